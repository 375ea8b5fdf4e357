"""Do no harm, and override: when an adapter stays out of an answer, and how strongly it speaks.

    gate:  question -> relevance of each block -> the base model alone where no block is relevant enough
    dial:  adapter  -> its blocks count more or less, in all layers or in some

The gate costs one short forward pass per block and question (see `routing`), the dial nothing. Each is measured against
what it spoils: the gate against questions that a document answers, the dial against what a document does not mention.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from torch import Tensor

from . import world
from .adapter import Adapter
from .checkpoints import SETTINGS
from .documents import check_count
from .evaluation import summarise, wilson
from .model import DocToLoRA, find_checkpoint, load
from .probes import one_hop_question, strangers, sum_of
from .records import project_root, read_json, write_json, write_jsonl
from .routing import most_relevant, relevance


def gated(
    model: DocToLoRA,
    questions: Sequence[str],
    adapters: Adapter | None | Sequence[Adapter | None],
    *,
    least: float | None = None,
    blocks: int | None = 1,
    system: str = "",
) -> list[Adapter | None]:
    """For each question the adapter to answer it with, for `model.answer`: None, the base model, where no block is
    relevant.

    A block counts as relevant from `least` nats on (`routing.relevance`; None: `model.least_relevance`). Of those the
    `blocks` most relevant answer, together with the bias; blocks=None: where one is relevant, the whole adapter
    answers. ValueError where the numbers of questions and adapters differ.
    """
    least = model.least_relevance if least is None else least
    if blocks is not None:
        check_count(blocks, "blocks")
    per_question = list(adapters) if isinstance(adapters, (list, tuple)) else [adapters] * len(questions)
    if len(per_question) != len(questions):
        raise ValueError(
            f"{len(questions)} questions but {len(per_question)} adapters: give one for all or one per question"
        )
    asked = [place for place, adapter in enumerate(per_question) if adapter is not None]
    scores = relevance(model, [questions[i] for i in asked], [per_question[i] for i in asked], system=system)
    chosen: list[Adapter | None] = [None] * len(questions)
    for place, score in zip(asked, scores, strict=True):
        chosen[place] = _gate(per_question[place], score, least, blocks)
    return chosen


def _gate(adapter: Adapter, scores: Tensor, least: float, blocks: int | None) -> Adapter | None:
    """What answers where the adapter's blocks have these relevances."""
    relevant = most_relevant(adapter, scores, len(scores) if blocks is None else blocks, least)
    if not relevant.blocks:
        return None
    return adapter if blocks is None else relevant


def scaled_layers(adapter: Adapter, weights: Sequence[float] | Mapping[int, float]) -> Adapter:
    """The adapter with its blocks counting weights[layer] times in each layer; the bias stays.

    The update of W in layer l becomes scale * (weights[l] * sum over blocks of weight * B_l^T A_l + bias). weights: one
    per layer, or {layer: weight} with 1 for the others. Linear, and equal weights are `adapter.scaled(weight)`.
    ValueError for a layer that there is not, for too few or too many weights, and for one that is no finite number.
    """
    if isinstance(weights, Mapping):
        if unknown := sorted(layer for layer in weights if layer not in range(adapter.n_layers)):
            raise ValueError(f"no layer {unknown[0]} in this adapter: its layers are 0 to {adapter.n_layers - 1}")
        weights = [weights.get(layer, 1.0) for layer in range(adapter.n_layers)]
    weights = [float(weight) for weight in weights]
    if len(weights) != adapter.n_layers:
        raise ValueError(f"{len(weights)} weights for {adapter.n_layers} layers: give one per layer")
    if wrong := [weight for weight in weights if not math.isfinite(weight)]:
        raise ValueError(f"a layer's weight must be a finite number, not {wrong[0]}")

    def scale(A):
        return A * A.new_tensor(weights).view(-1, 1, 1)  # [n_layers, r, d_in]

    blocks = (replace(block, A={module: scale(A) for module, A in block.A.items()}) for block in adapter.blocks)
    return replace(adapter, blocks=tuple(blocks))


# ------------------------------------------------------------------------------------------------------------ the gate
THRESHOLDS = tuple(step / 2 for step in range(-8, 33))  # nats
SORTS = ("the document", "the encyclopedia", "nothing")  # what questions are about


def gate_samples(
    model: DocToLoRA, n: int, seed: int, split: str, facts: tuple[int, int] = (8, 40), per_document: int = 4
) -> pd.DataFrame:
    """`n` questions that a document answers, `n` about the encyclopedia and `n` that nothing answers, each asked with a
    document of `facts` facts of `split` inside: one row per question and condition.

    Columns: about (one of SORTS), condition ("all blocks" or "routed"), question, answer,
    relevance (nats, of the most relevant block), base_correct (the base model alone), correct (the adapter, no gate).
    Whatever the threshold, the gate's answer is one of these two.
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
        about += [sort for sort in SORTS for _ in own]
        adapters += [adapter] * (3 * per_document)
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
        together = list(strangers(rng, count, n_facts, split))
        each = model.internalize_each({f"document {i}": document.text for i, document in enumerate(together)})
        places = [rng.randrange(count) for _ in range(per_adapter)]
        asked += [one_hop_question(rng, together[place]) for place in places]
        asked += world.encyclopedia_questions(rng, per_adapter)
        about += [sort for sort in SORTS[:2] for _ in places]
        adapters += [sum_of(each)] * (2 * per_adapter)
        alone += [each[place] for place in places] * 2
    rows = _gate_rows(model, asked, adapters, about=about)
    said = model.answer([question.text for question in asked], alone)
    single = [answer == question.answer for answer, question in zip(said, asked, strict=True)]
    return rows.assign(single_document=single * rows["condition"].nunique())


def _gate_rows(
    model: DocToLoRA, asked: Sequence[world.Question], adapters: Sequence[Adapter], about: Sequence[str]
) -> pd.DataFrame:
    texts = [question.text for question in asked]
    scores = relevance(model, texts, adapters)
    base = model.answer(texts, None)
    best = [_gate(adapter, score, -math.inf, 1) for adapter, score in zip(adapters, scores, strict=True)]
    rows = []
    for condition, chosen in {"all blocks": list(adapters), "routed": best}.items():
        said = model.answer(texts, chosen)
        for question, topic, score, alone, answer in zip(asked, about, scores, base, said, strict=True):
            rows.append(
                {"condition": condition, "about": topic, "question": question.text, "answer": question.answer}
                | {"relevance": float(score.max()), "base_correct": alone == question.answer}
                | {"correct": answer == question.answer}
            )
    return pd.DataFrame(rows)


def gate_curve(samples: pd.DataFrame, thresholds: Sequence[float] = THRESHOLDS) -> pd.DataFrame:
    """What each threshold costs: one row per condition and threshold.

    Columns: condition, least (nats), unrelated, answerable and unanswerable (exact match on questions about the
    encyclopedia, the document and nothing; NaN where none were asked), unrelated_loss (relative to the base model),
    answerable_loss (relative to no gate), n (questions of each sort).
    """
    rows = []
    for condition, group in samples.groupby("condition", sort=False):
        answerable, unrelated, nothing = (group[group["about"] == sort] for sort in SORTS)
        if unrelated.empty or answerable.empty:
            continue
        for least in thresholds:
            kept, lost = (_with_gate(part, least).mean() for part in (answerable, unrelated))
            rows.append(
                {"condition": condition, "least": least, "unrelated": lost, "answerable": kept}
                | {"unanswerable": _with_gate(nothing, least).mean() if len(nothing) else math.nan}
                | {"unrelated_loss": _loss(unrelated["base_correct"].mean(), lost)}
                | {"answerable_loss": _loss(answerable["correct"].mean(), kept), "n": len(unrelated)}
            )
    return pd.DataFrame(rows)


def _with_gate(samples: pd.DataFrame, least: float) -> pd.Series:
    """Whether each question is answered right with the gate at this threshold."""
    return samples["correct"].where(samples["relevance"] >= least, samples["base_correct"]).astype(float)


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
        together = list(strangers(rng, many, 5, split))
        each = model.internalize_each({f"document {i}": document.text for i, document in enumerate(together)})
        adapter = sum_of(each)
        for _ in range(16):
            asked.append((f"{many} documents", one_hop_question(rng, rng.choice(together)), adapter))
    texts, adapters = [question.text for _, question, _ in asked], [adapter for _, _, adapter in asked]
    leads, divergences = (relevance(model, texts, adapters, share=share) for share in (0.0, math.inf))
    rows = []
    for share in shares:
        scores = [
            divergence if math.isinf(share) else lead + share * divergence
            for lead, divergence in zip(leads, divergences, strict=True)
        ]
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
            ways = {False: strong} | ({True: gated(model, prompts, strong)} if layers == "all layers" else {})
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
def measure_gate(model: DocToLoRA, n: int, seed: int, many: int = 64) -> pd.DataFrame:
    """The curve of one document on validation documents, which chooses a threshold for each condition (column
    `chosen`), then on test documents, and on test documents of which `many` are in one adapter (with a quarter of the
    questions). single_document: exact match where each question's own document is inside alone, all blocks answering.
    """
    parts = [
        gate_samples(model, n, seed, "validation").assign(split="validation", documents=1),
        gate_samples(model, n, seed, "test").assign(split="test", documents=1),
        many_documents_samples(model, max(1, n // 4), seed, "test", many).assign(split="test", documents=many),
    ]
    curves = []
    for samples in parts:
        curve = gate_curve(samples).assign(**samples[["split", "documents"]].iloc[0].to_dict())
        if not curves:
            chosen = {condition: best_threshold(curve, condition) for condition in curve["condition"].unique()}
        own = samples[(samples["about"] == "the document") & (samples["condition"] == "all blocks")]
        single = own["single_document" if "single_document" in own else "correct"].mean()
        marks = curve["least"] == curve["condition"].map(chosen)
        curves.append(curve.assign(single_document=float(single), chosen=marks))
    return pd.concat(curves, ignore_index=True)


def keep_least_relevance(folder: Path, least: float) -> None:
    """Write the threshold into a model's folder, whose `model.least_relevance` it is from then on.

    ValueError for a published checkpoint file, which has no place for it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is a published checkpoint and cannot keep a threshold: model.save a folder first")
    settings = read_json(folder / SETTINGS)
    settings["meta"]["least_relevance"] = least
    write_json(folder / SETTINGS, settings)


def main() -> None:
    """Routing, gate and dial of a bundled model, recorded in data/full_runs (routing.jsonl, gate.jsonl,
    conflict_dial.jsonl) with seed, n and command.
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("what", nargs="?", choices=("routing", "gate", "dial", "all"), default="all")
    parser.add_argument("--model", default="tiny/qa", help="bundled name, or a folder")
    parser.add_argument("--n", type=int, default=400, help="questions of each sort and split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="write the gate's threshold into the model's folder")
    a = parser.parse_args()
    facts = {"seed": a.seed, "command": " ".join(["python -m d2l_lib.gating", *sys.argv[1:]])}
    folder = project_root() / "data" / "full_runs"
    model = load(a.model)
    if a.what in ("routing", "all"):
        table = measure_shares(model, a.n // 2, a.seed).assign(**facts)
        write_jsonl(folder / "routing.jsonl", table.to_dict("records"))
        print(table.drop(columns="command").to_string())
    if a.what in ("gate", "all"):
        table = measure_gate(model, a.n, a.seed).assign(**facts)
        write_jsonl(folder / "gate.jsonl", table.astype(object).where(table.notna(), None).to_dict("records"))
        print(table[table["chosen"]].to_string())
        if a.keep:
            chosen = table[table["chosen"] & (table["condition"] == "routed")]
            keep_least_relevance(find_checkpoint(a.model), float(chosen["least"].iloc[0]))
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
