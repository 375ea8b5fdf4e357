"""Scores in both normal forms, and what counts as an answer."""

import pytest

from d2l_lib import metrics


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
    assert metrics.token_f1(prediction, answer) == pytest.approx(published)
    assert metrics.token_f1(prediction, answer, form="squad") == pytest.approx(squad)


def test_best_answer_counts():
    answers = ["four", "one two", "one two three four"]
    assert metrics.token_scores("one two three", answers) == pytest.approx((6 / 7, 1, 3 / 4))
    assert metrics.exact_match("Four!", answers) == 1.0 and metrics.exact_match("one", answers) == 0.0
    assert metrics.rouge_l("one two", answers) == 1.0


def test_a_string_is_one_answer_and_no_answers_score_nothing():
    assert metrics.token_f1("ab", "ab") == metrics.token_f1("ab", ["ab"]) == 1.0
    assert metrics.token_f1("a", []) == metrics.exact_match("a", []) == metrics.rouge_l("a", []) == 0.0


def test_exact_match_of_numbers_is_literal():
    assert metrics.exact_match("0042", "0042") == 1.0
    assert metrics.exact_match("42", "0042") == 0.0
    assert metrics.exact_match("The number is 0042", "0042") == 0.0


def test_rouge_l_stems_and_keeps_order():
    assert metrics.rouge_l("jumping foxes", "jumps fox") == 1.0
    assert metrics.rouge_l("cat dog", "dog cat") == pytest.approx(0.5)


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="published, squad"):
        metrics.normalize_answer("x", form="strict")
