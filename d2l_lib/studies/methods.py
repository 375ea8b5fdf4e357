"""Every method on the same documents, with its costs."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pandas as pd

from d2l_lib.model import DocToLoRA
from d2l_lib.studies import earlier_rows
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


def _all_methods(model: DocToLoRA, steps: int, text_to_lora: str | None) -> list[Method]:
    """Every method; steps: of context distillation; text_to_lora: folder of a model of `training.text_to_lora`."""
    pooled = load_text_to_lora(text_to_lora) if text_to_lora else None
    return [
        *([] if pooled is None else [Internalized(pooled, "pooled text-to-LoRA")]),
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
        *(ContextDistillation(model, queries, steps=steps) for queries in ("oracle", 5, 20, 100)),
    ]


def run(
    model: DocToLoRA,
    n: int,
    seed: int,
    distillation_steps: int,
    text_to_lora: str | None,
    only: Sequence[str] | None = None,
) -> dict[str, list[dict]]:
    """The records: every method on `n` documents of 20 facts, eight questions each, in all and by length.

    only: methods whose names hold one of these words; rows of others that are recorded stay.

    ValueError if no method has such a name, and for recorded rows of another seed or number of documents.
    """
    methods = _all_methods(model, distillation_steps, text_to_lora)
    chosen = [one for one in methods if only is None or any(word in one.name for word in only)]
    if not chosen:
        raise ValueError(f"no method is called {' or '.join(only)}; there are {', '.join(one.name for one in methods)}")
    names = [one.name for one in chosen]
    kept = {name: _others(name, names, n, seed) if only else [] for name in ("qa_methods", "qa_methods_lengths")}
    questions = qa.add_lengths(_document_questions(n, seed), model.tokenizer)
    scored = qa.score(compare(chosen, questions, report=True))
    tables = {
        "qa_methods": qa.summarise_scores(scored, ["method"]).merge(costs(scored)),
        "qa_methods_lengths": qa.summarise_scores(scored, ["method", "dataset", "length_bin"]),
    }
    order = [one.name for one in methods]
    return {
        name: sorted(kept[name] + table.to_dict("records"), key=lambda row: order.index(row["method"]))
        for name, table in tables.items()
    }


def _others(record: str, names: Sequence[str], n: int, seed: int) -> list[dict]:
    """The recorded rows of methods with other names."""
    rows = [row for row in earlier_rows(record) if row["method"] not in names]
    for row in rows:
        if row["seed"] != seed or row.get("documents", n) != n:
            raise ValueError(
                f"{record} holds rows of seed {row['seed']}, command {row['command']!r}: the methods of a table answer "
                "the same questions, so take its --n and --seed, or leave out --only"
            )
    return rows
