"""Adapters that leave and come in: the same logits in PEFT, merged and through hooks; losses told as they are."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    FAMILIES,
    N_LAYERS,
    build_base_model,
    build_model,
    build_tokenizer,
    build_vision_model,
    held,
    logits_of,
    random_hypernetwork,
)
from torch import nn
from transformers import AutoModelForCausalLM

from d2l_lib.adapter import Adapter, Block, only_layers
from d2l_lib.analysis import attribution, weights
from d2l_lib.base_model import decoder_layers
from d2l_lib.formats.peft import check_export, export_errors, merge
from d2l_lib.model import DocToLoRA

peft = pytest.importorskip("peft")

DOCUMENTS = {"a": "One thing. Two things.", "b": "Three."}
QUESTION = "Who is it?"


@pytest.fixture(scope="module")
def model():
    return build_model(("down_proj", "q_proj"))


@pytest.fixture(scope="module")
def adapter(model):
    return model.internalize(DOCUMENTS, chunk_tokens=12).scaled(0.5, document="a").scaled_bias(0.7)


def ids_of(model):
    return torch.tensor([model.tokenizer(QUESTION)["input_ids"]])


def in_peft(model, folder, **options):
    """The base model, a copy of it, with the folder's LoRA on it."""
    base = build_base_model(model.tokenizer, family=model.base_model.config.model_type)
    base.load_state_dict(model.base_model.state_dict())
    return peft.PeftModel.from_pretrained(base, folder, **options)


@torch.no_grad()
def plain_logits(network, model):
    return network(ids_of(model)).logits


def assert_same(first, second, tolerance=1e-5):
    assert (first - second).abs().max() <= tolerance * second.abs().max()


def dense(adapter, module):
    A, B = adapter.factors(module)
    return adapter.scale * B.double().mT @ A.double()


def exported_update(folder, path, scale=1.0):
    tensors = load_file(folder / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{path}.lora_{side}.weight"].double() for side in "AB")
    return scale * B @ A


# ------------------------------------------------------------------------------------- PEFT, merged weights and hooks
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["last", "all"])
def test_peft_merged_and_hooks_agree_for_every_family(tmp_path, family, targets):
    tokenizer = build_tokenizer()
    base = build_base_model(tokenizer, family=family)
    names = [name for name, part in decoder_layers(base)[0].named_modules() if isinstance(part, nn.Linear)]
    names = [name.rpartition(".")[2] for name in names]
    modules = names if targets == "all" else names[-1:]
    model = DocToLoRA(base, tokenizer, random_hypernetwork(base, modules))
    adapter = model.internalize(DOCUMENTS, chunk_tokens=12).scaled(0.5, document="a").scaled_bias(0.7)
    hooks, unchanged = logits_of(model, adapter), logits_of(model, None)
    assert (hooks - unchanged).abs().max() > 0.1
    folder = adapter.export_peft(tmp_path / "peft")
    assert_same(plain_logits(in_peft(model, folder), model), hooks)
    assert_same(plain_logits(merge(base, adapter), model), hooks)
    assert torch.equal(logits_of(model, None), unchanged)
    imported = Adapter.from_peft(folder, model)
    assert_same(logits_of(model, imported), hooks)
    for loader in ("peft", "vllm", "llama.cpp"):
        assert check_export(folder, loader, model)


def test_an_export_is_the_same_bytes_each_time(tmp_path, adapter):
    """The labels in the header too, whose order safetensors draws at random."""
    files = ("adapter_model.safetensors", "adapter_config.json")
    folders = [adapter.export_peft(tmp_path / str(time)) for time in range(6)]
    assert len({tuple((folder / file).read_bytes() for file in files) for folder in folders}) == 1
    assert export_errors(folders[0]).attrs["error"] == 0


@pytest.mark.parametrize("change", ["whole", "without bias", "weighed", "compressed", "bias only", "negative"])
def test_every_kind_of_adapter_leaves_as_it_is(tmp_path, model, adapter, change):
    changed = {
        "whole": adapter,
        "without bias": adapter.scaled_bias(0),
        "weighed": adapter.scaled(2).scaled_bias(3),
        "compressed": adapter.compressed(3),
        "bias only": adapter.without(document=["a", "b"]),
        "negative": replace(adapter, scale=-adapter.scale),
    }[change]
    hooks = logits_of(model, changed)
    folder = changed.export_peft(tmp_path / "peft", loader="peft")
    assert_same(plain_logits(in_peft(model, folder), model), hooks)
    assert_same(plain_logits(merge(model, changed), model), hooks)
    assert_same(logits_of(model, Adapter.from_peft(folder)), hooks)


# ------------------------------------------------------------------------------------------------------ smaller exports
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_the_error_that_is_told_is_the_true_one(tmp_path, adapter, rank, dtype):
    folder = adapter.export_peft(tmp_path / "peft", rank=rank, dtype=dtype)
    table = export_errors(folder)
    assert len(table) == N_LAYERS * len(adapter.modules)
    whole = lost = 0.0
    for row in table.itertuples():
        true = dense(adapter, row.module)[row.layer]
        written = exported_update(folder, adapter.path_of(row.module).format(layer=row.layer))
        assert row.error == pytest.approx(float((true - written).norm() / true.norm()), rel=1e-9)
        whole, lost = whole + true.norm() ** 2, lost + (true - written).norm() ** 2
    assert table.attrs["error"] == pytest.approx(float((lost / whole).sqrt()), rel=1e-9)
    if dtype is not torch.bfloat16 and dtype is not torch.float16:
        assert table.attrs["error"] == pytest.approx(weights.recompression(adapter, [rank])["error"][0], rel=1e-4)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype or torch.float32}
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {rank}


def test_an_export_of_enough_rank_loses_nothing(tmp_path, adapter):
    exact = adapter.export_peft(tmp_path / "exact")
    larger = adapter.export_peft(tmp_path / "larger", rank=adapter.rank + 1)
    assert export_errors(exact)["error"].eq(0).all()
    assert export_errors(exact).attrs["error"] == 0
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (exact, larger))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for module in adapter.modules:
        for layer in range(N_LAYERS):
            written = exported_update(exact, adapter.path_of(module).format(layer=layer))
            torch.testing.assert_close(written, dense(adapter, module)[layer], rtol=1e-5, atol=1e-6)


def test_half_precision_adapters_tell_what_rounding_the_scale_costs(tmp_path, adapter):
    half = adapter.to(dtype=torch.bfloat16)
    table = export_errors(half.export_peft(tmp_path / "half"))
    assert 1e-4 < table.attrs["error"] < 1e-2
    assert export_errors(half.export_peft(tmp_path / "full", dtype=torch.float32)).attrs["error"] < 1e-6


def test_layers_without_an_update_lose_nothing(tmp_path, adapter):
    table = export_errors(only_layers(adapter, [1]).export_peft(tmp_path / "peft", rank=1))
    assert table.groupby("layer")["error"].max().gt(0).tolist() == [False, True, False, False]


def test_bad_choices_are_refused_and_nothing_is_written(tmp_path, adapter):
    for options, message in (
        ({"rank": 0}, "rank must be"),
        ({"rank": True}, "rank must be"),
        ({"dtype": torch.int8}, "dtype must be one of"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"loader": "ollama"}, "unknown loader 'ollama': one of 'peft', 'vllm'"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter.export_peft(tmp_path / "peft", **options)
    with pytest.raises(ValueError, match=r"do not fit torch.float16: use bfloat16"):
        replace(adapter, scale=1e6).export_peft(tmp_path / "peft", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ who can load it
def test_vllm_needs_a_rank_that_it_serves(tmp_path):
    size = 600
    A, B = torch.randn(1, size, 8), torch.randn(1, size, 8)
    large = Adapter((Block("x", 0, None, 1.0, {"down_proj": A}, {"down_proj": B}),), None, 1.0)
    with pytest.raises(ValueError, match="rank 600, but it serves at most 512: export with rank=512"):
        large.export_peft(tmp_path / "peft", loader="vllm")
    assert list(tmp_path.iterdir()) == []
    assert check_export(large.export_peft(tmp_path / "peft"), "llama.cpp")
    verdict = check_export(large.export_peft(tmp_path / "peft", rank=300, loader="vllm"), "vllm")
    assert verdict
    assert "--max-lora-rank 320" in repr(verdict)
    assert "relative error" in repr(verdict)


def edit_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "refusing"),
    [
        ({"use_dora": True}, {"vllm", "llama.cpp"}),
        ({"bias": "all"}, {"vllm", "llama.cpp"}),
        ({"modules_to_save": ["lm_head"]}, {"vllm", "llama.cpp"}),
        ({"use_rslora": True}, {"llama.cpp"}),
        ({"alpha_pattern": {"layers.1.mlp.down_proj": 3}}, {"vllm", "llama.cpp"}),
        ({"rank_pattern": {"nowhere": 3}}, {"vllm"}),
        ({"rank_pattern": {"down_proj": 3}}, {"peft", "vllm", "llama.cpp"}),
        ({"rank_pattern": {"(": 3}}, {"peft", "vllm", "llama.cpp"}),
        ({"r": 7}, {"peft", "vllm", "llama.cpp"}),
        ({"lora_alpha": None}, {"peft", "vllm", "llama.cpp"}),
        ({"target_modules": ["down_proj"]}, {"peft", "vllm", "llama.cpp"}),
        ({"target_modules": 5}, {"peft", "vllm", "llama.cpp"}),
        ({"target_modules": r"model\.layers\.\d+\..*_proj"}, set()),
    ],
)
def test_each_loader_refuses_what_it_cannot_read(tmp_path, adapter, values, refusing):
    folder = adapter.export_peft(tmp_path / "peft")
    edit_config(folder, **values)
    verdicts = {loader: check_export(folder, loader) for loader in ("peft", "vllm", "llama.cpp")}
    assert {loader for loader, verdict in verdicts.items() if not verdict} == refusing
    assert all("problem" in repr(verdict) for verdict in verdicts.values() if not verdict)


def test_tensors_without_a_place_are_told(tmp_path, model, adapter):
    folder = adapter.export_peft(tmp_path / "peft")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"
    for changed in (
        {key: value for key, value in tensors.items() if key != name},
        tensors | {"base_model.model.lm_head.weight": torch.zeros(2, 2)},
        tensors | {name: torch.zeros(3, 2)},
    ):
        save_file(changed, path)
        for loader in ("peft", "vllm", "llama.cpp"):
            assert "no part of a lora_A, lora_B pair" in check_export(folder, loader).problems[0]
        with pytest.raises(ValueError, match="no part of"):
            Adapter.from_peft(folder)
        with pytest.raises(ValueError, match="not written by export_peft"):
            export_errors(folder)
    save_file({key.replace("down_proj", "router"): value for key, value in tensors.items()}, path)
    edit_config(folder, target_modules=["router", "q_proj"])
    assert "may not know these modules: router" in check_export(folder, "vllm").problems[0]
    assert "no linear model.layers.0.mlp.router" in check_export(folder, "peft", model).problems[0]


@pytest.mark.parametrize("family", ["gemma3", "llava"])
def test_a_vision_part_with_the_same_names_gets_no_lora(tmp_path, family):
    base, processor = build_vision_model(family)
    model = DocToLoRA(base, processor.tokenizer, random_hypernetwork(base, ("q_proj", "down_proj")))
    adapter = model.internalize("One thing. Two things.")
    assert any("vision" in name and name.endswith("q_proj") for name, _ in base.named_modules())
    hooks, merged = logits_of(model, adapter), plain_logits(merge(base, adapter), model)
    folder = adapter.export_peft(tmp_path / "peft", loader="vllm")
    assert_same(merged, hooks)
    assert_same(logits_of(model, Adapter.from_peft(folder, model)), hooks)
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    assert_same(plain_logits(wrapped, model), hooks)
    adapted = {name for name, _ in wrapped.named_parameters() if ".lora_A." in name}
    assert len(adapted) == N_LAYERS * 2
    assert all("language_model.layers." in name for name in adapted)
    some = held(adapter, (1, 3))
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(base), some.export_peft(tmp_path / "some"))
    assert_same(plain_logits(wrapped, model), logits_of(model, some))
    assert len([name for name, _ in wrapped.named_parameters() if ".lora_A." in name]) == 2 * 2


def test_llama_cpp_file_holds_the_same_update(tmp_path, adapter):
    """Written as its converter does: the tensor's GGUF name, A and B as they are, alpha once; read back."""
    gguf = pytest.importorskip("gguf")
    folder = adapter.export_peft(tmp_path / "peft", loader="llama.cpp")
    config = json.loads((folder / "adapter_config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, N_LAYERS)
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "gemma2")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, config["lora_alpha"])
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        path, _, side = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        name = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        writer.add_tensor(f"{name}.{side.lower()}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    tensors = {tensor.name: torch.tensor(tensor.data).double() for tensor in reader.tensors}
    assert len(tensors) == 2 * N_LAYERS * len(adapter.modules)
    for module, name in (("down_proj", "ffn_down"), ("q_proj", "attn_q")):
        for layer in range(N_LAYERS):
            A, B = (tensors[f"blk.{layer}.{name}.weight.lora_{side}"] for side in "ab")
            update = alpha / B.shape[1] * B @ A
            torch.testing.assert_close(update, dense(adapter, module)[layer], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- merged weights
def test_a_merged_model_is_an_ordinary_one(tmp_path, model, adapter):
    merged = merge(model, adapter)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(plain_logits(loaded, model), plain_logits(merged, model))
    assert type(merged) is type(model.base_model)
    for layer in range(N_LAYERS):
        W = model.base_model.model.layers[layer].mlp.down_proj.weight
        changed = merged.model.layers[layer].mlp.down_proj.weight
        torch.testing.assert_close(changed.double(), W.double() + dense(adapter, "down_proj")[layer])
        assert torch.equal(
            merged.model.layers[layer].mlp.up_proj.weight, model.base_model.model.layers[layer].mlp.up_proj.weight
        )


def test_merge_rounds_once_and_keeps_ties(tmp_path, model, adapter):
    base = build_base_model(model.tokenizer)
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.bfloat16()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    merged = merge(base, adapter.to(dtype=torch.bfloat16))
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.lm_head.weight is not base.lm_head.weight
    half = adapter.to(dtype=torch.bfloat16)
    for layer in range(N_LAYERS):
        W = base.model.layers[layer].mlp.down_proj.weight
        A, B = (factor[layer].float() for factor in half.factors("down_proj"))
        expected = (W.float() + half.scale * B.mT @ A).bfloat16()
        found = merged.model.layers[layer].mlp.down_proj.weight
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=2**-8, atol=0)
        assert (found == expected).float().mean() > 0.99
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    saved = loaded.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in merged.state_dict().items())


def test_merge_in_place_needs_no_second_model(model, adapter):
    base = build_base_model(model.tokenizer)
    base.load_state_dict(model.base_model.state_dict())
    places = [parameter.data_ptr() for parameter in base.parameters()]
    assert merge(base, adapter, in_place=True) is base
    assert [parameter.data_ptr() for parameter in base.parameters()] == places
    assert_same(plain_logits(base, model), logits_of(model, adapter))


def test_what_cannot_be_merged_is_refused_unchanged(model, adapter):
    base = build_base_model(model.tokenizer)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    layers = base.model.layers
    with model.applied(adapter), pytest.raises(ValueError, match="leave the `with` block"):
        merge(model, adapter)
    with pytest.raises(ValueError, match="4 layers, this model has 3"):
        merge(build_base_model(n_layers=3), adapter)
    with pytest.raises(ValueError, match="another model"):
        merge(build_base_model(hidden_size=16), adapter)
    with pytest.raises(ValueError, match="other weights"):
        merge(build_model(("down_proj", "q_proj"), base_seed=5), adapter)
    with pytest.raises(TypeError, match="expected a base model"):
        merge(None, adapter)

    shared, own = layers[2].mlp.down_proj.weight, layers[3].mlp.down_proj.weight
    layers[3].mlp.down_proj.weight = shared
    with pytest.raises(ValueError, match="down_proj in layer 2 shares its weight"):
        merge(base, adapter, in_place=True)
    layers[3].mlp.down_proj.weight = own
    base.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="quantised: load the base model without"):
        merge(base, adapter, in_place=True)
    del base.config.quantization_config

    class Packed(nn.Parameter):
        """As a quantising library keeps its weights."""

    q_proj = layers[3].self_attn.q_proj
    own = q_proj.weight
    q_proj.weight = Packed(own.data.clone(), requires_grad=False)
    with pytest.raises(ValueError, match="q_proj in layer 3 is quantised"):
        merge(base, adapter, in_place=True)
    q_proj.weight = nn.Parameter(own.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="q_proj in layer 3 is quantised"):
        merge(base, adapter, in_place=True)
    q_proj.weight = nn.Parameter(own.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match="not in memory"):
        merge(base, adapter, in_place=True)
    q_proj.weight = own
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


# ---------------------------------------------------------------------------------------------------------- coming in
def train_nothing(model, seed=3, **settings):
    """A PEFT model with random LoRA weights, as if it had been trained."""
    base = build_base_model(model.tokenizer)
    base.load_state_dict(model.base_model.state_dict())
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return wrapped.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 7, "target_modules": ["down_proj", "q_proj"]},
        {"r": 4, "lora_alpha": 7, "target_modules": ["down_proj", "q_proj"], "use_rslora": True},
        {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["down_proj", "v_proj"],
            "rank_pattern": {"layers.1.mlp.down_proj": 9, "v_proj": 2},
            "alpha_pattern": {"down_proj": 1, "layers.1.self_attn.v_proj": 5},
        },
        {"r": 2, "target_modules": r".*layers\.(0|3)\..*(o|up)_proj", "init_lora_weights": "gaussian"},
        {"r": 2, "target_modules": "all-linear", "lora_dropout": 0.1},
    ],
    ids=["plain", "rslora", "some layers", "patterns", "regex", "all linear"],
)
def test_a_trained_lora_comes_in_with_its_logits(tmp_path, model, settings):
    wrapped = train_nothing(model, **settings)
    wrapped.save_pretrained(tmp_path / "style")
    imported = Adapter.from_peft(tmp_path / "style", model)
    assert imported.documents == ["style"]
    assert imported.n_layers == N_LAYERS
    theirs = plain_logits(wrapped, model)
    assert (theirs - logits_of(model, None)).abs().max() > 0.1
    assert_same(logits_of(model, imported), theirs)
    again = imported.export_peft(tmp_path / "again")
    assert_same(plain_logits(in_peft(model, again), model), theirs)
    assert Adapter.load(imported.save(tmp_path / "file")) == imported


def test_layers_above_the_last_adapted_one_need_the_base_model(tmp_path, model):
    wrapped = train_nothing(model, r=2, target_modules=["down_proj"], layers_to_transform=[1])
    wrapped.save_pretrained(tmp_path / "one")
    assert Adapter.from_peft(tmp_path / "one").n_layers == 2
    imported = Adapter.from_peft(tmp_path / "one", model.base_model)
    assert imported.n_layers == N_LAYERS
    assert imported.layers == (1,) and imported.blocks[0].A["down_proj"].shape[0] == 1
    for layer in (0, 2, 3):
        assert not dense(imported, "down_proj")[layer].any()
    assert_same(logits_of(model, imported), plain_logits(wrapped, model))


def test_an_adapter_of_some_layers_leaves_for_them_alone(tmp_path, model, adapter):
    some = held(adapter, (1, 3))
    hooks = logits_of(model, some)
    assert (hooks - logits_of(model, adapter)).abs().max() > 0.1
    folder = some.export_peft(tmp_path / "peft", loader="vllm")
    assert {name.split(".")[4] for name in load_file(folder / "adapter_model.safetensors")} == {"1", "3"}
    wrapped = in_peft(model, folder)
    assert_same(plain_logits(wrapped, model), hooks)
    assert len([name for name, _ in wrapped.named_parameters() if ".lora_A." in name]) == 2 * 2
    assert_same(plain_logits(merge(model, some), model), hooks)
    imported = Adapter.from_peft(folder, model)
    assert imported.layers == Adapter.from_peft(folder).layers == (1, 3) and imported.n_layers == N_LAYERS
    assert_same(logits_of(model, imported), hooks)
    smaller = export_errors(some.export_peft(tmp_path / "small", rank=2)).set_index(["module", "layer"])["error"]
    full = export_errors(some.in_layers(range(N_LAYERS)).export_peft(tmp_path / "full", rank=2))
    assert smaller.tolist() == pytest.approx(full["error"].tolist()) and len(smaller) == 2 * N_LAYERS
    assert smaller["down_proj", 1] > 0 == smaller["down_proj", 0]


@pytest.mark.parametrize("modules", [["down_proj", "q_proj"], ["q_proj", "v_proj"]], ids=["same", "other modules"])
def test_a_trained_lora_is_a_block_like_any_other(tmp_path, model, adapter, modules):
    train_nothing(model, r=3, lora_alpha=5, target_modules=modules).save_pretrained(tmp_path / "style")
    style = Adapter.from_peft(tmp_path / "style", model)
    for both in (adapter + style, style + adapter):
        assert set(both.documents) == {"a", "b", "style"}
        assert both.rank == adapter.rank + 3
        for module in both.modules:
            parts = [dense(one, module) for one in (adapter, style) if module in one.sizes]
            torch.testing.assert_close(dense(both, module), sum(parts), rtol=1e-5, atol=1e-6)
        assert_same(logits_of(model, both.without(document="style")), logits_of(model, adapter))
        assert_same(logits_of(model, both.without(document=["a", "b"]).scaled_bias(0)), logits_of(model, style))
        half = dense(both.scaled(0.5, document="style"), "q_proj") - dense(both, "q_proj")
        torch.testing.assert_close(half, -0.5 * dense(style, "q_proj"), rtol=1e-4, atol=1e-5)
    both = adapter + style
    if modules == ["down_proj", "q_proj"]:
        assert both.without(document="style") == adapter
    folder = both.export_peft(tmp_path / "both", loader="vllm")
    assert_same(plain_logits(in_peft(model, folder), model), logits_of(model, both))
    tables = [
        attribution.attribute(model, one, QUESTION, answer="It", level="chunk", method="leave_one_out")
        for one in (both, both.without(document="style"))
    ]
    told = float(tables[0].set_index("document")["contribution"]["style"])
    whole, less = (table.attrs["controls"]["all blocks"]["log_prob"] for table in tables)
    assert abs(told) > 1e-3
    assert told == pytest.approx(whole - less, abs=1e-4)
    assert (both + both).documents == ["a", "b", "style", "a (2)", "b (2)", "style (2)"]
    assert (style + style).documents == ["style", "style (2)"]
    with pytest.raises(ValueError, match="no document 'tone'"):
        both.without(document="tone")


def test_zero_rows_are_shared_by_blocks(tmp_path, model):
    many = sum(model.internalize_each([f"Document {number}." for number in range(9)]))
    train_nothing(model, r=2, target_modules=["v_proj"]).save_pretrained(tmp_path / "style")
    style = Adapter.from_peft(tmp_path / "style", model)
    both = many + style
    d_in, d_out = style.sizes["v_proj"]
    of_documents = 4 * N_LAYERS * 2 * (d_in + d_out)  # rank 2, in v_proj
    of_style = 4 * N_LAYERS * 2 * sum(map(sum, many.sizes.values()))
    assert both.nbytes == many.nbytes + style.nbytes + of_documents + of_style
    assert Adapter.load(both.save(tmp_path / "both")) == both


def test_a_block_of_another_model_cannot_be_added(tmp_path, model, adapter):
    train_nothing(model, r=2, target_modules=["down_proj"]).save_pretrained(tmp_path / "style")
    style = Adapter.from_peft(tmp_path / "style", model)
    with pytest.raises(ValueError, match="have different weights"):
        adapter + replace(style, base_key="another")
    assert (adapter + replace(style, base_key="")).base_key == adapter.base_key
    layers = {"A": {"down_proj": torch.zeros(2, 1, 48)}, "B": {"down_proj": torch.zeros(2, 1, 32)}}
    with pytest.raises(ValueError, match="4 layers with.*2 layers with"):
        adapter + Adapter((Block("x", 0, None, 1.0, **layers),), None, 1.0)
    with pytest.raises(ValueError, match="the scale of an adapter is 0"):
        replace(adapter, scale=0.0) + style


def test_an_export_with_its_bias_is_not_added_a_second_time(tmp_path, model, adapter):
    with_bias = Adapter.from_peft(adapter.export_peft(tmp_path / "with"))
    with pytest.raises(ValueError, match="holds the bias inside its block"):
        adapter + with_bias
    without = Adapter.from_peft(adapter.scaled_bias(0).export_peft(tmp_path / "without"), name="again")
    twice = adapter + without
    assert_same(logits_of(model, twice), logits_of(model, adapter.scaled(2)))
    assert with_bias.base_key == adapter.base_key
    with pytest.raises(ValueError, match="made for another base model"):
        Adapter.from_peft(tmp_path / "with", build_model(("down_proj", "q_proj"), base_seed=5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"peft_type": None}, "peft_type None"),
        ({"use_dora": True}, "use_dora True"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4', which changes the base model"),
        ({"a_thing_of_tomorrow": 1}, "a_thing_of_tomorrow 1"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(tmp_path, adapter, values, message):
    folder = adapter.export_peft(tmp_path / "peft")
    edit_config(folder, **values)
    with pytest.raises(ValueError, match=f"no plain LoRA.*{message}.*merge_and_unload"):
        Adapter.from_peft(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["down_proj"], "use_dora": True}, "use_dora"),
        ({"target_modules": ["down_proj"], "lora_bias": True}, "lora_bias"),
        ({"target_modules": ["down_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["lm_head"]}, "no part of one: base_model.model.lm_head.base_layer.weight"),
        ({"target_modules": ["embed_tokens"]}, "no part of one: .*embed_tokens.lora_embedding_A"),
    ],
)
def test_what_peft_saves_of_other_kinds_is_refused(tmp_path, model, settings, message):
    train_nothing(model, r=2, **settings).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        Adapter.from_peft(tmp_path / "other", model)


def test_files_that_cannot_be_read(tmp_path, model, adapter):
    folder = adapter.export_peft(tmp_path / "peft")
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="no adapter_config.json in"):
        Adapter.from_peft(tmp_path / "nowhere")
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="was it cut off"):
        Adapter.from_peft(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors"):
        Adapter.from_peft(folder)
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="a pickle, which is not opened here: load it with peft"):
        Adapter.from_peft(folder)
    path.write_bytes(whole)
    for text in ("[]", "{", '{"peft_type": "LORA", "r": "8", "lora_alpha": 8}', '{"peft_type": "LORA", "r": 7}'):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match="adapter_config.json"):
            Adapter.from_peft(folder)


def test_tensors_that_do_not_fit_are_told(tmp_path, model, adapter):
    folder = adapter.export_peft(tmp_path / "peft")
    with pytest.raises(ValueError, match="was it made for another model"):
        Adapter.from_peft(folder, build_base_model(n_layers=3))
    with pytest.raises(ValueError, match="another model"):
        Adapter.from_peft(folder, build_base_model(hidden_size=16))
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
    cases = {
        "NaN or infinity": {name.format("A"): torch.full_like(tensors[name.format("A")], torch.nan)},
        "different sizes in different layers": {name.format("A"): tensors[name.format("A")][:, :5].contiguous()},
        "rows, adapter_config.json says": {
            name.format("A"): tensors[name.format("A")][:2].contiguous(),
            name.format("B"): tensors[name.format("B")][:, :2].contiguous(),
        },
        "several linears named 'down_proj'": {
            key.replace("mlp", "mlp.experts.1"): value.clone() for key, value in tensors.items() if "0.mlp" in key
        },
        "lm_head, which is in no decoder layer": {
            key.replace("model.layers.0.mlp.down_proj", "lm_head"): value.clone()
            for key, value in tensors.items()
            if "0.mlp" in key
        },
    }
    for message, changed in cases.items():
        save_file(tensors | changed, path)
        with pytest.raises(ValueError, match=message):
            Adapter.from_peft(folder)


# ------------------------------------------------------------------------------------------ many adapters in one model
@pytest.fixture
def three(tmp_path, model):
    """Adapters of three documents, of different ranks, and their folders."""
    texts = {"a": "One thing. Two things.", "b": "Three.", "c": "Four of them. Five of them. Six of them."}
    adapters = dict(zip(texts, model.internalize_each(texts, chunk_tokens=12), strict=True))
    adapters["b"] = adapters["b"].scaled(0.5)
    assert len({adapter.rank for adapter in adapters.values()}) == 3
    return adapters, {name: adapter.export_peft(tmp_path / name) for name, adapter in adapters.items()}


def test_an_adapter_per_row_equals_pefts_mixed_batch(model, three):
    adapters, folders = three
    wrapped = in_peft(model, folders["a"], adapter_name="a").eval()
    for name in ("b", "c"):
        wrapped.load_adapter(folders[name], adapter_name=name)
    names = ["c", "__base__", "a", "a", "b", "c"]
    texts = ["Who is it?", "Where was it?", "When?", "Who?", "How many are there?", "Who is it?"]
    batch = model.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        theirs = wrapped(**batch, adapter_names=names).logits
        with model.applied([adapters.get(name) for name in names]) as network:
            ours = network(**batch).logits
        base = model.base_model(**batch).logits
    seen = batch["attention_mask"].bool()
    assert_same(ours[seen], theirs[seen])
    changed = [(ours[row][seen[row]] - base[row][seen[row]]).abs().max() for row in range(len(names))]
    assert changed[1] == 0
    assert min(changed[:1] + changed[2:]) > 0.1
    chosen = [adapters.get(name) for name in names]
    said = model.answer(texts, chosen, max_new_tokens=5)
    assert said == [model.answer(text, one, max_new_tokens=5) for text, one in zip(texts, chosen, strict=True)]


def test_swapping_equals_pefts_hot_swap(model, three):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    adapters, folders = three
    before = {name: value.clone() for name, value in model.base_model.state_dict().items()}
    unchanged = logits_of(model, None)
    wrapped = in_peft(model, folders["a"])
    prepare_model_for_compiled_hotswap(wrapped, target_rank=32)
    for name in ("a", "c", "b", "a"):
        hotswap_adapter(wrapped, folders[name], adapter_name="default", torch_device="cpu")
        assert_same(logits_of(model, adapters[name]), plain_logits(wrapped, model))
    assert torch.equal(logits_of(model, None), unchanged)
    assert all(torch.equal(value, before[name]) for name, value in model.base_model.state_dict().items())


@pytest.mark.parametrize("parts", [{"a": 1.0, "b": 1.0}, {"a": 0.3, "c": 0.5}, {"a": 2.0, "b": 0.25, "c": 1.0}])
def test_weighted_sums_equal_pefts_concatenation(tmp_path, model, three, parts):
    adapters = {name: adapter.scaled_bias(0) for name, adapter in three[0].items()}
    folders = {name: adapters[name].export_peft(tmp_path / f"{name} without bias") for name in parts}
    first, *others = parts
    wrapped = in_peft(model, folders[first], adapter_name=first)
    for name in others:
        wrapped.load_adapter(folders[name], adapter_name=name)
    wrapped.add_weighted_adapter([*parts], [*parts.values()], adapter_name="sum", combination_type="cat")
    wrapped.set_adapter("sum")
    ours = sum(adapters[name].scaled(weight) for name, weight in parts.items())
    assert_same(logits_of(model, ours), plain_logits(wrapped, model))
    wrapped.save_pretrained(tmp_path / "saved", selected_adapters=["sum"])
    assert_same(logits_of(model, Adapter.from_peft(tmp_path / "saved" / "sum", model)), logits_of(model, ours))


def test_documents_are_changed_before_an_export_not_after(tmp_path, model, three):
    adapters, _ = three
    both = adapters["a"] + adapters["c"]
    folder = both.export_peft(tmp_path / "document")
    assert_same(plain_logits(in_peft(model, folder), model), logits_of(model, both))
    both.without(document="c").export_peft(folder)
    assert_same(plain_logits(in_peft(model, folder), model), logits_of(model, adapters["a"]))
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
