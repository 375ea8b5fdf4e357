"""The study of the gate among chunks: weights for all numbers of them, and their place in a model's folder."""

import dataclasses
import math
import random

import pytest
import torch
from test_articles import squad_file
from tiny_models import build_rows_model

from d2l_lib.documents import question_ids
from d2l_lib.formats.checkpoints import load_checkpoint, save_checkpoint
from d2l_lib.presets import PRESETS
from d2l_lib.records import project_root, read_rows
from d2l_lib.studies import rise
from d2l_lib.training import recipes


@pytest.fixture
def file(tmp_path):
    return squad_file(tmp_path, {"a": 8, "b": 8}, 40)[0]


@pytest.fixture
def few_unseen(monkeypatch):
    """Four of the file's passages are never learned."""
    own = dataclasses.replace(PRESETS["smollm2"], rows=dataclasses.replace(PRESETS["smollm2"].rows, validation=4))
    monkeypatch.setitem(rise.PRESETS, "smollm2", own)


def test_slope_of_levels():
    assert rise.fit_rise({n: 0.3 * math.log(n) for n in rise.SIZES}) == pytest.approx(0.3)
    assert rise.fit_rise({1: 0.5, 4: 1.0}) == pytest.approx(1 / math.log(4))  # one chunk tells nothing
    assert rise.fit_rise({1: 0.0, 4: -2.0}) == 0.0
    assert rise.fit_rise({1: 0.0}) == 0.0


def made(rng, n: int, share: float) -> list:
    """Prompts and questions among 4 and 64 chunks: words tell `share` as much as the logit does."""
    asked = []
    for size in (4, 64):
        both = []
        for about in (0, 1):
            logits = torch.randn(n, generator=rng) + 2 * about + 0.3 * math.log(size)
            words = torch.randn(n, generator=rng) + 2 * share * about
            both.append(rise._Asked(size, logits, words))
        asked.append(both)
    return asked


def test_words_weigh_as_much_as_they_tell():
    rng = torch.Generator().manual_seed(0)
    assert rise.fit_words(made(rng, 2000, 1.0)) == pytest.approx(1.0, abs=0.1)
    assert rise.fit_words(made(rng, 2000, 0.5)) == pytest.approx(0.5, abs=0.1)
    assert rise.fit_words(made(rng, 2000, -1.0)) == 0.0  # never against a chunk


def test_prompts_are_those_that_training_leaves_out():
    every = [row["prompt"] for row in read_rows(project_root() / recipes._UNRELATED)]
    assert rise.never_learned_prompts() == every[:: recipes._UNSEEN]


def test_rows_count_the_prompts_and_the_questions_that_open_the_gate(monkeypatch, file, few_unseen):
    monkeypatch.setattr(rise, "SIZES", (1, 4, 8, 10**6))  # the last has too few passages
    model = build_rows_model()
    model.hypernetwork.reader.weigh_gate(0.0, 0.5)
    seen = []

    def asked(_, some, blocks, size, n, rng):
        """About something else: 0.2, 0.4 or 0.8 of log(number of chunks). About a chunk: more, and words."""
        about = bool(some[0][1])
        seen.append((about, len(some), size, len(blocks)))
        shares = torch.tensor([0.2, 0.4, 0.8, 0.8]) + about
        return rise._Asked(size, shares * math.log(size) - float(size == 1), torch.full((4,), 3.0 * about))

    monkeypatch.setattr(rise, "_ask", asked)
    rows = rise.run(model, 4, 0, f"squad={file}", None)
    assert [row["chunks"] for row in rows] == [1, 4, 8]
    assert [row["open_before"] for row in rows] == pytest.approx([0, 0.5, 0.5])
    assert [row["related_before"] for row in rows] == pytest.approx([0, 1, 1])
    assert rows[-1]["rise_before"] == pytest.approx(0.5) and rows[-1]["words_before"] == 0
    assert rows[-1]["rise_fitted"] == pytest.approx(0.8, abs=1e-3) and rows[-1]["words_fitted"] > 0
    assert [row["level"] for row in rows[1:]] == pytest.approx([0.8 * math.log(4), 0.8 * math.log(8)], abs=1e-3)
    assert {n for about, n, *_ in seen if about} == {rows[0]["questions"]}
    assert {n for about, n, *_ in seen if not about} == {len(rise.never_learned_prompts())}
    assert {n for *_, n in seen} == {12}  # chunks are of passages that were learned


def test_the_gates_own_logits_and_words():
    model = build_rows_model()
    reader = model.hypernetwork.reader
    blocks = model.internalize({"a": "The fen is deep.", "b": "The mill is old."}).blocks
    prompts = question_ids(model.tokenizer, ["Who is old?", "Where is the mill?"])
    plain = []
    for words, slope in ((0.0, 0.0), (0.7, 0.4)):
        reader.weigh_gate(words, slope)
        plain.append(rise._gates(model, prompts, model.adapter_of(blocks)))
    for first, second in zip(*plain, strict=True):
        assert first == pytest.approx(second, abs=1e-4) and first[1] > 0
    (alone,) = rise._gates(model, prompts[1:], model.adapter_of(blocks))
    assert plain[1][1] == pytest.approx(alone, abs=1e-5)  # no prompt leaves a trace
    assert rise._gates(model, prompts[1:], model.adapter_of(blocks[:1]))[0][1] == 0  # one chunk


def test_each_question_meets_its_own_chunk_among_others(monkeypatch):
    model = build_rows_model()
    blocks = model.internalize({"a": "The fen is deep.", "b": "The mill is old."}).blocks
    (prompt,) = question_ids(model.tokenizer, ["Where is the mill?"])
    met = []
    monkeypatch.setattr(
        rise, "_gates", lambda _, prompts, adapter: met.append(adapter.blocks) or [(1.0, 2.0)] * len(prompts)
    )
    one = rise._ask(model, [(prompt, blocks[:1])], blocks[1:] * 3, 3, 5, random.Random(0))
    assert one.logits.tolist() == [1.0] * 5 and one.words.tolist() == [2.0] * 5 and one.chunks == 3
    assert len(met) == 5 and all([block.document for block in own] == ["a", "b", "b"] for own in met)
    assert one.gate(0.5, 1.0).tolist() == pytest.approx([2 - math.log(3)] * 5)
    met.clear()
    elsewhere = rise._ask(model, [(prompt, ())], blocks * 2, 3, 20, random.Random(0))
    assert len(elsewhere.logits) == 20 and [len(own) for own in met] == [3, 3]  # sixteen share their chunks


def test_the_kept_weights_are_those_of_the_record(monkeypatch, tmp_path, file, few_unseen):
    monkeypatch.setattr(rise, "SIZES", (1, 2))
    model = build_rows_model()
    folder = save_checkpoint(tmp_path / "model", model.hypernetwork, {"chunk_tokens": 32}, torch.float16)
    rows = rise.run(model, 4, 0, f"squad={file}", str(folder))
    kept, meta = load_checkpoint(folder)
    assert meta == {"chunk_tokens": 32}
    assert float(kept.reader.gate_rise) == pytest.approx(rows[0]["rise_fitted"], rel=1e-2)
    assert float(kept.reader.gate_words) == pytest.approx(rows[0]["words_fitted"], rel=1e-2)
    for name, value in model.hypernetwork.named_parameters():  # nothing else is changed
        if name not in ("reader.gate_rise", "reader.gate_words"):
            assert torch.equal(dict(kept.named_parameters())[name], value.half().float()), name
