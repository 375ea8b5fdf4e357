"""Packing, chunking and labels: invariants over random inputs, and linear time."""

import logging
import random
import time

import pytest
import torch

from d2l_lib.hypernetwork import chunk_lengths
from d2l_lib.tasks import qa
from d2l_lib.training import batches


def random_batch(rng, n, teacher=False):
    """n samples with 1-3 questions and 1-3 chunks of 1-9 tokens."""
    batch = {"input_ids": [], "labels": [], "ctx_ids": []}
    for _ in range(n):
        questions = [[rng.randrange(100) for _ in range(rng.randint(2, 9))] for _ in range(rng.randint(1, 3))]
        batch["input_ids"].append(questions)
        batch["labels"].append([[-100] + ids[1:] for ids in questions])
        batch["ctx_ids"].append([[rng.randrange(100)] * rng.randint(1, 9) for _ in range(rng.randint(1, 3))])
    if teacher:
        batch["logprobs_vals"] = [[[[-0.5, -1.5]] * (len(q) - 1) for q in s] for s in batch["input_ids"]]
        batch["logprobs_indices"] = [[[[1, 2]] * (len(q) - 1) for q in s] for s in batch["input_ids"]]
    return batch


@pytest.mark.parametrize("seed", range(20))
def test_packs_keep_order_and_limits_and_are_greedy(seed):
    rng = random.Random(seed)
    lengths = [[rng.randint(0, 12) for _ in range(rng.randint(1, 3))] for _ in range(60)]
    ctx_lengths = [[rng.randint(0, 15) for _ in range(rng.randint(1, 3))] for _ in range(60)]
    limit, ctx_limit, most = 30, 40, rng.choice([0, 3])
    groups = batches.pack_by_length(lengths, ctx_lengths, limit, ctx_limit, most)
    fits = [sum(a) <= limit and sum(b) <= ctx_limit for a, b in zip(lengths, ctx_lengths, strict=True)]
    assert [i for start, end in groups for i in range(start, end)] == [i for i, fit in enumerate(fits) if fit]
    for start, end in groups:
        assert sum(map(sum, lengths[start:end])) <= limit and sum(map(sum, ctx_lengths[start:end])) <= ctx_limit
        assert not most or end - start <= most
        if end < len(fits) and fits[end]:  # the next one did not fit
            full = sum(map(sum, lengths[start : end + 1])) > limit
            assert full or sum(map(sum, ctx_lengths[start : end + 1])) > ctx_limit or end - start == most


def test_packing_takes_linear_time():
    def seconds(n):
        lengths = [[5]] * n
        start = time.process_time()
        assert len(batches.pack_by_length(lengths, lengths, 10**9, 10**9)) == 1
        return time.process_time() - start

    seconds(1_000)
    assert seconds(200_000) < 2.0  # a quadratic scan needs minutes


@pytest.mark.parametrize("teacher", [False, True])
def test_packed_batch_holds_every_sample_once(teacher):
    batch = random_batch(random.Random(0), 12, teacher)
    packed = batches.pack_batch(batch, 40, 40)
    flat = [token for row in packed["input_ids"] for token in row]
    assert flat == [token for sample in batch["input_ids"] for question in sample for token in question]
    assert sum(packed["n_queries"], []) == [len(sample) for sample in batch["input_ids"]]
    assert sum(packed["n_ctx_chunks"], []) == [len(sample) for sample in batch["ctx_ids"]]
    for i in range(len(packed["input_ids"])):
        row = batches.collate([{name: values[i] for name, values in packed.items()}])
        assert row["input_ids"].shape == row["labels"].shape == row["position_ids"].shape
        assert len(chunk_lengths(row["position_ids"])) == row["n_queries"].sum()
        assert len(chunk_lengths(row["ctx_position_ids"])) == row["n_ctx_chunks"].sum()
        assert sum(batches.tokens_per_context(row["position_ids"], row["n_queries"])) == row["input_ids"].numel()
        if teacher:
            assert row["logprobs_vals"].shape == (1, int((row["labels"] != -100).sum()), 2)


def test_tokens_per_context():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1]])
    assert batches.tokens_per_context(positions, torch.tensor([2, 1, 1])) == [5, 1, 2]
    with pytest.raises(ValueError, match="adds up to 3"):
        batches.tokens_per_context(positions, torch.tensor([2, 1]))


def test_collate_joins_packs():
    packed = batches.pack_batch(random_batch(random.Random(1), 6), 25, 40)
    packs = [{name: values[i] for name, values in packed.items()} for i in range(len(packed["input_ids"]))]
    assert len(packs) > 1
    row = batches.collate(packs)
    assert row["input_ids"].tolist()[0] == sum(packed["input_ids"], [])
    assert row["n_queries"].tolist() == sum(packed["n_queries"], [])
    with pytest.raises(ValueError, match="no packs"):
        batches.collate([])


def test_samples_that_are_too_long_are_reported(caplog):
    batch = {"input_ids": [[[1] * 50], [[2]]], "labels": [[[1] * 50], [[2]]], "ctx_ids": [[[3]], [[4]]]}
    with caplog.at_level(logging.WARNING):
        packed = batches.pack_batch(batch, 10, 10)
    assert packed["input_ids"] == [[2]] and packed["ctx_ids"] == [[4]]
    assert "1 of 2 samples" in caplog.text


def test_split_questions_keeps_each_with_its_document():
    batch = random_batch(random.Random(2), 30, teacher=True)
    for sample, number in zip(batch["ctx_ids"], range(30), strict=True):
        sample[0] = [1000 + number]
    split = batches.split_questions(batch, max_length=10, max_questions=2)
    owner = {tuple(map(tuple, chunks)): i for i, chunks in enumerate(batch["ctx_ids"])}
    for chunks, questions, labels in zip(split["ctx_ids"], split["input_ids"], split["labels"], strict=True):
        source = batch["input_ids"][owner[tuple(map(tuple, chunks))]]
        assert all(question in source for question in questions)
        assert len(questions) <= 2 and sum(map(len, questions)) <= 10
        assert [len(q) for q in questions] == [len(label) for label in labels]


# ------------------------------------------------------------------------------------------- chunks and labels


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


def test_labels_mark_exactly_the_answer():
    assert batches.labels_from_input_ids([[5, 6, 7, 8], [9]], [[1, 3], [0, 0]]) == [[-100, 6, 7, -100], [-100]]
    for span in ([2, 5], [-1, 2], [3, 2]):
        with pytest.raises(ValueError, match="outside a question"):
            batches.labels_from_input_ids([[5, 6, 7, 8]], [span])


# ------------------------------------------------------------------------------------------- statistics


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
