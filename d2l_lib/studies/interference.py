"""What an adapter costs elsewhere: easy general questions, with a text inside that has nothing to do with them."""

from __future__ import annotations

import random
import re
from pathlib import Path

from d2l_lib.model import DocToLoRA
from d2l_lib.records import project_root, read_rows
from d2l_lib.studies.articles import articles_of
from d2l_lib.studies.passages import ask
from d2l_lib.tasks import qa, scores

QUESTIONS = Path("data") / "general_questions.jsonl"
_PASSAGES = 40  # whose adapters take turns
_TOGETHER = 10  # of them in one adapter
_ARTICLES = 4  # whole ones that take turns


def run(model: DocToLoRA, n: int, seed: int, questions: str) -> list[dict]:
    """A row for each adapter: n questions, right ones with their interval, and how many of the base model's stay right.

    questions: the data set of passages, "DATASET" or "DATASET=FILE" (see `tasks.qa.load_named`). If it has articles of
    20,000 to 50,000 characters, all passages of one are inside, too.
    """
    asked = read_rows(project_root() / QUESTIONS)[:n]
    frame, rng = qa.load_named(questions), random.Random(f"interference/{seed}")
    documents = [document for document, _ in qa.group_by_document(frame)]
    drawn = rng.sample(sorted(documents), min(_PASSAGES, len(documents)))
    adapters = model.internalize_each(drawn)
    articles = articles_of(frame)
    titles = rng.sample(sorted(articles), min(_ARTICLES, len(articles)))
    whole = [sum(model.internalize_each(articles[title])) for title in titles]
    places = range(len(asked))
    applied = {
        "no adapter": [None for _ in places],
        "one passage": [adapters[i % len(adapters)] for i in places],
        f"{_TOGETHER} passages": [
            sum(adapters[(i + j) % len(adapters)] for j in range(min(_TOGETHER, len(adapters)))) for i in places
        ],
    }
    if whole:
        applied["a whole article"] = [whole[i % len(whole)] for i in places]
    rows, before = [], None
    for name, chosen in applied.items():
        replies, seconds = ask(model, [one["question"] for one in asked], chosen)
        right = [says(reply, one["answers"]) for reply, one in zip(replies, asked, strict=True)]
        before = right if before is None else before
        low, high = (round(bound, 4) for bound in scores.wilson(sum(right), len(right)))
        stay = sum(a and b for a, b in zip(before, right, strict=True)) / max(1, sum(before))
        n_passages = sum(len(articles[title]) for title in titles) if name == "a whole article" else len(drawn)
        row = {"inside": name, "n": len(asked), "n_passages": n_passages, "right": sum(right) / len(right)}
        rows.append(row | {"low": low, "high": high, "stay_right": stay, "seconds": seconds, "seed": seed})
        print(name, rows[-1], flush=True)
    return rows


def says(reply: str, answers: list[str]) -> bool:
    """Whether a reply holds one of these answers as whole words; symbols of one or two letters by their case."""
    return any(
        re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", reply, 0 if len(answer) < 3 else re.IGNORECASE) is not None
        for answer in answers
    )
