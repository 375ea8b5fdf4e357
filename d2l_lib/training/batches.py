"""A training batch: what one step reads, as named values; and how documents are cut and padded for it.

`contexts` draws batches, `step` and `warm_up` learn from them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from d2l_lib.engine import pad_rows
from d2l_lib.presets import TrainingPreset

IGNORED = -100  # label of a token that is not part of an answer


# ------------------------------------------------------------------------------------------------------------- batches
class _OnDevice:
    """A value whose tensors go to a device together, also those in its lists and dicts."""

    def to(self, device, **options):
        """The same on `device`; options are those of `Tensor.to`."""
        moved = {field.name: _moved(getattr(self, field.name), device, options) for field in fields(self)}
        return replace(self, **moved)


def _moved(value, device, options: dict):
    if isinstance(value, list):
        return [_moved(one, device, options) for one in value]
    if isinstance(value, dict):
        return {name: _moved(one, device, options) for name, one in value.items()}
    return value.to(device, **options) if isinstance(value, Tensor | _OnDevice) else value


@dataclass(frozen=True)
class Chunks(_OnDevice):
    """The chunks of all contexts of a batch, in groups of similar length.

    ids, mask: of each group, [chunks, tokens], padded on the right.
    order: [chunks], the place of each chunk, context by context, in the concatenated groups.
    counts: [contexts], chunks of each.
    images: of each group, the encoder's other inputs: {} or the pixels of its images (`encoder.image_inputs` without
        input_ids and attention_mask). None: nothing.
    """

    ids: list[Tensor]
    mask: list[Tensor]
    order: Tensor
    counts: Tensor
    images: list[dict[str, Tensor]] | None = None

    @classmethod
    def of(cls, chunks: Sequence[Sequence[int]], counts: Sequence[int], pad_id: int) -> Chunks:
        """chunks: token ids of the chunks of all contexts, in order; counts: chunks per context."""
        groups, order = group_by_length(chunks)
        padded = [pad_rows(group, pad_id) for group in groups]
        ids, mask = ([pair[i] for pair in padded] for i in (0, 1))
        return cls(ids, mask, torch.tensor(order), torch.tensor(counts))

    def groups(self) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """(ids, mask, images) of each group."""
        return zip(self.ids, self.mask, self.images or [{}] * len(self.ids), strict=True)

    def rows(self) -> list[list[int]]:
        """The token ids of each chunk, without padding, context by context."""
        rows = [
            row[real.bool()].tolist()
            for ids, mask in zip(self.ids, self.mask, strict=True)
            for row, real in zip(ids, mask, strict=True)
        ]
        return [rows[place] for place in self.order]


@dataclass(frozen=True, kw_only=True)
class Batch(_OnDevice):
    """Contexts in chunks, with questions and answers about each.

    input_ids, labels: [questions, length], context by context; labels are IGNORED outside answers.
    n_questions: [contexts].
    repeats: [chunks], how often a chunk's block counts (None: once).
    l1_share: share of the L1 term's weight.
    teacher_log_probs, teacher_indices: [answer tokens, k], the teacher's largest log-probabilities and their tokens.
    """

    chunks: Chunks
    input_ids: Tensor
    labels: Tensor
    n_questions: Tensor
    repeats: Tensor | None = None
    l1_share: Tensor | float = 1.0
    teacher_log_probs: Tensor | None = None
    teacher_indices: Tensor | None = None

    @property
    def n_contexts(self) -> int:
        """The number of contexts."""
        return len(self.n_questions)


@dataclass(frozen=True, kw_only=True)
class SentenceBatch(_OnDevice):
    """Sentences, each a chunk, with one question and its answer about each.

    answer_ids: [sentences, tokens], the answer and its stop token, then IGNORED.
    question_ids: [sentences, tokens] without chat wrapping, then IGNORED.
    input_ids: [sentences, length], chat-formatted question and answer.
    starts: [sentences], the answer's first position in input_ids.
    """

    chunks: Chunks
    answer_ids: Tensor
    question_ids: Tensor
    input_ids: Tensor
    starts: Tensor


def exceeds(p: TrainingPreset, chunks: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]) -> bool:
    """Whether chunks, or questions with their answers, have more tokens than a batch may have."""
    limits = ((p.context_tokens, chunks), (p.input_tokens, rows))
    return any(limit is not None and sum(map(len, ids)) > limit for limit, ids in limits)


def group_by_length(
    chunks: Sequence[Sequence[int]], most_padding: float = 0.4
) -> tuple[list[list[Sequence[int]]], list[int]]:
    """(groups of chunks whose lengths differ by at most the share `most_padding`, the order of the chunks).

    The concatenated groups taken at `order` are the original chunks.
    """
    by_length = sorted(range(len(chunks)), key=lambda c: -len(chunks[c]))
    groups: list[list[Sequence[int]]] = []
    for c in by_length:
        if not groups or len(chunks[c]) < (1 - most_padding) * len(groups[-1][0]):
            groups.append([])
        groups[-1].append(chunks[c])
    order = [0] * len(chunks)
    for place, c in enumerate(by_length):
        order[c] = place
    return groups, order


# ------------------------------------------------------------------------------------------------------------- cutting
def count_chunks(
    length: int,
    max_length: int,
    *,
    min_length: int = 0,
    probabilities: dict[int, float] | None = None,
    rng: random.Random | None = None,
) -> int:
    """The number of chunks for a document of `length` tokens.

    Without `probabilities`: the fewest that keep chunks within `max_length`. With them (training): a draw among those
    from ceil(length / max_length) to ceil(length / min_length). If there are none, the allowed number nearest to a key
    of `probabilities`. Chunks are never longer than `max_length`. max_length < 1 means one chunk, min_length < 1 no
    shortest chunk.
    """
    fewest = math.ceil(length / max_length) if max_length > 0 else 1
    fewest = max(1, fewest)
    if probabilities is None or max_length < 1:
        return fewest
    most = max(fewest, math.ceil(length / min_length) if min_length > 0 else length)
    allowed = [n for n in probabilities if fewest <= n <= most]
    if not allowed:
        nearest = min(probabilities, key=lambda n: (max(fewest - n, n - most), n))
        return min(max(nearest, fewest), most)
    return (rng or random).choices(allowed, weights=[probabilities[n] for n in allowed])[0]


def split_into_chunks(
    ctx_ids: Sequence[int], n_chunks: int, prefix: Sequence[int], suffix: Sequence[int]
) -> list[list[int]]:
    """A chat-formatted document as pieces of ceil(length / n_chunks) tokens, each chat-formatted again.

    The document has its own outer wrapping: the first piece gets the suffix, the last the prefix, all others both. The
    wrapping comes on top of a piece's length. Rounding may leave fewer than `n_chunks` pieces.
    """
    if n_chunks < 1:
        raise ValueError(f"n_chunks is {n_chunks}; a document has at least one chunk")
    size = max(1, math.ceil(len(ctx_ids) / n_chunks))
    pieces = [list(ctx_ids[start : start + size]) for start in range(0, len(ctx_ids), size)] or [[]]
    last = len(pieces) - 1
    return [
        (list(prefix) if i > 0 else []) + piece + (list(suffix) if i < last else []) for i, piece in enumerate(pieces)
    ]


def dataset_probabilities(sizes: Sequence[int], floor: float = 0.01) -> list[float]:
    """The share of each data set in a mixture: by size, at least `floor`, for which the largest ones make room."""
    if not sizes or min(sizes) < 0 or sum(sizes) == 0:
        raise ValueError(f"data set sizes {list(sizes)}: at least one must be positive and none negative")
    floor = min(floor, 1 / len(sizes))
    shares = [max(size / sum(sizes), floor) for size in sizes]
    excess = sum(shares) - 1
    while excess > 1e-12:
        largest = max(range(len(shares)), key=shares.__getitem__)
        given = min(excess, shares[largest] - floor)
        shares[largest] -= given
        excess -= given
    return shares
