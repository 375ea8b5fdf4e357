"""Seconds by part and peak memory of this process."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from d2l_lib.model import DocToLoRA

PARTS = ("text", "encoder", "Perceiver", "head", "moving")  # of internalizing, in order


class Stopwatch:
    """Seconds by part: `lap(part)` adds the time since the last lap to that part, so parts add up to the whole."""

    def __init__(self, device: torch.device):
        self.device = device
        self.parts: dict[str, float] = {}
        self._wait()
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        self._wait()
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now

    def _wait(self) -> None:
        """Wait for the device: a GPU works on while Python goes on."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    @property
    def seconds(self) -> float:
        """The sum of all parts."""
        return sum(self.parts.values())


@contextmanager
def watching(model: DocToLoRA, watch: Stopwatch) -> Iterator[None]:
    """Inside the `with` block internalizing is timed by part; the model on exit is the model on entry.

    text: cutting the document into chunks and tokens.
    encoder, Perceiver: their passes.
    head: the layers after the Perceiver and the two factors; of token rows, which have no Perceiver, all of it.
    moving: checking the blocks, copying them to the CPU, and the next batch's padding.
    """
    hypernetwork, encoder, encode = model.hypernetwork, model.encoder, model.encoder.encode

    def outside() -> None:
        watch.lap("moving" if "encoder" in watch.parts else "text")

    def watched(*inputs, **options) -> Tensor:
        outside()
        return encode(*inputs, **options)

    handles = [
        hypernetwork.register_forward_pre_hook(lambda *_: watch.lap("encoder")),
        hypernetwork.register_forward_hook(lambda *_: watch.lap("head")),
    ]
    if not model.writes_rows:
        # layer by layer, the Perceiver follows the head of the layer before
        handles += [
            hypernetwork.aggregator.register_forward_pre_hook(lambda *_: watch.lap("head")),
            hypernetwork.aggregator.register_forward_hook(lambda *_: watch.lap("Perceiver")),
        ]
    try:
        # not a hook of the body, which an encoder that is written out does not call
        with patch.object(encoder, "encode", watched):
            yield
    finally:
        for handle in handles:
            handle.remove()
        outside()


def peak_memory_mib() -> float:
    """The most memory in MiB that this process has held so far, or since `reset_peak_memory`.

    On a GPU: what torch allocated there. Else: `peak_of_process_mib`.
    """
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else peak_of_process_mib()


def reset_peak_memory() -> None:
    """Restart `peak_memory_mib` at the memory held now, if the system can (not on macOS and Windows)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak_of_process()


def peak_of_process_mib() -> float:
    """The largest resident set in MiB so far, from /proc if it exists: getrusage after a fork includes the parent's."""
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) / 1024
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def reset_peak_of_process() -> None:
    """Restart `peak_of_process_mib` at the memory held now, where the system can.

    Memory that Python and torch keep for later goes back to the system first, where it can: it would hide a need.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc's own function
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def growth_of_peak_mib(do: Callable[[], object]) -> float:
    """By how many MiB `do` raises the peak of this process above what it holds now; never below 0."""
    reset_peak_of_process()
    before = peak_of_process_mib()
    do()
    return max(before, peak_of_process_mib()) - before  # a peak does not fall, but its readings are rounded
