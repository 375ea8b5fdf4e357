"""Retrieval against adapters: the questions of `studies.reading` and `studies.router`, with passages in the prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pandas as pd

from d2l_lib.adapter import Adapter
from d2l_lib.model import DocToLoRA
from d2l_lib.studies import earlier_rows
from d2l_lib.studies.baselines import kept_bytes
from d2l_lib.studies.reading import Asked, draw_conditions
from d2l_lib.studies.retrieval import PassageIndex, Retrieval
from d2l_lib.studies.router import draw_pool, drawn_questions
from d2l_lib.tasks import qa
from d2l_lib.tasks.questions import marked
from d2l_lib.tasks.scores import summarise, wilson

_NEW_TOKENS = 64
_AT_ONCE = 16  # groups of questions that are answered together


@dataclass(frozen=True)
class _Way:
    """A method: what it keeps of documents (a key of `_preparations`), and its answers from that, one per question."""

    name: str
    keeps: str
    answer: Callable[[list[Any], list[str]], list[str]]


def _preparations(model: DocToLoRA) -> dict[str, Callable[[list[str]], Any]]:
    """What is made once of the texts of some documents."""

    def adapter(texts: list[str]) -> Adapter:
        return sum(model.internalize_each({f"document {i}": text for i, text in enumerate(texts)}))

    index = Retrieval(model).index
    return {"nothing": lambda texts: None, "text": "\n\n".join, "index": index, "adapter": adapter}


def _ways(model: DocToLoRA) -> list[_Way]:
    def prompted(prompts: list[str]) -> list[str]:
        return model.answer(prompts, None, max_new_tokens=_NEW_TOKENS)

    def whole(document: str, question: str) -> str:
        return qa.with_document(document, [question], model.tokenizer, model.window, _NEW_TOKENS)[0]

    def retrieval(k: int) -> _Way:
        method = Retrieval(model, k, max_new_tokens=_NEW_TOKENS)

        def answer(kept: list[PassageIndex], texts: list[str]) -> list[str]:
            return prompted([method.prompts(one, [text])[0] for one, text in zip(kept, texts, strict=True)])

        return _Way(method.name, "index", answer)

    def sparse(kept: list[Adapter], texts: list[str]) -> list[str]:
        return model.answer(texts, kept, max_new_tokens=_NEW_TOKENS, read="sparse")

    return [
        _Way("no document", "nothing", lambda kept, texts: prompted(texts)),
        _Way("everything that fits", "text", lambda kept, texts: prompted(list(map(whole, kept, texts)))),
        retrieval(1),
        retrieval(4),
        _Way("Doc-to-LoRA, sparse", "adapter", sparse),
    ]


def _answered(model: DocToLoRA, groups: list[Asked]) -> list[dict]:
    """Rows of `marked` with condition, method and the costs of `measure_retrieval`, one per question and method."""
    questions = [one for group in groups for one in group.questions]
    texts, rows, kept, facts = [one.text for one in questions], [], {}, {}
    for keeps, prepare in _preparations(model).items():
        began = time.process_time()
        each = [prepare([one.text for one in group.documents]) for group in groups]
        milliseconds = 1000 * (time.process_time() - began) / len(groups)
        kept[keeps] = [one for one, group in zip(each, groups, strict=True) for _ in group.questions]
        facts[keeps] = [
            {
                "condition": group.condition,
                "cpu_milliseconds_prepare": milliseconds,
                "kilobytes": kept_bytes(one) / 1000,
            }
            for one, group in zip(each, groups, strict=True)
            for _ in group.questions
        ]
    for way in _ways(model):
        began = time.process_time()
        predictions = way.answer(kept[way.keeps], texts)
        costs = {"method": way.name, "cpu_milliseconds": 1000 * (time.process_time() - began) / len(texts)}
        rows += [row | costs | own for row, own in zip(marked(questions, predictions), facts[way.keeps], strict=True)]
    return rows


def measure_retrieval(
    model: DocToLoRA, n: int, seed: int, split: str = "test", without: Collection[str] = ()
) -> Iterator[pd.DataFrame]:
    """Exact match by condition of `reading.draw_conditions` and method, `n` questions each, with intervals and costs.

    A table per condition, but for those in `without`.

    "everything that fits" puts all documents into the prompt; their middle is cut to fit the window. The BM25 rows put
    the best passages of all documents into it.

    Costs: cpu_milliseconds (per question), cpu_milliseconds_prepare (per group of documents: index or adapter),
    kilobytes (kept of a group: texts, texts and index, or adapter).
    """
    by, costs = ["condition", "method"], ["cpu_milliseconds", "cpu_milliseconds_prepare", "kilobytes"]
    for condition, same in groupby(draw_conditions(n, seed, split), lambda asked: asked.condition):
        if condition in without:
            continue
        groups, rows = list(same), []
        for start in range(0, len(groups), _AT_ONCE):
            rows += _answered(model, groups[start : start + _AT_ONCE])
        print(f"{condition}: {sum(len(group.questions) for group in groups)} questions", flush=True)
        samples = pd.DataFrame(rows)
        means = samples.groupby(by, sort=False, as_index=False)[costs].mean().round(1)
        yield summarise(samples, by).merge(means).assign(split=split)


def measure_pools(
    model: DocToLoRA, n: int, seed: int, sizes: Sequence[int] = (64, 564, 2000, 10000), split: str = "test"
) -> pd.DataFrame:
    """The measures of `router.measure_router` for BM25 over the chunks that are its blocks, for the same questions.

    A row per number of chunks and measure: blocks, measure, n, share, low, high, cpu_milliseconds, and megabytes (of
    texts and index). "right chunk first", "among 4", "among 8" are ranks; "best chunk", "best 4 chunks", "best 8
    chunks" are exact match with these in the prompt, ranking included in their time.
    """
    rows = []
    for size in sizes:
        chunks, pool = draw_pool(model, size, seed, split)
        chosen = drawn_questions(pool, n, size, seed)
        questions = [question for question, _ in chosen]
        texts = [question.text for question in questions]
        index = PassageIndex([chunk.text.strip() for of_document in chunks for chunk in of_document][:size])

        def add(measure: str, right: list[bool], seconds: float, size=size, megabytes=index.nbytes / 1e6) -> None:
            low, high = wilson(sum(right), len(right))
            row = {"blocks": size, "measure": measure, "n": len(right), "share": sum(right) / len(right)}
            row |= {"low": low, "high": high, "cpu_milliseconds": round(1000 * seconds / len(right), 2)}
            rows.append(row | {"megabytes": megabytes})

        began = time.process_time()
        best = [index.best(text, 8) for text in texts]
        seconds = time.process_time() - began
        for most, name in ((1, "right chunk first"), (4, "among 4"), (8, "among 8")):
            add(name, [bool(right & set(own[:most])) for own, (_, right) in zip(best, chosen, strict=True)], seconds)
        for k in (1, 4, 8):
            method = Retrieval(model, k, max_new_tokens=_NEW_TOKENS)
            began = time.process_time()
            answers = marked(questions, method.answer(index, texts))
            seconds = time.process_time() - began
            add(method.name.removeprefix("BM25, "), [row["correct"] for row in answers], seconds)
        print(f"{size} chunks: {len(chosen)} questions", flush=True)
    return pd.DataFrame(rows).assign(split=split)


def run(model: DocToLoRA, n: int, seed: int, again: bool = False) -> Iterator[dict[str, pd.DataFrame | list[dict]]]:
    """The records: `measure_pools` and, after each condition, `measure_retrieval`, on test documents.

    again: measure those conditions too that are recorded with this n and seed.
    """
    rows = [row for row in earlier_rows("retrieval") if not again and (row["n"], row["seed"]) == (n, seed)]
    yield {"retrieval_pools": measure_pools(model, n, seed)}
    for table in measure_retrieval(model, n, seed, without={row["condition"] for row in rows}):
        rows += table.to_dict("records")
        yield {"retrieval": rows}
