"""Distillation batches and their loss: the right rows for the right questions, and the loss that is asked for."""

import random
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_models import build_base_model, build_tokenizer

from d2l_lib.documents import context_ids
from d2l_lib.encoder import ContextEncoder
from d2l_lib.engine import TransformersEngine
from d2l_lib.formats.shards import PUBLISHED, read_shards
from d2l_lib.hypernetwork import Hypernetwork, combine
from d2l_lib.lora import apply_lora
from d2l_lib.presets import DistillationPreset
from d2l_lib.tasks import world
from d2l_lib.training import recipes, selfgen, step
from d2l_lib.training.batches import IGNORED
from d2l_lib.training.contexts import DistillationBatches, WorldDocuments
from d2l_lib.training.loop import Run, read_log
from d2l_lib.training.recipes import Base, hypernetwork_config

SMALL = DistillationPreset(
    latent_size=16, n_latent_queries=4, n_blocks=1, n_heads=2, n_kv_heads=1, head_dim=8, rank=2, encoder_layer=1,
    shortest_chunk=60, longest_chunk=160, single_chunk_share=0.5, contexts=3, questions=2, l1=0.0, steps=6,
    learning_rate=1e-3, warmup_steps=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def base():
    """A random base model that likes its stop token, so that its answers end, and its tokenizer."""
    tokenizer = build_tokenizer()
    model = build_base_model(tokenizer, window=2048)
    with torch.no_grad():
        model.get_output_embeddings().weight[selfgen.stop_ids(tokenizer)] *= 3
    return model, tokenizer


@pytest.fixture(scope="module")
def shards(base, tmp_path_factory):
    settings = selfgen.Settings(documents=12, shard_size=6, questions=5, shortest=1, longest=6, max_new_tokens=24)
    folder = tmp_path_factory.mktemp("shards")
    selfgen.generate(settings, folder, TransformersEngine("random", *base))
    return read_shards(folder)


def row_of(shards, question: list[int]) -> tuple[dict, int]:
    """The row of the shards and the place in it of these question-and-answer tokens."""
    return next(
        (row, q) for row in shards for q, ids in enumerate(row["input_ids"])
        if ids[: row["response_start_end"][q][1]] == question
    )  # fmt: skip


@pytest.mark.parametrize("i", [0, 5])
def test_every_context_stands_with_its_own_questions_and_their_teacher(base, shards, i):
    tokenizer = base[1]
    batch = DistillationBatches(tokenizer, SMALL, [shards], seed=0)[i]
    chunks, questions, at = batch.chunks.rows(), iter(zip(batch.input_ids, batch.labels, strict=True)), 0
    for n_chunks, n_questions in zip(batch.chunks.counts.tolist(), batch.n_questions.tolist(), strict=True):
        own, chunks = chunks[:n_chunks], chunks[n_chunks:]
        documents = set()
        for _ in range(n_questions):
            ids, labels = next(questions)
            end = int((labels != IGNORED).nonzero()[-1]) + 1
            row, q = row_of(shards, ids[:end].tolist())
            documents.add(row["document"])
            start = row["response_start_end"][q][0]
            assert labels[:end].tolist() == [IGNORED] * start + ids[start:end].tolist()
            values = torch.tensor(row["logprobs_vals"][q])
            assert torch.equal(batch.teacher_log_probs[at : at + end - start], values)
            assert batch.teacher_indices[at : at + end - start].tolist() == row["logprobs_indices"][q]
            at += end - start
        (document,) = documents
        text = "".join(tokenizer.decode(ids, skip_special_tokens=True).removeprefix("user\n") for ids in own)
        assert all(word in text for word in document.split())
        assert (i == 0) <= (own == [context_ids(tokenizer, document)]), "one chunk to begin with"
    assert not chunks and at == len(batch.teacher_indices)


def test_batches_are_functions_of_seed_and_step(base, shards):
    batches, again, other = (DistillationBatches(base[1], SMALL, [shards], seed) for seed in (0, 0, 1))
    assert torch.equal(batches[4].input_ids, again[4].input_ids)
    assert batches[4].input_ids.tolist() not in (other[4].input_ids.tolist(), batches[5].input_ids.tolist())


def test_later_chunks_end_at_sentence_ends_and_keep_to_their_size(base, shards):
    tokenizer = base[1]
    several = [DistillationBatches(tokenizer, SMALL, [shards], 0)[i].chunks.rows() for i in (3, 4, 5)]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for chunks in several for ids in chunks]
    assert len(texts) > 9, "more chunks than contexts"
    assert all(text.rstrip().removesuffix("assistant").rstrip().endswith(".") for text in texts)


def test_published_files_without_text_are_cut_anywhere(base, shards):
    published = shards.select_columns(list(PUBLISHED))
    batch = DistillationBatches(base[1], SMALL, [published], 0)[5]
    assert batch.chunks.counts.max() > 1
    assert max(map(len, batch.chunks.rows())) <= SMALL.longest_chunk + len(context_ids(base[1], "x")) - 1


def test_mixture_follows_its_weights(base, shards):
    first, second = shards.select(range(6)), shards.select(range(6, 12))
    p = replace(SMALL, single_chunk_share=0.0)
    batches = DistillationBatches(base[1], p, [first, second], 0, weights=[0.0, 1.0])
    of_second = {tuple(ids[:end]) for row in second
                 for ids, (_, end) in zip(row["input_ids"], row["response_start_end"], strict=True)}  # fmt: skip
    for i in range(6):
        batch = batches[i]
        ends = (batch.labels != IGNORED).int().cumsum(-1).argmax(-1) + 1
        assert all(tuple(ids[:end].tolist()) in of_second for ids, end in zip(batch.input_ids, ends, strict=True))
    with pytest.raises(ValueError, match="1 weights for 2 data sets"):
        DistillationBatches(base[1], p, [first, second], 0, weights=[1.0])


def test_documents_that_are_all_too_long_are_refused(base, shards):
    with pytest.raises(ValueError, match="at most 5 tokens.*raise longest_chunk"):
        DistillationBatches(base[1], replace(SMALL, shortest_chunk=5, longest_chunk=5), [shards], 0)


@pytest.mark.parametrize("distil", [True, False])
def test_loss_is_the_plain_formula(base, shards, distil):
    """One context and question after another, without padding: the same number."""
    model, tokenizer = base
    torch.manual_seed(0)
    hypernetwork = Hypernetwork(hypernetwork_config(SMALL, model, "random"))
    with torch.no_grad():
        for parameter in hypernetwork.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = DistillationBatches(tokenizer, SMALL, [shards], 0)[5]
    loss = step.Internalization(model, hypernetwork, replace(SMALL, distil=distil))(batch)["loss"]

    encoder = ContextEncoder.from_config(model, hypernetwork.config)
    chunks, row, at, of_contexts = batch.chunks.rows(), 0, 0, []
    for n_chunks, n_questions in zip(batch.chunks.counts.tolist(), batch.n_questions.tolist(), strict=True):
        parts = []
        for ids in chunks[:n_chunks]:
            mask = torch.ones(1, len(ids), dtype=torch.long)
            features = encoder.encode(torch.tensor([ids]), attention_mask=mask)
            parts.append(hypernetwork(features, attention_mask=mask))
        chunks = chunks[n_chunks:]
        blocks = {m: tuple(torch.cat(factor) for factor in zip(*(p[m] for p in parts), strict=True)) for m in parts[0]}
        loras = combine(blocks, hypernetwork.bias(), torch.tensor([n_chunks]))
        of_questions = []
        for _ in range(n_questions):
            labels = batch.labels[row]
            places = (labels != IGNORED).nonzero().flatten()
            ids = batch.input_ids[row, : places[-1] + 1]
            with apply_lora(model, loras, hypernetwork.config.scale), torch.no_grad():
                log_q = model(ids[None]).logits[0, places - 1].log_softmax(-1)
            own = slice(at, at + len(places))
            if distil:
                teacher, indices = batch.teacher_log_probs[own].exp(), batch.teacher_indices[own]
                per_token = -(teacher * log_q.gather(-1, indices)).sum(-1)
            else:
                per_token = -log_q.gather(-1, labels[places][:, None])
            of_questions.append(per_token.mean())
            row, at = row + 1, at + len(places)
        of_contexts.append(torch.stack(of_questions).mean())
    assert loss.item() == pytest.approx(torch.stack(of_contexts).mean().item(), rel=1e-5)


def test_training_lowers_the_loss_and_resumes_to_the_same_weights(base, shards, tmp_path):
    p = replace(SMALL, steps=24, learning_rate=5e-3)
    batches = DistillationBatches(base[1], p, [shards], 0)
    for name, stop_at in (("whole", None), ("twice", 10), ("twice", None)):
        run = Run(tmp_path / name, save_steps=8, report_steps=4, stop_at=stop_at)
        recipes.train_hypernetwork(p, Base(*base, "random"), batches, run)
    whole, twice = (load_file(tmp_path / run / "checkpoint-24" / "model.safetensors") for run in ("whole", "twice"))
    assert all(torch.equal(whole[name], twice[name]) for name in whole)
    log = read_log(tmp_path / "whole" / "log.jsonl")
    assert log[-1]["loss"] < log[0]["loss"]


def test_an_empty_mixture_is_refused(base):
    empty = Dataset.from_dict({name: [] for name in PUBLISHED})
    with pytest.raises(ValueError, match="at least one must be positive"):
        DistillationBatches(base[1], SMALL, [empty], 0)


def test_fresh_documents_grow_and_hold_the_right_answers(base):
    tokenizer = base[1]
    p = replace(SMALL, steps=100, most_facts=16, facts_grow=(0.2, 0.6), questions=4, unrelated_share=0.25)
    source = WorldDocuments(tokenizer, p)
    rng = random.Random(0)
    assert {source.draw_size(rng, 0.1) for _ in range(30)} == {1}
    sizes = [source.draw_size(rng, 0.9) for _ in range(400)]
    assert min(sizes) == 1 and max(sizes) == 16
    assert 0.4 < sum(size <= 4 for size in sizes) / 400 < 0.65, "each doubling is as likely"
    row = source.draw(rng, 12)
    assert len(row["input_ids"]) == 4 and row["document"].count(".") >= 12
    (start, end), values, indices = row["response_start_end"][0], row["logprobs_vals"][0], row["logprobs_indices"][0]
    assert [step[0] for step in indices] == row["input_ids"][0][start:end]
    assert torch.tensor(values).exp().sum(-1).allclose(torch.ones(end - start))

    plain = WorldDocuments(tokenizer, replace(p, unrelated_share=0.0, unanswerable_share=0.0))
    plain.kinds, plain.weights = ["one_hop", "number", "date"], [1, 1, 1]
    for one in (plain.draw(rng, 3) for _ in range(20)):
        for ids, (start, end) in zip(one["input_ids"], one["response_start_end"], strict=True):
            assert tokenizer.decode(ids[start:end], skip_special_tokens=True).strip() in one["document"]
    never = WorldDocuments(tokenizer, replace(p, unrelated_share=0.0, unanswerable_share=1.0))
    unknown = never.draw(rng, 3)
    (start, end) = unknown["response_start_end"][0]
    said = tokenizer.decode(unknown["input_ids"][0][start:end], skip_special_tokens=True).strip()
    assert said == world.UNKNOWN


def test_a_context_may_hold_the_documents_of_strangers(base, monkeypatch):
    tokenizer = base[1]
    p = replace(SMALL, least_facts=12, most_facts=12, questions=30, unrelated_share=0.0, strangers_share=1.0)
    source = WorldDocuments(tokenizer, replace(p, kinds=("one_hop", "number", "date"), unanswerable_share=0.0))
    drawn: list[world.Document] = []
    draw_document = world.draw_document
    monkeypatch.setattr(world, "draw_document", lambda *given: drawn.append(draw_document(*given)) or drawn[-1])
    counts, about = set(), set()
    for i in range(20):
        drawn.clear()
        row = source.draw(random.Random(i), source.draw_size(random.Random(i), 1.0))
        assert sum(len(document.facts) for document in drawn) == 12
        assert row["document"] == "\n".join(document.text for document in drawn)
        counts.add(len(drawn))
        for ids, (start, end) in zip(row["input_ids"], row["response_start_end"], strict=True):
            answer = tokenizer.decode(ids[start:end], skip_special_tokens=True).strip()
            about |= {i for i, document in enumerate(drawn) if any(fact.value == answer for fact in document.facts)}
    assert 1 in counts and max(counts) > 6 and len(about) > 6, "questions are about all of the documents"


def test_documents_of_a_batch_are_of_one_size(base):
    class Sizes(WorldDocuments):
        def draw(self, rng, n_facts):
            drawn.append(n_facts)
            return super().draw(rng, n_facts)

    p = replace(SMALL, contexts=4, most_facts=30, facts_grow=(0.0, 0.0), single_chunk_share=0.0)
    batches = DistillationBatches(base[1], p, [Sizes(base[1], p)], 0, [1.0])
    sizes = []
    for i in range(5):
        drawn: list[int] = []
        batches[i]
        assert len(drawn) == 4 and len(set(drawn)) == 1
        sizes += drawn
    assert len(set(sizes)) > 1


def test_world_and_shards_are_mixed_by_weight_and_world_needs_one(base, shards):
    model, tokenizer = base
    p = replace(SMALL, single_chunk_share=0.0, contexts=2)
    with pytest.raises(ValueError, match="give weights"):
        DistillationBatches(tokenizer, p, [WorldDocuments(tokenizer, p), shards], seed=0)
    only_shards = DistillationBatches(tokenizer, p, [WorldDocuments(tokenizer, p), shards], 0, [0.0, 1.0])
    certain = only_shards[0].teacher_log_probs[:, 0] == 0
    assert not certain.all()
    only_world = DistillationBatches(tokenizer, p, [WorldDocuments(tokenizer, p), shards], 0, [1.0, 0.0])
    batch = only_world[0]
    assert (batch.teacher_log_probs[:, 0] == 0).all()
    labels = batch.labels[batch.labels != IGNORED]
    assert torch.equal(batch.teacher_indices[:, 0], labels)
    losses = [loss_of(model, batch, distil) for distil in (True, False)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # with a teacher who has no doubt it is cross-entropy


def loss_of(model, batch, distil: bool) -> float:
    torch.manual_seed(0)
    hypernetwork = Hypernetwork(hypernetwork_config(SMALL, model, "x"))
    return step.Internalization(model, hypernetwork, replace(SMALL, distil=distil))(batch)["loss"].item()


def test_the_last_layer_alone_gives_the_logits_and_gradients_of_the_whole_model(base):
    """Where the other layers have no blocks, nothing but the last layer's own output changes."""
    model, tokenizer = base
    torch.manual_seed(0)
    hypernetwork = Hypernetwork(hypernetwork_config(SMALL, model, "x"))
    with torch.no_grad():
        hypernetwork.scaler_B["down_proj"][:, -1] = 3.0
        hypernetwork.bias_B["down_proj"][-1].normal_()
    p = replace(SMALL, contexts=4, most_facts=5, facts_grow=(0.0, 0.0), single_chunk_share=0.0, questions=5)
    batch = DistillationBatches(tokenizer, p, [WorldDocuments(tokenizer, p)], 0, [1.0])[1]
    assert len(batch.chunks.counts.unique()) > 1 or len(batch.n_questions.unique()) > 1
    losses, gradients = [], []
    for last_layer in (False, True):
        hypernetwork.zero_grad()
        loss = step.Internalization(model, hypernetwork, replace(SMALL, last_layer=last_layer))(batch)["loss"]
        loss.backward()
        losses.append(loss.item())
        gradients.append(hypernetwork.head.weight.grad[-1].clone())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)
    hypernetwork.scaler_B["down_proj"].data[:, 0] = 3.0  # now the other layers would count, and are left out
    assert step.Internalization(model, hypernetwork, SMALL)(batch)["loss"].item() != pytest.approx(losses[1])
    alone = step.Internalization(model, hypernetwork, replace(SMALL, last_layer=True))(batch)["loss"].item()
    assert alone == pytest.approx(losses[1])


def test_a_batch_is_full_at_so_many_chunks(base):
    tokenizer = base[1]
    p = replace(SMALL, contexts=50, chunks=12, most_facts=8, facts_grow=(0.0, 0.0), single_chunk_share=0.0, questions=9)
    batch = DistillationBatches(tokenizer, p, [WorldDocuments(tokenizer, p)], 0, [1.0])[0]
    n_chunks = batch.chunks.counts.tolist()
    assert sum(n_chunks) >= 12 and sum(n_chunks[:-1]) < 12
    assert (batch.n_questions <= batch.chunks.counts + 1).all() and batch.n_questions.max() <= 9
