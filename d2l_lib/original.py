"""The names that the original's Python example imports (SakanaAI/doc-to-lora, examples/python_api.py).

One line in place of its three imports runs it here:

    from d2l_lib.original import ModulatedPretrainedModel, get_tokenizer, torch

`torch.load` is the restricted reader whatever `weights_only` says: a checkpoint's pickle is never run. A document may
be longer than a chunk. The model does everything that a `DocToLoRA` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch as _torch
from torch import Tensor

from d2l_lib.base_model import load_tokenizer, locate
from d2l_lib.formats import pickles
from d2l_lib.formats.checkpoints import build_hypernetwork, parse_published
from d2l_lib.loading import Choices, assemble
from d2l_lib.model import DocToLoRA


class _Torch:
    """PyTorch, whose `load` reads published checkpoints and nothing else."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_torch, name)

    @staticmethod
    def load(f: str | Path | BinaryIO, map_location: Any = None, **_: Any) -> dict[str, Any]:
        """The content of a published checkpoint, tensors on the CPU; all options but the file are ignored.

        The path of a folder base_model/ beside the file replaces the stored one. Raises as `pickles.read` does.
        """
        content = pickles.read(f)
        if isinstance(f, (str, Path)) and (beside := Path(f).absolute().parent / "base_model").is_dir():
            content["base_model_name_or_path"] = str(beside)
        return content


torch = _Torch()


def get_tokenizer(name: str | Path, **options: Any):
    """The tokenizer of a base model, with padding on the left and chats as token ids, as in transformers 4."""
    tokenizer = load_tokenizer(locate(name), padding_side="left", truncation_side="left", **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, return_dict=False)
    return tokenizer


class ModulatedPretrainedModel(DocToLoRA):
    """A DocToLoRA under its original name, with the original's `base_model`, `device`, `internalize` and `reset`."""

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Any],
        train: bool = False,
        *,
        use_sequence_packing: bool = False,
        use_flash_attn: bool = False,
        base_model: str | Path | None = None,
        device: str | _torch.device | None = None,
        dtype: _torch.dtype | None = None,
    ) -> ModulatedPretrainedModel:
        """The model of `torch.load`'s content, which stays unchanged; base_model, device, dtype: as in `d2l_lib.load`.

        Options for packing and flash attention are ignored: they change no answer. ValueError for train=True.
        """
        if train:
            raise ValueError("this model only answers: pass train=False, and train with d2l_lib.training.recipes")
        config, tensors, stored = parse_published(state_dict)
        hypernetwork = build_hypernetwork(config, tensors)
        return assemble(hypernetwork, {"base_model": stored}, Choices(device, dtype, base_model), kind=cls)

    def generate(self, *, input_ids: Tensor | Mapping[str, Tensor], **options: Any) -> Tensor:
        """`DocToLoRA.generate`; input_ids may also be the mapping that transformers 5 makes of a chat."""
        if isinstance(input_ids, Mapping):
            options = {"attention_mask": input_ids.get("attention_mask")} | options
            input_ids = input_ids["input_ids"]
        return super().generate(input_ids, **options)
