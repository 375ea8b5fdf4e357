"""The most memory that this process has held."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


def peak_memory_mib() -> float:
    """The most memory that this process has held so far, or since `reset_peak_memory`, in MiB.

    On a GPU what torch allocated there; else the resident set, read from /proc where there is one: getrusage counts a
    parent's memory too after a fork.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) / 1024
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def reset_peak_memory() -> bool:
    """Let `peak_memory_mib` begin again at what is held now; False where the system has no way to (macOS, Windows)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
