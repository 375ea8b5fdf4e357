"""Context distillation on real text: a LoRA that is trained for one passage, beside an adapter of one forward pass.

The teacher is the base model with the reading LoRA in its weights and the passage in its prompt: the base model alone
answers in sentences. A distilled LoRA has the rank, scale and modules of the published form.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from torch import nn

from d2l_lib.documents import question_ids
from d2l_lib.engine import TransformersEngine, greedy_texts
from d2l_lib.formats.peft import merge
from d2l_lib.loading import load, reading_lora
from d2l_lib.model import DocToLoRA
from d2l_lib.studies.baselines import Internalized, NoContext, compare, costs
from d2l_lib.studies.passages import published_folder, scored_rows
from d2l_lib.tasks import qa
from d2l_lib.tasks.short_questions import write_questions
from d2l_lib.training.context_distillation import ContextDistillation

_NEW_TOKENS = 24
_QUERIES = 20  # questions that the model writes on a passage
_MOST = 5  # questions that are asked on a passage
_ROUNDS = 6  # of writing
_BATCH = 8  # questions of a step


@dataclass
class _Reading:
    """The teacher with the passage in its prompt, which is asked again for each question. A `baselines.Method`."""

    model: DocToLoRA
    teacher: nn.Module
    name: str = "passage in the prompt, reading LoRA"

    def prepare(self, document: str, questions: Sequence[str]) -> str:
        return document

    def answer(self, prepared: str, questions: Sequence[str]) -> list[str]:
        model = self.model
        prompts = qa.with_document(prepared, questions, model.tokenizer, model.window, _NEW_TOKENS)
        ids = question_ids(model.tokenizer, prompts)
        return greedy_texts(self.teacher, model.tokenizer, ids, [_NEW_TOKENS] * len(ids))


def written_questions(model: DocToLoRA, document: str, n: int, seed: int) -> list[str]:
    """Up to `n` different questions on the document that the base model writes (`tasks.short_questions`)."""
    engine = TransformersEngine("writer", model.base_model, model.tokenizer)
    written: dict[str, None] = {}
    for number in range(_ROUNDS):
        rng = random.Random(f"distilled passages/{seed}/{number}")
        how = {"most": 2 * n, "max_new_tokens": 32, "temperature": 0.7 if number else 0.0}
        (own,) = write_questions(rng, [document], engine, Counter(), **how)
        written |= dict.fromkeys(one.text for one in own)
        if len(written) >= n:
            break
    return list(written)[:n]


def run(model: DocToLoRA, n: int, seed: int, questions: str, steps: int) -> list[dict]:
    """A row for each method and metric, with its costs: questions on `n` passages, at most five on each.

    questions: "DATASET" or "DATASET=FILE" (see `tasks.qa.load_named`); passages of at least two questions are drawn
        with `seed`.
    steps: of training a LoRA (published: 300).
    """
    frame = _some_passages(qa.load_named(questions), n, seed)
    teacher = merge(model.base_model, reading_lora(model))
    form = load(published_folder(model), device=model.device, dtype=model.base_model.dtype)
    common = {
        "steps": steps,
        "batch": _BATCH,
        "max_new_tokens": _NEW_TOKENS,
        "teacher": teacher,
        "questions_from": written_questions,
    }
    methods = [
        NoContext(model, "question alone", max_new_tokens=_NEW_TOKENS),
        _Reading(model, teacher),
        Internalized(model, max_new_tokens=_NEW_TOKENS),
        ContextDistillation(form, "oracle", name="context distillation, the questions themselves", **common),
        ContextDistillation(form, _QUERIES, name=f"context distillation, {_QUERIES} written questions", **common),
    ]
    compared = compare(methods, frame, report=True)
    of_each = [answered for _, answered in compared.groupby("method", sort=False)]
    table = pd.DataFrame([row for answered in of_each for row in scored_rows(answered, seed)]).merge(costs(compared))
    return table.assign(steps=steps, dataset=frame["dataset"].iloc[0]).to_dict("records")


def _some_passages(frame: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """The first questions, at most `_MOST`, on each of `n` passages that have two or more."""
    counts = frame["document"].value_counts()
    documents = sorted(counts[counts > 1].index)
    drawn = random.Random(f"distilled passages/{seed}").sample(documents, min(n, len(documents)))
    own = frame[frame["document"].isin(drawn)]
    return own.groupby("document", sort=False).head(_MOST).reset_index(drop=True)
