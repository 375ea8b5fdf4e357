"""Pages show what they are given, all of it escaped, and stay right under clicks."""

import json

import pandas as pd
import pytest
from pages import Tags, controls, page
from toy_models import HOSTILE, SAMPLES, sample

import d2l_lib
from d2l_lib import viewers
from d2l_lib.views.conversation import render_answers, render_inside
from d2l_lib.views.page import render_message, render_view
from d2l_lib.views.samples import (
    ALL_KINDS,
    SAMPLE_COLUMNS,
    evidence_spans,
    find_samples,
    render_document,
    render_sample,
    render_sample_table,
    sample_frame,
    view_samples,
)

# --- pure renderers ---------------------------------------------------------------------------------------------------


def test_evidence_is_marked_exactly():
    page = render_document("ab<cd>ef", 2, 6)
    assert page == "ab<mark>&lt;cd&gt;</mark>ef"


@pytest.mark.parametrize(
    ("start", "end", "spans"),
    [
        (None, None, []),
        (float("nan"), float("nan"), []),
        (-1, -1, []),
        (3, 3, []),
        (5, 99, [(5, 10)]),
        (50, 60, []),
        ([6, 0], [9, 2], [(0, 2), (6, 9)]),
        ([0, 1], [4, 6], [(0, 6)]),
        ([], [], []),
        ([2, None], [4, None], [(2, 4)]),
    ],
)
def test_evidence_spans_are_sorted_joined_and_clipped(start, end, spans):
    assert evidence_spans(start, end, 10) == spans


def test_evidence_with_more_starts_than_ends_is_an_error():
    with pytest.raises(ValueError, match="2 starts but 1 ends"):
        evidence_spans([0, 5], [2], 10)


@pytest.mark.parametrize(
    "page",
    [
        render_sample(SAMPLES[3], 0, 1, 1),
        render_sample_table(pd.DataFrame(SAMPLES[3:])),
        render_message(HOSTILE, is_error=True),
        render_inside([{"name": HOSTILE, "n_characters": 3, "n_blocks": 1, "weight": 1.0}], 1.0, 1.0),
        render_answers([(HOSTILE, [(HOSTILE, HOSTILE)])]),
        render_view("x", "", value=HOSTILE),
    ],
    ids=["sample", "table", "message", "inside", "answers", "attribute"],
)
def test_hostile_text_stays_text(page):
    tags = Tags(page)
    assert not tags.names() & {"script", "img"}
    assert all(not name.startswith("on") for _, attributes in tags.elements for name in attributes)
    shown = tags.text + " ".join(value or "" for _, attributes in tags.elements for value in attributes.values())
    assert HOSTILE in shown


def test_sample_page_says_where_it_is():
    page = Tags(render_sample(SAMPLES[0], 1, 7, 1000))
    assert (
        page.root().items()
        >= {"data-position": "1", "data-matches": "7", "data-samples": "1000", "data-kind": "one_hop"}.items()
    )
    assert "sample 2 of 7 (1,000 in all)" in page.text
    assert SAMPLES[0]["document"] in page.text


def test_static_table_shows_the_evidence_of_a_long_document():
    document = "Filler sentence. " * 200 + "The number is 0042." + " More filler." * 200
    start = document.index("The number")
    table = render_sample_table(
        pd.DataFrame([sample(document=document, evidence_start=start, evidence_end=start + 19)])
    )
    assert "<mark>The number is 0042.</mark>" in table
    assert len(table) < 4000


def test_search_is_literal_and_any_case_and_filter_is_exact():
    frame = sample_frame(SAMPLES)
    assert list(find_samples(frame)) == [0, 1, 2, 3]
    assert list(find_samples(frame, "VELM?")) == []
    assert list(find_samples(frame, "where DOES")) == [1]
    assert list(find_samples(frame, "<script>")) == [3]
    assert list(find_samples(frame, "ada", "unanswerable")) == [2]


def test_samples_without_a_column_are_refused():
    with pytest.raises(ValueError, match=r"lack the columns \['kind'\]"):
        view_samples([{key: value for key, value in SAMPLES[0].items() if key != "kind"}])


def test_missing_cells_of_a_table():
    """A cell without a value is shown empty and found by no search; evidence that is none marks nothing."""
    gaps = pd.DataFrame([SAMPLES[0], SAMPLES[0] | dict.fromkeys(("answer", "kind", "evidence_start"), float("nan"))])
    frame = sample_frame(gaps)
    assert list(find_samples(frame, "no such text")) == []
    assert list(find_samples(frame, kind=SAMPLES[0]["kind"])) == [0]
    static = view_samples(gaps).static_html
    assert "nan" not in static and static.count("<mark>") == view_samples(SAMPLES[:1]).static_html.count("<mark>")
    assert evidence_spans(1, float("inf"), 10) == []
    assert evidence_spans(pd.Series([1, 5]), pd.Series([2, 6]), 10) == [(1, 2), (5, 6)]


@pytest.mark.parametrize("start, end", [([1, 2], [3]), ("one", 3), ({}, 3)])
def test_ragged_evidence_names_its_sample(start, end):
    """At once, not when somebody reaches that page."""
    samples = [SAMPLES[0]] * 10 + [SAMPLES[0] | {"evidence_start": start, "evidence_end": end}]
    with pytest.raises(ValueError, match="sample 10: "):
        view_samples(samples)


# --- widgets without a browser ----------------------------------------------------------------------------------------


def test_viewer_pages_searches_and_filters():
    frame = pd.DataFrame(SAMPLES)
    before = frame.copy(deep=True)
    viewer = view_samples(frame)
    control = controls(viewer)
    assert control["Previous"].disabled and not control["Next"].disabled
    control["Next"].click()
    assert page(viewer, "sample").root()["data-position"] == "1"
    control["Sample"].value = 4
    assert page(viewer, "sample").root()["data-position"] == "3" and control["Next"].disabled
    control["Kind"].value = "one_hop"
    assert page(viewer, "sample").root().items() >= {"data-position": "0", "data-matches": "2"}.items()
    control["Search"].value = "velm"
    control["Search"].value = "no such text"
    assert (
        page(viewer, "sample").root()["data-matches"] == "0"
        and control["Next"].disabled
        and control["Previous"].disabled
    )
    control["Search"].value = ""
    control["Kind"].value = ALL_KINDS
    assert page(viewer, "sample").root()["data-matches"] == "4"
    pd.testing.assert_frame_equal(frame, before)


def test_viewer_of_nothing_and_of_very_many():
    empty = view_samples(pd.DataFrame(columns=SAMPLE_COLUMNS))
    assert "No sample matches." in page(empty, "sample").text
    assert "No sample matches." in page(view_samples([]), "sample").text
    many = view_samples(pd.DataFrame(SAMPLES * 25_000))
    controls(many)["Sample"].value = 100_000
    assert page(many, "sample").root()["data-position"] == "99999"


def test_a_page_without_kernel_keeps_the_static_table():
    viewer = view_samples(SAMPLES)
    bundle = viewer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert Tags(bundle["text/html"]).root()["data-rows"] == "4"
    json.dumps(bundle)


def test_every_name_of_the_viewers_is_found_where_it_is_said_to_be():
    assert d2l_lib.viewers is viewers
    for name in viewers._EXPORTS:
        assert getattr(viewers, name).__name__ == name and name in dir(viewers)
    with pytest.raises(AttributeError, match="has no attribute 'view_nothing'"):
        viewers.view_nothing  # noqa: B018
    assert not pd.get_option("display.html.use_mathjax"), "texts in tables are no formulas"
