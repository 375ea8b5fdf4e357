"""A warm-up for hypernetworks: what one sentence says must be readable from the latents that its block is made of.

    sentence -> context encoder -> hypernetwork's latents -> two linear readouts -> answer tokens, words of the question

Learning to answer starts slowly, because an answer's tokens are found one after another, each through the whole frozen
base model. Here no base model answers: row j of every layer has to give token j of the answer at once, and the mean of
the rows the words of the question (which subject, which relation: what a block has to be found by). The readouts are
thrown away afterwards; the hypernetwork stays as published.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from . import needles, world
from .base_model import ContextEncoder
from .documents import context_ids
from .hypernetwork import Hypernetwork, names_without_decay
from .packing import IGNORED
from .presets import ReadoutPreset
from .trainer import chunk_batch, fit, pad_right

Sentence = tuple[str, str, str]  # a text, a question about it, the answer


def fact_sentences(rng: random.Random, tokenizer) -> Iterator[Sentence]:
    """Sentences of the world that state one fact each, without end."""
    while True:
        document = world.draw_document(rng, "train", 4, distractors=0.0)
        for fact in document.facts:
            question = world.question_about(rng, fact, paraphrase=rng.random() < 0.3)
            yield document.text[slice(*fact.span)], question.text, question.answer


def needle_sentences(rng: random.Random, tokenizer) -> Iterator[Sentence]:
    """Needles among a few lines of filler, without end."""
    while True:
        number = needles.draw_number(rng, "train")
        haystack = needles.build_haystack(tokenizer, rng.randint(20, 80), rng.random(), number)
        yield haystack.text, haystack.question, haystack.answer


class ReadoutBatches(Dataset):
    """Batches of sentences with a question about each, from `draw`; item i is a function of (seed, i).

    Item: chunk_ids, chunk_mask, order as in `training.NeedleBatches`; answer_ids [sentences, tokens], the answer and
    its stop token, IGNORED behind it; question_ids [sentences, tokens] without chat wrapping, IGNORED behind it.
    """

    def __init__(self, tokenizer, p: ReadoutPreset, seed: int, draw: Callable = fact_sentences):
        self.tokenizer, self.p, self.seed, self.draw = tokenizer, p, seed, draw

    def __len__(self) -> int:
        return self.p.steps

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        rng = random.Random(f"readout/{self.seed}/{i}")
        sentences, questions, answers = zip(*islice(self.draw(rng, self.tokenizer), self.p.sentences), strict=True)
        answer_rows = [ids + [self.tokenizer.eos_token_id] for ids in self._plain_ids(answers)]
        chunks = context_ids(self.tokenizer, list(sentences))
        batch = chunk_batch(chunks, [1] * len(chunks), self.tokenizer.pad_token_id)
        return {name: batch[name] for name in ("chunk_ids", "chunk_mask", "order")} | {
            "answer_ids": pad_right(answer_rows, IGNORED)[0],
            "question_ids": pad_right(self._plain_ids(questions), IGNORED)[0],
        }

    def _plain_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]


class Readout(nn.Module):
    """The training step: cross-entropy of answer token j from row j of each layer, and of the question's words from the
    mean of the rows, each word as likely as every other.
    """

    def __init__(self, base_model, hypernetwork: Hypernetwork):
        super().__init__()
        self.hypernetwork = hypernetwork
        d, vocabulary = hypernetwork.config.latent_size, base_model.get_input_embeddings().num_embeddings
        self.answer, self.question = nn.Linear(d, vocabulary), nn.Linear(d, vocabulary)
        self._frozen = (ContextEncoder.from_config(base_model, hypernetwork.config),)
        self._right, self._scored, self._losses = 0, 0, []

    def forward(self, chunk_ids, chunk_mask, order, answer_ids: Tensor, question_ids: Tensor) -> dict[str, Tensor]:
        (encoder,) = self._frozen
        encoder.model.to(answer_ids.device)
        latents = []
        for ids, mask in zip(chunk_ids, chunk_mask, strict=True):
            taps: dict[str, Tensor] = {}
            self.hypernetwork(encoder.encode(ids, attention_mask=mask), attention_mask=mask, taps=taps)
            latents.append(taps["lora_emb"])
        rows = torch.cat(latents)[order].flatten(2, 3)  # [n, L, M * r, d]
        rows = F.normalize(rows, dim=-1) * rows.shape[-1] ** 0.5
        n_slots = min(rows.shape[2], answer_ids.shape[1])
        logits = self.answer(rows[:, :, :n_slots])  # [n, L, slots, vocabulary]
        targets = answer_ids[:, None, :n_slots].expand(logits.shape[:3])
        answer_loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=IGNORED)
        words = torch.zeros(len(rows), logits.shape[-1], device=rows.device)
        asked = question_ids != IGNORED
        place = asked.nonzero()[:, 0]
        words[place, question_ids[asked]] = 1.0
        words = words / words.sum(1, keepdim=True)
        question_loss = -(words[:, None] * self.question(rows.mean(2)).log_softmax(-1)).sum(-1).mean()
        scored = targets != IGNORED
        self._right += int(((logits.argmax(-1) == targets) & scored).sum())
        self._scored += int(scored.sum())
        self._losses.append((answer_loss.item(), question_loss.item()))
        return {"loss": answer_loss + question_loss}

    def report(self) -> dict[str, float]:
        """Since the last report: nats per answer token and per word of the question, share of answer tokens right."""
        answer, question = (sum(column) / len(column) for column in zip(*self._losses or [(0.0, 0.0)], strict=True))
        right = self._right / max(1, self._scored)
        self._right, self._scored, self._losses = 0, 0, []
        return {"loss": round(answer, 5), "question_loss": round(question, 5), "answer_tokens_right": round(right, 4)}


@torch.no_grad()
def start_linear(hypernetwork: Hypernetwork, base_model, tokenizer, seed: int, n_documents: int = 64) -> None:
    """Start the modality projection of a fresh hypernetwork as a linear map of whitened features.

    The published projection begins as a random quadratic function of the features (SwiGLU without a bias). Features
    have a common mean; with gates along it, every gate is open by nearly the same amount, and what the rest lets
    through is the features without their mean, all directions of like size. The encoder's features of `n_documents`
    documents of the world decide which directions these are.
    """
    encoder = ContextEncoder.from_config(base_model, hypernetwork.config)
    rng = random.Random(f"start/{seed}")
    generator = torch.Generator().manual_seed(seed)
    features = []
    for _ in range(n_documents):
        ids = torch.tensor(
            [context_ids(tokenizer, world.draw_document(rng, "train", 4).text)], device=base_model.device
        )
        features.append(encoder.encode(ids, attention_mask=torch.ones_like(ids)).flatten(0, -2).double().cpu())
    x = torch.cat(features)
    mean = x.mean(0)
    without_mean = torch.eye(len(mean), dtype=x.dtype) - torch.outer(mean, mean) / mean.dot(mean)
    centred = x @ without_mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    size = values.clamp_min(1e-2 * values.max()).rsqrt() * (values > 1e-4 * values.max())
    whiten = vectors * size @ vectors.T @ without_mean
    projection = hypernetwork.aggregator.perceiver.modality_projection
    (hidden, n_features), d = projection.gate_proj.weight.shape, projection.down_proj.out_features
    draw = {"generator": generator, "dtype": x.dtype}
    spread = torch.linalg.qr(torch.randn(hidden, n_features, **draw))[0]
    mix = torch.linalg.qr(torch.randn(max(n_features, d), min(n_features, d), **draw))[0]
    mix = mix if d > n_features else mix.T
    opening = torch.tensor(2.0, dtype=x.dtype)
    gates = opening * mean / mean.dot(mean)
    projection.gate_proj.weight.copy_(0.3 * projection.gate_proj.weight + gates.to(projection.gate_proj.weight))
    projection.up_proj.weight.copy_(spread @ whiten)
    projection.down_proj.weight.copy_(mix @ spread.T / F.silu(opening))


def train_readout(
    p: ReadoutPreset, base_model, hypernetwork: Hypernetwork, batches: ReadoutBatches, run: Path, seed: int, **options
) -> None:
    """Warm `hypernetwork` up in place, resumable in `run`; `options` go to `trainer.fit`."""
    torch.manual_seed(seed)
    step = Readout(base_model, hypernetwork)
    fit(
        step,
        batches,
        run,
        steps=p.steps,
        learning_rate=p.learning_rate,
        warmup_steps=p.warmup_steps,
        seed=seed,
        weight_decay=0.01,
        ddp_find_unused_parameters=True,  # those that only the blocks themselves need
        without_decay=[f"hypernetwork.{name}" for name in names_without_decay(hypernetwork)],
        **options,
    )
