"""Whole articles inside one adapter: questions about one paragraph, with that paragraph alone and with all of them."""

from __future__ import annotations

import random
import time

import pandas as pd

from d2l_lib.model import DocToLoRA
from d2l_lib.studies.passages import ask, scored_rows
from d2l_lib.tasks import qa

_SIZES = 20_000, 50_000  # characters of an article
_NO_TITLE = "untitled"  # of passages without one


def run(model: DocToLoRA, n: int, seed: int, questions: str) -> pd.DataFrame:
    """A row for each method and metric: n questions on articles of 20,000 to 50,000 characters.

    questions: a data set with titles, "DATASET" or "DATASET=FILE" (see `tasks.qa.load_named`). An article is all its
    passages, each a document of the adapter; questions are drawn with `seed`, as many from each article as from others.
    """
    articles, drawn = questions_on_articles(questions, n, seed)
    start = time.process_time()
    each, whole = {}, {}
    for title in dict.fromkeys(drawn["title"]):
        adapters = dict(zip(articles[title], model.internalize_each(articles[title]), strict=True))
        wanted = set(drawn.loc[drawn["title"] == title, "document"])
        each |= {document: adapters[document] for document in wanted}
        whole |= dict.fromkeys(wanted, sum(adapters.values()))
    seconds = round((time.process_time() - start) / len(set(drawn["title"])), 1)
    inside = [sum(map(len, articles[title])) for title in dict.fromkeys(drawn["title"])]
    facts = {
        "n_articles": len(inside),
        "passages_of_an_article": round(sum(len(articles[t]) for t in dict.fromkeys(drawn["title"])) / len(inside), 1),
        "characters_of_an_article": round(sum(inside) / len(inside)),
        "seconds_internalizing": seconds,
        "dataset": drawn["dataset"].iloc[0],
    }
    rows = []
    for method, adapters in (("its passage alone", each), ("the whole article", whole)):
        replies, seconds = ask(model, list(drawn["question"]), [adapters[one] for one in drawn["document"]])
        rows += scored_rows(drawn.assign(method=method, prediction=replies), seed, seconds=seconds)
        print(method, {row["metric"]: round(row["score"], 3) for row in rows[-3:]}, flush=True)
    return pd.DataFrame([row | facts for row in rows])


def questions_on_articles(
    questions: str, n: int, seed: int, most: int | None = None
) -> tuple[dict[str, list[str]], pd.DataFrame]:
    """({title: its passages}, n questions, as many from each article as from others).

    questions: as for `run`. most: articles, of which so many are drawn with `seed`; None: all.

    ValueError if no article is of 20,000 to 50,000 characters.
    """
    frame = qa.load_named(questions)
    articles = articles_of(frame)
    if not articles:
        raise ValueError(f"{questions} has no article of {_SIZES[0]} to {_SIZES[1]} characters: are there titles?")
    if most is not None and len(articles) > most:
        kept = random.Random(f"articles/{seed}").sample(sorted(articles), most)
        articles = {title: articles[title] for title in kept}
    return articles, _drawn(frame[frame["title"].isin(articles)], n, seed)


def articles_of(frame: pd.DataFrame) -> dict[str, list[str]]:
    """{title: its passages} of the articles of 20,000 to 50,000 characters in a table of questions."""
    articles = {title: list(dict.fromkeys(own["document"])) for title, own in frame.groupby("title", sort=False)}
    return {
        title: own
        for title, own in articles.items()
        if title not in ("", _NO_TITLE) and _SIZES[0] <= sum(map(len, own)) <= _SIZES[1]
    }


def _drawn(frame: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """n questions, as many of each title as of others; in the table's order."""
    places = {title: list(own.index) for title, own in frame.groupby("title", sort=True)}
    rng, chosen = random.Random(f"articles/{seed}"), []
    for own in places.values():
        rng.shuffle(own)
    while len(chosen) < n and any(places.values()):
        chosen += [own.pop() for own in places.values() if own]
    return frame.loc[sorted(chosen[:n])].reset_index(drop=True)
