"""Haystacks have the length, depth and needle that they claim."""

import random

import pytest

from d2l_lib.base_model import bundled_path, load_tokenizer
from d2l_lib.tasks import needles, world


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(bundled_path("tiny") / "base_model"))


def count(tokenizer, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("length", [16, 32, 64, 100, 256, 1024, 4096])
def test_length_is_at_most_what_was_asked_and_short_by_less_than_a_sentence(tokenizer, length):
    haystack = needles.build_haystack(tokenizer, length, 0.5, "0042")
    real = count(tokenizer, haystack.text)
    assert real == haystack.length_tokens <= length
    assert length - real <= max(needles._sentence_costs(tokenizer)[0]) + 1


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_needle_stands_at_its_depth_once(tokenizer, depth):
    haystack = needles.build_haystack(tokenizer, 2000, depth, "4217")
    start, end = haystack.needle_span
    assert haystack.text[start:end] == "The special magic number is 4217."
    assert haystack.text.count("magic") == 1
    assert start / len(haystack.text) == pytest.approx(depth, abs=0.03)


def test_without_a_needle_there_is_filler_only(tokenizer):
    haystack = needles.build_haystack(tokenizer, 200, 0.5, None)
    assert "magic" not in haystack.text and haystack.needle_span is None and haystack.answer == ""


def test_published_sentences():
    assert needles.FILLER_LINE == (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    )
    assert needles.QUESTION == "What is the special magic number? Reply with only the number."


def test_evaluation_set_spreads_depths_evenly_over_held_out_numbers(tokenizer):
    haystacks = list(needles.evaluation_set(tokenizer, 256, 100, seed=0))
    bins = [int(h.depth * needles.N_DEPTH_BINS) for h in haystacks]
    assert all(bins.count(b) == 10 for b in range(10))
    assert {world.split_of(h.answer) for h in haystacks} == {"test"}
    assert haystacks == list(needles.evaluation_set(tokenizer, 256, 100, seed=0))
    assert haystacks != list(needles.evaluation_set(tokenizer, 256, 100, seed=1))


def test_all_numbers_have_four_digits_and_leading_zeros_occur():
    rng = random.Random(0)
    numbers = [needles.draw_number(rng, "train") for _ in range(500)]
    assert all(len(n) == 4 and n.isdigit() for n in numbers) and any(n[0] == "0" for n in numbers)


@pytest.mark.parametrize(
    ("prediction", "right"), [("0042", True), (" 0042. ", True), ("42", False), ("0042 and more", False), ("", False)]
)
def test_exact_match(prediction, right):
    assert needles.exact_match(prediction, "0042") is right


def test_too_short_and_depth_outside_are_named(tokenizer):
    with pytest.raises(ValueError, match="haystack of 5 tokens cannot hold it"):
        needles.build_haystack(tokenizer, 5, 0.5, "0042")
    with pytest.raises(ValueError, match="0..1, not 1.5"):
        needles.build_haystack(tokenizer, 50, 1.5, "0042")
