"""What the base model knows, and what it reads in its prompt."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pandas as pd

from d2l_lib.documents import check_texts, question_ids
from d2l_lib.engine import greedy_texts
from d2l_lib.tasks import needles, world
from d2l_lib.tasks.questions import world_samples
from d2l_lib.tasks.scores import in_fives, summarise
from d2l_lib.training.processes import shared

_KINDS = {
    "one_hop": world.ONE_HOP_KINDS,
    "unanswerable": ("unanswerable",),
    "other_kinds": ("paraphrase", "two_hop", "yes_no", "which_of", "list"),
}


def greedy_answers(
    model, tokenizer, prompts: Sequence[str], max_new_tokens: int = 24, batch_tokens: int = 16384
) -> list[str]:
    """The base model's greedy answers to user turns `prompts`, batched by length, also beyond its window.

    Several processes share the batches.
    """
    ids = question_ids(tokenizer, check_texts(prompts, "prompts"))
    batches: list[list[int]] = []
    for i in sorted(range(len(ids)), key=lambda i: len(ids[i]))[::-1]:  # the first of a batch is its longest
        if not batches or (len(batches[-1]) + 1) * len(ids[batches[-1][0]]) > batch_tokens:
            batches.append([])
        batches[-1].append(i)

    def work(batch: list[int]) -> list[str]:
        return greedy_texts(model, tokenizer, [ids[i] for i in batch], [max_new_tokens] * len(batch))

    answers = [""] * len(ids)
    for batch, texts in zip(batches, shared(batches, work), strict=True):
        for i, text in zip(batch, texts, strict=True):
            answers[i] = text
    return answers


def _questions(tokenizer, n: int, seed: int, split: str, facts: tuple[int, int]) -> Iterator[dict]:
    rng = random.Random(f"base model/{split}/{seed}")

    def row(task: str, kind: str, question: str, answer: str, document: str = "", size: str = "") -> dict:
        prompt = f"{document}\n\n{question}" if document else question
        of_task = {"task": task, "kind": kind, "facts": size, "question": question, "answer": answer}
        return of_task | {"prompt": prompt}

    for i in range(n):
        length = (64, 128, 256, 512, 980)[i % 5]
        haystack = needles.build_haystack(tokenizer, length, rng.random(), needles.draw_number(rng, split))
        yield row("needle", f"{length} tokens", haystack.question, haystack.answer, haystack.text)
    for task, kinds in _KINDS.items():
        for sample in world_samples(n, seed, split=split, facts=facts, kinds=kinds).to_dict("records"):
            question = sample["kind"], sample["question"], sample["answer"], sample["document"]
            yield row(task, *question, in_fives(sample["n_facts"]))
    for question in world.encyclopedia_questions(rng, n):
        yield row("encyclopedia", question.kind, question.text, question.answer)
    for _ in range(n):
        question = world.unknown_question(rng, split)
        yield row("unknown", question.kind, question.text, question.answer)


def base_model_samples(
    model, tokenizer, n: int, seed: int, split: str = "test", facts: tuple[int, int] = (2, 20)
) -> pd.DataFrame:
    """`n` samples of each task of the base model.

    Columns: task, kind, facts, length_tokens, question, answer, prediction, correct. The column `facts` is the
    document's number of facts in fives ("6-10"), or empty without a document of facts. Documents, of `facts` (fewest,
    most) facts, and unknown names are from `split`.
    """
    rows = pd.DataFrame(_questions(tokenizer, n, seed, split, facts))
    prompts = list(rows.pop("prompt"))
    lengths = [len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
    rows = rows.assign(length_tokens=lengths, prediction=greedy_answers(model, tokenizer, prompts, max_new_tokens=48))
    return rows.assign(correct=rows["prediction"] == rows["answer"])


def run(model: tuple, n: int, seed: int) -> pd.DataFrame:
    """The record: shares by task, kind and number of facts; `model` is (base model, tokenizer)."""
    return summarise(base_model_samples(*model, n, seed), ["task", "kind", "facts"])
