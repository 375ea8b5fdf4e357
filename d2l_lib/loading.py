"""Find a checkpoint, load the models that it names, and put them together.

source -> find_checkpoint -> (hypernetwork, meta) -> assemble -> DocToLoRA
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from d2l_lib.adapter import Adapter
from d2l_lib.base_model import base_model_names, bundled_path, check_place, input_device, load_base_model
from d2l_lib.encoder import ContextEncoder
from d2l_lib.formats.checkpoints import WEIGHTS, build_hypernetwork, load_checkpoint, read_published, read_router
from d2l_lib.formats.hub import BASE_MODEL_FILES, checkpoint_in, from_hub
from d2l_lib.formats.writing import read_whole
from d2l_lib.hypernetwork import Hypernetwork, HypernetworkConfig
from d2l_lib.model import DocToLoRA
from d2l_lib.reading import Reading
from d2l_lib.router import Router
from d2l_lib.routing import Gate
from d2l_lib.row_reading import RowReading


@dataclass(frozen=True)
class Choices:
    """The options of `load` for the models of a checkpoint; None leaves the choice to the checkpoint."""

    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    base_model: str | Path | None = None
    encoder_model: str | Path | None = None
    device_map: str | Mapping[str, int | str] | None = None

    def __post_init__(self):
        check_place(self.device, self.dtype, self.device_map)
        for name in ("base_model", "encoder_model"):
            one = getattr(self, name)
            if one is not None and not isinstance(one, (str, Path)):
                raise TypeError(f"{name} must be a name, a path or None, not {type(one).__name__}")


def load(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    base_model: str | Path | None = None,
    encoder_model: str | Path | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
) -> DocToLoRA:
    """The model at `source`, ready to internalize and answer.

    source: one of
        - a bundled name: "tiny", or "tiny/<name>" for another hypernetwork of it; "smollm2", a real language model,
          whose base model is prepared once (about 20 seconds, 0.5 GB in .cache),
        - a folder that `model.save` wrote,
        - a published checkpoint: `*.bin`, or a folder with one (of several steps the latest, with a warning),
        - a hub id: "owner/name", or "owner/name/folder/in/it"; the published ones are SakanaAI/doc-to-lora/gemma_demo,
          .../gemma_2b_d2l, .../mistral_7b_d2l and .../qwen_4b_d2l.
    device: None picks CUDA, MPS or CPU.
    dtype: of the base model (None: bfloat16 on CUDA, else float32).
    base_model, encoder_model: names or paths in place of the checkpoint's. Without them, folders base_model/ and
        encoder_model/ beside the checkpoint replace its names.
    device_map: instead of device, spreads the base model over several devices (see load_base_model); a word ("auto")
        also spreads a separate context encoder.

    A 4-bit context encoder runs in 4 bits on CUDA with bitsandbytes, elsewhere in full precision with a warning.
    Code from a checkpoint or base model is never run. FileNotFoundError says what is missing and where to put it.
    ValueError for a damaged checkpoint, a checkpoint for another base model, a base model that needs code of its own,
    and a device that is not here.
    """
    choices = Choices(device, dtype, base_model, encoder_model, device_map)
    place = find_checkpoint(source)
    if place.is_file():
        config, tensors, stored = read_published(place)
        return assemble(build_hypernetwork(config, tensors), {"base_model": stored}, choices, folder=place.parent)
    return read_whole(place, lambda folder: assemble(*load_checkpoint(folder), choices, folder=folder))


def assemble(
    hypernetwork: Hypernetwork,
    meta: dict[str, Any],
    choices: Choices,
    *,
    kind: type[DocToLoRA] = DocToLoRA,
    folder: Path | None = None,
) -> DocToLoRA:
    """A model of this `kind`: the hypernetwork with its base model and context encoder.

    meta: the checkpoint's facts beside the config.
    folder: where base_model/ and encoder_model/ may lie.

    Raises as `load` does.
    """
    config, dtype, device_map = hypernetwork.config, choices.dtype, choices.device_map
    base_source = _base_source(folder, meta, config, choices.base_model)
    encoder_source = _encoder_source(folder, meta, config, choices.encoder_model)
    network, tokenizer = _load_for(base_source, device=choices.device, dtype=dtype, device_map=device_map)
    place_of_base = input_device(network)
    four_bit = config.encoder_4bit and _can_quantize(place_of_base)
    if four_bit and encoder_source is None:
        encoder_source = base_source
    encoder, encoder_tokenizer = None, None
    if encoder_source is not None:
        where = {"device_map": device_map} if isinstance(device_map, str) else {"device": place_of_base}
        encoder_network, encoder_tokenizer = _load_for(encoder_source, dtype=dtype, four_bit=four_bit, **where)
        encoder = ContextEncoder.from_config(encoder_network, config, source=encoder_source)
    return kind(
        network,
        tokenizer,
        hypernetwork.to(place_of_base).eval().requires_grad_(False),
        chunk_tokens=meta.get("chunk_tokens"),
        least_relevance=meta.get("least_relevance", -math.inf),
        gate=_gate_of(meta),
        router=_router_of(meta, hypernetwork, folder),
        reading=_reading_of(meta),
        block_dtype=getattr(torch, meta["block_dtype"]) if meta.get("block_dtype") else None,
        base_source=base_source,
        encoder=encoder,
        encoder_tokenizer=encoder_tokenizer,
    )


def _load_for(source: str, **options: Any):
    """`load_base_model`; the error for a missing hub model also says where to put it."""
    try:
        return load_base_model(source, **options)
    except FileNotFoundError as error:
        if source.count("/") != 1 or source.startswith(("/", ".", "~")):
            raise  # not the id of a hub model
        raise FileNotFoundError(
            f"{error} Where the hub is not reached, put {BASE_MODEL_FILES} of {source} into {Path.cwd() / source}, or "
            "anywhere and pass base_model="
        ) from error


def _can_quantize(device: torch.device) -> bool:
    """Whether a context encoder can run in 4-bit precision here; warns where it cannot."""
    if device.type == "cuda" and find_spec("bitsandbytes") is not None:
        return True
    missing = "bitsandbytes is not installed" if device.type == "cuda" else f"this is {device.type}, not CUDA"
    warnings.warn(
        "the context encoder of this checkpoint was trained in 4-bit precision; here it runs in full precision "
        f"({missing}), so the adapters are not quite those of the 4-bit one",
        stacklevel=4,
    )
    return False


def _gate_of(meta: dict) -> Gate | None:
    """The gate in a checkpoint's meta, if any; ValueError where it is damaged."""
    named = meta.get("gate")
    try:
        return None if named is None else Gate(float(named["known"]), float(named["growth"]), str(named["refusal"]))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"this checkpoint's gate is damaged ({named!r}): it needs known, growth and refusal"
        ) from error


def _router_of(meta: dict, hypernetwork: Hypernetwork, folder: Path | None) -> Router | None:
    """The router of a checkpoint, if any; ValueError where it is damaged or does not fit the hypernetwork."""
    if (named := meta.get("router")) is None:
        return None
    if folder is None:
        raise ValueError("this checkpoint names a router, whose weights lie in its folder: load that")
    router, config, null = read_router(folder, named), hypernetwork.config, hypernetwork.null()
    sizes = (config.n_layers, config.rank, *config.d_out.values())
    if null is None or (router.config.n_layers, router.config.rank, router.config.d_out) != sizes:
        raise ValueError(f"this checkpoint's router ({named!r}) is of other blocks than its hypernetwork writes")
    return router


def _reading_of(meta: dict) -> Reading | RowReading | None:
    """The sparse reading in a checkpoint's meta, if any; ValueError where it is damaged."""
    named = meta.get("row_reading")
    try:
        if named is not None:
            return RowReading(**named)
    except (TypeError, ValueError) as error:
        raise ValueError(f"this checkpoint's row_reading is damaged ({named!r}): {error}") from error
    named = meta.get("reading")
    try:
        if named is None:
            return None
        return Reading(**{name: tuple(value) if isinstance(value, list) else value for name, value in named.items()})
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"this checkpoint's reading is damaged ({named!r}): {error}") from error


def _base_source(folder: Path | None, meta: dict, config: HypernetworkConfig, base_model: str | Path | None) -> str:
    """The base model to load: the caller's, else the one in the folder, else the one that the checkpoint names."""
    if base_model is not None:
        chosen = str(base_model)
    elif folder is not None and (folder / "base_model").is_dir():
        chosen = str(folder / "base_model")
    else:
        chosen = meta.get("base_model") or config.base_model
    if not chosen:
        raise ValueError(f"{folder or 'the checkpoint'} does not name its base model: pass base_model=")
    return _lasting(chosen)


def _encoder_source(
    folder: Path | None, meta: dict, config: HypernetworkConfig, encoder_model: str | Path | None
) -> str | None:
    """The context encoder to load, chosen as in `_base_source`; None where it is the base model."""
    if encoder_model is not None:
        return _lasting(str(encoder_model))
    if folder is not None and (folder / "encoder_model").is_dir():
        return _lasting(str(folder / "encoder_model"))
    named = meta.get("encoder_model") or config.encoder_model
    return None if not named or named == config.base_model else _lasting(named)


def _lasting(chosen: str) -> str:
    """A model's name unchanged, a folder as an absolute path."""
    is_known = chosen in base_model_names()  # even beside a folder of that name
    return chosen if is_known or not Path(chosen).is_dir() else str(Path(chosen).resolve())


def find_checkpoint(source: str | Path) -> Path:
    """The checkpoint file or folder of `source` (see `load`); FileNotFoundError says what may be named."""
    if not isinstance(source, (str, Path)):
        raise TypeError(f"source must be a name or path, not {source!r}")
    if not str(source).strip():
        raise ValueError(f"the source of a model must be a name or path, not {source!r}")
    bundle, _, name = str(source).partition("/")
    bundled = bundled_path(bundle)
    if bundled.is_dir() and bundle not in ("", ".", ".."):
        folder = bundled / (name or "hypernetwork")
        if _is_checkpoint(folder):
            return folder
        if not Path(source).exists():
            names = sorted(path.name for path in bundled.iterdir() if _is_checkpoint(path))
            raise FileNotFoundError(
                f"no hypernetwork at {folder}; bundled with {bundle!r}: {', '.join(names) or 'none yet'} "
                f"(load them as '{bundle}/<name>')"
            )
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return checkpoint_in(path)
    may_be_hub_id = "/" in str(source) and not str(source).startswith(("/", ".", "~"))
    if may_be_hub_id and not isinstance(source, Path):
        return from_hub(str(source))
    known = ", ".join(name for name in base_model_names() if _is_checkpoint(bundled_path(name) / "hypernetwork"))
    raise FileNotFoundError(
        f"nothing at {str(source)!r}: give a bundled name ({known or 'none here'}), a folder that model.save wrote, "
        "a published checkpoint (*.bin), or a hub id owner/name"
    )


def reading_lora_folder(model: DocToLoRA) -> Path:
    """Where the bundled reading LoRA of this base model would be (see `reading_lora`)."""
    return bundled_path(model.base_source or "") / "reading_lora"


def reading_lora(model: DocToLoRA) -> Adapter:
    """The bundled LoRA with which this base model answers from its prompt; FileNotFoundError without one."""
    return Adapter.from_peft(reading_lora_folder(model), model)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file()
