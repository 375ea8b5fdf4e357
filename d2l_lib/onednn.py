"""Products with weights that lie in oneDNN's own order: on a CPU they are about a tenth quicker than torch's others.

torch multiplies float32 with MKL. It has oneDNN as well, for other precisions and for compiled code, whose kernels are
quicker where a weight lies as they read it. To put it there costs as much as a product with some rows, so it is done
once, and kept as long as the weight stays what it is:

    packs = Packs()
    with packs.used():                              # in this thread; elsewhere products are torch's own
        y = product(x, packed(weight))              # y = x W^T

Results agree with torch's to rounding, and the bits of a row do not depend on how many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MOST = 128 << 20  # bytes of the packs of one model: larger models keep torch's products, and their memory
_ROWS = 512  # for which the order is chosen
_SAMPLED = 64  # values of each weight
_in_use: ContextVar[Packs | None] = ContextVar("d2l_packs", default=None)


class Packs:
    """Weights in oneDNN's order, made when they are first asked for.

    A pack is made anew where its weight has another place in memory or was changed in place. What torch cannot see of
    changes (`weight.data`), a sample of all values shows when the packs are used again.
    """

    def __init__(self):
        # {owner: (what shows changes, the weights, a sample of their values, the packs)}
        self._kept: dict[Any, tuple[tuple, Sequence[Tensor], Tensor, list[Tensor]]] = {}

    def __reduce__(self):
        return Packs, ()  # copies and pickles begin empty

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside the `with` block this thread's products without gradients are by these packs."""
        if not is_available():
            yield
            return
        kept = [*self._kept.values()]
        if kept and not torch.equal(torch.cat([one[2] for one in kept]), _sample_of(self._weights())):
            self._kept = {}
        before = _in_use.set(self)
        try:
            yield
        finally:
            _in_use.reset(before)

    def fit(self, weights: Sequence[Tensor]) -> bool:
        """Whether all these weights may be packed, beside those that are."""
        kept = {id(one) for one in self._weights()}
        missing = [one for one in weights if id(one) not in kept]
        return all(map(_may_be_packed, missing)) and self._has_room(missing)

    def of(self, owner: Any, weights: Sequence[Tensor], make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Packs of the matrices [d_out, d_in] that `make` makes of `weights`; the matrices as they are without room.

        owner: names the packs; the same one always asks for the same.
        """
        state = tuple((one.data_ptr(), one._version, one.shape) for one in weights if not one.is_inference())
        known = self._kept.get(owner)
        if known is not None and known[0] == state:
            return known[3]
        made = make()
        if not all(map(_may_be_packed, weights)) or (known is None and not self._has_room(made)):
            return made
        with torch.no_grad():
            packs = [torch.ops.mkldnn._reorder_linear_weight(one.detach().contiguous(), _ROWS) for one in made]
        self._kept[owner] = state, tuple(weights), _sample_of(weights), packs
        return packs

    def _has_room(self, more: Sequence[Tensor]) -> bool:
        kept = sum(one.numel() for *_, packs in [*self._kept.values()] for one in packs)
        return 4 * (kept + sum(one.numel() for one in more)) <= _MOST

    def _weights(self) -> list[Tensor]:
        return [weight for kept in [*self._kept.values()] for weight in kept[1]]


def in_use() -> Packs | None:
    """The packs of this thread's innermost `with` block; None with gradients or autocast: torch multiplies then."""
    packs = _in_use.get()
    if packs is None or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    return packs


def packed(weight: Tensor) -> Tensor:
    """A weight [d_out, d_in] for `product`: its pack where packs are in use, otherwise itself."""
    packs = in_use()
    return weight if packs is None else packs.of(id(weight), [weight], lambda: [weight])[0]


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, times: Tensor | None = None, plus: Tensor | None = None
) -> Tensor:
    """x W^T + bias, then multiplied by `times` or added to `plus`: [.., d_in] -> [.., d_out].

    weight: [d_out, d_in], or its pack.
    times, plus: [.., d_out]; one of them at most.
    """
    other, how = (times, "mul") if plus is None else (plus, "add")
    if not weight.is_mkldnn:
        y = F.linear(x, weight, bias)
        return y if other is None else y.mul_(times) if plus is None else y.add_(plus)
    if other is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, how)


def product_of_rows(x: Tensor, y: Tensor) -> Tensor:
    """x y^T of [n, d] and [m, d], neither of them a weight, by oneDNN: [n, m]."""
    return torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")


def linear(module: nn.Linear, x: Tensor, *, times: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """`product` with a linear's weight and bias; of other modules (quantised, wrapped) what they give."""
    if type(module) is nn.Linear and in_use() is not None:
        return product(x, packed(module.weight), module.bias, times=times, plus=plus)
    y = module(x)
    return y if times is plus else y * times if plus is None else y + plus


def is_available() -> bool:
    """Whether this torch has these products."""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
    )


def _may_be_packed(weight: Tensor) -> bool:
    """Whether it is an ordinary matrix or vector of float32 on the CPU, whose changes in place torch counts."""
    is_plain = type(weight) in (Tensor, nn.Parameter) and weight.layout == torch.strided
    return is_plain and weight.device.type == "cpu" and weight.dtype == torch.float32 and not weight.is_inference()


@torch.no_grad()
def _sample_of(weights: Sequence[Tensor]) -> Tensor:
    """Up to _SAMPLED values spread over each weight, one after another."""
    return torch.cat([one.reshape(-1)[:: max(1, one.numel() // _SAMPLED)] for one in weights])
