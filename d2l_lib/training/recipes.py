"""The recipes: which data train what, in which order.

    _train_base     the tiny base model, from nothing: `pretraining.Curriculum` in two stages
    train_needle    warm-up on single sentences, then haystacks with a needle in two stages
    train_rows      the hypernetwork that writes token rows, on questions about passages (see `token_rows`)
    train_reading   a trained hypernetwork with sparse reading switched on (see `reading`)
    train_qa        warm-up on single sentences (`warm_up.KeysAndValues`); documents of the world, first with the last
                    layer alone: many facts side by side; self-generated shards

The last stage is the paper's main stage: the student sees the question alone, and learns from the teacher's answers and
their top-16 log-probabilities in `selfgen` or published shards.

`remake_...` train what is bundled, `own_...` train for a base model of one's own. The command is `d2l train` (see
`command`). Runs can be killed and continue.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from d2l_lib.base_model import Fingerprint, default_modules, load_base_model, module_sizes
from d2l_lib.documents import question_ids
from d2l_lib.encoder import ContextEncoder, check_writes_residual
from d2l_lib.formats.checkpoints import load_checkpoint, save_checkpoint
from d2l_lib.formats.shards import find_shards, read_shards
from d2l_lib.formats.writing import PRETRAINED_FILES, FolderKind, atomic_folder
from d2l_lib.hypernetwork import Hypernetwork, HypernetworkConfig
from d2l_lib.loading import find_checkpoint, load
from d2l_lib.pooled_rows import PooledRows
from d2l_lib.presets import (
    NEEDLE_VARIANTS,
    SHARD_STAGES,
    HypernetworkPreset,
    NeedlePreset,
    Preset,
    PublishedPreset,
    QAPreset,
    ReadingPreset,
    RowsPreset,
    TrainingPreset,
    WarmUpPreset,
)
from d2l_lib.records import project_root, read_json, read_rows, write_json, write_jsonl
from d2l_lib.row_reader import reader_sizes
from d2l_lib.token_rows import ROLES, TokenRows
from d2l_lib.training import pretraining
from d2l_lib.training.contexts import DistillationBatches, NeedleBatches, WorldDocuments
from d2l_lib.training.loop import Run, checkpoints, fit, read_log
from d2l_lib.training.processes import is_first_process, own_device, processes
from d2l_lib.training.published import PassageBatches, PublishedStep, few_of
from d2l_lib.training.reading import ReadingBatches, ReadingStep, with_null_block
from d2l_lib.training.row_features import (
    PER_FILE,
    Features,
    Limits,
    Prompt,
    facts_of,
    never_learned,
    passages_of,
    read_features,
    streams_below,
    streams_higher,
    write_features,
)
from d2l_lib.training.step import Internalization
from d2l_lib.training.token_rows import RowsBatches, RowsStep, validation_batches
from d2l_lib.training.warm_up import (
    KeysAndValues,
    Readout,
    ReadoutBatches,
    fact_sentences,
    fit_scalers,
    key_whitening,
    needle_sentences,
    spread_to_all_layers,
    start_linear,
    train_readout,
    unwhiten_keys,
    whiten_keys,
)

_UNRELATED = Path("data") / "unrelated_prompts.jsonl"
_UNSEEN = 5  # every fifth of these prompts is never learned

HYPERNETWORK = "hypernetwork.json"
_LEAVING_OUT = {"ddp_find_unused_parameters": True}  # of several processes: some batches use not all parameters


# ----------------------------------------------------------------------------------------------------- the base model
def _train_base(p: Preset, run: Run, fast: bool = False) -> None:
    """Train the tiny base model into `run.folder`/final; fast: bfloat16 and compiled code (needs a C++ compiler)."""
    sizes = p.base
    tokenizer = pretraining.build_tokenizer(sizes.vocab_size, sizes.window, run.seed)
    torch.manual_seed(run.seed)
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
    for stage, schedule in {"first": sizes, "polish": sizes.polish}.items():
        step = pretraining.AnswerLoss(model.model, compiled=fast)
        limits = (schedule.steps, sizes.batch_tokens, sizes.window)
        batches = pretraining.Curriculum(tokenizer, *limits, run.seed, polish=stage == "polish")
        fit(step, batches, schedule, run.stage(stage, bf16=fast))
    with atomic_folder(run.folder / "final", _base_folder(model.config.to_dict())) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _base_folder(config: dict) -> FolderKind:
    """What a new base model may replace: an earlier one of these sizes."""
    sizes = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "head_dim")

    def recognise(folder: Path) -> list[str]:
        before = read_json(folder / "config.json")
        return PRETRAINED_FILES if all(before.get(name) == config.get(name) for name in sizes) else []

    return FolderKind("base model of these sizes", tuple(PRETRAINED_FILES), recognise)


# ----------------------------------------------------------------------------------------------------- hypernetworks
@dataclass(frozen=True)
class Base:
    """The frozen base model that a hypernetwork is trained for.

    name: the source from which `d2l.load` takes it later.
    encoder: the model that reads the documents (None: the base model).
    encoder_name: the source of an encoder other than the base model; chunks are then in its tokens.
    """

    model: torch.nn.Module
    tokenizer: object
    name: str
    encoder: torch.nn.Module | None = None
    encoder_name: str | None = None

    @classmethod
    def load(cls, source: str, p: TrainingPreset) -> Base:
        """The base model `source`; with `p.encoder_bits`, also a copy in 4-bit weights that reads documents."""
        model, tokenizer = load_base_model(source, device=own_device())
        return cls(model, tokenizer, source, load_encoder(p, source))


def hypernetwork_config(
    p: HypernetworkPreset, base_model, base_name: str, encoder_model=None, encoder_name: str | None = None
) -> HypernetworkConfig:
    """The hypernetwork's sizes for this preset and base model; it writes the MLP down projections.

    encoder_model, encoder_name: the context encoder and its source, if it is not the base model. With
        per_layer_activations it needs as many layers as the base model: one hidden state for each.
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
        encoder_4bit=p.encoder_bits == 4,
    )


def _new_hypernetwork(p: HypernetworkPreset, base: Base, seed: int) -> Hypernetwork:
    """A fresh hypernetwork of these sizes, a function of the seed."""
    encoder = None if base.encoder_name is None else base.encoder  # a copy of the base model has no name of its own
    torch.manual_seed(seed)
    return Hypernetwork(hypernetwork_config(p, base.model, base.name, encoder, base.encoder_name))


def train_hypernetwork(p: TrainingPreset, base: Base, batches: Dataset, run: Run) -> Hypernetwork:
    """A new hypernetwork for the base model, trained on `batches`."""
    hypernetwork = _new_hypernetwork(p, base, run.seed)
    fit_hypernetwork(p, base, hypernetwork, batches, run)
    return hypernetwork


def fit_hypernetwork(p: TrainingPreset, base: Base, hypernetwork: Hypernetwork, batches: Dataset, run: Run) -> None:
    """Train `hypernetwork` on `batches` in place, resumable; steps, rates and loss are those of `p`.

    Its configuration goes to `run.folder`/hypernetwork.json, so that `studies.watch` can load checkpoints during the
    run. ValueError if the run already has checkpoints of another hypernetwork.
    """
    if run.compiled:
        hypernetwork.aggregator.perceiver.compile(dynamic=True)
    step = Internalization(base.model, hypernetwork, p, base.encoder, run.recompute)
    if is_first_process():
        _write_down(hypernetwork, run.folder, p.chunk_tokens)
    fit(step, batches, p, run)


def _write_down(hypernetwork: Hypernetwork, folder: Path, chunk_tokens: int) -> None:
    """Write `folder`/hypernetwork.json; ValueError if it describes another hypernetwork that has checkpoints there."""
    facts = {"hypernetwork": hypernetwork.config.to_dict(), "chunk_tokens": chunk_tokens}
    path = folder / HYPERNETWORK
    if checkpoints(folder) and path.exists() and read_json(path) != facts:
        raise ValueError(
            f"{folder} has checkpoints of a hypernetwork of other sizes: choose another folder for this run"
        )
    write_json(path, facts)


def train_needle(p: NeedlePreset, base: Base, run: Run) -> Hypernetwork:
    """A hypernetwork trained on needles: the warm-up, if `p` has one, then two stages (see `NeedleBatches`).

    run.stop_at ends the call early, after so many steps of the first stage.
    """
    hypernetwork = _new_hypernetwork(p, base, run.seed)
    if p.readout is not None:
        start_linear(hypernetwork, base.model, base.tokenizer, run.seed)
        sentences = ReadoutBatches(base.tokenizer, p.readout, run.seed, needle_sentences)
        torch.manual_seed(run.seed)
        train_readout(p.readout, Readout(base.model, hypernetwork), sentences, run.stage("readout", stop_at=None))
    fit_hypernetwork(p, base, hypernetwork, NeedleBatches(base.tokenizer, p, run.seed), run)
    if p.polish_steps and run.stop_at is None:
        batches = NeedleBatches(base.tokenizer, p, run.seed, polish=True)
        fit_hypernetwork(p.polish, base, hypernetwork, batches, run.stage("polish"))
    return hypernetwork


def train_qa(p: QAPreset, base: Base, run: Run, shards: str | Path | Sequence | None = None) -> Hypernetwork:
    """A question-answering hypernetwork trained in the stages of `p`, each resumable in a folder of its own.

    shards: a finished folder of `selfgen`, or data sets of `read_shards`; None skips the stages that need them.
    """
    hypernetwork = _new_hypernetwork(p.first, base, run.seed)
    if p.readout is not None:
        start_linear(hypernetwork, base.model, base.tokenizer, run.seed)
        sentences = ReadoutBatches(base.tokenizer, p.readout, run.seed)
        (module,) = hypernetwork.config.modules
        whitening = key_whitening(base.model, module, sentences, directions=p.readout.whiten)
        warm_up = KeysAndValues(base.model, hypernetwork, whitening, last_layer=p.first.last_layer)
        train_readout(p.readout, warm_up, sentences, run.stage("readout"))
        fit_scalers(warm_up, sentences[0])
    only_last = p.first.last_layer
    for stage, settings in p.stages.items():
        if stage in SHARD_STAGES and shards is None:
            continue
        if only_last and not settings.last_layer and p.readout is not None:
            spread_to_all_layers(KeysAndValues(base.model, hypernetwork, whitening), sentences)
        only_last = settings.last_layer
        if stage not in SHARD_STAGES:
            sources = [WorldDocuments(base.tokenizer, settings)]
        else:
            sources = [read_shards(shards)] if isinstance(shards, str | Path) else shards
        weights = [1.0] if len(sources) == 1 else None
        batches = DistillationBatches(base.tokenizer, settings, sources, run.seed, weights)
        fit_hypernetwork(settings, base, hypernetwork, batches, run.stage(stage))
    if p.readout is not None:
        unwhiten_keys(hypernetwork)
    return hypernetwork


def train_reading(p: ReadingPreset, source: str | Path, run: Run, final: Path | None = None) -> Path:
    """The folder `final` (None: `run.folder`/final): the model at `source`, trained to be read sparsely. Resumable.

    It is in float16 and names its reading. Where blocks learn it has neither gate nor relevance: those of `source` were
    measured with other weights. ValueError for several processes.
    """
    if processes() > 1:
        raise ValueError("sparse reading is trained by one process: each would keep a bank of its own blocks")
    model = load(source, device=own_device())
    hypernetwork = with_null_block(model.hypernetwork, p, run.seed)
    step = ReadingStep(model.base_model, hypernetwork, p, model.encoder.model)
    if p.whiten:
        warm_up = WarmUpPreset(steps=1, sentences=32, learning_rate=0.0, warmup_steps=0)
        draw = partial(fact_sentences, chunk_tokens=p.longest_chunk)
        sentences = ReadoutBatches(model.tokenizer, warm_up, run.seed, draw)
        whiten_keys(hypernetwork, key_whitening(model.base_model, step.module, sentences))
    batches = ReadingBatches(model.tokenizer, p, run.seed, model.encoder_tokenizer)
    if is_first_process():
        _write_down(hypernetwork, run.folder, model.chunk_tokens)
    fit(step, batches, p, run)
    if p.whiten:
        unwhiten_keys(hypernetwork)
    meta = {"seed": run.seed, "chunk_tokens": model.chunk_tokens, "base_model": model.base_source}
    meta |= {"started_from": str(source), "reading": asdict(step.reading)}
    if not p.blocks_learn:
        meta |= {"least_relevance": model.least_relevance} if math.isfinite(model.least_relevance) else {}
        meta |= {"gate": asdict(model.gate)} if model.gate is not None else {}
    final = run.folder / "final" if final is None else final
    if is_first_process():
        save_checkpoint(final, hypernetwork, meta, torch.float16)
    return final


def train_rows(
    p: RowsPreset,
    source: str,
    tables: Mapping[str, pd.DataFrame],
    run: Run,
    features: Path,
    final: Path | None = None,
) -> Path:
    """The folder `final` (None: `run.folder`/final): a hypernetwork that writes token rows for `source`. Resumable.

    source: the base model.
    tables: {name: questions about passages} (see `tasks.qa.load_qa`); `p.validation` passages of the first one, drawn
        with a fixed seed, are never learned.
    features: a folder for what the base model makes of them (about 0.5 MB a passage), which later runs use again.

    ValueError for data with too few usable passages.
    """
    base_model, tokenizer = load_base_model(source, device=own_device())
    config = rows_config(p, base_model, source)
    encoder, limits = ContextEncoder.from_config(base_model, config, source), Limits(p.longest_passage)
    key, below, train = Fingerprint().key(base_model), p.row_layers[0], []
    for name, frame in tables.items():
        passages = passages_of(frame, tokenizer, limits)
        needs = p.passages + p.validation * (not train)
        if len(passages) < needs:
            raise ValueError(
                f"{len(passages)} passages of {name} have a question whose answer stands in at most "
                f"{limits.passage_tokens} tokens; this training needs {needs}"
            )
        facts = facts_of(key, frame, encoder, below, limits)
        write_features(base_model, tokenizer, passages, features / name, encoder=encoder, facts=facts)
        every = read_features(features / name, passages)
        if not train:
            every, held_out = _split(every, p.validation)
        train += every
    others = _unrelated(base_model, tokenizer, below)
    torch.manual_seed(run.seed)
    hypernetwork = TokenRows(config)
    hypernetwork.prepare(base_model, tokenizer)
    unseen = others[::_UNSEEN]
    others = [one for i, one in enumerate(others) if i % _UNSEEN]
    batches = RowsBatches(train, hypernetwork.words, p, run.seed, others)
    step = RowsStep(base_model, hypernetwork, p, validation_batches(held_out, hypernetwork.words, p, unseen))
    step.start(train, batches)
    if is_first_process():
        _write_down(hypernetwork, run.folder, p.longest_passage)
    fit(step, batches, p, replace(run, arguments=_LEAVING_OUT | dict(run.arguments)))
    if held_out:
        test, n = RowsBatches(held_out, hypernetwork.words, p, run.seed), len(held_out)
        parts = [range(start, min(start + p.passages, n)) for start in range(0, n, p.passages)]
        asked = [test.collate(part, together, unseen) for part in parts for together in (False, True)]
        print(f"the gate lets pass: {step.calibrate(asked)}", flush=True)
    step.plain_keys()
    meta = {"seed": run.seed, "chunk_tokens": p.longest_passage, "base_model": source, "passages": len(train)}
    final = run.folder / "final" if final is None else final
    if is_first_process():
        save_checkpoint(final, hypernetwork, meta, torch.float16)
    return final


def never_learned_prompts() -> list[str]:
    """The prompts about something else that no training of rows has learned from."""
    return _unrelated_prompts()[::_UNSEEN]


def _unrelated_prompts() -> list[str]:
    return [row["prompt"] for row in read_rows(project_root() / _UNRELATED)]


def _unrelated(base_model, tokenizer, below: int) -> list[Prompt]:
    """Prompts about something else: the stream of each into layer `below`, and its ids."""
    prompts = question_ids(tokenizer, _unrelated_prompts())
    streams = streams_below(base_model, tokenizer, prompts, below)
    return [(stream.half(), torch.tensor(ids)) for stream, ids in zip(streams, prompts, strict=True)]


def _split(passages: list[Features], n: int) -> tuple[list[Features], list[Features]]:
    """(those to learn, the n that are never learned)."""
    drawn = never_learned(len(passages), n)
    kept = [one for i, one in enumerate(passages) if i not in drawn]
    return kept, [one for i, one in enumerate(passages) if i in drawn]


def rows_config(p: RowsPreset, base_model, source: str) -> HypernetworkConfig:
    """The config of a hypernetwork that writes token rows for `base_model`."""
    modules = default_modules(base_model)
    for module in modules:
        check_writes_residual(base_model, module)
    d_in, d_out = module_sizes(base_model, modules)
    return HypernetworkConfig(
        n_layers=1,
        d_in=d_in,
        d_out=d_out,
        feature_size=base_model.config.get_text_config().hidden_size * len(p.encoder_layers),
        latent_size=p.latent_size,
        rank=len(ROLES),
        scale=1.0,
        encoder_type="hidden_states",
        encoder_layers=p.encoder_layers,
        n_blocks=p.n_blocks,
        use_bias=False,
        dropout=p.dropout,
        n_heads=p.n_heads,
        n_kv_heads=p.n_heads,
        base_model=source,
        writer="token_rows",
        row_layers=p.row_layers,
        reader_layers=p.reader_layers,
        reader_rank=p.reader_rank,
        reader_sizes=reader_sizes(base_model, p.reader_layers),
    )


def train_published(
    p: PublishedPreset,
    rows: RowsPreset,
    source: str,
    tables: Mapping[str, pd.DataFrame],
    run: Run,
    features: Path,
    final: Path | None = None,
) -> Path:
    """The folder `final` (None: `run.folder`/final): a Perceiver that writes blocks of a plain sum. Resumable.

    rows: the preset of the token rows whose mixing layers it takes over: states, longest passage and lower layers.
    source, tables, features: as in `train_rows`.

    Passages that validation took when those rows were trained are taken again, so no part has learned from them.
    ValueError for data with too few usable passages, and for token rows of other states.
    """
    if p.first_passages is not None and p.first_passages % PER_FILE:
        raise ValueError(f"first_passages is {p.first_passages}: give a multiple of {PER_FILE}")
    below = rows.row_layers[0]
    if p.written_layers[0] < below:
        raise ValueError(f"written_layers {p.written_layers} begin below layer {below}, where the streams on disk do")
    base_model, tokenizer = load_base_model(source, device=own_device())
    base_model.requires_grad_(False)
    token_rows, _ = load_checkpoint(find_checkpoint(p.rows))
    if not isinstance(token_rows, TokenRows) or token_rows.config.encoder_layers != rows.encoder_layers:
        raise ValueError(f"{p.rows} holds no token rows that read the states {rows.encoder_layers}")
    on_disk = ContextEncoder.from_config(base_model, token_rows.config, source)
    limits, key, train, held_out = Limits(rows.longest_passage), Fingerprint().key(base_model), [], []
    for name, frame in tables.items():
        facts = facts_of(key, frame, on_disk, below, limits)
        passages = passages_of(frame, tokenizer, limits)
        drawn = never_learned(len(passages), min(rows.validation, len(passages))) if not held_out else set()
        own = passages[: p.first_passages]
        write_features(base_model, tokenizer, own, features / name, encoder=on_disk, facts=facts)
        every = [few_of(one, p.questions) for one in read_features(features / name, own, first=True)]
        held_out += [one for number, one in enumerate(every) if number in drawn]
        train += [one for number, one in enumerate(every) if number not in drawn]
    if len(train) < p.passages or len(held_out) < 2:
        raise ValueError(
            f"{len(train)} passages to learn and {len(held_out)} others have a question with an answer in them; this "
            f"training needs {p.passages} and two: give more passages"
        )
    train, held_out = (_higher(base_model, several, below, p.written_layers[0]) for several in (train, held_out))
    torch.manual_seed(run.seed)
    hypernetwork = PooledRows(published_config(p, token_rows.config, base_model))
    hypernetwork.prepare(base_model, tokenizer)
    hypernetwork.take_mixing(token_rows)
    step = PublishedStep(base_model, hypernetwork, p)
    step.start(train[:: max(1, len(train) // 400)])
    test = PassageBatches(held_out, step, p, 0, run.seed)
    parts = [range(start, min(start + p.passages, len(held_out))) for start in range(0, len(held_out), p.passages)]
    step.tests = [test.collate(part) for part in parts if len(part) > 1]
    batches = PassageBatches(train, step, p, p.pointer.steps, run.seed)
    run = replace(run, arguments=_LEAVING_OUT | dict(run.arguments))
    fit(step, batches, p.pointer, run.stage("pointer"))
    step.adds, batches.steps = True, p.steps
    fit(step, batches, p, run.stage("sum", seed=run.seed + 1))
    step.fold()
    meta = {"seed": run.seed, "chunk_tokens": rows.longest_passage, "base_model": source, "passages": len(train)}
    final = run.folder / "final" if final is None else final
    if is_first_process():
        save_checkpoint(final, hypernetwork, meta, torch.float16)
    return final


def _higher(base_model, passages: Sequence[Features], below: int, layer: int) -> list[Features]:
    """The same with streams into a higher layer."""
    streams = iter(streams_higher(base_model, [one for own in passages for one in own.streams], below, layer))
    return [replace(own, streams=tuple(next(streams) for _ in own.streams)) for own in passages]


def published_config(p: PublishedPreset, rows: HypernetworkConfig, base_model) -> HypernetworkConfig:
    """The config of a Perceiver on the mixed states of a hypernetwork of token rows."""
    return replace(
        rows,
        n_layers=base_model.config.get_text_config().num_hidden_layers,
        rank=p.rank,
        use_bias=True,
        writer="pooled_rows",
        row_layers=(),
        reader_layers=(),
        reader_rank=0,
        reader_sizes={},
        written_layers=p.written_layers,
        pooled_size=p.pooled_size,
        pooled_blocks=p.pooled_blocks,
    )


# ---------------------------------------------------------------------------------------------------- what is bundled
def remake_published(p: Preset, tables: Mapping[str, pd.DataFrame], run: Run, features: Path, data: Path) -> Path:
    """`train_published` as the preset says; its log goes to `data`, seed 0's hypernetwork becomes the bundled one."""
    bundled = data / p.name / "published" if run.seed == 0 else None
    final = train_published(p.published, p.rows, p.base_source, tables, run, features, bundled)
    if is_first_process():
        log = [
            {"seed": run.seed, "stage": stage, **line}
            for stage in ("pointer", "sum")
            for line in read_log(run.folder / stage / "log.jsonl")
        ]
        write_jsonl(data / "full_runs" / f"{p.name}_published_seed{run.seed}_training.jsonl", log)
    return final


def remake_rows(p: Preset, tables: Mapping[str, pd.DataFrame], run: Run, features: Path, data: Path) -> Path:
    """`train_rows` as the preset says; its log goes to `data`, and seed 0's hypernetwork becomes the bundled one."""
    bundled = data / p.name / "hypernetwork" if run.seed == 0 else None
    final = train_rows(p.rows, p.base_source, tables, run, features, bundled)
    if is_first_process():
        log = [{"seed": run.seed, **line} for line in read_log(run.folder / "log.jsonl")]
        write_jsonl(data / "full_runs" / f"{p.name}_rows_seed{run.seed}_training.jsonl", log)
    return final


def remake_base(p: Preset, runs: Path, data: Path, fast: bool) -> None:
    """Train the base model; put it and its training log into `data`."""
    run = Run(runs / p.name / "base", p.base.seed)
    _train_base(p, run, fast)
    if not is_first_process():
        return
    kind = _base_folder(read_json(run.folder / "final" / "config.json"))
    with atomic_folder(data / p.name / "base_model", kind) as folder:
        shutil.copytree(run.folder / "final", folder, dirs_exist_ok=True)
    log = [{"seed": run.seed, **line} for line in _whole_log(run.folder / "first", run.folder / "polish")]
    write_jsonl(data / "full_runs" / "base_model_training.jsonl", log)


def _whole_log(*stages: Path) -> list[dict]:
    """The training logs of consecutive stages as one: steps and seconds count on."""
    lines: list[dict] = []
    for stage in stages:
        before = {name: lines[-1][name] if lines else 0 for name in ("step", "seconds")}
        later = read_log(stage / "log.jsonl")
        lines += [{**line, **{name: round(line[name] + start, 1) for name, start in before.items()}} for line in later]
    return lines


def remake_needle(p: Preset, runs: Path, data: Path, seed: int, variant: str) -> None:
    """Train a needle hypernetwork on the bundled base model; its log, and the bundled one's weights, go to `data`."""
    settings = replace(p.needle, **NEEDLE_VARIANTS[variant])
    name = f"needle_{variant}_seed{seed}"
    run = Run(runs / p.name / name, seed)
    base = Base.load(p.name, settings)
    hypernetwork = train_needle(settings, base, run)
    if not is_first_process():
        return
    bundled = (seed, variant) == (p.needle.seed, "ours")
    final = data / p.name / "hypernetwork" if bundled else run.folder / "final"
    facts = {"preset": p.name, "variant": variant, "seed": seed}
    save_checkpoint(final, hypernetwork, facts | {"chunk_tokens": settings.chunk_tokens, "base_model": p.name})
    facts = {"seed": seed, "variant": variant, "threads": torch.get_num_threads()}
    log = [facts | line for line in _whole_log(run.folder / "readout", run.folder, run.folder / "polish")]
    write_jsonl(data / "full_runs" / f"{name}_training.jsonl", log)


def remake_qa(p: Preset, runs: Path, data: Path, seed: int) -> None:
    """Train a question-answering hypernetwork on the bundled base model; logs and the bundled weights go to `data`."""
    run = Run(runs / p.name / f"qa_seed{seed}", seed, save_steps=125, report_steps=25)
    hypernetwork = train_qa(p.qa, Base.load(p.name, p.qa.first), run)
    if not is_first_process():
        return
    meta = {"preset": p.name, "seed": seed, "chunk_tokens": p.qa.world.chunk_tokens, "base_model": p.name}
    folder = data / p.name / "qa" if seed == p.qa.world.seed else run.folder / "final"
    save_checkpoint(folder, hypernetwork, meta, torch.float16)
    for stage in ("readout", *p.qa.stages):
        if (path := run.folder / stage / "log.jsonl").exists():
            log = [{"seed": seed, **line} for line in read_rows(path)]
            write_jsonl(data / "full_runs" / f"qa_seed{seed}_{stage}_training.jsonl", log)


def remake_reading(p: ReadingPreset, source: str, run: Run, data: Path) -> Path:
    """`train_reading` as the preset says; its log goes to `data`, and the null block of seed 0 to the bundled model."""
    bundled = run.seed == 0 and not p.blocks_learn
    final = train_reading(p, source, run, data / source if bundled else None)
    if is_first_process():
        log = [{"seed": run.seed, **line} for line in read_log(run.folder / "log.jsonl")]
        write_jsonl(data / "full_runs" / f"qa_seed{run.seed}_reading_training.jsonl", log)
    return final


# -------------------------------------------------------------------------------------------- base models of one's own
def own_needle(p: NeedlePreset, source: str, run: Run, preset_name: str) -> None:
    """Train a needle hypernetwork for the base model `source`; it ends in `run.folder`/final."""
    _print_run(p, source, run.folder)
    hypernetwork = train_needle(p, Base.load(source, p), run)
    _save_own(hypernetwork, source, run, preset_name, p.chunk_tokens)


def own_qa(p: QAPreset, source: str, run: Run, preset_name: str, shards: Sequence[Path], cache: Path) -> None:
    """Train a question-answering hypernetwork for the base model `source`; it ends in `run.folder`/final.

    shards, cache: folders or files of self-generated data, and where they are unpacked.

    ValueError if all stages need such data and there are none.
    """
    for name, stage in p.stages.items():
        _print_run(stage, source, run.folder / name)
    needs_shards = [stage for stage in p.stages if stage in SHARD_STAGES]
    if needs_shards and not shards and len(needs_shards) == len(p.stages):
        raise ValueError(f"the stages {', '.join(needs_shards)} learn from self-generated data: give --shards")
    stages = list(p.stages.values())
    base = Base.load(source, stages[0])
    known = base.model.get_input_embeddings().num_embeddings
    files_of = find_shards(shards).values() if shards else []
    data = [read_shards(files, cache, vocabulary=known) for files in files_of] or None
    hypernetwork = train_qa(p, base, run, data)
    _save_own(hypernetwork, source, run, preset_name, stages[-1].chunk_tokens)


def _save_own(hypernetwork: Hypernetwork, source: str, run: Run, preset_name: str, chunk_tokens: int) -> None:
    if is_first_process():
        meta = {"preset": preset_name, "seed": run.seed, "chunk_tokens": chunk_tokens, "base_model": source}
        save_checkpoint(run.folder / "final", hypernetwork, meta)


def _print_run(p: TrainingPreset, base_name: str, folder: Path) -> None:
    """One line, from the first process."""
    if is_first_process():
        steps = f"{p.steps // p.batches_per_step} steps of {p.batches_per_step} batches"
        print(f"{folder}: a hypernetwork for {base_name}, {steps}", flush=True)


def settle_encoder(p: TrainingPreset) -> TrainingPreset:
    """`p` with an encoder that this machine can run: without a GPU the base model reads documents, and a line says so.

    ValueError if `p.encoder_bits` is neither 4 nor None, or if there is a GPU but no package bitsandbytes.
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
    """A copy of the base model in 4-bit weights that reads documents for `p`; None if the base model reads them."""
    return None if p.encoder_bits is None else load_base_model(source, device=own_device(), four_bit=True)[0]
