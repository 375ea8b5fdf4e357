"""A warm-up for hypernetworks: what one sentence says must be readable from the latents that its block is made of.

    sentence -> context encoder -> hypernetwork's latents -> two linear readouts -> answer tokens, words of the question

Learning to answer starts slowly, because an answer's tokens are found one after another, each through the whole frozen
base model. Here no base model answers: row j of every layer has to give token j of the answer at once, and the mean of
the rows the words of the question (which subject, which relation: what a block has to be found by). The readouts are
thrown away afterwards; the hypernetwork stays as published.

`KeysAndValues` goes further, for documents of many facts: the rows of A and B themselves have to be keys that their own
question finds, and values that point to the answer's tokens.
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
from .base_model import ContextEncoder, decoder_body, decoder_layers, target_linears, without_lora
from .documents import context_ids, question_ids
from .hypernetwork import Hypernetwork
from .packing import IGNORED
from .presets import ReadoutPreset
from .trainer import chunk_batch, fit_step, pad_right

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
    its stop token, IGNORED behind it; question_ids [sentences, tokens] without chat wrapping, IGNORED behind it;
    input_ids [sentences, length], chat-formatted question and answer, in which the answer begins at starts [sentences].
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
        asked = question_ids(self.tokenizer, list(questions))
        batch = chunk_batch(chunks, [1] * len(chunks), self.tokenizer.pad_token_id)
        return {name: batch[name] for name in ("chunk_ids", "chunk_mask", "order")} | {
            "answer_ids": pad_right(answer_rows, IGNORED)[0],
            "question_ids": pad_right(self._plain_ids(questions), IGNORED)[0],
            "input_ids": pad_right(
                [q + a for q, a in zip(asked, answer_rows, strict=True)], self.tokenizer.pad_token_id
            )[0],
            "starts": torch.tensor([len(ids) for ids in asked]),
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

    def forward(
        self, chunk_ids, chunk_mask, order, answer_ids: Tensor, question_ids: Tensor, input_ids=None, starts=None
    ) -> dict[str, Tensor]:
        """See `ReadoutBatches`; input_ids and starts are not needed here."""
        (encoder,) = self._frozen
        encoder.model.to(answer_ids.device)
        latents = []
        for ids, mask in zip(chunk_ids, chunk_mask, strict=True):
            taps: dict[str, Tensor] = {}
            self.hypernetwork(encoder.encode(ids, attention_mask=mask), attention_mask=mask, taps=taps)
            latents.append(taps["lora_emb"])
        rows = torch.cat(latents)[order].flatten(2, 3)  # [n, L, M * r, d]
        rows = unit_rows(rows)
        n_slots = min(rows.shape[2], answer_ids.shape[1])
        logits = self.answer(rows[:, :, :n_slots])  # [n, L, slots, vocabulary]
        targets = answer_ids[:, None, :n_slots].expand(logits.shape[:3])
        answer_loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=IGNORED)
        words = word_shares(question_ids, logits.shape[-1])
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


# ----------------------------------------------------------------------------------------------------- keys and values
class KeysAndValues(nn.Module):
    """The warm-up step for many facts: row j of a block, s * B_j (A_j x), as a key A_j and a value B_j.

    Values: B_j points to the output embedding (behind the final norm's weights) of token j of the answer. Keys: with x,
    the input of the target linear in the base model without an adapter, A_j x is 1 where token j of the answer to the
    block's own question is predicted, and 0 at all other answer tokens of the batch, whosever they are. The words of
    the question are read from the latents as in `Readout`. There is no backward pass through the base model. For a
    hypernetwork with one target module that writes into the residual stream, as published.
    """

    def __init__(self, base_model, hypernetwork: Hypernetwork, sharpness: float = 20.0, key_gain: float = 10.0):
        super().__init__()
        config = hypernetwork.config
        (self.module,) = config.modules
        if config.d_out[self.module] != base_model.config.get_text_config().hidden_size:
            raise ValueError(f"{self.module} does not write into the residual stream: use down_proj or o_proj")
        self.hypernetwork, self.sharpness, self.key_gain = hypernetwork, sharpness, key_gain
        self.question = nn.Linear(config.latent_size, base_model.get_input_embeddings().num_embeddings)
        if hasattr(decoder_layers(base_model)[0], "post_feedforward_layernorm"):
            raise ValueError(
                "this model norms what its layers write (as Gemma does): a block's values are not what it adds"
            )
        embeddings = base_model.get_output_embeddings().weight.detach().float()
        directions = F.normalize(embeddings * decoder_body(base_model).norm.weight.detach().float(), dim=-1)
        self.register_buffer("directions", directions, persistent=False)
        self._frozen = (base_model, ContextEncoder.from_config(base_model, config))
        self.register_buffer("input_norms", torch.zeros(config.n_layers))  # of x, measured on the first batch
        self._sums, self._n = {}, 0

    def forward(
        self, chunk_ids, chunk_mask, order, answer_ids: Tensor, question_ids: Tensor, input_ids: Tensor, starts: Tensor
    ) -> dict[str, Tensor]:
        """See `ReadoutBatches`."""
        base_model, encoder = self._frozen
        base_model.to(answer_ids.device)
        directions = self.directions
        d_in = self.hypernetwork.config.d_in[self.module]
        latents, rows = [], []
        for ids, mask in zip(chunk_ids, chunk_mask, strict=True):
            taps: dict[str, Tensor] = {}
            self.hypernetwork(encoder.encode(ids, attention_mask=mask), attention_mask=mask, taps=taps)
            latents.append(taps["lora_emb"])
            rows.append(taps["flat_loras"])
        latents, rows = (torch.cat(parts)[order][:, :, 0] for parts in (latents, rows))  # [n, L, r, .]
        A, B = rows[..., :d_in], rows[..., d_in:]
        n_slots = min(rows.shape[2], answer_ids.shape[1])
        answer_ids = answer_ids[:, :n_slots]
        scored = answer_ids != IGNORED  # [n, slots]

        logits = self.sharpness * F.normalize(B[:, :, :n_slots], dim=-1) @ directions.T
        targets = answer_ids[:, None].expand(logits.shape[:3])
        value_loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=IGNORED)

        inputs = self._inputs(input_ids, starts, n_slots).to(A.dtype)  # [n, L, slots, d_in]
        if not self.input_norms.any():
            self.input_norms.copy_(inputs.norm(dim=-1).mean((0, 2)))
        inputs = (inputs / self.input_norms[:, None, None]).transpose(0, 1)[:, scored]  # [L, queries, d_in]
        keys = (self.key_gain * A[:, :, :n_slots]).transpose(0, 1)[:, scored]  # [L, keys, d_in]
        matches = keys @ inputs.transpose(1, 2)  # [L, keys, queries]
        own = matches.diagonal(dim1=1, dim2=2)
        others = matches.square().sum(1) - own.square()
        # the wrong matches of a key's query add up; they count as those of a document of a hundred rows
        key_loss = (1 - own).square().mean() + others.mean() * 100 / matches.shape[1]

        words = word_shares(question_ids, len(directions))
        read = self.question(unit_rows(latents).mean(2)).log_softmax(-1)
        question_loss = -(words[:, None] * read).sum(-1).mean()
        found = matches.sum(0).argmax(0) == torch.arange(matches.shape[1], device=matches.device)
        self._add(
            loss=value_loss, key_loss=key_loss, question_loss=question_loss, keys_found=found.float().mean(),
            values_right=((logits.argmax(-1) == targets) & scored[:, None]).sum() / scored.sum() / logits.shape[1],
        )  # fmt: skip
        return {"loss": value_loss + key_loss + question_loss}

    @torch.no_grad()
    def _inputs(self, input_ids: Tensor, starts: Tensor, n_slots: int) -> Tensor:
        """x of the target linears where answer token j is predicted: [n, L, slots, d_in]; starts [n] of the answers."""
        base_model = self._frozen[0]
        seen: list[Tensor] = []
        hooks = [
            linear.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
            for linear in target_linears(base_model, [self.module])[self.module]
        ]
        try:
            with without_lora(base_model):
                decoder_body(base_model)(input_ids=input_ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        places = starts[:, None] - 1 + torch.arange(n_slots, device=starts.device)
        places = places.clamp_max(input_ids.shape[1] - 1)
        rows = torch.arange(len(input_ids), device=starts.device)[:, None]
        return torch.stack([x[rows, places] for x in seen], dim=1)

    def _add(self, **values: Tensor) -> None:
        self._n += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.item()

    def report(self) -> dict[str, float]:
        """Means since the last report: the three losses, and the shares of values and keys that are right."""
        means = {name: round(total / max(1, self._n), 5) for name, total in self._sums.items()}
        self._sums, self._n = {}, 0
        return means


@torch.no_grad()
def set_scales(step: KeysAndValues, batch: dict, size: float = 0.4) -> None:
    """Let the blocks act: scaler_A so that an own key matches with about 1, scaler_B so that the value of one match is
    `size` times as large as the residual stream behind the last layer.
    """
    hypernetwork, (base_model, encoder) = step.hypernetwork, step._frozen
    batch = _to(batch, next(hypernetwork.parameters()).device)
    config, module = hypernetwork.config, step.module
    norms: list[Tensor] = []
    hook = decoder_body(base_model).norm.register_forward_pre_hook(
        lambda _, given: norms.append(given[0].norm(dim=-1).mean())
    )
    try:
        step(**batch)
    finally:
        hook.remove()
    taps: dict[str, Tensor] = {}
    ids, mask = batch["chunk_ids"][0], batch["chunk_mask"][0]
    hypernetwork(encoder.encode(ids, attention_mask=mask), attention_mask=mask, taps=taps)
    B = taps["flat_loras"][:, :, 0, :, config.d_in[module] :]
    lengths = B.norm(dim=-1).mean((0, 2))  # [L]
    hypernetwork.scaler_A[module][0, :, :, 0] = (step.key_gain / step.input_norms)[:, None]
    hypernetwork.scaler_B[module][0, :, :, 0] = (size * norms[-1] / (config.scale * lengths))[:, None]


def _to(batch: dict, device) -> dict:
    move = {True: lambda several: [one.to(device) for one in several], False: lambda one: one.to(device)}
    return {name: move[isinstance(value, list)](value) for name, value in batch.items()}


def unit_rows(latents: Tensor) -> Tensor:
    """Each latent scaled to a root mean square of 1."""
    return F.normalize(latents, dim=-1) * latents.shape[-1] ** 0.5


def word_shares(question_ids: Tensor, vocabulary: int) -> Tensor:
    """[n, vocabulary]: each different token of a question as likely as every other (see ReadoutBatches)."""
    words = torch.zeros(len(question_ids), vocabulary, device=question_ids.device)
    asked = question_ids != IGNORED
    words[asked.nonzero()[:, 0], question_ids[asked]] = 1.0
    return words / words.sum(1, keepdim=True)


def train_readout(
    p: ReadoutPreset, step: Readout | KeysAndValues, batches: ReadoutBatches, run: Path, seed: int, **options
) -> None:
    """Warm the hypernetwork of `step` up in place, resumable in `run`; `options` go to `trainer.fit`."""
    options = {"ddp_find_unused_parameters": True} | options  # only the blocks themselves need some of them
    fit_step(step, p, batches, run, seed, **options)
