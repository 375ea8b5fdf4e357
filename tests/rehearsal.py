"""Real models without their download: small stand-ins under the published names, in the layout of the hub's cache.

Every name, file, chat template, layer count and Perceiver size is the published one; widths of the base model are small
and all weights random. One more repository holds the bundled model under a made-up name: by a hub name it must answer
as it does from its folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from d2l_lib.base_model import bundled_path, load_tokenizer
from d2l_lib.formats import hub
from d2l_lib.formats.checkpoints import PUBLISHED, export
from d2l_lib.hypernetwork import Hypernetwork
from d2l_lib.loading import load
from d2l_lib.presets import preset
from d2l_lib.studies import notebooks
from d2l_lib.training.recipes import hypernetwork_config

ROOT = Path(__file__).resolve().parent.parent
REVISION = "0" * 40
BASE_MODEL = "google/gemma-2-2b-it"
CHECKPOINT = "gemma_demo"
BUNDLED = "your-name/doc-to-lora-tiny"
# Turns of user and model, each trimmed, no system turn: what the base model's own template writes.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}{% if turn.role == 'system' %}{{ raise_exception('no system turn') }}"
    "{% endif %}<start_of_turn>{{ 'model' if turn.role == 'assistant' else turn.role }}\n{{ turn.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def build_cache(home: Path, seed: int = 0) -> None:
    """Fill an empty HF_HOME: the stand-ins of BASE_MODEL and of CHECKPOINT, and the bundled model as BUNDLED."""
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(str(bundled_path("tiny") / "base_model"))
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.add_special_tokens({"eos_token": "<end_of_turn>", "extra_special_tokens": ["<start_of_turn>"]})
    config = AutoConfig.for_model(
        "gemma2",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=8192,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    base_model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    folder = snapshot_in(home, BASE_MODEL)
    base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    hypernetwork = Hypernetwork(hypernetwork_config(preset("paper-gemma").needle, base_model, BASE_MODEL))
    with torch.no_grad():
        for parameter in hypernetwork.parameters():  # those that start at zero too
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    step, _ = hub.PUBLISHED_MODELS[CHECKPOINT]
    export(hypernetwork, snapshot_in(home, hub.REPOSITORY) / CHECKPOINT / f"checkpoint-{step}" / PUBLISHED, BASE_MODEL)

    own = snapshot_in(home, BUNDLED)
    own.rmdir()
    load("tiny").save(own, include_base=True)


def snapshot_in(home: Path, repository: str) -> Path:
    """An empty snapshot of a repository in the layout of the hub's cache, where `home` is HF_HOME."""
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    (folder / "snapshots" / REVISION).mkdir(parents=True)
    return folder / "snapshots" / REVISION


def run_page(stem: str, parameters: Mapping[str, Any], project: Path, home: Path) -> list[dict]:
    """The cells of a notebook, run in a copy of the project with `home` as HF_HOME and no connection."""
    path = project / "notebooks" / f"{stem}.ipynb"
    page = json.loads((ROOT / "notebooks" / path.name).read_text(encoding="utf-8"))
    path.write_text(json.dumps(notebooks.inject_parameters(page, dict(parameters))), encoding="utf-8")
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(project)}
    executed = notebooks.execute(path, project / "executed", environment=environment)
    return json.loads(executed.read_text(encoding="utf-8"))["cells"]


def copy_project(folder: Path) -> Path:
    """A copy of what a notebook needs, which may write into it."""
    for name in ("d2l_lib", "data", "notebooks", "figures"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    if (ROOT / ".cache").exists():  # a base model that was prepared already
        (folder / ".cache").symlink_to(ROOT / ".cache")
    return folder
