"""Documents into chunks: invariants over random inputs."""

import random

import pytest

from d2l_lib.tasks import qa
from d2l_lib.training import batches


@pytest.mark.parametrize("length", [0, 1, 2, 9, 100, 301])
@pytest.mark.parametrize("n_chunks", [1, 2, 3, 7])
def test_chunks_cover_the_document_in_order(length, n_chunks):
    ids, prefix, suffix = list(range(length)), [-1, -2], [-3]
    chunks = batches.split_into_chunks(ids, n_chunks, prefix, suffix)
    assert 1 <= len(chunks) <= n_chunks
    assert [token for chunk in chunks for token in chunk if token >= 0] == ids
    for i, chunk in enumerate(chunks):
        assert (chunk[:2] == prefix) == (i > 0)
        assert (chunk[-1:] == suffix) == (i < len(chunks) - 1)


def test_count_chunks_follows_the_given_shares():
    shares, rng = {1: 0.5, 2: 0.25, 4: 0.25}, random.Random(0)
    counts = [batches.count_chunks(400, 512, min_length=25, probabilities=shares, rng=rng) for _ in range(4000)]
    for n, share in shares.items():
        assert counts.count(n) / 4000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    ("length", "most", "least", "shares", "expected"),
    [
        (1000, 0, 0, None, 1),  # no limit
        (1000, 100, 0, None, 10),
        (1001, 100, 0, None, 11),
        (20, 512, 25, {2: 1.0}, 1),  # too short for two chunks of 25
        (5000, 512, 25, {1: 0.5, 8: 0.5}, 10),  # too long for eight chunks of 512
        (0, 512, 25, {1: 1.0}, 1),
    ],
)
def test_count_chunks_at_the_edges(length, most, least, shares, expected):
    assert batches.count_chunks(length, most, min_length=least, probabilities=shares) == expected


def test_split_needs_a_chunk():
    with pytest.raises(ValueError, match="at least one chunk"):
        batches.split_into_chunks([1, 2], 0, [], [])


@pytest.mark.parametrize("length", range(0, 60, 7))
@pytest.mark.parametrize(("window", "new"), [(20, 0), (20, 4), (21, 4), (20, 18)])
def test_truncated_prompt_leaves_room(length, window, new):
    ids = list(range(length))
    kept = qa.truncate_middle(ids, window, new)
    assert len(kept) + new <= window
    assert kept == ids or (kept[0], kept[-1]) == (0, length - 1)
    assert len(kept) >= min(length, window - new - 1)


def test_every_length_has_one_bin():
    for length in [*range(600), 1023, 1024, 8191, 16383, 32767, 32768, 10**6]:
        assert sum(first <= length <= last for first, last in qa.LENGTH_BINS) == 1
        first, last = qa.length_bin(length)
        assert first <= length <= last
    with pytest.raises(ValueError):
        qa.length_bin(-1)


@pytest.mark.parametrize("sizes", [[1], [3, 1], [1, 1, 10**6], [1] * 300, [0, 5], [1] * 50 + [60, 60]])
def test_dataset_probabilities(sizes):
    shares = batches.dataset_probabilities(sizes)
    assert sum(shares) == pytest.approx(1)
    assert min(shares) >= min(0.01, 1 / len(sizes)) - 1e-12
    with pytest.raises(ValueError):
        batches.dataset_probabilities([0, 0])
