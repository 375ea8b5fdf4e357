"""The training on many GPUs, on paper: the arithmetic against a calculation by hand, and the recorded table."""

import pytest

from d2l_lib.studies import scaling
from d2l_lib.studies.scaling import Gradients, Stage, all_reduce_seconds, stage_row


@pytest.fixture(scope="module")
def published():
    return scaling.published()


def test_a_ring_by_hand():
    one_node = 3 * (8.4e-6 + 14 * 3.4e-6) + 1.75 * 1e9 / 450e9
    assert all_reduce_seconds(8, Gradients("", 1e9, 3), 100e9) == pytest.approx(one_node)
    # Two nodes: 30 hops, of which 4 go between them.
    two_nodes = 8.4e-6 + 26 * 3.4e-6 + 4 * 14e-6 + 1.875 * 1e9 / 100e9
    assert all_reduce_seconds(16, Gradients("", 1e9, 1), 100e9) == pytest.approx(two_nodes)
    assert all_reduce_seconds(16, Gradients("", 1e9, 1), 9e11) == pytest.approx(1.875 / 450 + 152.8e-6)


def test_a_stage_by_hand():
    stage, gradients = Stage("x", 864, 32, 6e12), Gradients("", 1e9, 1)
    row = stage_row(stage, 16, gradients, 100e9, rate=3e12)
    reduce = 0.01875 + 152.8e-6
    assert row["batches_per_gpu"] == 2 and row["steps"] == 864 and row["same_recipe"]
    assert (row["compute_seconds"], row["step_seconds"]) == pytest.approx((4.0, 4.0 + reduce))
    assert (row["days"], row["gpu_days"]) == pytest.approx((0.01 * (4 + reduce), 0.16 * (4 + reduce)))
    assert row["efficiency"] == pytest.approx(4 / (4 + reduce))
    large = stage_row(stage, 64, gradients, 100e9, rate=3e12)
    assert not large["same_recipe"] and (large["batches_per_step"], large["batches_per_gpu"]) == (64, 1)
    assert large["steps"] * large["batches_per_step"] == 864 * 32, "the same data"
    assert large["compute_seconds"] == 2.0


def test_the_published_run_by_hand(published):
    stages, ways = published
    assert [(one.steps, one.batches) for one in stages] == [(80_000, 64), (20_000, 128)]
    # The largest products of a batch of 4,096 tokens in 8 chunks, with 8 questions of 128 tokens.
    of_layer = 2304 * 2048 + 2048 * 2304 + 2 * 2304 * 1024 + 3 * 2304 * 9216
    encoder = 25 * 4096 * 2 * of_layer
    states = 26 * 4096 * 2 * (2 * 2 * 2304 * 9216 + 3 * 9216 * 512)  # forward and gradients
    questions = 51 * 1024 * 2 * of_layer  # the first of 26 layers needs no gradients of its inputs
    assert 0.9 < (encoder + states + questions) / stages[0].operations < 1
    assert 0.5 < stages[1].operations / stages[0].operations < 0.7
    ours, float32, alone = ways
    assert ours.n_bytes == alone.n_bytes == 2 * float32.n_bytes and 300e6 < float32.n_bytes / 4 < 320e6
    assert ours.calls == 1 and 100 < alone.calls < 200


def test_the_table_adds_up_and_the_record_is_of_this_arithmetic():
    rows, recorded = scaling.run(256, 0), scaling.read_record().to_dict("records")
    assert len(rows) == 3 * 6 * 2 * 3 * 3 == len(recorded)
    for row, old in zip(rows, recorded, strict=True):
        for name in ("teraflop_per_batch", "communication_seconds") if row["stage"] != "both" else ():
            assert row[name] == pytest.approx(old[name]), "d2l study scaling records it anew"
    first, second, both = rows[:3]
    assert both["days"] == pytest.approx(first["days"] + second["days"], rel=1e-4)
    assert both["gpu_days"] == pytest.approx(8 * both["days"], rel=1e-4)
    least, most = sorted((first["efficiency"], second["efficiency"]))
    assert least <= both["efficiency"] <= most
    table = scaling.summary(scaling.read_record())
    for _, own in table.groupby(["network", "way"], sort=False):
        assert list(own["gpus"]) == [8, 16, 32, 64, 128, 256] and own["efficiency"].is_monotonic_decreasing
        assert list(own["same_recipe"]) == [True] * 4 + [False] * 2
        assert (own["gpu_days_low"] < own["gpu_days"]).all() and (own["gpu_days"] < own["gpu_days_high"]).all()
    with pytest.raises(ValueError, match="at least 8, not 4"):
        scaling.run(4, 0)
