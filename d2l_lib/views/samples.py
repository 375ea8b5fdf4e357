"""Look at samples: question, answer, and the document with its evidence marked.

Renderers are pure functions from data to HTML; they escape every text. A viewer puts ipywidgets around them: a callback
computes a page and sets one `HTML.value`. (`Output` widgets and `interact` can hang a headless run for ever.) Pages
carry the class `d2l-view` and data-* attributes that say what is shown. A stored notebook keeps a viewer's plain form:
a static table without JavaScript or kernel.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import ipywidgets as W
import numpy as np
import pandas as pd

from d2l_lib.formats import markup
from d2l_lib.views.page import Pager, Report, Viewer, Work, listen, render_view, wrapped

SAMPLE_COLUMNS = ("document", "question", "answer", "evidence_start", "evidence_end", "kind")
ALL_KINDS = "all kinds"
STATIC_ROWS = 5
_SEARCHED_AT_ONCE = 2_000  # samples


# --- pure renderers ---------------------------------------------------------------------------------------------------


def evidence_spans(start: Any, end: Any, length: int) -> list[tuple[int, int]]:
    """The (start, end) spans of evidence in a text of `length` characters: sorted, overlaps joined, clipped to it.

    start, end: two ints, or two equally long lists of ints (several evidence sentences). None, NaN, infinity, a
        negative start, or an empty span marks nothing.
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
    """The document's text, escaped, with its evidence inside <mark>."""
    parts, position = [], 0
    for start, end in evidence_spans(evidence_start, evidence_end, len(document)):
        parts += [markup.escape(document[position:start]), f"<mark>{markup.escape(document[start:end])}</mark>"]
        position = end
    return "".join([*parts, markup.escape(document[position:])])


def render_excerpt(document: str, spans: Sequence[tuple[int, int]], width: int = 240) -> str:
    """About `width` characters of a document around the first of these spans; all spans are marked."""
    left = max(0, min((sum(spans[0]) - width) // 2 if spans else 0, len(document) - width))
    inside = [(max(0, start - left), end - left) for start, end in spans if left < end and start < left + width]
    text = render_document(document[left : left + width], [start for start, _ in inside], [end for _, end in inside])
    return ("… " if left else "") + text + (" …" if left + width < len(document) else "")


def render_sample(sample: dict, position: int, n_matches: int, n_samples: int) -> str:
    """One sample as a page: question, answer, then the document with its evidence marked.

    sample: the SAMPLE_COLUMNS.
    position: from 0, within the n_matches of n_samples that pass the search and filter.
    """
    document = str(sample["document"])
    text = render_document(document, sample["evidence_start"], sample["evidence_end"])
    where = f"sample {position + 1:,} of {n_matches:,} ({n_samples:,} in all)"
    body = (
        f'<div class="d2l-note">{where} · {markup.inline(sample["kind"])} · {len(document):,} characters</div>'
        f'<h4>Question</h4><div class="d2l-text d2l-question">{markup.escape(sample["question"])}</div>'
        f'<h4>Answer</h4><div class="d2l-text d2l-answer">{markup.escape(sample["answer"])}</div>'
        f'<h4>Document</h4><div class="d2l-text d2l-document" tabindex="0">{text}</div>'
    )
    return render_view("sample", body, position=position, matches=n_matches, samples=n_samples, kind=sample["kind"])


def render_sample_table(samples: pd.DataFrame, n_rows: int = STATIC_ROWS) -> str:
    """The first `n_rows` samples as a plain table, with the text around the evidence."""
    rows = []
    for sample in samples.head(n_rows).to_dict("records"):
        document = str(sample["document"])
        spans = evidence_spans(sample["evidence_start"], sample["evidence_end"], len(document))
        texts = [markup.escape(sample[column]) for column in ("kind", "question", "answer")]
        cells = [*texts, render_excerpt(document, spans)]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("kind", "question", "answer", "document (evidence marked)"))
    note = f'<div class="d2l-note">the first {len(rows)} of {len(samples):,} samples</div>'
    return render_view(
        "table", f"{note}<table><tr>{head}</tr>{''.join(rows)}</table>", rows=len(rows), samples=len(samples)
    )


def _is_missing(value: Any) -> bool:
    return value is None or bool(pd.isna(value)) or value in (math.inf, -math.inf)


def _as_text(value: Any) -> str:
    """Any cell of a table as text; a missing one is empty."""
    return "" if pd.api.types.is_scalar(value) and pd.isna(value) else str(value)


# --- widgets ----------------------------------------------------------------------------------------------------------


def sample_frame(samples: pd.DataFrame | Iterable[dict]) -> pd.DataFrame:
    """The samples as a DataFrame with the SAMPLE_COLUMNS: rows numbered from 0, missing texts empty.

    ValueError names a missing column, or the sample whose evidence `evidence_spans` refuses.
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


def find_samples(
    samples: pd.DataFrame, text: str = "", kind: str = ALL_KINDS, report: Report | None = None
) -> np.ndarray:
    """Row numbers of the samples (a `sample_frame`) of this kind with `text` (any case) in one of their texts.

    report(done, total) is called now and then.
    """
    chosen = np.ones(len(samples), dtype=bool) if kind == ALL_KINDS else (samples["kind"] == kind).to_numpy(dtype=bool)
    if not text:
        return np.flatnonzero(chosen)
    holds = np.zeros(len(samples), dtype=bool)
    for start in range(0, len(samples), _SEARCHED_AT_ONCE):
        rows = slice(start, start + _SEARCHED_AT_ONCE)
        for column in ("document", "question", "answer"):
            texts = samples[column].iloc[rows]
            holds[rows] |= texts.str.contains(text, case=False, regex=False).to_numpy(dtype=bool)
        if report is not None:
            report(min(start + _SEARCHED_AT_ONCE, len(samples)), len(samples))
    return np.flatnonzero(chosen & holds)


class SampleViewer(Viewer):
    """The page of `view_samples`."""

    def __init__(self, samples: pd.DataFrame | Iterable[dict], background: bool | None = None):
        self._frame = frame = sample_frame(samples)
        super().__init__([], render_sample_table(frame))
        self._search = W.Text(description="Search", placeholder="text, then Enter", continuous_update=False)
        self._kind = W.Dropdown(description="Kind", options=[ALL_KINDS, *sorted(frame["kind"].unique())])
        self._page = W.HTML()
        self.work = Work(background)
        self._pager = Pager("sample", len(frame), self._show, self.work)
        self._matches = np.arange(len(frame))
        for control in (self._search, self._kind):
            listen(control, self._select)
        self._show()
        controls = wrapped([self._search, self._kind, *self._pager.controls])
        self.children = [controls, self.work.status, self.work.bar, self._page]

    def _show(self) -> None:
        with self.work.lock:
            n = len(self._matches)
            if n:
                place = self._pager.place
                sample = self._frame.iloc[self._matches[place]].to_dict()
                self._page.value = render_sample(sample, place, n, len(self._frame))
            else:
                nothing = {"position": -1, "matches": 0, "samples": len(self._frame)}
                self._page.value = render_view("sample", "No sample matches.", **nothing)

    def _select(self, _: Any = None) -> None:
        text, kind = self._search.value, self._kind.value
        self.work.start(
            "searching ...",
            lambda report: find_samples(self._frame, text, kind, report),
            self._show_matches,
            key="search",
            replaces=True,
            ready="",
            unit="samples",
        )

    def _show_matches(self, matches: np.ndarray) -> None:
        self._matches = matches
        self._pager.restart(len(matches))
        self._show()


def view_samples(samples: pd.DataFrame | Iterable[dict]) -> Viewer:
    """A viewer to page through samples, search their text and filter by kind. Columns: SAMPLE_COLUMNS.

    evidence_start, evidence_end: character positions in the document (see `evidence_spans`).

    Keys: Tab moves between controls, Enter searches, the arrow keys move the slider, space presses a button.
    """
    return SampleViewer(samples)
