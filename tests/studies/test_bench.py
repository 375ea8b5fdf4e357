"""The bench: the plain computation is ours, the arithmetic is torch's count, memory is never negative, rows add up."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import build_rows_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d2l_lib import onednn, studies
from d2l_lib.__main__ import main
from d2l_lib.hypernetwork import combine
from d2l_lib.records import read_jsonl
from d2l_lib.studies import bench, products, random_models, watches
from d2l_lib.studies.plain import Plain
from d2l_lib.studies.products import Product
from d2l_lib.token_rows import _AT_ONCE, _KERNEL

each_configuration = pytest.mark.parametrize("name", random_models.CONFIGURATIONS)
MORE = {"n_self_attention_per_block": 1, "shared_weights": True, "per_layer_processing": False, "n_pre_head_layers": 2}


@pytest.fixture
def small(monkeypatch):
    sizes = {"vocab_size": 2000, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    monkeypatch.setattr(random_models, "BASE", random_models.BASE | sizes)


def random_model(name, **settings):
    """A random model of which every parameter counts."""
    with pytest.MonkeyPatch.context() as patch:
        configurations = random_models.CONFIGURATIONS
        patch.setitem(configurations, name, configurations[name] | settings)
        model = random_models.random_model(name)
    with torch.no_grad():
        for parameter in model.hypernetwork.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def near(ours, plain, tolerance):
    assert (ours - plain).abs().max() <= tolerance * plain.abs().max()


# --- the plain computation is ours ------------------------------------------------------------------------------------
@each_configuration
@pytest.mark.parametrize("settings", [{}, MORE], ids=["published", "other options"])
def test_plain_blocks_are_ours(small, name, settings):
    model = random_model(name, **settings)
    ids = torch.randint(2000, (3, 40), generator=torch.Generator().manual_seed(0))
    ours, (A, B) = model.internalize_ids(ids), Plain(model).internalize(ids)["down_proj"]
    blocks = [(block.A["down_proj"], block.B["down_proj"]) for block in ours.blocks]
    for index, plain in enumerate((A, B)):
        near(torch.cat([*(block[index] for block in blocks), ours.bias["down_proj"][index]], 1), plain[0], 1e-5)
    assert not torch.allclose(blocks[0][0], blocks[1][0])


@each_configuration
def test_plain_loss_and_gradients_are_ours(small, name):
    model = random_model(name)
    model.hypernetwork.requires_grad_(True)
    batch = random_models.random_batch(2000, 40, torch.Generator().manual_seed(0))
    losses = random_models.internalization(model)(batch)["loss"], Plain(model).loss(batch)
    near(*losses, 1e-5)
    parameters = list(model.hypernetwork.parameters())
    for ours, plain in zip(*(torch.autograd.grad(loss, parameters) for loss in losses), strict=True):
        near(ours, plain, 5e-5)


@torch.no_grad()
def test_a_plain_adapter_of_several_contexts_is_ours(small):
    model = random_model("many latents")
    plain = Plain(model)
    blocks = plain.write(plain.read(torch.randint(2000, (4, 20))))
    expected = combine(blocks, model.hypernetwork.bias(), torch.tensor([2, 2]))
    for ours, written in zip(expected["down_proj"], plain.combine(blocks, contexts=2)["down_proj"], strict=True):
        assert torch.equal(ours, written)


def test_answers_of_both_ways_are_the_same(small):
    prepared = bench.Prepared(bench.Task("answer", "many latents", blocks=3, questions=2), 0)
    prepared.model.hypernetwork.bias_B["down_proj"].data.normal_()
    ways, model = prepared.ways(), prepared.model
    answers = ways.ours()
    assert torch.equal(answers, ways.plain()) and answers.shape[1] == random_models.QUESTION_TOKENS + bench.NEW_TOKENS
    questions = answers[:, : random_models.QUESTION_TOKENS]
    assert not torch.equal(
        answers[:, random_models.QUESTION_TOKENS], model.base_model(questions).logits[:, -1].argmax(-1)
    )


# --- arithmetic -------------------------------------------------------------------------------------------------------
def counted(do) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        do()
    return counter.get_total_flops()


@pytest.fixture
def torchs_products(monkeypatch):
    """Torch counts its own products only."""
    monkeypatch.setattr(onednn, "is_available", lambda: False)


def unseen(model, tokens, layers, sequences=1):
    """Operations that torch counts for tokens that attention may not see."""
    return products.operations(products._attention(model, tokens, layers, sequences)) * (2 * tokens / (tokens + 1) - 1)


@each_configuration
def test_needed_operations_are_those_that_torch_counts(small, torchs_products, name):
    model, tokens = random_model(name), 300  # so long that a chunk is a batch of its own
    ids = torch.randint(2000, (1, tokens))
    needed = products.operations(products.internalizing(model, tokens))
    hidden = unseen(model, tokens, model.encoder.n_layers_run)
    assert counted(lambda: model.internalize_ids(ids)) == pytest.approx(needed + hidden, rel=1e-6)
    assert products.operations(products.internalizing(model, tokens, 5)) == pytest.approx(5 * needed)
    model.hypernetwork.requires_grad_(True)
    step, batch = random_models.internalization(model), random_models.random_batch(2000, tokens, torch.Generator())
    sizes = random_models.STEP
    needed = products.operations(products.training(model, tokens, *sizes))
    hidden = 4 * hidden + unseen(model, random_models.QUESTION_TOKENS, 1 + 3 * 3, 16)
    assert counted(lambda: step(batch)["loss"].backward()) == pytest.approx(needed + hidden, rel=0.01)


@torch.no_grad()
def test_needed_operations_of_token_rows(monkeypatch, torchs_products):
    model, tokens = build_rows_model(), 40
    words, d_out = model.hypernetwork.words, model.config.d_out["down_proj"]
    ids = torch.arange(100, 100 + tokens)[None]
    needed = products.operations(products.internalizing(model, tokens))
    seen = unseen(model, tokens, model.encoder.n_layers_run)
    convolved = 2 * model.config.n_blocks * tokens * model.config.latent_size * _KERNEL
    filled = 2 * (_AT_ONCE - (tokens - words.before - words.after)) * d_out**2  # a table's words come in batches
    monkeypatch.setattr(model, "batch_tokens", tokens)  # a batch of its own, without padding
    torch.backends.mha.set_fastpath_enabled(False)  # torch does not count what goes that way
    try:
        done = counted(lambda: model.internalize_ids(ids))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert done == pytest.approx(needed + seen + convolved + filled, rel=1e-6)


@torch.no_grad()
def test_needed_operations_of_an_answer(small):
    prepared = bench.Prepared(bench.Task("answer", "many latents", blocks=3, questions=2), 0)
    ways = prepared.ways()
    ways.ours()  # so many rows are added up, once
    hidden = unseen(prepared.model, random_models.QUESTION_TOKENS, prepared.task.layers, 2)
    assert counted(ways.ours) == pytest.approx(products.operations(ways.needs) + hidden, rel=1e-6)


def test_the_largest_products_are_timed_alike_ones_together():
    needs = [Product(10, 10, 10, 3), Product(1, 1, 1), Product(10, 10, 10, 2), Product(20, 10, 10)]
    assert bench._largest(needs) == [Product(10, 10, 10, 5), Product(20, 10, 10)]


# --- rows -------------------------------------------------------------------------------------------------------------
def test_turns_alternate_and_the_first_is_not_counted(monkeypatch):
    done, clock = [], SimpleNamespace(now=0.0)

    def way(name, seconds):
        def do():
            done.append(name)
            clock.now += seconds * (100 if done.count(name) == 1 else 1)

        return do

    monkeypatch.setattr(bench, "time", SimpleNamespace(process_time=lambda: clock.now))
    monkeypatch.setattr(
        bench, "product", lambda x, w: way("packed" if w.is_mkldnn else "product", 0.5 - w.is_mkldnn / 4)()
    )
    monkeypatch.setattr(bench, "_TIMED_OPERATIONS", 1)
    ways = bench.Ways(way("ours", 2.0), way("plain", 3.0), [Product(1, 1, 1, 2)])
    seconds = bench._in_turn(ways, 2)
    assert done == ["ours", "plain", "product", "packed"] * 3
    assert {name: list(of_way) for name, of_way in seconds.items()} == {
        "ours": [2, 2], "plain": [3, 3], "floor": [1, 1], "packed": [0.5, 0.5],
    }  # fmt: skip
    row = bench._columns(ways.needs, seconds, {"ours": 1.0, "plain": 2.0})
    assert (row["n"], row["ratio"], row["over_floor"], row["over_packed"], row["seconds"]) == (2, 1.5, 2, 4, 2)
    assert row["rate"] == row["gigaflop"] / row["floor_seconds"] and row["plain_memory_mib"] == 2
    alone = dict.fromkeys(("ours", "floor", "packed"), np.ones(2))
    without = bench._columns(ways.needs, alone, {"ours": 1.0, "plain": None})
    assert without["ratio"] is without["plain_seconds"] is None and without["over_floor"] == 1


def test_memory_is_the_growth_of_a_peak_and_never_negative(monkeypatch):
    assert watches.growth_of_peak_mib(lambda: torch.ones(100, 2**18)) == pytest.approx(100, abs=10)
    held = [torch.ones(100, 2**18)]
    assert 0 <= watches.growth_of_peak_mib(held.clear) < 10, "what is freed is not subtracted"
    readings = iter([100.0, 99.9])
    monkeypatch.setattr(watches, "peak_of_process_mib", lambda: next(readings))
    assert watches.growth_of_peak_mib(lambda: None) == 0


def test_the_command_measures_each_task_both_ways_and_in_processes_of_their_own(monkeypatch, tmp_path, capsys):
    """With the bundled model, whose weights a process of its own loads as well."""
    monkeypatch.setattr(bench, "tasks", lambda chunks: [bench.Task("internalize", "tiny", chunks=n) for n in chunks])
    monkeypatch.setattr(studies, "record_path", lambda name: tmp_path / f"{name}.jsonl")
    assert main(["study", "bench", "--n", "2", "--chunks", "1", "4"]) == 0
    one, four = read_jsonl(tmp_path / "bench.jsonl")
    assert (one["what"], one["model"], one["chunks"], four["chunks"], one["n"]) == ("internalize", "tiny", 1, 4, 2)
    assert one["command"] == "d2l study bench --n 2 --chunks 1 4" and one["threads"] and one["seed"] == 0
    assert four["gigaflop"] == pytest.approx(4 * one["gigaflop"], rel=1e-3)
    for row in (one, four):
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert (
            row["over_packed"] >= row["over_floor"] * 0.8 > 0.8 and min(row["memory_mib"], row["plain_memory_mib"]) >= 0
        )
        assert row["seconds"] > 0 and row["floor_seconds"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[-2:]] == ["tiny, internalize, 1 chunk", "tiny, internalize, 4 chunks"]
    assert all("times the floor" in line and " against " in line for line in lines[-2:])


def test_an_interrupted_record_continues_unless_it_is_made_again(monkeypatch):
    one, two = (bench.Task("internalize", "tiny", chunks=n) for n in (1, 2))
    seconds = {"ours": np.ones(3), "plain": np.full(3, 2.0), "floor": np.full(3, 0.5)}
    seconds["packed"] = seconds["floor"]
    ways = SimpleNamespace(ways=lambda: bench.Ways(None, print, [Product(1, 1, 1)]))
    monkeypatch.setattr(bench, "tasks", lambda chunks: [one, two])
    monkeypatch.setattr(bench, "Prepared", lambda task, seed: ways)
    monkeypatch.setattr(bench, "_in_turn", lambda ways, n: seconds)
    monkeypatch.setattr(bench, "_memory_alone", lambda *_: 5.0)
    monkeypatch.setattr(bench, "earlier_rows", lambda name: [])
    *_, rows = bench.run(3, 0, (1,), again=False)
    recorded = rows[0] | {"seed": 0}
    monkeypatch.setattr(bench, "earlier_rows", lambda name: [recorded])
    (later,) = bench.run(3, 0, (1,), again=False)
    assert later[0] is recorded and bench.task_of(later[1]) == two, "only what is missing is measured"
    assert len(list(bench.run(3, 1, (1,), again=False))) == 2, "another seed"
    assert len(list(bench.run(3, 0, (1,), again=True))) == 2
    table = bench.summary(pd.DataFrame(later))
    assert list(table.index) == ["tiny, internalize, 1 chunk", "tiny, internalize, 2 chunks"]
    assert list(table["ratio"]) == [2, 2] and list(table["quartiles"]) == ["2.00 to 2.00"] * 2
    costs = bench.cost_table(pd.DataFrame(later).assign(model="few latents", seed=0))
    assert set(costs["method"]) == {"ours", "plain", "floor: matrix products"}
    assert set(costs["length_tokens"]) == {264, 528}
    assert list(costs.loc[costs["floor"], "seconds"]) == [0.5, 0.5]


def test_every_cost_has_its_axis():
    plan = bench.tasks((1, 8))
    assert len(set(plan)) == len(plan)
    for axis in ("chunks", "documents", "blocks", "questions", "layers", "rank"):
        assert len({getattr(task, axis) for task in plan if task.model != "smollm2"}) > 1, axis
    assert {task.model for task in plan} == {"many latents", "few latents", "tiny", "smollm2"}
