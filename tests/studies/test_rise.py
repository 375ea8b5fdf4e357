"""The study of the gate's rise: a slope that holds for all numbers of chunks, and its place in a model's folder."""

import math

import pytest
import torch
from test_articles import squad_file
from tiny_models import build_rows_model

from d2l_lib.formats.checkpoints import load_checkpoint, save_checkpoint
from d2l_lib.records import project_root, read_rows
from d2l_lib.studies import rise
from d2l_lib.training import recipes


@pytest.fixture
def file(tmp_path):
    return squad_file(tmp_path, {"a": 8, "b": 8}, 40)[0]


def test_slope_of_levels():
    assert rise.fit({n: 0.3 * math.log(n) for n in rise.SIZES}) == pytest.approx(0.3)
    assert rise.fit({1: 0.5, 4: 1.0}) == pytest.approx(1 / math.log(4))  # one chunk tells nothing
    assert rise.fit({1: 0.0, 4: -2.0}) == 0.0
    assert rise.fit({1: 0.0}) == 0.0


def test_prompts_are_those_that_training_leaves_out():
    every = [row["prompt"] for row in read_rows(project_root() / recipes._UNRELATED)]
    assert rise.never_learned_prompts() == every[:: recipes._UNSEEN]


def test_rows_count_the_prompts_that_open_the_gate(monkeypatch, file):
    monkeypatch.setattr(rise, "SIZES", (1, 4, 16, 10**6))  # the last has too few passages
    model, slope = build_rows_model(), 0.5
    model.hypernetwork.reader.raise_gate(0.0, slope - float(model.hypernetwork.reader.gate_rise))

    def logits(_, prompts, adapter):
        """Without a rise: log(number of chunks) times 0.2, 0.4 or 0.8."""
        size = math.log(len(adapter.blocks))
        return [(share - slope) * size - (size == 0) for share in (0.2, 0.4, 0.8, 0.8)][: len(prompts)]

    monkeypatch.setattr(rise, "_OF_ONE", 4)
    monkeypatch.setattr(rise, "_logits", logits)
    rows = rise.run(model, 8, 0, f"squad={file}", None)
    assert [row["chunks"] for row in rows] == [1, 4, 16]
    assert [row["open_before"] for row in rows] == pytest.approx([0, 0.5, 0.5])
    assert rows[-1]["rise_before"] == pytest.approx(slope)
    assert rows[-1]["rise_fitted"] == pytest.approx(0.8, abs=1e-3)
    assert [row["level"] for row in rows[1:]] == pytest.approx([0.8 * math.log(4), 0.8 * math.log(16)], abs=1e-3)


def test_the_gates_own_logits(file):
    model = build_rows_model()
    adapter = model.internalize("The fen is deep. The mill is old.")
    (alone,) = rise._logits(model, ["Where is the mill?"], adapter)
    first, again = rise._logits(model, ["Who is old?", "Where is the mill?"], adapter)
    assert again == pytest.approx(alone, abs=1e-5)  # no prompt leaves a trace
    assert first != pytest.approx(alone, abs=1e-5)


def test_the_kept_rise_is_that_of_the_record(monkeypatch, tmp_path, file):
    monkeypatch.setattr(rise, "SIZES", (1, 2))
    model = build_rows_model()
    folder = save_checkpoint(tmp_path / "model", model.hypernetwork, {"chunk_tokens": 32}, torch.float16)
    rows = rise.run(model, 4, 0, f"squad={file}", str(folder))
    kept, meta = load_checkpoint(folder)
    assert meta == {"chunk_tokens": 32}
    assert float(kept.reader.gate_rise) == pytest.approx(rows[0]["rise_fitted"], rel=1e-2)
    for name, value in model.hypernetwork.named_parameters():  # nothing else is changed
        if name != "reader.gate_rise":
            assert torch.equal(dict(kept.named_parameters())[name], value.half().float()), name
