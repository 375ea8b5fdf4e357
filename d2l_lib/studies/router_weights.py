"""The weights of the router: fitted on training documents, judged on validation documents.

    d2l study router-weights --keep tiny/qa   # data/full_runs/router_weights.jsonl, and the weights in the model

Three small fits, each by maximum likelihood: a conditional logit among the blocks and the null block, a conditional
logit among the blocks by the question's words, and a logit of which of the two a question needs. No model learns.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import pandas as pd
import torch
from torch import Tensor

from d2l_lib.adapter import Adapter
from d2l_lib.documents import question_ids
from d2l_lib.formats.checkpoints import SETTINGS
from d2l_lib.formats.schemas import CheckpointSettings, check
from d2l_lib.loading import find_checkpoint
from d2l_lib.model import DocToLoRA
from d2l_lib.records import read_json, write_json
from d2l_lib.router import LEAST_LOG, Router, log_margins, word_peaks
from d2l_lib.routing import Weighed, weigh
from d2l_lib.studies.fits import minimised
from d2l_lib.tasks import world
from d2l_lib.tasks.questions import disjoint_documents, one_hop_question
from d2l_lib.tasks.scores import wilson

BY_WORDS = ("which_of", "list", "yes_no")  # kinds that name the value and do not ask for it
_ENCYCLOPEDIA, _MANY = "encyclopedia", "64 documents"
_PENALTY = 1e-3  # of squared weights


@dataclass(frozen=True)
class _Asked:
    """One question: its kind, what the router compares, and the places of the blocks that hold its answer, if any."""

    kind: str
    weighed: Weighed
    right: frozenset[int]


def _draw(model: DocToLoRA, n: int, seed: int, split: str) -> list[_Asked]:
    """A question of each kind on `n` documents of 4 to 40 facts, and `n` one-hop questions on 64 documents at once."""
    rng = random.Random(f"router weights/{split}/{seed}")
    asked: list[tuple[str, world.Question, Adapter, list[tuple[str, int, int]]]] = []
    documents = [world.draw_document(rng, split, rng.randint(4, 40)) for _ in range(n)]
    for document in documents:
        (adapter,) = model.internalize_each({"document": document.text})
        for kind in (*world.KINDS, _ENCYCLOPEDIA):
            known = kind == _ENCYCLOPEDIA
            question = next(world.encyclopedia_questions(rng, 1)) if known else world.ask(rng, document, kind)
            if question is not None:
                evidence = question.evidence[-1:] if kind == "two_hop" else question.evidence  # the last has the answer
                asked.append((kind, question, adapter, [("document", *span) for span in evidence]))
    for start in range(0, n, 50):
        together = list(disjoint_documents(rng, 64, 5, split))
        adapter = sum(model.internalize_each({f"document {i}": one.text for i, one in enumerate(together)}))
        for _ in range(min(50, n - start)):
            place = rng.randrange(64)
            question = one_hop_question(rng, together[place])
            asked.append((_MANY, question, adapter, [(f"document {place}", *span) for span in question.evidence]))
    prompts = question_ids(model.tokenizer, [question.text for _, question, _, _ in asked])
    layers = model.reading.layers_of(model.config.n_layers)
    weighed = weigh(model, prompts, [adapter for _, _, adapter, _ in asked], layers, world.UNKNOWN)
    right = [_right(one.adapter, spans) for (_, _, _, spans), one in zip(asked, weighed, strict=True)]
    return [_Asked(kind, *both) for (kind, *_), *both in zip(asked, weighed, right, strict=True)]


def _right(adapter: Adapter, spans: Sequence[tuple[str, int, int]]) -> frozenset[int]:
    return frozenset(
        place
        for place, block in enumerate(adapter.blocks)
        for document, start, end in spans
        if block.document == document and block.span[0] < end and start < block.span[1]
    )


def fit_router(model: DocToLoRA, asked: Sequence[_Asked]) -> Router:
    """The router that is most likely on these questions."""
    layers = model.reading.layers_of(model.config.n_layers)
    by_words = [one for one in asked if one.kind in BY_WORDS[:2] and one.right]  # no block answers yes or no
    others = [one for one in asked if one.kind not in BY_WORDS]
    last = _conditional_logit([log_margins(one.weighed.responses, one.weighed.null) for one in others], others, True)
    words = _conditional_logit([word_peaks(one.weighed.responses) for one in by_words], by_words, False)
    features = torch.tensor([_of_question(one) for one in asked])
    kinds = torch.tensor([float(one.kind in BY_WORDS) for one in asked])

    def loss(w: Tensor) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(w[0] + features @ w[1:], kinds)

    which = _minimised(loss, 3)
    return Router(layers, tuple(last[1:]), last[0], tuple(words[1:]), tuple(which), world.UNKNOWN)


def _of_question(one: _Asked) -> tuple[float, float]:
    margins = log_margins(one.weighed.responses, one.weighed.null)
    return max(one.weighed.log_refusal, LEAST_LOG), float(margins[0].max())


def _conditional_logit(features: Sequence[Tensor], asked: Sequence[_Asked], null: bool) -> list[float]:
    """[offset, weights of features [layers, K]]; with `null`, no block is a choice too, of log-odds 0."""
    n_layers, most = len(features[0]), max(one.shape[1] for one in features) + 1
    padded, present = torch.zeros(len(asked), n_layers, most), torch.full((len(asked), most), -torch.inf)
    right = present.clone()
    for row, (own, one) in enumerate(zip(features, asked, strict=True)):
        padded[row, :, 1 : own.shape[1] + 1] = own
        present[row, 1 : own.shape[1] + 1] = 0.0
        right[row, [place + 1 for place in one.right] or [0]] = 0.0
    present[:, 0] = 0.0 if null else -torch.inf
    is_block = torch.ones(most).index_fill(0, torch.tensor([0]), 0.0)

    def loss(w: Tensor) -> Tensor:
        scores = torch.einsum("l,nlk->nk", w[1:], padded) + w[0] * is_block
        return ((scores + present).logsumexp(1) - (scores + right).logsumexp(1)).mean()

    return _minimised(loss, n_layers + 1)


def _minimised(loss: Callable[[Tensor], Tensor], size: int) -> list[float]:
    """The weights of the least loss, with a small penalty."""
    weights = minimised(lambda w: loss(w) + _PENALTY * w.square().sum(), size)
    return [round(one, 4) for one in weights.tolist()]


def _ideas(router: Router) -> dict[str, Callable[[Weighed], list[int]]]:
    """Ways to choose the one block, or none, of a question; all of the same pass."""

    def first(scores: Tensor) -> list[int]:
        return [int(scores.argmax())]

    weights = torch.tensor(router.last_token)
    return {
        "last layer": lambda one: first(one.responses[-1, -1]),
        "sum of layers": lambda one: first(one.responses[:, -1].sum(0)),
        "log-odds": lambda one: first(weights @ log_margins(one.responses, one.null)),
        "words": lambda one: first(torch.tensor(router.words) @ word_peaks(one.responses)),
        "words, last layer": lambda one: first(word_peaks(one.responses)[-1]),
        "words, without means": lambda one: first(one.responses[:, :-1].amax(1).sum(0)),
        "words, standardised": lambda one: first(torch.tensor(router.words) @ _standardised_peaks(one.responses)),
        "router": lambda one: router.choose(one.responses, one.null, one.log_refusal, 1),
    }


def _standardised_peaks(responses: Tensor) -> Tensor:
    """`word_peaks` of z-scores over the blocks."""
    words = responses[:, :-1]
    deviation = words.std(-1, correction=0, keepdim=True) + 1e-3
    return ((words - words.mean(-1, keepdim=True)) / deviation).amax(1)


def measure_router_weights(
    model: DocToLoRA, n: int, seed: int, splits: tuple[str, str] = ("train", "validation")
) -> tuple[pd.DataFrame, Router]:
    """(right choices by kind of question and idea, the router): fitted on documents of one split, counted on another.

    Columns: kind, idea, n, share, low, high. A choice is right that holds the answer; where no block does, only
    "router" can be right, by choosing none. For yes/no questions the block of the fact is right, though it answers
    none of them.
    """
    router = fit_router(model, _draw(model, n, seed, splits[0]))
    asked, rows = _draw(model, n, seed, splits[1]), []
    for kind in dict.fromkeys(one.kind for one in asked):
        own = [one for one in asked if one.kind == kind]
        for idea, choose in _ideas(router).items():
            choices = [choose(one.weighed) for one in own]
            right = sum(
                choice[0] in one.right if choice else not one.right for choice, one in zip(choices, own, strict=True)
            )
            low, high = wilson(right, len(own))
            rows.append(
                {"kind": kind, "idea": idea, "n": len(own), "share": right / len(own), "low": low, "high": high}
            )
    return pd.DataFrame(rows).assign(split=splits[1]), router


def keep_router(model: str, router: Router) -> None:
    """Write the router into a model's folder; ValueError for a published checkpoint file."""
    folder = find_checkpoint(model)
    if not folder.is_dir():
        raise ValueError(f"{folder} is a published checkpoint and cannot keep a router: model.save a folder first")
    settings = read_json(folder / SETTINGS)
    check(CheckpointSettings, settings, folder / SETTINGS, "model.save the folder again")
    settings["meta"] = settings.get("meta", {}) | {"router": asdict(router)}
    write_json(folder / SETTINGS, settings)


def run(model: DocToLoRA, n: int, seed: int, keep: str | None) -> pd.DataFrame:
    """The record: `measure_router_weights`; the folder of model `keep` takes the weights."""
    table, router = measure_router_weights(model, n, seed)
    if keep is not None:
        keep_router(keep, router)
    return table
