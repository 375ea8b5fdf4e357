"""A report as a page: what an adapter stored of its documents and what it lost (the numbers: `analysis.report`)."""

import base64
import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from d2l_lib.analysis import report as numbers
from d2l_lib.analysis.report import STATUSES, format_fact
from d2l_lib.formats import markup
from d2l_lib.formats.writing import write_atomic
from d2l_lib.views.page import render_view
from d2l_lib.views.plots import plot_margin_by_sentence

_SHADES = {"stored": "#d3f0df", "lost": "#f7c9ae", "not asked": "transparent"}


class Report(numbers.Report):
    """The numbers of a report, to print, to show in a notebook, or to write as one page (`save_html`)."""

    def figure(self):
        """Every sentence's margin, in document order."""
        return plot_margin_by_sentence(self.table)

    def _repr_html_(self) -> str:
        return _render_report(self)

    def save_html(self, path: str | Path) -> Path:
        """Write the report with its figure as one page that needs no network; complete or not there at all."""
        buffer = io.BytesIO()
        self.figure().savefig(buffer, format="png", metadata={"Software": None})
        picture = base64.b64encode(buffer.getvalue()).decode()
        page = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Internalization report</title></head>'
            f'<body>{_render_report(self)}<p><img alt="Margin of each sentence" style="max-width: 100%" '
            f'src="data:image/png;base64,{picture}">'
            "</p></body></html>"
        )
        return write_atomic(path, page)


@functools.wraps(numbers.report)
def report(*arguments, **options) -> Report:
    return Report(**vars(numbers.report(*arguments, **options)))


def _cells(values: Sequence[object], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{markup.escape(str(value))}</{tag}>" for value in values) + "</tr>"


def _table(frame: pd.DataFrame) -> str:
    """A data frame as an HTML table, all of it escaped."""
    rows = "".join(
        _cells(["" if pd.isna(v) else f"{v:.2f}" if isinstance(v, float) else v for v in row])
        for row in frame.itertuples(index=False)
    )
    return f"<table>{_cells(frame.columns, 'th')}{rows}</table>"


def _render_report(made: numbers.Report) -> str:
    """The report as a page (see `page`): numbers, warnings, documents with shaded sentences, tables."""
    table = made.table
    counts = {status: int((table["status"] == status).sum()) for status in STATUSES}
    legend = " ".join(
        f'<span style="background:{_SHADES[status]};color:#000;padding:1px 4px">{status}: {count}</span>'
        if _SHADES[status] != "transparent"
        else f"<span>{status}: {count}</span>"
        for status, count in counts.items()
    )
    body = f"<h4>What was stored and what was lost</h4><p>{legend} (sentences; lost: less than "
    body += f"{made.flag_below:g} kept)</p>"
    body += "".join(f'<p class="d2l-error">Warning: {markup.escape(warning)}</p>' for warning in made.warnings)
    facts = pd.DataFrame({"what": list(made.facts), "value": [format_fact(value) for value in made.facts.values()]})
    body += _table(facts)
    by_document = dict(list(table.groupby("document")))
    for name, text in made.texts.items():
        body += f'<h4>{markup.escape(name)}</h4><div class="d2l-text d2l-document">'
        for row in by_document[name].itertuples() if name in by_document else ():
            words = (
                "no question found" if math.isnan(row.kept) else f"kept {row.kept:.2f}, margin {row.margin:.2f} nats"
            )
            shade = f"background:{_SHADES[row.status]}" + (";color:#000" if row.status != STATUSES[2] else "")
            shown = markup.inline(text[row.start : row.end])
            body += f'<span data-status="{row.status}" title="{words}" style="{shade}">{shown}</span>'
        body += "</div>"
    columns = ["document", "text", "status", "asked", "kept", "margin", "over_zero", "over_wrong", "believed"]
    body += "<h4>Sentences (margin, over_zero, over_wrong in nats)</h4>" + _table(table[columns])
    wrong = made.questions[made.questions["margin"] <= 0]
    body += "<h4>Questions answered otherwise</h4>" + _table(wrong[["document", "question", "told", "said", "margin"]])
    changed = made.unrelated[made.unrelated["changed"]]
    body += f"<h4>Unrelated questions answered otherwise ({len(changed)} of {len(made.unrelated)})</h4>"
    body += _table(changed[["question", "alone", "said"]])
    body += "<h4>Capacity</h4>" + _table(made.capacity)
    return render_view("report", body, **{status.replace(" ", "_"): count for status, count in counts.items()})
