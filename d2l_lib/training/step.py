"""Training: the tiny base model, then hypernetworks, on needles here and on questions in `distillation`.

The command is `d2l train` (see `command`); runs can be killed and go on (see `loop`).
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from d2l_lib.base_model import bundled_path, decoder_body, default_modules, final_norm, load_base_model, module_sizes
from d2l_lib.documents import chat_affixes, context_ids, question_ids, split_sentences, stop_ids
from d2l_lib.encoder import ContextEncoder, check_writes_residual, linear_inputs
from d2l_lib.engine import pad_rows
from d2l_lib.formats.checkpoints import save_checkpoint
from d2l_lib.formats.writing import PRETRAINED_FILES, FolderKind, atomic_folder
from d2l_lib.hypernetwork import Hypernetwork, HypernetworkConfig, Loras, combine
from d2l_lib.lora import apply_lora, hooked
from d2l_lib.presets import (
    NEEDLE_VARIANTS,
    DistillationPreset,
    HypernetworkPreset,
    NeedlePreset,
    Preset,
    TrainingPreset,
)
from d2l_lib.records import read_json, write_json, write_jsonl
from d2l_lib.tasks import needles
from d2l_lib.training import pretraining
from d2l_lib.training.batches import IGNORED, count_chunks, split_into_chunks
from d2l_lib.training.loop import (
    checkpoints,
    chunk_batch,
    fit,
    fit_step,
    is_first_process,
    own_device,
    read_log,
)
from d2l_lib.training.losses import (
    AnswerTokens,
    context_average,
    cross_entropy,
    distillation,
    find_answer_tokens,
    l1_penalty,
)
from d2l_lib.training.warm_up import Readout, ReadoutBatches, needle_sentences, start_linear, train_readout

HYPERNETWORK = "hypernetwork.json"
RECOMPUTED_TOKENS = 4096  # at a time, where activations are computed again in the backward pass


# ----------------------------------------------------------------------------------------------------- the base model
def train_base(p: Preset, run: Path, fast: bool = False, **options) -> None:
    """The tiny base model from nothing; tokenizer and weights end in `run`/final.

    `fast`: bfloat16 arithmetic on float32 weights, and compiled code; needs a C++ compiler.
    """
    sizes = p.base
    tokenizer = pretraining.build_tokenizer(sizes.vocab_size, sizes.window, sizes.seed)
    torch.manual_seed(sizes.seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            sizes.architecture,
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.n_layers,
            num_attention_heads=sizes.n_heads,
            num_key_value_heads=sizes.n_heads,
            head_dim=sizes.head_dim,
            intermediate_size=sizes.intermediate_size,
            max_position_embeddings=sizes.window,
            rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for stage, steps, rate in (
        ("first", sizes.steps, sizes.learning_rate),
        ("polish", sizes.polish_steps, sizes.polish_learning_rate),
    ):
        polish = stage == "polish"
        fit(
            pretraining.AnswerLoss(model.model, compiled=fast),
            pretraining.Curriculum(tokenizer, steps, sizes.batch_tokens, sizes.window, sizes.seed, polish),
            run / stage,
            steps=steps,
            learning_rate=rate,
            warmup_steps=sizes.warmup_steps,
            seed=sizes.seed,
            weight_decay=0.01,
            adam_beta2=0.98,
            bf16=fast,
            **options,
        )
    with atomic_folder(run / "final", _base_folder(model.config.to_dict())) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _base_folder(config: dict) -> FolderKind:
    """An earlier base model of these sizes, which a new one may replace."""
    sizes = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "head_dim")

    def recognise(folder: Path) -> list[str]:
        before = read_json(folder / "config.json")
        return PRETRAINED_FILES if all(before.get(name) == config.get(name) for name in sizes) else []

    return FolderKind("base model of these sizes", tuple(PRETRAINED_FILES), recognise)


# ------------------------------------------------------------------------------------------------------------ needles
class NeedleBatches(Dataset):
    """Batches of needle contexts, cut into chunks at sentence ends; item i is a function of (seed, i).

    Item: chunk_ids, chunk_mask, lists of [chunks, tokens] with chunks of like length together (see group_by_length),
    and `order` [chunks], which puts them back; n_chunks [contexts]; repeats [chunks] (how often a chunk counts, 1 for
    the needle's); input_ids, labels [contexts, length] of the question and the answer. Contexts grow from `shortest` to
    `longest` tokens in the first 30% of the run. Between 50% and 90% of it repeats grow from 1 to `max_repeats`, and
    `l1_share`, the weight of the L1 term, from 0 to 1: both are for filler, and L1 from the start delays the digits.
    In the second stage, `polish`, contexts are of all lengths, repeats of a context add up to between a sixteenth of
    and four times `max_repeats` (unless that is 1), and `l1_share` is 1. Without `gradual` contexts are of all lengths
    and `l1_share` is 1 from the start. A batch has `contexts` contexts, or fewer where the next one would exceed
    `input_tokens` or `context_tokens`. Chunks are written in the tokens and the chat format of `encoder_tokenizer`
    (None: the base model's).
    """

    def __init__(self, tokenizer, p: NeedlePreset, seed: int, polish: bool = False, encoder_tokenizer=None):
        if p.max_chunk_tokens is not None and p.max_repeats > 1:
            raise ValueError(
                "chunks cut at any token may cut the needle, so none can be repeated: set max_repeats to 1"
            )
        self.tokenizer, self.p, self.seed, self.polish = tokenizer, p, seed, polish
        self.encoder_tokenizer = tokenizer if encoder_tokenizer is None else encoder_tokenizer
        self.question = question_ids(tokenizer, needles.QUESTION)
        self.prefix, self.suffix = chat_affixes(self.encoder_tokenizer)
        self.stop = stop_ids(tokenizer)[-1]  # that of the chat template, where it has one of its own

    def __len__(self) -> int:
        return self.p.polish_steps if self.polish else self.p.steps

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        rng, p = random.Random(f"needle batches/{self.seed}/{'polish/' if self.polish else ''}{i}"), self.p
        progress = 1.0 if self.polish or not p.gradual else i / p.steps
        longest = p.shortest + round((p.longest - p.shortest) * min(1.0, 0.1 + progress / 0.3))
        growth = min(1.0, max(0.0, (progress - 0.5) / 0.4))
        least_repeats, most_repeats = 1.0, p.max_repeats**growth
        if self.polish and p.max_repeats > 1:
            least_repeats, most_repeats = p.max_repeats / 16, p.max_repeats * 4
        chunks: list[list[int]] = []
        n_chunks, repeats, rows = [], [], []
        for _ in range(p.contexts):
            length = rng.randint(p.shortest, longest)
            number = None if rng.random() < p.empty_share else needles.draw_number(rng, "train")
            haystack = needles.build_haystack(self.tokenizer, length, rng.random(), number)
            own, has_needle = self._chunks(rng, haystack, length)
            n_empty = len(own) - sum(has_needle)
            total = least_repeats * (most_repeats / least_repeats) ** rng.random()
            share = max(1.0, total / n_empty) if n_empty else 1.0
            answer = self.tokenizer(haystack.answer or pretraining.world.UNKNOWN, add_special_tokens=False)["input_ids"]
            row = self.question + answer + [self.stop]
            if rows and exceeds(p, chunks + own, [*rows, row]):
                break
            chunks += own
            rows.append(row)
            n_chunks.append(len(own))
            repeats += [1.0 if needle else share for needle in has_needle]
        input_ids, _ = pad_rows(rows, self.tokenizer.pad_token_id)
        begin = len(self.question)
        labels, _ = pad_rows([[IGNORED] * begin + row[begin:] for row in rows], IGNORED)
        return {
            **chunk_batch(chunks, n_chunks, self.encoder_tokenizer.pad_token_id),
            "repeats": torch.tensor(repeats),
            "l1_share": torch.tensor(growth),
            "input_ids": input_ids,
            "labels": labels,
        }

    def _chunks(self, rng: random.Random, haystack, length: int) -> tuple[list[list[int]], list[bool]]:
        """(the haystack's chunks in chat format, which of them holds the needle); none does where cuts lie anywhere."""
        p = self.p
        if p.max_chunk_tokens is not None:
            ids = context_ids(self.encoder_tokenizer, haystack.text)
            n = count_chunks(
                len(ids),
                p.max_chunk_tokens,
                min_length=p.min_chunk_tokens,
                probabilities=p.chunk_probabilities,
                rng=rng,
            )
            chunks = split_into_chunks(ids, n, self.prefix, self.suffix)
            return chunks, [False] * len(chunks)
        pieces = random_chunks(rng, haystack.text, length, p)
        ids = self.encoder_tokenizer(pieces, add_special_tokens=False)["input_ids"]
        has_needle = [haystack.needle_span is not None and needles.NEEDLE[:20] in piece for piece in pieces]
        return [self.prefix + piece + self.suffix for piece in ids], has_needle


def exceeds(p: TrainingPreset, chunks: list[list[int]], rows: list[list[int]]) -> bool:
    """Whether chunks, or questions with their answers, are more tokens than a batch may have."""
    limits = ((p.context_tokens, chunks), (p.input_tokens, rows))
    return any(limit is not None and sum(map(len, ids)) > limit for limit, ids in limits)


def random_chunks(rng: random.Random, text: str, length_tokens: int, p: NeedlePreset) -> list[str]:
    """`text` in a random number of pieces (published probabilities), cut at random sentence ends."""
    most = max(1, length_tokens // p.min_chunk_tokens)
    choices = {n: q for n, q in p.chunk_probabilities.items() if n <= most}
    n = rng.choices(list(choices), list(choices.values()))[0]
    sentences = split_sentences(text)
    slack = max(0, len(sentences) - n)
    cuts = (
        sorted(rng.sample(range(1, len(sentences)), min(n, len(sentences)) - 1)) if slack else range(1, len(sentences))
    )
    edges = [0, *(sentences[c][0] for c in cuts), len(text)]
    return [text[a:b].strip() for a, b in zip(edges, edges[1:], strict=False)]


def answer_logits(base_model, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, AnswerTokens, AnswerTokens]:
    """(logits [n, 1, vocabulary] from which the n answer tokens are predicted, the answer tokens in the batch, the
    same as places in these logits); no other logits are computed. input_ids, labels: [batch, length].
    """
    hidden = decoder_body(base_model)(input_ids=input_ids, use_cache=False).last_hidden_state
    answers = find_answer_tokens(labels)
    return _logits_at(base_model, hidden[answers.row, answers.position], answers)


def last_layer_logits(
    base_model, module: str, loras: Loras, scale: float, context: Tensor, input_ids: Tensor, labels: Tensor
) -> tuple[Tensor, AnswerTokens, AnswerTokens]:
    """`answer_logits` of a model in which only the last layer's `module` has an adapter, without a backward pass
    through the base model: what it adds goes straight to the final norm, and its inputs are those of the plain model.

    loras: {module: (A [contexts, 1, R, d_in], B [contexts, 1, R, d_out])}; context [batch]: which one a row has, in
    rising order. ValueError where the module does not write straight into the residual stream.
    """
    check_writes_residual(base_model, module)
    answers = find_answer_tokens(labels)
    streams: list[Tensor] = []
    with hooked(final_norm(base_model).register_forward_pre_hook, lambda _, given: streams.append(given[0])):
        x = linear_inputs(base_model, module, input_ids)[-1]
    x, stream = (of_batch[answers.row, answers.position] for of_batch in (x, streams[-1]))
    A, B = loras[module]
    counts = torch.bincount(context[answers.row], minlength=len(A)).tolist()
    added = torch.cat([x_c @ A[c, 0].T @ B[c, 0] for c, x_c in enumerate(x.split(counts))])
    return _logits_at(base_model, final_norm(base_model)(stream + scale * added), answers)


def _logits_at(base_model, hidden: Tensor, answers: AnswerTokens) -> tuple[Tensor, AnswerTokens, AnswerTokens]:
    """See `answer_logits`; hidden [n, d] are the normed states of the places that predict."""
    logits = base_model.get_output_embeddings()(hidden)
    if cap := getattr(base_model.config.get_text_config(), "final_logit_softcapping", None):  # Gemma-2
        logits = cap * torch.tanh(logits / cap)
    return logits[:, None], answers, places_among_answers(answers)


def places_among_answers(answers: AnswerTokens) -> AnswerTokens:
    """The answer tokens as places in logits [n, 1, vocabulary] that hold nothing else."""
    row = torch.arange(len(answers), device=answers.row.device)
    return replace(answers, row=row, position=torch.zeros_like(answers.position))


def n_real_tokens(labels: Tensor) -> int:
    """Tokens of questions and answers without padding; an answer ends its row."""
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return int(((labels != IGNORED) * places).amax(1).sum())


@contextmanager
def noisy_embeddings(model, strength: float, n_tokens: int) -> Iterator[None]:
    """Inside the `with` block embeddings of `model` have noise from -m to m on them, m = strength / sqrt(n_tokens * d).

    NEFTune (Jain et al. 2023) as published for this method: n_tokens counts all questions of the batch, as they would
    lie in one packed row. Nothing happens at strength 0.
    """

    def add_noise(_, given, output: Tensor) -> Tensor:
        most = strength / math.sqrt(n_tokens * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-most, most)

    with hooked(model.get_input_embeddings().register_forward_hook, add_noise) if strength else nullcontext():
        yield


class Internalization(nn.Module):
    """The training step of a hypernetwork: read chunks, write blocks, answer without the document.

    Cross-entropy on the answers, or, where a batch has the teacher's log-probabilities and `distil` is not False, the
    distillation loss; averaged per context, plus `l1` times the size of what is written. `last_layer`: only the last
    layer is written, which spares the pass through the base model (see `last_layer_logits`; one target module). Only
    the hypernetwork is a parameter of this module; the frozen base model, and the `encoder_model` that reads the chunks
    if that is another one, stay outside its state.

    `by_context`: losses are divided by the contexts of the whole step (num_items_in_batch of forward), not by those of
    the batch. `neftune`: see `noisy_embeddings`. `recompute`: hypernetwork and base model keep no activations, but
    compute them again in the backward pass, RECOMPUTED_TOKENS at a time; the numbers are the same.
    """

    def __init__(
        self,
        base_model,
        hypernetwork: Hypernetwork,
        l1: float,
        distil: bool = True,
        last_layer: bool = False,
        encoder_model=None,
        *,
        by_context: bool = False,
        neftune: float = 0.0,
        recompute: bool = False,
    ):
        super().__init__()
        self.hypernetwork, self.l1, self.distil = hypernetwork, l1, distil
        self.layer = hypernetwork.config.n_layers - 1 if last_layer else None
        self.accepts_loss_kwargs, self.neftune, self.recompute = by_context, neftune, recompute
        encoder_model = base_model if encoder_model is None else encoder_model
        self._frozen = (base_model, ContextEncoder.from_config(encoder_model, hypernetwork.config))
        self._losses, self._right, self._asked = [], 0, 0

    def forward(
        self, chunk_ids, chunk_mask, order, n_chunks, input_ids, labels, repeats=None, l1_share=1.0,
        n_questions=None, teacher_log_probs=None, teacher_indices=None, chunk_images=None, num_items_in_batch=None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """See `NeedleBatches` and `distillation.DistillationBatches`; without n_questions each context has one.

        chunk_images: for each of `chunk_ids`, what else the encoder reads, {} or the pixels of its images
        (`encoder.image_inputs` without input_ids and attention_mask).
        """
        base_model, encoder = self._frozen
        base_model.to(input_ids.device)
        encoder.model.to(input_ids.device)
        chunk_images = [{}] * len(chunk_ids) if chunk_images is None else chunk_images
        groups = [
            blocks
            for ids, mask, images in zip(chunk_ids, chunk_mask, chunk_images, strict=True)
            for blocks in self._write(encoder.encode(ids, attention_mask=mask, **images), mask)
        ]
        blocks = {
            m: tuple(torch.cat(parts)[order] for parts in zip(*(g[m] for g in groups), strict=True)) for m in groups[0]
        }
        config, bias = self.hypernetwork.config, self.hypernetwork.bias()
        if self.layer is not None and bias is not None:
            bias = {m: tuple(rows[self.layer, None] for rows in pair) for m, pair in bias.items()}
        loras = combine(blocks, bias, n_chunks, weights=repeats)
        n_questions = torch.ones_like(n_chunks) if n_questions is None else n_questions
        rows = torch.arange(len(n_chunks), device=n_chunks.device).repeat_interleave(n_questions)
        if self.layer is None:
            logits, answers, here = self._answer(base_model, loras, rows, input_ids, labels)
        else:
            (module,) = config.modules
            logits, answers, here = last_layer_logits(base_model, module, loras, config.scale, rows, input_ids, labels)
        if teacher_indices is None or not self.distil:
            per_token = cross_entropy(logits, here)
        else:
            per_token = distillation(logits, here, teacher_log_probs, teacher_indices)
        loss = context_average(per_token, answers, n_questions)
        total = loss
        if self.l1:
            # every block counts once here: the penalty is on what is written, not on how often it is repeated
            written = combine(blocks, bias, n_chunks)
            size = l1_penalty(written, n_chunks, config.rank, has_bias=bias is not None)
            total = loss + self.l1 * l1_share * size / len(n_chunks)
        if num_items_in_batch is not None:
            total = total * (len(n_chunks) / num_items_in_batch)
        wrong = torch.bincount(
            answers.row, weights=(logits[:, 0].argmax(-1) != answers.label).float(), minlength=len(labels)
        )
        self._right += int((wrong == 0).sum())
        self._asked += len(labels)
        self._losses.append(loss.item())
        return {"loss": total}

    def _write(self, features: Tensor, mask: Tensor) -> Iterator[Loras]:
        """The blocks of a group of chunks: in one piece, or in several whose activations are not kept."""
        if not self.recompute:
            yield self.hypernetwork(features, attention_mask=mask, layer=self.layer)
            return
        rows = max(1, RECOMPUTED_TOKENS // mask.shape[1])
        for features_piece, mask_piece in zip(features.split(rows), mask.split(rows), strict=True):
            options = {"attention_mask": mask_piece, "layer": self.layer}
            yield checkpoint(self.hypernetwork, features_piece, use_reentrant=False, **options)

    def _answer(self, base_model, loras: Loras, rows: Tensor, input_ids: Tensor, labels: Tensor):
        """`answer_logits` of the base model with these adapters, at once or in pieces."""

        strength = self.neftune if self.training else 0.0
        n_tokens = n_real_tokens(labels) if strength else 1

        def answer(rows: Tensor, input_ids: Tensor, labels: Tensor):
            adapted = apply_lora(base_model, loras, self.hypernetwork.config.scale, rows=rows)
            with noisy_embeddings(base_model, strength, n_tokens), adapted:
                return answer_logits(base_model, input_ids, labels)

        if not self.recompute:
            return answer(rows, input_ids, labels)
        size = max(1, RECOMPUTED_TOKENS // input_ids.shape[1])
        pieces = zip(rows.split(size), input_ids.split(size), labels.split(size), strict=True)
        logits = [checkpoint(lambda *piece: answer(*piece)[0], *piece, use_reentrant=False) for piece in pieces]
        answers = find_answer_tokens(labels)
        return torch.cat(logits), answers, places_among_answers(answers)

    def report(self) -> dict[str, float]:
        """Of the batches since the last report: nats per answer token, and exact match (every answer token right)."""
        loss = sum(self._losses) / max(1, len(self._losses))
        share = self._right / max(1, self._asked)
        self._losses, self._right, self._asked = [], 0, 0
        return {"loss": round(loss, 5), "exact_match": round(share, 4)}


def hypernetwork_config(
    p: HypernetworkPreset, base_model, base_name: str, encoder_model=None, encoder_name: str | None = None
) -> HypernetworkConfig:
    """The hypernetwork's sizes for this preset and base model; it writes the MLP down projections.

    encoder_model: the context encoder, loaded from encoder_name, where it is not the base model. With
    per_layer_activations it gives one hidden state for each layer of the base model, so it must have as many.
    """
    d_in, d_out = module_sizes(base_model, default_modules(base_model))
    n_layers = base_model.config.get_text_config().num_hidden_layers
    encoder_layer = p.encoder_layer
    if encoder_model is not None and p.encoder_type == "per_layer_activations" and encoder_layer is None:
        encoder_layer = n_layers
    encoder = ContextEncoder(base_model if encoder_model is None else encoder_model, p.encoder_type, encoder_layer)
    return HypernetworkConfig(
        n_layers=n_layers,
        d_in=d_in,
        d_out=d_out,
        feature_size=encoder.feature_size,
        latent_size=p.latent_size,
        rank=p.rank,
        encoder_type=p.encoder_type,
        encoder_layer=encoder_layer,
        use_bias=p.use_bias,
        n_latent_queries=p.n_latent_queries,
        n_blocks=p.n_blocks,
        n_heads=p.n_heads,
        n_kv_heads=p.n_kv_heads,
        head_dim=p.head_dim,
        per_layer_processing=True,
        base_model=base_name,
        encoder_model=encoder_name,
        encoder_4bit=getattr(p, "encoder_bits", None) == 4,
    )


def train_needle(
    p: NeedlePreset,
    base_model,
    tokenizer,
    run: Path,
    seed: int,
    base_name: str,
    stop_at: int | None = None,
    **options,
) -> Hypernetwork:
    """A hypernetwork for `base_model` trained on needles: the warm-up of `readout`, if `p` has one, then cross-entropy
    in two stages (see NeedleBatches).

    stop_at ends the first stage after the warm-up early, and with it this call; `options` go to `fit`.
    """
    torch.manual_seed(seed)
    hypernetwork = Hypernetwork(hypernetwork_config(p, base_model, base_name))
    if p.readout is not None:
        start_linear(hypernetwork, base_model, tokenizer, seed)
        sentences = ReadoutBatches(tokenizer, p.readout, seed, needle_sentences)
        torch.manual_seed(seed)
        warm_up = without_step_options(options)
        train_readout(p.readout, Readout(base_model, hypernetwork), sentences, run / "readout", seed, **warm_up)
    batches = NeedleBatches(tokenizer, p, seed)
    fit_hypernetwork(p, base_model, hypernetwork, batches, run, seed, stop_at=stop_at, **options)
    if p.polish_steps and stop_at is None:
        polish = replace(p, steps=p.polish_steps, learning_rate=p.polish_learning_rate)
        batches = NeedleBatches(tokenizer, p, seed, polish=True)
        fit_hypernetwork(polish, base_model, hypernetwork, batches, run / "polish", seed, **options)
    return hypernetwork


def without_step_options(options: dict) -> dict:
    """Of the options of `fit_hypernetwork` those that `fit` knows."""
    names = ("encoder_model", "recompute", "compiled", "save_every", "report_every")
    return {name: value for name, value in options.items() if name not in names}


def train_hypernetwork(
    p: NeedlePreset | DistillationPreset,
    base_model,
    batches: Dataset,
    run: Path,
    seed: int,
    base_name: str,
    encoder_model=None,
    encoder_name: str | None = None,
    **options,
) -> Hypernetwork:
    """A new hypernetwork for `base_model` trained on `batches`, resumable in `run`; `options` go to `fit`.

    encoder_model, encoder_name: see `hypernetwork_config`; the chunks in `batches` are in that model's tokens.
    """
    torch.manual_seed(seed)
    hypernetwork = Hypernetwork(hypernetwork_config(p, base_model, base_name, encoder_model, encoder_name))
    fit_hypernetwork(p, base_model, hypernetwork, batches, run, seed, encoder_model, **options)
    return hypernetwork


def fit_hypernetwork(
    p,
    base_model,
    hypernetwork: Hypernetwork,
    batches: Dataset,
    run: Path,
    seed: int,
    encoder_model=None,
    *,
    recompute: bool = False,
    compiled: bool = False,
    save_every: int | None = None,
    report_every: int | None = None,
    **options,
) -> None:
    """Train `hypernetwork` on `batches` in place, resumable in `run`; steps, rates and loss are those of `p`.

    What the hypernetwork is goes to `run`/hypernetwork.json, so that checkpoints can be read while the run goes on (see
    `watch`); ValueError where the run already has checkpoints of another one. encoder_model, recompute: see
    Internalization. `compiled`: torch.compile for the Perceiver; needs a compiler. save_every, report_every: in
    optimizer steps of `p`, in place of the save_steps and report_steps of `fit`, to which other `options` go.
    """
    for name, every in (("save_steps", save_every), ("report_steps", report_every)):
        if every is not None:
            options[name] = every * p.batches_per_step
    if compiled:
        hypernetwork.aggregator.perceiver.compile(dynamic=True)
    step = Internalization(
        base_model,
        hypernetwork,
        p.l1,
        getattr(p, "distil", True),
        getattr(p, "last_layer", False),
        encoder_model,
        by_context=getattr(p, "context_tokens", None) is not None or getattr(p, "input_tokens", None) is not None,
        neftune=getattr(p, "neftune", 0.0),
        recompute=recompute,
    )
    if is_first_process():
        _write_down(hypernetwork, run, getattr(p, "chunk_tokens", None))
    fit_step(step, p, batches, run, seed, **options)


def _write_down(hypernetwork: Hypernetwork, run: Path, chunk_tokens: int | None) -> None:
    """`run`/hypernetwork.json; ValueError where one of another hypernetwork is there, with checkpoints."""
    facts = {"hypernetwork": hypernetwork.config.to_dict(), "chunk_tokens": chunk_tokens}
    path = run / HYPERNETWORK
    if checkpoints(run) and path.exists() and read_json(path) != facts:
        raise ValueError(f"{run} has checkpoints of a hypernetwork of other sizes: choose another folder for this run")
    write_json(path, facts)


# ----------------------------------------------------------------------------------------------------- runs by command
def is_own_run(a: argparse.Namespace, p: Preset) -> bool:
    """Whether these options ask for something else than a bundled model."""
    return isinstance(p.base, str) or a.base is not None or a.steps is not None or bool(a.set)


def fit_options(a: argparse.Namespace) -> dict:
    """The options of the command `train` as `fit_hypernetwork` takes them."""
    return {
        "save_every": a.save_steps,
        "report_every": a.report_steps,
        "keep": a.keep or None,
        "bf16": torch.cuda.is_available() if a.bf16 is None else a.bf16,
        "recompute": a.recompute,
        "compiled": a.compile,
    }


def base_source(a: argparse.Namespace, p: Preset) -> str:
    """What the base model is found by, now and when the checkpoint is loaded: a folder in full."""
    source = a.base or p.base_source
    is_folder = Path(source).is_dir() and not (bundled_path(source) / "base_model").is_dir()
    return str(Path(source).resolve()) if is_folder else source


def settle_encoder(p):
    """`p` with the encoder that this machine can run: without a GPU, which one printed line says, none in 4 bits.

    ValueError where there is a GPU but not the package bitsandbytes.
    """
    if p.encoder_bits is None:
        return p
    if p.encoder_bits != 4:
        raise ValueError(f"encoder_bits is {p.encoder_bits}: 4, or None for the base model itself")
    if not torch.cuda.is_available():
        if is_first_process():
            print("no GPU: documents are read by the base model itself, not by a copy in 4-bit weights", flush=True)
        return replace(p, encoder_bits=None)
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "a 4-bit context encoder needs the package bitsandbytes: install it, or --set encoder_bits=None"
        )
    return p


def load_encoder(p: TrainingPreset, source: str):
    """The copy of the base model in 4-bit weights that reads documents for `p`, or None: the base model reads them."""
    return None if p.encoder_bits is None else load_base_model(source, device=own_device(), four_bit=True)[0]


def say_what_is_trained(p: TrainingPreset, base_name: str, run: Path) -> None:
    """One line, from the first process."""
    if is_first_process():
        steps = f"{p.steps // p.batches_per_step} steps of {p.batches_per_step} batches"
        print(f"{run}: a hypernetwork for {base_name}, {steps}", flush=True)


def remake_base(p: Preset, runs: Path, data: Path, fast: bool) -> None:
    """Train the base model and put it and its training log into `data`."""
    run = runs / p.name / "base"
    train_base(p, run, fast)
    if not is_first_process():
        return
    kind = _base_folder(read_json(run / "final" / "config.json"))
    with atomic_folder(data / p.name / "base_model", kind) as folder:
        shutil.copytree(run / "final", folder, dirs_exist_ok=True)
    log = [{"seed": p.base.seed, **line} for line in whole_log(run / "first", run / "polish")]
    write_jsonl(data / "full_runs" / "base_model_training.jsonl", log)


def whole_log(*stages: Path) -> list[dict]:
    """The training logs of stages that followed each other as one: steps and seconds count on."""
    lines: list[dict] = []
    for stage in stages:
        before = {name: lines[-1][name] if lines else 0 for name in ("step", "seconds")}
        later = read_log(stage / "log.jsonl")
        lines += [{**line, **{name: round(line[name] + start, 1) for name, start in before.items()}} for line in later]
    return lines


def remake_needle(p: Preset, runs: Path, data: Path, seed: int, variant: str) -> None:
    """Train a needle hypernetwork on the bundled base model; logs go to `data`, and the bundled one's weights too."""
    settings = replace(p.needle, **NEEDLE_VARIANTS[variant])
    name = f"needle_{variant}_seed{seed}"
    run = runs / p.name / name
    bundled = (seed, variant) == (p.needle.seed, "ours")
    final = data / p.name / "hypernetwork" if bundled else run / "final"
    make_needle(settings, p.name, run, seed, final, {"preset": p.name, "variant": variant})
    if not is_first_process():
        return
    facts = {"seed": seed, "variant": variant, "threads": torch.get_num_threads()}
    log = [facts | line for line in whole_log(run / "readout", run, run / "polish")]
    write_jsonl(data / "full_runs" / f"{name}_training.jsonl", log)


def make_needle(p: NeedlePreset, source: str, run: Path, seed: int, final: Path, meta: dict, **options) -> None:
    """Train a needle hypernetwork on the base model `source`, resumable in `run`, and save it as `final`."""
    base_model, tokenizer = load_base_model(source, device=own_device())
    if (encoder := load_encoder(p, source)) is not None:
        options["encoder_model"] = encoder
    hypernetwork = train_needle(p, base_model, tokenizer, run, seed, source, **options)
    if is_first_process():
        meta = meta | {"seed": seed, "chunk_tokens": p.chunk_tokens, "base_model": source}
        save_checkpoint(final, hypernetwork, meta)
