"""How good a model is as a writer of questions on texts, by style: what is left out, and whether answers are read."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from d2l_lib.engine import TransformersEngine
from d2l_lib.tasks.scores import token_scores, wilson
from d2l_lib.training.selfgen import Settings, make_shard, read_texts

_SETTINGS = Settings(
    unrelated_share=0.0, unanswerable_share=0.0, prompt="brief", max_new_tokens=40, questions=6, seed=0
)
_WRITER_TOKENS = {"lists": 160, "openings": 32}


def run(model: tuple, n: int, seed: int, texts: str, styles: Sequence[str]) -> Iterator[list[dict]]:
    """After each style all rows so far: questions written, left out by reason and kept on the first n texts.

    model: (base model, tokenizer), which writes the questions and answers them.
    texts: a folder of .txt and .md files, or a .jsonl file (see `selfgen.read_texts`).
    styles: of `settings.WRITERS`.

    all_words_inside: kept answers whose words all stand in the text or the question, as a share with interval.
    all_words_in_next: the same with the next text, which is what chance gives.
    """
    documents, rows = read_texts(texts)[:n], []
    if len(documents) < max(n, 2):
        raise ValueError(f"{texts} holds {len(documents)} texts; at least two, and {n} are asked for: lower --n")
    engine = TransformersEngine("writer", *model)
    for style in styles:
        tokens = {"writer_max_new_tokens": _WRITER_TOKENS[style]}
        settings = replace(_SETTINGS, documents=n, shard_size=n, seed=seed, writer_style=style, **tokens)
        began = time.process_time()
        table, counts = make_shard(settings, 0, engine, documents, engine)
        row = {"style": style, "written": counts["questions"] + _sum(counts, "writer_")}
        row |= {name: count for name, count in counts.items() if count}
        row |= inside(table.to_pylist(), documents) | {"cpu_seconds": round(time.process_time() - began, 1)}
        rows.append(row)
        print(row, flush=True)
        yield list(rows)


def inside(rows: Sequence[dict], documents: Sequence[str]) -> dict:
    """Shares of answers whose words all stand in their text or question, and in the next text of `documents`."""
    shares: list[tuple[float, float]] = []
    for row in rows:
        place = documents.index(row["document"])
        both = row["document"], documents[(place + 1) % len(documents)]
        for question, answer in zip(row["questions"], row["answers"], strict=True):
            shares.append(tuple(token_scores(f"{text} {question}", answer).recall for text in both))
    n, right = len(shares), [sum(one[k] == 1 for one in shares) for k in (0, 1)]
    low, high = wilson(right[0], n)
    return {
        "all_words_inside": round(right[0] / max(n, 1), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "all_words_in_next": round(right[1] / max(n, 1), 4),
    }


def _sum(counts: dict[str, int], beginning: str) -> int:
    return sum(n for name, n in counts.items() if name.startswith(beginning))
