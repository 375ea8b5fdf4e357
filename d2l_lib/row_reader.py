"""What reads token rows: the parts of a hypernetwork that act in the base model, the same for all documents.

Two of the upper layers look at rows, at the input x of their target linear: u = x / |x|, q = K u, and row j with code
c_j has the logit q.c_j.

First the words of a question look for their like in the document (late interaction, as in ColBERT: Khattab and Zaharia
2020, arXiv 2004.12832). This adds nothing to the model; it tells whether to read, and where:

    match layer   p(i, t) of token i, over the rows of role "context" of all tokens t and a null row that stands for
                  words which the document lacks, with the logit null_key u + null_logit: a softmax
    evidence      E(t) = sum over the tokens i so far of p(i, t)
    nearness      s_k(t) = log(1 + mean of E around t / FLOOR), weights exp(-distance / spread) before t, after t or on
                  both sides, for each of NEAR, inside t's chunk
    words         w_1(c) of chunk c: sum over the words i of the question so far of
                  log(n / n_i) f (K + 1) / (f + K (1 - L + L |c| / mean |c|)), where n_i of n chunks hold the word, c
                  holds it f times, and |c| is its length (BM25: Robertson and Zaragoza 2009); w_2(c): likewise of words
                  with the one before them. Words are tokens of the question's own text; capitals and spaces do not
                  count. Where there is one chunk, all are 0
    gate          open where sum over k of gate_k max over t of s_k(t) + gate_words max over c of w_1(c) > gate_bias
                  + gate_rise log(n) + gate_length log(1 + sum over the tokens i so far of sigmoid(content_key u_i));
                  gate_k, gate_length > 0. Its p(i, t) is a softmax over one chunk and the null row, so other chunks
                  take nothing from it: among more chunks one is alike by chance, hence the rise; and so it is where
                  more is asked, hence the count of content words. Tokens of an answer leave nothing for the gate: what
                  is asked decides
    last layer    logit of row j at token t: q.c_j + sum over k of (weight_k + W_k u) s_k(t);  p = softmax over the rows
                  of the chunk c with the largest  log sum over its rows of exp(logit) + sum over k of chunk_k max over
                  its t of s_k(t) + sum over m of chunk_words_m w_m(c)
                  y = W x + sum over j of p_j B_j where the gate is open: B_j writes a word (see `token_rows`)

Tokens of the answer leave evidence for the last layer, so an answer goes on where it began. A low-rank update of all
linears of the layers above the match layer lets the frozen model ask better: it is the published bias block in another
place. It acts where the gate is open, so a question about something else gets the base model, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2l_lib.base_model import decoder_body, decoder_layers, module_sizes, target_linears
from d2l_lib.hypernetwork import HypernetworkConfig
from d2l_lib.lora import without_lora

NEAR = ((0.0, 0), (3.0, -1), (3.0, 1), (12.0, -1), (12.0, 1), (24.0, 0))  # tokens; -1: evidence before t, 1: after it
FLOOR = 0.01  # evidence of one token that begins to count
REACH = 48  # tokens to each side
SATURATION, LENGTH = 1.2, 0.75  # K and L of BM25
_STRIDE = 64  # places whose nearness one matrix product gives
_FAST = 10.0  # single numbers learn so many times faster than matrices
_Delta = tuple[nn.Linear, Callable[[Tensor], Tensor]]


class RowReader(nn.Module):
    """Key maps K of the two layers that look at rows, the gate, weights of nearness, updates of the upper layers.

    match_layer, last_layer: numbers of the base layers that look at rows. lora_layers: those that are updated.
    answer_start, answer_ends: tokens before and after an answer in a chat; wrapping: around a question; and words: see
        `TokenRows.prepare`.

    ValueError where an updated layer is not above the match layer.
    """

    def __init__(self, config: HypernetworkConfig, n_roles: int):
        super().__init__()
        self.answer_start: tuple[int, ...] = ()
        self.answer_ends: frozenset[int] = frozenset()
        self.wrapping: frozenset[int] = frozenset()
        self.words: Any = None  # `token_rows.Words` of the base model
        (self.match_layer, self.last_layer), self.lora_layers = config.row_layers, config.reader_layers
        if min(self.lora_layers) <= self.match_layer:
            raise ValueError(f"the gate is set in layer {self.match_layer}: only layers above it can have an update")
        (self.module,) = config.modules
        d, d_in, names = config.latent_size, config.d_in[self.module], [str(layer) for layer in config.row_layers]
        self.keys = nn.ParameterDict({name: nn.Parameter(torch.randn(d_in, d) / (3 * d) ** 0.5) for name in names})
        self.null_key, self.null_logit = nn.Parameter(torch.zeros(d_in)), nn.Parameter(torch.zeros(()))
        self.gate_scaler = nn.Parameter(torch.full((len(NEAR),), -1.0 / _FAST))  # before softplus
        self.gate_bias = nn.Parameter(torch.tensor(4.0 / _FAST))
        self.gate_length = nn.Parameter(torch.tensor(-1.0 / _FAST))  # before softplus
        self.content_key = nn.Parameter(torch.zeros(d_in))
        self.gate_rise = nn.Parameter(torch.zeros(()), requires_grad=False)  # measured, not learned, like all below
        self.gate_words = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.chunk_weight = nn.Parameter(torch.zeros(len(NEAR)), requires_grad=False)
        self.chunk_words = nn.Parameter(torch.zeros(2), requires_grad=False)
        weights = torch.tensor([[0.0 if spread == 0 else 0.15] for spread, _ in NEAR])
        self.evidence_scaler = nn.Parameter(weights.repeat(1, n_roles) / _FAST)
        self.evidence_keys = nn.Parameter(torch.zeros(d_in, len(NEAR) * n_roles))
        n, r, sizes = len(self.lora_layers), config.reader_rank, config.reader_sizes
        self.lora_A = nn.ParameterDict(
            {module: nn.Parameter(torch.randn(n, r, d_in) / d_in**0.5) for module, (d_in, _) in sizes.items()}
        )
        self.lora_B = nn.ParameterDict(
            {module: nn.Parameter(torch.zeros(n, r, d_out)) for module, (_, d_out) in sizes.items()}
        )

    def asked(self, layer: int, unit: Tensor) -> Tensor:
        """q [..., d] of u [..., d_in] at this layer."""
        return unit @ self.keys[str(layer)].to(unit)

    def nothing(self, unit: Tensor) -> Tensor:
        """[...]: the logit of the match layer's null row, of u [..., d_in]."""
        return unit @ self.null_key.to(unit) + _FAST * self.null_logit.to(unit)

    def content(self, unit: Tensor) -> Tensor:
        """[...]: 0 to 1, how much each token of u [..., d_in] asks for."""
        return (unit @ self.content_key.to(unit)).sigmoid()

    def gate(self, nearness: Tensor, content: Tensor, chunks: int | Tensor, words: Tensor | None = None) -> Tensor:
        """[...]: a logit, above 0 where the gate is open.

        nearness: [..., T, k] of all chunks. content: [...], the sum over what was asked so far. chunks: their number.
        words: [...], the largest w_1 of any chunk; None: 0.
        """
        found = nearness.amax(-2) @ F.softplus(_FAST * self.gate_scaler.to(nearness))
        if words is not None:
            found = found + self.gate_words.to(found) * words.to(found)
        return (
            found
            - _FAST * self.gate_bias.to(nearness)
            - F.softplus(_FAST * self.gate_length.to(nearness)) * content.to(nearness).log1p()
            - self.gate_rise.to(nearness) * torch.as_tensor(chunks).clamp_min(1).log()
        )

    @torch.no_grad()
    def raise_gate(self, nats: float, rise: float) -> None:
        """From now on the gate opens where its logit was above nats + rise log(number of chunks)."""
        self.gate_bias += nats / _FAST
        self.gate_rise += rise

    @torch.no_grad()
    def weigh_gate(self, words: float, rise: float) -> None:
        """From now on the largest w_1, and the logarithm of the number of chunks, weigh so much in the gate."""
        self.gate_words.fill_(words)
        self.gate_rise.fill_(rise)

    @torch.no_grad()
    def weigh_chunks(self, nearest: int, nearness: float, words: Sequence[float]) -> None:
        """From now on the nearness with this number, and the two w, weigh so much where a chunk is chosen."""
        self.chunk_weight.zero_()
        self.chunk_weight[nearest] = nearness
        self.chunk_words.copy_(torch.tensor(words))

    def favour(self, nearness: Tensor, unit: Tensor) -> Tensor:
        """[..., T, roles]: what nearness [..., T, k] adds to logits of rows of words at a token with u [..., d_in]."""
        weights = (unit @ self.evidence_keys.to(unit)).unflatten(-1, self.evidence_scaler.shape)
        return nearness @ (_FAST * self.evidence_scaler.to(unit) + weights)

    def chunk_favour(self, nearness: Tensor, words: Tensor) -> Tensor:
        """[...]: what a chunk's logit gains by the largest nearness [..., k] in it and by its words w [..., 2]."""
        return nearness @ self.chunk_weight.to(nearness) + words @ self.chunk_words.to(words)

    def linears(self, base_model: nn.Module) -> dict[int, nn.Linear]:
        """{layer that looks at rows: its target linear}, ValueError for a model of another depth."""
        (found,) = target_linears(base_model, [self.module]).values()
        if self.last_layer != len(found) - 1:
            raise ValueError(f"words are read at layer {self.last_layer}, the last of this model is {len(found) - 1}")
        return {layer: found[layer] for layer in (self.match_layer, self.last_layer)}

    def updates(self, base_model: nn.Module, gates: Callable[[], Tensor]) -> Iterator[_Delta]:
        """The low-rank updates, for `lora.add_deltas`; gates: [batch, tokens] of the pass, 1 where they act, else 0."""
        for module, linears in target_linears(base_model, sorted(self.lora_A)).items():
            for place, layer in enumerate(self.lora_layers):
                yield linears[layer], _update(self.lora_A[module][place], self.lora_B[module][place], gates)


def word_gains(counts: Tensor, lengths: Tensor) -> Tensor:
    """[..., chunks]: what a word adds to each chunk's w.

    counts: [..., chunks], how often each chunk holds it. lengths: [chunks], in tokens.
    """
    n, holding = counts.shape[-1], (counts > 0).sum(-1, keepdim=True)
    free = SATURATION * (1 - LENGTH + LENGTH * lengths / lengths.mean())
    return (n / holding.clamp_min(1)).log() * counts * (SATURATION + 1) / (counts + free)


def nearness(evidence: Tensor, slots: Tensor | None = None) -> Tensor:
    """[..., T, k]: s_k(t) of evidence [..., T].

    slots: [T], the place of each token in a row with at least REACH free places between chunks (None: one chunk).
    """
    length = evidence.shape[-1] if slots is None else int(slots[-1]) + 1
    n = -(-length // _STRIDE)
    spaced = evidence.new_zeros(*evidence.shape[:-1], n * _STRIDE + 2 * REACH)
    spaced[..., REACH + (torch.arange(length) if slots is None else slots)] = evidence
    near = spaced.unfold(-1, _STRIDE + 2 * REACH, _STRIDE) @ _weights().to(evidence)
    near = near.unflatten(-1, (_STRIDE, len(NEAR))).flatten(-3, -2)  # [..., places, k]
    return torch.log1p((near[..., :length, :] if slots is None else near[..., slots, :]) / FLOOR)


def _weights() -> Tensor:
    """[_STRIDE + 2 REACH, _STRIDE * k]: from evidence in a window to means around the places in its middle."""
    distance = torch.arange(-REACH, REACH + 1)
    kernels = torch.zeros(len(NEAR), len(distance))
    for kernel, (spread, side) in zip(kernels, NEAR, strict=True):
        far = torch.exp(-distance.abs() / spread) if spread else (distance == 0).float()
        far = far * (distance * side > 0) if side else far
        kernel.copy_(far / far.sum())
    weights = torch.zeros(_STRIDE + 2 * REACH, _STRIDE, len(NEAR))
    for place in range(_STRIDE):
        weights[place : place + len(distance), place] = kernels.T
    return weights.flatten(1)


def _update(A: Tensor, B: Tensor, gates: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
    def delta(x: Tensor) -> Tensor:
        act = gates()
        return x @ A.to(x).T @ B.to(x) * act.to(x).unsqueeze(-1) if act.any() else x.new_zeros(())

    return delta


def reader_sizes(base_model: nn.Module, layers: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """{linear: (d_in, d_out)} of all linears of these layers, by name."""
    parts = decoder_layers(base_model)[layers[0]].named_modules()
    names = sorted(path.rpartition(".")[2] for path, part in parts if isinstance(part, nn.Linear))
    d_in, d_out = module_sizes(base_model, names)
    return {name: (d_in[name], d_out[name]) for name in names}


def part_of_layers(base_model: nn.Module, layers: slice) -> nn.Module:
    """The decoder with some of its layers alone, sharing all weights; its input goes in as `inputs_embeds`.

    Where layers differ by number (sliding windows in every second one), a part can give other numbers: see
    `check_parts`.
    """
    body = copy.copy(decoder_body(base_model))
    body._modules = dict(body._modules)
    body.layers = nn.ModuleList(decoder_layers(base_model)[layers])
    return body


@torch.no_grad()
def check_parts(base_model: nn.Module, ids: list[int], below: int) -> None:
    """ValueError unless the layers from `below` on give the same alone as in the whole model, on these ids."""
    body, inputs = decoder_body(base_model), torch.tensor([ids], device=base_model.device)
    with without_lora(base_model):
        states = body(input_ids=inputs, output_hidden_states=True, use_cache=False)
        own = part_of_layers(base_model, slice(below, None))(inputs_embeds=states.hidden_states[below], use_cache=False)
    whole = states.last_hidden_state.float()
    if (own.last_hidden_state.float() - whole).norm() > 1e-2 * whole.norm():
        raise ValueError(
            f"the layers of {type(base_model).__name__} from {below} on give other numbers alone than in the whole "
            "model, as layers that differ by number do: begin reader_layers at another one"
        )
