"""Apply generated low-rank blocks to a frozen model: y = W x + s * B^T (A x).

The adapter acts through forward hooks inside a `with` block. No weight is touched, and the hooks are gone on exit, so
the model after the block equals the model before it, bit for bit.

Threads: which adapter acts is a matter of the calling thread (or asyncio task) alone. A forward pass sees the innermost
block that its own thread has opened; what other threads have opened at the same time does not reach it.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from d2l_lib.base_model import decoder_body, target_linears
from d2l_lib.hypernetwork import Loras


class OpenBlock:
    """One open `with` block of this module: for which model, and what surrounds it in its thread.

    owner, adapter, reading: what `DocToLoRA.applied` notes for calls that leave out `adapter=`. shared: a thread that
    is started inside the block, and opens none itself, sees the block too.
    """

    def __init__(
        self, model: nn.Module, owner: Any = None, adapter: Any = None, reading: Any = None, shared: bool = True
    ):
        self.model, self.owner, self.adapter, self.reading, self.shared = model, owner, adapter, reading, shared
        self.around = _opened_here.get()
        self.is_open = True
        # threads that were there before; those of torch's own (backward passes) have no entry that could be relied on
        self.elders = {one for one in threading.enumerate() if not isinstance(one, threading._DummyThread)}


# Blocks that the calling thread or task has opened, outermost first.
_opened_here: ContextVar[tuple[OpenBlock, ...]] = ContextVar("d2l_opened_here", default=())
_opened: list[OpenBlock] = []  # those of all threads, in the order in which they were opened
_lock = threading.Lock()  # of the list, of hooks on shared modules, and of the stance below
_stance: list = []  # what ends the eager stance of torch.compile, then one entry for each open block


def innermost(model: nn.Module) -> OpenBlock | None:
    """The block that a forward pass of `model` in the calling thread sees.

    It is the last one that this thread opened. A thread that has opened none, and was started while a block was open (a
    streamer's thread, torch's thread of a backward pass), sees that block; RuntimeError where it could be one of
    several threads' blocks.
    """
    for block in reversed(_opened_here.get()):
        if block.model is model and block.is_open:
            return block
    if not _opened:  # spares the lock
        return None
    me = threading.current_thread()
    with _lock:
        seen = [block for block in _opened if block.model is model and block.shared and me not in block.elders]
    if not seen:
        return None
    if any(block not in seen[-1].around for block in seen[:-1]):
        raise RuntimeError(
            "several threads have adapters applied and this one has opened none: which is meant? Open one here "
            "(`with model.applied(adapter):`, or None for the base model)"
        )
    return seen[-1]


def noted_adapter(model: nn.Module, owner: Any) -> OpenBlock | None:
    """The innermost block of the calling thread that `owner` opened for `model`; never one of another thread."""
    blocks = [b for b in _opened_here.get() if b.owner is owner and b.model is model and b.is_open]
    return blocks[-1] if blocks else None


def is_applied(model: nn.Module) -> bool:
    """Whether any thread has a block open for this model."""
    with _lock:
        return any(block.model is model for block in _opened)


@contextmanager
def _opened_block(block: OpenBlock) -> Iterator[None]:
    """Inside the `with` block the calling thread sees `block`. Blocks need not be left in the order of entering."""
    with _lock:
        _opened.append(block)
    _opened_here.set((*block.around, block))
    try:
        yield
    finally:
        block.is_open = False  # also for tasks that began inside the block and go on after it
        _opened_here.set(tuple(one for one in _opened_here.get() if one is not block and one.is_open))
        with _lock:
            _opened.remove(block)


@contextmanager
def without_lora(model: nn.Module, **notes: Any) -> Iterator[None]:
    """Inside the `with` block the model is the plain base model, even within `apply_lora`; notes: see OpenBlock."""
    with _opened_block(OpenBlock(model, **({"shared": False} | notes))):
        yield


def _in_this_thread(hook: Callable) -> Callable:
    """A hook that acts in the thread that made it and ignores the forward passes of others."""
    mine = threading.get_ident()
    return lambda *arguments: hook(*arguments) if threading.get_ident() == mine else None


@contextmanager
def hooked(register: Callable[[Callable], Any], hook: Callable) -> Iterator[None]:
    """Inside the `with` block `hook` is on a module for this thread alone; register: its register_..._hook method."""
    with _lock:
        handle = register(_in_this_thread(hook))
    try:
        yield
    finally:
        with _lock:
            handle.remove()


@contextmanager
def apply_lora(
    model: nn.Module,
    loras: Loras,
    scale: float,
    *,
    rows: Tensor | None = None,
    **notes: Any,
) -> Iterator[None]:
    """Inside the `with` block every target linear returns y + scale * B^T (A x).

    loras: {module: (A [contexts, L, R, d_in], B [contexts, L, R, d_out])}.
    rows: [batch], the context of each batch row (None: row i is context i, or one context serves all rows). A batch
    that is a multiple of `rows` (beam search) repeats each entry.
    notes: see OpenBlock.

    A and B are never copied per token. Arithmetic runs in A's dtype; the sum has the base output's. Gradients reach A
    and B: call backward inside the block when activations are recomputed (gradient checkpointing). Blocks nest: the
    innermost adapter replaces the outer ones. Other threads do not see the block, except one that is started inside it
    and opens none itself (see `innermost`). ValueError where A and B do not fit the model or the batch.
    """
    linears = target_linears(model, sorted(loras))
    for module, (A, B) in loras.items():
        _check_fit(module, A, B, linears[module], rows)
    deltas = []
    for module, (A, B) in loras.items():
        for layer, linear in enumerate(linears[module]):
            # weights that wait on the disk or in main memory come to x; the factors are then moved with each call
            place = A.device if linear.weight.is_meta else linear.weight.device
            factors = {"A": A[:, layer].to(place), "B": B[:, layer].to(place)}
            deltas.append((linear, partial(_delta, **factors, rows=rows)))
    with add_deltas(model, deltas, scale, **notes):
        yield


@contextmanager
def add_deltas(
    model: nn.Module,
    deltas: Sequence[tuple[nn.Linear, Callable[[Tensor], Tensor]]],
    scale: float,
    *,
    before: Callable[[dict[str, Any]], None] | None = None,
    **notes: Any,
) -> Iterator[None]:
    """Inside the `with` block each of these linears of `model` returns y + scale * delta(x), in this thread.

    before: called before each forward pass with the keyword arguments of the decoder. notes: see OpenBlock. Blocks
    nest: the innermost one counts. The model on exit is the model on entry.
    """
    block = OpenBlock(model, **notes)
    with ExitStack() as stack:
        handles: list = []
        stack.callback(_remove, handles)
        # One lock for all: torch numbers hooks by a counter of its own, which two threads could read at once. A forward
        # pass of another thread reads a module's hooks in one step of the interpreter, so it needs no lock.
        with _lock:
            for linear, delta in deltas:
                hook = partial(_add_delta, delta=delta, scale=scale, block=block)
                handles.append(linear.register_forward_hook(hook))
            if before is not None:
                begin = partial(_begin, before=before, block=block)
                handles.append(decoder_body(model).register_forward_pre_hook(begin, with_kwargs=True))
        stack.enter_context(_uncompiled())
        stack.enter_context(_opened_block(block))
        yield


def _remove(handles: Sequence) -> None:
    with _lock:
        for handle in handles:
            handle.remove()


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Inside the `with` block models that torch.compile made run as they are: compiled code does not see hooks that
    came later, and would answer without the adapter. The stance is one for all threads: it holds while any block is
    open.
    """
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it takes seconds
        yield
        return
    with _lock:
        if not _stance:
            _stance.append(torch.compiler.set_stance("force_eager"))
        _stance.append(None)
    try:
        yield
    finally:
        with _lock:
            _stance.pop()
            if len(_stance) == 1:
                _stance.pop().__exit__(None, None, None)


def _begin(body, inputs, arguments, *, before, block):
    """Forward pre-hook of the decoder; acts only where its block is the innermost of the calling thread."""
    if innermost(block.model) is block:
        before(arguments)


def _add_delta(linear, inputs, output, *, delta, scale, block):
    """Forward hook of one linear; acts only where its block is the innermost of the calling thread."""
    if innermost(block.model) is not block:
        return None
    return (output + scale * delta(inputs[0].to(output.device))).to(output.dtype)


def _delta(x: Tensor, *, A: Tensor, B: Tensor, rows: Tensor | None) -> Tensor:
    """B^T (A x) for x [batch, tokens, d_in], with each token's own context: A [contexts, R, d_in], B [.., d_out]."""
    x, A, B = x.to(A.dtype), A.to(x.device), B.to(x.device)
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


def _check_fit(module: str, A: Tensor, B: Tensor, linears: list[nn.Linear], rows: Tensor | None) -> None:
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
    if rows is not None and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < contexts:
        raise ValueError(f"{module}: rows {rows.tolist()} name contexts outside 0..{contexts - 1}")
