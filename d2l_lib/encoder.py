"""Hidden states of the base model, or of another model, as the hypernetwork reads a document."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad

from d2l_lib import layers, onednn
from d2l_lib.base_model import (
    decoder_body,
    decoder_layers,
    default_modules,
    final_norm_name,
    load_processor,
    module_sizes,
    reads_images,
    target_linears,
)
from d2l_lib.documents import TemplateRefuses, from_template
from d2l_lib.hypernetwork import HypernetworkConfig
from d2l_lib.lora import hooked, without_lora


class ContextEncoder:
    """The features of chunks from the base model (or another model), without a second copy of its weights.

    - early_exit: the first `encoder_layer` layers and the final norm -> [n, T, F]
    - per_layer_activations: hidden states 0 .. L-1 -> [n, L, T, F]; state 0 is the embeddings, the last one has passed
      the final norm, as in the authors' code
    - embed_only: the embeddings -> [n, T, F]
    - hidden_states: the states after `encoder_layers` base layers each, side by side -> [n, T, states * F]

    source: the name or path that the model was loaded by, if any.

    Values at padded positions mean nothing. Applied adapters are ignored. A vision-language model gives the states of
    its language part, with an image's features in their places.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder_type: str = "early_exit",
        encoder_layer: int | None = None,
        source: str | None = None,
        encoder_layers: Sequence[int] = (),
    ):
        self.model = model
        self.encoder_type = encoder_type
        self.source = source
        self.encoder_layers = tuple(encoder_layers)
        n_layers = len(decoder_layers(model))
        if encoder_type == "early_exit":
            self.n_layers_run = max(1, n_layers // 4) if encoder_layer is None else encoder_layer
        elif encoder_type == "per_layer_activations":
            self.n_layers_run = (n_layers if encoder_layer is None else encoder_layer) - 1
        elif encoder_type == "embed_only":
            self.n_layers_run = 0
        elif encoder_type == "hidden_states" and encoder_layers:
            self.n_layers_run = max(encoder_layers)
            if min(encoder_layers) < 0 or self.n_layers_run > n_layers:
                raise ValueError(f"encoder_layers {self.encoder_layers} do not fit a model of {n_layers} layers")
        else:
            raise ValueError(f"unknown encoder_type {encoder_type!r}")
        if not 0 <= self.n_layers_run <= n_layers:
            raise ValueError(f"encoder_layer {encoder_layer} does not fit a model of {n_layers} layers")

    @classmethod
    def from_config(cls, model: nn.Module, config: HypernetworkConfig, source: str | None = None) -> "ContextEncoder":
        """The encoder of a hypernetwork's config, on `model`."""
        return cls(model, config.encoder_type, config.encoder_layer, source, config.encoder_layers)

    @property
    def feature_size(self) -> int:
        """Length F of one feature vector."""
        return decoder_body(self.model).config.hidden_size * max(1, len(self.encoder_layers))

    @property
    def n_states(self) -> int:
        """Number of hidden states per token."""
        return self.n_layers_run + 1 if self.encoder_type == "per_layer_activations" else 1

    @cached_property
    def processor(self):
        """The vision-language model's processor, loaded from `source` on first use, or set by hand.

        ValueError for a model that reads text only and for one without a source; raises as load_processor does.
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
        **images: Tensor,
    ) -> Tensor:
        """Features of chunk token ids [n, T]; `attention_mask` [n, T] is 0 at padding.

        images: the processor's other outputs for a chat with images (pixel_values, ...).
        """
        if not images and self._can_be_written_out(attention_mask):
            with without_lora(self.model):
                return self._written_out(input_ids)
        states: list[Tensor] = []
        body = self._shortened_body(states)
        whole = self._around(body) if images else body
        with without_lora(self.model):
            last = whole(
                input_ids=input_ids,
                attention_mask=attention_mask,
                use_cache=False,
                **images,
            ).last_hidden_state
        return self._features([*(state.to(last.device) for state in states), last])

    def _features(self, states: Sequence[Tensor]) -> Tensor:
        """Features of the states that a pass leaves: those before each layer, if they are asked for, and the last."""
        if self.encoder_type == "hidden_states":
            return torch.cat([states[layer] for layer in self.encoder_layers], dim=-1)
        return torch.stack(states, dim=1) if self.encoder_type == "per_layer_activations" else states[-1]

    def _can_be_written_out(self, attention_mask: Tensor | None) -> bool:
        """Whether this package's own layers read these chunks: where products are oneDNN's, and padding comes last.

        No token sees those after it, so padding on the right changes nothing before it.
        """
        run = decoder_layers(self.model)[: self.n_layers_run]
        if onednn.in_use() is None or not run:
            return False
        if attention_mask is not None:
            mask = attention_mask.bool()
            if mask.dim() != 2 or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
                return False
        return layers.can_be_written_out(self.model, run) and onednn.are_packable(layers.weights_of(run))

    def _written_out(self, input_ids: Tensor) -> Tensor:
        """`encode` by this package's own layers, with some tokens after the end, which nothing before them sees."""
        (n, n_tokens), body, states = input_ids.shape, decoder_body(self.model), []
        length = onednn.round_up(n_tokens, onednn.LENGTH_STEP)
        x = body.embed_tokens(pad(input_ids, (0, length - n_tokens))).flatten(0, 1)
        rotary = layers.rotary_of(body, x, torch.arange(length).repeat(n))
        attend = layers.causally(n, length)
        for layer in decoder_layers(self.model)[: self.n_layers_run]:
            if self.encoder_type != "early_exit":
                states.append(x)
            x = layers.written_out(layer, x, rotary, attend)
        states.append(x if self.encoder_type == "hidden_states" else body.norm(x))
        return self._features([state.view(n, length, -1)[:, :n_tokens] for state in states])

    def _shortened_body(self, states: list[Tensor] | None = None) -> nn.Module:
        """The body with its first layers only; modules and weights are the model's own.

        With "per_layer_activations" and "hidden_states" a forward pass leaves the input of each layer in `states`.
        """
        run = list(decoder_body(self.model).layers)[: self.n_layers_run]
        if self.encoder_type in ("per_layer_activations", "hidden_states") and states is not None:
            run = [_watched(layer, states) for layer in run]
        body = _with_own_parts(decoder_body(self.model))
        body._modules["layers"] = nn.ModuleList(run)
        if self.encoder_type in ("embed_only", "hidden_states"):
            body._modules[final_norm_name(self.model)] = nn.Identity()
        return body

    def _around(self, body: nn.Module) -> nn.Module:
        """The vision-language model below its head, with `body` as its language part."""
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
    """A copy with the same parts, which can be replaced without a change to the original."""
    module = copy.copy(module)
    module._modules = dict(module._modules)
    if "_old_forward" in vars(module):  # a device_map's `forward` runs all layers of the original
        del module.forward
    return module


def _watched(layer: nn.Module, states: list[Tensor]) -> nn.Module:
    """A copy of the layer, with the same parts, that leaves its input in `states`; the original gets no hook."""
    layer = copy.copy(layer)
    layer._forward_pre_hooks = OrderedDict(layer._forward_pre_hooks)
    layer.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    return layer


def image_inputs(processor, image: Image.Image) -> dict[str, Tensor]:
    """The encoder's inputs for one picture: input_ids, attention_mask [1, T], pixel_values, ...

    The chat is that of a text chunk (see `documents`) with the picture as the user's turn.
    ValueError for a processor without a chat template.
    """
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            "this processor has no chat template, and the method reads images in chat format: use the "
            "instruction-tuned version of the model, or set processor.chat_template"
        )
    user = {"role": "user", "content": [{"type": "image", "image": image}]}
    system = {"role": "system", "content": [{"type": "text", "text": ""}]}
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    try:
        inputs = from_template(processor, [system, user], **options)
    except TemplateRefuses:  # no system turn in this template
        inputs = from_template(processor, [user], **options)
    return {name: one for name, one in inputs.items() if isinstance(one, Tensor)}


def check_writes_residual(base_model, module: str) -> None:
    """ValueError unless the output of `module` is added to the residual stream as it is."""
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
    """x [L, n, length, d_in] of the target linears in the base model, without an adapter."""
    base_model.to(input_ids.device)
    seen: list[Tensor] = []
    with ExitStack() as stack:
        for linear in target_linears(base_model, [module])[module]:
            stack.enter_context(hooked(linear.register_forward_pre_hook, lambda _, inputs: seen.append(inputs[0])))
        stack.enter_context(without_lora(base_model))
        decoder_body(base_model)(input_ids=input_ids, use_cache=False)
    return torch.stack(seen)
