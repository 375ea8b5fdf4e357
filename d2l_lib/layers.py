"""Layers of a base model written out, where numbers alone are asked for: on a CPU, without gradients.

transformers' own layers come to the same numbers. These spare what stands around the products: tokens of all texts lie
side by side, [tokens, width], weights may lie in oneDNN's order (see `onednn`), and nothing is kept. Models of other
families go transformers' way, and so do those in which a module was replaced, wrapped, hooked or set otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers.activations import ACT2FN, SiLUActivation

from d2l_lib import onednn
from d2l_lib.base_model import decoder_body, final_norm

_FAMILIES = ("llama", "qwen3")
_THEIRS = ("transformers.models.", "transformers.activations", "torch.nn.modules.")
_PARTS = {
    "self_attn": "Attention", "mlp": "MLP", "input_layernorm": "RMSNorm", "post_attention_layernorm": "RMSNorm"
}  # fmt: skip
_SILU = (SiLUActivation, nn.SiLU)
_STRETCH = 96  # queries of a text that are compared at once with the keys before their end
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values [tokens, heads, size]


def can_be_written_out(model: nn.Module, layers: Sequence[nn.Module]) -> bool:
    """Whether this module knows these layers of the model as they are, and the model computes on a CPU."""
    config, body = model.config.get_text_config(), decoder_body(model)
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    return (
        model.device.type == "cpu"
        and config.model_type in _FAMILIES
        and {*kinds} == {"full_attention"}
        and config._attn_implementation in ("sdpa", "eager")
        and getattr(config, "is_causal", True) is not False
        and all(map(_is_known, (body, body.embed_tokens, body.rotary_emb, final_norm(model))))
        and all(_is_known(module) for layer in layers for module in layer.modules())
        and all(_has_its_parts(layer, type(ACT2FN[config.hidden_act])) for layer in layers)
    )


def _has_its_parts(layer: nn.Module, activation: type[nn.Module]) -> bool:
    """Whether a layer has the parts with which transformers made it, and attends as its family does."""
    family, is_layer, _ = type(layer).__name__.partition("DecoderLayer")
    parts = {name: getattr(layer, name, None) for name in _PARTS}
    if not is_layer or any(type(part).__name__ != family + _PARTS[name] for name, part in parts.items()):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    linears = [getattr(attention, f"{name}_proj") for name in "qkvo"] + [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    norms = [norm for name in ("q_norm", "k_norm") if (norm := getattr(attention, name, None)) is not None]
    return (
        all(isinstance(one, nn.Linear) for one in linears)
        and all(type(one).__name__ == f"{family}RMSNorm" for one in norms)
        and type(mlp.act_fn) is activation
        and getattr(attention, "is_causal", True)
        and attention.scaling == attention.head_dim**-0.5
    )


def _is_known(module: nn.Module) -> bool:
    """Whether a module is of transformers or torch, with the forward pass and the hooks that it has there."""
    kind = type(module)
    is_theirs = kind.__module__.startswith(_THEIRS) and kind.forward.__module__.startswith(_THEIRS)
    return is_theirs and "forward" not in vars(module) and not onednn.hooks_of(module)


def weights_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The weights of all linears in these modules."""
    return [part.weight for one in modules for part in one.modules() if isinstance(part, nn.Linear)]


def rotary_of(body: nn.Module, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [tokens, 1, size] of tokens at these places, the first half of the sines negated.

    x: any states of the model, for their precision.
    """
    cos, sin = (one[0, :, None] for one in body.rotary_emb(x, places[None]))
    sin[..., : sin.shape[-1] // 2] *= -1
    return cos, sin


def written_out(
    layer: nn.Module,
    x: Tensor,
    rotary: tuple[Tensor, Tensor],
    attend: Attention,
    *,
    rows: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """A layer's output [tokens, width] for x of that shape.

    rotary: see `rotary_of`.
    attend: mixes the values for each query.
    rows: x holds different rows only, and token i's is x[rows[i]] (None: every token has its own).
    keep: the output at these tokens only.
    """
    attention, cos, sin = layer.self_attn, *rotary
    y = layer.input_layernorm(x)
    k, v = _by_head(attention, "k", y), _by_head(attention, "v", y)
    if rows is not None:
        k, v = k[rows], v[rows]
    k = _turned(k, cos, sin)
    if keep is not None:
        own = keep if rows is None else rows[keep]
        x, y, cos, sin, rows = x[own], y[own], cos[keep], sin[keep], None
    q = _by_head(attention, "q", y)
    if rows is not None:
        x, q = x[rows], q[rows]
    mixed = attend(_turned(q, cos, sin), k, v)
    x = onednn.linear(attention.o_proj, mixed.flatten(1), plus=x)
    return _add_mlp(x, layer.mlp, layer.post_attention_layernorm(x))


def _by_head(attention: nn.Module, name: str, y: Tensor) -> Tensor:
    """Queries, keys or values [tokens, heads, size], normed where the model does it."""
    states = onednn.linear(getattr(attention, f"{name}_proj"), y).unflatten(1, (-1, attention.head_dim))
    norm = getattr(attention, f"{name}_norm", None)
    return states if norm is None else norm(states)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x [tokens, heads, size], cos and sin [tokens, 1, size], the first half of sin negated."""
    first, second = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([second, first], -1), sin)


def _add_mlp(x: Tensor, mlp: nn.Module, y: Tensor) -> Tensor:
    """x + mlp(y), [tokens, width]."""
    parts, size = [], onednn.piece_of(len(x), mlp.gate_proj.out_features)
    for before, rows in zip(x.split(size), y.split(size), strict=True):
        gate = onednn.linear(mlp.gate_proj, rows)
        gate = silu(gate, inplace=True) if isinstance(mlp.act_fn, _SILU) else mlp.act_fn(gate)
        hidden = onednn.linear(mlp.up_proj, rows, times=gate)
        parts.append(onednn.linear(mlp.down_proj, hidden, plus=before))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def stretches(length: int) -> list[tuple[int, int, Tensor | None]]:
    """(first query, end, mask [queries, end] to add to scores; None: causal) of parts of a text that is read causally.

    Each part's queries meet the keys before its end, so most scores that would be hidden are not computed.
    """
    ends = [*range(_STRETCH, length - _STRETCH // 2, _STRETCH), length]
    most, start = max(b - a for a, b in pairwise([0, *ends])), ends[-2] if len(ends) > 1 else 0
    mask = torch.zeros(most, start + most)  # of the last part; the others' are cut out of it
    mask[:, start:] = torch.full((most, most), -torch.inf).triu_(1)
    later = [(a, b, mask[: b - a, start - a : start - a + b]) for a, b in pairwise(ends)]
    return [(0, ends[0], None), *later]


def causally(n: int, length: int) -> Attention:
    """Attention of n texts of one length that lie one after another: each token sees those before it and itself."""
    parts = stretches(length)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        is_grouped = k.shape[1] != q.shape[1]
        q, k, v = (one.view(n, length, *one.shape[1:]).transpose(1, 2) for one in (q, k, v))
        mixed = [
            scaled_dot_product_attention(
                q[:, :, a:b], k[:, :, :b], v[:, :, :b], attn_mask=mask, is_causal=mask is None, enable_gqa=is_grouped
            ).transpose(1, 2)
            for a, b, mask in parts
        ]
        return torch.cat(mixed, 1).flatten(0, 1)

    return attend
