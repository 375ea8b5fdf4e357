"""One dial: a preset's name decides every size, rate and seed.

`tiny` is the bundled system. Sizes are in tokens, steps or units of the model; rates are AdamW learning rates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class BaseModelPreset:
    """A base model of a `transformers` architecture (its model type), trained from nothing on the generated world.

    There are two stages (see `pretraining.Curriculum`); `polish_steps` and `polish_learning_rate` belong to the second,
    which is about longer documents.
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
    steps: int
    batch_tokens: int
    learning_rate: float
    warmup_steps: int
    polish_steps: int
    polish_learning_rate: float
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class HypernetworkPreset:
    """The sizes of a hypernetwork: the Perceiver, the rank it writes, and the layer after which the encoder stops (None
    with an `encoder_type` that reads all).
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


@dataclass(frozen=True)
class ReadoutPreset:
    """The warm-up of a hypernetwork (see `readout`): `sentences` a batch.

    `muon_rate`, here and below: the rate of Muon for the matrices of the hypernetwork; None: AdamW for all. `whiten`:
    keys are learned in whitened coordinates (see `readout.KeysAndValues`).
    """

    steps: int
    sentences: int
    learning_rate: float
    warmup_steps: int
    muon_rate: float | None = None
    whiten: bool = True


@dataclass(frozen=True, kw_only=True)
class NeedlePreset(HypernetworkPreset):
    """A hypernetwork trained on needles: its sizes, the contexts it sees and the rates.

    `max_repeats`: needle-free chunks count up to this many times in training, which is what a long haystack does to
    them, for a block of weight K is K equal blocks. `empty_share`: contexts without a needle. There are two stages (see
    `training.NeedleBatches`); `polish_steps` and `polish_learning_rate` belong to the second, which is about filler.
    """

    shortest: int
    longest: int
    min_chunk_tokens: int
    chunk_probabilities: dict[int, float]
    max_repeats: int
    empty_share: float
    l1: float
    steps: int
    contexts: int
    learning_rate: float
    warmup_steps: int
    chunk_tokens: int
    polish_steps: int = 0
    polish_learning_rate: float = 0.0
    readout: ReadoutPreset | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class DistillationPreset(HypernetworkPreset):
    """A hypernetwork trained on answers to questions about documents (see `distillation.DistillationBatches`).

    Chunks have at most a random number of tokens between `shortest_chunk` and `longest_chunk`; in the first
    `single_chunk_share` of the steps each document is one chunk. A batch has up to `contexts` documents and is full at
    `chunks` chunks; of each document up to `questions` questions are asked, and one more than it has chunks at most.
    `distil`: learn the teacher's log-probabilities; False: its answers alone (cross-entropy). `last_layer`: only the
    last layer's blocks act and learn (see `training.Internalization`).

    Of fresh documents of the world (`distillation.WorldDocuments`): the contexts of a batch have one number of facts,
    from `least_facts` to at most `most_facts`, where the latter is approached between the two shares of the run in
    `facts_grow`; `strangers_share` of the contexts hold several documents; `unrelated_share` of the questions are about
    the encyclopedia, `unanswerable_share` of the rest have no answer in the document, and the others are of `kinds`
    (None: of all).
    `chunk_tokens`: what `internalize` takes by default.
    """

    shortest_chunk: int
    longest_chunk: int
    single_chunk_share: float
    contexts: int
    questions: int
    l1: float
    steps: int
    learning_rate: float
    warmup_steps: int
    distil: bool = True
    last_layer: bool = False
    seed: int = 0
    chunks: int = 1024
    least_facts: int = 1
    most_facts: int = 12
    facts_grow: tuple[float, float] = (0.0, 0.5)
    kinds: tuple[str, ...] | None = None
    strangers_share: float = 0.0
    unrelated_share: float = 0.1
    unanswerable_share: float = 0.17
    chunk_tokens: int = 64
    muon_rate: float | None = None


@dataclass(frozen=True)
class QAPreset:
    """Question answering in five stages: the warm-up; fresh documents of the world, to recall their facts with the
    last layer alone; the same with all layers; smaller documents, with more questions about something else and more
    without an answer; self-generated data. None: without that stage. All stages train one hypernetwork, so their
    sizes must be the same. The warm-up is of the layers that the stage after it trains.
    """

    readout: ReadoutPreset | None
    recall: DistillationPreset | None
    world: DistillationPreset | None
    polish: DistillationPreset | None
    self_generated: DistillationPreset | None

    @property
    def stages(self) -> dict[str, DistillationPreset]:
        """The stages after the warm-up, in order."""
        named = {name: getattr(self, name) for name in ("recall", "world", "polish", "self_generated")}
        return {name: settings for name, settings in named.items() if settings is not None}


@dataclass(frozen=True)
class Preset:
    """Everything that a run needs to know."""

    name: str
    base: BaseModelPreset
    needle: NeedlePreset
    qa: QAPreset


# What each part of the needle training is for: the published recipe (but for the L1 term, which sets in half-way in
# all of them), ours, and ours with one part taken out. Without the warm-up the rest has to take longer.
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
            chunk_probabilities={1: 0.5, 2: 0.125, **dict.fromkeys(range(3, 9), 0.0625)},
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
            readout=ReadoutPreset(steps=200, sentences=48, learning_rate=1e-3, warmup_steps=50),
        ),
        qa=QAPreset(
            readout=ReadoutPreset(steps=2400, sentences=32, learning_rate=2e-3, warmup_steps=60, muon_rate=4e-3),
            recall=_TINY_RECALL,
            world=_TINY_QA,
            polish=replace(_TINY_QA, steps=800, most_facts=12, unrelated_share=0.2, unanswerable_share=0.35),
            self_generated=replace(_TINY_QA, steps=400, learning_rate=2e-4, muon_rate=2e-4),
        ),
    ),
}


# For comparisons of recipes: the warm-up and the recall stage of the bundled recipe, smaller and shorter.
SHORT_QA = QAPreset(
    readout=replace(PRESETS["tiny"].qa.readout, steps=800, warmup_steps=20),
    recall=replace(
        _TINY_RECALL,
        n_latent_queries=16,
        steps=300,
        warmup_steps=20,
        chunks=48,
        most_facts=48,
    ),
    world=None,
    polish=None,
    self_generated=None,
)
# What is changed in the warm-up and in the stage after it. `shards`: that stage learns from self-generated data.
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


def preset(name: str) -> Preset:
    """The preset called `name`; KeyError names the known ones."""
    if name not in PRESETS:
        raise KeyError(f"unknown preset {name!r}; known: {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
