"""Ideas for quicker internalizing, beside reading chunk by chunk and beside bare products.

    OMP_NUM_THREADS=1 d2l study quicker    # data/full_runs/quicker.jsonl; compiling needs a C++ compiler

Eight chunks of one length are read and their blocks written, without what `internalize` does around that. All ways take
turns; seconds are of the processor. The numbers agree to rounding, so an idea's worth is its time. Two of them are
used: packed weights, and a few small chunks of one length together (see `DocToLoRA`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from d2l_lib.model import DocToLoRA
from d2l_lib.onednn import Packs
from d2l_lib.studies import bench, products, recorded_rows
from d2l_lib.studies.measurements import processor_name

CHUNKS = 8
_MODELS = ("many latents", "few latents", "tiny")


@dataclass(frozen=True)
class Idea:
    """A way to read and write chunks.

    together: chunks that are read at once.
    compiled: encoder and hypernetwork, by torch.compile.
    onednn: products of float32 by oneDNN, which torch has and uses for other precisions, instead of MKL.
    packed: the same with weights in oneDNN's order, and what else becomes possible with them (see `onednn`).
    """

    together: int = 1
    compiled: bool = False
    onednn: bool = False
    packed: bool = False


IDEAS = {
    "chunk by chunk": Idea(),
    "two chunks together": Idea(together=2),
    "four chunks together": Idea(together=4),
    "eight chunks together": Idea(together=8),
    "products by oneDNN": Idea(onednn=True),
    "packed weights": Idea(packed=True),
    "packed, four together": Idea(together=4, packed=True),
    "packed, eight together": Idea(together=8, packed=True),
    "compiled": Idea(compiled=True),
    "compiled, eight together": Idea(together=8, compiled=True),
}


def run(n: int, seed: int) -> Iterator[list[dict]]:
    """A row per model and idea, after each model: CPU seconds of n turns, after one that is not measured.

    Columns: model, idea, chunks, tokens, seconds, ratio (chunk by chunk by the idea, of the same turn) and over_floor
    (by the bare products of the same turn), each with quartiles _low and _high; difference: the most by which a number
    of a block differs from that of chunk by chunk, as a share of the largest.
    """
    rows: list[dict] = []
    for name in _MODELS:
        prepared = bench.Prepared(bench.Task("internalize", name, chunks=CHUNKS), seed)
        model, ids = prepared.model, prepared.ids()
        todo = {idea: _way(model, ids, settings) for idea, settings in IDEAS.items()}
        seconds = bench.in_turn(todo, products.internalizing(model, ids.shape[1], CHUNKS), n)
        expected = todo["chunk by chunk"]()
        for idea, do in todo.items():
            row = {"model": name, "idea": idea, "chunks": CHUNKS, "tokens": ids.shape[1], "n": n}
            row |= bench.quartiles("seconds", seconds[idea])
            row |= bench.quartiles("ratio", seconds["chunk by chunk"] / seconds[idea])
            row |= bench.quartiles("over_floor", seconds[idea] / seconds["floor"])
            row |= {"difference": _difference(do(), expected)}
            rows.append(row | {"device_name": processor_name(), "torch": torch.__version__})
            print(f"{name}, {idea}: {row['ratio']:.2f}, {row['over_floor']:.2f} times bare products", flush=True)
        yield rows


def _way(model: DocToLoRA, ids: Tensor, idea: Idea) -> Callable[[], list[Tensor]]:
    """A function that reads and writes chunks ids [n, T] in an idea's way and gives each factor of all their blocks."""
    encode, write = model.encoder.encode, model.hypernetwork
    if idea.compiled:
        encode, write = torch.compile(encode), torch.compile(write)
    packs = Packs()

    @torch.no_grad()
    def run() -> list[Tensor]:
        other_products = patch.object(F, "linear", _by_onednn) if idea.onednn else nullcontext()
        with other_products, packs.used() if idea.packed else nullcontext():
            parts = [write(encode(some), attention_mask=torch.ones_like(some)) for some in ids.split(idea.together)]
        return [torch.cat([part[m][side] for part in parts]) for m in model.config.modules for side in (0, 1)]

    return run


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _difference(ours: list[Tensor], expected: list[Tensor]) -> float:
    both = zip(ours, expected, strict=True)
    return float(f"{max(float((a - b).abs().max() / b.abs().max()) for a, b in both):.2g}")


def read_record() -> pd.DataFrame:
    """All recorded rows; FileNotFoundError says which command makes them."""
    return pd.DataFrame(recorded_rows("quicker", "d2l study quicker"))
