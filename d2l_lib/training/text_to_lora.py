"""A baseline that reads a text as one vector: Text-to-LoRA (Charakorn et al., arXiv 2506.06105).

    features [n, T, F] --mean over tokens--> [n, F] --MLP, told which layer and module--> A, B of that layer and module

The mean keeps a text's topic, but not which value belongs to which name; Doc-to-LoRA's Perceiver keeps both. Documents
and loss are the same (`step.Internalization`), with each document in one chunk.

    d2l train --stage text-to-lora                                        # trained, into runs/
    d2l study methods --text-to-lora runs/tiny/text_to_lora_seed0/final   # compared
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from d2l_lib.base_model import load_base_model
from d2l_lib.formats.checkpoints import config_of_settings, read_safetensors
from d2l_lib.formats.writing import FolderKind, atomic_folder, read_whole
from d2l_lib.hypernetwork import BlockWriter, HypernetworkConfig, Loras, zero_padding
from d2l_lib.model import DocToLoRA
from d2l_lib.presets import DistillationPreset, Preset
from d2l_lib.records import read_json, read_rows, write_jsonl
from d2l_lib.training.contexts import DistillationBatches, WorldDocuments
from d2l_lib.training.loop import Run
from d2l_lib.training.processes import is_first_process
from d2l_lib.training.recipes import Base, fit_hypernetwork, hypernetwork_config


class TextToLoRA(BlockWriter):
    """Writes one block per text from the mean of its features; interface and shapes of `hypernetwork.Hypernetwork`."""

    def __init__(self, config: HypernetworkConfig):
        super().__init__()
        if config.layer_to_layer:
            raise ValueError("one vector per text is read from one hidden state: use early_exit or embed_only")
        self.config = config
        d, n_modules = config.latent_size, len(config.modules)
        width = config.rank * max(config.d_in[m] + config.d_out[m] for m in config.modules)
        self.text = nn.Sequential(nn.LayerNorm(config.feature_size), nn.Linear(config.feature_size, d))
        self.place = nn.Parameter(torch.randn(config.n_layers, n_modules, d))
        self.mlp = nn.Sequential(
            nn.LayerNorm(2 * d), nn.Linear(2 * d, 4 * d), nn.SiLU(), nn.Linear(4 * d, d), nn.SiLU(), nn.LayerNorm(d)
        )
        self.head = nn.Linear(d, width)
        self.scaler_B = nn.ParameterDict({m: torch.zeros(1, config.n_layers, config.rank, 1) for m in config.modules})

    def forward(self, features: Tensor, attention_mask: Tensor, **options) -> Loras:
        """Blocks {module: (A [n, L, r, d_in], B [n, L, r, d_out])}; features [n, T, F], attention_mask [n, T].

        A fresh network writes B = 0. `options` of `Hypernetwork.forward` that change no number are ignored.
        """
        features, mask = zero_padding(features.float(), attention_mask)
        weight = torch.ones(features.shape[:2], device=features.device) if mask is None else mask.float()
        mean = (features * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
        text = self.text(mean)[:, None, None].expand(-1, *self.place.shape[:2], -1)
        rows = self.head(self.mlp(torch.cat([text, self.place.expand_as(text)], dim=-1)))  # [n, L, M, r * D]
        rows = rows.unflatten(-1, (self.config.rank, -1))
        blocks = {}
        for index, m in enumerate(self.config.modules):
            d_in, d_out = self.config.d_in[m], self.config.d_out[m]
            A, B = rows[:, :, index, :, :d_in], rows[:, :, index, :, d_in : d_in + d_out]
            blocks[m] = F.normalize(A, dim=-1) / math.sqrt(self.config.rank), B * self.scaler_B[m]
        return blocks

    def bias(self) -> None:
        """None: every block belongs to a text."""
        return


def train_text_to_lora(p: DistillationPreset, base: Base, run: Run) -> TextToLoRA:
    """A text-to-LoRA hypernetwork trained on fresh documents of the world, resumable."""
    p = replace(p, single_chunk_share=1.0, use_bias=False, last_layer=False)
    torch.manual_seed(run.seed)
    network = TextToLoRA(replace(hypernetwork_config(p, base.model, base.name), scale=1.0))
    batches = DistillationBatches(base.tokenizer, p, [WorldDocuments(base.tokenizer, p)], run.seed, [1.0])
    fit_hypernetwork(p, base, network, batches, run)
    return network


_FILES = ("config.json", "model.safetensors")


def _written_files(folder: Path) -> tuple[str, ...]:
    """The files of an earlier model, after a check that its settings are a hypernetwork's."""
    HypernetworkConfig.from_dict(read_json(folder / "config.json"))
    return _FILES


def save_text_to_lora(folder: Path, network: TextToLoRA) -> None:
    """Write weights and sizes into `folder`, completely or not at all."""
    with atomic_folder(folder, FolderKind("text-to-LoRA model", _FILES, _written_files)) as temporary:
        save_file({name: t.contiguous() for name, t in network.state_dict().items()}, temporary / "model.safetensors")
        (temporary / "config.json").write_text(json.dumps(network.config.to_dict(), indent=1))


def load_text_to_lora(folder: str | Path, base_name: str = "") -> DocToLoRA:
    """A model that turns each document, up to the base model's window, into one block from one vector.

    FileNotFoundError if `folder` has no model. ValueError if the tensors do not fit config.json.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no text-to-LoRA model in {folder}: train one with d2l train --stage text-to-lora")
    settings, tensors = read_whole(
        folder, lambda place: (read_json(place / "config.json"), read_safetensors(place / "model.safetensors"))
    )
    config = config_of_settings(settings, folder / "config.json")
    network = TextToLoRA(config)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error)[:200]
        raise ValueError(f"{folder}: the tensors do not fit config.json ({reason}): train it again") from error
    base_model, tokenizer = load_base_model(base_name or config.base_model)
    network = network.to(base_model.device).eval().requires_grad_(False)
    return DocToLoRA(base_model, tokenizer, network, base_source=base_name or config.base_model)


def remake_text_to_lora(p: Preset, runs: Path, data: Path, seed: int) -> None:
    """Train the baseline into `runs`; its log also goes to `data`."""
    run = Run(runs / p.name / f"text_to_lora_seed{seed}", seed)
    network = train_text_to_lora(p.qa.world, Base.load(p.name, p.qa.world), run)
    if is_first_process():
        save_text_to_lora(run.folder / "final", network)
        log = [{"seed": seed, **line} for line in read_rows(run.folder / "log.jsonl")]
        write_jsonl(data / "full_runs" / f"text_to_lora_seed{seed}_training.jsonl", log)
