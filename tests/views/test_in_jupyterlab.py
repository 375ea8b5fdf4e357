"""The viewers in JupyterLab, under clicks and keys, at a person's pace and with hostile texts.

One server and one Chromium for all of them; each notebook has a kernel of its own. Static pages have files of their
own, as a process drives one Chromium at a time.
"""

import browser
import pytest
import test_shard_viewer
from test_attribution_viewer import shade, shoot
from test_hostile_texts import CELLS, PAYLOADS, as_seen
from toy_models import HOSTILE

from d2l_lib.views.conversation import IN_PROMPT, SPARSELY, WITH_ADAPTER
from d2l_lib.views.samples import ALL_KINDS


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    reason = browser.why_not()
    if reason:
        pytest.skip(reason)
    with browser.open_lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture(scope="module")
def viewers_page(lab):
    """A page on which the sample viewer and the chat have been run."""
    cells = [
        "from toy_models import SAMPLES, ToyModel\nfrom d2l_lib import viewers",
        "viewers.view_samples(SAMPLES)",
        "viewers.chat(ToyModel(), {'lamps': 'Ada paints lamps.'}, 'What?')",
    ]
    with lab.opened("viewers", cells) as page:
        yield page


@pytest.mark.browser
def test_sample_viewer_in_a_browser(viewers_page, tmp_path):
    view = viewers_page.locator(".d2l-sample")
    view.wait_for()
    expect = browser.expect
    expect(view).to_have_attribute("data-position", "0")
    expect(view.locator("mark")).to_have_text("She paints lamps.")
    cell = viewers_page.locator(".jp-CodeCell", has=view)

    cell.get_by_role("button", name="Next").click()
    expect(view).to_have_attribute("data-position", "1")
    expect(view.locator(".d2l-question")).to_have_text("Where does Ada live?")
    expect(view.locator("mark")).to_have_text("Ada lives in Velm.")
    # by keyboard alone: the button, then the slider
    cell.get_by_role("button", name="Previous").focus()
    viewers_page.keyboard.press("Space")
    expect(view).to_have_attribute("data-position", "0")
    cell.locator(".widget-slider .noUi-handle").focus()
    for _ in range(3):
        viewers_page.keyboard.press("ArrowRight")
    expect(view).to_have_attribute("data-position", "3")

    expect(view.locator(".d2l-question")).to_have_text(HOSTILE)
    expect(view.locator(".d2l-answer")).to_have_text(HOSTILE)
    assert view.locator("img, script").count() == 0
    assert viewers_page.evaluate("() => window.owned") is None

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
    assert browser.errors_shown(viewers_page) == []


@pytest.mark.browser
def test_chat_in_a_browser(viewers_page):
    expect = browser.expect
    answers, inside = viewers_page.locator(".d2l-answers"), viewers_page.locator(".d2l-inside")
    answers.wait_for()
    cell = viewers_page.locator(".jp-CodeCell", has=answers)
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
    assert viewers_page.evaluate("() => window.owned") is None

    question = cell.get_by_label("Question")
    question.fill("Who <b>paints</b>?")
    cell.get_by_role("button", name="Ask").click()
    expect(latest.locator(".d2l-question")).to_have_text("Who <b>paints</b>?")
    expect(answers).to_have_attribute("data-turns", "2")
    expect(prompt_pane).to_contain_text("Ada paints lamps.")
    strength = cell.locator(".widget-slider", has_text="Adapter strength").locator(".noUi-handle")
    strength.focus()
    viewers_page.keyboard.press("ArrowLeft")
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
    assert browser.errors_shown(viewers_page) == []


@pytest.fixture
def slow_page(lab):
    """A page with a chat whose model waits until it may go on."""
    cells = [
        "import ipywidgets as W\nfrom toy_models import SlowModel\nfrom d2l_lib import viewers",
        "model = SlowModel(runs=True)\nmodel.go.set()\ngo = W.ToggleButton(description='Go on')\n"
        "go.observe(lambda change: model.go.set() if change['new'] else model.go.clear(), 'value')\ngo",
        "viewers.chat(model, {'lamps': 'Ada paints lamps.'}, 'What?')",
        "model.go.clear()",
    ]
    with lab.opened("slow", cells) as page:
        yield page


@pytest.mark.browser
def test_chat_at_a_persons_pace_in_a_browser(slow_page):
    """Texts, clicks and sliders while it works; Stop, the kernel's interrupt; a narrow page; the dark theme."""
    expect, page = browser.expect, slow_page
    answers, inside = page.locator(".d2l-answers"), page.locator(".d2l-inside")
    cell = page.locator(".jp-CodeCell", has=answers)
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
    page.set_viewport_size({"width": 760, "height": 1000})
    assert browser.sticking_out(page, ".jp-OutputArea-output") == []
    stop.click()
    expect(text).to_have_value(long)
    page.set_viewport_size({"width": 1300, "height": 1000})
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
            themes[theme].append(round(browser.contrast(page, shown), 1))
    assert min(map(min, themes.values())) >= 4, themes
    assert browser.errors_shown(page) == []


@pytest.mark.browser
def test_shard_viewer_in_a_browser(lab, tmp_path):
    row, count = test_shard_viewer.row, test_shard_viewer.N
    hostile = row(HOSTILE, (HOSTILE, HOSTILE, HOSTILE, HOSTILE, 0.4))
    test_shard_viewer.write(tmp_path / "shards" / "a.parquet", [*test_shard_viewer.ROWS, hostile])
    cells = [
        "from test_shard_viewer import TOKENIZER\nfrom d2l_lib.views.shards import view_shards",
        f"view_shards({str(tmp_path / 'shards')!r}, TOKENIZER)",
    ]
    with lab.opened("shards", cells) as page:
        expect, view = browser.expect, page.locator(".d2l-shard")
        view.wait_for()
        cell = page.locator(".jp-CodeCell", has=view)
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
        for _ in range(4):
            page.keyboard.press("PageUp")
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
def test_attribution_viewer_in_a_browser(lab):
    cells = [
        "from test_attribution_viewer import HOSTILE, LAMPS, bundled, toy_view\n"
        "from d2l_lib.views.trace import view_attribution",
        "view_attribution(*bundled())",
        "toy_view(LAMPS + HOSTILE, HOSTILE, HOSTILE)",
    ]
    with lab.opened("trace", cells) as page:
        expect = browser.expect
        answers = page.locator(".d2l-trace-answer")
        expect(answers).to_have_count(2)
        answer = answers.first
        cell = page.locator(".jp-CodeCell", has=answer).first
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

        toy = page.locator(".jp-CodeCell", has=page.locator(".d2l-trace-answer")).last
        expect(toy.locator(".d2l-sentences")).to_contain_text(HOSTILE)
        expect(toy.locator(".d2l-sentences")).to_contain_text("costs $5 and $6.")
        expect(toy.locator(".d2l-question")).to_have_text(HOSTILE)
        assert toy.locator(".jp-OutputArea img, .jp-OutputArea script, mjx-container").count() == 0
        assert page.evaluate("() => window.owned") is None
        shoot(toy, "attribution_viewer_hostile.png")
        assert browser.errors_shown(page) == []


@pytest.mark.browser
def test_hostile_texts_in_a_browser(lab):
    with lab.opened("hostile", CELLS) as page:
        expect = browser.expect
        view, inside = page.locator(".d2l-sample"), page.locator(".d2l-inside")
        cell = page.locator(".jp-CodeCell", has=view)
        for place, text in enumerate(PAYLOADS.values()):
            expect(view).to_have_attribute("data-position", str(place))
            for part in (".d2l-question", ".d2l-answer", ".d2l-document"):
                assert view.locator(part).evaluate("part => part.textContent") == as_seen(text)
            assert view.evaluate("view => view.scrollWidth <= view.clientWidth + 1")
            if place + 1 < len(PAYLOADS):
                cell.get_by_role("button", name="Next").click()
        held = inside.evaluate("inside => inside.textContent")
        assert all(text[:200] in held for text in PAYLOADS.values() if text.isprintable())
        chat = page.locator(".jp-CodeCell", has=inside)
        question = chat.get_by_label("Question")
        for text in (PAYLOADS["dollars"], PAYLOADS["closing"]):
            question.fill(text)
            question.press("Enter")
            latest = chat.locator(".d2l-turn").first
            expect(latest.locator(".d2l-question")).to_have_text(text)
        page.wait_for_timeout(1000)  # of typesetting, if there is anything to set
        assert browser.sticking_out(page, ".jp-OutputArea-output:has(.d2l-answers)") == []
        outputs = page.locator(".jp-OutputArea-output")
        assert outputs.locator("mjx-container, .MathJax, img, script, iframe, a").count() == 0
        loaded = page.evaluate("() => performance.getEntriesByType('resource').map(entry => entry.name)")
        assert [url for url in loaded if "owned" in url] == [] and page.evaluate("() => window.owned") is None
        assert browser.errors_shown(page) == []
