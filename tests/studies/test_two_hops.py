"""The study of two-hop traces: which questions it takes, and what it says of each method."""

from dataclasses import replace

import pandas as pd
import pytest

import d2l_lib as d2l
from d2l_lib.analysis.attribution import METHODS
from d2l_lib.analysis.trust import without_sentence
from d2l_lib.studies import two_hops


@pytest.fixture(scope="module")
def model():
    return d2l.load("tiny/qa")


def test_questions_that_need_their_first_hop_are_traced(model):
    cases, drawn = two_hops.needing(model, 2, 0, "validation")
    assert drawn % 16 == 0 and 2 <= len(cases) < drawn
    for document, question in cases:
        assert len(document.facts) == 12 and len(question.evidence) == 2
        text = without_sentence(document.text, *question.evidence[0])
        assert model.answer(f"{text}\n\n{question.text}", None) != question.answer
    table = two_hops.samples(model, 2, 0, "validation")
    assert table.attrs["needing"] == (len(cases), drawn)
    assert set(table["method"]) == {*METHODS["chunk"], "leave_one_out, read sparsely"} - {"surrogate"}
    assert (table["rank"] == table[["rank_bridge", "rank_answer"]].max(axis=1)).all()
    first = table[table["method"] == "question_parts"].set_index("question")["rank_answer"]
    proven = table[table["method"] == "leave_one_out"].set_index("question")["rank_answer"]
    assert ((first == 1) == (proven == 1)).all()


def test_sparse_losses_are_those_of_adapters_without_the_block(model):
    document, question = two_hops.needing(model, 1, 0, "validation")[0][0]
    (adapter,) = model.internalize_each([document.text])
    losses = two_hops.sparse_losses(model, adapter, question.text, question.answer)
    assert len(losses) == len(adapter.blocks)
    fewer = replace(adapter, blocks=adapter.blocks[1:])
    again = two_hops.sparse_losses(model, fewer, question.text, question.answer)
    assert len(again) == len(losses) - 1 and max(losses) > 1


def test_the_record_counts_both_sentences_in_the_first_three():
    rows = [
        {
            "question": q,
            "method": "a",
            "rank": rank,
            "rank_bridge": rank,
            "rank_answer": 1,
            "units": 10,
            "seconds": 0.01,
        }
        | {"in_context": False, "published_sum": True, "sparse": q == 0}
        for q, rank in enumerate((3, 4))
    ]
    table = pd.DataFrame(rows)
    table.attrs["needing"] = (3, 16)
    record = pd.DataFrame(two_hops.summarise(table, "test"))
    methods = record[record["what"] == "method"].set_index("questions")
    assert methods.loc["all", ["n", "hit_rate", "bridge", "answer_first"]].tolist() == [2, 0.5, 0.5, 1.0]
    assert methods.loc["answered rightly, sparse", ["n", "hit_rate"]].tolist() == [1, 1.0]
    assert methods["chance"].tolist() == pytest.approx([6 / 90, 6 / 90])
    answers = record[record["what"] == "answers"].set_index("name")
    assert answers.loc["needs its first hop, of all drawn", "share"] == 3 / 16
    assert answers.loc["answered rightly, sparse", "share"] == 0.5
