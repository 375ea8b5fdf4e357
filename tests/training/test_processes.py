"""Processes that exchange tensors end with nothing left of that: a thread that outlives Python aborts its process."""

import atexit
import importlib
import os
import sys
from pathlib import Path

import processes
import pytest
import train_small

from d2l_lib.training.processes import shared, together

THREADS = Path("/proc/self/task")
needs_threads = pytest.mark.skipif(not THREADS.is_dir(), reason="this system does not name its threads in a folder")


def note(folder: Path, when: str) -> None:
    """Write down how many threads of this process exchange tensors."""
    count = sum("gloo_runloop" in (thread / "comm").read_text() for thread in THREADS.iterdir())
    (folder / f"{when}-{os.environ['RANK']}").write_text(str(count))


def exchange(folder: Path) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.distributed.nn")]:
        del sys.modules[name]  # as where nothing has been trained yet
    with together():
        importlib.import_module("torch.distributed.nn.functional")  # names the group, if that is the first time
        assert shared([1, 2, 3], str) == ["1", "2", "3"]
        note(folder, "before")
    note(folder, "after")


def train(folder: Path) -> None:
    train_small.train(folder / "run", 0, train_small.BRIEF)
    note(folder, "before")
    atexit._run_exitfuncs()  # what Python does at its end, but not that of a forked process
    note(folder, "after")


@needs_threads
@pytest.mark.parametrize("work", [exchange, pytest.param(train, marks=pytest.mark.slow)])
def test_threads_that_exchange_tensors_end_before_python_does(work, tmp_path):
    for process in processes.start_together(2, work, tmp_path):
        process.join(120)
        assert process.exitcode == 0
    before, after = (
        [int((tmp_path / f"{when}-{rank}").read_text()) for rank in range(2)] for when in ("before", "after")
    )
    assert min(before) > 0 and after == [0, 0]
