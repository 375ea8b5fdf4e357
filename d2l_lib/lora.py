"""Apply generated low-rank blocks to a frozen model: y = W x + s * B^T (A x).

The adapter acts through forward hooks inside a `with` block. No weight is touched, and the hooks are gone on exit, so
the model after the block equals the model before it, bit for bit.

Threads: a forward pass sees the innermost block that its own thread (or asyncio task) has opened. Blocks of other
threads do not reach it.
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
    """One open `with` block of this module: its model and the blocks around it in its thread.

    owner, adapter, reading: notes of `DocToLoRA.applied` for calls without `adapter=`.
    shared: whether a thread that starts inside the block and opens none itself sees the block.
    """

    def __init__(
        self, model: nn.Module, owner: Any = None, adapter: Any = None, reading: Any = None, shared: bool = True
    ):
        self.model, self.owner, self.adapter, self.reading, self.shared = model, owner, adapter, reading, shared
        self.around = _opened_here.get()
        self.is_open = True
        # threads from before the block; torch's own threads (backward passes) have no reliable entry
        self.elders = {one for one in threading.enumerate() if not isinstance(one, threading._DummyThread)}


# Open blocks of the calling thread or task, outermost first.
_opened_here: ContextVar[tuple[OpenBlock, ...]] = ContextVar("d2l_opened_here", default=())
_opened: list[OpenBlock] = []  # of all threads, in order of opening
_lock = threading.Lock()  # of the list, of hooks on shared modules, and of the stance below
_stance: list = []  # the end of torch.compile's eager stance, then one entry per open block


def innermost(model: nn.Module) -> OpenBlock | None:
    """The block that a forward pass of `model` in the calling thread sees.

    It is the last one that this thread opened. A thread without blocks sees the block in which it started (a
    streamer's thread, torch's thread of a backward pass). RuntimeError where blocks of several threads were open then.
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
    """The innermost block that `owner` opened for `model` in the calling thread, or None."""
    blocks = [b for b in _opened_here.get() if b.owner is owner and b.model is model and b.is_open]
    return blocks[-1] if blocks else None


def is_applied(model: nn.Module) -> bool:
    """Whether any thread has a block open for this model."""
    with _lock:
        return any(block.model is model for block in _opened)


@contextmanager
def _opened_block(block: OpenBlock) -> Iterator[None]:
    """Inside the `with` block the calling thread sees `block`. Blocks may end in any order."""
    with _lock:
        _opened.append(block)
    _opened_here.set((*block.around, block))
    try:
        yield
    finally:
        block.is_open = False  # for tasks that outlive the block
        _opened_here.set(tuple(one for one in _opened_here.get() if one is not block and one.is_open))
        with _lock:
            _opened.remove(block)


@contextmanager
def without_lora(model: nn.Module, **notes: Any) -> Iterator[None]:
    """Inside the `with` block the model is the plain base model, even in `apply_lora`; notes: see OpenBlock."""
    with _opened_block(OpenBlock(model, **({"shared": False} | notes))):
        yield


def _in_this_thread(hook: Callable) -> Callable:
    """A hook that acts in the calling thread only."""
    mine = threading.get_ident()
    return lambda *arguments: hook(*arguments) if threading.get_ident() == mine else None


@contextmanager
def hooked(register: Callable[[Callable], Any], hook: Callable) -> Iterator[None]:
    """Inside the `with` block `hook` acts in this thread; register: the module's register_..._hook method."""
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
    layers: Sequence[int] | None = None,
    *,
    rows: Tensor | None = None,
    **notes: Any,
) -> Iterator[None]:
    """Inside the `with` block every target linear returns y + scale * B^T (A x).

    loras: {module: (A [contexts, L, R, d_in], B [contexts, L, R, d_out])}.
    layers: the L base layers that have them, by number (None: all). Linears of others stay as they are.
    rows: [batch], the context of each batch row (None: row i is context i, or one context serves all rows). Beam
        search repeats each entry: the batch is a multiple of `rows`.
    notes: see OpenBlock.

    A and B are never copied per token. Arithmetic runs in A's dtype; the sum has the base output's. Gradients reach A
    and B; with gradient checkpointing, call backward inside the block. Blocks nest: the innermost adapter replaces the
    outer ones. `innermost` says which threads see the block. ValueError where A and B do not fit the model or batch.
    """
    linears = target_linears(model, sorted(loras))
    for module, (A, B) in loras.items():
        _check_fit(module, A, B, linears[module], layers, rows)
    deltas = []
    for module, (A, B) in loras.items():
        own = linears[module] if layers is None else [linears[module][layer] for layer in layers]
        is_whole = _is_identity(B)
        for layer, linear in enumerate(own):
            # a weight that waits elsewhere comes to x: `_delta` then moves the factors with each call
            place = A.device if linear.weight.is_meta else linear.weight.device
            factors = {"A": A[:, layer].to(place), "B": None if is_whole else B[:, layer].to(place)}
            if is_whole and A.dtype == linear.weight.dtype and not linear.weight.is_meta:
                deltas.append((linear, factors["A"][0]))
            else:
                deltas.append((linear, partial(_delta, **factors, rows=rows)))
    with add_deltas(model, deltas, scale, **notes):
        yield


@contextmanager
def add_deltas(
    model: nn.Module,
    deltas: Sequence[tuple[nn.Linear, Callable[[Tensor], Tensor] | Tensor]],
    scale: float,
    *,
    before: Callable[[dict[str, Any]], None] | None = None,
    **notes: Any,
) -> Iterator[None]:
    """Inside the `with` block each of these linears of `model` returns y + scale * delta(x), in this thread.

    deltas: (linear, delta); of a matrix D [d_out, d_in], delta(x) is D x.
    before: called before each forward pass with the decoder's keyword arguments.
    notes: see OpenBlock.
    Blocks nest: the innermost one counts. The model on exit is the model on entry.
    """
    block = OpenBlock(model, **notes)
    with ExitStack() as stack:
        handles: list = []
        stack.callback(_remove, handles)
        # Torch numbers hooks by one counter, so registering needs a lock. A forward pass of another thread reads a
        # module's hooks in one step of the interpreter, so it needs none.
        with _lock:
            for linear, delta in deltas:
                add = _add_product if isinstance(delta, Tensor) else _add_delta
                hook = partial(add, delta=delta, scale=scale, block=block)
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
    """While any thread is in the block, torch.compile's models run uncompiled: compiled code ignores new hooks."""
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
    """Forward pre-hook of the decoder; acts if its block is the innermost of the calling thread."""
    if innermost(block.model) is block:
        before(arguments)


def _add_delta(linear, inputs, output, *, delta, scale, block):
    """Forward hook of one linear; acts if its block is the innermost of the calling thread."""
    if innermost(block.model) is not block:
        return None
    return torch.add(output, delta(inputs[0].to(output.device)), alpha=scale).to(output.dtype)


def _add_product(linear, inputs, output, *, delta, scale, block):
    """The same with a matrix delta [d_out, d_in] of the model's precision, in one operation."""
    if innermost(block.model) is not block:
        return None
    x, y = (one.reshape(-1, one.shape[-1]) for one in (inputs[0], output))
    return torch.addmm(y, x.to(y.device), delta.T.to(y.device), alpha=scale).view_as(output)


def _is_identity(B: Tensor) -> bool:
    """Whether B [1, L, d_out, d_out] of one context is one identity, expanded over the layers: A is a whole update."""
    contexts, layers, rank, d_out = B.shape
    is_expanded = layers == 1 or B.stride(1) == 0
    if contexts > 1 or rank != d_out or not is_expanded or B.requires_grad:
        return False
    return torch.equal(B[0, 0], torch.eye(d_out).to(B))


def _delta(x: Tensor, *, A: Tensor, B: Tensor | None, rows: Tensor | None) -> Tensor:
    """B^T (A x) for x [batch, tokens, d_in], with each token's own context: A [contexts, R, d_in], B [.., d_out].

    B: None for the identity.
    """
    x, A = x.to(A.dtype), A.to(x.device)
    if B is None:
        return x @ A[0].T
    B = B.to(x.device)
    if len(A) == 1:
        return x @ A[0].T @ B[0]
    if rows is None and len(x) == len(A):
        return x @ A.transpose(1, 2) @ B
    if rows is not None and len(rows) == len(x) and _in_equal_groups(rows, len(A)):
        # one product per context, and no copy of A and B per question
        return (x.reshape(len(A), -1, x.shape[2]) @ A.transpose(1, 2) @ B).view(*x.shape[:2], -1)
    rows = torch.arange(len(A), device=x.device) if rows is None else rows.to(x.device)
    if len(x) % len(rows):
        raise ValueError(f"a batch of {len(x)} rows does not fit adapters for {len(rows)} rows: pass rows=")
    rows = rows.repeat_interleave(len(x) // len(rows))
    return x @ A[rows].transpose(1, 2) @ B[rows]


def _in_equal_groups(rows: Tensor, contexts: int) -> bool:
    """Whether `rows` is 0, 0, .. 1, 1, .. with equal counts of all contexts."""
    if len(rows) % contexts:
        return False
    each = torch.arange(contexts, device=rows.device).repeat_interleave(len(rows) // contexts)
    return torch.equal(rows, each)


def _check_fit(
    module: str, A: Tensor, B: Tensor, linears: list[nn.Linear], layers: Sequence[int] | None, rows: Tensor | None
) -> None:
    if A.dim() != 4 or B.dim() != 4 or A.shape[:3] != B.shape[:3]:
        raise ValueError(f"{module}: A {list(A.shape)} and B {list(B.shape)} must share [contexts, layers, rank]")
    contexts, n_layers = A.shape[:2]
    fits = n_layers == len(linears) if layers is None else n_layers == len(layers) and max(layers) < len(linears)
    if not fits:
        held = f"{n_layers} layers" + ("" if layers is None else f", as numbers {', '.join(map(str, layers))}")
        raise ValueError(
            f"{module}: adapter has blocks for {held}, this model has {len(linears)}: was it made for another model?"
        )
    sizes = (linears[0].in_features, linears[0].out_features)
    if (A.shape[3], B.shape[3]) != sizes:
        raise ValueError(f"{module}: adapter maps {A.shape[3]} -> {B.shape[3]}, this model {sizes[0]} -> {sizes[1]}")
    if rows is not None and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < contexts:
        raise ValueError(f"{module}: rows {rows.tolist()} name contexts outside 0..{contexts - 1}")
