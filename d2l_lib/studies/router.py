"""The router in one pass: which block a question is about, and the answer, from 64 to 10,000 blocks."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pandas as pd

from d2l_lib.adapter import Adapter
from d2l_lib.documents import Chunk, chunk_document
from d2l_lib.model import DocToLoRA
from d2l_lib.routing import key_scores, route, route_by_keys
from d2l_lib.tasks import world
from d2l_lib.tasks.scores import wilson

_AT_ONCE = 64  # documents to internalize
_SHORTLIST = 8
_MOST_TRIED = 600  # most blocks to try one by one
_TRIED = 40  # questions for that


Pooled = list[tuple[world.Question, set[int]]]  # questions, and the places of the chunks that hold their evidence


def draw_pool(model: DocToLoRA, n_blocks: int, seed: int, split: str) -> tuple[list[list[Chunk]], Pooled]:
    """(chunks of documents, `n_blocks` of them or a few more; questions on the first `n_blocks`, with their places).

    Documents have 8 facts of one split; there are not enough names to keep them disjoint. Questions are about (subject,
    relation) pairs that occur once.
    """
    rng = random.Random(f"router/{split}/{seed}")  # a larger pool begins with the smaller one's documents
    documents, chunks, total = [], [], 0
    while total < n_blocks:
        some = [world.draw_document(rng, split, 8) for _ in range(min(64, 1 + (n_blocks - total) // 9))]
        each = [chunk_document(one.text, model.encoder_tokenizer, model.chunk_tokens) for one in some]
        documents, chunks, total = documents + some, chunks + each, total + sum(map(len, each))
    count: dict[tuple[str, str], int] = {}
    for document in documents:
        for fact in document.facts:
            count[fact.subject, fact.relation] = count.get((fact.subject, fact.relation), 0) + 1
    questions, start = [], 0
    for document, of_document in zip(documents, chunks, strict=True):
        for fact in document.facts:
            right = {start + place for place, chunk in enumerate(of_document) if _overlap(chunk.span, fact.span)}
            if count[fact.subject, fact.relation] == 1 and right and max(right) < n_blocks:
                questions.append((world.question_about(rng, fact), right))
        start += len(of_document)
    return chunks, questions


def drawn_questions(pool: Pooled, n: int, size: int, seed: int) -> Pooled:
    """`n` questions of a pool of `size` blocks, or all if there are fewer."""
    return random.Random(f"router/questions/{size}/{seed}").sample(pool, min(n, len(pool)))


def block_pool(model: DocToLoRA, n_blocks: int, seed: int, split: str) -> tuple[Adapter, Pooled]:
    """(an adapter of the first `n_blocks` blocks of `draw_pool`, its questions)."""
    chunks, questions = draw_pool(model, n_blocks, seed, split)
    texts, blocks = ["".join(chunk.text for chunk in of_document) for of_document in chunks], []
    for start in range(0, len(texts), _AT_ONCE):
        for adapter in model.internalize_each(texts[start : start + _AT_ONCE]):
            blocks += adapter.blocks
    return model.adapter_of(blocks[:n_blocks]), questions


def _overlap(first: tuple[int, int], second: tuple[int, int]) -> bool:
    return first[0] < second[1] and second[0] < first[1]


def _timed(answer: Callable[[], list[str]]) -> tuple[list[str], float]:
    """(answers, the processor's milliseconds per answer)."""
    began = time.process_time()
    answers = answer()
    return answers, 1000 * (time.process_time() - began) / len(answers)


def measure_router(
    model: DocToLoRA, n: int, seed: int, sizes: Sequence[int] = (64, 564, 2000, 10000), split: str = "test"
) -> pd.DataFrame:
    """A row per number of blocks and measure: blocks, measure, n, share, low, high, cpu_milliseconds, and megabytes.

    Ranks by `routing.key_scores`: "right block first", "among 4", "among 8". Exact match of greedy answers: with the
    first block ("best block"), with that where it is relevant enough ("best block, tried"), with the block that the
    model's router chooses, if any ("router": `answer(blocks=1)`), with the most relevant of the best 8, with sparse
    reading of the best 8 and of all blocks, with the most relevant of all blocks (if few enough to try), and with the
    bias alone, for its time.

    megabytes, megabytes_of_keys: of the adapter's tensors, and of the keys of the one layer that the router needs.
    """
    rows = []
    for size in sizes:
        adapter, pool = block_pool(model, size, seed, split)
        chosen = drawn_questions(pool, n, size, seed)
        texts, adapters = [question.text for question, _ in chosen], [adapter] * len(chosen)
        _ = adapter.stacked, key_scores(model, texts[:1], adapters[:1])  # built once, before the clock starts
        keys = next(iter(adapter.stacked.values()))[0]
        sizes_mb = {"megabytes": adapter.nbytes / 1e6, "megabytes_of_keys": keys[0].nbytes / 1e6}

        def add(measure: str, right: list[bool], milliseconds: float, size=size, facts=sizes_mb) -> None:
            low, high = wilson(sum(right), len(right))
            share = {"n": len(right), "share": sum(right) / len(right), "low": low, "high": high}
            rows.append(
                {"blocks": size, "measure": measure} | share | {"cpu_milliseconds": round(milliseconds, 2)} | facts
            )

        scores, ms = _timed(lambda: key_scores(model, texts, adapters))  # noqa: B023
        ranks = [
            min(score.argsort(descending=True).tolist().index(place) for place in right)
            for score, (_, right) in zip(scores, chosen, strict=True)
        ]
        for most, name in ((1, "right block first"), (4, "among 4"), (8, "among 8")):
            add(name, [rank < most for rank in ranks], ms)
        for name, count, answer in _answers(model, adapter, size):
            some = chosen[:count]
            answers, ms = _timed(lambda: answer([question.text for question, _ in some]))  # noqa: B023
            add(name, [a == question.answer for a, (question, _) in zip(answers, some, strict=True)], ms)
        print(f"{size} blocks: {len(chosen)} questions", flush=True)
    return pd.DataFrame(rows).assign(split=split)


def _answers(model: DocToLoRA, adapter: Adapter, size: int) -> list[tuple[str, int | None, Callable]]:
    """(measure, number of questions (None: all), function from texts to answers)."""
    bias = replace(adapter, blocks=())

    def routed(texts, blocks, read):
        return model.answer(texts, route_by_keys(model, texts, [adapter] * len(texts), blocks), read=read)

    def tried(texts):
        return route(model, texts, [adapter] * len(texts), least=model.least_relevance)

    ways = [
        ("bias alone", None, lambda texts: model.answer(texts, bias)),
        ("best block", None, lambda texts: routed(texts, 1, "sum")),
        ("best block, tried", None, lambda texts: model.answer(texts, tried(texts))),
        ("router", None, lambda texts: model.answer(texts, adapter, blocks=1)),
        ("most relevant of 8", None, lambda texts: model.answer(texts, adapter, blocks=1, shortlist=_SHORTLIST)),
        ("sparse reading of the best 8", None, lambda texts: routed(texts, _SHORTLIST, "sparse")),
        ("sparse reading of all", None, lambda texts: model.answer(texts, adapter, read="sparse")),
    ]
    if size <= _MOST_TRIED:
        every = {"blocks": 1, "shortlist": None}
        ways.append(("every block tried", _TRIED, lambda texts: model.answer(texts, adapter, **every)))
    return ways


def run(model: DocToLoRA, n: int, seed: int) -> pd.DataFrame:
    """The record: `measure_router` on test documents."""
    return measure_router(model, n, seed)
