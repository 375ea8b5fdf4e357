"""Needle in a haystack: filler lines, one sentence with a four-digit number, one question (paper, needle stage).

The sentences are the published ones. A haystack is built to a length in *tokens* of a tokenizer. It consists of whole
sentences, so it is never longer than asked for, and at most one sentence shorter. Numbers are split by
`world.split_of`: validation and test never ask for a number from training.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from d2l_lib.tasks.world import check_split, split_of

_FILLER_SENTENCES = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
FILLER_LINE = " ".join(_FILLER_SENTENCES)
NEEDLE = "The special magic number is {number}."
QUESTION = "What is the special magic number? Reply with only the number."
N_DEPTH_BINS = 10


@dataclass(frozen=True)
class Haystack:
    """A needle sample; `needle_span` holds the characters of the needle sentence in `text`, or None."""

    text: str
    answer: str
    length_tokens: int
    depth: float
    needle_span: tuple[int, int] | None
    question: str = QUESTION


def draw_number(rng: random.Random, split: str) -> str:
    """Four digits of `split`, leading zeros allowed, all equally likely; ValueError for an unknown split."""
    check_split(split)
    while split_of(number := f"{rng.randrange(10000):04d}") != split:
        pass
    return number


@functools.lru_cache(maxsize=16)
def _sentence_costs(tokenizer) -> tuple[tuple[int, ...], int, int]:
    """Tokens that each filler sentence, a new line and a needle line add."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    line = count(FILLER_LINE)
    costs = [count(" ".join(_FILLER_SENTENCES[: i + 1])) for i in range(len(_FILLER_SENTENCES))]
    costs = [b - a for a, b in zip([0, *costs], costs, strict=False)]
    newline = count(FILLER_LINE + "\n" + FILLER_LINE) - 2 * line
    needle = count(FILLER_LINE + "\n" + NEEDLE.format(number="0042") + "\n" + FILLER_LINE) - 2 * line
    return tuple(costs), newline, needle


def build_haystack(tokenizer, length_tokens: int, depth: float, number: str | None) -> Haystack:
    """A haystack of at most `length_tokens` tokens with `number` at relative `depth` (0 start, 1 end).

    Without a number it is filler only. ValueError if `length_tokens` cannot hold the needle sentence, or if `depth` is
    outside 0..1.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in 0..1, not {depth}")
    costs, newline, needle_cost = _sentence_costs(tokenizer)
    budget = length_tokens - (needle_cost if number is not None else 0)
    if budget < 0:
        raise ValueError(
            f"a needle sentence takes {needle_cost} tokens: a haystack of {length_tokens} tokens cannot hold it"
        )
    n_lines, rest = divmod(budget, sum(costs) + newline)
    lines = [FILLER_LINE] * n_lines
    tail = []
    for sentence, cost in zip(_FILLER_SENTENCES, costs, strict=True):
        if rest < cost + newline:
            break
        tail.append(sentence)
        rest -= cost
    if tail:
        lines.append(" ".join(tail))
    span = None
    if number is not None:
        at = round(depth * len(lines))
        lines.insert(at, NEEDLE.format(number=number))
        start = len("\n".join(lines[:at])) + (1 if at else 0)
        span = (start, start + len(lines[at]))
    text = "\n".join(lines)
    length = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return Haystack(text, number or "", length, depth, span)


def evaluation_set(tokenizer, length_tokens: int, n: int, seed: int, split: str = "test") -> Iterator[Haystack]:
    """`n` haystacks of one length, with depths evenly over `N_DEPTH_BINS` bins and numbers from `split`."""
    rng = random.Random(f"needles/{split}/{seed}/{length_tokens}")
    for i in range(n):
        yield build_haystack(
            tokenizer, length_tokens, ((i % N_DEPTH_BINS) + rng.random()) / N_DEPTH_BINS, draw_number(rng, split)
        )


def exact_match(prediction: str, answer: str) -> bool:
    """Whether the reply, without outer white space and a final full stop, is exactly the number."""
    return prediction.strip().removesuffix(".") == answer
