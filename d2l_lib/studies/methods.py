"""Every method on the same documents, with its costs."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pandas as pd

from d2l_lib.model import DocToLoRA
from d2l_lib.studies.baselines import InContext, Internalized, Method, NoContext, PromptCompression, compare, costs
from d2l_lib.tasks import qa, world
from d2l_lib.training.context_distillation import ContextDistillation
from d2l_lib.training.text_to_lora import load_text_to_lora


def document_questions(n_documents: int, n_questions: int, seed: int, n_facts: int = 20) -> pd.DataFrame:
    """`n_documents` test documents of `n_facts` facts with `n_questions` one-hop questions each, as `qa.load_qa`."""
    rng = random.Random(f"documents/{seed}")
    rows = []
    for number in range(n_documents):
        document = world.draw_document(rng, "test", n_facts)
        for fact in rng.sample(document.facts, n_questions):
            question = world.question_about(rng, fact)
            identity = {
                "dataset": "world",
                "id": f"{seed}/{number}/{fact.subject}/{fact.relation}",
                "document": document.text,
            }
            rows.append(identity | {"question": question.text, "answers": [question.answer], "kind": question.kind})
    return pd.DataFrame(rows)


def all_methods(
    model: DocToLoRA,
    distillation_steps: int,
    queries: Sequence[int] = (5, 20, 100),
    text_to_lora: DocToLoRA | None = None,
) -> list[Method]:
    """Every method with the settings of the record; `text_to_lora`: see the module of that name."""
    return [
        *([] if text_to_lora is None else [Internalized(text_to_lora, "pooled text-to-LoRA")]),
        InContext(model),
        NoContext(model),
        InContext(model, "truncated to 128 tokens", tokens=128 + 48),
        Internalized(model),
        Internalized(model, "Doc-to-LoRA, routed", blocks=1),
        Internalized(model, "Doc-to-LoRA, layer by layer", iterative=True),
        Internalized(model, "Doc-to-LoRA and context", with_context=True),
        *(PromptCompression(model, rate, use_llmlingua=False) for rate in (0.9, 0.8, 0.6, 0.4, 0.2)),
        ContextDistillation(model, "oracle", steps=distillation_steps),
        *(ContextDistillation(model, n, steps=distillation_steps) for n in queries),
    ]


def run(
    model: DocToLoRA, n: int, seed: int, distillation_steps: int, text_to_lora: str | None
) -> dict[str, pd.DataFrame]:
    """The records: every method on `n` documents of 20 facts, eight questions each, in all and by length."""
    questions = qa.add_lengths(document_questions(n, 8, seed), model.tokenizer)
    pooled = load_text_to_lora(text_to_lora) if text_to_lora else None
    scored = qa.score(compare(all_methods(model, distillation_steps, text_to_lora=pooled), questions, report=True))
    return {
        "qa_methods": qa.summarise_scores(scored, ["method"]).merge(costs(scored)),
        "qa_methods_lengths": qa.summarise_scores(scored, ["method", "dataset", "length_bin"]),
    }
