"""Training: the tiny base model, then hypernetworks, on needles here and on questions in `distillation`.

    python -m d2l_lib.training --preset tiny                     # everything that is bundled, from nothing
    python -m d2l_lib.training --preset tiny --stage needle --seed 1

Runs can be killed and go on (see `trainer`).
"""

from __future__ import annotations

import argparse
import random
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from . import needles, pretraining
from .base_model import (
    ContextEncoder,
    check_writes_residual,
    decoder_body,
    default_modules,
    final_norm,
    linear_inputs,
    load_base_model,
    module_sizes,
)
from .checkpoints import save_checkpoint
from .documents import chat_affixes, question_ids, split_sentences
from .hypernetwork import Hypernetwork, HypernetworkConfig, Loras, combine
from .lora import apply_lora
from .losses import AnswerTokens, context_average, cross_entropy, distillation, find_answer_tokens, l1_penalty
from .packing import IGNORED
from .presets import NEEDLE_VARIANTS, DistillationPreset, HypernetworkPreset, NeedlePreset, Preset, preset
from .readout import (
    Readout,
    ReadoutBatches,
    needle_sentences,
    start_linear,
    train_readout,
)
from .records import atomic_folder, read_jsonl, write_jsonl
from .trainer import chunk_batch, fit, fit_step, is_first_process, pad_right


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
    model.save_pretrained(run / "final")
    tokenizer.save_pretrained(run / "final")


# ------------------------------------------------------------------------------------------------------------ needles
class NeedleBatches(Dataset):
    """Batches of needle contexts, cut into chunks at sentence ends; item i is a function of (seed, i).

    Item: chunk_ids, chunk_mask, lists of [chunks, tokens] with chunks of like length together (see group_by_length),
    and `order` [chunks], which puts them back; n_chunks [contexts]; repeats [chunks] (how often a chunk counts, 1 for
    the needle's); input_ids, labels [contexts, length] of the question and the answer. Contexts grow from `shortest` to
    `longest` tokens in the first 30% of the run. Between 50% and 90% of it repeats grow from 1 to `max_repeats`, and
    `l1_share`, the weight of the L1 term, from 0 to 1: both are for filler, and L1 from the start delays the digits.
    In the second stage, `polish`, contexts are of all lengths, repeats of a context add up to between a sixteenth of
    and four times `max_repeats` (unless that is 1), and `l1_share` is 1. Chunks are written in the tokens and the chat
    format of `encoder_tokenizer` (None: the base model's).
    """

    def __init__(self, tokenizer, p: NeedlePreset, seed: int, polish: bool = False, encoder_tokenizer=None):
        self.tokenizer, self.p, self.seed, self.polish = tokenizer, p, seed, polish
        self.encoder_tokenizer = tokenizer if encoder_tokenizer is None else encoder_tokenizer
        self.question = question_ids(tokenizer, needles.QUESTION)
        self.prefix, self.suffix = chat_affixes(self.encoder_tokenizer)

    def __len__(self) -> int:
        return self.p.polish_steps if self.polish else self.p.steps

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        rng, p = random.Random(f"needle batches/{self.seed}/{'polish/' if self.polish else ''}{i}"), self.p
        progress = 1.0 if self.polish else i / p.steps
        longest = p.shortest + round((p.longest - p.shortest) * min(1.0, 0.1 + progress / 0.3))
        growth = min(1.0, max(0.0, (progress - 0.5) / 0.4))
        least_repeats, most_repeats = 1.0, p.max_repeats**growth
        if self.polish and p.max_repeats > 1:
            least_repeats, most_repeats = p.max_repeats / 16, p.max_repeats * 4
        chunks: list[list[int]] = []
        n_chunks, repeats, rows, answers = [], [], [], []
        for _ in range(p.contexts):
            length = rng.randint(p.shortest, longest)
            number = None if rng.random() < p.empty_share else needles.draw_number(rng, "train")
            haystack = needles.build_haystack(self.tokenizer, length, rng.random(), number)
            pieces = random_chunks(rng, haystack.text, length, p)
            has_needle = [haystack.needle_span is not None and needles.NEEDLE[:20] in piece for piece in pieces]
            n_empty = len(pieces) - sum(has_needle)
            total = least_repeats * (most_repeats / least_repeats) ** rng.random()
            share = max(1.0, total / n_empty) if n_empty else 1.0
            repeats += [1.0 if needle else share for needle in has_needle]
            ids = self.encoder_tokenizer(pieces, add_special_tokens=False)["input_ids"]
            chunks += [self.prefix + piece + self.suffix for piece in ids]
            n_chunks.append(len(pieces))
            answers.append(haystack.answer or pretraining.world.UNKNOWN)
        for answer in answers:
            rows.append(self.tokenizer(answer, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id])
        input_ids, _ = pad_right([self.question + row for row in rows], self.tokenizer.pad_token_id)
        labels, _ = pad_right([[IGNORED] * len(self.question) + row for row in rows], IGNORED)
        return {
            **chunk_batch(chunks, n_chunks, self.encoder_tokenizer.pad_token_id),
            "repeats": torch.tensor(repeats),
            "l1_share": torch.tensor(growth),
            "input_ids": input_ids,
            "labels": labels,
        }


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
    hook = final_norm(base_model).register_forward_pre_hook(lambda _, given: streams.append(given[0]))
    try:
        x = linear_inputs(base_model, module, input_ids)[-1]
    finally:
        hook.remove()
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
    row = torch.arange(len(answers), device=hidden.device)
    return logits[:, None], answers, replace(answers, row=row, position=torch.zeros_like(answers.position))


class Internalization(nn.Module):
    """The training step of a hypernetwork: read chunks, write blocks, answer without the document.

    Cross-entropy on the answers, or, where a batch has the teacher's log-probabilities and `distil` is not False, the
    distillation loss; averaged per context, plus `l1` times the size of what is written. `last_layer`: only the last
    layer is written, which spares the pass through the base model (see `last_layer_logits`; one target module). Only
    the hypernetwork is a parameter of this module; the frozen base model, and the `encoder_model` that reads the chunks
    if that is another one, stay outside its state.
    """

    def __init__(
        self,
        base_model,
        hypernetwork: Hypernetwork,
        l1: float,
        distil: bool = True,
        last_layer: bool = False,
        encoder_model=None,
    ):
        super().__init__()
        self.hypernetwork, self.l1, self.distil = hypernetwork, l1, distil
        self.layer = hypernetwork.config.n_layers - 1 if last_layer else None
        encoder_model = base_model if encoder_model is None else encoder_model
        self._frozen = (base_model, ContextEncoder.from_config(encoder_model, hypernetwork.config))
        self._losses, self._right, self._asked = [], 0, 0

    def forward(
        self, chunk_ids, chunk_mask, order, n_chunks, input_ids, labels, repeats=None, l1_share=1.0,
        n_questions=None, teacher_log_probs=None, teacher_indices=None, chunk_images=None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """See `NeedleBatches` and `distillation.DistillationBatches`; without n_questions each context has one.

        chunk_images: for each of `chunk_ids`, what else the encoder reads, {} or the pixels of its images
        (`images.image_inputs` without input_ids and attention_mask).
        """
        base_model, encoder = self._frozen
        base_model.to(input_ids.device)
        encoder.model.to(input_ids.device)
        chunk_images = [{}] * len(chunk_ids) if chunk_images is None else chunk_images
        groups = [
            self.hypernetwork(encoder.encode(ids, attention_mask=mask, **images), attention_mask=mask, layer=self.layer)
            for ids, mask, images in zip(chunk_ids, chunk_mask, chunk_images, strict=True)
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
            with apply_lora(base_model, loras, config.scale, rows=rows):
                logits, answers, here = answer_logits(base_model, input_ids, labels)
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
        wrong = torch.bincount(
            answers.row, weights=(logits[:, 0].argmax(-1) != answers.label).float(), minlength=len(labels)
        )
        self._right += int((wrong == 0).sum())
        self._asked += len(labels)
        self._losses.append(loss.item())
        return {"loss": total}

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
        train_readout(p.readout, Readout(base_model, hypernetwork), sentences, run / "readout", seed, **options)
    batches = NeedleBatches(tokenizer, p, seed)
    fit_hypernetwork(p, base_model, hypernetwork, batches, run, seed, stop_at=stop_at, **options)
    if p.polish_steps and stop_at is None:
        polish = replace(p, steps=p.polish_steps, learning_rate=p.polish_learning_rate)
        batches = NeedleBatches(tokenizer, p, seed, polish=True)
        fit_hypernetwork(polish, base_model, hypernetwork, batches, run / "polish", seed, **options)
    return hypernetwork


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
    p, base_model, hypernetwork: Hypernetwork, batches: Dataset, run: Path, seed: int, encoder_model=None, **options
) -> None:
    """Train `hypernetwork` on `batches` in place, resumable in `run`; steps, rates and loss are those of `p`."""
    distil, last_layer = getattr(p, "distil", True), getattr(p, "last_layer", False)
    step = Internalization(base_model, hypernetwork, p.l1, distil, last_layer, encoder_model)
    fit_step(step, p, batches, run, seed, **options)


# -------------------------------------------------------------------------------------------------------- the command
def remake_base(p: Preset, runs: Path, data: Path, fast: bool) -> None:
    """Train the base model and put it and its training log into `data`."""
    run = runs / p.name / "base"
    train_base(p, run, fast)
    if not is_first_process():
        return
    with atomic_folder(data / p.name / "base_model") as folder:
        shutil.copytree(run / "final", folder, dirs_exist_ok=True)
    log = [{"seed": p.base.seed, **line} for line in whole_log(run / "first", run / "polish")]
    write_jsonl(data / "full_runs" / "base_model_training.jsonl", log)


def whole_log(*stages: Path) -> list[dict]:
    """The training logs of stages that followed each other as one: steps and seconds count on."""
    lines: list[dict] = []
    for stage in stages:
        before = {name: lines[-1][name] if lines else 0 for name in ("step", "seconds")}
        later = read_jsonl(stage / "log.jsonl") if (stage / "log.jsonl").exists() else []
        lines += [{**line, **{name: round(line[name] + start, 1) for name, start in before.items()}} for line in later]
    return lines


def remake_needle(p: Preset, runs: Path, data: Path, seed: int, variant: str) -> None:
    """Train a needle hypernetwork on the bundled base model; logs go to `data`, and the bundled one's weights too."""
    settings = replace(p.needle, **NEEDLE_VARIANTS[variant])
    name = f"needle_{variant}_seed{seed}"
    base_model, tokenizer = load_base_model(p.name)
    hypernetwork = train_needle(settings, base_model, tokenizer, runs / p.name / name, seed, p.name)
    if not is_first_process():
        return
    meta = {
        "preset": p.name,
        "variant": variant,
        "seed": seed,
        "chunk_tokens": settings.chunk_tokens,
        "base_model": p.name,
    }
    bundled = (seed, variant) == (p.needle.seed, "ours")
    save_checkpoint(data / p.name / "hypernetwork" if bundled else runs / p.name / name / "final", hypernetwork, meta)
    run = runs / p.name / name
    facts = {"seed": seed, "variant": variant, "threads": torch.get_num_threads()}
    log = [facts | line for line in whole_log(run / "readout", run, run / "polish")]
    write_jsonl(data / "full_runs" / f"{name}_training.jsonl", log)


def main() -> None:
    """Remake what is bundled: the base model, then the needle hypernetwork. Interrupted runs go on where they were."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--stage", choices=("all", "base", "needle"), default="all")
    parser.add_argument(
        "--seed", type=int, help="of the needle hypernetwork; the preset's own seed makes the bundled one"
    )
    parser.add_argument("--variant", choices=sorted(NEEDLE_VARIANTS), default="ours", help="of the needle training")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="bfloat16 and compiled code for the base model: needs a C++ compiler; twice as fast on a CPU with AMX",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="checkpoints of runs in progress")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where finished models and logs go")
    a = parser.parse_args()
    p = preset(a.preset)
    if a.stage != "needle":
        remake_base(p, a.runs, a.data, a.fast)
    if a.stage != "base":
        remake_needle(p, a.runs, a.data, p.needle.seed if a.seed is None else a.seed, a.variant)


if __name__ == "__main__":
    main()
