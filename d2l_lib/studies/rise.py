"""How far the gate must rise with the number of chunks, so that prompts about something else leave it closed.

Among more chunks one is alike by chance (see `row_reader`). Training measures this with a batch of passages; here it is
measured up to the length of a book.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch

from d2l_lib.adapter import Adapter
from d2l_lib.documents import question_ids
from d2l_lib.formats.checkpoints import load_checkpoint, save_checkpoint
from d2l_lib.loading import find_checkpoint
from d2l_lib.model import DocToLoRA
from d2l_lib.presets import RowsPreset
from d2l_lib.row_reading import read_rows
from d2l_lib.tasks import qa
from d2l_lib.training.recipes import never_learned_prompts

SIZES = 1, 4, 16, 64, 256  # chunks
_PASSAGES = 320  # that chunks are drawn from
_OF_ONE = 16  # prompts that meet the same chunks


def run(model: DocToLoRA, n: int, seed: int, questions: str, keep: str | None) -> list[dict]:
    """A row for each number of chunks: how surely n prompts about something else leave the gate closed.

    n: prompts, those that training never saw, again and again with other chunks. questions: the data set of passages,
    "DATASET" or "DATASET=FILE" (see `tasks.qa.load_named`). keep: the model whose folder takes the rise that is fitted;
    None: it is recorded alone.

    `level` is the gate's logit at one chunk that the chosen share of prompts exceeds among so many chunks; the rise is
    the slope of these levels over log(number of chunks), by least squares.
    """
    documents = [document for document, _ in qa.group_by_document(qa.load_named(questions))]
    rng = random.Random(f"rise/{seed}")
    drawn = rng.sample(sorted(documents), min(_PASSAGES, len(documents)))
    blocks = [block for one in model.internalize_each(drawn) for block in one.blocks]
    prompts = never_learned_prompts()
    asked = [prompts[i % len(prompts)] for i in range(n)]
    error, before = RowsPreset.gate_error, float(model.hypernetwork.reader.gate_rise)
    levels, logits = {}, {}
    for size in SIZES:
        if size > len(blocks):
            break
        own = []
        for start in range(0, n, _OF_ONE):
            chosen = rng.sample(blocks, size)
            own += _logits(model, asked[start : start + _OF_ONE], model.adapter_of(chosen))
        logits[size] = torch.tensor(own) + before * math.log(size)
        levels[size] = float(logits[size].quantile(1 - error))
        print(f"{size} chunks: level {levels[size]:.3f}", flush=True)
    rise = fit(levels)
    rows = []
    for size, own in logits.items():
        row = {"chunks": size, "n": n, "prompts": len(prompts), "level": round(levels[size], 4)}
        for name, slope in (("before", before), ("fitted", rise)):
            row[f"open_{name}"] = (own > slope * math.log(size)).float().mean().item()
        rows.append(row | {"rise_before": round(before, 4), "rise_fitted": round(rise, 4), "seed": seed})
    if keep is not None:
        folder = find_checkpoint(keep)
        hypernetwork, meta = load_checkpoint(folder)
        hypernetwork.reader.raise_gate(0.0, rise - float(hypernetwork.reader.gate_rise))
        save_checkpoint(folder, hypernetwork, meta, torch.float16)
    return rows


def fit(levels: dict[int, float]) -> float:
    """The slope of levels {number of chunks: nats} over log(number of chunks), 0 nats at one chunk; at least 0."""
    size = sum(math.log(n) ** 2 for n in levels)
    return max(0.0, sum(level * math.log(n) for n, level in levels.items()) / size) if size else 0.0


@torch.no_grad()
def _logits(model: DocToLoRA, prompts: Sequence[str], adapter: Adapter) -> list[float]:
    """The gate's logit at the end of each prompt."""
    logits = []
    with read_rows(model.base_model, [adapter], model.reading, model.hypernetwork.reader) as state:
        for ids in question_ids(model.tokenizer, list(prompts)):
            state.start()
            model.base_model(torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1)
            logits.append(float(state.gate_logits[0][0, -1]))
    return logits
