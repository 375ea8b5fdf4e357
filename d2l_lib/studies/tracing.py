"""Answers from real text traced to sentences: is the sentence that states the answer the first, and does it matter?"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from d2l_lib.adapter import Adapter
from d2l_lib.analysis.attribution import attribute, methods_of, sentence_units
from d2l_lib.model import DocToLoRA
from d2l_lib.studies.passages import ask
from d2l_lib.tasks import qa, scores

_AT_ONCE = 16  # passages to internalize


@dataclass(frozen=True)
class _Case:
    """A passage inside, and a question that is answered rightly.

    units: the passage's sentences. stated: numbers of those that hold an answer word by word.
    """

    document: str
    adapter: Adapter
    question: str
    said: str
    answers: Sequence[str]
    units: pd.DataFrame
    stated: frozenset[int]


def run(model: DocToLoRA, n: int, seed: int, questions: str) -> list[dict]:
    """A row for each method of sentences, and one for each check: n questions that the adapter answers rightly.

    questions: "DATASET" or "DATASET=FILE" (see `tasks.qa.load_named`), in an order that `seed` decides, one a passage.
    A passage has two sentences or more, and one that states an answer. A hit: such a sentence is first. Checks: the
    share of answers that are wrong when the sentence ranked first by `leave_one_out` is taken out of the text and the
    text is internalized again, and when another one is, drawn at random.

    ValueError where fewer than n questions are answered rightly.
    """
    cases = _right_ones(model, qa.load_named(questions), n, seed)
    if len(cases) < n:
        raise ValueError(f"of {questions} this model answers {len(cases)} passages' questions rightly: ask for fewer")
    facts = {"n": n, "chance": sum(len(case.stated) / len(case.units) for case in cases) / n, "seed": seed}
    facts |= {"sentences": sum(len(case.units) for case in cases) / n, "dataset": questions.partition("=")[0]}
    rows, first = [], []
    for method in methods_of(model)["sentence"]:
        places, start = [], time.process_time()
        for case in cases:
            told = (model, case.adapter, case.question, case.said, "sentence", method)
            table = attribute(*told, documents=case.document, controls=False, seed=seed)
            places.append(int(table["contribution"].argmax()))
        seconds = round((time.process_time() - start) / n, 3)
        hits = [place in case.stated for place, case in zip(places, cases, strict=True)]
        rows.append(_row("method", method, hits) | {"seconds": seconds} | facts)
        first = places if method == "leave_one_out" else first
    rng = random.Random(f"tracing/{seed}/another")
    others = [
        rng.choice([i for i in range(len(case.units)) if i != place]) for place, case in zip(first, cases, strict=True)
    ]
    for name, places in (("the sentence ranked first", first), ("another sentence", others)):
        rows.append(_row("check", f"wrong without {name}", _wrong_without(model, cases, places)) | facts)
    return rows


def _right_ones(model: DocToLoRA, frame: pd.DataFrame, n: int, seed: int) -> list[_Case]:
    """The first n cases, one a passage."""
    rng, cases = random.Random(f"tracing/{seed}"), []
    drawn = [(document, rng.choice(own.to_dict("records"))) for document, own in qa.group_by_document(frame)]
    rng.shuffle(drawn)
    for start in range(0, len(drawn), _AT_ONCE):
        part = drawn[start : start + _AT_ONCE]
        adapters = model.internalize_each([document for document, _ in part])
        replies, _ = ask(model, [asked["question"] for _, asked in part], adapters)
        for (document, asked), adapter, said in zip(part, adapters, replies, strict=True):
            units = sentence_units(adapter, document)
            texts = enumerate(units["text"])
            stated = frozenset(number for number, text in texts if any(one in text for one in asked["answers"]))
            if said and scores.exact_match(said, asked["answers"], "squad") and len(units) > 1 and stated:
                cases.append(_Case(document, adapter, asked["question"], said, asked["answers"], units, stated))
        print(f"{len(cases)} of {start + len(part)} are answered rightly", flush=True)
        if len(cases) >= n:
            break
    return cases[:n]


def _wrong_without(model: DocToLoRA, cases: Sequence[_Case], places: Sequence[int]) -> list[bool]:
    """Whether the answer is wrong without this sentence of each case."""
    texts = []
    for case, place in zip(cases, places, strict=True):
        start, end = case.units["start"][place], case.units["end"][place]
        texts.append((case.document[:start] + case.document[end:]).strip())
    replies, _ = ask(model, [case.question for case in cases], model.internalize_each(texts))
    return [not scores.exact_match(reply, case.answers, "squad") for reply, case in zip(replies, cases, strict=True)]


def _row(what: str, name: str, own: Sequence[bool]) -> dict:
    """The share of these with its Wilson interval; it is printed too."""
    low, high = scores.wilson(sum(own), len(own))
    print(name, round(sum(own) / len(own), 3), flush=True)
    return {"what": what, "name": name, "share": sum(own) / len(own), "low": low, "high": high}
