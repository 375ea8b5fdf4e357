"""Checkpoints: exact round trips, and files that are not what they say."""

import collections
import json
import os
import pickle
import sys
import types
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, N_LAYERS, build_base_model, build_rows_model, random_hypernetwork

from d2l_lib.__main__ import main
from d2l_lib.formats import checkpoints, pickles
from d2l_lib.formats.checkpoints import (
    CheckpointError,
    build_hypernetwork,
    convert,
    export,
    load_checkpoint,
    read_published,
    save_checkpoint,
)
from d2l_lib.hypernetwork import HypernetworkConfig

VARIANTS = [
    {},
    {"encoder_type": "per_layer_activations", "encoder_layer": 4},
    {"n_blocks": 4, "n_self_attention_per_block": 1, "shared_weights": True},
    {"modules": ("down_proj", "v_proj"), "use_bias": False, "n_pre_head_layers": 2, "per_layer_processing": True},
]
each_variant = pytest.mark.parametrize("options", VARIANTS)
PUBLISHED_HEADS = {"n_heads": 16, "n_kv_heads": 4, "head_dim": 128}


@pytest.fixture(scope="module")
def model():
    return build_base_model()


def assert_same_output(left, right):
    layers = (N_LAYERS,) if left.config.layer_to_layer else ()
    features = torch.randn(2, *layers, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (h(features, attention_mask=torch.ones(2, 5)) for h in (left, right))
    assert a.keys() == b.keys()
    assert all(torch.equal(x, y) for m in a for x, y in zip(a[m], b[m], strict=True))


# ------------------------------------------------------------------------------------------- own format


@each_variant
def test_round_trip_is_exact(model, tmp_path, options):
    hypernetwork = random_hypernetwork(model, **options)
    folder = save_checkpoint(tmp_path / "saved", hypernetwork, {"step": 7, "note": "caf\u00e9"})
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "hypernetwork.safetensors"]
    loaded, meta = load_checkpoint(folder)
    assert meta == {"step": 7, "note": "caf\u00e9"} and loaded.config == hypernetwork.config and not loaded.training
    assert_same_output(loaded, hypernetwork)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


def test_a_hypernetwork_of_token_rows_makes_the_round_trip_and_is_not_exported(tmp_path):
    net = build_rows_model().hypernetwork
    folder = save_checkpoint(tmp_path / "saved", net, {"row_reading": {"temperature": 0.5, "null_logit": 1.0}})
    loaded, meta = load_checkpoint(folder)
    assert type(loaded) is type(net) and loaded.config == net.config and meta["row_reading"]["temperature"] == 0.5
    own = dict(net.named_parameters())
    assert {name for name, _ in loaded.named_parameters()} == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in loaded.named_parameters())
    with pytest.raises(ValueError, match="no token rows"):
        export(net, tmp_path / "pytorch_model.bin", base_model="some/base")
    for row_reading in ({"temperature": 0.0}, {"temperature": "1"}, {"null_logit": None}, {"other": 1}):
        damaged = json.loads((folder / "config.json").read_text())
        damaged["meta"]["row_reading"] = row_reading
        (folder / "config.json").write_text(json.dumps(damaged))
        with pytest.raises(CheckpointError, match="row_reading"):
            load_checkpoint(folder)
    assert "writer" not in random_hypernetwork(build_base_model()).config.to_dict()


def test_saving_again_replaces_and_a_failure_leaves_the_old_one(model, tmp_path, monkeypatch):
    first, second = random_hypernetwork(model, seed=1), random_hypernetwork(model, seed=2)
    folder = save_checkpoint(tmp_path / "saved", first)
    monkeypatch.setattr(checkpoints, "save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(folder, second)
    assert_same_output(load_checkpoint(folder)[0], first)
    monkeypatch.undo()
    save_checkpoint(folder, second)
    assert_same_output(load_checkpoint(folder)[0], second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


def test_half_precision_on_disk_is_float32_again_when_loaded(model, tmp_path):
    hypernetwork = random_hypernetwork(model)
    folder = save_checkpoint(tmp_path / "saved", hypernetwork, dtype=torch.float16)
    stored = load_file(folder / "hypernetwork.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    loaded, _ = load_checkpoint(folder)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, dict(hypernetwork.named_parameters())[name].half().float())
    with torch.no_grad():
        hypernetwork.head.weight[0, 0, 0] = 1e6
    with pytest.raises(ValueError, match="head.weight has values that do not fit into torch.float16"):
        save_checkpoint(folder, hypernetwork, dtype=torch.float16)
    assert_same_output(load_checkpoint(folder)[0], loaded)


def test_settings_that_are_not_json_are_refused_before_anything_is_written(model, tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "saved", random_hypernetwork(model), {"tensor": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []


def test_damaged_folders_say_what_is_wrong(model, tmp_path):
    folder = save_checkpoint(tmp_path / "saved", random_hypernetwork(model))
    settings, weights = folder / "config.json", folder / "hypernetwork.safetensors"
    text, content = settings.read_text(), weights.read_bytes()

    for cut in (0, 5, 200, len(content) - 4):
        weights.write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(folder)
    weights.write_bytes(content)

    changed = json.loads(text)
    for change, message in (
        ({"format": "something else"}, "does not describe"),
        ({"version": 99}, "version 99"),
        (
            {"hypernetwork": changed["hypernetwork"] | {"ranks": 4}},
            "hypernetwork.ranks: no such name is expected, not 4",
        ),
        ({"hypernetwork": changed["hypernetwork"] | {"rank": 4}}, "shape"),
        ({"hypernetwork": changed["hypernetwork"] | {"n_blocks": 3}}, "missing"),
        ({"hypernetwork": changed["hypernetwork"] | {"rank": "two"}}, "config.json"),
        (
            {"hypernetwork": changed["hypernetwork"] | {"rank": 2.5}},
            "hypernetwork.rank: a whole number is expected, not 2.5",
        ),
        ({"hypernetwork": changed["hypernetwork"] | {"shared_weights": "no"}}, "true or false is expected, not 'no'"),
        ({"hypernetwork": changed["hypernetwork"] | {"base_model": ["tiny"]}}, "hypernetwork.base_model: a text"),
        ({"hypernetwork": changed["hypernetwork"] | {"n_layers": 10**12}}, "a number of at most 1000 is expected"),
        ({"hypernetwork": changed["hypernetwork"] | {"d_in": {"down_proj": True}}}, r"hypernetwork.d_in.down_proj: a"),
        ({"hypernetwork": 3}, "config.json: hypernetwork: an object of named values is expected, not 3"),
        ({"meta": 3}, "config.json: meta: an object of named values is expected, not 3"),
        ({"meta": {"chunk_tokens": "20"}}, "config.json: meta.chunk_tokens: a whole number is expected, not '20'"),
        ({"meta": {"least_relevance": None}}, "meta.least_relevance: a finite number is expected, not None"),
        ({"meta": {"gate": {"known": 1, "growth": 2}}}, "meta.gate.refusal: a value is expected, and it is missing"),
        ({"version": True}, "config.json: version: a whole number is expected, not True"),
    ):
        settings.write_text(json.dumps(changed | change))
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(folder)
    for broken in (text[: len(text) // 2], "[]", ""):
        settings.write_text(broken)
        with pytest.raises(CheckpointError):
            load_checkpoint(folder)
    settings.unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_checkpoint(folder)


def test_tensors_may_carry_every_alias_or_one(model):
    hypernetwork = random_hypernetwork(model, n_blocks=4, shared_weights=True)
    everything = hypernetwork.state_dict()
    once = {name: value for name, value in everything.items() if name in dict(hypernetwork.named_parameters())}
    assert len(once) < len(everything)
    for state in (everything, once):
        assert_same_output(build_hypernetwork(hypernetwork.config, state), hypernetwork)
    with pytest.raises(CheckpointError, match="not expected.*surplus"):
        build_hypernetwork(hypernetwork.config, once | {"surplus": torch.ones(1)})
    alias = next(name for name in everything if name not in once)
    with pytest.raises(CheckpointError, match=f"{alias} and .* are one shared layer, but hold different values"):
        build_hypernetwork(hypernetwork.config, everything | {alias: everything[alias] + 1})


def test_a_built_hypernetwork_has_its_own_memory_and_learns(model):
    hypernetwork = random_hypernetwork(model, n_blocks=4, shared_weights=True)
    state = hypernetwork.state_dict()
    built = build_hypernetwork(hypernetwork.config, state)
    assert [name for name, _ in built.named_parameters()] == [name for name, _ in hypernetwork.named_parameters()]
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in built.parameters())
    with torch.no_grad():
        built.head.weight += 1
    assert torch.equal(state["head.weight"], hypernetwork.head.weight)


@pytest.mark.parametrize(
    "sizes",
    [
        {"latent_size": 10**9},
        {"feature_size": 10**12},
        {"n_latent_queries": 10**11},
        {"d_in": {"down_proj": 2**62}},
        {"n_layers": 10**10},
        {"n_blocks": 10**9},
        {"n_self_attention_per_block": 10**9},
        {"n_pre_head_layers": 10**9},
    ],
)
def test_settings_of_impossible_size_are_refused_before_memory_is_taken(model, sizes):
    hypernetwork = random_hypernetwork(model)
    config = HypernetworkConfig.from_dict(hypernetwork.config.to_dict() | sizes)
    with pytest.raises(CheckpointError):
        build_hypernetwork(config, hypernetwork.state_dict())


@pytest.mark.parametrize("module", ["a.b", "", "keys"])
def test_modules_that_cannot_be_called_so(model, module):
    hypernetwork = random_hypernetwork(model)
    sizes = {"d_in": {module: 4}, "d_out": {module: 4}}
    config = HypernetworkConfig.from_dict(hypernetwork.config.to_dict() | sizes)
    with pytest.raises(CheckpointError):
        build_hypernetwork(config, hypernetwork.state_dict())


# ------------------------------------------------------------------------------------------- published format


def published_classes(monkeypatch, names):
    """Classes under the published module names, so that pickles can be written here without that code."""
    made = {}
    for qualified in names:
        module_name, _, name = qualified.rpartition(".")
        parts = module_name.split(".")
        for i in range(1, len(parts) + 1):
            package = ".".join(parts[:i])
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        made[name] = type(name, (), {"__module__": module_name})
        monkeypatch.setattr(sys.modules[module_name], name, made[name], raising=False)
    return made


NEW_NAMES = (
    "ctx_to_lora.modeling.hypernet.HypernetConfig",
    "ctx_to_lora.modeling.aggregator.AggregatorConfig",
    "ctx_to_lora.configs.CtxEncoderArguments",
)
OLD_NAMES = tuple(f"ctx_to_lora.modeling_utils.{name.rpartition('.')[2]}" for name in NEW_NAMES)
LORA_NAME = "peft.tuners.lora.config.LoraConfig"


def published_content(monkeypatch, hypernetwork, names=NEW_NAMES, drop=(), **changes):
    """What the published code would save for this hypernetwork."""
    config = hypernetwork.config
    # LoraConfig exists where peft is installed; a class of the same name is enough for the pickle.
    made = published_classes(monkeypatch, (*names, LORA_NAME))

    def record(name, values):
        instance = made[name]()
        instance.__dict__.update({k: changes.get(k, v) for k, v in values.items() if k not in drop})
        return instance

    aggregator = record(
        "AggregatorConfig",
        {
            "aggregator_type": "perceiver",
            "num_layers": config.n_layers,
            "feature_size": config.feature_size,
            "n_latent_queries": config.n_latent_queries,
            "num_blocks": config.n_blocks,
            "num_self_attn_per_block": config.n_self_attention_per_block,
            "shared_weights": config.shared_weights,
        },
    )
    lora = record("LoraConfig", {"r": config.rank, "lora_alpha": config.scale, "target_modules": set(config.d_in)})
    hypernet = record(
        "HypernetConfig",
        {
            "latent_size": config.latent_size,
            "per_rank_gen": True,
            "use_bias": config.use_bias,
            "per_layer_processing": config.per_layer_processing,
            "num_pre_head_layers": config.n_pre_head_layers,
            "dropout_rate": config.dropout,
            "extra_modules": None,
            "layer_indices": torch.arange(config.n_layers),
            "feature_sizes": (config.d_in, config.d_out),
            "aggregator_config": aggregator,
            "lora_config": lora,
        },
    )
    is_per_layer = config.layer_to_layer
    encoder = record(
        "CtxEncoderArguments",
        {
            "ctx_encoder_model_name_or_path": None,
            "ctx_encoder_type": config.encoder_type,
            "layer_idx": None if is_per_layer else config.encoder_layer,
            "quantize_ctx_encoder": config.encoder_4bit,
            "ctx_encoder_last_layer": config.encoder_layer if is_per_layer else None,
        },
    )
    content = collections.OrderedDict(hypernetwork.state_dict())
    content["base_model_name_or_path"] = "some/base"
    content["hypernet_config"] = hypernet
    content["ctx_encoder_args"] = encoder
    return content


@each_variant
@pytest.mark.parametrize("names", [NEW_NAMES, OLD_NAMES], ids=["new", "old"])
def test_published_file_is_read(model, tmp_path, monkeypatch, options, names):
    hypernetwork = random_hypernetwork(model, **(options | PUBLISHED_HEADS))
    torch.save(published_content(monkeypatch, hypernetwork, names), tmp_path / "pytorch_model.bin")
    monkeypatch.undo()  # the published classes are gone when the file is read
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        config, tensors, base = read_published(path)
        assert base == "some/base"
        assert config.to_dict() == hypernetwork.config.to_dict() | {"base_model": "some/base"}
        assert_same_output(build_hypernetwork(config, tensors), hypernetwork)


def test_compiled_names_and_fields_that_old_files_lack(model, tmp_path, monkeypatch):
    hypernetwork = random_hypernetwork(model, n_pre_head_layers=4, **PUBLISHED_HEADS)
    content = published_content(monkeypatch, hypernetwork, drop=("num_pre_head_layers", "use_bias", "extra_modules"))
    compiled = collections.OrderedDict(
        (f"_orig_mod.{name}" if isinstance(value, torch.Tensor) else name, value) for name, value in content.items()
    )
    torch.save(compiled, tmp_path / "pytorch_model.bin")
    config, tensors, _ = read_published(tmp_path)
    assert config.n_pre_head_layers == 4 and config.use_bias
    assert_same_output(build_hypernetwork(config, tensors), hypernetwork)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aggregator_type": "pooler"}, "pooler"),
        ({"per_rank_gen": False}, "per_rank_gen"),
        ({"extra_modules": ["x"]}, "extra_modules"),
        ({"latent_size": "many"}, "hypernet_config.latent_size: a whole number is expected, not 'many'"),
        ({"ctx_encoder_type": "unheard"}, "encoder_type"),
        ({"r": 2.5}, "hypernet_config.lora_config.r: a whole number is expected, not 2.5"),
        ({"num_blocks": True}, "aggregator_config.num_blocks: a whole number is expected, not True"),
        ({"shared_weights": 1}, "aggregator_config.shared_weights: true or false is expected, not 1"),
        ({"layer_indices": torch.tensor([0, 2])}, "layer_indices"),
        ({"layer_indices": torch.zeros(N_LAYERS, 2)}, "layer_indices"),
        ({"feature_sizes": ({"down_proj": "4"}, {"down_proj": 4})}, "feature_sizes"),
        (
            {"ctx_encoder_model_name_or_path": "a\x1b[31m"},
            "name_or_path: a name of printable characters",
        ),
    ],
)
def test_settings_that_do_not_exist_here(model, tmp_path, monkeypatch, changes, message):
    content = published_content(monkeypatch, random_hypernetwork(model, **PUBLISHED_HEADS), **changes)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        read_published(tmp_path)


class Harmful:
    """A pickle that would run a command when opened carelessly."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_with_a_command_is_refused_by_name(model, tmp_path, monkeypatch):
    marker = tmp_path / "executed"
    content = published_content(monkeypatch, random_hypernetwork(model, **PUBLISHED_HEADS))
    content["ctx_encoder_args"] = Harmful(marker)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"asks for \w+\.system"):
        read_published(tmp_path)
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Harmful(marker), protocol=2))
    with pytest.raises(CheckpointError):
        read_published(tmp_path / "plain.bin")
    assert not marker.exists()


def test_names_that_meet_after_the_compiled_prefix_is_gone(model, tmp_path, monkeypatch):
    content = published_content(monkeypatch, random_hypernetwork(model, **PUBLISHED_HEADS))
    content["_orig_mod.head.weight"] = torch.zeros(1)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="head.weight is there twice"):
        read_published(tmp_path)


def test_files_that_are_not_checkpoints(model, tmp_path, monkeypatch):
    path = tmp_path / "pytorch_model.bin"
    torch.save(published_content(monkeypatch, random_hypernetwork(model, **PUBLISHED_HEADS)), path)
    content = path.read_bytes()
    for damaged in (b"", b"\x00" * 64, b"not a pickle", content[: len(content) // 2], content[:100]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            read_published(path)
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="lacks base_model_name_or_path"):
        read_published(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="not a Doc-to-LoRA checkpoint"):
        read_published(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(CheckpointError):
        read_published(path)
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin"):
        read_published(tmp_path / "absent")
    save_file({"x": torch.ones(1)}, path)
    assert load_file(path)
    with pytest.raises(CheckpointError):
        read_published(path)


# ------------------------------------------------------------------------------------------- there and back


@each_variant
def test_export_is_what_the_published_code_would_write(model, tmp_path, monkeypatch, options):
    """Torch's own reader finds the published classes and every tensor, shared layers under each of their names."""
    hypernetwork = random_hypernetwork(model, **(options | PUBLISHED_HEADS), encoder_4bit=True)
    path = export(hypernetwork, tmp_path / "pytorch_model.bin", base_model="some/base")
    assert [each.name for each in tmp_path.iterdir()] == ["pytorch_model.bin"]
    config, tensors, base = read_published(path)
    assert base == "some/base" and config.encoder_4bit
    layer = hypernetwork.config.encoder_layer
    layer = 1 if layer is None and not hypernetwork.config.layer_to_layer else layer  # a quarter of four
    assert config.to_dict() == hypernetwork.config.to_dict() | {"base_model": "some/base", "encoder_layer": layer}
    assert_same_output(build_hypernetwork(config, tensors), hypernetwork)

    classes = published_classes(monkeypatch, NEW_NAMES)
    content = torch.load(path, weights_only=False)
    assert type(content) is collections.OrderedDict
    expected = hypernetwork.state_dict()
    if not config.use_bias:  # their code makes these all the same
        expected |= {f"bias_A.{m}": torch.zeros(N_LAYERS, 2, size) for m, size in config.d_in.items()}
        expected |= {f"bias_B.{m}": torch.zeros(N_LAYERS, 2, size) for m, size in config.d_out.items()}
    stored = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    assert stored.keys() == expected.keys() and all(torch.equal(stored[name], expected[name]) for name in stored)
    for name, value in hypernetwork.state_dict(keep_vars=True).items():
        for other, same in hypernetwork.state_dict(keep_vars=True).items():
            shares = stored[name].untyped_storage().data_ptr() == stored[other].untyped_storage().data_ptr()
            assert shares == (value is same), (name, other)
    assert list(content)[-3:] == ["base_model_name_or_path", "hypernet_config", "ctx_encoder_args"]
    hypernet, encoder = content["hypernet_config"], content["ctx_encoder_args"]
    assert type(hypernet) is classes["HypernetConfig"] and type(encoder) is classes["CtxEncoderArguments"]
    assert type(hypernet.aggregator_config) is classes["AggregatorConfig"] and encoder.quantize_ctx_encoder is True
    assert torch.equal(hypernet.layer_indices, torch.arange(N_LAYERS))
    assert hypernet.lora_config.target_modules == set(config.modules)


def test_the_exported_lora_config_is_pefts_default_but_for_the_settings(model, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    published_classes(monkeypatch, NEW_NAMES)
    path = export(random_hypernetwork(model, **PUBLISHED_HEADS), tmp_path / "x.bin", base_model="some/base")
    stored = torch.load(path, weights_only=False)["hypernet_config"].lora_config
    assert type(stored) is peft.LoraConfig
    made = peft.LoraConfig(
        r=2,
        lora_alpha=2 * 2**1.5,
        target_modules={"down_proj"},
        task_type="CAUSAL_LM",
        base_model_name_or_path="some/base",
    )
    assert {name: value for name, value in vars(made).items() if name in vars(stored)} == vars(stored)


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conversion_there_and_back_keeps_every_bit(model, tmp_path, monkeypatch, capsys, options, dtype):
    hypernetwork = random_hypernetwork(model, **({"encoder_layer": 2} | options | PUBLISHED_HEADS), encoder_4bit=True)
    content = published_content(monkeypatch, hypernetwork)
    monkeypatch.undo()
    content = collections.OrderedDict(
        (name, value.to(dtype) if isinstance(value, torch.Tensor) else value) for name, value in content.items()
    )
    first = pickles.write(tmp_path / "first" / "pytorch_model.bin", _as_stand_ins(content))
    main(["convert", str(first.parent), str(tmp_path / "own")])
    main(["convert", str(tmp_path / "own"), str(tmp_path / "second")])
    assert capsys.readouterr().out.split() == [str(tmp_path / "own"), str(tmp_path / "second" / "pytorch_model.bin")]
    before, after = (pickles.read(tmp_path / name / "pytorch_model.bin") for name in ("first", "second"))
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert after[name].dtype == value.dtype == dtype
            assert after[name].shape == value.shape
            assert torch.equal(after[name].view(torch.uint8), value.view(torch.uint8)), name
    config = read_published(tmp_path / "second")[0]
    assert config == read_published(tmp_path / "first")[0] == load_checkpoint(tmp_path / "own")[0].config
    assert config.encoder_4bit
    assert_same_output(load_checkpoint(tmp_path / "own")[0], build_hypernetwork(*read_published(first)[:2]))


def _as_stand_ins(value):
    """The records of `published_content` as the writer's stand-ins, deep."""
    if isinstance(value, dict):
        return type(value)((key, _as_stand_ins(one)) for key, one in value.items())
    name = f"{type(value).__module__}.{type(value).__name__}"
    if name not in pickles.KNOWN or not hasattr(value, "__dict__"):
        return value
    return pickles.stand_in(name)(**{key: _as_stand_ins(one) for key, one in vars(value).items()})


def test_what_cannot_be_converted_says_why(model, tmp_path, capsys):
    hypernetwork = random_hypernetwork(model, **PUBLISHED_HEADS)
    with pytest.raises(ValueError, match="pass base_model="):
        export(hypernetwork, tmp_path / "x.bin")
    with pytest.raises(ValueError, match="16 heads, 4 of keys, of size 128"):
        export(random_hypernetwork(model), tmp_path / "x.bin", base_model="b")
    with pytest.raises(ValueError, match="how many layers of other/model"):
        export(random_hypernetwork(model, encoder_model="other/model", **PUBLISHED_HEADS), tmp_path / "x.bin", "b")
    own = save_checkpoint(tmp_path / "own", hypernetwork)
    convert(own, tmp_path / "there.bin", base_model="given/base")
    assert read_published(tmp_path / "there.bin")[2] == "given/base"
    with pytest.raises(ValueError, match="from a published file the way leads to a folder"):
        convert(tmp_path / "there.bin", tmp_path / "again.bin")
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "new")])
    assert stopped.value.code == 1 and "no published checkpoint at" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "there.bin"]


def test_the_null_block_round_trips_and_stays_behind_in_the_published_format(model, tmp_path):
    hypernetwork = random_hypernetwork(model, null_rows=2, **PUBLISHED_HEADS)
    save_checkpoint(tmp_path / "folder", hypernetwork)
    loaded, _ = load_checkpoint(tmp_path / "folder")
    assert loaded.config == hypernetwork.config and loaded.config.null_rows == 2
    for (keys, floor), (own_keys, own_floor) in zip(loaded.null().values(), hypernetwork.null().values(), strict=True):
        assert torch.equal(keys, own_keys) and torch.equal(floor, own_floor) and keys.abs().max() > 0
    export(hypernetwork, tmp_path / "pytorch_model.bin", "some/base")
    config, tensors, _ = read_published(tmp_path / "pytorch_model.bin")
    assert config.null_rows == 0 and not [name for name in tensors if "null" in name]
    assert_same_output(build_hypernetwork(config, tensors), hypernetwork)
