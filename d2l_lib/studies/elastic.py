"""A training and a generation of shards, killed and resumed with 1, 2 and 4 processes, beside runs straight through.

Each run is a command under torchrun in a folder of its own. A kill is SIGKILL to the launcher and all its processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from d2l_lib.training.loop import checkpoints, is_whole, read_log, step_of

PROCESSES = (1, 2, 4)
_STAGES = ("readout", "recall", "world", "polish")
_SMALLER = ("batches_per_step=4", "contexts=6", "chunks=8", "questions=8")
_DOCUMENTS, _SHARD_SIZE = 60, 5


def run(n: int, seed: int) -> list[dict]:
    """Losses of both trainings by stage and step, and both checksums of each shard; n: steps of each stage."""
    with tempfile.TemporaryDirectory() as folder:
        return [*_trainings(Path(folder), n, seed), *_shards(Path(folder), seed)]


def _trainings(folder: Path, n: int, seed: int) -> list[dict]:
    words = ["train", "--stage", "qa", "--seed", str(seed), "--steps", str(n), "--set", *_SMALLER]
    words += ["--save-steps", str(max(1, n // 4)), "--report-steps", "1", "--runs"]
    _until_end([*words, str(folder / "whole")], 1)
    whole, resumed = (folder / name / "tiny" / f"qa_own_seed{seed}" for name in ("whole", "resumed"))
    ends = []  # (stage, step) that each start reached
    for processes, stage in zip(PROCESSES, ("recall", "world", None), strict=True):
        command = [*words, str(folder / "resumed")]
        if stage is None:
            _until_end(command, processes)
            ends.append((len(_STAGES), 0))
        else:
            _until_killed(command, processes, lambda stage=stage: any(map(is_whole, checkpoints(resumed / stage))))
            last = [step_of(one) for one in checkpoints(resumed / stage) if is_whole(one)][-1]
            ends.append((_STAGES.index(stage), last))
    rows = []
    for number, stage in enumerate(_STAGES):
        logs = [read_log(one / stage / "log.jsonl") for one in (whole, resumed)]
        for ours, theirs in zip(*logs, strict=True):
            place = (number, ours["step"])
            processes = next(count for count, end in zip(PROCESSES, ends, strict=True) if place <= end)
            row = {"what": "training", "stage": stage, "step": ours["step"], "processes": processes}
            rows.append(row | {"loss": ours["total_loss"], "resumed": theirs["total_loss"]})
    return rows


def _shards(folder: Path, seed: int) -> list[dict]:
    words = ["generate", "--documents", str(_DOCUMENTS), "--shard-size", str(_SHARD_SIZE), "--seed", str(seed), "--out"]
    whole, resumed = folder / "whole_shards", folder / "resumed_shards"
    _until_end([*words, str(whole)], 1)
    for processes, least in zip(PROCESSES, (3, 7, None), strict=True):
        command = [*words, str(resumed)]
        if least is None:
            _until_end(command, processes)
        else:
            _until_killed(command, processes, lambda least=least: len([*resumed.glob("*.parquet")]) >= least)
    names = sorted(path.name for path in whole.iterdir())
    if names != sorted(path.name for path in resumed.iterdir()):
        raise RuntimeError("the killed run left other files")
    return [
        {"what": "shards", "file": name, "equal": (whole / name).read_bytes() == (resumed / name).read_bytes()}
        for name in names
    ]


def _start(words: list[str], processes: int) -> subprocess.Popen:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", "d2l_lib"]
    return subprocess.Popen([sys.executable, *torchrun, *words], env=os.environ | {"OMP_NUM_THREADS": "1"})


def _until_end(words: list[str], processes: int) -> None:
    if status := _start(words, processes).wait():
        raise RuntimeError(f"{' '.join(words)} ended with status {status}")


def _until_killed(words: list[str], processes: int, ripe: Callable[[], bool]) -> None:
    """Start a command and kill it a moment after `ripe`; RuntimeError if it ends before."""
    started = _start(words, processes)
    while not ripe():
        if started.poll() is not None:
            raise RuntimeError(f"{' '.join(words)} ended before it could be killed")
        time.sleep(0.05)
    time.sleep(0.5)  # into the next step or shard
    launcher = psutil.Process(started.pid)
    for process in [launcher, *launcher.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    started.wait()
