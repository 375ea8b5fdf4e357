"""The studies of sparse reading and of the router: what they measure, and that small ones find what they should."""

import pandas as pd
import pytest

import d2l_lib as d2l
from d2l_lib.studies import STUDIES, reading
from d2l_lib.studies.no_block import measure_no_block
from d2l_lib.studies.reading import METHODS, measure_reading
from d2l_lib.studies.router import block_pool, measure_router


@pytest.fixture(scope="module")
def model():
    return d2l.load("tiny/qa")


@pytest.mark.slow
def test_every_condition_is_answered_by_every_method(model):
    table = measure_reading(model, 2, 0, split="validation")
    assert table["condition"].nunique() == 14 and (table["n"] == 2).all()
    for condition, of_one in table.groupby("condition"):
        together = condition in ("16 documents", "64 documents")
        assert set(of_one["method"]) == set(METHODS) - ({"in context"} if together else set())
    shares = table.set_index(["condition", "method"])["exact_match"]
    assert shares["20 facts", "sparse"] > shares["20 facts", "bias alone"] == 0
    assert shares["encyclopedia beside 20 facts", "in context"] == 1
    assert (table["low"] <= table["exact_match"]).all() and (table["cpu_milliseconds"] > 0).all()


def test_rows_of_other_training_seeds_and_methods_stay(model, monkeypatch):
    measured = []

    def measure(model, n, seed, only):
        measured.append(only)
        return pd.DataFrame({"method": list(only), "exact_match": 1.0})

    earlier = [{"method": method, "training_seed": seed} for seed in (0, 2) for method in METHODS]
    monkeypatch.setattr(reading, "measure_reading", measure)
    monkeypatch.setattr(reading, "earlier_rows", lambda name: earlier)
    rows = reading.run(model, 2, 0, training_seed=1, only=["sparse"])
    each = len(METHODS)
    assert measured == [("sparse",)] and [row["training_seed"] for row in rows] == [0] * each + [1] + [2] * each
    rows = reading.run(model, 2, 0, training_seed=2, only=["sparse"])
    assert len(rows) == 2 * each and [row["method"] for row in rows if row.get("exact_match")] == ["sparse"]
    assert all("exact_match" in row for row in reading.run(model, 2, 0, training_seed=0, only=None)[:each])
    assert STUDIES["reading"].options["--only"]["choices"] == METHODS


def test_a_stated_error_rate_is_measured_for_each_number_of_blocks(model):
    table = measure_no_block(model, 20, 0, sizes=(10, 40), split="validation")
    assert (table["n"] == 20).all() and (table["low"] <= table["share_read"]).all()
    share = table.set_index(["blocks", "rule", "about"])
    for size in (10, 40):
        assert share.loc[(size, "as trained", "answerable"), "share_read"] >= 0.9
        assert share.loc[(size, "error of 5%", "unrelated"), "share_read"] <= 0.3
        assert share.loc[(size, "error of 5%", "unrelated"), "exact_match"] >= 0.9
    thresholds = share["null_threshold"].unstack("rule")["error of 5%"].groupby("blocks").first()
    assert thresholds[40] > thresholds[10], "the best of more blocks is better"


def test_the_router_is_measured_for_each_number_of_blocks(model):
    table = measure_router(model, 4, 0, sizes=(20, 40), split="validation")
    assert (table["n"] == 4).all() and set(table["blocks"]) == {20, 40}
    shares = table.set_index(["blocks", "measure"])["share"]
    for size in (20, 40):
        assert shares[size, "among 8"] >= shares[size, "among 4"] >= shares[size, "right block first"] >= 0.5
        assert min(shares[size, "best block"], shares[size, "router"]) >= 0.5 and shares[size, "bias alone"] == 0
    assert set(table["measure"]) >= {"sparse reading of all", "sparse reading of the best 8", "every block tried"}


def test_a_pool_knows_where_its_evidence_stands(model):
    adapter, questions = block_pool(model, 30, 0, "validation")
    assert len(adapter) == 30 and len(questions) >= 15
    for _, right in questions:
        assert 1 <= len(right) <= 2 and max(right) < 30
    larger, _ = block_pool(model, 33, 0, "validation")
    assert [block.span for block in larger.blocks[:20]] == [block.span for block in adapter.blocks[:20]]
