"""Questions about passages of real text: the passage in the prompt, in an adapter, among others, and controls."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import pandas as pd

from d2l_lib.model import DocToLoRA
from d2l_lib.tasks import qa, scores

_TOGETHER = 10  # passages of one adapter
_NEW_TOKENS = 24
_AT_ONCE = 64  # questions, for memory
_METRICS = ("token_f1_squad", "exact_match_squad", "recall")


def run(model: DocToLoRA, n: int, seed: int, questions: str) -> pd.DataFrame:
    """A row for each method and metric: n questions, passages, score with its interval, seconds of the processor.

    questions: "DATASET" or "DATASET=FILE" (see `tasks.qa.load_qa`); n of them are drawn with `seed`.
    """
    name, _, file = questions.partition("=")
    frame = qa.load_qa(name, file or None, n=n, seed=seed)
    groups = [(document, group) for document, group in qa.group_by_document(frame)]
    start = time.process_time()
    adapters = dict(zip((one for one, _ in groups), model.internalize_each([one for one, _ in groups]), strict=True))
    seconds_internalizing = (time.process_time() - start) / len(groups)
    others = _others(list(adapters), seed)
    pools = _pools(list(adapters), seed)
    together = {}
    for pool in pools:
        total = sum((adapters[document] for document in pool), 0)
        together |= dict.fromkeys(pool, total)

    def own(documents: Sequence[str], asked: Sequence[str]) -> list[str]:
        return _answers(model, asked, [adapters[document] for document in documents])

    def in_prompt(documents: Sequence[str], asked: Sequence[str]) -> list[str]:
        prompts = [
            qa.with_document(document, [question], model.tokenizer, model.window, _NEW_TOKENS)[0]
            for document, question in zip(documents, asked, strict=True)
        ]
        return _answers(model, prompts, [None] * len(prompts))

    methods: dict[str, Callable[[Sequence[str], Sequence[str]], list[str]]] = {
        "question alone": lambda documents, asked: _answers(model, asked, [None] * len(asked)),
        "passage in the prompt": in_prompt,
        "Doc-to-LoRA": own,
        f"Doc-to-LoRA, {_TOGETHER} passages in one adapter": lambda documents, asked: _answers(
            model, asked, [together[document] for document in documents]
        ),
        "another passage's adapter": lambda documents, asked: _answers(
            model, asked, [adapters[others[document]] for document in documents]
        ),
    }
    rows = []
    for method, answer in methods.items():
        tables, start = [], time.process_time()
        for first in range(0, len(frame), _AT_ONCE):
            some = frame.iloc[first : first + _AT_ONCE]
            tables.append(some.assign(prediction=answer(list(some["document"]), list(some["question"]))))
        spent = (time.process_time() - start) / len(frame)
        rows += _scores(pd.concat(tables), method, seed, seconds=round(spent, 4), n_passages=len(groups))
        print(method, {row["metric"]: round(row["score"], 3) for row in rows[-len(_METRICS) :]}, flush=True)
    facts = {
        "dataset": name,
        "seconds_internalizing": round(seconds_internalizing, 4),
        "kilobytes": round(sum(one.nbytes for one in adapters.values()) / len(adapters) / 1e3, 1),
    }
    return pd.DataFrame([row | facts for row in rows])


def _answers(model: DocToLoRA, asked: Sequence[str], adapters: Sequence) -> list[str]:
    return model.answer(list(asked), list(adapters), max_new_tokens=_NEW_TOKENS)


def _others(documents: list[str], seed: int) -> dict[str, str]:
    """Another document for each."""
    order = sorted(documents)
    random.Random(f"passages/{seed}").shuffle(order)
    return {document: order[(place + 1) % len(order)] for place, document in enumerate(order)}


def _pools(documents: list[str], seed: int) -> list[list[str]]:
    """All documents in groups of at most `_TOGETHER`."""
    order = sorted(documents)
    random.Random(f"passages/{seed}/together").shuffle(order)
    return [order[start : start + _TOGETHER] for start in range(0, len(order), _TOGETHER)]


def _scores(predictions: pd.DataFrame, method: str, seed: int, **facts) -> list[dict]:
    """Rows of one method's metrics."""
    scored = qa.score(predictions, "token_f1_squad")
    scored["recall"] = [
        scores.token_scores(prediction, answers, "squad").recall
        for prediction, answers in zip(scored["prediction"], scored["answers"], strict=True)
    ]
    tables = [qa.summarise_scores(scored.assign(method=method), ["method"], metric, seed) for metric in _METRICS]
    return [row | facts for table in tables for row in table.to_dict("records")]
