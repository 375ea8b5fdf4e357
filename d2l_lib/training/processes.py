"""The processes that torchrun started: how many there are, which one this is, and what each of them does.

Nothing here imports torch at once. Training shares the batches of a step (`loop`), `d2l generate` its shards
(`selfgen`), and a study its pieces: `shared` below.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import TypeVar

_Piece = TypeVar("_Piece")
_Result = TypeVar("_Result")
_LONGEST = timedelta(days=7)  # that a process may wait for the others' pieces
_alone = False  # inside a piece: what it shares out in turn is its own


def processes() -> int:
    """How many there are: torchrun's, or one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def process_index() -> int:
    """The number of this one, from 0."""
    return int(os.environ.get("RANK", 0))


def is_first_process() -> bool:
    """Whether this process writes results: the only one, or torchrun's first."""
    return process_index() == 0


def own_device() -> str | None:
    """The GPU of this process under torchrun; else None, and the loader chooses."""
    import torch

    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local is not None and torch.cuda.is_available() else None


@contextmanager
def together() -> Iterator[None]:
    """Inside the `with` block the processes can exchange results, and only the first one prints."""
    if processes() == 1:
        yield
        return
    import torch.distributed as dist

    _let_groups_end()
    dist.init_process_group("gloo", timeout=_LONGEST)
    try:
        with open(os.devnull, "w") as nowhere:
            if is_first_process():
                yield
            else:
                with redirect_stdout(nowhere):
                    yield
    finally:
        _end_group()


def end_group_at_exit() -> None:
    """Let the group of processes that is started after this call, as a Trainer does, end before Python does.

    Else a thread that exchanged a tensor may let go of it while Python ends. That aborts the process, and torchrun
    takes a training that is done for one that failed.
    """
    _let_groups_end()
    atexit.unregister(_end_group)
    atexit.register(_end_group)


def _let_groups_end() -> None:
    """Import what would keep a group, and so its threads, until Python ends: it names today's group as a default."""
    import torch.distributed.nn.functional  # noqa: F401


def _end_group() -> None:
    """End the group of processes, if there is one, and its threads."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # the threads end with the last reference, and a trainer refers to itself


def shared(pieces: Sequence[_Piece], work: Callable[[_Piece], _Result]) -> list[_Result]:
    """[work(piece) for each piece], in every process; inside `together` each process works on every W-th piece.

    work: must depend on the piece alone, whatever was done before it. Its results are pickled.

    All processes have to call this with the same pieces. A piece that shares out pieces of its own does all of them.
    """
    global _alone
    if _alone or processes() == 1:
        return [work(piece) for piece in pieces]
    import torch.distributed as dist

    _alone = True
    try:
        own = [work(piece) for piece in pieces[process_index() :: processes()]]
    finally:
        _alone = False
    every: list[list[_Result]] = [[] for _ in range(processes())]
    dist.all_gather_object(every, own)
    return [every[number % processes()][number // processes()] for number in range(len(pieces))]
