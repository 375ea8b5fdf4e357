"""An adapter is a sum of labelled blocks: W x  ->  W x + scale * sum over blocks of weight * B^T (A x).

Each chunk of each document is one low-rank block per layer and module. One learned bias block, the same for all
documents, is added. Composing documents adds blocks; forgetting a document drops its blocks.
Adapters are values: no operation changes its operand. Adapters share blocks and never copy them.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, reduce
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from d2l_lib.documents import MOST_SHOWN, check_count, check_name, shorten, some_of
from d2l_lib.formats import markup
from d2l_lib.formats.tensors import safetensors_metadata
from d2l_lib.formats.writing import atomic_file
from d2l_lib.records import parse_json

if TYPE_CHECKING:
    from d2l_lib.formats.schemas import AdapterHeader
    from d2l_lib.model import DocToLoRA

FORMAT = "d2l-adapter"
_FORMAT_VERSIONS = (1, 2)  # the second: blocks may share a table, and tensors of one shape may lie in one
_OWN_TENSORS = 1000  # of a file; where there would be more, those of one shape lie in one, which is read at once
_USUAL_ENDINGS = ("", ".safetensors", ".st", ".sft", ".adapter", ".lora", ".d2l")  # of files that `save` may replace
# Where a target module sits in a decoder layer, for an adapter without paths of its own.
_USUAL_PARENTS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn")
_USUAL_PARENTS |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp")

Factors = dict[str, tuple[Tensor, Tensor]]


def _may_replace(path: Path) -> bool:
    """Whether `save` may replace a file: an adapter, an empty file, or no tensors under a usual ending."""
    metadata = safetensors_metadata(path)
    if metadata is not None:
        return FORMAT in metadata
    return path.suffix in _USUAL_ENDINGS or path.stat().st_size == 0


class SharedRows(Mapping[str, Tensor]):
    """{module: B [1, r, d_out]} of a block of token rows, where row j of B is row rows[j] of a table.

    Blocks share the table [n, d_out], so a word that is written a thousand times is held once. rows: [r] int32.
    B itself is made anew each time that it is asked for.
    """

    def __init__(self, module: str, table: Tensor, rows: Tensor):
        self.module, self.table, self.rows = module, table, rows

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of B."""
        return 1, len(self.rows), self.table.shape[1]

    def __getitem__(self, module: str) -> Tensor:
        if module != self.module:
            raise KeyError(module)
        return self.table[self.rows.to(self.table.device)].unsqueeze(0)

    def __iter__(self) -> Iterator[str]:
        yield self.module

    def __len__(self) -> int:
        return 1


@dataclass(frozen=True, eq=False)
class Block:
    """What one chunk of one document adds: weight * B^T A in every module of the layers that are written.

    document, chunk: the document's name, and the chunk's number in it, from 0.
    span: the chunk's (start, end) in characters of its document; None for a chunk of token ids alone.
    weight: 1 as the hypernetwork wrote it.
    A, B: {module: [layers, r, d_in]} and {module: [layers, r, d_out]}; which layers is said by its adapter.

    TypeError for a name that is no text or cannot be printed.
    """

    document: str
    chunk: int
    span: tuple[int, int] | None
    weight: float
    A: dict[str, Tensor]
    B: dict[str, Tensor] | SharedRows

    def __post_init__(self):
        check_name(self.document)

    @property
    def tensors(self) -> list[Tensor]:
        """What it holds in memory."""
        of_B = [self.B.table, self.B.rows] if isinstance(self.B, SharedRows) else self.B.values()
        return [*self.A.values(), *of_B]

    @property
    def _shapes(self) -> dict[str, tuple[Sequence[int], Sequence[int]]]:
        """{module: shapes of A and of B}."""
        shared = isinstance(self.B, SharedRows)
        of_B = {self.B.module: self.B.shape} if shared else {module: B.shape for module, B in self.B.items()}
        return {module: (A.shape, of_B[module]) for module, A in self.A.items()}

    @property
    def rank(self) -> int:
        """Rows of A and B in each layer and module."""
        return next(iter(self.A.values())).shape[1]

    def renamed(self, document: str) -> Block:
        """This block as one of another document; itself where that is its own."""
        return self if self.document == document else replace(self, document=document)

    def weighted(self, weight: float) -> Block:
        """This block with its weight times `weight`; ValueError where the product is not finite."""
        product = self.weight * weight
        if not math.isfinite(product):
            _finite(product, f"the weight of {self!r}")
        return replace(self, weight=product)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Block):
            return NotImplemented
        labels = (self.document, self.chunk, self.span, self.weight)
        return labels == (other.document, other.chunk, other.span, other.weight) and _equal(
            {m: (self.A[m], self.B[m]) for m in self.A}, {m: (other.A[m], other.B[m]) for m in other.A}
        )

    __hash__ = None

    def __repr__(self) -> str:
        where = "" if self.span is None else f", characters {self.span[0]}-{self.span[1]}"
        weight = "" if self.weight == 1 else f", weight {self.weight:g}"
        return f"Block({shorten(self.document)!r}, chunk {self.chunk}{where}, rank {self.rank}{weight})"


def _equal(first: Factors | None, second: Factors | None) -> bool:
    """Whether both hold the same numbers, or both are None."""
    if first is None or second is None:
        return first is second
    return first.keys() == second.keys() and all(
        a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device)))
        for module in first
        for a, b in zip(first[module], second[module], strict=True)
    )


def _finite(weight: float, what: str) -> float:
    """`weight` as a float; ValueError unless it is a finite number."""
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise ValueError(f"{what} must be a finite number, not {weight!r}")
    return float(weight)


@dataclass(frozen=True)
class _Names:
    """An adapter's documents: {name: its chunks' numbers}, in order of first appearance.

    taken: for each name with copies, the highest n such that "name (2)" to "name (n)" all exist.
    """

    chunks: dict[str, frozenset[int]]
    taken: dict[str, int]

    @classmethod
    def of(cls, blocks: Iterable[Block]) -> _Names:
        chunks: dict[str, list[int]] = {}
        for block in blocks:
            chunks.setdefault(block.document, []).append(block.chunk)
        return cls({document: frozenset(numbers) for document, numbers in chunks.items()}, {})

    def added(self, other: _Names) -> tuple[_Names, dict[str, str]]:
        """(the names of both, {document of `other`: its name in the sum})."""
        chunks, taken, new_names = dict(self.chunks), dict(self.taken), {}
        for document, numbers in other.chunks.items():
            name = document
            if not self.chunks.get(document, frozenset()).isdisjoint(numbers):
                number = taken.get(document, 1) + 1
                while f"{document} ({number})" in chunks or f"{document} ({number})" in other.chunks:
                    number += 1
                name, taken[document] = f"{document} ({number})", number
            chunks[name] = chunks.get(name, frozenset()) | numbers
            new_names[document] = name
        return _Names(chunks, taken), new_names


def _as_set(choice: object, kind: type, what: str) -> set:
    """One name or number, or several of them, as a set; TypeError for anything else."""
    several = [choice] if isinstance(choice, (kind, str)) or not isinstance(choice, Iterable) else list(choice)
    if wrong := [one for one in several if isinstance(one, bool) or not isinstance(one, kind)]:
        raise TypeError(f"{what} or several of them are expected, not {wrong[0]!r}")
    return set(several)


@dataclass(frozen=True, eq=False)
class Adapter:
    """Labelled blocks, the bias block, and the scale s of y = W x + s B^T (A x).

    Print it to see its contents. `a + b` composes; `only` and `without` select documents and chunks; `scaled` and
    `scaled_bias` change weights linearly; `factors` gives the summed matrices; `compressed` lowers their rank.

    blocks: of all documents, in order. Tensors are shared, not copied.
    bias: {module: (A [layers, r, d_in], B [layers, r, d_out])} of the bias block (None: there is none).
    scale: s, for all blocks and the bias.
    bias_weight: multiplies the bias.
    bias_inside: whether a bias was summed into a block, and cannot be taken out.
    n_layers, sizes: of the base model, sizes as {module: (d_in, d_out)}. By default from the blocks or the bias.
    layers: the base layers that blocks and bias hold, in ascending order (0 = first; empty: all). Others stay as they
        are.
    base_model, base_key, hypernetwork_key: what made the adapter.
    paths: where each module sits in the base model ("model.layers.{layer}.mlp.down_proj").

    TypeError for what is no Block. ValueError for shapes that do not fit one another and numbers that are not finite.
    """

    blocks: tuple[Block, ...]
    bias: Factors | None
    scale: float
    bias_weight: float = 1.0
    n_layers: int = 0
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    base_model: str = ""
    base_key: str = ""
    hypernetwork_key: str = ""
    paths: dict[str, str] = field(default_factory=dict)
    bias_inside: bool = False
    layers: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "blocks", tuple(self.blocks))
        for block in self.blocks:
            if not isinstance(block, Block):
                raise TypeError(f"blocks must be Blocks, not {type(block).__name__}")
        for value, what in ((self.scale, "scale"), (self.bias_weight, "bias_weight")):
            _finite(value, what)
        for block in self.blocks:
            if type(block.weight) is not float or not math.isfinite(block.weight):
                _finite(block.weight, f"the weight of chunk {block.chunk} of {block.document!r}")
        first = None if not self.blocks else {m: (self.blocks[0].A[m], self.blocks[0].B[m]) for m in self.blocks[0].A}
        first = self.bias if first is None else first
        if not self.sizes:
            if first is None:
                raise ValueError("an adapter without blocks and bias needs n_layers and sizes={module: (d_in, d_out)}")
            sizes = {module: (A.shape[-1], B.shape[-1]) for module, (A, B) in first.items()}
            object.__setattr__(self, "sizes", sizes)
            object.__setattr__(self, "n_layers", next(iter(first.values()))[0].shape[0])
        object.__setattr__(self, "layers", tuple(self.layers) or self._all_layers)
        if list(self.layers) != sorted(set(self.layers) & set(self._all_layers)):
            raise ValueError(f"layers must ascend from 0 to at most {self.n_layers - 1}, not {self.layers}")
        for block in self.blocks:
            self._check_shapes(block, block._shapes)
        if self.bias is not None:
            self._check_shapes("the bias", {module: (A.shape, B.shape) for module, (A, B) in self.bias.items()})

    def _with(self, **changes: object) -> Adapter:
        """This adapter with these fields changed, unchecked: for results of its own operations."""
        new = object.__new__(type(self))
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        new.__dict__.update(values | changes)
        return new

    def _check_shapes(self, part: Block | str, shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]]) -> None:
        """ValueError unless these are shapes of this adapter's modules, layers and sizes."""
        if shapes.keys() != self.sizes.keys():
            raise ValueError(f"{_label(part)} has modules {sorted(shapes)}, the adapter has {self.modules}")
        n_held = len(self.layers)
        for module, (A, B) in shapes.items():
            d_in, d_out = self.sizes[module]
            r = A[1] if len(A) == 3 else -1
            if (tuple(A), tuple(B)) != ((n_held, r, d_in), (n_held, r, d_out)):
                raise ValueError(
                    f"{_label(part)}, {module}: A is {tuple(A)} and B {tuple(B)}; expected "
                    f"({n_held}, rank, {d_in}) and ({n_held}, rank, {d_out})"
                )

    # --- what is inside ---------------------------------------------------------------------------------------------

    @property
    def modules(self) -> list[str]:
        """Target modules, sorted."""
        return sorted(self.sizes)

    @property
    def documents(self) -> list[str]:
        """Names of the documents, in order of first appearance."""
        return list(self._names.chunks)

    @cached_property
    def _names(self) -> _Names:
        return _Names.of(self.blocks)

    @property
    def rank(self) -> int:
        """Rows of the summed factors: the ranks of all blocks and of the bias."""
        return sum(block.rank for block in self.blocks) + self._bias_rank

    @property
    def _bias_rank(self) -> int:
        return 0 if self.bias is None else next(iter(self.bias.values()))[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; a shared tensor counts once."""
        return sum(tensor.nbytes for tensor in {tensor.data_ptr(): tensor for tensor in self._tensors()}.values())

    @property
    def _all_layers(self) -> tuple[int, ...]:
        return tuple(range(self.n_layers))

    def _tensors(self) -> Iterator[Tensor]:
        for block in self.blocks:
            yield from block.tensors
        for pair in (self.bias or {}).values():
            yield from pair

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Adapter):
            return NotImplemented
        plain = ("scale", "bias_weight", "n_layers", "sizes", "base_key", "hypernetwork_key", "bias_inside")
        if any(getattr(self, name) != getattr(other, name) for name in plain):
            return False
        self, other = _in_same_layers(self, other)
        return self.blocks == other.blocks and _equal(self.bias, other.bias)

    __hash__ = None

    def __len__(self) -> int:
        return len(self.blocks)

    def __bool__(self) -> bool:
        return True  # an adapter without blocks still has its bias

    # --- sums and selections ----------------------------------------------------------------------------------------

    def __add__(self, other: Adapter) -> Adapter:
        """The blocks of both and the bias once, as if both sets of documents were internalized together.

        A document of `other` is renamed "name (2)" where its name and one of its chunk numbers are taken.
        An adapter that no hypernetwork made (`from_peft`) takes over the other's bias and scale; its update stays.
        Modules and layers that only one of the two writes get zero rows in the other.
        ValueError for different base models, hypernetworks, biases, scales or precisions.
        """
        if not isinstance(other, Adapter):
            return NotImplemented
        self, other = _in_same_layers(self, other)
        if self._is_foreign or other._is_foreign:
            self, other = _made_alike(self, other)
        else:
            self._check_summable(other)
        names, new_names = self._names.added(other._names)
        added = (block.renamed(new_names[block.document]) for block in other.blocks)
        return self._with(blocks=(*self.blocks, *added), _names=names)

    def __radd__(self, other: object) -> Adapter:
        """Lets `sum(adapters)` start from 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def as_lora(self) -> Adapter:
        """The same update as a plain LoRA, its bias a block "bias": it adds to any adapter for the same base model.

        ValueError for token rows, which have no sum.
        """
        self.check_summed()
        if self._is_foreign:
            return self
        blocks = self.blocks
        if self.bias is not None:
            name, number = "bias", 2
            while name in self.documents:
                name, number = f"bias ({number})", number + 1
            A, B = ({module: pair[side] for module, pair in self.bias.items()} for side in (0, 1))
            blocks = (*blocks, Block(name, 0, None, self.bias_weight, A, B))
        return replace(self, blocks=blocks, bias=None, bias_weight=1.0, bias_inside=False, hypernetwork_key="")

    @property
    def _is_foreign(self) -> bool:
        """Whether no hypernetwork made it, so that it has no bias to share."""
        return not self.hypernetwork_key and self.bias is None and not self.bias_inside

    def _check_summable(self, other: Adapter) -> None:
        if self.n_layers != other.n_layers or self.sizes != other.sizes:
            raise ValueError(
                "adapters for different base models cannot be added: "
                f"{self.n_layers} layers with {_shapes(self.sizes)}, "
                f"{other.n_layers} layers with {_shapes(other.sizes)}"
            )
        if not same_base(self.base_key, other.base_key) or bool(self.base_key) != bool(other.base_key):
            raise ValueError(
                "adapters for different base models cannot be added: "
                f"{self.base_model or 'unnamed'} and {other.base_model or 'unnamed'} have different weights"
            )
        if self.bias_inside or other.bias_inside:
            raise ValueError(
                "a compressed or exported adapter holds the bias inside its block: add first, compress the sum"
            )
        precisions = [t.dtype for one in (self, other) if (t := next(one._tensors(), None)) is not None]
        if self.hypernetwork_key == other.hypernetwork_key and len(set(precisions)) > 1:
            raise ValueError(
                f"adapters of different precision ({', '.join(map(str, precisions))}) cannot be added: "
                "use .to(dtype=...) to make them equal first"
            )
        if self.hypernetwork_key != other.hypernetwork_key or not _equal(self.bias, other.bias):
            raise ValueError(
                "adapters of different hypernetworks cannot be added: internalize both with one model, or use "
                "other.as_lora() to add it as an ordinary LoRA all the same"
            )
        if self.scale != other.scale:
            raise ValueError(f"adapters of different scales ({self.scale:g}, {other.scale:g}) cannot be added")
        if self.bias_weight != other.bias_weight:
            raise ValueError(
                f"the bias counts {self.bias_weight:g} in one adapter and {other.bias_weight:g} in the other: "
                "use scaled_bias to make them equal first"
            )

    def only(self, document: str | Iterable[str] | None = None, chunk: int | Iterable[int] | None = None) -> Adapter:
        """The adapter with only the blocks of these documents and chunks; the bias stays.

        document, chunk: one or several. With both, a block must match both.
        TypeError for a name that is no text and a number that is not whole. ValueError for one that the adapter lacks.
        """
        chosen = self._chosen(document, chunk)
        return self._with(blocks=tuple(b for b, inside in zip(self.blocks, chosen, strict=True) if inside))

    def without(self, document: str | Iterable[str] | None = None, chunk: int | Iterable[int] | None = None) -> Adapter:
        """The adapter without the blocks of these documents and chunks, exactly as if they were never added.

        Arguments and errors as in `only`.
        """
        chosen = self._chosen(document, chunk)
        return self._with(blocks=tuple(b for b, inside in zip(self.blocks, chosen, strict=True) if not inside))

    def _chosen(self, document: str | Iterable[str] | None, chunk: int | Iterable[int] | None) -> list[bool]:
        """For each block whether it matches; the ValueError for an unknown choice lists the contents."""
        if document is None and chunk is None:
            raise ValueError(f"name a document or a chunk; {self._contents()}")
        documents = None if document is None else _as_set(document, str, "a document's name")
        chunks = None if chunk is None else _as_set(chunk, Integral, "a chunk's number")
        if unknown := (documents or set()) - self._names.chunks.keys():
            raise ValueError(f"no document {some_of(sorted(unknown), quoted=True)} in this adapter; {self._contents()}")
        inside = [documents is None or block.document in documents for block in self.blocks]
        if chunks is not None:
            present = {block.chunk for block, match in zip(self.blocks, inside, strict=True) if match}
            if unknown := sorted(chunks - present):
                raise ValueError(f"no chunk {some_of(unknown)} there; {self._contents()}")
            inside = [match and b.chunk in chunks for b, match in zip(self.blocks, inside, strict=True)]
        return inside

    def _contents(self) -> str:
        """The documents and their numbers of chunks in one line, for errors."""
        if not self.blocks:
            return "the adapter holds no documents"
        chunks = dict.fromkeys(islice(self._names.chunks, MOST_SHOWN), 0)
        for block in self.blocks:
            if block.document in chunks:
                chunks[block.document] += 1
        counts = [f"{shorten(name)!r} ({_plural(count, 'chunk')})" for name, count in chunks.items()]
        rest = len(self._names.chunks) - len(counts)
        return "it holds " + ", ".join([*counts, *([f"... and {rest:,} more"] if rest else [])])

    def scaled(self, weight: float, document: str | Iterable[str] | None = None) -> Adapter:
        """The adapter with the update of its blocks (or those of `document`) times `weight`; the bias stays.

        ValueError for a weight that is no finite number; for documents as in `only`.
        """
        weight = _finite(weight, "weight")
        chosen = [True] * len(self.blocks) if document is None else self._chosen(document, None)
        return self._with(
            blocks=tuple(
                block.weighted(weight) if inside else block for block, inside in zip(self.blocks, chosen, strict=True)
            )
        )

    def scaled_bias(self, weight: float) -> Adapter:
        """The adapter with its bias weight times `weight` (linear); 0 switches the bias off.

        ValueError for a weight that is no finite number, and without a bias block.
        """
        weight = _finite(weight, "weight")
        if self.bias is None:
            reason = "it was folded into the compressed block" if self.bias_inside else "its hypernetwork has none"
            raise ValueError(f"this adapter has no bias block to scale: {reason}")
        return replace(self, bias_weight=self.bias_weight * weight)

    # --- matrices ---------------------------------------------------------------------------------------------------

    @property
    def is_rows(self) -> bool:
        """Whether attention reads its rows (see `row_reading`): their paths name layers, "model.layers.1,3.mlp..."."""
        return any("{layer}" not in path for path in self.paths.values())

    def check_summed(self) -> None:
        """ValueError for rows that attention reads: they have no sum."""
        if self.is_rows:
            raise ValueError(
                "this adapter holds token rows, which attention reads and nothing adds up: analysis.weights, export, "
                "compression, merging and routing are for adapters that are summed. analysis.rows measures it, "
                "row_reading.answer_rows tells what was read, analysis.attribution which chunk or sentence an answer "
                "hangs on, d2l.report what it holds, and without() leaves a document out"
            )

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """(A [n_layers, R, d_in], B [n_layers, R, d_out]) of the whole sum, R = rank; the update of W is scale * B^T A.

        Rows follow the order of the blocks, the bias last. A contains the weights. The tensors are new: free to change.
        ValueError for a module that the adapter lacks, and for token rows, which have no sum.
        """
        A, B = self._factors(module)
        return _in_layers(A, self.layers, self._all_layers), _in_layers(B, self.layers, self._all_layers)

    def _factors(self, module: str) -> tuple[Tensor, Tensor]:
        """`factors` of the layers that are held alone."""
        self.check_summed()
        if module not in self.sizes:
            raise ValueError(f"no module {module!r} in this adapter; it has {', '.join(self.modules)}")
        parts = [(block.A[module], block.B[module], block.weight) for block in self.blocks]
        if self.bias is not None:
            parts.append((*self.bias[module], self.bias_weight))
        if not parts:
            return tuple(torch.zeros(len(self.layers), 0, size) for size in self.sizes[module])
        A = torch.cat([A if weight == 1 else A * weight for A, _, weight in parts], dim=1)
        return A, torch.cat([B for _, B, _ in parts], dim=1)

    def _applied_factors(self, module: str) -> tuple[Tensor, Tensor]:
        """(A [L, R, d_in], B [L, R, d_out]) with the same sum as `_factors`, of the layers that are held alone.

        An adapter of rank d_out or more is no smaller than its sum. It is added up, once: the update itself as A, of
        rank d_out, and the identity as B. Tensors that learn stay as they are.
        """
        d_in, d_out = self.sizes[module]
        if self.rank < d_out or any(tensor.requires_grad for tensor in self._tensors()):
            return self._factors(module)
        folded = self.__dict__.setdefault("_folded", {})
        if module not in folded:
            with self._for_every_pass(), torch.no_grad():
                A, B = self._factors(module)
                wide = torch.promote_types(A.dtype, torch.float32)
                update = (B.to(wide).mT @ A.to(wide)).to(A.dtype)
                identity = torch.eye(d_out, dtype=B.dtype, device=B.device)
            folded[module] = update, identity.expand(len(update), -1, -1)
        return folded[module]

    @contextmanager
    def _for_every_pass(self) -> Iterator[None]:
        """Inside the `with` block tensors are made that can be kept: for passes with gradients, in full precision."""
        device = next((one.device.type for one in self._tensors()), "cpu")
        with torch.inference_mode(False), torch.autocast(device, enabled=False):
            yield

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the fields, without what was formed from them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def ranks(self) -> frozenset[int]:
        """The ranks of its blocks; counted once."""
        return frozenset(block.rank for block in self.blocks)

    @cached_property
    def stacked(self) -> Factors:
        """{module: (A [L, K, r, d_in], B [L, K, r, d_out])} of the K blocks without their weights; not the bias.

        r is the largest rank; zero rows fill up the others. Built once and kept, so do not change the tensors.
        """
        self.check_summed()
        rank = max(self.ranks, default=0)

        def stack(side: str, module: str, size: int) -> Tensor:
            whole = [getattr(block, side)[module] for block in self.blocks]
            if self.layers != self._all_layers:
                whole = [_in_layers(one, self.layers, self._all_layers) for one in whole]
            if len(self.ranks) > 1:
                whole = [torch.nn.functional.pad(one, (0, 0, 0, rank - one.shape[1])) for one in whole]
            return torch.stack(whole, dim=1) if whole else torch.zeros(self.n_layers, 0, rank, size)

        with self._for_every_pass():
            return {m: (stack("A", m, d_in), stack("B", m, d_out)) for m, (d_in, d_out) in self.sizes.items()}

    def keys_of(self, layer: int) -> dict[str, Tensor]:
        """{module: A of one layer [K, r, d_in]} of the K blocks without their weights, as in `stacked`.

        Built once and kept, K * r * d_in numbers a module; views of `stacked` where that is there. Do not change them.
        """
        if "stacked" in self.__dict__:
            return {module: A[layer] for module, (A, _) in self.stacked.items()}
        self.check_summed()
        kept = self.__dict__.setdefault("_keys", {})
        if layer not in kept:
            with self._for_every_pass():
                kept[layer] = {module: self._keys_of(layer, module) for module in self.sizes}
        return kept[layer]

    def _keys_of(self, layer: int, module: str) -> Tensor:
        """[K, r, d_in]: A of one layer and module of the K blocks."""
        rank, d_in = max((block.rank for block in self.blocks), default=0), self.sizes[module][0]
        place = self.layers.index(layer) if layer in self.layers else None
        A = [block.A[module] for block in self.blocks]
        whole = [one.new_zeros(rank, d_in) if place is None else one[place] for one in A]
        if any(len(one) < rank for one in whole):
            whole = [torch.nn.functional.pad(one, (0, 0, 0, rank - len(one))) for one in whole]
        return torch.stack(whole) if whole else torch.zeros(0, rank, d_in)

    def compressed(self, rank: int) -> Adapter:
        """The best approximation of the summed update (bias included) of at most this rank, as one block.

        Per layer and module: B^T A = U S V^T, truncated (see `singular_vectors`); A' = sqrt(S) V^T, B' = sqrt(S) U^T.
        The result no longer tells documents apart.
        ValueError for a rank that is no positive whole number, an empty adapter, and token rows.
        """
        check_count(rank, "rank")
        if self.rank == 0:
            raise ValueError("this adapter is empty: there is nothing to compress")
        new_A, new_B = {}, {}
        for module in self.modules:
            A, B = self._factors(module)
            U, S, V = singular_vectors(A, B)
            root = S[:, :rank].sqrt().unsqueeze(-1)  # [L, rank, 1]
            new_A[module] = self._padded(root * V[:, :, :rank].mT, rank, A.dtype)
            new_B[module] = self._padded(root * U[:, :, :rank].mT, rank, B.dtype)
        name = "compressed: " + (some_of(self._names.chunks) or "bias")
        block = Block(name, 0, None, 1.0, new_A, new_B)
        inside = self.bias is not None or self.bias_inside
        return replace(self, blocks=(block,), bias=None, bias_weight=1.0, bias_inside=inside)

    def _padded(self, rows: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
        """[L, k, d] with zero rows up to min(rank, the adapter's rank), so that all modules have equal ranks."""
        missing = min(rank, self.rank) - rows.shape[1]
        return torch.nn.functional.pad(rows, (0, 0, 0, missing)).to(dtype).contiguous()

    def to(self, device=None, dtype: torch.dtype | None = None) -> Adapter:
        """The adapter on another device or in another floating-point dtype (else ValueError); blocks still share."""
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(
                f"dtype must be a floating-point one, not {dtype}: the adapter would be rounded to nothing"
            )
        return self._changed(lambda tensor: tensor.to(device=device, dtype=dtype))

    def in_layers(self, layers: Sequence[int]) -> Adapter:
        """The same update, held for these layers: with zeros where this adapter writes nothing.

        ValueError where one that it writes is not among them.
        """
        layers = tuple(layers)
        if missing := sorted(set(self.layers) - set(layers)):
            raise ValueError(f"this adapter writes layer {missing[0]}, which is not among layers {layers}")
        return self._changed(lambda tensor: _in_layers(tensor, self.layers, layers), layers=layers)

    def _changed(self, change: Callable[[Tensor], Tensor], **fields: object) -> Adapter:
        """This adapter with these fields and every tensor changed; blocks that share a tensor still do."""
        changed: dict[int, Tensor] = {}

        def of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | SharedRows:
            if isinstance(tensors, SharedRows):
                table = of({tensors.module: tensors.table})[tensors.module]
                return SharedRows(tensors.module, table, tensors.rows)
            for tensor in tensors.values():
                if id(tensor) not in changed:
                    changed[id(tensor)] = change(tensor)
            return {module: changed[id(tensor)] for module, tensor in tensors.items()}

        blocks = tuple(replace(block, A=of(block.A), B=of(block.B)) for block in self.blocks)
        bias = None
        if self.bias is not None:
            A, B = (of({module: pair[side] for module, pair in self.bias.items()}) for side in (0, 1))
            bias = {module: (A[module], B[module]) for module in self.bias}
        return replace(self, blocks=blocks, bias=bias, **fields)

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, notes: Mapping[str, str] | None = None) -> Path:
        """Write one safetensors file with the labels as JSON in its header, completely or not at all.

        notes: further texts for the header, by name.

        A file of this name is replaced. FileExistsError where it holds other tensors (a model's weights) or has the
        ending of another kind of file (.pdf, .txt).
        """
        from d2l_lib.formats.tensors import write_parts

        tensors: dict[str, Tensor | list[Tensor]] = {}
        names: dict[int, str] = {}
        together = sum(1 for _ in self._tensors()) > _OWN_TENSORS

        def place(name: str, tensor: Tensor) -> str:
            """Where a tensor is stored: its name, or "name:number" in a stack of those of its shape."""
            if not together or tensor.dim() != 3:
                tensors[name] = tensor
                return name
            _, _, stack = name.partition(".")
            stack = f"{stack}.{'x'.join(map(str, tensor.shape))}.{str(tensor.dtype).removeprefix('torch.')}"
            tensors.setdefault(stack, []).append(tensor)
            return f"{stack}:{len(tensors[stack]) - 1}"

        def keep(prefix: str, factors: Mapping[str, Tensor]) -> dict[str, Any]:
            """{module: where its tensor is stored}; a shared tensor is stored once."""
            if isinstance(factors, SharedRows):
                if id(factors.rows) not in names:
                    names[id(factors.rows)] = f"{prefix}.rows"
                    tensors[f"{prefix}.rows"] = factors.rows.float()  # whole numbers below 2^24
                return {factors.module: keep(prefix, {"table": factors.table}) | {"rows": names[id(factors.rows)]}}
            for module, tensor in factors.items():
                if id(tensor) not in names:
                    names[id(tensor)] = place(f"{prefix}.{module}", tensor)
            return {module: names[id(tensor)] for module, tensor in factors.items()}

        rows = []
        for index, block in enumerate(self.blocks):
            labels = {name: getattr(block, name) for name in ("document", "chunk", "span", "weight")}
            rows.append(labels | {"A": keep(f"block{index}.A", block.A), "B": keep(f"block{index}.B", block.B)})
        bias = None
        if self.bias is not None:
            pairs = {"A": {m: A for m, (A, _) in self.bias.items()}, "B": {m: B for m, (_, B) in self.bias.items()}}
            bias = {side: keep(f"bias.{side}", factors) for side, factors in pairs.items()}
        plain = {name: getattr(self, name) for name in _PLAIN_FIELDS}
        plain |= {} if self.layers == self._all_layers else {"layers": self.layers}  # files of before lack it
        is_new = together or any(isinstance(block.B, SharedRows) for block in self.blocks)
        version = _FORMAT_VERSIONS[is_new]
        header = {"format": FORMAT, "version": version, "blocks": rows, "bias": bias, **plain}
        with atomic_file(path, replaces=_may_replace) as temporary:
            text = json.dumps(header, ensure_ascii=False)
            write_parts(temporary, tensors, {**(notes or {}), FORMAT: text})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        """The adapter that `save` wrote, on the CPU, bit for bit. The file is mapped into memory, not copied.

        FileNotFoundError for a missing file or a folder. ValueError for a file that is cut off, corrupted or no
        adapter: wrong labels (see `formats.schemas.AdapterHeader`), or tensors that are missing, left over, of other
        shapes, or no finite floating numbers.
        """
        from d2l_lib.formats.schemas import AdapterHeader, check
        from d2l_lib.formats.tensors import read_tensors

        path = Path(path)
        if not path.is_file():
            hint = "it is a folder" if path.is_dir() else "no such file"
            raise FileNotFoundError(f"no adapter at {path} ({hint}): give the file that adapter.save wrote")
        tensors, metadata = read_tensors(path)
        if FORMAT not in metadata:
            raise ValueError(f"{path} holds tensors but no adapter: give a file that adapter.save wrote")
        where, advice = f"{path} has a damaged header", "save it again"
        header = parse_json(metadata[FORMAT], f"{where}: its text", advice)
        version = header.get("version") if isinstance(header, dict) else None
        if type(version) is int and version not in _FORMAT_VERSIONS:
            raise ValueError(f"{path} has format version {version}, this code reads {some_of(_FORMAT_VERSIONS)}")
        with _nothing_collected():
            header = check(AdapterHeader, header, where, advice)
            try:
                return cls._from_header(header, tensors)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: {ascii(str(error))[1:-1][:500]}: {advice}") from error

    @classmethod
    def _from_header(cls, header: AdapterHeader, tensors: dict[str, Tensor]) -> Adapter:
        """The adapter of these labels; ValueError where tensors are missing, left over or of other shapes."""
        sides = [*header.blocks, *([] if header.bias is None else [header.bias])]
        whole = [name for side in sides for names in (side.A, side.B) for name in names.values()]
        named = {name for one in whole for name in ([one] if isinstance(one, str) else [one.table, one.rows])}
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            stacked = tensor.dim() == 4
            found |= {f"{name}:{k}": one for k, one in enumerate(tensor.unbind())} if stacked else {name: tensor}
        if missing := sorted(named - found.keys()):
            raise ValueError(f"the tensors {missing[:3]} are missing")
        if others := sorted(found.keys() - named):
            raise ValueError(f"the tensors {others[:3]} belong to no block")
        rows_of = {name: _whole(found[name]) for name in {one.rows for one in whole if not isinstance(one, str)}}

        def pick(names: dict[str, Any]) -> dict[str, Tensor] | SharedRows:
            shared = [(module, one) for module, one in names.items() if not isinstance(one, str)]
            if not shared:
                return {module: found[name] for module, name in names.items()}
            if len(names) > 1:
                raise ValueError("a block whose rows lie in a table has one module")
            ((module, one),) = shared
            table, rows = found[one.table], rows_of[one.rows]
            if table.dim() != 2 or int(rows.max()) >= len(table):
                raise ValueError(f"{one.rows} names rows that {one.table} lacks")
            return SharedRows(module, table, rows)

        blocks = [
            Block(row.document, row.chunk, row.span, row.weight, pick(row.A), pick(row.B)) for row in header.blocks
        ]
        for index, row in enumerate(header.blocks):
            if row.A.keys() != header.sizes.keys() or row.B.keys() != header.sizes.keys():
                raise ValueError(f"blocks.{index} has other modules than sizes")
        bias = None
        if header.bias is not None:
            A, B = pick(header.bias.A), pick(header.bias.B)
            if A.keys() != header.sizes.keys() or B.keys() != header.sizes.keys():
                raise ValueError("the bias has other modules than sizes")
            bias = {module: (A[module], B[module]) for module in A}
        if not header.sizes:
            raise ValueError("sizes names no module")
        plain = {name: getattr(header, name) for name in _PLAIN_FIELDS}
        return cls(blocks=tuple(blocks), bias=bias, layers=tuple(header.layers), **plain)

    def export_peft(
        self,
        folder: str | Path,
        *,
        rank: int | None = None,
        dtype: torch.dtype | None = None,
        loader: str | None = None,
    ) -> Path:
        """Write a PEFT LoRA folder of the whole sum, bias included; see `peft.export_peft`.

        rank, dtype: make it smaller; `peft.export_errors(folder)` tells the loss.
        loader: "peft", "vllm" or "llama.cpp", which must be able to load it.
        Documents cannot be removed from the folder: change the adapter and export again. PEFT carries only the
        sum and reads no blocks sparsely: of many blocks, export the choice of `routing.route` or a smaller `rank`.
        """
        from d2l_lib.formats import peft

        return peft.export_peft(self, folder, rank=rank, dtype=dtype, loader=loader)

    @classmethod
    def from_peft(
        cls, folder: str | Path, base_model: nn.Module | DocToLoRA | None = None, *, name: str | None = None
    ) -> Adapter:
        """A PEFT LoRA folder as an adapter of one block.

        base_model: checks names and sizes and tells the number of layers; a DocToLoRA also tells the base model's key.
            None: the highest layer that the LoRA adapts counts as the last.
        name: of the block's document (None: the folder's name).

        B contains alpha / r (or alpha / sqrt(r)), rank_pattern and alpha_pattern, so the scale is 1. Rows that the
        LoRA lacks are zero, and layers that it lacks are not held. A folder by `export_peft` knows its base model; with
        the bias inside it cannot be added to others, like a compressed adapter.

        Reads safetensors files only. ValueError names what is no plain LoRA (other PEFT types, DoRA, biases,
        modules_to_save, ...) or lies outside the decoder layers: merge such an adapter into the base model with peft.
        ValueError also for an export for another base model.
        """
        from d2l_lib.formats import peft

        lora = peft.read_lora(folder, base_model)
        own_key = getattr(base_model, "base_key", "")
        if not same_base(lora.base_key, own_key):
            raise ValueError(
                f"{folder} was made for another base model, this one has other weights "
                "(float16 and float32 count as different): export it again with this one"
            )
        return cls(
            blocks=(Block(name or Path(folder).resolve().name, 0, None, 1.0, lora.A, lora.B),),
            bias=None,
            scale=1.0,
            base_model=lora.base_model,
            base_key=max(lora.base_key, own_key, key=len),
            hypernetwork_key=lora.hypernetwork_key,
            paths=lora.paths,
            bias_inside=lora.bias_inside,
            n_layers=lora.n_layers,
            sizes={module: (A.shape[2], lora.B[module].shape[2]) for module, A in lora.A.items()},
            layers=lora.layers,
        )

    def path_of(self, module: str) -> str:
        """Where the module sits in the base model, with {layer} for the layer's number; ValueError if nobody knows."""
        if module in self.paths:
            return self.paths[module]
        if module not in _USUAL_PARENTS:
            raise ValueError(f"where {module!r} sits in the base model is not known: set paths={{{module!r}: '...'}}")
        return f"model.layers.{{layer}}.{_USUAL_PARENTS[module]}.{module}"

    # --- display ----------------------------------------------------------------------------------------------------

    def _rows(self) -> tuple[list[tuple[str, str, str, str]], int]:
        """((document, chunks, rank, weight) of the first documents and of the bias, how many documents are left out).

        MOST_SHOWN + 1 documents are all shown: the last row takes the room of "... 1 more".
        """
        names = self._names.chunks
        shown = list(names if len(names) <= MOST_SHOWN + 1 else islice(names, MOST_SHOWN))
        blocks: dict[str, list[Block]] = {name: [] for name in shown}
        for block in self.blocks:
            if block.document in blocks:
                blocks[block.document].append(block)
        rows = []
        for name, of_document in blocks.items():
            least, most = (pick(block.weight for block in of_document) for pick in (min, max))
            weight = f"{least:g}" if least == most else f"{least:g} to {most:g}"
            rank = sum(block.rank for block in of_document)
            rows.append((shorten(name), str(len(of_document)), str(rank), weight))
        if self.bias is not None:
            rows.append(("(bias)", "", str(self._bias_rank), f"{self.bias_weight:g}"))
        return rows, len(names) - len(shown)

    def _summary(self) -> str:
        contents = f"{_plural(len(self._names.chunks), 'document')}, {_plural(len(self.blocks), 'chunk')}"
        held = "" if self.layers == self._all_layers else f"{len(self.layers)} of "
        place = f"{held}{_plural(self.n_layers, 'layer')} x {', '.join(self.modules)}"
        return f"{contents}; rank {self.rank}, {place}; scale {self.scale:g}; {_size(self.nbytes)}"

    def __repr__(self) -> str:
        rows, left_out = self._rows()
        lines = [f"Adapter({self._summary()})"]
        for name, chunks, rank, weight in rows:
            chunk_text = f"{_plural(int(chunks), 'chunk')}, " if chunks else ""
            lines.append(f"  {name}: {chunk_text}rank {rank}, weight {weight}")
        if left_out:
            lines.insert(1 + MOST_SHOWN, f"  ... {left_out} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows, left_out = self._rows()
        header = "".join(f"<th>{name}</th>" for name in ("document", "chunks", "rank", "weight"))
        cells = ["".join(f"<td>{markup.escape(cell)}</td>" for cell in row) for row in rows]
        if left_out:
            cells.insert(MOST_SHOWN, f'<td colspan="4">... {left_out} more</td>')
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        return (
            f'<div class="{markup.NO_FORMULAS}" style="overflow-wrap: anywhere">'
            f"<b>Adapter</b>: {markup.escape(self._summary())}"
            f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
        )


_PLAIN_FIELDS = (
    "scale",
    "bias_weight",
    "n_layers",
    "sizes",
    "base_model",
    "base_key",
    "hypernetwork_key",
    "paths",
    "bias_inside",
)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Inside the `with` block Python looks for no garbage: where many small things are made that is half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _whole(rows: Tensor) -> Tensor:
    """Numbers of rows [r] of a file as int32; ValueError where they are none."""
    if rows.dim() != 1 or bool((rows != rows.floor()).any()) or float(rows.min()) < 0 or float(rows.max()) >= 1 << 24:
        raise ValueError("numbers of rows are whole numbers from 0 on")
    return rows.to(torch.int32)


def _label(part: Block | str) -> str:
    return part if isinstance(part, str) else f"block {part!r}"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _shapes(sizes: Mapping[str, tuple[int, int]]) -> str:
    return ", ".join(f"{module} {d_in} -> {d_out}" for module, (d_in, d_out) in sorted(sizes.items()))


def _size(n_bytes: int) -> str:
    """A number of bytes in a readable unit (1 kB = 1000 bytes)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} bytes"


def _in_layers(rows: Tensor, layers: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Rows [layers, ...] as [wanted layers, ...], zero in layers that they lack; `rows` itself where all is there."""
    if layers == wanted:
        return rows
    picked = rows.new_zeros(len(wanted), *rows.shape[1:])
    for place, layer in enumerate(wanted):
        if layer in layers:
            picked[place] = rows[layers.index(layer)]
    return picked


def _in_same_layers(first: Adapter, second: Adapter) -> tuple[Adapter, Adapter]:
    """Both, held for the layers of both; as they are where the base models differ."""
    if first.layers == second.layers or first.n_layers != second.n_layers:
        return first, second
    both = sorted({*first.layers, *second.layers})
    return first.in_layers(both), second.in_layers(both)


def _made_alike(first: Adapter, second: Adapter) -> tuple[Adapter, Adapter]:
    """Both with one scale, bias and set of modules, at the same updates; ValueError for different base models."""
    host = second if first._is_foreign and not second._is_foreign else first
    shared = [module for module in first.modules if module in second.sizes]
    if first.n_layers != second.n_layers or any(first.sizes[module] != second.sizes[module] for module in shared):
        raise ValueError(
            "adapters for different base models cannot be added: "
            f"{first.n_layers} layers with {_shapes(first.sizes)}, "
            f"{second.n_layers} layers with {_shapes(second.sizes)}"
        )
    if not same_base(first.base_key, second.base_key):
        raise ValueError(
            "adapters for different base models cannot be added: "
            f"{first.base_model or 'unnamed'} and {second.base_model or 'unnamed'} have different weights"
        )
    if host.scale == 0:
        raise ValueError("the scale of an adapter is 0: nothing can be expressed in it")
    sizes, zeros = {**first.sizes, **second.sizes}, {}
    common = {name: getattr(host, name) for name in ("scale", "bias_weight", "hypernetwork_key", "bias_inside")}
    common |= {
        "sizes": sizes,
        "bias": host.bias and _widened(host.bias, sizes, zeros),
        "base_model": host.base_model or first.base_model or second.base_model,
        "base_key": max(first.base_key, second.base_key, key=len),
        "paths": {**first.paths, **second.paths, **host.paths},
    }

    def rewritten(one: Adapter) -> Adapter:
        blocks = []
        for block in one.blocks:
            pairs = _widened({m: (block.A[m], block.B[m]) for m in block.A}, sizes, zeros)
            A = {module: A for module, (A, _) in pairs.items()}
            B = {module: B for module, (_, B) in pairs.items()}
            if one.scale != host.scale:
                B = {module: factor * (one.scale / host.scale) for module, factor in B.items()}
            blocks.append(replace(block, A=A, B=B))
        return replace(one, blocks=tuple(blocks), **common)

    return rewritten(first), rewritten(second)


def _widened(
    factors: Factors, sizes: Mapping[str, tuple[int, int]], zeros: dict[tuple, tuple[Tensor, Tensor]]
) -> Factors:
    """The factors with zero rows in the modules that they lack; `zeros` keeps these for other blocks to share."""
    A, B = next(iter(factors.values()))
    for module in sizes.keys() - factors.keys():
        key = (module, A.shape[1], A.dtype, A.device)
        if key not in zeros:
            zeros[key] = tuple(
                side.new_zeros(*side.shape[:2], size) for side, size in zip((A, B), sizes[module], strict=True)
            )
        factors = {**factors, module: zeros[key]}
    return factors


def singular_vectors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U [L, d_out, k], S [L, k], V [L, d_in, k]) of B^T A = U S V^T, float64, k = min(R, d_in, d_out).

    A [L, R, d_in], B [L, R, d_out]. A^T = Q_A R_A and B^T = Q_B R_B; then R_B R_A^T = U' S V'^T is small, and
    U = Q_B U', V = Q_A V'. The product [d_out, d_in] is never formed.
    """
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    Q_B, R_B = torch.linalg.qr(B.double().mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ U, S, Q_A @ Vh.mT


def same_base(first: str, second: str) -> bool:
    """Whether two fingerprints (`base_key`) can be of one base model: the halves that both have are equal."""
    return all(a == b for a, b in zip(first.split("-"), second.split("-"), strict=False) if a and b)


def stack_factors(adapters: Sequence[Adapter | None]) -> tuple[Factors, float, tuple[int, ...] | None]:
    """Several adapters side by side, for `lora.apply_lora`: (loras, scale, the L layers that any of them writes).

    loras: {module: (A [contexts, L, R, d_in], B [contexts, L, R, d_out])}. Layers are None where they are all.
    R is the largest rank, and at most d_out where nothing learns (see `Adapter._applied_factors`); zero rows fill up
    the others. None (the plain base model) is zero rows only, and so are a module and a layer that an adapter does not
    write. The precision is the highest among them. Where scales differ, A contains them and the common scale is 1.
    ValueError where all are None.
    """
    present = [adapter for adapter in adapters if adapter is not None]
    if not present:
        raise ValueError("no adapter to apply: all are None")
    first = present[0]
    one_scale = all(adapter.scale == first.scale for adapter in present)
    tensors = [tensor for adapter in present for tensor in adapter._tensors()] or [torch.zeros(0)]
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in tensors})
    sizes = {module: size for adapter in present for module, size in adapter.sizes.items()}
    layers = tuple(sorted({layer for adapter in present for layer in adapter.layers}))
    stacked = {}
    for module in sorted(sizes):
        if len(adapters) == 1:  # spares a copy
            A, B = first._applied_factors(module)
            stacked[module] = (A.unsqueeze(0), B.unsqueeze(0))
            continue
        parts = [None if one is None or module not in one.sizes else one._applied_factors(module) for one in adapters]
        rank = max(own[0].shape[1] for own in parts if own is not None)
        shapes = ((len(adapters), len(layers), rank, size) for size in sizes[module])
        A, B = (torch.zeros(shape, dtype=dtype, device=tensors[0].device) for shape in shapes)
        for context, (adapter, own) in enumerate(zip(adapters, parts, strict=True)):
            if own is not None:
                rows_A, rows_B = (_in_layers(rows, adapter.layers, layers) for rows in own)
                A[context, :, : rows_A.shape[1]] = rows_A if one_scale else rows_A * adapter.scale
                B[context, :, : rows_B.shape[1]] = rows_B
        stacked[module] = (A, B)
    return stacked, first.scale if one_scale else 1.0, None if len(layers) == first.n_layers else layers


_Decomposition = tuple[Tensor, Tensor, Tensor]


def decompose(adapter: Adapter, module: str) -> _Decomposition:
    """(U [L, d_out, k], S [L, k], V [L, d_in, k]) of each layer's update, with the scale; see `singular_vectors`.

    ValueError for an adapter of rank 0 and for numbers that are not finite.
    """
    if adapter.rank == 0:
        raise ValueError("this adapter is empty: it has no singular values")
    A, B = adapter.factors(module)
    if not (A.isfinite().all() and B.isfinite().all()):
        raise ValueError(f"{module} of this adapter holds NaN or infinity: it was written by a damaged model")
    U, S, V = singular_vectors(A, B)
    return U, abs(adapter.scale) * S, V * math.copysign(1, adapter.scale)


def singular_part(adapter: Adapter, start: int = 0, stop: int | None = None) -> Adapter:
    """The singular directions `start` to `stop` (0 = largest, stop excluded) of each layer as one block, bias inside.

    `singular_part(a, 0, r)` is `a.compressed(r)` and `singular_part(a, r)` the rest: their sum is `a`.
    ValueError where no direction is left.
    """
    A, B, held = {}, {}, list(adapter.layers)
    for module in adapter.modules:
        U, S, V = (side[held] for side in decompose(adapter, module))
        chosen = slice(start, stop)
        if start < 0 or not S[:, chosen].shape[1]:
            raise ValueError(f"no directions {start} to {stop}: this adapter has {S.shape[1]} in {module}")
        root = (S[:, chosen] / abs(adapter.scale) if adapter.scale else S[:, chosen]).sqrt().unsqueeze(-1)
        dtype = adapter.factors(module)[0].dtype
        sign = math.copysign(1, adapter.scale)
        A[module] = (sign * root * V[:, :, chosen].mT).to(dtype)
        B[module] = (root * U[:, :, chosen].mT).to(dtype)
    ranks = {module: rows.shape[1] for module, rows in A.items()}
    for module, rank in ranks.items():  # zero rows fill up modules of fewer directions
        missing = (0, 0, 0, max(ranks.values()) - rank)
        A[module], B[module] = (nn.functional.pad(rows[module], missing) for rows in (A, B))
    name = f"directions {start} to {'the last' if stop is None else stop}"
    inside = adapter.bias is not None or adapter.bias_inside
    block = Block(name, 0, None, 1.0, A, B)
    return replace(adapter, blocks=(block,), bias=None, bias_weight=1.0, bias_inside=inside)


def only_layers(adapter: Adapter, layers: Sequence[int]) -> Adapter:
    """The adapter with its update, bias included, in these layers only (0 = first); ValueError for an unknown layer."""
    if unknown := sorted(set(layers) - set(range(adapter.n_layers))):
        raise ValueError(f"no layer {unknown} in this adapter: it has 0 to {adapter.n_layers - 1}")
    inside = torch.tensor([float(layer in set(layers)) for layer in adapter.layers]).view(-1, 1, 1)
    blocks = [replace(block, B={m: B * inside.to(B) for m, B in block.B.items()}) for block in adapter.blocks]
    bias = adapter.bias and {module: (A, B * inside.to(B)) for module, (A, B) in adapter.bias.items()}
    return replace(adapter, blocks=tuple(blocks), bias=bias)


def scaled_layers(adapter: Adapter, weights: Sequence[float] | Mapping[int, float]) -> Adapter:
    """The adapter with its blocks times weights[layer] in each layer; the bias stays.

    The update of W in layer l becomes scale * (weights[l] * sum over blocks of weight * B_l^T A_l + bias).
    weights: one per layer, or {layer: weight} with 1 for the others. Equal weights are `adapter.scaled(weight)`.
    ValueError for an unknown layer, a wrong number of weights, and a weight that is not finite.
    """
    if isinstance(weights, Mapping):
        if unknown := sorted(layer for layer in weights if layer not in range(adapter.n_layers)):
            raise ValueError(f"no layer {unknown[0]} in this adapter: its layers are 0 to {adapter.n_layers - 1}")
        weights = [weights.get(layer, 1.0) for layer in range(adapter.n_layers)]
    weights = [float(weight) for weight in weights]
    if len(weights) != adapter.n_layers:
        raise ValueError(f"{len(weights)} weights for {adapter.n_layers} layers: give one per layer")
    if wrong := [weight for weight in weights if not math.isfinite(weight)]:
        raise ValueError(f"a layer's weight must be a finite number, not {wrong[0]}")

    held = [weights[layer] for layer in adapter.layers]

    def scale(A):
        return A * A.new_tensor(held).view(-1, 1, 1)  # [layers, r, d_in]

    blocks = (replace(block, A={module: scale(A) for module, A in block.A.items()}) for block in adapter.blocks)
    return replace(adapter, blocks=tuple(blocks))
