"""Lists: what several blocks say together where each holds one item, and whether a block can say its item at all."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pandas as pd
import torch

from d2l_lib.adapter import Adapter
from d2l_lib.documents import question_ids
from d2l_lib.model import DocToLoRA
from d2l_lib.routing import weigh
from d2l_lib.tasks import qa, world
from d2l_lib.tasks.scores import wilson

_FACTS = 12  # of a document
_BETWEEN = ", "  # items of an answer
NEAR = (1.0, 2.0, 4.0)  # nats below the best block's score


def draw_lists(model: DocToLoRA, n: int, seed: int, split: str) -> list[tuple[world.Question, world.Document, Adapter]]:
    """`n` list questions, each with its document and adapter."""
    rng, drawn = random.Random(f"lists/{split}/{seed}"), []
    while len(drawn) < n:
        document = world.draw_document(rng, split, _FACTS)
        if (question := world.ask(rng, document, "list")) is not None:
            drawn.append((question, document, model.internalize_each([document.text])[0]))
    return drawn


@torch.no_grad()
def _near_best(model: DocToLoRA, texts: Sequence[str], adapters: Sequence[Adapter], nats: float) -> list[Adapter]:
    """Each adapter with the blocks that the router scores at most `nats` below its best one, and above none."""
    weighed, kept = weigh(model, model.router, question_ids(model.tokenizer, list(texts)), adapters), []
    scores, _ = model.router([one.responses for one in weighed])
    for one, (none, *of_each) in zip(weighed, scores.tolist(), strict=True):
        least = max(none, max(of_each) - nats)
        near = [block for block, score in zip(one.adapter.blocks, of_each, strict=False) if score >= least]
        kept.append(one.adapter._with(blocks=tuple(near)))
    return kept


def _holding(question: world.Question, adapter: Adapter) -> Adapter:
    """The adapter with the blocks that hold an item, as the document tells."""
    held = [
        block
        for block in adapter.blocks
        if any(block.span[0] < end and start < block.span[1] for start, end in question.evidence)
    ]
    return adapter._with(blocks=tuple(held))


def _each_asked(model: DocToLoRA, texts: Sequence[str], adapters: Sequence[Adapter]) -> list[str]:
    """What each block answers alone, in their order and once, joined."""
    alone = [(row, one._with(blocks=(block,))) for row, one in enumerate(adapters) for block in one.blocks]
    items: list[dict[str, None]] = [{} for _ in texts]
    said = model.answer([texts[row] for row, _ in alone], [one for _, one in alone])
    for (row, _), answer in zip(alone, said, strict=True):
        if answer != model.router.config.refusal:
            items[row][answer] = None
    return [_BETWEEN.join(one) or model.router.config.refusal for one in items]


def measure_lists(model: DocToLoRA, n: int, seed: int, split: str = "test") -> pd.DataFrame:
    """Exact match of list questions: way, blocks (mean number that answers), n, share, low, high, first_words,
    right_blocks.

    first_words: the share of answers that begin with the right answer's first word. right_blocks: of questions for
    which exactly the blocks that hold an item answer. Ways: the router's one block; the blocks near its best (see
    `NEAR`), their sum, read sparsely, or each asked alone; the blocks that hold an item, which only the document can
    tell, in the same three ways; the document in the prompt.
    """
    drawn = draw_lists(model, n, seed, split)
    texts, adapters = [question.text for question, _, _ in drawn], [adapter for _, _, adapter in drawn]
    sets = {f"within {nats:g} nats of the best": _near_best(model, texts, adapters, nats) for nats in NEAR}
    sets["those that hold an item"] = [_holding(question, adapter) for question, _, adapter in drawn]
    one = _near_best(model, texts, adapters, 0.0)
    ways = [("the router's block", one, model.answer(texts, adapters, blocks=1))]
    for name, several in sets.items():
        ways += [
            (f"{name}: sum", several, model.answer(texts, several, read="sum")),
            (f"{name}: sparse", several, model.answer(texts, several, read="sparse")),
            (f"{name}: each alone", several, _each_asked(model, texts, several)),
        ]
    prompts = [
        qa.with_document(document.text, [question.text], model.tokenizer, model.window, 64)[0]
        for question, document, _ in drawn
    ]
    ways.append(("in context", None, model.answer(prompts, None)))
    return pd.DataFrame([_row(way, several, answers, drawn) for way, several, answers in ways]).assign(split=split)


def _row(way: str, several: list[Adapter] | None, answers: list[str], drawn: list) -> dict:
    right = sum(answer == question.answer for answer, (question, _, _) in zip(answers, drawn, strict=True))
    first = [answer.split()[:1] == q.answer.split()[:1] for answer, (q, _, _) in zip(answers, drawn, strict=True)]
    low, high = wilson(right, len(drawn))
    row = {"way": way, "n": len(drawn), "share": right / len(drawn), "low": low, "high": high}
    row |= {"first_words": sum(first) / len(drawn), "blocks": None, "right_blocks": None}
    if several is not None:
        held = [{block.chunk for block in _holding(question, adapter).blocks} for question, _, adapter in drawn]
        chosen = [{block.chunk for block in adapter.blocks} for adapter in several]
        row["blocks"] = sum(map(len, chosen)) / len(chosen)
        row["right_blocks"] = sum(a == b for a, b in zip(held, chosen, strict=True)) / len(held)
    return row


def run(model: DocToLoRA, n: int, seed: int) -> pd.DataFrame:
    """The record: `measure_lists` on test documents."""
    return measure_lists(model, n, seed)
