"""Rehearse a real model without its download: the notebooks by hub names, on small stand-ins in the hub cache's layout.

    python -m d2l_lib.studies.rehearsal

Every name, file, chat template, layer count and Perceiver size is the published one; widths of the base model are small
and all weights random, so that what is answered means nothing, and that everything fits together is seen before a GPU
is paid for. One more repository holds the bundled model under a made-up name: by a hub name it must answer as it does
from its folder. What the pages printed is recorded in data/full_runs/rehearsal.jsonl.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from d2l_lib import arguments as options
from d2l_lib.base_model import bundled_path, load_tokenizer
from d2l_lib.formats import hub
from d2l_lib.formats.checkpoints import PUBLISHED, export
from d2l_lib.hypernetwork import Hypernetwork
from d2l_lib.loading import load
from d2l_lib.presets import preset
from d2l_lib.records import one_line_errors, project_root, write_jsonl
from d2l_lib.studies import notebooks
from d2l_lib.training.step import hypernetwork_config

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
# Which pages are run, and with which parameters.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "a published checkpoint": ("00_quickstart", {"MODEL": f"{hub.REPOSITORY}/{CHECKPOINT}"}),
    "a repository of one's own": ("00_quickstart", {"MODEL": BUNDLED}),
    "a published recipe": (
        "02_train_hypernetwork",
        {
            "PRESET": "paper-gemma",
            "LIVE_STEPS": 2,
            "LIVE_CHANGES": ["contexts=2", "batches_per_step=2"],
            "N": 2,
        },
    ),
}


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


def rehearse(name: str, project: Path, home: Path) -> list[dict]:
    """Run one of RUNS in a copy of the project, with `home` as HF_HOME and no connection; one row for each code cell.

    Cells tagged "rehearsal" show what is recorded here, and are left out. Raises notebooks.NotebookFailed with the cell
    that failed.
    """
    stem, parameters = RUNS[name]
    path = project / "notebooks" / f"{stem}.ipynb"
    page = json.loads(path.read_text(encoding="utf-8"))
    page["cells"] = [cell for cell in page["cells"] if "rehearsal" not in cell["metadata"].get("tags", [])]
    path.write_text(json.dumps(notebooks.inject_parameters(page, parameters)), encoding="utf-8")
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(project)}
    executed = notebooks.execute(path, project / "executed", environment=environment)
    cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    facts = {"run": name, "notebook": stem, "parameters": parameters}
    return [
        facts | {"cell": cell["execution_count"], "code": "".join(cell["source"]), "output": _printed(cell)}
        for cell in cells
        if cell["cell_type"] == "code" and cell["source"]
    ]


def _printed(cell: Mapping) -> str:
    """What a cell printed and returned, as plain text; of a figure or a widget, its plain form."""
    texts = []
    for output in cell["outputs"]:
        if output["output_type"] == "stream" and output["name"] == "stdout":
            texts.append("".join(output["text"]))
        elif output["output_type"] == "execute_result":
            data = output["data"]
            plain = notebooks.WIDGET_PLACEHOLDER if notebooks.WIDGET_MIME in data else "".join(data["text/plain"])
            texts.append(plain + "\n")
    return "".join(texts).rstrip()


@one_line_errors("rehearsal")
def main() -> None:
    """Run all of RUNS and record what they printed."""
    options.Parser(prog="python -m d2l_lib.studies.rehearsal", description=main.__doc__).parse_args()
    root = project_root()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary) / "hub_home"
        build_cache(home)
        for number, name in enumerate(RUNS):
            project = Path(temporary) / f"project_{number}"
            for folder in ("d2l_lib", "data", "notebooks", "figures"):
                shutil.copytree(root / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
            print(f"{name} ...", flush=True)
            rows += rehearse(name, project, home)
    for row in rows:
        row["command"] = "python -m d2l_lib.studies.rehearsal"
    write_jsonl(root / "data" / "full_runs" / "rehearsal.jsonl", rows)
    print(f"recorded {len(rows)} cells in data/full_runs/rehearsal.jsonl")


if __name__ == "__main__":
    main()
