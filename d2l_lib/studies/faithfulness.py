"""Whether a trace can be believed: scores of attribution methods against what really happens, and against the truth.

    d2l study attribution --n 500        # data/full_runs/attribution.jsonl

In the generated world it is known which sentence answers a question, so that a method's first unit can be right or
wrong. Everything else here needs no such knowledge: parts are taken away, or added, in the order that a method gives,
and the answer is watched.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
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

SIZES = (8, 16, 24, 32, 40)  # sentences: the groups of documents, 8-16 and so on


# -------------------------------------------------------------------------------------------------------- the samples


def study_one(
    model: DocToLoRA, batch: Sequence[tuple[world.Document, world.Question]], first: int, seed: int
) -> list[dict]:
    """Rows of some questions: one per question and method, for those answered rightly with all blocks or routed.

    Columns: question (a number), hops, sentences, units, chance (that a random first unit is right), chance_alike (see
    there), all_blocks, routed (whether each answers rightly), method, rank (of the evidence; the later one's of two),
    rank_answer (of the sentence that states the answer), and for methods of chunks deletion, insertion,
    comprehensiveness, sufficiency, correlation, ms. Randomised weights are drawn anew for every batch. The rows of the
    method "checks" hold what came of taking sentences out of the text; of two-hop questions also `rivals`, the number
    of other values that stand in the asked relation in the document, and whether the base model answers in context.
    What is slow is done for a part of the questions (see `EVERY`); questions that only routed blocks answer have the
    methods that need no curves.
    """
    texts = [document.text for document, _ in batch]
    asked = [question.text for _, question in batch]
    other = randomised(model, 10**6 * seed + first)
    adapters = model.internalize_each(texts)
    needed = [place for place in range(len(batch)) if (first + place) % EVERY["randomised weights"] == 0]
    of_needed = other.internalize_each([texts[place] for place in needed]) if needed else []
    shuffled = dict(zip(needed, of_needed, strict=True))
    said = model.answer(asked, adapters)
    said_routed = model.answer(asked, route(model, asked, adapters, 1))
    said_in_context = [""] * len(batch)
    if any(len(question.evidence) == 2 for _, question in batch):
        prompts = [f"{text}\n\n{question}" for text, question in zip(texts, asked, strict=True)]
        said_in_context = model.answer(prompts, None)
    rows: list[dict] = []
    for place, (document, question) in enumerate(batch):
        whole, routed = said[place] == question.answer, said_routed[place] == question.answer
        hops = len(question.evidence)
        facts = {"question": first + place, "hops": hops, "sentences": len(split_sentences(document.text))}
        facts |= {"all_blocks": whole, "routed": routed}
        if hops == 2:
            asked_of = next(fact for fact in document.facts if fact.span == question.evidence[1])
            values = {fact.value for fact in document.facts if fact.relation == asked_of.relation}
            facts |= {"rivals": len(values) - 1, "in_context": said_in_context[place] == question.answer}
        if not (whole or (routed and hops == 1)):
            rows.append(facts | {"method": "checks"})
            continue
        rows += _study(
            model, shuffled.get(place), other, adapters[place], document, question, facts, seed + first + place
        )
    return rows


def _study(
    model: DocToLoRA,
    shuffled: Adapter | None,
    other: DocToLoRA,
    adapter: Adapter,
    document: world.Document,
    question: world.Question,
    facts: dict,
    seed: int,
) -> list[dict]:
    """See `study_one`: the rows of one question."""
    ask = {"question": question.text, "answer": question.answer, "seed": seed, "controls": False}
    trials = Trials(model, adapter, question.text, question.answer)
    number = facts["question"]
    wanted = METHODS["chunk"] if facts["all_blocks"] else ("leave_one_out", "add_one_in", "relevance", "random")
    tables = {
        method: attribute(model, adapter, **ask, method=method)
        for method in wanted
        if number % EVERY.get(method, 1) == 0
    }
    orders = {
        method: sorted(range(len(table)), key=ranks(table["contribution"]).__getitem__)
        for method, table in tables.items()
    }
    generator = torch.Generator().manual_seed(seed)
    traced = curves(trials, orders) if facts["all_blocks"] else None
    masks, effects = subset_effects(trials, 24, generator) if facts["all_blocks"] else (None, None)
    rows = []
    for method, table in tables.items():
        rows.append(
            facts
            | {"method": method, "units": len(table), "ms": 1000 * table.attrs["seconds"]}
            | _placing(table, document, question)
        )
        if traced is not None:
            predicted = masks.double() @ torch.tensor(table["contribution"].tolist(), dtype=torch.float64)
            rows[-1]["correlation"] = rank_correlation(predicted.tolist(), effects.tolist())
            rows[-1] |= _areas(traced[traced["method"] == method])
    sentence_methods = ["leave_one_out", *(["gradient", "integrated_gradients"] if facts["all_blocks"] else [])]
    for method in (name for name in sentence_methods if number % EVERY.get(f"{name}, sentences", 1) == 0):
        ask_sentences = ask | {"level": "sentence", "documents": document.text, "by_token": False}
        table = attribute(model, adapter, **ask_sentences, method=method)
        rows.append(
            facts
            | {"method": f"{method}, sentences", "units": len(table), "ms": 1000 * table.attrs["seconds"]}
            | _placing(table, document, question)
        )
        if method == "leave_one_out":
            rows.append(_checks(model, document, question, table, facts, seed))
    for method in ("leave_one_out", "relevance") if number % EVERY["randomised weights"] == 0 else ():
        table = attribute(other, shuffled, **ask, method=method)
        rows.append(
            facts
            | {"method": f"{method}, randomised weights", "units": len(table), "ms": 1000 * table.attrs["seconds"]}
            | _placing(table, document, question)
        )
    return rows


def _areas(traced: pd.DataFrame) -> dict:
    """Of one method's curves: both areas, and what the first unit does alone to the probability of the answer."""
    deletion, insertion = (traced[traced["curve"] == curve] for curve in ("deletion", "insertion"))
    without, only = (dict(zip(c["units"], c["probability"], strict=True)) for c in (deletion, insertion))
    return {
        "deletion": area(deletion),
        "insertion": area(insertion),
        "comprehensiveness": without[0] - without[1],
        "sufficiency": without[0] - only[1],
    }


def _placing(table: pd.DataFrame, document: world.Document, question: world.Question) -> dict:
    """Where a method's contributions put the evidence, and what chance would give."""
    truth = evidence_units(table, question.evidence)
    contributions = table["contribution"]
    return {
        "rank": worst_rank(contributions, truth),
        "rank_answer": worst_rank(contributions, truth[-1:]),
        "chance": _chance(truth, len(table)),
        "chance_alike": chance_alike(contributions, table, document, question.evidence[-1]),
    }


def _chance(truth: Sequence[Sequence[int]], n_units: int) -> float:
    """That a random order has one evidence sentence first, or two within the first three."""
    if len(truth) == 1:
        return len(truth[0]) / n_units
    return min(1.0, 6 / (n_units * (n_units - 1)))


def _checks(
    model: DocToLoRA,
    document: world.Document,
    question: world.Question,
    table: pd.DataFrame,
    facts: dict,
    seed: int,
) -> dict:
    """Take the first sentence of `table`, or a random other one, out of the text, internalize the text again and ask
    again: which answers stay? The other is neither the first nor evidence. Of two-hop questions also the sentence of
    the first hop, which names the one that is asked about ("bridge"), for the adapter and in context.
    """
    best = int(table["contribution"].to_numpy().argmax())
    evidence = {place for places in evidence_units(table, question.evidence) for place in places}
    rest = [place for place in range(len(table)) if place != best and place not in evidence]
    other = random.Random(f"other/{seed}").choice(rest)
    left = {which: (table["start"][place], table["end"][place]) for which, place in (("top", best), ("other", other))}
    if facts["hops"] == 2:
        left["bridge"] = question.evidence[0]
    texts = [without_sentence(document.text, *span) for span in left.values()]
    adapters = model.internalize_each(texts)
    asked = [question.text] * len(texts)
    found = facts | {"method": "checks"}
    for how, adapters_of in (("all_blocks", adapters), ("routed", route(model, asked, adapters, 1))):
        for which, said in zip(left, model.answer(asked, adapters_of), strict=True):
            found[f"{how}_without_{which}"] = said == question.answer
    if "bridge" in left:
        said = model.answer(f"{texts[-1]}\n\n{question.text}", None)
        found["in_context_without_bridge"] = said == question.answer
    return found


# --------------------------------------------------------------------------------------------------------- the record
def size_group(sentences: int) -> str:
    """The group of `SIZES` that a document belongs to: 17 sentences are "17-24"."""
    for low, high in zip(SIZES, SIZES[1:], strict=False):
        if sentences <= high:
            return f"{low if low == SIZES[0] else low + 1}-{high}"
    return f"{SIZES[-1] + 1}-"


def summarise(samples: pd.DataFrame, seed: int) -> list[dict]:
    """Rows of the record, for each hops, way of answering ("all blocks" or "routed"), size of document and method.

    what = "method": n, hit_rate (evidence first, or both of two in the first three) with its interval, chance, mean
    areas and other measures, p of the paired tests against random (of the deletion area, and of the hits), median ms;
    answer_first: the share whose first unit states the answer of two hops. what = "check", and "bridge" (see
    `_bridges`): n, share with its interval.
    """
    samples = samples.assign(size=samples["sentences"].map(size_group))
    found = []
    for hops, answering in ((1, "all blocks"), (1, "routed"), (2, "all blocks")):
        asked = samples[samples["hops"] == hops]
        if asked.empty:
            continue
        flag = answering.replace(" ", "_")
        answered = asked[asked["method"] == "checks"]
        for size in ["all", *sorted(asked["size"].unique(), key=lambda name: int(name.split("-")[0]))]:
            key = {"hops": hops, "answering": answering, "sentences": size}
            of_size = answered if size == "all" else answered[answered["size"] == size]
            found.append(key | {"what": "check", "name": "answered rightly"} | _share(of_size[flag]))
            right = asked[asked[flag].astype(bool)]
            right = right if size == "all" else right[right["size"] == size]
            chosen = right[right["method"] == "random"].set_index("question")
            for method, rows in right[right["method"] != "checks"].groupby("method", sort=False):
                found.append(key | {"what": "method", "method": method} | _of_method(rows, chosen, hops, seed))
            checks = right[right["method"] == "checks"]
            for which, name in (("top", "the sentence ranked first"), ("other", "a random other sentence")):
                stayed = checks[f"{flag}_without_{which}"].dropna().astype(bool)
                found.append(key | {"what": "check", "name": f"wrong without {name}"} | _share(~stayed))
            if hops == 2:
                found += [key | {"what": "bridge"} | row for row in _bridges(of_size, flag)]
    return found


def _bridges(checks: pd.DataFrame, flag: str) -> list[dict]:
    """Two-hop questions by how many rivals the answer has in its document: the share answered rightly, and the share of
    those that stay right without the sentence of the first hop, with the adapter and in context.
    """
    found = []
    for rivals, rows in checks.groupby(checks["rivals"].clip(upper=2)):
        named = {"rivals": "2 or more" if rivals == 2 else str(int(rivals))}
        right = rows[rows[flag].astype(bool)]
        both = right[right["in_context"].astype(bool)]
        for name, flags in (
            ("answered rightly, adapter", rows[flag]),
            ("answered rightly, in context", rows["in_context"]),
            ("stays right without the first hop, adapter", right[f"{flag}_without_bridge"]),
            ("stays right without the first hop, in context", both["in_context_without_bridge"]),
        ):
            found.append(named | {"name": name} | _share(flags.astype(bool)))
    return found


def _share(flags: pd.Series) -> dict:
    right, n = int(flags.sum()), len(flags)
    low, high = wilson(right, n)
    return {"n": n, "share": right / n if n else None, "low": low, "high": high}


def _of_method(rows: pd.DataFrame, chosen: pd.DataFrame, hops: int, seed: int) -> dict:
    """See `summarise`; `chosen` are the rows of the random method, by question."""
    hits = rows["rank"] <= (1 if hops == 1 else 3)
    share = _share(hits)
    found = {"n": share["n"], "hit_rate": share["share"], "low": share["low"], "high": share["high"]}
    found |= {"chance": float(rows["chance"].mean()), "ms": float(rows["ms"].median())}
    if hops == 1:
        found["chance_alike"] = float(rows["chance_alike"].mean())
    else:
        found["answer_first"] = float((rows["rank_answer"] == 1).mean())
    paired = chosen.loc[rows["question"]]
    if rows["method"].iloc[0] != "random":
        at_random = (paired["rank"] <= (1 if hops == 1 else 3)).to_numpy()
        found["p_hits"] = sign_flip(hits.to_numpy().astype(float) - at_random, seed)
    for name in ("deletion", "insertion", "comprehensiveness", "sufficiency", "correlation"):
        if name in rows and rows[name].notna().all():
            found[name] = float(rows[name].mean())
    if "deletion" in found and "p_hits" in found:
        found["times_better_deletion"] = float(paired["deletion"].mean() / max(1e-12, rows["deletion"].mean()))
        found["p_deletion"] = sign_flip(paired["deletion"].to_numpy() - rows["deletion"].to_numpy(), seed)
    return found


def study(
    model: DocToLoRA,
    n: int,
    seed: int,
    folder: Path | None = None,
    *,
    kinds: Sequence[str] = world.ONE_HOP_KINDS,
    least: int = SIZES[0],
    most: int = SIZES[-1],
    batch: int = 10,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Samples (see `study_one`) of questions until `n` are answered rightly with all blocks.

    folder: finished batches are kept there, and an interrupted study goes on behind them.
    """
    kinds = check_texts(kinds, "kinds")
    source = drawn(seed, kinds, least, most)
    rows: list[dict] = []
    right, number = 0, 0
    while right < n:
        some = [next(source) for _ in range(batch)]
        path = None if folder is None else folder / f"{'+'.join(kinds)}_{seed}_{model.hypernetwork_key}_{number}.jsonl"
        if path is not None and path.is_file():
            found = read_rows(path)
        else:
            found = study_one(model, some, number, seed)
            if path is not None:
                write_jsonl(path, found)
        rows += found
        right += sum(row["all_blocks"] for row in found if row["method"] == "checks")
        number += batch
        if progress is not None:
            progress(right, n)
        if number >= 20 * n + 10 * batch:
            raise ValueError(f"of {number} questions only {right} were answered rightly: too few for n = {n}")
    return pd.DataFrame(rows)


def block_cost(model: DocToLoRA, n_sentences: int, seed: int, repeats: int = 5) -> dict:
    """Milliseconds per chunk of leaving it out, and of making the adapter again without it, on one document."""
    document, question = next(drawn(seed, ("one_hop",), n_sentences, n_sentences))
    (adapter,) = model.internalize_each([document.text])
    trials = Trials(model, adapter, question.text, question.answer)
    seconds = {}
    for name, run in (
        ("leave one out", partial(leave_one_out, trials)),
        ("write the others again", lambda: model.internalize_each([document.text])),
    ):
        run()
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        seconds[name] = sorted(times)[len(times) // 2]
    chunks = len(adapter.blocks)
    return {
        "sentences": n_sentences,
        "chunks": chunks,
        "ms_per_chunk_leave_one_out": 1000 * seconds["leave one out"] / chunks,
        # without one chunk all the others are written
        "ms_per_chunk_recomputed": 1000 * seconds["write the others again"] * (chunks - 1) / chunks,
    }


def exactness(model: DocToLoRA, n: int, seed: int) -> dict:
    """Largest difference in nats, over `n` documents, between leaving a chunk out and an adapter without it."""
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
    """The record: see `summarise`, and rows of cost and exactness. Finished batches are kept in runs/attribution, from
    which it goes on where it was interrupted.
    """
    folder = project_root() / "runs" / "attribution"
    began = time.perf_counter()

    def report(right: int, n: int) -> None:
        print(f"{right} of {n} answered rightly, {time.perf_counter() - began:.0f} s", flush=True)

    one_hop = study(model, n, seed, folder, progress=report)
    two_hop = study(model, n_two_hop, seed, folder, kinds=("two_hop",), progress=report)
    found = summarise(pd.concat([one_hop, two_hop], ignore_index=True), seed)
    found += [{"what": "cost"} | block_cost(model, sentences, seed) for sentences in SIZES]
    found.append({"what": "exactness"} | exactness(model, 20, seed))
    return [{k: v for k, v in row.items() if not (isinstance(v, float) and math.isnan(v))} for row in found]
