"""No block: what a threshold of the null block with a stated error rate costs, by number of blocks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from d2l_lib.adapter import Adapter
from d2l_lib.model import DocToLoRA
from d2l_lib.routing import conformal_threshold, null_margins
from d2l_lib.studies.router import block_pool
from d2l_lib.tasks import world
from d2l_lib.tasks.scores import wilson


def measure_no_block(
    model: DocToLoRA, n: int, seed: int, sizes: Sequence[int] = (8, 64, 564), error: float = 0.05, split: str = "test"
) -> pd.DataFrame:
    """A row per number of blocks, threshold and topic: blocks, rule, null_threshold, about, n, share_read, low, high,
    exact_match, median_margin.

    Topics, `n` questions each: "answerable" by one of the blocks; "unrelated", about facts of the encyclopedia that the
    null block never learned. As many other unrelated questions, drawn alike, choose the threshold of `error`; the other
    rule is the model's own threshold. share_read (low, high: its interval): of questions that read a block.
    median_margin: see `routing.null_margins`, nats.
    """
    rng, rows = random.Random(f"no block/{split}/{seed}"), []
    whole, pool = block_pool(model, max(sizes), seed, split)
    facts = world.encyclopedia()[1::2]
    for size in sizes:
        starts = range(0, len(whole.blocks) - size + 1, size)
        adapters = [replace(whole, blocks=whole.blocks[start : start + size]) for start in starts]
        own = [(question, {place // size for place in right}) for question, right in pool]
        own = [(question, adapters[min(at)]) for question, at in own if len(at) == 1 and min(at) < len(adapters)]
        unrelated = [
            (world.question_about(rng, rng.choice(facts), paraphrase=rng.random() < 0.3), rng.choice(adapters))
            for _ in range(2 * n)
        ]
        rules = {"as trained": model.reading.null_threshold}
        rules[f"error of {error:.0%}"] = conformal_threshold(_margins(model, unrelated[n:]), error)
        for about, asked in (("answerable", rng.sample(own, min(n, len(own)))), ("unrelated", unrelated[:n])):
            margins = _margins(model, asked)
            for rule, threshold in rules.items():
                read, reading = int((margins > threshold).sum()), replace(model.reading, null_threshold=threshold)
                answers = model.answer(
                    [question.text for question, _ in asked], [one for _, one in asked], read=reading
                )
                right = [answer == question.answer for answer, (question, _) in zip(answers, asked, strict=True)]
                low, high = wilson(read, len(asked))
                row = {"blocks": size, "rule": rule, "null_threshold": threshold, "about": about, "n": len(asked)}
                row |= {"share_read": read / len(asked), "low": low, "high": high}
                rows.append(row | {"exact_match": sum(right) / len(asked), "median_margin": float(margins.median())})
        print(f"{size} blocks", flush=True)
    return pd.DataFrame(rows).assign(error=error, split=split)


def _margins(model: DocToLoRA, asked: Sequence[tuple[world.Question, Adapter]]) -> Tensor:
    return torch.cat([null_margins(model, [question.text], adapter) for question, adapter in asked])


def run(model: DocToLoRA, n: int, seed: int) -> pd.DataFrame:
    """The record: `measure_no_block` on test documents."""
    return measure_no_block(model, n, seed)
