"""Needles in haystacks: how far an internalized document reaches, and how far the base model reads."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pandas as pd

from d2l_lib.adapter import Adapter
from d2l_lib.analysis.weights import block_norms
from d2l_lib.model import DocToLoRA
from d2l_lib.studies.base_scores import greedy_answers
from d2l_lib.tasks import needles
from d2l_lib.tasks.scores import summarise

NEEDLE_LENGTHS = tuple(2**k for k in range(6, 18))
IN_CONTEXT_LENGTHS = tuple(2**k for k in range(6, 14))


def needle_samples(
    model,
    lengths: Sequence[int],
    n: int,
    seed: int,
    *,
    chunk_tokens: int | None = None,
    split: str = "test",
    batch: int = 20,
) -> pd.DataFrame:
    """Exact match of Doc-to-LoRA on `n` haystacks per length; the haystack is internalized, the prompt is the
    question alone.

    Columns: method, length_tokens, depth (0 to 1), answer, prediction, correct, chunks, rank, seconds (per document, to
    internalize), seed.
    """
    rows = []
    for length in lengths:
        haystacks = list(needles.evaluation_set(model.tokenizer, length, n, seed, split))
        for start in range(0, n, batch):
            some = haystacks[start : start + batch]
            adapters, seconds = [], []
            for haystack in some:
                began = time.perf_counter()
                adapters += model.internalize_each([haystack.text], chunk_tokens=chunk_tokens)
                seconds.append(time.perf_counter() - began)
            predictions = model.answer([h.question for h in some], adapters, max_new_tokens=10)
            for haystack, adapter, prediction, took in zip(some, adapters, predictions, seconds, strict=True):
                rows.append(
                    _needle_row("Doc-to-LoRA", length, haystack, prediction, seed)
                    | {"chunks": len(adapter.blocks), "rank": adapter.rank, "seconds": round(took, 4)}
                )
    return pd.DataFrame(rows)


def needle_in_context_samples(model, lengths: Sequence[int], n: int, seed: int, split: str = "test") -> pd.DataFrame:
    """The same haystacks and questions put to the base model with the haystack in its prompt, also beyond its
    window.
    """
    rows = []
    for length in lengths:
        haystacks = list(needles.evaluation_set(model.tokenizer, length, n, seed, split))
        prompts = [f"{h.text}\n\n{h.question}" for h in haystacks]
        predictions = greedy_answers(model.base_model, model.tokenizer, prompts, max_new_tokens=10)
        rows += [_needle_row("in context", length, h, p, seed) for h, p in zip(haystacks, predictions, strict=True)]
    return pd.DataFrame(rows)


def _needle_row(method: str, length: int, haystack: needles.Haystack, prediction: str, seed: int) -> dict:
    return {
        "method": method,
        "length_tokens": length,
        "depth": round(haystack.depth, 4),
        "answer": haystack.answer,
        "prediction": prediction,
        "correct": needles.exact_match(prediction, haystack.answer),
        "seed": seed,
    }


def needle_norms(adapter: Adapter, haystack: needles.Haystack) -> pd.DataFrame:
    """Frobenius norm of every block's update, all layers and modules together; columns chunk, norm, holds_needle."""
    norms, (start, end) = block_norms(adapter), haystack.needle_span
    inside = (norms["start"] < end) & (start < norms["end"])
    return norms.assign(holds_needle=inside)[["chunk", "norm", "holds_needle"]]


def run(model: DocToLoRA, n: int, seed: int, variant: str, training_seed: int) -> pd.DataFrame:
    """The record: shares by length and depth; of the bundled model also with the haystack in the prompt."""
    samples = needle_samples(model, NEEDLE_LENGTHS, n, seed)
    if (variant, training_seed) == ("ours", 0):
        samples = pd.concat([samples, needle_in_context_samples(model, IN_CONTEXT_LENGTHS, n, seed)])
    bins = (samples["depth"] * needles.N_DEPTH_BINS).astype(int).clip(upper=needles.N_DEPTH_BINS - 1)
    samples["depth"] = (bins + 0.5) / needles.N_DEPTH_BINS
    table = summarise(samples, ["method", "length_tokens", "depth"])
    return table.assign(variant=variant, training_seed=training_seed)
