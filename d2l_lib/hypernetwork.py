"""From context features to LoRA blocks: the Perceiver hypernetwork of Doc-to-LoRA (arXiv 2602.15902).

The Perceiver reads one latent vector per (layer, module, rank row) out of a chunk. A linear head per layer turns it
into one row of A and one row of B. Shapes:

    n chunks, T tokens, F feature_size, d latent_size, L layers, M modules (sorted by name), r rank,
    D = max over modules of d_in + d_out.

Parameter names equal those of the published checkpoints, so their tensors load without a translation table.
"""

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from d2l_lib import onednn
from d2l_lib.onednn import in_use, is_plain, linear, product, product_of_rows

_ENCODER_TYPES = ("early_exit", "per_layer_activations", "embed_only", "hidden_states")
_WRITERS = ("perceiver", "token_rows", "pooled_rows")
_TUPLES = ("encoder_layers", "row_layers", "reader_layers", "written_layers")
# Fields that files of before do not have: written only where they say something.
_LATER = (
    *("null_rows", "writer", "encoder_layers", "row_layers", "reader_layers", "reader_rank", "reader_sizes"),
    *("written_layers", "pooled_size", "pooled_blocks"),
)
Loras = dict[str, tuple[Tensor, Tensor]]
_MANY_ROWS = 256  # queries that share a key-value head: from so many on, heads go one by one


@dataclass(frozen=True)
class HypernetworkConfig:
    """All sizes of a hypernetwork and of the base model it writes for.

    scale: the s of y = W x + s B^T (A x), never divided by the rank (None: 2 * rank**1.5).
    encoder_layer: for early_exit, how many base layers are run (None: a quarter of them, at least one); for
        per_layer_activations, how many hidden states are read (None: one per layer).
    encoder_4bit: the context encoder of training was in 4-bit precision.
    encoder_layers: for hidden_states, after how many base layers each state is taken (0: the embeddings); a feature is
        these states one after another.
    null_rows: learned keys of "no block" in each layer and module (see `null`); 0: none, as published.
    writer: "perceiver", as published, "token_rows" (see `token_rows`; n_layers is 1 then), or "pooled_rows" (see
        `pooled_rows`).
    row_layers, reader_layers, reader_rank, reader_sizes: for token_rows, the base layers that read rows, those with a
        low-rank update, its rank, and {linear: (d_in, d_out)} of such a layer (see `row_reader`).
    written_layers, pooled_size, pooled_blocks: for pooled_rows, the base layers that get blocks, and size and depth of
        its Perceiver.
    """

    n_layers: int
    d_in: dict[str, int]
    d_out: dict[str, int]
    feature_size: int
    latent_size: int = 512
    rank: int = 8
    scale: float | None = None
    encoder_type: str = "early_exit"
    encoder_layer: int | None = None
    n_latent_queries: int = 208
    n_blocks: int = 8
    n_self_attention_per_block: int = 0
    shared_weights: bool = False
    per_layer_processing: bool = False
    n_pre_head_layers: int = 1
    use_bias: bool = True
    dropout: float = 0.0
    n_heads: int = 16
    n_kv_heads: int = 4
    head_dim: int = 128
    base_model: str = ""
    encoder_model: str | None = None
    encoder_4bit: bool = False
    null_rows: int = 0
    writer: str = "perceiver"
    encoder_layers: tuple[int, ...] = ()
    row_layers: tuple[int, ...] = ()
    reader_layers: tuple[int, ...] = ()
    reader_rank: int = 0
    reader_sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    written_layers: tuple[int, ...] = ()
    pooled_size: int = 0
    pooled_blocks: int = 0

    def __post_init__(self):
        self._check_numbers()
        if self.scale is None:
            object.__setattr__(self, "scale", 2 * self.rank**1.5)
        if not isinstance(self.scale, Real) or not math.isfinite(self.scale):
            raise ValueError(f"scale is {self.scale!r}; it must be a finite number")
        if self.encoder_type not in _ENCODER_TYPES:
            raise ValueError(f"encoder_type is {self.encoder_type!r}; choose one of {', '.join(_ENCODER_TYPES)}")
        if self.writer not in _WRITERS:
            raise ValueError(f"writer is {self.writer!r}; choose one of {', '.join(_WRITERS)}")
        for name in _TUPLES:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "reader_sizes", {name: tuple(two) for name, two in self.reader_sizes.items()})
        if bool(self.row_layers) != bool(self.reader_layers) or bool(self.row_layers) != (self.writer == "token_rows"):
            raise ValueError('writer "token_rows", row_layers and reader_layers go together')
        if self.row_layers and (len(self.row_layers) != 2 or self.row_layers[0] >= self.row_layers[1]):
            raise ValueError(f"row_layers must be two, a lower one and the last, not {self.row_layers}")
        pooled = {bool(one) for one in (self.written_layers, self.pooled_size, self.pooled_blocks)}
        if pooled != {self.writer == "pooled_rows"}:
            raise ValueError('writer "pooled_rows", written_layers, pooled_size and pooled_blocks go together')
        written = self.written_layers
        if written and (list(written) != sorted(set(written)) or not 0 <= written[0] <= written[-1] < self.n_layers):
            raise ValueError(f"written_layers must ascend from 0 to at most {self.n_layers - 1}, not {written}")
        if (self.encoder_type == "hidden_states") != bool(self.encoder_layers):
            raise ValueError('encoder_type "hidden_states" and encoder_layers, the states, go together')
        if not self.d_in or self.d_in.keys() != self.d_out.keys():
            raise ValueError(f"d_in names {sorted(self.d_in)} and d_out {sorted(self.d_out)}: name the same modules")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")

    def _check_numbers(self) -> None:
        """ValueError names a size or count that is too small or no whole number."""
        if not isinstance(self.d_in, dict) or not isinstance(self.d_out, dict):
            raise ValueError(f"d_in and d_out must be {{module: size}}, not {self.d_in!r} and {self.d_out!r}")
        numbers = {field.name: getattr(self, field.name) for field in fields(self) if field.type in (int, int | None)}
        numbers |= {f"{side}[{m!r}]": size for side in ("d_in", "d_out") for m, size in getattr(self, side).items()}
        may_be_zero = ("n_self_attention_per_block", "n_pre_head_layers", "encoder_layer", "null_rows", "reader_rank")
        may_be_zero += ("pooled_size", "pooled_blocks")
        smallest = dict.fromkeys(may_be_zero, 0)
        for name, value in numbers.items():
            if name == "encoder_layer" and value is None:
                continue
            least = smallest.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")

    @property
    def modules(self) -> list[str]:
        """Target module names, in the order of their latents."""
        return sorted(self.d_in)

    @property
    def layer_to_layer(self) -> bool:
        """Whether base layer l is written from hidden state l alone."""
        return self.encoder_type == "per_layer_activations"

    def to_dict(self) -> dict:
        """The fields as plain values, ready for JSON; those that files of before lack only where they differ."""
        defaults = {field.name: field.default for field in fields(self)}
        values = asdict(self) | {name: list(getattr(self, name)) for name in _TUPLES}
        values["reader_sizes"] = {name: list(two) for name, two in self.reader_sizes.items()}
        return {n: v for n, v in values.items() if n not in _LATER or v not in (defaults[n], [], {})}

    @classmethod
    def from_dict(cls, values: dict) -> "HypernetworkConfig":
        """Inverse of `to_dict`; ValueError names unknown or missing fields."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown hypernetwork settings {unknown}; known are {sorted(known)}")
        if missing := [name for name in ("n_layers", "d_in", "d_out", "feature_size") if name not in values]:
            raise ValueError(f"hypernetwork settings lack {missing}")
        return cls(**values)


def _unit_rms(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 1e-6), computed in float32 and returned in x's dtype."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], eps=1e-6)
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class _RMSNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + 1e-6), computed in float32 and returned in x's dtype."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)
        return self.weight * _unit_rms(x)


class _SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) without biases: d_in -> d_hidden -> d_out.

    Without gradients, hidden values are changed in place; on the CPU, of so few rows at once that its cache holds them.
    With gradients, gate(x) and up(x) are kept, and what follows from them is computed again.
    """

    def __init__(self, d_in: int, d_hidden: int, d_out: int):
        super().__init__()
        self.gate_proj = nn.Linear(d_in, d_hidden, bias=False)
        self.up_proj = nn.Linear(d_in, d_hidden, bias=False)
        self.down_proj = nn.Linear(d_hidden, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled():
            linears = (self.gate_proj, self.up_proj, self.down_proj)
            # the precision of each product is autocast's to choose, and a hook sees what its linear does
            if torch.is_autocast_enabled(x.device.type) or not all(map(is_plain, linears)):
                return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
            y = _KeptSwiGLU.apply(rows, *(one.weight for one in linears))
            return y.view(*x.shape[:-1], -1)
        parts, on_cpu = [], x.device.type == "cpu"
        for piece in rows.split(onednn.piece_of(len(rows), self.gate_proj.out_features) if on_cpu else len(rows)):
            gate = linear(self.gate_proj, piece)
            hidden = linear(self.up_proj, piece, times=F.silu(gate, inplace=is_plain(self.gate_proj)))
            parts.append(linear(self.down_proj, hidden))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*x.shape[:-1], -1)


class _KeptSwiGLU(torch.autograd.Function):
    """D (silu(G x) * U x) of rows x [n, d_in]; only x, G x and U x are kept for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, G: Tensor, U: Tensor, D: Tensor) -> Tensor:
        gate, up = F.linear(x, G), F.linear(x, U)
        ctx.save_for_backward(x, gate, up, G, U, D)
        return F.linear(F.silu(gate).mul_(up), D)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, G, U, D = ctx.saved_tensors
        act, grad_hidden = F.silu(gate), grad @ D
        grad_D = grad.T @ (act * up)
        grad_up = act.mul_(grad_hidden)
        grad_gate = torch.ops.aten.silu_backward(grad_hidden.mul_(up), gate)
        grad_x = torch.addmm(grad_gate @ G, grad_up, U) if ctx.needs_input_grad[0] else None
        return grad_x, grad_gate.T @ x, grad_up.T @ x, grad_D


class Attention(nn.Module):
    """Grouped-query attention of latents [n, k, d] on a context [n, T, d]; `mask` [n, T] is True at real tokens.

    Latents shared by all contexts may be [1, k, d]. Query heads that share a key-value head lie side by side along the
    query axis, so keys and values are never repeated.

    Two ways give the same numbers. The plain one forms keys K x and values V x of every token x. The absorbed one forms
    neither, as q . (K x) = (K^T q) . x and sum of a (V x) = V (sum of a x): latents read the context itself. With H
    key-value heads of size h and g query heads to each, a context takes so many multiplications beside q and output:

        plain     2 H h T (d + g k)
        absorbed  2 H g k d (T + h)

    The absorbed way runs where its count is at most three quarters of the plain one's: few latents, many tokens
    (seconds of both: `d2l study absorption`). Where weights are packed (see `onednn`), many latents go the plain way
    one head after another.

    absorbs: True or False chooses the way (None: by the counts).
    gain [d]: of a norm, multiplies the context; as K (gain x) = (K gain) x, no token is touched.
    """

    absorbs: bool | None = None

    def __init__(self, config: HypernetworkConfig):
        super().__init__()
        d, self.n_kv_heads, self.head_dim = config.latent_size, config.n_kv_heads, config.head_dim
        self.group = config.n_heads // config.n_kv_heads
        self.q_proj = nn.Linear(d, config.n_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(d, config.n_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(d, config.n_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_heads * config.head_dim, d, bias=False)

    def forward(
        self, latents: Tensor, context: Tensor, mask: Tensor | None = None, gain: Tensor | None = None
    ) -> Tensor:
        n, k = len(context), latents.shape[1]
        is_absorbed = self.is_absorbed(k, context.shape[1]) and self._has_plain_maps()
        if not is_absorbed and k * self.group >= _MANY_ROWS:
            maps = self._packed_by_head(gain)
            if maps is not None:
                return self._read_by_head(latents, context, mask, maps)
        queries = linear(self.q_proj, latents).view(-1, k, self.n_kv_heads, self.group, self.head_dim)
        queries = queries.permute(0, 2, 3, 1, 4).reshape(-1, self.n_kv_heads, self.group * k, self.head_dim)
        visible = None if mask is None else mask[:, None, None, :]
        read = self._read_absorbed if is_absorbed else self._read_plain
        mixed = read(queries, context, visible, gain)  # [n, H, g k, h]
        mixed = mixed.reshape(n, self.n_kv_heads, self.group, k, self.head_dim).permute(0, 3, 1, 2, 4)
        return linear(self.o_proj, mixed.reshape(n, k, -1))

    def _has_plain_maps(self) -> bool:
        """Whether keys and values are those of the weights alone: no hook, no other class."""
        return is_plain(self.k_proj) and is_plain(self.v_proj)

    def _maps(self, gain: Tensor | None) -> list[Tensor]:
        """K and V [H h, d] for a context that `gain` multiplies."""
        return [one.weight if gain is None else one.weight * gain for one in (self.k_proj, self.v_proj)]

    def _packed_maps(self, gain: Tensor | None) -> list[Tensor] | None:
        """The same, packed; None where torch multiplies."""
        sources = [self.k_proj.weight, self.v_proj.weight, *([] if gain is None else [gain])]
        return None if in_use() is None else in_use().of((id(self), "K, V"), sources, lambda: self._maps(gain))

    def _packed_by_head(self, gain: Tensor | None) -> list[Tensor] | None:
        """Four maps of each key-value head in turn, packed: Q [g h, d] with the scores' scale, K and V [h, d], and the
        output's [d, g h]; None where torch multiplies, or a linear is not plain."""
        linears = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        if in_use() is None or not all(map(is_plain, linears)):
            return None

        def make() -> list[Tensor]:
            rows = (self.q_proj.weight * self.head_dim**-0.5, *self._maps(gain))
            maps = [one.chunk(self.n_kv_heads) for one in rows] + [self.o_proj.weight.chunk(self.n_kv_heads, 1)]
            return [one for head in zip(*maps, strict=True) for one in head]

        sources = [*(one.weight for one in linears), *([] if gain is None else [gain])]
        return in_use().of((id(self), "by head"), sources, make)

    def _read_by_head(self, latents: Tensor, context: Tensor, mask: Tensor | None, maps: list[Tensor]) -> Tensor:
        """`forward` the plain way, one head after another and one context after another: no product is copied."""
        n, k, read = len(context), latents.shape[1], [None] * len(context)
        for Q, K, V, output in zip(*[iter(maps)] * 4, strict=True):
            queries = product(latents, Q).view(len(latents), -1, self.head_dim).expand(n, -1, -1)
            keys, values = product(context, K), product(context, V).transpose(1, 2)
            for place in range(n):
                scores = product_of_rows(queries[place], keys[place])  # [k g, T]
                if mask is not None:
                    scores.masked_fill_(~mask[place], -torch.inf)
                mixed = product_of_rows(torch.softmax(scores, -1, out=scores), values[place])
                read[place] = product(mixed.view(k, -1), output, plus=read[place])
        return torch.stack(read)

    def is_absorbed(self, k: int, n_tokens: int) -> bool:
        """Whether k latents read a context of `n_tokens` the absorbed way."""
        if self.absorbs is not None:
            return self.absorbs
        d, h, rows = self.q_proj.in_features, self.head_dim, self.group * k
        plain, absorbed = h * n_tokens * (d + rows), rows * d * (n_tokens + h)  # 2 H times as many
        return 4 * absorbed <= 3 * plain

    def _read_plain(self, queries: Tensor, context: Tensor, visible: Tensor | None, gain: Tensor | None) -> Tensor:
        """Values [n, H, g k, h] that queries [n or 1, H, g k, h] read."""
        n = len(context)
        if self._has_plain_maps():
            maps = self._packed_maps(gain)
            both = [product(context, one) for one in (self._maps(gain) if maps is None else maps)]
        else:
            tokens = context if gain is None else context * gain
            both = [self.k_proj(tokens), self.v_proj(tokens)]
        keys, values = (one.view(n, -1, self.n_kv_heads, self.head_dim).transpose(1, 2) for one in both)
        return F.scaled_dot_product_attention(queries.expand(n, -1, -1, -1), keys, values, attn_mask=visible)

    def _read_absorbed(self, queries: Tensor, context: Tensor, visible: Tensor | None, gain: Tensor | None) -> Tensor:
        """The same values without keys and values of the tokens: all heads are rows of one head of size d."""
        n, by_head = len(context), (self.n_kv_heads, self.head_dim, -1)
        K, V = self._maps(gain)
        queries = torch.einsum("nhqk,hkd->nhqd", queries, K.view(by_head))
        queries = queries.flatten(1, 2).unsqueeze(1).expand(n, -1, -1, -1)  # [n, 1, H g k, d]
        tokens, scale = context.unsqueeze(1), self.head_dim**-0.5
        read = F.scaled_dot_product_attention(queries, tokens, tokens, attn_mask=visible, scale=scale)
        read = read.reshape(n, self.n_kv_heads, -1, read.shape[-1])
        return torch.einsum("nhqd,hkd->nhqk", read, V.view(by_head))


class _PerceiverLayer(nn.Module):
    """h = lat + RMS(attn(RMS(lat), context)); out = h + RMS(SwiGLU(RMS(h))).

    With `cross` the context is RMS(context), otherwise the normed latents themselves (self-attention). `forward` takes
    the context without its norm's weight: what is left is the same for all layers.
    """

    def __init__(self, config: HypernetworkConfig, cross: bool):
        super().__init__()
        d = config.latent_size
        self.input_latents_layernorm = _RMSNorm(d)
        self.input_context_layernorm = _RMSNorm(d) if cross else None
        self.self_attn = Attention(config)
        self.post_attention_layernorm = _RMSNorm(d)
        self.pre_ff_layernorm = _RMSNorm(d)
        self.post_ff_layernorm = _RMSNorm(d)
        self.mlp = _SwiGLU(d, 4 * d, d)

    def forward(self, latents: Tensor, unit_context: Tensor, mask: Tensor | None) -> Tensor:
        queries, norm = self.input_latents_layernorm(latents), self.input_context_layernorm
        if norm is None:
            attended = self.self_attn(queries, queries)
        else:
            attended = self.self_attn(queries, unit_context, mask, norm.weight)
        hidden = latents + self.post_attention_layernorm(attended)
        return hidden + self.post_ff_layernorm(self.mlp(self.pre_ff_layernorm(hidden)))


class _Resampler(nn.Module):
    """Learned queries [n_queries, d] that read a context [n, T, d] block by block -> [n, n_queries, d].

    A block is one cross-attention layer followed by `n_self` self-attention layers. With `shared`, self-attention
    layers of all blocks are block 0's, cross-attention of blocks >= 2 is block 1's; block 0 keeps its own.
    """

    def __init__(self, config: HypernetworkConfig, n_queries: int, n_blocks: int, n_self: int, shared: bool):
        super().__init__()
        self.latents_q = nn.Parameter(torch.randn(n_queries, config.latent_size))
        layers = []
        for block in range(n_blocks):
            for offset in range(1 + n_self):
                first_use = block == 0 or (offset == 0 and block == 1)
                if first_use or not shared:
                    layers.append(_PerceiverLayer(config, cross=offset == 0))
                else:
                    source_block = 1 if offset == 0 else 0
                    layers.append(layers[source_block * (1 + n_self) + offset])
        self.layers = nn.ModuleList(layers)
        self.layernorm = _RMSNorm(config.latent_size)

    def forward(self, context: Tensor, mask: Tensor | None, chosen: slice = slice(None)) -> Tensor:
        """chosen: these queries alone; the numbers are the same if there is no self-attention."""
        latents = self.latents_q[chosen].unsqueeze(0)  # shared by all contexts until the first attention
        unit_context = _unit_rms(context)
        for layer in self.layers:
            latents = layer(latents, unit_context, mask)
        return self.layernorm(latents)


class _Perceiver(nn.Module):
    """Features [n, T, F] -> one embedding per output query [n, n_outputs, d]."""

    def __init__(self, config: HypernetworkConfig):
        super().__init__()
        rows = len(config.modules) * config.rank * (1 if config.layer_to_layer else config.n_layers)
        self.modality_projection = _SwiGLU(config.feature_size, 4 * config.feature_size, config.latent_size)
        self.encoder = _Resampler(
            config,
            config.n_latent_queries,
            config.n_blocks,
            config.n_self_attention_per_block,
            config.shared_weights,
        )
        self.decoder = _Resampler(config, rows, n_blocks=1, n_self=0, shared=False)

    def forward(self, features: Tensor, mask: Tensor | None, taps: dict | None, outputs: slice = slice(None)) -> Tensor:
        """outputs: these output queries alone."""
        projected = self.modality_projection(features)
        encoded = self.encoder(projected, mask)
        decoded = self.decoder(encoded, None, outputs)
        if taps is not None:
            taps.update(projected=projected, encoder_out=encoded, decoder_out=decoded)
        return decoded


class _Aggregator(nn.Module):
    """Holds the Perceiver under its published name and orders its rows as [n, L, M, r, d]."""

    def __init__(self, config: HypernetworkConfig):
        super().__init__()
        self.config = config
        self.perceiver = _Perceiver(config)

    def forward(
        self, features: Tensor, mask: Tensor | None, taps: dict | None = None, layer: int | None = None
    ) -> Tensor:
        """layer: that base layer alone, [n, 1, M, r, d]."""
        n, config = len(features), self.config
        row_shape = (len(config.modules), config.rank, config.latent_size)
        if layer is not None:
            rows = len(config.modules) * config.rank
            if config.layer_to_layer:
                embedding = self.perceiver(features[:, layer], mask, taps)
            else:
                embedding = self.perceiver(features, mask, taps, slice(layer * rows, (layer + 1) * rows))
            return embedding.view(n, 1, *row_shape)
        if not config.layer_to_layer:
            return self.perceiver(features, mask, taps).view(n, config.n_layers, *row_shape)
        by_layer = features.transpose(0, 1).flatten(0, 1)  # [L*n, T, F]: layer-major, one sequence per layer and chunk
        mask = None if mask is None else mask.repeat(config.n_layers, 1)
        return self.perceiver(by_layer, mask, taps).view(config.n_layers, n, *row_shape).transpose(0, 1)


class PerLayerLinear(nn.Module):
    """y[n, l] = x[n, l] W[l] + b[l]: one linear map per base layer, on [n, L, M, r, d_in]."""

    def __init__(self, n_layers: int, d_in: int, d_out: int):
        super().__init__()
        weight_bound, bias_bound = math.sqrt(3 / d_in), math.sqrt(1 / d_in)
        self.weight = nn.Parameter(torch.empty(n_layers, d_in, d_out).uniform_(-weight_bound, weight_bound))
        self.bias = nn.Parameter(torch.empty(1, n_layers, 1, 1, d_out).uniform_(-bias_bound, bias_bound))

    def forward(self, x: Tensor, layer: int | None = None) -> Tensor:
        """layer: x holds that base layer alone."""
        chosen = slice(None) if layer is None else slice(layer, layer + 1)
        return torch.einsum("nlmrd,ldh->nlmrh", x, self.weight[chosen]) + self.bias[:, chosen]


class _PerLayerResidual(nn.Module):
    """x + LayerNorm(W2 silu(W1 LayerNorm(x))) with W1, W2 of its own for each base layer."""

    def __init__(self, config: HypernetworkConfig):
        super().__init__()
        d, n_layers = config.latent_size, config.n_layers
        self.layers = nn.Sequential(
            nn.LayerNorm(d),
            PerLayerLinear(n_layers, d, 4 * d),
            nn.SiLU(),
            PerLayerLinear(n_layers, 4 * d, d),
            nn.LayerNorm(d),
        )

    def forward(self, x: Tensor, layer: int | None = None) -> Tensor:
        before, widen, act, narrow, after = self.layers
        return x + after(narrow(act(widen(before(x), layer)), layer))


class _SharedResidual(nn.Module):
    """x + LayerNorm(W2 silu(W1 LayerNorm(x))) with W1, W2 shared by all base layers."""

    def __init__(self, config: HypernetworkConfig):
        super().__init__()
        d = config.latent_size
        self.mlp = nn.Sequential(
            nn.LayerNorm(d),
            nn.Dropout(config.dropout),
            nn.Linear(d, 4 * d),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Linear(4 * d, d),
            nn.LayerNorm(d),
        )

    def forward(self, x: Tensor, layer: int | None = None) -> Tensor:
        return x + self.mlp(x)


class _Head(nn.Module):
    """flat = x W per layer and module: [n, L, M, r, d] -> [n, L, M, r, D], no bias.

    The weight is [L, d, D] for a single module and [L, M, d, D] for several, as in the published checkpoints.
    """

    def __init__(self, config: HypernetworkConfig):
        super().__init__()
        d, width = config.latent_size, max(config.d_in[m] + config.d_out[m] for m in config.modules)
        n_modules = len(config.modules)
        shape = (config.n_layers, d, width) if n_modules == 1 else (config.n_layers, n_modules, d, width)
        self.weight = nn.Parameter(torch.randn(shape) * 0.5 / math.sqrt(d + width * config.rank))

    def forward(self, x: Tensor, layer: int | None = None) -> Tensor:
        """layer: x holds that base layer alone."""
        weight = self.weight if self.weight.dim() == 4 else self.weight.unsqueeze(1)
        weight = weight if layer is None else weight[layer : layer + 1]
        return torch.einsum("nlmrd,lmdh->nlmrh", x, weight)


class BlockWriter(nn.Module):
    """What every hypernetwork says of the blocks that it writes, one for each layer and module; it has a `config`."""

    config: HypernetworkConfig

    def described(self) -> str:
        """What it writes, in a few words."""
        return f"rank {self.config.rank} on {', '.join(self.config.modules)}"

    def rows_of(self, n_tokens: int) -> slice:
        """The rows that are a chunk's own, of `n_tokens` tokens: all."""
        return slice(None)

    def row_sizes(self, module: str) -> tuple[int, int]:
        """Lengths of the rows of A and of B that are written for a module."""
        return self.config.d_in[module], self.config.d_out[module]

    def place_of(self, path: str) -> str:
        """The path of a module in the base model, with {layer} for every layer that the blocks are for."""
        return path


class Hypernetwork(BlockWriter):
    """Reads the features of n chunks and writes one LoRA block per chunk, layer and module.

    An untrained one writes B = 0, so it changes nothing.
    """

    def __init__(self, config: HypernetworkConfig):
        super().__init__()
        self.config = config
        self.aggregator = _Aggregator(config)
        residual = _PerLayerResidual if config.per_layer_processing else _SharedResidual
        self.layers = nn.Sequential(*[residual(config) for _ in range(config.n_pre_head_layers)])
        n_layers, r = config.n_layers, config.rank
        if config.use_bias:
            self.bias_A = nn.ParameterDict(
                {m: torch.randn(n_layers, r, size) * 0.2 / math.sqrt(size * r) for m, size in config.d_in.items()}
            )
            self.bias_B = nn.ParameterDict({m: torch.zeros(n_layers, r, size) for m, size in config.d_out.items()})
        self.scaler_A = nn.ParameterDict({m: torch.ones(1, n_layers, r, 1) for m in config.modules})
        self.scaler_B = nn.ParameterDict({m: torch.zeros(1, n_layers, r, 1) for m in config.modules})
        self.head = _Head(config)
        if config.null_rows:
            rows = config.null_rows
            self.null_keys = nn.ParameterDict(
                {m: torch.randn(n_layers, rows, size) * 1e-3 for m, size in config.d_in.items()}
            )
            self.null_floor = nn.ParameterDict({m: torch.zeros(n_layers) for m in config.modules})

    def forward(
        self,
        features: Tensor,
        attention_mask: Tensor,
        taps: dict | None = None,
        iterative: bool = False,
        layer: int | None = None,
    ) -> Loras:
        """Blocks {module: (A [n, L, r, d_in], B [n, L, r, d_out])} of the n chunks in `features`.

        features: [n, T, F], or [n, L, T, F] for per_layer_activations.
        attention_mask: [n, T], 0 at padding, on any side.
        taps: a dict that receives the intermediate activations.
        iterative: write one base layer after another: less memory, the same numbers, no taps.
        layer: only the blocks of that base layer, with L = 1 above.

        Half-precision features run the Perceiver under bfloat16 autocast, and everything after it in the parameters'
        own precision, as published. ValueError for shapes that do not fit the config.
        """
        self._check(features)
        if in_use() is not None:
            features, attention_mask = _in_steps(features, attention_mask)
        features, mask = zero_padding(features, attention_mask)
        parameter_dtype = self.head.weight.dtype
        half = features.dtype in (torch.bfloat16, torch.float16)
        features = features if half else features.to(parameter_dtype)
        if iterative and taps is not None:
            raise ValueError("taps hold all base layers at once: leave them out of an iterative call")
        if layer is not None:
            if iterative or not 0 <= layer < self.config.n_layers:
                raise ValueError(f"layer {layer!r} must be from 0 to {self.config.n_layers - 1}, and not iterative")
            return self._write(self._embed(features, mask, half, taps, layer), taps, layer)
        by_layer = iterative and self.config.layer_to_layer
        embedding = None if by_layer else self._embed(features, mask, half, taps)  # [n, L, M, r, d]
        if not iterative:
            return self._write(embedding, taps)
        parts = [
            self._write(
                self._embed(features, mask, half, None, layer) if by_layer else embedding[:, layer, None], None, layer
            )
            for layer in range(self.config.n_layers)
        ]
        return {
            m: tuple(torch.cat(factors, dim=1) for factors in zip(*(part[m] for part in parts), strict=True))
            for m in self.config.modules
        }

    def _embed(self, features, mask, half: bool, taps: dict | None, layer: int | None = None) -> Tensor:
        with torch.autocast(features.device.type, dtype=torch.bfloat16) if half else nullcontext():
            embedding = self.aggregator(features, mask, taps, layer)
        return embedding.to(self.head.weight.dtype)

    def _write(self, embedding: Tensor, taps: dict | None, layer: int | None = None) -> Loras:
        """The blocks of embeddings [n, L, M, r, d], or of one base layer [n, 1, M, r, d]."""
        processed = embedding
        for residual in self.layers:
            processed = residual(processed, layer)
        unit = F.normalize(processed, dim=-1, eps=1e-12)  # the eps only guards against an all-zero embedding
        flat = self.head(unit, layer)  # [n, L, M, r, D]
        if taps is not None:
            taps.update(lora_emb_in=embedding, lora_emb=processed, flat_loras=flat)
        return {m: self._split(flat[:, :, index], m, layer) for index, m in enumerate(self.config.modules)}

    def bias(self) -> Loras | None:
        """The learned block of no document: {module: (A [L, r, d_in], B [L, r, d_out])}, or None."""
        if not self.config.use_bias:
            return None
        return {m: (self.bias_A[m], self.bias_B[m]) for m in self.config.modules}

    def null(self) -> Loras | None:
        """What sparse reading asks a block to exceed: {module: (keys [L, null_rows, d_in], floor [L])}, or None."""
        if not self.config.null_rows:
            return None
        return {m: (self.null_keys[m], self.null_floor[m]) for m in self.config.modules}

    def _split(self, flat: Tensor, module: str, layer: int | None) -> tuple[Tensor, Tensor]:
        d_in, d_out = self.config.d_in[module], self.config.d_out[module]
        chosen = slice(None) if layer is None else slice(layer, layer + 1)
        A = flat[..., :d_in] * self.scaler_A[module][:, chosen]
        B = flat[..., d_in : d_in + d_out] * self.scaler_B[module][:, chosen]
        return A, B

    def _check(self, features: Tensor) -> None:
        config = self.config
        expected = "[chunks, layers, tokens, features]" if config.layer_to_layer else "[chunks, tokens, features]"
        if features.dim() != (4 if config.layer_to_layer else 3):
            raise ValueError(f"{config.encoder_type} features must be {expected}, got {tuple(features.shape)}")
        if features.shape[-1] != config.feature_size:
            raise ValueError(
                f"features have size {features.shape[-1]}, this hypernetwork reads {config.feature_size}: "
                "was it made for another context encoder?"
            )
        if config.layer_to_layer and features.shape[1] != config.n_layers:
            raise ValueError(f"features of {features.shape[1]} layers, this hypernetwork writes {config.n_layers}")


def _in_steps(features: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Features [n, ..., T, F] and their mask with more padding, up to a number of tokens that oneDNN meets often."""
    more = onednn.round_up(features.shape[-2], onednn.LENGTH_STEP) - features.shape[-2]
    return F.pad(features, (0, 0, 0, more)), F.pad(attention_mask, (0, more))


def zero_padding(features: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Features [n, ..., T, F] with zeros at padding, and a bool mask [n, T] (None without padding).

    Nothing at padding, not even NaN, reaches a result. ValueError for a chunk without a token.
    """
    expected = (len(features), features.shape[-2])
    if tuple(attention_mask.shape) != expected:
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, features need {expected}")
    mask = attention_mask.bool()
    if not mask.any(dim=1).all():
        raise ValueError(f"chunk {int((~mask.any(dim=1)).nonzero()[0])} has no token: drop it before encoding")
    if mask.all():
        return features, None
    hidden = ~mask.view(len(mask), *[1] * (features.dim() - 3), mask.shape[1], 1)
    return features.masked_fill(hidden, 0.0), mask


def combine(loras: Loras, bias: Loras | None, n_chunks: Tensor, weights: Tensor | None = None) -> Loras:
    """One adapter per context: its chunks' blocks and the bias block, concatenated along the rank axis.

    loras: {module: (A [chunks, L, r, d_in], B [chunks, L, r, d_out])}.
    n_chunks: [contexts], the number of chunks of each context, in order.
    weights: [chunks], the weight of each block; it multiplies A alone.

    Returns {module: (A [contexts, L, (max n + 1) * r, d_in], B alike)}: rows of chunk 1, ..., chunk n, bias, then zeros
    up to the longest context.
    """
    first = next(iter(loras.values()))[0]
    n_chunks = torch.as_tensor(n_chunks, device=first.device).long()
    total, contexts = len(first), len(n_chunks)
    if int(n_chunks.sum()) != total or (n_chunks < 0).any():
        raise ValueError(f"n_chunks {n_chunks.tolist()} adds up to {int(n_chunks.sum())}, there are {total} blocks")
    if weights is not None and tuple(weights.shape) != (total,):
        raise ValueError(f"weights must have one value per chunk: [{total}], got {list(weights.shape)}")
    context = torch.arange(contexts, device=first.device).repeat_interleave(n_chunks)
    slot = torch.arange(total, device=first.device) - (n_chunks.cumsum(0) - n_chunks)[context]
    n_slots = int(n_chunks.max()) + 1

    def place(chunk_rows: Tensor, bias_rows: Tensor | None) -> Tensor:
        _, n_layers, r, size = chunk_rows.shape
        slots = chunk_rows.new_zeros(contexts, n_slots, n_layers, r, size)
        slots = slots.index_put((context, slot), chunk_rows)
        if bias_rows is not None:
            every = torch.arange(contexts, device=first.device)
            bias_rows = bias_rows.to(chunk_rows.dtype)
            slots = slots.index_put((every, n_chunks), bias_rows.expand(contexts, -1, -1, -1))
        return slots.transpose(1, 2).reshape(contexts, n_layers, n_slots * r, size)

    combined = {}
    for module, (A, B) in loras.items():
        bias_A, bias_B = (None, None) if bias is None else bias[module]
        A = A if weights is None else A * weights.to(A.dtype)[:, None, None, None]
        combined[module] = place(A, bias_A), place(B, bias_B)
    return combined


def names_without_decay(hypernetwork: nn.Module) -> list[str]:
    """Names of parameters without weight decay, sorted: norms, biases, scalers, learned queries, null keys."""
    spared = ("scaler", "bias", "layernorm", "latents_q", "null_")
    names = {name for name, _ in hypernetwork.named_parameters() if any(part in name for part in spared)}
    for path, module in hypernetwork.named_modules():
        if isinstance(module, nn.LayerNorm):
            names.update(f"{path}.{name}" for name, _ in module.named_parameters())
    return sorted(names)
