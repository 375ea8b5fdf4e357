"""The watcher: every whole checkpoint once, none that is half-written, the same after a restart."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import train_small
from safetensors.torch import load_file

from d2l_lib.__main__ import main
from d2l_lib.records import read_jsonl
from d2l_lib.studies import watch
from d2l_lib.training.loop import Run
from d2l_lib.training.recipes import Base, train_needle


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short needle training with two checkpoints, and its base model in a folder."""
    folder = tmp_path_factory.mktemp("run")
    model, tokenizer = train_small.small_base()
    base = folder / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    p = replace(train_small.SMALL, readout=None, polish_steps=0, steps=4, warmup_steps=1, learning_rate=1e-2)
    hypernetwork = train_needle(p, Base(model, tokenizer, str(base)), Run(folder / "run", save_steps=2, keep=None))
    return folder / "run", model, tokenizer, hypernetwork


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    return tmp_path / "run"


def test_two_checkpoints_are_scored_once_each_also_after_a_restart(run, copy, capsys):
    arguments = [str(copy), "--lengths", "64", "--n", "2", "--once"]
    main(["watch", *arguments])
    lines = read_jsonl(copy / "scores.jsonl")
    assert [(line["checkpoint"], line["step"]) for line in lines] == [("checkpoint-2", 2), ("checkpoint-4", 4)]
    assert all(line["task"] == "needle" and line["n"] == 2 and 0 <= line["exact_match"] <= 1 for line in lines)
    before = (copy / "scores.jsonl").read_bytes()
    main(["watch", *arguments])
    assert (copy / "scores.jsonl").read_bytes() == before
    assert capsys.readouterr().out.count("checkpoint checkpoint-") == 2


def test_the_model_of_a_checkpoint_is_the_trained_one(run):
    folder, model, tokenizer, hypernetwork = run
    last = watch.load_training_checkpoint(folder / "checkpoint-4", model, tokenizer)
    mine, theirs = hypernetwork.state_dict(), last.hypernetwork.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert last.chunk_tokens == train_small.SMALL.chunk_tokens
    first = watch.load_training_checkpoint(folder / "checkpoint-2", model, tokenizer)
    assert any(not torch.equal(mine[name], tensor) for name, tensor in first.hypernetwork.state_dict().items())


def test_half_written_and_deleted_checkpoints_are_left_alone(run, copy, monkeypatch):
    _, model, tokenizer, _ = run
    state = copy / "checkpoint-4" / "trainer_state.json"
    whole = state.read_text()
    state.write_text(whole[:100])
    seen = []

    def score(loaded):
        seen.append(float(loaded.hypernetwork.head.weight.sum()))
        return {"score": 1.0}

    scores = copy / "scores.jsonl"
    assert watch.score_new(copy, score, (model, tokenizer), scores) == 1 and len(seen) == 1
    assert state.parent.is_dir(), "the watcher deletes nothing"
    state.write_text(whole)
    weights = copy / "checkpoint-4" / "model.safetensors"
    kept = weights.read_bytes()
    weights.unlink()  # the run is deleting it
    assert watch.score_new(copy, score, (model, tokenizer), scores) == 0
    weights.write_bytes(kept)
    assert watch.score_new(copy, score, (model, tokenizer), scores) == 1
    assert seen[1] == pytest.approx(float(load_file(weights)["hypernetwork.head.weight"].sum()))


def test_a_line_that_was_cut_off_is_scored_again(run, copy):
    _, model, tokenizer, _ = run
    scores = copy / "scores.jsonl"
    scores.write_text(json.dumps({"checkpoint": "checkpoint-2", "score": 3}) + '\n{"checkpoint": "check')
    assert watch.score_new(copy, lambda loaded: {"score": 1}, (model, tokenizer), scores) == 1
    assert [line["checkpoint"] for line in read_jsonl(scores)] == ["checkpoint-2", "checkpoint-4"]


def test_it_ends_with_the_run_and_waits_before(run, copy, monkeypatch):
    _, model, tokenizer, _ = run
    hidden = copy / "checkpoint-4"
    hidden.rename(copy / "later")
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        (copy / "later").rename(hidden)
        (copy / "final").mkdir()

    monkeypatch.setattr(watch.time, "sleep", sleep)
    watch.watch(copy, lambda loaded: {"score": 1}, (model, tokenizer), copy / "scores.jsonl", every=7)
    assert slept == [7] and len(read_jsonl(copy / "scores.jsonl")) == 2


def test_questions_are_scored_with_their_documents(run, copy):
    source = copy / "dev.json"
    questions = [{"id": "1", "question": "Q?", "answers": [{"text": "a"}]}]
    source.write_text(json.dumps({"data": [{"paragraphs": [{"context": "A text.", "qas": questions}]}]}))
    main(["watch", str(copy), "--task", "squad", "--source", str(source), "--n", "1", "--once"])
    lines = read_jsonl(copy / "scores.jsonl")
    assert [line["metric"] for line in lines] == ["token_f1"] * 2 and all(0 <= line["score"] <= 1 for line in lines)


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(SystemExit, match="there is no run at"):
        main(["watch", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="has no hypernetwork.json"):
        main(["watch", str(tmp_path), "--once"])
