"""Train the router of a model (see `router`): which block answers a question, or none, and yes or no.

    loss = - mean log (sum of p(k) over blocks k that hold the answer, or p(none) where none does)
           - verdict_weight * mean log p(verdict of the block that holds the fact)    over questions that state a value

where p is the softmax of a question's scores, and the sigmoid of a verdict. Blocks, base model and null block stay as
they are: what blocks respond to each question is computed once, and only the router's weights learn. The documents have
1 to 40 facts each, or there are up to 64 of them in one adapter; some questions are about a document that is not
inside, so that none of the blocks is right.

At last none is calibrated (split conformal, see `routing.conformal_threshold`): on documents of another split, its
score is moved so that at most `error` of the one-hop questions that a block answers get none.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from d2l_lib.adapter import Adapter
from d2l_lib.documents import question_ids
from d2l_lib.model import DocToLoRA
from d2l_lib.router import FAR, Responses, Router, RouterConfig
from d2l_lib.routing import ASK_HOP, conformal_threshold, final_embeddings, weigh
from d2l_lib.tasks import world
from d2l_lib.tasks.questions import disjoint_documents

# Kinds beside those of the world: by heart, about another document, and the first of two hops (`routing.first_hops`).
ENCYCLOPEDIA, ELSEWHERE, FIRST_HOP = "encyclopedia", "elsewhere", "first_hop"
_SHARES = {"one_hop": 1.0, "number": 0.5, "date": 0.5, "paraphrase": 1.0, "two_hop": 1.0, "yes_no": 2.5}
_SHARES |= {"which_of": 2.0, "list": 1.0, "unanswerable": 2.5, ENCYCLOPEDIA: 0.7, ELSEWHERE: 0.5, FIRST_HOP: 1.0}
_TOGETHER = (2, 4, 8, 16, 32, 64)  # documents in one adapter
_TOGETHER_SHARE = 0.08
_MOST_FACTS = 40
_FACTS = (8, 20, 40)  # of the documents that calibrate
_OF_EACH = 5  # questions on such a document
_QUESTIONS = 12  # of an adapter, and one more for each further document in it


@dataclass(frozen=True)
class RouterPreset:
    """The dials: questions to draw, steps of how many of them, and the rest."""

    questions: int = 100000
    steps: int = 7000
    batch: int = 48
    rate: float = 3e-3
    warm_up: int = 100
    steady_share: float = 0.4  # of the steps, before the rate falls
    weight_decay: float = 0.05
    verdict_weight: float = 0.3
    width: int = 96
    calibration: int = 2000  # questions for it
    error: float = 0.005  # of further such questions, which get no block


DEFAULT = RouterPreset()


@dataclass(frozen=True)
class Asked:
    """One question: its kind, how blocks respond, the places of those that hold its answer, and its verdict if any."""

    kind: str
    responses: Responses
    right: tuple[int, ...]
    verdict: bool | None


def new_router(model: DocToLoRA, width: int, seed: int) -> Router:
    """A router for a model's blocks that has learned nothing; ValueError for a model whose blocks it cannot read."""
    config, null = model.config, model.hypernetwork.null()
    if null is None or len(null) != 1:
        raise ValueError("a router needs blocks of one module and a null block: d2l train --stage reading makes one")
    torch.manual_seed(seed)
    ((_, d_out),) = config.d_out.items()
    router = Router(RouterConfig(config.n_layers, config.rank, d_out, width, world.UNKNOWN))
    router.centre.copy_(final_embeddings(model, slice(None)).mean(0))
    return router


def draw_questions(model: DocToLoRA, router: Router, n: int, seed: int, split: str) -> Iterator[Asked]:
    """`n` questions of all kinds or a few more, with what `router` reads of them.

    Where an adapter has so many blocks that those of the answer are not compared, the question is left out.
    """
    rng = random.Random(f"router/{split}/{seed}")
    while n > 0:
        if rng.random() < _TOGETHER_SHARE:
            inside = list(disjoint_documents(rng, rng.choice(_TOGETHER), rng.randint(3, 8), split))
        else:
            inside = [world.draw_document(rng, split, max(1, round(_MOST_FACTS ** rng.random())))]
        texts = {str(number): document.text for number, document in enumerate(inside)}
        adapter = sum(model.internalize_each(texts))
        drawn = [_ask(rng, inside, split) for _ in range(_QUESTIONS - 1 + len(inside))]
        asked = [one for one in drawn if one is not None]
        prompts = question_ids(model.tokenizer, [question.text for _, question, _ in asked])
        weighed = weigh(model, router, prompts, [adapter] * len(prompts))
        for (kind, question, name), one in zip(asked, weighed, strict=True):
            spans = [] if kind == ELSEWHERE else question.evidence
            holds = right_places(adapter, name, spans)
            right = right_places(one.adapter, name, spans)
            if right or not holds:
                n -= 1
                verdict = question.answer == router.config.verdicts[0] if kind == "yes_no" else None
                yield Asked(kind, _half(one.responses), right, verdict)


def _ask(rng: random.Random, inside: Sequence[world.Document], split: str) -> tuple[str, world.Question, str] | None:
    """(kind, question with the evidence of its answer alone, name of its document), None where it has none."""
    kind, number = rng.choices(list(_SHARES), list(_SHARES.values()))[0], rng.randrange(len(inside))
    if kind == ENCYCLOPEDIA:
        return kind, next(world.encyclopedia_questions(rng, 1)), str(number)
    if kind == ELSEWHERE:
        document = world.draw_document(rng, split, rng.randint(2, 8))
        of_kind = rng.choice([one for one in world.KINDS if one not in ("list", "two_hop")])
        question = world.ask(rng, document, of_kind)
    elif kind == FIRST_HOP:
        question = _first_hop(rng, inside[number])
    else:
        question = world.ask(rng, inside[number], kind)
    if question is None:
        return None
    if kind == "two_hop":  # the last has the answer
        question = replace(question, evidence=question.evidence[-1:])
    return kind, question, str(number)


def _first_hop(rng: random.Random, document: world.Document) -> world.Question | None:
    """What a subject's mayor, founder, ... is; for one in four there is no such fact."""
    roles = {name: one.role for name, one in world.RELATION.items() if one.role}
    facts = [one for one in document.facts if one.relation in roles]
    if not facts:
        return None
    fact, said = rng.choice(facts), rng.random() < 0.75
    if not said:
        stated = {(one.subject, one.relation) for one in document.facts}
        others = [name for name in roles if world.RELATION[name].subject == world.RELATION[fact.relation].subject]
        others = [name for name in others if (fact.subject, name) not in stated]
        if not others:
            return None
        fact = world.Fact(fact.subject, rng.choice(others), world.UNKNOWN)
    text = rng.choice(ASK_HOP).format(roles[fact.relation].format(s=fact.subject))
    return world.Question(text, fact.value, FIRST_HOP, (fact.span,) if said else ())


def right_places(adapter: Adapter, document: str, spans: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The places of an adapter's blocks that hold one of these characters of a document."""
    return tuple(
        place
        for place, block in enumerate(adapter.blocks)
        if block.document == document and any(block.span[0] < end and start < block.span[1] for start, end in spans)
    )


def _half(responses: Responses) -> Responses:
    return replace(responses, rows=responses.rows.half())


def router_loss(router: Router, asked: Sequence[Asked], verdict_weight: float) -> Tensor:
    """See the module's text."""
    scores, verdicts = router([one.responses for one in asked])
    right = torch.zeros_like(scores, dtype=torch.bool)
    for row, one in enumerate(asked):
        right[row, [place + 1 for place in one.right] or [0]] = True
    log_shares = scores.log_softmax(1).masked_fill(~right, FAR).logsumexp(1)
    judged = [(row, one.right[0]) for row, one in enumerate(asked) if one.verdict is not None and one.right]
    if not judged:
        return -log_shares.mean()
    truth = torch.tensor([float(asked[row].verdict) for row, _ in judged])
    logits = torch.stack([verdicts[row, place] for row, place in judged])
    return -log_shares.mean() + verdict_weight * F.binary_cross_entropy_with_logits(logits, truth)


def train_router(model: DocToLoRA, seed: int, p: RouterPreset = DEFAULT, split: str = "train") -> Router:
    """A router for a model's blocks. Needs about 40 kB of memory a question."""
    router = new_router(model, p.width, seed)
    asked = list(draw_questions(model, router, p.questions, seed, split))
    print(f"{len(asked)} questions drawn", flush=True)
    rng = random.Random(f"router steps/{seed}")
    rng.shuffle(asked)
    router.measure([one.responses for one in asked[: 10 * p.batch]])
    asked.sort(key=lambda one: len(one.responses.rows))  # a batch has adapters of like size: little is padded
    batches = [asked[start : start + p.batch] for start in range(0, len(asked), p.batch)]
    optimizer = torch.optim.AdamW(router.parameters(), lr=p.rate, weight_decay=p.weight_decay)
    steady = p.steady_share * p.steps

    def share(step: int) -> float:
        rising = min(1.0, (step + 1) / p.warm_up)
        return rising * min(1.0, max(0.02, (p.steps - step) / (p.steps - steady)))

    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    waiting: list[int] = []
    for step in range(p.steps):
        waiting = waiting or rng.sample(range(len(batches)), len(batches))
        loss = router_loss(router, batches[waiting.pop()], p.verdict_weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if (step + 1) % 500 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    return router.eval().requires_grad_(False)


@torch.no_grad()
def calibrate(model: DocToLoRA, router: Router, n: int, seed: int, split: str, error: float) -> None:
    """Move the router's score of none so that at most `error` of one-hop questions that a block answers get none.

    n: questions, on documents of 8, 20 and 40 facts in turn. ValueError for fewer than 1 / error - 1.
    """
    rng, margins = random.Random(f"router calibration/{split}/{seed}"), []
    while len(margins) < n:
        for facts in _FACTS:
            document = world.draw_document(rng, split, facts)
            (adapter,) = model.internalize_each([document.text])
            texts = [world.question_about(rng, fact).text for fact in rng.sample(document.facts, _OF_EACH)]
            weighed = weigh(model, router, question_ids(model.tokenizer, texts), [adapter] * _OF_EACH)
            scores, _ = router([one.responses for one in weighed])
            margins += (scores[:, 0] - scores[:, 1:].amax(1)).tolist()
    router.none.bias -= conformal_threshold(margins[:n], error)
