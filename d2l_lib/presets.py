"""One dial: a preset's name decides every size, rate and seed.

`tiny` is the bundled system. `paper-gemma`, `paper-mistral` and `paper-qwen` are the published recipes for published
base models (paper, sections on the needle and the main experiment; packing and accumulation from the authors' scripts).
Sizes are in tokens, batches or units of the model; rates are AdamW learning rates.
"""

from __future__ import annotations

import math
from ast import literal_eval
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral

from d2l_lib.documents import check_texts


@dataclass(frozen=True, kw_only=True)
class HypernetworkPreset:
    """The sizes of a hypernetwork.

    encoder_layer: the layer after which the context encoder stops; None with an `encoder_type` that reads all layers.
    encoder_bits: 4 reads documents with a 4-bit copy of the base model (on a GPU), None with the base model itself.
    """

    latent_size: int
    n_latent_queries: int
    n_blocks: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rank: int
    encoder_layer: int | None
    encoder_type: str = "early_exit"
    use_bias: bool = True
    encoder_bits: int | None = None


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The length and the rates of a training.

    steps, warmup_steps: in batches.
    batches_per_step: batches per optimizer step, over all processes, whose number has to divide it.
    min_learning_rate: the end of the cosine; None: 2% of the rate.
    muon_rate: Muon's rate for the matrices; None: AdamW for all.
    muon_float32: Muon's products in float32: faster on CPUs without bfloat16.
    adam_beta2: AdamW's decay of the second moment.
    """

    steps: int
    learning_rate: float
    warmup_steps: int
    batches_per_step: int = 1
    min_learning_rate: float | None = None
    muon_rate: float | None = None
    muon_float32: bool = False
    adam_beta2: float = 0.999

    def accumulation(self, processes: int) -> int:
        """Batches of each process in one optimizer step; ValueError where the processes cannot share them evenly."""
        if self.batches_per_step % processes:
            raise ValueError(
                f"{processes} processes cannot share out {self.batches_per_step} batches evenly: start a number that "
                "divides it, or change batches_per_step"
            )
        return self.batches_per_step // processes


@dataclass(frozen=True, kw_only=True)
class TwoStages(Schedule):
    """A training and its second stage, of another length and rate; 0 steps: none."""

    polish_steps: int = 0
    polish_learning_rate: float = 0.0

    @property
    def polish(self):
        """The second stage."""
        return replace(self, steps=self.polish_steps, learning_rate=self.polish_learning_rate)


@dataclass(frozen=True, kw_only=True)
class BaseModelPreset(TwoStages):
    """A base model, trained from nothing on the generated world.

    architecture: its model type in `transformers`.
    The second stage has longer documents (see `pretraining.Curriculum`).
    """

    architecture: str
    vocab_size: int
    window: int
    hidden_size: int
    n_layers: int
    n_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float
    batch_tokens: int
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainingPreset(Schedule, HypernetworkPreset):
    """The settings that needles and questions share.

    l1: weight of the L1 penalty on the blocks.
    contexts: the most in a batch.
    chunk_tokens: the default of `internalize`.
    distil: learn the teacher's log-probabilities where a batch has them; False: its answers alone (cross-entropy).
    last_layer: only the last layer's blocks act and learn (see `step.Internalization`).
    input_tokens, context_tokens: the most tokens of questions with answers, and of chunks, in a batch. With neither,
        all batches have equal weight, whatever their number of contexts.
    neftune: strength of the noise on the base model's embeddings while it answers (NEFTune, Jain et al. 2023).
    """

    l1: float
    contexts: int
    chunk_tokens: int
    seed: int = 0
    distil: bool = True
    last_layer: bool = False
    input_tokens: int | None = None
    context_tokens: int | None = None
    neftune: float = 0.0

    @property
    def by_context(self) -> bool:
        """Whether losses are averaged over all contexts of a step, as batches differ in their number."""
        return self.context_tokens is not None or self.input_tokens is not None


@dataclass(frozen=True, kw_only=True)
class WarmUpPreset(Schedule):
    """The warm-up of a hypernetwork (see `training.warm_up`).

    sentences: in a batch.
    whiten: learn keys in whitened coordinates (see `warm_up.KeysAndValues`).
    """

    sentences: int
    whiten: bool = True


@dataclass(frozen=True, kw_only=True)
class NeedlePreset(TwoStages, TrainingPreset):
    """A hypernetwork trained on needles; its second stage is about filler (see `contexts.NeedleBatches`).

    shortest, longest: contexts, in tokens.
    min_chunk_tokens: bounds the number of chunks of a context.
    chunk_probabilities: {number of chunks: probability}.
    max_repeats: chunks without the needle count up to this many times, as in a long haystack; K equal blocks are one
        block of weight K.
    empty_share: contexts without a needle.
    readout: the warm-up; None: none.
    gradual: lengths and the L1 term grow during the run; False: they start in full, as published.
    max_chunk_tokens: the limit of equal chunks, cut at any token, as published; None: cut at random sentence ends.
    """

    shortest: int
    longest: int
    min_chunk_tokens: int
    chunk_probabilities: dict[int, float]
    max_repeats: int
    empty_share: float
    readout: WarmUpPreset | None = None
    gradual: bool = True
    max_chunk_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class DistillationPreset(TrainingPreset):
    """A hypernetwork trained on answers to questions about documents (see `contexts.DistillationBatches`).

    shortest_chunk, longest_chunk: the limit of a document's chunks, in tokens, is random between the two.
    single_chunk_share: of the run, its start, with one chunk per document.
    questions: the most per document; never more than its chunks + 1.
    chunks: the most in a batch.
    chunk_probabilities: {number of equal chunks of these lengths: probability}, as published; None: random limits.
    question_tokens: longer questions (with their answers) are left out.

    For fresh documents of the world (`contexts.WorldDocuments`):

    least_facts, most_facts: of a context; all contexts of a batch have one number of facts.
    facts_grow: the shares of the run between which the number of facts grows up to `most_facts`.
    kinds: of the questions with an answer in the document (None: all kinds).
    strangers_share: contexts with several documents.
    unrelated_share: questions about the encyclopedia.
    unanswerable_share: of the other questions, those without an answer in the document.
    """

    shortest_chunk: int
    longest_chunk: int
    single_chunk_share: float
    questions: int
    chunk_tokens: int = 64
    chunks: int = 1024
    least_facts: int = 1
    most_facts: int = 12
    facts_grow: tuple[float, float] = (0.0, 0.5)
    kinds: tuple[str, ...] | None = None
    strangers_share: float = 0.0
    unrelated_share: float = 0.1
    unanswerable_share: float = 0.17
    chunk_probabilities: dict[int, float] | None = None
    question_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class ReadingPreset(DistillationPreset):
    """A trained hypernetwork that learns to be read sparsely (see `training.reading`); its own sizes stay.

    chunks, questions: of a batch, which is one adapter.
    weights: of the kinds of questions about a document, in place of `kinds`.
    own_share: questions with their own document alone.
    prompt: the tokens of the prompt read too.
    whiten: learn keys in whitened coordinates (see `warm_up.KeysAndValues`).
    null_rate: the rate of the null block's floor and of the sharpness, in learning rates.
    bank: blocks of earlier batches in the adapter of the other questions.
    decay: of the evidence, as in `reading.Reading`.
    evidence_weight: of the loss of the evidence.
    sharpness: of the softmax, to begin with.
    null_rows, null_floor: of the null block: keys per layer, and what each layer's floor begins with.
    blocks_learn: False: the null block and the sharpness alone learn, and blocks stay what they were.
    null_threshold: of the reading that the model names afterwards.
    """

    weights: dict[str, int]
    own_share: float = 0.35
    prompt: bool = False
    whiten: bool = False
    null_rate: float = 1.0
    bank: int = 96
    decay: float = 0.5
    evidence_weight: float = 0.5
    sharpness: float = 8.0
    null_rows: int = 8
    null_floor: tuple[float, ...] = ()
    blocks_learn: bool = False
    null_threshold: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RowsPreset(Schedule):
    """A hypernetwork that writes token rows (see `training.token_rows`).

    latent_size, n_blocks, n_heads, dropout: of its mixing layers.
    encoder_layers: the base model's states that it reads; the embeddings (0) come first.
    row_layers: the layer whose tokens look for their like, and the last, which writes words; all below the first of
        them is computed once.
    reader_layers, reader_rank: the layers above that one with a low-rank update.
    longest_passage: in tokens. generated: questions of a data set that is generated.
    passages: of a batch. validation: passages that are never learned.
    together_share: batches whose passages are one memory.
    others: prompts about something else in a batch.
    match_weight, gate_weight: of the losses. first_weight: of the first token of an answer, in its loss.
    gate_error: share of prompts about something else that may open the gate.
    """

    latent_size: int = 384
    n_blocks: int = 3
    n_heads: int = 6
    dropout: float = 0.2
    encoder_layers: tuple[int, ...] = (0, 6, 14, 20)
    reader_layers: tuple[int, ...] = (25, 26, 27, 28, 29)
    reader_rank: int = 32
    row_layers: tuple[int, ...] = (24, 29)
    longest_passage: int = 200
    generated: int = 2400
    passages: int = 16
    validation: int = 96
    together_share: float = 0.35
    others: int = 8
    match_weight: float = 0.2
    gate_weight: float = 0.3
    first_weight: float = 2.0
    gate_error: float = 0.01


@dataclass(frozen=True, kw_only=True)
class PublishedPreset(Schedule):
    """A Perceiver that writes blocks of a plain sum for the last layers (see `training.published`).

    The schedule is that of its second stage; pointer: that of the first.

    rows: the bundled name, or the folder, of a hypernetwork of token rows whose mixing layers it takes over.
    pooled_size, pooled_blocks, rank: of the Perceiver and the blocks. written_layers: base layers that get blocks.
    first_passages: so many passages of each data set are used (None: all). questions: of a passage, at most.
    passages: of a batch. Those of validation are the ones that the rows never learned from.
    dropout: share of a passage's tokens that are not read, in training.
    first_weight: of the first token of an answer, in its loss.
    """

    pointer: Schedule
    rows: str = "smollm2"
    pooled_size: int = 256
    pooled_blocks: int = 2
    rank: int = 8
    written_layers: tuple[int, ...] = (27, 28, 29)
    first_passages: int | None = None
    questions: int = 4
    passages: int = 16
    dropout: float = 0.15
    first_weight: float = 2.0


@dataclass(frozen=True, kw_only=True)
class ReadingLoraPreset(Schedule):
    """A plain LoRA that learns to answer from the passage in its prompt (see `training.reading_lora`).

    rank, scale: of the LoRA in every linear; the scale is alpha / rank.
    passages: of a batch.
    validation: passages in the report, of those that are never learned; validation_reports: in every so many reports.
    """

    rank: int = 8
    scale: float = 2.0
    passages: int = 4
    validation: int = 48
    validation_reports: int = 1


SHARD_STAGES = ("self_generated", "chunked")  # stages on self-generated data


@dataclass(frozen=True)
class QAPreset:
    """Question answering in up to six stages of one hypernetwork, all of the same sizes; None leaves a stage out.

    readout: the warm-up of the layers that the next stage trains.
    recall: fresh documents of the world, with the last layer alone.
    world: the same with all layers.
    polish: smaller documents, more questions about something else and more without an answer.
    self_generated: self-generated data.
    chunked: the same data in chunks.
    """

    readout: WarmUpPreset | None
    recall: DistillationPreset | None
    world: DistillationPreset | None
    polish: DistillationPreset | None
    self_generated: DistillationPreset | None
    chunked: DistillationPreset | None = None

    @property
    def stages(self) -> dict[str, DistillationPreset]:
        """The stages after the warm-up, in order."""
        named = {name: getattr(self, name) for name in ("recall", "world", "polish", *SHARD_STAGES)}
        return {name: settings for name, settings in named.items() if settings is not None}

    @property
    def first(self) -> DistillationPreset:
        """The first stage after the warm-up."""
        return next(iter(self.stages.values()))


@dataclass(frozen=True)
class Preset:
    """All settings of a run; base: the base model to train, or the hub name of a published one.

    reading: the training of `qa`'s result with sparse reading switched on; None: there is none.
    rows: the training of a hypernetwork that writes token rows; None: there is none.
    reading_lora: the training of a plain LoRA on the questions of `rows`; None: there is none.
    """

    name: str
    base: BaseModelPreset | str
    needle: NeedlePreset
    qa: QAPreset
    reading: ReadingPreset | None = None
    rows: RowsPreset | None = None
    published: PublishedPreset | None = None
    reading_lora: ReadingLoraPreset | None = None

    @property
    def base_source(self) -> str:
        """The name of the base model for `load_base_model`."""
        return self.base if isinstance(self.base, str) else self.name


# The needle recipe, the published one, and ours without one part. In all of them the L1 term sets in half-way.
# Without the warm-up the rest takes longer.
_NO_READOUT = {"readout": None, "steps": 2400, "polish_steps": 600}
NEEDLE_VARIANTS: dict[str, dict] = {
    "ours": {},
    "published": _NO_READOUT | {"max_repeats": 1, "empty_share": 0.0, "polish_steps": 0},
    "no_readout_no_polish": _NO_READOUT | {"polish_steps": 0},
    "no_readout": _NO_READOUT,
    "no_repeats": {"max_repeats": 1, "polish_steps": 0},
    "no_polish": {"polish_steps": 0},
    "no_empty": {"empty_share": 0.0},
    "no_l1": {"l1": 0.0},
}

_CHUNK_PROBABILITIES = {1: 0.5, 2: 0.125, **dict.fromkeys(range(3, 9), 0.0625)}
_TINY_SIZES = {
    "latent_size": 128, "n_latent_queries": 16, "n_blocks": 2, "n_heads": 8, "n_kv_heads": 4, "head_dim": 32,
    "encoder_layer": 2,
}  # fmt: skip
_TINY_QA = DistillationPreset(
    **_TINY_SIZES | {"latent_size": 192, "n_latent_queries": 8, "n_blocks": 1},
    rank=8,
    shortest_chunk=20,
    longest_chunk=24,
    single_chunk_share=0.0,
    contexts=48,
    chunks=64,
    questions=64,
    l1=0.0,
    steps=800,
    batches_per_step=2,
    learning_rate=5e-4,
    warmup_steps=50,
    most_facts=64,
    facts_grow=(0.0, 0.1),
    strangers_share=0.3,
    chunk_tokens=20,
    muon_rate=5e-4,
)
_TINY_RECALL = replace(
    _TINY_QA,
    steps=1800,
    learning_rate=1e-3,
    muon_rate=1e-3,
    least_facts=4,
    most_facts=96,
    strangers_share=0.5,
    kinds=("one_hop", "number", "date", "paraphrase"),
    last_layer=True,
)

_TINY_READING = ReadingPreset(
    **vars(_TINY_QA)
    | {
        "steps": 400,
        "batches_per_step": 1,
        "learning_rate": 3e-3,
        "muon_rate": 1e-4,
        "muon_float32": True,
        "warmup_steps": 30,
        "questions": 128,
        "most_facts": 32,
        "unanswerable_share": 0.22,
    },
    weights={
        "one_hop": 10, "number": 5, "date": 5, "paraphrase": 10, "two_hop": 14, "yes_no": 14, "which_of": 16,
        "list": 12,
    },
    null_floor=(0.0, 0.12, 0.057, 0.017),
    null_threshold=-0.3,
)  # fmt: skip

PRESETS = {
    "tiny": Preset(
        name="tiny",
        base=BaseModelPreset(
            architecture="qwen3",
            vocab_size=1536,
            window=1024,
            hidden_size=192,
            n_layers=4,
            n_heads=4,
            head_dim=64,
            intermediate_size=512,
            rope_theta=100_000.0,
            adam_beta2=0.98,
            steps=3000,
            batch_tokens=4096,
            learning_rate=2e-3,
            warmup_steps=150,
            polish_steps=5000,
            polish_learning_rate=1.5e-3,
        ),
        needle=NeedlePreset(
            **_TINY_SIZES,
            rank=4,
            shortest=32,
            longest=256,
            min_chunk_tokens=25,
            chunk_probabilities=_CHUNK_PROBABILITIES,
            max_repeats=1024,
            empty_share=0.1,
            l1=0.1,
            steps=1200,
            contexts=24,
            learning_rate=1e-3,
            warmup_steps=150,
            chunk_tokens=256,
            polish_steps=400,
            polish_learning_rate=3e-4,
            readout=WarmUpPreset(steps=200, sentences=48, learning_rate=1e-3, warmup_steps=50),
        ),
        qa=QAPreset(
            readout=WarmUpPreset(
                steps=2400, batches_per_step=2, sentences=32, learning_rate=2e-3, warmup_steps=60, muon_rate=4e-3
            ),
            recall=_TINY_RECALL,
            world=_TINY_QA,
            polish=replace(_TINY_QA, steps=800, most_facts=12, unrelated_share=0.2, unanswerable_share=0.35),
            self_generated=replace(_TINY_QA, steps=400, learning_rate=2e-4, muon_rate=2e-4),
        ),
        reading=_TINY_READING,
    ),
}


def _published(name: str, base: str, needle_l1: float) -> Preset:
    """The published recipes for a base model.

    Needles: one epoch of 640,000 contexts, about 24 in a batch.
    Questions: 80,000 steps of 8 GPUs with 8 batches each, then 20,000 steps of 8 GPUs with 16 smaller batches, in
    chunks; one question per context.
    """
    common = {
        "latent_size": 512, "n_heads": 16, "n_kv_heads": 4, "head_dim": 128, "rank": 8, "encoder_layer": None,
        "learning_rate": 4e-5, "min_learning_rate": 1e-7,
    }  # fmt: skip
    needle = NeedlePreset(
        **common,
        n_latent_queries=208,
        n_blocks=8,
        shortest=32,
        longest=256,
        min_chunk_tokens=25,
        max_chunk_tokens=512,
        chunk_probabilities=_CHUNK_PROBABILITIES,
        max_repeats=1,
        empty_share=0.0,
        gradual=False,
        l1=needle_l1,
        steps=640_000 // 24,
        contexts=64,
        input_tokens=4096,
        context_tokens=4096,
        batches_per_step=16,
        warmup_steps=100 * 16,
        chunk_tokens=1024,
    )
    single = DistillationPreset(
        **common,
        n_latent_queries=8,
        n_blocks=9,
        encoder_type="per_layer_activations",
        encoder_bits=4,
        shortest_chunk=25,
        longest_chunk=4096,
        single_chunk_share=1.0,
        contexts=1024,
        questions=1,
        question_tokens=2048,
        input_tokens=4096,
        context_tokens=4096,
        l1=0.1,
        neftune=5.0,
        batches_per_step=8 * 8,
        steps=80_000 * 8 * 8,
        warmup_steps=100 * 8 * 8,
        chunk_tokens=512,
    )
    chunked = replace(
        single,
        single_chunk_share=0.0,
        longest_chunk=512,
        chunk_probabilities=_CHUNK_PROBABILITIES,
        question_tokens=512,
        input_tokens=1024,
        context_tokens=2048,
        batches_per_step=16 * 8,
        steps=20_000 * 16 * 8,
        warmup_steps=2000 * 16 * 8,
        learning_rate=2e-5,
    )
    return Preset(name, base, needle, QAPreset(None, None, None, None, self_generated=single, chunked=chunked))


PRESETS |= {
    p.name: p
    for p in (
        _published("paper-gemma", "google/gemma-2-2b-it", needle_l1=1.5),
        _published("paper-mistral", "mistralai/Mistral-7B-Instruct-v0.2", needle_l1=2.0),
        _published("paper-qwen", "Qwen/Qwen3-4B-Instruct-2507", needle_l1=0.5),
    )
}
PRESETS["smollm2"] = replace(
    _published("smollm2", "smollm2", needle_l1=1.0), rows=RowsPreset(steps=900, learning_rate=1e-3, warmup_steps=40)
)

PRESETS["smollm2"] = replace(
    PRESETS["smollm2"],
    published=PublishedPreset(
        pointer=Schedule(steps=500, learning_rate=1e-3, warmup_steps=60),
        steps=500,
        learning_rate=3e-4,
        warmup_steps=40,
        first_passages=2424,
    ),
    reading_lora=ReadingLoraPreset(
        steps=200, batches_per_step=2, learning_rate=1e-3, warmup_steps=16, validation_reports=5
    ),
)


# For comparisons of recipes: warm-up and recall of the bundled recipe, smaller and shorter.
SHORT_QA = QAPreset(
    readout=replace(PRESETS["tiny"].qa.readout, steps=800, warmup_steps=20, batches_per_step=1),
    recall=replace(
        _TINY_RECALL,
        n_latent_queries=16,
        steps=300,
        batches_per_step=1,
        warmup_steps=20,
        chunks=48,
        most_facts=48,
    ),
    world=None,
    polish=None,
    self_generated=None,
)
# Changes in the warm-up and in the stage after it. `shards`: that stage learns from self-generated data.
QA_VARIANTS: dict[str, dict] = {
    "ours": {},
    "no warm-up": {"readout": None},
    "keys not whitened": {"readout": {"whiten": False}},
    "AdamW alone": {"readout": {"muon_rate": None, "learning_rate": 1e-3}, "training": {"muon_rate": None}},
    "all layers at once": {"training": {"last_layer": False}},
    "rank 4": {"training": {"rank": 4}},
    "rank 16": {"training": {"rank": 16}},
    "no bias block": {"training": {"use_bias": False}},
    "per-layer activations": {"training": {"encoder_type": "per_layer_activations", "encoder_layer": None}},
    "no unrelated questions": {"training": {"unrelated_share": 0.0}},
    "no unanswerable questions": {"training": {"unanswerable_share": 0.0}},
    "documents one by one": {"training": {"strangers_share": 0.0}},
    "self-generated, distillation": {"shards": True},
    "self-generated, cross-entropy": {"shards": True, "training": {"distil": False}},
}


def qa_variant(name: str) -> QAPreset:
    """The short recipe with the change called `name`; KeyError names the known ones."""
    if name not in QA_VARIANTS:
        raise KeyError(f"unknown variant {name!r}; known: {', '.join(QA_VARIANTS)}")
    change = QA_VARIANTS[name]
    trained = replace(SHORT_QA.recall, **change.get("training", {}))
    readout = change.get("readout", {})
    return QAPreset(
        readout=None if readout is None else replace(SHORT_QA.readout, **readout),
        recall=None if change.get("shards") else trained,
        world=None,
        polish=None,
        self_generated=trained if change.get("shards") else None,
    )


def changed(settings, changes: Sequence[str]):
    """`settings` (a preset of this module) with changes "name=value", values as in Python.

    ValueError names an unknown setting, with the known ones, and a value of another kind.
    """
    known = {field.name: field for field in fields(settings)}
    values = {}
    for change in check_texts(changes, "changes"):
        name, given, text = change.partition("=")
        if not given or name not in known:
            raise ValueError(f"{change!r}: give name=value, where the name is one of {', '.join(known)}")
        try:
            value = literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        kinds = known[name].type.replace(" ", "").split("|")
        if "float" in kinds:
            kinds.append("int")
        if type(value).__name__.replace("NoneType", "None") not in (kind.partition("[")[0] for kind in kinds):
            raise ValueError(f"{change!r}: {name} must be {known[name].type}")
        least = 1 if name in ("steps", "batches_per_step") else 0
        if isinstance(value, (int, float)) and not least <= value < math.inf:
            raise ValueError(f"{change!r}: {name} must be a finite number of at least {least}")
        values[name] = value
    for before in ("readout", "pointer"):  # a stage before this one has as many batches in a step
        if "batches_per_step" in values and getattr(settings, before, None) is not None:
            of_step = values["batches_per_step"]
            values[before] = replace(getattr(settings, before), batches_per_step=of_step)
    return replace(settings, **values)


def shortened(settings: Schedule | QAPreset | None, steps: int | None):
    """`settings` with `steps` optimizer steps in each of their stages (None: unchanged).

    settings: of the warm-up, of one training with its stages, or of all stages of question answering.
    The warm-up of the rate takes at most a tenth of the steps. ValueError unless steps is a whole number of at least 1.
    """
    if steps is None or settings is None:
        return settings
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"steps is {steps!r}: at least one")
    if isinstance(settings, QAPreset):
        stages = {field.name: shortened(getattr(settings, field.name), steps) for field in fields(settings)}
        return replace(settings, **stages)
    batches = steps * settings.batches_per_step
    changes = {"steps": batches, "warmup_steps": min(settings.warmup_steps, batches // 10)}
    if isinstance(settings, NeedlePreset):
        changes["readout"] = shortened(settings.readout, steps)
        changes["polish_steps"] = batches if settings.polish_steps else 0
    if isinstance(settings, PublishedPreset):
        changes["pointer"] = shortened(settings.pointer, steps)
    return replace(settings, **changes)


def preset(name: str) -> Preset:
    """The preset called `name`; KeyError names the known ones."""
    if name not in PRESETS:
        raise KeyError(f"unknown preset {name!r}; known: {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
