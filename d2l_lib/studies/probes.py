"""Probes of what an adapter holds and what it disturbs, on the generated world, where the truth is known.

Every probe returns one row per question and condition: probe, condition, question, answer, prediction, correct, seed,
and columns of its own. In a condition with the suffix ", routed" only the most relevant block answers (`routing`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pandas as pd

from d2l_lib.model import DocToLoRA
from d2l_lib.tasks import world
from d2l_lib.tasks.questions import disjoint_documents, marked, one_hop_question
from d2l_lib.tasks.scores import summarise
from d2l_lib.training.processes import shared

_INSTRUCTION = "You are a useful assistant."
_FACTS = 5  # of a document, by default
_BLOCKS = {"": None, ", routed": 1}  # {suffix of the condition: number of blocks that answer}
_DOCUMENT_COUNTS = (1, 2, 4, 8, 16, 32, 64)


def interference(model: DocToLoRA, n: int, seed: int) -> pd.DataFrame:
    """`n` encyclopedia questions to the base model, and with adapters that have nothing to do with them.

    Conditions: base model; unrelated document (of 20 other facts), assistant instruction, bias alone (no document).
    """
    rng = random.Random(f"interference/{seed}")
    questions = list(world.encyclopedia_questions(rng, n))
    documents = [world.draw_document(rng, "test", 20).text for _ in questions]
    (instruction,) = model.internalize_each([_INSTRUCTION])
    texts = [question.text for question in questions]
    conditions = {
        "base model": None,
        "unrelated document": model.internalize_each(documents),
        "assistant instruction": instruction,
        "bias alone": instruction.scaled(0.0),
    }
    rows = []
    for condition, adapters in conditions.items():
        for routed, blocks in _BLOCKS.items() if condition == "unrelated document" else [("", None)]:
            predictions = model.answer(texts, adapters, blocks=blocks)
            rows += marked(questions, predictions, condition=condition + routed)
    return pd.DataFrame(rows).assign(probe="interference", seed=seed)


def conflict(model: DocToLoRA, n: int, seed: int) -> pd.DataFrame:
    """`n` documents that contradict one encyclopedia fact: whose value does the model give?

    Each prediction makes two rows; `about` says whose value is the answer. Conditions: base model, in context,
    internalized.
    """
    rng = random.Random(f"conflict/{seed}")
    documents, questions, believed = [], [], []
    for _ in range(n):
        document, ((fact, known),) = world.conflicting_document(rng, _FACTS - 1, 1)
        documents.append(document.text)
        questions.append(world.question_about(rng, fact))
        believed.append(replace(questions[-1], answer=known.value))
    texts = [question.text for question in questions]
    with_document = [f"{document}\n\n{text}" for document, text in zip(documents, texts, strict=True)]
    adapters = model.internalize_each(documents)
    predictions = {"base model": model.answer(texts, None), "in context": model.answer(with_document, None)}
    for routed, blocks in _BLOCKS.items():
        predictions["internalized" + routed] = model.answer(texts, adapters, blocks=blocks)
    rows = []
    for condition, answers in predictions.items():
        rows += marked(questions, answers, condition=condition, about="the document's value")
        rows += marked(believed, answers, condition=condition, about="the encyclopedia's value")
    return pd.DataFrame(rows).assign(probe="conflict", seed=seed)


def composition(model: DocToLoRA, counts: Sequence[int], n: int, seed: int) -> pd.DataFrame:
    """At least `n` one-hop questions for each number of documents in one adapter; column documents.

    Documents share no names within an adapter. Each adapter gets four questions, each about a random one of its
    documents.
    """
    rows = []
    for count in counts:
        rng = random.Random(f"composition/{seed}/{count}")
        questions, adapters = [], []
        while len(questions) < n:
            together = list(disjoint_documents(rng, count, _FACTS))
            adapter = sum(model.internalize_each({f"document {i}": d.text for i, d in enumerate(together)}))
            questions += [one_hop_question(rng, rng.choice(together)) for _ in range(4)]
            adapters += [adapter] * 4
        for routed, blocks in _BLOCKS.items():
            predictions = model.answer([question.text for question in questions], adapters, blocks=blocks)
            rows += marked(questions, predictions, condition=f"{count} documents{routed}", documents=count)
    return pd.DataFrame(rows).assign(probe="composition", seed=seed)


def removal(model: DocToLoRA, n: int, seed: int, count: int = 16) -> pd.DataFrame:
    """`n` adapters of `count` documents each: one document is updated (one fact has another value) or removed.

    Questions are about a fact of that document (`about` "the document") or of another ("the others"). Conditions: all
    inside, removed, never added, updated. For "updated" the right answer is the new value.
    """
    rng = random.Random(f"removal/{seed}")
    samples: dict[tuple[str, str], list] = {}
    for _ in range(n):
        together = list(disjoint_documents(rng, count, _FACTS))
        each = model.internalize_each({f"document {i}": d.text for i, d in enumerate(together)})
        everything, others = sum(each), sum(each[:-1])
        name = f"document {count - 1}"
        changed, old, new = _with_another_value(rng, together[-1])
        (update,) = model.internalize_each({f"{name}, second version": changed.text})
        other = one_hop_question(rng, rng.choice(together[:-1]))
        for condition, adapter in {
            "all inside": everything,
            "removed": everything.without(document=name),
            "never added": others,
            "updated": everything.without(document=name) + update,
        }.items():
            own = new if condition == "updated" else old
            samples.setdefault((condition, "the document"), []).append((own, adapter))
            samples.setdefault((condition, "the others"), []).append((other, adapter))
    rows = []
    for (condition, about), pairs in samples.items():
        questions, adapters = (list(column) for column in zip(*pairs, strict=True))
        for routed, blocks in _BLOCKS.items():
            predictions = model.answer([question.text for question in questions], adapters, blocks=blocks)
            rows += marked(questions, predictions, condition=condition + routed, about=about)
    return pd.DataFrame(rows).assign(probe="removal", seed=seed)


def _with_another_value(
    rng: random.Random, document: world.Document
) -> tuple[world.Document, world.Question, world.Question]:
    """(document with another value in one fact, question about that fact with the old value, with the new value)."""
    place = rng.randrange(len(document.facts))
    fact = document.facts[place]
    changed = world.with_value(rng, fact, document.split)
    facts = [changed if i == place else other for i, other in enumerate(document.facts)]
    rewritten = world.write_document(rng, facts, document.split)
    question = world.question_about(rng, fact)
    return rewritten, question, replace(question, answer=changed.value)


def two_hop(model: DocToLoRA, n: int, seed: int) -> pd.DataFrame:
    """`n` two-hop questions, and either hop alone.

    Conditions: in context; whole document; two facts in one chunk; two facts in two documents; first or second hop
    alone (in two documents).
    """
    rng = random.Random(f"two hops/{seed}")
    documents, questions = [], []
    while len(questions) < n:
        document = world.draw_document(rng, "test", _FACTS)
        if (question := world.ask(rng, document, "two_hop")) is not None:
            documents.append(document)
            questions.append(question)
    hops: tuple[list[world.Question], list[world.Question]] = ([], [])
    chunks, separate = [], []
    for document, question in zip(documents, questions, strict=True):
        by_span = {fact.span: fact for fact in document.facts}
        for hop, span in zip(hops, question.evidence, strict=True):
            hop.append(world.question_about(rng, by_span[span]))
        first, second = (document.text[start:end] for start, end in question.evidence)
        chunks.append(f"{first} {second}")
        separate.append({"first": first, "second": second})
    longest = max(len(model.tokenizer(text)["input_ids"]) for text in chunks)
    one_chunk = model.internalize_each(chunks, chunk_tokens=longest)
    two_documents = [sum(model.internalize_each(pair)) for pair in separate]
    texts = [question.text for question in questions]
    prompts = [f"{document.text}\n\n{text}" for document, text in zip(documents, texts, strict=True)]
    whole = model.internalize_each([document.text for document in documents])
    rows = []
    for condition, about, answers in (
        ("in context", questions, model.answer(prompts, None)),
        ("whole document", questions, model.answer(texts, whole)),
        ("whole document, routed", questions, model.answer(texts, whole, blocks=1)),
        ("two facts in one chunk", questions, model.answer(texts, one_chunk)),
        ("two facts in two documents", questions, model.answer(texts, two_documents)),
        ("first hop alone", hops[0], model.answer([hop.text for hop in hops[0]], two_documents)),
        ("second hop alone", hops[1], model.answer([hop.text for hop in hops[1]], two_documents)),
    ):
        rows += marked(about, answers, condition=condition)
    return pd.DataFrame(rows).assign(probe="two hops", seed=seed)


def question_internalized(model: DocToLoRA, n: int, seed: int) -> pd.DataFrame:
    """One-hop questions with their document, the question itself, or another document in the adapter."""
    rng = random.Random(f"question internalized/{seed}")
    documents = [world.draw_document(rng, "test", _FACTS) for _ in range(n)]
    questions = [one_hop_question(rng, document) for document in documents]
    documents, texts = [document.text for document in documents], [question.text for question in questions]
    inside = {
        "the document": documents,
        "the question": texts,
        "another document": [*documents[1:], documents[0]],
    }
    rows = []
    for condition, contents in inside.items():
        rows += marked(questions, model.answer(texts, model.internalize_each(contents)), condition=condition)
    return pd.DataFrame(rows).assign(probe="what is inside", seed=seed)


def run(model: DocToLoRA, n: int, seed: int) -> pd.DataFrame:
    """The record: every probe, summarised by condition."""
    pieces = [interference, conflict, *(partial(composition, counts=(count,)) for count in _DOCUMENT_COUNTS), removal]
    pieces += [two_hop, question_internalized]
    rows = pd.concat(shared(pieces, lambda probe: probe(model, n=n, seed=seed)), ignore_index=True)
    return summarise(rows.assign(about=rows["about"].fillna("")), ["probe", "condition", "about"])
