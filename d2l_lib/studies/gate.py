"""The gate: when an adapter stays out of an answer.

    question -> relevance of each block -> the base model alone where no block is relevant enough

It costs one short forward pass per block and question (see `routing`). The study measures what it spoils: answers to
questions about the document.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from d2l_lib.adapter import Adapter
from d2l_lib.formats.checkpoints import SETTINGS
from d2l_lib.loading import find_checkpoint
from d2l_lib.model import DocToLoRA
from d2l_lib.records import read_json, write_json
from d2l_lib.routing import SHARE, Gate, _gate, leads_and_divergences
from d2l_lib.tasks import world
from d2l_lib.tasks.questions import disjoint_documents, one_hop_question

RULES = ("one threshold", "by what the base model knows")
SORTS = ("the document", "the encyclopedia", "nothing", "a contradiction")  # topics of questions
_THRESHOLDS = tuple(step / 2 for step in range(-8, 33))  # nats
_Sample = tuple[str, world.Question, Adapter]  # (one of SORTS, question, adapter)


# ---------------------------------------------------------------------------------------------------------- samples
def gate_samples(
    model: DocToLoRA, n: int, seed: int, split: str, facts: tuple[int, int] = (8, 40), per_document: int = 4
) -> pd.DataFrame:
    """`n` questions of each of SORTS on documents of `facts` (fewest, most) facts, a row per question and condition.

    Columns: about (one of SORTS), condition ("all blocks" or "routed"), question, answer, n_blocks, relevance and
    divergence (nats, each of the block where it is highest), knows (the base model does not say that it does not know),
    base_correct (the base model alone), correct (the adapter, no gate). For any threshold, the gate's answer is one of
    these two.
    """
    rng = random.Random(f"gate/{split}/{seed}")
    samples: list[_Sample] = []
    while len(samples) < 3 * n:
        document = world.draw_document(rng, split, rng.randint(*facts))
        (adapter,) = model.internalize_each([document.text])
        own = [world.question_about(rng, fact) for fact in rng.sample(document.facts, per_document)]
        nothing = [world.ask(rng, document, "unanswerable") for _ in own]
        samples += _of_sorts(adapter, own, [*world.encyclopedia_questions(rng, per_document)], nothing)
    for _ in range(n):
        document, ((placed, _),) = world.conflicting_document(rng, rng.randint(*facts) - 1, 1, split)
        question = world.question_about(rng, placed)
        samples.append((SORTS[3], question, *model.internalize_each([document.text])))
    return _gate_rows(model, samples)


def many_documents_samples(
    model: DocToLoRA, n: int, seed: int, split: str, count: int = 64, per_adapter: int = 16
) -> pd.DataFrame:
    """As `gate_samples`, for the first two SORTS, with `count` documents of five facts in one adapter.

    The documents share no names. One more column: single_document (whether the question's own document alone answers
    right in the same condition: all its blocks, or the most relevant of them).
    """
    rng = random.Random(f"gate, many documents/{split}/{seed}")
    samples: list[_Sample] = []
    alone: list[Adapter] = []
    while len(samples) < 2 * n:
        together = list(disjoint_documents(rng, count, 5, split))
        each = model.internalize_each({f"document {i}": document.text for i, document in enumerate(together)})
        places = [rng.randrange(count) for _ in range(per_adapter)]
        own = [one_hop_question(rng, together[place]) for place in places]
        samples += _of_sorts(sum(each), own, [*world.encyclopedia_questions(rng, per_adapter)])
        alone += [each[place] for place in places] * 2
    single = [(sort, question, own) for (sort, question, _), own in zip(samples, alone, strict=True)]
    return _gate_rows(model, samples).assign(single_document=_gate_rows(model, single)["correct"])


def _of_sorts(adapter: Adapter, *groups: Sequence[world.Question]) -> list[_Sample]:
    """Samples of the first SORTS, a group of questions each."""
    return [(sort, question, adapter) for sort, group in zip(SORTS, groups, strict=False) for question in group]


def _gate_rows(model: DocToLoRA, samples: Sequence[_Sample]) -> pd.DataFrame:
    sorts, questions, adapters = (list(column) for column in zip(*samples, strict=True))
    texts = [question.text for question in questions]
    both = leads_and_divergences(model, texts, adapters)
    scores = [lead + SHARE * divergence for lead, divergence in both]
    base = model.answer(texts, None)
    best = [_gate(adapter, score, -math.inf, 1) for adapter, score in zip(adapters, scores, strict=True)]
    rows = []
    for condition, chosen in {"all blocks": adapters, "routed": best}.items():
        for i, prediction in enumerate(model.answer(texts, chosen)):
            answer = questions[i].answer
            rows.append(
                {"condition": condition, "about": sorts[i], "question": texts[i], "answer": answer}
                | {"n_blocks": len(scores[i]), "relevance": float(scores[i].max())}
                | {"divergence": float(both[i][1].max()), "knows": base[i] != world.UNKNOWN}
                | {"base_correct": base[i] == answer, "correct": prediction == answer}
            )
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------------- thresholds
def gate_curve(
    samples: pd.DataFrame,
    thresholds: Sequence[float] = _THRESHOLDS,
    score: str = "relevance",
    least: float | None = None,
) -> pd.DataFrame:
    """What each threshold costs: condition, least (the threshold, nats), and the columns of `_gate_scores`.

    score: the column that has to reach the threshold.
    least: the threshold of questions that the base model has no answer to (None: the same).
    """
    rows = []
    for condition, group in samples.groupby("condition", sort=False):
        if not {SORTS[0], SORTS[1]} <= set(group["about"]):
            continue
        for threshold in thresholds:
            passes = group[score] >= (threshold if least is None else _stricter(group, least, threshold))
            rows.append({"condition": condition, "least": threshold} | _gate_scores(group, passes))
    return pd.DataFrame(rows)


def _gate_scores(samples: pd.DataFrame, passes: pd.Series) -> dict[str, float]:
    """Scores of a gate that lets the adapter answer where `passes` holds.

    unrelated, answerable, unanswerable, override: exact match on questions about the encyclopedia, the document,
        nothing, and a contradiction, where the document's value is right (NaN without such questions).
    unrelated_loss: relative to the base model.
    answerable_loss, override_loss: relative to no gate.
    n: questions of each sort.
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
    """The threshold of each question: max(`known`, `least`) if the base model knows an answer, else `least`."""
    return np.where(samples["knows"], np.maximum(known, least), least)


def _loss(before: float, after: float) -> float:
    """The relative loss of a score; 0 if there was nothing to lose."""
    return (before - after) / before if before else 0.0


def best_threshold(curve: pd.DataFrame, condition: str, allowed: float = 0.01) -> float:
    """The threshold with the least unrelated loss that costs answerable questions at most `allowed`.

    Of several it is the lowest. ValueError if every threshold costs more.
    """
    rows = curve[curve["condition"] == condition].sort_values("least")
    harmless = rows[rows["answerable_loss"] <= allowed]
    if harmless.empty:
        raise ValueError(f"every threshold costs {condition} more than {allowed:.0%} of its answers: try lower ones")
    return float(harmless.loc[harmless["unrelated_loss"].idxmin(), "least"])


def _lowest_that_spares(curve: pd.DataFrame, allowed: float = 0.005) -> float:
    """The lowest threshold that loses at most `allowed` of the encyclopedia questions; ValueError if there is none."""
    sparing = curve[curve["unrelated_loss"] <= allowed]
    if sparing.empty:
        raise ValueError(f"every threshold loses more than {allowed:.1%} of the encyclopedia: try higher ones")
    return float(sparing["least"].min())


def _line(sizes: Mapping[int, float], thresholds: Mapping[int, float]) -> tuple[float, float]:
    """(a, b) of a + b * size, through the thresholds at two sizes."""
    one, many = sizes
    growth = (thresholds[many] - thresholds[one]) / (sizes[many] - sizes[one])
    return thresholds[one] - growth * sizes[one], growth


def _log_blocks(samples: pd.DataFrame) -> pd.Series:
    return samples["n_blocks"].map(math.log2)


# ------------------------------------------------------------------------------------------------------- the records
def measure_gate(model: DocToLoRA, n: int, seed: int, many: int = 64) -> tuple[pd.DataFrame, pd.DataFrame, Gate]:
    """The gate on validation and test documents: (curves, ideas, the gate that validation gives).

    n: questions of each sort with one document; half as many with `many` documents in one adapter.

    Curves: `gate_curve` by split, documents and rule. The first rule is one threshold for all questions; the second has
    a stricter one for questions that the base model can answer. `chosen` marks validation's threshold. single_document
    is exact match with each question's own document alone, in the same condition and without a gate. Ideas: see
    `_ideas`.

    Where the base model knows an answer, a stricter threshold costs no answerable question (but contradictions). It is
    the lowest that loses at most 0.5% of the encyclopedia on validation.
    """
    samples = {}
    for split in ("validation", "test"):
        samples[split, 1] = gate_samples(model, n, seed, split)
        samples[split, many] = many_documents_samples(model, max(1, n // 2), seed, split, many)
    routed = {place: rows[rows["condition"] == "routed"] for place, rows in samples.items()}
    plain = {place: gate_curve(rows) for place, rows in samples.items()}
    one_by_one = plain["validation", 1]
    chosen = {condition: best_threshold(one_by_one, condition) for condition in one_by_one["condition"].unique()}
    apart = {place: gate_curve(rows, least=chosen["routed"]) for place, rows in routed.items()}
    known = {documents: _lowest_that_spares(apart["validation", documents]) for documents in (1, many)}
    sizes = {documents: float(_log_blocks(routed["validation", documents]).mean()) for documents in known}
    grown = {documents: best_threshold(plain["validation", documents], "routed") for documents in known}
    gate = Gate(*_line(sizes, known), world.UNKNOWN)
    divergence = best_threshold(gate_curve(routed["validation", 1], score="divergence"), "routed")
    lines = [(divergence, 0.0), (chosen["routed"], 0.0), _line(sizes, grown), (gate.known, gate.growth)]
    ideas = _ideas({documents: routed["test", documents] for documents in sizes}, lines, chosen["routed"])

    curves = []
    for (split, documents), rows in samples.items():
        own = rows[rows["about"] == SORTS[0]].groupby("condition")
        single = own["single_document" if "single_document" in rows else "correct"].mean()
        for rule, curve in zip(RULES, (plain[split, documents], apart[split, documents]), strict=True):
            best = curve["condition"].map(chosen) if rule == RULES[0] else known[documents]
            facts = {"rule": rule, "split": split, "documents": documents}
            alone = curve["condition"].map(single)
            curves.append(curve.assign(**facts, single_document=alone, chosen=curve["least"] == best))
    return pd.concat(curves, ignore_index=True), ideas, gate


def _ideas(samples: Mapping[int, pd.DataFrame], lines: Sequence[tuple[float, float]], least: float) -> pd.DataFrame:
    """Scores of four gates by number of documents; the threshold is at_one_block + growth * log2(n_blocks) nats.

    `lines` gives (at_one_block, growth) of each: divergence, one threshold for the divergence alone; relevance, one for
    `routing.relevance`; "more for more blocks", a threshold that grows; "more where the base model knows", a
    `routing.Gate`, and `least` where it does not know.
    """
    names = ("divergence", "relevance", "relevance, more for more blocks", "relevance, more where the base model knows")
    table = []
    for documents, rows in samples.items():
        for idea, (start, growth) in zip(names, lines, strict=True):
            thresholds = start + growth * _log_blocks(rows)
            thresholds = _stricter(rows, least, thresholds) if idea == names[-1] else thresholds
            passes = rows["divergence" if idea == "divergence" else "relevance"] >= thresholds
            facts = {"idea": idea, "at_one_block": start, "growth": growth, "documents": documents}
            table.append(facts | _gate_scores(rows, passes))
    return pd.DataFrame(table)


def keep_thresholds(folder: Path, least: float, gate: Gate | None = None) -> None:
    """Write the threshold, and the gate, into a model's folder; ValueError for a published checkpoint file."""
    from d2l_lib.formats.schemas import CheckpointSettings, check

    if not folder.is_dir():
        raise ValueError(f"{folder} is a published checkpoint and cannot keep a threshold: model.save a folder first")
    settings = read_json(folder / SETTINGS)
    check(CheckpointSettings, settings, folder / SETTINGS, "model.save the folder again")
    chosen = {"least_relevance": least} | ({} if gate is None else {"gate": asdict(gate)})
    settings["meta"] = settings.get("meta", {}) | chosen
    write_json(folder / SETTINGS, settings)


def run(model: DocToLoRA, n: int, seed: int, keep: str | None) -> dict[str, pd.DataFrame]:
    """The records: curves and ideas of `measure_gate`; the folder of model `keep` takes the thresholds."""
    table, ideas, gate = measure_gate(model, n, seed)
    if keep is not None:
        chosen = table[table["chosen"] & (table["condition"] == "routed")]
        keep_thresholds(find_checkpoint(keep), float(chosen["least"].iloc[0]), gate)
    return {"gate": table, "gate_ideas": ideas}
