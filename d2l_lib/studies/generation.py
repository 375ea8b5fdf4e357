"""What self-generated answers cost: by guesses, token by token, with the document read again, and by two processes.

    d2l study generation
    git worktree add ../before 014ccb6~1 && d2l study generation --before ../before    # beside an older state

Each way makes the same shards in turn, in processes of its own, each on one thread. Seconds are of the processor, of
all processes of a way together, without their start: other programs disturb them less than wall seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from d2l_lib.engine import TransformersEngine
from d2l_lib.formats.shards import read_shards
from d2l_lib.studies import earlier_rows, recorded_rows
from d2l_lib.studies.history import commit_of
from d2l_lib.studies.measurements import own_processes, processor_name
from d2l_lib.training import selfgen
from d2l_lib.training.settings import Settings

_MODEL, _BATCH = "tiny", Settings.batch_tokens


class _Stepwise(TransformersEngine):
    """Answers token by token: guesses are not used."""

    def reply(self, prompts, max_new_tokens, temperature, seed, guesses=None):
        return super().reply(prompts, max_new_tokens, temperature, seed)


class _Alone(_Stepwise):
    """The same, and the document is read again for each of its questions."""

    def _groups(self, prompts, max_new_tokens, replies=()):
        return [(0, [i]) for i, ids in enumerate(prompts) if len(ids) < self.window]


_ENGINES = {"guesses checked": TransformersEngine, "token by token": _Stepwise, "document read again": _Alone}
WAYS = (("guesses checked", 1), ("guesses checked", 2), ("token by token", 1), ("document read again", 1))
_BASE = WAYS[2]  # what the others are compared with


_BEFORE = """
import json, sys, time
from dataclasses import replace
import torch
from d2l_lib.training import selfgen
torch.set_num_threads(1)
settings = selfgen.Settings(**json.loads(sys.argv[1]))
engine = selfgen.load_engine("transformers", sys.argv[3], settings.batch_tokens)
next(selfgen.world.encyclopedia_questions(selfgen.random.Random(0), 1))
selfgen.make_shard(replace(settings, documents=2), 0, engine)
begin, cpu = time.time(), time.process_time()
selfgen.generate(settings, sys.argv[2], engine)
print(json.dumps({"cpu": time.process_time() - cpu, "begin": begin, "end": time.time()}))
"""  # what `_make` does, by the package of another folder


def run(n: int, seed: int, documents: int, before: Path | None) -> list[dict]:
    """A row for each of WAYS: answers per CPU second of n turns (median, quartiles), after one that is not measured.

    documents: in each turn, in four shards; every turn has its own, from `seed` on. Rows of other numbers stay.
    before: a checkout of an older commit, which makes the same shards in the same turns.

    ratio: to `token by token` on the same documents. over_before: likewise, to the older commit.
    per_wall_second: answers by the time from the first process's begin to the last one's end.
    different_ids, different_values: answers and log-probabilities that are not those of `token by token`.
    most_steps: by how many float16 steps at most.
    """
    ways = WAYS if before is None else (*WAYS, (f"commit {commit_of(before)}", 1))
    seen: dict[tuple[str, int], list[dict]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2, mp_context=own_processes()) as pool:
        for turn in range(n + 1):
            settings = Settings(documents=documents, seed=seed + turn, shard_size=-(-documents // 4))
            for name, workers in ways:
                place = Path(folder) / f"{turn}_{name}_{workers}"
                if name in _ENGINES:
                    parts = [pool.submit(_make, name, settings, place, i, workers) for i in range(workers)]
                    made = [one.result() for one in parts]
                else:
                    made = [_make_before(before, settings, place)]
                cpu, wall = sum(one["cpu"] for one in made), max(m["end"] for m in made) - min(m["begin"] for m in made)
                seen[name, workers].append({"cpu": cpu, "wall": wall, "place": place})
                print(f"turn {turn}: {name}, {workers}: {cpu:.2f} CPU seconds", flush=True)
        tables = {way: [_answers(one["place"]) for one in several[1:]] for way, several in seen.items()}
    counts = np.array([len(ids) for ids, _ in tables[_BASE]])
    rates = {way: counts / [one["cpu"] for one in several[1:]] for way, several in seen.items()}
    rows = [row for row in earlier_rows("generation") if row["documents"] != documents]
    for way, several in seen.items():
        row = {"model": _MODEL, "way": way[0], "processes": way[1], "documents": documents, "n": n}
        row |= {"answers": int(counts.sum()), "device_name": processor_name(), "torch": torch.__version__}
        row |= _quartiles("per_cpu_second", rates[way]) | _quartiles("ratio", rates[way] / rates[_BASE])
        if before is not None:
            row |= _quartiles("over_before", rates[way] / rates[ways[-1]])
        row |= _quartiles("per_wall_second", counts / [one["wall"] for one in several[1:]])
        rows.append(row | {"compared_with": _BASE[0]} | _difference(tables[way], tables[_BASE]))
    return rows


@cache
def _engine(name: str) -> TransformersEngine:
    loaded = selfgen.load_engine("transformers", _MODEL, _BATCH)
    return _ENGINES[name](_MODEL, loaded.model, loaded.tokenizer, _BATCH)


def _make(name: str, settings: Settings, folder: Path, worker: int, workers: int) -> dict[str, float]:
    """Make a worker's shards: CPU seconds, and when it began and ended."""
    engine = _engine(name)
    begin, cpu = time.time(), time.process_time()
    selfgen.generate(settings, folder, engine, worker=worker, workers=workers)
    return {"cpu": time.process_time() - cpu, "begin": begin, "end": time.time()}


def _make_before(checkout: Path, settings: Settings, folder: Path) -> dict[str, float]:
    """The same by the package in `checkout`, in a Python of its own."""
    changed = {name: getattr(settings, name) for name in ("documents", "seed", "shard_size")}
    words = [sys.executable, "-c", _BEFORE, json.dumps(changed), str(folder.resolve()), _MODEL]
    said = subprocess.run(words, cwd=checkout, capture_output=True, text=True, check=True).stdout
    return json.loads(said.splitlines()[-1])


_Answers = tuple[list[list[int]], np.ndarray]  # the ids of all answers, and their log-probabilities [tokens, k]


def _answers(folder: Path) -> _Answers:
    ids, values = [], []
    for row in read_shards(folder):
        for whole, (start, end), of_answer in zip(
            row["input_ids"], row["response_start_end"], row["logprobs_vals"], strict=True
        ):
            ids.append(whole[start:end])
            values += of_answer
    return ids, np.array(values, dtype=np.float16)


def _difference(ours: Sequence[_Answers], theirs: Sequence[_Answers]) -> dict:
    """How many answers and log-probabilities differ; values are compared where all answers are equal."""
    ids = sum(
        a != b for (one, _), (other, _) in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True)
    )
    row = {"different_ids": ids, "different_values": None, "values": None, "most_steps": None}
    if ids:
        return row
    a, b = (np.concatenate([values for _, values in several]) for several in (ours, theirs))
    steps = np.abs(a.astype(float) - b) / np.spacing(np.maximum(np.abs(a), np.abs(b))).astype(float)
    return row | {"different_values": int((a != b).sum()), "values": a.size, "most_steps": float(steps.max().round(2))}


def _quartiles(name: str, values: np.ndarray) -> dict[str, float]:
    low, middle, high = (float(f"{value:.4g}") for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def read_record() -> pd.DataFrame:
    """All recorded rows; FileNotFoundError says which command makes them."""
    return pd.DataFrame(recorded_rows("generation", "d2l study generation"))
