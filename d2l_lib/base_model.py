"""The frozen language model: loading, its layers and linears, and the fingerprint of its weights."""

import hashlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from d2l_lib.documents import check_texts
from d2l_lib.formats.packaged import PACKAGED, packaged_folder
from d2l_lib.formats.schemas import MOST_LAYERS
from d2l_lib.onednn import hooks_of

# transformers has no correct fused attention with soft-capped scores for these.
EAGER_ATTENTION = ("gemma2",)
# Names, by family, of the norm after the last layer and of the last linear in a layer's MLP (Phi: fc2).
_FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm")
_MLP_OUTPUTS = ("down_proj", "fc2", "dense_4h_to_h")
_PLAIN = (bool, int, float, str, type(None))  # settings of a module that its passes can depend on ...
_NO_SETTING = {"training", "gradient_checkpointing"}  # ... and those that its passes for blocks do not
_DATA = Path(__file__).resolve().parent.parent / "data"


def bundled_path(name: str) -> Path:
    """Folder of a bundled model: data/<name>."""
    return _DATA / name


def base_model_names() -> list[str]:
    """Names of the base models that need no hub: those bundled in data/, and those that packages bring, sorted."""
    return sorted({path.parent.name for path in _DATA.glob("*/base_model")} | PACKAGED.keys())


def default_device() -> torch.device:
    """CUDA where present, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_base_model(
    source: str | Path,
    *,
    device=None,
    dtype: torch.dtype | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
    four_bit: bool = False,
):
    """(model, tokenizer) of a known name ("tiny", "smollm2"), a local folder or a hub id; frozen, in eval mode.

    device: None picks CUDA, MPS or CPU.
    dtype: None is bfloat16 on CUDA and float32 elsewhere.
    device_map: instead of device; "auto" or transformers' {module: device} over devices, main memory and the disk.
        Weights on the "disk" stay in the model's own safetensors files.
    four_bit: the linears hold 4-bit numbers (needs bitsandbytes).

    A model that also reads images is loaded whole. Code that comes with a model is never run.
    FileNotFoundError says what is missing and where to put it. ValueError for damaged files.
    """
    device, dtype = check_place(device, dtype, device_map)
    location = locate(source)
    try:
        config = load_config(location)
        options = {"attn_implementation": "eager"} if config.model_type in EAGER_ATTENTION else {}
        kind = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
        place = {} if device_map is None else {"device_map": device_map}
        if four_bit:
            place = {"device_map": device_map or {"": device}, "quantization_config": _four_bit_config()}
        _check_layers(config)
        options |= {"config": config, "dtype": dtype, "weights_only": True, "output_loading_info": True}
        model, told = without_code(kind, location, **options, **place)
        if absent := [*told["missing_keys"], *told["mismatched_keys"]]:  # transformers would make them up
            raise ValueError(f"its weights lack {', '.join(sorted(map(str, absent))[:3])}, which its config.json names")
        tokenizer = load_tokenizer(location)
    except OSError as error:
        raise FileNotFoundError(
            f"base model {str(source)!r} could not be read: {_first_line(error)}. Give a known name "
            f"({', '.join(base_model_names())}), "
            "a folder with config.json, model.safetensors and tokenizer.json, or the id of a hub model that is "
            "already in the local cache or can be downloaded from this machine."
        ) from error
    except (ImportError, MemoryError, torch.OutOfMemoryError, NeedsCode):
        raise
    except Exception as error:  # of damaged files transformers and tokenizers raise anything
        problem = "is damaged or of an unknown kind" + (", or device_map does not fit it" if device_map else "")
        raise ValueError(f"base model {str(source)!r} {problem}: {_first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = model.to(device) if device_map is None and not four_bit else model
    return model.eval().requires_grad_(False), tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:500] or type(error).__name__


def _check_layers(config) -> None:
    """ValueError for a number of layers that no model has, before it is built."""
    inner = config.get_text_config()
    n_layers = getattr(inner, "num_hidden_layers", 1)
    if isinstance(n_layers, bool) or not isinstance(n_layers, int) or not 1 <= n_layers <= MOST_LAYERS:
        named = repr(n_layers)[:80]
        raise ValueError(f"num_hidden_layers in its config.json must be from 1 to {MOST_LAYERS}, not {named}")


class NeedsCode(ValueError):
    """The files of a model ask for code of their own or from the hub, which is never run."""


def without_code(kind: Any, source: str, **options: Any) -> Any:
    """`kind.from_pretrained(source)` of one of transformers' Auto classes, without running code of the source.

    NeedsCode where the source cannot be read without its code; otherwise raises as transformers does.
    """
    try:
        return kind.from_pretrained(source, trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise NeedsCode(
            f"{source!r} needs Python code of its own (auto_map in its configuration), which is not run here: give a "
            "model of an architecture that transformers has built in"
        ) from error


def load_config(source: str):
    """The configuration of the model at a folder or hub id; NeedsCode where it asks for foreign code."""
    config = without_code(AutoConfig, source)
    _refuse_hub_kernels(config, source)
    return config


def load_tokenizer(source: str, **options: Any):
    """The tokenizer at a folder or hub id; NeedsCode where it has code of its own."""
    return without_code(AutoTokenizer, source, **options)


def _refuse_hub_kernels(config, source: str) -> None:
    """NeedsCode where a configuration names an attention from the hub ("owner/name")."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {})]
    for part in parts:
        named = getattr(part, "_attn_implementation_internal", None)
        for one in named.values() if isinstance(named, dict) else [named]:
            if isinstance(one, str) and ("/" in one or ":" in one):
                raise NeedsCode(
                    f"{source!r} asks for the attention {one!r}, code from the hub that is not run here: take "
                    "attn_implementation out of its config.json"
                )


def check_place(
    device: str | torch.device | None, dtype: torch.dtype | None, device_map: object = None
) -> tuple[torch.device, torch.dtype]:
    """(device, dtype) with the defaults filled in; errors say what is allowed.

    ValueError for a device that is unknown or not here and a dtype that no model runs in; TypeError for anything else.
    """
    if device is not None and device_map is not None:
        raise ValueError("give device (everything in one place) or device_map (spread over several), not both")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16 (or None), not {dtype!r}")
    if dtype is not None and dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"a model cannot run in {dtype}: give torch.float32, torch.bfloat16 or torch.float16")
    if device_map is not None and not isinstance(device_map, (str, Mapping)):
        raise TypeError(f"device_map must be 'auto' or {{module: device}}, not {device_map!r}")
    device = default_device() if device is None else _device(device)
    return device, dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)


def _device(named: object) -> torch.device:
    """The device of that name; TypeError for what is no name, ValueError for one that is unknown or not here."""
    here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    here += ["mps"] if torch.backends.mps.is_available() else []
    advice = f"devices here: {', '.join(here)} (None takes the fastest)"
    if not isinstance(named, (str, torch.device)):
        raise TypeError(f"device must be a name such as 'cpu' or 'cuda', not {named!r}; {advice}")
    try:
        device = torch.device(named)
    except RuntimeError as error:
        raise ValueError(f"unknown device {named!r}; {advice}") from error
    known = {torch.device(one) for one in here} | {torch.device("cpu", 0), torch.device("mps", 0)}
    known -= set() if "mps" in here else {torch.device("mps", 0)}
    if device in known or (device == torch.device("cuda") and torch.cuda.device_count()):
        return device
    if device.type in ("cpu", "cuda", "mps", "meta"):
        raise ValueError(f"device {str(device)!r} is not here; {advice}")
    try:  # another back end, such as xpu: it is here if a tensor can lie on it
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used here; {advice}") from error
    return device


def window_of(model: nn.Module) -> int:
    """The most tokens that a model reads; sys.maxsize where its configuration names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def _four_bit_config() -> BitsAndBytesConfig:
    """The quantization of the published models' context encoders in training."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def locate(source: str | Path) -> str:
    """The folder of a base model by its known name or path, or the unchanged hub id; `load_tokenizer` reads either.

    FileNotFoundError says what is missing.
    """
    bundled = bundled_path(str(source)) / "base_model"
    if not Path(str(source)).is_absolute() and bundled.is_dir():
        return str(bundled)
    if source in PACKAGED:
        return str(packaged_folder(source))
    folder = Path(source).expanduser()
    if folder.is_dir():
        return str(folder)
    looks_like_path = isinstance(source, Path) or str(source).startswith(("/", ".", "~")) or str(source).count("/") > 1
    if looks_like_path or folder.is_file():
        raise FileNotFoundError(f"no base model folder at {folder}: give a folder that holds config.json")
    if "/" not in str(source):
        raise FileNotFoundError(
            f"no bundled base model {source!r}: looked for {bundled} (known here: {', '.join(base_model_names())}); "
            "a hub id has the form owner/name"
        )
    return str(source)


def load_processor(source: str | Path):
    """The processor of a vision-language model; FileNotFoundError without one, ImportError without its package."""
    try:
        processor = without_code(AutoProcessor, locate(source))
    except NeedsCode:
        raise
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{str(source)!r} has no processor to read images with ({str(error).splitlines()[0]}): add the model's "
            "preprocessor_config.json and processor_config.json to it"
        ) from error
    if not hasattr(processor, "image_processor"):
        raise FileNotFoundError(
            f"{str(source)!r} has a tokenizer but no image processor: add the model's preprocessor_config.json and "
            "processor_config.json to it"
        )
    return processor


def reads_images(model: nn.Module) -> bool:
    """Whether this is a vision-language model."""
    return hasattr(model.config, "vision_config")


def input_device(model: nn.Module) -> torch.device:
    """The device of the model's inputs: that of its embeddings, also where their weights wait elsewhere."""
    embeddings = model.get_input_embeddings()
    planned = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)  # set by a device_map
    return embeddings.weight.device if planned is None else torch.device(planned)


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Inside the `with` block a linear, norm or embedding has its weights, also with a device_map."""
    if any(weight.is_meta for weight in module.parameters(recurse=False)):
        from accelerate.utils import align_module_device

        with align_module_device(module, "cpu"):
            yield
    else:
        yield


def decoder_body(model: nn.Module) -> nn.Module:
    """The embeddings, layers and final norm below the language-model head; ValueError for a model without these."""
    body = model.get_decoder() if hasattr(model, "get_decoder") else getattr(model, "model", model)
    if not hasattr(body, "layers") or not any(hasattr(body, name) for name in _FINAL_NORMS):
        raise ValueError(
            f"{type(model).__name__} has no decoder with .layers and .norm; Gemma, Qwen, Mistral, Llama and Phi "
            "families do"
        )
    return body


def final_norm_name(model: nn.Module) -> str:
    """The attribute name of the norm after the last layer."""
    body = decoder_body(model)
    return next(name for name in _FINAL_NORMS if hasattr(body, name))


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last layer and the language-model head."""
    return getattr(decoder_body(model), final_norm_name(model))


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's transformer layers, first to last."""
    return list(decoder_body(model).layers)


def target_linears(model: nn.Module, modules: list[str]) -> dict[str, list[nn.Linear]]:
    """{module: its linear in every layer}; ValueError for a name that a layer lacks, with those that exist."""
    modules = check_texts(modules, "modules")
    linears: dict[str, list[nn.Linear]] = {module: [] for module in modules}
    for index, layer in enumerate(decoder_layers(model)):
        by_name: dict[str, list[nn.Linear]] = {}
        for path, linear in layer.named_modules():
            if isinstance(linear, nn.Linear):
                by_name.setdefault(path.rpartition(".")[2], []).append(linear)
        for module in modules:
            matches = by_name.get(module, [])
            if len(matches) != 1:
                problem = "no" if not matches else f"{len(matches)}"
                raise ValueError(f"layer {index} has {problem} linears named {module!r}; it has {sorted(by_name)}")
            linears[module].extend(matches)
    return linears


def default_modules(model: nn.Module) -> list[str]:
    """The published models' target module under this family's name: the last linear of each layer's MLP.

    ["down_proj"] for Gemma, Qwen, Mistral, Llama and Phi-3, ["fc2"] for Phi. ValueError for a model without one.
    """
    problems = []
    for name in _MLP_OUTPUTS:
        try:
            target_linears(model, [name])
        except ValueError as error:
            problems.append(str(error))
        else:
            return [name]
    raise ValueError(f"no usual target module ({', '.join(_MLP_OUTPUTS)}) in this model; {problems[0]}: choose one")


def module_sizes(model: nn.Module, modules: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """({module: d_in}, {module: d_out}); ValueError where layers differ, as one head width serves all layers."""
    d_in, d_out = {}, {}
    for module, linears in target_linears(model, modules).items():
        shapes = {(linear.in_features, linear.out_features) for linear in linears}
        if len(shapes) > 1:
            raise ValueError(f"{module} has different sizes in different layers: {sorted(shapes)}")
        d_in[module], d_out[module] = shapes.pop()
    return d_in, d_out


def module_paths(model: nn.Module, modules: list[str]) -> dict[str, str]:
    """{module: "model.layers.{layer}.mlp.down_proj"}: where the target linears sit, for export."""
    first = decoder_layers(model)[0]
    layer = next(name for name, module in model.named_modules() if module is first)  # ends in ".0"
    names = {module: name for name, module in first.named_modules()}
    return {
        module: f"{layer.removesuffix('0')}{{layer}}.{names[of_layers[0]]}"
        for module, of_layers in target_linears(model, modules).items()
    }


# --- fingerprints of weights ----------------------------------------------------------------------------------------


class Fingerprint:
    """Keys of a base model: a hash of some embeddings and the final norm, "-", a hash of some values of all layers.

    A key is the same in float32 and bfloat16; rounding to float16 can change it. `adapter.same_base` compares keys: a
    quantised model and older files have the first half only. Each call reads the values anew, so a change of all of a
    weight shows, and one of few values or columns may not. Weights that a device_map keeps away are read once.
    """

    def __init__(self):
        # of weights on the disk: {(id of a part, name): (the part, so that no other gets its id, values)}
        self._waiting: dict[tuple[int, str], tuple[nn.Module, Tensor]] = {}

    @torch.no_grad()
    def key(self, model: nn.Module) -> str:
        """The key of this model now."""
        ends = _leaves(model.get_input_embeddings(), final_norm(model))
        outer = {one: (part, name) for part in ends for name, one in part._parameters.items() if one is not None}
        inner: dict[Tensor, tuple[nn.Module, str]] = {}
        head = model.get_output_embeddings()
        for part in _leaves(decoder_body(model), head):
            inner |= {one: (part, name) for name, one in _lasting_tensors(part) if one not in outer}
        if model.config.get_text_config().tie_word_embeddings:  # placeholders do not show shared weights
            inner = {one: place for one, place in inner.items() if not one.is_meta or place != (head, "weight")}
        key = self._hash_of(outer)
        if not all(one.dtype.is_floating_point and one.dtype.itemsize > 1 for one in inner):
            return key
        return f"{key}-{self._hash_of(inner)}"

    def _hash_of(self, places: Mapping[Tensor, tuple[nn.Module, str]]) -> str:
        """A hash of some values of each weight; places: {weight: (part, name in it)}."""
        sampled = [
            (one.shape, self._away(*place) if one.is_meta else _spread_values(one)) for one, place in places.items()
        ]
        return _hash(sampled, torch.bfloat16)

    def _away(self, part: nn.Module, name: str) -> Tensor:
        """Some values of the weight `name` of `part`, which a device_map keeps away: those of the first call."""
        key = (id(part), name)  # not the tensor's id: each reading makes a new placeholder
        if key not in self._waiting:
            with present(part):
                self._waiting[key] = part, _spread_values(getattr(part, name)).clone()
        return self._waiting[key][1]


@torch.no_grad()
def parameters_key(module: nn.Module, *, without: str) -> str:
    """A hash of some values of each of a module's parameters, in order.

    without: parameters whose name begins so are left out.
    """
    parts = (one for name, one in module._modules.items() if not name.startswith(without))
    own = [one for name, one in module._parameters.items() if not name.startswith(without)]
    below = [one for part in _leaves(*parts) for one in part._parameters.values()]
    parameters = dict.fromkeys(one for one in (*own, *below) if one is not None)  # shared ones count once
    return _hash([(one.shape, _spread_values(one)) for one in parameters], torch.float32)


@torch.no_grad()
def passes_key(*modules: nn.Module) -> str | None:
    """A hash of what the passes of these modules depend on: classes, plain settings, some values of every tensor.

    The values lie in different rows and columns. None where a hook or a forward pass of others acts: what that does
    shows in no hash.
    """
    settings, tensors = [], {}
    for part in dict.fromkeys(part for module in modules for part in module.modules()):
        own = vars(part)
        if ("forward" in own and "_hf_hook" not in own) or hooks_of(part):  # accelerate's moves weights only
            return None
        plain = {name: own[name] for name in sorted(own) if isinstance(own[name], _PLAIN) and name not in _NO_SETTING}
        settings.append(f"{type(part).__module__}.{type(part).__qualname__} {plain}")
        tensors |= {one: None for one in (*part._parameters.values(), *part._buffers.values()) if one is not None}
    sampled = [(one.shape, _spread_values(one, anywhere=True)) for one in tensors if not one.is_meta]
    return hashlib.sha256("\n".join([*settings, _hash(sampled, torch.float32)]).encode()).hexdigest()[:16]


def _spread_values(tensor: Tensor, anywhere: bool = False) -> Tensor:
    """Up to 64 values spread over a tensor, a view where it is contiguous.

    anywhere: in different columns too. The others can all lie in one, and stay there, as files hold hashes of them.
    """
    n = tensor.numel()
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    step = max(1, n // 64)
    while anywhere and math.gcd(step, max(1, tensor.shape[-1] if tensor.dim() else 1)) > 1:
        step -= 1
    return tensor.as_strided((min(64, -(-n // step)),), (step,))


def _hash(sampled: Sequence[tuple[torch.Size, Tensor]], precision: torch.dtype) -> str:
    """A hash of (shape, some values) of tensors in `precision`; one copy to main memory per device and dtype."""
    digest, together = hashlib.sha256(), {}
    for place, (shape, values) in enumerate(sampled):
        digest.update(str([*shape]).encode())
        together.setdefault((values.device, values.dtype), []).append(place)
    at: list[Tensor] = [torch.zeros(0)] * len(sampled)
    for places in together.values():
        joined = torch.cat([sampled[place][1] for place in places]).to(precision).float().cpu()
        if len(together) == 1:
            at = [joined]
            break
        for place, part in zip(places, joined.split([sampled[p][1].numel() for p in places]), strict=True):
            at[place] = part
    digest.update(torch.cat(at).numpy().tobytes())
    return digest.hexdigest()[:16]


def _leaves(*modules: nn.Module | None) -> Iterator[nn.Module]:
    """The parts of these modules that hold tensors, in order; faster than `modules()`."""
    waiting = [*reversed(modules)]
    while waiting:
        part = waiting.pop()
        if part is not None:
            if part._parameters or part._buffers:
                yield part
            waiting += reversed(part._modules.values())


def _lasting_tensors(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a module's own parameters and persistent buffers."""
    yield from ((name, one) for name, one in part._parameters.items() if one is not None)
    for name, one in part._buffers.items():
        if one is not None and name not in part._non_persistent_buffers_set:
            yield name, one
