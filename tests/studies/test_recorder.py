"""The recorder of the studies: what it adds, what it leaves alone, and that what a study returns can be written."""

import math
from functools import partial

import pandas as pd
import pytest
import tiny_models

from d2l_lib import loading, studies
from d2l_lib.__main__ import main
from d2l_lib.records import read_jsonl


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where records go: the files of a project of its own."""
    (tmp_path / "d2l_lib").mkdir()
    (tmp_path / "d2l_lib" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data" / "full_runs"


def use(monkeypatch, function, files=("one",)):
    """Let the study "probes" be this function."""
    monkeypatch.setitem(studies.STUDIES, "probes", studies.Study("x:y", files, "a study", 7, "things", ""))
    monkeypatch.setattr(studies, "_function", lambda place: function)


def test_it_adds_what_a_row_lacks_and_writes_missing_values_as_null(folder, monkeypatch, capsys):
    table = pd.DataFrame({"n": [1, 2], "share": [0.5, math.nan], "chosen": [True, False]})
    use(monkeypatch, lambda n, seed: {"one": table, "two": table.drop(columns="n")}, ("one", "two"))
    main(["study", "probes", "--seed", "3"])
    first, second = read_jsonl(folder / "one.jsonl")
    assert first == {"n": 1, "share": 0.5, "chosen": True, "seed": 3} | {k: first[k] for k in ("command", "threads")}
    assert first["command"] == "d2l study probes --seed 3" and second["share"] is None
    assert [row["n"] for row in read_jsonl(folder / "two.jsonl")] == [7, 7]
    printed = capsys.readouterr().out
    assert "0.5" in printed and "d2l study" not in printed and "False" not in printed, "what was chosen is shown"


def test_what_is_yielded_is_written_at_once_and_rows_with_a_command_stay(folder, monkeypatch):
    earlier = {"value": 0, "command": "an earlier one"}

    def run(n, seed):
        yield [earlier]
        yield [earlier, {"value": 1}]
        raise ValueError("interrupted")

    use(monkeypatch, run)
    with pytest.raises(SystemExit, match="^d2l study: interrupted"):
        main(["study", "probes", "--n", "2"])
    before, after = read_jsonl(folder / "one.jsonl")
    assert before == earlier and (after["n"], after["seed"], after["command"]) == (2, 0, "d2l study probes --n 2")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base-model", "kinds", "routing", "dial", "report"])
def test_a_study_of_a_random_model_is_recorded(name, folder, monkeypatch):
    model = tiny_models.build_model(window=8192)
    model.answer = partial(model.answer, max_new_tokens=4)  # its answers have no end
    monkeypatch.setattr(loading, "load", lambda source: model)
    monkeypatch.setattr("d2l_lib.base_model.load_base_model", lambda source: (model.base_model, model.tokenizer))
    main(["study", name, "--n", "2", "--seed", "5"])
    for file in studies.STUDIES[name].files:
        rows = read_jsonl(folder / f"{file}.jsonl")
        assert rows and all((row["seed"], row["command"]) == (5, f"d2l study {name} --n 2 --seed 5") for row in rows)
