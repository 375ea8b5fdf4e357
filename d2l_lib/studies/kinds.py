"""Every kind of question, in context and internalized."""

from __future__ import annotations

import pandas as pd

from d2l_lib.model import DocToLoRA
from d2l_lib.tasks import qa, scores, world
from d2l_lib.tasks.questions import world_samples
from d2l_lib.training.processes import shared

_AT_ONCE = 128  # questions, for memory


def _samples(n: int, seed: int) -> pd.DataFrame:
    """`n` one-hop questions and n / 5 of each other kind, with a fresh document of up to 40 facts for each."""
    others = [(kind,) for kind in world.KINDS if kind not in world.ONE_HOP_KINDS]
    tables = []
    for kinds in (world.ONE_HOP_KINDS, *others):
        fewest = 4 if kinds[0] in ("which_of", "list", "two_hop") else 1  # need several facts
        one_hop = kinds == world.ONE_HOP_KINDS
        samples = world_samples(n if one_hop else max(1, n // 5), seed, facts=(fewest, 40), kinds=kinds)
        tables.append(samples.assign(one_hop=one_hop))
    samples = pd.concat(tables, ignore_index=True)
    return samples.assign(
        dataset="world",
        id=[f"test/{seed}/{i}" for i in range(len(samples))],
        answers=[[answer] for answer in samples["answer"]],
        facts=[scores.in_fives(n_facts) for n_facts in samples["n_facts"]],
    )


def _question_kinds(model: DocToLoRA, n: int, seed: int) -> pd.DataFrame:
    """Rows of `qa.load_qa` with method, prediction, one_hop, facts ("6-10") and correct; nothing is timed."""
    samples = qa.add_lengths(_samples(n, seed), model.tokenizer)

    def work(start: int) -> pd.DataFrame:
        some, tables = samples.iloc[start : start + _AT_ONCE], []
        questions, documents = list(some["question"]), list(some["document"])
        prompts = [
            prompt
            for document, question in zip(documents, questions, strict=True)
            for prompt in qa.with_document(document, [question], model.tokenizer, model.window, 48)
        ]
        adapters = model.internalize_each(documents)
        for method, answers in {
            "in context": model.answer(prompts, None, max_new_tokens=48),
            "Doc-to-LoRA": model.answer(questions, adapters, max_new_tokens=48),
            "Doc-to-LoRA, routed": model.answer(questions, adapters, max_new_tokens=48, blocks=1),
            "Doc-to-LoRA, most relevant of 8": model.answer(
                questions, adapters, max_new_tokens=48, blocks=1, shortlist=8
            ),
            "no context": model.answer(questions, None, max_new_tokens=48),
        }.items():
            tables.append(some.assign(method=method, prediction=answers))
        print(f"{start + len(some)} of {len(samples)} questions", flush=True)
        return pd.concat(tables)

    compared = pd.concat(shared(range(0, len(samples), _AT_ONCE), work), ignore_index=True)
    return compared.assign(correct=compared["prediction"] == compared["answer"])


def run(model: DocToLoRA, n: int, seed: int) -> dict[str, pd.DataFrame]:
    """The records: by kind of question and number of facts, and by length of the document."""
    compared = _question_kinds(model, n, seed)
    return {
        "qa_kinds": scores.summarise(compared, ["method", "one_hop", "kind", "facts"]),
        "qa_lengths": qa.summarise_scores(qa.score(compared), ["method", "one_hop", "length_bin"]),
    }
