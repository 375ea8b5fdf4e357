"""Which blocks a question is about, so that few of many blocks answer.

    question -> the base model with one block at a time -> relevance of each block -> an adapter of the most relevant

A sum of many blocks carries the noise of all of them. With one block at a time, the model itself shows which one
matters. A block that holds nothing about a question does not change the first token of the answer. A block that holds
something similar changes it with doubts. Routing needs no training and adds nothing to an adapter. It costs one short
forward pass per block and question.

`key_scores` needs one pass for all blocks: how strongly the keys A of each respond to the inputs of the last layer. It
ranks blocks too, but does not tell whether any of them holds an answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2l_lib.adapter import Adapter
from d2l_lib.base_model import target_linears
from d2l_lib.documents import check_count, check_texts, question_ids
from d2l_lib.engine import pad_id_of, pad_rows
from d2l_lib.lora import hooked
from d2l_lib.reading import Reading, read_sparsely

if TYPE_CHECKING:
    from d2l_lib.model import DocToLoRA

TOKENS_AT_ONCE = 2048  # of questions, one copy per block
_SHUT = 50.0  # nats: a null block that stops everything
SHARE = 0.3  # of the divergence in a block's relevance; `studies.routing_shares` measures others


@dataclass(frozen=True)
class Gate:
    """How relevant a block must be to questions that the base model answers by itself (see `gated`).

    One of n blocks must reach `known` + `growth` * log2(n) nats: the largest relevance among n unrelated blocks grows
    with n, so the threshold grows with log2(n). `refusal`: what the base model says when it does not know.
    """

    known: float
    growth: float
    refusal: str

    def least(self, n_blocks: int) -> float:
        """Nats that a block must reach in an adapter of `n_blocks`."""
        return self.known + self.growth * math.log2(max(1, n_blocks))


def relevance(
    model: DocToLoRA, questions: Sequence[str], adapters: Sequence[Adapter], *, system: str = "", share: float = SHARE
) -> list[Tensor]:
    """How much each block matters to each question, in nats: one float32 tensor [n_blocks] per question, on the CPU.

    relevance = lead + share * divergence, of the answer's first token. p_none is its distribution with the bias alone,
    p_block with the bias and that block, weighted as in the adapter.
    - divergence: KL(p_block || p_none).
    - lead: leave out the likeliest token of p_none; of the others, the log-probability of the likeliest in p_block,
      less that of the best other token. It is positive where the block changes the token, and large where it leaves no
      doubt. A block about something similar changes it as much, but with doubts.

    adapters: one per question; questions on one adapter are cheapest in one call.
    share: infinity takes the divergence alone.

    ValueError unless there are as many adapters as questions.
    """
    both = leads_and_divergences(model, questions, adapters, system=system)
    return [divergence if math.isinf(share) else lead + share * divergence for lead, divergence in both]


def leads_and_divergences(
    model: DocToLoRA, questions: Sequence[str], adapters: Sequence[Adapter], *, system: str = ""
) -> list[tuple[Tensor, Tensor]]:
    """The two parts of `relevance`: (lead, divergence) of each block, two tensors [n_blocks] per question."""
    questions = check_texts(questions, "questions")
    if len(questions) != len(adapters):
        raise ValueError(f"{len(questions)} questions but {len(adapters)} adapters: give one adapter per question")
    prompts = question_ids(model.tokenizer, list(questions), system)
    measures = [(torch.zeros(0), torch.zeros(0))] * len(questions)
    together: dict[int, list[int]] = {}
    for place, adapter in enumerate(adapters):
        together.setdefault(id(adapter), []).append(place)
    for places in together.values():
        adapter = adapters[places[0]]
        model._check_adapters([adapter])  # once for all of its blocks
        before = _first_token(model, [prompts[place] for place in places], [replace(adapter, blocks=())])
        at_once = max(1, TOKENS_AT_ONCE // max(len(prompts[place]) for place in places))
        parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in places]
        for start in range(0, len(adapter.blocks), at_once):
            alone = [replace(adapter, blocks=(block,)) for block in adapter.blocks[start : start + at_once]]
            changed = _first_token(model, [prompts[place] for place in places], alone)
            for part, (none,), each in zip(parts, before, changed, strict=True):
                part.append((_lead(none, each), (each.exp() * (each - none)).sum(-1).clamp(min=0.0)))
        for place, part in zip(places, parts, strict=True):
            if part:
                leads, divergences = zip(*part, strict=True)
                measures[place] = torch.cat(leads), torch.cat(divergences)
    return measures


def _lead(none: Tensor, each: Tensor) -> Tensor:
    """See `relevance`; log-probabilities none [vocabulary], each [n_blocks, vocabulary] -> [n_blocks]."""
    others = each.index_fill(-1, none.argmax(-1), -torch.inf)
    first, choice = others.max(-1)
    return first - each.scatter(-1, choice.unsqueeze(-1), -torch.inf).amax(-1)


@torch.no_grad()
def _first_token(model: DocToLoRA, prompts: Sequence[list[int]], adapters: list[Adapter]) -> list[Tensor]:
    """Log-probabilities [adapters, vocabulary] of the token after each prompt, with each adapter."""
    results = []
    with model._with_applied(adapters, shared=True, checked=True):
        for ids in prompts:
            rows = torch.tensor([ids] * len(adapters), device=model.device)
            logits = model.base_model(rows, use_cache=False, logits_to_keep=1).logits[:, -1]
            results.append(torch.log_softmax(logits.float(), -1).cpu())
    return results


@torch.no_grad()
def key_scores(
    model: DocToLoRA, questions: Sequence[str], adapters: Sequence[Adapter], *, system: str = ""
) -> list[Tensor]:
    """How strongly each block's keys respond to each question: one float32 tensor [n_blocks] per question, on the CPU.

    score = |A_k x|, with x the input of the target linears at the last token of the prompt, in the last layer that
    reads (see `reading`). One pass of the question with the bias alone gives x. Weights of blocks do not count, but a
    block of weight 0 scores 0. A pass of many questions serves adapters of any size; their stacked keys are kept
    (`Adapter.stacked`).

    adapters: one per question.

    ValueError unless there are as many adapters as questions.
    """
    questions = check_texts(questions, "questions")
    if len(questions) != len(adapters):
        raise ValueError(f"{len(questions)} questions but {len(adapters)} adapters: give one adapter per question")
    prompts = question_ids(model.tokenizer, list(questions), system)
    model._check_adapters(list({id(one): one for one in adapters}.values()))
    biases = {id(one): replace(one, blocks=()) for one in adapters}
    scores: list[Tensor] = []
    for start in range(0, len(prompts), model.answer_batch):
        batch = slice(start, start + model.answer_batch)
        inputs = _last_inputs(model, prompts[batch], [biases[id(one)] for one in adapters[batch]])
        for row, adapter in enumerate(adapters[batch]):
            scores.append(_key_norms(adapter, {module: x[row] for module, x in inputs.items()}, _last_layer(model)))
    return scores


def _last_layer(model: DocToLoRA) -> int:
    return model.reading.layers_of(model.config.n_layers)[-1]


def _last_inputs(model: DocToLoRA, prompts: Sequence[list[int]], adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """{module: [rows, d_in]}: its inputs at the last token of each prompt, in the last layer that reads."""
    ids, mask = (one.to(model.device) for one in pad_rows(prompts, pad_id_of(model.tokenizer), side="left"))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs: dict[str, Tensor] = {}
    modules = sorted({module for one in adapters for module in one.sizes})
    with ExitStack() as stack:
        stack.enter_context(model._with_applied(list(adapters), shared=True, checked=True))
        for module, linears in target_linears(model.base_model, modules).items():

            def keep(_, arguments, module=module):
                inputs[module] = arguments[0][:, -1]

            stack.enter_context(hooked(linears[_last_layer(model)].register_forward_pre_hook, keep))
        model.base_model(ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)
    return inputs


def _key_norms(adapter: Adapter, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """|A_k x| of every block [n_blocks], over all modules of one layer."""
    if not adapter.blocks:
        return torch.zeros(0)
    squares = []
    for module, (A, _) in adapter.stacked.items():
        keys = A[layer]  # [K, r, d_in]
        products = keys.flatten(0, 1) @ inputs[module].to(keys)
        squares.append(products.view(keys.shape[:2]).float().square().sum(-1))
    weights = torch.tensor([block.weight for block in adapter.blocks])
    return torch.stack(squares).sum(0).sqrt().cpu().masked_fill(weights == 0, 0.0)


@torch.no_grad()
def null_margins(model: DocToLoRA, questions: Sequence[str], adapter: Adapter) -> Tensor:
    """By how much each question's best block exceeds the null block, in nats: [questions] float32, on the CPU.

    margin = log(S / N) at the last token of the prompt, the largest over linears that read (see `reading`). Sparse
    reading reads a block where it exceeds `Reading.null_threshold`.

    ValueError where the model has no null block, or the adapter no blocks.
    """
    if not isinstance(model.reading, Reading) or (null := model.hypernetwork.null()) is None:
        raise ValueError("this model has no null block for whole blocks: d2l train --stage reading makes one")
    if not any(block.weight for block in adapter.blocks):
        raise ValueError("the adapter has no block to compare with the null block")
    model._check_adapters([adapter])
    prompts, margins = question_ids(model.tokenizer, check_texts(questions, "questions")), []
    shut = replace(model.reading, null_threshold=_SHUT)  # what a layer reads would change the margins of later ones
    for start in range(0, len(prompts), model.answer_batch):
        rows = prompts[start : start + model.answer_batch]
        ids, mask = (one.to(model.device) for one in pad_rows(rows, pad_id_of(model.tokenizer), side="left"))
        options = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0), "use_cache": False}
        with read_sparsely(model.base_model, [adapter], shut, null=null) as state:
            model.base_model(ids, logits_to_keep=1, **options)
        margins.append(torch.stack(list(state.margins.values())).amax(0).float().cpu())
    return torch.cat(margins)


def conformal_threshold(scores: Sequence[float] | Tensor, error: float) -> float:
    """The least threshold that a further score like these exceeds with a probability of at most `error`.

    Split conformal: the k-th smallest of n scores, k = ceil((n + 1) (1 - error)). With `null_margins` of unrelated
    questions it is a `Reading.null_threshold`: of further such questions, on adapters of as many blocks, at most
    `error` read a block, on average over draws of the n questions. It promises nothing about answerable questions.

    ValueError for an error outside 0 to 1, and for too few scores: n must be at least 1 / error - 1.
    """
    if not 0 < error < 1:
        raise ValueError(f"error must be between 0 and 1, not {error!r}")
    ordered = sorted(float(score) for score in scores)
    place = math.ceil((len(ordered) + 1) * (1 - error) - 1e-9)
    if place > len(ordered):
        raise ValueError(
            f"an error of {error} needs {math.ceil(1 / error - 1e-9) - 1} scores or more, not {len(ordered)}"
        )
    return ordered[place - 1]


def route_by_keys(
    model: DocToLoRA, questions: Sequence[str], adapters: Sequence[Adapter | None], blocks: int = 1, *, system: str = ""
) -> list[Adapter | None]:
    """For each question the bias and the `blocks` of its adapter with the largest `key_scores`, in their order.

    Like `route`, in one pass for any number of blocks, and without a threshold. None, and an adapter with no more than
    `blocks`, come back unchanged.
    """
    check_count(blocks, "blocks")
    questions = check_texts(questions, "questions")
    many = [place for place, one in enumerate(adapters) if one is not None and len(one.blocks) > blocks]
    scores = key_scores(model, [questions[i] for i in many], [adapters[i] for i in many], system=system)
    routed = list(adapters)
    for place, score in zip(many, scores, strict=True):
        routed[place] = most_relevant(adapters[place], score, blocks)
    return routed


def route(
    model: DocToLoRA,
    questions: Sequence[str],
    adapters: Sequence[Adapter | None],
    blocks: int = 1,
    *,
    least: float | None = None,
    system: str = "",
) -> list[Adapter | None]:
    """For each question the bias and the most relevant `blocks` of its adapter (see `relevance`), in their order.

    blocks: how many.
    least: nats that a block must reach (None: `model.least_relevance`). If none does, the bias alone answers.

    None comes back unchanged; so does an adapter with no more than `blocks` if `least` is minus infinity.
    """
    check_count(blocks, "blocks")
    questions = check_texts(questions, "questions")
    least = model.least_relevance if least is None else least
    many = [
        place
        for place, adapter in enumerate(adapters)
        if adapter is not None and (len(adapter.blocks) > blocks or (least > -math.inf and adapter.blocks))
    ]
    scores = relevance(model, [questions[i] for i in many], [adapters[i] for i in many], system=system)
    routed = list(adapters)
    for place, score in zip(many, scores, strict=True):
        routed[place] = most_relevant(adapters[place], score, blocks, least)
    return routed


def most_relevant(adapter: Adapter, scores: Tensor, blocks: int, least: float = -math.inf) -> Adapter:
    """The adapter with only its `blocks` of highest score [n_blocks], in their order, each at least `least`."""
    best = scores.argsort(descending=True, stable=True)[:blocks].tolist()
    kept = sorted(block for block in best if scores[block] >= least)
    return replace(adapter, blocks=tuple(adapter.blocks[block] for block in kept))


def gated(
    model: DocToLoRA,
    questions: Sequence[str],
    adapters: Adapter | None | Sequence[Adapter | None],
    *,
    least: float | None = None,
    blocks: int | None = 1,
    system: str = "",
) -> list[Adapter | None]:
    """The adapter to answer each question with, for `model.answer`; None, the base model, if no block is relevant.

    least: nats that a relevant block must reach (see `relevance`). None: `model.least_relevance`, or the threshold of
        the model's `gate` for a question that the base model answers by itself. The gate spares what the base model
        knows, even if a document contradicts it: pass `least` for documents that should override.
    blocks: how many of the relevant blocks answer, the most relevant, with the bias. None: the whole adapter answers if
        any block is relevant.

    ValueError unless there is one adapter for all questions, or one per question.
    """
    questions = check_texts(questions, "questions")
    gate = model.gate if least is None else None
    least = model.least_relevance if least is None else least
    if blocks is not None:
        check_count(blocks, "blocks")
    per_question = list(adapters) if isinstance(adapters, (list, tuple)) else [adapters] * len(questions)
    if len(per_question) != len(questions):
        raise ValueError(
            f"{len(questions)} questions but {len(per_question)} adapters: give one for all or one per question"
        )
    places = [place for place, adapter in enumerate(per_question) if adapter is not None]
    scores = relevance(model, [questions[i] for i in places], [per_question[i] for i in places], system=system)
    thresholds = [least] * len(places)
    if gate is not None:
        stricter = [max(least, gate.least(len(score))) for score in scores]
        between = [i for i, score in enumerate(scores) if len(score) and least <= score.max() < stricter[i]]
        own = model.answer([questions[places[i]] for i in between], None, system=system)
        for i, answer in zip(between, own, strict=True):
            if answer != gate.refusal:
                thresholds[i] = stricter[i]
    chosen: list[Adapter | None] = [None] * len(questions)
    for place, score, threshold in zip(places, scores, thresholds, strict=True):
        chosen[place] = _gate(per_question[place], score, threshold, blocks)
    return chosen


def _gate(adapter: Adapter, scores: Tensor, least: float, blocks: int | None) -> Adapter | None:
    """The adapter that answers, for these relevances of its blocks [n_blocks]; None for the base model."""
    relevant = most_relevant(adapter, scores, len(scores) if blocks is None else blocks, least)
    if not relevant.blocks:
        return None
    return adapter if blocks is None else relevant
