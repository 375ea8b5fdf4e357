"""Distillation: a hypernetwork learns what the base model answers with the document in its prompt (paper, main stage).

    self-generated shards  ->  batches of documents in chunks, with questions  ->  `training.Internalization`

The teacher's answers and their top-16 log-probabilities are read from `selfgen` shards (or published ones); the student
sees the question alone. Batch i is a function of (seed, i), as everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .documents import chat_affixes, chunk_document, context_ids
from .hypernetwork import Hypernetwork
from .packing import IGNORED, dataset_probabilities, split_into_chunks
from .presets import DistillationPreset
from .training import chunk_batch, pad_right, train_hypernetwork


class DistillationBatches(Dataset):
    """Batches of documents in chunks and questions about them; item i is a function of (seed, i).

    sources: data sets as `selfgen.read_shards` returns them, drawn from with `weights` (default: by size, see
    `packing.dataset_probabilities`). In the first `single_chunk_share` of the steps a document is one chunk, and only
    documents of at most `longest_chunk` tokens are drawn; after that each context is cut into chunks of its own random
    size. ValueError where no document is short enough to begin with, or where weights and sources differ in number.

    Item: chunk_ids, chunk_mask, order, n_chunks [contexts] as in `training.NeedleBatches`; n_questions [contexts];
    input_ids, labels [questions, length]; teacher_log_probs, teacher_indices [answer tokens, k].
    """

    def __init__(
        self, tokenizer, p: DistillationPreset, sources: Sequence, seed: int, weights: Sequence[float] | None = None
    ):
        if weights is not None and len(weights) != len(sources):
            raise ValueError(f"{len(weights)} weights for {len(sources)} data sets: give one for each")
        self.tokenizer, self.p, self.sources, self.seed = tokenizer, p, list(sources), seed
        self.weights = list(weights or dataset_probabilities([len(source) for source in sources]))
        self.prefix, self.suffix = chat_affixes(tokenizer)
        wrapping = len(self.prefix) + len(self.suffix)
        self.short = [
            [row for row, ids in enumerate(source["ctx_ids"]) if len(ids) <= p.longest_chunk + wrapping]
            for source in self.sources
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
        for _ in range(p.contexts):
            sample = self._draw(rng, single)
            pieces = [sample["ctx_ids"]] if single else self._cut(rng, sample)
            chunks += pieces
            n_chunks.append(len(pieces))
            asked = rng.sample(range(len(sample["input_ids"])), min(p.questions, len(sample["input_ids"])))
            n_questions.append(len(asked))
            for q in asked:
                ids, (start, end) = sample["input_ids"][q], sample["response_start_end"][q]
                rows.append(ids[:end])
                labels.append([IGNORED] * start + ids[start:end])
                values += sample["logprobs_vals"][q]
                indices += sample["logprobs_indices"][q]
        return {
            **chunk_batch(chunks, n_chunks, self.tokenizer.pad_token_id),
            "n_questions": torch.tensor(n_questions),
            "input_ids": pad_right(rows, self.tokenizer.pad_token_id)[0],
            "labels": pad_right(labels, IGNORED)[0],
            "teacher_log_probs": torch.tensor(values, dtype=torch.float32),
            "teacher_indices": torch.tensor(indices),
        }

    def _draw(self, rng: random.Random, single: bool) -> dict:
        rows = self.short if single else [range(len(source)) for source in self.sources]
        weights = [weight if len(own) else 0.0 for weight, own in zip(self.weights, rows, strict=True)]
        place = rng.choices(range(len(rows)), weights)[0]
        return self.sources[place][rng.choice(rows[place])]

    def _cut(self, rng: random.Random, sample: dict) -> list[list[int]]:
        """The document in chunks of at most a random number of tokens: at sentence ends where its text is known, else
        at any token, as published.
        """
        size = rng.randint(self.p.shortest_chunk, self.p.longest_chunk)
        if text := sample.get("document"):
            return context_ids(self.tokenizer, [chunk.text for chunk in chunk_document(text, self.tokenizer, size)])
        n_chunks = -(-len(sample["ctx_ids"]) // size)
        return split_into_chunks(sample["ctx_ids"], n_chunks, self.prefix, self.suffix)


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
    `run`; `options` go to `training.fit`.
    """
    batches = DistillationBatches(tokenizer, p, sources, seed, weights)
    return train_hypernetwork(p, base_model, batches, run, seed, base_name, distil=p.distil, **options)
