"""Pictures say what the tables say.

Right labels, every method drawn, known intervals, same bytes twice, tables untouched.
"""

import io

import matplotlib
import numpy as np
import pandas as pd
import pytest

from d2l_lib import plots

LENGTHS = [64, 256, 1024, 4096]


@pytest.fixture
def needles() -> pd.DataFrame:
    rows = []
    for method, shares in {"Doc-to-LoRA": (1.0, 1.0, 0.98, 0.96), "base model": (1.0, 1.0, 0.9, 0.0)}.items():
        for length, share in zip(LENGTHS, shares, strict=True):
            for depth in (0.1, 0.5, 0.9):
                for seed in (0, 1):
                    row = {
                        "method": method,
                        "length_tokens": length,
                        "depth": depth,
                        "n": 50,
                        "exact_match": share,
                        "seed": seed,
                    }
                    rows.append(row)
    return pd.DataFrame(rows)


@pytest.fixture
def tables(needles) -> dict:
    """Every plot function with a table it can draw."""
    steps = np.arange(0, 1000, 100)
    history = pd.concat(
        pd.DataFrame(
            {
                "seed": seed,
                "step": steps,
                "loss": 5.0 / (1 + steps),
                "exact_match": np.where(steps % 200 == 0, steps / 1000, np.nan),
            }
        )
        for seed in (0, 1, 2)
    )
    costs = pd.DataFrame(
        {"length_tokens": LENGTHS * 2, "seconds": [0.1, 0.3, 1.0, 4.0] * 2, "peak_memory_mib": [500.0] * 8}
    )
    blocks = pd.DataFrame(
        {"chunk": range(6), "norm": [0.5, 0.4, 7.0, 0.5, 0.6, 0.4], "holds_needle": [i == 2 for i in range(6)]}
    )
    scores = pd.DataFrame(
        {"task": ["needle", "one-hop"], "n": [500, 800], "exact_match": [0.99, 0.05], "seed": 0, "aim": [0.99, np.nan]}
    )
    curriculum = pd.DataFrame({"seed": 0, "step": steps, "right_haystack": steps / 1000, "right_recital": np.nan})
    lengths = pd.DataFrame({"facts": [2, 2, 4, 4], "length_tokens": [30, 34, 61, 70]})
    facts = pd.DataFrame(
        {"method": ["in context", "Doc-to-LoRA"] * 2, "facts": ["1-5", "1-5", "11-15", "11-15"], "n": 100,
         "exact_match": [1.0, 0.9, 0.98, 0.5], "seed": 0}
    )  # fmt: skip
    documents = pd.DataFrame({"documents": [1, 2, 16], "n": 200, "exact_match": [0.9, 0.88, 0.7], "seed": 0})
    seconds = pd.DataFrame(
        {"method": ["no context", "Doc-to-LoRA", "distillation"], "score": [0.0, 0.9, 0.5], "low": [0.0, 0.8, 0.4],
         "high": [0.05, 0.95, 0.6], "seconds_prepare": [0.0, 0.05, 20.0], "documents": 10, "n": 80, "seed": 0}
    )  # fmt: skip
    ablation = pd.DataFrame(
        {"variant": ["ours", "ours", "rank 4"] * 2, "seed": [0, 1, 0] * 2,
         "task": ["one hop"] * 3 + ["encyclopedia"] * 3, "n": 100, "exact_match": [0.9, 0.8, 0.4, 1.0, 1.0, 0.2]}
    )  # fmt: skip
    return {
        plots.plot_ablation: ablation,
        plots.plot_exact_match_by_facts: facts,
        plots.plot_exact_match_by_documents: documents,
        plots.plot_score_by_seconds: seconds,
        plots.plot_needle_accuracy_by_length: needles,
        plots.plot_needle_accuracy_by_length_and_depth: needles[needles["method"] == "Doc-to-LoRA"],
        plots.plot_training_curves: history,
        plots.plot_internalization_cost_by_length: costs,
        plots.plot_block_norm_by_chunk: blocks,
        plots.plot_base_model_scores: scores,
        plots.plot_curriculum_by_step: curriculum,
        plots.plot_document_length_by_facts: lengths,
    }


def png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def labels(axes) -> tuple[str, str]:
    return axes.get_xlabel(), axes.get_ylabel()


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # the closed form worked by hand for p = 0, 1/2, 1 (z^2 = 3.841459): e.g. p = 0 gives high = z^2 / (n + z^2)
    [
        (0, 10, 0.0, 3.841459 / 13.841459),
        (10, 10, 10 / 13.841459, 1.0),
        (50, 100, 0.4038315, 0.5961685),
        (99, 100, 0.9455, 0.9982),
    ],
)
def test_pooled_rows_have_known_wilson_intervals(successes, n, low, high):
    # in two parts, as two depths of one length would be
    table = pd.DataFrame({"length_tokens": 64, "n": [n // 2, n - n // 2], "exact_match": successes / n, "seed": 0})
    pooled = plots.pool(table, ["length_tokens"])
    assert (pooled["low"].item(), pooled["high"].item()) == pytest.approx((low, high), abs=5e-5)


def test_pooling_weighs_by_n():
    table = pd.DataFrame({"length_tokens": [64, 64], "n": [1, 99], "exact_match": [0.0, 1.0]})
    pooled = plots.pool(table, ["length_tokens"])
    assert pooled["exact_match"].item() == pytest.approx(0.99)
    assert pooled["n"].item() == 100
    assert pooled["low"].item() == pytest.approx(0.9455, abs=5e-5)


def test_facts_stand_in_order_of_number_and_no_cost_stands_at_the_left_edge(tables):
    facts = tables[plots.plot_exact_match_by_facts]
    axes = plots.plot_exact_match_by_facts(facts.iloc[::-1]).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1-5", "11-15"]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert lines == {"in context": [1.0, 0.98], "Doc-to-LoRA": [0.9, 0.5]}
    axes = plots.plot_score_by_seconds(tables[plots.plot_score_by_seconds]).axes[0]
    places = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.get_lines() if len(line.get_xdata()) == 1]
    assert {(1e-3, 0.0), (0.05, 0.9), (20.0, 0.5)} <= set(places)
    bars = plots.plot_exact_match_by_condition(
        pd.DataFrame({"condition": ["b", "a"], "n": 10, "exact_match": [0.5, 1.0], "seed": 0}), title="x"
    ).axes[0]
    assert [label.get_text().split("\n")[0] for label in bars.get_yticklabels()] == ["b", "a"]


def test_variants_are_bars_of_their_mean_with_a_dot_for_each_seed(tables):
    figure = plots.plot_ablation(tables[plots.plot_ablation])
    first, second = figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["ours", "rank 4"]
    assert [bar.get_width() for bar in first.patches] == pytest.approx([0.85, 0.4])
    assert list(first.get_lines()[0].get_xdata()) == pytest.approx([0.9, 0.8])
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("one hop", "encyclopedia")


def test_every_function_draws_the_same_bytes_twice_and_leaves_its_table_and_settings_alone(tables):
    for plot, table in tables.items():
        before, settings = table.copy(deep=True), dict(matplotlib.rcParams)
        first, second = plot(table), plot(table)
        assert isinstance(first, matplotlib.figure.Figure)
        assert png(first) == png(second), plot.__name__
        assert first._repr_png_() == png(first), plot.__name__
        pd.testing.assert_frame_equal(table, before)
        assert dict(matplotlib.rcParams) == settings, plot.__name__


def test_every_axis_is_labelled_with_its_unit(tables):
    units = (
        "tokens",
        "%",
        "steps",
        "optimizer updates",
        "facts",
        "documents",
        "seconds",
        "MiB",
        "nats",
        "Frobenius",
        "position",
    )
    for plot, table in tables.items():
        panels = [axes for axes in plot(table).axes if not hasattr(axes, "_colorbar")]
        for axes in panels:
            shared = axes.get_shared_x_axes().get_siblings(axes)
            x = next(sibling.get_xlabel() for sibling in shared if sibling.get_xlabel())
            assert any(unit in x for unit in units), (plot.__name__, x)
            names_rows = plot in (plots.plot_base_model_scores, plots.plot_ablation)
            assert names_rows or any(unit in axes.get_ylabel() for unit in units), (plot.__name__, axes.get_ylabel())


def test_needle_lines_show_every_method_at_its_measured_share(needles):
    figure = plots.plot_needle_accuracy_by_length(needles, native_window=1024, training_length=256)
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert {"Doc-to-LoRA", "base model"} <= set(lines)
    assert list(lines["base model"].get_xdata()) == LENGTHS
    assert lines["base model"].get_ydata() == pytest.approx([1.0, 1.0, 0.9, 0.0])
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.texts] == ["longest in training (256)", "native window (1K)"]
    assert any(label.startswith("chance") for label in lines)
    assert len(axes.collections) == 2, "one band per method"
    assert "n = 300 needles per length, seed 0, 1" in figure.get_supxlabel()


def test_heat_map_puts_length_across_and_depth_down_and_leaves_gaps_empty(needles):
    table = needles[
        (needles["method"] == "base model") & ~((needles["length_tokens"] == 64) & (needles["depth"] == 0.9))
    ]
    axes = plots.plot_needle_accuracy_by_length_and_depth(table).axes[0]
    image = np.ma.masked_invalid(axes.images[0].get_array())
    assert image.shape == (3, 4)
    assert list(image[0]) == pytest.approx([1.0, 1.0, 0.9, 0.0])
    assert [tuple(cell) for cell in np.argwhere(np.ma.getmaskarray(image))] == [(2, 0)]
    assert len(axes.texts) == 11
    assert [label.get_text() for label in axes.get_yticklabels()] == ["10%", "50%", "90%"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["64", "256", "1K", "4K"]


def test_heat_map_asks_which_method(needles):
    with pytest.raises(ValueError, match="several methods"):
        plots.plot_needle_accuracy_by_length_and_depth(needles)
    with pytest.raises(ValueError, match="no method 'x'"):
        plots.plot_needle_accuracy_by_length_and_depth(needles, method="x")


def test_training_curves_skip_steps_that_were_not_evaluated(tables):
    figure = plots.plot_training_curves(tables[plots.plot_training_curves])
    above, below = figure.axes
    assert len(above.lines) == 3
    assert len(below.lines) == 4, "three seeds and chance"
    assert list(below.lines[0].get_xdata()) == [0, 200, 400, 600, 800]
    assert len(above.lines[0].get_xdata()) == 10


def test_cost_reference_is_linear_through_the_longest_document(tables):
    axes = plots.plot_internalization_cost_by_length(tables[plots.plot_internalization_cost_by_length]).axes[0]
    linear = next(line for line in axes.lines if line.get_label() == "linear in length")
    assert linear.get_ydata()[-1] == pytest.approx(4.0)
    assert linear.get_ydata() / linear.get_xdata() == pytest.approx(np.full(4, 4.0 / 4096))
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_needle_block_is_set_apart(tables):
    axes = plots.plot_block_norm_by_chunk(tables[plots.plot_block_norm_by_chunk]).axes[0]
    marked = next(line for line in axes.lines if line.get_label() == "holds the needle")
    assert (list(marked.get_xdata()), list(marked.get_ydata())) == ([2], [7.0])


def test_scores_keep_their_order_and_show_n(tables):
    axes = plots.plot_base_model_scores(tables[plots.plot_base_model_scores]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["needle\n(n = 500)", "one-hop\n(n = 800)"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.99, 0.05])


def test_a_missing_column_and_an_empty_table_are_named(needles):
    with pytest.raises(ValueError, match=r"lacks the columns \['seed'\]"):
        plots.plot_needle_accuracy_by_length(needles.drop(columns="seed"))
    with pytest.raises(ValueError, match="no rows"):
        plots.plot_needle_accuracy_by_length(needles.iloc[:0])
    with pytest.raises(TypeError, match="must be a pandas DataFrame, not list"):
        plots.plot_needle_accuracy_by_length(needles.to_dict("records"))


@pytest.mark.parametrize("column", ["method", "length_tokens", "n"])
def test_rows_without_a_key_are_refused(needles, column):
    needles[column] = needles[column].astype(object).where(needles.index != 3)
    with pytest.raises(ValueError, match=rf"missing values in the columns \['{column}'\]"):
        plots.plot_needle_accuracy_by_length(needles)


@pytest.mark.parametrize("share", [float("nan"), 98.0, -0.1])
def test_shares_that_are_none_are_refused(needles, share):
    """A row that was not measured would otherwise count as all wrong."""
    needles.loc[3, "exact_match"] = share
    for draw in (plots.plot_needle_accuracy_by_length, plots.plot_base_model_scores):
        with pytest.raises(ValueError, match="between 0 and 1"):
            draw(needles.rename(columns={"method": "task"}) if draw is plots.plot_base_model_scores else needles)


def test_dollar_signs_in_names_are_no_formula(needles):
    png(plots.plot_needle_accuracy_by_length(needles.replace("base model", "$a_{$")))


def test_one_curriculum_at_a_time(tables):
    history = tables[plots.plot_curriculum_by_step]
    with pytest.raises(ValueError, match="several runs, give one of the seeds 0, 1"):
        plots.plot_curriculum_by_step(pd.concat([history, history.assign(seed=1)]))
