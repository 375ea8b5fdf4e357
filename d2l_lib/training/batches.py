"""Documents into chunks for training, and the shares of data sets in a mixture."""

import math
import random
from collections.abc import Sequence

IGNORED = -100  # label of a token that is not part of an answer


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
