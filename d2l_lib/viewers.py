"""Pages to look at data and talk to a model, in a notebook.

The renderers are pure functions from data to HTML; every text that comes from data passes through `html.escape`. The
viewers are ipywidgets around them: a callback computes a page and sets one `HTML.value` (an `Output` widget or
`interact` can hang a headless run for ever, so neither is used). Pages carry the class `d2l-view` and data-*
attributes that say what is shown.

A viewer also has a plain form without JavaScript or kernel, a static table, which is what a stored notebook keeps.
"""

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ipywidgets as W
import numpy as np
import pandas as pd

from d2l_lib.documents import name_documents

SAMPLE_COLUMNS = ("document", "question", "answer", "evidence_start", "evidence_end", "kind")
ALL_KINDS = "all kinds"
STATIC_ROWS = 5
CSS = """
.d2l-view { font-family: var(--jp-ui-font-family, sans-serif); font-size: 13px; line-height: 1.5; }
.d2l-view table { border-collapse: collapse; width: 100%; }
.d2l-view table th, .d2l-view table td { text-align: left; vertical-align: top; padding: 4px 10px 4px 0; }
.d2l-view th, .d2l-view td { border-bottom: 1px solid #8884; }
.d2l-view mark { background: #ffe08a; color: #000; padding: 1px 2px; border-radius: 2px; }
.d2l-view .d2l-text { white-space: pre-wrap; overflow-wrap: anywhere; }
.d2l-view .d2l-document { max-height: 22em; overflow-y: auto; padding: 8px; }
.d2l-view .d2l-document { border: 1px solid #8886; border-radius: 4px; }
.d2l-view .d2l-note { color: var(--jp-ui-font-color2, #666); }
.d2l-view .d2l-error { color: #b3261e; }
.d2l-view .d2l-columns { display: grid; grid-template-columns: repeat(3, 1fr); gap: 10px; }
.d2l-view .d2l-pane { border: 1px solid #8886; border-radius: 4px; padding: 6px 10px; }
.d2l-view h4 { margin: 6px 0 2px; }
"""


# --- pure renderers ---------------------------------------------------------------------------------------------------


def render_view(view: str, body: str, /, **data: Any) -> str:
    """A page of the class `d2l-view d2l-<view>` around `body`, which is HTML.

    Each of `data` becomes an escaped data-* attribute.
    """
    attributes = "".join(f' data-{name.replace("_", "-")}="{html.escape(str(value))}"' for name, value in data.items())
    return f'<style>{CSS}</style><div class="d2l-view d2l-{view}"{attributes}>{body}</div>'


def evidence_spans(start: Any, end: Any, length: int) -> list[tuple[int, int]]:
    """The (start, end) spans of evidence in a text of `length` characters: sorted, overlaps joined, clipped to it.

    start and end: two ints, or two equally long lists of ints (several evidence sentences); None, NaN, infinity, a
    negative start, or an empty span means that nothing is marked.
    """
    lists = (list, tuple, np.ndarray, pd.Series)
    starts, ends = (list(value) if isinstance(value, lists) else [value] for value in (start, end))
    if len(starts) != len(ends):
        raise ValueError(f"evidence has {len(starts)} starts but {len(ends)} ends")
    spans: list[tuple[int, int]] = []
    known = ((int(a), int(b)) for a, b in zip(starts, ends, strict=True) if not (_is_missing(a) or _is_missing(b)))
    for a, b in sorted((a, min(b, length)) for a, b in known if a >= 0):
        if spans and a <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], b))
        elif a < b:
            spans.append((a, b))
    return spans


def render_document(document: str, evidence_start: Any = None, evidence_end: Any = None) -> str:
    """The document's text with its evidence inside <mark>; all of it escaped."""
    parts, position = [], 0
    for start, end in evidence_spans(evidence_start, evidence_end, len(document)):
        parts += [html.escape(document[position:start]), f"<mark>{html.escape(document[start:end])}</mark>"]
        position = end
    return "".join([*parts, html.escape(document[position:])])


def render_sample(sample: dict, position: int, n_matches: int, n_samples: int) -> str:
    """One sample as a page: question, answer, then the document with its evidence marked.

    sample: the SAMPLE_COLUMNS. position counts from 0 within the n_matches of n_samples that the search and filter
    leave.
    """
    document = str(sample["document"])
    text = render_document(document, sample["evidence_start"], sample["evidence_end"])
    where = f"sample {position + 1:,} of {n_matches:,} ({n_samples:,} in all)"
    body = (
        f'<div class="d2l-note">{where} · {html.escape(str(sample["kind"]))} · {len(document):,} characters</div>'
        f'<h4>Question</h4><div class="d2l-text d2l-question">{html.escape(str(sample["question"]))}</div>'
        f'<h4>Answer</h4><div class="d2l-text d2l-answer">{html.escape(str(sample["answer"]))}</div>'
        f'<h4>Document</h4><div class="d2l-text d2l-document" tabindex="0">{text}</div>'
    )
    return render_view("sample", body, position=position, matches=n_matches, samples=n_samples, kind=sample["kind"])


def render_sample_table(samples: pd.DataFrame, n_rows: int = STATIC_ROWS, width: int = 240) -> str:
    """The first `n_rows` samples as a plain table.

    A document is cut to about `width` characters around its evidence.
    """
    rows = []
    for sample in samples.head(n_rows).to_dict("records"):
        document = str(sample["document"])
        spans = evidence_spans(sample["evidence_start"], sample["evidence_end"], len(document))
        middle = sum(spans[0]) // 2 if spans else 0
        left = max(0, min(middle - width // 2, len(document) - width))
        shown = document[left : left + width]
        inside = [(max(0, start - left), end - left) for start, end in spans if start < left + width and end > left]
        text = render_document(shown, [start for start, _ in inside], [end for _, end in inside])
        cut = ("… " if left else "") + text + (" …" if left + width < len(document) else "")
        cells = [html.escape(str(sample[column])) for column in ("kind", "question", "answer")] + [cut]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("kind", "question", "answer", "document (evidence marked)"))
    note = f'<div class="d2l-note">the first {len(rows)} of {len(samples):,} samples</div>'
    return render_view(
        "table", f"{note}<table><tr>{head}</tr>{''.join(rows)}</table>", rows=len(rows), samples=len(samples)
    )


def render_message(message: str, is_error: bool = False) -> str:
    """One line of status; an error is coloured and announced by screen readers."""
    role = "alert" if is_error else "status"
    return render_view(
        "message", f'<div role="{role}" class="d2l-{"error" if is_error else "note"}">{html.escape(message)}</div>'
    )


def render_inside(documents: Iterable[dict], adapter_strength: float, bias_strength: float) -> str:
    """What is inside the model right now. documents: name, n_blocks, n_characters, weight."""
    rows = [
        f"<li><b>{html.escape(row['name'])}</b>: {row['n_characters']:,} characters, "
        f"{row['n_blocks']} block{'' if row['n_blocks'] == 1 else 's'}, weight {row['weight']:.2f}</li>"
        for row in documents
    ]
    if rows:
        strengths = f"adapter strength {adapter_strength:.2f}, bias strength {bias_strength:.2f}"
        body = f"<b>Inside right now</b> ({strengths})<ul>{''.join(rows)}</ul>"
    else:
        body = (
            "<b>Inside right now:</b> nothing. Add a document first; until then all answers are the base model's own."
        )
    return render_view("inside", body, documents=len(rows))


Turn = tuple[str, Sequence[tuple[str, str]]]  # a question, and its answers: (where it came from, text)


def render_answers(turns: Sequence[Turn]) -> str:
    """Questions and their answers side by side, the latest first."""
    body = ""
    for question, answers in reversed(turns):
        panes = "".join(
            f'<div class="d2l-pane" data-source="{html.escape(source)}"><h4>{html.escape(source)}</h4>'
            f'<div class="d2l-text">{html.escape(text)}</div></div>'
            for source, text in answers
        )
        asked = f'<h4>Question</h4><div class="d2l-text d2l-question">{html.escape(question)}</div>'
        body += f'<div class="d2l-turn">{asked}<div class="d2l-columns">{panes}</div></div>'
    return render_view("answers", body, turns=len(turns), answers=len(turns[-1][1]) if turns else 0)


def _is_missing(value: Any) -> bool:
    return value is None or bool(pd.isna(value)) or value in (math.inf, -math.inf)


def _as_text(value: Any) -> str:
    """Any cell of a table as text; a missing one is empty."""
    return "" if pd.api.types.is_scalar(value) and pd.isna(value) else str(value)


# --- widgets ----------------------------------------------------------------------------------------------------------


def attempt(page: W.HTML, action: Callable[[], Any], working: str = "", done: str = "") -> bool:
    """Runs `action`; what goes wrong is told on `page`: in a callback an exception would be lost. So are `working`,
    before it, and `done`, after it, where they are given.
    """
    if working:
        page.value = render_message(working)
    try:
        action()
    except Exception as error:  # whatever it is, the person at the page has to see it
        page.value = render_message(f"{type(error).__name__}: {error}", is_error=True)
        return False
    if done:
        page.value = render_message(done)
    return True


class Viewer(W.VBox):
    """Widgets in a column that also have a plain HTML form, for pages without a kernel: `static_html`."""

    def __init__(self, children: Sequence[W.Widget], static_html: str):
        super().__init__(list(children))
        self.static_html = static_html

    def _repr_mimebundle_(self, **options) -> dict:
        return super()._repr_mimebundle_(**options) | {"text/html": self.static_html}


def sample_frame(samples: pd.DataFrame | Iterable[dict]) -> pd.DataFrame:
    """The samples as a DataFrame with the SAMPLE_COLUMNS, rows numbered from 0, missing texts as empty ones.

    ValueError names a missing column, or the sample whose evidence is not as `evidence_spans` wants it.
    """
    if isinstance(samples, pd.DataFrame):
        frame = samples
    else:
        rows = list(samples)
        frame = pd.DataFrame(rows, columns=None if rows else list(SAMPLE_COLUMNS))
    missing = [column for column in SAMPLE_COLUMNS if column not in frame]
    if missing:
        raise ValueError(f"samples lack the columns {missing}; needed are {list(SAMPLE_COLUMNS)}")
    texts = {name: [_as_text(value) for value in frame[name]] for name in ("document", "question", "answer", "kind")}
    frame = frame.reset_index(drop=True).assign(**texts)
    for number, span in enumerate(zip(frame["evidence_start"], frame["evidence_end"], strict=True)):
        try:
            evidence_spans(*span, length=0)
        except (TypeError, ValueError) as error:
            raise ValueError(f"sample {number}: {error}") from error
    return frame


def find_samples(samples: pd.DataFrame, text: str = "", kind: str = ALL_KINDS) -> np.ndarray:
    """Row numbers of the samples (a sample_frame) of this kind with `text` (any case) in one of their texts."""
    chosen = np.ones(len(samples), dtype=bool) if kind == ALL_KINDS else (samples["kind"] == kind).to_numpy(dtype=bool)
    if text:
        found = np.zeros(len(samples), dtype=bool)
        for column in ("document", "question", "answer"):
            found |= samples[column].str.contains(text, case=False, regex=False).to_numpy(dtype=bool)
        chosen = chosen & found
    return np.flatnonzero(chosen)


def view_samples(samples: pd.DataFrame | Iterable[dict]) -> Viewer:
    """A viewer to page through samples, search their text and filter by kind. Columns: SAMPLE_COLUMNS.

    evidence_start and evidence_end are character positions in the document (see `evidence_spans`). Keys: Tab moves
    between the controls, Enter searches, the arrow keys move the slider, space presses a button.
    """
    frame = sample_frame(samples)
    kinds = [ALL_KINDS, *sorted(frame["kind"].unique())]
    search = W.Text(description="Search", placeholder="text, then Enter", continuous_update=False)
    kind = W.Dropdown(description="Kind", options=kinds)
    position = W.IntSlider(description="Sample", min=1, max=max(1, len(frame)), continuous_update=False)
    previous = W.Button(description="Previous", icon="arrow-left", tooltip="the sample before this one")
    following = W.Button(description="Next", icon="arrow-right", tooltip="the sample after this one")
    page = W.HTML()
    matches = np.arange(len(frame))

    def show(_=None) -> None:
        previous.disabled = position.value <= 1
        following.disabled = position.value >= len(matches)
        if len(matches):
            sample = frame.iloc[matches[position.value - 1]].to_dict()
            page.value = render_sample(sample, position.value - 1, len(matches), len(frame))
        else:
            page.value = render_view("sample", "No sample matches.", position=-1, matches=0, samples=len(frame))

    def select(_=None) -> None:
        nonlocal matches
        matches = find_samples(frame, search.value, kind.value)
        position.unobserve(show, "value")
        position.value, position.max = 1, max(1, len(matches))
        position.observe(show, "value")
        show()

    def step(change: int) -> Callable:
        def move(_) -> None:
            position.value = min(max(1, position.value + change), max(1, len(matches)))

        return move

    previous.on_click(step(-1))
    following.on_click(step(+1))
    for control in (search, kind):
        control.observe(select, "value")
    select()
    controls = W.HBox([search, kind, position, previous, following], layout=W.Layout(flex_flow="row wrap"))
    return Viewer([controls, page], render_sample_table(frame))


# --- chat -------------------------------------------------------------------------------------------------------------

WITH_ADAPTER = "adapter, document not in the prompt"
ROUTED = "adapter, its most relevant block alone"
WITHOUT = "base model alone"
IN_PROMPT = "base model, document in its prompt"


class Conversation:
    """What a chat holds: documents with their adapters and weights, two strengths, a system message. No widgets; `chat`
    draws it. Every question stands alone: earlier ones are not in the prompt.

    model: a DocToLoRA, or anything with its `internalize_each` and `answer`; its own current adapter stays what it
    was. Every document is internalized once, when it is added; weights and strengths only scale blocks.
    """

    def __init__(self, model: Any):
        self.model = model
        self.texts: dict[str, str] = {}
        self.weights: dict[str, float] = {}
        self.adapter_strength = 1.0
        self.bias_strength = 1.0
        self.system = ""
        self._adapters: dict[str, Any] = {}

    def add(self, text: str, name: str = "") -> str:
        """The name under which `text` is now inside (counted, if none is given). ValueError for one that is taken."""
        numbers = range(1, len(self.texts) + 2)
        name = name.strip() or next(free for i in numbers if (free := f"document {i}") not in self.texts)
        if name in self.texts:
            raise ValueError(f"a document named {name!r} is inside already: remove it first, or choose another name")
        [self._adapters[name]] = self.model.internalize_each({name: text})
        self.texts[name], self.weights[name] = text, 1.0
        return name

    def replace(self, name: str, text: str) -> None:
        """Another text under the same name, in the same place and at the same weight."""
        if name not in self.texts:
            raise ValueError(f"no document named {name!r} is inside")
        [self._adapters[name]] = self.model.internalize_each({name: text})
        self.texts[name] = text

    def remove(self, name: str) -> None:
        """Afterwards the model is as if the document had never been added."""
        for holder in (self.texts, self.weights, self._adapters):
            del holder[name]

    def adapter(self) -> Any:
        """The sum of all documents' blocks at their weights and the two strengths; None if nothing is inside."""
        if not self._adapters:
            return None
        weighted = (each.scaled(self.weights[name] * self.adapter_strength) for name, each in self._adapters.items())
        adapter = sum(weighted)
        return adapter if adapter.bias is None else adapter.scaled_bias(self.bias_strength)

    def inside(self) -> list[dict]:
        """One row per document: name, n_characters, n_blocks, weight (before the adapter strength)."""
        return [
            {
                "name": name,
                "n_characters": len(text),
                "n_blocks": len(self._adapters[name].blocks),
                "weight": self.weights[name],
            }
            for name, text in self.texts.items()
        ]

    def answers(self, question: str) -> list[tuple[str, str]]:
        """(where it came from, answer) of the model with the adapter, without it, and with the documents in its prompt;
        where the adapter has several blocks, also of the most relevant one alone (see `routing`).

        What one of them cannot do (documents longer than the window, say) is told in its place.
        """
        adapter, in_prompt = self.adapter(), "\n\n".join([*self.texts.values(), question])
        answers = [(WITH_ADAPTER, self._answer(question, adapter))]
        if adapter is not None and len(adapter.blocks) > 1:
            answers.append((ROUTED, self._answer(question, adapter, blocks=1)))
        return [*answers, (WITHOUT, self._answer(question, None)), (IN_PROMPT, self._answer(in_prompt, None))]

    def _answer(self, prompt: str, adapter: Any, **options: Any) -> str:
        if self.system.strip():
            options["system"] = self.system
        try:
            return self.model.answer(prompt, adapter, **options)
        except (ValueError, RuntimeError) as error:
            return f"(no answer: {error})"


def chat(model: Any, documents: str | Sequence[str] | Mapping[str, str] | None = None, question: str = "") -> Viewer:
    """A page to paste documents and ask: the adapter beside the base model without and with the documents.

    model: a DocToLoRA (see `Conversation` for what is used of it). documents (as `internalize` takes them) are
    internalized at once, and `question` is asked at once, so that the page has something to show.
    """
    given = documents if isinstance(documents, Mapping) else name_documents(documents) if documents else {}
    conversation = Conversation(model)
    name = W.Text(description="Name", placeholder="optional")
    text = W.Textarea(description="Document", placeholder="paste a text here", rows=6, layout=W.Layout(width="98%"))
    add = W.Button(description="Add document", icon="plus", button_style="primary")
    listed = W.VBox()
    adapter_strength = _strength("Adapter strength")
    bias_strength = _strength("Bias strength")
    inside, status, answers = W.HTML(), W.HTML(), W.HTML()
    asked = W.Text(description="Question", value=question, continuous_update=False, layout=W.Layout(width="80%"))
    ask = W.Button(description="Ask", icon="comment", button_style="primary")
    system = W.Text(
        description="System",
        placeholder="optional system message",
        continuous_update=False,
        layout=W.Layout(width="80%"),
    )
    clear = W.Button(description="Clear", icon="eraser", tooltip="forget the questions and answers, keep the documents")
    answered_for, editing = None, None
    turns: list[Turn] = []

    def refresh(_=None) -> None:
        """Draws what is inside, and asks the question again if anything that its answer depends on has changed."""
        nonlocal answered_for
        conversation.adapter_strength, conversation.bias_strength = adapter_strength.value, bias_strength.value
        conversation.system = system.value
        inside.value = render_inside(conversation.inside(), adapter_strength.value, bias_strength.value)
        wanted = asked.value.strip()
        settings = (adapter_strength.value, bias_strength.value, system.value)
        state = (wanted, settings, *conversation.texts.items(), *conversation.weights.items())
        if not wanted or state == answered_for:
            return

        def answer() -> None:
            turn = (wanted, conversation.answers(wanted))
            if turns and turns[-1][0] == wanted:  # the same question again, with something else inside
                turns.pop()
            turns.append(turn)
            answers.value = render_answers(turns)

        if attempt(status, answer, "answering ...", "ready"):
            answered_for = state

    def row(document: str) -> W.HBox:
        weight = W.FloatSlider(description="Weight", value=1.0, min=-1.0, max=2.0, step=0.05, continuous_update=False)
        edit = W.Button(description="Edit", icon="pencil", tooltip=f"change the text of {document}")
        remove = W.Button(description="Remove", icon="trash", tooltip=f"take {document} out again")
        title = W.HTML(render_view("name", html.escape(document), document=document), layout=W.Layout(width="240px"))
        line = W.HBox([title, weight, edit, remove])

        def reweigh(change: dict) -> None:
            conversation.weights[document] = change["new"]
            refresh()

        def drop(_) -> None:
            conversation.remove(document)
            if editing == document:
                edit_document(None)
            listed.children = [child for child in listed.children if child is not line]
            refresh()

        def change(_) -> None:
            edit_document(document)

        weight.observe(reweigh, "value")
        edit.on_click(change)
        remove.on_click(drop)
        return line

    def edit_document(document: str | None) -> None:
        """Puts a document's text where it can be changed, or (None) makes room for a new one."""
        nonlocal editing
        editing = document
        name.value, text.value = document or "", conversation.texts.get(document, "")
        name.disabled = document is not None
        add.description = "Replace document" if document else "Add document"

    def insert(body: str, title: str) -> bool:
        def internalize() -> None:
            added = conversation.add(body, title)
            listed.children = [*listed.children, row(added)]

        done = attempt(status, internalize, "internalizing ...", "ready")
        if done:
            refresh()
        return done

    def on_add(_) -> None:
        if editing is None:
            done = insert(text.value, name.value)
        elif done := attempt(status, lambda: conversation.replace(editing, text.value), "internalizing ...", "ready"):
            refresh()
        if done:
            edit_document(None)

    def on_clear(_) -> None:
        nonlocal answered_for
        turns.clear()
        answered_for = None
        answers.value = render_answers(turns)

    for title, body in given.items():
        insert(body, title)
    refresh()
    add.on_click(on_add)
    ask.on_click(refresh)
    clear.on_click(on_clear)
    for control in (adapter_strength, bias_strength, system, asked):
        control.observe(refresh, "value")
    column = W.Layout(width="100%")
    return Viewer(
        [
            inside,
            listed,
            name,
            text,
            add,
            W.HBox([adapter_strength, bias_strength], layout=W.Layout(flex_flow="row wrap")),
            system,
            W.HBox([asked, ask, clear], layout=column),
            status,
            answers,
        ],
        static_html=inside.value + answers.value,
    )


def _strength(label: str) -> W.FloatSlider:
    return W.FloatSlider(
        description=label,
        value=1.0,
        min=0.0,
        max=2.0,
        step=0.05,
        continuous_update=False,
        style={"description_width": "initial"},
        layout=W.Layout(width="360px"),
    )
