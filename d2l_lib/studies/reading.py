"""One pass over many blocks: the published sum against sparse reading, by size of the document and kind of question."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import pandas as pd

from d2l_lib.adapter import Adapter
from d2l_lib.model import DocToLoRA
from d2l_lib.studies import READING_METHODS as METHODS
from d2l_lib.studies import earlier_rows
from d2l_lib.tasks import qa, world
from d2l_lib.tasks.questions import disjoint_documents, marked, one_hop_question
from d2l_lib.tasks.scores import summarise
from d2l_lib.training.processes import shared

_SIZES = (8, 20, 40)  # facts in a document
_TOGETHER = (16, 64)  # documents in an adapter
_KINDS = ("two_hop", "paraphrase", "unanswerable", "which_of", "yes_no", "list")
_ENCYCLOPEDIA = "encyclopedia beside 20 facts"
_OPEN = -50.0  # nats: a null block that stops nothing
_AT_ONCE = 25  # questions per adapter of several documents
_GROUPS = 16  # answered together


@dataclass(frozen=True)
class Asked:
    """Questions of one condition on some documents; places: which document each question is about."""

    condition: str
    documents: list[world.Document]
    questions: list[world.Question]
    places: list[int]


@dataclass(frozen=True)
class _Group:
    """Questions of one condition on one adapter; document: its text where a prompt can hold it."""

    condition: str
    adapter: Adapter
    document: str | None
    questions: list[world.Question]


def draw_conditions(n: int, seed: int, split: str) -> Iterator[Asked]:
    """All conditions of `measure_reading`, `n` questions of each."""
    for n_facts in _SIZES:
        rng = random.Random(f"reading/{n_facts} facts/{split}/{seed}")
        for start in range(0, n, 5):
            document = world.draw_document(rng, split, n_facts)
            facts = rng.sample(document.facts, min(5, n - start))
            questions = [world.question_about(rng, one) for one in facts]
            yield Asked(f"{n_facts} facts", [document], questions, [0] * len(questions))
    for count in _TOGETHER:
        rng = random.Random(f"reading/{count} documents/{split}/{seed}")
        for start in range(0, n, _AT_ONCE):
            documents = list(disjoint_documents(rng, count, 5, split))
            places = [rng.randrange(count) for _ in range(min(_AT_ONCE, n - start))]
            questions = [one_hop_question(rng, documents[place]) for place in places]
            yield Asked(f"{count} documents", documents, questions, places)
    rng = random.Random(f"reading/kinds/{split}/{seed}")
    of_kind: dict[str, list[Asked]] = {kind: [] for kind in _KINDS}
    while any(len(asked) < n for asked in of_kind.values()):
        document = world.draw_document(rng, split, 12)
        for kind, asked in of_kind.items():
            if len(asked) < n and (question := world.ask(rng, document, kind)) is not None:
                asked.append(Asked(kind, [document], [question], [0]))
    for asked in of_kind.values():
        yield from asked
    rng = random.Random(f"reading/encyclopedia/{split}/{seed}")
    for start in range(0, n, 5):
        document = world.draw_document(rng, split, 20)
        questions = list(world.encyclopedia_questions(rng, min(5, n - start)))
        yield Asked(_ENCYCLOPEDIA, [document], questions, [0] * len(questions))


def _pieces(n: int, seed: int, split: str) -> list[list[Asked]]:
    """All conditions in pieces to work on: _GROUPS of one condition, or one with many documents."""
    pieces: list[list[Asked]] = []
    for asked in draw_conditions(n, seed, split):
        last = pieces[-1] if pieces else None
        is_whole = last is None or len(last) == _GROUPS or len(asked.documents) > 1
        if is_whole or last[0].condition != asked.condition:
            pieces.append([])
        pieces[-1].append(asked)
    return pieces


def _groups(model: DocToLoRA, piece: list[Asked], made: dict[str, Adapter]) -> Iterator[_Group]:
    """The questions of a piece, with adapters. made: those of documents that several kinds ask about."""
    for asked in piece:
        texts = [one.text for one in asked.documents]
        if asked.condition not in _KINDS:  # these are about the same documents
            made.clear()
        if len(texts) == 1:
            if texts[0] not in made:
                (made[texts[0]],) = model.internalize_each(texts)
            document = None if asked.condition == _ENCYCLOPEDIA else texts[0]
            yield _Group(asked.condition, made[texts[0]], document, asked.questions)
        else:
            each = model.internalize_each({f"document {i}": text for i, text in enumerate(texts)})
            yield _Group(asked.condition, sum(each), None, asked.questions)
            for place, question in zip(asked.places, asked.questions, strict=True):
                yield _Group(f"one of the {asked.condition}", each[place], texts[place], [question])


def _answered(model: DocToLoRA, groups: list[_Group], only: Sequence[str]) -> pd.DataFrame:
    """Rows of `marked` with condition, method (one of `only`) and seconds per question."""
    questions = [one for group in groups for one in group.questions]
    texts, rows = [one.text for one in questions], []
    adapters = [group.adapter for group in groups for _ in group.questions]
    documents = [group.document for group in groups for _ in group.questions]
    conditions = [group.condition for group in groups for _ in group.questions]
    prompts = [
        text if document is None else qa.with_document(document, [text], model.tokenizer, model.window, 64)[0]
        for text, document in zip(texts, documents, strict=True)
    ]
    biases = {id(one): replace(one, blocks=()) for one in adapters}
    always_open = replace(model.reading, thresholds=(), gate_weights=(), null_threshold=_OPEN)
    unlocked = copy.copy(model)
    unlocked.router = model.router and model.router.always_open()
    ways = {  # model, prompts, adapters, how they are read
        "bias alone": (model, texts, [biases[id(one)] for one in adapters], {"read": "sum"}),
        "published sum": (model, texts, adapters, {"read": "sum"}),
        "sparse": (model, texts, adapters, {"read": model.reading}),
        "sparse, always open": (model, texts, adapters, {"read": always_open}),
        "router": (model, texts, adapters, {"blocks": 1}),
        "router, always open": (unlocked, texts, adapters, {"blocks": 1}),
        "in context": (model, prompts, None, {}),
    }
    for method in only:
        one, asked, inside, how = ways[method]
        began = time.process_time()
        predictions = one.answer(asked, inside, **how)
        seconds = (time.process_time() - began) / len(texts)
        rows += [row | {"method": method, "seconds": seconds} for row in marked(questions, predictions)]
    return pd.DataFrame(rows).assign(condition=conditions * len(only))


def measure_reading(
    model: DocToLoRA, n: int, seed: int, split: str = "test", only: Sequence[str] = METHODS
) -> pd.DataFrame:
    """Exact match of greedy answers: condition, method, n, exact_match, low, high, cpu_milliseconds (per question).

    Conditions, `n` questions each: one-hop on documents of 8, 20 and 40 facts; one-hop on 16 and 64 documents of 5
    facts in one adapter, and on the question's own document alone; each other kind on documents of 12 facts;
    encyclopedia beside a document of 20 facts.

    "in context" is the base model with the document in its prompt, or alone for the encyclopedia. The sum of 16 or more
    documents has no such row.

    "router" is the one block that the model's router chooses, or none (`answer(blocks=1)`). Beside it, "router, always
    open" never chooses none: between them lies what is lost where a question that has an answer gets no block.

    only: methods, of METHODS. The null block matters to "sparse" alone.
    """
    made: dict[str, Adapter] = {}

    def work(piece: list[Asked]) -> pd.DataFrame:
        tables = []
        for _, same in groupby(_groups(model, piece, made), lambda group: group.condition):
            some = list(same)
            tables += [_answered(model, some[i : i + _GROUPS], only) for i in range(0, len(some), _GROUPS)]
        return pd.concat(tables)

    samples = pd.concat(shared(_pieces(n, seed, split), work), ignore_index=True)
    together = samples["condition"].isin([f"{count} documents" for count in _TOGETHER])
    samples = samples[~(together & (samples["method"] == "in context"))]
    by = ["condition", "method"]
    seconds = samples.groupby(by, sort=False, as_index=False)["seconds"].mean()
    table = summarise(samples, by).merge(seconds)
    return table.assign(cpu_milliseconds=(1000 * table["seconds"]).round(1)).drop(columns="seconds").assign(split=split)


def run(model: DocToLoRA, n: int, seed: int, training_seed: int, only: Sequence[str] | None) -> list[dict]:
    """The record: `measure_reading` on test documents. Rows of other training seeds and other methods stay."""
    only = tuple(only or METHODS)
    rows = [
        row for row in earlier_rows("reading") if row["training_seed"] != training_seed or row["method"] not in only
    ]
    table = measure_reading(model, n, seed, only=only).assign(training_seed=training_seed)
    return sorted(rows + table.to_dict("records"), key=lambda row: row["training_seed"])
