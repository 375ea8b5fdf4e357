"""Read an adapter like attention: at each token of an answer the one block that matches adds its part.

    score     s(k, t) = |A_k x(t)|, at every linear that reads; x(t) is its input at token t
    over time Z(k, t) = decay * Z(k, t - 1) + s(k, t), from t0, the last token of the prompt, on
    so far    S(k, t) = sum of Z(k, t) over the linears that the model has run through
    reading   y = W x + scale * (bias + weight_k B_k^T (A_k x)) with k = argmax of S(k, t)

The sum over time keeps an answer with the block that its first token chose. Before t0, and in layers that do not read,
the bias alone acts. A hypernetwork that was trained to be read (`training.reading`) has a null block, what a block must
exceed to be read, and can read the tokens of the prompt too, each by itself (Z = s):

    null      n(t)^2 = (floor |x(t)|)^2 + |null_keys x(t)|^2,  N(t) = sum of n(t) over the linears so far
    prompt    a token before t0 reads its best block k where S(k, t) > N(t)
    answer    all its tokens read where log(S(k, t0) / N(t0)) > null_threshold for the best block k

`adapter.Adapter` and `lora.apply_lora` are the published sum, in which all blocks act at every
token: its noise grows with the number of blocks. Both take one forward pass.

A score uses this token and earlier ones at the same linear, and earlier linears at the same token. So a prompt with its
answer in one pass, and token by token with a cache, read the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from d2l_lib.adapter import Adapter
from d2l_lib.base_model import target_linears
from d2l_lib.documents import question_ids, stop_ids
from d2l_lib.following import Followed, rows_of
from d2l_lib.hypernetwork import Loras
from d2l_lib.lora import add_deltas

if TYPE_CHECKING:
    import pandas as pd

    from d2l_lib.model import DocToLoRA

TINY = 1e-8  # under a root, for its gradient


@dataclass(frozen=True)
class Reading:
    """How blocks are chosen.

    layers: those that read, by number (None: all but the first quarter, whose inputs do not tell blocks apart).
    decay: what is left of the evidence one token later, from 0 (each token chooses anew) to 1.
    thresholds, gate_weights: one number for each layer that reads, or none, for adapters of one module. Layer l reads
    where gate(l), the sum over layers so far of gate_weight * log(s(k, t0) / |x(t0)|) for the block k that it would
    read at t0, exceeds its threshold. So a question that no block is about gets the bias alone.
    prompt: the tokens before t0 read too.
    null_threshold: of the null block, in nats; models without one do not ask (see above).

    ValueError for a decay out of range and for lists of different lengths.
    """

    layers: tuple[int, ...] | None = None
    decay: float = 0.5
    thresholds: tuple[float, ...] = ()
    gate_weights: tuple[float, ...] = ()
    prompt: bool = False
    null_threshold: float = 0.0

    def __post_init__(self):
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must be from 0 to 1, not {self.decay!r}")
        if not math.isfinite(self.null_threshold):
            raise ValueError(f"null_threshold must be a finite number of nats, not {self.null_threshold!r}")
        if self.thresholds and not self.gate_weights:
            object.__setattr__(self, "gate_weights", (1.0,) * len(self.thresholds))
        if len(self.gate_weights) != len(self.thresholds):
            raise ValueError(f"{len(self.thresholds)} thresholds but {len(self.gate_weights)} gate_weights: one each")

    def layers_of(self, n_layers: int) -> tuple[int, ...]:
        """The layers that read in a model of so many. ValueError where it has none of a number, or too few."""
        layers = tuple(range(n_layers // 4, n_layers)) if self.layers is None else tuple(sorted(self.layers))
        if wrong := [layer for layer in layers if not 0 <= layer < n_layers]:
            raise ValueError(f"this model has layers 0 to {n_layers - 1}; layer {wrong[0]} cannot read")
        if self.thresholds and len(self.thresholds) != len(layers):
            raise ValueError(f"{len(self.thresholds)} thresholds for {len(layers)} layers that read: give one for each")
        return layers


@dataclass(frozen=True)
class _Choice:
    """What one linear read at some tokens, for the rows of one adapter.

    rows: the batch rows [n]. start: the column (token) of the first one, counted with the cache. blocks [n, tokens]:
    places in `adapter.blocks`; -1 before the answer and where no block was read. evidence, lead [n, tokens]: S of the
    chosen block, and by how much it exceeds the second best.
    """

    layer: int
    module: str
    adapter: Adapter
    rows: list[int]
    start: int
    blocks: Tensor
    evidence: Tensor
    lead: Tensor


@dataclass
class _Generation(Followed):
    """The state of what is being generated: evidence so far, verdicts of the gate, and the choices that were made.

    `choices` are those since the prompt; None once beam search has exchanged rows.
    """

    adapters: Sequence[Adapter | None]
    reading: Reading
    rows: Tensor | None
    starts: Tensor | None
    null: Loras | None = None
    choices: list[_Choice] | None = field(default_factory=list)
    over_time: dict[tuple[int, str, int], Tensor] = field(default_factory=dict)  # Z [rows, K] at the last token
    is_open: dict[tuple[int, str, int], Tensor] = field(default_factory=dict)  # [rows]
    so_far: dict[int, Tensor] = field(default_factory=dict)  # S [rows, tokens, K] of this pass, by adapter
    gate: dict[int, Tensor] = field(default_factory=dict)  # [rows, K] of this pass, by adapter
    null_so_far: dict[int, Tensor] = field(default_factory=dict)  # N [rows, tokens] of this pass, by adapter
    margins: dict[tuple[int, str, int], Tensor] = field(default_factory=dict)  # log(S / N) [rows] at t0, best block
    factors: dict[tuple[int, str, int], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)  # where x is

    def begin(self, arguments: dict[str, Any]) -> None:
        """Called before each pass: see `Followed`."""
        super().begin(arguments)
        self.so_far, self.gate, self.null_so_far = {}, {}, {}

    def start(self) -> None:
        """Forget what was before."""
        self.choices, self.over_time, self.is_open = [], {}, {}

    def exchange(self, chosen: list[int]) -> None:
        """Row i of the batch goes on from row chosen[i]."""
        self.choices = None
        for (layer, module, context), evidence in self.over_time.items():
            own = rows_of(self.rows, context, len(chosen))
            place = {row: index for index, row in enumerate(own)}
            self.over_time[layer, module, context] = evidence[[place[chosen[row]] for row in own]]

    def delta(self, x: Tensor, *, layer: int, module: str, reads: bool) -> Tensor:
        """What the adapters add at one linear, scale included: [rows, tokens, d_out] for x [rows, tokens, d_in]."""
        self.take(x.shape[1])
        present = [one for one in self.adapters if one is not None and module in one.sizes]
        dtype = reduce(torch.promote_types, [one.stacked[module][0].dtype for one in present])
        added = x.new_zeros(*x.shape[:2], present[0].sizes[module][1], dtype=dtype)
        for context, adapter in enumerate(self.adapters):
            if adapter is None or module not in adapter.sizes:
                continue
            rows = rows_of(self.rows, context, len(x))
            own = x[rows].to(dtype)
            if adapter.bias is not None and layer in adapter.layers:
                A, B = (one[adapter.layers.index(layer)].to(own) for one in adapter.bias[module])
                added[rows] = adapter.scale * adapter.bias_weight * (own @ A.T @ B)
            if reads and rows and any(block.weight for block in adapter.blocks):
                first, read = self._read(own, (layer, module, context), rows)
                added[rows, first:] += adapter.scale * read
        return added

    def _read(self, x: Tensor, place: tuple[int, str, int], rows: list[int]) -> tuple[int, Tensor]:
        """(first column that may read, what the blocks add from there on) for the rows of one adapter."""
        layer, module, context = place
        adapter = self.adapters[context]
        if place not in self.factors:
            weights = torch.tensor([block.weight for block in adapter.blocks])
            self.factors[place] = tuple(one.to(x) for one in (*(f[layer] for f in adapter.stacked[module]), weights))
        A, B, weights = self.factors[place]  # [K, r, d_in], [K, r, d_out], [K]
        starts = torch.zeros(len(rows), dtype=torch.long)  # columns of t0 in this pass
        if self.before == 0:
            starts += x.shape[1] - 1
            if self.starts is not None:
                starts = self.starts[rows]
        first = 0 if self.reading.prompt else int(starts.min())
        x, starts = x[:, first:], starts - first
        answers = (torch.arange(x.shape[1]) >= starts[:, None]).to(x.device)
        products = (x @ A.flatten(0, 1).T).unflatten(2, A.shape[:2])  # [rows, tokens, K, r]
        scores = products.float().norm(dim=-1)
        so_far = self._evidence(scores, answers, place)
        allowed = so_far.masked_fill(weights == 0, -math.inf)
        best = allowed.topk(min(2, allowed.shape[-1]), dim=-1)
        chosen = best.indices[..., 0]
        acts = answers
        if self.before == 0:  # the prompt is here, padding too: nothing attends to what it reads
            null = self._null(x, place)
            self.is_open[place] = self._decide(scores, x, best, null, starts, place)
            if self.reading.prompt:
                acts = acts | (best.values[..., 0] > null)
        acts = acts & (self.is_open[place][:, None] | ~answers)
        own = products.gather(2, chosen[..., None, None].expand(-1, -1, 1, products.shape[-1]))  # [rows, tokens, 1, r]
        read = (own @ B[chosen]).squeeze(2) * (weights[chosen] * acts.to(weights)).unsqueeze(-1)
        if self.choices is not None:
            second = best.values[..., -1] if best.values.shape[-1] > 1 else torch.zeros_like(best.values[..., 0])
            skip = int(starts.min())  # tokens of prompts
            read_here = (chosen.masked_fill(~acts, -1), best.values[..., 0], best.values[..., 0] - second)
            read_here = (one[:, skip:].cpu() for one in read_here)
            self.choices.append(_Choice(layer, module, adapter, rows, self.before + first + skip, *read_here))
        return first, read

    def _evidence(self, scores: Tensor, answers: Tensor, place: tuple[int, str, int]) -> Tensor:
        """S [rows, tokens, K] of scores [rows, tokens, K] at one linear; answers [rows, tokens] tells the tokens."""
        last, steps = self.over_time.get(place), []
        for score in (scores * answers.unsqueeze(-1)).unbind(1):
            last = score if last is None else self.reading.decay * last + score
            steps.append(last)
        self.over_time[place] = last
        over_time = torch.where(answers.unsqueeze(-1), torch.stack(steps, 1), scores)
        context = place[2]
        self.so_far[context] = over_time + self.so_far[context] if context in self.so_far else over_time
        return self.so_far[context]

    def _null(self, x: Tensor, place: tuple[int, str, int]) -> Tensor:
        """N [rows, tokens] at one linear; 0 without a null block."""
        layer, module, context = place
        if self.null is None:
            return x.new_zeros(x.shape[:2], dtype=torch.float32)
        own = null_score(x.float(), *(one[layer].to(x.device, torch.float32) for one in self.null[module]))
        self.null_so_far[context] = own + self.null_so_far.get(context, 0.0)
        return self.null_so_far[context]

    def _decide(self, scores, x: Tensor, best, null: Tensor, starts: Tensor, place: tuple[int, str, int]) -> Tensor:
        """The verdict [rows], once per answer and layer that reads, at t0: of the null block and of the gate."""
        layer, _, context = place
        adapter, every = self.adapters[context], torch.arange(len(x))
        self.margins[place] = (best.values[every, starts, 0] / null[every, starts]).log()
        least = null[every, starts] * math.exp(self.reading.null_threshold)
        is_open = (best.values[every, starts, 0] > least) | (self.null is None)
        if not self.reading.thresholds:
            return is_open
        layers = self.reading.layers_of(adapter.n_layers)
        weight = self.reading.gate_weights[layers.index(layer)]
        ratio = scores[every, starts].log() - x[every, starts].float().norm(dim=-1, keepdim=True).log()  # [rows, K]
        self.gate[context] = weight * ratio + self.gate.get(context, 0.0)
        value = self.gate[context][every, best.indices[every, starts, 0]]
        return is_open & (value > self.reading.thresholds[layers.index(layer)])


def null_score(x: Tensor, keys: Tensor, floor: Tensor) -> Tensor:
    """n [..., tokens] of inputs x [..., tokens, d_in] at one linear, with null_keys [null_rows, d_in] and its floor."""
    return ((floor * x.norm(dim=-1)).square() + (x @ keys.T).square().sum(-1) + TINY).sqrt()


@contextmanager
def read_sparsely(
    model: nn.Module,
    adapters: Sequence[Adapter | None],
    reading: Reading,
    *,
    rows: Tensor | None = None,
    starts: Tensor | None = None,
    null: Loras | None = None,
    **notes: Any,
) -> Iterator[_Generation]:
    """Inside the `with` block the base model reads these adapters sparsely; yields the state, which keeps the choices.

    adapters: those of a batch, None for the plain base model.
    rows: [batch], for each row of the batch which adapter it has (None: one adapter for all rows).
    starts: [batch], the column of each row's last prompt token, where a pass without a cache holds prompts with their
    answers (None: the last column, as where an answer is generated from prompts that are padded on the left).
    null: the hypernetwork's null block (`Hypernetwork.null`; None: it has none).
    notes: see lora.OpenBlock.

    Weights, hooks and threads are as in `lora.apply_lora`. ValueError where an adapter and the reading do not fit.
    """
    present = [one for one in adapters if one is not None]
    modules = sorted({module for one in present for module in one.sizes})
    if rows is None and len(adapters) != 1:
        raise ValueError(f"{len(adapters)} adapters need rows=, which of them each row of the batch has")
    linears = target_linears(model, modules)
    reading_layers = reading.layers_of(len(linears[modules[0]]))
    if reading.thresholds and len(modules) > 1:
        raise ValueError(f"thresholds are for adapters of one module, these write {', '.join(modules)}")
    state = _Generation(adapters, reading, rows, starts, null)
    deltas = [
        (linear, partial(state.delta, layer=layer, module=module, reads=layer in reading_layers))
        for module in modules
        for layer, linear in enumerate(linears[module])
    ]
    with add_deltas(model, deltas, 1.0, before=state.begin, reading=reading, **notes):
        yield state


def choices_table(state: _Generation) -> pd.DataFrame:
    """What each token of the answers read, one line for each row, token and linear that reads.

    Columns: row, token (column in the batch, padding counted; the first is the last one of the prompt, which chooses
    the answer's first token), layer, module, block (place in the adapter, -1: none), document, chunk, evidence (S) and
    lead (by how much S exceeds the second best block's). It is what was read, and no cause: leave a block out to see
    what it does. RuntimeError after beam search, whose rows are exchanged on the way.
    """
    if state.choices is None:
        raise RuntimeError("beam search exchanges rows while it reads: give the answer and read it again in one pass")
    import pandas as pd  # only tables need it: asking starts sooner without

    lines = []
    for one in state.choices:
        for index, row in enumerate(one.rows):
            start = 0 if state.starts is None else int(state.starts[row])
            for step, block in enumerate(one.blocks[index].tolist()):
                if (token := one.start + step) < start:  # of the prompt
                    continue
                chosen = None if block < 0 else one.adapter.blocks[block]
                label = (None, None) if chosen is None else (chosen.document, chosen.chunk)
                numbers = (float(one.evidence[index, step]), float(one.lead[index, step]))
                lines.append((row, token, one.layer, one.module, block, *label, *numbers))
    columns = ["row", "token", "layer", "module", "block", "document", "chunk", "evidence", "lead"]
    return pd.DataFrame(lines, columns=columns)


@torch.no_grad()
def answer_reads(
    model: DocToLoRA,
    question: str,
    adapter: Adapter,
    answer: str | None = None,
    *,
    read: Reading | None = None,
    system: str = "",
) -> pd.DataFrame:
    """What each token of an answer reads: the columns of `choices_table` without row, token counted from 0, and text.

    text: the token of the answer that is chosen while this is read; the last one is the end of the turn, where the
    answer has one. answer: None, the greedy one of sparse reading. read: None, `model.reading`. system: as of
    `model.answer`. The answer is read in one pass, which reads the same as writing it. It says what was read, and is no
    proof of a cause.
    """
    reading = model.reading if read is None else read
    model._check_adapters([adapter])
    (prompt,) = question_ids(model.tokenizer, [question], system)
    stops = stop_ids(model.tokenizer)
    if answer is None:
        ids = torch.tensor([prompt])
        written = model.generate(ids, max_new_tokens=64, adapter=adapter, read=reading)[0, len(prompt) :].tolist()
        end = next((place + 1 for place, token in enumerate(written) if token in stops), len(written))
        written = written[:end]
    else:
        written = model.tokenizer(answer, add_special_tokens=False)["input_ids"] + list(stops[-1:])
    ids = torch.tensor([prompt + written[:-1]], device=model.device)
    starts, null = torch.tensor([len(prompt) - 1]), model.hypernetwork.null()
    with read_sparsely(model.base_model, [adapter], reading, starts=starts, null=null) as state:
        model.base_model(ids, use_cache=False, logits_to_keep=1)
    table = choices_table(state).drop(columns="row")
    table["token"] -= len(prompt) - 1
    table.insert(1, "text", [model.tokenizer.decode([written[token]]) for token in table["token"]])
    return table
