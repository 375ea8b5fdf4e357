"""The training step of a hypernetwork: from a batch to its loss.

    chunks --encoder, hypernetwork--> blocks --combine--> adapters
    questions --base model with these adapters--> logits --losses--> loss

`recipes` says which batches in which order, `loop` runs the steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from d2l_lib.base_model import decoder_body, final_norm
from d2l_lib.encoder import ContextEncoder, check_writes_residual, linear_inputs
from d2l_lib.hypernetwork import Hypernetwork, Loras, combine
from d2l_lib.lora import apply_lora, hooked
from d2l_lib.presets import TrainingPreset
from d2l_lib.training.batches import IGNORED, Batch
from d2l_lib.training.losses import (
    AnswerTokens,
    context_average,
    cross_entropy,
    distillation,
    find_answer_tokens,
    l1_penalty,
)
from d2l_lib.training.notes import Step

_RECOMPUTED_TOKENS = 4096  # per piece with recomputed activations


class Internalization(Step):
    """The loss {"loss": ...} of a `Batch`: read chunks, write blocks, answer without the document.

    Only the hypernetwork has parameters here; the frozen models stay outside this module's state.

    p: settings. With `p.by_context`, losses are divided by the contexts of the whole step, not of the batch.
    encoder_model: the model that reads the chunks (None: the base model).
    recompute: compute activations again in the backward pass, a few thousand tokens at a time; same numbers, less
        memory.
    """

    def __init__(
        self, base_model, hypernetwork: Hypernetwork, p: TrainingPreset, encoder_model=None, recompute: bool = False
    ):
        super().__init__()
        self.hypernetwork, self.p, self.recompute = hypernetwork, p, recompute
        self.accepts_loss_kwargs = p.by_context  # the Trainer's name
        self.layer = hypernetwork.config.n_layers - 1 if p.last_layer else None
        encoder_model = base_model if encoder_model is None else encoder_model
        self._frozen = (base_model, ContextEncoder.from_config(encoder_model, hypernetwork.config))

    def forward(self, batch: Batch, num_items_in_batch: Tensor | int | None = None) -> dict[str, Tensor]:
        """num_items_in_batch: contexts of the whole step, over all batches and processes (None: of this batch)."""
        for model in (self._frozen[0], self._frozen[1].model):
            model.to(batch.input_ids.device)
        blocks, bias = self._read(batch), self._bias()
        loras = combine(blocks, bias, batch.chunks.counts, weights=batch.repeats)
        logits, answers = self._answer(loras, batch)
        here = answers.among_answers()
        if batch.teacher_indices is None or not self.p.distil:
            per_token = cross_entropy(logits, here)
        else:
            per_token = distillation(logits, here, batch.teacher_log_probs, batch.teacher_indices)
        loss = context_average(per_token, answers, batch.n_questions)
        self._note(loss, logits, answers)
        if self.p.l1:
            loss = loss + self.p.l1 * batch.l1_share * self._size(blocks, bias, batch) / batch.n_contexts
        if num_items_in_batch is not None:
            loss = loss * (batch.n_contexts / num_items_in_batch)
        return {"loss": loss}

    def _read(self, batch: Batch) -> Loras:
        """The blocks of all chunks, in order."""
        encoder = self._frozen[1]
        groups = [
            blocks
            for ids, mask, images in batch.chunks.groups()
            for blocks in self._write(encoder.encode(ids, attention_mask=mask, **images), mask)
        ]
        order = batch.chunks.order
        return {
            m: tuple(torch.cat(parts)[order] for parts in zip(*(g[m] for g in groups), strict=True)) for m in groups[0]
        }

    def _write(self, features: Tensor, mask: Tensor) -> Iterator[Loras]:
        """The blocks of a group of chunks: in one piece, or in several with recomputed activations."""
        if not self.recompute:
            yield self.hypernetwork(features, attention_mask=mask, layer=self.layer)
            return
        rows = max(1, _RECOMPUTED_TOKENS // mask.shape[1])
        for features_piece, mask_piece in zip(features.split(rows), mask.split(rows), strict=True):
            options = {"attention_mask": mask_piece, "layer": self.layer}
            yield checkpoint(self.hypernetwork, features_piece, use_reentrant=False, **options)

    def _bias(self) -> Loras | None:
        """The block that every adapter has, restricted to the written layers."""
        bias = self.hypernetwork.bias()
        if self.layer is None or bias is None:
            return bias
        return {m: tuple(rows[self.layer, None] for rows in pair) for m, pair in bias.items()}

    def _answer(self, loras: Loras, batch: Batch) -> tuple[Tensor, AnswerTokens]:
        """(logits [n, 1, vocabulary] that predict the n answer tokens, the answer tokens), at once or in pieces."""
        base_model, scale = self._frozen[0], self.hypernetwork.config.scale
        n_questions, labels = batch.n_questions, batch.labels
        context = torch.arange(len(n_questions), device=n_questions.device).repeat_interleave(n_questions)
        if self.layer is not None:
            (module,) = self.hypernetwork.config.modules
            return _last_layer_logits(base_model, _LastLayer(module, *loras[module], scale), context, batch)
        strength = self.p.neftune if self.training else 0.0
        n_tokens = _n_real_tokens(labels) if strength else 1

        def answer(context: Tensor, input_ids: Tensor, labels: Tensor):
            adapted = apply_lora(base_model, loras, scale, rows=context)
            with _noisy_embeddings(base_model, strength, n_tokens), adapted:
                return answer_logits(base_model, input_ids, labels)

        if not self.recompute:
            return answer(context, batch.input_ids, labels)
        size = max(1, _RECOMPUTED_TOKENS // labels.shape[1])
        pieces = zip(context.split(size), batch.input_ids.split(size), labels.split(size), strict=True)
        logits = [checkpoint(lambda *piece: answer(*piece)[0], *piece, use_reentrant=False) for piece in pieces]
        return torch.cat(logits), find_answer_tokens(labels)

    def _size(self, blocks: Loras, bias: Loras | None, batch: Batch) -> Tensor:
        """The L1 term of the written blocks; each counts once, without its repeats."""
        counts = batch.chunks.counts
        written = combine(blocks, bias, counts)
        return l1_penalty(written, counts, self.hypernetwork.config.rank, has_bias=bias is not None)

    def _note(self, loss: Tensor, logits: Tensor, answers: AnswerTokens) -> Tensor:
        """Notes the loss and exact match (every answer token right); [questions], True where right."""
        wrong = torch.bincount(
            answers.row, weights=(logits[:, 0].argmax(-1) != answers.label).float(), minlength=answers.n_questions
        )
        self.notes.add("loss", loss.item())
        self.notes.add("exact_match", int((wrong == 0).sum()), answers.n_questions)
        return wrong == 0


# ------------------------------------------------------------------------------------------- logits of answer tokens
def answer_logits(
    base_model, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, AnswerTokens]:
    """(logits [n, 1, vocabulary] that predict the n answer tokens, the answer tokens in the batch).

    No other logits are computed; `AnswerTokens.among_answers` gives the places in these. input_ids and labels are
    [questions, length]. attention_mask: 0 at padding on the left (None: there is none).
    """
    body = decoder_body(base_model)
    hidden = body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    answers = find_answer_tokens(labels)
    return logits_of(base_model, hidden[answers.row, answers.position]), answers


@dataclass(frozen=True)
class _LastLayer:
    """The adapters of the last layer's `module`: A [contexts, 1, R, d_in], B [contexts, 1, R, d_out]."""

    module: str
    A: Tensor
    B: Tensor
    scale: float


def _last_layer_logits(base_model, loras: _LastLayer, context: Tensor, batch: Batch) -> tuple[Tensor, AnswerTokens]:
    """`answer_logits` of a model with adapters in the last layer only, without a backward pass through the model.

    The module's inputs are those of the plain model, and what it adds to the residual stream goes straight to the final
    norm.

    context: [questions], the adapter of each, in rising order.

    ValueError if the module does not write straight into the residual stream.
    """
    check_writes_residual(base_model, loras.module)
    answers = find_answer_tokens(batch.labels)
    streams: list[Tensor] = []
    with hooked(final_norm(base_model).register_forward_pre_hook, lambda _, inputs: streams.append(inputs[0])):
        x = linear_inputs(base_model, loras.module, batch.input_ids)[-1]
    x, stream = (of_batch[answers.row, answers.position] for of_batch in (x, streams[-1]))
    counts = torch.bincount(context[answers.row], minlength=len(loras.A)).tolist()
    pieces = zip(x.split(counts), loras.A[:, 0], loras.B[:, 0], strict=True)
    added = torch.cat([x_c @ A.T @ B for x_c, A, B in pieces])
    return logits_of(base_model, final_norm(base_model)(stream + loras.scale * added)), answers


def logits_of(base_model, hidden: Tensor) -> Tensor:
    """Logits [n, 1, vocabulary]; hidden [n, d] holds the normed states of the predicting positions."""
    logits = base_model.get_output_embeddings()(hidden)
    if cap := getattr(base_model.config.get_text_config(), "final_logit_softcapping", None):  # Gemma-2
        logits = cap * torch.tanh(logits / cap)
    return logits[:, None]


def _n_real_tokens(labels: Tensor) -> int:
    """Tokens of questions and answers without padding; an answer ends its row."""
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return int(((labels != IGNORED) * places).amax(1).sum())


@contextmanager
def _noisy_embeddings(model, strength: float, n_tokens: int) -> Iterator[None]:
    """Inside the `with` block embeddings of `model` get uniform noise in [-m, m], m = strength / sqrt(n_tokens * d).

    NEFTune (Jain et al. 2023) as published for this method: n_tokens counts all questions of the batch, as in one
    packed row. Strength 0 adds nothing.
    """

    def add_noise(_, inputs, output: Tensor) -> Tensor:
        most = strength / math.sqrt(n_tokens * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-most, most)

    with hooked(model.get_input_embeddings().register_forward_hook, add_noise) if strength else nullcontext():
        yield
