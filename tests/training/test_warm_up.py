"""The warm-up: what is asked of the latents, and that it can be learned."""

from dataclasses import replace

import pytest
import tiny_models
import torch
import train_small
from torch.nn.utils import parametrize

from d2l_lib.base_model import load_base_model
from d2l_lib.documents import context_ids
from d2l_lib.encoder import ContextEncoder, linear_inputs
from d2l_lib.hypernetwork import Hypernetwork
from d2l_lib.presets import WarmUpPreset
from d2l_lib.training.batches import IGNORED, Chunks
from d2l_lib.training.loop import Run, read_log
from d2l_lib.training.recipes import hypernetwork_config
from d2l_lib.training.warm_up import (
    KeysAndValues,
    Readout,
    ReadoutBatches,
    WhitenedKeys,
    fact_sentences,
    fit_scalers,
    key_limits,
    key_whitening,
    needle_sentences,
    spread_to_all_layers,
    start_linear,
    train_readout,
    unwhiten_keys,
)

P = WarmUpPreset(steps=20, sentences=6, learning_rate=1e-3, warmup_steps=2)


@pytest.fixture(scope="module")
def base():
    return train_small.small_base()


def fresh(base_model, rank=2) -> Hypernetwork:
    torch.manual_seed(0)
    p = replace(train_small.SMALL, rank=rank, latent_size=32)
    return Hypernetwork(hypernetwork_config(p, base_model, "small"))


def warm_up(base, hypernetwork, kind=Readout):
    torch.manual_seed(1)
    if kind is Readout:
        return Readout(base[0], hypernetwork)
    batches = ReadoutBatches(base[1], P, 0)
    return KeysAndValues(base[0], hypernetwork, key_whitening(base[0], "down_proj", batches, n_batches=30))


@pytest.mark.parametrize("draw", [fact_sentences, needle_sentences])
def test_batches_hold_the_answer_and_the_question_of_their_sentence(base, draw):
    tokenizer = base[1]
    batches = ReadoutBatches(tokenizer, P, 3, draw)
    batch, again, other = batches[4], ReadoutBatches(tokenizer, P, 3, draw)[4], batches[5]
    assert torch.equal(batch.answer_ids, again.answer_ids) and len(batches) == 20
    assert not torch.equal(batch.chunks.order, other.chunks.order) or batch.answer_ids.shape != other.answer_ids.shape
    chunks = batch.chunks.rows()
    assert len(chunks) == len(batch.answer_ids) == len(batch.question_ids) == 6
    for chunk, answer, question in zip(chunks, batch.answer_ids, batch.question_ids, strict=True):
        answer = answer[answer != IGNORED].tolist()
        assert answer[-1] == tokenizer.eos_token_id
        value = tokenizer.decode(answer[:-1]).strip()
        text = tokenizer.decode(chunk, skip_special_tokens=True).strip()
        assert value in text and value not in tokenizer.decode(question[question != IGNORED].tolist())
        assert context_ids(tokenizer, text) == chunk


def test_the_step_scores_token_j_from_row_j_and_moves_nothing_of_the_base_model(base):
    base_model, tokenizer = base
    hypernetwork = fresh(base_model)
    step = Readout(base_model, hypernetwork)
    batch = ReadoutBatches(tokenizer, P, 0)[0]
    with torch.no_grad():  # answer readouts that always say one token, whatever the latents are
        step.answer.weight.zero_()
        step.answer.bias.zero_()
        said = int(batch.answer_ids[0, 0])
        step.answer.bias[said] = 50.0
    loss = step(batch)["loss"]
    loss.backward()
    slots = batch.answer_ids[:, :2]
    expected = float((slots[slots != IGNORED] == said).float().mean())
    assert step.report()["answer_tokens_right"] == pytest.approx(expected, abs=1e-4)
    assert all(parameter.grad is None for parameter in base_model.parameters())
    head = hypernetwork.head.weight
    assert head.grad is None or not head.grad.any()  # the blocks themselves are not scored
    assert hypernetwork.aggregator.perceiver.modality_projection.down_proj.weight.grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind, muon_rate", [(Readout, None), (KeysAndValues, None), (KeysAndValues, 2e-3)])
def test_the_warm_up_learns_to_read_and_goes_on_where_it_was(base, tmp_path, kind, muon_rate):
    base_model, tokenizer = base
    p = replace(P, steps=30, sentences=24, learning_rate=1e-2, muon_rate=muon_rate)
    whole, two = fresh(base_model, rank=4), fresh(base_model, rank=4)
    batches = ReadoutBatches(tokenizer, p, 0, needle_sentences)
    run = Run(tmp_path, report_steps=6, save_steps=12)
    train_readout(p, warm_up(base, whole, kind), batches, run.stage("whole"))
    train_readout(p, warm_up(base, two, kind), batches, run.stage("two", stop_at=12))
    two = fresh(base_model, rank=4)  # a new process would start from nothing too
    train_readout(p, warm_up(base, two, kind), batches, run.stage("two"))
    for (name, a), b in zip(whole.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name
    log = read_log(tmp_path / "whole" / "log.jsonl")
    assert log[-1]["loss"] < 0.8 * log[0]["loss"] and log[-1]["question_loss"] < log[0]["question_loss"]


def test_the_linear_start_passes_features_on_without_their_mean(base):
    base_model, tokenizer = base
    hypernetwork = fresh(base_model)
    start_linear(hypernetwork, base_model, tokenizer, seed=0, n_documents=16)
    other = fresh(base_model)
    start_linear(other, base_model, tokenizer, seed=0, n_documents=16)
    assert all(torch.equal(a, b) for a, b in zip(hypernetwork.parameters(), other.parameters(), strict=True))
    encoder = ContextEncoder.from_config(base_model, hypernetwork.config)
    ids = torch.tensor([context_ids(tokenizer, "The mayor of Velm is Ada Row. It was a long winter.")])
    features = encoder.encode(ids, attention_mask=torch.ones_like(ids))[0]
    projection = hypernetwork.aggregator.perceiver.modality_projection
    mean = features.mean(0)
    with torch.no_grad():
        # along the line between two tokens the projection hardly bends; a fresh one does
        def bend(network):
            first, second = network(mean + (features[3] - mean)), network(mean + (features[7] - mean))
            middle = network((features[3] + features[7]) / 2)
            return ((first + second) / 2 - middle).norm() / middle.norm()

        assert bend(projection) < 0.5 * bend(fresh(base_model).aggregator.perceiver.modality_projection)


def test_keys_and_values_score_the_rows_that_act(base):
    """A hypernetwork whose rows are known: key and value of row j, and what they are scored against."""
    base_model, tokenizer = base
    hypernetwork = fresh(base_model)
    step = warm_up(base, hypernetwork, KeysAndValues)
    batch = ReadoutBatches(tokenizer, P, 0)[0]
    step(batch)
    said = step.report()
    assert 0 <= said["values_right"] < 0.2 and said["key_cosine"] < 0.5
    d_in = hypernetwork.config.d_in["down_proj"]
    answers = batch.answer_ids[:, :2]
    inputs = step.whitened_inputs(batch, 2)
    assert inputs.shape == (2, 6, 2, d_in)
    # x where token j is predicted is the input of down_proj at the position before it
    seen = []
    hook = base_model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    base_model(batch.input_ids, use_cache=False)
    hook.remove()
    place = int(batch.starts[4])
    torch.testing.assert_close(inputs[1, 4, 1], seen[0][4, place] @ step.whitening[1])
    assert int(batch.input_ids[4, place]) == int(answers[4, 0])

    class Known(torch.nn.Module):
        """Writes, for sentence k, the rows that solve the batch."""

        config = hypernetwork.config

        def forward(self, features, attention_mask, taps, layer):
            rows = torch.zeros(len(answers), 2, 1, 2, d_in + 32)
            rows[:, :, 0, :, :d_in] = 3 * inputs.transpose(0, 1)
            rows[:, :, 0, :, d_in:] = step.directions[answers.clamp_min(0)][:, None]
            taps.update(lora_emb=torch.zeros(len(answers), 2, 1, 2, 32), flat_loras=rows)

    step.hypernetwork = Known()
    ids = torch.ones(6, 3, dtype=torch.long)
    step(replace(batch, chunks=Chunks([ids], [ids], torch.arange(6), torch.ones(6, dtype=torch.long))))
    said = step.report()
    assert said["values_right"] == pytest.approx(1.0) and said["key_cosine"] == pytest.approx(1.0)
    assert said["keys_found"] > 0.9


def test_whitened_inputs_have_the_unit_matrix_as_second_moment(base):
    """And the key that points to its own question's x is, made plain, the one that others match least."""
    base_model, tokenizer = base
    batches = ReadoutBatches(tokenizer, P, 0)
    whitening = key_whitening(base_model, "down_proj", batches, n_batches=40, floor=1e-9)
    rows = []
    for i in range(40):
        batch = batches[i]
        x = linear_inputs(base_model, "down_proj", batch.input_ids)
        for row, (start, answer) in enumerate(zip(batch.starts, batch.answer_ids, strict=True)):
            rows.append(x[:, row, start - 1 : start - 1 + (answer != IGNORED).sum()])
    x = torch.cat(rows, dim=1) @ whitening
    moment = x.transpose(1, 2) @ x / x.shape[1]
    torch.testing.assert_close(moment, torch.eye(x.shape[-1]).expand_as(moment), atol=1e-2, rtol=0)
    assert torch.allclose(whitening, whitening.transpose(1, 2), atol=1e-4)


def test_blocks_act_with_the_size_that_was_asked_for_and_keys_become_plain(base):
    base_model, tokenizer = base
    hypernetwork = fresh(base_model, rank=4)
    step = warm_up(base, hypernetwork, KeysAndValues)
    batches = ReadoutBatches(tokenizer, P, 0)
    batch = batches[0]
    _, A, _ = step.rows(batch.chunks)
    scored = batch.answer_ids[:, :4] != IGNORED
    inputs = step.whitened_inputs(batch, 4)[:, scored]
    matches = (A[:, :, :4].transpose(0, 1)[:, scored] * inputs).sum(-1).mean(1)
    with torch.no_grad():  # keys that match on average, as a warm-up leaves them
        weight = hypernetwork.head.weight
        weight[..., : A.shape[-1]] *= matches.sign()[:, None, None]
    assert not hypernetwork.scaler_B["down_proj"].any()
    fit_scalers(step, batch, size=0.5)
    assert (hypernetwork.scaler_B["down_proj"] > 0).all() and (hypernetwork.scaler_A["down_proj"] > 0).all()

    # what the linears of the base model really read, with plain keys: an own key matches with 1 on average
    def own_matches():
        rows = []
        for ids, mask in zip(batch.chunks.ids, batch.chunks.mask, strict=True):
            encoder = ContextEncoder.from_config(base_model, hypernetwork.config)
            rows.append(hypernetwork(encoder.encode(ids, attention_mask=mask), attention_mask=mask)["down_proj"][0])
        A = torch.cat(rows)[batch.chunks.order]
        x = linear_inputs(base_model, "down_proj", batch.input_ids)
        places = (batch.starts[:, None] - 1 + torch.arange(4)).clamp_max(x.shape[2] - 1)
        own = x[:, torch.arange(6)[:, None], places][:, scored]
        return (A.transpose(0, 1)[:, scored] * own).sum(-1).mean(1)

    with torch.no_grad():
        torch.testing.assert_close(own_matches(), torch.ones(2), atol=1e-4, rtol=0)
        unwhiten_keys(hypernetwork)
        torch.testing.assert_close(own_matches(), torch.ones(2), atol=1e-4, rtol=0)
    assert "head.weight" in hypernetwork.state_dict()  # the published names again


def test_the_last_layer_alone_is_warmed_up_where_that_is_asked_for(base):
    base_model, tokenizer = base
    hypernetwork = fresh(base_model, rank=4)
    batch = ReadoutBatches(tokenizer, P, 0)[0]
    whitening = key_whitening(base_model, "down_proj", ReadoutBatches(tokenizer, P, 0), n_batches=30)
    both, last = (KeysAndValues(base_model, hypernetwork, whitening, last_layer=alone) for alone in (False, True))
    for rows, of_last in zip(both.rows(batch.chunks), last.rows(batch.chunks), strict=True):
        torch.testing.assert_close(of_last, rows[:, -1:])
    inputs = [step.whitened_inputs(batch, 4) for step in (both, last)]
    assert torch.equal(inputs[1], inputs[0][-1:])
    last(batch)["loss"].backward()
    assert hypernetwork.head.weight.grad[-1].any() and not hypernetwork.head.weight.grad[:-1].any()
    scored = batch.answer_ids[:, :4] != IGNORED
    with torch.no_grad():
        matches = (last.rows(batch.chunks)[1][:, :, :4].transpose(0, 1)[:, scored] * inputs[1][:, scored]).sum(-1)
        hypernetwork.head.weight[-1, :, : whitening.shape[-1]] *= matches.mean().sign()
    fit_scalers(last, batch)
    assert hypernetwork.scaler_B["down_proj"][0, -1].all() and not hypernetwork.scaler_B["down_proj"][0, :-1].any()


def test_the_earlier_layers_begin_as_copies_of_the_last(base):
    base_model, tokenizer = base
    hypernetwork = fresh(base_model, rank=4)
    batches = ReadoutBatches(tokenizer, P, 0)
    whitening = key_whitening(base_model, "down_proj", batches, n_batches=30)
    step = KeysAndValues(base_model, hypernetwork, whitening)
    parametrize.register_parametrization(hypernetwork.head, "weight", WhitenedKeys(step.whitening))
    with torch.no_grad():
        hypernetwork.scaler_B["down_proj"][:, -1] = 2.0
    batch = batches[7]
    last = [rows[:, -1].clone() for rows in step.rows(batch.chunks)]
    spread_to_all_layers(step, batches, n_batches=20, share=0.1)
    latents, A, B = step.rows(batch.chunks)
    for now, before in zip((latents, A, B), last, strict=True):
        torch.testing.assert_close(now[:, -1], before)  # the last layer is what it was
    torch.testing.assert_close(latents[:, 0], latents[:, -1])
    torch.testing.assert_close(B[:, 0], B[:, -1])
    torch.testing.assert_close(hypernetwork.scaler_B["down_proj"][0, 0], torch.full((4, 1), 0.2))
    scored = batch.answer_ids[:, :4] != IGNORED
    x = linear_inputs(base_model, "down_proj", batch.input_ids)[0]
    places = (batch.starts[:, None] - 1 + torch.arange(4)).clamp_max(x.shape[1] - 1)
    x = x[torch.arange(6)[:, None], places]
    cosines = torch.nn.functional.cosine_similarity(A[:, 0, :4][scored], x[scored] @ whitening[0], dim=-1)
    assert cosines.mean() > 0.3, "keys of the first layer point to what it reads"


@pytest.mark.slow
@pytest.mark.slow
def test_whitened_keys_tell_the_facts_of_a_document_apart(bundled):
    base_model, tokenizer = bundled
    table = key_limits(base_model, tokenizer, [20], 0, n_documents=2)
    plain, whitened = (
        table[table["whitened"] == whiten].set_index("layers")["exact_match"] for whiten in (False, True)
    )
    assert list(whitened.index) == ["0", "1", "2", "3", "all"]
    assert whitened["all"] > 0.95 > plain["all"]


@pytest.fixture(scope="module")
def bundled():
    return load_base_model("tiny")


def test_a_family_that_calls_its_last_norm_otherwise_can_be_warmed_up():
    base_model = tiny_models.build_base_model(tiny_models.build_tokenizer(), family="phi")
    with torch.no_grad():
        base_model.model.final_layernorm.weight[0] = 0.0
    hypernetwork = tiny_models.random_hypernetwork(base_model, ("fc2",))
    step = KeysAndValues(base_model, hypernetwork, torch.eye(48).expand(4, 48, 48))
    assert step.directions.shape == (base_model.config.vocab_size, 32)
    assert (step.directions[:, 0] == 0).all(), "the norm's weight is part of what a value adds to a token"
