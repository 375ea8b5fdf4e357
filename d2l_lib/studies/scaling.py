"""The published training on 8 to 256 GPUs, on paper: step time, GPU-days and efficiency. No such run was made.

    d2l study scaling                # data/full_runs/scaling.jsonl, in seconds

With n GPUs, of which each takes its share of a step's batches,

    step       = batches of a GPU * operations of a batch / (_PEAK * SHARE / over_floor)  +  all-reduce
    all-reduce = calls * latency of a ring  +  2 (n - 1) / n * bytes of the gradients / bandwidth

Operations are counted from Gemma-2-2B's sizes (`products`). One number is measured: over_floor, how much longer our
training step takes than its bare matrix products, on a CPU (`bench`). What is assumed stands in `ASSUMED`. Nothing
overlaps: `training.loop` sums the gradients after the last batch of a step, in float64. Left out are the loading of
data, checkpoints, the optimizer (a few milliseconds), and the unpacking of 4-bit weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from d2l_lib.presets import preset
from d2l_lib.studies import bench, gemma_sizes, products, recorded_rows

_PEAK = 989.4e12  # operations a second
SHARE, SHARES = 0.4, (0.2, 0.6)  # of _PEAK: assumed, and the ends of a range
_NODE = 8  # GPUs
_NVLINK = 450e9  # bytes a second
NETWORKS = {"InfiniBand 8 x 400 Gb/s": 400e9, "Ethernet 100 Gb/s": 12.5e9}  # bytes a second of a node
CALL, NVLINK_HOP, NETWORK_HOP = 8.4e-6, 3.4e-6, 14e-6  # seconds
QUESTION_TOKENS, ANSWER_TOKENS = 128, 64
_CHUNK_TOKENS = {"self_generated": 512, "chunked": 256}
_NCCL = "NCCL's estimate (src/graph/tuning.cc)"
ASSUMED = pd.DataFrame(
    [
        ("H100 SXM, dense bfloat16", f"{_PEAK / 1e12} Tflop/s", "NVIDIA's data sheet"),
        ("share of it that a tuned training reaches", f"{SHARE}", "Llama 3 on H100: 0.38 to 0.43 (arXiv 2407.21783)"),
        ("range of that share", f"{SHARES[0]} to {SHARES[1]}", "a guess"),
        ("GPUs of a node", f"{_NODE}", "DGX H100's data sheet"),
        ("NVLink, each way", f"{_NVLINK / 1e9:.0f} GB/s", "NVIDIA's data sheet: 900 both ways"),
        *((f"between nodes: {name}", f"{rate / 1e9} GB/s a node", "nominal") for name, rate in NETWORKS.items()),
        ("latency of a call", f"{1e6 * CALL:.1f} us", _NCCL),
        ("latency of a hop, NVLink and network", f"{1e6 * NVLINK_HOP:.1f} and {1e6 * NETWORK_HOP:.0f} us", _NCCL),
        ("a batch", "full, as the preset allows", "a guess: the published packing is greedy"),
        ("chunks in it, first and second stage", f"{' and '.join(map(str, _CHUNK_TOKENS.values()))} tokens", "a guess"),
        ("a question on each, with its answer", f"{QUESTION_TOKENS} tokens, {ANSWER_TOKENS} of them answer", "a guess"),
    ],
    columns=["what", "value", "source"],
)


@dataclass(frozen=True)
class Stage:
    """A stage of the published training: its steps, the batches of one, and the operations that a batch needs."""

    name: str
    steps: int
    batches: int
    operations: float


@dataclass(frozen=True)
class Gradients:
    """What a step sums over the GPUs: bytes of all gradients, in so many calls."""

    way: str
    n_bytes: float
    calls: int


def published() -> tuple[list[Stage], list[Gradients]]:
    """The two stages of the published main training for Gemma-2-2B, and ways to sum its gradients: ours, and others."""
    model = gemma_sizes.random_model("main", None, None, torch.bfloat16, "meta", 0)  # shapes, no numbers
    stages = []
    for name, settings in preset("paper-gemma").qa.stages.items():
        tokens = _CHUNK_TOKENS[name]
        sizes = settings.context_tokens // tokens, 1, QUESTION_TOKENS, ANSWER_TOKENS
        needed = products.operations(products.training(model, tokens, *sizes))
        steps = settings.steps // settings.batches_per_step
        stages.append(Stage(name, steps, settings.batches_per_step, needed))
    n_parameters = gemma_sizes.n_parameters(model.hypernetwork)
    n_tensors = sum(1 for _ in model.hypernetwork.parameters())
    return stages, [
        Gradients("float64 in one call: ours", 8.0 * n_parameters, 1),
        Gradients("float32 in one call", 4.0 * n_parameters, 1),
        Gradients("float64, each tensor alone", 8.0 * n_parameters, n_tensors),
    ]


def all_reduce_seconds(gpus: int, gradients: Gradients, between_nodes: float) -> float:
    """Seconds of a ring over `gpus` GPUs, in nodes of _NODE; between_nodes: bytes a second of a node."""
    nodes = math.ceil(gpus / _NODE)
    hops, across = 2 * (gpus - 1), 2 * nodes if nodes > 1 else 0
    latency = CALL + (hops - across) * NVLINK_HOP + across * NETWORK_HOP
    bandwidth = _NVLINK if nodes == 1 else min(_NVLINK, between_nodes)
    return gradients.calls * latency + 2 * (gpus - 1) / gpus * gradients.n_bytes / bandwidth


def stage_row(stage: Stage, gpus: int, gradients: Gradients, between_nodes: float, rate: float) -> dict:
    """What a stage takes; rate: operations a second of a GPU.

    Where there are more GPUs than batches, a step has a batch for each GPU and there are fewer steps: the same data,
    and another recipe (same_recipe is False).

    efficiency: the share of the time in which GPUs compute.
    """
    batches = max(stage.batches, gpus)
    each = math.ceil(batches / gpus)
    steps = stage.steps * stage.batches / batches
    compute, reduce = each * stage.operations / rate, all_reduce_seconds(gpus, gradients, between_nodes)
    return {
        "stage": stage.name,
        "gpus": gpus,
        "batches_per_step": batches,
        "batches_per_gpu": each,
        "steps": round(steps),
        "same_recipe": batches == stage.batches,
        "teraflop_per_batch": stage.operations / 1e12,
        "compute_seconds": compute,
        "communication_seconds": reduce,
        "step_seconds": compute + reduce,
        "days": steps * (compute + reduce) / 86_400,
        "gpu_days": gpus * steps * (compute + reduce) / 86_400,
        "efficiency": compute / (compute + reduce),
    }


def _whole(rows: Sequence[dict]) -> dict:
    """The row of all stages together."""
    total = {name: sum(row[name] for row in rows) for name in ("steps", "days", "gpu_days")}
    computing = sum(row["gpu_days"] * row["efficiency"] for row in rows)
    facts = {"stage": "both", "gpus": rows[0]["gpus"], "same_recipe": all(row["same_recipe"] for row in rows)}
    return facts | total | {"efficiency": computing / total["gpu_days"]}


def run(n: int, seed: int) -> list[dict]:
    """A row for each stage and both, number of GPUs (8, 16, .. up to n), network, way to sum gradients, and share.

    share: of _PEAK; over_floor: measured. ValueError for fewer than 8 GPUs.
    """
    if n < _NODE:
        raise ValueError(f"n is the most GPUs, at least {_NODE}, not {n}")
    stages, ways = published()
    over_floor = _measured_over_floor(bench.read_record())
    rows = []
    for share in (SHARE, *SHARES):
        for gpus in (_NODE * 2**k for k in range(int(math.log2(n / _NODE)) + 1)):
            for network, between_nodes in NETWORKS.items():
                for way in ways:
                    facts = {"network": network, "way": way.way, "share": share, "over_floor": over_floor}
                    own = [stage_row(one, gpus, way, between_nodes, _PEAK * share / over_floor) for one in stages]
                    rows += [row | facts for row in (*own, _whole(own))]
    return [{name: float(f"{v:.6g}") if type(v) is float else v for name, v in row.items()} for row in rows]


def _measured_over_floor(benched: pd.DataFrame) -> float:
    """How much longer than its bare products a training step takes, of the recipe with few latents, as the main one."""
    chosen = (benched["what"] == "training step") & (benched["model"] == "few latents")
    return float(benched.loc[chosen, "over_floor"].iloc[0])


# --- the tables -----------------------------------------------------------------------------------------------------
def read_record() -> pd.DataFrame:
    """All recorded rows; FileNotFoundError says which command makes them."""
    return pd.DataFrame(recorded_rows("scaling", "d2l study scaling"))


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per network, way and number of GPUs, in the order of the record, for the share SHARE.

    Columns: network, way, gpus, step_seconds of the first stage and step_seconds_chunked of the second; of both: days,
    gpu_days, gpu_days_low and gpu_days_high (with the shares SHARES), efficiency, same_recipe.
    """
    by = ["network", "way", "gpus"]
    first, chunked, both = (rows[rows["stage"] == stage] for stage in (*_CHUNK_TOKENS, "both"))
    table = both[both["share"] == SHARE][[*by, "days", "gpu_days", "efficiency", "same_recipe"]]
    for stage, name in ((first, "step_seconds"), (chunked, "step_seconds_chunked")):
        own = stage[stage["share"] == SHARE].rename(columns={"step_seconds": name})
        table = table.merge(own[[*by, name]], on=by)
    ends = both.groupby(by)["gpu_days"].agg(gpu_days_low="min", gpu_days_high="max").reset_index()
    return table.merge(ends, on=by)
