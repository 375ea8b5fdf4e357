"""The probes ask what they say they ask: checked with a stand-in that answers from the text it was given."""

import random
from dataclasses import dataclass, replace

import pytest

from d2l_lib.studies import probes
from d2l_lib.tasks import world
from d2l_lib.tasks.questions import disjoint_documents


@dataclass(frozen=True)
class Inside:
    """Stands for an adapter: the texts that are inside, by name, and whether they count."""

    texts: tuple[tuple[str, str], ...]
    weight: float = 1.0

    def __add__(self, other):
        return Inside(self.texts + other.texts)

    def __radd__(self, other):
        return self if other == 0 else NotImplemented

    def without(self, document):
        return Inside(tuple(pair for pair in self.texts if pair[0] != document))

    def scaled(self, weight):
        return replace(self, weight=weight)


class Reader:
    """A model that answers one-hop questions from whatever text it has, later texts first, and else says nothing."""

    def __init__(self):
        self.statements = {
            (relation.name, template) for relation in world.RELATIONS for template in relation.statements
        }

    class tokenizer:
        def __new__(cls, text):
            return {"input_ids": text.split()}

    def internalize_each(self, documents, chunk_tokens=None):
        pairs = documents.items() if isinstance(documents, dict) else [("document", text) for text in documents]
        return [Inside((pair,)) for pair in pairs]

    def answer(self, questions, adapters, blocks=None):
        adapters = adapters if isinstance(adapters, list) else [adapters] * len(questions)
        return [self._read(*pair) for pair in zip(questions, adapters, strict=True)]

    def _read(self, question, inside):
        prompt, _, asked = question.rpartition("\n\n")
        text = prompt
        if inside is not None and inside.weight:
            text = "\n".join(text for _, text in inside.texts)
        for relation in world.RELATIONS:
            for template in (*relation.questions, *relation.paraphrases):
                before, after = template.lower().split("{s}")
                lowered = asked.lower()
                if lowered.startswith(before) and lowered.endswith(after):
                    subject = asked[len(before) : len(asked) - len(after)]
                    for statement in relation.statements:
                        start, middle, end = _parts(statement)
                        for sentence in text.replace(".\n", ". ").split(". "):
                            said = (sentence.rstrip(".") + ".").lower()
                            head = (start + subject + middle).lower()
                            if said.startswith(head) and said.endswith(end.lower()):
                                return (sentence.rstrip(".") + ".")[len(head) : len(said) - len(end)]
        return "I do not know."


def _parts(statement):
    start, rest = statement.split("{s}")
    middle, end = rest.split("{v}")
    return start, middle, end


def shares(rows, *by):
    return rows.groupby(list(by), sort=False)["correct"].mean().to_dict()


@pytest.fixture(scope="module")
def reader():
    return Reader()


def test_composition_asks_about_every_document_inside(reader):
    rows = probes.composition(reader, (1, 4), 24, seed=0)
    assert shares(rows, "documents") == {1: 1.0, 4: 1.0}
    assert (rows.groupby("condition").size() == 24).all()
    assert set(rows["condition"]) == {"1 documents", "1 documents, routed", "4 documents", "4 documents, routed"}
    assert rows.equals(probes.composition(reader, (1, 4), 24, seed=0))


def test_removal_takes_one_document_out_and_leaves_the_others(reader):
    found = shares(probes.removal(reader, 12, seed=0, count=4), "condition", "about")
    assert found["all inside", "the document"] == found["all inside", "the others"] == 1
    assert found["removed", "the document"] == found["never added", "the document"] == 0
    assert found["removed", "the others"] == found["never added", "the others"] == found["updated", "the others"] == 1
    assert found["updated", "the document"] == 1  # the new value counts, and the old one would be wrong


def test_conflict_counts_both_values(reader):
    found = shares(probes.conflict(reader, 12, seed=0), "condition", "about")
    assert found["internalized", "the document's value"] == found["in context", "the document's value"] == 1
    assert found["internalized", "the encyclopedia's value"] == 0
    assert found["base model", "the document's value"] == 0


def test_interference_and_what_is_inside(reader):
    rows = probes.interference(reader, 10, seed=0)
    assert list(rows["condition"].unique()) == [
        "base model", "unrelated document", "unrelated document, routed", "assistant instruction", "bias alone"
    ]  # fmt: skip
    facts = {(f.subject, f.value) for f in world.encyclopedia()}
    assert all(any(f"{v}" == answer for _, v in facts) for answer in rows["answer"])
    found = shares(probes.question_internalized(reader, 12, seed=0), "condition")
    assert found == {"the document": 1.0, "the question": 0.0, "another document": 0.0}


def test_two_hops_are_put_where_they_should_be(reader):
    rows = probes.two_hop(reader, 8, seed=0)
    found = shares(rows, "condition")
    assert found["first hop alone"] == found["second hop alone"] == 1  # both facts are inside
    assert found["two facts in one chunk"] == 0  # this reader cannot go two hops
    assert rows["answer"].str.len().min() > 0


def test_strangers_share_no_names(monkeypatch):
    documents = list(disjoint_documents(random.Random(0), 16, 5))
    names = [name for document in documents for _, name in document.entities]
    assert len(documents) == 16 and len(set(names)) == len(names)
    monkeypatch.setattr(world, "draw_document", lambda *_: documents[0])
    with pytest.raises(ValueError, match="the test split has too few names for 1 more documents of 5 facts"):
        list(disjoint_documents(random.Random(0), 2, 5))
