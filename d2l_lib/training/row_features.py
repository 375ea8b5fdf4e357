"""What a base model makes of passages and of questions about them, computed once and kept on disk.

The base model is frozen, and token rows are read in its upper layers alone. So training them needs of the layers below

    of a passage    token ids, and the hidden states that the hypernetwork reads
    of a question   the residual stream below the upper layers, at each token of the question and its right answer (the
                    question alone in the prompt)

A folder of features holds files of some passages each, complete or absent, so a killed run continues.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from d2l_lib.documents import chat_affixes, chunk_document, context_ids, question_ids, stop_ids
from d2l_lib.encoder import ContextEncoder
from d2l_lib.engine import pad_rows
from d2l_lib.formats.writing import atomic_file
from d2l_lib.lora import hooked, without_lora
from d2l_lib.row_reader import check_parts, part_of_layers
from d2l_lib.tasks.qa import group_by_document
from d2l_lib.training.processes import process_index, processes

PER_FILE = 24  # passages of a file
_POOL = 64  # passages, from which batches of like size are made
_LARGEST = 6e4  # float16
_BATCH = 6, 24  # passages, questions


Prompt = tuple[Tensor, Tensor]  # its stream into the first upper layer, its ids


@dataclass(frozen=True)
class Limits:
    """Which passages and questions are used: the most tokens of each, and questions of a passage."""

    passage_tokens: int = 200
    question_tokens: int = 60
    answer_tokens: int = 12
    questions: int = 5


@dataclass(frozen=True)
class Passage:
    """Token ids of a passage without chat wrapping, and its questions: (prompt ids, answer ids with the end, text)."""

    text: str
    ids: list[int]
    questions: list[tuple[list[int], list[int], str]]


def passages_of(frame: pd.DataFrame, tokenizer, limits: Limits) -> list[Passage]:
    """The usable passages of a table of questions (see `tasks.qa.load_qa`), in its order; then chunks of longer ones.

    A question is used if its first answer stands in the passage (in one chunk alone, where there are several) and both
    are short enough.
    """
    whole, parts = [], []
    for document, group in group_by_document(frame):
        questions = list(zip(group["question"], (one[0] for one in group["answers"]), strict=True))
        if len(_ids(document, tokenizer)) <= limits.passage_tokens:
            whole.append((document, questions))
            continue
        texts = [chunk.text for chunk in chunk_document(document, tokenizer, limits.passage_tokens)]
        places = [[number for number, text in enumerate(texts) if answer in text] for _, answer in questions]
        for number, text in enumerate(texts):
            parts.append((text, [one for one, its in zip(questions, places, strict=True) if its == [number]]))
    found = (_passage(text, questions, tokenizer, limits) for text, questions in whole + parts if questions)
    return [one for one in found if one.questions]


def never_learned(n_passages: int, n: int) -> set[int]:
    """Numbers of the n of these passages that validation takes, the same in every training."""
    return set(random.Random("rows/validation").sample(range(n_passages), n))


def questions_on_learned(frame: pd.DataFrame, tokenizer, limits: Limits, validation: int) -> pd.DataFrame:
    """The rows of a training's first table that ask about documents from which it learned.

    A document counts if a passage of it was learned, and none is of the `validation` ones that never were; then all its
    questions are given, also those that the training could not use. ValueError for data with too few usable passages.
    """
    passages = passages_of(frame, tokenizer, limits)
    if len(passages) <= validation:
        raise ValueError(
            f"{len(passages)} passages have a question whose answer stands in at most {limits.passage_tokens} tokens; "
            f"the training needs more than {validation}: is this its file?"
        )
    drawn = never_learned(len(passages), validation)
    learned = {one.text: number not in drawn for number, one in enumerate(passages)}
    seen = {}
    for document in frame["document"].unique():
        whole = document in learned
        texts = [document] if whole else [c.text for c in chunk_document(document, tokenizer, limits.passage_tokens)]
        known = [learned[text] for text in texts if text in learned]
        seen[document] = bool(known) and all(known)
    return frame[[seen[document] for document in frame["document"]]].reset_index(drop=True)


def batches_of_like_size(rng: random.Random, sizes: Sequence[int], n: int) -> list[list[int]]:
    """All places of `sizes` in batches of n of like size, each from `_POOL` places that are drawn."""
    order, batches = list(range(len(sizes))), []
    rng.shuffle(order)
    for start in range(0, len(order), _POOL):
        pool = sorted(order[start : start + _POOL], key=lambda i: sizes[i])
        batches += [pool[i : i + n] for i in range(0, len(pool), n)]
    return batches


def _ids(text: str, tokenizer) -> list[int]:
    """Token ids without chat wrapping."""
    before, after = map(len, chat_affixes(tokenizer))
    ids = context_ids(tokenizer, text)
    return ids[before : len(ids) - after]


def _passage(text: str, questions: Sequence[tuple[str, str]], tokenizer, limits: Limits) -> Passage:
    """A passage with those of its (question, answer) that are used."""
    ids, places = _ids(text, tokenizer), _places(text.strip(), tokenizer)  # chat templates strip texts, too
    prompts = question_ids(tokenizer, [question for question, _ in questions])
    used = []
    for prompt, (_, answer) in zip(prompts, questions, strict=True):
        span = _span(text.strip(), answer, places) if len(places) == len(ids) else None
        if span and len(prompt) <= limits.question_tokens and span[1] - span[0] <= limits.answer_tokens:
            used.append((prompt, [*ids[slice(*span)], stop_ids(tokenizer)[0]], answer))
    return Passage(text, ids, used[: limits.questions])


def _places(text: str, tokenizer) -> list[tuple[int, int]]:
    """For each token of a text its first and last character, spaces around it left out."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    parts = [(end - len(text[start:end].lstrip()), start, end) for start, end in offsets]
    return [(first, first + len(text[start:end].strip())) for first, start, end in parts]


def _span(text: str, answer: str, places: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """(first, end): the tokens of the first place where an answer stands as whole tokens; None if there is none."""
    starts = {first: number for number, (first, end) in enumerate(places) if end > first}
    ends = {end: number + 1 for number, (first, end) in enumerate(places) if end > first}
    at = text.find(answer)
    while at >= 0:
        if at in starts and at + len(answer) in ends:
            return starts[at], ends[at + len(answer)]
        at = text.find(answer, at + 1)
    return None


def write_features(
    base_model: nn.Module,
    tokenizer,
    passages: Sequence[Passage],
    folder: Path,
    *,
    encoder: ContextEncoder,
    facts: dict[str, object],
) -> None:
    """Fill `folder` with the features of these passages; files that are there already are kept. Processes share them.

    encoder: of type hidden_states; state 0, the embeddings, is left out of the files.
    facts: of `facts_of`, what the numbers depend on.

    ValueError if a file names other facts, and for a model whose upper layers cannot run alone.
    """
    check_parts(base_model, passages[0].questions[0][0], int(facts["below"]))
    folder.mkdir(parents=True, exist_ok=True)
    parts = range(0, len(passages), PER_FILE)
    for number, start in enumerate(parts):
        file = folder / f"features-{number:05}.safetensors"
        if file.exists():
            _check_facts(file, facts)
            continue
        if number % processes() != process_index():
            continue
        tensors = _features(base_model, tokenizer, passages[start : start + PER_FILE], encoder, int(facts["below"]))
        with atomic_file(file) as unfinished:
            save_file(tensors, unfinished, metadata={"facts": json.dumps(facts)})
        print(f"features {number + 1} of {len(parts)}", flush=True)
    while not all((folder / f"features-{number:05}.safetensors").exists() for number in range(len(parts))):
        time.sleep(0.5)  # for those of other processes


def _check_facts(file: Path, facts: dict[str, object]) -> None:
    with safe_open(file, "pt") as opened:
        there = json.loads((opened.metadata() or {}).get("facts", "null"))
    if there != json.loads(json.dumps(facts)):
        raise ValueError(f"{file} holds features of {there}, not of {facts}: choose another folder")


@torch.no_grad()
def _features(base_model, tokenizer, passages: Sequence[Passage], encoder: ContextEncoder, below: int) -> dict:
    """The tensors of one file (see `Features`)."""
    before, _ = chat_affixes(tokenizer)
    states = []
    for start in range(0, len(passages), _BATCH[0]):
        batch = passages[start : start + _BATCH[0]]
        ids, mask = pad_rows([before + one.ids for one in batch], tokenizer.pad_token_id)
        features = encoder.encode(ids.to(base_model.device), mask.to(base_model.device))
        own = features.shape[-1] // len(encoder.encoder_layers) * (0 in encoder.encoder_layers)
        states += [
            row[len(before) : len(before) + len(one.ids), own:] for row, one in zip(features, batch, strict=True)
        ]
    questions = [(number, *question) for number, one in enumerate(passages) for question in one.questions]
    stream = streams_below(base_model, tokenizer, [q[1] + q[2][:-1] for q in questions], below)
    return {
        "ids": torch.tensor([token for one in passages for token in one.ids]),
        "lengths": torch.tensor([len(one.ids) for one in passages]),
        "states": torch.cat(states).clamp(-_LARGEST, _LARGEST).half().cpu(),
        "stream": torch.cat(stream).clamp(-_LARGEST, _LARGEST).half().cpu(),
        "prompt_lengths": torch.tensor([len(q[1]) for q in questions]),
        "labels": torch.tensor([token for q in questions for token in q[2]]),
        "answer_lengths": torch.tensor([len(q[2]) for q in questions]),
        "passage": torch.tensor([q[0] for q in questions]),
    }


def streams_below(base_model, tokenizer, rows: Sequence[list[int]], below: int) -> list[Tensor]:
    """For each row of ids [T, hidden]: the residual stream that goes into layer `below`."""

    def inputs(part: list[int]) -> dict[str, Tensor]:
        ids, mask = pad_rows([rows[i] for i in part], tokenizer.pad_token_id)
        return {"input_ids": ids.to(base_model.device), "attention_mask": mask.to(base_model.device)}

    return _streams_after(base_model, slice(below), [len(row) for row in rows], inputs)


@torch.no_grad()
def streams_higher(base_model, streams: Sequence[Tensor], below: int, layer: int) -> list[Tensor]:
    """For each stream into layer `below` [T, hidden]: the one into a higher layer."""
    if layer == below:
        return list(streams)

    def inputs(part: list[int]) -> dict[str, Tensor]:
        rows = nn.utils.rnn.pad_sequence([streams[i].float() for i in part], batch_first=True)
        return {"inputs_embeds": rows.to(base_model.device, base_model.dtype)}

    higher = _streams_after(base_model, slice(below, layer), [len(one) for one in streams], inputs)
    return [one.to(own) for one, own in zip(higher, streams, strict=True)]


def _streams_after(
    base_model, layers: slice, sizes: Sequence[int], inputs: Callable[[list[int]], dict[str, Tensor]]
) -> list[Tensor]:
    """For each sequence of `sizes` tokens [T, hidden]: the stream after these layers; inputs: of some of them."""
    body, last, done = part_of_layers(base_model, layers), {}, {}
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])

    def keep(_, __, out) -> None:
        last["h"] = layer_output(out)

    with hooked(body.layers[-1].register_forward_hook, keep), without_lora(base_model):
        for start in range(0, len(order), _BATCH[1]):
            part = order[start : start + _BATCH[1]]
            body(**inputs(part), use_cache=False)
            done |= {i: last["h"][row, : sizes[i]].float() for row, i in enumerate(part)}
    return [done[i] for i in range(len(sizes))]


@dataclass(frozen=True)
class Features:
    """Features of one passage.

    ids [T], states [T, states * F]. Of each of its questions: streams [its tokens, hidden], the ids of its answer with
    the end, and the ids of its prompt.
    """

    ids: Tensor
    states: Tensor
    streams: tuple[Tensor, ...]
    answers: tuple[Tensor, ...]
    prompts: tuple[Tensor, ...]


def read_features(folder: Path, passages: Sequence[Passage], first: bool = False) -> list[Features]:
    """The features of these passages, from a folder that `write_features` filled with them.

    first: the folder may hold more passages behind these.

    FileNotFoundError for a folder without files; ValueError for one of other passages.
    """
    files = sorted(folder.glob("features-*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no features in {folder}: make them first")
    if first:
        files = files[: -(-len(passages) // PER_FILE)]
    every = [one for file in files for one in _passages_in(file)]
    if [ids.tolist() for ids, *_ in every] != [one.ids for one in passages]:
        raise ValueError(f"{folder} holds features of other passages: choose another folder")
    prompts = [tuple(torch.tensor(prompt) for prompt, _, _ in one.questions) for one in passages]
    return [Features(*tensors, own) for tensors, own in zip(every, prompts, strict=True)]


def _passages_in(file: Path) -> Iterator[tuple]:
    """(ids, states, streams, answers) of each passage of a file."""
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    ids, states = (tensors[name].split(tensors["lengths"].tolist()) for name in ("ids", "states"))
    prompts, lengths = tensors["prompt_lengths"].tolist(), tensors["answer_lengths"].tolist()
    streams = tensors["stream"].split([prompt + length - 1 for prompt, length in zip(prompts, lengths, strict=True)])
    answers, owner = tensors["labels"].split(lengths), tensors["passage"]
    for passage in range(len(ids)):
        of = (owner == passage).nonzero()[:, 0].tolist()
        yield ids[passage], states[passage], tuple(streams[i] for i in of), tuple(answers[i] for i in of)


def facts_of(
    base_key: str, frame: pd.DataFrame, encoder: ContextEncoder, below: int, limits: Limits
) -> dict[str, object]:
    """What features depend on, for `write_features`; the questions' table by a hash."""
    texts = frame[["document", "question"]].to_csv(index=False) + str(list(frame["answers"]))
    return {
        "base_key": base_key,
        "questions": hashlib.sha256(texts.encode()).hexdigest()[:16],
        "encoder_layers": list(encoder.encoder_layers),
        "below": below,
        "limits": asdict(limits),
        "answers": "in the tokens of the passage",
    }


def layer_output(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What a decoder layer gives back, alone."""
    return out if isinstance(out, Tensor) else out[0]


def whitening(x: Tensor) -> Tensor:
    """[d, d], symmetric: x [N, d] times it has like size in all directions, and a length near 1."""
    x = x.double()
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    ridge = 0.02 * values.mean()
    return (vectors * (values + ridge).rsqrt() @ vectors.T / x.shape[1] ** 0.5).float()
