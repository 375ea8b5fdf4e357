"""How well the report flags the facts that an adapter fails to answer."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import pandas as pd

from d2l_lib.analysis.report import find_questions, kept, most_frequent, probe_questions
from d2l_lib.documents import split_sentences
from d2l_lib.model import DocToLoRA
from d2l_lib.tasks import world
from d2l_lib.tasks.questions import marked

SIGNALS = {  # of a sentence; the smallest is flagged first
    "kept": kept,
    "margin of the most frequent question": lambda questions: most_frequent(questions)["margin"],
    "least margin": lambda questions: questions["margin"].min(),
    "share of questions answered": lambda questions: (questions["margin"] > 0).mean(),
    "over the controls": lambda questions: most_frequent(questions)[["over_zero", "over_wrong"]].min(),
}
_ANSWERING = {"all blocks": None, "routed": 1}


def _flag_samples(model: DocToLoRA, n_documents: int, seed: int, split: str) -> pd.DataFrame:
    """One row per fact of `n_documents` documents of `split` and condition: its answer, and the report's signals.

    The report does not know the fact's question. Conditions: "all blocks", "routed". Columns: document, condition,
    sentence, question, answer, prediction, correct, and SIGNALS at the sentence (NaN if the report has no question
    about it).
    """
    rng = random.Random(f"flags/{split}/{seed}")
    rows = []
    for number in range(n_documents):
        document = world.draw_document(rng, split, rng.randint(8, 40))
        unrelated = world.draw_document(rng, split, len(document.facts))
        adapter, other = model.internalize_each([document.text, unrelated.text])
        spans = split_sentences(document.text)
        about = [world.question_about(rng, fact) for fact in document.facts]
        places = [next(i for i, (a, b) in enumerate(spans) if a <= fact.span[0] < b) for fact in document.facts]
        sentences = [document.text[start:end].strip() for start, end in spans]
        questions = find_questions(model, sentences, n=12, seed=seed + number)
        for condition, blocks in _ANSWERING.items():
            probed = dict(list(probe_questions(model, questions, adapter, other, blocks).groupby("sentence")))
            predictions = model.answer([question.text for question in about], adapter, blocks=blocks)
            new = marked(about, predictions, document=number, condition=condition)
            for row, place in zip(new, places, strict=True):
                at = probed.get(place)
                signals = {name: math.nan if at is None else float(of(at)) for name, of in SIGNALS.items()}
                rows.append(row | {"sentence": place} | signals)
    return pd.DataFrame(rows)


def flag_curve(samples: pd.DataFrame, thresholds: Mapping[str, Sequence[float]] | None = None) -> pd.DataFrame:
    """What is flagged below each threshold: condition, signal, threshold, n (facts), failing, and three shares.

    found: share of the failing facts that are flagged.
    precision: share of the flagged facts that fail.
    false_alarms: share of the answered facts that are flagged.

    Facts without a question are never flagged. `thresholds`, by signal: None takes steps of 0.05 for `kept`, and up to
    41 quantiles of the values of the others.
    """
    rows = []
    for condition, group in samples.groupby("condition", sort=False):
        failed = ~group["correct"].astype(bool)
        for signal in SIGNALS:
            if thresholds is None and signal == "kept":
                at = [step / 20 for step in range(21)]
            elif thresholds is None:
                values = group[signal].dropna()
                at = sorted({float(values.quantile(q / 40)) for q in range(41)} | {float(values.max()) + 1e-6})
            else:
                at = thresholds[signal]
            for threshold in at:
                flagged = group[signal] < threshold
                hits = int((flagged & failed).sum())
                rows.append(
                    {"condition": condition, "signal": signal, "threshold": float(threshold)}
                    | {"found": hits / max(1, int(failed.sum()))}
                    | {"precision": hits / int(flagged.sum()) if flagged.any() else 1.0}
                    | {"false_alarms": int((flagged & ~failed).sum()) / max(1, int((~failed).sum()))}
                    | {"n": len(group), "failing": int(failed.sum())}
                )
    return pd.DataFrame(rows)


def _best_flags(curve: pd.DataFrame) -> pd.DataFrame:
    """One row per condition and signal: the threshold with the largest found - false_alarms."""
    gain = (curve["found"] - curve["false_alarms"]).rename("gain")
    best = gain.groupby([curve["condition"], curve["signal"]], sort=False).idxmax()
    return curve.loc[best]


def run(model: DocToLoRA, n: int, seed: int) -> pd.DataFrame:
    """The record: `flag_curve` of `n` documents of each split; `chosen` marks the best on validation documents."""
    curves = []
    thresholds = None
    for split in ("validation", "test"):
        curve = flag_curve(_flag_samples(model, n, seed, split), thresholds)
        if thresholds is None:
            chosen = _best_flags(curve).set_index(["condition", "signal"])["threshold"]
            thresholds = curve.groupby("signal")["threshold"].unique().to_dict()
        rows = zip(curve["condition"], curve["signal"], curve["threshold"], strict=True)
        marks = [chosen[condition, signal] == at for condition, signal, at in rows]
        curves.append(curve.assign(chosen=marks, split=split, documents=n))
    return pd.concat(curves, ignore_index=True)
