"""Token lists into training batches: labels, chunks with their chat wrapping, and packing without padding.

A sample is a document with its questions: `ctx_ids` [chunks][tokens], `input_ids` and `labels` [questions][tokens],
and, with a teacher, `logprobs_vals` and `logprobs_indices` [questions][answer tokens][k].
"""

import logging
import math
import random
from collections.abc import Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from d2l_lib.formats.shards import TEACHER_COLUMNS

logger = logging.getLogger(__name__)

IGNORED = -100  # label of a token that is not part of an answer


def labels_from_input_ids(
    input_ids: Sequence[Sequence[int]], response_start_end: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Per question the token ids inside [start, end), -100 elsewhere; as long as the question's ids."""
    labels = []
    for ids, (start, end) in zip(input_ids, response_start_end, strict=True):
        if not 0 <= start <= end <= len(ids):
            raise ValueError(f"response span [{start}, {end}) lies outside a question of {len(ids)} tokens")
        labels.append([token if start <= i < end else IGNORED for i, token in enumerate(ids)])
    return labels


# ---------------------------------------------------------------------------------------------------- chunking


def count_chunks(
    length: int,
    max_length: int,
    *,
    min_length: int = 0,
    probabilities: dict[int, float] | None = None,
    rng: random.Random | None = None,
) -> int:
    """Into how many chunks a document of `length` tokens is cut.

    Without `probabilities` the fewest that keep pieces within `max_length`. With them (training) one is drawn from
    those between ceil(length / max_length) and ceil(length / min_length); where none lies there, the allowed number
    nearest to the given ones is taken, so a document is never cut into longer pieces than allowed. max_length < 1
    means one chunk, min_length < 1 no shortest chunk.
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

    The document carries its own outer wrapping, so the first piece gets the suffix, the last the prefix and those
    between both. Rounding may leave fewer than `n_chunks` pieces, and the wrapping comes on top of a piece's length.
    """
    if n_chunks < 1:
        raise ValueError(f"n_chunks is {n_chunks}; a document has at least one chunk")
    size = max(1, math.ceil(len(ctx_ids) / n_chunks))
    pieces = [list(ctx_ids[start : start + size]) for start in range(0, len(ctx_ids), size)] or [[]]
    last = len(pieces) - 1
    return [
        (list(prefix) if i > 0 else []) + piece + (list(suffix) if i < last else []) for i, piece in enumerate(pieces)
    ]


# ---------------------------------------------------------------------------------------------------- packing


def pack_by_length(
    lengths: Sequence[Sequence[int]],
    ctx_lengths: Sequence[Sequence[int]],
    max_length: int,
    max_ctx_length: int,
    max_samples: int = 0,
) -> list[tuple[int, int]]:
    """Consecutive samples as (start, end) groups, each as large as both limits allow; order is kept.

    `lengths[i]` are the lengths of sample i's questions, `ctx_lengths[i]` of its chunks. A sample that exceeds a limit
    on its own belongs to no group. `max_samples` limits a group's samples (< 1: no limit). Linear time.
    """
    if len(lengths) != len(ctx_lengths):
        raise ValueError(f"{len(lengths)} samples have lengths, {len(ctx_lengths)} have context lengths")
    groups: list[tuple[int, int]] = []
    start, tokens, ctx_tokens = 0, 0, 0
    for i, (questions, chunks) in enumerate(zip(lengths, ctx_lengths, strict=True)):
        own, own_ctx = sum(questions), sum(chunks)
        too_long = own > max_length or own_ctx > max_ctx_length
        full = tokens + own > max_length or ctx_tokens + own_ctx > max_ctx_length or i - start == max_samples > 0
        if too_long or full:
            if i > start:
                groups.append((start, i))
            start, tokens, ctx_tokens = i, 0, 0
        if too_long:
            start = i + 1
        else:
            tokens, ctx_tokens = tokens + own, ctx_tokens + own_ctx
    if len(lengths) > start:
        groups.append((start, len(lengths)))
    return groups


def split_questions(batch: dict[str, list], max_length: int = 0, max_questions: int = 0) -> dict[str, list]:
    """Samples with too many questions as several samples of the same document; limits < 1 are no limit.

    Every group of consecutive questions keeps within `max_length` tokens and `max_questions`. A question that is too
    long on its own is dropped, and a document whose questions are all too long with it.
    """
    if max_length < 1 and max_questions < 1:
        return dict(batch)
    per_question = [name for name in ("input_ids", "labels", *TEACHER_COLUMNS) if name in batch]
    split: dict[str, list] = {name: [] for name in ("ctx_ids", *per_question)}
    limit = max_length if max_length > 0 else math.inf
    for i, questions in enumerate(batch["input_ids"]):
        lengths = [[len(ids)] for ids in questions]
        for start, end in pack_by_length(lengths, [[0]] * len(lengths), limit, math.inf, max_questions):
            split["ctx_ids"].append(batch["ctx_ids"][i])
            for name in per_question:
                split[name].append(batch[name][i][start:end])
    return split


def pack_batch(
    batch: dict[str, list], max_length: int, max_ctx_length: int, max_samples: int = 0
) -> dict[str, list[list]]:
    """Samples packed into rows: every column becomes one flat list per pack, with position ids that restart at 0.

    Adds `position_ids` (a start per question), `ctx_position_ids` (a start per chunk), `n_queries` and
    `n_ctx_chunks` (per sample of the pack). Samples over a limit are left out with a warning; where nothing fits every
    column is empty. ValueError where samples are not nested as this module's first lines say.
    """
    for sample in batch["input_ids"]:
        if any(not isinstance(question, Sequence | torch.Tensor) for question in sample):
            raise ValueError("input_ids must be nested [samples][questions][tokens]: wrap a single question in a list")
    lengths = [[len(ids) for ids in sample] for sample in batch["input_ids"]]
    ctx_lengths = [[len(ids) for ids in sample] for sample in batch["ctx_ids"]]
    groups = pack_by_length(lengths, ctx_lengths, max_length, max_ctx_length, max_samples)
    dropped = len(lengths) - sum(end - start for start, end in groups)
    if dropped:
        logger.warning(
            "%d of %d samples exceed %d tokens (or %d in context) on their own and were left out of the packs",
            dropped,
            len(lengths),
            max_length,
            max_ctx_length,
        )
    token_columns = [name for name in ("input_ids", "labels", "ctx_ids", *TEACHER_COLUMNS) if name in batch]
    names = [*token_columns, "position_ids", "ctx_position_ids", "n_queries", "n_ctx_chunks"]
    packed: dict[str, list[list]] = {name: [] for name in names}
    for start, end in groups:
        for name in token_columns:
            parts = chain.from_iterable(batch[name][start:end])
            packed[name].append(list(chain.from_iterable(parts)))
        packed["position_ids"].append(_positions(lengths[start:end]))
        packed["ctx_position_ids"].append(_positions(ctx_lengths[start:end]))
        packed["n_queries"].append([len(sample) for sample in lengths[start:end]])
        packed["n_ctx_chunks"].append([len(sample) for sample in ctx_lengths[start:end]])
    return packed


def collate(packs: Sequence[dict[str, list]]) -> dict[str, Tensor]:
    """Packs (one dict of flat lists each) as one batch: token columns [1, total], counts [contexts].

    Teacher columns become [1, answer tokens, k]. Position ids keep the packs apart.
    """
    if not packs:
        raise ValueError("no packs to collate")
    batch = {}
    for name in packs[0]:
        values = list(chain.from_iterable(pack[name] for pack in packs))
        dtype = torch.float32 if name == "logprobs_vals" else torch.long
        tensor = torch.tensor(values, dtype=dtype)
        batch[name] = tensor if name in ("n_queries", "n_ctx_chunks") else tensor.unsqueeze(0)
    return batch


def tokens_per_context(position_ids: Tensor, n_queries: Tensor) -> list[int]:
    """Packed question tokens of each context: what `apply_lora` takes as `lengths`."""
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    counts = torch.as_tensor(n_queries).tolist()
    if sum(counts) != len(starts):
        raise ValueError(f"n_queries adds up to {sum(counts)}, the batch holds {len(starts)} questions")
    edges = [*starts, position_ids.shape[1]]
    return [edges[end] - edges[end - count] for end, count in zip(accumulate(counts), counts, strict=True)]


def _positions(lengths: Sequence[Sequence[int]]) -> list[int]:
    return [i for sample in lengths for length in sample for i in range(length)]


# ---------------------------------------------------------------------------------------------------- statistics


def dataset_probabilities(sizes: Sequence[int], floor: float = 0.01) -> list[float]:
    """Share of each data set in a mixture: proportional to size, at least `floor`; the largest makes room for it."""
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
