"""The rehearsal: its stand-ins load by their hub names, and its record is of the pages as they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from d2l_lib.base_model import load_base_model
from d2l_lib.documents import chat_affixes
from d2l_lib.formats import hub
from d2l_lib.records import read_jsonl
from d2l_lib.studies import rehearsal

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rehearsal") / "home"
    rehearsal.build_cache(folder)
    return folder


@pytest.fixture(scope="module")
def recorded() -> list[dict]:
    return read_jsonl(ROOT / "data" / "full_runs" / "rehearsal.jsonl")


def page_cells(stem: str) -> list[dict]:
    page = json.loads((ROOT / "notebooks" / f"{stem}.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in page["cells"] if cell["cell_type"] == "code"]
    return [cell for cell in code if "rehearsal" not in cell["metadata"].get("tags", [])]


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


@pytest.mark.parametrize("name", rehearsal.RUNS)
def test_what_is_recorded_is_the_pages_code(recorded, name):
    """A page that changed after the record was made fails here: python -m d2l_lib.studies.rehearsal makes it anew."""
    stem, parameters = rehearsal.RUNS[name]
    rows = [row for row in recorded if row["run"] == name]
    cells = [cell for cell in page_cells(stem) if "".join(cell["source"])]
    assert [row["cell"] for row in rows] == list(range(1, len(cells) + 1))
    assert {json.dumps(row["parameters"]) for row in rows} == {json.dumps(parameters)}
    for row, cell in zip(rows, cells, strict=True):
        if "parameters" not in cell["metadata"].get("tags", []):
            assert row["code"] == "".join(cell["source"])


def test_by_a_hub_name_the_bundled_model_answers_as_from_its_folder(recorded):
    rows = [row for row in recorded if row["run"] == "a repository of one's own"]
    asked = [
        (row, cell) for row, cell in zip(rows, page_cells("00_quickstart"), strict=True) if "answer(" in row["code"]
    ]
    assert len(asked) >= 2
    for row, cell in asked:
        printed = "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")
        assert row["output"] == printed.rstrip()


def test_cells_that_show_the_record_are_left_out(tmp_path, monkeypatch):
    """And what a cell printed and returned is kept; progress bars and warnings are not."""
    cells = [
        {"source": "MODEL = None", "metadata": {"tags": ["parameters"]}},
        {"source": "import sys\nprint(MODEL)\nprint('a bar', file=sys.stderr)\n{'a': 1}", "metadata": {}},
        {"source": "raise ValueError('shows the record')", "metadata": {"tags": ["rehearsal"]}},
    ]
    code = {"cell_type": "code", "outputs": [], "execution_count": None}
    page = {
        "cells": [code | cell | {"id": f"c{i}"} for i, cell in enumerate(cells)],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "00_page.ipynb").write_text(json.dumps(page))
    monkeypatch.setitem(rehearsal.RUNS, "a page", ("00_page", {"MODEL": "a/b"}))
    rows = rehearsal.rehearse("a page", tmp_path, tmp_path / "home")
    assert [(row["cell"], row["output"]) for row in rows] == [(1, ""), (2, "a/b\n{'a': 1}")]
    assert rows[1]["parameters"] == {"MODEL": "a/b"} and rows[0]["code"] == "MODEL = 'a/b'"
    monkeypatch.setitem(rehearsal.RUNS, "a page", ("00_page", {"NAME": "a/b"}))
    with pytest.raises(KeyError, match="does not assign 'NAME'"):
        rehearsal.rehearse("a page", tmp_path, tmp_path / "home")
