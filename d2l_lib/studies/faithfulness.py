"""Faithfulness of traces: scores of attribution methods against ablations and against ground truth.

    d2l study attribution --n 500        # data/full_runs/attribution.jsonl

The generated world tells which sentence answers a question, so a method's first unit is right or wrong. The other
scores need no ground truth: parts are removed, or added, in a method's order, and the answer is measured.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from d2l_lib.analysis.attribution import METHODS, Trials, attribute, leave_one_out, ranks
from d2l_lib.analysis.trust import (
    EVERY,
    area,
    chance_alike,
    curves,
    drawn,
    evidence_units,
    randomised,
    rank_correlation,
    sign_flip,
    subset_effects,
    without_sentence,
    worst_rank,
)
from d2l_lib.documents import check_texts, split_sentences
from d2l_lib.model import DocToLoRA
from d2l_lib.records import project_root, read_rows, write_jsonl
from d2l_lib.routing import route
from d2l_lib.tasks import world
from d2l_lib.tasks.scores import wilson

if TYPE_CHECKING:
    from d2l_lib.adapter import Adapter

SIZES = (8, 16, 24, 32, 40)  # sentences: documents of 8-16 and so on
_BATCH = 10  # questions
_MEASURES = ("deletion", "insertion", "comprehensiveness", "sufficiency", "correlation")


# -------------------------------------------------------------------------------------------------------- the samples
@dataclass(frozen=True)
class _Case:
    """A question, its document's adapter (and that of shuffled weights, where needed), and the row's facts."""

    document: world.Document
    question: world.Question
    adapter: Adapter
    shuffled: Adapter | None
    facts: dict
    seed: int


def study_one(
    model: DocToLoRA, batch: Sequence[tuple[world.Document, world.Question]], first: int, seed: int
) -> list[dict]:
    """Rows of a batch of questions: one per question and method, if all blocks or the routed one answer rightly.

    Columns: question (a number), hops, sentences, units, chance (probability that a random first unit is right),
    chance_alike (see there), all_blocks, routed (whether each answers rightly), method, rank (of the evidence; the
    later of two), rank_answer (of the sentence that states the answer), ms, and for methods of chunks _MEASURES.

    Every question has a row of the method "checks" (see `_checks`). For two hops rows also have rivals (other values of
    the same relation in the document) and in_context (whether the base model answers rightly). Slow measurements cover
    a part of the questions (see `EVERY`). Questions that only the routed block answers skip the methods that need
    curves.
    """
    texts = [document.text for document, _ in batch]
    questions = [question.text for _, question in batch]
    other = randomised(model, 10**6 * seed + first)
    adapters = model.internalize_each(texts)
    places = [place for place in range(len(batch)) if (first + place) % EVERY["randomised weights"] == 0]
    of_places = other.internalize_each([texts[place] for place in places]) if places else []
    shuffled = dict(zip(places, of_places, strict=True))
    predictions = {
        "all_blocks": model.answer(questions, adapters),
        "routed": model.answer(questions, route(model, questions, adapters, 1)),
    }
    if any(len(question.evidence) == 2 for _, question in batch):
        prompts = [f"{text}\n\n{question}" for text, question in zip(texts, questions, strict=True)]
        predictions["in_context"] = model.answer(prompts, None)
    rows: list[dict] = []
    for place, (document, question) in enumerate(batch):
        right = {how: answers[place] == question.answer for how, answers in predictions.items()}
        hops = len(question.evidence)
        facts = {"question": first + place, "hops": hops, "sentences": len(split_sentences(document.text))}
        facts |= {"all_blocks": right["all_blocks"], "routed": right["routed"]}
        if hops == 2:
            last = next(fact for fact in document.facts if fact.span == question.evidence[1])
            values = {fact.value for fact in document.facts if fact.relation == last.relation}
            facts |= {"rivals": len(values) - 1, "in_context": right["in_context"]}
        if right["all_blocks"] or (right["routed"] and hops == 1):
            case = _Case(document, question, adapters[place], shuffled.get(place), facts, seed + first + place)
            rows += _traces(model, other, case)
        else:
            rows.append(facts | {"method": "checks"})
    return rows


def _traces(model: DocToLoRA, other: DocToLoRA, case: _Case) -> list[dict]:
    """The rows of one question; other: the model of shuffled weights."""
    question, facts = case.question, case.facts
    ask = {"question": question.text, "answer": question.answer, "seed": case.seed, "controls": False}
    rows = []

    def is_due(name: str) -> bool:
        return facts["question"] % EVERY.get(name, 1) == 0

    def add(name: str, table: pd.DataFrame) -> None:
        cost = {"method": name, "units": len(table), "ms": 1000 * table.attrs["seconds"]}
        rows.append(facts | cost | _placing(table, case.document, question))

    whole = facts["all_blocks"]
    methods = METHODS["chunk"] if whole else ("leave_one_out", "add_one_in", "relevance", "random")
    tables = {name: attribute(model, case.adapter, **ask, method=name) for name in methods if is_due(name)}
    for name, table in tables.items():
        add(name, table)
    if whole:
        for row, measured in zip(rows, _measures(model, case, tables), strict=True):
            row |= measured
    by_sentence = ask | {"level": "sentence", "documents": case.document.text, "by_token": False}
    for name in ("leave_one_out", "gradient", "integrated_gradients") if whole else ("leave_one_out",):
        if is_due(f"{name}, sentences"):
            table = attribute(model, case.adapter, **by_sentence, method=name)
            add(f"{name}, sentences", table)
            if name == "leave_one_out":
                rows.append(_checks(model, case.document, question, table, facts, case.seed))
    for name in ("leave_one_out", "relevance") if is_due("randomised weights") else ():
        add(f"{name}, randomised weights", attribute(other, case.shuffled, **ask, method=name))
    return rows


def _measures(model: DocToLoRA, case: _Case, tables: dict[str, pd.DataFrame]) -> list[dict]:
    """_MEASURES of each method.

    deletion, insertion: areas under its curves.
    comprehensiveness, sufficiency: loss of the answer's probability without its first unit, and with that unit alone.
    correlation: rank correlation of predicted and true effects of random subsets.
    """
    trials = Trials(model, case.adapter, case.question.text, case.question.answer)
    orders = {
        name: sorted(range(len(table)), key=ranks(table["contribution"]).__getitem__) for name, table in tables.items()
    }
    traced = curves(trials, orders)
    masks, effects = subset_effects(trials, 24, torch.Generator().manual_seed(case.seed))
    rows = []
    for name, table in tables.items():
        predicted = masks.double() @ torch.tensor(table["contribution"].tolist(), dtype=torch.float64)
        own = dict(list(traced[traced["method"] == name].groupby("curve")))
        without, only = (own[c].set_index("units")["probability"] for c in ("deletion", "insertion"))
        rows.append(
            {"correlation": rank_correlation(predicted.tolist(), effects.tolist())}
            | {curve: area(own[curve]) for curve in ("deletion", "insertion")}
            | {"comprehensiveness": without[0] - without[1], "sufficiency": without[0] - only[1]}
        )
    return rows


def _placing(table: pd.DataFrame, document: world.Document, question: world.Question) -> dict:
    """The rank of the evidence in a method's contributions, and its chance level."""
    truth = evidence_units(table, question.evidence)
    contributions = table["contribution"]
    return {
        "rank": worst_rank(contributions, truth),
        "rank_answer": worst_rank(contributions, truth[-1:]),
        "chance": _chance(truth, len(table)),
        "chance_alike": chance_alike(contributions, table, document, question.evidence[-1]),
    }


def _chance(truth: Sequence[Sequence[int]], n_units: int) -> float:
    """The probability that a random order has the evidence sentence first, or both of two in the first three."""
    if len(truth) == 1:
        return len(truth[0]) / n_units
    return min(1.0, 6 / (n_units * (n_units - 1)))


def _checks(
    model: DocToLoRA, document: world.Document, question: world.Question, table: pd.DataFrame, facts: dict, seed: int
) -> dict:
    """Whether the answer stays right if a sentence is removed from the text, which is internalized again.

    top, other: the first of `table`, and a random one that is neither first nor evidence.
    bridge: for two hops, the first hop's, which names the subject of the second; also in context.
    """
    best = int(table["contribution"].to_numpy().argmax())
    evidence = {place for places in evidence_units(table, question.evidence) for place in places}
    rest = [place for place in range(len(table)) if place != best and place not in evidence]
    other = random.Random(f"other/{seed}").choice(rest)
    spans = {which: (table["start"][place], table["end"][place]) for which, place in (("top", best), ("other", other))}
    if facts["hops"] == 2:
        spans["bridge"] = question.evidence[0]
    texts = [without_sentence(document.text, *span) for span in spans.values()]
    questions, adapters = [question.text] * len(texts), model.internalize_each(texts)
    row = facts | {"method": "checks"}
    for how, chosen in (("all_blocks", adapters), ("routed", route(model, questions, adapters, 1))):
        for which, prediction in zip(spans, model.answer(questions, chosen), strict=True):
            row[f"{how}_without_{which}"] = prediction == question.answer
    if "bridge" in spans:
        prediction = model.answer(f"{texts[-1]}\n\n{question.text}", None)
        row["in_context_without_bridge"] = prediction == question.answer
    return row


def study(
    model: DocToLoRA,
    n: int,
    seed: int,
    folder: Path | None = None,
    *,
    kinds: Sequence[str] = world.ONE_HOP_KINDS,
    sentences: tuple[int, int] = (SIZES[0], SIZES[-1]),
) -> pd.DataFrame:
    """Samples (see `study_one`) of questions, until `n` are answered rightly with all blocks; ValueError if few are.

    folder: for finished batches, from which an interrupted study continues.
    sentences: fewest and most of a document.
    """
    kinds = check_texts(kinds, "kinds")
    source, began = drawn(seed, kinds, *sentences), time.perf_counter()
    rows: list[dict] = []
    right, number = 0, 0
    while right < n:
        batch = [next(source) for _ in range(_BATCH)]
        path = None if folder is None else folder / f"{'+'.join(kinds)}_{seed}_{model.hypernetwork_key}_{number}.jsonl"
        if path is not None and path.is_file():
            new = read_rows(path)
        else:
            new = study_one(model, batch, number, seed)
            if path is not None:
                write_jsonl(path, new)
        rows += new
        right += sum(row["all_blocks"] for row in new if row["method"] == "checks")
        number += _BATCH
        print(f"{right} of {n} answered rightly, {time.perf_counter() - began:.0f} s", flush=True)
        if number >= 20 * n + 10 * _BATCH:
            raise ValueError(f"of {number} questions only {right} were answered rightly: too few for n = {n}")
    return pd.DataFrame(rows)


# --------------------------------------------------------------------------------------------------------- the record
def size_group(sentences: int) -> str:
    """The group of `SIZES` for a document: 17 sentences are "17-24"."""
    for low, high in zip(SIZES, SIZES[1:], strict=False):
        if sentences <= high:
            return f"{low if low == SIZES[0] else low + 1}-{high}"
    return f"{SIZES[-1] + 1}-"


def summarise(samples: pd.DataFrame, seed: int) -> list[dict]:
    """Rows of the record, by hops, way of answering ("all blocks" or "routed"), size of document and method.

    what = "method": see `_of_method`. what = "check" and "bridge" (see `_bridges`): n, share with its interval.
    """
    samples = samples.assign(size=samples["sentences"].map(size_group))
    rows = []
    for hops, answering in ((1, "all blocks"), (1, "routed"), (2, "all blocks")):
        of_hops = samples[samples["hops"] == hops]
        flag = answering.replace(" ", "_")
        for size in ["all", *sorted(of_hops["size"].unique(), key=lambda name: int(name.split("-")[0]))]:
            of_size = of_hops if size == "all" else of_hops[of_hops["size"] == size]
            if of_size.empty:
                continue
            key = {"hops": hops, "answering": answering, "sentences": size}
            checks = of_size[of_size["method"] == "checks"]
            rows.append(key | {"what": "check", "name": "answered rightly"} | _share(checks[flag]))
            right = of_size[of_size[flag].astype(bool)]
            at_random = right[right["method"] == "random"].set_index("question")
            for method, group in right[right["method"] != "checks"].groupby("method", sort=False):
                rows.append(key | {"what": "method", "method": method} | _of_method(group, at_random, hops, seed))
            for which, name in (("top", "the sentence ranked first"), ("other", "a random other sentence")):
                stays = right.loc[right["method"] == "checks", f"{flag}_without_{which}"].dropna().astype(bool)
                rows.append(key | {"what": "check", "name": f"wrong without {name}"} | _share(~stays))
            if hops == 2:
                rows += [key | {"what": "bridge"} | row for row in _bridges(checks, flag)]
    return rows


def _bridges(checks: pd.DataFrame, flag: str) -> list[dict]:
    """Shares of two-hop questions by rivals of the answer in its document, with the adapter and in context.

    Rows: answered rightly, and of those, still right without the sentence of the first hop.
    """
    rows = []
    for rivals, group in checks.groupby(checks["rivals"].clip(upper=2)):
        right = group[group[flag].astype(bool)]
        both = right[right["in_context"].astype(bool)]
        for name, flags in (
            ("answered rightly, adapter", group[flag]),
            ("answered rightly, in context", group["in_context"]),
            ("stays right without the first hop, adapter", right[f"{flag}_without_bridge"]),
            ("stays right without the first hop, in context", both["in_context_without_bridge"]),
        ):
            several = "2 or more" if rivals == 2 else str(int(rivals))
            rows.append({"rivals": several, "name": name} | _share(flags.astype(bool)))
    return rows


def _share(flags: pd.Series) -> dict:
    right, n = int(flags.sum()), len(flags)
    low, high = wilson(right, n)
    return {"n": n, "share": right / n if n else None, "low": low, "high": high}


def _of_method(rows: pd.DataFrame, at_random: pd.DataFrame, hops: int, seed: int) -> dict:
    """Scores of a method: n, hit_rate with its interval, chance, ms (median), means of _MEASURES, p-values.

    hit_rate: share with the evidence first, or both of two in the first three.
    answer_first: of two hops, the share whose first unit states the answer.
    p_hits, p_deletion: paired tests of hits and deletion area against random (`at_random`, by question).
    """
    depth = 1 if hops == 1 else 3
    hits = rows["rank"] <= depth
    share = _share(hits)
    row = {"n": share["n"], "hit_rate": share["share"], "low": share["low"], "high": share["high"]}
    row |= {"chance": float(rows["chance"].mean()), "ms": float(rows["ms"].median())}
    if hops == 1:
        row["chance_alike"] = float(rows["chance_alike"].mean())
    else:
        row["answer_first"] = float((rows["rank_answer"] == 1).mean())
    paired = at_random.loc[rows["question"]]
    is_random = rows["method"].iloc[0] == "random"
    if not is_random:
        row["p_hits"] = sign_flip(hits.to_numpy().astype(float) - (paired["rank"] <= depth).to_numpy(), seed)
    row |= {name: float(rows[name].mean()) for name in _MEASURES if name in rows and rows[name].notna().all()}
    if "deletion" in row and not is_random:
        row["times_better_deletion"] = float(paired["deletion"].mean() / max(1e-12, rows["deletion"].mean()))
        row["p_deletion"] = sign_flip(paired["deletion"].to_numpy() - rows["deletion"].to_numpy(), seed)
    return row


def _block_cost(model: DocToLoRA, n_sentences: int, seed: int) -> dict:
    """Milliseconds per chunk to leave it out, and to make the adapter again without it, on one document."""
    document, question = next(drawn(seed, ("one_hop",), n_sentences, n_sentences))
    (adapter,) = model.internalize_each([document.text])
    trials, chunks = Trials(model, adapter, question.text, question.answer), len(adapter.blocks)

    def median_ms(run: Callable[[], object]) -> float:
        run()
        times = []
        for _ in range(5):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        return 1000 * sorted(times)[len(times) // 2]

    written = median_ms(lambda: model.internalize_each([document.text]))
    return {
        "sentences": n_sentences,
        "chunks": chunks,
        "ms_per_chunk_leave_one_out": median_ms(lambda: leave_one_out(trials)) / chunks,
        "ms_per_chunk_recomputed": written * (chunks - 1) / chunks,  # all other chunks are written
    }


def _exactness(model: DocToLoRA, n: int, seed: int) -> dict:
    """Largest difference in nats, over `n` documents, between a chunk left out and an adapter without it."""
    worst = 0.0
    for _, (document, question) in zip(range(n), drawn(seed, ("one_hop",), SIZES[0], SIZES[-1]), strict=False):
        (adapter,) = model.internalize_each([document.text])
        trials = Trials(model, adapter, question.text, question.answer)
        lost = leave_one_out(trials).by_token
        full = trials.score(torch.ones(1, len(trials)))[0]
        for place in range(0, len(trials), 5):
            others = replace(adapter, blocks=tuple(b for i, b in enumerate(adapter.blocks) if i != place))
            again = Trials(model, others, question.text, question.answer)
            there = full - again.score(torch.ones(1, len(again)))[0]
            worst = max(worst, float((there.sum() - lost[place].sum()).abs()))
    return {"n": n, "largest_difference_nats": worst}


def run(model: DocToLoRA, n: int, seed: int, n_two_hop: int) -> list[dict]:
    """The record: `summarise`, cost and exactness; runs/attribution keeps finished batches for an interrupted run."""
    folder = project_root() / "runs" / "attribution"
    one_hop = study(model, n, seed, folder)
    two_hop = study(model, n_two_hop, seed, folder, kinds=("two_hop",))
    rows = summarise(pd.concat([one_hop, two_hop], ignore_index=True), seed)
    rows += [{"what": "cost"} | _block_cost(model, sentences, seed) for sentences in SIZES]
    rows.append({"what": "exactness"} | _exactness(model, 20, seed))
    return [{k: v for k, v in row.items() if not (isinstance(v, float) and math.isnan(v))} for row in rows]
