"""Pictures of measured tables: pure functions from a pandas DataFrame to a matplotlib Figure.

Every function names the columns it reads, never changes its table, sets nothing global, and draws the same bytes for
the same table. Shares are fractions from 0 to 1; lengths are tokens. A band is the 95% Wilson score interval of the
pooled questions.

To add a plot, write one function `plot_<what>_by_<what>` under `@_styled`: `_need` its columns, draw on `_figure` or
`_panels`, end with `_caption` and return the figure. Give it a table in `tests/views/test_plots.py`: the tests there
check every plot for labels with units, the same bytes twice, and clear errors. A plot whose rows have names instead of
a scale stands in `NAMED_ROWS` there.
"""

import functools
import io
import math
import textwrap
from collections.abc import Callable, Iterable

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, PercentFormatter

from d2l_lib.tasks.scores import pool

# Okabe and Ito's palette (Color Universal Design, 2008) without yellow, too light for a line on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
REFERENCE = "#666666"
# Columns that identify a row: no row may lack them.
_KEYS = ("method", "task", "condition", "variant", "length_tokens", "depth", "n", "facts", "documents", "chunk", "step")

_STYLE = {
    "figure.dpi": 120,
    "savefig.dpi": 120,
    "savefig.bbox": None,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "d2l",
}
_WIDE = (7.2, 4.4)
_TALL = (7.2, 5.6)
_BROAD = (9.2, 4.2)
_DOTTED = {"color": REFERENCE, "linestyle": ":", "linewidth": 1.2}
_DASHED = _DOTTED | {"linestyle": "--"}
_LINES = ("-", "-.", ":")
_WILSON = "band: 95% Wilson interval"


class NotebookFigure(Figure):
    """A matplotlib Figure that shows itself in a notebook under any backend, with the bytes of its file."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def style():
    """The project's style as a context, `with style(): ...`; outside it nothing is set."""
    return matplotlib.rc_context(_STYLE)


# --- what the plots have in common ------------------------------------------------------------------------------------
def _styled(plot: Callable[..., Figure]) -> Callable[..., Figure]:
    """The plot in the project's style; outside it nothing is set."""

    @functools.wraps(plot)
    def styled(*arguments, **options) -> Figure:
        with style():
            return plot(*arguments, **options)

    return styled


def _figure(title: str, size: tuple[float, float] = _WIDE) -> tuple[NotebookFigure, Axes]:
    """A figure with one panel, titled."""
    figure = NotebookFigure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def _panels(
    title: str, columns: int = 2, rows: int = 1, size: tuple[float, float] = _BROAD, **shared: bool
) -> tuple[NotebookFigure, np.ndarray]:
    """A figure with several panels, row by row, its title on the left. shared: `sharex`, `sharey`."""
    figure = NotebookFigure(figsize=size, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure, figure.subplots(rows, columns, squeeze=False, **shared).ravel()


def _panel_each(
    title: str, table: pd.DataFrame, column: str, size: tuple[float, float] = _BROAD, **shared: bool
) -> tuple[NotebookFigure, list[tuple[Axes, pd.DataFrame]]]:
    """A figure with a panel for each value of a column, and for each panel (axes, rows of that value)."""
    groups = list(table.groupby(column, sort=False))
    figure, panels = _panels(title, len(groups), size=size, **shared)
    for axes, (name, _) in zip(panels, groups, strict=True):
        axes.set_title(_plain(name), fontsize=10)
    return figure, [(axes, rows) for axes, (_, rows) in zip(panels, groups, strict=True)]


def _stacked(title: str) -> tuple[NotebookFigure, Axes, Axes]:
    """A figure with two panels over one x axis, the upper one titled."""
    figure = NotebookFigure(figsize=_TALL, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.set_title(title)
    return figure, above, below


def _caption(figure: Figure, text: str) -> None:
    figure.supxlabel(text, fontsize=8, color=REFERENCE)


def _look(i: int) -> dict[str, str]:
    """Colour and mark of the i-th line."""
    return {"color": COLORS[i % len(COLORS)], "marker": _MARKERS[i % len(_MARKERS)]}


def _width(i: int, n: int) -> float:
    """The width of the i-th of n lines: earlier ones are wider, so that lines on one another all show."""
    return 1.5 + 3.0 * (n - 1 - i) / max(1, n - 1)


def _band(axes: Axes, x: Iterable, low: Iterable, high: Iterable, color: str) -> None:
    axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)


def _line_with_band(axes: Axes, x: Iterable, rows: pd.DataFrame, i: int, method: str, n: int = 1) -> None:
    """Pooled rows (see `scores.pool`) as the i-th of n lines, with their interval; a single point's is a thin line."""
    _band(axes, x, rows["low"], rows["high"], COLORS[i % len(COLORS)])
    if len(rows) == 1:
        axes.vlines(x, rows["low"], rows["high"], COLORS[i % len(COLORS)], linewidth=0.9)
    look = _look(i) | ({} if n == 1 else {"linewidth": _width(i, n), "markersize": 4.0 + _width(i, n)})
    axes.plot(x, rows["exact_match"], **look, label=_plain(method))


def _interval(rows: pd.DataFrame, value: str) -> np.ndarray:
    """Lengths for `errorbar` [2, rows], from `low` to `value` and on to `high`; 0 where rounding makes one negative."""
    return np.maximum([rows[value] - rows["low"], rows["high"] - rows[value]], 0.0)


def _legend_below(axes: Axes) -> None:
    """A legend outside the plot, where it covers no line."""
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=4)


def _legend_of_all(figure: Figure, panels: Iterable[Axes], **options) -> None:
    """One legend for all panels, with every label once."""
    lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside right center", **options)


def _names_down(axes: Axes, names: Iterable[str]) -> None:
    """Name the rows, from the top down."""
    names = list(names)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def _token_axis(axes: Axes, lengths: Iterable[float], label: str = "haystack length (tokens)") -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(lengths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: _tokens(round(length))))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(label)


def _share_axis(axes: Axes, label: str) -> None:
    axes.set(ylim=(-0.03, 1.05), ylabel=label)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _shares_across(axes: Axes, label: str, low: float = 0, high: float = 1.02) -> None:
    axes.set(xlim=(low, high), xlabel=label)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))


def _log_axis(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))


def _mark_length(axes: Axes, length: int | None, what: str) -> None:
    if length is None:
        return
    axes.axvline(length, **_DASHED)
    place = {"xy": (length, 0.5), "xycoords": ("data", "axes fraction"), "xytext": (-3, 0)}
    look = {"rotation": 90, "ha": "right", "va": "center", "fontsize": 8, "color": REFERENCE}
    axes.annotate(f"{what} ({_tokens(length)})", **place, textcoords="offset points", **look)


def _need(table: pd.DataFrame, *columns: str) -> None:
    """TypeError unless it is a table; ValueError for one without rows, and for missing columns or gaps in them."""
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"the table must be a pandas DataFrame, not {type(table).__name__}: pandas.DataFrame(rows)")
    if not len(table):
        needed = f"; a row has the columns {list(columns)}" if columns else ""
        raise ValueError(f"the table has no rows, so there is nothing to draw{needed}")
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"the table lacks the columns {missing}; it has {list(table.columns)}")
    keys = [column for column in columns if column in _KEYS]
    if gaps := [column for column in keys if table[column].isna().any()]:
        raise ValueError(f"the table has missing values in the columns {gaps}: every row needs them")


def _range(numbers: pd.Series) -> str:
    """'3', or '3 to 5'."""
    numbers = numbers.dropna().astype(int)
    return f"{numbers.min()}" if numbers.min() == numbers.max() else f"{numbers.min()} to {numbers.max()}"


def _n(results: pd.DataFrame, by: list[str], what: str) -> str:
    """'n = 300 needles per length, seed 0, 1': the pooled questions of each method and `by`."""
    return f"n = {_range(results.groupby(['method', *by])['n'].sum())} {what}, seed {_seeds(results)}"


def _runs(table: pd.DataFrame) -> str:
    """'n = 3 to 5 runs'."""
    return f"n = {_range(table['n'])} run{'' if table['n'].max() == 1 else 's'}"


def _seeds(table: pd.DataFrame) -> str:
    return ", ".join(str(seed) for seed in sorted(table["seed"].unique()))


def _plain(label: object) -> str:
    """A name from the data as a label: its dollar signs start no formula."""
    return str(label).replace("$", r"\$")


def _tokens(length: float) -> str:
    """1024 -> '1K', 131072 -> '128K', 300 -> '300'."""
    length = int(length)
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else f"{length:,}"


def _seconds(seconds: float) -> str:
    """0.0123 -> '12 ms', 1.234 -> '1.2 s'."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


# --- needles, training, cost ------------------------------------------------------------------------------------------
@_styled
def plot_needle_accuracy_by_length(
    results: pd.DataFrame,
    *,
    native_window: int | None = None,
    training_length: int | None = None,
    chance: float = 1e-4,
    title: str = "Needle in a haystack: exact match by length",
) -> Figure:
    """Exact match of every method against haystack length, pooled over depths and seeds, with its 95% band.

    results: method (str; in order of first appearance), length_tokens, n (questions in the row), exact_match (0 to
        1), seed.
    native_window, training_length: tokens, vertical lines.
    chance: a horizontal line (four digits: 1e-4).
    """
    _need(results, "method", "length_tokens", "n", "exact_match", "seed")
    figure, axes = _figure(title)
    for i, (method, rows) in enumerate(results.groupby("method", sort=False)):
        rows = pool(rows, ["length_tokens"])
        _line_with_band(axes, rows["length_tokens"], rows, i, method, results["method"].nunique())
    axes.axhline(chance, **_DOTTED, label=f"chance ({chance:g})")
    _token_axis(axes, results["length_tokens"].unique())
    _mark_length(axes, training_length, "longest in training")
    _mark_length(axes, native_window, "native window")
    _share_axis(axes, "exact match (% of needles)")
    _legend_below(axes)
    _caption(figure, f"{_n(results, ['length_tokens'], 'needles per length')}; {_WILSON}")
    return figure


@_styled
def plot_needle_accuracy_by_length_and_depth(
    results: pd.DataFrame,
    *,
    method: str | None = None,
    native_window: int | None = None,
    title: str = "Needle in a haystack: exact match by length and depth",
) -> Figure:
    """Heat map of one method's exact match (%): haystack length across, depth of the needle down.

    results: method, length_tokens, depth (0 = start of the haystack, 1 = end), n, exact_match (0 to 1), seed.
    method: which one (None: the table holds only one).

    A cell without a measurement stays empty.
    """
    _need(results, "method", "length_tokens", "depth", "n", "exact_match", "seed")
    methods = list(results["method"].unique())
    if method is None and len(methods) > 1:
        raise ValueError(f"the table holds several methods, name one of them: {methods}")
    method = methods[0] if method is None else method
    if method not in methods:
        raise ValueError(f"the table has no method {method!r}; it has {methods}")
    rows = results[results["method"] == method]
    grid = pool(rows, ["depth", "length_tokens"]).pivot(index="depth", columns="length_tokens", values="exact_match")
    figure, axes = _figure(f"{title}\n{_plain(method)}", _TALL)
    axes.grid(False)
    image = axes.imshow(grid.to_numpy(), aspect="auto", origin="upper", cmap="viridis", vmin=0, vmax=1)
    for i, depth in enumerate(grid.index):
        for j, length in enumerate(grid.columns):
            share = grid.loc[depth, length]
            if not math.isnan(share):
                color = "white" if share < 0.6 else "black"
                axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(grid.columns)), [_tokens(length) for length in grid.columns], fontsize=8)
    axes.set_yticks(range(len(grid.index)), [f"{depth:.0%}" for depth in grid.index])
    axes.set(xlabel="haystack length (tokens)", ylabel="depth of the needle (% of the haystack)")
    if native_window is not None:
        # between the last length inside the window and the first beyond it
        axes.axvline(sum(length <= native_window for length in grid.columns) - 0.5, color="#D55E00", linewidth=2)
    figure.colorbar(image, ax=axes, format=PercentFormatter(1.0)).set_label("exact match (% of needles)")
    note = "" if native_window is None else f"; orange line: end of the native window ({_tokens(native_window)} tokens)"
    _caption(figure, _n(rows, ["length_tokens", "depth"], "needles per cell") + note)
    return figure


@_styled
def plot_training_curves(
    history: pd.DataFrame, *, chance: float = 1e-4, title: str = "Training: loss and exact match by step"
) -> Figure:
    """Loss above, exact match below, one line per seed.

    history: seed, step (optimizer steps), loss (nats per answer token; NaN where not logged), exact_match (0 to 1; NaN
        where not evaluated).
    """
    _need(history, "seed", "step", "loss", "exact_match")
    figure, above, below = _stacked(title)
    for i, (seed, rows) in enumerate(history.groupby("seed", sort=True)):
        rows, look = rows.sort_values("step"), _look(i)
        losses, matches = rows.dropna(subset="loss"), rows.dropna(subset="exact_match")
        above.plot(losses["step"], losses["loss"], color=look["color"], linewidth=1.2, label=f"seed {seed}")
        below.plot(matches["step"], matches["exact_match"], **look, markersize=4, label=f"seed {seed}")
    above.set_ylabel("loss (nats per token)")
    if (history["loss"].dropna() > 0).all():
        _log_axis(above)
    below.axhline(chance, **_DOTTED, label=f"chance ({chance:g})")
    _share_axis(below, "exact match (% of questions)")
    below.set_xlabel("training step (optimizer updates)")
    below.legend(loc="best")
    n, several = history["seed"].nunique(), "s" if history["seed"].nunique() > 1 else ""
    _caption(figure, f"n = {n} training run{several}, seed{several} {_seeds(history)}")
    return figure


@_styled
def plot_loss_by_step(losses: pd.DataFrame, *, title: str = "Loss by training step") -> Figure:
    """Loss against training step, a line for each column of losses.

    losses: step (optimizer steps), seed, and per line a column of nats per token, named as in the legend; NaN where not
        evaluated.
    """
    _need(losses, "step", "seed")
    names = [column for column in losses if column not in ("step", "seed")]
    _need(losses, *(names or ["a column of losses"]))
    if losses["seed"].nunique() > 1:
        raise ValueError(f"the table holds several runs, give one of the seeds {_seeds(losses)}")
    figure, axes = _figure(title)
    for i, name in enumerate(names):
        seen = losses[["step", name]].dropna()
        axes.plot(seen["step"], seen[name], **_look(i), markersize=3, label=name)
    axes.set_ylim(0)
    axes.set_xlabel("training step (optimizer steps)")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(loc="best")
    _caption(figure, f"n = 1 training run, seed {_seeds(losses)}")
    return figure


@_styled
def plot_curriculum_by_step(
    history: pd.DataFrame,
    *,
    title: str = "Pre-training the base model, by kind of row",
    label: str = "labelled tokens predicted right (%)",
) -> Figure:
    """Share of labelled tokens predicted right against training step, a line per kind of row.

    history: step, seed, and per kind a column right_<kind> (0 to 1; NaN without such rows).
    label: names the shares.
    """
    _need(history, "step", "seed")
    kinds = [column for column in history if column.startswith("right_")]
    _need(history, *(kinds or ["right_<kind>"]))
    if history["seed"].nunique() > 1:
        raise ValueError(f"the table holds several runs, give one of the seeds {_seeds(history)}")
    figure, axes = _figure(title)
    for i, column in enumerate(kinds):
        seen = history[["step", column]].dropna()
        kind = column.removeprefix("right_").replace("_", " ")
        axes.plot(seen["step"], seen[column], **_look(i), markersize=3, label=kind)
    axes.set_xlabel("training step (optimizer steps)")
    _share_axis(axes, label)
    axes.legend(loc="lower right")
    _caption(figure, f"n = 1 run, seed {_seeds(history)}")
    return figure


@_styled
def plot_document_length_by_facts(
    lengths: pd.DataFrame,
    *,
    native_window: int | None = None,
    seed: int = 0,
    title: str = "A document's length grows with its facts",
) -> Figure:
    """Length of documents against their number of facts: a dot per document, a line through the medians.

    lengths: facts, length_tokens.
    native_window: tokens, a horizontal line.
    """
    _need(lengths, "facts", "length_tokens")
    figure, axes = _figure(title)
    axes.plot(lengths["facts"], lengths["length_tokens"], ".", alpha=0.35, markersize=4, label="one document")
    middle = lengths.groupby("facts")["length_tokens"].median()
    axes.plot(middle.index, middle, "-", label="median")
    if native_window is not None:
        axes.axhline(native_window, **_DASHED, label="window of the base model")
    axes.set(xlabel="facts in the document", ylabel="length (tokens)", ylim=(0, None))
    axes.legend()
    n = int(lengths.groupby("facts").size().min())
    _caption(figure, f"n = {n} documents per number of facts, seed {seed}")
    return figure


@_styled
def plot_internalization_cost_by_length(
    costs: pd.DataFrame, *, title: str = "Internalizing a document: time and memory by length"
) -> Figure:
    """Seconds (left) and peak memory (right) against document length, both axes logarithmic.

    costs: length_tokens, seconds (the median of n runs) with quartiles seconds_low and seconds_high, peak_memory_mib,
        n, seed; optional method (one line each).

    Bars are the quartiles. The dashed line is linear, through the longest measurement of the first method.
    """
    _need(costs, "length_tokens", "seconds", "seconds_low", "seconds_high", "peak_memory_mib", "n", "seed")
    table = costs if "method" in costs else costs.assign(method="internalize")
    figure, panels = _panels(title)
    units = {"seconds": "time (seconds)", "peak_memory_mib": "peak memory (MiB)"}
    for axes, (column, label) in zip(panels, units.items(), strict=True):
        for i, (method, rows) in enumerate(table.groupby("method", sort=False)):
            rows = rows.sort_values("length_tokens")
            spread = rows.rename(columns={"seconds_low": "low", "seconds_high": "high"})
            bars = _interval(spread, column) if column == "seconds" else None
            axes.errorbar(rows["length_tokens"], rows[column], yerr=bars, **_look(i), capsize=2, label=_plain(method))
            if i == 0:
                lengths = rows["length_tokens"].to_numpy(dtype=float)
                linear = rows[column].iloc[-1] * lengths / lengths[-1]
                axes.plot(lengths, linear, **_DASHED, label="linear in length", zorder=1)
        axes.set_yscale("log")
        least, most = table[column].min(), table[column].max()
        axes.set_ylim(min(least / 2, most / 50), 2 * most)  # wide enough to tell flat from linear
        _token_axis(axes, table["length_tokens"].unique(), "document length (tokens)")
        axes.set_ylabel(label)
    panels[0].legend()
    _caption(figure, f"{_runs(table)} per length, seed {_seeds(table)}; median, bar: quartiles")
    return figure


@_styled
def plot_block_norm_by_chunk(
    blocks: pd.DataFrame, *, title: str = "One block per chunk: the needle's block stands out"
) -> Figure:
    """Norm of every block of an adapter, in document order; chunks that hold the needle differ in colour and mark.

    blocks: chunk (0, 1, ...), norm (Frobenius, of the block's update, all layers and modules together; no unit),
        holds_needle (bool).
    """
    _need(blocks, "chunk", "norm", "holds_needle")
    rows = blocks.sort_values("chunk")
    holds = rows["holds_needle"].astype(bool)
    figure, axes = _figure(title)
    for label, chosen, color, marker in (
        ("filler only", rows[~holds], COLORS[0], "o"),
        ("holds the needle", rows[holds], COLORS[1], "D"),
    ):
        axes.vlines(chosen["chunk"], 0, chosen["norm"], color=color, linewidth=1.2, alpha=0.7)
        axes.plot(chosen["chunk"], chosen["norm"], linestyle="none", marker=marker, color=color, label=label)
    axes.set(xlabel="chunk (position in the document)", ylabel="norm of the block's update (Frobenius)")
    axes.set_ylim(0)
    _legend_below(axes)
    caption = f"n = {len(rows)} chunks, {int(holds.sum())} with a needle"
    if holds.any() and (~holds).any():
        with_needle, without = rows["norm"][holds].median(), rows["norm"][~holds].median()
        caption += f"; median with needle / without: {with_needle:.3g} / {without:.3g}"
    _caption(figure, caption)
    return figure


@_styled
def plot_base_model_scores(
    scores: pd.DataFrame, *, title: str = "The base model before any document is internalized"
) -> Figure:
    """Horizontal bars of exact match per task, in table order, with the 95% interval; a black tick marks an aim.

    scores: task (str), n, exact_match (0 to 1), seed; optional aim (0 to 1, or NaN).
    """
    _need(scores, "task", "n", "exact_match", "seed")
    pooled = pool(scores, ["task"]).set_index("task").loc[scores["task"].unique()]
    figure, axes = _figure(title, (7.2, 1.9 + 0.42 * len(pooled)))
    positions, shares = np.arange(len(pooled)), pooled["exact_match"].to_numpy()
    axes.barh(positions, shares, height=0.62, color=COLORS[0])
    axes.errorbar(
        shares, positions, xerr=_interval(pooled, "exact_match"), fmt="none", ecolor="black", capsize=3, linewidth=1.2
    )
    for position, share, high in zip(positions, shares, pooled["high"], strict=True):
        x, color = (0.012, "white") if share > 0.15 else (high + 0.012, "black")
        axes.text(x, position, f"{share:.1%}", va="center", color=color, fontsize=9)
    if "aim" in scores:
        aims = scores.groupby("task")["aim"].first().loc[pooled.index]
        axes.plot(aims, positions, "|", markersize=18, markeredgewidth=2, color="black", label="aim")
        _legend_below(axes)
    _names_down(axes, [f"{_plain(task)}\n(n = {n})" for task, n in pooled["n"].items()])
    _shares_across(axes, "exact match (% of questions)")
    _caption(figure, f"seed {_seeds(scores)}; bars: 95% Wilson interval")
    return figure


@_styled
def plot_exact_match_by_facts(
    results: pd.DataFrame, *, title: str = "One-hop questions by number of facts in the document"
) -> Figure:
    """Exact match of every method against the document's number of facts, with its 95% band.

    results: method, facts (str, "1-5", "6-10", ...), n, exact_match (0 to 1), seed.
    """
    _need(results, "method", "facts", "n", "exact_match", "seed")
    figure, axes = _figure(title)
    groups = sorted(results["facts"].unique(), key=lambda group: int(str(group).split("-")[0]))
    n = results["method"].nunique()
    for i, (method, rows) in enumerate(results.groupby("method", sort=False)):
        rows = pool(rows, ["facts"]).set_index("facts")
        rows = rows.loc[[group for group in groups if group in rows.index]]
        _line_with_band(axes, [groups.index(group) for group in rows.index], rows, i, method, n)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlabel("facts in the document")
    _share_axis(axes, "exact match (% of questions)")
    _legend_below(axes)
    _caption(figure, f"{_n(results, ['facts'], 'questions per point')}; {_WILSON}")
    return figure


@_styled
def plot_exact_match_by_documents(
    results: pd.DataFrame, *, title: str = "One-hop questions by number of documents in one adapter"
) -> Figure:
    """Exact match against the number of documents in one adapter, with its 95% band.

    results: documents (number), n, exact_match (0 to 1), seed; optional method.
    """
    _need(results, "documents", "n", "exact_match", "seed")
    results = results if "method" in results else results.assign(method="Doc-to-LoRA")
    figure, axes = _figure(title)
    for i, (method, rows) in enumerate(results.groupby("method", sort=False)):
        rows = pool(rows, ["documents"])
        _line_with_band(axes, rows["documents"], rows, i, method, results["method"].nunique())
    _token_axis(axes, results["documents"].unique(), "documents in the adapter")
    _share_axis(axes, "exact match (% of questions)")
    _legend_below(axes)
    _caption(figure, f"{_n(results, ['documents'], 'questions per point')}; {_WILSON}")
    return figure


@_styled
def plot_score_by_seconds(
    results: pd.DataFrame, *, title: str = "What a document's preparation costs, and what it buys"
) -> Figure:
    """Every method's score against the seconds it takes to prepare one document, with 95% intervals.

    results: method, score, low, high (0 to 1), seconds_prepare (mean per document), documents, n, seed.

    Methods without preparation stand at the left edge, at a millisecond. Each has its number in the legend beside it;
    earlier ones lie above later ones.
    """
    _need(results, "method", "score", "low", "high", "seconds_prepare", "documents", "n", "seed")
    figure, axes = _figure(title, _TALL)
    for i in range(len(results)):
        row = results.iloc[[i]]
        look = {"color": COLORS[i % len(COLORS)], "marker": _MARKERS[i // len(COLORS) % len(_MARKERS)]}
        look |= {"linestyle": "none", "markersize": 8, "capsize": 3, "zorder": 3 + (len(results) - i) / len(results)}
        seconds = row["seconds_prepare"].clip(lower=1e-3)
        label = f"{i + 1}  {_plain(row['method'].item())}"
        axes.errorbar(seconds, row["score"], yerr=_interval(row, "score"), **look, label=label)
        place = (seconds.item(), row["score"].item())
        axes.annotate(str(i + 1), place, (7, 5), textcoords="offset points", fontsize=7.5, zorder=5)
    axes.set(xscale="log")
    _share_axis(axes, "score (% of the best possible)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    n, documents = (
        " to ".join(str(count) for count in sorted({results[column].min(), results[column].max()}))
        for column in ("n", "documents")
    )
    n = f"n = {n} questions on {documents} documents"
    what = "seconds to prepare one document (logarithmic)"
    axes.set_xlabel(f"{what}\n{n}, seed {_seeds(results)}; bars: 95% interval")
    return figure


def plot_exact_match_by_condition(results: pd.DataFrame, *, title: str = "Exact match by condition") -> Figure:
    """Horizontal bars of exact match per condition, in table order, with the 95% interval.

    results: condition (str), n, exact_match (0 to 1), seed; optional aim (0 to 1, or NaN).
    """
    _need(results, "condition", "n", "exact_match", "seed")
    if results.duplicated(["condition", "seed"]).any():
        raise ValueError("a condition stands in several rows: give the rows of one value of the column that differs")
    return plot_base_model_scores(results.rename(columns={"condition": "task"}), title=title)


@_styled
def plot_ablation(results: pd.DataFrame, *, title: str = "The recipe with one part changed") -> Figure:
    """One panel per task: each variant's exact match, a bar for the mean over its seeds, a dot for every seed.

    results: variant, seed, task, n, exact_match (0 to 1).

    Rows of the same variant, seed and task (documents of different sizes) are averaged. Variants keep the table's
    order; the line is the first one's mean.
    """
    _need(results, "variant", "seed", "task", "n", "exact_match")
    tasks, variants = list(results["task"].unique()), list(results["variant"].unique())
    each = results.groupby(["task", "variant", "seed"])["exact_match"].mean()
    figure, panels = _panels(title, len(tasks), size=(9.0, 1.7 + 0.34 * len(variants)), sharey=True)
    figure.suptitle(title)
    for axes, task in zip(panels, tasks, strict=True):
        for position, variant in enumerate(variants):
            if (task, variant) not in each.index.droplevel("seed"):
                continue
            seeds = each.loc[task, variant]
            axes.barh(position, seeds.mean(), height=0.6, color=COLORS[0 if position == 0 else 1], alpha=0.75)
            axes.plot(seeds, [position] * len(seeds), "o", color="black", markersize=3.5)
        axes.axvline(each.loc[task, variants[0]].mean(), color=REFERENCE, linewidth=1, linestyle="--")
        axes.set_title(_plain(task), fontsize=10)
        axes.grid(axis="y", visible=False)
        _shares_across(axes, "exact match (% of questions)")
    _names_down(panels[0], map(_plain, variants))
    n = results["n"].min()
    _caption(figure, f"bars: mean over seeds, dots: seeds {_seeds(results)}; n = {n} questions or more each")
    return figure


@_styled
def plot_contribution_by_chunk(
    table: pd.DataFrame, *, evidence: Iterable[int] = (), title: str = "What each chunk contributes to the answer"
) -> Figure:
    """Bars of contribution by chunk for one question.

    table: unit, contribution (nats), from `attribution.attribute` for chunks or sentences.
    evidence: rows of the table that hold the true evidence.
    """
    _need(table, "unit", "contribution")
    evidence = set(evidence)
    figure, axes = _figure(title)
    places = range(len(table))
    for label, color, chosen in (
        ("holds the evidence", COLORS[1], [place for place in places if place in evidence]),
        ("other", COLORS[0], [place for place in places if place not in evidence]),
    ):
        if chosen:
            axes.bar(chosen, table["contribution"].iloc[chosen], color=color, label=label, alpha=0.85)
    axes.axhline(0, color=REFERENCE, linewidth=1)
    axes.set(xlabel="chunk (position in the adapter)", ylabel="contribution (nats of log-probability)")
    _legend_below(axes)
    return figure


@_styled
def plot_evidence_by_token_and_block(
    reads: pd.DataFrame,
    *,
    blocks: pd.DataFrame | None = None,
    most: int = 24,
    title: str = "What each token of the answer reads",
) -> Figure:
    """Heat map of what sparse reading reads: the answer's tokens across, blocks down; the colour is the evidence.

    reads: token, text, layer, module, block (-1: none), document, chunk, evidence (from `reading.answer_reads`). Of the
        linears that read a block at a token the last one counts, as evidence adds up.
    blocks: block, document, chunk, text (from `trials.block_texts`), to say how a block's text begins, and to show
        blocks that were not read. None, or more blocks than `most`: only those that were read.

    The number in a cell says how many linears read that block there, unless all did. The last row, if there is one,
    says how many read no block. It is what was read, and no proof of a cause.
    """
    _need(reads, "token", "text", "layer", "module", "block", "evidence")
    _need(reads.fillna({"chunk": -1}), "document", "chunk")  # what was not read has none
    linears = len(reads[["layer", "module"]].drop_duplicates())
    order = reads.sort_values("layer", kind="stable").groupby(["block", "token"])
    names = _block_names(reads, blocks, most)
    tokens = reads.sort_values("token").drop_duplicates("token")
    counts = order.size().unstack().reindex(index=list(names), columns=tokens["token"]).fillna(0).to_numpy(dtype=int)
    values = order["evidence"].last().unstack().reindex(index=list(names), columns=tokens["token"])
    values = values.to_numpy(dtype=float, copy=True)
    values[[place for place in names if place < 0]] = np.nan  # the last row: none was read
    figure, (axes,) = _panels(_plain(title), 1, size=(4.6 + 0.55 * len(tokens), 2.6 + 0.3 * len(names)))
    axes.grid(False)
    read = np.isfinite(values).any()
    largest = np.nanmax(values) if read else 1.0
    image = axes.imshow(values, aspect="auto", cmap="Blues", vmin=0, vmax=largest)
    for (i, j), count in np.ndenumerate(counts):
        if 0 < count < linears or (count and list(names)[i] < 0):
            color = "white" if values[i, j] > 0.6 * largest else "black"
            axes.text(j, i, f"{count} of {linears}", ha="center", va="center", fontsize=7, color=color)
    ticks = [_plain(text.replace("\n", "↵").strip() or "space") for text in tokens["text"]]
    axes.set_xticks(range(len(ticks)), ticks, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(names)), list(names.values()), fontsize=8)
    axes.set(xlabel="answer (tokens)", ylabel="block")
    if read:
        figure.colorbar(image, ax=axes).set_label("evidence\n(sum of |A x|, no unit)", fontsize=8)
    _caption(figure, f"{linears} linears read; what was read, no proof of a cause")
    return figure


def _block_names(reads: pd.DataFrame, blocks: pd.DataFrame | None, most: int) -> dict[int, str]:
    """The rows of `plot_evidence_by_token_and_block`, in order: blocks by place, then -1 where none was read."""
    labels = reads[reads["block"] >= 0].drop_duplicates("block")[["block", "document", "chunk"]].assign(text="")
    if blocks is not None:
        _need(blocks, "block", "document", "chunk", "text")
        if len(missing := set(labels["block"]) - set(blocks["block"])):
            raise ValueError(f"blocks has no block {min(missing)}, which was read: give those of the same adapter")
        labels = blocks if len(blocks) <= most else blocks[blocks["block"].isin(labels["block"])]
    several = (labels if blocks is None else blocks)["document"].nunique() > 1
    names = {int(row.block): _plain(_block_name(row, several)) for row in labels.sort_values("block").itertuples()}
    return names | ({-1: "no block"} if (reads["block"] < 0).any() else {})


def _block_name(row: object, several: bool) -> str:
    """'chunk 3: Lumana Helpor came fr…', with its document where there are several."""
    document = textwrap.shorten(str(row.document), 24, placeholder="…")
    name = f"{document}, chunk {int(row.chunk)}" if several else f"chunk {int(row.chunk)}"
    text = textwrap.shorten(row.text, 40, placeholder=" …")
    return f"{name}: {text}" if text else name


@_styled
def plot_contribution_by_layer_and_direction(
    table: pd.DataFrame, *, title: str = "What each singular direction contributes to the answer"
) -> Figure:
    """Heat map for one question: layers and modules down, directions of the summed update across, strongest first.

    table: layer, module, direction, contribution (nats), from `attribution.attribute` for ranks.
    """
    _need(table, "layer", "module", "direction", "contribution")
    cells = table.astype({"layer": int, "direction": int, "module": str})
    grid = cells.pivot(index=["layer", "module"], columns="direction", values="contribution")
    figure, axes = _figure(title, (7.2, 1.8 + 0.45 * len(grid)))
    most = max(1e-9, float(grid.abs().max().max()))
    image = axes.imshow(grid, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    axes.set_xticks(range(grid.shape[1]), grid.columns)
    axes.set_yticks(range(len(grid)), [_plain(f"{layer}, {module}") for layer, module in grid.index])
    axes.set(xlabel="direction (position by singular value)", ylabel="layer (position), module")
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="contribution (nats)")
    return figure


@_styled
def plot_probability_by_share(
    curves: pd.DataFrame, *, title: str = "Chunks taken away, and added, in the order of each method"
) -> Figure:
    """Two panels, deletion and insertion: mean probability of the answer by the share of units taken away or added.

    curves: method, curve, units, share (0 to 1), probability, seed; optional question.

    Each question's curve is interpolated linearly at the same shares. The method "random" is the dashed reference.
    """
    _need(curves, "method", "curve", "share", "probability", "seed")
    curves = curves if "question" in curves else curves.assign(question=0)
    shares = np.linspace(0, 1, 101)
    figure, panels = _panels(title)
    figure.suptitle(title)
    for axes, (curve, label) in zip(panels, (("deletion", "taken away"), ("insertion", "added")), strict=True):
        of_curve = curves[curves["curve"] == curve]
        for i, method in enumerate(curves["method"].unique()):
            each = [
                np.interp(shares, rows["share"], rows["probability"])
                for _, rows in of_curve[of_curve["method"] == method].sort_values("share").groupby("question")
            ]
            color, line = (REFERENCE, "--") if method == "random" else (COLORS[i % len(COLORS)], _LINES[i % 3])
            look = {"color": color, "linestyle": line, "linewidth": _width(i, curves["method"].nunique())}
            axes.plot(shares, np.mean(each, axis=0), **look, label=_plain(method))
        axes.set_title(curve)
        _shares_across(axes, f"chunks {label} (% of all)", -0.03, 1.1)  # room for the last label: the layout settles
        _share_axis(axes, "probability of the answer (%)")
    panels[0].legend(loc="upper right", fontsize=8)
    _caption(figure, f"n = {curves['question'].nunique()} questions, seed {_seeds(curves)}")
    return figure


@_styled
def plot_hit_rate_by_method(results: pd.DataFrame, *, title: str = "The evidence is ranked first") -> Figure:
    """Horizontal bars, in table order: how often a method ranks the evidence first, its 95% interval, chance level.

    results: method, n, hit_rate, low, high, chance (0 to 1), seed.
    """
    _need(results, "method", "n", "hit_rate", "low", "high", "chance", "seed")
    figure, axes = _figure(title, (7.2, 1.6 + 0.5 * len(results)))
    error = _interval(results, "hit_rate")
    axes.barh(range(len(results)), results["hit_rate"], xerr=error, height=0.6, color=COLORS[0], alpha=0.75, capsize=3)
    for place, chance in enumerate(results["chance"]):
        label = "chance" if place == 0 else None
        axes.plot([chance] * 2, [place - 0.4, place + 0.4], color=COLORS[1], linewidth=2, label=label)
    _names_down(axes, [f"{_plain(row['method'])}\n(n = {row['n']})" for row in results.to_dict("records")])
    _shares_across(axes, "evidence ranked first (% of questions)", 0, 1.05)
    _legend_below(axes)
    _caption(figure, f"seed {_seeds(results)}; bars: 95% Wilson interval")
    return figure


@_styled
def plot_margin_by_sentence(
    table: pd.DataFrame, *, title: str = "What the adapter stored, sentence by sentence"
) -> Figure:
    """The margin of every sentence in document order, coloured by status.

    table: status ("stored", "lost", "not asked"), margin (nats; NaN for "not asked").

    Above the line at 0 the adapter gives the sentence's answer, below it another one.
    """
    _need(table, "status", "margin")
    places = np.arange(1, len(table) + 1)
    status = table["status"].to_numpy()
    margins = np.nan_to_num(table["margin"].to_numpy(dtype=float))
    figure, axes = _figure(title)
    for name, color in (("stored", COLORS[2]), ("lost", COLORS[1])):
        chosen = status == name
        axes.bar(places[chosen], margins[chosen], color=color, width=0.8, label=f"{name} ({int(chosen.sum())})")
    chosen = status == "not asked"
    axes.plot(places[chosen], np.zeros(chosen.sum()), "x", color=REFERENCE, label=f"not asked ({int(chosen.sum())})")
    axes.axhline(0, color=REFERENCE, linewidth=1.2)
    axes.set(xlabel="sentence (position in the documents)", ylabel="margin of the answer (nats)")
    _legend_below(axes)
    _caption(figure, f"n = {len(table)} sentences, those of one adapter")
    return figure


@_styled
def plot_flags_by_threshold(
    curve: pd.DataFrame, *, title: str = "Flagging the facts that the adapter fails to answer"
) -> Figure:
    """Two panels: precision against recall of failing facts (found), and recall against false alarms.

    curve: condition, signal, found, precision, false_alarms (0 to 1), n, failing, seed; one row per threshold.

    A cross marks the aim, 90% found at 10% false alarms. Grey lines flag at random.
    """
    _need(curve, "condition", "signal", "found", "precision", "false_alarms", "n", "failing", "seed")
    groups = list(curve.groupby(["condition", "signal"], sort=False))
    figure, (left, right) = _panels(title, size=(11.0, 4.4))
    for i, ((condition, signal), rows) in enumerate(groups):
        color, line = COLORS[i % len(COLORS)], _LINES[i // len(COLORS) % 3]
        rows = rows.sort_values(["found", "precision"])
        label = _plain(f"{condition}: {signal}")
        left.plot(rows["found"], rows["precision"], color=color, linestyle=line, label=label)
        rows = rows.sort_values(["false_alarms", "found"])
        right.plot(rows["false_alarms"], rows["found"], color=color, linestyle=line)
    for i, (condition, rows) in enumerate(curve.groupby("condition", sort=False)):
        share = rows["failing"].iloc[0] / rows["n"].iloc[0]
        look = {"color": REFERENCE, "linestyle": ("--", ":", "-.")[i % 3], "linewidth": 1.2}
        left.axhline(share, **look, label=f"{condition}: at random")
    right.plot([0, 1], [0, 1], color=REFERENCE, linestyle="--", linewidth=1)
    right.plot(0.1, 0.9, marker="x", markersize=9, markeredgewidth=2, color="black", linestyle="none")
    for axes, x, y in (
        (left, "failing facts found (%)", "flagged facts that fail (%)"),
        (right, "answered facts flagged (%)", "failing facts found (%)"),
    ):
        _shares_across(axes, x, -0.03, 1.03)
        _share_axis(axes, y)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    counts = {c: f"{c}: {r['failing'].iloc[0]} of {r['n'].iloc[0]} facts fail" for c, r in curve.groupby("condition")}
    _caption(figure, f"{'; '.join(counts.values())}; seed {_seeds(curve)}")
    return figure


@_styled
def plot_gate_losses_by_threshold(
    curve: pd.DataFrame, *, title: str = "The gate: what it spares unrelated questions, and what it costs"
) -> Figure:
    """Relative losses against the gate's threshold, one panel per number of documents and rule.

    curve: of one condition, documents, rule, least (nats), unrelated_loss (against the base model), answerable_loss and
        override_loss (against no gate), unanswerable (exact match, drawn as its loss; both NaN where none were asked),
        chosen (bool), n, seed.

    A vertical line marks the chosen threshold, a dotted one the aim of 1%.
    """
    _need(curve, "documents", "rule", "least", "unrelated_loss", "answerable_loss", "override_loss", "unanswerable")
    _need(curve, "chosen", "n", "seed")
    groups = list(curve.groupby(["documents", "rule"], sort=False))
    n_rows, title = math.ceil(len(groups) / 2), f"{title} (seed {_seeds(curve)})"
    figure, panels = _panels(title, min(2, len(groups)), n_rows, (11.0, 2.2 + 2.2 * n_rows), sharey=True)
    for axes, ((documents, rule), rows) in zip(panels, groups, strict=False):
        rows = rows.sort_values("least")
        axes.plot(rows["least"], rows["unrelated_loss"], marker=_MARKERS[0], label="unrelated questions")
        axes.plot(rows["least"], rows["answerable_loss"], marker=_MARKERS[1], label="answerable questions")
        if rows["unanswerable"].notna().any():
            axes.plot(
                rows["least"], 1 - rows["unanswerable"], marker=_MARKERS[2], label="unanswerable questions: wrong"
            )
        if rows["override_loss"].notna().any():
            axes.plot(rows["least"], rows["override_loss"], marker=_MARKERS[3], label="contradictions: not overridden")
        axes.axhline(0.01, **_DOTTED, label="aim: 1%")
        for least in rows["least"][rows["chosen"]]:
            axes.axvline(least, **_DASHED, label="chosen on validation")
        _share_axis(axes, "relative loss (%)")
        axes.set(xlabel="least relevance to answer (nats)", ylim=(-0.02, 0.5))
        plural = "" if documents == 1 else "s"
        axes.set_title(f"{documents} document{plural}, {rule}: n = {rows['n'].iloc[0]} each", fontsize=9.5)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


@_styled
def plot_override_by_strength(
    curve: pd.DataFrame, *, title: str = "The strength dial: overriding what the base model believes, and the damage"
) -> Figure:
    """Shares of answers against the weight of the document's blocks, one panel without and one with the gate.

    curve: layers, weight, gate (bool), override, unrelated, document (0 to 1) with their _low and _high, n, seed.

    "all layers" has all three shares with intervals; single layers have a thin line, the override.
    """
    shares = {"override": "the document overrides", "document": "the document's other facts", "unrelated": "unrelated"}
    bounds = [f"{name}_{side}" for name in shares for side in ("low", "high")]
    _need(curve, "layers", "weight", "gate", "n", "seed", *shares, *bounds)
    figure, panels = _panels(title, curve["gate"].nunique(), size=(11.0, 4.4), sharey=True)
    for axes, (gate, of_gate) in zip(panels, curve.groupby("gate"), strict=True):
        rows = of_gate[of_gate["layers"] == "all layers"].sort_values("weight")
        for i, (name, label) in enumerate(shares.items()):
            _band(axes, rows["weight"], rows[f"{name}_low"], rows[f"{name}_high"], COLORS[i])
            axes.plot(rows["weight"], rows[name], **_look(i), label=label)
        for i, (layers, part) in enumerate(of_gate[of_gate["layers"] != "all layers"].groupby("layers")):
            part = pd.concat([part, rows[rows["weight"] == 1]]).sort_values("weight")
            look = {"color": COLORS[(3 + i) % len(COLORS)], "linewidth": 1.2, "linestyle": ("--", "-.", ":")[i % 3]}
            axes.plot(part["weight"], part["override"], **look, label=f"override, {layers} alone turned")
        axes.set_title("with the gate, routed" if gate else "all blocks, no gate", fontsize=10)
        axes.set_xlabel("strength (times the blocks as written)")
        _share_axis(axes, "answers (%)")
    _legend_of_all(figure, panels, fontsize=8)
    _caption(figure, f"n = {curve['n'].min()} documents, seed {_seeds(curve)}; {_WILSON}")
    return figure


@_styled
def plot_singular_values_by_index(
    spectra: pd.DataFrame, *, title: str = "Singular values of the update, layer by layer"
) -> Figure:
    """A panel per adapter, a line per layer (and module, if there are several): singular values, largest first.

    spectra: adapter (str), module, layer, index (1 = largest), value (no unit), from `weights.spectra`.

    Values below a millionth of an adapter's largest are rounding and are not drawn.
    """
    _need(spectra, "adapter", "module", "layer", "index", "value")
    modules = spectra["module"].nunique()
    figure, panels = _panel_each(title, spectra, "adapter", sharey=True)
    for axes, rows in panels:
        rows = rows[rows["value"] > 1e-6 * rows["value"].max()]
        for i, ((module, layer), line) in enumerate(rows.groupby(["module", "layer"])):
            label = f"layer {layer}" + (f", {module}" if modules > 1 else "")
            axes.plot(line["index"], line["value"], color=COLORS[i % len(COLORS)], marker=".", label=label)
        axes.set_yscale("log")
        axes.set(xlabel="singular direction (position, largest first)", ylabel="singular value (no unit)")
        axes.legend(loc="upper right")
    return figure


@_styled
def plot_norms_by_layer(
    norms: pd.DataFrame, *, title: str = "How large an update is, and over how many directions"
) -> Figure:
    """Left the update's norms as a share of the base weight's, right its effective and stable rank; a line per adapter.

    norms: adapter (str), layer, relative_frobenius, relative_spectral (shares), effective_rank, stable_rank, from
        `weights.norms` for one module. ValueError for several.
    """
    columns = {"relative_frobenius": "Frobenius", "relative_spectral": "spectral"}
    ranks = {"effective_rank": "effective", "stable_rank": "stable"}
    _need(norms, "adapter", "layer", *columns, *ranks)
    if norms.duplicated(["adapter", "layer"]).any():
        raise ValueError("the table holds a layer of an adapter twice: give the rows of one module")
    figure, panels = _panels(title)
    for axes, chosen in zip(panels, (columns, ranks), strict=True):
        for i, (name, rows) in enumerate(norms.groupby("adapter", sort=False)):
            for (column, label), line in zip(chosen.items(), ("-", "--"), strict=True):
                axes.plot(rows["layer"], rows[column], line, **_look(i), label=f"{_plain(name)}: {label}")
        axes.set_xticks(sorted(norms["layer"].unique()))
        axes.set_xlabel("layer (position)")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8, handlelength=4)
    panels[0].set(ylim=(0, None), ylabel="norm of the update (% of the base weight's)")
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[1].set(yscale="log", ylabel="rank (number of directions)")
    panels[1].yaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]))
    panels[1].yaxis.set_minor_locator(NullLocator())
    panels[1].yaxis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:g}"))
    return figure


@_styled
def plot_parts_by_layer(
    parts: pd.DataFrame, *, title: str = "The bias and the documents' part, layer by layer"
) -> Figure:
    """A panel per adapter, two bars per layer: norm of the documents' part and of the bias; their cosine above.

    parts: adapter (str), layer, documents, bias (Frobenius norms), cosine, from `weights.bias_and_documents` for one
        module.
    """
    _need(parts, "adapter", "layer", "documents", "bias", "cosine")
    figure, panels = _panel_each(title, parts, "adapter", (9.2, 4.0))
    for axes, rows in panels:
        axes.bar(rows["layer"] - 0.2, rows["documents"], 0.38, color=COLORS[0], label="documents")
        axes.bar(rows["layer"] + 0.2, rows["bias"], 0.38, color=COLORS[1], label="bias")
        for row in rows.to_dict("records"):
            place, above = (row["layer"], max(row["documents"], row["bias"])), {"textcoords": "offset points"}
            axes.annotate(f"cos {row['cosine']:.2f}", place, (0, 3), **above, ha="center", fontsize=8)
        axes.set_xticks(rows["layer"])
        axes.margins(y=0.12)
        axes.set(xlabel="layer (position)", ylabel="norm of the part (Frobenius)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


@_styled
def plot_block_norm_by_document(blocks: pd.DataFrame, *, title: str = "How large each document's blocks are") -> Figure:
    """A row of dots per document of one adapter, in table order; a dot per block, first chunk on top; a black median.

    blocks: document (str), chunk, norm (Frobenius, all layers and modules together), from `weights.block_norms`.

    ValueError for several rows of a chunk.
    """
    _need(blocks, "document", "chunk", "norm")
    if blocks.duplicated(["document", "chunk"]).any():
        raise ValueError("several rows of a document's chunk: give the rows of one adapter, one per block")
    documents = dict(list(blocks.sort_values("chunk", kind="stable").groupby("document", sort=False)["norm"]))
    documents = {name: documents[name] for name in blocks["document"].unique()}
    figure, axes = _figure(title, (7.2, 1.8 + 0.5 * len(documents)))
    for position, norms in enumerate(documents.values()):
        spread = 0.5 * (np.arange(len(norms)) - (len(norms) - 1) / 2) / max(1, len(norms) - 1)
        axes.plot(norms, position + spread, "o", color=COLORS[0], markersize=3, alpha=0.6)
        axes.vlines(np.median(norms), position - 0.36, position + 0.36, color="black", linewidth=2.4)
    _names_down(axes, (f"{_plain(name)}\n(n = {len(norms)})" for name, norms in documents.items()))
    axes.set(xlim=(0, None), xlabel="norm of the block's update (Frobenius)")
    plural = "" if len(documents) == 1 else "s"
    _caption(figure, f"n = {len(blocks)} blocks of {len(documents)} document{plural}; black: median")
    return figure


@_styled
def plot_similarity_by_document(
    similarity: pd.DataFrame, *, label: str = "cosine of the updates", title: str = "How alike adapters are"
) -> Figure:
    """Heat map of a square table of similarities, names on both sides, in the table's order; the value in each cell.

    similarity: from `weights.similarity`.
    label: names the measure.

    Colours run from 0 to 1, or from -1 to 1 if a value is negative.
    """
    _need(similarity)
    _need(similarity, *similarity.index)
    values = similarity.to_numpy()
    low = -1.0 if (values < -0.05).any() else 0.0
    figure, axes = _figure(title, (3.6 + 0.42 * len(values), 2.4 + 0.42 * len(values)))
    axes.grid(False)
    image = axes.imshow(values, cmap="RdBu" if low else "viridis", vmin=low, vmax=1)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            color = "white" if (abs(value) > 0.6 if low else value < 0.6) else "black"
            text = f"{value:.2f}".replace("0.", ".")
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    names = [_plain(name) for name in similarity.columns]
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="adapters of single documents", ylabel="adapters of single documents")
    figure.colorbar(image, ax=axes, shrink=0.8).set_label(label)
    return figure


@_styled
def plot_intruders_by_index(
    intruders: pd.DataFrame, *, threshold: float = 0.6, title: str = "Which directions of W + dW are new"
) -> Figure:
    """A panel per adapter, a line per layer: the largest cosine of each singular vector of W + dW with those of W.

    intruders: adapter (str), layer, index (1 = largest), cosine (0 to 1), from `weights.intruder_dimensions` for one
        module.
    threshold: a horizontal line; points below it are intruder dimensions.
    """
    _need(intruders, "adapter", "layer", "index", "cosine")
    figure, panels = _panel_each(title, intruders, "adapter", (9.2, 4.0), sharey=True)
    for axes, of_adapter in panels:
        for i, (layer, rows) in enumerate(of_adapter.groupby("layer")):
            axes.plot(rows["index"], rows["cosine"], **_look(i), label=f"layer {layer}")
        axes.axhline(threshold, **_DASHED, label=f"threshold ({threshold:g})")
        axes.set(xlabel="singular direction of W + dW (position)", ylabel="largest cosine with one of W (no unit)")
        axes.set_ylim(0, 1.03)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


@_styled
def plot_margin_by_condition(
    margins: pd.DataFrame, *, title: str = "Does the margin depend on the document?"
) -> Figure:
    """A row of dots per condition, in table order: one per question, a black bar at the median.

    margins: condition (str), margin (nats), seed.

    Right of 0 the model gives the right answer.
    """
    _need(margins, "condition", "margin", "seed")
    conditions = dict(list(margins.groupby("condition", sort=False)["margin"]))
    figure, axes = _figure(title, (7.2, 1.8 + 0.5 * len(conditions)))
    for position, values in enumerate(conditions.values()):
        spread = 0.5 * (np.arange(len(values)) / max(1, len(values) - 1) - 0.5)
        axes.plot(values, position + spread, "o", color=COLORS[0], markersize=3, alpha=0.45)
        axes.vlines(np.median(values), position - 0.36, position + 0.36, color="black", linewidth=2.4)
    axes.axvline(0, **_DASHED)
    _names_down(axes, map(_plain, conditions))
    axes.set_xlabel("margin of the right answer (nats)")
    n = min(map(len, conditions.values()))
    _caption(figure, f"n = {n} questions per condition, seed {_seeds(margins)}; black: median")
    return figure


@_styled
def plot_recompression_by_rank(samples: pd.DataFrame, *, title: str = "A long adapter at a small rank") -> Figure:
    """Share of needles found (above) and error of the update (below) against the rank; a line per length.

    samples: length_tokens, rank, full (bool: nothing was cut), error (0 to 1), correct (bool), seed, from
        `studies.recompression.recompressed_needles`.

    The full adapter of a length stands last, as a hollow mark.
    """
    _need(samples, "length_tokens", "rank", "full", "error", "correct", "seed")
    figure, above, below = _stacked(title)
    for i, (length, rows) in enumerate(samples.groupby("length_tokens")):
        pooled = pool(rows.assign(n=1, exact_match=rows["correct"].astype(float)), ["rank"])
        errors = rows.groupby("rank")["error"].mean()
        whole = rows.loc[rows["full"], "rank"].unique()
        hollow = _look(i) | {"linestyle": "none", "markerfacecolor": "white", "markersize": 9}
        _line_with_band(above, pooled["rank"], pooled, i, f"{_tokens(length)} tokens")
        below.plot(errors.index, errors, **_look(i))
        above.plot(whole, pooled.set_index("rank").loc[whole, "exact_match"], **hollow)
        below.plot(whole, errors.loc[whole], **hollow)
    above.axhline(0.99, **_DOTTED, label="aim: 99%")
    _share_axis(above, "exact match (% of needles)")
    above.legend(loc="lower right")
    cut = samples.loc[~samples["full"].astype(bool), "rank"].unique()
    near = {full for full in samples["rank"].unique() if any(1 / 1.5 < full / rank < 1.5 for rank in cut)}
    labelled = [rank for rank in samples["rank"].unique() if rank in cut or rank not in near]
    _token_axis(below, labelled, "rank that was kept (number of directions; hollow: all)")
    below.set(ylim=(0, None), ylabel="error of the update (% of its norm)")
    below.yaxis.set_major_formatter(PercentFormatter(1.0))
    n = _range(samples.groupby(["length_tokens", "rank"]).size())
    _caption(figure, f"n = {n} haystacks per point, seed {_seeds(samples)}; {_WILSON}")
    return figure


# --- speed and memory -------------------------------------------------------------------------------------------------
_COST_LABELS = {"seconds": "time (seconds)", "memory_mib": "peak memory (MiB)"}


@_styled
def plot_cost_by_length(
    costs: pd.DataFrame,
    *,
    value: str = "seconds",
    published: dict[str, float] | None = None,
    published_length: float = 32_768,
    title: str = "Time by length, and the least it can be",
) -> Figure:
    """One panel per model: seconds (or memory) of every method against document length, a floor in grey.

    costs: panel, method, length_tokens, n (runs), floor (bool), seed, and the column `value`.
    value: "seconds" with quartiles seconds_low and seconds_high, drawn as a band, or "memory_mib".
    published: {name: value}, level lines up to `published_length` tokens.

    A cross at the top is a NaN: too little memory. Seconds have a logarithmic axis, memory one from 0.
    """
    if value not in _COST_LABELS:
        raise ValueError(f"value must be {' or '.join(_COST_LABELS)}, not {value!r}")
    quartiles = [f"{value}_low", f"{value}_high"] if value == "seconds" else []
    _need(costs, "panel", "method", "length_tokens", value, *quartiles, "n", "floor", "seed")
    is_floor = costs.groupby("method", sort=False)["floor"].any()
    looks = {method: _look(i) for i, method in enumerate(is_floor.index[~is_floor])}
    size = (4.6 + 2.9 * costs["panel"].nunique(), 4.2)
    figure, panels = _panel_each(title, costs, "panel", size, sharey=True)
    for axes, rows in panels:
        for method, of_method in rows.groupby("method", sort=False):
            look = looks.get(method, {"color": REFERENCE, "linestyle": "--", "linewidth": 1.4, "zorder": 1})
            of_method = of_method.sort_values("length_tokens")
            known, lost = of_method.dropna(subset=value), of_method[of_method[value].isna()]
            axes.plot(known["length_tokens"], known[value], label=_plain(method), **look)
            if quartiles:
                _band(axes, known["length_tokens"], *(known[column] for column in quartiles), look["color"])
            top = {"color": look["color"], "markersize": 8, "transform": axes.get_xaxis_transform()}
            axes.plot(lost["length_tokens"], [0.97] * len(lost), "x", **top)
        for j, (label, level) in enumerate((published or {}).items()):
            shortest, color = rows["length_tokens"].min(), COLORS[-1 - j % len(COLORS)]
            ends = [shortest, max(published_length, shortest)]
            axes.plot(ends, [level] * 2, color=color, linestyle=":", label=_plain(label))
        _token_axis(axes, rows["length_tokens"].unique(), "document length (tokens)")
    first = panels[0][0]
    if value == "seconds":
        _log_axis(first)
    else:
        first.set_ylim(0)
    first.set_ylabel(_COST_LABELS[value])
    _legend_of_all(figure, [axes for axes, _ in panels])
    note = "median, band: quartiles" if quartiles else "the most in any of them"
    if costs[value].isna().any():
        note += "; crosses: out of memory"
    _caption(figure, f"{_runs(costs)} per point, seed {_seeds(costs)}; {note}")
    return figure


@_styled
def plot_parts_by_length(parts: pd.DataFrame, *, title: str = "Where the time goes") -> Figure:
    """One panel per model: the share of each part in the seconds of a length, stacked, the seconds on top.

    parts: panel, length_tokens, part (str; stacked from below in table order), seconds, n (runs), seed.
    """
    _need(parts, "panel", "length_tokens", "part", "seconds", "n", "seed")
    if parts.duplicated(["panel", "length_tokens", "part"]).any():
        raise ValueError("a part of one length stands in several rows: give the rows of one way of internalizing")
    size = (4.0 + 2.8 * parts["panel"].nunique(), 4.4)
    figure, panels = _panel_each(title, parts, "panel", size, sharey=True)
    for axes, rows in panels:
        table = rows.pivot(index="length_tokens", columns="part", values="seconds").fillna(0.0)
        total, below = table.sum(axis=1), np.zeros(len(table))
        for i, part in enumerate(parts["part"].unique()):
            share = (table[part] / total if part in table else 0 * total).to_numpy()
            axes.bar(range(len(table)), share, bottom=below, color=COLORS[i % len(COLORS)], label=_plain(part))
            below = below + share
        for place, seconds in enumerate(total):
            axes.text(place, 1.01, _seconds(seconds), ha="center", va="bottom", fontsize=8)
        axes.set_xticks(range(len(table)), [_tokens(length) for length in table.index])
        axes.grid(axis="x", visible=False)
        axes.set_title(axes.get_title(loc="left"), fontsize=10, pad=14)  # above the seconds
        axes.set_xlabel("document length (tokens)")
    first = panels[0][0]
    _share_axis(first, "share of the time (%)")
    first.set_ylim(0, 1.0)
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center")
    _caption(figure, f"{_runs(parts)} per bar, seed {_seeds(parts)}: the median one")
    return figure


@_styled
def plot_documents_per_second_by_batch(
    rates: pd.DataFrame, *, title: str = "Documents internalized in one call"
) -> Figure:
    """Documents per second against the documents in one call, a line per model.

    rates: model, documents, seconds, seconds_low, seconds_high (of the whole call: median and quartiles), n (runs),
        seed.

    The dotted line is the rate of one document per call.
    """
    _need(rates, "model", "documents", "seconds", "seconds_low", "seconds_high", "n", "seed")
    figure, axes = _figure(title)
    for i, (model, rows) in enumerate(rates.groupby("model", sort=False)):
        rows, look = rows.sort_values("documents"), _look(i)
        count, first = rows["documents"], rows.iloc[0]
        _band(axes, count, count / rows["seconds_high"], count / rows["seconds_low"], look["color"])
        axes.plot(count, count / rows["seconds"], **look, label=_plain(model))
        axes.axhline(first["documents"] / first["seconds"], **_DOTTED | {"color": look["color"]})
    _token_axis(axes, rates["documents"].unique(), "documents in one call (number of them)")
    axes.set(ylim=(0, None), ylabel="speed (documents per second)")
    axes.legend()
    caption = f"{_runs(rates)} per point, seed {_seeds(rates)}: median, band: quartiles"
    _caption(figure, f"{caption}; dotted: the smallest call's")
    return figure


@_styled
def plot_training_by_gpus(costs: pd.DataFrame, *, title: str = "A training by number of GPUs, on paper") -> Figure:
    """Seconds of a step, GPU-days and efficiency against the number of GPUs, a line per network and way.

    costs: network, way, gpus, step_seconds, gpu_days, gpu_days_low, gpu_days_high, efficiency, same_recipe.

    The band is the range of the first line's GPU-days. Beyond the dashed line a step has more batches than the recipe.
    """
    values = {"step_seconds": "a step (seconds)", "gpu_days": "the whole training (GPU-days)"}
    _need(costs, "network", "way", "gpus", *values, "gpu_days_low", "gpu_days_high", "efficiency", "same_recipe")
    figure, panels = _panels(title, 3, size=(11.5, 4.2))
    for i, ((network, way), rows) in enumerate(costs.groupby(["network", "way"], sort=False)):
        rows = rows.sort_values("gpus")
        for axes, value in zip(panels, (*values, "efficiency"), strict=True):
            axes.plot(rows["gpus"], rows[value], **_look(i), label=_plain(f"{network}\n{way}"))
        if i == 0:
            _band(panels[1], rows["gpus"], rows["gpu_days_low"], rows["gpu_days_high"], COLORS[0])
    same = costs.loc[costs["same_recipe"], "gpus"]
    for axes in panels:
        _token_axis(axes, costs["gpus"].unique(), "GPUs (number of them)")
        if not costs["same_recipe"].all() and len(same):
            axes.axvline(same.max(), **_DASHED)
    for axes, label in zip(panels, values.values(), strict=False):
        _log_axis(axes)
        axes.set_ylabel(label)
    _share_axis(panels[2], "time in which GPUs compute (%)")
    _legend_of_all(figure, panels)
    _caption(figure, "calculated, not run; band: range of the first line; dashed: beyond it a step has more batches")
    return figure


@_styled
def plot_adapter_file_by_length(files: pd.DataFrame, *, title: str = "An adapter on disk") -> Figure:
    """Size of an adapter's file (left) and seconds to save and to load it (right) against document length.

    files: model, what ("save" or "load"), length_tokens, file_mib, seconds, seconds_low, seconds_high, n (runs), seed.
    """
    _need(files, "model", "what", "length_tokens", "file_mib", "seconds", "seconds_low", "seconds_high", "n", "seed")
    figure, (left, right) = _panels(title)
    lines = {"save": "-", "load": "--"}
    for i, (model, rows) in enumerate(files.groupby("model", sort=False)):
        rows, look = rows.sort_values("length_tokens"), _look(i)
        size = rows.groupby("length_tokens")["file_mib"].first()
        left.plot(size.index, size, **look, label=_plain(model))
        for what, line in lines.items():
            some = rows[rows["what"] == what]
            _band(right, some["length_tokens"], some["seconds_low"], some["seconds_high"], look["color"])
            label = f"{_plain(model)}: {what}"
            right.plot(some["length_tokens"], some["seconds"], **look, linestyle=line, label=label)
    for axes, label in ((left, "size of the file (MiB)"), (right, "time (seconds)")):
        _log_axis(axes)
        axes.set_ylabel(label)
        _token_axis(axes, files["length_tokens"].unique(), "document length (tokens)")
    left.legend(loc="upper left")
    kinds = [Line2D([], [], color=REFERENCE, linestyle=line, label=what) for what, line in lines.items()]
    right.legend(handles=kinds, loc="upper left")
    _caption(figure, f"{_runs(files)} per point, seed {_seeds(files)}: median, band: quartiles")
    return figure
