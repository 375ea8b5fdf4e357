"""Hypernetworks on disk: this project's folder format, and a restricted reader of the published pickles.

A folder holds `hypernetwork.safetensors` (tensors under their published names) and `config.json`: nothing in it is
code. The published `pytorch_model.bin` is a pickle; it is opened with PyTorch's restricted unpickler, which knows the
classes listed below as plain attribute holders and refuses every other name.
"""

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2l_lib.hypernetwork import Hypernetwork, HypernetworkConfig
from d2l_lib.records import atomic_folder

FORMAT = "doc-to-lora hypernetwork"
VERSION = 1
WEIGHTS = "hypernetwork.safetensors"
SETTINGS = "config.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, with what is wrong with it and what to do."""


# ------------------------------------------------------------------------------------------- this project's format


def save_checkpoint(
    folder: str | Path,
    hypernetwork: Hypernetwork,
    meta: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the hypernetwork and `meta` (plain JSON values) as a folder; it appears complete or not at all.

    `dtype`: round to this precision on disk (loading makes float32 of it again); ValueError where a value does not
    fit into it.
    """
    settings = {
        "format": FORMAT,
        "version": VERSION,
        "hypernetwork": hypernetwork.config.to_dict(),
        "meta": meta or {},
    }
    text = json.dumps(settings, indent=2)
    # named_parameters lists a shared layer once; loading restores the aliases.
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in hypernetwork.named_parameters()}
    if dtype is not None and (unfit := [name for name, value in tensors.items() if not value.isfinite().all()]):
        raise ValueError(f"{unfit[0]} has values that do not fit into {dtype}: save it without dtype")
    with atomic_folder(folder) as unfinished:
        save_file(tensors, unfinished / WEIGHTS)
        (unfinished / SETTINGS).write_text(text + "\n", encoding="utf-8")
    return Path(folder)


def load_checkpoint(folder: str | Path) -> tuple[Hypernetwork, dict[str, Any]]:
    """(hypernetwork in eval mode on the CPU, meta) of a folder that `save_checkpoint` wrote.

    FileNotFoundError names the missing file; CheckpointError says what is wrong with a damaged one.
    """
    folder = Path(folder)
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: give a folder that save_checkpoint wrote")
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / SETTINGS} is not valid JSON ({error}): copy the folder again") from error
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise CheckpointError(f"{folder / SETTINGS} does not describe a {FORMAT}")
    if settings.get("version") != VERSION:
        raise CheckpointError(f"{folder} has format version {settings.get('version')}, this code reads {VERSION}")
    try:
        config = HypernetworkConfig.from_dict(settings["hypernetwork"])
        meta = dict(settings.get("meta", {}))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / SETTINGS}: {error}") from error
    return build_hypernetwork(config, read_safetensors(folder / WEIGHTS)), meta


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; CheckpointError for a damaged one."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({error}): copy it again") from error


def build_hypernetwork(config: HypernetworkConfig, state: dict[str, Tensor]) -> Hypernetwork:
    """A hypernetwork of this config with the tensors of `state`, in eval mode.

    Each shared layer may appear once or under all of its names. CheckpointError lists names and shapes that do not
    belong together.
    """
    hypernetwork = Hypernetwork(config)
    own = hypernetwork.state_dict()
    required = dict(hypernetwork.named_parameters())
    unknown = sorted(set(state) - set(own))
    missing = sorted(set(required) - set(state))
    if unknown or missing:
        raise CheckpointError(f"tensors do not fit the settings: missing {missing[:5]}, not expected {unknown[:5]}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(f"{name} has shape {list(tensor.shape)}, the settings need {list(own[name].shape)}")
    hypernetwork.load_state_dict(state, strict=False)
    return hypernetwork.eval()


# ------------------------------------------------------------------------------------------- the published format


class _Record:
    """Stands in for a configuration class of the published code: attributes only."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class _Name(str):
    """Stands in for an enumeration whose values are strings."""


def _class(name: str, base: type) -> type:
    return type(name, (base,), {})


# Older files name the configuration classes in the module that came before the package was split.
_KNOWN_GLOBALS = {
    "ctx_to_lora.configs.CtxEncoderArguments": _Record,
    "ctx_to_lora.modeling.hypernet.HypernetConfig": _Record,
    "ctx_to_lora.modeling.aggregator.AggregatorConfig": _Record,
    "ctx_to_lora.modeling_utils.CtxEncoderArguments": _Record,
    "ctx_to_lora.modeling_utils.HypernetConfig": _Record,
    "ctx_to_lora.modeling_utils.AggregatorConfig": _Record,
    "peft.tuners.lora.config.LoraConfig": _Record,
    "peft.tuners.lora.config.LoraRuntimeConfig": _Record,
    "peft.utils.peft_types.PeftType": _Name,
}
_STAND_INS = [(_class(name.rpartition(".")[2], base), name) for name, base in _KNOWN_GLOBALS.items()]
# What PyTorch raises for cut, empty or scrambled files.
DAMAGE = (RuntimeError, EOFError, OSError, zipfile.BadZipFile, LookupError, ValueError, TypeError, AttributeError)
_RECORDS = ("base_model_name_or_path", "hypernet_config", "ctx_encoder_args")


def read_published(path: str | Path) -> tuple[HypernetworkConfig, dict[str, Tensor], str]:
    """(config, tensors, base model name) of a checkpoint that the authors' code saved.

    path: `pytorch_model.bin` or the folder that holds it. Nothing in the file is executed: a pickle that asks for any
    name outside the known ones is refused, naming it. CheckpointError for that, for a damaged file and for settings
    that this architecture does not have.
    """
    path = Path(path)
    path = path / "pytorch_model.bin" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no published checkpoint at {path}: give the pytorch_model.bin or its folder")
    content = _unpickle(path)
    if not isinstance(content, dict) or any(name not in content for name in _RECORDS[:2]):
        raise CheckpointError(f"{path} is not a Doc-to-LoRA checkpoint: it lacks {' and '.join(_RECORDS[:2])}")
    tensors = {
        str(name).replace("_orig_mod.", ""): value for name, value in content.items() if isinstance(value, Tensor)
    }
    try:
        config = _config_of(content)
    except CheckpointError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its configuration lacks or misstates a setting ({error})") from error
    if not config.use_bias:
        tensors = {name: value for name, value in tensors.items() if not name.startswith(("bias_A.", "bias_B."))}
    return config, tensors, str(content["base_model_name_or_path"])


def _unpickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise CheckpointError(
                f"{path} asks for {refused.group(1)}, which no Doc-to-LoRA checkpoint needs: not opened"
            ) from error
        raise CheckpointError(f"{path} is not a readable checkpoint ({str(error).splitlines()[0]})") from error
    except DAMAGE as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({first}): copy it again") from error


def _config_of(content: dict[str, Any]) -> HypernetworkConfig:
    """Our config from the published records; fields that older files lack get the value they had then."""
    hypernet = content["hypernet_config"]
    aggregator, lora = hypernet.aggregator_config, hypernet.lora_config
    encoder = content.get("ctx_encoder_args")
    if aggregator.aggregator_type != "perceiver":
        raise CheckpointError(f"aggregator {aggregator.aggregator_type!r} is not supported, only 'perceiver'")
    if not hypernet.per_rank_gen:
        raise CheckpointError("per_rank_gen is off: the published code cannot run such a hypernetwork, nor can this")
    if getattr(hypernet, "extra_modules", None):
        raise CheckpointError(f"extra_modules {hypernet.extra_modules} are not supported")
    encoder_type = getattr(encoder, "ctx_encoder_type", "early_exit")
    layer_field = "ctx_encoder_last_layer" if encoder_type == "per_layer_activations" else "layer_idx"
    d_in, d_out = hypernet.feature_sizes
    return HypernetworkConfig(
        n_layers=int(aggregator.num_layers),
        d_in={name: int(size) for name, size in d_in.items()},
        d_out={name: int(size) for name, size in d_out.items()},
        feature_size=int(aggregator.feature_size),
        latent_size=int(hypernet.latent_size),
        rank=int(lora.r),
        scale=float(lora.lora_alpha),
        encoder_type=encoder_type,
        encoder_layer=getattr(encoder, layer_field, None),
        n_latent_queries=int(aggregator.n_latent_queries),
        n_blocks=int(aggregator.num_blocks),
        n_self_attention_per_block=int(aggregator.num_self_attn_per_block),
        shared_weights=bool(aggregator.shared_weights),
        per_layer_processing=bool(hypernet.per_layer_processing),
        n_pre_head_layers=int(getattr(hypernet, "num_pre_head_layers", 4)),
        use_bias=bool(getattr(hypernet, "use_bias", True)),
        dropout=float(getattr(hypernet, "dropout_rate", 0.0)),
        base_model=str(content["base_model_name_or_path"]),
        encoder_model=getattr(encoder, "ctx_encoder_model_name_or_path", None),
    )
