"""What training steps note for the log, as sums: those of several processes, and of a killed run, add up."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn


class Notes:
    """Means since the last report, kept as `sums` {name: [sum, weight]}; what has no weight is a total."""

    def __init__(self):
        self.sums: dict[str, list[float]] = {}

    def add(self, name: str, value: float, weight: float = 1) -> None:
        """Add to the sum and the weight of `name`."""
        total = self.sums.setdefault(name, [0, 0])
        total[0] += value
        total[1] += weight

    def gather(self) -> None:
        """Move the notes of all processes to the first; all of them have to call this."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        every: list[dict] = [{}] * dist.get_world_size()
        dist.all_gather_object(every, self.sums)
        self.sums = {}
        for sums in every if dist.get_rank() == 0 else ():
            for name, pair in sums.items():
                self.add(name, *pair)

    def take(self) -> dict[str, float]:
        """The means and totals by name; then there are no notes."""
        means = {name: round(value / (weight or 1), 5) for name, (value, weight) in sorted(self.sums.items())}
        self.sums = {}
        return means


class Step(nn.Module):
    """A training step: `forward` gives {"loss": ...} of a batch, and adds to `notes`."""

    def __init__(self):
        super().__init__()
        self.notes = Notes()

    def report(self) -> dict[str, float]:
        """What the log says: means since the last report."""
        return self.notes.take()
