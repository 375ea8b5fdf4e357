"""Probes of what an adapter holds and what it disturbs, on the generated world, where the truth is known.

Every function returns one row per question and condition: probe, condition, question, answer, prediction, correct, and
columns of its own. `scores.summarise(rows, ["probe", "condition"])` makes the table. A condition that ends in
", routed" is the one before it with only the most relevant block of the adapter answering (`routing`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from d2l_lib.model import DocToLoRA
from d2l_lib.tasks import world
from d2l_lib.tasks.questions import disjoint_documents, one_hop_question
from d2l_lib.tasks.scores import summarise

INSTRUCTION = "You are a useful assistant."
FACTS = 5  # of a document, where nothing else is said
BLOCKS = {"": None, ", routed": 1}  # the end of a condition's name, and how many blocks answer


def _rows(probe: str, condition: str, asked: Sequence[world.Question], predictions: Sequence[str], **columns) -> list:
    """One row per question; a column has one value for all rows."""
    return [
        {"probe": probe, "condition": condition, "question": question.text, "answer": question.answer}
        | {"prediction": prediction, "correct": prediction == question.answer}
        | columns
        for question, prediction in zip(asked, predictions, strict=True)
    ]


def interference(model: DocToLoRA, n: int, seed: int, n_facts: int = 20) -> pd.DataFrame:
    """`n` encyclopedia questions to the base model, and with something inside that has nothing to do with them.

    Conditions: base model; unrelated document (of `n_facts` facts about others), assistant instruction, bias alone
    (no document at all).
    """
    rng = random.Random(f"interference/{seed}")
    asked = list(world.encyclopedia_questions(rng, n))
    documents = [world.draw_document(rng, "test", n_facts).text for _ in asked]
    (instruction,) = model.internalize_each([INSTRUCTION])
    texts = [question.text for question in asked]
    conditions = {
        "base model": None,
        "unrelated document": model.internalize_each(documents),
        "assistant instruction": instruction,
        "bias alone": instruction.scaled(0.0),
    }
    rows = []
    for condition, adapters in conditions.items():
        for routed, blocks in BLOCKS.items() if condition == "unrelated document" else [("", None)]:
            said = model.answer(texts, adapters, blocks=blocks)
            rows += _rows("interference", condition + routed, asked, said, seed=seed)
    return pd.DataFrame(rows)


def conflict(model: DocToLoRA, n: int, seed: int, n_facts: int = FACTS) -> pd.DataFrame:
    """`n` documents that contradict one encyclopedia fact: which of the two does the model say?

    Each prediction makes two rows, whose column `about` says whose value counts as the answer. Conditions: base model,
    in context, internalized.
    """
    rng = random.Random(f"conflict/{seed}")
    documents, asked, believed = [], [], []
    for _ in range(n):
        document, ((fact, known),) = world.conflicting_document(rng, n_facts - 1, 1)
        documents.append(document.text)
        asked.append(world.question_about(rng, fact))
        believed.append(known.value)
    texts = [question.text for question in asked]
    with_document = [f"{document}\n\n{text}" for document, text in zip(documents, texts, strict=True)]
    predictions = {
        "base model": model.answer(texts, None),
        "in context": model.answer(with_document, None),
    }
    adapters = model.internalize_each(documents)
    for routed, blocks in BLOCKS.items():
        predictions["internalized" + routed] = model.answer(texts, adapters, blocks=blocks)
    known = [replace(question, answer=value) for question, value in zip(asked, believed, strict=True)]
    rows = []
    for condition, said in predictions.items():
        rows += _rows("conflict", condition, asked, said, about="the document's value", seed=seed)
        rows += _rows("conflict", condition, known, said, about="the encyclopedia's value", seed=seed)
    return pd.DataFrame(rows)


def composition(
    model: DocToLoRA, counts: Sequence[int], n: int, seed: int, n_facts: int = FACTS, questions: int = 4
) -> pd.DataFrame:
    """At least `n` one-hop questions for each number of documents in one adapter; column documents.

    Documents have `n_facts` facts each and share no names within an adapter; `questions` are asked of every adapter,
    each about a document of it drawn anew.
    """
    rows = []
    for count in counts:
        rng = random.Random(f"composition/{seed}/{count}")
        asked, adapters = [], []
        while len(asked) < n:
            together = list(disjoint_documents(rng, count, n_facts))
            adapter = sum(model.internalize_each({f"document {i}": d.text for i, d in enumerate(together)}))
            for _ in range(questions):
                asked.append(one_hop_question(rng, rng.choice(together)))
                adapters.append(adapter)
        for routed, blocks in BLOCKS.items():
            said = model.answer([question.text for question in asked], adapters, blocks=blocks)
            rows += _rows("composition", f"{count} documents{routed}", asked, said, documents=count, seed=seed)
    return pd.DataFrame(rows)


def removal(model: DocToLoRA, n: int, seed: int, count: int = 16, n_facts: int = FACTS) -> pd.DataFrame:
    """`n` adapters of `count` documents each: one document is updated (one fact has another value) or removed.

    Questions about a fact of that document (`about` "the document") and about another document ("the others"), put to:
    all inside, removed, never added, updated. For "updated" the right answer is the new value.
    """
    rng = random.Random(f"removal/{seed}")
    asked: dict[tuple[str, str], list[world.Question]] = {}
    adapters: dict[tuple[str, str], list] = {}
    for _ in range(n):
        together = list(disjoint_documents(rng, count, n_facts))
        each = model.internalize_each({f"document {i}": d.text for i, d in enumerate(together)})
        everything, others = sum(each), sum(each[:-1])
        name = f"document {count - 1}"
        changed, question = _with_another_value(rng, together[-1])
        (update,) = model.internalize_each({f"{name}, second version": changed.text})
        about = {"the document": question, "the others": one_hop_question(rng, rng.choice(together[:-1]))}
        conditions = {
            "all inside": everything,
            "removed": everything.without(document=name),
            "never added": others,
            "updated": everything.without(document=name) + update,
        }
        for condition, adapter in conditions.items():
            for which, plain in about.items():
                key = (condition, which)
                fact = next(f for f in changed.facts if f.span == question.evidence[0])
                new = world.Question(plain.text, fact.value, plain.kind)
                is_new = condition == "updated" and which == "the document"
                asked.setdefault(key, []).append(new if is_new else plain)
                adapters.setdefault(key, []).append(adapter)
    rows = []
    for (condition, which), questions in asked.items():
        for routed, blocks in BLOCKS.items():
            said = model.answer([question.text for question in questions], adapters[condition, which], blocks=blocks)
            rows += _rows("removal", condition + routed, questions, said, about=which, seed=seed)
    return pd.DataFrame(rows)


def two_hop(model: DocToLoRA, n: int, seed: int, n_facts: int = FACTS) -> pd.DataFrame:
    """`n` two-hop questions: in context; with the whole document of `n_facts` facts (at least two) internalized; with
    nothing but the two facts in one chunk, and in two documents; and either hop asked alone with the two documents.
    """
    if n_facts < 2:
        raise ValueError("a two-hop question needs two facts: n_facts must be at least 2")
    rng = random.Random(f"two hops/{seed}")
    samples = []
    while len(samples) < n:
        document = world.draw_document(rng, "test", n_facts)
        question = world.ask(rng, document, "two_hop")
        if question is not None:
            samples.append((document, question))
    asked = [question for _, question in samples]
    hops: tuple[list[world.Question], list[world.Question]] = ([], [])
    wholes, chunked, separate = [], [], []
    for document, question in samples:
        by_span = {fact.span: fact for fact in document.facts}
        for hop, span in zip(hops, question.evidence, strict=True):
            hop.append(world.question_about(rng, by_span[span]))
        first, second = (document.text[start:end] for start, end in question.evidence)
        wholes.append(document.text)
        chunked.append(f"{first} {second}")
        separate.append({"first": first, "second": second})
    longest = max(len(model.tokenizer(text)["input_ids"]) for text in chunked)
    one_chunk = model.internalize_each(chunked, chunk_tokens=longest)
    two_documents = [sum(model.internalize_each(pair)) for pair in separate]
    texts = [question.text for question in asked]
    whole = model.internalize_each(wholes)
    predictions = {
        "in context": (asked, model.answer([f"{d}\n\n{t}" for d, t in zip(wholes, texts, strict=True)], None)),
        "whole document": (asked, model.answer(texts, whole)),
        "whole document, routed": (asked, model.answer(texts, whole, blocks=1)),
        "two facts in one chunk": (asked, model.answer(texts, one_chunk)),
        "two facts in two documents": (asked, model.answer(texts, two_documents)),
        "first hop alone": (hops[0], model.answer([q.text for q in hops[0]], two_documents)),
        "second hop alone": (hops[1], model.answer([q.text for q in hops[1]], two_documents)),
    }
    rows = []
    for condition, (questions, said) in predictions.items():
        rows += _rows("two hops", condition, questions, said, seed=seed)
    return pd.DataFrame(rows)


def question_internalized(model: DocToLoRA, n: int, seed: int, n_facts: int = FACTS) -> pd.DataFrame:
    """One-hop questions with the document inside, with the question itself inside instead, and with another document:
    only the first can be answered.
    """
    rng = random.Random(f"question internalized/{seed}")
    documents = [world.draw_document(rng, "test", n_facts) for _ in range(n)]
    asked = [one_hop_question(rng, document) for document in documents]
    texts = [question.text for question in asked]
    inside = {
        "the document": [document.text for document in documents],
        "the question": texts,
        "another document": [document.text for document in [*documents[1:], documents[0]]],
    }
    rows = []
    for condition, contents in inside.items():
        predictions = model.answer(texts, model.internalize_each(contents))
        rows += _rows("what is inside", condition, asked, predictions, seed=seed)
    return pd.DataFrame(rows)


def _with_another_value(rng: random.Random, document: world.Document) -> tuple[world.Document, world.Question]:
    """(the document with another value in one of its facts, a question about that fact with the first answer)."""
    place = rng.randrange(len(document.facts))
    fact = document.facts[place]
    changed = world.with_value(rng, fact, document.split)
    facts = [changed if i == place else other for i, other in enumerate(document.facts)]
    rewritten = world.write_document(rng, facts, document.split)
    question = world.question_about(rng, fact)
    span = next(f.span for f in rewritten.facts if (f.subject, f.relation) == (fact.subject, fact.relation))
    return rewritten, world.Question(question.text, question.answer, question.kind, (span,))


# ----------------------------------------------------------------------------------------------------------- the record
DOCUMENT_COUNTS = (1, 2, 4, 8, 16, 32, 64)


def all_probes(model: DocToLoRA, n: int, seed: int) -> pd.DataFrame:
    """Every probe with the settings of the record, as one table."""
    return pd.concat(
        [
            interference(model, n, seed),
            conflict(model, n, seed),
            composition(model, DOCUMENT_COUNTS, n, seed),
            removal(model, n, seed),
            two_hop(model, n, seed),
            question_internalized(model, n, seed),
        ],
        ignore_index=True,
    )


def run(model: DocToLoRA, n: int, seed: int) -> pd.DataFrame:
    """The record: every probe, summarised by condition."""
    rows = all_probes(model, n, seed)
    return summarise(rows.assign(about=rows["about"].fillna("")), ["probe", "condition", "about"])
