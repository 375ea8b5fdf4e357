"""Hostile texts in a real browser, through everything that shows a text: nothing runs, nothing is asked of the network,
nothing is swallowed, nothing becomes a formula, and no page grows wider than its window.
"""

import contextlib
import subprocess

import browser
import pandas as pd
import pytest
from test_adapter import build_adapter
from test_attribution_viewer import ToyModel as TracedModel
from test_attribution_viewer import toy_adapter, toy_attribute
from test_shard_viewer import TOKENIZER, row, write
from toy_models import ToyModel, sample

from d2l_lib import viewers
from d2l_lib.analysis.report import STATUSES
from d2l_lib.studies.notebooks import NBCONVERT
from d2l_lib.views.conversation import render_answers, render_inside
from d2l_lib.views.page import render_message
from d2l_lib.views.report import Report
from d2l_lib.views.samples import render_sample, render_sample_table

OWN = "window.owned = 1; alert(1)"
PAYLOADS = {
    "script": f"<script>{OWN}; fetch('http://owned.invalid/a')</script>",
    "handler": f'<img src="http://owned.invalid/b.png" onerror="{OWN}"><svg onload="{OWN}"></svg>',
    "closing": f"</div></td></bdi></style></title></textarea>--><script>{OWN}</script><style>*{{display:none}}</style>",
    "attribute": f"\" autofocus onfocus=\"{OWN}\" x='\" ' onmouseover='{OWN}' &quot;&lt;&amp;&#36;",
    "link": f'<a href="javascript:{OWN}">here</a><iframe src="http://owned.invalid/c"></iframe><meta http-equiv=x>',
    "dollars": "It costs $5 and $6, or $x^2$.",
    "formulas": r"$$\frac{a}{b}$$ \(x\) \[y\] \begin{equation}z\end{equation} \$1 $\href{javascript:alert(1)}{x}$",
    "markdown": "**bold** `code` ![p](http://owned.invalid/d.png) [l](javascript:alert(1)) # head | a | b |\n***\n> q",
    "directions": "\u202egnp.exe \u2066ab\u2069 \u05d0\u05d1 \u200f left open",
    "invisible": "a\u200bb\u200d\u2060c\ufeff d\u00ad e\u034f",
    "control": "a\x01b\x07c\x1b[31md\x7fe\x85f\x0bg",
    "null": "a\0b\r\nc\rd\te",
    "long": "W" * 100_000,
}
EVERY = list(PAYLOADS.items())


def as_seen(text: str) -> str:
    """What a browser holds of a text: it has no null character."""
    return text.replace("\0", "\u2400")


# --- what shows texts -------------------------------------------------------------------------------------------------


def report_of(text: str, title: str) -> Report:
    """A report on one document of one sentence, all of whose texts are this one."""
    row = {"document": title, "sentence": 1, "start": 0, "end": len(text), "text": text, "chunk": 0, "asked": 1}
    row |= {"kept": 0.2, "margin": -1.0, "over_zero": 0.5, "over_wrong": 0.5, "status": STATUSES[1], "believed": text}
    question = {"document": title, "question": text, "told": text, "said": text, "margin": -1.0}
    unrelated = {"question": text, "alone": text, "said": text, "changed": True}
    tables = (pd.DataFrame([one]) for one in (row, question, {"layer": 0, "module": text}, unrelated))
    return Report(*tables, {text[:50]: 1}, (text,), {title: text}, 0.5)


def title_of(text: str) -> str:
    """A name for a document, made of its text: it holds no control characters."""
    return "".join(character if character.isprintable() else "-" for character in text[:200])


def cards(text: str, folder) -> dict[str, tuple[str, int]]:
    """{what shows the text: (its HTML, how often the whole text is in it at least)}."""
    title = title_of(text)
    samples = [sample(document=text, question=text, answer=text, kind=text, evidence_start=0, evidence_end=9)]
    write(folder / "shard.parquet", [row(text, (text[:300], text[:300], text[:300], text, 0.4))])
    adapter = build_adapter((title,), n_chunks=1)
    trace = viewers.view_attribution(
        TracedModel(), toy_adapter(text, title, ()), {title: text}, text, text, attribute=toy_attribute
    )
    inside = [{"name": text, "n_characters": 3, "n_blocks": 1, "weight": 1.0}]
    whole = len(text) < 1000
    return {
        "sample": (render_sample(samples[0], 0, 1, 1), 4),
        "samples": (render_sample_table(pd.DataFrame(samples)), 3),
        "sample viewer": (viewers.view_samples(samples).static_html, 3),
        "inside": (render_inside(inside, 1.0, 1.0), 1),
        "answers": (render_answers([(text, [(text, text)], text)]), 4),
        "message": (render_message(text, is_error=True), 1),
        "chat": (viewers.chat(ToyModel(window=10**9), {title: text}, text).static_html, 3),
        "shards": (viewers.view_shards(folder, TOKENIZER).static_html, 3 if whole else 1),
        "trace": (trace.static_html, 3),
        "report": (report_of(text, title)._repr_html_(), 8),
        "adapter": (adapter._repr_html_(), int(title == text and len(text) < 40)),
        "table": (
            f'<div style="overflow: auto">{pd.DataFrame(samples)._repr_html_()}</div>',
            int(len(text) < 49 and "\r" not in text),
        ),
    }


# --- the browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab():
    """A tab of Chromium, which has no network beyond this machine's files."""
    reason = browser.why_not()
    if reason:
        pytest.skip(reason)
    with browser.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser.chromium(), args=["--no-sandbox"])
        yield started.new_page()
        started.close()


@contextlib.contextmanager
def opened(tab, path):
    """The page of a file; afterwards nothing of it ran, opened a dialog or asked for anything but itself."""
    requests, dialogs = [], []
    heard = {
        "request": lambda request: requests.append(request.url),
        "dialog": lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()),
    }
    tab.set_viewport_size({"width": 1000, "height": 800})
    for event, listener in heard.items():
        tab.on(event, listener)
    try:
        tab.goto(path.as_uri())
        yield tab
        assert tab.evaluate("() => window.owned") is None and dialogs == []
        assert path.as_uri() in requests
        assert [url for url in requests if url != path.as_uri() and not url.startswith("data:")] == []
    finally:
        for event, listener in heard.items():
            tab.remove_listener(event, listener)


def is_as_wide_as_its_window(page) -> bool:
    for width in (1000, 760):
        page.set_viewport_size({"width": width, "height": 800})
        if page.evaluate("() => document.documentElement.scrollWidth > innerWidth"):
            return False
    return True


def number_of(page, selector: str) -> int:
    """How many elements of the page a CSS selector finds."""
    return page.evaluate("selector => document.querySelectorAll(selector).length", selector)


TEXT_WITHOUT_STYLE = """card => {
    const copy = card.cloneNode(true);
    copy.querySelectorAll('style').forEach(style => style.remove());
    return copy.textContent;
}"""
IS_FORMULA_FREE = """root => {
    const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT), ignored = 'style, script, .tex2jax_ignore';
    while (walk.nextNode()) {
        const text = walk.currentNode, parent = text.parentElement;
        if (/[$\\\\]/.test(text.data) && text.data.trim().length > 1 && !parent.closest(ignored))
            return text.data;
    }
    return '';
}"""
# what stands behind a name with marks of direction is still read from left to right
READS_FROM_LEFT_TO_RIGHT = """root => [...root.querySelectorAll('bdi')].every(name => {
    const next = name.nextSibling?.nodeType === 3 ? name.nextSibling : name.parentElement.nextSibling;
    if (next?.nodeType !== 3 || !/^\\W*[a-z0-9]{2}/i.test(next.data)) return true;
    const place = next.data.search(/[a-z0-9]{2}/i), range = document.createRange();
    const left = at => (range.setStart(next, at), range.setEnd(next, at + 1), range.getBoundingClientRect());
    const [one, two] = [left(place), left(place + 1)];
    return one.width === 0 || one.top !== two.top || one.left < two.left;
})"""


# one call for all cards of a page
EVERY_CARD = f"""() => Object.fromEntries([...document.querySelectorAll('section')].map(card => [card.id, [
    ({TEXT_WITHOUT_STYLE})(card), ({IS_FORMULA_FREE})(card), ({READS_FROM_LEFT_TO_RIGHT})(card),
    card.getBoundingClientRect().height,
]]))"""
TEXT_OF = "selector => document.querySelector(selector).textContent"


@pytest.mark.browser
@pytest.mark.parametrize(("name", "text"), EVERY, ids=PAYLOADS)
def test_a_page_with_everything_that_shows_a_text(tab, tmp_path, name, text):
    shown = cards(text, tmp_path / "shards")
    body = "".join(f'<section id="{what}">{html}</section>' for what, (html, _) in shown.items())
    path = tmp_path / "cards.html"
    path.write_text(f'<!doctype html><html><head><meta charset="utf-8"></head><body>{body}</body></html>', "utf-8")
    with opened(tab, path) as page:
        assert number_of(page, "img, script, iframe, svg, a, meta[http-equiv]") == 0
        seen = page.evaluate(EVERY_CARD)
        assert list(seen) == list(shown)
        for what, (_, times) in shown.items():
            held, formula, is_in_order, height = seen[what]
            assert held.count(as_seen(text)) >= times, (what, held[:500])
            assert formula == "", what
            assert is_in_order, what
            assert height > 10, what
        assert is_as_wide_as_its_window(page)


@pytest.mark.browser
@pytest.mark.parametrize(("name", "text"), EVERY, ids=PAYLOADS)
def test_saved_pages(tab, tmp_path, name, text):
    title = title_of(text)
    made = report_of(text, title).save_html(tmp_path / "report.html")
    with opened(tab, made) as page:
        assert number_of(page, "img") == 1 and number_of(page, "script, iframe, svg, a") == 0
        assert page.evaluate(TEXT_OF, "body").count(as_seen(text)) >= 8
        assert is_as_wide_as_its_window(page)
    model, adapter = TracedModel(), toy_adapter(text, title, ())
    saved = viewers.save_html(
        tmp_path / "trace.html", model, adapter, {title: text}, text, text, attribute=toy_attribute
    )
    with opened(tab, saved) as page:
        assert number_of(page, "img, script, iframe, svg, a") == 0
        assert page.evaluate(TEXT_OF, "main").count(as_seen(text)) >= 3
        assert page.evaluate(f"() => ({IS_FORMULA_FREE})(document.querySelector('main'))") == ""
        assert is_as_wide_as_its_window(page)


CELLS = [
    "import pandas as pd\nfrom test_hostile_texts import PAYLOADS, hostile_samples, printable, report_of\n"
    "from toy_models import ToyModel\nfrom d2l_lib import viewers",
    "viewers.view_samples(hostile_samples())",
    "viewers.chat(ToyModel(window=10**9), printable(), PAYLOADS['formulas'])",
    "pd.DataFrame(hostile_samples())",
    "report_of(PAYLOADS['formulas'], PAYLOADS['handler'])",
]


def printable() -> dict[str, str]:
    """{name of a document: its text}."""
    return {text[:200]: text for text in PAYLOADS.values() if text.isprintable()}


def hostile_samples() -> list[dict]:
    return [
        sample(document=text, question=text, answer=text, kind=name, evidence_start=0, evidence_end=9)
        for name, text in PAYLOADS.items()
    ]


@pytest.mark.browser
def test_a_notebook_as_a_page(tab, tmp_path, monkeypatch):
    paths = ":".join(map(str, [browser.ROOT, browser.ROOT / "tests", browser.ROOT / "tests" / "views"]))
    monkeypatch.setenv("PYTHONPATH", paths)
    notebook = browser.write_notebook(tmp_path / "hostile.ipynb", CELLS)
    command = [*NBCONVERT, "--to", "html", "--execute", str(notebook)]
    result = subprocess.run(
        [*command, "--ExecutePreprocessor.store_widget_state=False"], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    page = tab.context.browser.new_page(viewport={"width": 1000, "height": 800})
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.route("http*://**", lambda route: route.abort())
    page.goto((tmp_path / "hostile.html").as_uri())
    assert page.evaluate("() => window.owned") is None and [url for url in requests if "owned" in url] == []
    outputs = page.locator(".jp-OutputArea-output")
    assert outputs.count() == len(CELLS) - 1
    for output in outputs.all():
        assert output.evaluate(IS_FORMULA_FREE) == ""
        assert output.locator("img, script, iframe, svg, a").count() == 0
    held = page.locator("main").evaluate("main => main.textContent")
    assert all(held.count(text) >= 2 for name, text in PAYLOADS.items() if name in ("script", "formulas", "handler"))
    page.close()
