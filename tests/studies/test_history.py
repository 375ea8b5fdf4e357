"""Today's costs beside an older commit's: both states take turns at the same tasks, and compute the same."""

from pathlib import Path

import pytest

from d2l_lib.__main__ import main
from d2l_lib.records import read_jsonl
from d2l_lib.studies import history, random_models

HERE = Path(__file__).resolve().parents[2]


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Tasks of no time, and a record in an empty folder."""
    monkeypatch.setattr(history, "_TASKS", [("internalize", 2)])
    monkeypatch.setattr(history, "commit_of", lambda checkout: "abcdef0")
    monkeypatch.setattr("d2l_lib.studies.record_path", lambda name: tmp_path / f"{name}.jsonl")
    return tmp_path


def test_states_take_turns_and_a_row_says_what_was_measured(short, monkeypatch):
    asked = []

    def ask(process, *task):
        asked.append(process)
        return (6.0, 2.0) if process == "before" else (2.0 + asked.count("now"), 2.5)

    class Served:
        def __init__(self, place):
            self.name = "before" if place == HERE / "old" else "now"

        def __enter__(self):
            return self.name

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(history, "_served", Served)
    monkeypatch.setattr(history, "_ask", ask)
    assert main(["study", "history", "--n", "3", "--before", str(HERE / "old")]) == 0
    rows = read_jsonl(short / "history.jsonl")
    assert [row["model"] for row in rows] == list(random_models.CONFIGURATIONS)
    assert asked == ["before", "now"] * 6
    first = rows[0]
    assert (first["before_seconds"], first["seconds"], first["ratio"]) == (6.0, 4.0, 1.5)  # 3, 4 and 5 seconds now
    assert (first["ratio_low"], first["ratio_high"]) == (1.35, 1.75) and first["difference"] == 0.25
    assert (first["commit"], first["chunks"], first["n"], first["seed"]) == ("abcdef0", 2, 3, 0)


def test_both_states_build_the_same_model_and_compute_the_same(short, monkeypatch):
    monkeypatch.setattr(random_models, "CONFIGURATIONS", {"few latents": {}})  # here; the processes know all
    (rows,) = history.run(1, 0, HERE)
    assert rows[0]["difference"] == 0 and rows[0]["seconds"] > 0


@pytest.mark.parametrize("is_package", [False, True])
def test_a_folder_that_cannot_do_the_tasks_is_told_of(is_package, tmp_path, capfd):
    if is_package:
        (tmp_path / "d2l_lib").mkdir()
        (tmp_path / "d2l_lib" / "__init__.py").touch()
    with history._served(tmp_path) as process, pytest.raises(RuntimeError, match="is it a checkout, and not too old"):
        history._ask(process, "internalize", "many latents", 1, 0)
    told = capfd.readouterr().err  # Python finds the modules of this project, or none
    assert "is not of the package in" in told or "No module named" in told
