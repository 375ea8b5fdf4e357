"""Read an adapter's rows like a memory: each token of an answer attends to all of them.

    logit     l_j = A_j x / |x|  of row j at its linear; l_null = null_key x / |x| + null_logit
    share     p = softmax over all rows of all blocks, and the null row
    reading   y = W x + scale * sum over j of p_j B_j

A block's weight multiplies its rows' shares before they are made to add up to one; 0 takes them out. Composing
documents puts their rows side by side, and forgetting one leaves the others' logits as they were, bit for bit. The null
row has no value: where it has all the share, the model answers as if it had no adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from d2l_lib.adapter import Adapter
from d2l_lib.base_model import target_linears
from d2l_lib.documents import question_ids, stop_ids
from d2l_lib.lora import add_deltas

if TYPE_CHECKING:
    import pandas as pd

    from d2l_lib.model import DocToLoRA

_SHOWN = 3  # rows that a table has for each token


@dataclass(frozen=True)
class RowReading:
    """How rows are chosen.

    temperature: divides the logits; below 1 a token reads fewer rows.
    null_logit: added to the null row's logit, in nats; above 0 an adapter is read less often.

    ValueError for a temperature that is not positive and for numbers that are not finite.
    """

    temperature: float = 1.0
    null_logit: float = 0.0

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be a positive number, not {self.temperature!r}")
        if not math.isfinite(self.null_logit):
            raise ValueError(f"null_logit must be a finite number of nats, not {self.null_logit!r}")


class _Rows:
    """The rows of one adapter side by side, at one module of the last layer."""

    def __init__(self, adapter: Adapter, module: str):
        self.adapter = adapter
        A, B = zip(*((block.A[module][0], block.B[module][0]) for block in adapter.blocks), strict=True)
        self.A, self.B = torch.cat(A), torch.cat(B)  # [R, d_in], [R, d_out]
        counts = torch.tensor([block.rank for block in adapter.blocks])
        weights = torch.tensor([block.weight for block in adapter.blocks])
        if (weights < 0).any():
            raise ValueError("a block that is read by rows has a weight of at least 0: 0 takes it out")
        self.offsets = weights.log().repeat_interleave(counts)  # [R], added to logits
        self.ends = counts.cumsum(0)

    @cached_property
    def is_weighted(self) -> bool:
        return bool(self.offsets.any())

    def read(self, x: Tensor, null: tuple[Tensor, Tensor], reading: RowReading) -> tuple[Tensor, Tensor]:
        """(sum over rows of p B [..., d_out], p [..., R + 1] with the null row's share first) for x [..., d_in]."""
        unit = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        logits = unit @ self.A.to(x).T
        key, floor = (one.to(x) for one in null)
        none = unit @ key + floor + reading.null_logit
        if self.is_weighted:
            logits = logits + self.offsets.to(x)
        shares = torch.cat([none.unsqueeze(-1), logits], -1).div(reading.temperature).softmax(-1)
        return shares[..., 1:] @ self.B.to(x), shares


@dataclass
class Attended:
    """What tokens read inside `read_rows`; `shares` of the last pass, for each adapter [rows, tokens, R + 1]."""

    rows: list[_Rows | None]
    shares: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def read_rows(
    model: nn.Module,
    adapters: Sequence[Adapter | None],
    reading: RowReading,
    null: tuple[Tensor, Tensor],
    *,
    rows: Tensor | None = None,
    **notes: Any,
) -> Iterator[Attended]:
    """Inside the `with` block the base model reads the rows of these adapters; yields what its tokens read.

    adapters: those of a batch, None for the plain base model.
    null: of `TokenRows.null`.
    rows: [batch], for each row of the batch which adapter it has (None: one adapter for all).
    notes: see lora.OpenBlock.

    ValueError where adapters are of several modules or layers.
    """
    present = [one for one in adapters if one is not None]
    modules = sorted({module for one in present for module in one.sizes})
    if len(modules) != 1 or any(one.n_layers != 1 for one in present):
        raise ValueError("rows are read at one module of the last layer: these adapters write more")
    if rows is None and len(adapters) != 1:
        raise ValueError(f"{len(adapters)} adapters need rows=, which of them each row of the batch has")
    (linears,) = target_linears(model, modules).values()
    state = Attended([_Rows(one, modules[0]) if one is not None and one.blocks else None for one in adapters])
    delta = partial(_delta, state=state, reading=reading, null=null, rows=rows)
    with add_deltas(model, [(linears[-1], delta)], present[0].scale, reading=reading, **notes):
        yield state


def _delta(x: Tensor, *, state: Attended, reading: RowReading, null, rows: Tensor | None) -> Tensor:
    """What the rows add at the last layer for x [batch, tokens, d_in], scale not included."""
    if rows is not None and len(x) % len(rows):
        raise ValueError(f"a batch of {len(x)} rows does not fit adapters for {len(rows)} rows: pass rows=")
    each = torch.zeros(len(x), dtype=torch.long) if rows is None else rows.repeat_interleave(len(x) // len(rows))
    added = None
    for context, its in enumerate(state.rows):
        mine = (each == context).nonzero()[:, 0].to(x.device)
        if its is None or not len(mine):
            continue
        read, state.shares[context] = its.read(x[mine].float(), null, reading)
        added = read.new_zeros(*x.shape[:2], read.shape[-1]) if added is None else added
        added[mine] = read
    return x.new_zeros(()) if added is None else added


@torch.no_grad()
def answer_rows(
    model: DocToLoRA, question: str, adapter: Adapter, answer: str | None = None, *, read: RowReading | None = None
) -> pd.DataFrame:
    """What each token of an answer reads, three rows of the table a token, those with the largest shares first.

    Columns: token (0 is the first of the answer), text (what the model chooses there), share (of the softmax),
    document, chunk, row (in its block; -1: the null row, which reads nothing), place (the number of the row's token in
    its chunk) and role ("first", "inside" or "end"; see `token_rows`).

    answer: None, the greedy one. read: None, `model.reading`. It says what was read, and is no proof of a cause.
    """
    import pandas as pd  # only tables need it: asking starts sooner without

    from d2l_lib.token_rows import ROLES

    reading = model.reading if read is None else read
    answer = model.answer(question, adapter, read=reading) if answer is None else answer
    (prompt,) = question_ids(model.tokenizer, [question])
    written = model.tokenizer(answer, add_special_tokens=False)["input_ids"] + list(stop_ids(model.tokenizer)[:1])
    ids = torch.tensor([prompt + written[:-1]], device=model.device)
    with read_rows(model.base_model, [adapter], reading, model.hypernetwork.null()) as state:
        model.base_model(ids, use_cache=False, logits_to_keep=1)
    shares = state.shares[0][0, len(prompt) - 1 :]  # [tokens, R + 1]
    ends, lines = state.rows[0].ends, []
    for token, (own, text) in enumerate(zip(shares, written, strict=True)):
        for share, row in zip(*(one.tolist() for one in own.topk(min(_SHOWN, len(own)))), strict=True):
            place = (None, None, -1, None, None)
            if row:
                number = int(torch.searchsorted(ends, row - 1, right=True))
                block = adapter.blocks[number]
                inside = row - 1 - (int(ends[number - 1]) if number else 0)
                place = (block.document, block.chunk, inside, inside // len(ROLES), ROLES[inside % len(ROLES)])
            lines.append((token, model.tokenizer.decode([text]), share, *place))
    return pd.DataFrame(lines, columns=["token", "text", "share", "document", "chunk", "row", "place", "role"])
