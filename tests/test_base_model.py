"""Loading base models, finding their parts, and reading context features without a second copy."""

import json

import pytest
import torch
from tiny_models import (
    FAMILIES,
    MLP_OUTPUT,
    N_LAYERS,
    VOCABULARY,
    build_base_model,
    random_hypernetwork,
    random_ids,
    random_loras,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from d2l_lib import base_model
from d2l_lib.base_model import decoder_layers, default_modules, load_base_model, module_sizes, target_linears
from d2l_lib.encoder import ContextEncoder
from d2l_lib.lora import apply_lora

each_family = pytest.mark.parametrize("family", FAMILIES)
ENCODERS = ("early_exit", "per_layer_activations", "embed_only")


def save_model(folder, family="llama"):
    """A complete model folder: config, weights and a tokenizer without a padding token."""
    build_base_model(family=family).save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"</s>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------- context encoder


@each_family
@torch.no_grad()
def test_features_are_the_models_own_hidden_states(family):
    model, ids = build_base_model(family=family), random_ids(2, 9)
    states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    norm = base_model.final_norm(model)
    for depth in (0, 1, 3):
        torch.testing.assert_close(ContextEncoder(model, "early_exit", depth).encode(ids), norm(states[depth]))
    per_layer = ContextEncoder(model, "per_layer_activations").encode(ids)
    assert per_layer.shape == (2, N_LAYERS, 9, states[0].shape[-1])
    for depth in range(N_LAYERS - 1):
        torch.testing.assert_close(per_layer[:, depth], states[depth])
    torch.testing.assert_close(per_layer[:, -1], norm(states[N_LAYERS - 1]))
    assert ContextEncoder(model, "per_layer_activations", 2).encode(ids).shape[1] == 2
    torch.testing.assert_close(ContextEncoder(model, "embed_only").encode(ids), states[0])


@each_family
@pytest.mark.parametrize("kind", ENCODERS)
def test_padded_and_single_chunks_agree(family, kind):
    encoder = ContextEncoder(build_base_model(family=family), kind)
    chunks = [random_ids(1, length, seed=length) for length in (4, 9, 6)]
    alone = [encoder.encode(ids)[0] for ids in chunks]
    for side in ("left", "right"):
        ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
        for i, chunk in enumerate(chunks):
            n = chunk.shape[1]
            place = slice(9 - n, 9) if side == "left" else slice(0, n)
            ids[i, place], mask[i, place] = chunk[0], 1
        padded = encoder.encode(ids, attention_mask=mask)
        for i, expected in enumerate(alone):
            ours = padded[i][..., mask[i].bool(), :]
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoder_shares_the_models_weights_and_leaves_it_alone(kind):
    model, ids = build_base_model(), random_ids(1, 6)
    before = model(input_ids=ids, use_cache=False).logits
    encoder = ContextEncoder(model, kind)
    body = encoder._shortened_body()
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(parameter.data_ptr() in own for parameter in body.parameters())
    features = encoder.encode(ids)
    assert not features.requires_grad
    assert len(decoder_layers(model)) == N_LAYERS
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


def test_encoder_runs_only_the_layers_it_needs():
    model, ran = build_base_model(), []
    for i, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    for kind, depth, expected in (("early_exit", None, [0]), ("per_layer_activations", None, [0, 1, 2])):
        ran.clear()
        ContextEncoder(model, kind, depth).encode(random_ids(1, 4))
        assert ran == expected


@pytest.mark.parametrize("kind", ["early_exit", "per_layer_activations"])
def test_encoder_ignores_an_applied_adapter(kind):
    model, ids = build_base_model(), random_ids(1, 6)
    encoder = ContextEncoder(model, kind, 3)
    expected = encoder.encode(ids)
    loras = random_loras(random_hypernetwork(model).config, 1, 4)
    with apply_lora(model, loras, 1.0):
        assert torch.equal(encoder.encode(ids), expected)
        adapted = model(input_ids=ids, use_cache=False).logits
    assert not torch.equal(model(input_ids=ids, use_cache=False).logits, adapted)


def test_wrong_encoder_settings():
    model = build_base_model()
    with pytest.raises(ValueError, match="does not fit a model of 4 layers"):
        ContextEncoder(model, "early_exit", 5)
    with pytest.raises(ValueError, match="unknown encoder_type"):
        ContextEncoder(model, "late_exit")
    assert ContextEncoder(model).feature_size == 32


# ------------------------------------------------------------------------------------------- parts


@each_family
def test_target_linears_and_sizes(family):
    model = build_base_model(family=family)
    mlp = MLP_OUTPUT.get(family, "down_proj")
    queries, n_queries = ("qkv_proj", 64) if family == "phi3" else ("q_proj", 32)
    assert default_modules(model) == [mlp]
    linears = target_linears(model, [mlp, queries])
    assert [len(found) for found in linears.values()] == [N_LAYERS, N_LAYERS]
    assert linears[queries][2] is getattr(decoder_layers(model)[2].self_attn, queries)
    assert linears[mlp][2] is getattr(decoder_layers(model)[2].mlp, mlp)
    d_in, d_out = module_sizes(model, [mlp, queries])
    assert d_in == {mlp: 48, queries: 32} and d_out == {mlp: 32, queries: n_queries}


def test_a_model_without_a_usual_target_module_says_what_it_has():
    model = build_base_model()
    for layer in decoder_layers(model):
        layer.mlp.down_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match="no usual target module.*'gate_proj'"):
        default_modules(model)


def test_unknown_module_lists_the_known_ones():
    with pytest.raises(ValueError, match="no linears named 'fc1'.*'down_proj'.*'q_proj'"):
        target_linears(build_base_model(), ["fc1"])


def test_layers_of_different_size_are_refused():
    model = build_base_model()
    decoder_layers(model)[1].mlp.down_proj = torch.nn.Linear(40, 32)
    with pytest.raises(ValueError, match="different sizes"):
        module_sizes(model, ["down_proj"])


def test_models_without_a_decoder_are_refused():
    with pytest.raises(ValueError, match="no decoder"):
        decoder_layers(torch.nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_load_local_folder(tmp_path, family):
    model, tokenizer = load_base_model(save_model(tmp_path / "model", family), device="cpu")
    assert model.dtype == torch.float32 and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.pad_token == "</s>"
    expected = build_base_model(family=family)(input_ids=random_ids(1, 5), use_cache=False).logits
    assert torch.equal(model(input_ids=random_ids(1, 5), use_cache=False).logits, expected)
    if family == "gemma2":
        assert model.config._attn_implementation == "eager"
    half, _ = load_base_model(str(tmp_path / "model"), device="cpu", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_bundled_name(tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "_DATA", tmp_path)
    save_model(tmp_path / "toy" / "base_model")
    assert base_model.bundled_path("toy") == tmp_path / "toy"
    assert load_base_model("toy", device="cpu")[0].config.num_hidden_layers == N_LAYERS
    with pytest.raises(FileNotFoundError, match="no bundled base model 'tyn'.*known here: smollm2, toy"):
        load_base_model("tyn")


@pytest.mark.parametrize("source", ["/nowhere/model", "./nowhere", "owner/absent-model", "a/b/c"])
def test_missing_model_says_what_to_give(source):
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_base_model(source, device="cpu")


def test_incomplete_and_damaged_folders(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match="empty"):
        load_base_model(empty, device="cpu")

    cut = save_model(tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises((FileNotFoundError, ValueError), match="cut"):
        load_base_model(cut, device="cpu")

    strange = save_model(tmp_path / "strange")
    (strange / "config.json").write_text(json.dumps({"model_type": "never_heard_of"}))
    with pytest.raises(ValueError, match="strange"):
        load_base_model(strange, device="cpu")
