"""Training with sparse reading on: the soft rule's limit is the hard one, what learns, resuming, and what comes out."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from test_reading import FLOOR, QUESTIONS, TEXTS, ids_of, logits_of, with_null
from tiny_models import build_model

import d2l_lib as d2l
from d2l_lib.lora import add_deltas
from d2l_lib.presets import ReadingPreset, preset
from d2l_lib.reading import Reading
from d2l_lib.tasks import world
from d2l_lib.training import recipes
from d2l_lib.training.batches import IGNORED
from d2l_lib.training.loop import Run, _Muon, read_log
from d2l_lib.training.reading import ReadingBatches, ReadingStep, SoftReading, with_null_block
from d2l_lib.training.warm_up import key_whitening, unwhiten_keys, whiten_keys

SMALL = ReadingPreset(
    latent_size=16, n_latent_queries=4, n_blocks=1, n_heads=2, n_kv_heads=1, head_dim=8, rank=2, encoder_layer=1,
    shortest_chunk=60, longest_chunk=90, single_chunk_share=0.0, contexts=1, chunks=5, questions=6, l1=0.0, steps=4,
    learning_rate=1e-3, muon_rate=1e-3, muon_float32=True, warmup_steps=1, most_facts=2, bank=4, null_rows=2,
    weights={"one_hop": 3, "number": 1}, null_floor=(0.0, 0.3, 0.3, 0.3), unanswerable_share=0.3,
    prompt=True, whiten=True, null_rate=3.0, blocks_learn=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return build_model(modules=("down_proj",))


@pytest.mark.parametrize("prompt", [True, False])
def test_very_sharp_reading_is_the_rule_of_an_adapter(model, prompt):
    new, adapter = with_null(model, model.internalize(TEXTS, chunk_tokens=20), FLOOR)
    ids, mask = ids_of(new)
    answers = torch.tensor([[7, 9, 11]] * len(QUESTIONS))
    ids, mask, start = torch.cat([ids, answers], 1), torch.cat([mask, torch.ones_like(answers)], 1), ids.shape[1] - 1
    reading = Reading(prompt=prompt)
    starts = torch.tensor([start] * len(QUESTIONS))
    hard = logits_of(new, adapter, ids, mask, read=reading, starts=starts)
    step = ReadingStep(new.base_model, new.hypernetwork, replace(SMALL, sharpness=1e5, prompt=prompt))
    A, B = adapter.stacked["down_proj"]

    def soft(hidden, forced):
        state = SoftReading(A, B, torch.tensor(hidden), start, torch.tensor(forced), reading)
        with torch.no_grad(), add_deltas(new.base_model, step.deltas(state), adapter.scale):
            return new.base_model(ids, attention_mask=mask, use_cache=False).logits, state

    everything, nobody = [[False] * len(adapter)] * 3, [False] * 3
    got, state = soft(everything, nobody)
    real = mask.bool()
    torch.testing.assert_close(got[real], hard[real], rtol=1e-3, atol=1e-3)
    is_open = torch.stack(state.shares)[..., -1] < -1
    assert is_open.any() and not is_open.all()
    forced = soft(everything, [True] * 3)[0]
    assert not torch.allclose(forced[real], hard[real], atol=1e-2)
    # a hidden block is as good as none
    hidden = [[block.document == "b" for block in adapter.blocks]] * 3
    expected = logits_of(new, adapter.without("b"), ids, mask, read=reading, starts=starts)
    torch.testing.assert_close(soft(hidden, nobody)[0][real], expected[real], rtol=1e-3, atol=1e-3)


def test_batches_point_to_the_chunks_that_say_the_answer(model):
    batches = ReadingBatches(model.tokenizer, replace(SMALL, questions=40, chunks=30, most_facts=16), seed=3)
    batch, kinds, chunks = batches[0], set(), None
    chunks = [model.tokenizer.decode(row) for row in batch.chunks.rows()]
    for row, kind in enumerate(batch.kinds):
        answer = model.tokenizer.decode(batch.labels[row][batch.labels[row] != IGNORED], skip_special_tokens=True)
        says = [chunk for chunk, inside in zip(chunks, batch.evidence[row], strict=True) if inside]
        kinds.add(kind)
        if kind in ("unanswerable", "encyclopedia"):
            assert not says and (kind == "encyclopedia" or answer == world.UNKNOWN)
        else:
            assert any(answer in chunk for chunk in says)
            assert not (batch.evidence[row] & batch.hidden[row]).any()
        assert batch.hidden[row].any() == batch.alone[row]
        assert batch.labels[row, : batch.start + 1].eq(IGNORED).all() and batch.labels[row, batch.start + 1] != IGNORED
    assert {"one_hop", "unanswerable"} <= kinds and batch.alone.any() and not batch.alone.all()
    assert batch.attention_mask.shape == batch.input_ids.shape
    again, other = (ReadingBatches(model.tokenizer, batches.p, seed)[0] for seed in (3, 4))
    assert torch.equal(again.input_ids, batch.input_ids) and torch.equal(again.hidden, batch.hidden)
    assert again.input_ids.shape != other.input_ids.shape or not torch.equal(again.input_ids, other.input_ids)


def test_gradients_reach_the_null_block_and_the_hypernetwork(model):
    hypernetwork = with_null_block(model.hypernetwork, SMALL, 0)
    step = ReadingStep(model.base_model, hypernetwork, SMALL)
    batches = ReadingBatches(model.tokenizer, SMALL, 0)
    for i in range(2):
        bank = step.bank_A.clone()
        step(batches[i])["loss"].backward()
        assert not torch.equal(step.bank_A, bank)
    grads = {name: one.grad for name, one in step.named_parameters()}
    for name in ("hypernetwork.null_keys.down_proj", "hypernetwork.null_floor.down_proj"):
        assert grads[name][1:].flatten(1).abs().sum(-1).min() > 0 if grads[name].dim() > 1 else grads[name][1:].all()
        assert (grads[name][0] == 0).all(), "the first layer does not read"
    assert grads["log_sharpness"].all() and grads["hypernetwork.head.weight"][1:].abs().sum((1, 2)).all()
    assert all(torch.isfinite(grad).all() for grad in grads.values() if grad is not None)
    report = step.report()
    assert report["questions"] == 12 and {"evidence_loss", "evidence_first", "open_other"} <= report.keys()


def test_a_stopped_run_resumes_to_the_weights_of_an_uninterrupted_one(model, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "key_whitening", partial(key_whitening, n_batches=2))
    model.save(tmp_path / "start", include_base=True)
    whole, two = (Run(tmp_path / name, seed=1, report_steps=1) for name in ("whole", "two"))
    final = recipes.train_reading(SMALL, tmp_path / "start", whole)
    recipes.train_reading(SMALL, tmp_path / "start", replace(two, stop_at=2))
    assert (two.folder / "checkpoint-2").exists() and not (two.folder / "checkpoint-4").exists()
    again = recipes.train_reading(SMALL, tmp_path / "start", two)
    trained, resumed = d2l.load(final, base_model=tmp_path / "start/base_model"), d2l.load(again)
    own = dict(resumed.hypernetwork.named_parameters())
    for name, value in trained.hypernetwork.named_parameters():
        assert torch.equal(value, own[name]), name
    before = with_null_block(model.hypernetwork, SMALL, 1).state_dict()
    assert all((own[name] != before[name]).any() for name in own if "null" in name or name == "head.weight")
    assert [line["step"] for line in read_log(two.folder / "log.jsonl")] == [1, 2, 3, 4]
    assert trained.reading == Reading(prompt=True) and trained.config.null_rows == 2
    adapter = trained.internalize(TEXTS, chunk_tokens=20)
    assert len(trained.answer(QUESTIONS, adapter, max_new_tokens=5, read="sparse")) == 3


def test_a_null_block_alone_learns_and_blocks_stay_what_they_were(tmp_path):
    """So adapters of before still fit, and so do the gate and the relevance that were measured."""
    model = build_model(modules=("down_proj",))
    with torch.no_grad():
        for parameter in model.hypernetwork.parameters():
            parameter.copy_(parameter.half())
    model.least_relevance = 1.5
    model.save(tmp_path / "start", include_base=True)
    adapter = model.internalize(TEXTS, chunk_tokens=20)
    p = replace(SMALL, blocks_learn=False, whiten=False, null_threshold=-0.25)
    trained = d2l.load(recipes.train_reading(p, tmp_path / "start", Run(tmp_path / "run")))
    own = trained.hypernetwork.state_dict()
    started = with_null_block(model.hypernetwork, p, 0).state_dict()
    for name, value in started.items():
        changed = (value != own[name]).any()
        assert changed == name.startswith("null_"), name
    assert (trained.reading.null_threshold, trained.least_relevance) == (-0.25, 1.5)
    assert trained.hypernetwork_key == model.hypernetwork_key
    answers = [one.answer(QUESTIONS, adapter, max_new_tokens=4) for one in (model, trained)]
    assert answers[0] == answers[1]


def test_whitened_keys_are_the_same_function(model):
    hypernetwork = with_null_block(model.hypernetwork, SMALL, 0)
    before = hypernetwork.head.weight.detach().clone()
    spread = torch.randn(4, model.config.d_in["down_proj"], model.config.d_in["down_proj"])
    whiten_keys(hypernetwork, spread @ spread.mT / 48 + torch.eye(spread.shape[-1]))
    assert not torch.allclose(hypernetwork.head.parametrizations.weight.original, before)
    torch.testing.assert_close(hypernetwork.head.weight, before, rtol=1e-4, atol=1e-4)
    unwhiten_keys(hypernetwork)
    torch.testing.assert_close(hypernetwork.head.weight.detach(), before, rtol=1e-4, atol=1e-4)


def test_muon_in_float32_is_torchs(model):
    torch.manual_seed(0)
    ours = [torch.randn(12, 30, requires_grad=True), torch.randn(30, 7, requires_grad=True)]
    torchs = [one.detach().clone().requires_grad_() for one in ours]
    optimizers = (
        _Muon(ours, lr=1e-2, weight_decay=0.1),
        torch.optim.Muon(torchs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    before = [one.detach().clone() for one in ours]
    for i in range(3):
        for own, other in zip(ours, torchs, strict=True):
            own.grad = torch.randn(own.shape, generator=torch.Generator().manual_seed(i))
            other.grad = own.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for own, other, first in zip(ours, torchs, before, strict=True):
        change = (own - first).detach()
        assert (own - other).norm() < 0.02 * change.norm() and change.abs().max() > 1e-3


def test_the_bundled_preset_fits_the_bundled_model():
    p = preset("tiny").reading
    assert len(with_null_block(d2l.load("tiny/qa").hypernetwork, p, 0).null_floor["down_proj"]) == 4
    with pytest.raises(ValueError, match="one each"):
        with_null_block(build_model(modules=("down_proj",)).hypernetwork, replace(p, null_floor=(0.1,)), 0)
