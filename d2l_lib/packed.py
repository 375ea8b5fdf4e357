"""Guessed answers, checked: a document, its questions and a guess at each answer are read in one go, without padding.

    head (a document's prompt)    d d d d d d d                   read once for its questions, causally
    tails (questions + guesses)   q q q g g | q q g | q q q g     each sees the head and itself

A greedy answer is known from its guess where the model, at each token, finds the guess's next token likeliest: then one
pass has done the work of as many steps as the answer has tokens. Where a guess fails, the model's own token stands in
its place, and the rest is guessed again. So a guess changes the cost of an answer and never its tokens.

Tokens of all prompts of a pack stand side by side, [tokens, width]; only the attention knows whose they are. The last
layer is computed where its output is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from d2l_lib import layers, onednn
from d2l_lib.base_model import decoder_body, decoder_layers, final_norm

_PACK, _HELD = 1000, 4000  # tokens of heads that are read at once, and kept: more leave a processor's own memory
_ROUNDS = 6  # guesses at one answer; what is then left is answered token by token
_TOKEN_STEP, _KEPT_STEP = 64, 16  # a pack has multiples of these, of tokens and of those whose output is asked for
_COPIED = 6  # tokens of a guess that is copied from the prompt
Ids = Sequence[Sequence[int]]  # token ids of several texts


def can_pack(model: nn.Module) -> bool:
    """Whether the model's layers are known (see `layers`)."""
    return layers.can_be_written_out(model, decoder_layers(model))


@dataclass
class Answer:
    """Token ids of an answer, and their largest log-probabilities: arrays [tokens, k], one after the other."""

    ids: list[int]
    values: list[np.ndarray]
    indices: list[np.ndarray]


@dataclass
class Head:
    """The beginning of prompts. states: its keys and values [heads, tokens, size] in each layer, once it is read."""

    ids: Sequence[int]
    states: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Guessing:
    """Greedy answers to prompts by way of guesses.

    found: {place of a prompt: its answer}; filled by `run`.
    """

    def __init__(
        self, model: nn.Module, prompts: Ids, guesses: Ids, *, limits: Sequence[int], stops: Sequence[int], k: int
    ):
        """guesses: what each answer may be, without a stop token.

        limits: the most tokens of each answer.
        stops: ids that end an answer.
        k: how many log-probabilities are kept of each token.
        """
        self._packed, self._prompts, self._limits, self._stops, self._k = _Packed(model), prompts, limits, stops, k
        self._guesses = [list(guess)[: max(0, n - 1)] for guess, n in zip(guesses, limits, strict=True)]
        self._begun: dict[int, Answer] = {}
        self.found: dict[int, Answer] = {}

    @torch.inference_mode()
    def run(self, groups: Sequence[tuple[int, Sequence[int]]], most: int) -> None:
        """Find what a few guesses each can find; where most of the first ones fail, the others are not tried.

        groups: (n, places) of prompts that begin with the same n tokens; 0 for a lone prompt.
        most: tokens of heads that are kept at once, unless one head has more.
        """
        with self._packed.products():
            self._run(groups, most)

    def _run(self, groups: Sequence[tuple[int, Sequence[int]]], most: int) -> None:
        waiting = [(n or len(self._prompts[places[0]]) - 1, places) for n, places in reversed(groups)]
        while waiting:
            size, left, n_asked = 0, [], 0
            while waiting and size < min(_HELD, most):
                pack, start = [], size
                while waiting and size - start < min(_PACK, most):
                    pack.append(waiting.pop())
                    size += pack[-1][0]
                n_asked += sum(len(places) for _, places in pack)
                left += self._round([(Head(self._prompts[places[0]][:n]), places) for n, places in pack])
                if 2 * sum(len(places) for _, places in left) > n_asked:
                    return
            for _ in range(_ROUNDS - 1):
                left = self._round(left) if left else []

    def _round(self, asked: Sequence[tuple[Head, Sequence[int]]]) -> list[tuple[Head, list[int]]]:
        """Check a guess at each of these answers; the heads and places of those that are not whole yet."""
        begun, guesses = self._begun, self._guesses
        tails = [
            [[*self._prompts[i][len(head.ids) :], *(begun[i].ids if i in begun else ()), *guesses[i]] for i in places]
            for head, places in asked
        ]
        order = [i for _, places in asked for i in places]
        wanted = [len(guesses[i]) + 1 for i in order]
        top = self._packed.logits([head for head, _ in asked], tails, wanted).float().log_softmax(-1).topk(self._k)
        values, indices = top.values.numpy(), top.indices.numpy()
        for i, (a, b) in zip(order, _spans(wanted), strict=True):
            self._note(i, indices[a:b, 0].tolist(), values[a:b], indices[a:b])
        left = [(head, [i for i in places if i not in self.found]) for head, places in asked]
        return [(head, places) for head, places in left if places]

    def _note(self, i: int, likeliest: list[int], values: np.ndarray, indices: np.ndarray) -> None:
        """Take over what is sure: tokens up to the first that is not the guess's, or that ends the answer."""
        guess = self._guesses[i]
        n = next((j + 1 for j, token in enumerate(guess) if likeliest[j] != token), len(likeliest))
        n = next((j + 1 for j, token in enumerate(likeliest[:n]) if token in self._stops), n)
        answer = self._begun.setdefault(i, Answer([], [], []))
        answer.ids += likeliest[:n]
        answer.values.append(values[:n])
        answer.indices.append(indices[:n])
        room = self._limits[i] - len(answer.ids)
        if answer.ids[-1] in self._stops or room == 0:
            self.found[i] = answer
        else:
            self._guesses[i] = _next_guess(self._prompts[i], answer.ids[-1], guess[n:])[: room - 1]


def _next_guess(prompt: Sequence[int], last: int, rest: list[int]) -> list[int]:
    """What may follow the answer's last token: what follows it in the prompt, else the rest of the guess before."""
    place = next((i for i in reversed(range(len(prompt) - 1)) if prompt[i] == last), None)
    return rest if place is None else list(prompt[place + 1 : place + 1 + _COPIED])


class _Packed:
    """A model whose layers are known over packed tokens."""

    def __init__(self, model: nn.Module):
        self._body, self._layers = decoder_body(model), decoder_layers(model)
        self._norm, self._output = final_norm(model), model.get_output_embeddings()

    def products(self) -> AbstractContextManager:
        """Inside the `with` block its products are oneDNN's; weights are packed anew each time, for many answers."""
        weights = layers.weights_of([*self._layers, self._output])
        return onednn.Packs().used() if onednn.are_small(weights) else nullcontext()

    def logits(self, heads: Sequence[Head], tails: Sequence[Ids], wanted: Sequence[int]) -> Tensor:
        """[wanted tokens, vocabulary]: what follows the last `wanted` tokens of each tail.

        heads: those without states are read as well, and have them then.
        tails: those of each head. wanted: a number for each tail.
        """
        rows, starts, spans, keep = [], [], [], []  # spans: (start of the head, of its tails, end) among all tokens
        end, number, dtype = 0, iter(wanted), self._body.embed_tokens.weight.dtype
        for head, of_head in zip(heads, tails, strict=True):
            start = end
            if not head.states:
                rows.append(head.ids)
                starts.append(0)
                end += len(head.ids)
            middle = end
            for tail in of_head:
                rows.append(tail)
                starts.append(len(head.ids))
                end += len(tail)
                keep += range(end - next(number), end)
            spans.append((start, middle, end))
        n_wanted = len(keep)
        keep += keep[-1:] * (onednn.round_up(n_wanted, _KEPT_STEP) - n_wanted)
        rows.append([0] * (onednn.round_up(end, _TOKEN_STEP) - end))  # nobody sees these
        starts.append(0)
        keep = torch.tensor(keep)
        masks = [
            _tail_mask(len(head.ids), [len(tail) for tail in of_head]).to(dtype)
            for head, of_head in zip(heads, tails, strict=True)
        ]
        stretches = [layers.stretches(middle - start) if start < middle else () for start, middle, _ in spans]
        kept = torch.searchsorted(keep, torch.tensor([span[1:] for span in spans])).tolist()  # the tails within `keep`
        numbers = iter(range(len(self._layers)))

        def attend(q, k, v):
            at, parts, k, v = next(numbers), [], k.transpose(0, 1), v.transpose(0, 1)
            is_last = at == len(self._layers) - 1
            each = zip(heads, spans, stretches, kept, masks, strict=True)
            for head, (start, middle, end), of_head, (a, b), mask in each:
                if len(head.states) == at:
                    head.states.append((k[:, start:middle], v[:, start:middle]))
                    states = k[:, start:end], v[:, start:end]
                    for first, last, own in of_head if not is_last else ():
                        seen = (one[:, start : start + last] for one in (k, v))
                        parts.append(((start + first, start + last), *seen, own))
                else:
                    states = (torch.cat([h, x[:, middle:end]], 1) for h, x in zip(head.states[at], (k, v), strict=True))
                parts.append(((a, b), *states, mask[keep[a:b] - middle]) if is_last else ((middle, end), *states, mask))
            return _attention(q, parts)

        return onednn.linear(self._output, self._norm(self._run(rows, starts, attend, keep)))[:n_wanted]

    def _run(self, rows: Ids, starts: Sequence[int], attend: layers.Attention, keep: Tensor) -> Tensor:
        """The last layer's output [kept, width] at the packed tokens `keep` of the rows, which begin at `starts`.

        Equal tokens enter the first layer as equal rows, so its products are taken of different ones only.
        """
        different, own = torch.tensor([token for row in rows for token in row]).unique(return_inverse=True)
        different = pad(different, (0, onednn.round_up(len(different), _TOKEN_STEP) - len(different)))
        x = self._body.embed_tokens(different)
        places = torch.cat([torch.arange(start, start + len(row)) for start, row in zip(starts, rows, strict=True)])
        rotary = layers.rotary_of(self._body, x, places)
        for number, layer in enumerate(self._layers, 1):
            kept = keep if number == len(self._layers) else None
            x = layers.written_out(layer, x, rotary, attend, rows=own if number == 1 else None, keep=kept)
        return x


def _attention(q: Tensor, parts: Sequence[tuple[tuple[int, int], Tensor, Tensor, Any]]) -> Tensor:
    """[tokens, heads, size] for q of that shape; parts: (first and last query, keys, values, mask or None: causal)."""
    result = torch.zeros_like(q)
    for (a, b), k, v, mask in parts if len(q) else ():
        one = q[a:b].transpose(0, 1)
        done = scaled_dot_product_attention(
            one[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, enable_gqa=len(k) != len(one)
        )
        result[a:b] = done[0].transpose(0, 1)
    return result


def _tail_mask(head: int, sizes: Sequence[int]) -> Tensor:
    """[tokens, head + tokens] to add to scores: tails of these sizes each see the head and themselves."""
    row = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.long))
    own = (row[:, None] == row).tril()
    mask = torch.zeros(len(row), head + len(row))
    mask[:, head:].masked_fill_(~own, -torch.inf)
    return mask


def _spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(start, end) of stretches of these sizes, one after the other."""
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return list(zip(ends[:-1], ends[1:], strict=True))
