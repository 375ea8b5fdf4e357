"""Scores in both normal forms, and what counts as an answer."""

import pytest

from d2l_lib.tasks import scores


@pytest.mark.parametrize(
    ("prediction", "answer", "published", "squad"),
    [
        ("Paris.", "paris", 1, 1),
        ("U.S.", "US", 0, 1),
        ("3,000", "3000", 0, 1),
        ("well-known", "well known", 1, 0),
        ("don\u2019t", "don't", 1, 0),
        ("back\\slash", "backslash", 0, 1),
        ("the", "a", 1, 1),
        ("", "", 1, 1),
        ("", "Paris", 0, 0),
        ("Paris, France", "Paris", 2 / 3, 2 / 3),
        ("The answer is 42.", "42", 1 / 2, 1 / 2),
    ],
)
def test_token_f1_in_both_forms(prediction, answer, published, squad):
    assert scores.token_f1(prediction, answer) == pytest.approx(published)
    assert scores.token_f1(prediction, answer, form="squad") == pytest.approx(squad)


def test_best_answer_counts():
    answers = ["four", "one two", "one two three four"]
    assert scores.token_scores("one two three", answers) == pytest.approx((6 / 7, 1, 3 / 4))
    assert scores.exact_match("Four!", answers) == 1.0 and scores.exact_match("one", answers) == 0.0
    assert scores.rouge_l("one two", answers) == 1.0


def test_a_string_is_one_answer_and_no_answers_score_nothing():
    assert scores.token_f1("ab", "ab") == scores.token_f1("ab", ["ab"]) == 1.0
    assert scores.token_f1("a", []) == scores.exact_match("a", []) == scores.rouge_l("a", []) == 0.0


def test_exact_match_of_numbers_is_literal():
    assert scores.exact_match("0042", "0042") == 1.0
    assert scores.exact_match("42", "0042") == 0.0
    assert scores.exact_match("The number is 0042", "0042") == 0.0


def test_rouge_l_stems_and_keeps_order():
    assert scores.rouge_l("jumping foxes", "jumps fox") == 1.0
    assert scores.rouge_l("cat dog", "dog cat") == pytest.approx(0.5)


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="published, squad"):
        scores.normalize_answer("x", form="strict")
