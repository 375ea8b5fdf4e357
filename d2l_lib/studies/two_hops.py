"""Two hops, traced: the rank of both evidence sentences, on the questions that need them.

    d2l study two-hops        # data/full_runs/two_hops.jsonl

A question needs its first hop if the base model, with the text without that sentence in its prompt, answers it wrong.
The others can be guessed: few values in a document fit the relation that is asked for.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace

import pandas as pd
import torch

from d2l_lib.adapter import Adapter
from d2l_lib.analysis.attribution import METHODS, Trials, attribute
from d2l_lib.analysis.trust import evidence_units, without_sentence, worst_rank
from d2l_lib.model import DocToLoRA
from d2l_lib.tasks import world
from d2l_lib.tasks.scores import wilson
from d2l_lib.training.processes import shared

_FACTS = 12  # in a document
_BATCH = 16  # questions
_DEPTH = 3  # units that both sentences should be among
_SLOW = ("surrogate",)
_SPARSE = "leave_one_out, read sparsely"


def _drawn(rng: random.Random, split: str) -> Iterator[tuple[world.Document, world.Question]]:
    while True:
        document = world.draw_document(rng, split, _FACTS)
        if (question := world.ask(rng, document, "two_hop")) is not None:
            yield document, question


def needing(model: DocToLoRA, n: int, seed: int, split: str) -> tuple[list[tuple[world.Document, world.Question]], int]:
    """Two-hop questions that need their first hop, `n` or a few more, each with its document; how many were drawn."""
    source = _drawn(random.Random(f"two hops/{split}/{seed}"), split)
    cases: list[tuple[world.Document, world.Question]] = []
    drawn = 0
    while len(cases) < n:
        batch = [next(source) for _ in range(_BATCH)]
        texts = [without_sentence(document.text, *question.evidence[0]) for document, question in batch]
        prompts = [f"{text}\n\n{question.text}" for text, (_, question) in zip(texts, batch, strict=True)]
        answers = model.answer(prompts, None)
        cases += [case for case, answer in zip(batch, answers, strict=True) if answer != case[1].answer]
        drawn += _BATCH
        if drawn >= 100 * (n + _BATCH):
            raise ValueError(f"of {drawn} questions only {len(cases)} need their first hop: too few for n = {n}")
    return cases, drawn


def sparse_losses(model: DocToLoRA, adapter: Adapter, question: str, answer: str) -> list[float]:
    """The loss of an answer's log-probability without each block, in nats, where the adapter is read sparsely."""
    target = Trials(model, adapter, question, answer).target
    places = range(len(adapter.blocks))
    others = [replace(adapter, blocks=tuple(b for i, b in enumerate(adapter.blocks) if i != k)) for k in places]
    adapters, first = [adapter, *others], len(target.prompt) - 1
    ids = torch.tensor([target.prompt + target.answer] * len(adapters), device=model.device)
    starts = torch.full((len(adapters),), first)
    with torch.no_grad(), model.applied(adapters, read="sparse", starts=starts) as base_model:
        logits = base_model(ids, use_cache=False).logits[:, first:-1].float()
    total = logits.log_softmax(-1).gather(2, ids[:, first + 1 :, None]).sum((1, 2))
    return (total[0] - total[1:]).tolist()


def samples(model: DocToLoRA, n: int, seed: int, split: str = "test") -> pd.DataFrame:
    """One row per question and method; `.attrs["needing"]`: questions that need their first hop, and questions drawn.

    The right answer is explained, whatever the model says. Columns: question (a number), method, rank (of the later of
    both evidence sentences), rank_bridge, rank_answer, units, seconds, and whether the answer is right: in_context,
    published_sum, sparse.
    """
    cases, drawn = needing(model, n, seed, split)
    n_needing, cases = len(cases), cases[:n]
    began = time.perf_counter()

    def work(start: int) -> list[dict]:
        some, rows = cases[start : start + _BATCH], []
        questions = [question.text for _, question in some]
        adapters = model.internalize_each([document.text for document, _ in some])
        answers = {
            "in_context": model.answer([f"{document.text}\n\n{question.text}" for document, question in some], None),
            "published_sum": model.answer(questions, adapters),
            "sparse": model.answer(questions, adapters, read="sparse"),
        }
        for place, ((_, question), adapter) in enumerate(zip(some, adapters, strict=True)):
            right = {how: answer[place] == question.answer for how, answer in answers.items()}
            facts = {"question": start + place} | right
            rows += [facts | row for row in _ranked(model, adapter, question, seed)]
        print(f"{start + len(some)} of {n} traced, {time.perf_counter() - began:.0f} s", flush=True)
        return rows

    table = pd.DataFrame([row for rows in shared(range(0, n, _BATCH), work) for row in rows])
    table.attrs["needing"] = (n_needing, drawn)
    return table


def _ranked(model: DocToLoRA, adapter: Adapter, question: world.Question, seed: int) -> Iterator[dict]:
    """Rows of one question, see `samples`."""
    for method in (*METHODS["chunk"], _SPARSE):
        if method in _SLOW:
            continue
        began = time.process_time()
        if method == _SPARSE:
            contributions = sparse_losses(model, adapter, question.text, question.answer)
        else:
            options = {"method": method, "seed": seed, "controls": False}
            table = attribute(model, adapter, question.text, question.answer, **options)
            contributions = table["contribution"].tolist()
        seconds = time.process_time() - began
        bridge, answer = truth = evidence_units(table, question.evidence)
        yield {
            "method": method,
            "rank": worst_rank(contributions, truth),
            "rank_bridge": worst_rank(contributions, [bridge]),
            "rank_answer": worst_rank(contributions, [answer]),
            "units": len(contributions),
            "seconds": seconds,
        }


def summarise(table: pd.DataFrame, split: str) -> list[dict]:
    """Rows of the record, on all of the questions and on those that sparse reading answers rightly.

    what = "answers": n, and the share that is right; of the questions drawn, the share that needs the first hop.
    what = "method": hit_rate (both sentences among the first three), low, high, chance, answer_first, bridge (first
    hop's sentence among the first three), cpu_milliseconds (median).
    """
    once = table.drop_duplicates("question")
    flags = {f"answered rightly, {how}": once[how] for how in ("in_context", "published_sum", "sparse")}
    counts = {name: (int(flag.sum()), len(flag)) for name, flag in flags.items()}
    counts["needs its first hop, of all drawn"] = table.attrs["needing"]
    rows = [
        {"what": "answers", "name": name.replace("_", " "), "n": n, "share": right / n}
        | dict(zip(("low", "high"), wilson(right, n), strict=True))
        for name, (right, n) in counts.items()
    ]
    for questions, some in (("all", table), ("answered rightly, sparse", table[table["sparse"]])):
        for method, group in some.groupby("method", sort=False):
            hits, n = int((group["rank"] <= _DEPTH).sum()), len(group)
            low, high = wilson(hits, n)
            row = {"what": "method", "questions": questions, "method": method, "n": n, "hit_rate": hits / n}
            row |= {"low": low, "high": high}
            row["chance"] = float(
                (_DEPTH * (_DEPTH - 1) / (group["units"] * (group["units"] - 1))).clip(upper=1).mean()
            )
            row["answer_first"] = float((group["rank_answer"] == 1).mean())
            row["bridge"] = float((group["rank_bridge"] <= _DEPTH).mean())
            rows.append(row | {"cpu_milliseconds": round(1000 * float(group["seconds"].median()), 1)})
    return [row | {"split": split} for row in rows]


def run(model: DocToLoRA, n: int, seed: int, split: str) -> list[dict]:
    """The record: `summarise` of `samples`."""
    return summarise(samples(model, n, seed, split), split)
