"""See where an answer came from: its document shaded by what each sentence contributes, and the answer without it.

    Trace (documents, question, answer; tables of `analysis.attribution`; answers without some sentences)  ->  pages

Renderers are pure functions from tables to HTML; they escape every text. The viewer puts widgets around them. Every
sentence is a checkbox: a click or the space key takes it out of the adapter or puts it back. A saved page holds the
same without kernel and scripts: its choices are radio buttons, its answers are made beforehand.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ipywidgets as W
import pandas as pd

from d2l_lib.analysis import attribution
from d2l_lib.analysis.attribution import METHODS, methods_of
from d2l_lib.analysis.options import chosen
from d2l_lib.analysis.trials import document_texts, sentence_units
from d2l_lib.documents import sentence_number
from d2l_lib.formats import markup
from d2l_lib.formats.writing import write_atomic
from d2l_lib.views.page import CSS as VIEW_CSS
from d2l_lib.views.page import (
    Report,
    Viewer,
    Work,
    listen,
    plural,
    quietly,
    render_message,
    render_view,
    short,
    visible,
    wrapped,
)

_Evidence = Iterable[tuple[int, int]] | Mapping[str, Iterable[tuple[int, int]]]

SUPPORTS, OPPOSES = (67, 147, 195), (224, 120, 86)  # colours of the largest contribution of either sign
LEAST_LIMIT = 0.1  # nats: where all contributions are smaller, colours stay pale
_SHOWN_UNITS = 8
_LEAST_SHOWN = 0.005  # of a contribution, which would read 0.00
_COLUMNS_AT_ONCE = 8  # of numbers, beside the unit; the others are scrolled to
_LONGEST_TOKEN = 24  # characters
_WHOLE = ("whole answer", -1)
_SENTENCES_AT_ONCE = 200  # more are shown in parts
_TRACED_SENTENCES = 100  # with more of them a viewer begins with chunks, which cost no hypernetwork pass
_SAVED_VIEWS = (
    ("sentence", "leave_one_out"),
    ("sentence", "gradient"),
    ("sentence", "attended"),
    ("chunk", "leave_one_out"),
    ("layer", "leave_one_out"),
    ("rank", "leave_one_out"),
)
_MEASURES = {
    "relevance": "nats of relevance at the answer's first token (see routing)",
    "attended": "attention of {what} (1 for each token; what was read, no proof)",
    "random": "random numbers, a control: no unit",
}
_MEASURE = "nats of log-probability of {what}"
CSS = """
.d2l-view .d2l-cells { width: auto; font-variant-numeric: tabular-nums; }
.d2l-view table.d2l-cells th, .d2l-view table.d2l-cells td { padding: 2px 8px; text-align: right; }
.d2l-view table.d2l-cells th, .d2l-view table.d2l-cells td { min-width: 3em; overflow-wrap: normal; }
.d2l-view table.d2l-cells td { white-space: nowrap; }
.d2l-view table.d2l-cells .d2l-left { text-align: left; max-width: 34em; overflow-wrap: anywhere; }
.d2l-view table.d2l-cells td.d2l-left { white-space: pre-wrap; }
.d2l-view .d2l-scroll { overflow-x: auto; max-width: 100%; padding-bottom: 4px; }
.d2l-view table.d2l-units { border-collapse: separate; border-spacing: 0; }
.d2l-view table.d2l-units th { vertical-align: bottom; }
.d2l-view table.d2l-units .d2l-left { min-width: 16em; max-width: 16em; position: sticky; left: 0; z-index: 1; }
.d2l-view table.d2l-units .d2l-left { background: var(--jp-layout-color1, #fff); border-right: 1px solid #8886; }
.d2l-view table.d2l-units .d2l-left { color: var(--jp-ui-font-color1, #111); }
.d2l-view table.d2l-units .d2l-token-column { box-sizing: border-box; min-width: 5.8em; max-width: 5.8em; }
.d2l-view table.d2l-units td[style]:not(.d2l-shade) { padding: 2px 4px; }
.d2l-view table.d2l-units .d2l-token-column { padding: 2px 4px; overflow-wrap: anywhere; font-weight: normal; }
.d2l-view td.d2l-shade, .d2l-view .d2l-heat td[style], .d2l-view .d2l-units td[style] { color: #000; }
.d2l-view td.d2l-shade, .d2l-view .d2l-heat td[style], .d2l-view .d2l-units td[style] { border: 1px solid #e4e4e4; }
.d2l-view .d2l-legend { display: inline-block; min-width: 3.8em; padding: 0 2px; box-sizing: border-box; }
.d2l-view .d2l-legend { text-align: center; white-space: nowrap; color: #000; font-size: 11px; }
.d2l-view .d2l-side { display: flex; flex-wrap: wrap; gap: 4px 36px; align-items: flex-start; }
.d2l-view .d2l-side > * { max-width: 100%; min-width: 0; }
.d2l-view .d2l-changed { background: #ffe08a; color: #000; padding: 1px 4px; border-radius: 2px; }
.d2l-view .d2l-said { font-size: 15px; }
.d2l-sample { outline: 2px dashed #333; outline-offset: -1px; padding: 0 6px; color: #000; background: #fff; }
.d2l-sentences { max-height: 24em; overflow-y: auto; border: 1px solid #8886; border-radius: 4px; padding: 10px 12px; }
.d2l-sentences { max-width: 100%; box-sizing: border-box; }
.d2l-sentences { background: #fff; color: #111; line-height: 2; font-size: 14px; margin: 4px 2px; }
.d2l-sentences.widget-box { display: block; }
.d2l-sentences .d2l-name { font-weight: 600; line-height: 1.5; color: #111; overflow-wrap: anywhere; }
.d2l-sentences .widget-html, .d2l-sentences .widget-html-content { height: auto; line-height: 1.5; margin: 0; }
.d2l-sentences .widget-checkbox { counter-increment: d2l-sentence; }
.d2l-sentences .widget-checkbox { display: inline; width: auto; height: auto; margin: 0; line-height: inherit; }
.d2l-sentences label { display: inline; cursor: pointer; position: relative; line-height: inherit; }
.d2l-sentences input { position: absolute; opacity: 0; width: 1px; height: 1px; margin: 0; }
.d2l-sentences label > span { white-space: pre-wrap; overflow-wrap: anywhere; padding: 2px 0; color: #111; }
.d2l-sentences label > span, .d2l-sentences .d2l-sentence { unicode-bidi: isolate; }
.d2l-sentences label > span::before { content: counter(d2l-sentence); }
.d2l-sentences [data-sentence]::before { content: attr(data-sentence) !important; }
.d2l-sentences label > span::before, .d2l-sentences [data-sentence]::before { padding: 0 3px 0 1px; color: #111; }
.d2l-sentences label > span::before, .d2l-sentences [data-sentence]::before { font-size: 10px; }
.d2l-sentences label > span::before, .d2l-sentences [data-sentence]::before { vertical-align: super; line-height: 1; }
.d2l-sentences .d2l-marked-up label > span { pointer-events: none; }
.d2l-sentences label > span { background: var(--shade, transparent); }
.d2l-sentences label > span::after { content: var(--value, none); }
.d2l-sentences label > span { -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.d2l-sentences sup { font-size: 10px; line-height: 1; padding: 0 4px 0 2px; }
.d2l-sentences label:hover > span { text-decoration: underline dotted; }
.d2l-sentences label > span::after { font-size: 10px; vertical-align: super; color: #111; padding: 0 5px 0 2px; }
.d2l-sentences .d2l-true > label > span, .d2l-sentences label.d2l-true > span { outline: 2px dashed #333; }
.d2l-sentences input:focus-visible + span { box-shadow: 0 0 0 3px #0b57d0; border-radius: 2px; }
.d2l-sentences .widget-checkbox input:not(:checked) + span { text-decoration: line-through; opacity: 0.5; }
"""


# --- what there is to see -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What one can choose of a trace.

    wrong: the adapter of another document, a control.
    attribute: makes the tables; called as `analysis.attribution.attribute`.
    """

    wrong: Any = None
    attribute: Callable[..., pd.DataFrame] = attribution.attribute


@dataclass(frozen=True)
class ViewOptions(Options):
    """`Options`, and background: whether work runs in a thread (None: what a person starts on the page does)."""

    background: bool | None = None


@dataclass(frozen=True)
class PageOptions(Options):
    """`Options`, and what a saved page holds.

    views: the pairs (level, method) to choose from (None: those of the usual ones that the model has).
    removals: how many sentences can be taken out, those of largest contribution in the first view. Each costs an
        internalization of its chunk.
    """

    views: Sequence[tuple[str, str]] | None = None
    removals: int = 50


class Trace:
    """Documents inside an adapter, a question, and what there is to know of its answer. No widgets and no HTML.

    model: a DocToLoRA, or anything with its `answer`, `internalize_each` and `encoder_tokenizer`. Its current adapter
        stays what it was.
    answer: the text to explain (None: the model's own).
    evidence: the (start, end) spans of the true evidence in characters; {document: spans} for several documents.
    options: those of `Options`.

    Attributes:
        texts: {document: text}.
        units: the table of `sentence_units`.
        true: numbers of the sentences that hold evidence.
        said: what the model answers.
        answer: what is explained.
        methods: {level: names of its methods} for this model.
    """

    def __init__(
        self,
        model: Any,
        adapter: Any,
        documents: str | Mapping[str, str],
        question: str,
        answer: str | None = None,
        evidence: _Evidence = (),
        **options: Any,
    ):
        self.options = chosen(Options, "a trace", options)
        if not hasattr(adapter, "blocks"):
            raise TypeError(f"pass the adapter that model.internalize returned, not {type(adapter).__name__}")
        self.model, self.adapter, self.question = model, adapter, question
        self.texts = document_texts(adapter, documents)
        self.units = sentence_units(adapter, documents)
        self.true = true_sentences(self.units, self.texts, evidence)
        self.methods = methods_of(model)
        self.said = model.answer(question, adapter)
        self.answer = self.said if answer is None else answer
        self._tables: dict[tuple[str, str], pd.DataFrame] = {}
        self._answers = {frozenset(): self.said}

    def table(self, level: str, method: str, progress: Report | None = None) -> pd.DataFrame:
        """`attribution.attribute` of this answer; made once."""
        if (level, method) not in self._tables:
            traced = (self.model, self.adapter, self.question, self.answer, level, method)
            options = {"documents": self.texts, "wrong": self.options.wrong, "progress": progress}
            self._tables[level, method] = self.options.attribute(*traced, **options)
        return self._tables[level, method]

    def adapter_without(self, removed: Collection[int]) -> Any:
        """The adapter as if these sentences (numbers of `units`) did not stand in their chunks.

        Chunks are written anew without them. An empty chunk is dropped, which needs no model.
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
        return [replace(block, A=new.A, B=new.B) for new in written.in_layers(self.adapter.layers).blocks]

    def answer_without(self, removed: Collection[int]) -> str:
        """What the model answers once these sentences are out of the adapter."""
        key = frozenset(removed)
        if key not in self._answers:
            self._answers[key] = self.model.answer(self.question, self.adapter_without(key))
        return self._answers[key]


def true_sentences(units: pd.DataFrame, texts: Mapping[str, str], evidence: _Evidence) -> set[int]:
    """Numbers of the sentences that share a character with the evidence.

    evidence: (start, end) spans in the one document, or {document: spans}.

    ValueError for a span outside its document, an unknown document, or spans that name none of several documents.
    """
    if not isinstance(evidence, Mapping):
        evidence = list(evidence)
        if evidence and len(texts) > 1:
            raise ValueError(f"evidence needs the document's name: pass {{name: spans}}; there are {', '.join(texts)}")
        evidence = dict.fromkeys(texts, evidence) if evidence else {}
    numbers = set()
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
            numbers |= set(units.index[inside.to_numpy(dtype=bool)])
    return numbers


def contributions(table: pd.DataFrame, token: int | None = None) -> list[float]:
    """The contribution of each row to the whole answer (None), or to its token of this number."""
    if token is None:
        return [float(value) for value in table["contribution"]]
    return [float(values[token]) for values in table["by_token"]]


def has_tokens(table: pd.DataFrame) -> bool:
    """True where the method tells the answer's tokens apart."""
    return all(not math.isnan(value) for values in table["by_token"] for value in values)


def sentence_values(units: pd.DataFrame, table: pd.DataFrame, token: int | None = None) -> list[float]:
    """The contribution of each sentence, or of the chunk that holds it; NaN at levels without a place in the text.

    units: the sentences, from `attribution.sentence_units`.
    """
    places = {"sentence": ("document", "start", "end"), "chunk": ("document", "chunk")}.get(table.attrs["level"])
    if places is None:
        return [math.nan] * len(units)
    keys = zip(*(table[name] for name in places), strict=True)
    values = dict(zip(keys, contributions(table, token), strict=True))
    return [values.get(key, math.nan) for key in zip(*(units[name] for name in places), strict=True)]


# --- pure renderers -----------------------------------------------------------------------------------------------


def color_limit(values: Iterable[float]) -> float:
    """The contribution (nats) of the strongest colour: the largest absolute value, at least LEAST_LIMIT."""
    return max([LEAST_LIMIT, *(abs(value) for value in values if math.isfinite(value))])


def shade(value: float, limit: float) -> str:
    """A CSS colour: white at 0, the full colour of its sign at `limit`, transparent for NaN."""
    if not math.isfinite(value):
        return "transparent"
    share = min(1.0, abs(value) / limit)
    full = SUPPORTS if value > 0 else OPPOSES
    return f"rgb({', '.join(str(round(255 + (channel - 255) * share)) for channel in full)})"


def _signed(value: float) -> str:
    """A contribution with its sign and two decimals; "0.00" has no sign."""
    if not math.isfinite(value):
        return "–"
    return f"{value:+.2f}".replace("-", "−") if _counts(value) else "0.00"


def _counts(value: float) -> bool:
    """Whether a contribution is shown: False for NaN and for what rounds to 0.00."""
    return math.isfinite(value) and abs(value) >= 0.005


def measure(table: pd.DataFrame, token: int | None = None) -> str:
    """The unit of the contributions, in words."""
    if token is None:
        return _measure_of(table, "the whole answer")
    return _measure_of(table, f"answer token {token + 1}, {_visible(table.attrs['tokens'][token])}")


def _measure_of(table: pd.DataFrame, what: str) -> str:
    return _MEASURES.get(table.attrs["method"], _MEASURE).replace("{what}", what)


def _visible(text: str) -> str:
    """A token's text in quotes, line ends and tabs as signs; the beginning of a long one."""
    return f"“{short(visible(text), _LONGEST_TOKEN)}”"


def _cell(value: float, limit: float, title: str = "", css: str = "") -> str:
    """A table cell of a contribution."""
    note = f' title="{markup.escape(title)}"' if title else ""
    note += f' class="{css}"' if css else ""
    return f'<td style="background: {shade(value, limit)}"{note}>{_signed(value)}</td>'


def render_legend(limit: float, unit: str, evidence: bool = False) -> str:
    """The colours with their values and unit; with `evidence`, also the outline."""
    steps = [limit * step / 4 for step in range(-4, 5)]
    cells = "".join(
        f'<span class="d2l-legend" style="background: {shade(step, limit)}">{_signed(step)}</span>' for step in steps
    )
    outline = ' · <span class="d2l-sample">dashed outline</span> true evidence' if evidence else ""
    return (
        f'<div>opposes {cells} supports{outline}</div><div class="d2l-note">contribution in {markup.escape(unit)}</div>'
    )


def _shading(trace: Trace, table: pd.DataFrame, token: int | None) -> tuple[list[float], str, bool]:
    """(values of the sentences, legend, whether the level has a place in the text: else all values are NaN)."""
    values = sentence_values(trace.units, table, token)
    in_text = any(map(math.isfinite, values))
    limit = color_limit(values if in_text else contributions(table, token))
    return values, render_legend(limit, measure(table, token), bool(trace.true)), in_text


def sentence_style(values: Sequence[float], show: Sequence[bool]) -> str:
    """CSS rules that shade the sentences `.d2l-unit-<number>`, to nest in a rule that says where.

    show: the sentences whose contribution is written behind them, unless it is 0.00.
    """
    limit, rules = color_limit(values), []
    for number, (value, shown) in enumerate(zip(values, show, strict=True)):
        if math.isfinite(value):
            text = f' --value: "{_signed(value)}";' if shown and _counts(value) else ""
            rules.append(f".d2l-unit-{number} {{ --shade: {shade(value, limit)};{text} }}")
    return "\n".join(rules)


def last_of_unit(units: pd.DataFrame, level: str) -> list[bool]:
    """Which sentences have a number behind them: all, or the last one of each chunk."""
    if level != "chunk":
        return [level == "sentence"] * len(units)
    blocks = list(units["block"])
    return [number + 1 == len(blocks) or blocks[number + 1] != block for number, block in enumerate(blocks)]


def pieces(units: pd.DataFrame, texts: Mapping[str, str]) -> list[tuple[str, str]]:
    """For each sentence (its text, the text up to the next one); "[…]" for text that is not inside."""
    starts, documents = [*units["start"]], [*units["document"]]
    parts = []
    for number, (start, end, document) in enumerate(zip(starts, units["end"], documents, strict=True)):
        follows = number + 1 < len(starts) and documents[number + 1] == document and starts[number + 1] >= end
        between = texts[document][end : starts[number + 1] if follows else None]
        if missing := between.strip():
            before, _, after = between.partition(missing)
            between = f"{before or ' '}[…]{after or ' '}"
        parts.append((texts[document][start:end], between))
    return parts


def _headings(units: pd.DataFrame, first: int = 0) -> list[str]:
    """The heading above each sentence, or "".

    Of several documents, each name stands above its first sentence, and above sentence `first`, where the page begins.
    """
    documents = list(units["document"])
    if len(set(documents)) == 1:
        return [""] * len(documents)
    begins = [number == first or documents[number - 1] != name for number, name in enumerate(documents)]
    names = [f'<div class="d2l-name">{markup.inline(name)}</div>' for name in documents]
    return [name if is_first else "" for name, is_first in zip(names, begins, strict=True)]


def render_sentences(
    units: pd.DataFrame, texts: Mapping[str, str], values: Sequence[float], true: Collection[int], show: Sequence[bool]
) -> str:
    """The documents as text: sentences shaded by value, the value in small print unless 0.00, evidence outlined."""
    limit, parts = color_limit(values), []
    rows = zip(_headings(units), pieces(units, texts), values, show, strict=True)
    for number, (heading, (sentence, between), value, shown) in enumerate(rows):
        note = f"<sup>{_signed(value)}</sup>" if shown and _counts(value) else ""
        outline = "outline: 2px dashed #333; " if number in true else ""
        kind = "d2l-sentence d2l-true" if number in true else "d2l-sentence"
        parts.append(
            f'{heading}<span class="{kind}" data-sentence="{sentence_number(number)}" '
            f'style="{outline}background: {shade(value, limit)}">'
            f"{markup.inline(sentence)}{note}</span>{markup.escape(between)}"
        )
    return f'<div class="d2l-sentences d2l-text" tabindex="0">{"".join(parts)}</div>'


def render_heat_map(table: pd.DataFrame, token: int | None = None) -> str:
    """Layers by rank directions (a table per module), or layers by modules; "" at the other levels."""
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
        head = "".join(f"<th>{markup.escape(str(column))}</th>" for column in columns)
        body = ""
        for layer in layers:
            line = "".join(
                _cell(cells[layer, column][0], limit, f"{cells[layer, column][1]}: {_signed(cells[layer, column][0])}")
                if (layer, column) in cells
                else "<td></td>"
                for column in columns
            )
            body += f"<tr><th>{layer}</th>{line}</tr>"
        across = f"rank direction of {markup.escape(module)}, strongest first" if by_rank else "module"
        tables.append(
            '<div class="d2l-scroll"><table class="d2l-cells d2l-heat">'
            f'<tr><th>layer</th><th class="d2l-left" colspan="{len(columns)}">'
            f"{across}</th></tr><tr><th></th>{head}</tr>{body}</table></div>"
        )
    unit = markup.escape(measure(table, token))
    note = f'<div class="d2l-note">contribution in {unit}</div>'
    return f"<h4>Layer by {'rank' if by_rank else 'module'}</h4>{note}<div class='d2l-side'>{''.join(tables)}</div>"


def _strongest(table: pd.DataFrame, token: int | None) -> list[int]:
    """Row numbers of the units, the largest contribution first."""
    values = contributions(table, token)
    return sorted(range(len(values)), key=lambda row: -values[row] if math.isfinite(values[row]) else math.inf)


def _unit_name(table: pd.DataFrame, texts: Mapping[str, str], row: int) -> str:
    """The name of a unit, and how its text begins."""
    name, document, start, end = (table[column].iloc[row] for column in ("unit", "document", "start", "end"))
    if pd.isna(document):
        return markup.inline(short(str(name), 80))
    name = short(str(name), 80).replace(document, markup.isolated(document), 1)
    if pd.isna(start) or document not in texts:
        return markup.inline(name)
    return markup.inline(f"{name}: {short(' '.join(texts[document][start:end].split()), 160)}")


def _token_cells(table: pd.DataFrame) -> tuple[str, list[str]]:
    """(heads of columns: the answer's tokens; cells of each unit); empty if the method does not tell tokens apart."""
    if not has_tokens(table):
        return "", [""] * len(table)
    head = "".join(
        f'<th class="d2l-token-column">{number}<br>{markup.inline(_visible(text))}</th>'
        for number, text in enumerate(table.attrs["tokens"], 1)
    )
    limit = color_limit(value for values in table["by_token"] for value in values)
    return head, ["".join(_cell(float(value), limit) for value in values) for values in table["by_token"]]


def _aside(n_columns: int) -> str:
    """What a person has to do to see all columns."""
    return ": scroll the table sideways to see them all" if n_columns > _COLUMNS_AT_ONCE else ""


def _scrolled(rows: str) -> str:
    """A table of units that shows _COLUMNS_AT_ONCE columns at once and scrolls to the others."""
    width = f"max-width: min(100%, {16 + 5.8 * _COLUMNS_AT_ONCE + 2:g}em)"
    table = f'<table class="d2l-cells d2l-units">{rows}</table>'
    return f'<div class="d2l-scroll" tabindex="0" style="{width}">{table}</div>'


def render_units(
    table: pd.DataFrame, texts: Mapping[str, str], token: int | None = None, each_token: bool = True
) -> str:
    """The units that contribute most to the answer, or to one of its tokens; a line alone where none does.

    each_token: adds what each of them contributes to each token.

    Of many units, those that would read 0.00 are left out.
    """
    values, order = contributions(table, token), _strongest(table, token)
    counted = [row for row in order if not abs(values[row]) < _LEAST_SHOWN]
    order = (counted if len(order) > _SHOWN_UNITS else order)[:_SHOWN_UNITS]
    what = "answer" if token is None else f"token {token + 1}"
    if not counted:
        return f"<h4>None of {len(values)} contributes to it: the model would say it without what is inside.</h4>"
    limit = color_limit(values)
    head, cells = _token_cells(table) if each_token else ("", [""] * len(table))
    rows = ""
    for place, row in enumerate(order, 1):
        rows += (
            f'<tr><td class="d2l-left d2l-text">{place}. {_unit_name(table, texts, row)}</td>'
            f"{_cell(values[row], limit, css='d2l-shade')}"
            f"<td>{_signed(float(table['margin_contribution'].iloc[row]))}</td>{cells[row]}</tr>"
        )
    first = f'<th class="d2l-left">{table.attrs["level"]}</th><th>{what}</th><th>margin (logits)</th>'
    against = "; those below 0 speak against it" if any(values[row] < 0 for row in order) else ""
    note = f"The {len(order)} highest of {len(values)} contributions{against}"
    more = "" if has_tokens(table) else "; this method does not tell tokens apart"
    if head:
        n_tokens = len(table.attrs["tokens"])
        more = f", and their contribution to each of the {n_tokens} answer tokens{_aside(n_tokens + 2)}"
    return (
        f'<h4>{note}</h4><div class="d2l-note">in {markup.escape(measure(table, token))}{more}</div>'
        f"{_scrolled(f'<tr>{first}{head}</tr>{rows}')}"
    )


def _render_each_token(table: pd.DataFrame, texts: Mapping[str, str]) -> str:
    """The units among the strongest for any answer token, in their order, with their contribution to each token."""
    if not has_tokens(table):
        return ""
    n_tokens = len(table.attrs["tokens"])
    chosen = {row for token in (None, *range(n_tokens)) for row in _strongest(table, token)[:_SHOWN_UNITS]}
    head, cells = _token_cells(table)
    rows = "".join(
        f'<tr><td class="d2l-left d2l-text">{_unit_name(table, texts, row)}</td>{cells[row]}</tr>'
        for row in sorted(chosen)
    )
    head = f'<tr><th class="d2l-left">{table.attrs["level"]}</th>{head}</tr>'
    unit = markup.escape(_measure_of(table, f"each of the {n_tokens} answer tokens"))
    note = f'<div class="d2l-note">in {unit}{_aside(n_tokens)}</div>'
    return f"<h4>Token by token</h4>{note}{_scrolled(head + rows)}"


def render_controls(table: pd.DataFrame) -> str:
    """The answer with all blocks, beside the controls: zero adapter, wrong document, random units left out."""
    controls = table.attrs.get("controls")
    if not controls:
        return "<h4>Controls</h4>none were computed"
    rows = ""
    for name in ("all blocks", "zero adapter", "wrong document"):
        reading = controls.get(name)
        cells = (
            f"<td>{_number(reading['log_prob'])}</td><td>{100 * reading['probability']:.1f} %</td>"
            f"<td>{_signed(reading['margin'])}</td>"
            if reading
            else '<td colspan="3" class="d2l-left d2l-note">not given</td>'
        )
        rows += f'<tr><th class="d2l-left">{name}</th>{cells}</tr>'
    names = ("log-probability (nats)", "probability", "margin (logits)")
    head = "".join(f"<th>{name}</th>" for name in names)
    random = controls.get("random units")
    note = ""
    if random:
        note = (
            f'<div class="d2l-note">{plural(len(random["units"]), "random unit")} left out, each alone: '
            f"{_signed(random['contribution'])} nats on average, {_signed(random['largest'])} at most</div>"
        )
    return f'<h4>Controls</h4><table class="d2l-cells d2l-controls"><tr><th></th>{head}</tr>{rows}</table>{note}'


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−") if math.isfinite(value) else "–"


def _render_answer(question: str, answer: str, said: str, now: str, n_removed: int) -> str:
    """The question, the answer to explain, and the model's answers with all sentences and with some removed."""
    changed = now != said
    if n_removed:
        label = f"Answer now, without {plural(n_removed, 'sentence')} ({'changed' if changed else 'the same'})"
    else:
        label = "Answer now, nothing removed"
    text = markup.escape(now) or '<span class="d2l-note">(empty)</span>'
    explained = "" if answer == said else f"<h4>Answer that is explained</h4>{markup.escape(answer)}"
    body = (
        f'<h4>Question</h4><div class="d2l-text d2l-question">{markup.escape(question)}</div>'
        f'<div class="d2l-side"><div><h4>Answer with the whole document inside</h4>'
        f'<div class="d2l-text d2l-whole d2l-said">{markup.escape(said)}</div></div>'
        f'<div aria-live="polite"><h4>{label}</h4>'
        f'<div class="d2l-text d2l-now d2l-said"><span class="{"d2l-changed" if changed else ""}">{text}</span></div>'
        f'</div><div class="d2l-text d2l-explained">{explained}</div></div>'
    )
    return render_view("trace-answer", body, removed=n_removed, changed=str(changed).lower(), now=now)


def _render_parts(table: pd.DataFrame, texts: Mapping[str, str], token: int | None = None) -> str:
    """What stands below the documents: heat map, units, controls."""
    body = (
        f"{render_heat_map(table, token)}{render_units(table, texts, token)}<div class='d2l-side'>"
        f"<div>{render_controls(table)}</div></div>"
    )
    data = {name: table.attrs[name] for name in ("level", "method")}
    return render_view("trace", body, **data, token="whole" if token is None else token, units=len(table))


def render_trace(trace: Trace, level: str, method: str, token: int | None = None) -> str:
    """One plain page: answer, shaded documents, heat map, strongest units, controls."""
    table = trace.table(level, method)
    values, legend, _ = _shading(trace, table, token)
    shown = last_of_unit(trace.units, level)
    text = render_sentences(trace.units, trace.texts, values, trace.true, shown)
    heading = f"<h4>Documents, shaded by {markup.escape(level)} ({markup.escape(method.replace('_', ' '))})</h4>"
    page = render_view("trace-text", heading + legend + text, level=level, method=method)
    answer = _render_answer(trace.question, trace.answer, trace.said, trace.said, 0)
    return f"<style>{CSS}</style>{answer}{page}{_render_parts(table, trace.texts, token)}"


# --- the viewer -----------------------------------------------------------------------------------------------------


class _AttributionViewer(Viewer):
    """The page of `view_attribution`.

    A change during a computation counts: it is computed next, and work that it makes superfluous is left out.
    """

    def __init__(self, question: str, answer: str | None, make_trace: Callable[..., Trace], background: bool | None):
        """make_trace(question, answer or None, whether the question is the first one) -> Trace."""
        super().__init__([], "")
        self.work = Work(background)
        self._question, self._make_trace = question, make_trace
        self._scope = f"d2l-trace-{uuid.uuid4().hex[:8]}"
        self._trace: Trace | None = None
        self._table: pd.DataFrame | None = None  # what is drawn now
        self._removed: set[int] = set()
        self._make_controls(question, answer)
        self._ask()
        if self.work.was_interrupted:
            raise KeyboardInterrupt
        self._connect()
        drawn = self._trace is not None and self._parts.value
        self.static_html = (
            render_trace(self._trace, self._level.value, self._method.value) if drawn else self.work.status.value
        )

    def _make_controls(self, question: str, answer: str | None) -> None:
        late, wide = {"continuous_update": False}, W.Layout(flex="1 1 300px", width="auto", max_width="100%")
        self._asked = W.Text(description="Question", value=str(question), layout=wide, **late)
        self._explained = W.Text(description="Answer", placeholder="the model's own answer", layout=wide, **late)
        self._explained.value = "" if answer is None else str(answer)
        self._level, self._method, self._part = (
            W.Dropdown(description=name, layout=W.Layout(max_width="100%")) for name in ("Level", "Method", "Sentences")
        )
        self._level.options = list(METHODS)
        self._tokens = W.ToggleButtons(description="Explain", style=W.ToggleButtonsStyle(button_width="auto"))
        self._restore = W.Button(description="Restore all", icon="undo", tooltip="put all sentences back")
        self._answers, self._legend, self._parts = W.HTML(), W.HTML(), W.HTML()
        style = W.HTML(f"<style>{CSS}</style>", layout=W.Layout(display="none"))
        self._sentences = W.Box()
        for css in ("d2l-sentences", self._scope):
            self._sentences.add_class(css)
        self.children = [
            style,
            wrapped([self._asked, self._explained]),
            self._answers,
            wrapped([self._level, self._method, self._part, self._restore]),
            self._tokens,
            self.work.status,
            self.work.bar,
            self._legend,
            self._sentences,
            self._parts,
        ]

    def _connect(self) -> None:
        listen(self._asked, self._ask_anew)
        listen(self._explained, self._ask)
        listen(self._level, self._select_level)
        listen(self._method, self._compute)
        listen(self._part, self._fill)
        listen(self._tokens, self._draw)
        self._restore.on_click(self._put_back)

    # --- question and answer --------------------------------------------------------------------------------------

    def _ask_anew(self, _: Any) -> None:
        """Another question: explain the model's own answer to it."""
        with self.work.lock:
            with quietly():
                self._explained.value = ""
            self._ask()

    def _ask(self, _: Any = None) -> None:
        """Another question or answer: compute everything anew, with all sentences inside."""
        with self.work.lock:
            self._trace = self._table = None
            self._removed.clear()
            self._answers.value = self._legend.value = self._parts.value = ""
            self._sentences.children = ()
            with quietly():
                self._tokens.options = [_WHOLE]  # an empty list would leave the buttons on the page
            self.work.leave_out(lambda key: True)
            for key in ("answer", "table"):
                self.work.tell("", key=key)
            is_first, answer = self._asked.value == str(self._question), self._explained.value.strip() or None
            question = self._question if is_first else self._asked.value
            self.work.start(
                "answering ...", lambda _: self._make_trace(question, answer, is_first), self._traced, key="ask"
            )

    def _traced(self, trace: Trace) -> None:
        self._trace = trace
        starts = range(0, max(1, len(trace.units)), _SENTENCES_AT_ONCE)
        ends = [min(start + _SENTENCES_AT_ONCE, len(trace.units)) for start in starts]
        choices = [(f"{sentence_number(start)} to {end}", start) for start, end in zip(starts, ends, strict=True)]
        with quietly():
            if list(self._level.options) != list(trace.methods):
                self._level.options = list(trace.methods)
            self._part.options, self._part.value = choices, 0
            if self._method.value is None:  # the first question
                few = len(trace.units) <= _TRACED_SENTENCES
                self._level.value = "sentence" if few else "chunk"
        self._part.layout.display = "none" if len(choices) == 1 else None
        self._fill()
        self._show_answer(trace.said)
        self._select_level()

    def _show_answer(self, now: str) -> None:
        trace = self._trace
        self._answers.value = _render_answer(trace.question, trace.answer, trace.said, now, len(self._removed))

    # --- contributions --------------------------------------------------------------------------------------------

    def _select_level(self, _: Any = None) -> None:
        """Offer the methods of this level; the current method stays if it is one of them."""
        with self.work.lock:
            names = (METHODS if self._trace is None else self._trace.methods)[self._level.value]
            chosen = self._method.value if self._method.value in names else names[0]
            with quietly():
                self._method.options = [(name.replace("_", " "), name) for name in names]
                self._method.value = chosen
            self._compute()

    def _compute(self, _: Any = None) -> None:
        """Compute the table of this level and method, then draw it."""
        with self.work.lock:
            if self._trace is None:  # computed once there is an answer
                return
            trace, level, method = self._trace, self._level.value, self._method.value

            def show(table: pd.DataFrame) -> None:
                self._table = table
                self._draw()

            self.work.start(
                "computing contributions ...",
                lambda report: trace.table(level, method, report),
                show,
                self._blank,
                key="table",
                replaces=True,
                unit="steps",
            )

    def _blank(self, _: str) -> None:
        self._table = None
        self._legend.value = self._parts.value = ""

    def _draw(self, _: Any = None) -> None:
        """Shade the sentences and draw what is below them, for the chosen token."""
        with self.work.lock:
            trace, table = self._trace, self._table
            if table is None:
                return
            level, method = table.attrs["level"], table.attrs["method"]
            texts = [_visible(text) for text in table.attrs["tokens"]] if has_tokens(table) else []
            choices = [_WHOLE, *((f"{i} {text}", i - 1) for i, text in enumerate(texts, 1))]
            if [*self._tokens.options] != choices:
                chosen = self._tokens.value
                with quietly():
                    self._tokens.options = choices
                    self._tokens.value = chosen if chosen is not None and chosen < len(texts) else -1
            token = None if self._tokens.value < 0 else self._tokens.value
            values, scale, in_text = _shading(trace, table, token)
            style = sentence_style(values, last_of_unit(trace.units, level))
            note = "" if in_text else f" The level {level} has no place in the text: see the map below."
            hint = f'<div class="d2l-note">Click a sentence to take it out, and again to put it back.{note}</div>'
            page = render_view("trace-legend", scale + hint, level=level, method=method)
            style = f".{self._scope} {{ counter-reset: d2l-sentence {self._part.value};\n{style} }}"
            self._legend.value = f"<style>{style}</style>{page}"
            self._parts.value = _render_parts(table, trace.texts, token)

    # --- sentences ------------------------------------------------------------------------------------------------

    def _fill(self, change: Any = None) -> None:
        """Show a checkbox for each sentence of this part."""
        with self.work.lock:
            trace, children = self._trace, []
            if trace is None:
                return
            texts, headings = pieces(trace.units, trace.texts), _headings(trace.units, self._part.value)
            for number in range(self._part.value, min(self._part.value + _SENTENCES_AT_ONCE, len(texts))):
                children += [W.HTML(headings[number])] if headings[number] else []
                children.append(self._sentence(number, "".join(texts[number])))
            self._sentences.children = children
            if change is not None:
                self._draw()

    def _sentence(self, number: int, text: str) -> W.Checkbox:
        """The checkbox of a sentence. Labels are typeset: one with signs of formulas is HTML."""
        has_signs = "$" in text or "\\" in text
        label = markup.without_formulas(text) if has_signs else text.replace("\0", "\u2400")
        box = W.Checkbox(
            value=number not in self._removed, description=label, description_allow_html=has_signs, indent=False
        )
        kinds = {"d2l-true": number in self._trace.true, "d2l-marked-up": has_signs}
        for css in (f"d2l-unit-{number}", *(name for name, is_so in kinds.items() if is_so)):
            box.add_class(css)

        def change(event: Any) -> None:
            with self.work.lock:
                (self._removed.discard if event["new"] else self._removed.add)(number)
                self._answer()

        listen(box, change)
        return box

    def _answer(self) -> None:
        """Ask again without the sentences that are out now."""
        trace, removed = self._trace, frozenset(self._removed)

        def drop(reason: str) -> None:  # an answer always belongs to the sentences on the page
            self._answers.value = render_message(f"no answer without these sentences: {reason}", is_error=True)

        self.work.start(
            "answering ...",
            lambda _: trace.answer_without(removed),
            self._show_answer,
            drop,
            key="answer",
            replaces=True,
        )

    def _put_back(self, _: Any = None) -> None:
        with self.work.lock:
            if self._trace is None:
                if not self.work.has("ask"):  # stopped or failed
                    self._ask()
                return
            self._removed.clear()
            self._fill()
            self._answer()
            if self._table is None and not self.work.has("table"):
                self._compute()


def view_attribution(
    model: Any,
    adapter: Any,
    documents: str | Mapping[str, str],
    question: str,
    answer: str | None = None,
    evidence: _Evidence = (),
    **options: Any,
) -> Viewer:
    """A viewer of where an answer came from, by chunk, sentence, layer or rank direction.

    Arguments: as of `Trace`; `answer` counts for the first question only.
    options: those of `ViewOptions`.

    A click on a sentence takes it out of the adapter and asks again; another puts it back. The page tells its errors.
    Keys: Tab moves between controls and sentences, space presses a button or switches a sentence, the arrow keys
    change a list, Enter applies a field.
    """
    view = chosen(ViewOptions, "this viewer", options)
    known = evidence if isinstance(evidence, Mapping) or not isinstance(evidence, Iterable) else [*evidence]

    def make(asked: str, explained: str | None, is_first: bool) -> Trace:
        spans = known if is_first else ()
        return Trace(model, adapter, documents, asked, explained, spans, wrong=view.wrong, attribute=view.attribute)

    return _AttributionViewer(question, answer, make, view.background)


# --- the saved page ---------------------------------------------------------------------------------------------------

_PAGE_CSS = """
body { margin: 0 auto; max-width: 1100px; padding: 16px; background: #fff; color: #111; font-family: sans-serif; }
h1 { font-size: 20px; margin: 4px 0; }
fieldset { min-width: 0; }
fieldset { border: 1px solid #8886; border-radius: 4px; margin: 8px 0; padding: 4px 10px; font-size: 13px; }
fieldset label { margin-right: 14px; display: inline-block; max-width: 100%; overflow-wrap: anywhere; }
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
    evidence: _Evidence = (),
    **options: Any,
) -> Path:
    """Write what `view_attribution` shows as one HTML file, complete or not there at all.

    Arguments after `path`: as of `Trace`.
    options: those of `PageOptions`.

    The page needs no kernel, network or scripts. Radio buttons choose the view (level, method), the answer token and
    the sentence to take out. Fails as `attribution.attribute` does.
    """
    page = chosen(PageOptions, "a saved page", options)
    if page.views is not None and (not page.views or any(isinstance(view, str) for view in page.views)):
        raise ValueError(f"views must be a list of at least one pair (level, method), not {page.views!r}")
    trace = Trace(model, adapter, documents, question, answer, evidence, wrong=page.wrong, attribute=page.attribute)
    usual = [(level, method) for level, method in _SAVED_VIEWS if method in trace.methods.get(level, ())]
    tables = [trace.table(*view) for view in page.views or usual]
    values = sentence_values(trace.units, tables[0])
    order = sorted(range(len(values)), key=lambda place: -values[place] if math.isfinite(values[place]) else 0.0)
    without = {number: trace.answer_without({number}) for number in order[: page.removals]}
    return write_atomic(path, render_page(trace, tables, without).encode("utf-8", errors="replace"))


def render_page(trace: Trace, tables: Sequence[pd.DataFrame], without: Mapping[int, str]) -> str:
    """A whole HTML page. tables: one per view. without: {sentence: the answer without it}."""
    views = [_saved_view(trace, view, table) for view, table in enumerate(tables)]
    rules, legends, panels = ("".join(parts) for parts in zip(*views, strict=True))
    names = [f"{table.attrs['level']}, {table.attrs['method'].replace('_', ' ')}" for table in tables]
    texts = [f"{number} {_visible(text)}" for number, text in enumerate(tables[0].attrs["tokens"], 1)]
    tokens = ["whole answer", *texts]
    answers = [_saved_answer(trace, None, trace.said), *(_saved_answer(trace, *pair) for pair in without.items())]
    for number in ("none", *without):
        rules += f".d2l-saved:has(#removed-{number}:checked) .d2l-now-{number} {{ display: block; }}\n"
    keep = (
        '<label><input type="radio" name="removed" id="removed-none" checked> nothing taken out</label>'
        f"a click on a sentence takes it out (made beforehand for {len(without)} of {len(trace.units)} sentences)"
    )
    sentences = ""
    rows = zip(_headings(trace.units), pieces(trace.units, trace.texts), strict=True)
    for number, (heading, (text, between)) in enumerate(rows):
        kind = f"d2l-unit-{number}" + (" d2l-true" if number in trace.true else "")
        radio = f'<input type="radio" name="removed" id="removed-{number}">' if number in without else ""
        sentences += f'{heading}<label class="{kind}">{radio}<span data-sentence="{sentence_number(number)}">'
        sentences += f"{markup.inline(text)}</span></label>{markup.escape(between)}"
    body = (
        f"<h1>Where the answer came from</h1>{''.join(answers)}"
        f"{_radios('Level and method', 'view', names)}{_radios('Explain', 'token', tokens)}"
        f"<fieldset><legend>Take out</legend>{keep}</fieldset>{legends}"
        f'<div class="d2l-sentences">{sentences}</div>{panels}'
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    style = "\n".join([VIEW_CSS, CSS, _PAGE_CSS, rules])
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>Where the answer came from</title><style>{style}</style></head>"
        f'<body><main class="d2l-view d2l-saved {markup.NO_FORMULAS}">{body}</main></body></html>\n'
    )


def _saved_view(trace: Trace, view: int, table: pd.DataFrame) -> tuple[str, str, str]:
    """(CSS rules, legends, what stands below the text) of a view: all its choices, of which one is shown."""
    level, tokens = table.attrs["level"], table.attrs["tokens"] if has_tokens(table) else []
    chosen, name = f".d2l-saved:has(#view-{view}:checked)", f"d2l-choice-{view}"
    rules, legends, panels = f"{chosen} .{name} {{ display: block; }}\n", "", ""
    for choice, token in enumerate([None, *range(len(tokens))]):
        # a method that does not tell tokens apart shows the whole answer whatever token is chosen
        scope = chosen + (f":has(#token-{choice}:checked)" if tokens else "")
        values, scale, in_text = _shading(trace, table, token)
        note = "" if in_text else f'<div class="d2l-note">The level {level} has no place in the text.</div>'
        style = sentence_style(values, last_of_unit(trace.units, level))
        rules += f"{scope} {{ .{name}-{choice} {{ display: block; }}\n{style} }}\n"
        legends += f'<div class="d2l-choice {name}-{choice}">{scale}{note}</div>'
        body = render_heat_map(table, token) + render_units(table, trace.texts, token, each_token=False)
        panels += f'<div class="d2l-choice {name}-{choice}">{body}</div>'
    body = _render_each_token(table, trace.texts) + render_controls(table)  # the same whatever token is chosen
    return rules, legends, f'{panels}<div class="d2l-choice {name}">{body}</div>'


def _saved_answer(trace: Trace, number: int | None, now: str) -> str:
    page = _render_answer(trace.question, trace.answer, trace.said, now, 0 if number is None else 1)
    return f'<div class="d2l-choice d2l-now-{"none" if number is None else number}">{page}</div>'


def _radios(legend: str, name: str, labels: Sequence[str]) -> str:
    choices = ""
    for i, text in enumerate(labels):
        button = f'<input type="radio" name="{name}" id="{name}-{i}"{"" if i else " checked"}>'
        choices += f"<label>{button} {markup.inline(text)}</label> "
    return f"<fieldset><legend>{legend}</legend>{choices}</fieldset>"
