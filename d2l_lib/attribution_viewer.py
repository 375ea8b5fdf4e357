"""See where an answer came from: its document shaded by what each sentence contributes, and the answer without it.

    Trace (documents, question, answer; tables of `attribution`; answers without some sentences)  ->  pages

Renderers are pure functions from tables to HTML, all of whose text is escaped. The viewer is a set of widgets around
them; every sentence is a checkbox, so a click or the space key takes it out of the adapter and puts it back. A saved
page holds the same without kernel and without scripts: its choices are radio buttons, its answers made beforehand.
"""

from __future__ import annotations

import html
import math
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets as W
import pandas as pd

from d2l_lib import attribution
from d2l_lib.attribution import METHODS, document_texts, sentence_units
from d2l_lib.records import write_atomic
from d2l_lib.viewers import CSS as VIEW_CSS
from d2l_lib.viewers import Viewer, attempt, render_view

Evidence = Iterable[tuple[int, int]] | Mapping[str, Iterable[tuple[int, int]]]

SUPPORTS, OPPOSES = (67, 147, 195), (224, 120, 86)  # colours of the largest contribution of either sign
LEAST_LIMIT = 0.1  # nats: where all contributions are smaller, colours stay pale
SHOWN_UNITS = 8
SENTENCES_AT_ONCE = 200  # more are shown in parts
TRACED_SENTENCES = 100  # with more of them a viewer begins with chunks, which cost no hypernetwork pass
SAVED_VIEWS = (
    ("sentence", "leave_one_out"),
    ("sentence", "gradient"),
    ("chunk", "leave_one_out"),
    ("layer", "leave_one_out"),
    ("rank", "leave_one_out"),
)
MEASURES = {
    "relevance": "nats of relevance at the answer's first token (see routing)",
    "random": "random numbers, a control: no unit",
}
MEASURE = "nats of log-probability of {what}"
CSS = """
.d2l-view .d2l-cells { width: auto; font-variant-numeric: tabular-nums; }
.d2l-view table.d2l-cells th, .d2l-view table.d2l-cells td { padding: 2px 8px; text-align: right; }
.d2l-view table.d2l-cells .d2l-left { text-align: left; max-width: 34em; overflow-wrap: anywhere; }
.d2l-view .d2l-shade { color: #000; border: 1px solid #e4e4e4; }
.d2l-view .d2l-legend { display: inline-block; width: 3.8em; text-align: center; color: #000; font-size: 11px; }
.d2l-view .d2l-side { display: flex; flex-wrap: wrap; gap: 4px 36px; align-items: flex-start; }
.d2l-view .d2l-changed { background: #ffe08a; color: #000; padding: 1px 4px; border-radius: 2px; }
.d2l-view .d2l-said { font-size: 15px; }
.d2l-sample { outline: 2px dashed #333; outline-offset: -1px; padding: 0 6px; color: #000; background: #fff; }
.d2l-sentences { max-height: 24em; overflow-y: auto; border: 1px solid #8886; border-radius: 4px; padding: 10px 12px; }
.d2l-sentences { background: #fff; color: #111; line-height: 2; font-size: 14px; margin: 4px 2px; }
.d2l-sentences.widget-box { display: block; }
.d2l-sentences .d2l-name { font-weight: 600; line-height: 1.5; color: #111; }
.d2l-sentences .widget-html, .d2l-sentences .widget-html-content { height: auto; line-height: 1.5; margin: 0; }
.d2l-sentences .widget-checkbox { display: inline; width: auto; height: auto; margin: 0; line-height: inherit; }
.d2l-sentences label { display: inline; cursor: pointer; position: relative; line-height: inherit; }
.d2l-sentences input { position: absolute; opacity: 0; width: 1px; height: 1px; margin: 0; }
.d2l-sentences label > span { white-space: pre-wrap; overflow-wrap: anywhere; padding: 2px 0; color: #111; }
.d2l-sentences label > span { -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.d2l-sentences sup { font-size: 10px; line-height: 1; padding: 0 4px 0 2px; }
.d2l-sentences label > span:hover { text-decoration: underline dotted; }
.d2l-sentences label > span::after { font-size: 10px; vertical-align: super; color: #111; padding: 0 5px 0 2px; }
.d2l-sentences .d2l-true > label > span, .d2l-sentences label.d2l-true > span { outline: 2px dashed #333; }
.d2l-sentences input:focus-visible + span { box-shadow: 0 0 0 3px #0b57d0; border-radius: 2px; }
.d2l-sentences .widget-checkbox input:not(:checked) + span { text-decoration: line-through; opacity: 0.5; }
"""


# --- what there is to see -----------------------------------------------------------------------------------------


class Trace:
    """Documents inside an adapter, a question, and what there is to know of its answer. No widgets and no HTML.

    model: a DocToLoRA, or anything with its `answer`, `internalize_each` and `encoder_tokenizer`; its own current
    adapter stays what it was. answer: the text to explain (None: the model's own). evidence: the (start, end) spans of
    the true evidence in characters; {document: spans} where there are several documents. wrong: the adapter of another
    document, as a control. attribute: what makes the tables, called as `attribution.attribute`.

    Attributes: `texts` {document: text}, `units` (the table of `attribution.sentence_units`), `true` (numbers of the
    sentences that hold evidence), `said` (what the model answers), `answer` (what is explained).
    """

    def __init__(
        self,
        model: Any,
        adapter: Any,
        documents: str | Mapping[str, str],
        question: str,
        answer: str | None = None,
        evidence: Evidence = (),
        *,
        wrong: Any = None,
        attribute: Callable[..., pd.DataFrame] | None = None,
    ):
        if not hasattr(adapter, "blocks"):
            raise TypeError(f"pass the adapter that model.internalize returned, not {type(adapter).__name__}")
        self.model, self.adapter, self.question, self.wrong = model, adapter, question, wrong
        self.attribute = attribution.attribute if attribute is None else attribute
        self.texts = document_texts(adapter, documents)
        self.units = sentence_units(adapter, documents)
        self.true = true_sentences(self.units, self.texts, evidence)
        self.said = model.answer(question, adapter)
        self.answer = self.said if answer is None else answer
        self._tables: dict[tuple[str, str], pd.DataFrame] = {}
        self._answers = {frozenset(): self.said}

    def table(self, level: str, method: str) -> pd.DataFrame:
        """`attribution.attribute` of this answer; made once."""
        if (level, method) not in self._tables:
            self._tables[level, method] = self.attribute(
                *(self.model, self.adapter, self.question, self.answer, level, method),
                documents=self.texts,
                wrong=self.wrong,
            )
        return self._tables[level, method]

    def adapter_without(self, removed: Collection[int]) -> Any:
        """The adapter as if these sentences (numbers of `units`) did not stand in their chunks.

        A chunk of which nothing is left is dropped, which needs no model; others are written anew from what is left.
        """
        blocks, gone = [], self.units.loc[sorted(removed)]
        for number, block in enumerate(self.adapter.blocks):
            inside = gone[gone["block"] == number]
            blocks += self._shortened(block, inside) if len(inside) else [block]
        return replace(self.adapter, blocks=tuple(blocks))

    def _shortened(self, block: Any, gone: pd.DataFrame) -> list:
        text, place, kept = self.texts[block.document], block.span[0], ""
        for start, end in zip(gone["start"], gone["end"], strict=True):
            kept += text[place:start]
            place = end
        kept = (kept + text[place : block.span[1]]).strip()
        if not kept:
            return []
        # as long as the whole chunk: what is left of it then stays one chunk
        whole = self.model.encoder_tokenizer([text[slice(*block.span)]], add_special_tokens=False)["input_ids"][0]
        [written] = self.model.internalize_each([kept], chunk_tokens=max(self.model.chunk_tokens, len(whole)))
        return [replace(block, A=new.A, B=new.B) for new in written.blocks]

    def answer_without(self, removed: Collection[int]) -> str:
        """What the model answers once these sentences are out of the adapter."""
        key = frozenset(removed)
        if key not in self._answers:
            self._answers[key] = self.model.answer(self.question, self.adapter_without(key))
        return self._answers[key]


def true_sentences(units: pd.DataFrame, texts: Mapping[str, str], evidence: Evidence) -> set[int]:
    """Numbers of the sentences that share a character with the evidence.

    evidence: (start, end) spans in the one document, or {document: spans}. ValueError for a span outside it, for an
    unknown document, and for spans that do not say which of several documents they are in.
    """
    if not isinstance(evidence, Mapping):
        evidence = list(evidence)
        if evidence and len(texts) > 1:
            raise ValueError(f"evidence needs the document's name: pass {{name: spans}}; there are {', '.join(texts)}")
        evidence = dict.fromkeys(texts, evidence) if evidence else {}
    found = set()
    for name, spans in evidence.items():
        if name not in texts:
            raise ValueError(f"evidence is in {name!r}, but the documents are {', '.join(texts)}")
        for span in spans:
            try:
                start, end = map(int, span)
            except (TypeError, ValueError) as error:
                raise ValueError(f"evidence must be (start, end) pairs of characters, not {span!r}") from error
            if not 0 <= start < end <= len(texts[name]):
                raise ValueError(f"evidence {start} to {end} is not inside {name!r} of {len(texts[name])} characters")
            inside = (units["document"] == name) & (units["start"] < end) & (units["end"] > start)
            found |= set(units.index[inside.to_numpy(dtype=bool)])
    return found


def contributions(table: pd.DataFrame, token: int | None = None) -> list[float]:
    """Of each row: to the whole answer (None), or to its token of this number."""
    if token is None:
        return [float(value) for value in table["contribution"]]
    return [float(values[token]) for values in table["by_token"]]


def has_tokens(table: pd.DataFrame) -> bool:
    """True where the method tells the answer's tokens apart."""
    return all(not math.isnan(value) for values in table["by_token"] for value in values)


def sentence_values(units: pd.DataFrame, table: pd.DataFrame, token: int | None = None) -> list[float]:
    """The contribution of each sentence, or of the chunk that holds it; NaN at the levels that have no place in a text.

    units: the sentences, as `attribution.sentence_units` gives them.
    """
    places = {"sentence": ("document", "start", "end"), "chunk": ("document", "chunk")}.get(table.attrs["level"])
    if places is None:
        return [math.nan] * len(units)
    keys = zip(*(table[name] for name in places), strict=True)
    values = dict(zip(keys, contributions(table, token), strict=True))
    return [values.get(key, math.nan) for key in zip(*(units[name] for name in places), strict=True)]


# --- pure renderers -----------------------------------------------------------------------------------------------


def color_limit(values: Iterable[float]) -> float:
    """The contribution of the strongest colour: the largest size among the values, at least LEAST_LIMIT."""
    return max([LEAST_LIMIT, *(abs(value) for value in values if math.isfinite(value))])


def shade(value: float, limit: float) -> str:
    """A CSS colour: white at 0 to the full colour of its sign at `limit`; transparent where there is no value."""
    if not math.isfinite(value):
        return "transparent"
    share = min(1.0, abs(value) / limit)
    full = SUPPORTS if value > 0 else OPPOSES
    return f"rgb({', '.join(str(round(255 + (channel - 255) * share)) for channel in full)})"


def signed(value: float) -> str:
    """A contribution with its sign and two digits behind the point; one that is 0 to them has no sign."""
    if not math.isfinite(value):
        return "–"
    return f"{value:+.2f}".replace("-", "−") if _counts(value) else "0.00"


def _counts(value: float) -> bool:
    """False for what is 0 to two digits, and for no value."""
    return math.isfinite(value) and abs(value) >= 0.005


def measure(table: pd.DataFrame, token: int | None = None) -> str:
    """In words, what the contributions are measured in."""
    what = (
        "the whole answer" if token is None else f"answer token {token + 1}, {_visible(table.attrs['tokens'][token])}"
    )
    return MEASURES.get(table.attrs["method"], MEASURE.format(what=what))


def _visible(text: str) -> str:
    """A token's text in quotes, line ends and tabs as signs."""
    return "“" + text.replace("\n", "↵").replace("\r", "␍").replace("\t", "⇥") + "”"


def _cell(value: float, limit: float, title: str = "") -> str:
    """A table cell of a contribution."""
    note = f' title="{html.escape(title)}"' if title else ""
    return f'<td class="d2l-shade" style="background: {shade(value, limit)}"{note}>{signed(value)}</td>'


def render_legend(limit: float, unit: str, evidence: bool = False) -> str:
    """The colours with their values and what these are measured in; `evidence`: explains the outline too."""
    steps = [limit * step / 4 for step in range(-4, 5)]
    cells = "".join(
        f'<span class="d2l-legend" style="background: {shade(step, limit)}">{signed(step)}</span>' for step in steps
    )
    outline = ' · <span class="d2l-sample">dashed outline</span> true evidence' if evidence else ""
    return (
        f'<div>opposes {cells} supports{outline}</div><div class="d2l-note">contribution in {html.escape(unit)}</div>'
    )


def sentence_style(scope: str, values: Sequence[float], show: Sequence[bool]) -> str:
    """CSS rules that shade the sentences `.d2l-unit-<number>` under the selector `scope`.

    show: after which sentences their contribution is written, unless it is 0.00.
    """
    limit = color_limit(values)
    rules = []
    for number, (value, shown) in enumerate(zip(values, show, strict=True)):
        span = f"{scope} .d2l-unit-{number} span"
        if math.isfinite(value):
            rules.append(f"{span} {{ background: {shade(value, limit)}; }}")
            if shown and _counts(value):
                rules.append(f'{span}::after {{ content: "{signed(value)}"; }}')
    return "\n".join(rules)


def last_of_unit(units: pd.DataFrame, level: str) -> list[bool]:
    """After which sentences a number belongs: all of them, or the last one of each chunk."""
    if level != "chunk":
        return [level == "sentence"] * len(units)
    blocks = list(units["block"])
    return [number + 1 == len(blocks) or blocks[number + 1] != block for number, block in enumerate(blocks)]


def pieces(units: pd.DataFrame, texts: Mapping[str, str]) -> list[tuple[str, str]]:
    """(text of a sentence, what stands between it and the next one) of each sentence; "[…]" for text not inside."""
    starts, documents = [*units["start"]], [*units["document"]]
    found = []
    for number, (start, end, document) in enumerate(zip(starts, units["end"], documents, strict=True)):
        follows = number + 1 < len(starts) and documents[number + 1] == document and starts[number + 1] >= end
        between = texts[document][end : starts[number + 1] if follows else None]
        if missing := between.strip():
            before, _, after = between.partition(missing)
            between = f"{before or ' '}[…]{after or ' '}"
        found.append((texts[document][start:end], between))
    return found


def render_sentences(
    units: pd.DataFrame, texts: Mapping[str, str], values: Sequence[float], true: Collection[int], show: Sequence[bool]
) -> str:
    """The documents as text, every sentence shaded by its value, with it in small print unless it is 0.00; evidence
    outlined.
    """
    limit, parts, before = color_limit(values), [], None
    several = len(set(units["document"])) > 1
    rows = zip(units["document"], pieces(units, texts), values, show, strict=True)
    for number, (document, (sentence, between), value, shown) in enumerate(rows):
        if several and document != before:
            parts.append(f'<div class="d2l-name">{html.escape(document)}</div>')
        before = document
        note = f"<sup>{signed(value)}</sup>" if shown and _counts(value) else ""
        outline = "outline: 2px dashed #333; " if number in true else ""
        kind = "d2l-sentence d2l-true" if number in true else "d2l-sentence"
        parts.append(
            f'<span class="{kind}" data-sentence="{number}" style="{outline}background: {shade(value, limit)}">'
            f"{html.escape(sentence)}{note}</span>{html.escape(between)}"
        )
    return f'<div class="d2l-sentences d2l-text" tabindex="0">{"".join(parts)}</div>'


def render_heat_map(table: pd.DataFrame, token: int | None = None) -> str:
    """Layers by rank directions (one table for each module), or layers by modules; nothing at the other levels."""
    level = table.attrs["level"]
    if level not in ("layer", "rank"):
        return ""
    values = contributions(table, token)
    limit = color_limit(values)
    by_rank = level == "rank"
    maps: dict[str, dict[tuple, tuple[float, str]]] = {}
    rows = zip(table["module"], table["layer"], table["direction"], table["unit"], values, strict=True)
    for module, layer, direction, unit, value in rows:
        column = int(direction) if by_rank else str(module)
        maps.setdefault(str(module) if by_rank else "", {})[int(layer), column] = (value, str(unit))
    tables = []
    for module, cells in maps.items():
        layers, columns = sorted({layer for layer, _ in cells}), sorted({column for _, column in cells})
        head = "".join(f"<th>{html.escape(str(column))}</th>" for column in columns)
        body = ""
        for layer in layers:
            line = "".join(
                _cell(cells[layer, column][0], limit, f"{cells[layer, column][1]}: {signed(cells[layer, column][0])}")
                if (layer, column) in cells
                else "<td></td>"
                for column in columns
            )
            body += f"<tr><th>{layer}</th>{line}</tr>"
        across = f"rank direction of {html.escape(module)}, strongest first" if by_rank else "module"
        tables.append(
            f'<table class="d2l-cells d2l-heat"><tr><th>layer</th><th class="d2l-left" colspan="{len(columns)}">'
            f"{across}</th></tr><tr><th></th>{head}</tr>{body}</table>"
        )
    unit = html.escape(measure(table, token))
    note = f'<div class="d2l-note">contribution in {unit}</div>'
    return f"<h4>Layer by {'rank' if by_rank else 'module'}</h4>{note}<div class='d2l-side'>{''.join(tables)}</div>"


def render_units(
    table: pd.DataFrame, texts: Mapping[str, str], token: int | None = None, n_shown: int = SHOWN_UNITS
) -> str:
    """The units that contribute most: to the answer (or to one of its tokens), and to each token beside it."""
    values = contributions(table, token)
    order = sorted(range(len(values)), key=lambda place: -values[place] if math.isfinite(values[place]) else math.inf)
    tokens = list(table.attrs["tokens"]) if has_tokens(table) else []
    by_token = [list(values) for values in table["by_token"]]
    limit = color_limit(values)
    token_limit = color_limit(value for row in by_token for value in row) if tokens else limit
    spans = [*zip(table["document"], table["start"], table["end"], strict=True)]
    rows = ""
    for place, row in enumerate(order[:n_shown], 1):
        text = _short(str(table["unit"].iloc[row]), 80)
        document, start, end = spans[row]
        if not pd.isna(start) and document in texts:
            text += ": " + _short(" ".join(texts[document][start:end].split()))
        line = "".join(_cell(float(by_token[row][column]), token_limit) for column in range(len(tokens)))
        rows += (
            f'<tr><td>{place}</td><td class="d2l-left d2l-text">{html.escape(text)}</td>{_cell(values[row], limit)}'
            f"<td>{signed(float(table['margin_contribution'].iloc[row]))}</td>{line}</tr>"
        )
    what = "answer" if token is None else f"token {token + 1}"
    first = f'<th></th><th class="d2l-left">{table.attrs["level"]}</th><th>{what}</th><th>margin (logits)</th>'
    head = "".join(f"<th>{html.escape(_visible(text))}</th>" for text in tokens)
    note = f"The {min(n_shown, len(order))} of {len(order)} that support it most"
    more = ", and their contribution to each answer token" if tokens else "; this method does not tell tokens apart"
    return (
        f"<h4>{note}</h4>"
        f'<div class="d2l-note">in {html.escape(measure(table, token))}{more}</div>'
        f'<table class="d2l-cells d2l-units"><tr>{first}{head}</tr>{rows}</table>'
    )


def _short(text: str, length: int = 160) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def render_controls(table: pd.DataFrame) -> str:
    """The answer with all blocks beside the controls: zero adapter, wrong document, random units left out."""
    controls = table.attrs.get("controls")
    if not controls:
        return "<h4>Controls</h4>none were computed"
    rows = ""
    for name in ("all blocks", "zero adapter", "wrong document"):
        reading = controls.get(name)
        cells = (
            f"<td>{_number(reading['log_prob'])}</td><td>{100 * reading['probability']:.1f} %</td>"
            f"<td>{signed(reading['margin'])}</td>"
            if reading
            else '<td colspan="3" class="d2l-left d2l-note">not given</td>'
        )
        rows += f'<tr><th class="d2l-left">{name}</th>{cells}</tr>'
    names = ("log-probability (nats)", "probability", "margin (logits)")
    head = "".join(f"<th>{name}</th>" for name in names)
    random = controls.get("random units")
    note = ""
    if random:
        n = len(random["units"])
        note = (
            f'<div class="d2l-note">{n} random unit{"" if n == 1 else "s"} left out, each alone: '
            f"{signed(random['contribution'])} nats on average, {signed(random['largest'])} at most</div>"
        )
    return f'<h4>Controls</h4><table class="d2l-cells d2l-controls"><tr><th></th>{head}</tr>{rows}</table>{note}'


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−") if math.isfinite(value) else "–"


def render_answer(question: str, answer: str, said: str, now: str, n_removed: int) -> str:
    """The question, what is explained, and what the model says with everything inside and with sentences removed."""
    changed = now != said
    if n_removed:
        count = f"{n_removed} sentence{'' if n_removed == 1 else 's'}"
        label = f"Answer now, without {count} ({'changed' if changed else 'the same'})"
    else:
        label = "Answer now, nothing removed"
    text = html.escape(now) or '<span class="d2l-note">(empty)</span>'
    explained = "" if answer == said else f"<h4>Answer that is explained</h4>{html.escape(answer)}"
    body = (
        f'<h4>Question</h4><div class="d2l-text d2l-question">{html.escape(question)}</div>'
        f'<div class="d2l-side"><div><h4>Answer with the whole document inside</h4>'
        f'<div class="d2l-text d2l-whole d2l-said">{html.escape(said)}</div></div>'
        f'<div aria-live="polite"><h4>{label}</h4>'
        f'<div class="d2l-text d2l-now d2l-said"><span class="{"d2l-changed" if changed else ""}">{text}</span></div>'
        f'</div><div class="d2l-text d2l-explained">{explained}</div></div>'
    )
    return render_view("trace-answer", body, removed=n_removed, changed=str(changed).lower(), now=now)


def render_parts(table: pd.DataFrame, texts: Mapping[str, str], token: int | None = None) -> str:
    """All that stands below the documents: heat map, units, controls."""
    body = (
        f"{render_heat_map(table, token)}{render_units(table, texts, token)}<div class='d2l-side'>"
        f"<div>{render_controls(table)}</div></div>"
    )
    data = {name: table.attrs[name] for name in ("level", "method")}
    return f"<style>{CSS}</style>" + render_view(
        "trace", body, **data, token="whole" if token is None else token, units=len(table)
    )


def render_trace(trace: Trace, level: str, method: str, token: int | None = None) -> str:
    """The whole as one plain page: answer, shaded documents, heat map, strongest units, controls."""
    table = trace.table(level, method)
    values = sentence_values(trace.units, table, token)
    shaded = any(map(math.isfinite, values))
    legend = render_legend(
        color_limit(values if shaded else contributions(table, token)), measure(table, token), bool(trace.true)
    )
    shown = last_of_unit(trace.units, level)
    text = render_sentences(trace.units, trace.texts, values, trace.true, shown)
    heading = f"<h4>Documents, shaded by {html.escape(level)} ({html.escape(method.replace('_', ' '))})</h4>"
    page = render_view("trace-text", heading + legend + text, level=level, method=method)
    answer = render_answer(trace.question, trace.answer, trace.said, trace.said, 0)
    return f"<style>{CSS}</style>{answer}{page}{render_parts(table, trace.texts, token)}"


# --- the viewer -----------------------------------------------------------------------------------------------------


def view_attribution(
    model: Any,
    adapter: Any,
    documents: str | Mapping[str, str],
    question: str,
    answer: str | None = None,
    evidence: Evidence = (),
    *,
    wrong: Any = None,
    attribute: Callable[..., pd.DataFrame] | None = None,
) -> Viewer:
    """A viewer of where an answer came from (arguments as of `Trace`), by chunk, sentence, layer or rank direction.

    A click on a sentence takes it out of the adapter and asks again; another puts it back. What cannot be done is told
    on the page. Keys: Tab moves between controls and sentences, space presses a button or takes a sentence out and
    puts it back, the arrow keys change a list, Enter in a field applies it.
    """
    scope, late = f"d2l-trace-{uuid.uuid4().hex[:8]}", {"continuous_update": False}
    wide = W.Layout(width="46%", min_width="320px")
    asked = W.Text(description="Question", value=str(question), layout=wide, **late)
    explained = W.Text(description="Answer", placeholder="the model's own answer", layout=wide, **late)
    explained.value = "" if answer is None else str(answer)
    level, method, part = (W.Dropdown(description=name) for name in ("Level", "Method", "Sentences"))
    level.options = list(METHODS)
    tokens = W.ToggleButtons(description="Explain", style=W.ToggleButtonsStyle(button_width="auto"))
    restore = W.Button(description="Restore all", icon="undo", tooltip="put all sentences back")
    answers, legend, parts, status = W.HTML(), W.HTML(), W.HTML(), W.HTML()
    sentences = W.Box()
    sentences.add_class("d2l-sentences")
    sentences.add_class(scope)
    trace: Trace | None = None
    boxes: dict[int, W.Checkbox] = {}
    removed: set[int] = set()

    def quietly(widget: W.Widget, observer: Callable, **traits) -> None:
        """Sets a control without what follows when a person does."""
        widget.unobserve(observer, "value")
        for trait, value in traits.items():
            setattr(widget, trait, value)
        widget.observe(observer, "value")

    def show_answer() -> None:
        now = trace.answer_without(removed)
        answers.value = render_answer(trace.question, trace.answer, trace.said, now, len(removed))

    def draw(_=None) -> None:
        """Shades the sentences and draws what is below them, for this level, method and token."""

        def show() -> None:
            table = trace.table(level.value, method.value)
            texts = [_visible(text) for text in table.attrs["tokens"]] if has_tokens(table) else []
            choices = [("whole answer", -1), *((f"{i} {text}", i - 1) for i, text in enumerate(texts, 1))]
            if [*tokens.options] != choices:
                chosen = tokens.value if tokens.value is not None and tokens.value < len(texts) else -1
                quietly(tokens, draw, options=choices, value=chosen)
            token = None if tokens.value < 0 else tokens.value
            values = sentence_values(trace.units, table, token)
            style = sentence_style(f".{scope}", values, last_of_unit(trace.units, level.value))
            shaded = any(map(math.isfinite, values))
            limit = color_limit(values if shaded else contributions(table, token))
            scale = render_legend(limit, measure(table, token), bool(trace.true))
            note = "" if shaded else f" The level {level.value} has no place in the text: see the map below."
            hint = f'<div class="d2l-note">Click a sentence to take it out, and again to put it back.{note}</div>'
            page = render_view("trace-legend", scale + hint, level=level.value, method=method.value)
            legend.value = f"<style>{CSS}{style}</style>{page}"
            parts.value = render_parts(table, trace.texts, token)

        if trace is not None and not attempt(status, show, "computing contributions ...", "ready"):
            legend.value = parts.value = ""

    def select_level(_=None) -> None:
        """The methods of this level; the one that is chosen stays if it has it."""
        names = METHODS[level.value]
        chosen = method.value if method.value in names else names[0]
        quietly(method, draw, options=[(name.replace("_", " "), name) for name in names], value=chosen)
        draw()

    def toggle(number: int) -> Callable:
        def change(event: dict) -> None:
            (removed.discard if event["new"] else removed.add)(number)
            if not attempt(status, show_answer, "answering ...", "ready"):
                answers.value = status.value  # never an answer that does not belong to the sentences shown

        return change

    def fill(_=None) -> None:
        """A checkbox for each sentence of the part that is shown."""
        boxes.clear()
        children, before = [], None
        if trace is not None and part.value is not None:
            several = len(set(trace.units["document"])) > 1
            texts = pieces(trace.units, trace.texts)
            for number in range(part.value, min(part.value + SENTENCES_AT_ONCE, len(texts))):
                name = trace.units["document"].iloc[number]
                if several and name != before:
                    children.append(W.HTML(f'<div class="d2l-name">{html.escape(name)}</div>'))
                before = name
                # labels are typeset: between two dollar signs would be mathematics, so the wide sign stands for it
                label = "".join(texts[number]).replace("$", "\uff04")
                box = W.Checkbox(value=number not in removed, description=label, indent=False)
                for css in (f"d2l-unit-{number}", *(["d2l-true"] if number in trace.true else [])):
                    box.add_class(css)
                box.observe(toggle(number), "value")
                boxes[number] = box
                children.append(box)
        sentences.children = children

    def put_back(_=None) -> None:
        removed.clear()
        if trace is not None:
            fill()
            attempt(status, show_answer, done="ready")

    def ask(_=None) -> None:
        """Another question or answer: everything anew, all sentences inside."""
        nonlocal trace
        trace = None
        removed.clear()
        answers.value = legend.value = parts.value = ""

        def read() -> None:
            nonlocal trace, evidence
            evidence = evidence if isinstance(evidence, Mapping) else [*evidence]  # an iterator lasts for once
            given = (asked.value if asked.value != str(question) else question, explained.value.strip() or None)
            known = evidence if asked.value == str(question) else ()
            trace = Trace(model, adapter, documents, *given, known, wrong=wrong, attribute=attribute)

        if attempt(status, read, "answering ...", "ready"):
            starts = range(0, max(1, len(trace.units)), SENTENCES_AT_ONCE)
            ends = [min(start + SENTENCES_AT_ONCE, len(trace.units)) for start in starts]
            choices = [(f"{start + 1} to {end}", start) for start, end in zip(starts, ends, strict=True)]
            quietly(part, fill, options=choices, value=0)
            part.layout.display = "none" if len(choices) == 1 else None
            fill()
            attempt(status, show_answer, done="ready")
            if method.value is None:  # the first question
                few = len(trace.units) <= TRACED_SENTENCES
                quietly(level, select_level, value="sentence" if few else "chunk")
            select_level()
        else:
            sentences.children = ()

    observers = {asked: ask, explained: ask, level: select_level, method: draw, part: fill, tokens: draw}
    for control, observer in observers.items():
        control.observe(observer, "value")
    restore.on_click(put_back)
    ask()
    static = status.value
    if trace is not None and parts.value:
        static = render_trace(trace, level.value, method.value)
    row = W.Layout(flex_flow="row wrap", width="100%")
    return Viewer(
        [
            W.HBox([asked, explained], layout=row),
            answers,
            W.HBox([level, method, part, restore], layout=row),
            tokens,
            status,
            legend,
            sentences,
            parts,
        ],
        static,
    )


# --- the saved page ---------------------------------------------------------------------------------------------------

PAGE_CSS = """
body { margin: 0 auto; max-width: 1100px; padding: 16px; background: #fff; color: #111; font-family: sans-serif; }
h1 { font-size: 20px; margin: 4px 0; }
fieldset { border: 1px solid #8886; border-radius: 4px; margin: 8px 0; padding: 4px 10px; font-size: 13px; }
fieldset label { margin-right: 14px; white-space: nowrap; }
.d2l-choice { display: none; }
.d2l-saved .d2l-sentences input:checked + span { text-decoration: line-through; opacity: 0.5; }
.d2l-saved .d2l-sentences { white-space: pre-wrap; overflow-wrap: anywhere; max-height: none; }
"""


def save_html(
    path: str | Path,
    model: Any,
    adapter: Any,
    documents: str | Mapping[str, str],
    question: str,
    answer: str | None = None,
    evidence: Evidence = (),
    *,
    wrong: Any = None,
    attribute: Callable[..., pd.DataFrame] | None = None,
    views: Sequence[tuple[str, str]] = SAVED_VIEWS,
    removals: int = 50,
) -> Path:
    """Write what `view_attribution` shows as one HTML file, complete or not there at all.

    It needs no kernel, no network and no scripts: views (level, method), answer tokens and the sentence that is taken
    out are chosen by radio buttons. removals: for how many sentences, the largest contributions of the first view
    first, the answer without it is made beforehand (each costs an internalization of its chunk). Raises as
    `attribution.attribute` does.
    """
    if not views:
        raise ValueError("no views given: pass at least one (level, method)")
    trace = Trace(model, adapter, documents, question, answer, evidence, wrong=wrong, attribute=attribute)
    tables = [trace.table(*view) for view in views]
    values = sentence_values(trace.units, tables[0])
    order = sorted(range(len(values)), key=lambda place: -values[place] if math.isfinite(values[place]) else 0.0)
    without = {number: trace.answer_without({number}) for number in order[:removals]}
    page = render_page(trace, tables, without)
    return write_atomic(path, page.encode("utf-8", errors="replace"))


def render_page(trace: Trace, tables: Sequence[pd.DataFrame], without: Mapping[int, str]) -> str:
    """A whole HTML page. tables: one for each view; without: {sentence: the answer once it is taken out}."""
    rules, legends, panels = [], [], []
    for view, table in enumerate(tables):
        level, tokens = table.attrs["level"], table.attrs["tokens"] if has_tokens(table) else []
        for choice, token in enumerate([None, *range(len(tokens))]):
            # a method that does not tell tokens apart shows the whole answer whatever token is chosen
            scope = f".d2l-saved:has(#view-{view}:checked)" + (f":has(#token-{choice}:checked)" if tokens else "")
            values = sentence_values(trace.units, table, token)
            shaded = any(map(math.isfinite, values))
            limit = color_limit(values if shaded else contributions(table, token))
            note = "" if shaded else f'<div class="d2l-note">The level {level} has no place in the text.</div>'
            scale = render_legend(limit, measure(table, token), bool(trace.true)) + note
            rules.append(sentence_style(scope, values, last_of_unit(trace.units, level)))
            rules.append(f"{scope} .d2l-choice-{view}-{choice} {{ display: block; }}")
            legends.append(f'<div class="d2l-choice d2l-choice-{view}-{choice}">{scale}</div>')
            body = render_heat_map(table, token) + render_units(table, trace.texts, token) + render_controls(table)
            panels.append(f'<div class="d2l-choice d2l-choice-{view}-{choice}">{body}</div>')
    names = [f"{table.attrs['level']}, {table.attrs['method'].replace('_', ' ')}" for table in tables]
    tokens = ["whole answer", *map(_visible, tables[0].attrs["tokens"])]
    answers = [_saved_answer(trace, None, trace.said), *(_saved_answer(trace, *pair) for pair in without.items())]
    rules += [f".d2l-saved:has(#removed-{n}:checked) .d2l-now-{n} {{ display: block; }}" for n in ("none", *without)]
    keep = (
        '<label><input type="radio" name="removed" id="removed-none" checked> nothing taken out</label>'
        f"a click on a sentence takes it out (made beforehand for {len(without)} of {len(trace.units)} sentences)"
    )
    sentences, before = "", None
    several = len(set(trace.units["document"])) > 1
    rows = zip(trace.units["document"], pieces(trace.units, trace.texts), strict=True)
    for number, (document, (text, between)) in enumerate(rows):
        if several and document != before:
            sentences += f'<div class="d2l-name">{html.escape(document)}</div>'
        before = document
        kind = f"d2l-unit-{number}" + (" d2l-true" if number in trace.true else "")
        radio = f'<input type="radio" name="removed" id="removed-{number}">' if number in without else ""
        sentences += f'<label class="{kind}">{radio}<span>{html.escape(text)}</span></label>{html.escape(between)}'
    body = (
        f"<h1>Where the answer came from</h1>{''.join(answers)}"
        f"{_radios('Level and method', 'view', names)}{_radios('Explain', 'token', tokens)}"
        f"<fieldset><legend>Take out</legend>{keep}</fieldset>{''.join(legends)}"
        f'<div class="d2l-sentences">{sentences}</div>{"".join(panels)}'
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    style = "\n".join([VIEW_CSS, CSS, PAGE_CSS, *rules])
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>Where the answer came from</title><style>{style}</style></head>"
        f'<body><main class="d2l-view d2l-saved">{body}</main></body></html>\n'
    )


def _saved_answer(trace: Trace, number: int | None, now: str) -> str:
    page = render_answer(trace.question, trace.answer, trace.said, now, 0 if number is None else 1)
    return f'<div class="d2l-choice d2l-now-{"none" if number is None else number}">{page}</div>'


def _radios(legend: str, name: str, labels: Sequence[str]) -> str:
    choices = ""
    for i, text in enumerate(labels):
        button = f'<input type="radio" name="{name}" id="{name}-{i}"{"" if i else " checked"}>'
        choices += f"<label>{button} {html.escape(text)}</label> "
    return f"<fieldset><legend>{legend}</legend>{choices}</fieldset>"
