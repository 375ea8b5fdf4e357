"""Hostile texts in JupyterLab: the sample viewer, the chat, a table and a report, with a running kernel.

Apart from the static pages, whose Chromium stays open for all of their tests.
"""

import browser
import pytest
from test_hostile_texts import CELLS, PAYLOADS, as_seen


@pytest.mark.browser
def test_in_jupyterlab(tmp_path):
    reason = browser.why_not()
    if reason:
        pytest.skip(reason)
    notebook = browser.write_notebook(tmp_path / "hostile.ipynb", CELLS)
    with browser.open_notebook(notebook, tmp_path / "home") as lab:
        expect = browser.expect
        view, inside = lab.locator(".d2l-sample"), lab.locator(".d2l-inside")
        cell = lab.locator(".jp-CodeCell", has=view)
        for place, text in enumerate(PAYLOADS.values()):
            expect(view).to_have_attribute("data-position", str(place))
            for part in (".d2l-question", ".d2l-answer", ".d2l-document"):
                assert view.locator(part).evaluate("part => part.textContent") == as_seen(text)
            assert view.evaluate("view => view.scrollWidth <= view.clientWidth + 1")
            if place + 1 < len(PAYLOADS):
                cell.get_by_role("button", name="Next").click()
        held = inside.evaluate("inside => inside.textContent")
        assert all(text[:200] in held for text in PAYLOADS.values() if text.isprintable())
        chat = lab.locator(".jp-CodeCell", has=inside)
        question = chat.get_by_label("Question")
        for text in (PAYLOADS["dollars"], PAYLOADS["closing"]):
            question.fill(text)
            question.press("Enter")
            latest = chat.locator(".d2l-turn").first
            expect(latest.locator(".d2l-question")).to_have_text(text)
        lab.wait_for_timeout(1000)  # of typesetting, if there is anything to set
        assert browser.sticking_out(lab, ".jp-OutputArea-output:has(.d2l-answers)") == []
        outputs = lab.locator(".jp-OutputArea-output")
        assert outputs.locator("mjx-container, .MathJax, img, script, iframe, a").count() == 0
        loaded = lab.evaluate("() => performance.getEntriesByType('resource').map(entry => entry.name)")
        assert [url for url in loaded if "owned" in url] == [] and lab.evaluate("() => window.owned") is None
        assert browser.errors_shown(lab) == []
