"""Scores and tables: intervals, batches, block norms, and the samples that they are taken on."""

import math

import pandas as pd
import pytest
import tiny_models
import torch

from d2l_lib.documents import question_ids
from d2l_lib.studies import base_scores, needle_scores
from d2l_lib.tasks import needles, scores, world
from d2l_lib.tasks.questions import world_samples


@pytest.fixture(scope="module")
def model():
    return tiny_models.build_model()


def test_wilson_interval_known_values():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20 at 95%
    assert scores.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert scores.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert scores.wilson(0, 0) == (0.0, 1.0)


def test_summarise_counts_each_group():
    samples = pd.DataFrame({"task": ["a", "a", "a", "b"], "correct": [True, False, True, False]})
    table = scores.summarise(samples, ["task"]).set_index("task")
    assert table.loc["a", "n"] == 3 and table.loc["a", "exact_match"] == pytest.approx(2 / 3)
    assert table.loc["b", "exact_match"] == 0 and table.loc["b", "low"] == 0 < table.loc["b", "high"] < 1


def test_greedy_answers_in_batches_equal_one_by_one(model):
    prompts = ["Who?", "A much longer question about the town, and its mayor?", "When was it?", "x" * 90]
    both = model.base_model, model.tokenizer
    together = base_scores.greedy_answers(*both, prompts, max_new_tokens=6, batch_tokens=300)
    alone = [base_scores.greedy_answers(*both, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert together == alone and len(set(alone)) > 1
    assert len(question_ids(model.tokenizer, prompts[1])) * 2 < 300, "some batches hold several prompts"


def test_world_samples_mark_their_evidence_and_use_held_out_names():
    samples = world_samples(45, 0, kinds=world.ONE_HOP_KINDS)
    assert list(samples["kind"][:3]) == list(world.ONE_HOP_KINDS)
    for row in samples.to_dict("records"):
        (start,), (end,) = row["evidence_start"], row["evidence_end"]
        assert row["answer"].lower() in row["document"][start:end].lower()
    assert samples.equals(world_samples(45, 0, kinds=world.ONE_HOP_KINDS))
    assert not samples["document"].equals(world_samples(45, 1, kinds=world.ONE_HOP_KINDS)["document"])


def test_needle_samples_internalize_the_haystack_and_ask_the_question_alone(model, monkeypatch):
    seen = []
    original = type(model).answer
    monkeypatch.setattr(
        type(model), "answer", lambda self, q, a, **k: (seen.append((list(q), list(a))), original(self, q, a, **k))[1]
    )
    monkeypatch.setattr(needle_scores, "_BATCH", 2)
    monkeypatch.setattr(model, "chunk_tokens", 150)
    samples = needle_scores.needle_samples(model, [200, 400], n=3, seed=0)
    assert samples.groupby("length_tokens").size().to_dict() == {200: 3, 400: 3}
    assert all(q == needles.QUESTION for questions, _ in seen for q in questions)
    assert all(len(adapter.blocks) > 1 for _, adapters in seen for adapter in adapters)
    assert set(samples["correct"]) == {False}, "a random model does not find needles"


def test_needles_read_sparsely_keep_what_is_recorded_of_the_sum(model, monkeypatch):
    monkeypatch.setattr(needle_scores, "_NEEDLE_LENGTHS", (100,))
    monkeypatch.setattr(needle_scores, "_IN_CONTEXT_LENGTHS", (64,))
    monkeypatch.setattr(needle_scores, "earlier_rows", lambda name: {"needle_ours_seed0": earlier}[name])
    earlier = [{"method": "Doc-to-LoRA", "command": "x"}, {"method": "old", "read": "sparse", "command": "x"}]
    made = []
    internalize_each = type(model).internalize_each
    monkeypatch.setattr(
        type(model), "internalize_each", lambda self, *a, **k: made.append(a) or internalize_each(self, *a, **k)
    )
    both = needle_scores.run(model, 2, 0, "ours", 0, ["sum", "sparse"])
    assert [(row["method"], row.get("read")) for row in both[::2]] == [
        ("Doc-to-LoRA", "sum"), ("Doc-to-LoRA, read sparsely", "sparse"), ("in context", None)
    ]  # fmt: skip
    assert len(made) == 2, "a haystack is internalized once"
    alone = needle_scores.run(model, 2, 0, "ours", 0, ["sparse"])
    assert alone[0] == earlier[0] and alone[1:] == both[2:4]


def test_in_context_prompts_hold_the_haystack(model, monkeypatch):
    prompts = []
    monkeypatch.setattr(needle_scores, "greedy_answers", lambda *a, **k: prompts.extend(a[2]) or ["0000"] * len(a[2]))
    samples = needle_scores.needle_in_context_samples(model, [100], n=2, seed=0)
    assert all(f"is {answer}." in prompt for answer, prompt in zip(samples["answer"], prompts, strict=True))


def test_block_norms_equal_the_norm_of_the_formed_update(model):
    haystack = needles.build_haystack(model.tokenizer, 400, 0.5, "4217")
    adapter = model.internalize(haystack.text, chunk_tokens=150).scaled(0.5)
    norms = needle_scores.needle_norms(adapter, haystack)
    assert norms["holds_needle"].sum() == 1
    for block, norm in zip(adapter.blocks, norms["norm"], strict=True):
        square = sum(
            float(torch.linalg.matrix_norm(block.B[m].transpose(1, 2) @ A).square().sum()) for m, A in block.A.items()
        )
        assert norm == pytest.approx(abs(block.weight) * adapter.scale * math.sqrt(square), rel=1e-4)


def test_base_model_samples_hold_every_task(model, monkeypatch):
    monkeypatch.setattr(base_scores, "greedy_answers", lambda m, t, prompts, **k: [world.UNKNOWN] * len(prompts))
    model.tokenizer.model_max_length = 10**9
    samples = base_scores.base_model_samples(model.base_model, model.tokenizer, 10, 0)
    right = samples.groupby("task")["correct"].mean()
    assert right["unanswerable"] == right["unknown"] == 1 and right["needle"] == right["encyclopedia"] == 0
    assert samples.groupby("task").size().min() >= 10
