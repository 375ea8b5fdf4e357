"""Every kind of question, in context and internalized."""

from __future__ import annotations

import pandas as pd

from d2l_lib.model import DocToLoRA
from d2l_lib.tasks import qa, scores, world
from d2l_lib.tasks.questions import world_samples


def question_kinds(model: DocToLoRA, n: int, seed: int, facts: tuple[int, int] = (1, 40)) -> pd.DataFrame:
    """In context, Doc-to-LoRA (all blocks, and routed to one) and no context on `n` one-hop questions and a fifth as
    many of each other kind, a fresh document of `facts` (fewest, most) facts for each; the columns of `qa.load_qa`,
    method, prediction, one_hop, facts ("6-10"), correct. Many questions are answered at once, so nothing is timed here.
    """
    tables = []
    for kinds, count in (
        (world.ONE_HOP_KINDS, n),
        *(((kind,), max(1, n // 5)) for kind in world.KINDS if kind not in world.ONE_HOP_KINDS),
    ):
        # which of two, lists and two hops need documents that hold several facts
        several = kinds[0] in ("which_of", "list", "two_hop")
        fewest = max(4, facts[0]) if several else facts[0]
        samples = world_samples(count, seed, facts=(fewest, facts[1]), kinds=kinds)
        tables.append(samples.assign(one_hop=kinds == world.ONE_HOP_KINDS))
    samples = pd.concat(tables, ignore_index=True)
    samples = samples.assign(
        dataset="world",
        id=[f"test/{seed}/{i}" for i in range(len(samples))],
        answers=[[answer] for answer in samples["answer"]],
        facts=[scores.in_fives(n_facts) for n_facts in samples["n_facts"]],
    )
    samples = qa.add_lengths(samples, model.tokenizer)
    tables = []
    for start in range(0, len(samples), 128):  # in parts, for memory
        some = samples.iloc[start : start + 128]
        asked, documents = list(some["question"]), list(some["document"])
        prompts = [
            prompt
            for document, question in zip(documents, asked, strict=True)
            for prompt in qa.with_document(document, [question], model.tokenizer, model.window, 48)
        ]
        adapters = model.internalize_each(documents)
        predictions = {
            "in context": model.answer(prompts, None, max_new_tokens=48),
            "Doc-to-LoRA": model.answer(asked, adapters, max_new_tokens=48),
            "Doc-to-LoRA, routed": model.answer(asked, adapters, max_new_tokens=48, blocks=1),
            "no context": model.answer(asked, None, max_new_tokens=48),
        }
        tables += [some.assign(method=method, prediction=said) for method, said in predictions.items()]
        print(f"{start + len(some)} of {len(samples)} questions", flush=True)
    compared = pd.concat(tables, ignore_index=True)
    return compared.assign(correct=compared["prediction"] == compared["answer"])


def run(model: DocToLoRA, n: int, seed: int) -> dict[str, pd.DataFrame]:
    """The records: by kind of question and number of facts, and by length of the document."""
    compared = question_kinds(model, n, seed)
    return {
        "qa_kinds": scores.summarise(compared, ["method", "one_hop", "kind", "facts"]),
        "qa_lengths": qa.summarise_scores(qa.score(compared), ["method", "one_hop", "length_bin"]),
    }
