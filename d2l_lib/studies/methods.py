"""Every method on the same documents, with its costs."""

from __future__ import annotations

import random

import pandas as pd

from d2l_lib.model import DocToLoRA
from d2l_lib.studies.baselines import InContext, Internalized, Method, NoContext, PromptCompression, compare, costs
from d2l_lib.studies.retrieval import Retrieval
from d2l_lib.tasks import qa, world
from d2l_lib.training.context_distillation import ContextDistillation
from d2l_lib.training.text_to_lora import load_text_to_lora


def _document_questions(n_documents: int, seed: int) -> pd.DataFrame:
    """`n_documents` test documents of 20 facts with eight one-hop questions each, as `qa.load_qa`."""
    rng = random.Random(f"documents/{seed}")
    rows = []
    for number in range(n_documents):
        document = world.draw_document(rng, "test", 20)
        for fact in rng.sample(document.facts, 8):
            question = world.question_about(rng, fact)
            name = f"{seed}/{number}/{fact.subject}/{fact.relation}"
            row = {"dataset": "world", "id": name, "document": document.text, "question": question.text}
            rows.append(row | {"answers": [question.answer], "kind": question.kind})
    return pd.DataFrame(rows)


def _quick_methods(model: DocToLoRA, text_to_lora: DocToLoRA | None) -> list[Method]:
    """Every method but distillation; text_to_lora: a model of `training.text_to_lora`."""
    return [
        *([] if text_to_lora is None else [Internalized(text_to_lora, "pooled text-to-LoRA")]),
        InContext(model),
        NoContext(model),
        *(Retrieval(model, k, unit) for unit in ("chunk", "sentence") for k in (1, 4)),
        InContext(model, "truncated to 128 tokens", tokens=128 + 48),
        Internalized(model),
        Internalized(model, "Doc-to-LoRA, routed", blocks=1),
        Internalized(model, "Doc-to-LoRA, sparse", read="sparse"),
        Internalized(model, "Doc-to-LoRA, layer by layer", iterative=True),
        Internalized(model, "Doc-to-LoRA and context", with_context=True),
        *(PromptCompression(model, rate, use_llmlingua=False) for rate in (0.9, 0.8, 0.6, 0.4, 0.2)),
    ]


def run(
    model: DocToLoRA,
    n: int,
    seed: int,
    distillation_steps: int,
    text_to_lora: str | None,
    distillation_documents: int | None = None,
) -> dict[str, pd.DataFrame]:
    """The records: every method on `n` documents of 20 facts, eight questions each, in all and by length.

    distillation_documents: distillation answers the questions of the first of them (None: of all).
    """
    questions = qa.add_lengths(_document_questions(n, seed), model.tokenizer)
    pooled = load_text_to_lora(text_to_lora) if text_to_lora else None
    few = questions["document"].unique()[:distillation_documents]
    trained = [ContextDistillation(model, queries, steps=distillation_steps) for queries in ("oracle", 5, 20, 100)]
    compared = [
        compare(_quick_methods(model, pooled), questions, report=True),
        compare(trained, questions[questions["document"].isin(few)], report=True),
    ]
    scored = qa.score(pd.concat(compared, ignore_index=True))
    return {
        "qa_methods": qa.summarise_scores(scored, ["method"]).merge(costs(scored)),
        "qa_methods_lengths": qa.summarise_scores(scored, ["method", "dataset", "length_bin"]),
    }
