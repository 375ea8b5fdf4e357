"""Ideas for quicker internalizing: all read and write the same, and their rows say what was measured."""

import torch

from d2l_lib import studies
from d2l_lib.__main__ import main
from d2l_lib.onednn import Packs
from d2l_lib.records import read_jsonl
from d2l_lib.studies import bench, quicker, random_models


def test_every_idea_gives_the_same_blocks_and_a_row(monkeypatch, tmp_path):
    sizes = {"vocab_size": 2000, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    monkeypatch.setattr(random_models, "BASE", random_models.BASE | sizes)
    monkeypatch.setattr(bench, "_TOKENS", dict.fromkeys(bench._TOKENS, 30))
    monkeypatch.setattr(studies, "record_path", lambda name: tmp_path / f"{name}.jsonl")
    monkeypatch.setattr(bench, "_TIMED_OPERATIONS", 1)
    monkeypatch.setattr(quicker, "_MODELS", ("few latents",))
    ideas = ("chunk by chunk", "products by oneDNN", "packed, four together", "compiled, eight together")
    monkeypatch.setattr(quicker, "IDEAS", {name: quicker.IDEAS[name] for name in ideas})
    compiled = []

    def compile_(function):
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_)  # it takes a minute, and a C++ compiler
    assert main(["study", "quicker", "--n", "1"]) == 0
    rows = read_jsonl(tmp_path / "quicker.jsonl")
    assert [row["idea"] for row in rows] == [*ideas] and len(compiled) == 2, "encoder and hypernetwork"
    for row in rows:
        assert row["command"] == "d2l study quicker --n 1" and (row["n"], row["seed"], row["chunks"]) == (1, 0, 8)
        assert row["difference"] < 1e-4 and row["seconds"] > 0 and row["over_floor"] > 0
        assert row["idea"] != "chunk by chunk" or (row["ratio"], row["difference"]) == (1, 0)


def test_ideas_read_what_they_say(monkeypatch):
    prepared = bench.Prepared(bench.Task("internalize", "tiny", chunks=quicker.CHUNKS), 0)
    seen, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(quicker, "_by_onednn", lambda *inputs: seen.append("oneDNN") or linear(*inputs))
    used = Packs.used
    monkeypatch.setattr(Packs, "used", lambda self: seen.append("packs") or used(self))
    handle = prepared.model.hypernetwork.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    ids = prepared.ids()[:, :30]
    for idea in ("chunk by chunk", "four chunks together", "products by oneDNN", "packed weights"):
        seen.clear()
        quicker._way(prepared.model, ids, quicker.IDEAS[idea])()
        sizes = [one for one in seen if isinstance(one, int)]
        assert sizes == {"four chunks together": [4, 4]}.get(idea, 8 * [1])
        assert ("oneDNN" in seen) == (idea == "products by oneDNN")
        assert ("packs" in seen) == (idea == "packed weights")
    handle.remove()
    assert torch.nn.functional.linear is linear
