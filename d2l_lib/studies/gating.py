"""Do no harm, and override: when an adapter stays out of an answer, and how strongly it speaks.

    gate:  question -> relevance of each block -> the base model alone where no block is relevant enough
    dial:  adapter  -> its blocks count more or less, in all layers or in some

The gate costs one short forward pass per block and question (see `routing`), the dial nothing. Each is measured against
what it spoils: the gate against questions that a document answers, the dial against what a document does not mention.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from d2l_lib import arguments as options
from d2l_lib.adapter import Adapter, scaled_layers
from d2l_lib.formats.checkpoints import SETTINGS
from d2l_lib.loading import find_checkpoint, load
from d2l_lib.model import DocToLoRA
from d2l_lib.records import one_line_errors, project_root, read_json, write_json, write_jsonl
from d2l_lib.routing import SHARE, Gate, _gate, gated, leads_and_divergences, most_relevant
from d2l_lib.tasks import world
from d2l_lib.tasks.questions import disjoint_documents, one_hop_question
from d2l_lib.tasks.scores import summarise, wilson

# ------------------------------------------------------------------------------------------------------------ the gate
RULES = ("one threshold", "by what the base model knows")
THRESHOLDS = tuple(step / 2 for step in range(-8, 33))  # nats
SORTS = ("the document", "the encyclopedia", "nothing", "a contradiction")  # what questions are about


def gate_samples(
    model: DocToLoRA, n: int, seed: int, split: str, facts: tuple[int, int] = (8, 40), per_document: int = 4
) -> pd.DataFrame:
    """`n` questions that a document answers, `n` about the encyclopedia and `n` that nothing answers, each asked with a
    document of `facts` facts of `split` inside, and `n` about what a document of as many facts says against the
    encyclopedia: one row per question and condition.

    Columns: about (one of SORTS), condition ("all blocks" or "routed"), question, answer, n_blocks, relevance and
    divergence (nats, of the block where it is highest), knows (the base model does not say that it does not know),
    base_correct (the base model alone), correct (the adapter, no gate). Whatever the threshold, the gate's answer is
    one of these two.
    """
    rng = random.Random(f"gate/{split}/{seed}")
    asked: list[world.Question] = []
    about, adapters = [], []
    while len(asked) < 3 * n:
        document = world.draw_document(rng, split, rng.randint(*facts))
        (adapter,) = model.internalize_each([document.text])
        own = [world.question_about(rng, fact) for fact in rng.sample(document.facts, per_document)]
        nothing = [world.ask(rng, document, "unanswerable") for _ in own]
        asked += [*own, *world.encyclopedia_questions(rng, per_document), *nothing]
        about += [sort for sort in SORTS[:3] for _ in own]
        adapters += [adapter] * (3 * per_document)
    for _ in range(n):
        document, ((placed, _),) = world.conflicting_document(rng, rng.randint(*facts) - 1, 1, split)
        asked.append(world.question_about(rng, placed))
        about.append(SORTS[3])
        adapters += model.internalize_each([document.text])
    return _gate_rows(model, asked, adapters, about=about)


def many_documents_samples(
    model: DocToLoRA, n: int, seed: int, split: str, count: int = 64, n_facts: int = 5, per_adapter: int = 16
) -> pd.DataFrame:
    """The same with `count` documents of `n_facts` facts, which share no names, in one adapter.

    One more column: single_document (whether the adapter of the question's own document, all blocks of it, answers
    right).
    """
    rng = random.Random(f"gate, many documents/{split}/{seed}")
    asked: list[world.Question] = []
    about, adapters, alone = [], [], []
    while len(asked) < 2 * n:
        together = list(disjoint_documents(rng, count, n_facts, split))
        each = model.internalize_each({f"document {i}": document.text for i, document in enumerate(together)})
        places = [rng.randrange(count) for _ in range(per_adapter)]
        asked += [one_hop_question(rng, together[place]) for place in places]
        asked += world.encyclopedia_questions(rng, per_adapter)
        about += [sort for sort in SORTS[:2] for _ in places]
        adapters += [sum(each)] * (2 * per_adapter)
        alone += [each[place] for place in places] * 2
    rows = _gate_rows(model, asked, adapters, about=about)
    said = model.answer([question.text for question in asked], alone)
    single = [answer == question.answer for answer, question in zip(said, asked, strict=True)]
    return rows.assign(single_document=single * rows["condition"].nunique())


def _gate_rows(
    model: DocToLoRA, asked: Sequence[world.Question], adapters: Sequence[Adapter], about: Sequence[str]
) -> pd.DataFrame:
    texts = [question.text for question in asked]
    both = leads_and_divergences(model, texts, adapters)
    scores = [lead + SHARE * divergence for lead, divergence in both]
    base = model.answer(texts, None)
    best = [_gate(adapter, score, -math.inf, 1) for adapter, score in zip(adapters, scores, strict=True)]
    rows = []
    for condition, chosen in {"all blocks": list(adapters), "routed": best}.items():
        said = model.answer(texts, chosen)
        for i, (question, answer) in enumerate(zip(asked, said, strict=True)):
            rows.append(
                {"condition": condition, "about": about[i], "question": question.text, "answer": question.answer}
                | {"n_blocks": len(scores[i]), "relevance": float(scores[i].max())}
                | {"divergence": float(both[i][1].max()), "knows": base[i] != world.UNKNOWN}
                | {"base_correct": base[i] == question.answer, "correct": answer == question.answer}
            )
    return pd.DataFrame(rows)


def gate_curve(
    samples: pd.DataFrame,
    thresholds: Sequence[float] = THRESHOLDS,
    score: str = "relevance",
    least: float | None = None,
) -> pd.DataFrame:
    """What each threshold costs: one row per condition and threshold.

    score: the column that has to reach it. least: the thresholds are for questions that the base model has an answer
    of its own to; for the others this one holds.

    Columns: condition, least (nats: the threshold), and those of `gate_scores`.
    """
    rows = []
    for condition, group in samples.groupby("condition", sort=False):
        if not {SORTS[0], SORTS[1]} <= set(group["about"]):
            continue
        for threshold in thresholds:
            limit = threshold if least is None else _stricter(group, least, threshold)
            rows.append({"condition": condition, "least": threshold} | gate_scores(group, group[score] >= limit))
    return pd.DataFrame(rows)


def gate_scores(samples: pd.DataFrame, passes: pd.Series) -> dict[str, float]:
    """What a gate costs that lets the adapter answer where `passes` holds: unrelated, answerable, unanswerable and
    override (exact match on questions about the encyclopedia, the document, nothing, and a contradiction, where the
    document's value is right; NaN where none were asked), unrelated_loss (relative to the base model), answerable_loss
    and override_loss (relative to no gate), n (questions of each sort).
    """
    right = samples["correct"].where(passes, samples["base_correct"]).astype(float)
    score = {sort: right[samples["about"] == sort].mean() for sort in SORTS}
    plain = samples.groupby("about")[["base_correct", "correct"]].mean()
    return {
        "unrelated": score[SORTS[1]],
        "answerable": score[SORTS[0]],
        "unanswerable": score[SORTS[2]],
        "override": score[SORTS[3]],
        "unrelated_loss": _loss(plain["base_correct"][SORTS[1]], score[SORTS[1]]),
        "answerable_loss": _loss(plain["correct"][SORTS[0]], score[SORTS[0]]),
        "override_loss": _loss(plain["correct"].get(SORTS[3], math.nan), score[SORTS[3]]),
        "n": int((samples["about"] == SORTS[1]).sum()),
    }


def _stricter(samples: pd.DataFrame, least: float, known: float | pd.Series) -> np.ndarray:
    """The threshold of each question: `known`, if it is higher than `least`, where the base model knows an answer."""
    return np.where(samples["knows"], np.maximum(known, least), least)


def _loss(before: float, after: float) -> float:
    """The relative loss of a score; 0 where there was nothing to lose."""
    return (before - after) / before if before else 0.0


def best_threshold(curve: pd.DataFrame, condition: str, allowed: float = 0.01) -> float:
    """The threshold with the least unrelated loss, among those that cost answerable questions at most `allowed`; the
    lowest one of several.
    """
    rows = curve[curve["condition"] == condition].sort_values("least")
    harmless = rows[rows["answerable_loss"] <= allowed]
    if harmless.empty:
        raise ValueError(f"every threshold costs {condition} more than {allowed:.0%} of its answers: try lower ones")
    return float(harmless.loc[harmless["unrelated_loss"].idxmin(), "least"])


# ------------------------------------------------------------------------------------------------ what routing ranks by
SHARES = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, math.inf)


def measure_shares(
    model: DocToLoRA, n: int, seed: int, split: str = "validation", many: int = 64, shares: Sequence[float] = SHARES
) -> pd.DataFrame:
    """Exact match with the most relevant block alone, for each share of the divergence in `routing.relevance`: one row
    per share and condition; columns condition, share (as text; "divergence alone" for infinity), n, exact_match, low,
    high.

    Conditions: `n` one-hop and `n` paraphrased questions on documents of 8 to 40 facts, and `n` one-hop questions with
    `many` documents of 5 facts in one adapter.
    """
    rng = random.Random(f"routing/{split}/{seed}")
    asked: list[tuple[str, world.Question, Adapter]] = []
    while len(asked) < 2 * n:
        document = world.draw_document(rng, split, rng.randint(8, 40))
        (adapter,) = model.internalize_each([document.text])
        for fact in rng.sample(document.facts, 2):
            asked.append(("one hop", world.question_about(rng, fact), adapter))
            if (other := world.ask(rng, document, "paraphrase")) is not None:
                asked.append(("paraphrase", other, adapter))
    for _ in range(math.ceil(n / 16)):
        together = list(disjoint_documents(rng, many, 5, split))
        each = model.internalize_each({f"document {i}": document.text for i, document in enumerate(together)})
        adapter = sum(each)
        for _ in range(16):
            asked.append((f"{many} documents", one_hop_question(rng, rng.choice(together)), adapter))
    texts, adapters = [question.text for _, question, _ in asked], [adapter for _, _, adapter in asked]
    both = leads_and_divergences(model, texts, adapters)
    rows = []
    for share in shares:
        scores = [divergence if math.isinf(share) else lead + share * divergence for lead, divergence in both]
        routed = [most_relevant(adapter, score, 1) for adapter, score in zip(adapters, scores, strict=True)]
        for (condition, question, _), said in zip(asked, model.answer(texts, routed), strict=True):
            name = "divergence alone" if math.isinf(share) else f"{share:g}"
            rows.append({"share": name, "condition": condition, "correct": said == question.answer})
    return summarise(pd.DataFrame(rows), ["condition", "share"])


# ------------------------------------------------------------------------------------------------------------ the dial
WEIGHTS = (0.0, 0.5, 1.0, 1.25, 1.5, 2.0, 3.0)


def dial_samples(
    model: DocToLoRA, n: int, seed: int, split: str, weights: Sequence[float] = WEIGHTS, n_facts: int = 5
) -> pd.DataFrame:
    """`n` documents of `n_facts` facts, one of which contradicts the encyclopedia, at each strength of their blocks.

    Three questions each: about the contradiction, about another fact of the document, and about another fact of the
    encyclopedia. Columns: layers ("all layers", or "layer 2" where only that one is turned), weight, gate (whether
    `gated` chose who answers; for all layers only), about ("the contradiction", "the document", "the encyclopedia"),
    question, prediction, correct (the document's value for the contradiction), believed (the answer is the
    encyclopedia's value).
    """
    rng = random.Random(f"dial/{split}/{seed}")
    asked: dict[str, list[world.Question]] = {"the contradiction": [], "the document": [], "the encyclopedia": []}
    texts, believed = [], []
    for _ in range(n):
        document, ((placed, fact),) = world.conflicting_document(rng, n_facts - 1, 1, split)
        other = rng.choice([f for f in document.facts if f is not placed])
        elsewhere = next(
            question for question in world.encyclopedia_questions(rng, 1000) if fact.subject not in question.text
        )
        asked["the contradiction"].append(world.question_about(rng, placed))
        asked["the document"].append(world.question_about(rng, other))
        asked["the encyclopedia"].append(elsewhere)
        texts.append(document.text)
        believed.append(fact.value)
    adapters = model.internalize_each(texts)
    everything = [question for questions in asked.values() for question in questions]
    topics = [topic for topic, questions in asked.items() for _ in questions]
    beliefs = [*believed, *[None] * (2 * n)]
    prompts = [question.text for question in everything]
    rows = []
    for layers, turned in _turned(adapters[0].n_layers).items():
        for weight in weights:
            if layers != "all layers" and weight == 1:
                continue  # the same as in all layers
            strong = [scaled_layers(adapter, dict.fromkeys(turned, weight)) for adapter in adapters] * 3
            ways = {False: strong}
            if layers == "all layers":  # one threshold, for the document is to override what the base model knows
                ways[True] = gated(model, prompts, strong, least=model.least_relevance)
            for gate, chosen in ways.items():
                said = model.answer(prompts, chosen)
                for question, topic, belief, answer in zip(everything, topics, beliefs, said, strict=True):
                    rows.append(
                        {"layers": layers, "weight": weight, "gate": gate, "about": topic, "question": question.text}
                        | {"prediction": answer, "correct": answer == question.answer, "believed": answer == belief}
                    )
    return pd.DataFrame(rows)


def _turned(n_layers: int) -> dict[str, list[int]]:
    """Which layers the dial turns, by name."""
    return {"all layers": list(range(n_layers))} | {f"layer {layer}": [layer] for layer in range(n_layers)}


def dial_curve(samples: pd.DataFrame) -> pd.DataFrame:
    """Shares by layers, weight and gate, one row each: override (the document's value is said), believed (the
    encyclopedia's), document (other facts of the document), unrelated (other facts of the encyclopedia); their 95%
    Wilson intervals (override_low, ...); n questions of each sort.
    """
    rows = []
    for (layers, weight, gate), group in samples.groupby(["layers", "weight", "gate"], sort=False):
        parts = dict(list(group.groupby("about")))
        hits = {
            "override": parts["the contradiction"]["correct"],
            "believed": parts["the contradiction"]["believed"],
            "document": parts["the document"]["correct"],
            "unrelated": parts["the encyclopedia"]["correct"],
        }
        row = {"layers": layers, "weight": float(weight), "gate": bool(gate), "n": len(parts["the contradiction"])}
        for name, right in hits.items():
            low, high = wilson(int(right.sum()), len(right))
            row |= {name: float(right.mean()), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def best_strength(curve: pd.DataFrame, gate: bool, allowed: float = 0.01) -> tuple[str, float]:
    """(layers, weight) with the largest share of overriding answers, among those that lose at most `allowed` of the
    document's other facts and of the encyclopedia against weight 1.
    """
    rows = curve[curve["gate"] == gate]
    plain = rows[(rows["layers"] == "all layers") & (rows["weight"] == 1)].iloc[0]
    harmless = rows[
        (rows["document"] >= plain["document"] - allowed) & (rows["unrelated"] >= plain["unrelated"] - allowed)
    ]
    best = harmless.loc[harmless["override"].idxmax()]
    return best["layers"], best["weight"]


# --------------------------------------------------------------------------------------------------------- the command
def measure_gate(model: DocToLoRA, n: int, seed: int, many: int = 64) -> tuple[pd.DataFrame, pd.DataFrame, Gate]:
    """The gate with `n` questions of each sort and one document inside, and with half as many and `many` documents in
    one adapter, on validation and on test documents: (curves, ideas, the gate that was found).

    Curves: `gate_curve` by split, documents and rule (RULES): one threshold for all questions, and one for those that
    the base model has an answer to, where the others keep the first rule's. `chosen` marks the threshold that is taken
    on validation documents; single_document is exact match where each question's own document is inside alone, all
    blocks answering. Ideas: what each way to gate comes to on test documents, routed, with what it takes from
    validation, at_one_block + growth * log2(n_blocks) nats:

    - divergence: one threshold for the divergence alone
    - relevance: one threshold for `routing.relevance`
    - relevance, more for more blocks: one that grows with log2(n_blocks)
    - relevance, more where the base model knows: one threshold where it does not, a routing.Gate where it does

    Lines go through what the two sizes take. Where the base model knows an answer a stricter threshold costs no
    answerable question (but contradictions), so the lowest that loses at most half a per cent of the encyclopedia on
    validation is taken.
    """
    parts = {}
    for split in ("validation", "test"):
        parts[split, 1] = gate_samples(model, n, seed, split)
        parts[split, many] = many_documents_samples(model, max(1, n // 2), seed, split, many)
    routed = {place: samples[samples["condition"] == "routed"] for place, samples in parts.items()}
    plain = {place: gate_curve(samples) for place, samples in parts.items()}
    one_by_one = plain["validation", 1]
    chosen = {condition: best_threshold(one_by_one, condition) for condition in one_by_one["condition"].unique()}
    apart = {place: gate_curve(samples, least=chosen["routed"]) for place, samples in routed.items()}
    known = {documents: _lowest_that_spares(apart["validation", documents]) for documents in (1, many)}
    sizes = {documents: float(_log_blocks(routed["validation", documents]).mean()) for documents in known}
    grown = {documents: best_threshold(plain["validation", documents], "routed") for documents in known}
    gate = Gate(*_line(sizes, known), world.UNKNOWN)

    curves = []
    for (split, documents), samples in parts.items():
        own = samples[(samples["about"] == SORTS[0]) & (samples["condition"] == "all blocks")]
        single = float(own["single_document" if "single_document" in own else "correct"].mean())
        for rule, curve in zip(RULES, (plain[split, documents], apart[split, documents]), strict=True):
            best = curve["condition"].map(chosen) if rule == RULES[0] else known[documents]
            facts = {"rule": rule, "split": split, "documents": documents, "single_document": single}
            curves.append(curve.assign(**facts, chosen=curve["least"] == best))

    divergence = best_threshold(gate_curve(routed["validation", 1], score="divergence"), "routed")
    ideas = {  # what has to reach the threshold, the threshold's line, the threshold where the base model knows nothing
        "divergence": ("divergence", (divergence, 0.0), None),
        "relevance": ("relevance", (chosen["routed"], 0.0), None),
        "relevance, more for more blocks": ("relevance", _line(sizes, grown), None),
        "relevance, more where the base model knows": ("relevance", (gate.known, gate.growth), chosen["routed"]),
    }
    rows = []
    for documents in sizes:
        samples = routed["test", documents]
        for idea, (score, (start, growth), least) in ideas.items():
            limits = start + growth * _log_blocks(samples)
            limits = limits if least is None else _stricter(samples, least, limits)
            facts = {"idea": idea, "at_one_block": start, "growth": growth, "documents": documents}
            rows.append(facts | gate_scores(samples, samples[score] >= limits))
    return pd.concat(curves, ignore_index=True), pd.DataFrame(rows), gate


def _lowest_that_spares(curve: pd.DataFrame, allowed: float = 0.005) -> float:
    """The lowest threshold that loses at most `allowed` of the questions about the encyclopedia."""
    sparing = curve[curve["unrelated_loss"] <= allowed]
    if sparing.empty:
        raise ValueError(f"every threshold loses more than {allowed:.1%} of the encyclopedia: try higher ones")
    return float(sparing["least"].min())


def _line(sizes: Mapping[int, float], thresholds: Mapping[int, float]) -> tuple[float, float]:
    """(a, b) of a + b * size, from the thresholds found at two sizes."""
    one, many = sizes
    growth = (thresholds[many] - thresholds[one]) / (sizes[many] - sizes[one])
    return thresholds[one] - growth * sizes[one], growth


def _log_blocks(samples: pd.DataFrame) -> pd.Series:
    return samples["n_blocks"].map(math.log2)


def keep_thresholds(folder: Path, least: float, gate: Gate | None = None) -> None:
    """Write the threshold, and the gate, into a model's folder: its `model.least_relevance` and `model.gate` from then
    on.

    ValueError for a published checkpoint file, which has no place for it.
    """
    from d2l_lib.formats.schemas import CheckpointSettings, check

    if not folder.is_dir():
        raise ValueError(f"{folder} is a published checkpoint and cannot keep a threshold: model.save a folder first")
    settings = read_json(folder / SETTINGS)
    check(CheckpointSettings, settings, folder / SETTINGS, "model.save the folder again")
    chosen = {"least_relevance": least} | ({} if gate is None else {"gate": asdict(gate)})
    settings["meta"] = settings.get("meta", {}) | chosen
    write_json(folder / SETTINGS, settings)


@one_line_errors("gating")
def main() -> None:
    """Routing, gate and dial of a bundled model, recorded in data/full_runs (routing.jsonl, gate.jsonl,
    gate_ideas.jsonl, conflict_dial.jsonl) with seed, n and command.
    """
    parser = options.Parser(description=main.__doc__)
    parser.add_argument("what", nargs="?", choices=("routing", "gate", "dial", "all"), default="all")
    parser.add_argument("--model", default="tiny/qa", help="bundled name, or a folder")
    parser.add_argument("--n", type=options.count, default=400, help="questions of each sort and split")
    parser.add_argument("--seed", type=options.seed, default=0)
    parser.add_argument("--keep", action="store_true", help="write the gate's thresholds into the model's folder")
    a = parser.parse_args()
    facts = {"seed": a.seed, "command": " ".join(["python -m d2l_lib.studies.gating", *sys.argv[1:]])}
    folder = project_root() / "data" / "full_runs"
    model = load(a.model)
    if a.what in ("routing", "all"):
        table = measure_shares(model, a.n // 2, a.seed).assign(**facts)
        write_jsonl(folder / "routing.jsonl", table.to_dict("records"))
        print(table.drop(columns="command").to_string())
    if a.what in ("gate", "all"):
        table, ideas, gate = measure_gate(model, a.n, a.seed)
        for name, rows in {"gate": table, "gate_ideas": ideas}.items():
            rows = rows.assign(**facts)
            write_jsonl(folder / f"{name}.jsonl", rows.astype(object).where(rows.notna(), None).to_dict("records"))
            print((rows[rows["chosen"]] if "chosen" in rows else rows).drop(columns="command").to_string())
        if a.keep:
            chosen = table[table["chosen"] & (table["condition"] == "routed")]
            keep_thresholds(find_checkpoint(a.model), float(chosen["least"].iloc[0]), gate)
            model = load(a.model)
    if a.what in ("dial", "all"):
        curves = []
        for split in ("validation", "test"):
            curve = dial_curve(dial_samples(model, a.n, a.seed, split)).assign(split=split)
            if split == "validation":
                chosen = {gate: best_strength(curve, gate) for gate in (False, True)}
            at = [chosen[gate] for gate in curve["gate"]]
            marks = [
                pair == best for pair, best in zip(zip(curve["layers"], curve["weight"], strict=True), at, strict=True)
            ]
            curves.append(curve.assign(chosen=marks, **facts))
        table = pd.concat(curves, ignore_index=True)
        write_jsonl(folder / "conflict_dial.jsonl", table.to_dict("records"))
        print(table[table["chosen"] | (table["weight"] == 1)].to_string())


if __name__ == "__main__":
    main()
