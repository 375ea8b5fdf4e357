"""Pictures of measured tables: pure functions from a pandas DataFrame to a matplotlib Figure.

Every function names the columns it reads, never changes its table, sets nothing global, and draws the same bytes for
the same table. Shares are fractions between 0 and 1; lengths are tokens. A band is the 95% Wilson score interval of
the pooled questions.
"""

import io
import math
from collections.abc import Iterable

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, PercentFormatter

from d2l_lib.tasks.scores import pool

# Okabe and Ito's palette (Color Universal Design, 2008) without its yellow, which is too light for a line on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
REFERENCE = "#666666"
# What says which row is which: no row may lack it.
KEYS = ("method", "task", "condition", "variant", "length_tokens", "depth", "n", "facts", "documents", "chunk", "step")

STYLE = {
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
WIDE = (7.2, 4.4)
TALL = (7.2, 5.6)


class NotebookFigure(Figure):
    """A matplotlib Figure that shows itself in a notebook under any backend, with the bytes that a file would get."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def style():
    """A context in which the project's style holds: `with style(): ...`; outside it nothing is set."""
    return matplotlib.rc_context(STYLE)


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
    1), seed. native_window and training_length (tokens) are marked by vertical lines, chance (four digits: 1e-4) by a
    horizontal one.
    """
    _need(results, "method", "length_tokens", "n", "exact_match", "seed")
    with style():
        figure, axes = _figure(WIDE, title)
        for i, method in enumerate(results["method"].unique()):
            rows = pool(results[results["method"] == method], ["length_tokens"])
            color = COLORS[i % len(COLORS)]
            axes.fill_between(rows["length_tokens"], rows["low"], rows["high"], color=color, alpha=0.18, linewidth=0)
            axes.plot(
                rows["length_tokens"],
                rows["exact_match"],
                color=color,
                marker=MARKERS[i % len(MARKERS)],
                label=_plain(method),
            )
        axes.axhline(chance, color=REFERENCE, linestyle=":", linewidth=1.2, label=f"chance ({chance:g})")
        _token_axis(axes, results["length_tokens"].unique())
        _mark_length(axes, training_length, "longest in training")
        _mark_length(axes, native_window, "native window")
        _share_axis(axes, "exact match (% of needles)")
        _legend_below(axes)
        figure.supxlabel(_caption(results, "length"), fontsize=8, color=REFERENCE)
    return figure


def plot_needle_accuracy_by_length_and_depth(
    results: pd.DataFrame,
    *,
    method: str | None = None,
    native_window: int | None = None,
    title: str = "Needle in a haystack: exact match by length and depth",
) -> Figure:
    """Heat map of one method's exact match (%): haystack length across, depth of the needle down.

    results: method, length_tokens, depth (0 = start of the haystack, 1 = end), n, exact_match (0 to 1), seed. Without
    `method` the table must hold a single one. A cell that was not measured stays empty.
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
    with style():
        figure, axes = _figure(TALL, f"{title}\n{_plain(method)}")
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
        axes.set_xlabel("haystack length (tokens)")
        axes.set_ylabel("depth of the needle (% of the haystack)")
        if native_window is not None:
            # between the columns: the last length inside the window, the first beyond it
            axes.axvline(sum(length <= native_window for length in grid.columns) - 0.5, color="#D55E00", linewidth=2)
        bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1.0))
        bar.set_label("exact match (% of needles)")
        note = (
            ""
            if native_window is None
            else f"; orange line: end of the native window ({_tokens(native_window)} tokens)"
        )
        figure.supxlabel(
            _caption(rows, "cell", ["length_tokens", "depth"], band=False) + note, fontsize=8, color=REFERENCE
        )
    return figure


def plot_training_curves(
    history: pd.DataFrame,
    *,
    chance: float = 1e-4,
    title: str = "Training: loss and exact match by step",
) -> Figure:
    """Loss above, exact match below, one line per seed.

    history: seed, step (optimizer steps), loss (nats per answer token; NaN where not logged), exact_match (0 to 1;
    NaN where it was not evaluated).
    """
    _need(history, "seed", "step", "loss", "exact_match")
    with style():
        figure = NotebookFigure(figsize=TALL, layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        above.set_title(title)
        for i, (seed, rows) in enumerate(history.groupby("seed", sort=True)):
            rows = rows.sort_values("step")
            color = COLORS[i % len(COLORS)]
            losses, matches = rows.dropna(subset="loss"), rows.dropna(subset="exact_match")
            above.plot(losses["step"], losses["loss"], color=color, linewidth=1.2, label=f"seed {seed}")
            marker = MARKERS[i % len(MARKERS)]
            below.plot(
                matches["step"], matches["exact_match"], color=color, marker=marker, markersize=4, label=f"seed {seed}"
            )
        above.set_ylabel("loss (nats per token)")
        if (history["loss"].dropna() > 0).all():
            above.set_yscale("log")
        below.axhline(chance, color=REFERENCE, linestyle=":", linewidth=1.2, label=f"chance ({chance:g})")
        _share_axis(below, "exact match (% of questions)")
        below.set_xlabel("training step (optimizer updates)")
        below.legend(loc="lower right")
        figure.supxlabel(
            f"n = {history['seed'].nunique()} training runs, seeds {_seeds(history)}", fontsize=8, color=REFERENCE
        )
    return figure


def plot_curriculum_by_step(
    history: pd.DataFrame,
    *,
    title: str = "Pre-training the base model, by kind of row",
    label: str = "labelled tokens predicted right (%)",
) -> Figure:
    """Share of labelled tokens predicted right against training step, a line per kind of row; `label` names the shares.

    history: step, seed, and a column right_<kind> (0 to 1; NaN where no such row was seen) per kind.
    """
    _need(history, "step", "seed")
    kinds = [column for column in history if column.startswith("right_")]
    _need(history, *(kinds or ["right_<kind>"]))
    if history["seed"].nunique() > 1:
        raise ValueError(f"the table holds several runs, give one of the seeds {_seeds(history)}")
    with style():
        figure, axes = _figure(WIDE, title)
        for i, column in enumerate(kinds):
            seen = history[["step", column]].dropna()
            kind = column.removeprefix("right_").replace("_", " ")
            axes.plot(seen["step"], seen[column], marker=MARKERS[i % len(MARKERS)], markersize=3, label=kind)
        axes.set_xlabel("training step (optimizer steps)")
        _share_axis(axes, label)
        axes.legend(loc="lower right")
        figure.supxlabel(f"n = 1 run, seed {_seeds(history)}", fontsize=8, color=REFERENCE)
    return figure


def plot_document_length_by_facts(
    lengths: pd.DataFrame,
    *,
    native_window: int | None = None,
    seed: int = 0,
    title: str = "A document's length grows with its facts",
) -> Figure:
    """Length of documents against their number of facts: a dot per document, a line through the medians.

    lengths: facts, length_tokens. native_window (tokens) is drawn as a horizontal line.
    """
    _need(lengths, "facts", "length_tokens")
    with style():
        figure, axes = _figure(WIDE, title)
        axes.plot(lengths["facts"], lengths["length_tokens"], ".", alpha=0.35, markersize=4, label="one document")
        middle = lengths.groupby("facts")["length_tokens"].median()
        axes.plot(middle.index, middle, "-", label="median")
        if native_window is not None:
            axes.axhline(
                native_window, color=REFERENCE, linestyle="--", linewidth=1.2, label="window of the base model"
            )
        axes.set_ylim(0)
        axes.set_xlabel("facts in the document")
        axes.set_ylabel("length (tokens)")
        axes.legend()
        n = int(lengths.groupby("facts").size().min())
        figure.supxlabel(f"n = {n} documents per number of facts, seed {seed}", fontsize=8, color=REFERENCE)
    return figure


def plot_internalization_cost_by_length(
    costs: pd.DataFrame, *, title: str = "Internalizing a document: time and memory by length"
) -> Figure:
    """Seconds (left) and peak memory (right) against document length, both axes logarithmic.

    costs: length_tokens, seconds, peak_memory_mib; optional method (one line each). Several rows of one length are
    repeats: the median is drawn, and a bar from the fastest to the slowest. The dashed line is exactly linear through
    the longest measurement of the first method.
    """
    _need(costs, "length_tokens", "seconds", "peak_memory_mib")
    table = costs if "method" in costs else costs.assign(method="internalize")
    with style():
        figure = NotebookFigure(figsize=(9.2, 4.2), layout="constrained")
        panels = figure.subplots(1, 2)
        units = {"seconds": "time (seconds)", "peak_memory_mib": "peak memory (MiB)"}
        for axes, (column, label) in zip(panels, units.items(), strict=True):
            for i, method in enumerate(table["method"].unique()):
                group = table[table["method"] == method].groupby("length_tokens", sort=True)[column]
                middle = group.median()
                spread = [middle - group.min(), group.max() - middle]
                axes.errorbar(
                    middle.index,
                    middle,
                    yerr=spread,
                    marker=MARKERS[i % len(MARKERS)],
                    capsize=2,
                    label=_plain(method),
                )
                if i == 0:
                    lengths = np.asarray(middle.index, dtype=float)
                    linear = middle.iloc[-1] * lengths / lengths[-1]
                    axes.plot(
                        lengths,
                        linear,
                        color=REFERENCE,
                        linestyle="--",
                        linewidth=1.2,
                        label="linear in length",
                        zorder=1,
                    )
            axes.set_yscale("log")
            least, most = table[column].min(), table[column].max()
            axes.set_ylim(min(least / 2, most / 50), 2 * most)  # wide enough to tell flat from linear
            _token_axis(axes, table["length_tokens"].unique(), "document length (tokens)")
            axes.set_ylabel(label)
        panels[0].legend()
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        repeats = int(table.groupby(["method", "length_tokens"]).size().min())
        figure.supxlabel(f"n >= {repeats} runs per length: median, bar from least to most", fontsize=8, color=REFERENCE)
    return figure


def plot_block_norm_by_chunk(
    blocks: pd.DataFrame, *, title: str = "One block per chunk: the needle's block stands out"
) -> Figure:
    """Size of every block of an adapter, in document order; chunks that hold the needle stand out by colour and mark.

    blocks: chunk (0, 1, ...), norm (Frobenius norm of the block's update, all layers and modules together; no unit),
    holds_needle (bool).
    """
    _need(blocks, "chunk", "norm", "holds_needle")
    rows = blocks.sort_values("chunk")
    holds = rows["holds_needle"].astype(bool)
    with style():
        figure, axes = _figure(WIDE, title)
        for label, chosen, color, marker in (
            ("filler only", rows[~holds], COLORS[0], "o"),
            ("holds the needle", rows[holds], COLORS[1], "D"),
        ):
            axes.vlines(chosen["chunk"], 0, chosen["norm"], color=color, linewidth=1.2, alpha=0.7)
            axes.plot(chosen["chunk"], chosen["norm"], linestyle="none", marker=marker, color=color, label=label)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("chunk (position in the document)")
        axes.set_ylabel("norm of the block's update (Frobenius)")
        _legend_below(axes)
        caption = f"n = {len(rows)} chunks, {int(holds.sum())} with a needle"
        if holds.any() and (~holds).any():
            with_needle, without = rows["norm"][holds].median(), rows["norm"][~holds].median()
            caption += f"; median with needle / without: {with_needle:.3g} / {without:.3g}"
        figure.supxlabel(caption, fontsize=8, color=REFERENCE)
    return figure


def plot_base_model_scores(
    scores: pd.DataFrame, *, title: str = "The base model before any document is internalized"
) -> Figure:
    """Horizontal bars of exact match per task with the 95% interval, and a black tick at a task's aim.

    scores: task (str; drawn top to bottom in table order), n, exact_match (0 to 1), seed; optional aim (0 to 1, or
    NaN).
    """
    _need(scores, "task", "n", "exact_match", "seed")
    pooled = pool(scores, ["task"]).set_index("task").loc[scores["task"].unique()]
    with style():
        figure, axes = _figure((7.2, 1.9 + 0.42 * len(pooled)), title)
        positions = np.arange(len(pooled))
        shares = pooled["exact_match"].to_numpy()
        error = np.stack([shares - pooled["low"], pooled["high"] - shares])
        axes.barh(positions, shares, height=0.62, color=COLORS[0])
        # rounding can put an interval's end a hair inside the share itself
        axes.errorbar(
            shares, positions, xerr=np.maximum(error, 0), fmt="none", ecolor="black", capsize=3, linewidth=1.2
        )
        for position, share, high in zip(positions, shares, pooled["high"], strict=True):
            inside = share > 0.15
            x, color = (0.012, "white") if inside else (high + 0.012, "black")
            axes.text(x, position, f"{share:.1%}", va="center", color=color, fontsize=9)
        if "aim" in scores:
            aims = scores.groupby("task")["aim"].first().loc[pooled.index]
            axes.plot(
                aims,
                positions,
                linestyle="none",
                marker="|",
                markersize=18,
                markeredgewidth=2,
                color="black",
                label="aim",
            )
            _legend_below(axes)
        axes.set_yticks(positions, [f"{_plain(task)}\n(n = {n})" for task, n in pooled["n"].items()])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 1.02)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("exact match (% of questions)")
        figure.supxlabel(f"seed {_seeds(scores)}; bars: 95% Wilson interval", fontsize=8, color=REFERENCE)
    return figure


def plot_exact_match_by_facts(
    results: pd.DataFrame, *, title: str = "One-hop questions by number of facts in the document"
) -> Figure:
    """Exact match of every method against the size of the document, with its 95% band.

    results: method, facts (str, "1-5", "6-10", ...), n, exact_match (0 to 1), seed.
    """
    _need(results, "method", "facts", "n", "exact_match", "seed")
    with style():
        figure, axes = _figure(WIDE, title)
        groups = sorted(results["facts"].unique(), key=_first_number)
        for i, method in enumerate(results["method"].unique()):
            rows = pool(results[results["method"] == method], ["facts"]).set_index("facts")
            rows = rows.loc[[group for group in groups if group in rows.index]]
            _line_with_band(axes, [groups.index(group) for group in rows.index], rows, i, method)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_xlabel("facts in the document")
        _share_axis(axes, "exact match (% of questions)")
        _legend_below(axes)
        figure.supxlabel(_question_caption(results, ["facts"]), fontsize=8, color=REFERENCE)
    return figure


def plot_exact_match_by_documents(
    results: pd.DataFrame, *, title: str = "One-hop questions by number of documents in one adapter"
) -> Figure:
    """Exact match against how many documents share an adapter, with its 95% band.

    results: documents (a number), n, exact_match (0 to 1), seed; optional method.
    """
    _need(results, "documents", "n", "exact_match", "seed")
    results = results if "method" in results else results.assign(method="Doc-to-LoRA")
    with style():
        figure, axes = _figure(WIDE, title)
        for i, method in enumerate(results["method"].unique()):
            rows = pool(results[results["method"] == method], ["documents"])
            _line_with_band(axes, rows["documents"], rows, i, method)
        _token_axis(axes, results["documents"].unique(), "documents in the adapter")
        _share_axis(axes, "exact match (% of questions)")
        _legend_below(axes)
        figure.supxlabel(_question_caption(results, ["documents"]), fontsize=8, color=REFERENCE)
    return figure


def plot_score_by_seconds(
    results: pd.DataFrame, *, title: str = "What a document's preparation costs, and what it buys"
) -> Figure:
    """Every method's score against the seconds it takes to prepare one document, with 95% intervals.

    results: method, score, low, high (0 to 1), seconds_prepare (mean per document), documents, n, seed. Methods that
    prepare nothing stand at the left edge, at a millisecond.
    """
    _need(results, "method", "score", "low", "high", "seconds_prepare", "documents", "n", "seed")
    with style():
        figure, axes = _figure(TALL, title)
        for i, row in enumerate(results.to_dict("records")):
            seconds = max(1e-3, row["seconds_prepare"])
            error = [[max(0.0, row["score"] - row["low"])], [max(0.0, row["high"] - row["score"])]]
            color, marker = COLORS[i % len(COLORS)], MARKERS[i // len(COLORS) % len(MARKERS)]
            axes.errorbar(
                seconds, row["score"], yerr=error, color=color, marker=marker, linestyle="none", capsize=3,
                markersize=8, label=_plain(row["method"]),
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel("seconds to prepare one document (logarithmic)")
        _share_axis(axes, "score (% of the best possible)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        counts = results[["documents", "n"]].iloc[0]
        n = f"n = {counts['n']} questions on {counts['documents']} documents"
        figure.suptitle(
            f"{n}, seed {_seeds(results)}; bars: 95% interval",
            fontsize=8,
            color=REFERENCE,
            x=0.99,
            ha="right",
        )
    return figure


def plot_exact_match_by_condition(results: pd.DataFrame, *, title: str = "Exact match by condition") -> Figure:
    """Horizontal bars of exact match per condition, with the 95% interval; drawn top to bottom in table order.

    results: condition (str), n, exact_match (0 to 1), seed; optional aim (0 to 1, or NaN).
    """
    _need(results, "condition", "n", "exact_match", "seed")
    if results.duplicated(["condition", "seed"]).any():
        raise ValueError("a condition stands in several rows: give the rows of one value of the column that differs")
    return plot_base_model_scores(results.rename(columns={"condition": "task"}), title=title)


def plot_ablation(results: pd.DataFrame, *, title: str = "The recipe with one part changed") -> Figure:
    """One panel per task: each variant's exact match, a bar for the mean over its seeds and a dot for every seed.

    results: variant, seed, task, n, exact_match (0 to 1); several rows of a variant, seed and task (documents of
    different sizes) are averaged. Variants are drawn top to bottom in table order; the first one's mean is the line.
    """
    _need(results, "variant", "seed", "task", "n", "exact_match")
    tasks, variants = list(results["task"].unique()), list(results["variant"].unique())
    each = results.groupby(["task", "variant", "seed"])["exact_match"].mean()
    with style():
        figure = NotebookFigure(figsize=(9.0, 1.7 + 0.34 * len(variants)), layout="constrained")
        panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
        for axes, task in zip(panels, tasks, strict=True):
            for position, variant in enumerate(variants):
                if (task, variant) not in each.index.droplevel("seed"):
                    continue
                seeds = each.loc[task, variant]
                color = COLORS[0] if position == 0 else COLORS[1 % len(COLORS)]
                axes.barh(position, seeds.mean(), height=0.6, color=color, alpha=0.75)
                axes.plot(seeds, [position] * len(seeds), "o", color="black", markersize=3.5)
            axes.axvline(each.loc[task, variants[0]].mean(), color=REFERENCE, linewidth=1, linestyle="--")
            axes.set_title(_plain(task), fontsize=10)
            axes.set_xlabel("exact match (% of questions)")
            axes.set_xlim(0, 1.02)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
            axes.grid(axis="y", visible=False)
        panels[0].set_yticks(range(len(variants)), [_plain(variant) for variant in variants])
        panels[0].invert_yaxis()
        figure.suptitle(title)
        n = results["n"].min()
        figure.supxlabel(
            f"bars: mean over seeds, dots: seeds {_seeds(results)}; n = {n} questions or more each",
            fontsize=8,
            color=REFERENCE,
        )
    return figure


def _line_with_band(axes: Axes, x, rows: pd.DataFrame, i: int, method: str) -> None:
    color = COLORS[i % len(COLORS)]
    axes.fill_between(x, rows["low"], rows["high"], color=color, alpha=0.18, linewidth=0)
    axes.plot(x, rows["exact_match"], color=color, marker=MARKERS[i % len(MARKERS)], label=_plain(method))


def _first_number(group: str) -> int:
    return int(str(group).split("-")[0])


def _question_caption(results: pd.DataFrame, by: list[str]) -> str:
    counts = results.groupby(["method", *by])["n"].sum()
    n = f"n = {counts.min()}" if counts.min() == counts.max() else f"n = {counts.min()} to {counts.max()}"
    return f"{n} questions per point, seed {_seeds(results)}; band: 95% Wilson interval"


def _figure(size: tuple[float, float], title: str) -> tuple[NotebookFigure, Axes]:
    figure = NotebookFigure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def _need(table: pd.DataFrame, *columns: str) -> None:
    """TypeError for what is no table; ValueError for one without rows, and for columns that lack or have gaps."""
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"the table must be a pandas DataFrame, not {type(table).__name__}: pandas.DataFrame(rows)")
    if not len(table):
        needed = f"; a row has the columns {list(columns)}" if columns else ""
        raise ValueError(f"the table has no rows, so there is nothing to draw{needed}")
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"the table lacks the columns {missing}; it has {list(table.columns)}")
    keys = [column for column in columns if column in KEYS]
    if gaps := [column for column in keys if table[column].isna().any()]:
        raise ValueError(f"the table has missing values in the columns {gaps}: every row needs them")


def _seeds(table: pd.DataFrame) -> str:
    return ", ".join(str(seed) for seed in sorted(table["seed"].unique()))


def _plain(label: object) -> str:
    """A name out of the data as label: its dollar signs start no formula."""
    return str(label).replace("$", r"\$")


def _tokens(length: float) -> str:
    """1024 -> '1K', 131072 -> '128K', 300 -> '300'."""
    length = int(length)
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else f"{length:,}"


def _token_axis(axes: Axes, lengths: Iterable[float], label: str = "haystack length (tokens)") -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(lengths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: _tokens(round(length))))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(label)


def _share_axis(axes: Axes, label: str) -> None:
    axes.set_ylim(-0.03, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel(label)


def _mark_length(axes: Axes, length: int | None, what: str) -> None:
    if length is None:
        return
    axes.axvline(length, color=REFERENCE, linestyle="--", linewidth=1.2)
    axes.annotate(
        f"{what} ({_tokens(length)})",
        xy=(length, 0.5),
        xycoords=("data", "axes fraction"),
        xytext=(-3, 0),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="center",
        fontsize=8,
        color=REFERENCE,
    )


def _legend_below(axes: Axes) -> None:
    """Outside the plot, where it can cover no line."""
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=4)


def _caption(results: pd.DataFrame, unit: str, by: list[str] | None = None, band: bool = True) -> str:
    counts = results.groupby(["method", *(by or ["length_tokens"])])["n"].sum()
    n = f"n = {counts.min()}" if counts.min() == counts.max() else f"n = {counts.min()} to {counts.max()}"
    return f"{n} needles per {unit}, seed {_seeds(results)}" + ("; band: 95% Wilson interval" if band else "")


def plot_contribution_by_chunk(
    table: pd.DataFrame, *, evidence: Iterable[int] = (), title: str = "What each chunk contributes to the answer"
) -> Figure:
    """Bars of contribution by chunk for one question; `evidence`: rows of the table that hold the true evidence.

    table: unit, contribution (nats); what `attribution.attribute` returns for chunks or sentences.
    """
    _need(table, "unit", "contribution")
    evidence = set(evidence)
    with style():
        figure, axes = _figure(WIDE, title)
        places = range(len(table))
        for label, color, chosen in (
            ("holds the evidence", COLORS[1], [place for place in places if place in evidence]),
            ("other", COLORS[0], [place for place in places if place not in evidence]),
        ):
            if chosen:
                axes.bar(chosen, table["contribution"].iloc[chosen], color=color, label=label, alpha=0.85)
        axes.axhline(0, color=REFERENCE, linewidth=1)
        axes.set_xlabel("chunk (position in the adapter)")
        axes.set_ylabel("contribution (nats of log-probability)")
        _legend_below(axes)
    return figure


def plot_contribution_by_layer_and_direction(
    table: pd.DataFrame, *, title: str = "What each singular direction contributes to the answer"
) -> Figure:
    """Heat map for one question: layers and modules down, directions of the summed update across, strongest first.

    table: layer, module, direction, contribution (nats); what `attribution.attribute` returns for ranks.
    """
    _need(table, "layer", "module", "direction", "contribution")
    with style():
        cells = table.astype({"layer": int, "direction": int, "module": str})
        grid = cells.pivot(index=["layer", "module"], columns="direction", values="contribution")
        figure, axes = _figure((7.2, 1.8 + 0.45 * len(grid)), title)
        most = max(1e-9, float(grid.abs().max().max()))
        image = axes.imshow(grid, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
        axes.set_xticks(range(grid.shape[1]), grid.columns)
        axes.set_yticks(range(len(grid)), [_plain(f"{layer}, {module}") for layer, module in grid.index])
        axes.set_xlabel("direction (position by singular value)")
        axes.set_ylabel("layer (position), module")
        axes.grid(visible=False)
        figure.colorbar(image, ax=axes, label="contribution (nats)")
    return figure


def plot_probability_by_share(
    curves: pd.DataFrame, *, title: str = "Chunks taken away, and added, in the order of each method"
) -> Figure:
    """Two panels, deletion and insertion: mean probability of the answer by the share of units taken away or added.

    curves: method, curve, units, share (0 to 1), probability, seed; optional question. Each question's curve is read at
    the same shares, by straight lines between its steps. The method "random" is the dashed reference.
    """
    _need(curves, "method", "curve", "share", "probability", "seed")
    curves = curves if "question" in curves else curves.assign(question=0)
    shares = np.linspace(0, 1, 101)
    with style():
        figure = NotebookFigure(figsize=(9.2, 4.2), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, (curve, label) in zip(panels, (("deletion", "taken away"), ("insertion", "added")), strict=True):
            of_curve = curves[curves["curve"] == curve]
            for i, method in enumerate(curves["method"].unique()):
                each = [
                    np.interp(shares, rows["share"], rows["probability"])
                    for _, rows in of_curve[of_curve["method"] == method].sort_values("share").groupby("question")
                ]
                is_random = method == "random"
                axes.plot(
                    shares,
                    np.mean(each, axis=0),
                    color=REFERENCE if is_random else COLORS[i % len(COLORS)],
                    linestyle="--" if is_random else ("-", "-.", ":")[i % 3],
                    label=_plain(method),
                )
            axes.set_title(curve)
            axes.set_xlabel(f"chunks {label} (% of all)")
            axes.set_xlim(-0.03, 1.1)  # room for the last label, so that the layout settles at once
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
            _share_axis(axes, "probability of the answer (%)")
        panels[0].legend(loc="upper right", fontsize=8)
        figure.suptitle(title)
        n = curves["question"].nunique()
        figure.supxlabel(f"n = {n} questions, seed {_seeds(curves)}", fontsize=8, color=REFERENCE)
    return figure


def plot_hit_rate_by_method(results: pd.DataFrame, *, title: str = "The evidence is ranked first") -> Figure:
    """Horizontal bars: how often a method ranks the evidence first, with its 95% interval and its chance level.

    results: method, n, hit_rate, low, high, chance (0 to 1), seed; drawn top to bottom in table order.
    """
    _need(results, "method", "n", "hit_rate", "low", "high", "chance", "seed")
    with style():
        figure, axes = _figure((7.2, 1.6 + 0.5 * len(results)), title)
        for place, row in enumerate(results.to_dict("records")):
            error = [[max(0.0, row["hit_rate"] - row["low"])], [max(0.0, row["high"] - row["hit_rate"])]]
            axes.barh(place, row["hit_rate"], xerr=error, height=0.6, color=COLORS[0], alpha=0.75, capsize=3)
            label = "chance" if place == 0 else None
            axes.plot([row["chance"]] * 2, [place - 0.4, place + 0.4], color=COLORS[1], linewidth=2, label=label)
        names = [f"{_plain(row['method'])}\n(n = {row['n']})" for row in results.to_dict("records")]
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.05)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("evidence ranked first (% of questions)")
        axes.grid(axis="y", visible=False)
        _legend_below(axes)
        figure.supxlabel(f"seed {_seeds(results)}; bars: 95% Wilson interval", fontsize=8, color=REFERENCE)
    return figure


def plot_margin_by_sentence(
    table: pd.DataFrame, *, title: str = "What the adapter stored, sentence by sentence"
) -> Figure:
    """The margin of every sentence in document order, coloured by whether it was stored.

    Above the line at 0 the adapter gives the sentence's answer, below it another one.

    table: status ("stored", "lost", "not asked"), margin (nats; NaN where nothing was asked).
    """
    _need(table, "status", "margin")
    places = np.arange(1, len(table) + 1)
    status = table["status"].to_numpy()
    margins = np.nan_to_num(table["margin"].to_numpy(dtype=float))
    with style():
        figure, axes = _figure(WIDE, title)
        for name, color in (("stored", COLORS[2]), ("lost", COLORS[1])):
            chosen = status == name
            axes.bar(places[chosen], margins[chosen], color=color, width=0.8, label=f"{name} ({int(chosen.sum())})")
        chosen = status == "not asked"
        axes.plot(
            places[chosen], np.zeros(chosen.sum()), "x", color=REFERENCE, label=f"not asked ({int(chosen.sum())})"
        )
        axes.axhline(0, color=REFERENCE, linewidth=1.2)
        axes.set_xlabel("sentence (position in the documents)")
        axes.set_ylabel("margin of the answer (nats)")
        _legend_below(axes)
        figure.supxlabel(f"n = {len(table)} sentences, those of one adapter", fontsize=8, color=REFERENCE)
    return figure


def plot_flags_by_threshold(
    curve: pd.DataFrame, *, title: str = "Flagging the facts that the adapter fails to answer"
) -> Figure:
    """Two panels: precision against the share of failing facts found, and found against false alarms.

    curve: condition, signal, found, precision, false_alarms (0 to 1), n, failing, seed; one row per threshold. A cross
    marks the aim, 90% found at 10% false alarms; the dashed line is flagging at random.
    """
    _need(curve, "condition", "signal", "found", "precision", "false_alarms", "n", "failing", "seed")
    groups = list(curve.groupby(["condition", "signal"], sort=False))
    with style():
        figure = NotebookFigure(figsize=(11.0, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for i, ((condition, signal), rows) in enumerate(groups):
            color, line = COLORS[i % len(COLORS)], ("-", "-.", ":")[i // len(COLORS) % 3]
            rows = rows.sort_values(["found", "precision"])
            label = _plain(f"{condition}: {signal}")
            left.plot(rows["found"], rows["precision"], color=color, linestyle=line, label=label)
            rows = rows.sort_values(["false_alarms", "found"])
            right.plot(rows["false_alarms"], rows["found"], color=color, linestyle=line)
        for condition, rows in curve.groupby("condition", sort=False):
            share = rows["failing"].iloc[0] / rows["n"].iloc[0]
            left.axhline(share, color=REFERENCE, linestyle="--", linewidth=1, label=f"{condition}: at random")
        right.plot([0, 1], [0, 1], color=REFERENCE, linestyle="--", linewidth=1)
        right.plot(0.1, 0.9, marker="x", markersize=9, markeredgewidth=2, color="black", linestyle="none")
        for axes, x, y in (
            (left, "failing facts found (%)", "flagged facts that fail (%)"),
            (right, "answered facts flagged (%)", "failing facts found (%)"),
        ):
            axes.set_xlim(-0.03, 1.03)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_xlabel(x)
            _share_axis(axes, y)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8)
        counts = {
            c: f"{c}: {r['failing'].iloc[0]} of {r['n'].iloc[0]} facts fail" for c, r in curve.groupby("condition")
        }
        figure.supxlabel(f"{'; '.join(counts.values())}; seed {_seeds(curve)}", fontsize=8, color=REFERENCE)
    return figure


def plot_gate_losses_by_threshold(
    curve: pd.DataFrame, *, title: str = "The gate: what it spares unrelated questions, and what it costs"
) -> Figure:
    """Relative losses against the gate's threshold, one panel per number of documents and rule.

    curve, of one condition: documents, rule, least (nats), unrelated_loss (against the base model), answerable_loss and
    override_loss (against no gate), unanswerable (exact match, drawn as its loss; both NaN where none were asked),
    chosen (bool), n, seed. A vertical line marks the chosen threshold, a dotted one the aim of 1%.
    """
    _need(curve, "documents", "rule", "least", "unrelated_loss", "answerable_loss", "override_loss", "unanswerable")
    _need(curve, "chosen", "n", "seed")
    groups = list(curve.groupby(["documents", "rule"], sort=False))
    with style():
        figure = NotebookFigure(figsize=(11.0, 2.2 + 2.2 * math.ceil(len(groups) / 2)), layout="constrained")
        panels = figure.subplots(math.ceil(len(groups) / 2), min(2, len(groups)), sharey=True, squeeze=False).ravel()
        for axes, ((documents, rule), rows) in zip(panels, groups, strict=False):
            rows = rows.sort_values("least")
            axes.plot(rows["least"], rows["unrelated_loss"], marker=MARKERS[0], label="unrelated questions")
            axes.plot(rows["least"], rows["answerable_loss"], marker=MARKERS[1], label="answerable questions")
            if rows["unanswerable"].notna().any():
                wrong = 1 - rows["unanswerable"]
                axes.plot(rows["least"], wrong, marker=MARKERS[2], label="unanswerable questions: wrong")
            if rows["override_loss"].notna().any():
                axes.plot(
                    rows["least"], rows["override_loss"], marker=MARKERS[3], label="contradictions: not overridden"
                )
            axes.axhline(0.01, color=REFERENCE, linestyle=":", linewidth=1.2, label="aim: 1%")
            for least in rows["least"][rows["chosen"]]:
                axes.axvline(least, color=REFERENCE, linestyle="--", linewidth=1.2, label="chosen on validation")
            axes.set_ylim(-0.02, 0.5)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_xlabel("least relevance to answer (nats)")
            axes.set_ylabel("relative loss (%)")
            plural = "" if documents == 1 else "s"
            axes.set_title(f"{documents} document{plural}, {rule}: n = {rows['n'].iloc[0]} each", fontsize=9.5)
        for axes in panels[len(groups) :]:
            axes.set_visible(False)
        figure.suptitle(f"{title} (seed {_seeds(curve)})", x=0.01, ha="left", fontsize=11)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def plot_override_by_strength(
    curve: pd.DataFrame, *, title: str = "The strength dial: overriding what the base model believes, and the damage"
) -> Figure:
    """Shares of answers against the weight of the document's blocks, one panel without and one with the gate.

    curve: layers, weight, gate (bool), override, unrelated, document (0 to 1) with their _low and _high, n, seed. Only
    "all layers" is drawn with its intervals; for single layers the override alone is drawn, thin.
    """
    shares = {"override": "the document overrides", "document": "the document's other facts", "unrelated": "unrelated"}
    bounds = [f"{name}_{side}" for name in shares for side in ("low", "high")]
    _need(curve, "layers", "weight", "gate", "n", "seed", *shares, *bounds)
    with style():
        figure = NotebookFigure(figsize=(11.0, 4.4), layout="constrained")
        gates = sorted(curve["gate"].unique())
        panels = np.atleast_1d(figure.subplots(1, len(gates), sharey=True))
        for axes, gate in zip(panels, gates, strict=True):
            rows = curve[(curve["gate"] == gate) & (curve["layers"] == "all layers")].sort_values("weight")
            for i, (name, label) in enumerate(shares.items()):
                axes.fill_between(
                    rows["weight"], rows[f"{name}_low"], rows[f"{name}_high"], color=COLORS[i], alpha=0.18, linewidth=0
                )
                axes.plot(rows["weight"], rows[name], color=COLORS[i], marker=MARKERS[i], label=label)
            single = curve[(curve["gate"] == gate) & (curve["layers"] != "all layers")]
            for i, (layers, part) in enumerate(single.groupby("layers", sort=True)):
                part = pd.concat([part, rows[rows["weight"] == 1]]).sort_values("weight")
                axes.plot(
                    part["weight"], part["override"], color=COLORS[0], linewidth=0.9,
                    linestyle=("--", "-.", ":", (0, (1, 3)))[i % 4], label=f"override, {layers} alone turned",
                )  # fmt: skip
            axes.set_title("with the gate, routed" if gate else "all blocks, no gate", fontsize=10)
            axes.set_xlabel("strength (times the blocks as written)")
            _share_axis(axes, "answers (%)")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        named = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(named.values(), named.keys(), loc="outside right center", fontsize=8)
        n = f"n = {curve['n'].min()} documents"
        figure.supxlabel(f"{n}, seed {_seeds(curve)}; band: 95% Wilson interval", fontsize=8, color=REFERENCE)
    return figure


def plot_singular_values_by_index(
    spectra: pd.DataFrame, *, title: str = "Singular values of the update, layer by layer"
) -> Figure:
    """A panel per adapter, a line per layer (and module, where there are several): singular values, largest first.

    spectra: adapter (str), module, layer, index (1 = largest), value (no unit), as `weights.spectra` gives them. Values
    below a millionth of an adapter's largest are rounding and are not drawn.
    """
    _need(spectra, "adapter", "module", "layer", "index", "value")
    names, modules = list(spectra["adapter"].unique()), spectra["module"].nunique()
    with style():
        figure = NotebookFigure(figsize=(9.2, 4.2), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
            rows = spectra[spectra["adapter"] == name]
            rows = rows[rows["value"] > 1e-6 * rows["value"].max()]
            for i, ((module, layer), line) in enumerate(rows.groupby(["module", "layer"])):
                label = f"layer {layer}" + (f", {module}" if modules > 1 else "")
                axes.plot(line["index"], line["value"], color=COLORS[i % len(COLORS)], marker=".", label=label)
            axes.set_yscale("log")
            axes.set_xlabel("singular direction (position, largest first)")
            axes.set_ylabel("singular value (no unit)")
            axes.set_title(_plain(name), fontsize=10)
            axes.legend(loc="upper right")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def plot_norms_by_layer(
    norms: pd.DataFrame, *, title: str = "How large an update is, and over how many directions"
) -> Figure:
    """Left the update's norms as a share of the base weight's, right its effective and stable rank; a line per adapter.

    norms: adapter (str), layer, relative_frobenius, relative_spectral (shares), effective_rank, stable_rank, as
    `weights.norms` gives them for one module. ValueError for several modules.
    """
    columns = {"relative_frobenius": "Frobenius", "relative_spectral": "spectral"}
    ranks = {"effective_rank": "effective", "stable_rank": "stable"}
    _need(norms, "adapter", "layer", *columns, *ranks)
    if norms.duplicated(["adapter", "layer"]).any():
        raise ValueError("the table holds a layer of an adapter twice: give the rows of one module")
    with style():
        figure = NotebookFigure(figsize=(9.2, 4.2), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, chosen in zip(panels, (columns, ranks), strict=True):
            for i, (name, rows) in enumerate(norms.groupby("adapter", sort=False)):
                for (column, label), line in zip(chosen.items(), ("-", "--"), strict=True):
                    axes.plot(
                        rows["layer"], rows[column], line, color=COLORS[i], marker=MARKERS[i],
                        label=f"{_plain(name)}: {label}",
                    )  # fmt: skip
            axes.set_xticks(sorted(norms["layer"].unique()))
            axes.set_xlabel("layer (position)")
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8, handlelength=4)
        panels[0].set_ylim(bottom=0)
        panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
        panels[0].set_ylabel("norm of the update (% of the base weight's)")
        panels[1].set_yscale("log")
        panels[1].yaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]))
        panels[1].yaxis.set_minor_locator(NullLocator())
        panels[1].yaxis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:g}"))
        panels[1].set_ylabel("rank (number of directions)")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def plot_parts_by_layer(
    parts: pd.DataFrame, *, title: str = "The bias and the documents' part, layer by layer"
) -> Figure:
    """A panel per adapter, two bars per layer: norm of the documents' part and of the bias; their cosine above.

    parts: adapter (str), layer, documents, bias (Frobenius norms), cosine, as `weights.bias_and_documents` gives them
    for one module.
    """
    _need(parts, "adapter", "layer", "documents", "bias", "cosine")
    names = list(parts["adapter"].unique())
    with style():
        figure = NotebookFigure(figsize=(9.2, 4.0), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            rows = parts[parts["adapter"] == name]
            axes.bar(rows["layer"] - 0.2, rows["documents"], 0.38, color=COLORS[0], label="documents")
            axes.bar(rows["layer"] + 0.2, rows["bias"], 0.38, color=COLORS[1], label="bias")
            for layer, top, cosine in zip(
                rows["layer"], rows[["documents", "bias"]].max(axis=1), rows["cosine"], strict=True
            ):
                axes.annotate(
                    f"cos {cosine:.2f}", (layer, top), (0, 3), textcoords="offset points", ha="center", fontsize=8
                )
            axes.set_xticks(rows["layer"])
            axes.margins(y=0.12)
            axes.set_xlabel("layer (position)")
            axes.set_ylabel("norm of the part (Frobenius)")
            axes.set_title(_plain(name), fontsize=10)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def plot_similarity_by_document(
    similarity: pd.DataFrame, *, label: str = "cosine of the updates", title: str = "How alike adapters are"
) -> Figure:
    """Heat map of a square table of similarities, names on both sides, in the table's order; the value in each cell.

    similarity: as `weights.similarity` gives it; `label` names the measure. Colours run from -1 to 1 where a value is
    negative, else from 0 to 1.
    """
    _need(similarity)
    _need(similarity, *similarity.index)
    values = similarity.to_numpy()
    low = -1.0 if (values < -0.05).any() else 0.0
    with style():
        figure, axes = _figure((3.6 + 0.42 * len(values), 2.4 + 0.42 * len(values)), title)
        axes.grid(False)
        image = axes.imshow(values, cmap="RdBu" if low else "viridis", vmin=low, vmax=1)
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                dark = abs(value) > 0.6 if low else value < 0.6
                axes.text(
                    j, i, f"{value:.2f}".replace("0.", "."), ha="center", va="center", fontsize=7,
                    color="white" if dark else "black",
                )  # fmt: skip
        names = [_plain(name) for name in similarity.columns]
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlabel("adapters of single documents")
        axes.set_ylabel("adapters of single documents")
        figure.colorbar(image, ax=axes, shrink=0.8).set_label(label)
    return figure


def plot_intruders_by_index(
    intruders: pd.DataFrame, *, threshold: float = 0.6, title: str = "Which directions of W + dW are new"
) -> Figure:
    """A panel per adapter, a line per layer: the largest cosine of each singular vector of W + dW with those of W.

    intruders: adapter (str), layer, index (1 = largest), cosine (0 to 1), as `weights.intruder_dimensions` gives them
    for one module. Points below the line at `threshold` are intruder dimensions.
    """
    _need(intruders, "adapter", "layer", "index", "cosine")
    names = list(intruders["adapter"].unique())
    with style():
        figure = NotebookFigure(figsize=(9.2, 4.0), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
            for i, (layer, rows) in enumerate(intruders[intruders["adapter"] == name].groupby("layer")):
                color = COLORS[i % len(COLORS)]
                axes.plot(rows["index"], rows["cosine"], color=color, marker=MARKERS[i % 7], label=f"layer {layer}")
            axes.axhline(threshold, color=REFERENCE, linestyle="--", linewidth=1.2, label=f"threshold ({threshold:g})")
            axes.set_ylim(0, 1.03)
            axes.set_xlabel("singular direction of W + dW (position)")
            axes.set_ylabel("largest cosine with one of W (no unit)")
            axes.set_title(_plain(name), fontsize=10)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def plot_margin_by_condition(
    margins: pd.DataFrame, *, title: str = "Does the margin depend on the document?"
) -> Figure:
    """A row of dots per condition, one per question, and the median as a black bar; right of 0 the answer is said.

    margins: condition (str; drawn top to bottom in table order), margin (nats), seed.
    """
    _need(margins, "condition", "margin", "seed")
    conditions = list(margins["condition"].unique())
    with style():
        figure, axes = _figure((7.2, 1.8 + 0.5 * len(conditions)), title)
        for position, condition in enumerate(conditions):
            values = margins.loc[margins["condition"] == condition, "margin"].to_numpy()
            spread = 0.5 * (np.arange(len(values)) / max(1, len(values) - 1) - 0.5)
            axes.plot(values, position + spread, "o", color=COLORS[0], markersize=3, alpha=0.45)
            axes.vlines(np.median(values), position - 0.36, position + 0.36, color="black", linewidth=2.4)
        axes.axvline(0, color=REFERENCE, linestyle="--", linewidth=1.2)
        axes.set_yticks(range(len(conditions)), [_plain(condition) for condition in conditions])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("margin of the right answer (nats)")
        n = margins.groupby("condition").size().min()
        figure.supxlabel(
            f"n = {n} questions per condition, seed {_seeds(margins)}; black: median", fontsize=8, color=REFERENCE
        )
    return figure


def plot_recompression_by_rank(samples: pd.DataFrame, *, title: str = "A long adapter at a small rank") -> Figure:
    """Above the share of needles found, below the error of the update, against the rank that was kept.

    samples: length_tokens, rank, full (bool: nothing was cut), error (0 to 1), correct (bool), seed, as
    `weights.recompressed_needles` gives them; a line per length. A length's full adapter stands last, as a hollow mark.
    """
    _need(samples, "length_tokens", "rank", "full", "error", "correct", "seed")
    with style():
        figure = NotebookFigure(figsize=TALL, layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        above.set_title(title)
        for i, (length, rows) in enumerate(samples.groupby("length_tokens")):
            counted = rows.assign(n=1, exact_match=rows["correct"].astype(float))
            pooled = pool(counted, ["rank"])
            errors = rows.groupby("rank")["error"].mean()
            whole = rows.loc[rows["full"], "rank"].unique()
            marked = {"color": COLORS[i], "marker": MARKERS[i], "linestyle": "none", "markerfacecolor": "white"}
            _line_with_band(above, pooled["rank"], pooled, i, f"{_tokens(length)} tokens")
            below.plot(errors.index, errors, color=COLORS[i], marker=MARKERS[i])
            above.plot(whole, pooled.set_index("rank").loc[whole, "exact_match"], markersize=9, **marked)
            below.plot(whole, errors.loc[whole], markersize=9, **marked)
        above.axhline(0.99, color=REFERENCE, linestyle=":", linewidth=1.2, label="aim: 99%")
        _share_axis(above, "exact match (% of needles)")
        above.legend(loc="lower right")
        cut = samples.loc[~samples["full"].astype(bool), "rank"].unique()
        near = {full for full in samples["rank"].unique() if any(1 / 1.5 < full / rank < 1.5 for rank in cut)}
        labelled = [rank for rank in samples["rank"].unique() if rank in cut or rank not in near]
        _token_axis(below, labelled, "rank that was kept (number of directions; hollow: all)")
        below.set_ylim(bottom=0)
        below.yaxis.set_major_formatter(PercentFormatter(1.0))
        below.set_ylabel("error of the update (% of its norm)")
        n = samples.groupby(["length_tokens", "rank"]).size()
        n = f"{n.min()}" if n.min() == n.max() else f"{n.min()} to {n.max()}"
        figure.supxlabel(
            f"n = {n} haystacks per point, seed {_seeds(samples)}; band: 95% Wilson interval",
            fontsize=8,
            color=REFERENCE,
        )
    return figure


# --- speed and memory -------------------------------------------------------------------------------------------------
COST_LABELS = {"seconds": "time (seconds)", "memory_mib": "peak memory (MiB)"}


def plot_cost_by_length(
    costs: pd.DataFrame,
    *,
    value: str = "seconds",
    published: dict[str, float] | None = None,
    published_length: float = 32_768,
    title: str = "Time by length, and the least it can be",
) -> Figure:
    """One panel per model: seconds (or memory) of every method against document length, a floor in grey.

    costs: panel, method, length_tokens, n (runs), floor (bool), seed, and the column `value` ("seconds" with quartiles
    seconds_low and seconds_high, drawn as a band, or "memory_mib"). Rows where it is NaN, because there was too little
    memory, are crosses at the top. Seconds have a logarithmic axis, memory one from 0. published: {name: value}, level
    lines up to `published_length` tokens.
    """
    if value not in COST_LABELS:
        raise ValueError(f"value must be {' or '.join(COST_LABELS)}, not {value!r}")
    quartiles = [f"{value}_low", f"{value}_high"] if value == "seconds" else []
    _need(costs, "panel", "method", "length_tokens", value, *quartiles, "n", "floor", "seed")
    names, methods = list(costs["panel"].unique()), list(costs["method"].unique())
    drawn = [method for method in methods if not costs.loc[costs["method"] == method, "floor"].any()]
    with style():
        figure = NotebookFigure(figsize=(4.6 + 2.9 * len(names), 4.2), layout="constrained")
        panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, names, strict=True):
            rows = costs[costs["panel"] == name]
            for method in rows["method"].unique():
                of_method = rows[rows["method"] == method].sort_values("length_tokens")
                found = of_method.dropna(subset=value)
                if method in drawn:
                    i = drawn.index(method)
                    look = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
                else:
                    look = {"color": REFERENCE, "linestyle": "--", "linewidth": 1.4, "zorder": 1}
                axes.plot(found["length_tokens"], found[value], label=_plain(method), **look)
                if quartiles:
                    low, high = (found[column] for column in quartiles)
                    axes.fill_between(found["length_tokens"], low, high, color=look["color"], alpha=0.18, linewidth=0)
                lost = of_method.loc[of_method[value].isna(), "length_tokens"]
                axes.plot(
                    lost, [0.97] * len(lost), "x", color=look["color"], markersize=8,
                    transform=axes.get_xaxis_transform(),
                )  # fmt: skip
            for j, (label, level) in enumerate((published or {}).items()):
                shortest = rows["length_tokens"].min()
                color = COLORS[-1 - j % len(COLORS)]
                axes.plot(
                    [shortest, max(published_length, shortest)], [level] * 2, color=color, linestyle=":",
                    label=_plain(label),
                )  # fmt: skip
            axes.set_title(_plain(name), fontsize=10)
            _token_axis(axes, rows["length_tokens"].unique(), "document length (tokens)")
        if value == "seconds":
            _log_axis(panels[0])
        else:
            panels[0].set_ylim(bottom=0)
        panels[0].set_ylabel(COST_LABELS[value])
        labelled = {
            label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(labelled.values(), labelled.keys(), loc="outside right center")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        note = "median, band: quartiles" if quartiles else "the most in any of them"
        if costs[value].isna().any():
            note += "; crosses: out of memory"
        figure.supxlabel(f"{_runs(costs)} per point, seed {_seeds(costs)}; {note}", fontsize=8, color=REFERENCE)
    return figure


def plot_parts_by_length(parts: pd.DataFrame, *, title: str = "Where the time goes") -> Figure:
    """One panel per model: the share of each part in the seconds of a length, stacked, with the seconds on top.

    parts: panel, length_tokens, part (str; stacked from below in table order), seconds, n (runs), seed.
    """
    _need(parts, "panel", "length_tokens", "part", "seconds", "n", "seed")
    if parts.duplicated(["panel", "length_tokens", "part"]).any():
        raise ValueError("a part of one length stands in several rows: give the rows of one way of internalizing")
    names, order = list(parts["panel"].unique()), list(parts["part"].unique())
    with style():
        figure = NotebookFigure(figsize=(4.0 + 2.8 * len(names), 4.4), layout="constrained")
        panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, names, strict=True):
            rows = parts[parts["panel"] == name]
            table = rows.pivot(index="length_tokens", columns="part", values="seconds").fillna(0.0)
            total, below = table.sum(axis=1), np.zeros(len(table))
            for i, part in enumerate(order):
                share = (table[part] / total if part in table else 0 * total).to_numpy()
                axes.bar(range(len(table)), share, bottom=below, color=COLORS[i % len(COLORS)], label=_plain(part))
                below = below + share
            for place, seconds in enumerate(total):
                axes.text(place, 1.01, _seconds(seconds), ha="center", va="bottom", fontsize=8)
            axes.set_xticks(range(len(table)), [_tokens(length) for length in table.index])
            axes.grid(axis="x", visible=False)
            axes.set_title(_plain(name), fontsize=10, pad=14)
            axes.set_xlabel("document length (tokens)")
        _share_axis(panels[0], "share of the time (%)")
        panels[0].set_ylim(0, 1.0)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside right center")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.supxlabel(f"{_runs(parts)} per bar, seed {_seeds(parts)}: the median one", fontsize=8, color=REFERENCE)
    return figure


def plot_documents_per_second_by_batch(
    rates: pd.DataFrame, *, title: str = "Documents internalized in one call"
) -> Figure:
    """Documents per second against how many are internalized in one call, a line per model.

    rates: model, documents, seconds, seconds_low, seconds_high (of the whole call: median and quartiles), n (runs),
    seed. The dotted line is the rate of one document per call.
    """
    _need(rates, "model", "documents", "seconds", "seconds_low", "seconds_high", "n", "seed")
    with style():
        figure, axes = _figure(WIDE, title)
        for i, model in enumerate(rates["model"].unique()):
            rows = rates[rates["model"] == model].sort_values("documents")
            count, color = rows["documents"], COLORS[i % len(COLORS)]
            axes.fill_between(
                count, count / rows["seconds_high"], count / rows["seconds_low"], color=color, alpha=0.18, linewidth=0
            )
            axes.plot(
                count, count / rows["seconds"], color=color, marker=MARKERS[i % len(MARKERS)], label=_plain(model)
            )
            first = rows.iloc[0]
            axes.axhline(first["documents"] / first["seconds"], color=color, linestyle=":", linewidth=1.2)
        _token_axis(axes, rates["documents"].unique(), "documents in one call (number of them)")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("speed (documents per second)")
        axes.legend()
        figure.supxlabel(
            f"{_runs(rates)} per point, seed {_seeds(rates)}: median, band: quartiles; dotted: the smallest call's",
            fontsize=8,
            color=REFERENCE,
        )
    return figure


def plot_adapter_file_by_length(files: pd.DataFrame, *, title: str = "An adapter on disk") -> Figure:
    """Left the size of an adapter's file, right the seconds to save and to load it, against document length.

    files: model, what ("save" or "load"), length_tokens, file_mib, seconds, seconds_low, seconds_high, n (runs), seed.
    """
    _need(files, "model", "what", "length_tokens", "file_mib", "seconds", "seconds_low", "seconds_high", "n", "seed")
    with style():
        figure = NotebookFigure(figsize=(9.2, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        lines = {"save": "-", "load": "--"}
        for i, model in enumerate(files["model"].unique()):
            color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
            rows = files[files["model"] == model].sort_values("length_tokens")
            size = rows.groupby("length_tokens")["file_mib"].first()
            left.plot(size.index, size, color=color, marker=marker, label=_plain(model))
            for what, line in lines.items():
                some = rows[rows["what"] == what]
                right.fill_between(
                    some["length_tokens"], some["seconds_low"], some["seconds_high"], color=color, alpha=0.18,
                    linewidth=0,
                )  # fmt: skip
                right.plot(
                    some["length_tokens"], some["seconds"], color=color, marker=marker, linestyle=line,
                    label=f"{_plain(model)}: {what}",
                )  # fmt: skip
        for axes, label in ((left, "size of the file (MiB)"), (right, "time (seconds)")):
            _log_axis(axes)
            axes.set_ylabel(label)
            _token_axis(axes, files["length_tokens"].unique(), "document length (tokens)")
        left.legend(loc="upper left")
        kinds = [Line2D([], [], color=REFERENCE, linestyle=line, label=what) for what, line in lines.items()]
        right.legend(handles=kinds, loc="upper left")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.supxlabel(
            f"{_runs(files)} per point, seed {_seeds(files)}: median, band: quartiles", fontsize=8, color=REFERENCE
        )
    return figure


def _log_axis(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))


def _runs(table: pd.DataFrame) -> str:
    """'n = 3 to 5 runs'."""
    n = table["n"].dropna().astype(int)
    counted = f"{n.min()}" if n.min() == n.max() else f"{n.min()} to {n.max()}"
    return f"n = {counted} run{'' if n.max() == 1 else 's'}"


def _seconds(seconds: float) -> str:
    """0.0123 -> '12 ms', 1.234 -> '1.2 s'."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
