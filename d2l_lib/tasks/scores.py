"""Scores of an answer against reference answers: exact match, token F1 and ROUGE-L, each between 0 and 1.

There are two normal forms. "published" is the form behind the numbers of arXiv 2602.15902: punctuation becomes a space,
so "U.S." is two words and "3,000" is not "3000". "squad" is the SQuAD evaluation script's: punctuation vanishes.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import pandas as pd
from rouge_score.rouge_scorer import RougeScorer

from d2l_lib.documents import check_texts

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_FORMS = ("published", "squad")
# The published expression leaves the backslash out of its punctuation.
_PUBLISHED_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation.replace("\\", ""), " "))
_SQUAD_PUNCTUATION = str.maketrans("", "", string.punctuation)
_TYPOGRAPHY = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015", "-"),
        **dict.fromkeys("\u2018\u2019\u201a\u201b", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f", '"'),
        "\u2026": "...",
        "\u00a0": " ",
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
    }
)


class _TokenScores(NamedTuple):
    """Overlap of words between a prediction and its best reference answer."""

    f1: float
    precision: float
    recall: float


def normalize_answer(text: str, form: str = "published") -> str:
    """`text` in lower case without punctuation, articles and repeated spaces.

    "published" first turns typographic dashes, quotes and spaces into plain ones; "squad" follows the SQuAD script.
    """
    if form not in _FORMS:
        raise ValueError(f"form is {form!r}; choose one of {', '.join(_FORMS)}")
    if form == "published":
        plain = text.translate(_TYPOGRAPHY).lower().translate(_PUBLISHED_PUNCTUATION)
    else:
        plain = text.lower().translate(_SQUAD_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def token_scores(prediction: str, answers: str | Sequence[str], form: str = "published") -> _TokenScores:
    """F1, precision and recall of words against the answer with the highest F1; no answers give 0.

    Two texts that both normalise to nothing agree: 1 (as in SQuAD 2).
    """
    scores = [_overlap(normalize_answer(prediction, form), normalize_answer(a, form)) for a in _as_list(answers)]
    return max(scores, default=_TokenScores(0.0, 0.0, 0.0), key=lambda score: score.f1)


def token_f1(prediction: str, answers: str | Sequence[str], form: str = "published") -> float:
    """Highest word F1 over the answers."""
    return token_scores(prediction, answers, form).f1


def exact_match(prediction: str, answers: str | Sequence[str], form: str = "published") -> float:
    """1.0 if the normal form equals that of one of the answers, else 0.0."""
    target = normalize_answer(prediction, form)
    return float(any(target == normalize_answer(answer, form) for answer in _as_list(answers)))


def rouge_l(prediction: str, answers: str | Sequence[str]) -> float:
    """Highest ROUGE-L F1 over the answers, with the Porter stemmer, on words of [a-z0-9] only.

    Published numbers use the first answer alone: pass only that one to reproduce them.
    """
    scorer = _rouge_scorer()
    return max(
        (float(scorer.score(answer, prediction)["rougeL"].fmeasure) for answer in _as_list(answers)), default=0.0
    )


def _overlap(prediction: str, answer: str) -> _TokenScores:
    predicted, expected = prediction.split(), answer.split()
    if not predicted or not expected:
        return _TokenScores(*[float(predicted == expected)] * 3)
    common = sum((Counter(predicted) & Counter(expected)).values())
    if not common:
        return _TokenScores(0.0, 0.0, 0.0)
    precision, recall = common / len(predicted), common / len(expected)
    return _TokenScores(2 * precision * recall / (precision + recall), precision, recall)


def _as_list(answers: str | Sequence[str]) -> Sequence[str]:
    return [answers] if isinstance(answers, str) else answers


@lru_cache(maxsize=1)
def _rouge_scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% Wilson score interval of a share; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share = right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(samples: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Exact match by the columns `by`: n, exact_match, low, high (95% Wilson interval)."""
    by = check_texts(by, "columns")
    rows = []
    for key, group in samples.groupby(by, sort=False):
        right, n = int(group["correct"].sum()), len(group)
        low, high = wilson(right, n)
        rows.append({**dict(zip(by, key, strict=True)), "n": n, "exact_match": right / n, "low": low, "high": high})
    return pd.DataFrame(rows, columns=[*by, "n", "exact_match", "low", "high"])


def in_fives(n: int) -> str:
    """The group of five for `n` (1 or more): 6 to 10 are "6-10"."""
    most = 5 * math.ceil(n / 5)
    return f"{most - 4}-{most}"


def pool(results: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """One row per value of the columns `by`: n, exact_match (weighted by n), low, high.

    ValueError for an exact_match that is missing or outside 0..1.
    """
    if not results["exact_match"].between(0, 1).all():
        raise ValueError("exact_match must lie between 0 and 1 in every row: drop rows that were not measured")
    cells = results.assign(correct=results["exact_match"] * results["n"])
    pooled = cells.groupby(by, sort=True, as_index=False)[["correct", "n"]].sum()
    pooled["exact_match"] = pooled["correct"] / pooled["n"]
    intervals = [wilson(round(correct), n) for correct, n in zip(pooled["correct"], pooled["n"], strict=True)]
    pooled["low"], pooled["high"] = zip(*intervals, strict=True)
    return pooled.drop(columns="correct")
