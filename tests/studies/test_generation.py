"""What self-generation costs: every way makes the same answers, and its rows say what was compared."""

from pathlib import Path

import numpy as np
import pytest

from d2l_lib import studies
from d2l_lib.__main__ import main
from d2l_lib.records import read_jsonl
from d2l_lib.studies import generation
from d2l_lib.studies.generation import WAYS
from d2l_lib.training.settings import Settings


def test_the_command_compares_all_ways_on_the_same_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(studies, "record_path", lambda name: tmp_path / f"{name}.jsonl")
    assert main(["study", "generation", "--n", "1", "--documents", "5"]) == 0
    rows = read_jsonl(tmp_path / "generation.jsonl")
    assert [(row["way"], row["processes"]) for row in rows] == list(WAYS)
    assert len({row["answers"] for row in rows}) == 1 and 30 < rows[0]["answers"] <= 40
    for row in rows:
        assert row["command"] == "d2l study generation --n 1 --documents 5" and row["seed"] == 0 and row["n"] == 1
        assert row["compared_with"] == "token by token" and row["different_ids"] == 0
        assert row["per_cpu_second"] > 0 and row["per_wall_second"] > 0 and row["most_steps"] <= 2
    one, two, base, _ = rows
    assert base["ratio"] == 1 and base["different_values"] == base["most_steps"] == 0
    assert one["different_values"] == two["different_values"] < one["values"] / 4, "two processes make the same values"


def test_an_older_checkout_makes_its_shards_in_a_python_of_its_own(tmp_path):
    settings = Settings(documents=2, seed=4, shard_size=1)
    made = generation._make_before(Path(__file__).resolve().parents[2], settings, tmp_path / "before")
    generation._make("guesses checked", settings, tmp_path / "now", 0, 1)
    assert made["cpu"] > 0 and made["begin"] < made["end"]
    before, now = (generation._answers(tmp_path / name) for name in ("before", "now"))
    assert before[0] == now[0] and len(now[0]) > 8
    assert generation._difference([now], [before])["different_values"] == 0


def test_differences_are_counted_in_steps_of_float16():
    ours = [([[1, 2], [3]], np.array([[0.5, 16], [1, 2], [4, 8]], np.float16))]
    theirs = [([[1, 2], [3]], np.array([[0.5, 16.03125], [1, 2], [4, 8]], np.float16))]
    row = generation._difference(ours, theirs)
    assert row == {"different_ids": 0, "different_values": 1, "values": 6, "most_steps": 2.0}
    row = generation._difference(ours, [([[1, 2], [4]], theirs[0][1])])
    assert row["different_ids"] == 1 and row["different_values"] is None
    assert generation._quartiles("x", np.array([1, 2, 3.0])) == pytest.approx({"x": 2, "x_low": 1.5, "x_high": 2.5})
