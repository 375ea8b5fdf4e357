"""What internalizing and a training step cost by an older commit, beside today's: CPU seconds, in turn.

    git worktree add ../before bda86b0 && d2l study history --before ../before

Both states build the same random models (see `random_models`), in a process of its own each, on one thread.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from d2l_lib.studies import random_models, recorded_rows
from d2l_lib.studies.bench import quartiles
from d2l_lib.studies.measurements import processor_name

_TASKS = [
    ("internalize", 1),
    ("internalize", 8),
    ("training step", random_models.CONTEXTS),
]


def run(n: int, seed: int, before: Path) -> Iterator[list[dict]]:
    """A row per model and task: CPU seconds of n turns of both states (median, quartiles), and their ratio.

    before: a checkout of the older commit.

    ratio: of the older state's seconds to today's, of the same turn. difference: of what both computed, as a share of
    it: the loss, or the mean size of the blocks' numbers.
    """
    rows: list[dict] = []
    with ExitStack() as stack:
        here = Path(random_models.__file__).resolve().parents[2]
        states = {name: stack.enter_context(_served(place)) for name, place in (("before", before), ("now", here))}
        for model in random_models.CONFIGURATIONS:
            for what, chunks in _TASKS:
                done = [{name: _ask(one, what, model, chunks, seed) for name, one in states.items()} for _ in range(n)]
                row = {"what": what, "model": model, "chunks": chunks, "tokens": random_models.TOKENS, "n": n}
                rows.append(row | {"commit": commit_of(before)} | _columns(done))
                rows[-1] |= {"device_name": processor_name(), "torch": torch.__version__}
                print(f"{model}, {what}, {chunks} chunks: {rows[-1]['ratio']:.2f} times as long before", flush=True)
                yield rows


def _columns(turns: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """The measured columns of turns {state: (seconds, number)}."""
    before, now = (np.array([turn[name][0] for turn in turns]) for name in ("before", "now"))
    row = quartiles("before_seconds", before) | quartiles("seconds", now) | quartiles("ratio", before / now)
    before, now = (turns[0][name][1] for name in ("before", "now"))
    return row | {"difference": float(f"{abs(before - now) / abs(before):.2g}")}


@contextmanager
def _served(checkout: Path) -> Iterator[subprocess.Popen]:
    """A process that does the tasks of `random_models.serve` by the package in `checkout`."""
    program = f"import runpy; runpy.run_path({random_models.__file__!r}, run_name='__main__')"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], cwd=checkout, **pipes) as process:
        yield process
        with suppress(BrokenPipeError):  # it ended before
            process.stdin.close()


def _ask(process: subprocess.Popen, what: str, model: str, chunks: int, seed: int) -> tuple[float, float]:
    """(CPU seconds, number) of one task. RuntimeError where the older state cannot do it."""
    with suppress(BrokenPipeError):  # it ended before
        print(json.dumps([what, model, chunks, seed]), file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(
            "the process of one state ended; what it said stands above: is it a checkout, and not too old?"
        )
    seconds, number = json.loads(line)
    return seconds, number


def commit_of(checkout: Path) -> str:
    """The commit of a checkout, in seven letters."""
    words = ["git", "-C", str(checkout), "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def read_record() -> pd.DataFrame:
    """All recorded rows; FileNotFoundError says which command makes them."""
    return pd.DataFrame(recorded_rows("history", "d2l study history --before FOLDER"))
