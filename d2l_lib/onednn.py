"""Products with weights that lie in oneDNN's own order: on a CPU they are about a tenth quicker than torch's others.

torch multiplies float32 with MKL. It has oneDNN as well, for other precisions and for compiled code, whose kernels are
quicker where a weight lies as they read it. To put it there takes as long as a product with some rows, so it is done
once, and kept as long as the weight stays what it is:

    packs = Packs()
    with packs.used():                              # in this thread; elsewhere products are torch's own
        y = linear(module, x)                       # module(x), by the pack of its weight

oneDNN writes code for each new number of rows, which takes time and memory. So whoever can choose takes multiples of a
number (`round_up`; LENGTH_STEP for the tokens of a text).

Results agree with torch's to rounding, and the bits of a row do not depend on how many others there are, if any.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _all

_MOST = 256 << 20  # bytes of weights; a pack is a second copy, which larger models do not get
LENGTH_STEP = 8
_ROWS = 512  # for which the order is chosen
_SEGMENT = 1021  # numbers whose sum shows whether a weight has changed, at most
_PIECE, _HIDDEN = 512, 400_000  # rows and numbers of an MLP's hidden values at once, at most
_HARMLESS = ("d2l_lib.", "torch.utils.module_tracker", "torch.utils.flop_counter")  # whose hooks change nothing
_in_use: ContextVar[Packs | None] = ContextVar("d2l_packs", default=None)


@dataclass(frozen=True)
class _Kept:
    """Packs of `weights`, and what shows that these are still the same: memory and counts of changes, and sums."""

    weights: Sequence[weakref.ref[Tensor]]
    state: tuple
    totals: list[list[int]]
    packs: list[Tensor]

    def alive(self) -> list[Tensor] | None:
        """The weights, or None if one of them is no more."""
        weights = [one() for one in self.weights]
        return None if any(one is None for one in weights) else weights


class Packs:
    """Weights in oneDNN's order, made when they are first asked for.

    A pack is made anew where its weight has another place in memory, or was changed in place as torch counts it. Torch
    does not count all changes (those of `weight.data`, of fused optimizers): sums over all values show these, when
    `used` begins.
    """

    def __init__(self):
        self._kept: dict[Any, _Kept] = {}

    def __reduce__(self):
        return Packs, ()  # copies and pickles begin empty

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside the `with` block this thread's products without gradients are by these packs."""
        if not is_available():
            yield
            return
        self._kept = _unchanged(self._kept)
        before = _in_use.set(self)
        try:
            yield
        finally:
            _in_use.reset(before)

    def of(self, owner: Any, weights: Sequence[Tensor], make: Callable[[], list[Tensor]]) -> list[Tensor] | None:
        """Packs of the matrices [d_out, d_in] that `make` makes of `weights`; None where these are not packable.

        owner: names the packs; the same one always asks for the same.
        """
        if not are_packable(weights):
            return None
        state, known = _state_of(weights), self._kept.get(owner)
        if known is not None and known.state == state and known.alive() is not None:
            return known.packs
        with torch.no_grad():
            packs = [torch.ops.mkldnn._reorder_linear_weight(one.detach().contiguous(), _ROWS) for one in make()]
            self._kept[owner] = _Kept([weakref.ref(one) for one in weights], state, _totals_of(weights), packs)
        return packs


def _unchanged(kept: dict[Any, _Kept]) -> dict[Any, _Kept]:
    """Those whose weights are still there, of the same kind and with the same sums."""
    alive = {owner: weights for owner, one in [*kept.items()] if (weights := one.alive()) is not None}
    present = {owner: weights for owner, weights in alive.items() if are_packable(weights)}
    totals = iter(_totals_of([weight for weights in present.values() for weight in weights]))
    now = {owner: [next(totals) for _ in weights] for owner, weights in present.items()}
    return {owner: kept[owner] for owner, of_owner in now.items() if kept[owner].totals == of_owner}


def _state_of(weights: Sequence[Tensor]) -> tuple:
    return tuple((id(one), one.data_ptr(), one._version) for one in weights)


@torch.no_grad()
def _totals_of(weights: Sequence[Tensor]) -> list[list[int]]:
    """The bits of each weight as whole numbers, summed up in segments: values that were moved show as well."""
    kinds = {0: torch.int64, 1: torch.int32}  # an odd number of values is read one by one
    parts = []
    for one in weights:
        flat = one.detach().reshape(-1)
        flat = flat.view(kinds[len(flat) % 2])
        size = min(_SEGMENT, len(flat) // 64 | 1)  # odd, so that segments cut the rows of a weight in different places
        whole = len(flat) // size * size
        parts.append(torch.cat([flat[:whole].view(-1, size).sum(1), flat[whole:].sum(0, keepdim=True)]))
    totals = torch.cat(parts).split([len(part) for part in parts]) if parts else ()
    return [total.tolist() for total in totals]


def are_packable(weights: Iterable[Tensor]) -> bool:
    """Whether all are ordinary tensors of float32 on the CPU, with a count of their changes in place."""
    return all(
        type(one) in (Tensor, nn.Parameter)
        and (one.device.type, one.dtype, one.layout) == ("cpu", torch.float32, torch.strided)
        and not one.is_inference()
        for one in weights
    )


def are_small(weights: Iterable[Tensor]) -> bool:
    """Whether there is room for a second copy of all these."""
    return sum(one.nbytes for one in weights) <= _MOST


def in_use() -> Packs | None:
    """The packs of this thread's innermost `with` block; None with gradients, autocast or torch.compile."""
    packs = _in_use.get()
    if packs is None or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return None
    return packs


def packed(weight: Tensor) -> Tensor:
    """A weight [d_out, d_in] for `product`: its pack where packs are in use and it is packable, otherwise itself."""
    packs = in_use()
    found = None if packs is None else packs.of(id(weight), [weight], lambda: [weight])
    return weight if found is None else found[0]


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, times: Tensor | None = None, plus: Tensor | None = None
) -> Tensor:
    """x W^T + bias, then multiplied by `times` or added to `plus`: [.., d_in] -> [.., d_out].

    weight: [d_out, d_in], or its pack.
    times, plus: [.., d_out]; one of them at most.
    """
    if not weight.is_mkldnn:
        return _then(F.linear(x, weight, bias), times, plus)
    if times is None and plus is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    other, how = (times, "mul") if plus is None else (plus, "add")
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, how)


def _then(y: Tensor, times: Tensor | None, plus: Tensor | None, is_new: bool = True) -> Tensor:
    """y multiplied or added to; in its own memory where it is new and no gradient needs what it was."""
    if not is_new or torch.is_grad_enabled():
        return y * times if times is not None else y if plus is None else y + plus
    return y.mul_(times) if times is not None else y if plus is None else y.add_(plus)


def product_of_rows(x: Tensor, y: Tensor) -> Tensor:
    """x y^T of [n, d] and [m, d] in float32, neither of them a weight, by oneDNN: [n, m]."""
    return torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")


def linear(module: nn.Module, x: Tensor, *, times: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """module(x), then multiplied by `times` or added to `plus`; a plain linear by its pack where packs are in use."""
    if in_use() is not None and is_plain(module):
        return product(x, packed(module.weight), module.bias, times=times, plus=plus)
    return _then(module(x), times, plus, is_new=is_plain(module))  # a hook may hold what it gave


def is_plain(module: nn.Module) -> bool:
    """Whether it is a linear map and nothing else: no class of its own, no hook."""
    return type(module) is nn.Linear and "forward" not in vars(module) and not hooks_of(module)


def hooks_of(module: nn.Module) -> list[Callable]:
    """What acts before and after a module's passes, or all modules', without what only watches."""
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    kinds += (_all._global_forward_pre_hooks, _all._global_forward_hooks)
    kinds += (_all._global_backward_pre_hooks, _all._global_backward_hooks)
    hooks = [hook for kind in kinds for hook in kind.values()]
    return [one for one in hooks if not getattr(getattr(one, "func", one), "__module__", "").startswith(_HARMLESS)]


def piece_of(rows: int, width: int) -> int:
    """The size of nearly equal pieces of rows, whose hidden values [piece, width] stay in a processor's own memory.

    No last piece has a single row, whose product would have other bits.
    """
    most = max(2, min(_PIECE, _HIDDEN // width))
    return max(1, -(-rows // max(1, -(-rows // most))))


def round_up(rows: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-rows // step) * step


def is_available() -> bool:
    """Whether this torch has these products."""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
    )
