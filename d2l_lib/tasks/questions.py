"""Questions on documents of the generated world, as tables, and the answers to them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pandas as pd

from d2l_lib.documents import check_texts, split_sentences
from d2l_lib.tasks import world


def one_hop_question(rng: random.Random, document: world.Document) -> world.Question:
    """A plain question about one of the document's facts."""
    return world.question_about(rng, rng.choice(document.facts))


def marked(questions: Sequence[world.Question], predictions: Sequence[str], **columns) -> list[dict]:
    """Rows of question, answer, prediction and correct (equal to the answer), plus constant `columns`."""
    return [
        {"question": question.text, "answer": question.answer, "prediction": prediction}
        | {"correct": prediction == question.answer, **columns}
        for question, prediction in zip(questions, predictions, strict=True)
    ]


def disjoint_documents(rng: random.Random, count: int, n_facts: int, split: str = "test") -> Iterator[world.Document]:
    """`count` documents of `split` that share no names: no question has two right answers."""
    known: set[str] = set()
    failures = 0
    while count:
        document = world.draw_document(rng, split, n_facts)
        names = {name for _, name in document.entities}
        if names & known:
            failures += 1
            if failures == 500:
                raise ValueError(f"the {split} split has too few names for {count} more documents of {n_facts} facts")
            continue
        known |= names
        failures, count = 0, count - 1
        yield document


def world_samples(
    n: int, seed: int, *, split: str = "test", facts: tuple[int, int] = (2, 20), kinds: Sequence[str] = world.KINDS
) -> pd.DataFrame:
    """`n` questions on documents of `split`, a fresh document each, kinds in turn, for `views.samples.view_samples`.

    Columns: document, question, answer, kind, evidence_start, evidence_end (lists of characters, one per evidence
    sentence), n_facts. `facts`: fewest and most facts of a document.
    """
    kinds = check_texts(kinds, "kinds")
    rng = random.Random(f"world samples/{split}/{seed}")
    rows: list[dict] = []
    for _ in range(100 * n):
        if len(rows) == n:
            break
        document = world.draw_document(rng, split, rng.randint(*facts))
        question = world.ask(rng, document, kinds[len(rows) % len(kinds)])
        if question is not None:
            rows.append(
                {"document": document.text, "question": question.text, "answer": question.answer}
                | {"kind": question.kind}
                | {"evidence_start": [start for start, _ in question.evidence]}
                | {"evidence_end": [end for _, end in question.evidence], "n_facts": len(document.facts)}
            )
    if len(rows) < n:
        raise ValueError(
            f"documents of {facts[0]} to {facts[1]} facts support too few questions of kind {', '.join(kinds)}"
        )
    return pd.DataFrame(rows)


def _sentences(text: str) -> list[str]:
    return [text[start:end].strip() for start, end in split_sentences(text)]


def shuffle_sentences(rng: random.Random, text: str) -> str:
    """The same sentences in another order."""
    sentences = _sentences(text)
    return " ".join(rng.sample(sentences, len(sentences)))


def shuffle_words(rng: random.Random, text: str) -> str:
    """The same sentences in the same order, the words of each shuffled."""
    split = [sentence.rstrip(".").split() for sentence in _sentences(text)]
    return " ".join(" ".join(rng.sample(words, len(words))) + "." for words in split)


def write_variants(rng: random.Random, split: str, n_facts: int) -> tuple[world.Document, dict[str, str]]:
    """A document of fresh facts, and {name: a text that differs from it in one respect}.

    "other words": the same facts in other words and order. "shuffled": its sentences in another order. "other values":
    its sentences, each with another value.
    """
    facts = world.draw_facts(rng, split, n_facts)
    changed = [world.with_value(rng, fact, split) for fact in facts]
    writer = rng.randrange(2**32)  # the same number gives the same words
    document = world.write_document(random.Random(writer), facts, split)
    return document, {
        "other words": world.write_document(rng, facts, split).text,
        "shuffled": shuffle_sentences(rng, document.text),
        "other values": world.write_document(random.Random(writer), changed, split).text,
    }
