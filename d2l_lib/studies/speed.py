"""Seconds and memory: the costs of internalizing and answering, beside their lower bounds.

    d2l study speed-tiny                                                   # the tiny models, on the CPU in minutes
    d2l study speed-smollm2                                                # the real one, in minutes
    d2l study speed-gemma --layers 26 --lengths 1024 4096 32768 131072     # Gemma-2-2B's sizes, on a GPU

Each of the `measurements` runs in a process of its own and adds a row; an interrupted record continues.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pandas as pd

from d2l_lib.base_model import default_device
from d2l_lib.documents import check_texts
from d2l_lib.studies import earlier_rows, recorded_rows
from d2l_lib.studies.gemma_sizes import GEMMA_2_2B, RECIPES
from d2l_lib.studies.measurements import MODES, Measurement, measure_alone
from d2l_lib.studies.watches import PARTS

# Seconds and GB on LongBench documents of up to 32K tokens, on the authors' GPU (arXiv 2602.15902, long question
# answering, gemma-2-2b-it).
PUBLISHED = pd.DataFrame(
    [
        {"dataset": "2WikiMultihopQA", "mode": "batched", "seconds": 0.21, "memory_gb": 11.5},
        {"dataset": "MultiFieldQA", "mode": "batched", "seconds": 0.20, "memory_gb": 19.4},
        {"dataset": "Qasper", "mode": "batched", "seconds": 0.18, "memory_gb": 31.2},
        {"dataset": "2WikiMultihopQA", "mode": "iterative", "seconds": 0.55, "memory_gb": 3.8},
    ]
)
PUBLISHED_LENGTH = 32_768  # tokens of the longest of these documents

_TINY_LENGTHS = {"tiny": (1024, 8192, 32_768, 131_072), "tiny/qa": (1024, 8192)}
_IN_CONTEXT_LENGTHS = (512, 1024, 2048, 4096, 8192)
_SMOLLM2_LENGTHS = (128, 512, 2048)
_DOCUMENTS = (1, 2, 4, 8, 16, 32)
_GEMMA_LENGTHS = {"cpu": (1024, 2048), "gpu": tuple(2**k for k in range(10, 18))}
_GEMMA_ON_CPU = {"layers": 2, "vocabulary": 4096, "dtype": "bfloat16"}


# ----------------------------------------------------------------------------------------------------------- the plans
def tiny_measurements(seed: int = 0, lengths: Sequence[int] | None = None) -> list[Measurement]:
    """The measurements of the tiny models; `lengths` replaces every list of lengths."""
    plan = []
    for model, of_model in _TINY_LENGTHS.items():
        plan.append(Measurement("answer", model, mode="no adapter"))
        for length in lengths or of_model:
            plan += [Measurement("internalize", model, length, mode) for mode in MODES["internalize"]]
            plan += [Measurement("answer", model, length, mode) for mode in ("all blocks", "routed")]
            plan += [Measurement(what, model, length) for what in ("floor", "save", "load")]
        plan += [Measurement("documents", model, documents=count) for count in _DOCUMENTS]
    plan += [Measurement("in context", "tiny", length) for length in lengths or _IN_CONTEXT_LENGTHS]
    return [replace(m, seed=seed) for m in plan]


def smollm2_measurements(seed: int = 0, lengths: Sequence[int] | None = None) -> list[Measurement]:
    """The measurements of SmolLM2-135M-Instruct with token rows; `lengths` replaces the documents' lengths."""
    plan = [Measurement("start", "smollm2", mode=mode) for mode in MODES["start"]]
    plan.append(Measurement("answer", "smollm2", mode="no adapter"))
    for length in lengths or _SMOLLM2_LENGTHS:
        plan.append(Measurement("internalize", "smollm2", length, "batched"))
        plan.append(Measurement("answer", "smollm2", length, "all blocks"))
        plan += [Measurement(what, "smollm2", length) for what in ("floor", "in context", "save", "load")]
    return [replace(m, seed=seed) for m in plan]


def gemma_measurements(lengths: Sequence[int] | None = None, seed: int = 0, **sizes) -> list[Measurement]:
    """The measurements at Gemma-2-2B's sizes.

    lengths: None takes all on a GPU, a few on a CPU.
    sizes: layers, vocabulary and dtype of a Measurement; None is as published on a GPU, less on a CPU.
    """
    on_cpu = default_device().type == "cpu"
    usual = _GEMMA_ON_CPU if on_cpu else dict.fromkeys(_GEMMA_ON_CPU)
    sizes = usual | {name: value for name, value in sizes.items() if value is not None}
    lengths = _GEMMA_LENGTHS["cpu" if on_cpu else "gpu"] if lengths is None else lengths
    plan = []
    for model in (f"gemma-2-2b/{recipe}" for recipe in RECIPES):
        for length in lengths:
            plan += [Measurement("internalize", model, length, mode) for mode in MODES["internalize"]]
            plan.append(Measurement("floor", model, length))
    # a question costs the same with the blocks of any recipe
    plan.append(Measurement("answer", "gemma-2-2b/needle", mode="no adapter"))
    for length in lengths:
        plan += [Measurement("answer", "gemma-2-2b/needle", length, mode) for mode in ("all blocks", "routed")]
        plan.append(Measurement("in context", "gemma-2-2b/needle", length))
    return [replace(m, seed=seed, **sizes) for m in plan]


# ---------------------------------------------------------------------------------------------------------- the record
def run_tiny(n: int, seed: int, lengths: Sequence[int] | None, **limits) -> Iterator[list[dict]]:
    """The record of the tiny models; times are valid only if nothing else uses the cores."""
    return _recorded("speed_tiny", tiny_measurements(seed, lengths), n, **limits)


def run_smollm2(n: int, seed: int, lengths: Sequence[int] | None, **limits) -> Iterator[list[dict]]:
    """The record of SmolLM2-135M-Instruct; `cpu_share` says how much of a core each measurement had."""
    return _recorded("speed_smollm2", smollm2_measurements(seed, lengths), n, **limits)


def run_gemma(n: int, seed: int, lengths: Sequence[int] | None, **options) -> Iterator[list[dict]]:
    """The record at Gemma-2-2B's sizes."""
    sizes = {name: options.pop(name) for name in _GEMMA_ON_CPU}
    return _recorded("speed_gemma", gemma_measurements(lengths, seed, **sizes), n, **options)


def _recorded(
    name: str, plan: Sequence[Measurement], n: int, limit: float, memory_limit: int | None, again: bool
) -> Iterator[list[dict]]:
    limits = {"repeats": n, "limit_s": limit, "memory_limit_mib": memory_limit}
    return record(plan, earlier_rows(name), again=again, **limits)


def record(
    measurements: Sequence[Measurement], rows: Sequence[dict] = (), *, again: bool = False, **options
) -> Iterator[list[dict]]:
    """The rows of a record, after each measurement that it lacks; options are those of `measure_alone`.

    again: first drop rows of the same models and depths on the same device.
    """
    wanted, rows = [m.here() for m in measurements], list(rows)
    if again:
        replaced = {(m.model, m.layers, m.device) for m in wanted}
        rows = [row for row in rows if (row["model"], row["layers"], row["device"]) not in replaced]
    present = {measurement_of(row) for row in rows}
    missing = [m for m in dict.fromkeys(wanted) if m not in present]
    for done, m in enumerate(missing, 1):
        began = time.perf_counter()
        row = measure_alone(m, **options)
        rows.append(row | {"spent_s": round(time.perf_counter() - began, 1)})
        result = f"{row['seconds']:.4f} s" if row["status"] == "measured" else row["status"]
        print(f"{done} of {len(missing)}: {m}: {result}", flush=True)
        yield rows


def measurement_of(row: dict) -> Measurement:
    """The measurement behind a row of a record."""
    return Measurement(**{name: row[name] for name in Measurement.__dataclass_fields__})


def read_records(name: str) -> pd.DataFrame:
    """All recorded rows of "tiny", "smollm2" or "gemma"; FileNotFoundError says which command makes them."""
    return pd.DataFrame(recorded_rows(f"speed_{name}", f"d2l study speed-{name}"))


# ---------------------------------------------------------------------------------------------------------- the tables
_METHODS = {
    ("internalize", "batched"): "internalize",
    ("internalize", "iterative"): "internalize, layer by layer",
    ("floor", ""): "floor: one pass of the encoder",
    ("answer", "all blocks"): "answer, all blocks",
    ("answer", "routed"): "answer, one block of all (routed)",
    ("answer", "no adapter"): "floor: the question alone",
    ("in context", ""): "answer, document in the prompt",
}


def cost_table(rows: pd.DataFrame, whats: Sequence[str]) -> pd.DataFrame:
    """The table of `views.plots.plot_cost_by_length`, from the rows of a record with these `whats`.

    Columns: panel (model, and where it ran), method, length_tokens, seconds, seconds_low, seconds_high, memory_mib, n,
    floor (bool), seed. Rows that ran out of memory have NaN there. A question without an adapter is a floor at every
    length with answers.
    """
    chosen = rows[rows["what"].isin(check_texts(whats, "measurements"))].copy()
    chosen["panel"] = [_panel_of(row) for row in chosen.to_dict("records")]
    chosen["method"] = [_METHODS[key] for key in zip(chosen["what"], chosen["mode"], strict=True)]
    chosen["floor"] = chosen["method"].str.startswith("floor")
    alone = chosen[chosen["mode"] == "no adapter"].drop(columns="length_tokens")
    with_document = chosen[chosen["mode"] != "no adapter"]
    lengths = with_document.loc[with_document["what"] == "answer", ["panel", "length_tokens"]].drop_duplicates()
    table = pd.concat([with_document, alone.merge(lengths, on="panel")], ignore_index=True)
    table = table.rename(columns={"peak_memory_mib": "memory_mib"})
    columns = ["panel", "method", "length_tokens", "seconds", "seconds_low", "seconds_high", "memory_mib", "n", "floor"]
    return table[[*columns, "seed"]]


def memory_table(rows: pd.DataFrame) -> pd.DataFrame:
    """As `cost_table` for internalizing, plus a floor: the model at rest and, on the CPU, the adapter itself."""
    least = _internalized_at_once(rows).copy()
    held = least["adapter_mib"].where(~least["device"].str.startswith("cuda"), 0.0)
    least["peak_memory_mib"] = least["resting_memory_mib"] + held
    floor = cost_table(least, ["internalize"]).assign(method="floor: the model and the adapter", floor=True)
    return pd.concat([cost_table(rows, ["internalize"]), floor], ignore_index=True)


def parts_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Seconds by part of internalizing, all layers at once: panel, length_tokens, part, seconds, n, seed."""
    return pd.DataFrame(
        [
            {"panel": _panel_of(row), "part": part, "seconds": row["parts"].get(part, 0.0)}
            | {name: row[name] for name in ("length_tokens", "n", "seed")}
            for row in _internalized_at_once(rows).sort_values("length_tokens", kind="stable").to_dict("records")
            for part in PARTS
        ]
    )


def _internalized_at_once(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[(rows["what"] == "internalize") & (rows["mode"] == "batched") & (rows["status"] == "measured")]


def _panel_of(row: dict) -> str:
    """The title of a row's panel."""
    if not row["model"].startswith("gemma"):
        return row["model"]
    name, recipe = row["model"].split("/")
    place = "CPU" if row["device"] == "cpu" else row["device_name"]
    return f"{name}, {recipe}: {layers_of(row)} layers, {row['dtype']}, {place}"


def layers_of(row: dict) -> int:
    """The number of base layers of a row at Gemma-2-2B's sizes."""
    return GEMMA_2_2B["num_hidden_layers"] if pd.isna(row["layers"]) else int(row["layers"])
