"""The dial: the strength of an adapter's blocks, in all layers or in some.

It costs nothing. The study measures what it spoils: answers about what a document does not mention.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pandas as pd

from d2l_lib.adapter import scaled_layers
from d2l_lib.model import DocToLoRA
from d2l_lib.routing import gated
from d2l_lib.tasks import world
from d2l_lib.tasks.questions import marked
from d2l_lib.tasks.scores import wilson

_WEIGHTS = (0.0, 0.5, 1.0, 1.25, 1.5, 2.0, 3.0)


def dial_samples(
    model: DocToLoRA, n: int, seed: int, split: str, weights: Sequence[float] = _WEIGHTS, n_facts: int = 5
) -> pd.DataFrame:
    """`n` documents of `n_facts` facts, one of which contradicts the encyclopedia, at each strength of their blocks.

    Columns: layers ("all layers", or "layer 2" if only that one is turned), weight, gate (whether `gated` chose who
    answers; for all layers only), about ("the contradiction", "the document" for another fact of it, "the encyclopedia"
    for another fact of that), question, answer (for the contradiction: the document's value), prediction, correct,
    believed (the prediction is the encyclopedia's value).
    """
    rng = random.Random(f"dial/{split}/{seed}")
    groups: dict[str, list[world.Question]] = {"the contradiction": [], "the document": [], "the encyclopedia": []}
    texts, beliefs = [], []
    for _ in range(n):
        document, ((placed, fact),) = world.conflicting_document(rng, n_facts - 1, 1, split)
        other = rng.choice([f for f in document.facts if f is not placed])
        elsewhere = (one for one in world.encyclopedia_questions(rng, 1000) if fact.subject not in one.text)
        groups["the encyclopedia"].append(next(elsewhere))
        groups["the contradiction"].append(world.question_about(rng, placed))
        groups["the document"].append(world.question_about(rng, other))
        texts.append(document.text)
        beliefs.append(fact.value)
    adapters = model.internalize_each(texts)
    questions = [question for group in groups.values() for question in group]
    facts = pd.DataFrame({"about": [about for about, group in groups.items() for _ in group]})
    beliefs = pd.Series([*beliefs, *[None] * (2 * n)])
    prompts = [question.text for question in questions]
    tables = []
    for layers, turned in _turned(adapters[0].n_layers).items():
        for weight in weights:
            if layers != "all layers" and weight == 1:
                continue  # the same as in all layers
            strong = [scaled_layers(adapter, dict.fromkeys(turned, weight)) for adapter in adapters] * 3
            ways = {False: strong}
            if layers == "all layers":  # one threshold: the document shall override what the base model knows
                ways[True] = gated(model, prompts, strong, least=model.least_relevance)
            for gate, chosen in ways.items():
                rows = pd.DataFrame(marked(questions, model.answer(prompts, chosen)))
                rows = facts.assign(layers=layers, weight=weight, gate=gate).join(rows)
                tables.append(rows.assign(believed=rows["prediction"] == beliefs))
    return pd.concat(tables, ignore_index=True)


def _turned(n_layers: int) -> dict[str, list[int]]:
    """{name: the layers that the dial turns}."""
    return {"all layers": list(range(n_layers))} | {f"layer {layer}": [layer] for layer in range(n_layers)}


def dial_curve(samples: pd.DataFrame) -> pd.DataFrame:
    """Shares by layers, weight and gate, with 95% Wilson intervals (override_low, ...), and n questions of each sort.

    override, believed: the prediction is the document's value, or the encyclopedia's.
    document, unrelated: right answers about the document's other facts, and about the encyclopedia's.
    """
    rows = []
    for (layers, weight, gate), group in samples.groupby(["layers", "weight", "gate"], sort=False):
        parts = dict(list(group.groupby("about")))
        contradiction = parts["the contradiction"]
        row = {"layers": layers, "weight": float(weight), "gate": bool(gate), "n": len(contradiction)}
        for name, right in (
            ("override", contradiction["correct"]),
            ("believed", contradiction["believed"]),
            ("document", parts["the document"]["correct"]),
            ("unrelated", parts["the encyclopedia"]["correct"]),
        ):
            low, high = wilson(int(right.sum()), len(right))
            row |= {name: float(right.mean()), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def best_strength(curve: pd.DataFrame, gate: bool, allowed: float = 0.01) -> tuple[str, float]:
    """(layers, weight) with most override that loses at most `allowed` of document and unrelated against weight 1."""
    rows = curve[curve["gate"] == gate]
    spared = ["document", "unrelated"]
    plain = rows[(rows["layers"] == "all layers") & (rows["weight"] == 1)].iloc[0]
    harmless = rows[(rows[spared] >= plain[spared] - allowed).all(axis=1)]
    best = harmless.loc[harmless["override"].idxmax()]
    return best["layers"], best["weight"]


def run(model: DocToLoRA, n: int, seed: int) -> pd.DataFrame:
    """The record: `dial_curve` on validation and test documents; `chosen` marks the best strength on validation."""
    curves = []
    for split in ("validation", "test"):
        curve = dial_curve(dial_samples(model, n, seed, split)).assign(split=split)
        if split == "validation":
            chosen = {gate: best_strength(curve, gate) for gate in (False, True)}
        rows = zip(curve["layers"], curve["weight"], curve["gate"], strict=True)
        curves.append(curve.assign(chosen=[chosen[gate] == (layers, weight) for layers, weight, gate in rows]))
    return pd.concat(curves, ignore_index=True)
