"""Question answering: a hypernetwork learns what the base model answers with the document in its prompt.

    single sentences, questions  ->  `readout.KeysAndValues`: a block's rows as keys and values
    documents of the world       ->  `training.Internalization`, the last layer alone: many facts side by side
    documents of the world       ->  \
                                      batches of documents in chunks, with questions  ->  `training.Internalization`
    self-generated shards        ->  /

The paper's main stage is the last line: the teacher's answers and their top-16 log-probabilities are read from
`selfgen` shards (or published ones), and the student sees the question alone. The world's documents are drawn fresh,
with the right answers. Batch i is a function of (seed, i), as everywhere.

    d2l train --stage qa               # the bundled hypernetwork, from nothing
    d2l train --stage qa --preset paper-gemma --shards FOLDER ...    # the published recipe on shards
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import Dataset

from d2l_lib.base_model import load_base_model
from d2l_lib.documents import chat_affixes, chunk_document, context_ids, question_ids, stop_ids
from d2l_lib.engine import TOP_K, pad_rows
from d2l_lib.formats.checkpoints import save_checkpoint
from d2l_lib.formats.shards import find_shards, read_shards
from d2l_lib.hypernetwork import Hypernetwork
from d2l_lib.presets import SHARD_STAGES, DistillationPreset, Preset, QAPreset
from d2l_lib.records import read_rows, write_jsonl
from d2l_lib.tasks import world
from d2l_lib.training.batches import IGNORED, count_chunks, dataset_probabilities, split_into_chunks
from d2l_lib.training.loop import chunk_batch, is_first_process, own_device
from d2l_lib.training.pretraining import QUESTION_WEIGHTS
from d2l_lib.training.step import (
    exceeds,
    fit_hypernetwork,
    hypernetwork_config,
    load_encoder,
    train_hypernetwork,
    without_step_options,
)
from d2l_lib.training.warm_up import (
    KeysAndValues,
    ReadoutBatches,
    key_whitening,
    let_blocks_act,
    plain_keys,
    spread_to_all_layers,
    start_linear,
    train_readout,
)

MOST_REFUSED = 1000  # documents in a row that are too long for a batch
CERTAIN = [0.0] + [-1e4] * (TOP_K - 1)  # log-probabilities of a teacher that has no doubt


# ------------------------------------------------------------------------------------------------------------- sources
class WorldDocuments:
    """A source of fresh documents of the world, with the right answers in place of a teacher's (cross-entropy).

    A question is about the encyclopedia with `p.unrelated_share`, has no answer with `p.unanswerable_share` of the
    rest, and is of one of the other kinds (those in `p.kinds`, if given) otherwise. With `p.strangers_share` the facts
    are shared out among several documents, one after another in one context.
    """

    def __init__(self, tokenizer, p: DistillationPreset, split: str = "train"):
        self.tokenizer, self.p, self.split = tokenizer, p, split
        self.kinds = [kind for kind in p.kinds or QUESTION_WEIGHTS if kind != "unanswerable"]
        self.weights = [QUESTION_WEIGHTS[kind] for kind in self.kinds]
        self.stop = stop_ids(tokenizer)[-1]  # that of the chat template, where it has one of its own

    def draw_size(self, rng: random.Random, progress: float) -> int:
        """How many facts the contexts of a batch have: log-uniform, so that each doubling is as likely; `progress` (0
        to 1) decides up to how many.
        """
        p, (start, end) = self.p, self.p.facts_grow
        growth = min(1.0, max(0.0, (progress - start) / max(1e-9, end - start)))
        return max(1, round(p.least_facts * (p.most_facts / p.least_facts) ** (growth * rng.random())))

    def draw(self, rng: random.Random, n_facts: int) -> dict:
        """A row as in `selfgen` shards, of a context of `n_facts` facts."""
        p = self.p
        count = round(n_facts ** rng.random()) if rng.random() < p.strangers_share else 1  # of documents
        sizes = [n_facts // count + (i < n_facts % count) for i in range(count)]
        distractors = rng.choice((0.0, 0.2, 0.5))
        documents = [world.draw_document(rng, self.split, size, distractors) for size in sizes]
        asked: list[world.Question] = []
        while len(asked) < min(p.questions, n_facts + 2):
            if rng.random() < p.unrelated_share:
                asked += world.encyclopedia_questions(rng, 1)
                continue
            (document,) = rng.choices(documents, sizes)
            unanswerable = rng.random() < p.unanswerable_share
            kind = "unanswerable" if unanswerable else rng.choices(self.kinds, self.weights)[0]
            question = world.ask(rng, document, kind)
            asked.append(question or world.question_about(rng, rng.choice(document.facts)))
        text = "\n".join(document.text for document in documents)
        questions = question_ids(self.tokenizer, [question.text for question in asked])
        answers = self.tokenizer([question.answer for question in asked], add_special_tokens=False)["input_ids"]
        answers = [ids + [self.stop] for ids in answers]
        return {
            "document": text,
            "ctx_ids": context_ids(self.tokenizer, text),
            "input_ids": [q + a for q, a in zip(questions, answers, strict=True)],
            "response_start_end": [[len(q), len(q) + len(a)] for q, a in zip(questions, answers, strict=True)],
            "logprobs_vals": [[CERTAIN] * len(ids) for ids in answers],
            "logprobs_indices": [[[token] + [0] * (TOP_K - 1) for token in ids] for ids in answers],
        }


# ------------------------------------------------------------------------------------------------------------- batches
class DistillationBatches(Dataset):
    """Batches of documents in chunks and questions about them; item i is a function of (seed, i).

    sources: data sets as `selfgen.read_shards` returns them, or `WorldDocuments`, drawn from with `weights` (default:
    by size, see `batches.dataset_probabilities`; needed where a source has no size). In the first `single_chunk_share`
    of the steps a document is one chunk, and of data sets only documents of at most `longest_chunk` tokens are drawn;
    after that each context is cut into chunks of its own random size, or, with `chunk_probabilities`, into a random
    number of equal ones. A batch is full at `contexts` documents or `chunks` chunks, or where the next document would
    exceed `context_tokens` or `input_tokens`. ValueError where no document is short enough to begin with or for a
    batch, or where weights and sources differ in number.

    Item: chunk_ids, chunk_mask, order, n_chunks [contexts] as in `training.NeedleBatches`; n_questions [contexts];
    input_ids, labels [questions, length]; teacher_log_probs, teacher_indices [answer tokens, k].
    """

    def __init__(
        self, tokenizer, p: DistillationPreset, sources: Sequence, seed: int, weights: Sequence[float] | None = None
    ):
        if weights is not None and len(weights) != len(sources):
            raise ValueError(f"{len(weights)} weights for {len(sources)} data sets: give one for each")
        self.tokenizer, self.p, self.sources, self.seed = tokenizer, p, list(sources), seed
        endless = [isinstance(source, WorldDocuments) for source in sources]
        if weights is None and any(endless):
            raise ValueError("documents of the world have no end: give weights for the sources")
        self.weights = list(weights or dataset_probabilities([len(source) for source in sources]))
        self.prefix, self.suffix = chat_affixes(tokenizer)
        wrapping = len(self.prefix) + len(self.suffix)
        longest = min(p.longest_chunk + wrapping, p.context_tokens or math.inf)
        self.short = [
            range(1) if is_endless else np.flatnonzero(context_lengths(source) <= longest).tolist()
            for source, is_endless in zip(self.sources, endless, strict=True)
        ]
        if p.single_chunk_share > 0 and not any(self.short):
            raise ValueError(
                f"no document has at most {p.longest_chunk} tokens: training begins with documents of one chunk, so "
                "add shorter ones, raise longest_chunk or set single_chunk_share to 0"
            )

    def __len__(self) -> int:
        return self.p.steps

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        rng, p = random.Random(f"distillation/{self.seed}/{i}"), self.p
        single = i < p.single_chunk_share * p.steps
        chunks: list[list[int]] = []
        rows, labels, n_chunks, n_questions, values, indices = [], [], [], [], [], []
        sizes = [
            source.draw_size(rng, i / p.steps) if isinstance(source, WorldDocuments) else 0 for source in self.sources
        ]
        refused = 0
        while len(n_chunks) < p.contexts and len(chunks) < p.chunks:
            sample = self._draw(rng, single, sizes)
            ends = [end for _, end in sample["response_start_end"]]
            usable = [q for q, end in enumerate(ends) if p.question_tokens is None or end <= p.question_tokens]
            pieces = [sample["ctx_ids"]] if single else self._cut(rng, sample)
            asked = rng.sample(usable, min(p.questions, len(usable), len(pieces) + 1))
            own = [sample["input_ids"][q][: ends[q]] for q in asked]
            if not asked or exceeds(p, chunks + pieces, rows + own):
                if asked and n_chunks:
                    break
                refused += 1
                if refused == MOST_REFUSED:
                    raise ValueError(
                        f"of {refused} documents none fits into a batch of {p.context_tokens} tokens with questions of "
                        f"{p.question_tokens}, {p.input_tokens} in all: raise context_tokens, question_tokens, "
                        "input_tokens, or cut the documents"
                    )
                continue
            chunks += pieces
            n_chunks.append(len(pieces))
            n_questions.append(len(asked))
            rows += own
            for q, ids in zip(asked, own, strict=True):
                start = sample["response_start_end"][q][0]
                labels.append([IGNORED] * start + ids[start:])
                values += sample["logprobs_vals"][q]
                indices += sample["logprobs_indices"][q]
        return {
            **chunk_batch(chunks, n_chunks, self.tokenizer.pad_token_id),
            "n_questions": torch.tensor(n_questions),
            "input_ids": pad_rows(rows, self.tokenizer.pad_token_id)[0],
            "labels": pad_rows(labels, IGNORED)[0],
            "teacher_log_probs": torch.tensor(values, dtype=torch.float32),
            "teacher_indices": torch.tensor(indices),
        }

    def _draw(self, rng: random.Random, single: bool, sizes: list[int]) -> dict:
        weights = [
            weight if len(own) or not single else 0.0 for weight, own in zip(self.weights, self.short, strict=True)
        ]
        place = rng.choices(range(len(weights)), weights)[0]
        source = self.sources[place]
        if isinstance(source, WorldDocuments):
            return source.draw(rng, sizes[place])
        return source[rng.choice(self.short[place]) if single else rng.randrange(len(source))]

    def _cut(self, rng: random.Random, sample: dict) -> list[list[int]]:
        """The document in chunks of at most a random number of tokens: at sentence ends where its text is known, else
        at any token, as published; or in a random number of chunks.
        """
        p, ids = self.p, sample["ctx_ids"]
        if p.chunk_probabilities is not None:
            n = count_chunks(
                len(ids), p.longest_chunk, min_length=p.shortest_chunk, probabilities=p.chunk_probabilities, rng=rng
            )
            return split_into_chunks(ids, n, self.prefix, self.suffix)
        size = rng.randint(p.shortest_chunk, p.longest_chunk)
        if text := sample.get("document"):
            return context_ids(self.tokenizer, [chunk.text for chunk in chunk_document(text, self.tokenizer, size)])
        return split_into_chunks(ids, -(-len(ids) // size), self.prefix, self.suffix)


def context_lengths(source) -> np.ndarray:
    """Tokens of each document of a data set as `selfgen.read_shards` returns it; no document is read."""
    if source._indices is None:
        return pc.list_value_length(source.data.column("ctx_ids")).to_numpy()
    return np.array([len(ids) for ids in source["ctx_ids"]])


def train_distillation(
    p: DistillationPreset,
    base_model,
    tokenizer,
    sources: Sequence,
    run: Path,
    seed: int,
    base_name: str,
    weights: Sequence[float] | None = None,
    **options,
) -> Hypernetwork:
    """A hypernetwork for `base_model` that learned the answers in `sources` (see DistillationBatches), resumable in
    `run`; `options` go to `trainer.fit`.
    """
    batches = DistillationBatches(tokenizer, p, sources, seed, weights)
    return train_hypernetwork(p, base_model, batches, run, seed, base_name, **options)


# --------------------------------------------------------------------------------------------------------- the command
def train_qa(
    p: QAPreset, base_model, tokenizer, run: Path, seed: int, base_name: str, shards: Path | Sequence | None, **options
) -> Hypernetwork:
    """A question-answering hypernetwork in the stages of `p`, each resumable in a folder of `run`.

    shards: a finished folder of `selfgen`, or data sets as `read_shards` returns them; None leaves out the stages that
    need them. `options` go to `training.fit_hypernetwork`.
    """
    torch.manual_seed(seed)
    first = next(iter(p.stages.values()))
    hypernetwork = Hypernetwork(hypernetwork_config(first, base_model, base_name))
    if p.readout is not None:
        start_linear(hypernetwork, base_model, tokenizer, seed)
        sentences = ReadoutBatches(tokenizer, p.readout, seed)
        (module,) = hypernetwork.config.modules
        whitening = key_whitening(base_model, module, sentences, directions=p.readout.whiten)
        warm_up = KeysAndValues(base_model, hypernetwork, whitening, last_layer=first.last_layer)
        train_readout(p.readout, warm_up, sentences, run / "readout", seed, **without_step_options(options))
        let_blocks_act(warm_up, sentences[0])
    only_last = first.last_layer
    for stage, settings in p.stages.items():
        if stage in SHARD_STAGES and shards is None:
            continue
        if only_last and not settings.last_layer and p.readout is not None:
            spread_to_all_layers(KeysAndValues(base_model, hypernetwork, whitening), sentences)
        only_last = settings.last_layer
        if stage not in SHARD_STAGES:
            sources = [WorldDocuments(tokenizer, settings)]
        else:
            sources = [read_shards(shards)] if isinstance(shards, str | Path) else shards
        weights = [1.0] if len(sources) == 1 else None
        batches = DistillationBatches(tokenizer, settings, sources, seed, weights)
        fit_hypernetwork(settings, base_model, hypernetwork, batches, run / stage, seed, **options)
    if p.readout is not None:
        plain_keys(hypernetwork)
    return hypernetwork


def remake_qa(p: Preset, runs: Path, data: Path, seed: int) -> None:
    """Train the bundled question-answering hypernetwork on the bundled base model; logs go to `data` too."""
    base_model, tokenizer = load_base_model(p.name)
    run = runs / p.name / f"qa_seed{seed}"
    hypernetwork = train_qa(p.qa, base_model, tokenizer, run, seed, p.name, None)
    if not is_first_process():
        return
    meta = {"preset": p.name, "seed": seed, "chunk_tokens": p.qa.world.chunk_tokens, "base_model": p.name}
    folder = data / p.name / "qa" if seed == p.qa.world.seed else run / "final"
    save_checkpoint(folder, hypernetwork, meta, torch.float16)
    for stage in ("readout", *p.qa.stages):
        if (run / stage / "log.jsonl").exists():
            log = [{"seed": seed, **line} for line in read_rows(run / stage / "log.jsonl")]
            write_jsonl(data / "full_runs" / f"qa_seed{seed}_{stage}_training.jsonl", log)


def train_own(
    p: QAPreset, source: str, run: Path, seed: int, meta: dict, shards: Sequence[Path], cache: Path, **options
):
    """Train a hypernetwork for the base model `source`, in the stages of `p`; it ends in `run`/final."""
    needs_shards = [stage for stage in p.stages if stage in SHARD_STAGES]
    if needs_shards and not shards and len(needs_shards) == len(p.stages):
        raise ValueError(f"the stages {', '.join(needs_shards)} learn from self-generated data: give --shards")
    stages = list(p.stages.values())
    base_model, tokenizer = load_base_model(source, device=own_device())
    known = base_model.get_input_embeddings().num_embeddings
    files_of = find_shards(shards).values() if shards else []
    data = [read_shards(files, cache, vocabulary=known) for files in files_of] or None
    encoder = load_encoder(stages[0], source)
    hypernetwork = train_qa(p, base_model, tokenizer, run, seed, source, data, encoder_model=encoder, **options)
    if is_first_process():
        meta = meta | {"seed": seed, "chunk_tokens": stages[-1].chunk_tokens, "base_model": source}
        save_checkpoint(run / "final", hypernetwork, meta)
