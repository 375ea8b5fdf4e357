"""Applying adapters: the equation, who gets which adapter, and that the model is left as it was."""

import pytest
import torch
from tiny_models import build_base_model, random_hypernetwork, random_ids, random_loras

from d2l_lib.base_model import target_linears
from d2l_lib.lora import apply_lora, without_lora

SCALE = 1.5


@pytest.fixture(scope="module")
def model():
    return build_base_model()


@pytest.fixture(scope="module")
def config(model):
    return random_hypernetwork(model, modules=("down_proj", "q_proj")).config


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(5)


def logits(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **options).logits


def pick(loras, context):
    return {m: (A[context : context + 1], B[context : context + 1]) for m, (A, B) in loras.items()}


def test_equals_merged_weights(model, config):
    ids, loras = random_ids(2, 7), random_loras(config, 1, 4)
    base = logits(model, ids)
    with apply_lora(model, loras, SCALE):
        adapted = logits(model, ids)
    linears = target_linears(model, config.modules)
    originals = {m: [linear.weight.clone() for linear in linears[m]] for m in linears}
    for m, (A, B) in loras.items():
        for layer, linear in enumerate(linears[m]):
            linear.weight += SCALE * B[0, layer].T @ A[0, layer]
    merged = logits(model, ids)
    for m in linears:
        for linear, original in zip(linears[m], originals[m], strict=True):
            linear.weight.copy_(original)
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-5)
    assert (adapted - base).abs().max() > 0.01


def test_model_is_bit_equal_after_the_block_even_after_an_error(model, config):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = random_ids(1, 6)
    base = logits(model, ids)
    with apply_lora(model, random_loras(config, 1, 4), SCALE):
        logits(model, ids)
    assert torch.equal(logits(model, ids), base)
    with pytest.raises(RuntimeError, match="interrupted"), apply_lora(model, random_loras(config, 1, 4), SCALE):
        raise RuntimeError("interrupted")
    assert torch.equal(logits(model, ids), base)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(not m._forward_hooks for m in model.modules())


def test_zero_B_and_zero_rows_change_nothing(model, config):
    ids, loras = random_ids(1, 6), random_loras(config, 1, 4)
    base = logits(model, ids)
    with apply_lora(model, {m: (A, torch.zeros_like(B)) for m, (A, B) in loras.items()}, SCALE):
        assert torch.equal(logits(model, ids), base)
    wider = {m: tuple(torch.cat([f, torch.zeros_like(f)], dim=2) for f in pair) for m, pair in loras.items()}
    with apply_lora(model, loras, SCALE):
        narrow = logits(model, ids)
    with apply_lora(model, wider, SCALE):
        torch.testing.assert_close(logits(model, ids), narrow, rtol=0, atol=1e-6)


def test_rank_rows_in_any_order_give_the_same_sum(model, config):
    ids, loras = random_ids(1, 6), random_loras(config, 1, 6)
    order = torch.randperm(6)
    shuffled = {m: (A[:, :, order], B[:, :, order]) for m, (A, B) in loras.items()}
    with apply_lora(model, loras, SCALE):
        expected = logits(model, ids)
    with apply_lora(model, shuffled, SCALE):
        torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)


def test_rows_and_one_by_one_agree(model, config):
    loras = random_loras(config, 3, 4)
    questions = [random_ids(1, length, seed=length) for length in (5, 8, 3, 6)]
    contexts = [0, 0, 2, 1]
    alone = []
    for context, ids in zip(contexts, questions, strict=True):
        with apply_lora(model, pick(loras, context), SCALE):
            alone.append(logits(model, ids)[0])

    ids = torch.zeros(4, 8, dtype=torch.long)
    mask = torch.zeros(4, 8, dtype=torch.long)
    for i, question in enumerate(questions):
        ids[i, : question.shape[1]], mask[i, : question.shape[1]] = question[0], 1
    with apply_lora(model, loras, SCALE, rows=torch.tensor(contexts)):
        padded = logits(model, ids, attention_mask=mask)
    for i, expected in enumerate(alone):
        torch.testing.assert_close(padded[i, : len(expected)], expected, rtol=1e-4, atol=1e-5)


def test_questions_of_one_context_side_by_side_agree_with_single_ones(model, config):
    loras = random_loras(config, 2, 4)
    ids = random_ids(6, 5)
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    with apply_lora(model, loras, SCALE, rows=rows):
        together = logits(model, ids)
    for row, context in enumerate(rows.tolist()):
        with apply_lora(model, pick(loras, context), SCALE):
            alone = logits(model, ids[row : row + 1])[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


def test_beam_search_repeats_rows(model, config):
    loras = random_loras(config, 2, 4)
    ids = random_ids(2, 5)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    with apply_lora(model, loras, SCALE, rows=torch.tensor([1, 0])):
        together = model.generate(ids, **options)
    for row, context in ((0, 1), (1, 0)):
        options["attention_mask"] = torch.ones_like(ids[:1])
        with apply_lora(model, pick(loras, context), SCALE):
            alone = model.generate(ids[row : row + 1], **options)
        assert torch.equal(together[row, : alone.shape[1]], alone[0])


def test_innermost_adapter_replaces_the_outer_one(model, config):
    ids, outer, inner = random_ids(1, 6), random_loras(config, 1, 4), random_loras(config, 1, 2)
    base = logits(model, ids)
    with apply_lora(model, inner, SCALE):
        expected_inner = logits(model, ids)
    with apply_lora(model, outer, SCALE):
        expected_outer = logits(model, ids)
        with apply_lora(model, inner, SCALE):
            assert torch.equal(logits(model, ids), expected_inner)
            with without_lora(model):
                assert torch.equal(logits(model, ids), base)
            assert torch.equal(logits(model, ids), expected_inner)
        assert torch.equal(logits(model, ids), expected_outer)
    assert torch.equal(logits(model, ids), base)


def test_two_models_do_not_disturb_each_other(model, config):
    other, ids = build_base_model(family="mistral"), random_ids(1, 6)
    loras = random_loras(config, 1, 4)
    with apply_lora(model, loras, SCALE):
        expected = logits(model, ids)
        with apply_lora(other, random_loras(config, 1, 4), SCALE):
            assert torch.equal(logits(model, ids), expected)


def test_gradients_reach_both_factors(model, config):
    loras = random_loras(config, 2, 4)
    factors = [factor.requires_grad_() for pair in loras.values() for factor in pair]
    with apply_lora(model, loras, SCALE):
        model(input_ids=random_ids(2, 5), use_cache=False).logits.square().mean().backward()
    assert all(factor.grad.abs().sum() > 0 for factor in factors)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_backward_keeps_no_copy_of_the_factors_per_token(model, config):
    """What autograd saves stays far below tokens * rank * size."""
    rank, tokens = 16, 256
    loras = {m: tuple(f.requires_grad_() for f in pair) for m, pair in random_loras(config, 2, rank).items()}
    largest = 0

    def watch(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor)
    with hooks, apply_lora(model, loras, SCALE):
        model(input_ids=random_ids(2, tokens // 2), use_cache=False)
    assert 0 < largest < tokens * rank * config.d_in["down_proj"]


def test_output_keeps_the_base_precision(config):
    half = build_base_model().bfloat16()
    with apply_lora(half, random_loras(config, 1, 4), SCALE):
        assert logits(half, random_ids(1, 5)).dtype == torch.bfloat16


def test_layers_that_are_not_named_stay_as_they_are(model, config):
    ids, loras = random_ids(2, 6), random_loras(config, 2, 4)
    some = [1, config.n_layers - 1]
    with apply_lora(model, {m: (A[:, some], B[:, some]) for m, (A, B) in loras.items()}, SCALE, some):
        mine = logits(model, ids)
        linears = target_linears(model, config.modules)
        hooked = {(m, layer) for m in linears for layer, one in enumerate(linears[m]) if one._forward_hooks}
    assert hooked == {(m, layer) for m in config.modules for layer in some}
    zero = torch.tensor([float(layer in some) for layer in range(config.n_layers)]).view(-1, 1, 1)
    with apply_lora(model, {m: (A * zero, B * zero) for m, (A, B) in loras.items()}, SCALE):
        assert torch.equal(mine, logits(model, ids))
    assert not torch.equal(mine, logits(model, ids))


def test_misfits_say_what_is_wrong(model, config):
    ids, loras = random_ids(3, 5), random_loras(config, 2, 4)
    with (
        pytest.raises(ValueError, match="was it made for another model"),
        apply_lora(model, {m: (A[:, :3], B[:, :3]) for m, (A, B) in loras.items()}, SCALE),
    ):
        pass
    two = {m: (A[:, :2], B[:, :2]) for m, (A, B) in loras.items()}
    for layers in ([0, config.n_layers], [1]):
        numbers = ", ".join(map(str, layers))
        with (
            pytest.raises(ValueError, match=f"2 layers, as numbers {numbers}, this model has {config.n_layers}"),
            apply_lora(model, two, SCALE, layers),
        ):
            pass
    with pytest.raises(ValueError, match="adapter maps"), apply_lora(model, {"down_proj": loras["q_proj"]}, SCALE):
        pass
    with (
        pytest.raises(ValueError, match="no linears named 'up_projection'"),
        apply_lora(model, {"up_projection": loras["q_proj"]}, SCALE),
    ):
        pass
    with pytest.raises(ValueError, match="outside 0..1"), apply_lora(model, loras, SCALE, rows=torch.tensor([0, 2])):
        pass
    with pytest.raises(ValueError, match="does not fit adapters for 2 rows"), apply_lora(model, loras, SCALE):
        logits(model, ids)
    assert all(not m._forward_hooks for m in model.modules())


def test_an_identity_for_B_is_left_out_and_another_square_B_is_not(model, config):
    ids, d_out = random_ids(2, 7), config.d_out["q_proj"]
    (A, _), layers = random_loras(config, 1, d_out)["q_proj"], config.n_layers
    eye, linears = torch.eye(d_out).expand(1, layers, -1, -1), target_linears(model, ["q_proj"])["q_proj"]
    turned = torch.eye(d_out).flip(0).expand(1, layers, -1, -1)

    def adapted(A, B, layers=None):
        """The logits, and the delta of the linear of layer 2."""
        with apply_lora(model, {"q_proj": (A, B)}, SCALE, layers=layers):
            (hook,) = linears[2]._forward_hooks.values()
            return logits(model, ids), hook.keywords["delta"]

    plain, delta = adapted(A, eye)
    assert torch.equal(delta, A[0, 2])
    same, delta = adapted(A.flip(2), turned)
    assert delta.keywords["B"] is not None
    torch.testing.assert_close(plain, same)
    assert (plain - adapted(A, turned)[0]).abs().max() > 0.01
    assert isinstance(adapted(A[:, :1], eye[:, :1], layers=[2])[1], torch.Tensor), "of one layer, too"
    wide, delta = adapted(A.double(), eye[0, :1].double().expand_as(eye))
    assert delta.keywords["B"] is None, "of another precision it is a product, and then a sum"
    torch.testing.assert_close(plain, wide)
