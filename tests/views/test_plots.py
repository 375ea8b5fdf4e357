"""Pictures say what the tables say.

Right labels, every method drawn, known intervals, same bytes twice, tables untouched.
"""

import io

import matplotlib
import numpy as np
import pandas as pd
import pytest

from d2l_lib.tasks import scores
from d2l_lib.views import plots

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
    costs = pd.DataFrame({"length_tokens": LENGTHS, "seconds": [0.1, 0.3, 1.0, 4.0], "peak_memory_mib": 500.0})
    costs = costs.assign(
        seconds_low=0.9 * costs["seconds"], seconds_high=1.2 * costs["seconds"], n=[5, 5, 3, 3], seed=0
    )
    blocks = pd.DataFrame(
        {"chunk": range(6), "norm": [0.5, 0.4, 7.0, 0.5, 0.6, 0.4], "holds_needle": [i == 2 for i in range(6)]}
    )
    composed = pd.DataFrame(
        {"document": ["report", "report", "memo", "report"], "chunk": [2, 1, 0, 0], "norm": [3.0, 2.0, 5.0, 1.0]}
    )
    scores = pd.DataFrame(
        {"task": ["needle", "one-hop"], "n": [500, 800], "exact_match": [0.99, 0.05], "seed": 0, "aim": [0.99, np.nan]}
    )
    curriculum = pd.DataFrame({"seed": 0, "step": steps, "right_haystack": steps / 1000, "right_recital": np.nan})
    losses = pd.DataFrame({"seed": 0, "step": steps, "own passage": 5.0 / (1 + steps), "another passage": 6.0})
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
    sentences = pd.DataFrame({"status": ["stored", "not asked", "lost", "stored"], "margin": [2.0, np.nan, -1.0, 3.0]})
    flags = pd.DataFrame(
        {"condition": ["all blocks"] * 3 + ["routed"] * 3, "signal": "margin", "found": [0.0, 0.5, 1.0] * 2,
         "precision": [1.0, 0.8, 0.3] * 2, "false_alarms": [0.0, 0.1, 1.0] * 2, "n": 100, "failing": 30, "seed": 0}
    )  # fmt: skip
    gate = pd.DataFrame(
        {"rule": "one threshold", "documents": [1, 1, 64, 64], "least": [0.0, 1.0] * 2, "n": 50, "seed": 0,
         "unrelated_loss": [0.1, 0.0] * 2, "answerable_loss": [0.0, 0.05] * 2, "override_loss": [0.0, 0.4, None, None],
         "unanswerable": [0.7, 0.9, None, None], "chosen": [False, True] * 2}
    )  # fmt: skip
    dial = pd.DataFrame(
        {"layers": ["all layers", "all layers", "layer 1"] * 2, "weight": [1.0, 2.0, 2.0] * 2, "n": 40, "seed": 0,
         "gate": [False] * 3 + [True] * 3}
    )  # fmt: skip
    for name, share in (("override", 0.7), ("document", 0.9), ("unrelated", 1.0)):
        dial = dial.assign(**{name: share, f"{name}_low": share - 0.1, f"{name}_high": min(1.0, share + 0.1)})
    layers = pd.DataFrame(
        {"adapter": ["one"] * 4 + ["two"] * 4, "module": "down_proj", "layer": [0, 0, 1, 1] * 2, "index": [1, 2] * 4,
         "value": [4.0, 2.0, 3.0, 1e-9] * 2, "cosine": [0.9, 0.5, 0.8, 0.7] * 2}
    )  # fmt: skip
    by_layer = pd.DataFrame(
        {"adapter": ["one", "one", "two", "two"], "layer": [0, 1] * 2, "relative_frobenius": [0.1, 0.2] * 2,
         "relative_spectral": [0.3, 0.4] * 2, "effective_rank": [5.0, 6.0] * 2, "stable_rank": [2.0, 3.0] * 2,
         "documents": [3.0, 4.0] * 2, "bias": [1.0, 2.0] * 2, "cosine": [0.1, -0.1] * 2}
    )  # fmt: skip
    alike = pd.DataFrame([[1.0, 0.2], [0.2, 1.0]], index=["one", "two"], columns=["one", "two"])
    conditions = pd.DataFrame({"condition": ["own", "own", "other"], "margin": [4.0, 2.0, -3.0], "seed": 0})
    cut = pd.DataFrame(
        {"length_tokens": 4096, "rank": [4, 4, 100, 100], "full": [False, False, True, True],
         "error": [0.2, 0.4, 0.0, 0.0], "correct": [False, True, True, True], "seed": 0}
    )  # fmt: skip
    reads = pd.DataFrame(
        {"token": [0, 1, 2] * 2, "text": ["Nel", "in", "<|end|>"] * 2, "layer": [1] * 3 + [2] * 3, "module": "down",
         "block": [4, 2, -1, 2, 2, -1], "document": ["a", "a", None] * 2, "chunk": [4, 2, None, 2, 2, None],
         "evidence": [1.5, 2.0, 0.5, 3.0, 5.0, 0.7]}
    )  # fmt: skip
    chunks = pd.DataFrame({"unit": ["chunk 0", "chunk 1", "chunk 2"], "contribution": [0.1, 9.0, -0.5]})
    directions = pd.DataFrame(
        {"layer": [0, 0, 1, 1], "module": "down_proj", "direction": [0, 1, 0, 1], "contribution": [0.1, 0.0, 3.0, -1.0]}
    )
    deletion = pd.DataFrame(
        {"method": ["gradient"] * 4 + ["random"] * 4, "curve": ["deletion", "deletion", "insertion", "insertion"] * 2,
         "units": [0, 2] * 4, "share": [0.0, 1.0] * 4, "probability": [0.8, 0.0, 0.0, 0.8] * 2, "seed": 0}
    )  # fmt: skip
    hits = pd.DataFrame(
        {"method": ["gradient", "random"], "n": 50, "hit_rate": [0.98, 0.04], "low": [0.9, 0.01], "high": [1.0, 0.1],
         "chance": 0.05, "seed": 0}
    )  # fmt: skip
    speed = pd.DataFrame(
        {"panel": ["tiny"] * 4 + ["other"] * 2, "length_tokens": [64, 256] * 3, "n": 3, "seed": 0,
         "method": ["internalize"] * 2 + ["floor"] * 2 + ["internalize"] * 2,
         "floor": [False, False, True, True, False, False], "seconds": [1.0, 4.0, 0.5, 2.0, 3.0, np.nan]}
    )  # fmt: skip
    speed = speed.assign(seconds_low=speed["seconds"] * 0.9, seconds_high=speed["seconds"] * 1.2, memory_mib=100.0)
    seconds_of = pd.DataFrame(
        {"panel": "tiny", "length_tokens": [64, 64, 256, 256], "part": ["encoder", "head"] * 2,
         "seconds": [0.03, 0.01, 1.0, 3.0], "n": 3, "seed": 0}
    )  # fmt: skip
    rates = pd.DataFrame(
        {"model": "tiny", "documents": [1, 4], "seconds": [0.5, 1.0], "seconds_low": [0.4, 0.8],
         "seconds_high": [0.6, 1.6], "n": [3, 5], "seed": 0}
    )  # fmt: skip
    files = pd.DataFrame(
        {"model": "tiny", "what": ["save", "load"] * 2, "length_tokens": [64, 64, 256, 256], "n": 3, "seed": 0,
         "file_mib": [1.0, 1.0, 4.0, 4.0], "seconds": [0.2, 0.1, 0.8, 0.4]}
    )  # fmt: skip
    files = files.assign(seconds_low=files["seconds"], seconds_high=files["seconds"])
    scaling = pd.DataFrame(
        {"network": ["fast"] * 3 + ["slow"] * 3, "way": "ours", "gpus": [8, 16, 128] * 2,
         "step_seconds": [1.0, 0.5, 0.4, 1.0, 0.8, 0.9], "gpu_days": [8.0, 8.5, 20.0, 8.0, 12.0, 40.0],
         "gpu_days_low": [4.0, 5.0, 16.0] * 2, "gpu_days_high": [16.0, 17.0, 30.0] * 2,
         "efficiency": [0.99, 0.9, 0.5, 0.99, 0.6, 0.2], "same_recipe": [True, True, False] * 2}
    )  # fmt: skip
    return {
        plots.plot_training_by_gpus: scaling,
        plots.plot_cost_by_length: speed,
        plots.plot_parts_by_length: seconds_of,
        plots.plot_documents_per_second_by_batch: rates,
        plots.plot_adapter_file_by_length: files,
        plots.plot_contribution_by_chunk: chunks,
        plots.plot_contribution_by_layer_and_direction: directions,
        plots.plot_probability_by_share: deletion,
        plots.plot_hit_rate_by_method: hits,
        plots.plot_singular_values_by_index: layers,
        plots.plot_norms_by_layer: by_layer,
        plots.plot_parts_by_layer: by_layer,
        plots.plot_block_norm_by_document: composed,
        plots.plot_similarity_by_document: alike,
        plots.plot_intruders_by_index: layers,
        plots.plot_margin_by_condition: conditions,
        plots.plot_recompression_by_rank: cut,
        plots.plot_margin_by_sentence: sentences,
        plots.plot_flags_by_threshold: flags,
        plots.plot_gate_losses_by_threshold: gate,
        plots.plot_override_by_strength: dial,
        plots.plot_evidence_by_token_and_block: reads,
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
        plots.plot_loss_by_step: losses,
        plots.plot_document_length_by_facts: lengths,
        plots.plot_exact_match_by_condition: scores.rename(columns={"task": "condition"}),
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
    pooled = scores.pool(table, ["length_tokens"])
    assert (pooled["low"].item(), pooled["high"].item()) == pytest.approx((low, high), abs=5e-5)


def test_pooling_weighs_by_n():
    table = pd.DataFrame({"length_tokens": [64, 64], "n": [1, 99], "exact_match": [0.0, 1.0]})
    pooled = scores.pool(table, ["length_tokens"])
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
    table = tables[plots.plot_score_by_seconds]
    few = table.assign(n=[40, *table["n"][1:]], documents=[5, *table["documents"][1:]])
    n, documents = table["n"].max(), table["documents"].max()
    for rows, counts in ((table, f"{n} questions on {documents}"), (few, f"40 to {n} questions on 5 to {documents}")):
        axes = plots.plot_score_by_seconds(rows).axes[0]
        assert f"n = {counts} documents, seed" in axes.get_xlabel()
        assert [text.get_text() for text in axes.texts] == [str(i) for i in range(1, len(rows) + 1)]
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


@pytest.mark.slow
def test_every_function_draws_the_same_bytes_twice_and_leaves_its_table_and_settings_alone(tables):
    for plot, table in tables.items():
        before, settings = table.copy(deep=True), dict(matplotlib.rcParams)
        first, second = plot(table), plot(table)
        assert isinstance(first, matplotlib.figure.Figure)
        assert first._repr_png_() == png(second), plot.__name__
        pd.testing.assert_frame_equal(table, before)
        assert dict(matplotlib.rcParams) == settings, plot.__name__


# Their rows have names, and so no unit.
NAMED_ROWS = (
    plots.plot_base_model_scores,
    plots.plot_exact_match_by_condition,
    plots.plot_ablation,
    plots.plot_margin_by_condition,
    plots.plot_block_norm_by_document,
    plots.plot_hit_rate_by_method,
    plots.plot_evidence_by_token_and_block,
)


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
        "GPU",
        "nats",
        "Frobenius",
        "position",
        "times",
        "no unit",
        "number of",
    )
    for plot, table in tables.items():
        panels = [axes for axes in plot(table).axes if not hasattr(axes, "_colorbar")]
        for axes in panels:
            shared = axes.get_shared_x_axes().get_siblings(axes)
            x = next(sibling.get_xlabel() for sibling in shared if sibling.get_xlabel())
            assert any(unit in x for unit in units), (plot.__name__, x)
            shared = axes.get_shared_y_axes().get_siblings(axes)
            y = next((sibling.get_ylabel() for sibling in shared if sibling.get_ylabel()), "")
            assert plot in NAMED_ROWS or any(unit in y for unit in units), (plot.__name__, y)


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


def test_what_was_read_has_tokens_across_and_the_blocks_that_were_read_down(tables):
    reads = tables[plots.plot_evidence_by_token_and_block]
    figure = plots.plot_evidence_by_token_and_block(reads)
    axes = figure.axes[0]
    assert _rows_down(figure) == ["chunk 2", "chunk 4", "no block"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["Nel", "in", "<|end|>"]
    image = np.ma.masked_invalid(axes.images[0].get_array()).filled(-1)
    assert image.tolist() == [[3.0, 5.0, -1], [1.5, -1, -1], [-1, -1, -1]], "the last layer that read a block counts"
    counts = {text.get_position(): text.get_text() for text in axes.texts}
    assert counts == {(0, 0): "1 of 2", (0, 1): "1 of 2", (2, 2): "2 of 2"}
    assert "no proof of a cause" in figure.get_supxlabel()
    texts = ["It rained.", "b", "Nelin led it.", "c", "Costs $5 and $6, and " + "more " * 20]
    blocks = pd.DataFrame({"block": range(5), "document": "a", "chunk": range(5), "text": texts})
    names = _rows_down(plots.plot_evidence_by_token_and_block(reads, blocks=blocks))
    assert names[:2] == ["chunk 0: It rained.", "chunk 1: b"] and len(names) == 6, "unread ones too, where they are few"
    assert r"\$5 and \$6" in names[4] and names[4].endswith("…") and len(names[4]) < 55
    few = plots.plot_evidence_by_token_and_block(reads, blocks=blocks.assign(document=["a", "b"] * 2 + ["a"]), most=3)
    names = _rows_down(few)
    assert names[0] == "a, chunk 2: Nelin led it." and len(names) == 3
    with pytest.raises(ValueError, match="no block 4, which was read"):
        plots.plot_evidence_by_token_and_block(reads, blocks=blocks[:3])
    unread = plots.plot_evidence_by_token_and_block(reads.assign(block=-1, document=None, chunk=None))
    assert _rows_down(unread) == ["no block"] and len(unread.axes) == 1, "no colour bar of nothing"


def _rows_down(figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


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


def test_losses_of_less_than_a_decade_have_plain_labels(tables):
    history = tables[plots.plot_training_curves]
    one = history[history["seed"] == history["seed"].min()].copy()
    one["loss"] = np.linspace(3.1, 0.76, len(one))
    figure = plots.plot_training_curves(one)
    figure.savefig(io.BytesIO(), format="png")  # which writes the labels
    low, high = figure.axes[0].get_ylim()
    ticks = figure.axes[0].yaxis.get_major_ticks() + figure.axes[0].yaxis.get_minor_ticks()
    assert [tick.label1.get_text() for tick in ticks if low <= tick.get_loc() <= high] == ["1", "2"]
    assert "n = 1 training run, seed 0" in [text.get_text() for text in figure.texts]


def test_cost_reference_is_linear_through_the_longest_document(tables):
    axes = plots.plot_internalization_cost_by_length(tables[plots.plot_internalization_cost_by_length]).axes[0]
    linear = next(line for line in axes.lines if line.get_label() == "linear in length")
    assert linear.get_ydata()[-1] == pytest.approx(4.0)
    assert linear.get_ydata() / linear.get_xdata() == pytest.approx(np.full(4, 4.0 / 4096))
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    (bars,) = axes.containers[0].lines[2]
    assert bars.get_segments()[-1][:, 1] == pytest.approx([3.6, 4.8])
    assert axes.figure.get_supxlabel().startswith("n = 3 to 5 runs per length, seed 0")


def test_needle_block_is_set_apart(tables):
    axes = plots.plot_block_norm_by_chunk(tables[plots.plot_block_norm_by_chunk]).axes[0]
    marked = next(line for line in axes.lines if line.get_label() == "holds the needle")
    assert (list(marked.get_xdata()), list(marked.get_ydata())) == ([2], [7.0])


def test_scores_keep_their_order_and_show_n(tables):
    axes = plots.plot_base_model_scores(tables[plots.plot_base_model_scores]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["needle\n(n = 500)", "one-hop\n(n = 800)"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.99, 0.05])


PLOTS = [function for name, function in vars(plots).items() if name.startswith("plot_")]


@pytest.mark.parametrize("draw", PLOTS, ids=lambda draw: draw.__name__)
def test_a_table_without_rows_is_one_clear_error(draw, tables):
    whole = tables[draw]
    for empty in (whole.iloc[:0], pd.DataFrame(), pd.DataFrame(columns=["a"])):
        with pytest.raises(ValueError, match="no rows, so there is nothing to draw"):
            draw(empty)
    for wrong in (whole.to_dict("records"), [], None, {}):
        with pytest.raises(TypeError, match="the table must be a pandas DataFrame, not"):
            draw(wrong)


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


def test_losses_are_a_line_each_of_one_run(tables):
    losses = tables[plots.plot_loss_by_step]
    losses.loc[0, "own passage"] = np.nan
    figure = plots.plot_loss_by_step(losses)
    lines = {line.get_label(): line.get_xdata() for line in figure.axes[0].lines}
    assert list(lines) == ["own passage", "another passage"] and lines["own passage"][0] == 100
    assert figure.axes[0].get_ylim()[0] == 0, "differences are not cut"
    assert "n = 1 training run, seed 0" in [text.get_text() for text in figure.texts]
    with pytest.raises(ValueError, match="several runs"):
        plots.plot_loss_by_step(pd.concat([losses, losses.assign(seed=1)]))


def test_sentences_are_bars_in_order_and_the_unasked_have_none(tables):
    axes = plots.plot_margin_by_sentence(tables[plots.plot_margin_by_sentence]).axes[0]
    bars = {(round(bar.get_x() + bar.get_width() / 2), bar.get_height()) for bar in axes.patches}
    assert bars == {(1, 2.0), (3, -1.0), (4, 3.0)}
    assert {"stored (2)", "lost (1)", "not asked (1)"} <= {
        text.get_text() for text in axes.figure.legends[0].get_texts()
    }


def test_flag_panels_show_both_sorts_of_error(tables):
    left, right = plots.plot_flags_by_threshold(tables[plots.plot_flags_by_threshold]).axes
    assert list(left.get_lines()[0].get_ydata()) == [1.0, 0.8, 0.3]
    assert list(right.get_lines()[0].get_xdata()) == [0.0, 0.1, 1.0]


def test_gate_panels_are_one_per_number_of_documents_with_the_choice_marked(tables):
    first, second = plots.plot_gate_losses_by_threshold(tables[plots.plot_gate_losses_by_threshold]).axes
    assert first.get_title(loc="left").startswith("1 document, one threshold:")
    assert second.get_title(loc="left").startswith("64 documents, one threshold:")
    marked = [line.get_xdata()[0] for line in first.get_lines() if line.get_label() == "chosen on validation"]
    assert marked == [1.0]
    drawn = [[line.get_label() for line in axes.get_lines()] for axes in (first, second)]
    assert ["unanswerable questions: wrong" in names for names in drawn] == [True, False]
    assert ["contradictions: not overridden" in names for names in drawn] == [True, False]


def test_the_dial_has_a_panel_with_and_one_without_the_gate(tables):
    first, second = plots.plot_override_by_strength(tables[plots.plot_override_by_strength]).axes
    titles = [axes.get_title(loc="left") for axes in (first, second)]
    assert titles == ["all blocks, no gate", "with the gate, routed"]
    alone = next(line for line in first.get_lines() if "layer 1" in line.get_label())
    assert list(alone.get_xdata()) == [1.0, 2.0]  # a single layer starts from the blocks as written


def test_rounding_is_no_singular_value_and_layers_have_a_line_each(tables):
    first, second = plots.plot_singular_values_by_index(tables[plots.plot_singular_values_by_index]).axes
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("one", "two")
    lines = {line.get_label(): list(line.get_ydata()) for line in first.get_lines()}
    assert lines == {"layer 0": [4.0, 2.0], "layer 1": [3.0]}


def test_parts_are_pairs_of_bars_and_norms_a_line_for_each_measure(tables):
    first, _ = plots.plot_parts_by_layer(tables[plots.plot_parts_by_layer]).axes
    assert [bar.get_height() for bar in first.patches] == [3.0, 4.0, 1.0, 2.0]
    assert [text.get_text() for text in first.texts] == ["cos 0.10", "cos -0.10"]
    table = tables[plots.plot_norms_by_layer]
    left, right = plots.plot_norms_by_layer(table).axes
    assert {line.get_label(): list(line.get_ydata()) for line in left.get_lines()}["two: spectral"] == [0.3, 0.4]
    assert {line.get_label(): list(line.get_ydata()) for line in right.get_lines()}["one: effective"] == [5.0, 6.0]
    with pytest.raises(ValueError, match="give the rows of one module"):
        plots.plot_norms_by_layer(pd.concat([table, table]))


def test_similarities_keep_their_names_and_colours_reach_below_zero_only_where_needed(tables):
    table = tables[plots.plot_similarity_by_document]
    axes = plots.plot_similarity_by_document(table).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]
    assert [text.get_text() for text in axes.texts] == ["1.00", ".20", ".20", "1.00"]
    assert axes.images[0].get_clim() == (0.0, 1.0)
    opposite = plots.plot_similarity_by_document(table.replace(0.2, -0.5)).axes[0]
    assert opposite.images[0].get_clim() == (-1.0, 1.0)


def test_margins_are_dots_with_a_median_in_table_order(tables):
    axes = plots.plot_margin_by_condition(tables[plots.plot_margin_by_condition]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["own", "other"]
    assert [list(line.get_xdata()) for line in axes.get_lines()[:2]] == [[4.0, 2.0], [-3.0]]
    assert [bar.get_segments()[0][0][0] for bar in axes.collections] == [3.0, -3.0]


def test_blocks_are_dots_in_chunk_order_beside_their_document(tables):
    table = tables[plots.plot_block_norm_by_document]
    figure = plots.plot_block_norm_by_document(table)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["report\n(n = 3)", "memo\n(n = 1)"]
    dots = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]
    assert dots == [([1.0, 2.0, 3.0], [-0.25, 0.0, 0.25]), ([5.0], [1.0])]
    assert [bar.get_segments()[0][0][0] for bar in axes.collections] == [2.0, 5.0]
    assert figure.get_supxlabel() == "n = 4 blocks of 2 documents; black: median"
    with pytest.raises(ValueError, match="one adapter, one per block"):
        plots.plot_block_norm_by_document(pd.concat([table, table]))


def test_recompression_marks_the_adapter_of_which_nothing_was_cut(tables):
    above, below = plots.plot_recompression_by_rank(tables[plots.plot_recompression_by_rank]).axes
    assert list(above.get_lines()[0].get_ydata()) == [0.5, 1.0]
    assert list(below.get_lines()[0].get_ydata()) == pytest.approx([0.3, 0.0])
    assert (list(above.get_lines()[1].get_xdata()), list(above.get_lines()[1].get_ydata())) == ([100], [1.0])


def test_evidence_is_set_apart_and_chance_stands_beside_each_method(tables):
    axes = plots.plot_contribution_by_chunk(tables[plots.plot_contribution_by_chunk], evidence=[1]).axes[0]
    bars = {group.get_label(): [bar.get_height() for bar in group] for group in axes.containers}
    assert bars == {"holds the evidence": [9.0], "other": [0.1, -0.5]}
    axes = plots.plot_hit_rate_by_method(tables[plots.plot_hit_rate_by_method]).axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.98, 0.04])
    assert len([line for line in axes.lines if list(line.get_xdata()) == [0.05, 0.05]]) == 2


def test_curves_of_questions_are_averaged_at_the_same_share(tables):
    curves = tables[plots.plot_probability_by_share].assign(question=0)
    curves = curves[curves["method"] == "gradient"]
    steeper = pd.DataFrame(
        {"method": "gradient", "curve": "deletion", "units": [0, 1, 4], "share": [0.0, 0.25, 1.0],
         "probability": [0.8, 0.0, 0.0], "seed": 0, "question": 1}
    )  # fmt: skip
    figure = plots.plot_probability_by_share(pd.concat([curves, steeper], ignore_index=True))
    line = next(line for line in figure.axes[0].lines if line.get_label() == "gradient")
    assert np.interp(0.25, line.get_xdata(), line.get_ydata()) == pytest.approx((0.6 + 0.0) / 2)
    assert figure.axes[0].get_ylabel() == "probability of the answer (%)"


def test_the_heat_map_of_directions_has_layers_down(tables):
    plot = plots.plot_contribution_by_layer_and_direction
    axes = plot(tables[plot]).axes[0]
    assert axes.images[0].get_array().tolist() == [[0.1, 0.0], [3.0, -1.0]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0, down_proj", "1, down_proj"]


def test_costs_have_a_panel_for_each_model_a_grey_floor_and_a_cross_where_memory_ran_out(tables):
    table = tables[plots.plot_cost_by_length]
    figure = plots.plot_cost_by_length(table, published={"published": 0.2}, published_length=128)
    first, second = figure.axes
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("tiny", "other")
    lines = {line.get_label(): line for line in first.get_lines()}
    assert list(lines["internalize"].get_ydata()) == [1.0, 4.0] and list(lines["floor"].get_ydata()) == [0.5, 2.0]
    assert lines["floor"].get_color() == plots.REFERENCE and lines["internalize"].get_color() == plots.COLORS[0]
    assert (list(lines["published"].get_xdata()), list(lines["published"].get_ydata())) == ([64, 128], [0.2, 0.2])
    crosses = [list(line.get_xdata()) for line in second.get_lines() if line.get_marker() == "x"]
    assert crosses == [[256]] and "crosses: out of memory" in figure.get_supxlabel()
    band = first.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.9, 4.8))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["internalize", "floor", "published"]
    memory = plots.plot_cost_by_length(table, value="memory_mib").axes[0]
    assert memory.get_yscale() == "linear" and memory.get_ylim()[0] == 0 and first.get_yscale() == "log"
    with pytest.raises(ValueError, match="seconds or memory_mib"):
        plots.plot_cost_by_length(table, value="euros")


def test_parts_fill_each_bar_and_its_seconds_stand_on_top(tables):
    table = tables[plots.plot_parts_by_length]
    axes = plots.plot_parts_by_length(table).axes[0]
    bars = {group.get_label(): [bar.get_height() for bar in group] for group in axes.containers}
    assert bars == {"encoder": [0.75, 0.25], "head": [0.25, 0.75]}
    assert [bar.get_y() for bar in axes.containers[1]] == [0.75, 0.25]
    assert [text.get_text() for text in axes.texts] == ["40 ms", "4.0 s"]
    with pytest.raises(ValueError, match="several rows"):
        plots.plot_parts_by_length(pd.concat([table, table]))


def test_rates_are_documents_for_each_second(tables):
    axes = plots.plot_documents_per_second_by_batch(tables[plots.plot_documents_per_second_by_batch]).axes[0]
    line, one = axes.get_lines()
    assert list(line.get_ydata()) == [2.0, 4.0] and set(one.get_ydata()) == {2.0}
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((1 / 0.6, 5.0))


def test_a_training_has_a_line_for_each_network_and_a_mark_where_the_recipe_ends(tables):
    table = tables[plots.plot_training_by_gpus]
    panels = plots.plot_training_by_gpus(table).axes
    for axes, column in zip(panels, ("step_seconds", "gpu_days", "efficiency"), strict=True):
        fast, slow, end = axes.get_lines()
        assert list(fast.get_xdata()) == [8, 16, 128] and fast.get_label() == "fast\nours"
        assert [*fast.get_ydata(), *slow.get_ydata()] == list(table[column])
        assert set(end.get_xdata()) == {16}
    (band,) = panels[1].collections
    assert (band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()) == (4.0, 30.0)
    all_same = plots.plot_training_by_gpus(table.assign(same_recipe=True)).axes[0]
    assert len(all_same.get_lines()) == 2


def test_files_have_a_size_and_two_times(tables):
    left, right = plots.plot_adapter_file_by_length(tables[plots.plot_adapter_file_by_length]).axes
    assert [list(line.get_ydata()) for line in left.get_lines()] == [[1.0, 4.0]]
    lines = {line.get_label(): list(line.get_ydata()) for line in right.get_lines()}
    assert lines == {"tiny: save": [0.2, 0.8], "tiny: load": [0.1, 0.4]}
