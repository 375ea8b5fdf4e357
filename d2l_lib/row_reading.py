"""Read an adapter's rows like a memory: each token attends to all of them, in the two layers that read rows.

`row_reader` has the formulas. A block's weight multiplies its rows' shares before they are made to add up to one; 0
takes them out. Composing documents puts their rows side by side, and forgetting one leaves the others' codes as they
were, bit for bit. Where a question finds too little of itself in the document, the gate is closed: nothing is read, and
the model is the base model, bit for bit, as it is without an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2l_lib.adapter import Adapter, Block, SharedRows
from d2l_lib.documents import answer_ids, question_ids, stop_ids
from d2l_lib.following import Followed, rows_of
from d2l_lib.lora import add_deltas
from d2l_lib.row_reader import REACH, RowReader, nearness, word_gains
from d2l_lib.token_rows import ROLES, WORD_ROLES

if TYPE_CHECKING:
    import pandas as pd

    from d2l_lib.model import DocToLoRA

_WORDS = len(WORD_ROLES)
_SHOWN = 3  # rows that a table has for each token
_AT_ONCE = 1 << 26  # numbers of codes that are put side by side; more are taken block by block


@dataclass(frozen=True)
class RowReading:
    """How the last layer chooses the rows whose words it writes.

    temperature: divides the logits; below 1 a token reads fewer rows.
    null_logit: what the gate's logit must exceed, in nats; above 0 an adapter is read less often.
    chunks: how many chunks a token reads at most, those with the largest logits; None: all.

    ValueError for a temperature or a number of chunks that is not positive and for numbers that are not finite.
    """

    temperature: float = 1.0
    null_logit: float = 0.0
    chunks: int | None = 1

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be a positive number, not {self.temperature!r}")
        if not math.isfinite(self.null_logit):
            raise ValueError(f"null_logit must be a finite number of nats, not {self.null_logit!r}")
        whole = isinstance(self.chunks, int) and not isinstance(self.chunks, bool)
        if self.chunks is not None and not (whole and self.chunks > 0):
            raise ValueError(f"chunks must be a positive whole number, or None for all, not {self.chunks!r}")


@dataclass(frozen=True)
class ChunkParts:
    """What speaks for each chunk at each token.

    rows: [..., chunks], the log of the sum of exp(logit) of its rows. nearness: [..., chunks, k], the largest in it.
    words: [..., chunks, 2], w_1 and w_2 of what was asked so far.
    """

    rows: Tensor
    nearness: Tensor
    words: Tensor


class _Codes:
    """Codes of the rows of some blocks, [T, k, d] each. Many stay where they lie, in a file or in half precision."""

    def __init__(self, parts: list[Tensor]):
        self.parts = [parts[0].flatten(0, 1)] if len(parts) == 1 else parts

    def products(self, q: Tensor) -> Tensor:
        """[..., R] of q [..., d]."""
        return torch.cat([q @ one.to(q).flatten(0, -2).T for one in self.parts], -1)


def _tables(sides: Sequence[Mapping[str, Tensor]], module: str) -> tuple[Tensor, Tensor]:
    """(different rows [n, d_out] of the B of some blocks, which of them each row is [R])."""
    tables: dict[int, Tensor] = {}
    starts, places, size = {}, [], 0
    for B in sides:
        shared = isinstance(B, SharedRows)
        table = B.table if shared else B[module][0]
        if id(table) not in tables:
            tables[id(table)], starts[id(table)], size = table, size, size + len(table)
        places.append((B.rows if shared else torch.arange(len(table))) + starts[id(table)])
    return torch.cat(list(tables.values())), torch.cat(places)


class _Rows:
    """The rows of these blocks side by side, those of words and those of context."""

    def __init__(self, blocks: Sequence[Block], module: str):
        self.blocks, n = blocks, len(ROLES)
        codes = [block.A[module][0].unflatten(0, (-1, n)) for block in blocks]  # of each [T, 4, d]
        if sum(one.numel() for one in codes) <= _AT_ONCE:
            codes = [torch.cat(codes).float()]
        self.context = _Codes([one[:, _WORDS:] for one in codes])
        self.words = _Codes([one[:, :_WORDS] for one in codes])
        self.values, places = _tables([block.B for block in blocks], module)
        self.places = places.unflatten(0, (-1, n))[:, :_WORDS].flatten()  # of each row of words, in values
        counts = torch.tensor([block.rank // n for block in blocks])
        weights = torch.tensor([block.weight for block in blocks])
        self.offsets = weights.log().repeat_interleave(counts)  # [T], added to logits
        self.ends = counts.cumsum(0)  # in tokens
        self.chunk = torch.arange(len(blocks)).repeat_interleave(counts)  # of each token
        self.slots = torch.arange(len(self.chunk)) + REACH * self.chunk  # free places between chunks

    @cached_property
    def is_weighted(self) -> bool:
        return bool(self.offsets.any())

    def logits(self, q: Tensor, codes: _Codes) -> Tensor:
        """[..., R] of q [..., d] and R codes, with the weights of blocks."""
        logits = codes.products(q)
        if not self.is_weighted:
            return logits
        return logits + self.offsets.to(q).repeat_interleave(logits.shape[-1] // len(self.offsets))

    def read(self, shares: Tensor) -> Tensor:
        """[..., d_out] of shares [..., 3 T] of rows of words: the sum of what they write."""
        places = self.places.to(shares.device)
        of_value = shares.new_zeros(*shares.shape[:-1], len(self.values)).index_add_(-1, places, shares)
        return of_value @ self.values.to(shares)

    def chooses(self, n: int | None) -> bool:
        """Whether a token that reads n chunks leaves some out."""
        return n is not None and n < len(self.blocks)

    def words_held(self, words: Tensor, before: Tensor, reader: RowReader) -> Tensor:
        """[n, chunks, 2]: what each of words [n] adds to w_1 and w_2 of the chunks; before: the last word, or -1."""
        different, own = self.places[::_WORDS].unique(return_inverse=True)
        standing = reader.words.standing_in(self.values[different], torch.cat([words, before.clamp_min(0)]))
        holds, first = standing[:, own].chunk(2)
        chunk = self.chunk.to(holds.device)
        follows = F.pad(first[:, :-1] & (chunk[1:] == chunk[:-1]), (1, 0)) & (before >= 0)[:, None]
        held = torch.stack([holds, holds & follows], 1).float()  # [n, 2, T]
        counts = held.new_zeros(len(words), 2, len(self.blocks)).index_add(2, chunk, held)
        return word_gains(counts, chunk.bincount().float()).mT

    def chunk_parts(self, logits: Tensor, near: Tensor, words: Tensor) -> ChunkParts:
        """What speaks for each chunk.

        logits: [..., 3 T] of rows of words. near: nearness [..., T, k] at the same tokens. words: [..., chunks, 2].
        """
        shape, chunk = (*logits.shape[:-1], len(self.blocks)), self.chunk.to(logits.device)
        of_row = chunk.repeat_interleave(_WORDS).expand_as(logits)
        most = logits.new_full(shape, -torch.inf).scatter_reduce(-1, of_row, logits, "amax")
        sums = logits.new_zeros(shape).scatter_add(-1, of_row, (logits - most.gather(-1, of_row)).exp())
        nearest = near.new_zeros(*shape, near.shape[-1])  # nearness is 0 or more
        nearest = nearest.scatter_reduce(-2, chunk[:, None].expand_as(near), near, "amax")
        return ChunkParts(most + sums.log(), nearest, words)

    def kept(self, logits: Tensor, of_chunk: Tensor, n: int) -> Tensor:
        """logits [..., 3 T] of rows of words, -inf outside the n chunks with the largest of_chunk [..., chunks]."""
        best = of_chunk.topk(n, -1).indices
        out = torch.ones(of_chunk.shape, dtype=torch.bool, device=logits.device).scatter(-1, best, False)
        of_row = self.chunk.to(logits.device).repeat_interleave(_WORDS).expand_as(logits)
        return logits.masked_fill(out.gather(-1, of_row), -torch.inf)

    def found(self, q: Tensor, none: Tensor) -> Tensor:
        """p(i, t) [..., 2, T] of q [..., d] and the null row: a softmax over all tokens, then over each chunk."""
        logits = self.logits(q, self.context)
        joint = torch.cat([none.unsqueeze(-1), logits], -1).softmax(-1)[..., 1:]
        chunk = self.chunk.to(logits.device)
        most = none.unsqueeze(-1).expand(*none.shape, len(self.blocks))
        most = most.scatter_reduce(-1, chunk.expand_as(logits), logits, "amax")
        parts = (logits - most[..., chunk]).exp()
        sums = (none.unsqueeze(-1) - most).exp().index_add(-1, chunk, parts)
        return torch.stack([joint, parts / sums[..., chunk]], -2)


@dataclass
class Attended(Followed):
    """What tokens read inside `read_rows`.

    shares: of the last pass, {adapter's number: p [rows, tokens, 3 T + 1]} of the last layer's rows; the first is of
    reading nothing, 1 where the gate is closed and else 0.
    """

    rows: list[_Rows | None]
    reader: RowReader
    reading: RowReading
    of_row: Tensor | None
    shares: dict[int, Tensor] = field(default_factory=dict)
    over_time: dict[int, Tensor] = field(
        default_factory=dict
    )  # evidence [rows, 2, T] at the last token (`_Rows.found`)
    content: dict[int, Tensor] = field(default_factory=dict)  # of all that was asked so far [rows]
    held: dict[int, Tensor] = field(default_factory=dict)  # likewise, of its words: w [rows, chunks, 2]
    words: dict[int, Tensor] = field(default_factory=dict)  # w [rows, tokens, chunks, 2] up to each token of this pass
    chunk_parts: dict[int, ChunkParts] = field(default_factory=dict)  # of the last pass, where chunks are chosen
    near: dict[int, Tensor] = field(default_factory=dict)  # nearness [rows, tokens, T, k] of this pass
    gate_logits: dict[int, Tensor] = field(default_factory=dict)  # [rows, tokens] of this pass
    gates: Tensor | None = None  # [batch, tokens] of this pass: 1 where it is open, else 0
    mask: Tensor | None = None  # [batch, tokens] of all tokens so far; padding is 0
    turns: list[_Turn] = field(default_factory=list)  # of each row of the batch
    asked: Tensor | None = None  # [batch, tokens] of this pass: 1 outside answers
    pairs: Tensor | None = None  # [batch, tokens, 2] of this pass: words before and at each token (see `_Turn.read`)

    def begin(self, arguments: dict[str, Any]) -> None:
        """Called before each pass: see `Followed`."""
        super().begin(arguments)
        mask = arguments.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        ids = arguments.get("input_ids")
        self.asked = self.pairs = None
        if isinstance(ids, Tensor):  # else embeddings go in, and all of them are a question's, without words
            self.turns = self.turns or [_Turn() for _ in ids]
            read = [turn.read(row, self.reader) for turn, row in zip(self.turns, ids.tolist(), strict=True)]
            self.asked = torch.tensor([outside for outside, _ in read], device=ids.device)
            self.pairs = torch.tensor([pairs for _, pairs in read], device=ids.device)

    def start(self) -> None:
        """Forget the evidence of before."""
        self.over_time, self.content, self.held, self.turns = {}, {}, {}, []

    def exchange(self, chosen: list[int]) -> None:
        """Row i of the batch goes on from row chosen[i]."""
        self.turns = [replace(self.turns[row]) for row in chosen] if self.turns else []
        for context, evidence in self.over_time.items():
            own = rows_of(self.of_row, context, len(chosen))
            place = {row: index for index, row in enumerate(own)}
            kept = [place[chosen[row]] for row in own]
            self.over_time[context], self.content[context] = evidence[kept], self.content[context][kept]
            self.held[context] = self.held[context][kept]

    def deltas(self, model: nn.Module) -> list[tuple[nn.Linear, Any]]:
        """What is done in the linears of a model, for `lora.add_deltas`."""
        linears = self.reader.linears(model)
        match, read = linears[self.reader.match_layer], linears[self.reader.last_layer]
        return [(match, self._match), (read, self._read), *self.reader.updates(model, lambda: self.gates)]

    def _present(self, batch: int) -> Iterator[tuple[int, _Rows, list[int]]]:
        """(adapter's number, its rows, its rows of the batch) of adapters that hold rows."""
        for context, its in enumerate(self.rows):
            mine = rows_of(self.of_row, context, batch)
            if its is not None and mine:
                yield context, its, mine

    def _match(self, x: Tensor) -> Tensor:
        """0 for x [batch, tokens, d_in] of the match layer, after it has left its evidence and set the gates."""
        self.take(x.shape[1])
        self.gates, self.near = x.new_zeros(x.shape[:2]), {}
        for context, its, mine in self._present(len(x)):
            unit = _unit(x[mine])
            q, none = self.reader.asked(self.reader.match_layer, unit), self.reader.nothing(unit)
            found = its.found(q, none)
            content = self.reader.content(unit)
            if self.mask is not None:  # padding asks and finds nothing
                own = self.mask[mine, -found.shape[1] :].to(found)
                found, content = found * own[..., None, None], content * own
            if self.asked is not None:  # words of an answer neither open nor close the gate
                own = self.asked[mine].to(found)
                found, content = torch.stack([found[..., 0, :], found[..., 1, :] * own[..., None]], -2), content * own
            so_far, content = found.cumsum(1), content.cumsum(1)
            if context in self.over_time:
                so_far = so_far + self.over_time[context].unsqueeze(1)
                content = content + self.content[context].unsqueeze(1)
            self.over_time[context], self.content[context] = so_far[:, -1], content[:, -1]
            self._count(context, its, mine, x)
            self.near[context], of_each = nearness(so_far, its.slots.to(x.device)).unbind(-3)
            most = self.words[context][..., 0].amax(-1)
            self.gate_logits[context] = self.reader.gate(of_each, content, len(its.blocks), most)
            self.gates[mine] = (self.gate_logits[context] > self.reading.null_logit).to(x)
        return x.new_zeros(())

    def _count(self, context: int, its: _Rows, mine: list[int], x: Tensor) -> None:
        """Add up what the words that were asked count for the chunks that hold them."""
        w = x.new_zeros(len(mine), x.shape[1], len(its.blocks), 2, dtype=torch.float32)
        if self.pairs is not None and len(its.blocks) > 1:  # of one chunk all are 0
            pairs = self.pairs[mine]
            asked = pairs[..., 1] >= 0
            if self.mask is not None:
                asked = asked & self.mask[mine, -x.shape[1] :].bool()
            if asked.any():
                before, words = pairs[asked].unbind(-1)
                w[asked] = its.words_held(words, before, self.reader).to(w)
        w = w.cumsum(1)
        if context in self.held:
            w = w + self.held[context].unsqueeze(1)
        self.held[context], self.words[context] = w[:, -1], w

    def _read(self, x: Tensor) -> Tensor:
        """What the rows add in the last layer for x [batch, tokens, d_in]."""
        added = x.new_zeros(())
        for context, its, mine in self._present(len(x)):
            unit, gates = _unit(x[mine]), self.gates[mine].float().unsqueeze(-1)
            logits = its.logits(self.reader.asked(self.reader.last_layer, unit), its.words)
            logits = logits + self.reader.favour(self.near[context], unit).flatten(-2)
            if its.chooses(self.reading.chunks):
                parts = its.chunk_parts(logits, self.near[context], self.words[context])
                of_chunk = parts.rows + self.reader.chunk_favour(parts.nearness, parts.words)
                logits = its.kept(logits, of_chunk, self.reading.chunks)
                self.chunk_parts[context] = parts
            shares = logits.div(self.reading.temperature).softmax(-1) * gates
            self.shares[context] = torch.cat([1 - gates, shares], -1)
            read = its.read(shares)
            added = read.new_zeros(*x.shape[:2], read.shape[-1]) if not added.dim() else added
            added[mine] = read
        return added


@dataclass
class _Turn:
    """Where a row of a batch stands in its chat."""

    tail: tuple[int, ...] = ()  # its last tokens
    answers: bool = False
    word: int = -1  # its last token, if it is a word of a question

    def read(self, ids: list[int], reader: RowReader) -> tuple[list[bool], list[tuple[int, int]]]:
        """For each of the next tokens whether it stands outside an answer, and the word before it and its own.

        The token that ends an answer stands outside. A word is a token of a question, not of the wrapping around it; -1
        where there is none.
        """
        outside, pairs, n = [], [], len(reader.answer_start)
        for token in ids:
            self.answers = self.answers and token not in reader.answer_ends
            outside.append(not self.answers)
            word = -1 if self.answers or token in reader.wrapping else token
            pairs.append((self.word, word))
            self.word = word
            self.tail = (*self.tail, token)[-n:] if n else ()
            self.answers = self.answers or (n > 0 and self.tail == reader.answer_start)
        return outside, pairs


def _unit(x: Tensor) -> Tensor:
    x = x.float()
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6)


@contextmanager
def read_rows(
    model: nn.Module,
    adapters: Sequence[Adapter | None],
    reading: RowReading,
    reader: RowReader,
    *,
    rows: Tensor | None = None,
    **notes: Any,
) -> Iterator[Attended]:
    """Inside the `with` block the base model reads the rows of these adapters; yields what its tokens read.

    adapters: those of a batch, None for the plain base model.
    reader: of the hypernetwork that wrote them.
    rows: [batch], for each row of the batch which adapter it has (None: one adapter for all).
    notes: see lora.OpenBlock.

    ValueError for adapters without rows.
    """
    present = [one for one in adapters if one is not None]
    if not all(one.is_rows for one in present):
        raise ValueError("this model reads token rows by attention: these adapters are summed and hold none")
    if rows is None and len(adapters) != 1:
        raise ValueError(f"{len(adapters)} adapters need rows=, which of them each row of the batch has")
    state = Attended([_rows_of(one) for one in adapters], reader, reading, rows)
    with add_deltas(model, state.deltas(model), present[0].scale, before=state.begin, reading=reading, **notes):
        yield state


def _rows_of(adapter: Adapter | None) -> _Rows | None:
    """The rows that an adapter lets tokens read, None where there are none."""
    blocks = [] if adapter is None else [block for block in adapter.blocks if block.weight]
    if any(block.weight < 0 for block in blocks):
        raise ValueError("a block that is read by rows has a weight of at least 0: 0 takes it out")
    return _Rows(blocks, adapter.modules[0]) if blocks else None


@torch.no_grad()
def answer_rows(
    model: DocToLoRA,
    question: str,
    adapter: Adapter,
    answer: str | None = None,
    *,
    read: RowReading | None = None,
    system: str = "",
) -> pd.DataFrame:
    """What each token of an answer reads, three rows of the table a token, those with the largest shares first.

    Columns: token (0 is the first of the answer), text (what the model chooses there), share (of the softmax),
    document, chunk, row (in its block; -1: nothing is read, the gate is closed), place (the number of the row's token
    in its chunk) and role ("first", "inside" or "end"; see `token_rows`).

    answer: None, the greedy one. read: None, `model.reading`. system: as of `model.answer`. The table says what was
    read, and is no proof of a cause.
    """
    import pandas as pd  # only tables need it: asking starts sooner without

    reading = model.reading if read is None else read
    answer = model.answer(question, adapter, read=reading, system=system) if answer is None else answer
    (prompt,) = question_ids(model.tokenizer, [question], system)
    written = [*answer_ids(model.tokenizer, answer, after_space=True), stop_ids(model.tokenizer)[0]]
    ids = torch.tensor([prompt + written[:-1]], device=model.device)
    with read_rows(model.base_model, [adapter], reading, model.hypernetwork.reader) as state:
        model.base_model(ids, use_cache=False, logits_to_keep=1)
    if state.rows[0] is None:
        raise ValueError("this adapter holds no rows to read: internalize a document first")
    shares = state.shares[0][0, len(prompt) - 1 :]  # [tokens, R + 1]
    ends, blocks, lines = state.rows[0].ends, state.rows[0].blocks, []
    for token, (own, text) in enumerate(zip(shares, written, strict=True)):
        for share, row in zip(*(one.tolist() for one in own.topk(min(_SHOWN, len(own)))), strict=True):
            place = (None, None, -1, None, None)
            if row:
                at, role = divmod(row - 1, _WORDS)
                number = int(torch.searchsorted(ends, at, right=True))
                block = blocks[number]
                at -= int(ends[number - 1]) if number else 0
                place = (block.document, block.chunk, len(ROLES) * at + role, at, ROLES[role])
            lines.append((token, model.tokenizer.decode([text]), share, *place))
    return pd.DataFrame(lines, columns=["token", "text", "share", "document", "chunk", "row", "place", "role"])
