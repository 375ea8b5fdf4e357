"""Needles in prose: one made-up sentence in novels, internalized, and in the prompt as far as that is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pandas as pd

from d2l_lib.adapter import Adapter, Block
from d2l_lib.loading import reading_lora, reading_lora_folder
from d2l_lib.model import DocToLoRA
from d2l_lib.studies import earlier_rows
from d2l_lib.studies.passages import ask, ask_reading, joined
from d2l_lib.tasks import prose, qa, scores
from d2l_lib.training.processes import shared
from d2l_lib.training.selfgen import read_texts

_NEW_TOKENS = 12
_PROMPT_TOKENS = 24  # the base model answers in sentences
_AT_ONCE = 16384  # tokens of prompts, for memory
IN_PROMPT = "haystack in the prompt"
WITH_LORA = f"{IN_PROMPT}, reading LoRA"


def run(
    model: DocToLoRA, n: int, seed: int, texts: str, lengths: Sequence[int], in_prompt: Sequence[int]
) -> Iterator[list[dict]]:
    """After each length all rows so far: for each method and kind of needle n haystacks, right answers, interval.

    Recorded rows of other lengths stay.

    texts: a folder of .txt files, or a .jsonl file (see `selfgen.read_texts`).
    lengths: of haystacks, in tokens. in_prompt: those that the base model also reads in its prompt.

    An answer is right by SQuAD's exact match; in the prompt it is also counted where the reply holds the answer's
    words, as the base model answers in sentences. With its reading LoRA, if it has one, it answers in a few words.
    """
    stories = read_texts(texts)
    rows = [row for row in earlier_rows("prose_needles") if row["length_tokens"] not in lengths]
    lora = reading_lora(model) if in_prompt and reading_lora_folder(model).is_dir() else None
    for length in lengths:
        some = list(prose.haystacks(stories, model.tokenizer, length, n, seed, piece_tokens=model.chunk_tokens))
        asked = [one.needle.question for one in some]
        replies, seconds = _ask_inside(model, some)
        rows += _rows("Doc-to-LoRA", length, some, replies, seconds)
        replies, seconds = ask(model, asked, [None] * n, _NEW_TOKENS)
        rows += _rows("question alone", length, some, replies, seconds)
        if length in in_prompt:
            prompts = [
                qa.with_document(one.text, [question], model.tokenizer, model.window, _PROMPT_TOKENS)[0]
                for one, question in zip(some, asked, strict=True)
            ]
            for reader in [None] if lora is None else [None, lora]:
                replies, seconds = _ask_in_prompt(model, prompts, length, reader)
                rows += _rows(IN_PROMPT if reader is None else WITH_LORA, length, some, replies, seconds)
        print(length, {row["method"]: row["exact_match"] for row in rows if row["length_tokens"] == length}, flush=True)
        yield sorted(rows, key=lambda row: row["length_tokens"])


def _ask_inside(model: DocToLoRA, some: Sequence[prose.ProseHaystack]) -> tuple[list[str], float]:
    """(answers with each haystack inside, seconds of the processor for each); one stretch at a time, for memory."""
    of_stretch: dict[int, list[int]] = {}
    for place, one in sorted(enumerate(some), key=lambda pair: pair[1].stretch):
        of_stretch.setdefault(one.stretch, []).append(place)

    def work(places: list[int]) -> tuple[list[str], float]:
        own = [some[place] for place in places]
        of_piece = _blocks_of(model, [piece for one in own for piece in one.pieces])
        adapters = [
            model.adapter_of([replace(of_piece[piece], chunk=k) for k, piece in enumerate(one.pieces)]) for one in own
        ]
        answers, each = ask(model, [one.needle.question for one in own], adapters, _NEW_TOKENS)
        print(f"{len(own)} haystacks of {own[0].length_tokens} tokens", flush=True)
        return answers, each * len(own)

    replies, seconds = [""] * len(some), 0.0
    for places, (answers, own_seconds) in zip(
        of_stretch.values(), shared(list(of_stretch.values()), work), strict=True
    ):
        seconds += own_seconds
        for place, answer in zip(places, answers, strict=True):
            replies[place] = answer
    return replies, round(seconds / len(some), 4)


def _ask_in_prompt(
    model: DocToLoRA, prompts: Sequence[str], length: int, lora: Adapter | None
) -> tuple[list[str], float]:
    """(answers of the base model, with this LoRA if there is one, seconds of the processor for each)."""
    size = max(1, _AT_ONCE // length)

    def work(start: int) -> tuple[list[str], float]:
        part = prompts[start : start + size]
        answers, each = (
            ask(model, part, [None] * len(part), _PROMPT_TOKENS)
            if lora is None
            else ask_reading(model, part, lora, _PROMPT_TOKENS)
        )
        return answers, each * len(part)

    return joined(shared(range(0, len(prompts), size), work))


def _blocks_of(model: DocToLoRA, pieces: Sequence[str]) -> dict[str, Block]:
    """{piece: its block}, each different piece internalized once."""
    distinct = list(dict.fromkeys(pieces))
    blocks = {}
    for piece, adapter in zip(distinct, model.internalize_each(distinct), strict=True):
        (block,) = adapter.blocks
        blocks[piece] = replace(block, document="haystack")
    return blocks


def _rows(
    method: str, length: int, some: Sequence[prose.ProseHaystack], replies: Sequence[str], seconds: float
) -> list[dict]:
    """A row for each kind of needle, and one for all."""
    frame = pd.DataFrame(
        {
            "kind": [one.needle.kind for one in some],
            "right": [scores.exact_match(r, one.needle.answer, "squad") for r, one in zip(replies, some, strict=True)],
            "held": [
                scores.token_scores(r, one.needle.answer, "squad").recall == 1
                for r, one in zip(replies, some, strict=True)
            ],
        }
    )
    rows = []
    for kind, own in [*frame.groupby("kind"), ("all", frame)]:
        low, high = scores.wilson(int(own["right"].sum()), len(own))
        row = {"method": method, "length_tokens": length, "kind": kind, "n": len(own)}
        row |= {"exact_match": own["right"].mean(), "low": low, "high": high, "holds_answer": own["held"].mean()}
        rows.append(row | {"seconds": seconds})
    return rows
