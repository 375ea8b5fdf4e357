"""Questions about passages of real text: the passage in the prompt, in an adapter, among others, and controls."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import pandas as pd

from d2l_lib.adapter import Adapter
from d2l_lib.model import DocToLoRA
from d2l_lib.studies import earlier_rows
from d2l_lib.tasks import qa, scores

_IN_PROMPT = "passage in the prompt"
_TOGETHER = 10  # passages of one adapter
_TOGETHER_NAME = f"Doc-to-LoRA, {_TOGETHER} passages in one adapter"
_OTHER = "another passage's adapter"
_NEW_TOKENS = 24
_AT_ONCE = 64  # questions, for memory
_METRICS = ("token_f1_squad", "exact_match_squad", "recall")


def run(model: DocToLoRA, n: int, seed: int, questions: str, only: Sequence[str] | None = None) -> Iterator[list[dict]]:
    """After each method all rows so far, one for each metric: n questions, score with its interval, seconds.

    questions: "DATASET" or "DATASET=FILE" (see `tasks.qa.load_named`); n of them are drawn with `seed`.
    only: methods whose names hold one of these words; rows of others that are recorded stay.

    Seconds are the processor's. ValueError if no method has such a name, and for recorded rows of other questions.
    """
    chosen = [name for name in METHODS if only is None or any(word in name for word in only)]
    if not chosen:
        raise ValueError(f"no method is called {' or '.join(only)}; there are {', '.join(METHODS)}")
    rows = [row for row in earlier_rows("passages") if row["method"] not in chosen] if only else []
    for row in rows:
        if (row["seed"], row["n"]) != (seed, n):
            raise ValueError(
                f"the record holds rows of seed {row['seed']}, n {row['n']}: the methods of a table answer the same "
                "questions, so take its --n and --seed, or leave out --only"
            )
    frame = qa.load_named(questions, n=n, seed=seed)
    for new in rows_of_methods(model, frame, chosen, seed):
        rows += new
        yield sorted(rows, key=lambda row: list(METHODS).index(row["method"]))


def rows_of_methods(model: DocToLoRA, frame: pd.DataFrame, methods: Sequence[str], seed: int) -> Iterator[list[dict]]:
    """The rows of one of METHODS after another, one for each metric, with costs; they are printed too.

    frame: questions about passages, as `tasks.qa.load_qa` gives them.
    """
    documents = [document for document, _ in qa.group_by_document(frame)]
    facts, adapters = {"dataset": frame["dataset"].iloc[0], "n_passages": len(documents)}, {}
    if {"Doc-to-LoRA", _TOGETHER_NAME, _OTHER} & set(methods):
        start = time.process_time()
        adapters = dict(zip(documents, model.internalize_each(documents), strict=True))
        cost = {
            "seconds_internalizing": round((time.process_time() - start) / len(documents), 4),
            "kilobytes": round(sum(one.nbytes for one in adapters.values()) / len(adapters) / 1e3, 1),
        }
    for method in methods:
        applied = METHODS[method](adapters, seed)
        prompts = list(frame["question"]) if method != _IN_PROMPT else _with_passages(model, frame)
        replies, seconds = ask(model, prompts, [applied.get(document) for document in frame["document"]])
        rows = scored_rows(frame.assign(method=method, prediction=replies), seed, seconds=seconds)
        print(method, {row["metric"]: round(row["score"], 3) for row in rows}, flush=True)
        yield [row | facts | (cost if applied else {}) for row in rows]


def ask(
    model: DocToLoRA, prompts: Sequence[str], adapters: Sequence[Adapter | None], new_tokens: int = _NEW_TOKENS
) -> tuple[list[str], float]:
    """(answers, seconds of the processor for each); few at a time, for memory."""
    replies, start = [], time.process_time()
    for first in range(0, len(prompts), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        replies += model.answer(prompts[part], adapters[part], max_new_tokens=new_tokens)
    return replies, round((time.process_time() - start) / len(prompts), 4)


def _with_passages(model: DocToLoRA, some: pd.DataFrame) -> list[str]:
    """Each question with its passage in the prompt."""
    return [
        qa.with_document(document, [question], model.tokenizer, model.window, _NEW_TOKENS)[0]
        for document, question in zip(some["document"], some["question"], strict=True)
    ]


def _others(adapters: Mapping[str, Adapter], seed: int) -> dict[str, Adapter]:
    """Another document's adapter for each."""
    order = _shuffled(adapters, f"passages/{seed}")
    return {document: adapters[order[(place + 1) % len(order)]] for place, document in enumerate(order)}


def _together(adapters: Mapping[str, Adapter], seed: int) -> dict[str, Adapter]:
    """For each document the sum of its group's adapters: all documents in groups of at most `_TOGETHER`."""
    order, sums = _shuffled(adapters, f"passages/{seed}/together"), {}
    for start in range(0, len(order), _TOGETHER):
        group = order[start : start + _TOGETHER]
        sums |= dict.fromkeys(group, sum(adapters[document] for document in group))
    return sums


def _shuffled(documents: Iterable[str], seed: str) -> list[str]:
    order = sorted(documents)
    random.Random(seed).shuffle(order)
    return order


def scored_rows(predictions: pd.DataFrame, seed: int, **facts) -> list[dict]:
    """Rows of one method's metrics."""
    scored = qa.score(predictions, "token_f1_squad")
    scored["recall"] = [
        scores.token_scores(prediction, answers, "squad").recall
        for prediction, answers in zip(scored["prediction"], scored["answers"], strict=True)
    ]
    tables = [qa.summarise_scores(scored, ["method"], metric, seed) for metric in _METRICS]
    return [row | facts for table in tables for row in table.to_dict("records")]


# Method -> {document: what is applied}, of {document: its adapter} and a seed.
METHODS: dict[str, Callable[[Mapping[str, Adapter], int], Mapping[str, Adapter]]] = {
    "question alone": lambda adapters, seed: {},
    _IN_PROMPT: lambda adapters, seed: {},
    "Doc-to-LoRA": lambda adapters, seed: adapters,
    _TOGETHER_NAME: _together,
    _OTHER: _others,
}
