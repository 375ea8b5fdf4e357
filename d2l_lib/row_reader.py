"""What reads token rows: the parts of a hypernetwork that act in the base model, the same for all documents.

Two of the upper layers read rows, at the input x of their target linear. Both ask in the same way:

    question's code   q = K (x / |x|)
    logit             q.c_j of row j, whose code is c_j; null_key (x / |x|) + null_logit of reading nothing
    share             p = softmax over the rows and the null row

First the words of a question look for their like in the document (late interaction, as in ColBERT: Khattab and Zaharia
2020, arXiv 2004.12832). This adds nothing to the model; it tells the last layer where to look:

    match layer   p(i, t) of token i, over the rows of role "context" of all tokens t
    evidence      E(t) = sum over the tokens i so far of p(i, t); words that the document lacks go to the null row
    nearness      s_k(t) = mean of E around t, weights exp(-distance / k), for k of SPREADS, inside t's chunk
    last layer    logit of row j at token t: q.c_j + sum over k of weight_k log(1 + s_k(t) / FLOOR)
                  y = W x + sum over j of p_j B_j: B_j writes a word (see `token_rows`)

Tokens of the answer leave evidence too, so an answer goes on where it began. A low-rank update of all linears of the
upper layers lets the frozen model ask better: it is the published bias block in another place, and acts only where an
adapter is applied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2l_lib.base_model import decoder_body, decoder_layers, module_sizes, target_linears
from d2l_lib.hypernetwork import HypernetworkConfig
from d2l_lib.lora import without_lora

SPREADS = (2.0, 8.0, 32.0)  # tokens
FLOOR = 0.01  # evidence of one token that begins to count
REACH = 64  # tokens to each side
_Delta = tuple[nn.Linear, Callable[[Tensor], Tensor]]


class RowReader(nn.Module):
    """Key maps K and null rows of the two layers that read rows, weights of evidence, updates of the upper layers.

    match_layer, last_layer: numbers of the base layers that read. lora_layers: those that are updated.
    """

    def __init__(self, config: HypernetworkConfig, n_roles: int):
        super().__init__()
        (self.match_layer, self.last_layer), self.lora_layers = config.row_layers, config.reader_layers
        (self.module,) = config.modules
        d, d_in, names = config.latent_size, config.d_in[self.module], [str(layer) for layer in config.row_layers]
        self.keys = nn.ParameterDict({name: nn.Parameter(torch.randn(d_in, d) / (3 * d) ** 0.5) for name in names})
        self.null_keys = nn.ParameterDict({name: nn.Parameter(torch.zeros(d_in)) for name in names})
        self.null_logits = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in names})
        self.evidence_scaler = nn.Parameter(torch.full((len(SPREADS), n_roles), 0.25))
        n, r, sizes = len(self.lora_layers), config.reader_rank, config.reader_sizes
        self.lora_A = nn.ParameterDict(
            {module: nn.Parameter(torch.randn(n, r, d_in) / d_in**0.5) for module, (d_in, _) in sizes.items()}
        )
        self.lora_B = nn.ParameterDict(
            {module: nn.Parameter(torch.zeros(n, r, d_out)) for module, (_, d_out) in sizes.items()}
        )

    def asked(self, layer: int, unit: Tensor) -> tuple[Tensor, Tensor]:
        """(q [..., d], logit of the null row [...]) of x / |x| [..., d_in] at this layer."""
        name = str(layer)
        keys, null_key = self.keys[name].to(unit), self.null_keys[name].to(unit)
        return unit @ keys, unit @ null_key + self.null_logits[name].to(unit)

    def favour(self, evidence: Tensor, slots: Tensor | None = None) -> Tensor:
        """[..., T, roles]: what evidence [..., T] adds to the logits of each token's rows of words.

        slots: [T], the place of each token in a row with at least REACH free places between chunks (None: one chunk).
        """
        if slots is not None:
            spaced = evidence.new_zeros(*evidence.shape[:-1], int(slots[-1]) + 1)
            spaced[..., slots] = evidence
            evidence = spaced
        flat = evidence.reshape(-1, 1, evidence.shape[-1])
        near = F.conv1d(flat, _kernels().to(flat), padding=REACH).unflatten(0, evidence.shape[:-1])  # [..., k, T]
        near = near if slots is None else near[..., slots]
        return torch.log1p(near / FLOOR).mT @ self.evidence_scaler.to(near)

    def linears(self, base_model: nn.Module) -> dict[int, nn.Linear]:
        """{layer that reads rows: its target linear}, ValueError for a model of another depth."""
        (found,) = target_linears(base_model, [self.module]).values()
        if self.last_layer != len(found) - 1:
            raise ValueError(f"words are read at layer {self.last_layer}, the last of this model is {len(found) - 1}")
        return {layer: found[layer] for layer in (self.match_layer, self.last_layer)}

    def updates(self, base_model: nn.Module, weigh: Callable[[Tensor], Tensor] | None = None) -> Iterator[_Delta]:
        """The low-rank updates, for `lora.add_deltas`; weigh: what is done to an update [batch, tokens, d_out]."""
        for module, linears in target_linears(base_model, sorted(self.lora_A)).items():
            for place, layer in enumerate(self.lora_layers):
                A, B = self.lora_A[module][place], self.lora_B[module][place]
                yield linears[layer], _update(A, B, weigh)


def _kernels() -> Tensor:
    """[spreads, 1, 2 REACH + 1], each with sum 1."""
    distance = torch.arange(-REACH, REACH + 1).abs()
    kernels = torch.stack([torch.exp(-distance / spread) for spread in SPREADS])
    return (kernels / kernels.sum(1, keepdim=True)).unsqueeze(1)


def _update(A: Tensor, B: Tensor, weigh: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    def delta(x: Tensor) -> Tensor:
        y = x @ A.to(x).T @ B.to(x)
        return y if weigh is None else weigh(y)

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
