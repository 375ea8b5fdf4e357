"""Blocks in half precision: are answers what they are with all digits?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from d2l_lib.adapter import Adapter
from d2l_lib.model import DocToLoRA
from d2l_lib.studies import earlier_rows
from d2l_lib.tasks import facts, prose, scores, world
from d2l_lib.tasks.questions import world_samples
from d2l_lib.training.processes import shared
from d2l_lib.training.selfgen import read_texts

_FACTS = 8  # of a paragraph
_NEW_TOKENS = {"needles in novels": 12, "paragraphs of facts": 24, "generated world": 48}
_AT_ONCE = 32  # questions


def run(model: DocToLoRA, n: int, seed: int, texts: str, length: int) -> Iterator[list[dict]]:
    """A row for each sample of n questions: the share of equal answers, and of right ones with each precision.

    texts: a folder of .txt files, or a .jsonl file; length: of haystacks, in tokens. Rows of other models stay.

    A model of token rows is asked about needles and about paragraphs of facts, others about the generated world.
    """
    name = model.config.base_model
    rows = [row for row in earlier_rows("half_precision") if row["base_model"] != name]
    samples = _of_rows(model, n, seed, texts, length) if model.writes_rows else _of_sums(n, seed)
    for sample, documents, questions, answers in samples:

        def work(start: int, sample=sample, documents=documents, questions=questions) -> list[list[str]]:
            part = slice(start, start + _AT_ONCE)
            whole = [one.to(dtype=torch.float32) for one in model.internalize_each(list(documents[part]))]
            half = [one.to(dtype=torch.float16) for one in whole]
            return [_replies(model, questions[part], one, sample) for one in (whole, half)]

        parts = zip(*shared(range(0, n, _AT_ONCE), work), strict=True)
        replies = [[reply for part in own for reply in part] for own in parts]  # of whole numbers, and of half ones
        equal, right = sum(a == b for a, b in zip(*replies, strict=True)), {}
        for precision, its in zip(("float32", "float16"), replies, strict=True):
            marks = (scores.exact_match(r, a, "squad") for r, a in zip(its, answers, strict=True))
            right[precision] = int(sum(marks))
        print(f"{sample}: {equal} of {n} equal", flush=True)
        low, high = scores.wilson(equal, n)
        row = {"base_model": name, "sample": sample, "n": n, "equal": equal / n, "low": low, "high": high}
        rows.append(row | {f"exact_match_{precision}": count / n for precision, count in right.items()})
        yield rows


_Sample = tuple[str, Sequence[str], Sequence[str], Sequence[str]]


def _of_rows(model: DocToLoRA, n: int, seed: int, texts: str, length: int) -> Iterator[_Sample]:
    """(name, documents, questions, answers) of needles in prose and of facts."""
    pieces = {"piece_tokens": model.chunk_tokens}
    some = list(prose.haystacks(read_texts(texts), model.tokenizer, length, n, seed, **pieces))
    needles = [one.needle for one in some]
    own = [one.question for one in needles], [one.answer for one in needles]
    yield "needles in novels", [one.text for one in some], *own
    frame = facts.fact_samples(n, seed, (_FACTS, _FACTS), split="test")
    yield "paragraphs of facts", list(frame["document"]), list(frame["question"]), [one[0] for one in frame["answers"]]


def _of_sums(n: int, seed: int) -> Iterator[_Sample]:
    """Likewise of the generated world."""
    frame = world_samples(n, seed, facts=(1, 40), kinds=world.ONE_HOP_KINDS)
    yield "generated world", list(frame["document"]), list(frame["question"]), list(frame["answer"])


def _replies(model: DocToLoRA, questions: Sequence[str], adapters: Sequence[Adapter], sample: str) -> list[str]:
    return model.answer(list(questions), list(adapters), max_new_tokens=_NEW_TOKENS[sample])
