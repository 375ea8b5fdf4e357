"""The sample viewer and the chat in JupyterLab, under clicks and keys, at a person's pace."""

import browser
import pytest
from toy_models import HOSTILE

from d2l_lib.views.conversation import IN_PROMPT, WITH_ADAPTER
from d2l_lib.views.samples import ALL_KINDS


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
    assert browser.errors_shown(lab_page) == []


@pytest.mark.browser
def test_chat_in_a_browser(lab_page):
    expect = browser.expect
    answers, inside = lab_page.locator(".d2l-answers"), lab_page.locator(".d2l-inside")
    answers.wait_for()
    cell = lab_page.locator(".jp-CodeCell", has=answers)
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
