"""Which base model an adapter belongs to: its fingerprint sees every layer, however a weight was changed."""

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from tiny_models import build_base_model, build_model, build_tokenizer, random_hypernetwork

from d2l_lib.adapter import same_base
from d2l_lib.base_model import decoder_layers, passes_key
from d2l_lib.formats import peft
from d2l_lib.model import DocToLoRA

TEXT, QUESTION = "Ada keeps 3 cats.", "Who?"


@pytest.fixture
def model():
    return build_model()


@pytest.fixture(scope="module")
def adapter():
    return build_model().internalize(TEXT)


def by_data(weight):
    weight.data = weight.data + 0.1


def by_copy(weight):
    weight.data.copy_(weight + 0.1)


def in_place(weight):
    with torch.no_grad():
        weight.add_(0.1)


def in_numpy(weight):
    weight.detach().numpy()[...] += 0.1


CHANGES = (by_data, by_copy, in_place, in_numpy)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_change_in_one_weight_of_one_layer_is_noticed(model, adapter, change, layer):
    key = model.base_key
    assert key == adapter.base_key
    linear = decoder_layers(model.base_model)[layer].self_attn.v_proj.weight
    before = linear.detach().clone()
    change(linear)
    assert model.base_key.split("-")[0] == key.split("-")[0]  # the ends are what they were
    assert model.base_key != key
    for call in (lambda: model.answer(QUESTION, adapter), lambda: model.answer([QUESTION], [adapter])):
        with pytest.raises(ValueError, match="has other weights"):
            call()
    linear.data = before
    assert model.base_key == key
    assert isinstance(model.answer(QUESTION, adapter, max_new_tokens=2), str)


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.norm", "lm_head", "model.layers.2.input_layernorm"])
def test_a_change_anywhere_is_noticed(model, name):
    key = model.base_key
    in_place(model.base_model.get_submodule(name).weight)
    assert model.base_key != key


def test_every_weight_counts(model):
    keys = {model.base_key}
    for weight in model.base_model.parameters():
        before = weight.detach().clone()
        in_place(weight)
        keys.add(model.base_key)
        weight.data = before
    assert len(keys) == 1 + sum(1 for _ in model.base_model.parameters())


def test_another_module_in_the_place_of_a_linear_is_noticed(model):
    key = model.base_key
    mlp = decoder_layers(model.base_model)[1].mlp
    mlp.up_proj = copy.deepcopy(mlp.up_proj)
    assert model.base_key == key
    in_place(mlp.up_proj.weight)
    assert model.base_key != key


def test_a_lasting_buffer_counts_and_a_passing_one_does_not(model):
    key = model.base_key
    layer = decoder_layers(model.base_model)[2]
    layer.register_buffer("passing", torch.ones(3), persistent=False)
    assert model.base_key == key
    layer.register_buffer("gain", torch.ones(3))
    with_gain = model.base_key
    assert with_gain != key
    layer.gain.mul_(2)
    assert model.base_key not in (key, with_gain)


def test_a_merged_base_model_is_another_one(model, adapter):
    merged = DocToLoRA(peft.merge(model, adapter), model.tokenizer, model.hypernetwork)
    assert merged.base_key != model.base_key
    with pytest.raises(ValueError, match="merged in, is another model"):
        merged.answer(QUESTION, adapter)
    with pytest.raises(ValueError, match="has other weights"), merged.applied(adapter):
        pass


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_precision_does_not_count(family):
    tokenizer = build_tokenizer()
    keys = set()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        base_model = build_base_model(tokenizer, family=family).to(torch.bfloat16).to(dtype)
        hypernetwork = random_hypernetwork(base_model, ("fc2",) if family == "phi" else ("down_proj",))
        keys.add(DocToLoRA(base_model, tokenizer, hypernetwork).base_key)
    assert len(keys) == 1
    first, second = keys.pop().split("-")
    assert len(first) == len(second) == 16


def test_order_of_memory_does_not_count(model):
    key = model.base_key
    weight = decoder_layers(model.base_model)[0].mlp.up_proj.weight
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous() and model.base_key == key


def test_a_shorter_weight_at_the_same_address_is_another_one(model):
    key = model.base_key
    norm = decoder_layers(model.base_model)[1].input_layernorm
    norm.weight.data = norm.weight.data[:-1]
    assert model.base_key != key


def test_weights_that_were_replaced_are_not_kept_alive(model):
    key, linear = model.base_key, decoder_layers(model.base_model)[1].mlp.up_proj
    assert model.hypernetwork_key
    before = [weakref.ref(linear.weight), weakref.ref(next(model.hypernetwork.parameters()))]
    linear.weight = torch.nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
    model.hypernetwork = copy.deepcopy(model.hypernetwork)
    assert model.base_key == key and model.hypernetwork_key
    assert [one() for one in before] == [None, None]


def test_weights_that_are_one_count_once():
    tokenizer = build_tokenizer()
    tied = build_base_model(tokenizer, tie_word_embeddings=True)
    key = DocToLoRA(tied, tokenizer, random_hypernetwork(tied)).base_key
    apart = copy.deepcopy(tied)
    apart.lm_head.weight = torch.nn.Parameter(apart.lm_head.weight.detach().clone(), requires_grad=False)
    in_place(apart.lm_head.weight)
    assert DocToLoRA(apart, tokenizer, random_hypernetwork(apart)).base_key != key


def test_an_adapter_with_the_first_half_of_the_key_is_still_taken(model, adapter):
    old = replace(adapter, base_key=adapter.base_key.split("-")[0])
    expected = model.answer(QUESTION, adapter, max_new_tokens=4)
    assert model.answer(QUESTION, old, max_new_tokens=4) == expected
    assert model.answer(QUESTION, replace(adapter, base_key=""), max_new_tokens=4) == expected
    in_place(model.base_model.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="has other weights"):
        model.answer(QUESTION, old)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("a-b", "a-b", True),
        ("a-b", "a-c", False),
        ("a-b", "c-b", False),
        ("a", "a-b", True),
        ("a-b", "a", True),
        ("a", "c-b", False),
        ("", "a-b", True),
        ("a-b", "", True),
    ],
)
def test_keys_are_compared_in_halves(first, second, same):
    assert same_base(first, second) is same


def test_a_changed_hypernetwork_is_another_one(model, adapter):
    key = model.hypernetwork_key
    weight = next(model.hypernetwork.parameters())
    for change in CHANGES:
        before = weight.detach().clone()
        weight.requires_grad_(False)
        change(weight)
        assert model.hypernetwork_key != key
        with pytest.raises(ValueError, match="another hypernetwork"):
            model.answer(QUESTION, adapter)
        weight.data = before
    assert model.hypernetwork_key == key
    in_place(weight)
    assert isinstance(model.answer(QUESTION, adapter.as_lora(), max_new_tokens=2), str)


def test_a_key_of_passes_shows_columns_and_settings():
    part = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.LayerNorm(128))
    keys = [passes_key(part)]
    assert passes_key(part) == keys[0] and passes_key(part.train()) == keys[0]
    part[0].weight.data[:, 1:] = 0
    keys.append(passes_key(part))
    part[1].eps = 1e-3
    keys.append(passes_key(part))
    part.register_buffer("places", torch.arange(4), persistent=False)
    keys.append(passes_key(part))
    part[0] = torch.nn.Sequential(part[0])
    keys.append(passes_key(part))
    assert len(set(keys)) == 5 and None not in keys
    part[0].register_forward_hook(lambda *_: None)
    assert passes_key(part) is None
