"""Whether a trace can be trusted: how well contributions predict effects, and how they rank the evidence.

Without the truth: the answer's probability as parts are removed or added in a method's order, and the effect of
removing random subsets. With the truth, in the generated world: the rank of the evidence. The control is a hypernetwork
with shuffled weights.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from d2l_lib.analysis.attribution import METHODS, Trials, attribute, ranks
from d2l_lib.documents import check_texts, split_sentences
from d2l_lib.model import DocToLoRA
from d2l_lib.tasks import world

_CURVE_STEPS = (0, 1, 2, 3, 5, 8, 12, 18, 26, 36, 48)  # units taken away, or added; the last step is all of them
_RESAMPLES = 10_000
# Slow methods: computed for every n-th question only.
EVERY = {"surrogate": 2, "randomised weights": 2, "gradient, sentences": 4, "integrated_gradients, sentences": 10}


def curves(trials: Trials, orders: Mapping[str, Sequence[int]]) -> pd.DataFrame:
    """The answer's probability as units are removed ("deletion"), or added to the bias ("insertion"), best first.

    orders: {method: its order of the units}.

    Columns: method, curve, units, share (of all units), probability.
    """
    n = len(trials)
    steps = sorted({step for step in _CURVE_STEPS if step < n} | {n})
    rows, weights = [], []
    for method, order in orders.items():
        for curve, start in (("deletion", 1.0), ("insertion", 0.0)):
            for step in steps:
                trial = torch.full((n,), start)
                trial[list(order[:step])] = 1.0 - start
                weights.append(trial)
                rows.append({"method": method, "curve": curve, "units": step, "share": step / n})
    distinct, place = torch.unique(torch.stack(weights), dim=0, return_inverse=True)
    probability = trials.score(distinct)[0].sum(1).exp()[place]
    return pd.DataFrame(rows).assign(probability=probability.tolist())


def curves_of(
    model: DocToLoRA, n: int, seed: int, methods: Sequence[str] = METHODS["chunk"], least: int = 8, most: int = 24
) -> pd.DataFrame:
    """`curves` of `n` one-hop questions that all blocks answer right; two more columns: question (a number), seed.

    least, most: sentences of a document.
    """
    methods = check_texts(methods, "methods")
    tables: list[pd.DataFrame] = []
    for document, question in drawn(seed, world.ONE_HOP_KINDS, least, most):
        if len(tables) == n:
            break
        (adapter,) = model.internalize_each([document.text])
        if model.answer(question.text, adapter) != question.answer:
            continue
        orders = {}
        for method in methods:
            table = attribute(model, adapter, question.text, question.answer, method=method, seed=seed, controls=False)
            orders[method] = sorted(range(len(table)), key=ranks(table["contribution"]).__getitem__)
        of_question = curves(Trials(model, adapter, question.text, question.answer), orders)
        tables.append(of_question.assign(question=len(tables), seed=seed))
    return pd.concat(tables, ignore_index=True)


def area(curve: pd.DataFrame) -> float:
    """Area below one curve of `curves` over the share of units, 0 to 1. Deletion: less is better; insertion: more."""
    curve = curve.sort_values("units")
    return float(np.trapezoid(curve["probability"], curve["share"]))


def subset_effects(trials: Trials, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(masks [n, units], nats that the answer loses without each mask's units: a random half)."""
    masks = torch.rand(n, len(trials), generator=generator).argsort(1) < len(trials) // 2
    log_probs = trials.score(torch.cat([torch.ones(1, len(trials)), 1.0 - masks.float()]))[0].sum(1)
    return masks, log_probs[0] - log_probs[1:]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's correlation, with ties at their mean rank; 0 where one side is constant."""
    a, b = pd.Series(list(first)).rank(), pd.Series(list(second)).rank()
    return 0.0 if a.std() == 0 or b.std() == 0 else float(np.corrcoef(a, b)[0, 1])


def sign_flip(differences: Sequence[float], seed: int = 0) -> float:
    """The two-sided p of a paired test: how often random signs give the differences a mean as far from 0."""
    values = np.asarray(list(differences), dtype=float)
    if not len(values):
        return 1.0
    signs = np.random.default_rng(seed).integers(0, 2, (_RESAMPLES, len(values)), dtype=np.int8) * 2 - 1
    as_far = (np.abs(signs @ values) >= np.abs(values.sum()) - 1e-12).sum()
    return float((1 + as_far) / (1 + _RESAMPLES))


def randomised(model: DocToLoRA, seed: int = 0) -> DocToLoRA:
    """The same model with shuffled values in every tensor of its hypernetwork: same sizes, nothing learned."""
    hypernetwork = copy.deepcopy(model.hypernetwork)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in hypernetwork.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return DocToLoRA(
        model.base_model,
        model.tokenizer,
        hypernetwork,
        chunk_tokens=model.chunk_tokens,
        base_source=model.base_source,
        encoder=model.encoder,
        encoder_tokenizer=model.encoder_tokenizer,
    )


def evidence_units(units: pd.DataFrame, evidence: Sequence[tuple[int, int]]) -> list[list[int]]:
    """For each evidence sentence, the units (rows of `units`) that hold a part of it."""
    return [
        [place for place, (a, b) in enumerate(zip(units["start"], units["end"], strict=True)) if a < end and start < b]
        for start, end in evidence
    ]


def worst_rank(contributions: Sequence[float], truth: Sequence[Sequence[int]]) -> int:
    """The rank of the last evidence sentence; a sentence in several units has its best rank."""
    order = ranks(contributions)
    return max(min(order[place] for place in places) for places in truth)


def chance_alike(
    contributions: Sequence[float], units: pd.DataFrame, document: world.Document, evidence: tuple[int, int]
) -> float:
    """The chance that the first unit holds the evidence, for a method that cannot tell facts of one kind (dates) apart.

    1 / (number of units with a fact of the evidence's kind) if the first unit is one of them, else 0.
    """
    kind_of = {fact.span: world.RELATION[fact.relation].kind for fact in document.facts}
    alike = [span for span, kind in kind_of.items() if kind == kind_of[evidence]]
    places = {place for inside in evidence_units(units, alike) for place in inside}
    return 1 / len(places) if ranks(contributions).index(1) in places else 0.0


def without_sentence(text: str, start: int, end: int) -> str:
    """The document without the characters of one sentence."""
    return (text[:start] + text[end:].lstrip(" ")).strip()


def drawn(seed: int, kinds: Sequence[str], least: int, most: int) -> Iterator[tuple[world.Document, world.Question]]:
    """Documents of `least` to `most` sentences, uniformly, each with a question of the next of these kinds."""
    kinds = check_texts(kinds, "kinds")
    for number in range(10**9):
        rng = random.Random(f"attribution/{seed}/{'+'.join(kinds)}/{number}")
        wanted, kind = rng.randint(least, most), kinds[number % len(kinds)]
        for _ in range(1000):
            document = world.draw_document(rng, "test", max(1, round(wanted * rng.uniform(0.7, 1.0))))
            question = world.ask(rng, document, kind)
            if question is not None and len(split_sentences(document.text)) == wanted:
                yield document, question
                break
