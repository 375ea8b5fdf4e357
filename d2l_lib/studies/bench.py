"""What ours costs beside the published computation written out plainly (`plain`), and beside arithmetic.

    make bench                              # all of it, about ten minutes of one core
    make bench BENCH_ARGS="--again --n 1"   # anew and quickly; else an interrupted record continues
    make bench BENCH_ARGS="--chunks 64"     # longer documents, added to the record

Each task is done by ours, plainly, and as bare matrix products, in turn, n times. The floor is

    operations that the task needs / operations a second of matrix products, measured in the same turns,

with the products of the task's own shapes that make nine tenths of its operations, as torch multiplies. With weights in
oneDNN's order, as ours has them in some places (see `onednn`), products are up to a tenth quicker. So they are measured
in that way as well, for the least that is possible. Times are CPU seconds: other programs on the machine do not count.
Random models stand in for the costs by size (see `random_models`), as time does not depend on the numbers.

Memory is the growth of the peak of a process of its own, one for ours and one for the plain way: it starts at what the
process holds with its model and a first small document, and a peak never falls, so no difference is below zero.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from d2l_lib.documents import context_ids
from d2l_lib.engine import generate
from d2l_lib.loading import load
from d2l_lib.onednn import Packs, packed, product
from d2l_lib.studies import earlier_rows, products, random_models, recorded_rows
from d2l_lib.studies.measurements import distinct_text, own_processes, processor_name
from d2l_lib.studies.plain import Plain
from d2l_lib.studies.products import Product
from d2l_lib.studies.watches import growth_of_peak_mib

NEW_TOKENS = 8  # of every answer
_TOKENS = {"many latents": 512, "few latents": 512, "tiny": 264, "smollm2": 264}  # of a chunk with its chat wrapping
_DOCUMENT_TOKENS = 200  # of each of several documents, without the wrapping
_FEW_TOKENS = 64
_TIMED_SHARE = 0.9  # of a task's operations: the largest products that make it are timed
_TIMED_OPERATIONS = 2e8  # of one timing, at least


@dataclass(frozen=True)
class Task:
    """What is done: "internalize", "documents" (of one chunk, in one call), "training step", "write" or "answer".

    "write" is the hypernetwork alone, on the features of one chunk.

    model: one of `random_models.CONFIGURATIONS`, or a bundled model.
    documents, chunks: how many are read.
    blocks, questions: of the adapter that answers; answered together.
    layers, rank: of a random model.
    """

    what: str
    model: str
    documents: int = 1
    chunks: int = 1
    blocks: int = 0
    questions: int = 0
    layers: int = 8
    rank: int = 8

    def __str__(self) -> str:
        sizes = {
            "internalize": _counted(self.chunks, "chunk"),
            "documents": f"{self.documents}",
            "training step": _counted(self.chunks, "chunk"),
            "write": f"{self.layers} layers, rank {self.rank}",
            "answer": f"{_counted(self.blocks, 'block')}, {_counted(self.questions, 'question')}",
        }
        return f"{self.model}, {self.what}, {sizes[self.what]}"


def _counted(n: int, name: str) -> str:
    return f"{n} {name}" if n == 1 else f"{n} {name}s"


def tasks(chunks: Sequence[int] = (1, 8)) -> list[Task]:
    """All tasks, with documents of so many chunks."""
    random = list(random_models.CONFIGURATIONS)
    plan = [Task("internalize", model, chunks=count) for count in chunks for model in random]
    plan += [Task("training step", model, chunks=random_models.CONTEXTS) for model in (*random, "tiny")]
    plan += [Task("write", model, **size) for size in ({}, {"layers": 4}, {"rank": 32}) for model in random]
    plan += [Task("answer", "many latents", blocks=blocks, questions=1) for blocks in (1, 8, 64)]
    plan += [Task("answer", "many latents", blocks=8, questions=questions) for questions in (4, 16)]
    plan += [Task("internalize", "tiny", chunks=count) for count in (1, 8)]
    plan += [Task("documents", "tiny", documents=count, chunks=count) for count in (1, 8)]
    return plan + [Task("internalize", "smollm2", chunks=count) for count in (1, 4)]


# Least ratios to the authors' own code, of which the plain computation is a stand-in, and the most times the floor.
AIMS = {
    Task("internalize", "many latents", chunks=8): 1.4,
    Task("internalize", "few latents", chunks=1): 2.4,
    Task("internalize", "few latents", chunks=8): 3.4,
    Task("training step", "many latents", chunks=random_models.CONTEXTS): 1.7,
    Task("training step", "few latents", chunks=random_models.CONTEXTS): 3.0,
}
FLOOR_AIM = 1.35


# ------------------------------------------------------------------------------------------------------ what is done
@dataclass(frozen=True)
class Ways:
    """A task on ready inputs: done by ours, done plainly (None: not of the published form), and what it needs."""

    ours: Callable[[], object]
    plain: Callable[[], object] | None
    needs: list[Product]


class Prepared:
    """The model of a task, and its `ways`."""

    def __init__(self, task: Task, seed: int):
        self.task, self._seed, self._generator = task, seed, torch.Generator().manual_seed(seed)
        if task.model in random_models.CONFIGURATIONS:
            self.model = random_models.random_model(task.model, seed, layers=task.layers, rank=task.rank)
        else:
            self.model = load(task.model, device="cpu")
        self.plain = None if self.model.writes_rows else Plain(self.model)

    def small(self, way: str) -> None:
        """Read a document of a few tokens: what a first call sets up belongs to no task."""
        ids = self._ids(1, _FEW_TOKENS)
        if way == "ours":
            self.model.internalize_ids(ids)
        else:
            self.plain.internalize(ids)

    def ways(self) -> Ways:
        """Inputs are made here; they are the same for the same seed."""
        return getattr(self, f"_{self.task.what.replace(' ', '_')}")()

    def _ids(self, *shape: int) -> Tensor:
        return torch.randint(self.model.base_model.config.vocab_size, shape, generator=self._generator)

    def ids(self) -> Tensor:
        """Chunks to internalize [chunks, tokens]."""
        return self._ids(self.task.chunks, _TOKENS[self.task.model])

    def _internalize(self) -> Ways:
        model, plain, ids = self.model, self.plain, self.ids()
        needs = products.internalizing(model, ids.shape[1], self.task.chunks)
        return Ways(partial(model.internalize_ids, ids), plain and partial(plain.internalize, ids), needs)

    def _documents(self) -> Ways:
        """Documents of one chunk; plainly, one after another."""
        model, plain = self.model, self.plain
        texts = [distinct_text(model.tokenizer, _DOCUMENT_TOKENS, self._seed + i) for i in range(self.task.documents)]
        rows = context_ids(model.encoder_tokenizer, texts)
        needs = [one for row in rows for one in products.internalizing(model, len(row))]

        def each() -> None:
            for ids in context_ids(model.encoder_tokenizer, texts):
                plain.internalize(torch.tensor([ids]))

        return Ways(partial(model.internalize_each, texts), each, needs)

    def _training_step(self) -> Ways:
        model, tokens = self.model, _TOKENS[self.task.model]
        batch = random_models.random_batch(model.base_model.config.vocab_size, tokens, self._generator)
        hypernetwork, step = model.hypernetwork.requires_grad_(True), random_models.internalization(model)

        def run(loss: Callable[[], Tensor]) -> None:
            hypernetwork.zero_grad()
            loss().backward()

        ours = partial(run, lambda: step(batch)["loss"])
        return Ways(
            ours, partial(run, partial(self.plain.loss, batch)), products.training(model, tokens, *random_models.STEP)
        )

    @torch.no_grad()
    def _write(self) -> Ways:
        model, tokens = self.model, _TOKENS[self.task.model]
        features, mask = model.encoder.encode(self._ids(1, tokens)), torch.ones(1, tokens)
        without_gradients = torch.no_grad()
        ours = without_gradients(partial(model.hypernetwork, features, attention_mask=mask))
        plain = without_gradients(partial(self.plain.write, features))
        return Ways(ours, plain, products.writing(model.config, tokens))

    def _answer(self) -> Ways:
        """Blocks are copies of one: what they cost does not depend on their numbers."""
        model, task = self.model, self.task
        one = model.internalize_ids(self._ids(1, _FEW_TOKENS))
        adapter = replace(one, blocks=tuple(replace(one.blocks[0], chunk=i) for i in range(task.blocks)))
        block, copies = one.blocks[0], (task.blocks, 1, 1, 1)
        written = {m: tuple(side[m].repeat(copies) for side in (block.A, block.B)) for m in model.config.modules}
        ids = self._ids(task.questions, random_models.QUESTION_TOKENS)

        def ours() -> Tensor:
            with model.applied(adapter) as network:
                count = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
                return generate(network, model.tokenizer, ids, torch.ones_like(ids), **count)

        def plain() -> Tensor:
            return self.plain.answer(ids, self.plain.combine(written, contexts=1), NEW_TOKENS)

        return Ways(ours, plain, products.answering(model, adapter.rank, *ids.shape, NEW_TOKENS))


# ------------------------------------------------------------------------------------------------------------ the rows
def run(n: int, seed: int, chunks: Sequence[int], again: bool) -> Iterator[list[dict]]:
    """The rows so far, after each task that the record lacks, with the columns of `_columns` and what they ran on.

    again: measure every task anew, as it is where the record is of another n or seed.
    """
    rows = [row for row in earlier_rows("bench") if not again and (row["n"], row["seed"]) == (n, seed)]
    present = {task_of(row) for row in rows}
    for task in tasks(chunks):
        if task in present:
            continue
        ways = Prepared(task, seed).ways()
        memory = {"ours": _memory_alone(task, seed, "ours")}
        memory["plain"] = None if ways.plain is None else _memory_alone(task, seed, "plain")
        place = {"tokens": _TOKENS[task.model], "device_name": processor_name(), "torch": torch.__version__}
        rows.append(asdict(task) | place | _columns(ways.needs, _in_turn(ways, n), memory))
        print(_line(task, rows[-1]), flush=True)
        yield rows


def task_of(row: dict) -> Task:
    """The task of a row."""
    return Task(**{name: row[name] for name in Task.__dataclass_fields__})


def _in_turn(ways: Ways, n: int) -> dict[str, np.ndarray]:
    """CPU seconds of n turns: ours, plain, and floor."""
    return in_turn({"ours": ways.ours} | ({} if ways.plain is None else {"plain": ways.plain}), ways.needs, n)


def in_turn(todo: Mapping[str, Callable[[], object]], needs: Sequence[Product], n: int) -> dict[str, np.ndarray]:
    """CPU seconds of n turns of everything in `todo`, after one that is not measured; and of bare products.

    Those of "floor" are torch's own, those of "packed" with weights in oneDNN's order.
    """
    shapes, needed = _largest(needs), products.operations(needs)
    seconds: dict[str, list[float]] = {way: [] for way in (*todo, "floor", "packed")}
    for _ in range(n + 1):
        for way, do in todo.items():
            seconds[way].append(_timed(do))
        for way, packs in (("floor", nullcontext), ("packed", Packs().used)):
            seconds[way].append(needed / products.operations(shapes) * _seconds_of(shapes, packs))
    return {way: np.array(of_way[1:]) for way, of_way in seconds.items()}


def _timed(do: Callable[[], object]) -> float:
    began = time.process_time()
    do()
    return time.process_time() - began


def _largest(needs: Sequence[Product]) -> list[Product]:
    """The largest products, alike ones together, that make _TIMED_SHARE of all operations."""
    times: dict[tuple[int, int, int], float] = {}
    for one in needs:
        shape = one.rows, one.inner, one.columns
        times[shape] = times.get(shape, 0.0) + one.times
    merged = sorted((Product(*shape, count) for shape, count in times.items()), key=lambda one: -one.operations)
    least, chosen = _TIMED_SHARE * products.operations(needs), []
    while products.operations(chosen) < least:
        chosen.append(merged[len(chosen)])
    return chosen


@torch.no_grad()
def _seconds_of(shapes: Sequence[Product], packs: Callable[[], AbstractContextManager]) -> float:
    """CPU seconds of these products and nothing else."""
    total = 0.0
    with packs():
        for one in shapes:
            x, weight = torch.randn(one.rows, one.inner), packed(torch.randn(one.columns, one.inner))
            repeats = math.ceil(_TIMED_OPERATIONS / replace(one, times=1).operations)
            total += one.times / repeats * _timed(lambda x=x, w=weight, r=repeats: [product(x, w) for _ in range(r)])
    return total


def _columns(needs: Sequence[Product], seconds: dict[str, np.ndarray], memory: dict[str, float | None]) -> dict:
    """The measured columns of a row.

    seconds, plain_seconds, floor_seconds: CPU seconds. ratio: plain by ours of the same turn. over_floor: ours by the
    floor, likewise. over_packed: ours by the products with weights in oneDNN's order. All are medians, with quartiles
    _low and _high. gigaflop: billions of operations needed. rate: billions a second of the floor's products.
    memory_mib, plain_memory_mib: growth of the peak. What has no plain way has None.
    """
    ours, floor, plain = seconds["ours"], seconds["floor"], seconds.get("plain")
    needed = products.operations(needs) / 1e9
    row = {"n": len(ours)} | quartiles("seconds", ours) | quartiles("plain_seconds", plain)
    row |= quartiles("floor_seconds", floor) | quartiles("over_floor", ours / floor)
    row |= quartiles("over_packed", ours / seconds["packed"])
    row |= quartiles("ratio", None if plain is None else plain / ours)
    row |= {"gigaflop": _rounded(needed), "rate": _rounded(np.median(needed / floor))}
    return row | {"memory_mib": memory["ours"], "plain_memory_mib": memory["plain"]}


def quartiles(name: str, values: np.ndarray | None) -> dict[str, float | None]:
    """{name: median, name_low, name_high: quartiles}, to four digits; None for what was not measured."""
    low, middle, high = (None,) * 3 if values is None else map(_rounded, np.quantile(values, (0.25, 0.5, 0.75)))
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _line(task: Task, row: dict) -> str:
    """A row in words."""
    parts = [f"{row['seconds']:.3f} s"]
    if row["ratio"] is not None:
        parts.append(f"plain {row['plain_seconds']:.3f} s, {row['ratio']:.2f} times")
    parts.append(f"{row['over_floor']:.2f} times the floor ({row['gigaflop']:.1f} Gflop at {row['rate']:.0f} a second)")
    memory = [f"{one:.0f}" for one in (row["memory_mib"], row["plain_memory_mib"]) if one is not None]
    return f"{task}: {'; '.join(parts)}; {' against '.join(memory)} MiB"


def _memory_alone(task: Task, seed: int, way: str) -> float:
    """The growth of the peak in a process of its own that does the task one way."""
    with ProcessPoolExecutor(1, mp_context=own_processes()) as process:
        return process.submit(_growth, task, seed, way, torch.get_num_threads()).result()


def _growth(task: Task, seed: int, way: str, threads: int) -> float:
    """The body of that process: MiB."""
    torch.set_num_threads(threads)
    prepared = Prepared(task, seed)
    prepared.small(way)
    return round(growth_of_peak_mib(getattr(prepared.ways(), way)), 1)


# ---------------------------------------------------------------------------------------------------------- the tables
def read_record() -> pd.DataFrame:
    """All recorded rows; FileNotFoundError says which command makes them."""
    return pd.DataFrame(recorded_rows("bench", "make bench"))


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """The table to show: a line per task, in the order of the record."""
    done = [task_of(row) for row in rows.to_dict("records")]
    names = {"seconds": "CPU s", "plain_seconds": "plain", "ratio": "ratio", "over_floor": "over floor"}
    names |= {"over_packed": "over packed", "gigaflop": "Gflop", "rate": "Gflop/s", "memory_mib": "MiB"}
    names |= {"plain_memory_mib": "plain MiB"}
    table = rows[list(names)].rename(columns=names)
    quartiles = [f"{low:.2f} to {high:.2f}" for low, high in zip(rows["ratio_low"], rows["ratio_high"], strict=True)]
    table.insert(3, "quartiles", [text if "nan" not in text else "" for text in quartiles])
    table.insert(4, "aim", [AIMS.get(task) for task in done])
    return table.set_index(pd.Index([str(task) for task in done], name="task"))


def cost_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The table of `views.plots.plot_cost_by_length`: random models that internalize, by tokens read."""
    chosen = rows[(rows["what"] == "internalize") & rows["model"].isin(list(random_models.CONFIGURATIONS))]
    methods = {"seconds": "ours", "plain_seconds": "plain", "floor_seconds": "floor: matrix products"}
    tables = []
    for column, method in methods.items():
        values = {f"seconds{end}": chosen[f"{column}{end}"] for end in ("", "_low", "_high")}
        facts = {"panel": chosen["model"], "length_tokens": chosen["tokens"] * chosen["chunks"], "method": method}
        facts |= {"floor": column.startswith("floor"), "n": chosen["n"], "seed": chosen["seed"]}
        tables.append(pd.DataFrame(facts | values))
    return pd.concat(tables, ignore_index=True)
