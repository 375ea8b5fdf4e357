"""Hypernetworks on disk: this project's folder format, the published `pytorch_model.bin`, and the way between them.

A folder holds `hypernetwork.safetensors` (tensors under their published names) and `config.json`, and no code. The
published file is a pickle; `pickles` reads and writes it without running its code. Both ways keep every bit of every
tensor:

    d2l convert pytorch_model.bin folder
    d2l convert folder pytorch_model.bin
"""

import json
import os
import types
from collections import OrderedDict
from dataclasses import asdict, replace
from glob import escape
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from d2l_lib.formats import pickles
from d2l_lib.formats.pickles import CheckpointError, Record
from d2l_lib.formats.schemas import (
    LONGEST_NAME,
    MOST_LAYERS,
    CheckpointSettings,
    HypernetworkSettings,
    PublishedCheckpoint,
    PublishedEncoder,
    check,
)
from d2l_lib.formats.tensors import check_tensors, read_tensors
from d2l_lib.formats.writing import PRETRAINED_FILES, FolderKind, atomic_file, atomic_folder, check_folder, read_whole
from d2l_lib.hypernetwork import Hypernetwork, HypernetworkConfig
from d2l_lib.pooled_rows import PooledRows
from d2l_lib.records import read_json
from d2l_lib.router import Router, RouterConfig
from d2l_lib.token_rows import TokenRows

__all__ = ["CheckpointError", "convert", "export", "load_checkpoint", "read_published", "save_checkpoint"]

FORMAT = "doc-to-lora hypernetwork"
VERSION = 1
WEIGHTS = "hypernetwork.safetensors"
ROUTER = "router.safetensors"  # beside it, where the settings name a router
SETTINGS = "config.json"
PUBLISHED = "pytorch_model.bin"
PARTS = ("base_model", "encoder_model")  # models that may lie in the folder too
_WRITERS = {"perceiver": Hypernetwork, "token_rows": TokenRows, "pooled_rows": PooledRows}


# ------------------------------------------------------------------------------------------- this project's format


def _written_files(folder: Path) -> list[str]:
    """The files that a folder of this format was written with; [] for other folders.

    A base model or context encoder belongs to them if the settings name none; else somebody put it there. The settings
    list its files; in folders of before, those with usual names count.
    """
    settings = read_json(folder / SETTINGS)
    if settings["format"] != FORMAT:
        return []
    meta = settings["meta"]
    router = [] if meta.get("router") is None else [ROUTER]
    files = []
    for part in [part for part in PARTS if meta.get(part, "") is None]:
        listed = [escape(name) for name in meta.get("files") or () if name.startswith(f"{part}/")]
        files += listed or [f"{part}/{name}" for name in PRETRAINED_FILES]
    return [SETTINGS, WEIGHTS, *router, *files]


MODEL_FOLDER = FolderKind(
    "model folder",
    (SETTINGS, WEIGHTS, ROUTER, *(f"{part}/{name}" for part in PARTS for name in PRETRAINED_FILES)),
    _written_files,
)


def part_in(folder: str | Path, name: str, source: str | None) -> dict[str, Any] | None:
    """{"meta": the new settings' entry for `name`, "files": its files} where `source` is the folder's own `name`/.

    None for any other source.

    folder: of `save_checkpoint`; name: one of PARTS.
    The entry stays as it was, so a model that somebody put there is never taken for a file of this project.
    """
    place = Path(folder) / name
    if source is None or not place.is_dir() or os.path.realpath(source) != os.path.realpath(place):
        return None
    try:
        meta = read_json(Path(folder) / SETTINGS)["meta"]
        return {"meta": meta[name], "files": [file for file in meta.get("files", ()) if file.startswith(f"{name}/")]}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {"meta": source, "files": []}


def save_checkpoint(
    folder: str | Path,
    hypernetwork: Hypernetwork,
    meta: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the hypernetwork and its meta as a folder, completely or not at all.

    folder: a new or empty one, or an earlier one of this format; FileExistsError for others (see `atomic_folder`).
    meta: plain JSON values.
    dtype: the precision on disk (loading gives float32 again); ValueError where a value does not fit into it.
    """
    tensors = _tensors_of(hypernetwork, dtype)
    with atomic_folder(folder, MODEL_FOLDER) as unfinished:
        _write_files(unfinished, hypernetwork.config, tensors, meta)
    return Path(folder)


def write_checkpoint(folder: Path, hypernetwork: Hypernetwork, meta: dict[str, Any]) -> None:
    """Write the files of `save_checkpoint` into an unfinished folder of `atomic_folder`."""
    _write_files(folder, hypernetwork.config, _tensors_of(hypernetwork, None), meta)


def _tensors_of(hypernetwork: Hypernetwork, dtype: torch.dtype | None) -> dict[str, Tensor]:
    # named_parameters lists a shared layer once; loading restores the aliases.
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in hypernetwork.named_parameters()}
    if dtype is not None and (unfit := [name for name, value in tensors.items() if not value.isfinite().all()]):
        raise ValueError(f"{unfit[0]} has values that do not fit into {dtype}: save it without dtype")
    return tensors


def _write_files(
    folder: Path, config: HypernetworkConfig, tensors: dict[str, Tensor], meta: dict[str, Any] | None
) -> None:
    settings = {"format": FORMAT, "version": VERSION, "hypernetwork": config.to_dict(), "meta": meta or {}}
    text = json.dumps(settings, indent=2)
    save_file(tensors, folder / WEIGHTS)
    (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")


def load_checkpoint(folder: str | Path) -> tuple[Hypernetwork, dict[str, Any]]:
    """(hypernetwork in eval mode on the CPU, meta) of a folder that `save_checkpoint` wrote.

    FileNotFoundError names the missing file; CheckpointError says what is damaged.
    """
    config, tensors, meta = read_whole(folder, _read_folder)
    return build_hypernetwork(config, tensors), meta


def _read_folder(folder: Path) -> tuple[HypernetworkConfig, dict[str, Tensor], dict[str, Any]]:
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: give a folder that save_checkpoint wrote")
    path = folder / SETTINGS
    try:
        settings = read_json(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not describe a {FORMAT}")
    version = settings.get("version")
    if type(version) is int and version != VERSION:
        raise CheckpointError(f"{folder} has format version {version}, this code reads {VERSION}")
    check(CheckpointSettings, settings, path, "copy the folder again", CheckpointError)
    config = config_of_settings(settings["hypernetwork"], path)
    return config, read_safetensors(folder / WEIGHTS), dict(settings.get("meta", {}))


def write_router(folder: Path, router: Router) -> dict[str, Any]:
    """Write a router's weights beside a checkpoint's; returns its settings, which belong into the meta as "router"."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in router.state_dict().items()}
    with atomic_file(folder / ROUTER) as unfinished:
        save_file(tensors, unfinished)
    return asdict(router.config)


def read_router(folder: Path, settings: dict[str, Any]) -> Router:
    """The router of these settings in a checkpoint's folder; CheckpointError where a file is damaged or missing."""
    path = folder / ROUTER
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {ROUTER}, which its {SETTINGS} names: copy the folder again")
    state = read_safetensors(path)
    try:
        router = Router(RouterConfig(**settings | {"verdicts": tuple(settings["verdicts"])}))
        router.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit its settings, copy the folder again: {error}") from error
    return router.eval().requires_grad_(False)


def config_of_settings(settings: Any, file: str | Path) -> HypernetworkConfig:
    """The config of the settings that `to_dict` wrote; CheckpointError names `file` and the wrong setting."""
    check(HypernetworkSettings, settings, file, "copy the file again", CheckpointError)
    try:
        return HypernetworkConfig.from_dict(settings)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: hypernetwork: {error}") from error


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The finite floating-point tensors of a safetensors file; CheckpointError for others and for a damaged file."""
    return read_tensors(path, CheckpointError)[0]


def build_hypernetwork(config: HypernetworkConfig, state: dict[str, Tensor]) -> Hypernetwork:
    """A float32 hypernetwork of this config with the tensors of `state`, in eval mode.

    A shared layer may appear once or under all of its names.
    CheckpointError names tensors and shapes that do not fit, before memory of the config's size is allocated.
    """
    hypernetwork = _skeleton(config)
    tensors = _once(hypernetwork, state)
    copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
    hypernetwork.load_state_dict(copies, strict=False, assign=True)
    return hypernetwork.eval()


def _skeleton(config: HypernetworkConfig) -> Hypernetwork:
    """A hypernetwork of names and shapes without memory; CheckpointError for impossible sizes."""
    n_layers = config.n_blocks * (1 + config.n_self_attention_per_block) + config.n_pre_head_layers
    try:
        if n_layers > MOST_LAYERS:
            raise ValueError(f"{n_layers} Perceiver and head layers, {MOST_LAYERS} at most are supported")
        with torch.device("meta"):
            return _WRITERS[config.writer](config)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:LONGEST_NAME]
        raise CheckpointError(f"the settings describe no hypernetwork: {reason}") from error


def _few(names: list[str]) -> list[str]:
    return [name[:LONGEST_NAME] for name in names[:5]]


def _once(skeleton: Hypernetwork, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `state`, each shared layer once; CheckpointError unless names, shapes and shared values fit."""
    own = skeleton.state_dict(keep_vars=True)
    first = {id(parameter): name for name, parameter in skeleton.named_parameters()}
    unknown = sorted(set(state) - set(own))
    missing = sorted(set(first.values()) - set(state))
    if unknown or missing:
        raise CheckpointError(f"tensors do not fit the settings: missing {_few(missing)}, not expected {_few(unknown)}")
    check_tensors(state, "the checkpoint", CheckpointError)
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(f"{name} has shape {list(tensor.shape)}, the settings need {list(own[name].shape)}")
        shared = first[id(own[name])]
        if shared != name and not torch.equal(tensor, state[shared]):
            raise CheckpointError(f"{name} and {shared} are one shared layer, but hold different values")
    return {name: state[name] for name in first.values()}


# ------------------------------------------------------------------------------------------- the published format


def read_published(path: str | Path) -> tuple[HypernetworkConfig, dict[str, Tensor], str]:
    """(config, tensors, base model name) of a checkpoint by the authors' code, read without running its code.

    path: `pytorch_model.bin` or its folder.
    FileNotFoundError for no file. CheckpointError for a pickle that asks for an unknown name (the message has it), a
    damaged file and settings outside this architecture.
    """
    path = Path(path)
    path = path / PUBLISHED if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no published checkpoint at {path}: give the {PUBLISHED} or its folder")
    try:
        return parse_published(pickles.read(path))
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error


def parse_published(content: dict[str, Any]) -> tuple[HypernetworkConfig, dict[str, Tensor], str]:
    """(config, tensors, base model name) of a published checkpoint's content, which stays unchanged."""
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            name = key.replace("_orig_mod.", "")  # of compiled models
            if len(name) > LONGEST_NAME or not name.isprintable():
                raise CheckpointError("a tensor has a name that none in a hypernetwork has")
            if name in tensors:
                raise CheckpointError(f"{name} is there twice, with and without _orig_mod.")
            tensors[name] = value
    try:
        config = _config_of(content)
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"its configuration lacks or misstates a setting ({error})") from error
    if not config.use_bias:  # the published code makes these too and never reads them
        tensors = {name: value for name, value in tensors.items() if not name.startswith(("bias_A.", "bias_B."))}
    return config, tensors, config.base_model


def _config_of(content: dict[str, Any]) -> HypernetworkConfig:
    """The config of the published records; a field that older files lack gets its value of that time."""

    fields = ("base_model_name_or_path", "hypernet_config", "ctx_encoder_args")
    values = types.SimpleNamespace(**{name: content[name] for name in fields if name in content})
    record = check(PublishedCheckpoint, values, "its configuration", "copy it again", CheckpointError)
    hypernet, encoder = record.hypernet_config, record.ctx_encoder_args or PublishedEncoder()
    aggregator, lora = hypernet.aggregator_config, hypernet.lora_config
    if aggregator.aggregator_type != "perceiver":
        raise CheckpointError(f"aggregator {aggregator.aggregator_type[:40]!r} is not supported, only 'perceiver'")
    if not hypernet.per_rank_gen:
        raise CheckpointError("per_rank_gen is off: the published code cannot run such a hypernetwork, nor can this")
    if hypernet.extra_modules:
        raise CheckpointError(f"extra_modules are not supported, this checkpoint has {len(hypernet.extra_modules)}")
    n_layers = aggregator.num_layers
    indices = getattr(content["hypernet_config"], "layer_indices", torch.arange(0))
    if not isinstance(indices, Tensor) or (indices.numel() and indices.tolist() != list(range(n_layers))):
        raise CheckpointError(f"layer_indices are not all of the {n_layers} layers, which is not supported")
    encoder_type = encoder.ctx_encoder_type or "early_exit"
    per_layer = encoder_type == "per_layer_activations"
    d_in, d_out = hypernet.feature_sizes
    return HypernetworkConfig(
        n_layers=n_layers,
        d_in=dict(d_in),
        d_out=dict(d_out),
        feature_size=aggregator.feature_size,
        latent_size=hypernet.latent_size,
        rank=lora.r,
        scale=lora.lora_alpha,
        encoder_type=encoder_type,
        encoder_layer=encoder.ctx_encoder_last_layer if per_layer else encoder.layer_idx,
        n_latent_queries=aggregator.n_latent_queries,
        n_blocks=aggregator.num_blocks,
        n_self_attention_per_block=aggregator.num_self_attn_per_block,
        shared_weights=aggregator.shared_weights,
        per_layer_processing=hypernet.per_layer_processing,
        n_pre_head_layers=4 if hypernet.num_pre_head_layers is None else hypernet.num_pre_head_layers,
        use_bias=hypernet.use_bias is not False,
        dropout=hypernet.dropout_rate or 0.0,
        base_model=record.base_model_name_or_path,
        encoder_model=encoder.ctx_encoder_model_name_or_path,
        encoder_4bit=bool(encoder.quantize_ctx_encoder),
    )


# The other fields of LoraConfig in peft 0.17: its defaults, without effect here.
_LORA_REST: dict[str, Any] = {
    "exclude_modules": None,
    "lora_alpha": None,  # replaced; this keeps its place in the order
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,
    "bias": "none",
    "use_rslora": False,
    "modules_to_save": None,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "trainable_token_indices": None,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "use_dora": False,
    "use_qalora": False,
    "qalora_group_size": 16,
    "layer_replication": None,
}


def export(hypernetwork: Hypernetwork, path: str | Path, base_model: str | None = None) -> Path:
    """Write a checkpoint that the authors' code opens, with their class names and every tensor name that it expects.

    base_model: the name or path that their code loads (None: the config's).

    Settings without effect get their defaults. Without a bias block the bias tensors that their code expects are zeros.
    The null block of sparse reading stays behind: their code reads the sum.
    ValueError without a base model, and for a hypernetwork that their code cannot build.
    """
    tensors = {name: value.detach().cpu() for name, value in hypernetwork.named_parameters()}
    return _write_published(path, hypernetwork.config, tensors, base_model)


def _write_published(
    path: str | Path, config: HypernetworkConfig, tensors: dict[str, Tensor], base_model: str | None
) -> Path:
    base_model, config = base_model or config.base_model, replace(config, null_rows=0)
    if config.writer != "perceiver" or config.encoder_layers:
        raise ValueError("the published code has no token rows and reads no hidden states of several layers")
    if not base_model:
        raise ValueError("the published format stores the base model's name or path: pass base_model=")
    if (heads := (config.n_heads, config.n_kv_heads, config.head_dim)) != (16, 4, 128):
        raise ValueError(f"the published code has 16 heads, 4 of keys, of size 128 and no others; this one has {heads}")
    skeleton = _skeleton(config)
    first = {id(parameter): name for name, parameter in skeleton.named_parameters()}
    content: OrderedDict[str, Any] = OrderedDict()
    for name, parameter in skeleton.state_dict(keep_vars=True).items():
        tensor = tensors[first[id(parameter)]]
        if tensor.untyped_storage().nbytes() != tensor.nbytes:  # a view would bring its whole storage along
            tensor = tensors[first[id(parameter)]] = tensor.clone()
        content[name] = tensor.detach()  # shares memory, as in a shared layer's state_dict
    if not config.use_bias:
        for letter, sizes in (("A", config.d_in), ("B", config.d_out)):
            for module, size in sizes.items():
                content[f"bias_{letter}.{module}"] = torch.zeros(config.n_layers, config.rank, size)
    content["base_model_name_or_path"] = base_model
    content["hypernet_config"] = _hypernet_record(config, base_model)
    content["ctx_encoder_args"] = _encoder_record(config)
    return pickles.write(path, content)


def _hypernet_record(config: HypernetworkConfig, base_model: str) -> Record:
    """The published HypernetConfig of a config."""
    aggregator = pickles.stand_in("ctx_to_lora.modeling.aggregator.AggregatorConfig")(
        aggregator_type="perceiver",
        num_layers=config.n_layers,
        num_modules=len(config.modules),
        num_extra_modules=0,
        output_size=config.latent_size,
        feature_size=config.feature_size,
        pooling_type="mean",
        num_latent_factor=8,
        lora_r=config.rank,
        per_rank_gen=True,
        n_latent_queries=config.n_latent_queries,
        num_blocks=config.n_blocks,
        num_self_attn_per_block=config.n_self_attention_per_block,
        shared_weights=config.shared_weights,
        layer_to_layer_ctx_encoder=config.layer_to_layer,
    )
    lora = pickles.stand_in("peft.tuners.lora.config.LoraConfig")(
        task_type="CAUSAL_LM",
        peft_type=pickles.stand_in("peft.utils.peft_types.PeftType")("LORA"),
        auto_mapping=None,
        base_model_name_or_path=base_model,
        revision=None,
        inference_mode=False,
        r=config.rank,
        target_modules=set(config.modules),
        **_LORA_REST | {"lora_alpha": float(config.scale)},
        runtime_config=pickles.stand_in("peft.tuners.lora.config.LoraRuntimeConfig")(ephemeral_gpu_offload=False),
        lora_bias=False,
        target_parameters=None,
        _custom_modules=None,
    )
    return pickles.stand_in("ctx_to_lora.modeling.hypernet.HypernetConfig")(
        latent_size=config.latent_size,
        use_light_weight_lora=False,
        light_weight_latent_size=128,
        per_rank_gen=True,
        use_per_rank_bias=False,
        use_bias=config.use_bias,
        per_layer_processing=config.per_layer_processing,
        use_token_mixing=False,
        num_pre_head_layers=config.n_pre_head_layers,
        dropout_rate=float(config.dropout),
        lora_config=lora,
        extra_modules=None,
        base_hidden_size=_base_hidden_size(config),
        layer_indices=torch.arange(config.n_layers),
        feature_sizes=(dict(config.d_in), dict(config.d_out)),
        aggregator_config=aggregator,
    )


def _base_hidden_size(config: HypernetworkConfig) -> int:
    """Size of the base model's hidden states, from its target modules, else the encoder's feature size."""
    for module in config.modules:
        if module in ("down_proj", "o_proj"):
            return config.d_out[module]
        if module in ("gate_proj", "up_proj", "q_proj", "k_proj", "v_proj"):
            return config.d_in[module]
    return config.feature_size


def _encoder_record(config: HypernetworkConfig) -> Record:
    """The published CtxEncoderArguments of a config; without an encoder layer it stores a quarter of the layers."""
    if config.encoder_layer is None and config.encoder_type == "early_exit" and config.encoder_model:
        raise ValueError(f"the published format stores how many layers of {config.encoder_model} are read: set them")
    stored = None if config.layer_to_layer else config.encoder_layer
    return pickles.stand_in("ctx_to_lora.configs.CtxEncoderArguments")(
        ctx_encoder_model_name_or_path=config.encoder_model,
        ctx_encoder_type=config.encoder_type,
        layer_idx=max(1, config.n_layers // 4) if stored is None else stored,
        quantize_ctx_encoder=config.encoder_4bit,
        ctx_encoder_last_layer=config.encoder_layer if config.layer_to_layer else None,
    )


# ------------------------------------------------------------------------------------------- the way between them


def convert(source: str | Path, target: str | Path, base_model: str | None = None) -> Path:
    """Convert a published file to a folder of this project's format, or such a folder to a published file.

    source: `pytorch_model.bin`, a folder with it, or a folder of this project's format.
    target: a folder, or for the way back a file (or a folder for `pytorch_model.bin`). An earlier output is replaced.
    base_model: stored in place of the source's name.

    Returns the path of the output. Tensors keep their bits and precision. FileExistsError for any other file and for a
    folder with other files, also the source's.
    """
    source, target = Path(source), Path(target)
    if (source / WEIGHTS).is_file():
        path = target if target.suffix == ".bin" else target / PUBLISHED
        pickles.check_file(path)
        config, tensors, meta = read_whole(source, _read_folder)
        tensors = _once(_skeleton(config), tensors)
        return _write_published(path, config, tensors, base_model or meta.get("base_model"))
    if target.suffix == ".bin":
        raise ValueError(f"{source} is not a folder with {WEIGHTS}; from a published file the way leads to a folder")
    check_folder(target, MODEL_FOLDER)
    config, tensors, stored = read_published(source)
    tensors = {name: tensor.contiguous() for name, tensor in _once(_skeleton(config), tensors).items()}
    with atomic_folder(target, MODEL_FOLDER) as unfinished:
        _write_files(unfinished, config, tensors, {"base_model": base_model or stored})
    return target
