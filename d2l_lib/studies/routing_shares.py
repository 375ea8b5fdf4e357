"""The weight of the divergence beside the lead when routing ranks blocks."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pandas as pd

from d2l_lib.adapter import Adapter
from d2l_lib.model import DocToLoRA
from d2l_lib.routing import leads_and_divergences, most_relevant
from d2l_lib.tasks import world
from d2l_lib.tasks.questions import disjoint_documents, marked, one_hop_question
from d2l_lib.tasks.scores import summarise

_SHARES = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, math.inf)


def measure_shares(
    model: DocToLoRA, n: int, seed: int, split: str = "validation", many: int = 64, shares: Sequence[float] = _SHARES
) -> pd.DataFrame:
    """Exact match with the most relevant block alone, by share of the divergence in `routing.relevance`.

    Columns: condition, share (as text; "divergence alone" for infinity), n, exact_match, low, high.

    Conditions: `n` one-hop and `n` paraphrased questions on documents of 8 to 40 facts, and `n` one-hop questions with
    `many` documents of 5 facts in one adapter.
    """
    rng = random.Random(f"routing/{split}/{seed}")
    samples: list[tuple[str, world.Question, Adapter]] = []
    while len(samples) < 2 * n:
        document = world.draw_document(rng, split, rng.randint(8, 40))
        (adapter,) = model.internalize_each([document.text])
        for fact in rng.sample(document.facts, 2):
            samples.append(("one hop", world.question_about(rng, fact), adapter))
            if (other := world.ask(rng, document, "paraphrase")) is not None:
                samples.append(("paraphrase", other, adapter))
    for _ in range(math.ceil(n / 16)):
        together = list(disjoint_documents(rng, many, 5, split))
        each = model.internalize_each({f"document {i}": document.text for i, document in enumerate(together)})
        adapter = sum(each)
        for _ in range(16):
            samples.append((f"{many} documents", one_hop_question(rng, rng.choice(together)), adapter))
    conditions, questions, adapters = (list(column) for column in zip(*samples, strict=True))
    texts = [question.text for question in questions]
    both = leads_and_divergences(model, texts, adapters)
    rows = []
    for share in shares:
        scores = [divergence if math.isinf(share) else lead + share * divergence for lead, divergence in both]
        routed = [most_relevant(adapter, score, 1) for adapter, score in zip(adapters, scores, strict=True)]
        name = "divergence alone" if math.isinf(share) else f"{share:g}"
        new = marked(questions, model.answer(texts, routed), share=name)
        rows += [row | {"condition": condition} for row, condition in zip(new, conditions, strict=True)]
    return summarise(pd.DataFrame(rows), ["condition", "share"])


def run(model: DocToLoRA, n: int, seed: int) -> pd.DataFrame:
    """The record: `measure_shares` on validation documents, with half of `n` questions of each condition."""
    return measure_shares(model, n // 2, seed)
