"""The hypernetwork: sizes, layouts, weight sharing, and the algebra of combining blocks."""

import math
from contextlib import nullcontext

import pytest
import torch
from tiny_models import HIDDEN, N_LAYERS, build_base_model, random_hypernetwork, random_loras
from torch.utils.flop_counter import FlopCounterMode

from d2l_lib import hypernetwork, onednn
from d2l_lib.hypernetwork import Attention, Hypernetwork, HypernetworkConfig, combine, names_without_decay
from d2l_lib.onednn import Packs

SEVERAL = ("v_proj", "down_proj", "q_proj", "gate_proj")  # four different pairs of sizes, not in sorted order
VARIANTS = {
    "early exit": {},
    "layer to layer": {"encoder_type": "per_layer_activations"},
    "embeddings": {"encoder_type": "embed_only"},
    "several modules": {"modules": SEVERAL},
    "several modules, layer to layer": {"modules": SEVERAL, "encoder_type": "per_layer_activations"},
    "self-attention": {"n_self_attention_per_block": 2},
    "shared": {"n_blocks": 4, "n_self_attention_per_block": 1, "shared_weights": True},
    "per-layer residuals": {"per_layer_processing": True, "n_pre_head_layers": 3},
    "shared residuals": {"n_pre_head_layers": 3},
    "no residuals": {"n_pre_head_layers": 0},
    "no bias block": {"use_bias": False},
    "one block": {"n_blocks": 1, "shared_weights": True},
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


@pytest.fixture(scope="module")
def model():
    return build_base_model()


def features_for(hypernetwork, lengths, seed=3):
    """Random features per chunk: a list of [T, F] or [L, T, F]."""
    generator = torch.Generator().manual_seed(seed)
    layers = (N_LAYERS,) if hypernetwork.config.layer_to_layer else ()
    return [torch.randn(*layers, length, HIDDEN, generator=generator) for length in lengths]


def padded(chunks, side="right", filler=float("nan")):
    longest = max(chunk.shape[-2] for chunk in chunks)
    mask = torch.zeros(len(chunks), longest, dtype=torch.long)
    batch = torch.full((len(chunks), *chunks[0].shape[:-2], longest, HIDDEN), filler)
    for i, chunk in enumerate(chunks):
        length = chunk.shape[-2]
        place = slice(0, length) if side == "right" else slice(longest - length, longest)
        batch[i, ..., place, :], mask[i, place] = chunk, 1
    return batch, mask


def assert_same_loras(left, right, tolerance=1e-5):
    assert left.keys() == right.keys()
    for module in left:
        for a, b in zip(left[module], right[module], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@each_variant
@torch.no_grad()
def test_padded_and_single_chunks_agree(model, options):
    hypernetwork = random_hypernetwork(model, **options)
    chunks = features_for(hypernetwork, [5, 9, 1, 7])
    single = [hypernetwork(c.unsqueeze(0), attention_mask=torch.ones(1, c.shape[-2])) for c in chunks]
    expected = {m: tuple(torch.cat([s[m][i] for s in single]) for i in (0, 1)) for m in single[0]}
    for module, (A, B) in expected.items():
        config = hypernetwork.config
        assert A.shape == (4, N_LAYERS, config.rank, config.d_in[module])
        assert B.shape == (4, N_LAYERS, config.rank, config.d_out[module])
        assert not torch.allclose(A[0], A[1]) and not torch.allclose(B[0], B[1])
    for side in ("right", "left"):  # padding holds NaN: nothing of it may reach a result
        batch, mask = padded(chunks, side)
        assert_same_loras(hypernetwork(batch, attention_mask=mask), expected)


@each_variant
@torch.no_grad()
def test_iterative_writing_gives_the_same_numbers(model, options):
    hypernetwork = random_hypernetwork(model, **options)
    batch, mask = padded(features_for(hypernetwork, [5, 9, 1]))
    assert_same_loras(
        hypernetwork(batch, attention_mask=mask, iterative=True), hypernetwork(batch, attention_mask=mask), 1e-6
    )
    alone = hypernetwork(batch, attention_mask=mask, layer=1)
    whole = hypernetwork(batch, attention_mask=mask)
    assert_same_loras(alone, {m: (A[:, 1:2], B[:, 1:2]) for m, (A, B) in whole.items()}, 1e-6)
    with pytest.raises(ValueError, match="must be from 0 to"):
        hypernetwork(batch, attention_mask=mask, layer=99)
    with pytest.raises(ValueError, match="leave them out of an iterative call"):
        hypernetwork(batch, attention_mask=mask, iterative=True, taps={})


@each_variant
def test_every_parameter_gets_a_gradient(model, options):
    hypernetwork = random_hypernetwork(model, **options)
    batch, mask = padded(features_for(hypernetwork, [4, 6]), filler=0.0)
    combined = combine(hypernetwork(batch, attention_mask=mask), hypernetwork.bias(), torch.tensor([2]))
    sum((factor**2).sum() for factors in combined.values() for factor in factors).backward()
    without = [name for name, p in hypernetwork.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_shared_weights_are_the_same_objects(model):
    hypernetwork = random_hypernetwork(model, n_blocks=4, n_self_attention_per_block=1, shared_weights=True)
    layers = hypernetwork.aggregator.perceiver.encoder.layers
    assert len(layers) == 8
    assert layers[0] is not layers[2] and layers[2] is layers[4] is layers[6]  # cross-attention
    assert layers[1] is layers[3] is layers[5] is layers[7]  # self-attention
    state = hypernetwork.state_dict()
    prefix = "aggregator.perceiver.encoder.layers."
    assert torch.equal(state[prefix + "2.mlp.up_proj.weight"], state[prefix + "6.mlp.up_proj.weight"])
    names = {name for name, _ in hypernetwork.named_parameters()}
    assert prefix + "2.mlp.up_proj.weight" in names and prefix + "4.mlp.up_proj.weight" not in names
    assert prefix + "1.input_context_layernorm.weight" not in state  # self-attention has a single norm


@each_variant
def test_state_dict_loads_strictly(model, options):
    source, target = random_hypernetwork(model, seed=1, **options), random_hypernetwork(model, seed=2, **options)
    target.load_state_dict(source.state_dict())
    batch, mask = padded(features_for(source, [3, 5]))
    with torch.no_grad():
        assert_same_loras(source(batch, attention_mask=mask), target(batch, attention_mask=mask), tolerance=0)


def test_published_parameter_shapes():
    config = HypernetworkConfig(
        n_layers=3,
        d_in={"down_proj": 40, "q_proj": 24},
        d_out={"down_proj": 24, "q_proj": 32},
        feature_size=24,
        latent_size=16,
        rank=4,
        n_blocks=1,
    )
    state = {name: tuple(value.shape) for name, value in Hypernetwork(config).state_dict().items()}
    assert state["head.weight"] == (3, 2, 16, 64)  # D is that of down_proj, the widest
    assert state["aggregator.perceiver.decoder.latents_q"] == (3 * 2 * 4, 16)
    assert state["aggregator.perceiver.encoder.layers.0.self_attn.q_proj.weight"] == (2048, 16)
    assert state["aggregator.perceiver.encoder.layers.0.self_attn.k_proj.weight"] == (512, 16)
    assert state["layers.0.mlp.2.weight"] == (64, 16) and state["layers.0.mlp.6.bias"] == (16,)
    assert state["bias_B.q_proj"] == (3, 4, 32) and state["scaler_A.down_proj"] == (1, 3, 4, 1)


def test_fresh_hypernetwork_changes_nothing_and_starts_as_published(model):
    torch.manual_seed(0)
    config = random_hypernetwork(model).config
    fresh = Hypernetwork(config)
    features = features_for(fresh, [6])[0].unsqueeze(0)
    loras = fresh(features, attention_mask=torch.ones(1, 6))
    assert loras["down_proj"][1].abs().max() == 0 and fresh.bias()["down_proj"][1].abs().max() == 0
    width = config.d_in["down_proj"] + config.d_out["down_proj"]
    expected = 0.5 / math.sqrt(config.latent_size + width * config.rank)
    assert fresh.head.weight.std().item() == pytest.approx(expected, rel=0.05)
    expected = 0.2 / math.sqrt(config.d_in["down_proj"] * config.rank)
    assert fresh.bias_A["down_proj"].std().item() == pytest.approx(expected, rel=0.1)


@torch.no_grad()
def test_order_of_tokens_does_not_matter_but_their_content_does(model):
    hypernetwork = random_hypernetwork(model)
    features = features_for(hypernetwork, [8])[0].unsqueeze(0)
    mask = torch.ones(1, 8)
    original = hypernetwork(features, attention_mask=mask)
    assert_same_loras(original, hypernetwork(features.flip(1), attention_mask=mask))
    changed = hypernetwork(features * 1.1, attention_mask=mask)
    assert (changed["down_proj"][0] - original["down_proj"][0]).abs().max() > 1e-3


@torch.no_grad()
def test_layer_to_layer_keeps_layers_apart(model):
    hypernetwork = random_hypernetwork(model, encoder_type="per_layer_activations")
    features = features_for(hypernetwork, [5])[0].unsqueeze(0)
    changed = features.clone()
    changed[:, 2] += 1.0
    mask = torch.ones(1, 5)
    before, after = (hypernetwork(x, attention_mask=mask)["down_proj"][0] for x in (features, changed))
    differs = (before != after).flatten(2).any(-1)[0]
    assert differs.tolist() == [False, False, True, False]


@torch.no_grad()
def test_dropout_acts_in_training_only(model):
    hypernetwork = random_hypernetwork(model, dropout=0.5)
    features, mask = features_for(hypernetwork, [5])[0].unsqueeze(0), torch.ones(1, 5)
    first, second = (hypernetwork(features, attention_mask=mask) for _ in range(2))
    assert_same_loras(first, second, tolerance=0)
    hypernetwork.train()
    changed = hypernetwork(features, attention_mask=mask)["down_proj"][0]
    assert not torch.allclose(changed, first["down_proj"][0])


@torch.no_grad()
def test_half_precision_features_give_parameter_precision_blocks(model):
    hypernetwork = random_hypernetwork(model)
    features, mask = features_for(hypernetwork, [12])[0].unsqueeze(0), torch.ones(1, 12)
    exact = hypernetwork(features, attention_mask=mask)["down_proj"][0]
    rounded = hypernetwork(features.bfloat16(), attention_mask=mask)["down_proj"][0]
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.1 * exact.abs().max()


# ------------------------------------------------------------------------------------------- combine


def test_combine_lays_out_chunks_bias_and_padding(model):
    config = random_hypernetwork(model).config
    loras, bias = random_loras(config, contexts=4, rows=2), random_loras(config, contexts=1, rows=2)
    bias = {m: (A[0], B[0]) for m, (A, B) in bias.items()}
    A, B = combine(loras, bias, torch.tensor([1, 3]))["down_proj"]
    chunk_A, chunk_B = loras["down_proj"]
    bias_A, bias_B = bias["down_proj"]
    assert A.shape == (2, N_LAYERS, 8, config.d_in["down_proj"]) and B.shape[:3] == (2, N_LAYERS, 8)
    assert torch.equal(A[0, :, 0:2], chunk_A[0]) and torch.equal(A[0, :, 2:4], bias_A)
    assert A[0, :, 4:].abs().max() == 0 and B[0, :, 4:].abs().max() == 0
    assert torch.equal(B[1, :, 0:2], chunk_B[1]) and torch.equal(B[1, :, 4:6], chunk_B[3])
    assert torch.equal(B[1, :, 6:8], bias_B)


def test_combine_weights(model):
    config = random_hypernetwork(model).config
    loras, bias = random_loras(config, 2, 2), {m: (A[0], B[0]) for m, (A, B) in random_loras(config, 1, 2).items()}
    A, B = combine(loras, bias, torch.tensor([2]), weights=torch.tensor([0.5, 2.0]))["down_proj"]
    chunk_A, chunk_B = loras["down_proj"]
    torch.testing.assert_close(A[0, :, 0:2], 0.5 * chunk_A[0])
    torch.testing.assert_close(A[0, :, 2:4], 2.0 * chunk_A[1])
    assert torch.equal(B[0, :, 2:4], chunk_B[1])  # weights touch A only
    assert torch.equal(A[0, :, 4:6], bias["down_proj"][0]) and torch.equal(B[0, :, 4:6], bias["down_proj"][1])
    without = combine(loras, None, torch.tensor([2]))["down_proj"][0]
    assert without.shape == A.shape and without[0, :, 4:].abs().max() == 0


def test_combine_is_differentiable_in_blocks_weights_and_bias(model):
    config = random_hypernetwork(model).config
    loras, bias = random_loras(config, 3, 2), {m: (A[0], B[0]) for m, (A, B) in random_loras(config, 1, 2).items()}
    weights = torch.ones(3, requires_grad=True)
    leaves = [*loras["down_proj"], *bias["down_proj"]]
    for leaf in leaves:
        leaf.requires_grad_()
    A, B = combine(loras, bias, torch.tensor([2, 1]), weights=weights)["down_proj"]
    (A.sum() + B.sum()).backward()
    for leaf, uses in zip(leaves, (1, 1, 2, 2), strict=True):  # the bias block serves both contexts
        assert torch.equal(leaf.grad, torch.full_like(leaf, uses))
    torch.testing.assert_close(weights.grad, loras["down_proj"][0].detach().sum(dim=(1, 2, 3)))


@pytest.mark.parametrize(
    ("n_chunks", "weights", "message"),
    [([1, 1], None, "adds up to 2"), ([3], torch.ones(2), "one value per chunk"), ([4, -1], None, "adds up")],
)
def test_combine_refuses_wrong_counts(model, n_chunks, weights, message):
    loras = random_loras(random_hypernetwork(model).config, 3, 2)
    with pytest.raises(ValueError, match=message):
        combine(loras, None, torch.tensor(n_chunks), weights=weights)


# ------------------------------------------------------------------------------------------- attention without keys


def attention(d=24, n_heads=6, n_kv_heads=2, head_dim=10):
    sizes = {"latent_size": d, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim}
    return Attention(HypernetworkConfig(n_layers=1, d_in={"a": 4}, d_out={"a": 4}, feature_size=8, **sizes))


def plain_attention(a, latents, context, mask):
    """Head after head, context after context, real tokens alone."""
    contexts = []
    for i, x in enumerate(context):
        x, lat, h = x[mask[i]], latents[i if len(latents) > 1 else 0], a.head_dim
        queries, keys, values = a.q_proj(lat).split(h, -1), a.k_proj(x).split(h, -1), a.v_proj(x).split(h, -1)
        shares = [(q @ keys[head // a.group].T / h**0.5).softmax(-1) for head, q in enumerate(queries)]
        contexts.append(torch.cat([share @ values[head // a.group] for head, share in enumerate(shares)], -1))
    return a.o_proj(torch.stack(contexts))


@pytest.mark.parametrize("absorbs", [False, True])
@pytest.mark.parametrize("shared", [False, True], ids=["latents of each context", "shared latents"])
@pytest.mark.parametrize("padded", [False, True])
def test_both_ways_of_attention_give_the_defined_values_and_gradients(absorbs, shared, padded):
    torch.manual_seed(0)
    a = attention().double()
    a.absorbs = absorbs
    latents = torch.randn(1 if shared else 3, 5, 24, dtype=torch.float64, requires_grad=True)
    context = torch.randn(3, 7, 24, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(3, 7, dtype=torch.bool)
    if padded:
        mask[1, 4:] = mask[2, :3] = False
    ours, defined = a(latents, context, mask if padded else None), plain_attention(a, latents, context, mask)
    torch.testing.assert_close(ours, defined, rtol=0, atol=1e-10)
    direction, wrt = torch.randn_like(defined), [latents, context, *a.parameters()]
    gradients = [torch.autograd.grad((one * direction).sum(), wrt) for one in (ours, defined)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert not padded or not gradients[0][1][~mask].any(), "padding gets no gradient"


@each_variant
def test_whole_hypernetworks_are_equal_both_ways(model, options, monkeypatch):
    hypernetwork = random_hypernetwork(model, **options).double()
    batch, mask = padded([chunk.double() for chunk in features_for(hypernetwork, [9, 5])], filler=0.0)
    both = []
    for absorbs in (False, True):
        monkeypatch.setattr(Attention, "absorbs", absorbs)
        loras = hypernetwork(batch.double(), attention_mask=mask)
        hypernetwork.zero_grad()
        sum((factor**2).mean() for factors in loras.values() for factor in factors).backward()
        gradients = {name: p.grad for name, p in hypernetwork.named_parameters() if p.grad is not None}
        both.append((loras, gradients))
    (plain, plain_gradients), (absorbed, absorbed_gradients) = both
    assert_same_loras(plain, absorbed, 1e-10)
    torch.testing.assert_close(plain_gradients, absorbed_gradients, rtol=1e-10, atol=1e-10)


def test_the_way_with_fewer_multiplications_is_chosen(monkeypatch):
    def counted(a, k, n_tokens, absorbs):
        monkeypatch.setattr(Attention, "absorbs", absorbs)
        latents, context = (torch.zeros(2, n, 24, device="meta") for n in (k, n_tokens))
        with FlopCounterMode(display=False) as counter:
            a(latents, context, None)
        return counter.get_total_flops()

    a, ways = attention().to("meta"), set()
    for k, n_tokens in ((1, 8), (1, 100), (4, 100), (4, 5), (3, 40), (50, 100)):
        same = 2 * 2 * 2 * k * 24 * 60  # queries and output, two operations each, of two contexts
        plain, absorbed, chosen = (counted(a, k, n_tokens, way) - same for way in (False, True, None))
        assert chosen == (absorbed if absorbed <= 0.75 * plain else plain), (k, n_tokens)
        ways.add(chosen == absorbed)
    assert ways == {True, False}


# ------------------------------------------------------------------------------------------- errors and settings


def test_wrong_inputs_say_what_to_do(model):
    hypernetwork = random_hypernetwork(model)
    features = torch.randn(2, 4, HIDDEN)
    with pytest.raises(TypeError, match="attention_mask"):
        hypernetwork(features)
    with pytest.raises(ValueError, match="another context encoder"):
        hypernetwork(torch.randn(2, 4, HIDDEN + 1), attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="chunks, tokens, features"):
        hypernetwork(torch.randn(2, N_LAYERS, 4, HIDDEN), attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="attention_mask is"):
        hypernetwork(features, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="chunk 1 has no token"):
        hypernetwork(features, attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]))


def test_config_round_trip_and_defaults():
    config = HypernetworkConfig(n_layers=2, d_in={"b": 3, "a": 4}, d_out={"b": 5, "a": 6}, feature_size=8)
    assert config.scale == pytest.approx(2 * 8**1.5) and config.modules == ["a", "b"]
    assert HypernetworkConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"unknown hypernetwork settings \['ranks'\]"):
        HypernetworkConfig.from_dict(config.to_dict() | {"ranks": 3})
    with pytest.raises(ValueError, match="lack"):
        HypernetworkConfig.from_dict({"n_layers": 2})


@pytest.mark.parametrize(
    "wrong",
    [
        *({"rank": 0}, {"rank": "8"}, {"rank": 2.5}, {"rank": None}, {"n_blocks": -1}, {"n_heads": 5}),
        *({"encoder_type": "pooler"}, {"scale": float("nan")}, {"scale": "8"}),
        *({"d_out": {"b": 5}}, {"d_in": [4]}, {"d_in": {"a": "4"}}),
    ],
)
def test_config_refuses_impossible_settings(wrong):
    settings = {"n_layers": 2, "d_in": {"a": 4}, "d_out": {"a": 6}, "feature_size": 8}
    with pytest.raises(ValueError):
        HypernetworkConfig(**(settings | wrong))


def test_weight_decay_spares_norms_biases_scalers_and_queries(model):
    hypernetwork = random_hypernetwork(model, n_pre_head_layers=1)
    names = names_without_decay(hypernetwork)
    assert {"layers.0.mlp.0.weight", "layers.0.mlp.2.bias", "scaler_A.down_proj", "bias_A.down_proj"} <= set(names)
    assert "layers.0.mlp.2.weight" not in names and "head.weight" not in names


def test_a_swiglu_in_pieces_without_gradients_is_the_defined_one(monkeypatch):
    monkeypatch.setattr(onednn, "_PIECE", 7)
    part, x = hypernetwork._SwiGLU(6, 24, 4), torch.randn(2, 3, 5, 6)
    before = x.clone()
    gate, up, down = (one.weight for one in (part.gate_proj, part.up_proj, part.down_proj))
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(part(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(part(x), expected)
        torch.testing.assert_close(part(x[0, 0, 0]), expected[0, 0, 0])  # one row alone
    assert torch.equal(x, before)


def test_a_swiglu_that_keeps_two_hidden_values_has_the_defined_gradients():
    part, x = hypernetwork._SwiGLU(6, 24, 4).double(), torch.randn(2, 5, 6, dtype=torch.double, requires_grad=True)
    given = [x, part.gate_proj.weight, part.up_proj.weight, part.down_proj.weight]
    y, expected = part(x), (torch.nn.functional.silu(x @ given[1].T) * (x @ given[2].T)) @ given[3].T
    weights, kept = torch.randn_like(y), []
    for one, other in zip(*(torch.autograd.grad(o, given, weights) for o in (y, expected)), strict=True):
        torch.testing.assert_close(one, other)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        part(x)
    assert sum(one.shape[-1] == 24 and one.shape[0] == 10 for one in kept) == 2


@each_variant
@pytest.mark.parametrize("way", ["gradients", "no gradients", "packs"])
@pytest.mark.parametrize("absorbs", [False, True])
def test_a_hook_on_any_linear_is_heeded(model, options, way, absorbs, monkeypatch):
    monkeypatch.setattr(hypernetwork, "_MANY_ROWS", 1)
    monkeypatch.setattr(Attention, "absorbs", absorbs)
    network = random_hypernetwork(model, **options)
    features, mask = padded(features_for(network, [8, 8]))

    def blocks() -> list[torch.Tensor]:
        with torch.set_grad_enabled(way == "gradients"), Packs().used() if way == "packs" else nullcontext():
            return [factor.detach() for pair in network(features, mask).values() for factor in pair]

    before = blocks()
    linears = [part for part in network.modules() if type(part) is torch.nn.Linear]
    assert linears
    for linear in linears:
        handle = linear.register_forward_hook(lambda module, inputs, y: y + torch.linspace(-1, 1, y.shape[-1]))
        assert any(not torch.allclose(one, other) for one, other in zip(blocks(), before, strict=True))
        handle.remove()
    for one, other in zip(blocks(), before, strict=True):
        torch.testing.assert_close(one, other)


def test_what_a_hook_holds_stays_as_it_was():
    part, x, held = hypernetwork._SwiGLU(6, 24, 4), torch.randn(5, 6), []
    for linear in (part.gate_proj, part.up_proj):
        linear.register_forward_hook(lambda module, inputs, y: held.append((y, y.clone())))
    with torch.no_grad():
        part(x)
    assert len(held) == 2 and all(torch.equal(one, other) for one, other in held)


def test_backward_hooks_are_heeded():
    part, attention_of, seen = hypernetwork._SwiGLU(6, 24, 4), attention(), []
    linears = [one for whole in (part, attention_of) for one in whole.modules() if type(one) is torch.nn.Linear]
    for linear in linears:
        linear.register_full_backward_hook(lambda module, *_: seen.append(module))
    part(torch.randn(5, 6, requires_grad=True)).sum().backward()
    attention_of(torch.randn(2, 5, 24, requires_grad=True), torch.randn(2, 7, 24)).sum().backward()
    assert {*seen} == {*linears}
