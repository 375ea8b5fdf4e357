"""What answering costs: a token with many blocks beside one of the base model, a routed answer beside a plain one.

    OMP_NUM_THREADS=1 d2l study answering    # data/full_runs/answering.jsonl

The ways take turns, and ratios are of the same turn. Times are CPU seconds: other programs on the machine count little.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from d2l_lib.adapter import Adapter
from d2l_lib.documents import question_ids
from d2l_lib.engine import generate
from d2l_lib.model import DocToLoRA
from d2l_lib.studies.measurements import processor_name
from d2l_lib.studies.router import block_pool, drawn_questions

_NEW_TOKENS = 64  # after the first one, whose pass reads the question


def _seconds(do: Callable[[], object]) -> float:
    began = time.process_time()
    do()
    return time.process_time() - began


def _written(model: DocToLoRA, texts: Sequence[str], adapter: Adapter | None, count: int) -> Callable[[], object]:
    """Write `count` tokens after each question, whatever they are."""
    ids = torch.tensor(question_ids(model.tokenizer, [texts[0]] * len(texts)))
    options = {"min_new_tokens": count, "max_new_tokens": count}

    def write() -> None:
        with model.applied(adapter) as network:
            generate(network, model.tokenizer, ids, torch.ones_like(ids), **options)

    return write


def measure_answering(
    model: DocToLoRA,
    n: int,
    seed: int,
    sizes: Sequence[int] = (1, 64, 1024, 10000),
    questions: Sequence[int] = (1, 16),
    split: str = "test",
) -> pd.DataFrame:
    """A row per number of blocks, of questions answered together, and measure; n turns each, after one not measured.

    Columns: blocks, questions, measure, n, milliseconds and base_milliseconds (medians, of the processor), ratio,
    ratio_low, ratio_high (median and quartiles over the turns).

    Measures: "a token", with all blocks added up against the base model alone, prompt and first token left out; "a
    routed answer" (`answer(blocks=1)`) to questions on the blocks, against answers with the bias alone.
    """
    rows, place = [], {"device_name": processor_name(), "torch": torch.__version__, "split": split}
    for size in sizes:
        adapter, pool = block_pool(model, size, seed, split)
        bias = replace(adapter, blocks=())
        drawn = drawn_questions(pool, max(questions), size, seed)
        for count in questions:
            texts = [drawn[i % len(drawn)][0].text for i in range(count)]
            ways = {
                f"{name}, {tokens}": _written(model, texts, inside, tokens)
                for name, inside in (("ours", adapter), ("base", None))
                for tokens in (1, 1 + _NEW_TOKENS)
            }
            ways |= {
                "routed": lambda texts=texts, inside=adapter: model.answer(texts, inside, blocks=1),
                "plain": lambda texts=texts, inside=bias: model.answer(texts, inside),
            }
            turns = pd.DataFrame([{way: _seconds(do) for way, do in ways.items()} for _ in range(n + 1)][1:])
            last = 1 + _NEW_TOKENS
            token = {name: (turns[f"{name}, {last}"] - turns[f"{name}, 1"]) / _NEW_TOKENS for name in ("ours", "base")}
            both = {
                "a token": (token["ours"], token["base"]),
                "a routed answer": (turns["routed"] / count, turns["plain"] / count),
            }
            for measure, (ours, base) in both.items():
                low, middle, high = np.quantile(ours / base, (0.25, 0.5, 0.75)).round(3).tolist()
                row = {"blocks": size, "questions": count, "measure": measure, "n": n}
                row |= {"milliseconds": round(1000 * ours.median(), 3)}
                row |= {"base_milliseconds": round(1000 * base.median(), 3)}
                rows.append(row | {"ratio": middle, "ratio_low": low, "ratio_high": high} | place)
        print(f"{size} blocks", flush=True)
    return pd.DataFrame(rows)


def run(model: DocToLoRA, n: int, seed: int) -> pd.DataFrame:
    """The record: `measure_answering` on test documents."""
    return measure_answering(model, n, seed)
