"""The frozen language model: loading it, finding its layers and linears, and reading hidden states out of it."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from weakref import WeakKeyDictionary

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

from d2l_lib.hypernetwork import HypernetworkConfig

MOST_LAYERS = 1000  # of any model
# transformers has no correct fused attention with soft-capped scores for these.
EAGER_ATTENTION = ("gemma2",)
# What the families call the norm after the last layer, and the linear with which a layer's MLP ends (Phi: fc2).
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm")
MLP_OUTPUTS = ("down_proj", "fc2", "dense_4h_to_h")
# Per model, the adapters that are applied now (see lora.apply_lora); only the innermost, the last, acts.
open_adapters: WeakKeyDictionary[nn.Module, list[object]] = WeakKeyDictionary()
_DATA = Path(__file__).resolve().parent.parent / "data"


def bundled_path(name: str) -> Path:
    """Folder of a bundled model: data/<name>."""
    return _DATA / name


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
    """(model, tokenizer) of a bundled name ("tiny"), a local folder or a hub id; frozen, in eval mode.

    device: None picks CUDA, MPS or CPU. dtype: None is bfloat16 on CUDA and float32 elsewhere. device_map, instead of
    device, spreads the model over several devices, main memory and the disk: "auto" or transformers' {module: device};
    weights that it puts on the "disk" stay in the model's own safetensors files. four_bit: its linears hold 4-bit
    numbers (needs bitsandbytes). A model that also reads images is loaded whole. Raises FileNotFoundError that says
    what is missing and where to put it, ValueError for damaged files. Code that comes with a model is never run.
    """
    if device is not None and device_map is not None:
        raise ValueError("give device (everything in one place) or device_map (spread over several), not both")
    device = default_device() if device is None else torch.device(device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    location = _locate(source)
    try:
        config = AutoConfig.from_pretrained(location)
        options = {"attn_implementation": "eager"} if config.model_type in EAGER_ATTENTION else {}
        kind = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
        place = {} if device_map is None else {"device_map": device_map}
        if four_bit:
            place = {"device_map": device_map or {"": device}, "quantization_config": _four_bit_config()}
        _check_layers(config)
        options |= {"output_loading_info": True}
        model, told = kind.from_pretrained(location, config=config, dtype=dtype, **options, **place)
        if absent := [*told["missing_keys"], *told["mismatched_keys"]]:  # transformers would make them up
            raise ValueError(f"its weights lack {', '.join(sorted(map(str, absent))[:3])}, which its config.json names")
        tokenizer = AutoTokenizer.from_pretrained(location)
    except OSError as error:
        raise FileNotFoundError(
            f"base model {str(source)!r} could not be read: {_first_line(error)}. Give a bundled name (tiny), "
            "a folder with config.json, model.safetensors and tokenizer.json, or the id of a hub model that is "
            "already in the local cache or can be downloaded from this machine."
        ) from error
    except (ImportError, MemoryError, torch.OutOfMemoryError):
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
    """ValueError for a number of layers that no model has: building one would take ages."""
    inner = config.get_text_config()
    n_layers = getattr(inner, "num_hidden_layers", 1)
    if isinstance(n_layers, bool) or not isinstance(n_layers, int) or not 1 <= n_layers <= MOST_LAYERS:
        named = repr(n_layers)[:80]
        raise ValueError(f"num_hidden_layers in its config.json must be from 1 to {MOST_LAYERS}, not {named}")


def _four_bit_config() -> BitsAndBytesConfig:
    """As the published models' context encoders were quantized in training."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _locate(source: str | Path) -> str:
    """A folder that exists, or the unchanged hub id."""
    bundled = bundled_path(str(source)) / "base_model"
    if not Path(str(source)).is_absolute() and bundled.is_dir():
        return str(bundled)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return str(folder)
    looks_like_path = isinstance(source, Path) or str(source).startswith(("/", ".", "~")) or str(source).count("/") > 1
    if looks_like_path or folder.is_file():
        raise FileNotFoundError(f"no base model folder at {folder}: give a folder that holds config.json")
    if "/" not in str(source):
        names = sorted(path.parent.name for path in _DATA.glob("*/base_model"))
        raise FileNotFoundError(
            f"no bundled base model {source!r}: looked for {bundled} (bundled here: {', '.join(names) or 'none'}); "
            "a hub id has the form owner/name"
        )
    return str(source)


def load_processor(source: str | Path):
    """What turns images and their chat into inputs of the vision-language model at `source` (see load_base_model).

    Raises FileNotFoundError where the model comes without one, ImportError where it needs a package that is not here.
    """
    try:
        processor = AutoProcessor.from_pretrained(_locate(source))
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
    """Where the model's inputs belong: where its embeddings are computed, also if their weights wait elsewhere."""
    embeddings = model.get_input_embeddings()
    planned = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)  # set by a device_map
    return embeddings.weight.device if planned is None else torch.device(planned)


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Inside the `with` block a linear, norm or embedding has its weights, also where a device_map keeps them away."""
    if any(weight.is_meta for weight in module.parameters(recurse=False)):
        from accelerate.utils import align_module_device

        with align_module_device(module, "cpu"):
            yield
    else:
        yield


def decoder_body(model: nn.Module) -> nn.Module:
    """The stack of embeddings, layers and final norm below the language-model head (and beside a vision part)."""
    body = model.get_decoder() if hasattr(model, "get_decoder") else getattr(model, "model", model)
    if not hasattr(body, "layers") or not any(hasattr(body, name) for name in FINAL_NORMS):
        raise ValueError(
            f"{type(model).__name__} has no decoder with .layers and .norm; Gemma, Qwen, Mistral, Llama and Phi "
            "families do"
        )
    return body


def _final_norm_name(model: nn.Module) -> str:
    body = decoder_body(model)
    return next(name for name in FINAL_NORMS if hasattr(body, name))


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last layer and the language-model head."""
    return getattr(decoder_body(model), _final_norm_name(model))


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's transformer layers, first to last."""
    return list(decoder_body(model).layers)


def target_linears(model: nn.Module, modules: list[str]) -> dict[str, list[nn.Linear]]:
    """{module: its linear in every layer}. ValueError for a name that a layer lacks lists the names that exist."""
    found: dict[str, list[nn.Linear]] = {module: [] for module in modules}
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
            found[module].extend(matches)
    return found


def default_modules(model: nn.Module) -> list[str]:
    """The target module that the published models use, under this family's name: the last linear of each layer's MLP.

    ["down_proj"] for Gemma, Qwen, Mistral, Llama and Phi-3, ["fc2"] for Phi. ValueError where a model has none.
    """
    problems = []
    for name in MLP_OUTPUTS:
        try:
            target_linears(model, [name])
        except ValueError as error:
            problems.append(str(error))
        else:
            return [name]
    raise ValueError(f"no usual target module ({', '.join(MLP_OUTPUTS)}) in this model; {problems[0]}: choose one")


def module_sizes(model: nn.Module, modules: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """(d_in, d_out) of each target module; ValueError where layers differ, for one head width serves all layers."""
    d_in, d_out = {}, {}
    for module, linears in target_linears(model, modules).items():
        shapes = {(linear.in_features, linear.out_features) for linear in linears}
        if len(shapes) > 1:
            raise ValueError(f"{module} has different sizes in different layers: {sorted(shapes)}")
        d_in[module], d_out[module] = shapes.pop()
    return d_in, d_out


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block the model is the plain base model, even within `lora.apply_lora`."""
    nobody = object()
    stack = open_adapters.setdefault(model, [])
    stack.append(nobody)
    try:
        yield
    finally:
        stack.remove(nobody)


class ContextEncoder:
    """Reads the features of chunks out of the base model (or of another model), without a second copy of its weights.

    - early_exit: the first `encoder_layer` layers and the final norm -> [n, T, F]
    - per_layer_activations: hidden states 0 .. L-1 -> [n, L, T, F]; state 0 is the embeddings, the last one has passed
      the final norm, as in the authors' code
    - embed_only: the embeddings -> [n, T, F]

    Values at padded positions mean nothing. An adapter applied to the model at the time is ignored. Of a
    vision-language model these are the states of its language part, an image's features in their places.

    `source` is the name or path that the model was loaded by, if any.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder_type: str = "early_exit",
        encoder_layer: int | None = None,
        source: str | None = None,
    ):
        self.model = model
        self.encoder_type = encoder_type
        self.source = source
        n_layers = len(decoder_layers(model))
        if encoder_type == "early_exit":
            self.n_layers_run = max(1, n_layers // 4) if encoder_layer is None else encoder_layer
        elif encoder_type == "per_layer_activations":
            self.n_layers_run = (n_layers if encoder_layer is None else encoder_layer) - 1
        elif encoder_type == "embed_only":
            self.n_layers_run = 0
        else:
            raise ValueError(f"unknown encoder_type {encoder_type!r}")
        if not 0 <= self.n_layers_run <= n_layers:
            raise ValueError(f"encoder_layer {encoder_layer} does not fit a model of {n_layers} layers")

    @classmethod
    def from_config(cls, model: nn.Module, config: HypernetworkConfig, source: str | None = None) -> "ContextEncoder":
        """The encoder that a hypernetwork was made for, reading from `model`."""
        return cls(model, config.encoder_type, config.encoder_layer, source)

    @property
    def feature_size(self) -> int:
        """Length F of one feature vector."""
        return decoder_body(self.model).config.hidden_size

    @property
    def n_states(self) -> int:
        """How many hidden states of each token are read."""
        return self.n_layers_run + 1 if self.encoder_type == "per_layer_activations" else 1

    @cached_property
    def processor(self):
        """The vision-language model's processor, loaded from `source` when it is first needed (or set by hand).

        ValueError where the model reads text only; raises as load_processor does.
        """
        if not reads_images(self.model):
            raise ValueError(
                f"the context encoder ({type(self.model).__name__}) reads text only: images need a hypernetwork that "
                "was trained on a vision-language encoder"
            )
        if self.source is None:
            raise ValueError("this encoder was not loaded by a name: set encoder.processor to the model's processor")
        return load_processor(self.source)

    @torch.no_grad()
    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **images: Tensor,
    ) -> Tensor:
        """Features of chunk token ids [n, T], padded (`attention_mask`) or packed [1, total] (`position_ids`).

        Packed chunks do not see each other: transformers separates them when there is neither mask nor cache.
        `images`: what else a vision-language model's processor made of a chat with images (pixel_values, ...).
        """
        if position_ids is not None and attention_mask is not None:
            raise ValueError("packed chunks are told apart by position_ids alone: leave attention_mask out")
        body = self._shortened_body()
        whole = self._around(body) if images else body
        states: list[Tensor] = []
        handles = []
        try:
            if self.encoder_type == "per_layer_activations":
                for layer in body.layers:
                    handles.append(layer.register_forward_pre_hook(lambda _, args: states.append(args[0])))
            with without_lora(self.model):
                last = whole(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    use_cache=False,
                    **images,
                ).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        if self.encoder_type != "per_layer_activations":
            return last
        return torch.stack([*(state.to(last.device) for state in states), last], dim=1)

    def _shortened_body(self) -> nn.Module:
        """The body with its first layers only; the modules, and so the weights, are the model's own."""
        body = _with_own_parts(decoder_body(self.model))
        body._modules["layers"] = nn.ModuleList(list(body.layers)[: self.n_layers_run])
        if self.encoder_type == "embed_only":
            body._modules[_final_norm_name(self.model)] = nn.Identity()
        return body

    def _around(self, body: nn.Module) -> nn.Module:
        """The vision-language model below its head, with `body` for its language part."""
        original, whole = decoder_body(self.model), _with_own_parts(self.model.base_model)
        path = next(name for name, module in whole.named_modules() if module is original)
        *above, name = path.split(".")
        inner = whole
        for step in above:
            inner._modules[step] = _with_own_parts(inner._modules[step])
            inner = inner._modules[step]
        inner._modules[name] = body
        return whole


def _with_own_parts(module: nn.Module) -> nn.Module:
    """A copy whose parts, the same modules, can be exchanged without changing the original."""
    module = copy.copy(module)
    module._modules = dict(module._modules)
    if "_old_forward" in vars(module):  # a device_map's `forward` runs the original, with all of its layers
        del module.forward
    return module


def check_writes_residual(base_model, module: str) -> None:
    """ValueError where what `module` puts out is not simply added to the residual stream."""
    _, d_out = module_sizes(base_model, [module])
    if d_out[module] != base_model.config.get_text_config().hidden_size:
        usual = " or ".join(default_modules(base_model))
        raise ValueError(f"{module} does not write into the residual stream: use {usual}")
    if hasattr(decoder_layers(base_model)[0], "post_feedforward_layernorm"):
        raise ValueError(
            "this model norms what its layers write (as Gemma does): a block's values are not what it adds"
        )


@torch.no_grad()
def linear_inputs(base_model, module: str, input_ids: Tensor) -> Tensor:
    """x of the target linears in the base model without an adapter: [L, n, length, d_in]."""
    base_model.to(input_ids.device)
    seen: list[Tensor] = []
    hooks = [
        linear.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        for linear in target_linears(base_model, [module])[module]
    ]
    try:
        with without_lora(base_model):
            decoder_body(base_model)(input_ids=input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen)
