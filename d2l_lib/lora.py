"""Apply generated low-rank blocks to a frozen model: y = W x + s * B^T (A x).

The adapter acts through forward hooks inside a `with` block. No weight is touched, and the hooks are gone on exit, so
the model after the block equals the model before it, bit for bit.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from d2l_lib.base_model import open_adapters, target_linears
from d2l_lib.hypernetwork import Loras

_eager_blocks: list = []  # what ends the eager stance, then one entry for each open block


@contextmanager
def apply_lora(
    model: nn.Module,
    loras: Loras,
    scale: float,
    *,
    rows: Tensor | None = None,
    lengths: Sequence[int] | None = None,
) -> Iterator[None]:
    """Inside the `with` block every target linear returns y + scale * B^T (A x).

    loras: {module: (A [contexts, L, R, d_in], B [contexts, L, R, d_out])}. To which context a token belongs:
    `rows` [batch] names the context of each batch row (None: row i is context i, or one context for all rows);
    `lengths` counts the tokens of each context in a packed [1, total] batch. A batch that is a multiple of `rows`
    (beam search) repeats each entry. A and B are never copied per token.

    Arithmetic runs in A's dtype; the sum is returned in the base output's. Gradients reach A and B: call backward
    inside the block when activations are recomputed (gradient checkpointing). Blocks nest: the innermost adapter
    replaces the outer ones until it is left. ValueError where A and B fit neither the model nor the batch.
    """
    if rows is not None and lengths is not None:
        raise ValueError("give rows (one context per batch row) or lengths (packed batch), not both")
    linears = target_linears(model, sorted(loras))
    for module, (A, B) in loras.items():
        _check_fit(module, A, B, linears[module], rows, lengths)
    deltas = []
    for module, (A, B) in loras.items():
        for layer, linear in enumerate(linears[module]):
            # weights that wait on the disk or in main memory come to x; the factors are then moved with each call
            place = A.device if linear.weight.is_meta else linear.weight.device
            factors = {"A": A[:, layer].to(place), "B": B[:, layer].to(place)}
            deltas.append((linear, partial(_delta, **factors, rows=rows, lengths=lengths)))
    with add_deltas(model, deltas, scale):
        yield


@contextmanager
def add_deltas(
    model: nn.Module, deltas: Sequence[tuple[nn.Linear, Callable[[Tensor], Tensor]]], scale: float
) -> Iterator[None]:
    """Inside the `with` block each of these linears of `model` returns y + scale * delta(x).

    Blocks nest: the innermost one counts. The model on exit is the model on entry.
    """
    token, handles = object(), []
    stack = open_adapters.setdefault(model, [])
    try:
        for linear, delta in deltas:
            hook = partial(_add_delta, delta=delta, scale=scale, stack=stack, token=token)
            handles.append(linear.register_forward_hook(hook))
        stack.append(token)
        with _uncompiled():
            yield
    finally:
        if token in stack:
            stack.remove(token)
        for handle in handles:
            handle.remove()


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Inside the `with` block models that torch.compile made run as they are: compiled code does not see hooks that
    came later, and would answer without the adapter.
    """
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it takes seconds
        yield
        return
    if not _eager_blocks:
        _eager_blocks.append(torch.compiler.set_stance("force_eager"))
    _eager_blocks.append(None)
    try:
        yield
    finally:
        _eager_blocks.pop()
        if len(_eager_blocks) == 1:
            _eager_blocks.pop().__exit__(None, None, None)


def _add_delta(linear, inputs, output, *, delta, scale, stack, token):
    """Forward hook of one linear; acts only for the innermost application."""
    if stack[-1] is not token:
        return None
    return (output + scale * delta(inputs[0].to(output.device))).to(output.dtype)


def _delta(x: Tensor, *, A: Tensor, B: Tensor, rows: Tensor | None, lengths: Sequence[int] | None) -> Tensor:
    """B^T (A x) for x [batch, tokens, d_in], with each token's own context: A [contexts, R, d_in], B [.., d_out]."""
    x, A, B = x.to(A.dtype), A.to(x.device), B.to(x.device)
    if lengths is not None:
        if len(x) != 1 or x.shape[1] != sum(lengths):
            raise ValueError(f"lengths add up to {sum(lengths)} tokens, the packed batch is {list(x.shape[:2])}")
        pieces = x[0].split(list(lengths))
        return torch.cat([piece @ A[c].T @ B[c] for c, piece in enumerate(pieces)]).unsqueeze(0)
    if len(A) == 1:
        return x @ A[0].T @ B[0]
    if rows is None and len(x) == len(A):
        return x @ A.transpose(1, 2) @ B
    if rows is not None and len(rows) == len(x) and _in_equal_groups(rows, len(A)):
        # questions of one context side by side: one product per context, and no copy of A and B per question
        return (x.reshape(len(A), -1, x.shape[2]) @ A.transpose(1, 2) @ B).view(*x.shape[:2], -1)
    rows = torch.arange(len(A), device=x.device) if rows is None else rows.to(x.device)
    if len(x) % len(rows):
        raise ValueError(f"a batch of {len(x)} rows does not fit adapters for {len(rows)} rows: pass rows=")
    rows = rows.repeat_interleave(len(x) // len(rows))
    return x @ A[rows].transpose(1, 2) @ B[rows]


def _in_equal_groups(rows: Tensor, contexts: int) -> bool:
    """Whether `rows` is 0, 0, .. 1, 1, .. with as many of each of the contexts."""
    if len(rows) % contexts:
        return False
    each = torch.arange(contexts, device=rows.device).repeat_interleave(len(rows) // contexts)
    return torch.equal(rows, each)


def _check_fit(module: str, A: Tensor, B: Tensor, linears: list[nn.Linear], rows, lengths) -> None:
    if A.dim() != 4 or B.dim() != 4 or A.shape[:3] != B.shape[:3]:
        raise ValueError(f"{module}: A {list(A.shape)} and B {list(B.shape)} must share [contexts, layers, rank]")
    contexts, n_layers = A.shape[:2]
    if n_layers != len(linears):
        raise ValueError(
            f"{module}: adapter has blocks for {n_layers} layers, this model has {len(linears)}: "
            "was it made for another model?"
        )
    sizes = (linears[0].in_features, linears[0].out_features)
    if (A.shape[3], B.shape[3]) != sizes:
        raise ValueError(f"{module}: adapter maps {A.shape[3]} -> {B.shape[3]}, this model {sizes[0]} -> {sizes[1]}")
    if lengths is not None and len(lengths) != contexts:
        raise ValueError(f"{module}: {len(lengths)} lengths for adapters of {contexts} contexts")
    if rows is not None and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < contexts:
        raise ValueError(f"{module}: rows {rows.tolist()} name contexts outside 0..{contexts - 1}")
