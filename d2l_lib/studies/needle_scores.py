"""Needles in haystacks: how far an internalized document reaches, and how far the base model reads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import pandas as pd

from d2l_lib.adapter import Adapter
from d2l_lib.analysis.weights import block_norms
from d2l_lib.documents import check_texts
from d2l_lib.model import DocToLoRA
from d2l_lib.studies import earlier_rows
from d2l_lib.studies.base_scores import greedy_answers
from d2l_lib.tasks import needles
from d2l_lib.tasks.scores import summarise
from d2l_lib.training.processes import shared

_NEEDLE_LENGTHS = tuple(2**k for k in range(6, 18))
_IN_CONTEXT_LENGTHS = tuple(2**k for k in range(6, 14))
_BATCH = 20  # haystacks
_METHODS = {"sum": "Doc-to-LoRA", "sparse": "Doc-to-LoRA, read sparsely"}


def needle_samples(
    model,
    lengths: Sequence[int],
    n: int,
    seed: int,
    *,
    split: str = "test",
    read: Sequence[str] = ("sum",),
) -> pd.DataFrame:
    """Exact match of Doc-to-LoRA on `n` haystacks per length; the prompt is the question alone.

    read: how the adapters are read, one way or several ("sum", "sparse"); they are made once.

    Columns: method, length_tokens, depth (0 to 1), answer, prediction, correct, chunks, rank, read, seed.
    """
    read = check_texts(read, "ways to read")

    @lru_cache(maxsize=1)
    def haystacks(length: int) -> list[needles.Haystack]:
        return list(needles.evaluation_set(model.tokenizer, length, n, seed, split))

    def work(piece: tuple[int, int]) -> list[dict]:
        length, start = piece
        some, rows = haystacks(length)[start : start + _BATCH], []
        adapters = [one for h in some for one in model.internalize_each([h.text])]
        for how in read:
            predictions = model.answer([h.question for h in some], adapters, max_new_tokens=10, read=how)
            for haystack, adapter, prediction in zip(some, adapters, predictions, strict=True):
                row = _needle_row(_METHODS[how], length, haystack, prediction, seed)
                rows.append(row | {"chunks": len(adapter.blocks), "rank": adapter.rank, "read": how})
        return rows

    pieces = [(length, start) for length in lengths for start in range(0, n, _BATCH)]
    return pd.DataFrame([row for rows in shared(pieces, work) for row in rows])


def needle_in_context_samples(model, lengths: Sequence[int], n: int, seed: int) -> pd.DataFrame:
    """The same for the base model with the haystack in its prompt, also beyond its window."""
    rows = []
    for length in lengths:
        haystacks = list(needles.evaluation_set(model.tokenizer, length, n, seed))
        prompts = [f"{h.text}\n\n{h.question}" for h in haystacks]
        predictions = greedy_answers(model.base_model, model.tokenizer, prompts, max_new_tokens=10)
        rows += [_needle_row("in context", length, h, p, seed) for h, p in zip(haystacks, predictions, strict=True)]
    return pd.DataFrame(rows)


def _needle_row(method: str, length: int, haystack: needles.Haystack, prediction: str, seed: int) -> dict:
    correct = needles.exact_match(prediction, haystack.answer)
    row = {"method": method, "length_tokens": length, "depth": round(haystack.depth, 4), "answer": haystack.answer}
    return row | {"prediction": prediction, "correct": correct, "seed": seed}


def needle_norms(adapter: Adapter, haystack: needles.Haystack) -> pd.DataFrame:
    """Frobenius norm of every block's update over all layers and modules; columns chunk, norm, holds_needle."""
    norms, (start, end) = block_norms(adapter), haystack.needle_span
    inside = (norms["start"] < end) & (start < norms["end"])
    return norms.assign(holds_needle=inside)[["chunk", "norm", "holds_needle"]]


def run(model: DocToLoRA, n: int, seed: int, variant: str, training_seed: int, read: Sequence[str]) -> list[dict]:
    """The record: shares by length and depth; for the bundled model also with the haystack in the prompt.

    read: "sum", "sparse" or both. The column `read` says which; rows without it are of the sum, or have no adapter.
    "sparse" alone keeps the rows that are recorded of the sum and of the prompt.
    """
    samples = needle_samples(model, _NEEDLE_LENGTHS, n, seed, read=read)
    if "sum" in read and (variant, training_seed) == ("ours", 0):
        samples = pd.concat([samples, needle_in_context_samples(model, _IN_CONTEXT_LENGTHS, n, seed)])
    bins = (samples["depth"] * needles.N_DEPTH_BINS).astype(int).clip(upper=needles.N_DEPTH_BINS - 1)
    samples["depth"] = (bins + 0.5) / needles.N_DEPTH_BINS
    table = summarise(samples, ["method", "length_tokens", "depth"])
    table = table.assign(variant=variant, training_seed=training_seed)
    rows = []
    for row in table.to_dict("records"):
        how = next((how for how, method in _METHODS.items() if method == row["method"]), None)
        rows.append(row if how is None else row | {"read": how})
    if "sum" in read:
        return rows
    recorded = earlier_rows(f"needle_{variant}_seed{training_seed}")
    return [row for row in recorded if row.get("read") != "sparse"] + rows
