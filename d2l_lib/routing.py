"""Which blocks a question is about, so that few of many blocks answer.

    question -> one pass with the bias alone -> key scores of all blocks -> a shortlist (of one, unless more are asked)
    shortlist -> a pass with each of its blocks alone -> relevance -> an adapter of the most relevant

A sum of many blocks carries the noise of all of them. `key_scores` needs one pass for all blocks: how strongly the keys
A of each respond to the inputs of the last layer. It ranks blocks, but does not tell whether any of them holds an
answer. With one block at a time, the model itself shows it (`relevance`). A block that holds nothing about a question
does not change the first token of the answer. A block that holds something similar changes it with doubts, but among
many such blocks some change it without: so the keys choose, and the trial tells whether the choice is relevant.

A model with a `Router` (a small learned network, see `router`) tries no block: of the same pass it compares how blocks
respond, in all layers and at all words, and no block answers where none is about the question. A question that is to be
answered with yes or no it judges, too. A question about "the X of Y" needs two blocks, one after the other: see
`_by_first_hop`.

Routing changes no adapter: it returns a new one, whose block has one row more where a question is judged. What it
costs does not grow with the number of blocks, but for one product with the keys of one layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from d2l_lib.adapter import Adapter, Block
from d2l_lib.base_model import final_norm, target_linears
from d2l_lib.documents import answer_ids, check_count, check_texts, question_ids
from d2l_lib.engine import pad_id_of, pad_rows
from d2l_lib.lora import hooked
from d2l_lib.reading import Reading, null_score, read_sparsely
from d2l_lib.router import CANDIDATES, Responses, Router, with_verdict

if TYPE_CHECKING:
    from d2l_lib.model import DocToLoRA

TOKENS_AT_ONCE = 2048  # of questions, or of one with a copy per block
_BLOCKS_AT_ONCE = 256  # whose keys answer while they are in the processor's cache
_HOP = re.compile(r"the [a-z]+ of (?:the )?[A-Z]\w*(?:[^,.;:?!]{,60}\b[A-Z]\w*)?")  # "the founder of the Lencott Bank"
ASK_HOP = ("What is {}?", "Who is {}?")
_ALONE = re.compile(r"(?:What|Which|Who|Whom|Where|When) (?:is|was|are|were)\W*")  # asks for the first hop itself
_HOP_TOKENS = 16  # of the value that stands for it
_SHUT = 50.0  # nats: a null block that stops everything
# Blocks that are tried, unless more of them answer. One leaves the choice to the router, or to the keys. Trials of
# eight choose no better, at twice the time of an answer (`d2l study kinds`), and among hundreds of blocks they choose
# worse (`d2l study router`).
SHORTLIST = 1
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

    Every block is tried, with a row of a forward pass for each.

    adapters: one per question.
    share: infinity takes the divergence alone.

    ValueError unless there are as many adapters as questions.
    """
    both = leads_and_divergences(model, questions, adapters, system=system)
    return [_together(*parts, share) for parts in both]


def leads_and_divergences(
    model: DocToLoRA,
    questions: Sequence[str],
    adapters: Sequence[Adapter],
    *,
    shortlist: int | None = None,
    system: str = "",
) -> list[tuple[Tensor, Tensor]]:
    """The two parts of `relevance`: (lead, divergence) of each block, two tensors [n_blocks] per question.

    shortlist: only so many blocks are tried, those of the largest `key_scores`; the others have minus infinity (None:
        every block is tried).
    """
    if shortlist is not None:
        check_count(shortlist, "shortlist")
    prompts = _checked_prompts(model, questions, adapters, system)
    return _measures(model, prompts, adapters, shortlist)


def _together(lead: Tensor, divergence: Tensor, share: float = SHARE) -> Tensor:
    """Relevance of its two parts."""
    return divergence if math.isinf(share) else lead + share * divergence


def _checked_prompts(
    model: DocToLoRA, questions: Sequence[str], adapters: Sequence[Adapter | None], system: str
) -> list[list[int]]:
    """The questions' token ids, after a check of them and of each adapter, once."""
    questions = check_texts(questions, "questions")
    if len(questions) != len(adapters):
        raise ValueError(f"{len(questions)} questions but {len(adapters)} adapters: give one adapter per question")
    distinct = list({id(one): one for one in adapters if one is not None}.values())
    model._check_adapters(distinct)
    for one in distinct:
        one.check_summed()
    return question_ids(model.tokenizer, list(questions), system)


@torch.no_grad()
def _measures(
    model: DocToLoRA, prompts: Sequence[list[int]], adapters: Sequence[Adapter], shortlist: int | None
) -> list[tuple[Tensor, Tensor]]:
    """`leads_and_divergences` of token ids and checked adapters."""
    none, tried = [], []  # log-probabilities with the bias alone; places of the blocks to try
    for batch in _batches(prompts):
        log_probs, inputs = _bias_pass(model, prompts[batch], adapters[batch])
        none += log_probs
        scores = None
        for row, adapter in enumerate(adapters[batch]):
            places = list(range(len(adapter.blocks)))
            if shortlist is not None and shortlist < len(places):
                scores = _scores_of_batch(adapters[batch], inputs) if scores is None else scores
                places = scores[row].topk(shortlist).indices.sort().values.tolist()
            tried.append(places)
    measures = [tuple(torch.full((len(one.blocks),), -math.inf) for _ in range(2)) for one in adapters]
    pairs = [(i, place) for i, places in enumerate(tried) for place in places]
    pairs.sort(key=lambda pair: -len(prompts[pair[0]]))  # the least padding
    while pairs:
        most = max(1, TOKENS_AT_ONCE // len(prompts[pairs[0][0]]))
        now, pairs = pairs[:most], pairs[most:]
        alone = [adapters[i]._with(blocks=(adapters[i].blocks[place],)) for i, place in now]
        each = _last_token(model, [prompts[i] for i, _ in now], alone)
        before = torch.stack([none[i] for i, _ in now])
        leads, divergences = _lead(before, each), (each.exp() * (each - before)).sum(-1).clamp(min=0.0)
        for (i, place), lead, divergence in zip(now, leads, divergences, strict=True):
            measures[i][0][place], measures[i][1][place] = lead, divergence
    return measures


def _lead(none: Tensor, each: Tensor) -> Tensor:
    """See `relevance`; log-probabilities none [rows, vocabulary], each [rows, vocabulary] -> [rows]."""
    others = each.scatter(-1, none.argmax(-1, keepdim=True), -torch.inf)
    first, choice = others.max(-1)
    return first - each.scatter(-1, choice.unsqueeze(-1), -torch.inf).amax(-1)


def _last_token(model: DocToLoRA, prompts: Sequence[list[int]], adapters: Sequence[Adapter]) -> Tensor:
    """Log-probabilities [rows, vocabulary] of the token after each prompt, with its adapter."""
    ids, mask = (one.to(model.device) for one in pad_rows(prompts, pad_id_of(model.tokenizer), side="left"))
    padding = {} if mask.all() else {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with model._with_applied(list(adapters), shared=True, checked=True):
        logits = model.base_model(ids, use_cache=False, logits_to_keep=1, **padding).logits[:, -1]
    return torch.log_softmax(logits.float(), -1).cpu()


Inputs = dict[int, dict[str, Tensor]]  # {layer: {module: x [rows, tokens, d_in]}}, prompts padded on the left


def _batches(prompts: Sequence[list[int]]) -> Iterator[slice]:
    """The prompts in their order, as many at once as `TOKENS_AT_ONCE` holds: they share one product with the keys."""
    start = longest = 0
    for place, prompt in enumerate(prompts):
        longest = max(longest, len(prompt))
        if place > start and longest * (place + 1 - start) > TOKENS_AT_ONCE:
            yield slice(start, place)
            start, longest = place, len(prompt)
    if prompts:
        yield slice(start, len(prompts))


def _bias_pass(
    model: DocToLoRA, prompts: Sequence[list[int]], adapters: Sequence[Adapter], layers: Sequence[int] = ()
) -> tuple[Tensor, Inputs]:
    """One pass with the bias alone: (log-probabilities [rows, vocabulary] of the next token, inputs of the linears).

    layers: whose inputs are kept, beside those of the last layer that reads.
    """
    biases = {id(one): one._with(blocks=()) for one in adapters}
    inputs: Inputs = {layer: {} for layer in sorted({*layers, _last_layer(model)})}
    modules = sorted({module for one in adapters for module in one.sizes})
    with ExitStack() as stack:
        for module, linears in target_linears(model.base_model, modules).items():
            for layer, of_layer in inputs.items():

                def keep(_, arguments, module=module, of_layer=of_layer):
                    of_layer[module] = arguments[0]

                stack.enter_context(hooked(linears[layer].register_forward_pre_hook, keep))
        return _last_token(model, prompts, [biases[id(one)] for one in adapters]), inputs


@torch.no_grad()
def key_scores(
    model: DocToLoRA, questions: Sequence[str], adapters: Sequence[Adapter], *, system: str = ""
) -> list[Tensor]:
    """How strongly each block's keys respond to each question: one float32 tensor [n_blocks] per question, on the CPU.

    score = |A_k x|, with x the input of the target linears at the last token of the prompt, in the last layer that
    reads (see `reading`). One pass of the question with the bias alone gives x. Weights of blocks do not count, but a
    block of weight 0 scores 0. Questions of a batch that share an adapter share one product with its keys.

    Memory: the keys of that layer in one piece, made once and kept with the adapter (`Adapter.keys_of`): a block of
    `tiny/qa` takes 16 kB, 10,000 blocks 164 MB.

    adapters: one per question.

    ValueError unless there are as many adapters as questions.
    """
    prompts = _checked_prompts(model, questions, adapters, system)
    scores: list[Tensor] = []
    for batch in _batches(prompts):
        scores += _scores_of_batch(adapters[batch], _bias_pass(model, prompts[batch], adapters[batch])[1])
    return scores


def _last_layer(model: DocToLoRA) -> int:
    return model.reading.layers_of(model.config.n_layers)[-1]


def _scores_of_batch(adapters: Sequence[Adapter], inputs: Inputs) -> list[Tensor]:
    """`key_scores` [n_blocks] of each row, of the inputs of the last layer that reads."""
    layer = max(inputs)
    rows_of: dict[int, list[int]] = {}
    for row, adapter in enumerate(adapters):
        rows_of.setdefault(id(adapter), []).append(row)
    scores = [torch.zeros(0)] * len(adapters)
    for rows in rows_of.values():
        if adapters[rows[0]].blocks:
            own = {module: x[rows, -1] for module, x in inputs[layer].items()}
            for row, score in zip(rows, _key_norms(adapters[rows[0]], own, layer), strict=True):
                scores[row] = score
    return scores


def _key_norms(adapter: Adapter, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """|A_k x| of every block [rows, n_blocks] for x [rows, d_in], over all modules of one layer; 0 without weight."""
    squares = []
    for module, keys in adapter.keys_of(layer).items():  # [K, r, d_in]
        x, of_module = inputs[module].to(keys), []
        for some in keys.split(_BLOCKS_AT_ONCE):
            products = x @ some.flatten(0, 1).T  # [rows, some r]
            of_module.append(products.float().square_().unflatten(1, some.shape[:2]).sum(-1))
        squares.append(torch.cat(of_module, 1))
    silent = [place for place, block in enumerate(adapter.blocks) if block.weight == 0]
    norms = torch.stack(squares).sum(0).sqrt().cpu()
    norms[:, silent] = 0.0
    return norms


@dataclass(frozen=True)
class Weighed:
    """What a router compares for one question.

    adapter: with the blocks that are compared. responses: theirs. x: [d_in], the input of the last layer's linear at
    the prompt's last token.
    """

    adapter: Adapter
    responses: Responses
    x: Tensor


@torch.no_grad()
def weigh(model: DocToLoRA, router: Router, prompts: Sequence[list[int]], adapters: Sequence[Adapter]) -> list[Weighed]:
    """How the blocks respond to each question (token ids), of one pass with the bias alone.

    Of more than `CANDIDATES` blocks only those of the largest `key_scores` are compared, and none without weight.
    """
    ((module, (keys, floor)),) = model.hypernetwork.null().items()
    words = [answer_ids(model.tokenizer, text)[0] for text in (router.config.refusal, *router.config.verdicts)]
    layers, weighed = range(router.config.n_layers), []
    for batch in _batches(prompts):
        log_probs, inputs = _bias_pass(model, prompts[batch], adapters[batch], layers)
        many = [len(adapter.blocks) > CANDIDATES for adapter in adapters[batch]]
        scores = _scores_of_batch(adapters[batch], inputs) if any(many) else None
        for row, (prompt, adapter) in enumerate(zip(prompts[batch], adapters[batch], strict=True)):
            few = most_relevant(adapter, scores[row], CANDIDATES) if many[row] else adapter
            if not all(block.weight for block in few.blocks):
                few = few._with(blocks=tuple(block for block in few.blocks if block.weight))
            rows = torch.zeros(0, len(prompt), len(router.mean))
            x = torch.stack([inputs[layer][module][row, -len(prompt) :] for layer in layers])  # [L, T, d_in]
            if few.blocks:
                A, B = few.stacked[module]  # [L, K, r, d]
                e = router.directions(final_embeddings(model, prompt)).to(B)
                each = x.to(A) @ A.flatten(1, 2).mT, e @ B.flatten(1, 2).mT  # [L, T, K r]
                rows = torch.cat(
                    [one.unflatten(2, A.shape[1:3]).permute(2, 1, 0, 3).flatten(2).float() for one in each], -1
                )
            null = [
                null_score(
                    one[-1].float(), keys[layer].to(one.device, torch.float32), floor[layer].to(one.device)
                ).cpu()
                for layer, one in enumerate(x)
            ]
            responses = Responses(rows, torch.stack(null), log_probs[row, words])
            weighed.append(Weighed(few, responses, x[-1, -1]))
    return weighed


def final_embeddings(model: DocToLoRA, ids: Sequence[int] | slice) -> Tensor:
    """[tokens, hidden] output embeddings times the final norm's weight, on the CPU."""
    norm = final_norm(model.base_model).weight.detach().float()
    return (model.base_model.get_output_embeddings().weight.detach()[ids].float() * norm).cpu()


@torch.no_grad()
def _chosen_by_router(
    model: DocToLoRA, prompts: Sequence[list[int]], adapters: Sequence[Adapter], blocks: int
) -> list[Adapter]:
    """For each question the bias and at most `blocks` blocks that the model's router chooses."""
    router, chosen, weighed = model.router, [], weigh(model, model.router, prompts, adapters)
    for start in range(0, len(weighed), model.answer_batch):
        batch = weighed[start : start + model.answer_batch]
        scores, verdicts = router([one.responses for one in batch])
        for one, (none, *_), own, verdict in zip(batch, scores.tolist(), scores[:, 1:], verdicts, strict=True):
            own = own[: len(one.adapter.blocks)]
            kept = most_relevant(one.adapter, own, blocks, none)
            if kept.blocks and router.states(one.responses.log_probs):
                best = int(own.argmax())
                kept = _judged(model, kept, one.adapter.blocks[best], one.x, bool(verdict[best] > 0))
            chosen.append(kept)
    return chosen


def _judged(model: DocToLoRA, adapter: Adapter, block: Block, x: Tensor, verdict: bool) -> Adapter:
    """The adapter, its `block` with a row that says yes or no: see `router.with_verdict`."""
    words = [answer_ids(model.tokenizer, word)[0] for word in model.router.config.verdicts]
    yes, no = final_embeddings(model, words)
    direction = F.normalize(yes - no if verdict else no - yes, dim=-1)
    held = adapter.layers.index(model.config.n_layers - 1)
    (module,) = adapter.modules
    judged = with_verdict(block, module, x, direction, adapter.scale, held)
    return adapter._with(blocks=tuple(judged if one is block else one for one in adapter.blocks))


@dataclass(frozen=True)
class FirstHop:
    """A question within a question.

    words: "the X of Y", as they stand there. asked: the question about them. inside: the adapter of the one block that
    the router chooses for it.
    """

    words: str
    asked: str
    inside: Adapter


def first_hops(
    model: DocToLoRA, questions: Sequence[str], adapters: Sequence[Adapter], *, system: str = ""
) -> dict[int, FirstHop]:
    """{row: what "the X of Y" in its question is}, of the rows where there is one and the router finds its block.

    "What is the mayor of Halmere?" is asked, and where no block answers it, "Who is ...?" (self-ask, Press et al. 2022,
    arXiv 2210.03350). Y is a name, in capitals; English alone is read so. A question that asks for the first hop alone
    has none.

    adapters: one per question. ValueError for a model without a router.
    """
    if model.router is None:
        raise ValueError("this model has no router, which finds first hops: d2l study router-weights trains one")
    words = {
        row: hop[0]
        for row, question in enumerate(questions)
        if (hop := _HOP.search(question)) and not _ALONE.fullmatch(question.replace(hop[0], ""))
    }
    found: dict[int, FirstHop] = {}
    for form in ASK_HOP:
        asked = {row: form.format(hop) for row, hop in words.items() if row not in found}
        prompts = question_ids(model.tokenizer, list(asked.values()), system)
        chosen = _chosen_by_router(model, prompts, [adapters[row] for row in asked], 1)
        for (row, text), one in zip(asked.items(), chosen, strict=True):
            if one.blocks:
                found[row] = FirstHop(words[row], text, one)
    return found


def _label(block: Block) -> tuple[str, int]:
    return block.document, block.chunk


def _by_first_hop(
    model: DocToLoRA,
    questions: Sequence[str],
    adapters: Sequence[Adapter],
    chosen: Sequence[Adapter],
    blocks: int,
    system: str,
) -> list[Adapter]:
    """The blocks `chosen` by the router, and others where a question has a first hop.

    "When was the mayor of Halmere born?" matches the keys of every birth. So who that is, is asked first (see
    `first_hops`). If the block that says it is not among those chosen for the whole question, the router chooses again,
    with the answer in place of the words. The question that is answered at last stays as it was asked.

    It costs an answer and two or three passes of short questions, where there is a first hop.
    """
    hops = {
        row: hop
        for row, hop in first_hops(model, questions, adapters, system=system).items()
        if _label(hop.inside.blocks[0]) not in map(_label, chosen[row].blocks)
    }
    options = {"max_new_tokens": _HOP_TOKENS, "system": system}
    answers = model.answer([hop.asked for hop in hops.values()], [hop.inside for hop in hops.values()], **options)
    said = [answer not in ("", model.router.config.refusal) for answer in answers]
    rows = [row for row, says in zip(hops, said, strict=True) if says]
    replaced = [
        questions[row].replace(hop.words, answer)
        for (row, hop), answer, says in zip(hops.items(), answers, said, strict=True)
        if says
    ]
    prompts = question_ids(model.tokenizer, replaced, system)
    routed = list(chosen)
    for row, second in zip(rows, _chosen_by_router(model, prompts, [adapters[i] for i in rows], blocks), strict=True):
        routed[row] = second if second.blocks else chosen[row]
    return routed


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
    shortlist: int | None = SHORTLIST,
    system: str = "",
) -> list[Adapter | None]:
    """For each question the bias and the most relevant `blocks` of its adapter (see `relevance`), in their order.

    blocks: how many.
    least: nats that a block must reach (None: `model.least_relevance`). If none does, the bias alone answers.
    shortlist: how many blocks are tried, those of the largest `key_scores`, and no fewer than `blocks`: left out, the
        keys choose (None: every block, with a row of a forward pass for each). Adapters with no more blocks come out
        the same either way.

    Where both are left out, a model with a `Router` tries no block: its router chooses, or none answers. It reads
    blocks as the hypernetwork writes them; an adapter with others (compressed, say) goes the way of a model without.

    None comes back unchanged; so does an adapter with no more than `blocks` if `least` is minus infinity.
    """
    questions = check_texts(questions, "questions")
    prompts = _checked_prompts(model, questions, adapters, system)
    return route_prompts(model, questions, prompts, adapters, blocks, least=least, shortlist=shortlist, system=system)


def route_prompts(
    model: DocToLoRA,
    questions: Sequence[str],
    prompts: Sequence[list[int]],
    adapters: Sequence[Adapter | None],
    blocks: int,
    *,
    least: float | None = None,
    shortlist: int | None = SHORTLIST,
    system: str = "",
) -> list[Adapter | None]:
    """`route` of questions with their token ids, and checked adapters."""
    check_count(blocks, "blocks")
    if shortlist is not None:
        check_count(shortlist, "shortlist")
        shortlist = max(shortlist, blocks)
    routed, places = list(adapters), range(len(adapters))
    if model.router is not None and least is None and shortlist == blocks:
        own = [i for i in places if adapters[i] is not None and adapters[i].ranks == {model.router.config.rank}]
        inside = [adapters[i] for i in own]
        chosen = _chosen_by_router(model, [prompts[i] for i in own], inside, blocks)
        chosen = _by_first_hop(model, [questions[i] for i in own], inside, chosen, blocks, system)
        for place, one in zip(own, chosen, strict=True):
            routed[place] = one
        places = sorted({*places} - {*own})
    least = model.least_relevance if least is None else least
    many = [
        place
        for place in places
        if (one := adapters[place]) is not None and (len(one.blocks) > blocks or (least > -math.inf and one.blocks))
    ]
    measures = _measures(model, [prompts[i] for i in many], [adapters[i] for i in many], shortlist)
    for place, parts in zip(many, measures, strict=True):
        routed[place] = most_relevant(adapters[place], _together(*parts), blocks, least)
    return routed


def most_relevant(adapter: Adapter, scores: Tensor, blocks: int, least: float = -math.inf) -> Adapter:
    """The adapter with only its `blocks` of highest score [n_blocks], in their order, each at least `least`."""
    if len(scores) > blocks:  # sort few of many
        high = (scores >= scores.topk(blocks).values[-1]).nonzero().flatten()
    else:
        high = torch.arange(len(scores))
    best = high[scores[high].argsort(descending=True, stable=True)[:blocks]].tolist()
    kept = sorted(block for block in best if scores[block] >= least)
    return adapter._with(blocks=tuple(adapter.blocks[block] for block in kept))


def gated(
    model: DocToLoRA,
    questions: Sequence[str],
    adapters: Adapter | None | Sequence[Adapter | None],
    *,
    least: float | None = None,
    blocks: int | None = 1,
    shortlist: int | None = SHORTLIST,
    system: str = "",
) -> list[Adapter | None]:
    """The adapter to answer each question with, for `model.answer`; None, the base model, if no block is relevant.

    least: nats that a relevant block must reach (see `relevance`). None: `model.least_relevance`, or the threshold of
        the model's `gate` for a question that the base model answers by itself. The gate spares what the base model
        knows, even if a document contradicts it: pass `least` for documents that should override.
    blocks: how many of the relevant blocks answer, the most relevant, with the bias. None: the whole adapter answers if
        any block is relevant.
    shortlist: how many blocks are tried, as of `route`.

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
    if shortlist is not None and blocks is not None:
        shortlist = max(shortlist, blocks)
    of_places = [questions[i] for i in places], [per_question[i] for i in places]
    measures = leads_and_divergences(model, *of_places, shortlist=shortlist, system=system)
    scores = [_together(*parts) for parts in measures]
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
