"""TODO docstring."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping, Sequence

import pandas as pd

from d2l_lib import arguments as options
from d2l_lib.analysis.report import find_questions, kept, most_frequent, probe_questions
from d2l_lib.documents import split_sentences
from d2l_lib.loading import load
from d2l_lib.model import DocToLoRA
from d2l_lib.records import one_line_errors, project_root, write_jsonl
from d2l_lib.tasks import world

SIGNALS = {  # of a sentence; what is least is flagged first
    "kept": kept,
    "margin of the most frequent question": lambda asked: most_frequent(asked)["margin"],
    "least margin": lambda asked: asked["margin"].min(),
    "share of questions answered": lambda asked: (asked["margin"] > 0).mean(),
    "over the controls": lambda asked: most_frequent(asked)[["over_zero", "over_wrong"]].min(),
}


ANSWERING = {"all blocks": None, "routed": 1}


def flag_samples(
    model: DocToLoRA, n_documents: int, seed: int, split: str, facts: tuple[int, int] = (8, 40), n: int = 12
) -> pd.DataFrame:
    """Every fact of `n_documents` generated documents of `split`: is its question answered, and what did the report,
    which does not know that question, measure at its sentence?

    One row per fact and condition ("all blocks", "routed"): document, condition, question, answer, prediction,
    failed, the SIGNALS (NaN where no question about the sentence was found).
    """
    rng = random.Random(f"flags/{split}/{seed}")
    rows = []
    for number in range(n_documents):
        document = world.draw_document(rng, split, rng.randint(*facts))
        adapter, other = model.internalize_each(
            [document.text, world.draw_document(rng, split, len(document.facts)).text]
        )
        spans = split_sentences(document.text)
        sentences = [document.text[start:end].strip() for start, end in spans]
        asked = [world.question_about(rng, fact) for fact in document.facts]
        places = [next(i for i, (a, b) in enumerate(spans) if a <= fact.span[0] < b) for fact in document.facts]
        questions = find_questions(model, sentences, n=n, seed=seed + number)
        for condition, blocks in ANSWERING.items():
            probed = probe_questions(model, questions, adapter, other, blocks)
            found = dict(list(probed.groupby("sentence")))
            said = model.answer([question.text for question in asked], adapter, blocks=blocks)
            for question, place, answer in zip(asked, places, said, strict=True):
                about = found.get(place)
                row = {"document": number, "condition": condition, "sentence": place, "question": question.text}
                row |= {"answer": question.answer, "prediction": answer, "failed": answer != question.answer}
                row |= {name: math.nan if about is None else float(of(about)) for name, of in SIGNALS.items()}
                rows.append(row)
    return pd.DataFrame(rows)


def flag_curve(samples: pd.DataFrame, thresholds: Mapping[str, Sequence[float]] | None = None) -> pd.DataFrame:
    """What is found at each threshold, by condition and signal: found (share of the failing facts that are flagged),
    precision (share of the flagged ones that fail), false_alarms (share of the answered facts that are flagged).

    Flagged: the signal lies below the threshold; facts without a question never are. thresholds: by signal (None: steps
    of 0.05 for `kept`, up to 41 quantiles of the values of the others). Other columns: condition, signal, threshold,
    n (facts), failing.
    """
    rows = []
    for condition, group in samples.groupby("condition", sort=False):
        failed = group["failed"].astype(bool)
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


def best_flags(curve: pd.DataFrame) -> pd.DataFrame:
    """The threshold of each condition and signal at which most is found over the false alarms: one row each."""
    gain = (curve["found"] - curve["false_alarms"]).rename("gain")
    best = gain.groupby([curve["condition"], curve["signal"]], sort=False).idxmax()
    return curve.loc[best]


@one_line_errors("reports")
def main() -> None:
    """How well the report of a bundled model flags what its adapters fail to answer, on generated documents, recorded
    in data/full_runs/report.jsonl with seed, n and command.

    Thresholds are chosen on validation documents (column `chosen`) and measured, with all others, on test documents.
    """
    parser = options.Parser(description=main.__doc__)
    parser.add_argument("--model", default="tiny/qa", help="bundled name, or a folder")
    parser.add_argument("--documents", type=options.count, default=25, help="of each split, of 8 to 40 facts")
    parser.add_argument("--seed", type=options.seed, default=0)
    a = parser.parse_args()
    facts = {"seed": a.seed, "command": " ".join(["python -m d2l_lib.analysis.report", *sys.argv[1:]])}
    model = load(a.model)
    curves = []
    for split in ("validation", "test"):
        samples = flag_samples(model, a.documents, a.seed, split)
        if not curves:
            curve = flag_curve(samples)
            chosen = best_flags(curve).set_index(["condition", "signal"])["threshold"]
            thresholds = curve.groupby("signal")["threshold"].unique().to_dict()
        else:
            curve = flag_curve(samples, thresholds)
        keys = zip(curve["condition"], curve["signal"], strict=True)
        marks = [chosen[key] == at for key, at in zip(keys, curve["threshold"], strict=True)]
        curves.append(curve.assign(chosen=marks, split=split, documents=a.documents, **facts))
    table = pd.concat(curves, ignore_index=True)
    write_jsonl(project_root() / "data" / "full_runs" / "report.jsonl", table.to_dict("records"))
    print(table[table["chosen"]].drop(columns="command").to_string())


if __name__ == "__main__":
    main()
