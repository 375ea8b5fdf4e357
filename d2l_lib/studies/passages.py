"""Questions about passages of real text: the passage in the prompt, in an adapter, among others, and controls."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping

import pandas as pd

from d2l_lib.adapter import Adapter
from d2l_lib.model import DocToLoRA
from d2l_lib.tasks import qa, scores

_IN_PROMPT = "passage in the prompt"
_TOGETHER = 10  # passages of one adapter
_NEW_TOKENS = 24
_AT_ONCE = 64  # questions, for memory
_METRICS = ("token_f1_squad", "exact_match_squad", "recall")


def run(model: DocToLoRA, n: int, seed: int, questions: str) -> pd.DataFrame:
    """A row for each method and metric: n questions, passages, score with its interval, seconds of the processor.

    questions: "DATASET" or "DATASET=FILE" (see `tasks.qa.load_named`); n of them are drawn with `seed`.
    """
    frame = qa.load_named(questions, n=n, seed=seed)
    documents = [document for document, _ in qa.group_by_document(frame)]
    start = time.process_time()
    adapters = dict(zip(documents, model.internalize_each(documents), strict=True))
    seconds_internalizing = (time.process_time() - start) / len(documents)
    applied = {
        "question alone": {},
        _IN_PROMPT: {},
        "Doc-to-LoRA": adapters,
        f"Doc-to-LoRA, {_TOGETHER} passages in one adapter": _together(adapters, seed),
        "another passage's adapter": _others(adapters, seed),
    }
    rows = []
    for method, of_document in applied.items():
        replies, start = [], time.process_time()
        for first in range(0, len(frame), _AT_ONCE):
            some = frame.iloc[first : first + _AT_ONCE]
            prompts = list(some["question"]) if method != _IN_PROMPT else _with_passages(model, some)
            chosen = [of_document.get(document) for document in some["document"]]
            replies += model.answer(prompts, chosen, max_new_tokens=_NEW_TOKENS)
        seconds = round((time.process_time() - start) / len(frame), 4)
        rows += _scores(frame.assign(method=method, prediction=replies), seed, seconds=seconds)
        print(method, {row["metric"]: round(row["score"], 3) for row in rows[-len(_METRICS) :]}, flush=True)
    facts = {
        "n_passages": len(documents),
        "dataset": frame["dataset"].iloc[0],
        "seconds_internalizing": round(seconds_internalizing, 4),
        "kilobytes": round(sum(one.nbytes for one in adapters.values()) / len(adapters) / 1e3, 1),
    }
    return pd.DataFrame([row | facts for row in rows])


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


def _scores(predictions: pd.DataFrame, seed: int, **facts) -> list[dict]:
    """Rows of one method's metrics."""
    scored = qa.score(predictions, "token_f1_squad")
    scored["recall"] = [
        scores.token_scores(prediction, answers, "squad").recall
        for prediction, answers in zip(scored["prediction"], scored["answers"], strict=True)
    ]
    tables = [qa.summarise_scores(scored, ["method"], metric, seed) for metric in _METRICS]
    return [row | facts for table in tables for row in table.to_dict("records")]
