"""Models by hub names, from a local cache: stand-ins of the published ones, and the bundled one under another name."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import rehearsal

from d2l_lib.base_model import load_base_model
from d2l_lib.documents import chat_affixes
from d2l_lib.formats import hub
from d2l_lib.records import read_jsonl

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rehearsal") / "home"
    rehearsal.build_cache(folder)
    return folder


def test_the_stand_ins_load_by_their_names_without_a_connection(home):
    """In a process of its own, whose HF_HOME is the cache."""
    code = (
        "import sys, d2l_lib as d2l\n"
        "for name in sys.argv[1:]:\n"
        "    model = d2l.load(name)\n"
        "    adapter = model.internalize('The mayor of Arden is Ila Voss. ' * 40)\n"
        "    print(type(model.base_model).__name__, adapter.n_layers, model.config.n_latent_queries, adapter.rank)\n"
    )
    names = [f"{hub.REPOSITORY}/{rehearsal.CHECKPOINT}", rehearsal.BUNDLED]
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    published, own = done.stdout.splitlines()
    assert published.startswith("Gemma2ForCausalLM 26 208 ")
    assert own.startswith("Qwen3ForCausalLM 4 16 ")


def test_the_stand_in_wraps_as_the_real_base_model_does(home):
    repository = f"models--{rehearsal.BASE_MODEL.replace('/', '--')}"
    _, tokenizer = load_base_model(home / "hub" / repository / "snapshots" / rehearsal.REVISION)
    prefix, suffix = chat_affixes(tokenizer)
    # this tokenizer shows a word behind a special token with the space that it belongs to
    assert tokenizer.decode(prefix).split() == ["<|bos|><start_of_turn>", "user"]
    assert tokenizer.decode(suffix).split() == ["<end_of_turn>", "<start_of_turn>", "model"]
    with pytest.raises(Exception, match="no system turn"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


def shown(outputs: list[dict]) -> list[dict]:
    """Outputs of a cell with what it printed in one piece: how it is cut depends on time."""
    whole: list[dict] = []
    for one in outputs:
        if whole and one["output_type"] == "stream" and one.get("name") == whole[-1].get("name"):
            whole[-1] = whole[-1] | {"text": whole[-1]["text"] + "".join(one["text"])}
        else:
            whole.append(one | ({"text": "".join(one["text"])} if "text" in one else {}))
    return whole


@pytest.mark.slow
@pytest.mark.notebooks
def test_by_a_hub_name_the_bundled_model_answers_as_from_its_folder(home, tmp_path):
    """Notebook 00, run with the name of a repository: its page shows the answers of the bundled folder."""
    project = rehearsal.copy_project(tmp_path / "project")
    page = json.loads((ROOT / "notebooks" / "00_quickstart.ipynb").read_text(encoding="utf-8"))
    cells = rehearsal.run_page("00_quickstart", {"MODEL": rehearsal.BUNDLED}, project, home)
    asked = [
        (by_name, by_folder)
        for by_name, by_folder in zip(cells, page["cells"], strict=True)
        if re.search(r"\banswers?\(", "".join(by_name["source"])) and by_name["cell_type"] == "code"
    ]
    assert len(asked) >= 3
    for by_name, by_folder in asked:
        assert shown(by_name["outputs"]) == shown(by_folder["outputs"]) != []
    (row,) = read_jsonl(project / "data" / "results" / "00_quickstart.jsonl")
    assert row["exact_match"] and row["preset"] == rehearsal.BUNDLED
