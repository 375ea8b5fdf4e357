"""Needles in prose: where they stand, what they share, and what is refused."""

import random

import pytest
from tiny_models import build_tokenizer

from d2l_lib.tasks import prose

TEXTS = [
    " ".join(f"In chapter {i} of story {k} the old captain walked home {i} times." for i in range(400))
    for k in range(3)
]


@pytest.mark.parametrize("kind", prose.KINDS)
def test_a_needle_holds_its_answer_once(kind):
    drawn = [prose.draw_needle(random.Random(i), kind) for i in range(50)]
    assert len({one.answer for one in drawn}) > 10 and len({one.question for one in drawn}) == 1
    assert all(one.sentence.count(one.answer) == 1 and one.answer not in one.question for one in drawn)
    with pytest.raises(ValueError, match="number, word, date"):
        prose.draw_needle(random.Random(0), "pin")


def test_haystacks_share_their_texts_and_spread_their_needles():
    tokenizer = build_tokenizer()
    made = list(prose.haystacks(TEXTS, tokenizer, 3000, 30, 0, piece_tokens=200))
    assert [one.needle.kind for one in made[:3]] == list(prose.KINDS)
    assert all(2700 < one.length_tokens <= 3000 for one in made)
    places = set()
    for one in made:
        held = [one.needle.sentence in piece for piece in one.pieces]
        assert held.index(True) == one.place and sum(held) == 1 and one.text.count(one.needle.sentence) == 1
        assert max(len(tokenizer(piece)["input_ids"]) for piece in one.pieces) <= 200
        assert abs(one.place / len(one.pieces) - one.depth) < 0.1
        places.add(int(10 * one.depth))
        without = " ".join(one.text.replace(one.needle.sentence, "").split())
        assert any(without in text for text in TEXTS)
    assert places == set(range(10))
    assert len({piece for one in made for piece in one.pieces}) <= 3 * len(made[0].pieces) + 3 + 30
    again = list(prose.haystacks(TEXTS, tokenizer, 3000, 30, 0, piece_tokens=200))
    assert again == made != list(prose.haystacks(TEXTS, tokenizer, 3000, 30, 1, piece_tokens=200))


def test_what_is_too_short_is_refused():
    tokenizer = build_tokenizer()
    with pytest.raises(ValueError, match="need more"):
        list(prose.haystacks(["A short text. And its end."], tokenizer, 3000, 3, 0, piece_tokens=200))
    with pytest.raises(ValueError, match="make them longer"):
        list(prose.haystacks(TEXTS, tokenizer, 3000, 3, 0, piece_tokens=40))
