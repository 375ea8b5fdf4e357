"""The studies of sparse reading and of the router: what they measure, and that small ones find what they should."""

import pytest

import d2l_lib as d2l
from d2l_lib.studies.reading import measure_reading
from d2l_lib.studies.router import _pool, measure_router

METHODS = {"bias alone", "published sum", "sparse", "sparse, always open", "in context"}


@pytest.fixture(scope="module")
def model():
    return d2l.load("tiny/qa")


@pytest.mark.slow
def test_every_condition_is_answered_by_every_method(model):
    table = measure_reading(model, 2, 0, split="validation")
    assert table["condition"].nunique() == 14 and (table["n"] == 2).all()
    for condition, of_one in table.groupby("condition"):
        together = condition in ("16 documents", "64 documents")
        assert set(of_one["method"]) == METHODS - ({"in context"} if together else set())
    shares = table.set_index(["condition", "method"])["exact_match"]
    assert shares["20 facts", "sparse"] > shares["20 facts", "bias alone"] == 0
    assert shares["encyclopedia beside 20 facts", "in context"] == 1
    assert (table["low"] <= table["exact_match"]).all() and (table["cpu_milliseconds"] > 0).all()


def test_the_router_is_measured_for_each_number_of_blocks(model):
    table = measure_router(model, 4, 0, sizes=(20, 40), split="validation")
    assert (table["n"] == 4).all() and set(table["blocks"]) == {20, 40}
    shares = table.set_index(["blocks", "measure"])["share"]
    for size in (20, 40):
        assert shares[size, "among 8"] >= shares[size, "among 4"] >= shares[size, "right block first"] >= 0.5
        assert shares[size, "best block"] >= 0.5 and shares[size, "bias alone"] == 0
    assert set(table["measure"]) >= {"sparse reading of all", "sparse reading of the best 8", "every block tried"}


def test_a_pool_knows_where_its_evidence_stands(model):
    adapter, questions = _pool(model, 30, 0, "validation")
    assert len(adapter) == 30 and len(questions) >= 15
    for _, right in questions:
        assert 1 <= len(right) <= 2 and max(right) < 30
    larger, _ = _pool(model, 33, 0, "validation")
    assert [block.span for block in larger.blocks[:20]] == [block.span for block in adapter.blocks[:20]]
