"""The contexts that a hypernetwork is trained on, drawn batch by batch.

    haystacks with a needle                                 ->  NeedleBatches
    fresh documents of the world, with the right answers    ->  WorldDocuments  ->  DistillationBatches
    shards, with a teacher's answers and log-probabilities  ->  read_shards     ->  DistillationBatches

Batch i is a function of (seed, i): a killed run continues with the batches it would have seen.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset

from d2l_lib.documents import chat_affixes, chunk_document, context_ids, question_ids, split_sentences, stop_ids
from d2l_lib.engine import TOP_K, pad_rows
from d2l_lib.presets import DistillationPreset, NeedlePreset
from d2l_lib.tasks import needles, world
from d2l_lib.training.batches import (
    IGNORED,
    Batch,
    Chunks,
    count_chunks,
    dataset_probabilities,
    exceeds,
    split_into_chunks,
)
from d2l_lib.training.pretraining import QUESTION_WEIGHTS

_MOST_REFUSED = 1000  # documents in a row that are too long for a batch
_CERTAIN = [0.0] + [-1e4] * (TOP_K - 1)  # log-probabilities of a teacher that has no doubt


# ------------------------------------------------------------------------------------------------------------ needles
class NeedleBatches(Dataset):
    """Batches of needle contexts, cut into chunks at sentence ends; item i is a `Batch`, a function of (seed, i).

    With `p.gradual` the first stage grows (without it, all is as at the end):

    - up to 30% of the steps: contexts grow from `shortest` to `longest` tokens;
    - from 50% to 90%: chunks without the needle are repeated ever more, in the end up to `max_repeats` times in all, as
      a stand-in for filler; `l1_share` grows from 0 to 1, as the L1 term from the start delays the digits.

    In the second stage, `polish`, contexts have all lengths, and `l1_share` is 1. Unless `max_repeats` is 1, the
    repeats of a context add up to 1/16 to 4 times `max_repeats`.

    A batch has `contexts` contexts, or fewer if the next one would exceed its tokens. Chunks are in the tokens and chat
    format of `encoder_tokenizer` (None: the base model's).
    """

    def __init__(self, tokenizer, p: NeedlePreset, seed: int, polish: bool = False, encoder_tokenizer=None):
        if p.max_chunk_tokens is not None and p.max_repeats > 1:
            raise ValueError(
                "chunks cut at any token may cut the needle, so none can be repeated: set max_repeats to 1"
            )
        self.tokenizer, self.p, self.seed, self.polish = tokenizer, p, seed, polish
        self.encoder_tokenizer = tokenizer if encoder_tokenizer is None else encoder_tokenizer
        self._question = question_ids(tokenizer, needles.QUESTION)
        self._prefix, self._suffix = chat_affixes(self.encoder_tokenizer)
        self._stop = stop_ids(tokenizer)[-1]  # that of the chat template, where it has one of its own

    def __len__(self) -> int:
        return self.p.polish_steps if self.polish else self.p.steps

    def __getitem__(self, i: int) -> Batch:
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
            answer = self.tokenizer(haystack.answer or world.UNKNOWN, add_special_tokens=False)["input_ids"]
            row = self._question + answer + [self._stop]
            if rows and exceeds(p, chunks + own, [*rows, row]):
                break
            chunks += own
            rows.append(row)
            n_chunks.append(len(own))
            repeats += [1.0 if needle else share for needle in has_needle]
        begin = len(self._question)
        return Batch(
            chunks=Chunks.of(chunks, n_chunks, self.encoder_tokenizer.pad_token_id),
            input_ids=pad_rows(rows, self.tokenizer.pad_token_id)[0],
            labels=pad_rows([[IGNORED] * begin + row[begin:] for row in rows], IGNORED)[0],
            n_questions=torch.ones(len(rows), dtype=torch.long),
            repeats=torch.tensor(repeats),
            l1_share=torch.tensor(growth),
        )

    def _chunks(self, rng: random.Random, haystack, length: int) -> tuple[list[list[int]], list[bool]]:
        """(chunks in chat format, whether each holds the needle); all False if cuts may lie anywhere."""
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
            chunks = split_into_chunks(ids, n, self._prefix, self._suffix)
            return chunks, [False] * len(chunks)
        pieces = _random_chunks(rng, haystack.text, length, p)
        ids = self.encoder_tokenizer(pieces, add_special_tokens=False)["input_ids"]
        has_needle = [haystack.needle_span is not None and needles.NEEDLE[:20] in piece for piece in pieces]
        return [self._prefix + piece + self._suffix for piece in ids], has_needle


def _random_chunks(rng: random.Random, text: str, length_tokens: int, p: NeedlePreset) -> list[str]:
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


# ------------------------------------------------------------------------------------------------------------- sources
class WorldDocuments:
    """A source of fresh documents of the world; the right answers replace a teacher's (cross-entropy).

    The kind of a question is drawn: encyclopedia (`p.unrelated_share`), else unanswerable (`p.unanswerable_share`),
    else one of `p.kinds` (None: all). In `p.strangers_share` of the contexts, several documents in a row share the
    facts.
    """

    def __init__(self, tokenizer, p: DistillationPreset, split: str = "train"):
        self.tokenizer, self.p, self.split = tokenizer, p, split
        self.kinds = [kind for kind in p.kinds or QUESTION_WEIGHTS if kind != "unanswerable"]
        self.weights = [QUESTION_WEIGHTS[kind] for kind in self.kinds]
        self.stop = stop_ids(tokenizer)[-1]  # that of the chat template, where it has one of its own

    def draw_size(self, rng: random.Random, progress: float) -> int:
        """The number of facts per context of a batch, log-uniform; its maximum grows with `progress` (0 to 1)."""
        p, (start, end) = self.p, self.p.facts_grow
        growth = min(1.0, max(0.0, (progress - start) / max(1e-9, end - start)))
        return max(1, round(p.least_facts * (p.most_facts / p.least_facts) ** (growth * rng.random())))

    def draw(self, rng: random.Random, n_facts: int) -> dict:
        """A row as in `selfgen` shards, for a context of `n_facts` facts."""
        p = self.p
        count = round(n_facts ** rng.random()) if rng.random() < p.strangers_share else 1  # documents
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
            "logprobs_vals": [[_CERTAIN] * len(ids) for ids in answers],
            "logprobs_indices": [[[token] + [0] * (TOP_K - 1) for token in ids] for ids in answers],
        }


# ------------------------------------------------------------------------------------------------------------- batches
class DistillationBatches(Dataset):
    """Batches of documents in chunks with questions; item i is a `Batch`, a function of (seed, i).

    In the first `single_chunk_share` of the steps a document is one chunk; data sets then give only documents of at
    most `longest_chunk` tokens. Later each document is cut into chunks of a random size, or, with
    `chunk_probabilities`, into a random number of equal chunks. A batch is full at `contexts` documents, at `chunks`
    chunks, or if the next document would exceed its tokens.

    sources: `WorldDocuments`, or data sets of `formats.shards.read_shards`.
    weights: of the sources. None: by size (see `dataset_probabilities`), which `WorldDocuments` do not have.

    ValueError if no document is short enough for the first steps or for a batch, or if weights are missing or their
    number differs from that of the sources.
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
            range(1) if is_endless else np.flatnonzero(_context_lengths(source) <= longest).tolist()
            for source, is_endless in zip(self.sources, endless, strict=True)
        ]
        if p.single_chunk_share > 0 and not any(self.short):
            raise ValueError(
                f"no document has at most {p.longest_chunk} tokens: training begins with documents of one chunk, so "
                "add shorter ones, raise longest_chunk or set single_chunk_share to 0"
            )

    def __len__(self) -> int:
        return self.p.steps

    def __getitem__(self, i: int) -> Batch:
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
                if refused == _MOST_REFUSED:
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
        return Batch(
            chunks=Chunks.of(chunks, n_chunks, self.tokenizer.pad_token_id),
            input_ids=pad_rows(rows, self.tokenizer.pad_token_id)[0],
            labels=pad_rows(labels, IGNORED)[0],
            n_questions=torch.tensor(n_questions),
            teacher_log_probs=torch.tensor(values, dtype=torch.float32),
            teacher_indices=torch.tensor(indices),
        )

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
        """The document in chunks: in a random number of them with `chunk_probabilities`, else of a random size.

        Chunks of a random size end at sentence ends if the text is known, else at any token, as published.
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


def _context_lengths(source) -> np.ndarray:
    """Tokens of each document of a data set of `read_shards`, without reading documents."""
    if source._indices is None:
        return pc.list_value_length(source.data.column("ctx_ids")).to_numpy()
    return np.array([len(ids) for ids in source["ctx_ids"]])
