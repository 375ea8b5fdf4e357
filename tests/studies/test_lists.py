"""The study of lists: which blocks answer, and what their items make together."""

import pytest

import d2l_lib as d2l
from d2l_lib.documents import question_ids
from d2l_lib.routing import weigh
from d2l_lib.studies import lists


@pytest.fixture(scope="module")
def model():
    return d2l.load("tiny/qa")


@pytest.fixture(scope="module")
def drawn(model):
    return lists.draw_lists(model, 4, 0, "validation")


def test_blocks_that_hold_an_item_are_told_by_the_document(drawn):
    for question, document, adapter in drawn:
        held = lists._holding(question, adapter)
        assert {block.chunk for block in held.blocks} < {block.chunk for block in adapter.blocks}
        inside = [document.text[slice(*block.span)].lower() for block in held.blocks]
        assert all(any(item.lower() in text for text in inside) for item in question.answer.split(", "))


def test_items_are_joined_once_and_refusals_left_out(model, drawn, monkeypatch):
    question, _, adapter = drawn[0]
    said = iter(["Halmere", model.router.config.refusal, "Orrin", "Halmere", model.router.config.refusal])
    monkeypatch.setattr(model, "answer", lambda texts, adapters: [next(said) for _ in texts])
    four, one = adapter._with(blocks=adapter.blocks[:4]), adapter._with(blocks=adapter.blocks[4:5])
    assert lists._each_asked(model, [question.text] * 2, [four, one]) == ["Halmere, Orrin", "I do not know."]


def test_more_blocks_answer_the_further_from_the_best_they_may_be(model, drawn):
    texts, adapters = [question.text for question, _, _ in drawn], [adapter for _, _, adapter in drawn]
    sizes = [[len(one.blocks) for one in lists._near_best(model, texts, adapters, nats)] for nats in (0.0, 4.0, 1e9)]
    assert sizes[0] == [1] * 4 and all(a <= b <= c for a, b, c in zip(*sizes, strict=True))
    above = [sum(score >= none for score in of_each) for none, of_each in _scores(model, texts, adapters)]
    assert sizes[2] == above, "none below the score of no block, however far"


def _scores(model, texts, adapters):
    weighed = weigh(model, model.router, question_ids(model.tokenizer, texts), adapters)
    scores, _ = model.router([one.responses for one in weighed])
    return [(row[0], row[1 : 1 + len(one.adapter.blocks)]) for one, row in zip(weighed, scores.tolist(), strict=True)]


def test_a_row_counts_answers_first_words_and_blocks(model, drawn):
    answers = [question.answer for question, _, _ in drawn[:3]] + ["nothing"]
    row = lists._row("some", [lists._holding(question, adapter) for question, _, adapter in drawn], answers, drawn)
    assert row["share"] == 0.75 and row["first_words"] == 0.75 and row["right_blocks"] == 1.0
    assert lists._row("in context", None, answers, drawn)["right_blocks"] is None
