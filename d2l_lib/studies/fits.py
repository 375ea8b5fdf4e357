"""What small fits of weights share: the least loss, and a place for the weights in a model's folder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from d2l_lib.formats.checkpoints import load_checkpoint, save_checkpoint
from d2l_lib.loading import find_checkpoint
from d2l_lib.row_reader import RowReader

_STEPS = 200


def minimised(loss: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """The weights [size] of the least loss, from zeros on, by L-BFGS."""
    weights = torch.zeros(size, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = loss(weights)
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(closure)
    return weights.detach()


def keep_in_reader(model: str, change: Callable[[RowReader], None]) -> None:
    """Change what reads the rows of a bundled model, or of one in a folder, in its file."""
    folder = find_checkpoint(model)
    hypernetwork, meta = load_checkpoint(folder)
    change(hypernetwork.reader)
    save_checkpoint(folder, hypernetwork, meta, torch.float16)
