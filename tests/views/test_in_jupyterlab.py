"""The viewers in JupyterLab, under clicks and keys, at a person's pace and with hostile texts.

One server, one Chromium and one notebook for all of them: a page takes seven seconds of a core, its kernel ten. Static
pages have files of their own, as a process drives one Chromium at a time.
"""

import browser
import pytest
import test_hostile_texts
import test_shard_viewer
from test_attribution_viewer import shade, shoot
from test_hostile_texts import PAYLOADS, as_seen
from toy_models import HOSTILE

from d2l_lib.views.conversation import IN_PROMPT, SPARSELY, WITH_ADAPTER
from d2l_lib.views.samples import ALL_KINDS

# The notebook: {name of a cell: its source}.
CELLS = {
    "imports": "import ipywidgets as W\nfrom test_attribution_viewer import HOSTILE, LAMPS, bundled, toy_view\n"
    "from test_shard_viewer import TOKENIZER\nfrom toy_models import SAMPLES, SlowModel, ToyModel\n"
    "from d2l_lib import viewers",
    "samples": "viewers.view_samples(SAMPLES)",
    "chat": "viewers.chat(ToyModel(), {'lamps': 'Ada paints lamps.'}, 'What?')",
    # several models, one of which does not load, and example documents
    "menus": "def broken():\n    raise FileNotFoundError('nothing at <b>broken</b>')\n"
    "viewers.chat(models={'first': ToyModel(), 'second': lambda: ToyModel(), 'broken': broken}, "
    "examples={'lamps': ('Ada paints lamps.', ['What?', HOSTILE])})",
    # a chat whose model waits until it may go on
    "slow model": "model = SlowModel(runs=True)\nmodel.go.set()\ngo = W.ToggleButton(description='Go on')\n"
    "go.observe(lambda change: model.go.set() if change['new'] else model.go.clear(), 'value')\ngo",
    "slow chat": "viewers.chat(model, {'lamps': 'Ada paints lamps.'}, 'What?')",
    "wait": "model.go.clear()",
    "shards": "viewers.view_shards('shards', TOKENIZER)",
    "bundled trace": "viewers.view_attribution(*bundled())",
    "toy trace": "toy_view(LAMPS + HOSTILE, HOSTILE, HOSTILE)",
}
_HOSTILE = {f"hostile {number}": source for number, source in enumerate(test_hostile_texts.CELLS)}
CELLS |= _HOSTILE


def place(name: str) -> str:
    """The CSS selector of a cell of the notebook."""
    return f'.jp-CodeCell[data-windowed-list-index="{list(CELLS).index(name)}"]'


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of the notebook, all of whose cells have been run."""
    reason = browser.why_not()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("lab")
    hostile = test_shard_viewer.row(HOSTILE, (HOSTILE, HOSTILE, HOSTILE, HOSTILE, 0.4))
    test_shard_viewer.write(folder / "shards" / "a.parquet", [*test_shard_viewer.ROWS, hostile])
    with browser.open_lab(folder) as lab, lab.opened("viewers", list(CELLS.values())) as page:
        yield page


@pytest.mark.browser
def test_sample_viewer_in_a_browser(page):
    cell = page.locator(place("samples"))
    view = cell.locator(".d2l-sample")
    view.wait_for()
    expect = browser.expect
    expect(view).to_have_attribute("data-position", "0")
    expect(view.locator("mark")).to_have_text("She paints lamps.")

    cell.get_by_role("button", name="Next").click()
    expect(view).to_have_attribute("data-position", "1")
    expect(view.locator(".d2l-question")).to_have_text("Where does Ada live?")
    expect(view.locator("mark")).to_have_text("Ada lives in Velm.")
    # by keyboard alone: the button, then the slider
    cell.get_by_role("button", name="Previous").focus()
    page.keyboard.press("Space")
    expect(view).to_have_attribute("data-position", "0")
    cell.locator(".widget-slider .noUi-handle").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(view).to_have_attribute("data-position", "3")

    expect(view.locator(".d2l-question")).to_have_text(HOSTILE)
    expect(view.locator(".d2l-answer")).to_have_text(HOSTILE)
    assert view.locator("img, script").count() == 0
    assert page.evaluate("() => window.owned") is None

    cell.locator(".widget-dropdown select").select_option("unanswerable")
    expect(view).to_have_attribute("data-matches", "1")
    expect(view.locator(".d2l-answer")).to_have_text("I do not know.")
    assert view.locator("mark").count() == 0
    cell.locator(".widget-dropdown select").select_option(ALL_KINDS)
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
    assert browser.errors_shown(page) == []


@pytest.mark.browser
def test_chat_in_a_browser(page):
    expect = browser.expect
    cell = page.locator(place("chat"))
    answers, inside = cell.locator(".d2l-answers"), cell.locator(".d2l-inside")
    answers.wait_for()
    latest = answers.locator(".d2l-turn").first
    adapter_pane = latest.locator(f'[data-source="{WITH_ADAPTER}"] .d2l-text')
    prompt_pane = latest.locator(f'[data-source="{IN_PROMPT}"] .d2l-text')
    expect(adapter_pane).to_have_text("inside=Ada paints lamps.*1; bias=1; prompt=What?")

    cell.locator("textarea").fill(HOSTILE)
    cell.get_by_label("Name").fill(HOSTILE)
    cell.get_by_role("button", name="Add document").click()
    expect(inside).to_have_attribute("data-documents", "2")
    expect(inside).to_contain_text(HOSTILE)
    expect(adapter_pane).to_contain_text(HOSTILE + "*1")
    assert page.evaluate("() => window.owned") is None

    question = cell.get_by_label("Question")
    question.fill("Who <b>paints</b>?")
    cell.get_by_role("button", name="Ask").click()
    expect(latest.locator(".d2l-question")).to_have_text("Who <b>paints</b>?")
    expect(answers).to_have_attribute("data-turns", "2")
    expect(prompt_pane).to_contain_text("Ada paints lamps.")
    strength = cell.locator(".widget-slider", has_text="Adapter strength").locator(".noUi-handle")
    strength.focus()
    page.keyboard.press("ArrowLeft")
    expect(adapter_pane).to_contain_text("lamps.*0.95;")
    expect(inside).to_contain_text("adapter strength 0.95")
    cell.get_by_label("Reading").select_option("sparse reading")
    expect(latest.locator(f'[data-source="{SPARSELY}"] .d2l-text')).to_contain_text("read=sparse")
    expect(latest.locator(".d2l-state")).to_contain_text("; sparse reading")
    cell.get_by_label("Reading").select_option("published sum")

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
    assert browser.errors_shown(page) == []


@pytest.mark.browser
def test_menus_of_the_chat_in_a_browser(page):
    """By keyboard alone: an example comes in, a suggested question is asked, another model answers, a third fails."""
    expect = browser.expect
    cell = page.locator(place("menus"))
    answers, inside, status = (cell.locator(f".d2l-{name}") for name in ("answers", "inside", "message"))
    model = cell.get_by_label("Model")
    cell.get_by_role("button", name="Add example").focus()
    page.keyboard.press("Enter")
    expect(inside).to_have_attribute("data-documents", "1")
    cell.get_by_role("button", name="What?").focus()
    page.keyboard.press("Space")
    expect(answers).to_have_attribute("data-turns", "1")
    expect(answers.locator(".d2l-model")).to_have_text("answered by first")
    model.focus()
    for key in ("Alt+ArrowDown", "ArrowDown", "Enter"):  # JupyterLab takes a plain arrow for itself
        page.keyboard.press(key)
    expect(answers).to_have_attribute("data-turns", "2")
    expect(answers.locator(".d2l-model").first).to_have_text("answered by second")
    expect(inside).to_contain_text("Model: second")
    model.select_option("broken")
    expect(status).to_contain_text("FileNotFoundError: nothing at <b>broken</b>")
    expect(status).to_contain_text("The model is still second.")
    expect(model.locator("option:checked")).to_have_text("second")
    cell.get_by_role("button", name=HOSTILE).click()
    expect(answers.locator(".d2l-question").first).to_have_text(HOSTILE)
    assert page.evaluate("() => window.owned") is None
    browser.resize(page, 760)
    assert browser.sticking_out(page, f"{place('menus')} .jp-OutputArea-output") == []
    browser.resize(page, 1300)
    assert browser.errors_shown(page) == []


@pytest.mark.browser
def test_chat_at_a_persons_pace_in_a_browser(page):
    """Texts, clicks and sliders while it works; Stop, the kernel's interrupt; a narrow page; the dark theme."""
    expect = browser.expect
    cell = page.locator(place("slow chat"))
    answers, inside = cell.locator(".d2l-answers"), cell.locator(".d2l-inside")
    text, status = cell.locator("textarea"), cell.locator(".d2l-message")
    add, stop = (cell.get_by_role("button", name=name) for name in ("Add document", "Stop"))
    go = page.get_by_role("button", name="Go on")

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
    page.keyboard.press("ArrowLeft")
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
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.interrupt()")
    expect(status).to_contain_text("stopped: internalizing document 2")
    expect(text).to_have_value(long)
    expect(inside).to_have_attribute("data-documents", "3")

    add.click()
    expect(stop).to_be_visible()
    browser.resize(page, 760)
    assert browser.sticking_out(page, f"{place('slow chat')} .jp-OutputArea-output") == []
    stop.click()
    expect(text).to_have_value(long)
    browser.resize(page, 1300)
    go.click()
    text.fill("   ")
    add.click()
    expect(status.locator(".d2l-error")).to_contain_text("ValueError: document is empty")
    themes = {name: [] for name in ("JupyterLab Light", "JupyterLab Dark")}
    for theme in themes:
        command = f"() => window.jupyterapp.commands.execute('apputils:change-theme', {{theme: '{theme}'}})"
        page.evaluate(command)
        page.wait_for_function(f"() => document.body.dataset.jpThemeName === '{theme}'")
        for shown in (".d2l-inside", ".d2l-state", ".d2l-error", ".d2l-pane .d2l-text"):
            themes[theme].append(round(browser.contrast(page, f"{place('slow chat')} {shown}"), 1))
    assert min(map(min, themes.values())) >= 4, themes
    assert browser.errors_shown(page) == []


@pytest.mark.browser
def test_shard_viewer_in_a_browser(page):
    expect, count = browser.expect, test_shard_viewer.N
    cell = page.locator(place("shards"))
    view = cell.locator(".d2l-shard")
    view.wait_for()
    expect(view.locator("mark")).to_have_text("She paints lamps.")
    cell.get_by_role("button", name="Next").click()
    expect(view).to_have_attribute("data-position", "1")

    tokens, open_panel = view.locator(".d2l-token"), view.locator(".d2l-alternatives:visible")
    expect(open_panel).to_have_count(0)
    tokens.nth(2).hover()
    expect(open_panel).to_contain_text("token 3: 30.0 %, rank 2 of 16")
    page.mouse.move(0, 0)
    expect(open_panel).to_have_count(0)
    tokens.nth(0).click()
    page.mouse.move(0, 0)
    expect(open_panel).to_contain_text("token 1: 97.0 %")
    page.keyboard.press("Tab")
    expect(open_panel).to_contain_text("token 2: 97.0 %")

    cell.locator(".noUi-handle").nth(0).focus()
    page.keyboard.press("PageUp")  # once: of several presses the last may reach the kernel after the button's click
    expect(view).not_to_have_attribute("data-matches", str(count + 1))
    cell.get_by_role("button", name="Clear filters").click()
    expect(view).to_have_attribute("data-matches", str(count + 1))
    cell.locator(".widget-dropdown select").nth(1).select_option(HOSTILE)
    expect(view).to_have_attribute("data-matches", "1")
    expect(view.locator(".d2l-question")).to_have_text(HOSTILE)
    expect(view.locator(".d2l-document")).to_have_text(HOSTILE)
    assert view.locator("img, script").count() == 0
    assert page.evaluate("() => window.owned") is None
    assert browser.errors_shown(page) == []


@pytest.mark.browser
def test_attribution_viewer_in_a_browser(page):
    expect = browser.expect
    cell, toy = page.locator(place("bundled trace")), page.locator(place("toy trace"))
    answer = cell.locator(".d2l-trace-answer")
    for one in (answer, toy.locator(".d2l-trace-answer")):
        expect(one).to_have_count(1)
    expect(answer).to_have_attribute("data-removed", "0")
    said = answer.get_attribute("data-now")
    color = "element => getComputedStyle(element).backgroundColor"

    # another method, another token
    cell.locator(".widget-dropdown select").nth(1).select_option("gradient")
    expect(cell.locator(".d2l-trace")).to_have_attribute("data-method", "gradient")
    true = cell.locator(".d2l-true span").first
    by_gradient = true.evaluate(color)
    cell.locator(".widget-dropdown select").nth(1).select_option("leave one out")
    expect(cell.locator(".d2l-trace")).to_have_attribute("data-method", "leave_one_out")
    assert true.evaluate(color) == shade(1.0, 1.0), "the true evidence contributes most"
    assert by_gradient.startswith("rgb(")
    assert "dashed" in true.evaluate("element => getComputedStyle(element).outline")
    cell.locator(".widget-toggle-buttons button").nth(1).click()
    expect(cell.locator(".d2l-trace")).to_have_attribute("data-token", "0")

    # taken out by a click, put back by keyboard alone
    true.click()
    expect(answer).to_have_attribute("data-changed", "true")
    expect(answer.locator(".d2l-now")).not_to_have_text(said)
    assert "line-through" in true.evaluate("element => getComputedStyle(element).textDecoration")
    shoot(cell, "attribution_viewer_removed.png")
    page.keyboard.press("Space")
    expect(answer.locator(".d2l-now")).to_have_text(said)
    true.click()
    expect(answer).to_have_attribute("data-removed", "1")
    cell.get_by_role("button", name="Restore all").click()
    expect(answer.locator(".d2l-now")).to_have_text(said)

    cell.locator(".widget-dropdown select").first.select_option("rank")
    expect(cell.locator(".d2l-heat")).to_have_count(1)
    shoot(cell, "attribution_viewer_rank.png")
    cell.locator(".widget-dropdown select").first.select_option("sentence")
    expect(cell.locator(".d2l-trace")).to_have_attribute("data-level", "sentence")
    browser.resize(page, 800)
    is_wide = "element => element.scrollWidth > element.clientWidth"
    assert cell.locator(".d2l-scroll").last.evaluate(is_wide), "the table is scrolled ..."
    assert not cell.locator(".jp-OutputArea-output").last.evaluate(is_wide), "... and not the page"
    browser.resize(page, 1300)

    expect(toy.locator(".d2l-sentences")).to_contain_text(HOSTILE)
    expect(toy.locator(".d2l-sentences")).to_contain_text("costs $5 and $6.")
    expect(toy.locator(".d2l-question")).to_have_text(HOSTILE)
    assert toy.locator(".jp-OutputArea img, .jp-OutputArea script, mjx-container").count() == 0
    assert page.evaluate("() => window.owned") is None
    shoot(toy, "attribution_viewer_hostile.png")
    assert browser.errors_shown(page) == []


@pytest.mark.browser
def test_hostile_texts_in_a_browser(page):
    expect = browser.expect
    cell, chat = page.locator(place("hostile 1")), page.locator(place("hostile 2"))
    view, inside = cell.locator(".d2l-sample"), chat.locator(".d2l-inside")
    for position, text in enumerate(PAYLOADS.values()):
        expect(view).to_have_attribute("data-position", str(position))
        for part in (".d2l-question", ".d2l-answer", ".d2l-document"):
            assert view.locator(part).evaluate("part => part.textContent") == as_seen(text)
        assert view.evaluate("view => view.scrollWidth <= view.clientWidth + 1")
        if position + 1 < len(PAYLOADS):
            cell.get_by_role("button", name="Next").click()
    held = inside.evaluate("inside => inside.textContent")
    assert all(text[:200] in held for text in PAYLOADS.values() if text.isprintable())
    question = chat.get_by_label("Question")
    for text in (PAYLOADS["dollars"], PAYLOADS["closing"]):
        question.fill(text)
        question.press("Enter")
        latest = chat.locator(".d2l-turn").first
        expect(latest.locator(".d2l-question")).to_have_text(text)
    page.wait_for_timeout(1000)  # of typesetting, if there is anything to set
    assert browser.sticking_out(page, f"{place('hostile 2')} .jp-OutputArea-output") == []
    for name in _HOSTILE:
        outputs = page.locator(f"{place(name)} .jp-OutputArea-output")
        assert outputs.count() == (name != "hostile 0")
        assert outputs.locator("mjx-container, .MathJax, img, script, iframe, a").count() == 0
    loaded = page.evaluate("() => performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [url for url in loaded if "owned" in url] == [] and page.evaluate("() => window.owned") is None
    assert browser.errors_shown(page) == []
