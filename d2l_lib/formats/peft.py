"""Adapters that leave and adapters that come in: PEFT folders, and weights with an adapter in them.

    W x + s * sum over blocks of weight * B^T (A x)
    PEFT:    lora_A = rows of weight * A,   lora_B = s * B^T,   lora_alpha = r, so that alpha / r = 1
    merged:  W + s * sum over blocks of weight * B^T A

What leaves is one sum: no document can be taken out of an export or added to it. Keep the adapter's own file
(`adapter.save`), change that (`without`, `+`, `scaled`) and export again.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import regex  # as `re`, with a limit of time
import torch
from torch import Tensor, nn

from d2l_lib.base_model import decoder_layers, target_linears
from d2l_lib.documents import check_count
from d2l_lib.formats.schemas import ExportRecord, PeftConfig, check, shown
from d2l_lib.formats.tensors import read_tensors, safetensors_metadata, write_tensors
from d2l_lib.formats.writing import FolderKind, atomic_folder, check_folder, read_whole
from d2l_lib.lora import is_applied
from d2l_lib.records import parse_json, read_json, write_json

if TYPE_CHECKING:
    from d2l_lib.adapter import Adapter
    from d2l_lib.model import DocToLoRA

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_RECORD, _RECORD_VERSION = "d2l-export", 1  # in the header of the weights: what was exported
_PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
_LOADERS = ("peft", "vllm", "llama.cpp")
# What every vLLM accepts as --max-lora-rank (vllm/config/lora.py, MaxLoRARanks; 1 is a later addition).
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Linears of decoder layers that vLLM and llama.cpp know under these names; both pack or split q, k, v and gate, up.
_SERVED_MODULES = frozenset(
    "q_proj k_proj v_proj o_proj qkv_proj dense gate_proj up_proj gate_up_proj down_proj fc1 fc2".split()
)
_KEY = re.compile(r"base_model\.model\.(?P<path>[A-Za-z0-9_.]{1,1000})\.lora_(?P<side>[AB])\.weight")
_IN_LAYER = re.compile(r"(?P<before>.*?)\.(?P<layer>[0-9]{1,3})\.(?P<after>.+)")  # at most MOST_LAYERS of them
_MOST_EMPTY = 100  # layers without a LoRA for each one with, before a base model is asked for
_PATIENCE = 0.5  # seconds for one pattern of a configuration on one path
# What a plain LoRA may set in adapter_config.json; anything else that is set changes what the adapter computes.
_PLAIN = frozenset(
    "auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config exclude_modules "
    "fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform lora_alpha lora_dropout "
    "lora_ga_config loftq_config megatron_config megatron_core peft_type peft_version qalora_group_size r "
    "rank_pattern alpha_pattern revision runtime_config target_modules task_type use_rslora".split()
)
# Ways to begin a training that also change the base model's weights.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


def _written_files(folder: Path) -> tuple[str, ...]:
    """The files of an earlier export; () for any other folder."""
    is_ours = read_json(folder / _CONFIG)["peft_type"] == "LORA" and _RECORD in safetensors_metadata(folder / _WEIGHTS)
    return (_CONFIG, _WEIGHTS) if is_ours else ()


_EXPORT_FOLDER = FolderKind("export of an adapter", (_CONFIG, _WEIGHTS), _written_files)
_Pairs = dict[str, tuple[Tensor, Tensor]]  # {path of a linear: (lora_A [r, d_in], lora_B [d_out, r])}
_Places = dict[tuple[int, str], str]  # {(layer, module): path of a linear}


# ---------------------------------------------------------------------------------------------------------- to a folder
def export_peft(
    adapter: Adapter,
    folder: str | Path,
    *,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    loader: str | None = None,
) -> Path:
    """Write a PEFT LoRA folder: adapter_model.safetensors and adapter_config.json; complete or not there at all.

    The sum of all blocks with the bias is one LoRA in every target linear: loaded with PeftModel.from_pretrained it
    gives this adapter's logits. Writing it does not need peft. The same adapter is the same bytes each time.

    folder: a new or empty one, or an earlier export, which is replaced; FileExistsError names the files of any other.
    rank: at most so many rows, see `Adapter.compressed` (None: all of them, nothing is lost).
    dtype: float32, bfloat16 or float16 (None: the adapter's own).
    loader: "peft", "vllm" or "llama.cpp": ValueError, and no folder, where it could not load it (see `check_export`).

    What rank and dtype lose is measured and kept in the folder: see `export_errors`. Documents cannot be taken out of
    the folder or added to it: keep the adapter (`save`), change that, export again.
    """
    if adapter.rank == 0:
        raise ValueError("this adapter is empty: there is nothing to export")
    check_folder(folder, _EXPORT_FOLDER)
    if rank is not None:
        check_count(rank, "rank")
    if dtype is not None and dtype not in _PRECISIONS:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _PRECISIONS))}, not {dtype!r}")
    if loader is not None:
        _check_loader(loader)
    written = adapter if rank is None or rank >= adapter.rank else adapter.compressed(rank)
    tensors: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    for module in adapter.modules:
        A, B, norms[module] = _stored(adapter, written, module, dtype)
        for layer in adapter.layers:
            path = f"base_model.model.{adapter.path_of(module).replace('{layer}', str(layer))}"
            tensors[f"{path}.lora_A.weight"] = A[layer].detach().cpu().contiguous().clone()  # [r, d_in]
            tensors[f"{path}.lora_B.weight"] = B[layer].detach().cpu().mT.contiguous()  # [d_out, r]
    record = json.dumps(_record_of(adapter, norms), ensure_ascii=False, allow_nan=False)
    with atomic_folder(folder, _EXPORT_FOLDER) as temporary:
        write_tensors(temporary / _WEIGHTS, tensors, {"format": "pt", _RECORD: record})
        write_json(temporary / _CONFIG, _config_of(adapter, written.rank))
        if loader is not None and not (verdict := check_export(temporary, loader)):
            raise ValueError(f"nothing was written, for {loader} could not load it: {'; '.join(verdict.problems)}")
    return Path(folder)


def _stored(
    adapter: Adapter, written: Adapter, module: str, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(A, s * B in the precision of the file, norms [L, 2] of the update and of what is lost of it)."""
    A, B = written.factors(module)
    precision = A.dtype if dtype is None else dtype
    is_exact = written is adapter and precision == torch.promote_types(A.dtype, torch.float32)
    B = B.to(torch.promote_types(B.dtype, torch.float32)) * adapter.scale
    A, B = (_rounded(factor, precision, module) for factor in (A, B))
    return A, B, torch.zeros(adapter.n_layers, 2) if is_exact else _norms(adapter, module, A, B)


def _config_of(adapter: Adapter, rank: int) -> dict[str, Any]:
    """adapter_config.json: a plain LoRA whose alpha / r is 1."""
    targets, whole = _target_modules(adapter), len(adapter.layers) == adapter.n_layers
    # a pattern names the layers itself, and PEFT takes no list of layers beside one
    some = {} if whole or isinstance(targets, str) else {"layers_to_transform": list(adapter.layers)}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": targets,
        **some,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }


def _record_of(adapter: Adapter, norms: Mapping[str, Tensor]) -> dict[str, Any]:
    """What was exported, and what was lost of it: the record in the header of the weights."""
    return {
        "version": _RECORD_VERSION,
        "documents": adapter.documents,
        "bias": adapter.bias_inside or (adapter.bias is not None and adapter.bias_weight != 0),
        "n_layers": adapter.n_layers,
        "base_key": adapter.base_key,
        "hypernetwork_key": adapter.hypernetwork_key,
        "rank": adapter.rank,
        "error": _share(torch.cat([*norms.values()]).norm(dim=0)),
        "errors": {module: [_share(pair) for pair in pairs] for module, pairs in norms.items()},
    }


def _target_modules(adapter: Adapter) -> list[str] | str:
    """The modules' names; where the layers are a part of a larger model, one pattern for their whole paths.

    A vision part may have linears of the same names, on which PEFT would put a LoRA of its own.
    """
    paths = [adapter.path_of(module) for module in adapter.modules]
    if all(path.startswith("model.layers.") for path in paths):
        return adapter.modules
    layers = r"\d+" if len(adapter.layers) == adapter.n_layers else f"({'|'.join(map(str, adapter.layers))})"
    return "|".join(re.escape(path).replace(r"\{layer\}", layers) for path in paths)


def _rounded(factor: Tensor, precision: torch.dtype, module: str) -> Tensor:
    """The factor in this precision; ValueError where a value is too large for it."""
    rounded = factor.to(precision)
    if not rounded.isfinite().all():
        largest = float(factor.abs().max())
        raise ValueError(f"{module}: values up to {largest:.3g} do not fit {precision}: use bfloat16 or float32")
    return rounded


def _norms(adapter: Adapter, module: str, A: Tensor, B: Tensor) -> Tensor:
    """[L, 2]: the Frobenius norms of the update dW and of dW - B^T A, in float64, without forming either.

    With A^T = Q_A R_A and B^T = Q_B R_B of the stacked factors, ||B^T A|| = ||R_B R_A^T||; one layer at a time.
    """
    full_A, full_B = adapter.factors(module)
    norms = torch.zeros(adapter.n_layers, 2, dtype=torch.float64)
    for layer in range(adapter.n_layers):
        sides = (
            [full_A[layer].double(), A[layer].double()],
            [full_B[layer].double() * adapter.scale, -B[layer].double()],
        )
        R_A, R_B = (torch.linalg.qr(torch.cat(side).mT, mode="r").R for side in sides)  # [k, R + r]
        norms[layer, 0] = (R_B[:, : adapter.rank] @ R_A[:, : adapter.rank].mT).norm()
        norms[layer, 1] = (R_B @ R_A.mT).norm()
    return norms


def _share(norms: Tensor) -> float:
    """lost / whole of a pair (whole, lost); 0 where there is nothing to lose."""
    whole, lost = norms.tolist()
    return lost / whole if whole else 0.0


def export_errors(folder: str | Path) -> pd.DataFrame:
    """What an export lost, measured as it was written: ||dW - exported dW||_F / ||dW||_F of each linear.

    Columns: module, layer (0 = first), error (0 where neither rank= nor dtype= changed anything). The error over all of
    them is in `attrs["error"]`. ValueError for a folder that `export_peft` did not write.
    """
    record = read_whole(folder, _read_folder)[2]
    if not record:
        raise ValueError(f"{folder} does not say what it lost: it was not written by export_peft")
    rows = [
        {"module": module, "layer": layer, "error": error}
        for module, errors in record["errors"].items()
        for layer, error in enumerate(errors)
    ]
    table = pd.DataFrame(rows, columns=["module", "layer", "error"])
    table.attrs["error"] = record["error"]
    return table


# ---------------------------------------------------------------------------------------------------- reading a folder
def _read_folder(folder: str | Path) -> tuple[dict, dict[str, Tensor], dict]:
    """(configuration, tensors, our own record of the export or {}) of a PEFT folder.

    FileNotFoundError where it or one of its files is missing; ValueError for damaged files, for tensors that are no
    finite floating numbers, and for pickles (.bin). What the configuration says is checked by `_check_config`.
    """
    folder = Path(folder)
    config_path, path = folder / _CONFIG, folder / _WEIGHTS
    if not config_path.is_file():
        raise FileNotFoundError(f"no {_CONFIG} in {folder}: give the folder of a PEFT adapter")
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise ValueError(
                f"{folder} holds adapter_model.bin, a pickle, which is not opened here: load it with peft where you "
                f"trust it and save it again (save_pretrained writes {_WEIGHTS})"
            )
        raise FileNotFoundError(f"no {_WEIGHTS} in {folder}")
    config = read_json(config_path)
    if not isinstance(config, dict):
        raise ValueError(f"{config_path} holds no settings but {type(config).__name__}")
    tensors, metadata = read_tensors(path)
    record = parse_json(metadata.get(_RECORD, "{}"), f"{path} has a damaged header", "export it again")
    if not isinstance(record, dict) or record.get("version") != _RECORD_VERSION:
        return config, tensors, {}  # not ours, or of a later version, which the LoRA itself does not need
    check(ExportRecord, record, f"{path}, its record of the export", "export it again")
    return config, tensors, record


def _check_config(folder: str | Path, config: dict) -> None:
    """ValueError for settings that are of another kind than those of a PEFT LoRA (`formats.schemas.PeftConfig`)."""
    check(PeftConfig, config, Path(folder) / _CONFIG, "is it the configuration of a PEFT LoRA?")


def _pairs(tensors: Mapping[str, Tensor]) -> tuple[_Pairs, list[str]]:
    """(the pairs, the names of all other tensors)."""
    sides: dict[str, dict[str, Tensor]] = {}
    others = []
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match and tensor.dim() == 2 and tensor.is_floating_point():
            sides.setdefault(match["path"], {})[match["side"]] = tensor
        else:
            others.append(name)
    pairs = {}
    for path, own in sides.items():
        if len(own) == 2 and own["A"].shape[0] == own["B"].shape[1]:
            pairs[path] = (own["A"], own["B"])
        else:
            others += [f"base_model.model.{path}.lora_{side}.weight" for side in own]
    return pairs, sorted(others)


def _of_pattern(patterns: Mapping[str, float] | None, path: str, default: float) -> float:
    """The value of the first pattern that ends the path, as PEFT reads rank_pattern and alpha_pattern."""
    for pattern, value in (patterns or {}).items():
        if _matches(rf"(.*\.)?({pattern})", path):
            return value
    return default


def _matches(pattern: str, path: str) -> bool:
    """Whether a pattern of a configuration is the whole path; ValueError for one that is wrong or takes too long."""
    try:
        return regex.fullmatch(pattern, path, timeout=_PATIENCE) is not None
    except TimeoutError as error:
        raise ValueError(f"{_CONFIG} holds a pattern that takes too long to match: {shown(pattern)}") from error
    except (regex.error, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"{_CONFIG} holds a pattern that cannot be read ({error}): {shown(pattern)}") from error


def _rank_and_scale(config: Mapping, path: str) -> tuple[int, float]:
    """(r, factor of B A) of one linear: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023)."""
    r = _of_pattern(config.get("rank_pattern"), path, config.get("r"))
    alpha = _of_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha"))
    check_count(r, f"r in {_CONFIG}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"lora_alpha in {_CONFIG} must be a number, not {alpha!r}")
    return r, alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def _not_plain(config: Mapping) -> list[str]:
    """What makes a PEFT configuration more than lora_B lora_A, by name."""
    extras = [] if config.get("peft_type") == "LORA" else [f"peft_type {shown(config.get('peft_type')).strip(chr(39))}"]
    if config.get("bias") not in (None, "none"):
        extras.append(f"bias {shown(config['bias'])}")
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
        extras.append(f"init_lora_weights {shown(config['init_lora_weights'])}, which changes the base model")
    others = [(name, value) for name, value in sorted(config.items()) if value and name not in _PLAIN]
    return extras + [f"{shown(name).strip(chr(39))} {shown(value)}" for name, value in others[:10]]


def _some(names: Sequence[str]) -> str:
    """Up to three of the names, and how many more there are."""
    return ", ".join(name[:200] for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ------------------------------------------------------------------------------------------------------ who can load it
@dataclass(frozen=True)
class Verdict:
    """Whether a loader can load a folder: true where `problems` is empty. `notes` say how to load it."""

    loader: str
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.problems

    def __repr__(self) -> str:
        head = f"{self.loader}: " + ("fits" if self else "does not fit")
        lines = [*(f"  problem: {text}" for text in self.problems), *(f"  {text}" for text in self.notes)]
        return "\n".join([head, *lines])


def _check_loader(loader: str) -> None:
    if loader not in _LOADERS:
        raise ValueError(f"unknown loader {loader!r}: one of {', '.join(map(repr, _LOADERS))}")


def check_export(folder: str | Path, loader: str = "peft", base_model: nn.Module | DocToLoRA | None = None) -> Verdict:
    """Whether `loader` ("peft", "vllm", "llama.cpp") can load the LoRA in a folder, as its files say; and why not.

    Nothing is run: these are the rules of the loaders' sources. With `base_model` its linears are looked up, too.
    - peft 0.21, tuners/lora/model.py and tuners/tuners_utils.py: ranks, rank_pattern, target_modules. Tensors with no
      place there are left out with no more than a warning, so they count as a problem here.
    - vLLM 0.14, config/lora.py (MaxLoRARanks), lora/peft_helper.py (r at most max_lora_rank; no bias, DoRA or
      modules_to_save) and lora/lora_model.py (names). It must support LoRA for the model's architecture.
    - llama.cpp, convert_lora_to_gguf.py (nothing but lora_A and lora_B; one lora_alpha) and src/llama-adapter.cpp (the
      scale is alpha / rows: no alpha_pattern, no rank stabilisation). It must know the architecture, and needs the base
      model's configuration for the conversion.
    """
    _check_loader(loader)
    config, tensors, record = read_whole(folder, _read_folder)
    try:
        _check_config(folder, config)
    except ValueError as error:
        return Verdict(loader, (str(error),), ())
    pairs, others = _pairs(tensors)
    extras = _not_plain(config)
    problems = [] if pairs else ["there is no pair of lora_A and lora_B tensors"]
    notes = []
    if extras:
        (notes if loader == "peft" else problems).append(f"more than a plain LoRA: {'; '.join(extras)}")
    if others and not (extras and loader == "peft"):
        problems.append(f"tensors that are no part of a lora_A, lora_B pair: {_some(others)}")
    try:
        wrong = [path for path, (A, _) in pairs.items() if _rank_and_scale(config, path)[0] != A.shape[0]]
        if wrong:
            problems.append(f"{_CONFIG} names another rank than the tensors have: {_some(wrong)}")
        if missed := [path for path in pairs if not _is_target(path, config.get("target_modules"))]:
            problems.append(f"target_modules in {_CONFIG} leaves out {_some(missed)}")
    except ValueError as error:
        problems.append(str(error))
    if base_model is not None:
        problems += _misfits(pairs, _network(base_model))
    if loader != "peft":
        more_problems, more_notes = _server_rules(loader, config, pairs)
        problems += more_problems
        notes += more_notes
    if record.get("error"):
        notes.append(f"relative error {record['error']:.3g}, from rank {record['rank']} (see export_errors)")
    return Verdict(loader, tuple(problems), tuple(notes))


def _server_rules(loader: str, config: Mapping, pairs: _Pairs) -> tuple[list[str], list[str]]:
    """(problems, notes) of vLLM or llama.cpp beside those that they share with PEFT."""
    problems, notes = [], []
    unread = {"vllm": ("rank_pattern", "alpha_pattern"), "llama.cpp": ("alpha_pattern", "use_rslora")}[loader]
    if set_here := [name for name in unread if config.get(name)]:
        problems.append(f"{', '.join(set_here)} may not be read, and the update would then have another size")
    if unknown := sorted({path.rpartition(".")[2] for path in pairs} - _SERVED_MODULES):
        problems.append(f"it may not know these modules: {_some(unknown)}")
    if loader == "llama.cpp":
        base = config.get("base_model_name_or_path") or "none is named here"
        notes.append(f"convert it with convert_lora_to_gguf.py --base <folder of the base model> ({base})")
        return problems, notes
    rank = max((A.shape[0] for A, _ in pairs.values()), default=0)
    if enough := [allowed for allowed in _VLLM_RANKS if allowed >= rank]:
        notes.append(f"serve the base model with --enable-lora --max-lora-rank {enough[0]}")
    else:
        problems.append(f"rank {rank}, but it serves at most {_VLLM_RANKS[-1]}: export with rank={_VLLM_RANKS[-1]}")
    return problems, notes


def _is_target(path: str, target_modules: object) -> bool:
    """Whether PEFT would put a LoRA on this linear: a pattern for the whole path, or names that it ends in."""
    if isinstance(target_modules, str):
        return target_modules == "all-linear" or _matches(target_modules, path)
    names = target_modules if isinstance(target_modules, list) else []
    return any(path == name or path.endswith(f".{name}") for name in names)


def _network(base_model: nn.Module | DocToLoRA) -> nn.Module:
    """The transformers model itself."""
    network = base_model.base_model if hasattr(base_model, "hypernetwork") else base_model
    if not isinstance(network, nn.Module):
        raise TypeError(f"expected a base model or a DocToLoRA, not {type(base_model).__name__}")
    return network


def _misfits(pairs: _Pairs, network: nn.Module) -> list[str]:
    """What of the pairs has no linear of its size in the model."""
    linears = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    absent = [path for path in pairs if path not in linears]
    problems = [f"the base model has no linear {_some(absent)}: was it made for another model?"] if absent else []
    for path, (A, B) in pairs.items():
        if path in linears:
            sizes = (linears[path].in_features, linears[path].out_features)
            if (A.shape[1], B.shape[0]) != sizes:
                made = f"{A.shape[1]} -> {B.shape[0]}"
                problems.append(f"{path} maps {made}, the base model's {sizes[0]} -> {sizes[1]}: another model?")
                break  # one says enough
    return problems


# -------------------------------------------------------------------------------------------------------- from a folder
@dataclass(frozen=True)
class PlainLora:
    """A PEFT LoRA as W x + B^T (A x): {module: A [layers, r, d_in]} and {module: B [layers, r, d_out]}, float32.

    n_layers, layers: of the base model, and which of them it adapts.
    base_model is the name that the folder gives; the keys, as in `Adapter`, are known of exports alone.
    """

    A: dict[str, Tensor]
    B: dict[str, Tensor]
    n_layers: int
    layers: tuple[int, ...]
    paths: dict[str, str]
    base_model: str
    base_key: str
    hypernetwork_key: str
    bias_inside: bool


def read_lora(folder: str | Path, base_model: nn.Module | DocToLoRA | None = None) -> PlainLora:
    """The LoRA in a PEFT folder; rows that it lacks are zero. See `Adapter.from_peft`."""
    config, tensors, record = read_whole(folder, _read_folder)
    _check_config(folder, config)
    pairs = _plain_pairs(folder, config, tensors)
    places = _places(folder, pairs)
    n_layers, layers = _n_layers(folder, pairs, places, record, base_model), sorted({layer for layer, _ in places})
    A, B = _block_factors(folder, config, pairs, places, layers)
    holds_bias = bool(record.get("bias"))
    return PlainLora(
        A,
        B,
        n_layers=n_layers,
        layers=tuple(layers),
        paths={module: _IN_LAYER.sub(r"\g<before>.{layer}.\g<after>", path) for (_, module), path in places.items()},
        base_model=config.get("base_model_name_or_path") or "",
        base_key=record.get("base_key", ""),
        hypernetwork_key=record.get("hypernetwork_key", "") if holds_bias else "",
        bias_inside=holds_bias,
    )


def _plain_pairs(folder: str | Path, config: Mapping, tensors: Mapping[str, Tensor]) -> _Pairs:
    """The pairs of a plain LoRA; ValueError names whatever else the folder holds."""
    pairs, others = _pairs(tensors)
    if extras := _not_plain(config):
        raise ValueError(
            f"{folder} is no plain LoRA ({'; '.join(extras)}): merge it into the base model with peft's "
            "merge_and_unload, and use that as the base model"
        )
    if others or not pairs:
        what = f"tensors that are no part of one: {_some(others)}" if others else "none"
        raise ValueError(f"{folder} should hold lora_A and lora_B for each linear, but holds {what}")
    return pairs


def _n_layers(
    folder: str | Path, pairs: _Pairs, places: _Places, record: Mapping, base_model: nn.Module | DocToLoRA | None
) -> int:
    """The number of layers: of `base_model`, which the pairs must fit (ValueError), else as far as the folder knows."""
    if base_model is not None:
        network = _network(base_model)
        if problems := _misfits(pairs, network):
            raise ValueError(f"{folder}: {'; '.join(problems)}")
        return len(decoder_layers(network))
    n_layers = max(record.get("n_layers", 0), *(1 + layer for layer, _ in places))
    if n_layers > _MOST_EMPTY * len({layer for layer, _ in places}):
        made = f"{len(places)} linears of a model with {n_layers} layers"
        raise ValueError(f"{folder} adapts {made}: pass base_model= if that is so")
    return n_layers


def _block_factors(
    folder: str | Path, config: Mapping, pairs: _Pairs, places: _Places, layers: Sequence[int]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """{module: A [L, r, d_in]} and {module: B [L, r, d_out]} with the LoRA's scale in B; rows that it lacks are 0."""
    A: dict[str, Tensor] = {}
    B: dict[str, Tensor] = {}
    rank = max(lora_A.shape[0] for lora_A, _ in pairs.values())
    for (layer, module), path in places.items():
        lora_A, lora_B = pairs[path]
        r, scale = _rank_and_scale(config, path)
        if r != lora_A.shape[0]:
            raise ValueError(f"{folder}: {path} has {lora_A.shape[0]} rows, {_CONFIG} says {r}")
        if module not in A:
            A[module] = torch.zeros(len(layers), rank, lora_A.shape[1])
            B[module] = torch.zeros(len(layers), rank, lora_B.shape[0])
        if (A[module].shape[2], B[module].shape[2]) != (lora_A.shape[1], lora_B.shape[0]):
            raise ValueError(f"{folder}: {module} has different sizes in different layers")
        place = layers.index(layer)
        A[module][place, :r] = lora_A.float()
        B[module][place, :r] = lora_B.float().mT * scale
        if not (A[module][place].isfinite().all() and B[module][place].isfinite().all()):
            raise ValueError(f"{folder}: {path} holds NaN or infinity: the file is damaged")
    return A, B


def _places(folder: str | Path, pairs: _Pairs) -> _Places:
    """The place of every linear; ValueError where one is outside the layers or a name is not unique."""
    places: _Places = {}
    before, after = set(), {}
    for path in pairs:
        match = _IN_LAYER.fullmatch(path)
        if match is None:
            raise ValueError(f"{folder} adapts {path}, which is in no decoder layer: merge it with peft instead")
        module = match["after"].rpartition(".")[2]
        before.add(match["before"])
        if len(before) > 1 or after.setdefault(module, match["after"]) != match["after"]:
            raise ValueError(
                f"{folder} adapts several linears named {module!r} in one layer or several stacks of layers"
            )
        places[int(match["layer"]), module] = path
    return places


# ------------------------------------------------------------------------------------------------------ plain weights
@torch.no_grad()
def merge(base_model: nn.Module | DocToLoRA, adapter: Adapter, *, in_place: bool = False) -> nn.Module:
    """The base model with the adapter in its weights: W + s * sum of weight * B^T A, an ordinary model.

    Save it with `save_pretrained`; whatever loads the base model loads it. Sums are formed in float32, one linear at a
    time, and rounded once to W's precision. It cannot be undone: keep the base model and the adapter.

    in_place: change `base_model` itself, so that no second copy is in memory (else a copy is changed).

    ValueError, before anything is changed, for
    - an adapter of another model (of the same sizes: only a DocToLoRA can tell);
    - target weights that are quantised, not in memory or shared with another layer;
    - a model to which an adapter is applied: leave the `with` block first.
    """
    adapter.check_summed()
    network = _network(base_model)
    if network is not base_model:
        base_model._check_adapter(adapter)
    if is_applied(network):
        raise ValueError("an adapter is applied to this model: leave the `with` block first")
    _check_mergeable(network, adapter)
    if not in_place:
        network = copy.deepcopy(network)
    for module, linears in target_linears(network, adapter.modules).items():
        A, B = adapter.factors(module)
        for layer, linear in enumerate(linears):
            W = linear.weight
            wide = torch.promote_types(W.dtype, torch.float32)
            update = B[layer].to(W.device, wide).mT @ A[layer].to(W.device, wide)  # [d_out, d_in]
            W.copy_(torch.add(W.to(wide), update, alpha=adapter.scale))
    return network


def _check_mergeable(network: nn.Module, adapter: Adapter) -> None:
    """ValueError where the adapter does not fit or a target weight is not a plain one of its own."""
    remedy = "load the base model without quantisation (dtype=torch.bfloat16) and merge into that"
    if getattr(getattr(network, "config", None), "quantization_config", None) is not None:
        raise ValueError(f"this base model is quantised: {remedy}")
    if (n_layers := len(decoder_layers(network))) != adapter.n_layers:
        raise ValueError(
            f"adapter has blocks for {adapter.n_layers} layers, this model has {n_layers}: "
            "was it made for another model?"
        )
    parameters = [parameter for _, parameter in network.named_parameters(remove_duplicate=False)]
    uses = Counter(one.data_ptr() for one in parameters if type(one) is nn.Parameter and not one.is_meta)
    for module, linears in target_linears(network, adapter.modules).items():
        for layer, linear in enumerate(linears):
            W, where = linear.weight, f"{module} in layer {layer}"
            if W.is_meta:
                raise ValueError(f"{where} is not in memory: load the whole model first")
            if type(W) is not nn.Parameter or W.dtype not in (*_PRECISIONS, torch.float64):
                raise ValueError(f"{where} is quantised ({type(W).__name__}, {W.dtype}): {remedy}")
            if (W.shape[1], W.shape[0]) != adapter.sizes[module]:
                made = "adapter maps {} -> {}".format(*adapter.sizes[module])
                raise ValueError(f"{where}: {made}, this model {W.shape[1]} -> {W.shape[0]}: another model?")
            if uses[W.data_ptr()] > 1:
                raise ValueError(f"{where} shares its weight with another layer, which a merge would change as well")
