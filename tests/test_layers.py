"""Layers written out: the numbers of transformers' own, for every encoder type, and only where nobody changed them."""

import pytest
import torch
from tiny_models import build_base_model, build_model, build_tokenizer
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import eager_attention_forward

from d2l_lib import layers, onednn
from d2l_lib.encoder import ContextEncoder
from d2l_lib.onednn import Packs

pytestmark = pytest.mark.skipif(not onednn.is_available(), reason="this torch has no oneDNN")
TYPES = {
    "early_exit": {"encoder_layer": 2},
    "per_layer_activations": {},
    "hidden_states": {"encoder_layers": (0, 2, 4)},
    "embed_only": {},
}
TEXTS = ["Ada Row is the mayor of Velm. " * 12, "It was a long winter in Tarn, and nobody saw the sun. " * 5]


@pytest.fixture
def written(monkeypatch) -> list[int]:
    """The tokens of each layer that was written out."""
    seen, plain = [], layers.written_out

    def written_out(layer, x, *arguments, **options):
        seen.append(len(x))
        return plain(layer, x, *arguments, **options)

    monkeypatch.setattr(layers, "written_out", written_out)
    return seen


def build_encoder(family: str = "llama", encoder_type: str = "early_exit", **options) -> ContextEncoder:
    return ContextEncoder(build_base_model(build_tokenizer(), family=family), encoder_type, **options)


def both(encoder: ContextEncoder, ids: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Features by transformers, and with packs in use."""
    with torch.no_grad():
        plain = encoder.encode(ids, mask)
        with Packs().used():
            return plain, encoder.encode(ids, mask)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2", "gemma2"])
@pytest.mark.parametrize("encoder_type", TYPES)
def test_features_are_those_of_transformers(family, encoder_type, written):
    encoder = build_encoder(family, encoder_type, **TYPES[encoder_type])
    for n, length in ((1, 240), (2, 150), (3, 1)):
        plain, ours = both(encoder, torch.randint(5, 60, (n, length)))
        assert plain.shape == ours.shape
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=5e-6 * max(1.0, float(plain.abs().max())))
    ran = family in ("llama", "qwen3") and encoder_type != "embed_only"
    assert bool(written) == ran


def test_padded_chunks_and_gradients_go_the_other_way(written):
    encoder, ids = build_encoder(), torch.randint(5, 60, (2, 40))
    mask = torch.ones_like(ids)
    both(encoder, ids, mask)
    assert written
    written.clear()
    mask[0, :3] = 0
    assert torch.equal(*both(encoder, ids, mask)) and not written


def test_hooks_are_heard(written):
    encoder, ids, seen = build_encoder(), torch.randint(5, 60, (1, 40)), []
    first = encoder.model.model.layers[0]
    for module in (first, first.mlp, first.self_attn.q_proj, encoder.model.model.embed_tokens):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *_: seen.append(1))
            assert torch.equal(*both(encoder, ids)) and len(seen) == 2 and not written
            handle.remove()
            seen.clear()
    handle = register_module_forward_hook(lambda *_: None)
    assert torch.equal(*both(encoder, ids)) and not written
    handle.remove()
    encoder.model.model.layers[-1].register_forward_hook(lambda *_: seen.append(1))
    both(encoder, ids)
    assert written and not seen, "a layer that is not run is free"


class Doubled(nn.Module):
    """Wraps a module, under the names of its parts."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.__dict__ |= {name: one for name, one in vars(inner).items() if not name.startswith("_")}
        self.inner = inner
        for name, part in inner.named_children():
            setattr(self, name, part)

    def forward(self, *inputs, **options):
        result = self.inner(*inputs, **options)
        return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result


def _double(mlp, x):
    return 2 * mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))


def _eagerly(*arguments, **options):
    mixed, weights = eager_attention_forward(*arguments, **options)
    return 2 * mixed, weights


def _parametrize(model, layer, _):
    parametrize.register_parametrization(layer.mlp.up_proj, "weight", nn.Tanh())


def _attend_otherwise(model, *_):
    AttentionInterface.register("mine", _eagerly)
    model.set_attn_implementation("mine")


CHANGES = {
    "parametrized": _parametrize,
    "implementation": _attend_otherwise,
    "forward": lambda model, layer, patch: patch.setattr(layer.mlp, "forward", lambda x: 0 * x),
    "class": lambda model, layer, patch: patch.setattr(type(layer.mlp), "forward", _double),
    "layer": lambda model, layer, patch: patch.setitem(model.model.layers._modules, "0", Doubled(layer)),
    "attention": lambda model, layer, patch: patch.setitem(layer._modules, "self_attn", Doubled(layer.self_attn)),
    "mlp": lambda model, layer, patch: patch.setitem(layer._modules, "mlp", Doubled(layer.mlp)),
    "linear": lambda model, layer, patch: patch.setitem(layer.mlp._modules, "up_proj", Doubled(layer.mlp.up_proj)),
    "scaling": lambda model, layer, patch: patch.setattr(layer.self_attn, "scaling", 1.0),
    "activation": lambda model, layer, patch: patch.setitem(layer.mlp._modules, "act_fn", nn.ReLU()),
    "parts left out": lambda model, layer, patch: patch.setitem(layer._modules, "mlp", nn.Identity()),
    "norm": lambda model, layer, patch: patch.setitem(layer._modules, "input_layernorm", nn.Identity()),
    "two maps": lambda model, layer, patch: patch.setitem(
        layer.mlp._modules, "gate_proj", nn.Sequential(layer.mlp.gate_proj, nn.ReLU())
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_models_go_the_other_way(written, monkeypatch, change):
    encoder, ids = build_encoder(encoder_layer=2), torch.randint(5, 60, (1, 40))
    before = both(encoder, ids)[0]
    assert written and layers.can_be_written_out(encoder.model, encoder.model.model.layers)
    written.clear()
    CHANGES[change](encoder.model, encoder.model.model.layers[0], monkeypatch)
    plain, ours = both(encoder, ids)
    assert torch.equal(plain, ours) and not written and not torch.allclose(plain, before, atol=1e-3)
    assert not layers.can_be_written_out(encoder.model, encoder.model.model.layers), "nor for guessed answers"


def test_large_models_keep_their_memory(written, monkeypatch):
    model = build_model()
    model.batch_tokens = 1
    monkeypatch.setattr(onednn, "_MOST", 1000)
    model.internalize(TEXTS[0][: model.chunk_tokens])
    assert not written and not model._packs._kept


@pytest.mark.parametrize("change", [None, "parametrized"])
def test_an_applied_adapter_does_not_reach_the_encoder(change):
    model = build_model()
    if change:
        for layer in model.base_model.model.layers:
            parametrize.register_parametrization(layer.mlp.down_proj, "weight", nn.Tanh())
    texts = [text[: model.chunk_tokens] for text in TEXTS]
    model.batch_tokens = 1  # long chunks: no padding
    alone = model.internalize(texts)
    with model.applied(alone):
        inside = model.internalize(texts)
    for one, other in zip(alone.blocks, inside.blocks, strict=True):
        assert all(torch.equal(one.A[m], other.A[m]) and torch.equal(one.B[m], other.B[m]) for m in one.A)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_go_by_head_neither(dtype):
    model = build_model(n_latent_queries=200)
    model.base_model.to(dtype)
    model.hypernetwork.to(dtype if dtype == torch.float64 else torch.float32)
    model.batch_tokens = 1
    assert model.internalize(TEXTS[0][: model.chunk_tokens]).blocks and not model._packs._kept.keys() & {"by head"}


def test_many_latents_are_read_by_head_and_hooks_of_the_hypernetwork_are_heard():
    model = build_model(n_latent_queries=200)
    model.batch_tokens, text, seen = 1, TEXTS[0][: model.chunk_tokens], []
    ours = model.internalize(text).blocks[0].A["down_proj"]
    assert any("by head" in owner for owner in model._packs._kept if isinstance(owner, tuple))
    layer = model.hypernetwork.aggregator.perceiver.encoder.layers[0]
    parts = (layer.self_attn.q_proj, layer.self_attn.o_proj, *layer.mlp.children())
    for part in parts:
        part.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model.internalize(text).blocks[0].A["down_proj"], ours, rtol=1e-4, atol=5e-6)
    assert len(seen) == len(parts)


@pytest.mark.parametrize("queries", [6, 200])
@pytest.mark.parametrize("encoder_type", ["early_exit", "per_layer_activations"])
@torch.no_grad()
def test_packed_weights_write_the_same_blocks(encoder_type, queries):
    model = build_model(encoder_type=encoder_type, n_latent_queries=queries)
    ids, packs = torch.randint(5, 60, (3, 203)), Packs()
    mask = torch.ones_like(ids)
    features = model.encoder.encode(ids, mask)
    padded = mask.clone()
    padded[0, 150:] = padded[1, :7] = 0
    for one in (mask, padded):
        plain = model.hypernetwork(features, attention_mask=one)
        with packs.used():
            ours = model.hypernetwork(features, attention_mask=one)
        for a, b in zip(ours["down_proj"], plain["down_proj"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-6)
    assert any("by head" in owner for owner in packs._kept if isinstance(owner, tuple)) == (queries == 200)


@pytest.mark.parametrize("encoder_type", ["early_exit", "per_layer_activations"])
def test_blocks_follow_every_change_of_the_weights(encoder_type):
    model = build_model(encoder_type=encoder_type)
    model.batch_tokens = 1
    text = TEXTS[0][: model.chunk_tokens]

    def A_of(factor: float, change) -> torch.Tensor:
        before = [one.detach().clone() for one in change()]
        for one in change():
            one.data.mul_(factor)  # torch does not count it
        found = model.internalize(text).blocks[0].A["down_proj"]
        for one, old in zip(change(), before, strict=True):
            one.data.copy_(old)
        return found

    perceiver = model.hypernetwork.aggregator.perceiver
    for change in (perceiver.parameters, model.base_model.model.layers[0].parameters):
        plain = A_of(1.0, lambda change=change: [*change()])
        changed = A_of(1.3, lambda change=change: [*change()])
        assert not torch.allclose(plain, changed, rtol=1e-3)
        assert torch.equal(A_of(1.0, lambda change=change: [*change()]), plain)


@pytest.mark.parametrize("length", [1, 47, 96, 143, 144, 145, 300])
def test_stretches_hide_what_comes_later_and_nothing_else(length):
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for a, b, mask in layers.stretches(length):
        seen = torch.ones(b - a, b).tril(a) if mask is None else (mask == 0).float()
        allowed[a:b, :b] = seen.bool()
    assert torch.equal(allowed, torch.ones(length, length).tril().bool())
