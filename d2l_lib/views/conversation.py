"""Paste documents and ask: the adapter beside the base model without and with the documents in its prompt."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import ipywidgets as W

from d2l_lib.documents import check_texts, name_documents, read_document
from d2l_lib.formats import markup
from d2l_lib.views.examples import ModelMenu, checked_examples, suggestions
from d2l_lib.views.page import (
    REDRAW_S,
    Column,
    Report,
    Viewer,
    Work,
    listen,
    plural,
    quietly,
    render_view,
    short,
    takes,
    wrapped,
)

_NAMED = 8  # documents that a line names
LISTED = 100  # documents in the list of what is inside
_LONG_TEXT = 20_000  # characters; a longer text shows a bar while the page is being built
WITH_ADAPTER = "adapter, document not in the prompt"
SPARSELY = "adapter read sparsely, document not in the prompt"
ROUTED = "adapter, one block of it alone"
WITHOUT = "base model alone"
IN_PROMPT = "base model, document in its prompt"
_SUGGESTED = 8  # questions in the line of suggestions
_NO_ANSWER = "(no answer: "
_READ = 0.05  # share of what an answer read from which a document is named
Answers = list[tuple[str, str]]  # (source, text)
READINGS = {"published sum": "sum", "sparse reading": "sparse"}


# --- pure renderers ---------------------------------------------------------------------------------------------------


def render_inside(
    documents: Iterable[dict], adapter_strength: float | None, bias_strength: float | None, model_name: str = ""
) -> str:
    """What is inside the model now.

    documents: name, n_blocks, n_characters, weight, and warning, if any; the first 100 are listed.
    adapter_strength, bias_strength: None for a model without strengths.
    model_name: "" where there is but one.
    """
    documents = list(documents)
    rows = [
        f"<li><b>{markup.inline(row['name'])}</b>: {row['n_characters']:,} characters, "
        f"{plural(row['n_blocks'], 'block')}, weight {row['weight']:.2f}{_warned(row.get('warning', ''))}</li>"
        for row in documents[:LISTED]
    ]
    if len(documents) > LISTED:
        rows.append(f"<li>and {len(documents) - LISTED:,} more</li>")
    if rows:
        known = adapter_strength is not None
        strengths = f" (adapter strength {adapter_strength:.2f}, bias strength {bias_strength:.2f})" if known else ""
        body = f"<b>Inside right now</b>{strengths}<ul>{''.join(rows)}</ul>"
    else:
        body = (
            "<b>Inside right now:</b> nothing. Add a document first; until then all answers are the base model's own."
        )
    model = f'<div class="d2l-note d2l-model">Model: {markup.inline(model_name)}</div>' if model_name else ""
    return render_view("inside", model + body, documents=len(documents))


def _warned(warning: str) -> str:
    return f'<div class="d2l-error d2l-warning">{markup.escape(warning)}.</div>' if warning else ""


class Turn(NamedTuple):
    """A question and its answers as (source, text).

    state: what was inside then, in words.
    model: the name of the model that answered; "" where there is but one.
    read: what the adapter's answer was read from, in words.
    """

    question: str
    answers: Sequence[tuple[str, str]]
    state: str = ""
    model: str = ""
    read: str = ""


def render_answers(turns: Sequence[tuple]) -> str:
    """Questions and their answers side by side, the latest first.

    turns: each a `Turn`, or its first two fields. What was inside stands above the first turn and above each change.
    """
    parts, before = [], ""
    for turn in (Turn(*turn) for turn in turns):
        changed = f"{'changed: ' if before else ''}{turn.state}" if turn.state != before else ""
        parts.append(_rendered_turn(turn, changed))
        before = turn.state or before
    answered = len(turns[-1][1]) if turns else 0
    return render_view("answers", "".join(reversed(parts)), turns=len(turns), answers=answered)


def render_writing(turn: Turn) -> str:
    """A turn whose answers are being written; "…" stands for one without a word yet."""
    shown = turn._replace(answers=[(source, text or "…") for source, text in turn.answers])
    return render_view("writing", _rendered_turn(shown), answers=len(turn.answers))


def _rendered_turn(turn: Turn, state: str = "") -> str:
    """A turn below a line that says what was inside ("": no line)."""
    panes = "".join(
        f'<div class="d2l-pane" data-source="{markup.escape(source)}"><h4>{markup.escape(source)}</h4>'
        f'<div class="d2l-text">{markup.escape(text)}</div></div>'
        for source, text in turn.answers
    )
    line = f'<div class="d2l-note d2l-state">{markup.escape(state)}</div>' if state else ""
    model = f'<div class="d2l-note d2l-model">answered by {markup.inline(turn.model)}</div>' if turn.model else ""
    asked = f'<h4>Question</h4><div class="d2l-text d2l-question">{markup.escape(turn.question)}</div>'
    read = f'<div class="d2l-note d2l-read">{markup.escape(turn.read)}</div>' if turn.read else ""
    return f'<div class="d2l-turn">{line}{asked}{model}<div class="d2l-columns">{panes}</div>{read}</div>'


def render_suggestions(questions: Iterable[str]) -> str:
    """Questions that may be asked, as text: what a page without a kernel shows of their buttons. "" for none."""
    asked = " · ".join(markup.inline(question) for question in questions)
    return render_view("suggestions", f'<div class="d2l-note">Ask for example: {asked}</div>') if asked else ""


# --- widgets ----------------------------------------------------------------------------------------------------------


class Conversation:
    """What a chat holds: documents with their adapters and weights, strengths, reading, system message. No widgets.

    model: a DocToLoRA, or anything with its `internalize_each` and `answer`. Its current adapter stays what it was.

    read: "sum" or "sparse", as of `model.answer`. At first it is how the model was trained: sparse for a model with a
    null block, whose sum of many blocks drowns and disturbs unrelated questions (`d2l study reading`); else the
    published sum. An `answer` without `read` knows the sum alone. A model that writes rows is read in its own way: it
    has neither the sum, nor one block that is chosen, nor strengths (the shares of its rows add up to one).

    Every question stands alone: earlier ones are not in the prompt. Every document is internalized once, when it is
    added; weights and strengths only scale blocks. Threads may share a conversation.

    model_name: what turns call the model; "" where there is but one.

    A text that the base model predicts worse than its mere characters gets a warning (see `analysis.familiarity`).
    """

    def __init__(self, model: Any, model_name: str = ""):
        self.texts: dict[str, str] = {}
        self.weights: dict[str, float] = {}
        self.adapter_strength = 1.0
        self.bias_strength = 1.0
        self.system = ""
        self._adapters: dict[str, Any] = {}
        self._warnings: dict[str, str] = {}  # of texts that were internalized
        self._lock = threading.RLock()
        self._take_model(model, model_name)

    def _take_model(self, model: Any, model_name: str) -> None:
        self.model, self.model_name = model, model_name
        self.has_rows = getattr(model, "writes_rows", False)
        self.reads_sparsely = takes(model.answer, "read") and not self.has_rows
        prefers = self.reads_sparsely and getattr(model, "has_null_block", False)
        self.read = "sparse" if self.has_rows or prefers else "sum"

    @property
    def strengths(self) -> tuple[float, float] | None:
        """Of the adapter and of the bias; None for a model that writes rows."""
        return None if self.has_rows else (self.adapter_strength, self.bias_strength)

    def copy(self) -> "Conversation":
        """A copy of the present state, for an answer that takes a while."""
        with self._lock:
            other = Conversation(self.model, self.model_name)
            other._warnings = dict(self._warnings)
            other.texts, other.weights, other._adapters = dict(self.texts), dict(self.weights), dict(self._adapters)
            other.adapter_strength, other.bias_strength = self.adapter_strength, self.bias_strength
            other.system, other.read = self.system, self.read
        return other

    def free_name(self, taken: Iterable[str] = ()) -> str:
        """The first of "document 1", "document 2", ... that is neither inside nor in `taken`."""
        names = {*self.texts, *check_texts(taken, "names")}
        return next(name for i in range(1, len(names) + 2) if (name := f"document {i}") not in names)

    def check_free(self, name: str) -> None:
        """ValueError if a document of this name is inside."""
        if name in self.texts:
            raise ValueError(f"a document named {name!r} is inside already: remove it first, or choose another name")

    def check_inside(self, name: str) -> None:
        """ValueError if no document of this name is inside."""
        if name not in self.texts:
            raise ValueError(f"no document named {name!r} is inside")

    def internalized(self, name: str, text: str, progress: Report | bool | None = None) -> Any:
        """The adapter of a text, which is not put inside. progress: as of `internalize_each`, if it takes one."""
        model = self.model
        [adapter], [warning] = _internalized(model, {name: text}, progress)
        with self._lock:
            if model is self.model:
                self._warnings[text] = warning
        return adapter

    def moved(self, model: Any, model_name: str = "", progress: Report | bool | None = None) -> "Conversation":
        """This conversation with another model: a new one, whose model has internalized the same documents.

        Weights, strengths and the system message stay; `read` is as the model was trained. progress: as of
        `internalized`. Raises what the model raises; this conversation stays as it is.
        """
        other = self.copy()
        other._take_model(model, model_name)
        adapters, warnings = _internalized(model, other.texts, progress) if other.texts else ([], [])
        other._adapters = dict(zip(other.texts, adapters, strict=True))
        other._warnings = dict(zip(other.texts.values(), warnings, strict=True))
        return other

    def take(self, other: "Conversation") -> None:
        """Go on with the model of `other`, made by `moved`, and with its adapters of the documents that are inside.

        ValueError if a document came or changed meanwhile.
        """
        with self._lock:
            for name, text in self.texts.items():
                if other.texts.get(name) != text:
                    raise ValueError(f"document {name!r} came meanwhile: choose the model again")
            self._take_model(other.model, other.model_name)
            self.read = other.read
            self._adapters = {name: other._adapters[name] for name in self.texts}
            self._warnings = dict(other._warnings)

    def add(self, text: str, name: str = "", adapter: Any = None) -> str:
        """The name under which `text` is now inside. ValueError for a name that is taken.

        name: "" counts the documents.
        adapter: that of the text (see `internalized`); None: made here.
        """
        name = name.strip() or self.free_name()
        self.check_free(name)
        adapter = self.internalized(name, text) if adapter is None else adapter
        with self._lock:
            self.check_free(name)
            self.texts[name], self.weights[name], self._adapters[name] = text, 1.0, adapter
        return name

    def replace(self, name: str, text: str, adapter: Any = None) -> None:
        """Put another text under the same name, in the same place, at the same weight. adapter: as of `add`."""
        self.check_inside(name)
        adapter = self.internalized(name, text) if adapter is None else adapter
        with self._lock:
            self.check_inside(name)
            self.texts[name], self._adapters[name] = text, adapter

    def remove(self, name: str) -> None:
        """Take a document out: the model is then as if it had never been added."""
        with self._lock:
            for holder in (self.texts, self.weights, self._adapters):
                del holder[name]

    def adapter(self) -> Any:
        """The sum of all documents' blocks at their weights and the two strengths; None without documents."""
        held = self.copy()
        if not held._adapters:
            return None
        strength, bias_strength = held.strengths or (1.0, 1.0)
        adapter = sum(each.scaled(held.weights[name] * strength) for name, each in held._adapters.items())
        return adapter if adapter.bias is None else adapter.scaled_bias(bias_strength)

    def inside(self) -> list[dict]:
        """One row per document: name, n_characters, n_blocks, weight (before the adapter strength), warning or ""."""
        held = self.copy()
        return [
            {
                "name": name,
                "n_characters": len(text),
                "n_blocks": len(held._adapters[name].blocks),
                "weight": held.weights[name],
                "warning": held._warnings.get(text, ""),
            }
            for name, text in held.texts.items()
        ]

    def state(self) -> str:
        """One line: documents, weights, strengths, sparse reading where it is used, and the system message."""
        held = self.copy()
        weights = {markup.isolated(name): held.weights[name] for name in held.texts}
        names = [name if weight == 1 else f"{name} (weight {weight:.2f})" for name, weight in weights.items()]
        more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
        line = f"inside: {', '.join(names[:_NAMED]) or 'nothing'}{more}"
        if names:
            line += "; adapter {:.2f}, bias {:.2f}".format(*held.strengths) if held.strengths else ""
            line += "; sparse reading" if held.read == "sparse" else ""
        return line + (f"; system: {held.system.strip()}" if held.system.strip() else "")

    def answers(
        self, question: str, report: Report | None = None, stream: Callable[[Answers], None] | None = None
    ) -> Answers:
        """(source, answer) of the model with the adapter, without it, and with the documents in its prompt.

        The adapter is read as `read` says, and the source says so. An adapter of several blocks adds the answer of one
        block alone (`blocks=1` of `model.answer`). An error, as for documents longer than the window, stands in place
        of its answer.

        report: called as report(done, total) after each answer.
        stream: called with the (source, answer) pairs so far, the last one unfinished, whenever a token has come. A
            model whose `answer` has no `stream` gives whole answers.
        """
        held = self.copy()
        adapter, in_prompt = held.adapter(), "\n\n".join([*held.texts.values(), question])
        ways: list[tuple[str, str, Any, dict]] = [(WITH_ADAPTER, question, adapter, {})]
        if adapter is not None and held.read == "sparse":
            ways = [(SPARSELY, question, adapter, {"read": "sparse"})]
        if adapter is not None and len(adapter.blocks) > 1 and not self.has_rows:
            ways.append((ROUTED, question, adapter, {"blocks": 1}))
        ways += [(WITHOUT, question, None, {}), (IN_PROMPT, in_prompt, None, {})]
        answers: Answers = []
        for source, prompt, applied, options in ways:

            def follow(text: str, source: str = source) -> None:
                if report is not None:
                    report(len(answers), len(ways))  # where the work may be stopped
                stream([*answers, (source, text)])

            if stream is not None:
                follow("")
                options = options | ({"stream": follow} if takes(held.model.answer, "stream", by_name=True) else {})
            answers.append((source, held._answer(prompt, applied, **options)))
            if report is not None:
                report(len(answers), len(ways))
        return answers

    def read_from(self, question: str, answer: str) -> str:
        """What the adapter's answer was read from, in words; "" without one, and for a model that writes no rows."""
        held = self.copy()
        if not held.has_rows:
            return ""
        from d2l_lib.model import DocToLoRA  # which imports torch
        from d2l_lib.row_reading import answer_rows

        adapter = held.adapter()
        reads = isinstance(held.model, DocToLoRA) and not answer.startswith(_NO_ANSWER)
        if not reads or adapter is None or not any(block.weight for block in adapter.blocks):
            return ""
        table = answer_rows(held.model, question, adapter, answer, system=held.system)
        shares = table[table["row"] >= 0].groupby("document")["share"].sum().sort_values(ascending=False)
        if shares.sum() < table["share"].sum() / 2:
            return (
                "With the adapter nothing was read: no place inside was close enough to the question, so the model "
                "answered itself."
            )
        shares = (shares / shares.sum()).round(2)
        parts = [f"{markup.isolated(name)} ({share:.0%})" for name, share in shares[shares >= _READ].items()]
        return f"The adapter's answer was read from {', '.join(parts)}."

    def _answer(self, prompt: str, adapter: Any, **options: Any) -> str:
        if self.system.strip():
            options["system"] = self.system
        try:
            return self.model.answer(prompt, adapter, **options)
        except (ValueError, RuntimeError) as error:
            return f"{_NO_ANSWER}{error})"


def _internalized(
    model: Any, texts: Mapping[str, str], progress: Report | bool | None = None
) -> tuple[list[Any], list[str]]:
    """(an adapter, a warning or "") of each text. progress: as of `Conversation.internalized`."""
    internalize = model.internalize_each
    options = {"progress": progress} if progress is not None and takes(internalize, "progress") else {}
    adapters = internalize(dict(texts), **options)
    return adapters, [_warning(model, text) for text in texts.values()]


def _warning(model: Any, text: str) -> str:
    """What `analysis.familiarity` says against a text; "" for nothing, and for a model that is no language model."""
    if getattr(model, "base_model", None) is None or getattr(model, "tokenizer", None) is None:
        return ""
    from d2l_lib.analysis.familiarity import familiarity  # which imports torch

    familiar = familiarity(model.base_model, model.tokenizer, text)
    return "" if familiar is None else familiar.warning()


class Chat(Viewer):
    """A page to paste documents and ask: the adapter beside the base model without and with the documents.

    Arguments: see `chat`.

    Attributes: `conversation` (a Conversation), `turns` (list of Turn, the oldest first), `work` (a page.Work).

    Nothing that a person gives it is lost. A text leaves its box when it is taken to be internalized. If that fails
    or is stopped, the text comes back: into the box, or into a line of its own if the box holds another text. Documents
    wait for one another. A change that affects the answers asks again once nothing else runs.
    """

    def __init__(
        self,
        model: Any,
        documents: str | Sequence[str] | Mapping[str, str] | None = None,
        question: str = "",
        background: bool | None = None,
        models: Mapping[str, Any] | None = None,
        examples: Mapping[str, Any] | None = None,
    ):
        texts = documents if isinstance(documents, Mapping) else name_documents(documents) if documents else {}
        texts = {name: read_document(one) if isinstance(one, PurePath) else one for name, one in texts.items()}
        super().__init__([], "")
        self._menu, self._examples = ModelMenu(model, models), checked_examples(examples)
        first = self._menu.first
        self.conversation, self.turns, self.work = Conversation(self._menu.get(first), first), [], Work(background)
        self._editing: str | None = None
        self._draft = ("", "")  # name and text in the box when the edit of a document began
        self._coming: set[str] = set()  # names of documents that wait for their internalization, or are in it
        self._requested: tuple | None = None  # what the latest answers depend on
        self._is_shown = False  # until the first documents are inside
        self._redrawn = 0.0, 0  # when the turn that is being written was last drawn, and its number of answers
        self._make_controls(question)
        self._make_menus()
        self._arrange()
        for name, text in texts.items():
            self._bring_in(name, name, text)
        with self.work.lock:
            self._is_shown = True
            self._refresh()
        if self.work.was_interrupted:
            raise KeyboardInterrupt
        self._connect()
        offered = render_suggestions(question for _, question in self._offered)
        self.static_html = self._inside.value + offered + self._answers.value

    def _make_controls(self, question: str) -> None:
        late, wide = {"continuous_update": False}, {"layout": W.Layout(flex="1 1 300px", width="auto")}
        self._name = W.Text(description="Name", placeholder="optional", layout=W.Layout(max_width="100%"))
        self._text = W.Textarea(
            description="Document", placeholder="paste a text here", rows=6, layout=W.Layout(width="98%")
        )
        self._add = W.Button(
            description="Add document", icon="plus", button_style="primary", layout=W.Layout(width="180px")
        )
        self._cancel = W.Button(
            description="Cancel", icon="times", tooltip="leave the document as it is", layout=W.Layout(display="none")
        )
        self._listed, self._kept = Column(), Column()
        self._adapter_strength, self._bias_strength = _strength("Adapter strength"), _strength("Bias strength")
        self._inside, self._answers, self._writing = W.HTML(), W.HTML(), W.HTML()
        self._asked = W.Text(description="Question", value=question, **late, **wide)
        self._ask = W.Button(description="Ask", icon="comment", button_style="primary")
        self._clear = W.Button(
            description="Clear", icon="eraser", tooltip="forget the questions and answers, keep the documents"
        )
        self._system = W.Text(description="System", placeholder="optional system message", **late, **wide)
        self._read = W.Dropdown(
            description="Reading", options=list(READINGS.items()), value=self.conversation.read,
            tooltip="all blocks at every token, as published; or at each token the block that matches",
            layout=W.Layout(max_width="100%"),
        )  # fmt: skip
        self._show_dials()

    def _show_dials(self) -> None:
        """Show the strengths and the reading where the model knows them."""
        held = self.conversation
        for dial in (self._adapter_strength, self._bias_strength):
            dial.layout.display = None if held.strengths else "none"
        self._read.layout.display = None if held.reads_sparsely else "none"

    def _make_menus(self) -> None:
        names, wide = self._menu.names, {"layout": W.Layout(width="auto", flex="0 1 340px", max_width="100%")}
        self._model = W.Dropdown(
            description="Model", options=names or [self._menu.first], value=self.conversation.model_name,
            tooltip="who answers; the documents inside are internalized again", **wide,
        )  # fmt: skip
        self._example = W.Dropdown(description="Examples", options=[*self._examples], **wide)
        self._add_example = W.Button(
            description="Add example", icon="book", tooltip="put this document inside, with questions to ask"
        )
        self._suggested = wrapped([])
        self._offered: list[tuple[str, str]] = []  # (document, question) of each button

    def _arrange(self) -> None:
        """The controls in their order; menus only where there is something to choose."""
        self.children = [
            *([wrapped([self._model])] if len(self._menu.names) > 1 else []),
            self._inside,
            self._listed,
            self._kept,
            *([wrapped([self._example, self._add_example])] if self._examples else []),
            self._name,
            self._text,
            wrapped([self._add, self._cancel]),
            wrapped([self._adapter_strength, self._bias_strength, self._read]),
            wrapped([self._system]),
            wrapped([self._asked, self._ask, self._clear]),
            *([self._suggested] if self._examples else []),
            self.work.status,
            self.work.bar,
            self._writing,
            self._answers,
        ]

    def _connect(self) -> None:
        self._add.on_click(lambda _: self.work.soon(self._take))
        self._cancel.on_click(lambda _: self._end_edit())
        self._ask.on_click(self._on_ask)
        self._clear.on_click(self._on_clear)
        self._add_example.on_click(lambda _: self._bring_example())
        listen(self._model, self._on_model)
        for control in (self._adapter_strength, self._bias_strength, self._read, self._system, self._asked):
            listen(control, self._refresh)
        for box in (self._name, self._text):  # what was refused is being changed
            listen(box, lambda _: self.work.tell("", key="add"))

    # --- questions ------------------------------------------------------------------------------------------------

    def _refresh(self, _: Any = None) -> None:
        """Draw what is inside, and ask again if anything that the answer depends on has changed."""
        with self.work.lock:
            held = self.conversation
            held.adapter_strength, held.bias_strength = self._adapter_strength.value, self._bias_strength.value
            held.system, held.read = self._system.value, self._read.value
            name = held.model_name if len(self._menu.names) > 1 else ""
            self._inside.value = render_inside(held.inside(), *(held.strengths or (None, None)), name)
            self._suggest()
            question = self._asked.value.strip()
            settings = (held.model_name, held.adapter_strength, held.bias_strength, held.read, held.system)
            state = (question, settings, *held.texts.items(), *held.weights.items())
            if question and state != self._requested:
                self._requested = state
                self.work.tell("", key="ask")
                self.work.start(
                    "answering ...",
                    lambda report: self._answered(question, report),
                    self._keep_turn,
                    self._drop_request,
                    key=("answer", question),
                    replaces=True,
                    unit="answers",
                )

    def _answered(self, question: str, report: Report) -> Turn:
        held = self.conversation.copy()
        state, name = held.state(), held.model_name if len(self._menu.names) > 1 else ""

        def draw(answers: Answers) -> None:
            self._draw_writing(Turn(question, answers, state, name))

        answers = held.answers(question, report, draw if self._is_shown else None)
        return Turn(question, answers, state, name, held.read_from(question, answers[0][1]))

    def _keep_turn(self, turn: Turn) -> None:
        last = self.turns[-1] if self.turns else None
        replaces = last is not None and (last.question, last.model) == (turn.question, turn.model)
        kept = self.turns[:-1] if replaces else self.turns
        page = render_answers([*kept, turn])
        self.turns[:] = [*kept, turn]  # the same question with something else inside replaces the last turn
        self._answers.value, self._writing.value = page, ""

    def _drop_request(self, _: str) -> None:
        self._requested, self._writing.value = None, ""

    def _draw_writing(self, turn: Turn) -> None:
        """Show a turn that is being written: every new answer, and its words not more often than they can be read."""
        now, n_answers = time.monotonic(), len(turn.answers)
        before, n_drawn = self._redrawn
        if now - before >= REDRAW_S or n_answers != n_drawn:
            with self.work.lock:
                if self.work.has(("answer", turn.question)):
                    self._redrawn, self._writing.value = (now, n_answers), render_writing(turn)

    def _on_ask(self, _: Any) -> None:
        if self._asked.value.strip():
            self._refresh()
        else:
            self.work.tell("Nothing was asked: type a question first.", key="ask")

    def _on_clear(self, _: Any) -> None:
        with self.work.lock:
            self.work.leave_out(_is_of_answer)
            self.work.forget(lambda key: key == "add" or _is_of_answer(key))
            self.turns.clear()
            self._requested = None
            self._answers.value, self._writing.value = render_answers(self.turns), ""

    # --- menus ----------------------------------------------------------------------------------------------------

    def _on_model(self, change: dict) -> None:
        """Load the chosen model and let it internalize what is inside. The old one answers until then."""
        with self.work.lock:
            name, held = change["new"], self.conversation
            self.work.leave_out(lambda key: key == "model")
            for key in ("model", "stays"):
                self.work.tell("", key=key)
            if name == held.model_name:
                return

            def move(report: Report) -> Conversation:
                model = self._menu.get(name)
                report(0, 1)
                return held.moved(model, name, report)

            def take(moved: Conversation) -> None:
                held.take(moved)
                with quietly():
                    self._read.value = held.read
                self._show_dials()
                self._refresh()

            def stay(_: str) -> None:
                with quietly():
                    self._model.value = held.model_name
                self.work.tell(f"The model is still {markup.isolated(held.model_name)}.", key="stays")

            steps = [] if self._menu.has_loaded(name) else ["loading it"]
            steps += [f"internalizing {plural(len(held.texts), 'document')} again"] if held.texts else []
            label = f"changing to {markup.isolated(name)}{': ' if steps else ''}{', '.join(steps)} ..."
            self.work.start(label, move, take, stay, key="model", unit="chunks")

    def _bring_example(self) -> None:
        """Put the chosen example inside."""
        with self.work.lock:
            name = self._example.value
            if name in self._coming or name in self.conversation.texts:
                self.work.tell(f"{markup.isolated(name)} is inside already, or on its way.", key="add")
            else:
                self._bring_in(name, name, self._examples[name].text)

    def _suggest(self) -> None:
        """Show a button for each suggested question about the examples that are inside."""
        offered = suggestions(self._examples, self.conversation.texts, _SUGGESTED)
        if offered != self._offered:
            self._offered = offered
            buttons = [self._question_button(name, question) for name, question in offered]
            self._suggested.children = [W.Label("Ask for example:"), *buttons] if buttons else []

    def _question_button(self, name: str, question: str) -> W.Button:
        button = W.Button(
            description=question, tooltip=f"ask this about {name}", layout=W.Layout(width="auto", max_width="100%")
        )

        def ask(_: Any) -> None:
            with self.work.lock:
                with quietly():
                    self._asked.value = question
                self._refresh()

        button.on_click(ask)
        return button

    # --- documents ------------------------------------------------------------------------------------------------

    def _take(self) -> None:
        """Take the text out of the box, which is then free for the next."""
        with self.work.lock:
            title, text, editing = self._name.value, self._text.value, self._editing
            name = editing or title.strip() or self.conversation.free_name([*self._coming])
            if not text and editing is None:
                if not self.work.has("add"):  # a second click on one text is no error
                    self.work.tell("The box is empty: paste a text, then add it.", key="add")
                return
            if name in self._coming:
                self.work.tell(f"{name!r} is being internalized: wait, or choose another name", True, key="kept")
                return
            if editing is None:
                try:
                    self.conversation.check_free(name)
                except ValueError as error:
                    self.work.tell(f"ValueError: {error}", True, key="add")
                    return
            self._end_edit() if editing else self._fill("", "", None)
            self._bring_in(name, title, text, editing)

    def _bring_in(self, name: str, title: str, text: str, editing: str | None = None) -> None:
        """Internalize a text under this name, or in place of document `editing`. title: the name that a person gave."""
        self._coming.add(name)

        def internalize(report: Report) -> Any:
            if editing is not None:
                self.conversation.check_inside(editing)
            # nobody sees the page's own bar while it is being built
            progress = report if self._is_shown else (len(text) > _LONG_TEXT or None)
            return self.conversation.internalized(name, text, progress)

        def put_inside(adapter: Any) -> None:
            if editing is None:
                self.conversation.add(text, name, adapter)
                self._listed.add(self._row(name))
            else:
                self.conversation.replace(editing, text, adapter)
            self._coming.discard(name)
            if self._is_shown:
                self._refresh()

        def give_back(reason: str) -> None:
            self._coming.discard(name)
            self._give_back(title, text, editing, reason)

        label = f"internalizing {markup.isolated(name)} ..."
        self.work.start(label, internalize, put_inside, give_back, key="add", unit="chunks")

    def _give_back(self, title: str, text: str, editing: str | None, reason: str) -> None:
        """Put a text that is not inside back into the box, or into a line of its own if the box is in use."""
        if editing not in self.conversation.texts:
            editing = None
        if not (self._text.value or self._name.value or self._editing):
            self._fill(title, text, editing)
            return
        name = markup.isolated(editing or title.strip() or f"“{short(' '.join(text.split()), 41)}”")
        note = f"not added: {name} ({len(text):,} characters): {reason}"
        put_back = W.Button(description="Put back", icon="undo", tooltip="put this text into the box again")
        discard = W.Button(description="Discard", icon="trash", tooltip="forget this text")
        line = wrapped([_line(render_view("kept", markup.escape(note))), put_back, discard])

        def drop(_: Any = None) -> None:
            self._kept.take_out(line)

        def restore(_: Any) -> None:
            with self.work.lock:
                if self._text.value or self._name.value or self._editing:
                    self.work.tell("The box holds another text: add it, or empty it first.", key="kept")
                else:
                    self.work.tell("", key="kept")
                    self._fill(title, text, editing if editing in self.conversation.texts else None)
                    drop()

        put_back.on_click(restore)
        discard.on_click(drop)
        self._kept.add(line)

    def _fill(self, title: str, text: str, editing: str | None) -> None:
        """Put a text into the box, to be added, or to replace that of document `editing`."""
        self._editing = editing
        with quietly():
            self._name.value, self._text.value, self._name.disabled = editing or title, text, editing is not None
        self._add.description = "Replace document" if editing else "Add document"
        self._cancel.layout.display = None if editing else "none"

    def _begin_edit(self, document: str) -> None:
        with self.work.lock:
            if self._editing is None:
                self._draft = self._name.value, self._text.value
            elif self._text.value != self.conversation.texts[self._editing]:
                message = (
                    f"The text of {self._editing!r} in the box is changed: replace the document, or cancel, first."
                )
                self.work.tell(message, key="kept")
                return
            self.work.tell("", key="kept")
            self._fill("", self.conversation.texts[document], document)

    def _end_edit(self) -> None:
        """Put back into the box what it held before the edit."""
        with self.work.lock:
            draft, self._draft = self._draft, ("", "")
            self.work.tell("", key="kept")
            self._fill(*draft, None)

    def _row(self, document: str) -> W.HBox:
        """The controls of a document that is inside."""
        weight = W.FloatSlider(
            description="Weight",
            value=1.0,
            min=-1.0,
            max=2.0,
            step=0.05,
            continuous_update=False,
            layout=W.Layout(max_width="100%"),
        )
        edit = W.Button(description="Edit", icon="pencil", tooltip=f"change the text of {document}")
        remove = W.Button(description="Remove", icon="trash", tooltip=f"take {document} out again")
        title = _line(render_view("name", markup.inline(document), document=document))
        line = wrapped([title, weight, edit, remove])

        def reweigh(change: dict) -> None:
            with self.work.lock:
                if document in self.conversation.weights:
                    self.conversation.weights[document] = change["new"]
                    self._refresh()

        def drop(_: Any) -> None:
            with self.work.lock:
                if document not in self.conversation.texts:  # a second click
                    return
                if self._editing == document:
                    if self._text.value == self.conversation.texts[document]:
                        self._end_edit()
                    else:  # a changed text stays, as a document to add
                        self._fill(document, self._text.value, None)
                self.work.tell("", key="add")
                self.conversation.remove(document)
                self._listed.take_out(line)
                self._refresh()

        listen(weight, reweigh)
        edit.on_click(lambda _: self._begin_edit(document))
        remove.on_click(drop)
        return line


def _is_of_answer(key: Any) -> bool:
    return isinstance(key, tuple) and key[0] == "answer"


def chat(
    model: Any = None,
    documents: str | Sequence[str] | Mapping[str, str] | None = None,
    question: str = "",
    background: bool | None = None,
    models: Mapping[str, Any] | None = None,
    examples: Mapping[str, Any] | None = None,
) -> Chat:
    """A page to paste documents and ask: the adapter beside the base model without and with the documents.

    Answers appear as they are written. A document that the base model cannot predict gets a warning with the reason.

        viewers.chat(models={"SmolLM2-135M, real text": "smollm2", "tiny, generated world": "tiny/qa"},
                     examples=viewers.bundled_examples())

    model: a DocToLoRA; `Conversation` says what is used of it. With `models` also a name of the menu, and None is its
        first.
    documents: as of `internalize`; internalized at once.
    question: asked at once, so that the page has something to show.
    background: whether work runs in a thread beside the page (see `page.Work`). None: what a person starts on it does.
    models: a menu, {name: what `d2l.load` takes, a model, or a function that gives one}. The model to begin with is
        loaded at once, others when they are chosen. Documents, weights and turns stay, and a turn names its model. If
        loading fails, the old model stays and the page says why. What was loaded is kept in memory.
    examples: a menu, {name: (text, [questions])}; see `bundled_examples`. The questions about what is inside become
        buttons.
    """
    return Chat(model, documents, question, background, models, examples)


def _strength(label: str) -> W.FloatSlider:
    return W.FloatSlider(
        description=label,
        value=1.0,
        min=0.0,
        max=2.0,
        step=0.05,
        continuous_update=False,
        style={"description_width": "initial"},
        layout=W.Layout(width="360px", max_width="100%"),
    )


def _line(page: str) -> W.HTML:
    """A text that begins a row of controls."""
    return W.HTML(page, layout=W.Layout(width="auto", min_width="120px", flex="1 1 160px"))
