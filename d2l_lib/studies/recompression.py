"""Needle accuracy of adapters that were cut to a smaller rank."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import pandas as pd

from d2l_lib.adapter import singular_part
from d2l_lib.analysis.weights import recompression
from d2l_lib.model import DocToLoRA
from d2l_lib.studies import earlier_rows, record_path
from d2l_lib.tasks import needles
from d2l_lib.tasks.scores import summarise

RANKS = (4, 8, 16, 32, 64, 128)


def recompressed_needles(
    model: DocToLoRA, length_tokens: int, n: int, seed: int, ranks: Sequence[int] = RANKS, skip: int = 0
) -> Iterator[list[dict]]:
    """For haystacks `skip` to `n`, the rows of every rank: a list per haystack, which is internalized once.

    Keys: length_tokens, sample, depth, rank, full (bool: nothing was cut), error and bytes (see `recompression`),
    stored_bytes (of the saved adapter: tensors that equal chunks share count once), answer, prediction, correct,
    seconds (to internalize), seed.
    """
    for sample, haystack in enumerate(needles.evaluation_set(model.tokenizer, length_tokens, n, seed)):
        if sample < skip:
            continue
        began = time.perf_counter()
        (whole,) = model.internalize_each([haystack.text])
        seconds = round(time.perf_counter() - began, 2)
        cut = sorted(rank for rank in ranks if rank < whole.rank)
        small = singular_part(whole, 0, max(cut)) if cut else None
        adapters = [singular_part(small, 0, rank) for rank in cut] + [whole]
        table = recompression(whole, [*cut, whole.rank]).to_dict("records")
        predictions = [model.answer(haystack.question, adapter, max_new_tokens=10) for adapter in adapters]
        yield [
            {"length_tokens": length_tokens, "sample": sample, "depth": round(haystack.depth, 4)}
            | {"rank": row["rank"], "full": row["rank"] == whole.rank, "error": round(row["error"], 6)}
            | {"bytes": row["bytes"], "stored_bytes": adapter.nbytes}
            | {"answer": haystack.answer, "prediction": prediction}
            | {"correct": needles.exact_match(prediction, haystack.answer), "seconds": seconds, "seed": seed}
            for row, adapter, prediction in zip(table, adapters, predictions, strict=True)
        ]


def run(model: DocToLoRA, n: int, seed: int, length: int) -> Iterator[list[dict]]:
    """The record after each haystack. Rows of other lengths and seeds stay; recorded haystacks are skipped.

    ValueError if the file holds rows of another hypernetwork.
    """
    rows, key = earlier_rows("recompression"), model.hypernetwork_key
    if any(row["hypernetwork"] != key for row in rows):
        raise ValueError(f"{record_path('recompression')} holds rows of another hypernetwork: move it away first")
    done = {row["sample"] for row in rows if (row["length_tokens"], row["seed"]) == (length, seed)}
    for new in recompressed_needles(model, length, n, seed, RANKS, skip=len(done)):
        rows += [row | {"n": n, "hypernetwork": key} for row in new]
        right = sum(row["correct"] for row in new)
        print(f"haystack {new[0]['sample'] + 1} of {n}: {right} of {len(new)}", flush=True)
        yield rows
    print(summarise(pd.DataFrame(rows), ["length_tokens", "rank"]).to_string())
