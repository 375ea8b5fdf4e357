"""Learned weights with which keys alone choose the blocks of a question, or none: a dozen numbers.

    response  s_l(t, k) = |A_k x_l(t)|, with x_l(t) the input of layer l's target linears at token t of the prompt
    null      n_l(t), the same of the null block (see `reading`)
    log-odds  o(k) = offset + sum over layers of last_token_l * log(s_l(T, k) / n_l(T)), at the last token T
    by words  v(k) = sum over layers of words_l * max over t < T of log(s_l(t, k) / mean over the blocks of s_l(t, .))

The mean makes a word to which few blocks respond count more than one to which all do, as in late interaction with rare
words.

The block of the largest log-odds answers if they are positive; that is a choice among the blocks and the null block.
Keys are learned for questions that ask for a value, at the last token. A question that names two things, or asks which
things have a value, meets the keys at its own words: there v chooses. Which case it is, the base model's own answer
tells (it does not say that it does not know), and how strongly the first layer's keys respond at the last token:

    by words where by_words[0] + by_words[1] * log p(refusal) + by_words[2] * max over k of log(s_1(T, k) / n_1(T)) > 0
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CANDIDATES = 32  # blocks that are weighed in all layers, those that respond most in the last one
LEAST_LOG = -12.0  # of the probability of a refusal: below, all answers are as sure
_TINY = 1e-3  # of responses, which are around 1


@dataclass(frozen=True)
class Router:
    """The weights; see above.

    layers: those whose keys count, in order. last_token, words: one weight for each.
    refusal: what the base model says when it does not know.

    ValueError for lists of different lengths, and for numbers that are not finite.
    """

    layers: tuple[int, ...]
    last_token: tuple[float, ...]
    offset: float
    words: tuple[float, ...]
    by_words: tuple[float, float, float]
    refusal: str

    def __post_init__(self):
        if not self.layers or {len(self.layers)} != {len(self.last_token), len(self.words)} or len(self.by_words) != 3:
            raise ValueError(f"a router needs one weight of each sort for each of its layers {self.layers}")
        if not all(map(math.isfinite, (*self.last_token, *self.words, *self.by_words, self.offset))):
            raise ValueError("the weights of a router must be finite numbers")

    def choose(self, responses: Tensor, null: Tensor, log_refusal: float, blocks: int) -> list[int]:
        """Places of at most `blocks` blocks of one question, the best first.

        responses: s [layers, tokens, K], 0 for a block without weight. null: n [layers, tokens].
        """
        margins = log_margins(responses, null)
        first = float(margins[0].max())
        if self.goes_by_words(log_refusal, first):
            scores = torch.tensor(self.words) @ word_peaks(responses)
            scores = scores.masked_fill(responses[-1, -1] == 0, -math.inf)
            least = -math.inf
        else:
            scores, least = self.offset + torch.tensor(self.last_token) @ margins, 0.0
        best = scores.topk(min(blocks, len(scores)))
        return [
            place for place, score in zip(best.indices.tolist(), best.values.tolist(), strict=True) if score > least
        ]

    def goes_by_words(self, log_refusal: float, first_margin: float) -> bool:
        """Whether the words of the question choose, and not its last token."""
        constant, of_refusal, of_margin = self.by_words
        return constant + of_refusal * max(log_refusal, LEAST_LOG) + of_margin * first_margin > 0


def log_margins(responses: Tensor, null: Tensor) -> Tensor:
    """log(s / n) at the last token: [layers, K]."""
    return (responses[:, -1] / null[:, -1:]).log()


def word_peaks(responses: Tensor) -> Tensor:
    """The largest log(s / mean s) of each block over the tokens before the last: [layers, K]."""
    words = responses[:, :-1] + _TINY
    return (words / words.mean(-1, keepdim=True)).log().amax(1)
