"""The published computation written out plainly: what ours has to equal, and what `bench` times it against.

Same weights, same numbers (arXiv 2602.15902), nothing saved or fused: every chunk goes through at once, each with
latents of its own; keys and values of every token are formed and repeated for all query heads; questions carry their
own copies of A and B; logits are computed at every position. Chunks have equal lengths, so there is no padding.

    n chunks, T tokens, F feature size, d latent size, L layers, M modules, r rank
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2l_lib.base_model import decoder_body, target_linears
from d2l_lib.hypernetwork import Loras
from d2l_lib.model import DocToLoRA
from d2l_lib.training.batches import IGNORED, Batch


class Plain:
    """The published computation with the weights of `model`, whose hypernetwork is of the published form."""

    def __init__(self, model: DocToLoRA):
        self.base_model, self.hypernetwork, self.config = model.base_model, model.hypernetwork, model.config
        self.encoder = copy.deepcopy(decoder_body(model.base_model))  # a second copy, with its first layers only
        self.encoder.layers = self.encoder.layers[: model.encoder.n_layers_run]

    def internalize(self, ids: Tensor) -> Loras:
        """The adapter {module: (A [1, L, R, d_in], B [1, L, R, d_out])} of one document; ids: its chunks [n, T]."""
        with torch.no_grad():
            return self.combine(self.write(self.read(ids)), contexts=1)

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """Features [n, T, F], or [n, L, T, F] of all layers."""
        result = self.encoder(ids, use_cache=False, output_hidden_states=self.config.layer_to_layer)
        return torch.stack(result.hidden_states, 1) if self.config.layer_to_layer else result.last_hidden_state

    def write(self, features: Tensor) -> Loras:
        """Blocks {module: (A [n, L, r, d_in], B [n, L, r, d_out])} of features."""
        config, network = self.config, self.hypernetwork
        perceiver = network.aggregator.perceiver
        n, rows = len(features), (len(config.modules), config.rank, config.latent_size)
        if config.layer_to_layer:  # one sequence for each layer and chunk
            features = features.transpose(0, 1).flatten(0, 1)
        tokens = _swiglu(perceiver.modality_projection, features)
        latents = _resample(perceiver.decoder, _resample(perceiver.encoder, tokens))
        if config.layer_to_layer:
            embedding = latents.view(config.n_layers, n, *rows).transpose(0, 1)
        else:
            embedding = latents.view(n, config.n_layers, *rows)
        for part in network.layers:
            embedding = embedding + (_own_mlp if config.per_layer_processing else _shared_mlp)(part, embedding)
        unit = embedding / embedding.norm(dim=-1, keepdim=True)
        head = network.head.weight.view(config.n_layers, len(config.modules), config.latent_size, -1)
        flat = torch.einsum("nlmrd,lmdh->nlmrh", unit, head)
        loras = {}
        for index, module in enumerate(config.modules):
            d_in, d_out = config.d_in[module], config.d_out[module]
            A = flat[:, :, index, :, :d_in] * network.scaler_A[module]
            B = flat[:, :, index, :, d_in : d_in + d_out] * network.scaler_B[module]
            loras[module] = A, B
        return loras

    def combine(self, blocks: Loras, contexts: int) -> Loras:
        """Adapters of contexts with equally many chunks: their blocks and the bias block, one below the other."""
        combined = {}
        for module, factors in blocks.items():
            biases = self.hypernetwork.bias_A[module], self.hypernetwork.bias_B[module]
            combined[module] = tuple(
                torch.cat([*one.unflatten(0, (contexts, -1)).unbind(1), bias.expand(contexts, -1, -1, -1)], dim=2)
                for one, bias in zip(factors, biases, strict=True)
            )
        return combined

    @contextmanager
    def applied(self, loras: Loras, context: Tensor) -> Iterator[None]:
        """Inside the `with` block target linears return W x + s B^T (A x); context: of each question, [questions]."""
        with ExitStack() as stack:
            for module, linears in target_linears(self.base_model, self.config.modules).items():
                for layer, linear in enumerate(linears):
                    A, B = (factor[:, layer][context] for factor in loras[module])
                    hook = partial(_add, A=A, B=B, scale=self.config.scale)
                    stack.callback(linear.register_forward_hook(hook).remove)
            yield

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy: the mean over contexts of the mean over questions of the mean over answer tokens."""
        contexts, questions = len(batch.n_questions), len(batch.input_ids)
        (ids,) = batch.chunks.ids
        loras = self.combine(self.write(self.read(ids[batch.chunks.order])), contexts)
        with self.applied(loras, torch.arange(contexts).repeat_interleave(batch.n_questions)):
            logits = self.base_model(batch.input_ids, use_cache=False).logits
        labels = batch.labels[:, 1:]
        each = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        by_question = each.sum(1) / (labels != IGNORED).sum(1)
        return by_question.view(contexts, questions // contexts).mean(1).mean()

    @torch.no_grad()
    def answer(self, ids: Tensor, loras: Loras, new_tokens: int) -> Tensor:
        """Questions [questions, length] with their greedy answers of exactly `new_tokens` tokens."""
        answer, cache = [ids], None
        with self.applied(loras, torch.zeros(len(ids), dtype=torch.long)):
            for _ in range(new_tokens):
                result = self.base_model(answer[-1], past_key_values=cache, use_cache=True)
                answer.append(result.logits[:, -1:].argmax(-1))
                cache = result.past_key_values
        return torch.cat(answer, 1)


def _add(linear: nn.Linear, inputs: tuple[Tensor], output: Tensor, *, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W x + s B^T (A x): A [questions, R, d_in], B [questions, R, d_out]."""
    return output + scale * (inputs[0] @ A.transpose(1, 2) @ B)


def _rms(norm: nn.Module, x: Tensor) -> Tensor:
    return norm.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def _swiglu(part: nn.Module, x: Tensor) -> Tensor:
    return part.down_proj(F.silu(part.gate_proj(x)) * part.up_proj(x))


def _resample(part: nn.Module, context: Tensor) -> Tensor:
    """The learned queries, [n, k, d], after they have read `context` [n, T, d] layer by layer."""
    latents = part.latents_q.expand(len(context), -1, -1)
    for layer in part.layers:
        queries, norm = _rms(layer.input_latents_layernorm, latents), layer.input_context_layernorm
        read = _attend(layer.self_attn, queries, queries if norm is None else _rms(norm, context))
        latents = latents + _rms(layer.post_attention_layernorm, read)
        wide = _swiglu(layer.mlp, _rms(layer.pre_ff_layernorm, latents))
        latents = latents + _rms(layer.post_ff_layernorm, wide)
    return _rms(part.layernorm, latents)


def _attend(part: nn.Module, latents: Tensor, context: Tensor) -> Tensor:
    """Grouped-query attention: key-value head j serves the query heads j g .. j g + g - 1."""
    queries, keys, values = (
        linear(x).unflatten(-1, (-1, part.head_dim)).transpose(1, 2)
        for linear, x in ((part.q_proj, latents), (part.k_proj, context), (part.v_proj, context))
    )
    keys, values = (one.repeat_interleave(part.group, dim=1) for one in (keys, values))
    read = F.scaled_dot_product_attention(queries, keys, values)
    return part.o_proj(read.transpose(1, 2).flatten(2))


def _own_mlp(part: nn.Module, x: Tensor) -> Tensor:
    """LayerNorm(W2 silu(W1 LayerNorm(x))), with W1 and W2 of each base layer."""
    before, widen, _, narrow, after = part.layers
    hidden = F.silu(torch.einsum("nlmrd,ldh->nlmrh", before(x), widen.weight) + widen.bias)
    return after(torch.einsum("nlmrh,lhd->nlmrd", hidden, narrow.weight) + narrow.bias)


def _shared_mlp(part: nn.Module, x: Tensor) -> Tensor:
    """The same with W1 and W2 for all base layers."""
    before, _, widen, _, _, narrow, after = part.mlp
    return after(narrow(F.silu(widen(before(x)))))
