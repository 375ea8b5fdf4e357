"""How the gate weighs words among many chunks, and how far it rises with their number (see `row_reader`).

Among more chunks one is alike by chance. Training measures this with a batch of passages; here it is measured up to the
length of a book, for prompts about something else and for questions about one of the chunks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from d2l_lib.adapter import Adapter, Block
from d2l_lib.documents import question_ids
from d2l_lib.model import DocToLoRA
from d2l_lib.presets import PRESETS, RowsPreset
from d2l_lib.row_reading import read_rows
from d2l_lib.studies.fits import keep_in_reader, minimised
from d2l_lib.tasks import qa
from d2l_lib.training.recipes import never_learned_prompts
from d2l_lib.training.row_features import Limits, never_learned, passages_of

SIZES = 1, 4, 16, 64, 256  # chunks
_PASSAGES = 320  # that chunks are drawn from
_OF_ONE = 16  # prompts that meet the same chunks
_RIDGE = 1e-3


@dataclass(frozen=True)
class _Asked:
    """Prompts among so many chunks: the gate's logits without words and rise [n], and the largest w_1 of each [n]."""

    chunks: int
    logits: Tensor
    words: Tensor

    def gate(self, words: float, rise: float) -> Tensor:
        """[n]: the gate's logits with these weights."""
        return self.logits + words * self.words - rise * math.log(self.chunks)


def run(model: DocToLoRA, n: int, seed: int, questions: str, keep: str | None) -> list[dict]:
    """A row for each number of chunks: how many of n prompts about something else, and of n questions, open the gate.

    n: prompts, those that training never saw, and questions about passages that it never saw, again and again with
    other chunks. questions: the data set that was learned from, "DATASET" or "DATASET=FILE" (see
    `tasks.qa.load_named`). keep: the model whose folder takes the two weights that are fitted; None: they are recorded
    alone.

    The weight of words is fitted by a logistic regression of what is asked (something else, or one of the chunks) on
    the logit, the words and the logarithm of the number of chunks. `level` is the logit, without a rise, that the
    chosen share of prompts exceeds among so many chunks; the rise is the slope of these levels over that logarithm, by
    least squares.
    """
    frame, p = qa.load_named(questions), PRESETS["smollm2"].rows
    passages = passages_of(frame, model.tokenizer, Limits(p.longest_passage))
    unseen = [passages[i] for i in sorted(never_learned(len(passages), p.validation))]
    rng = random.Random(f"rise/{seed}")
    documents = sorted(set(frame["document"]) - {one.text for one in unseen})
    drawn = rng.sample(documents, min(_PASSAGES, len(documents)))
    blocks = [block for one in model.internalize_each(drawn) for block in one.blocks]
    adapters = model.internalize_each([one.text for one in unseen])
    about = [(prompt, own.blocks) for one, own in zip(unseen, adapters, strict=True) for prompt, _, _ in one.questions]
    others = [(prompt, ()) for prompt in question_ids(model.tokenizer, never_learned_prompts())]
    reader, error = model.hypernetwork.reader, RowsPreset.gate_error
    before = float(reader.gate_words), float(reader.gate_rise)
    asked = []
    for size in (one for one in SIZES if one <= len(blocks)):
        asked.append([_ask(model, some, blocks, size, n, rng) for some in (others, about)])
        print(f"{size} chunks", flush=True)
    words = fit_words(asked)
    levels = {one.chunks: float(one.gate(words, 0.0).quantile(1 - error)) for one, _ in asked}
    fitted = words, fit_rise(levels)
    rows = []
    for elsewhere, related in asked:
        row = {"chunks": elsewhere.chunks, "n": n, "prompts": len(others), "questions": len(about)}
        row["level"] = round(levels[elsewhere.chunks], 4)
        for name, weights in (("before", before), ("fitted", fitted)):
            row[f"open_{name}"] = (elsewhere.gate(*weights) > 0).float().mean().item()
            row[f"related_{name}"] = (related.gate(*weights) > 0).float().mean().item()
            row |= {f"words_{name}": round(weights[0], 4), f"rise_{name}": round(weights[1], 4)}
        rows.append(row | {"seed": seed})
    if keep is not None:
        keep_in_reader(keep, lambda reader: reader.weigh_gate(*fitted))
    return rows


def fit_words(asked: Sequence[Sequence[_Asked]]) -> float:
    """The weight of words, at least 0: of (prompts about something else, questions about a chunk) for each size."""
    parts, about = [], []
    for both in asked:
        for place, one in enumerate(both):
            size = torch.full_like(one.words, math.log(one.chunks))
            parts.append(torch.stack([one.logits, one.words, size], -1))
            about.append(torch.full_like(one.words, place))
    x, y = torch.cat(parts), torch.cat(about)
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-6)

    def loss(weights: Tensor) -> Tensor:
        logits = (x - mean) / scale @ weights[:-1] + weights[-1]
        return F.binary_cross_entropy_with_logits(logits, y) + _RIDGE * weights[:-1].square().sum()

    logit, words, _ = (minimised(loss, len(scale) + 1)[:-1] / scale).tolist()
    return max(0.0, words / logit) if logit > 0 else 0.0


def fit_rise(levels: dict[int, float]) -> float:
    """The slope of levels {number of chunks: nats} over log(number of chunks), 0 nats at one chunk; at least 0."""
    size = sum(math.log(n) ** 2 for n in levels)
    return max(0.0, sum(level * math.log(n) for n, level in levels.items()) / size) if size else 0.0


def _ask(
    model: DocToLoRA,
    some: Sequence[tuple[list[int], Sequence[Block]]],
    blocks: Sequence[Block],
    size: int,
    n: int,
    rng: random.Random,
) -> _Asked:
    """n of these prompts, each with its own blocks and so many others that there are `size`."""
    found: list[tuple[float, float]] = []
    for start in range(0, n, _OF_ONE):
        part = [some[i % len(some)] for i in range(start, min(start + _OF_ONE, n))]
        chosen = rng.sample(blocks, size)
        groups = [([prompt for prompt, _ in part], ())] if not part[0][1] else [([prompt], own) for prompt, own in part]
        for prompts, own in groups:
            found += _gates(model, prompts, model.adapter_of([*own, *chosen[: size - len(own)]]))
    logits, words = torch.tensor(found).unbind(-1)
    return _Asked(size, logits, words)


@torch.no_grad()
def _gates(model: DocToLoRA, prompts: Sequence[list[int]], adapter: Adapter) -> list[tuple[float, float]]:
    """For each prompt (the gate's logit at its end without words and rise, the largest w_1 of a chunk)."""
    reader, rise, found = model.hypernetwork.reader, math.log(len(adapter.blocks)), []
    with read_rows(model.base_model, [adapter], model.reading, reader) as state:
        for prompt in prompts:
            state.start()
            model.base_model(torch.tensor([prompt], device=model.device), use_cache=False, logits_to_keep=1)
            words = float(state.words[0][0, -1, :, 0].max())
            logit = float(state.gate_logits[0][0, -1]) - float(reader.gate_words) * words
            found.append((logit + float(reader.gate_rise) * rise, words))
    return found
