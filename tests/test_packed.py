"""Guessed answers: the tokens of answers token by token, whatever the guesses; one pass if they are right."""

import random

import numpy as np
import pytest
import torch
from tiny_models import build_base_model, build_tokenizer

from d2l_lib import packed
from d2l_lib.base_model import load_base_model
from d2l_lib.documents import question_ids
from d2l_lib.engine import TransformersEngine
from d2l_lib.packed import can_pack
from d2l_lib.training import selfgen
from d2l_lib.training.selfgen import PROMPTS, Settings

LONG = "The mayor of Velm is Ada Row. It was a long winter in Tarn. "
OTHER = "There was much snow in the hills. " * 4
TEXTS = [f"{LONG * 2}\n\nWho is the mayor?", "Who wrote it?", f"{LONG * 2}\n\nWhere is Velm?", f"{OTHER}\n\nWas it?",
         f"{LONG * 2}\n\nIs Ada Row a mayor of Velm?", f"{OTHER}\n\nWhere was snow?", "Hm."]  # fmt: skip


def build_engine(family: str = "llama", window: int = 2048) -> TransformersEngine:
    """A random model that likes its stop tokens."""
    tokenizer = build_tokenizer()
    model = build_base_model(tokenizer, family=family, window=window)
    engine = TransformersEngine("random", model, tokenizer)
    with torch.no_grad():
        model.get_output_embeddings().weight[engine.stops] *= 3
    return engine


@pytest.fixture
def rounds(monkeypatch) -> list[list[int]]:
    """The numbers of answers asked for in each pass over tails."""
    seen = []
    plain = packed._Packed.logits

    def logits(self, heads, tails, wanted):
        seen.append([len(rows) for rows in tails])
        return plain(self, heads, tails, wanted)

    monkeypatch.setattr(packed._Packed, "logits", logits)
    return seen


def assert_alike(ours, theirs):
    """The same tokens; log-probabilities may differ by two steps of a float16."""
    for a, b in zip(ours, theirs, strict=True):
        assert (a.ids, a.finished) == (b.ids, b.finished)
        assert a.values.dtype == np.float16 and a.indices.dtype == np.int32 and a.values.shape == b.values.shape
        steps = 2 * np.spacing(np.abs(b.values)).astype(float)
        assert (np.abs(a.values.astype(float) - b.values.astype(float)) <= steps).all()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_no_guess_changes_an_answer(family, rounds):
    engine = build_engine(family)
    prompts = question_ids(engine.tokenizer, TEXTS)
    stepwise = engine.reply(prompts, 24, 0.0, 0)
    assert not rounds and any(reply.finished for reply in stepwise) == (family == "llama"), "of both kinds"
    right = [[*reply.ids] if not reply.finished else reply.ids[:-1] for reply in stepwise]
    rng = random.Random(0)
    halves = [ids[: len(ids) // 2] + [rng.randrange(200) for _ in range(3)] for ids in right]
    longer = [[*ids, engine.stops[0], 7] for ids in right]
    for guesses in (right, longer, halves, [*right[:4], *halves[4:]]):
        rounds.clear()
        assert_alike(engine.reply(prompts, 24, 0.0, 0, guesses), stepwise)
        assert rounds[0] == [3, 1, 2, 1], "both documents are read once"
        assert len(rounds) == 1 or guesses not in (right, longer)
    wrong = [[rng.randrange(200) for _ in range(n)] for n in (0, 1, 5, 40, 2, 3, 0)]
    assert_alike(engine.reply(prompts, 24, 0.0, 0, wrong), stepwise)


def test_most_answers_of_the_bundled_model_are_known_from_the_worlds_own(rounds):
    model, tokenizer = load_base_model("tiny", device="cpu")
    engine = TransformersEngine("tiny", model, tokenizer)
    drawn = selfgen.world_documents(random.Random(1), Settings(), 12)
    questions = [(document, question) for document, asked in drawn for question in asked]
    prompts = question_ids(tokenizer, [PROMPTS["plain"].format(document=d, question=q.text) for d, q in questions])
    guesses = tokenizer([q.reference for _, q in questions], add_special_tokens=False)["input_ids"]
    stepwise, guessed = engine.reply(prompts, 64, 0.0, 0), engine.reply(prompts, 64, 0.0, 0, guesses)
    assert_alike(guessed, stepwise)
    found = sum(ids == reply.ids[:-1] for ids, reply in zip(guesses, stepwise, strict=True))
    assert 0.7 * len(prompts) < found < len(prompts) and sum(map(sum, rounds)) < 1.6 * len(prompts)


def test_where_most_guesses_fail_the_others_are_not_tried(rounds, monkeypatch):
    engine = build_engine()
    monkeypatch.setattr(packed, "_PACK", 1)
    prompts = question_ids(engine.tokenizer, [f"{LONG}{LONG[n:]}\n\nWho is it?" for n in range(6)])
    stepwise = engine.reply(prompts, 24, 0.0, 0)
    assert_alike(engine.reply(prompts, 24, 0.0, 0, [[9, 9, 9]] * 6), stepwise)
    assert len(rounds) == 1


def test_guesses_hold_in_the_window_and_numbers_are_checked():
    engine = build_engine(window=160)
    engine.stops = [-1]
    prompts = [[5] * n for n in (159, 160, 161, 150)]
    replies = engine.reply(prompts, 24, 0.0, 0, [[5] * 30] * 4)
    assert [None if reply is None else len(reply.ids) for reply in replies] == [1, None, None, 10]
    with torch.no_grad():
        engine.model.get_output_embeddings().weight[7] = float("nan")
    with pytest.raises(FloatingPointError, match="not numbers"):
        engine.reply([[5, 6]], 4, 0.0, 0, [[5]])


def test_sampled_answers_and_other_families_are_answered_token_by_token(rounds):
    engine = build_engine()
    prompts = question_ids(engine.tokenizer, TEXTS)
    plain, guessed = (engine.reply(prompts, 8, 1.0, 3, guesses) for guesses in (None, [[5, 5]] * len(prompts)))
    assert [reply.ids for reply in plain] == [reply.ids for reply in guessed] and not rounds
    for family, known in {"gemma2": False, "mistral": False, "qwen3": True}.items():
        assert can_pack(build_engine(family).model) == known


def test_a_guess_goes_on_as_the_prompt_does():
    assert packed._next_guess([1, 2, 3, 4, 2, 5, 6, 9, 9, 9, 9, 9, 9], 2, [7]) == [5, 6, 9, 9, 9, 9]
    assert packed._next_guess([1, 2, 3], 3, [7]) == packed._next_guess([1, 2, 3], 8, [7]) == [7]


def test_tails_see_their_head_and_themselves_only():
    allowed = packed._tail_mask(2, [1, 3, 0]) == 0
    assert allowed.int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0], [1, 1, 0, 1, 1, 1]]
