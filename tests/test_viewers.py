"""Pages show what they are given, all of it escaped, and stay right under clicks.

The last tests do it in a real browser.
"""

import json
import re
from html.parser import HTMLParser

import browser
import ipywidgets as W
import pandas as pd
import pytest
import tiny_models
from toy_models import HOSTILE, SAMPLES, ToyModel, sample

from d2l_lib.views import viewers


class Tags(HTMLParser):
    """All elements with their attributes, and the visible text of each class that is asked for."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.text, self._style = [], "", False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._style = tag == "style"

    def handle_endtag(self, tag):
        self._style = False

    def handle_data(self, data):
        self.text += "" if self._style else data

    def names(self) -> set:
        return {tag for tag, _ in self.elements}

    def root(self) -> dict:
        return next(attributes for tag, attributes in self.elements if "d2l-view" in attributes.get("class", ""))


# --- pure renderers ---------------------------------------------------------------------------------------------------


def test_evidence_is_marked_exactly():
    page = viewers.render_document("ab<cd>ef", 2, 6)
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
    assert viewers.evidence_spans(start, end, 10) == spans


def test_evidence_with_more_starts_than_ends_is_an_error():
    with pytest.raises(ValueError, match="2 starts but 1 ends"):
        viewers.evidence_spans([0, 5], [2], 10)


@pytest.mark.parametrize(
    "page",
    [
        viewers.render_sample(SAMPLES[3], 0, 1, 1),
        viewers.render_sample_table(pd.DataFrame(SAMPLES[3:])),
        viewers.render_message(HOSTILE, is_error=True),
        viewers.render_inside([{"name": HOSTILE, "n_characters": 3, "n_blocks": 1, "weight": 1.0}], 1.0, 1.0),
        viewers.render_answers([(HOSTILE, [(HOSTILE, HOSTILE)])]),
        viewers.render_view("x", "", value=HOSTILE),
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
    page = Tags(viewers.render_sample(SAMPLES[0], 1, 7, 1000))
    assert (
        page.root().items()
        >= {"data-position": "1", "data-matches": "7", "data-samples": "1000", "data-kind": "one_hop"}.items()
    )
    assert "sample 2 of 7 (1,000 in all)" in page.text
    assert SAMPLES[0]["document"] in page.text


def test_static_table_shows_the_evidence_of_a_long_document():
    document = "Filler sentence. " * 200 + "The number is 0042." + " More filler." * 200
    start = document.index("The number")
    table = viewers.render_sample_table(
        pd.DataFrame([sample(document=document, evidence_start=start, evidence_end=start + 19)])
    )
    assert "<mark>The number is 0042.</mark>" in table
    assert len(table) < 4000


def test_search_is_literal_and_any_case_and_filter_is_exact():
    frame = viewers.sample_frame(SAMPLES)
    assert list(viewers.find_samples(frame)) == [0, 1, 2, 3]
    assert list(viewers.find_samples(frame, "VELM?")) == []
    assert list(viewers.find_samples(frame, "where DOES")) == [1]
    assert list(viewers.find_samples(frame, "<script>")) == [3]
    assert list(viewers.find_samples(frame, "ada", "unanswerable")) == [2]


def test_samples_without_a_column_are_refused():
    with pytest.raises(ValueError, match=r"lack the columns \['kind'\]"):
        viewers.view_samples([{key: value for key, value in SAMPLES[0].items() if key != "kind"}])


def test_missing_cells_of_a_table():
    """A cell without a value is shown empty and found by no search; evidence that is none marks nothing."""
    gaps = pd.DataFrame([SAMPLES[0], SAMPLES[0] | dict.fromkeys(("answer", "kind", "evidence_start"), float("nan"))])
    frame = viewers.sample_frame(gaps)
    assert list(viewers.find_samples(frame, "no such text")) == []
    assert list(viewers.find_samples(frame, kind=SAMPLES[0]["kind"])) == [0]
    static = viewers.view_samples(gaps).static_html
    assert "nan" not in static and static.count("<mark>") == viewers.view_samples(SAMPLES[:1]).static_html.count(
        "<mark>"
    )
    assert viewers.evidence_spans(1, float("inf"), 10) == []
    assert viewers.evidence_spans(pd.Series([1, 5]), pd.Series([2, 6]), 10) == [(1, 2), (5, 6)]


@pytest.mark.parametrize("start, end", [([1, 2], [3]), ("one", 3), ({}, 3)])
def test_ragged_evidence_names_its_sample(start, end):
    """At once, not when somebody reaches that page."""
    samples = [SAMPLES[0]] * 10 + [SAMPLES[0] | {"evidence_start": start, "evidence_end": end}]
    with pytest.raises(ValueError, match="sample 10: "):
        viewers.view_samples(samples)


# --- widgets without a browser ----------------------------------------------------------------------------------------


def controls(widget: W.Widget) -> dict[str, W.Widget]:
    """Every control below `widget` by its description (the last one of a name wins)."""
    found = {}
    for child in getattr(widget, "children", ()):
        found |= controls(child)
    if getattr(widget, "description", ""):
        found[widget.description] = widget
    return found


def page(viewer: viewers.Viewer, kind: str) -> Tags:
    """The page of one kind as it is shown now."""
    pages = [child.value for child in viewer.children if isinstance(child, W.HTML) and f"d2l-{kind}" in child.value]
    return Tags(pages[-1])


def test_viewer_pages_searches_and_filters():
    frame = pd.DataFrame(SAMPLES)
    before = frame.copy(deep=True)
    viewer = viewers.view_samples(frame)
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
    control["Kind"].value = viewers.ALL_KINDS
    assert page(viewer, "sample").root()["data-matches"] == "4"
    pd.testing.assert_frame_equal(frame, before)


def test_viewer_of_nothing_and_of_very_many():
    empty = viewers.view_samples(pd.DataFrame(columns=viewers.SAMPLE_COLUMNS))
    assert "No sample matches." in page(empty, "sample").text
    assert "No sample matches." in page(viewers.view_samples([]), "sample").text
    many = viewers.view_samples(pd.DataFrame(SAMPLES * 25_000))
    controls(many)["Sample"].value = 100_000
    assert page(many, "sample").root()["data-position"] == "99999"


def test_a_page_without_kernel_keeps_the_static_table():
    viewer = viewers.view_samples(SAMPLES)
    bundle = viewer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert Tags(bundle["text/html"]).root()["data-rows"] == "4"
    json.dumps(bundle)


# --- chat -------------------------------------------------------------------------------------------------------------


def panes(viewer: viewers.Viewer) -> dict[str, str]:
    """{where it came from: answer} as shown now."""
    html_of = next(
        child.value for child in viewer.children if isinstance(child, W.HTML) and "d2l-answers" in child.value
    )
    pieces = re.findall(
        r'<div class="d2l-pane" data-source="([^"]*)">.*?<div class="d2l-text">(.*?)</div>', html_of, flags=re.DOTALL
    )
    return dict(pieces)


def test_chat_compares_three_ways_and_never_puts_the_document_into_the_adapters_prompt():
    answers = panes(viewers.chat(ToyModel(), {"lamps": "Ada paints lamps."}, "What?"))
    assert answers == {
        viewers.WITH_ADAPTER: "inside=Ada paints lamps.*1; bias=1; prompt=What?",
        viewers.WITHOUT: "prompt=What?",
        viewers.IN_PROMPT: "prompt=Ada paints lamps.\n\nWhat?",
    }


def test_chat_adds_weighs_and_removes_documents():
    model = ToyModel()
    viewer = viewers.chat(model, {"a": "A."}, "What?")
    control = controls(viewer)
    control["Document"].value = "B."
    control["Add document"].click()
    assert model.internalized == ["a", "document 1"]
    assert page(viewer, "inside").root()["data-documents"] == "2"
    assert control["Document"].value == "", "the box is ready for the next document"
    assert panes(viewer)[viewers.WITH_ADAPTER].startswith("inside=A.*1; B.*1;")
    assert panes(viewer)[viewers.ROUTED] == panes(viewer)[viewers.WITH_ADAPTER] + "; blocks=1"
    first, second = viewer.children[1].children
    controls(first)["Weight"].value = 0.5
    control["Adapter strength"].value = 2.0
    control["Bias strength"].value = 0.0
    assert panes(viewer)[viewers.WITH_ADAPTER] == "inside=A.*1; B.*2; bias=0; prompt=What?"
    assert "weight 0.50" in page(viewer, "inside").text and "bias strength 0.00" in page(viewer, "inside").text
    controls(second)["Remove"].click()
    assert panes(viewer)[viewers.WITH_ADAPTER] == "inside=A.*1; bias=0; prompt=What?"
    assert panes(viewer)[viewers.IN_PROMPT] == "prompt=A.\n\nWhat?"
    assert viewers.ROUTED not in panes(viewer), "one block has nothing to choose from"
    controls(first)["Remove"].click()
    assert page(viewer, "inside").root()["data-documents"] == "0"
    assert panes(viewer)[viewers.WITH_ADAPTER] == "prompt=What?"
    assert model.internalized == ["a", "document 1"], "weights and removal need no new pass of the model"


def test_chat_keeps_what_was_said_until_it_is_cleared():
    viewer = viewers.chat(ToyModel(), {"a": "A."}, "What?")
    control = controls(viewer)
    assert page(viewer, "answers").root()["data-turns"] == "1"
    control["Bias strength"].value = 0.5
    assert page(viewer, "answers").root()["data-turns"] == "1", "the same question again replaces its answers"
    control["Question"].value = "Who?"
    said = page(viewer, "answers")
    assert said.root()["data-turns"] == "2"
    assert said.text.index("Who?") < said.text.index("What?"), "the latest comes first"
    assert panes(viewer)[viewers.WITHOUT] == "prompt=What?"  # of two turns the older one is read last
    control["Clear"].click()
    assert page(viewer, "answers").root()["data-turns"] == "0"
    control["Ask"].click()
    assert page(viewer, "answers").root()["data-turns"] == "1"


def test_chat_edits_a_document_in_its_place_and_sends_the_system_message():
    model = ToyModel()
    viewer = viewers.chat(model, {"a": "A.", "b": "B."}, "What?")
    control = controls(viewer)
    first, second = viewer.children[1].children
    controls(first)["Weight"].value = 0.5
    controls(first)["Edit"].click()
    assert (control["Name"].value, control["Document"].value) == ("a", "A.") and control["Name"].disabled
    control["Document"].value = "  "
    controls(viewer)["Replace document"].click()
    assert "ValueError: document is empty" in page(viewer, "message").text
    assert panes(viewer)[viewers.WITH_ADAPTER].startswith("inside=A.*0.5; B.*1;")
    control["Document"].value = "New A."
    controls(viewer)["Replace document"].click()
    assert panes(viewer)[viewers.WITH_ADAPTER].startswith("inside=New A.*0.5; B.*1;")
    assert panes(viewer)[viewers.IN_PROMPT] == "prompt=New A.\n\nB.\n\nWhat?"
    assert (control["Name"].value, control["Document"].value, control["Name"].disabled) == ("", "", False)
    controls(second)["Edit"].click()
    controls(second)["Remove"].click()
    assert controls(viewer)["Add document"].description and control["Document"].value == ""
    control["System"].value = "Be brief."
    assert panes(viewer)[viewers.WITHOUT] == "prompt=[Be brief.] What?"


def test_chat_says_what_went_wrong_and_goes_on():
    viewer = viewers.chat(ToyModel(), {"a": "A."})
    control = controls(viewer)
    control["Document"].value = "   "
    control["Add document"].click()
    assert "ValueError: document is empty" in page(viewer, "message").text
    assert control["Document"].value == "   ", "nothing that was typed is lost"
    control["Document"].value, control["Name"].value = "B.", "a"
    control["Add document"].click()
    assert "remove it first" in page(viewer, "message").text
    control["Name"].value = "long"
    control["Document"].value = "x" * 500
    control["Add document"].click()
    control["Question"].value = "What?"
    assert panes(viewer)[viewers.IN_PROMPT].startswith("(no answer: the prompt has")
    assert panes(viewer)[viewers.WITH_ADAPTER].startswith("inside=A.*1; xxx")
    assert "ready" in page(viewer, "message").text


def test_chat_takes_documents_as_internalize_does(tmp_path):
    (tmp_path / "lamps.txt").write_text("Ada paints lamps.")
    for documents in (tmp_path / "lamps.txt", {"lamps.txt": tmp_path / "lamps.txt"}):
        assert viewers.chat(ToyModel(), documents).conversation.texts == {"lamps.txt": "Ada paints lamps."}
    for documents, names in (("A.", ["document"]), (["A.", "B."], ["document 1", "document 2"]), ({"x": "A."}, ["x"])):
        model = ToyModel()
        viewers.chat(model, documents)
        assert model.internalized == names
    with pytest.raises(TypeError, match="a text, a Path, a list of these"):
        viewers.chat(ToyModel(), 3)


def test_chat_names_documents_without_reusing_a_name():
    conversation = viewers.Conversation(ToyModel())
    assert [conversation.add(text) for text in ("A", "B", "C")] == ["document 1", "document 2", "document 3"]
    conversation.remove("document 2")
    assert conversation.add("D") == "document 2"
    assert [row["name"] for row in conversation.inside()] == ["document 1", "document 3", "document 2"]


def test_conversation_holds_what_the_model_would():
    model = tiny_models.build_model()
    before = model.internalize("Something else.")
    conversation = viewers.Conversation(model)
    conversation.add("Ada lives in Velm.", "a")
    conversation.add("The lake is cold.", "b")
    assert model.current is before, "a page does not change what the model holds"
    both = model.internalize({"a": "Ada lives in Velm.", "b": "The lake is cold."})
    assert conversation.adapter() == both.scaled_bias(1.0)
    conversation.weights["b"], conversation.adapter_strength, conversation.bias_strength = 0.5, 2.0, 0.0
    assert conversation.adapter() == both.scaled(2.0).scaled(0.5, document="b").scaled_bias(0.0)
    conversation.remove("a")
    conversation.remove("b")
    assert conversation.adapter() is None
    assert conversation.answers("Who?")[0][1] == model.answer("Who?", None)


# --- in a real browser ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab_page(tmp_path_factory):
    """A page of JupyterLab in Chromium on which both viewers have been run."""
    reason = browser.why_not()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("lab")
    cells = [
        "from toy_models import SAMPLES, ToyModel\nfrom d2l_lib import viewers",
        "viewers.view_samples(SAMPLES)",
        "viewers.chat(ToyModel(), {'lamps': 'Ada paints lamps.'}, 'What?')",
    ]
    slow = [
        "import ipywidgets as W\nfrom toy_models import SlowModel",
        "model = SlowModel(runs=True)\nmodel.go.set()\ngo = W.ToggleButton(description='Go on')\n"
        "go.observe(lambda change: model.go.set() if change['new'] else model.go.clear(), 'value')\ngo",
        "viewers.chat(model, {'lamps': 'Ada paints lamps.'}, 'What?')",
        "model.go.clear()",
    ]
    browser.write_notebook(folder / "slow.ipynb", [cells[0], *slow])
    notebook = browser.write_notebook(folder / "viewers.ipynb", cells)
    with browser.open_notebook(notebook, folder / "home") as page:
        yield page


@pytest.mark.browser
def test_sample_viewer_in_a_browser(lab_page, tmp_path):
    view = lab_page.locator(".d2l-sample")
    view.wait_for()
    expect = browser.expect
    expect(view).to_have_attribute("data-position", "0")
    expect(view.locator("mark")).to_have_text("She paints lamps.")
    cell = lab_page.locator(".jp-CodeCell", has=view)

    cell.get_by_role("button", name="Next").click()
    expect(view).to_have_attribute("data-position", "1")
    expect(view.locator(".d2l-question")).to_have_text("Where does Ada live?")
    expect(view.locator("mark")).to_have_text("Ada lives in Velm.")
    # by keyboard alone: the button, then the slider
    cell.get_by_role("button", name="Previous").focus()
    lab_page.keyboard.press("Space")
    expect(view).to_have_attribute("data-position", "0")
    cell.locator(".widget-slider .noUi-handle").focus()
    for _ in range(3):
        lab_page.keyboard.press("ArrowRight")
    expect(view).to_have_attribute("data-position", "3")

    expect(view.locator(".d2l-question")).to_have_text(HOSTILE)
    expect(view.locator(".d2l-answer")).to_have_text(HOSTILE)
    assert view.locator("img, script").count() == 0
    assert lab_page.evaluate("() => window.owned") is None

    cell.locator(".widget-dropdown select").select_option("unanswerable")
    expect(view).to_have_attribute("data-matches", "1")
    expect(view.locator(".d2l-answer")).to_have_text("I do not know.")
    assert view.locator("mark").count() == 0
    cell.locator(".widget-dropdown select").select_option(viewers.ALL_KINDS)
    search = cell.locator(".widget-text input").first
    search.fill("velm")
    search.press("Enter")
    expect(view).to_have_attribute("data-matches", "3")
    search.fill("nowhere to be found")
    search.press("Enter")
    expect(view).to_have_attribute("data-matches", "0")
    expect(view).to_contain_text("No sample matches.")
    expect(cell.get_by_role("button", name="Next")).to_be_disabled()
    search.fill("")
    search.press("Enter")
    expect(view).to_have_attribute("data-matches", "4")
    assert browser.errors_shown(lab_page) == []


@pytest.mark.browser
def test_chat_in_a_browser(lab_page):
    expect = browser.expect
    answers, inside = lab_page.locator(".d2l-answers"), lab_page.locator(".d2l-inside")
    answers.wait_for()
    cell = lab_page.locator(".jp-CodeCell", has=answers)
    latest = answers.locator(".d2l-turn").first
    adapter_pane = latest.locator(f'[data-source="{viewers.WITH_ADAPTER}"] .d2l-text')
    prompt_pane = latest.locator(f'[data-source="{viewers.IN_PROMPT}"] .d2l-text')
    expect(adapter_pane).to_have_text("inside=Ada paints lamps.*1; bias=1; prompt=What?")

    cell.locator("textarea").fill(HOSTILE)
    cell.get_by_label("Name").fill(HOSTILE)
    cell.get_by_role("button", name="Add document").click()
    expect(inside).to_have_attribute("data-documents", "2")
    expect(inside).to_contain_text(HOSTILE)
    expect(adapter_pane).to_contain_text(HOSTILE + "*1")
    assert lab_page.evaluate("() => window.owned") is None

    question = cell.get_by_label("Question")
    question.fill("Who <b>paints</b>?")
    cell.get_by_role("button", name="Ask").click()
    expect(latest.locator(".d2l-question")).to_have_text("Who <b>paints</b>?")
    expect(answers).to_have_attribute("data-turns", "2")
    expect(prompt_pane).to_contain_text("Ada paints lamps.")
    strength = cell.locator(".widget-slider", has_text="Adapter strength").locator(".noUi-handle")
    strength.focus()
    lab_page.keyboard.press("ArrowLeft")
    expect(adapter_pane).to_contain_text("lamps.*0.95;")
    expect(inside).to_contain_text("adapter strength 0.95")

    cell.get_by_role("button", name="Remove").nth(1).click()
    expect(inside).to_have_attribute("data-documents", "1")
    expect(adapter_pane).to_have_text("inside=Ada paints lamps.*0.95; bias=1; prompt=Who <b>paints</b>?")
    cell.get_by_role("button", name="Edit").click()
    expect(cell.locator("textarea")).to_have_value("Ada paints lamps.")
    cell.locator("textarea").fill("Ada paints boats.")
    cell.get_by_role("button", name="Replace document").click()
    expect(adapter_pane).to_contain_text("inside=Ada paints boats.*0.95;")
    system = cell.get_by_label("System")
    system.fill("Be brief.")
    system.press("Enter")
    expect(adapter_pane).to_contain_text("prompt=[Be brief.] Who <b>paints</b>?")
    cell.get_by_role("button", name="Clear").click()
    expect(answers).to_have_attribute("data-turns", "0")
    cell.locator("textarea").fill("   ")
    cell.get_by_role("button", name="Add document").click()
    expect(cell.locator(".d2l-message")).to_contain_text("ValueError: document is empty")
    assert browser.errors_shown(lab_page) == []


@pytest.mark.browser
def test_chat_at_a_persons_pace_in_a_browser(lab_page):
    """Texts, clicks and sliders while it works; Stop, the kernel's interrupt; a narrow page; the dark theme."""
    expect = browser.expect
    browser.run_notebook(lab_page, lab_page.url.split("/lab/")[0], "slow.ipynb")
    answers, inside = lab_page.locator(".d2l-answers"), lab_page.locator(".d2l-inside")
    cell = lab_page.locator(".jp-CodeCell", has=answers)
    text, status = cell.locator("textarea"), cell.locator(".d2l-message")
    add, stop = (cell.get_by_role("button", name=name) for name in ("Add document", "Stop"))
    go = lab_page.get_by_role("button", name="Go on")

    text.fill("The first text. " * 500)
    cell.get_by_label("Name").fill("first")
    add.click()
    expect(text).to_have_value("")
    expect(status).to_contain_text("internalizing first ...")
    expect(stop).to_be_visible()
    text.fill("The second text. " * 50)
    add.click()
    expect(text).to_have_value("")
    expect(status).to_contain_text("then: internalizing document 1")
    text.fill("The third text")
    text.press("End")
    text.press_sequentially(", typed meanwhile.")
    cell.locator(".widget-slider", has_text="Adapter strength").locator(".noUi-handle").focus()
    lab_page.keyboard.press("ArrowLeft")
    expect(inside).to_contain_text("adapter strength 0.95")
    expect(inside).to_have_attribute("data-documents", "1")
    expect(status).to_contain_text("internalizing first ...")
    go.click()
    expect(inside).to_have_attribute("data-documents", "3")
    expect(text).to_have_value("The third text, typed meanwhile.")
    expect(answers.locator(".d2l-state")).to_have_text("inside: lamps, first, document 1; adapter 0.95, bias 1.00")
    expect(status).to_have_text("ready")
    expect(stop).to_be_hidden()

    go.click()
    long = "A long document. " * 7_648  # 130 kB
    text.fill(long)
    add.click()
    expect(cell.locator(".widget-label", has_text="260 of 261 chunks")).to_be_visible()
    expect(text).to_have_value("")
    stop.click()
    expect(status).to_contain_text("stopped: internalizing document 2")
    expect(text).to_have_value(long)
    add.click()
    expect(stop).to_be_visible()
    lab_page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.interrupt()")
    expect(status).to_contain_text("stopped: internalizing document 2")
    expect(text).to_have_value(long)
    expect(inside).to_have_attribute("data-documents", "3")

    add.click()
    expect(stop).to_be_visible()
    lab_page.set_viewport_size({"width": 760, "height": 1000})
    assert browser.sticking_out(lab_page, ".jp-OutputArea-output") == []
    stop.click()
    expect(text).to_have_value(long)
    lab_page.set_viewport_size({"width": 1300, "height": 1000})
    go.click()
    text.fill("   ")
    add.click()
    expect(status.locator(".d2l-error")).to_contain_text("ValueError: document is empty")
    themes = {name: [] for name in ("JupyterLab Light", "JupyterLab Dark")}
    for theme in themes:
        command = f"() => window.jupyterapp.commands.execute('apputils:change-theme', {{theme: '{theme}'}})"
        lab_page.evaluate(command)
        lab_page.wait_for_function(f"() => document.body.dataset.jpThemeName === '{theme}'")
        for shown in (".d2l-inside", ".d2l-state", ".d2l-error", ".d2l-pane .d2l-text"):
            themes[theme].append(round(browser.contrast(lab_page, shown), 1))
    assert min(map(min, themes.values())) >= 4, themes
    assert browser.errors_shown(lab_page) == []
