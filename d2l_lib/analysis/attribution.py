"""Where an answer came from: which chunk, sentence, layer or direction of an adapter carries it.

To add a method, write one function under `@register("chunk", ...)` in the section "methods" below: it takes `Trials`
and returns `Scores`. `METHODS`, the viewer, the errors and the study `attribution` then know it by the function's
name, in the order of this file. Test in `tests/analysis/test_attribution.py` what it computes and that it ranks the
evidence first. Give a slow method an entry in `trust.EVERY`: the study then skips questions. `trials` says what an
adapter's parts are, and scores an answer without them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from d2l_lib import routing
from d2l_lib.adapter import Adapter
from d2l_lib.analysis.trials import (
    LEVELS,
    Trials,
    answer_target,
    document_texts,
    likelihoods,
    rows_of,
    sentence_units,
    weighted,
)
from d2l_lib.documents import chat_affixes, context_ids
from d2l_lib.engine import pad_id_of, pad_rows
from d2l_lib.row_reading import read_rows
from d2l_lib.token_rows import ROLES, WORD_ROLES

if TYPE_CHECKING:
    from d2l_lib.model import DocToLoRA

__all__ = ["METHODS", "ROW_METHODS", "attribute", "by_token", "methods_of", "ranks", "register"]
__all__ += ["Trials", "answer_target", "document_texts", "rows_of", "sentence_units", "weighted"]  # of `trials`

METHODS: dict[str, tuple[str, ...]] = dict.fromkeys(LEVELS, ())  # {level: names of its methods}, see `register`
ROW_METHODS: dict[str, tuple[str, ...]] = dict.fromkeys(("chunk", "sentence"), ())  # the same for token rows
_RUN: dict[str, Callable[[Trials], Scores]] = {}
_RANDOM_UNITS = 4  # left out as a control
_PART = 12  # words of a question that are read by themselves, at most
_SECOND = 0.999  # what the block of a first hop counts beside the answer's


class Scores(NamedTuple):
    """What a method returns; tokens but the first are NaN if it does not tell tokens apart.

    by_token: contributions [units, answer tokens] in nats.
    margin: margin contributions [units] in logits, of the token with the smallest margin.
    elsewhere: nats that belong to no unit.
    """

    by_token: Tensor
    margin: Tensor
    elsewhere: float = 0.0


def register(*levels: str, rows: Sequence[str] = ()) -> Callable:
    """A decorator for a method of these levels, and of the levels `rows` of token rows; its name is the function's."""

    def known(function: Callable[[Trials], Scores]) -> Callable[[Trials], Scores]:
        _RUN[function.__name__] = function
        for methods, several in ((METHODS, levels), (ROW_METHODS, rows)):
            for level in several:
                methods[level] += (function.__name__,)
        return function

    return known


def methods_of(model: DocToLoRA) -> dict[str, tuple[str, ...]]:
    """{level: names of its methods} for the adapters of this model: METHODS, or ROW_METHODS."""
    return ROW_METHODS if getattr(model, "writes_rows", False) else METHODS


# ---------------------------------------------------------------------------------------------------------- methods
@register("chunk", "sentence", "layer", "rank", rows=("chunk", "sentence"))
def leave_one_out(trials: Trials) -> Scores:
    """The loss without each unit. Exact."""
    return Scores(*trials.leave_out(range(len(trials))))


@register("chunk", "layer", "rank", rows=("chunk",))
def add_one_in(trials: Trials) -> Scores:
    """What each unit alone adds to the bias."""
    n = len(trials)
    log_probs, margins = trials.score(torch.cat([torch.zeros(1, n), torch.eye(n)]))
    return Scores(log_probs[1:] - log_probs[:1], margins[1:].amin(1) - margins[:1].amin(1))


@register("chunk", "sentence", "layer", "rank")
def gradient(trials: Trials) -> Scores:
    """Gradient times input: the derivative by each unit's weight where all are 1, in one backward pass.

    Sentences: the derivative by their features, through the hypernetwork.
    """
    if trials.level == "sentence":
        return _feature_gradients(trials, [1.0], trials.options.by_token)
    n_tokens = len(trials.target.answer)
    weights = torch.ones(n_tokens, len(trials), requires_grad=True)  # row t is for token t
    log_probs, margins = likelihoods(trials.model, trials.rows, trials.target, weights)
    weakest = int(margins[0].argmin())
    (of_tokens,) = torch.autograd.grad(log_probs.diagonal().sum(), weights, retain_graph=True)
    (of_margin,) = torch.autograd.grad(margins[weakest, weakest], weights)
    return Scores(of_tokens.T, of_margin[weakest])


@register("sentence")
def integrated_gradients(trials: Trials) -> Scores:
    """The mean gradient on the straight line from the mean feature to the features, in `options.steps` steps."""
    steps = trials.options.steps
    return _feature_gradients(trials, [(step + 0.5) / steps for step in range(steps)] if steps > 1 else [1.0], False)


@register("chunk", "layer", rows=("chunk",))
def surrogate(trials: Trials) -> Scores:
    """Coefficients of a lasso over `options.samples` trials, each unit in or out with probability 1/2."""
    weights = torch.randint(0, 2, (trials.options.samples, len(trials)), generator=trials.generator).float()
    log_probs, margins = trials.score(weights)
    fitted = lasso(weights, torch.cat([log_probs, margins.amin(1, keepdim=True)], 1), penalty=0.05)
    return Scores(fitted[:, :-1], fitted[:, -1])


@register("chunk")
def relevance(trials: Trials) -> Scores:
    """`routing.relevance` of each block (nats, not of the log-probability): of the first token only, no margin."""
    (first,) = routing.relevance(trials.model, [trials.question], [trials.adapter], system=trials.options.system)
    contributions = torch.full((len(trials), len(trials.target.answer)), math.nan)
    contributions[:, 0] = first
    return Scores(contributions, torch.full((len(trials),), math.nan))


@register("chunk")
def question_parts(trials: Trials) -> Scores:
    """The block that the answer needs most, then those that parts of the question read: for questions of several hops.

    Every run of 2 to `_PART` words of the question is asked by itself, in one pass with the bias alone. A block's share
    of a part is that of its squared `routing.key_scores`; it counts with its largest share of a part (0 to 1, not
    nats). 1 for the first of `leave_one_out`, and next to it the block that says what "the X of Y" in the question is,
    where the model's router finds one (`routing.first_hops`). Only the first is proven: the others are what parts would
    read, no cause.
    """
    words, unmeasured = trials.question.split(), torch.full((len(trials),), math.nan)
    ends = [(a, b) for a in range(len(words)) for b in range(a + 2, min(a + _PART, len(words)) + 1)]
    parts = [" ".join(words[a:b]).rstrip("?!.") for a, b in ends] or [trials.question]
    scores = routing.key_scores(trials.model, parts, [trials.adapter] * len(parts), system=trials.options.system)
    squares = torch.stack(scores).square()
    contributions = torch.full((len(trials), len(trials.target.answer)), math.nan)
    contributions[:, 0] = (squares / squares.sum(1, keepdim=True).clamp(min=1e-12)).amax(0)
    model, adapter = trials.model, trials.adapter
    if model.router is not None:
        for hop in routing.first_hops(model, [trials.question], [adapter], system=trials.options.system).values():
            (said,) = hop.inside.blocks
            holds = [(block.document, block.chunk) == (said.document, said.chunk) for block in adapter.blocks]
            contributions[holds.index(True), 0] = _SECOND
    contributions[leave_one_out(trials).by_token.sum(1).argmax(), 0] = 1.0
    return Scores(contributions, unmeasured)


@register(rows=("chunk", "sentence"))
def attended(trials: Trials) -> Scores:
    """The share of each answer token's attention that reads rows of the unit (0 to 1, not nats): what was read, and no
    cause. No margin."""
    model, adapter, target = trials.model, trials.adapter, trials.target
    ids = torch.tensor([target.prompt + target.answer[:-1]], device=model.device)
    with torch.no_grad(), read_rows(model.base_model, [adapter], model.reading, model.hypernetwork.reader) as state:
        model.base_model(ids, use_cache=False, logits_to_keep=1)
    shares = state.shares[0][0, len(target.prompt) - 1 :, 1:].unflatten(-1, (-1, len(WORD_ROLES))).sum(-1).cpu()
    of_each = [block.rank // len(ROLES) if block.weight else 0 for block in adapter.blocks]
    of_token = torch.arange(len(of_each)).repeat_interleave(torch.tensor(of_each))
    if trials.level == "sentence":
        of_token = torch.cat([_sentences_of(trials, number, n) for number, n in enumerate(of_each)])
    contributions = torch.zeros(len(trials), len(target.answer)).index_add(0, of_token, shares.T)
    return Scores(contributions, torch.full((len(trials),), math.nan))


@register("chunk", "sentence", "layer", "rank", rows=("chunk", "sentence"))
def random(trials: Trials) -> Scores:
    """Random numbers: a control."""
    contributions = torch.randn(len(trials), len(trials.target.answer), generator=trials.generator)
    return Scores(contributions, torch.randn(len(trials), generator=trials.generator))


# -------------------------------------------------------------------------------------------------------- attribute
def attribute(
    model: DocToLoRA,
    adapter: Adapter,
    question: str,
    answer: str | None = None,
    level: str = "chunk",
    method: str = "leave_one_out",
    **options: object,
) -> pd.DataFrame:
    """How much each part of an adapter supports an answer: one row per unit of `level`, in the adapter's order.

    answer: the one to explain (None: the model's own greedy one).
    level: "chunk", "sentence" (needs `documents`), "layer" (of each module) or "rank" (singular directions).
    method: one of `methods_of(model)[level]`, each a function of this module.
    options: those of `Options`: documents, wrong, seed, samples, directions, steps, by_token, controls, system,
        progress.

    Columns:
        level, unit (a label), document, chunk, start, end (characters), layer, module, direction: missing where a unit
            has none.
        contribution: nats of the answer's log-probability; positive: the unit supports the answer.
        margin_contribution: logits of the answer's margin, the smallest over its tokens to the best other token. The
            model gives the answer while the margin is positive.
        by_token: the contribution to each answer token, a list.
        strength (directions only); text, block (sentences only).

    `.attrs` holds plain values:
        question, answer, level, method, seed.
        tokens: the answer's, as texts.
        seconds: of the method alone.
        elsewhere: nats that gradients through the hypernetwork give to the chat wrapping.
        controls (unless controls=False): log_prob, probability and margin of the answer with "all blocks", the "zero
            adapter" (the bias alone) and the "wrong document" (the adapter `wrong`, or None); the mean and largest cost
            of leaving out a few "random units".
    """
    methods = methods_of(model)
    if level in LEVELS and method not in methods.get(level, ()):
        if level not in methods:
            raise ValueError(f"token rows have no {level}s: choose the level {' or '.join(methods)}")
        raise ValueError(f"level {level!r} has no method {method!r}; it has {', '.join(methods[level])}")
    trials = Trials(model, adapter, question, answer, level, **options)
    began = time.perf_counter()
    scores = _RUN[method](trials)
    seconds = time.perf_counter() - began
    table = trials.units.assign(
        contribution=scores.by_token.nansum(1).tolist(),
        margin_contribution=scores.margin.tolist(),
        by_token=scores.by_token.tolist(),
    )
    table.insert(0, "level", level)
    table.attrs = {"question": question, "answer": trials.answer, "level": level, "method": method}
    table.attrs |= {"seed": trials.options.seed, "tokens": trials.target.tokens, "seconds": seconds}
    table.attrs["elsewhere"] = scores.elsewhere
    if trials.options.controls:
        table.attrs["controls"] = _controls(trials)
    return table


def _controls(trials: Trials) -> dict:
    """See `attribute`."""
    model, wrong = trials.model, trials.options.wrong
    # no block in any layer: at the level of ranks some rows belong to no unit
    controls = {
        "all blocks": _reading(*trials.whole()),
        "zero adapter": _reading(*trials.whole(None if model.writes_rows else rows_of(trials.adapter, "layer"), 0.0)),
        "wrong document": None,
    }
    if wrong is not None:
        with model.applied(wrong):  # refuses an adapter that was made for another base model
            pass
        controls["wrong document"] = _reading(*trials.whole(rows_of(wrong, "chunk")))
    chosen = torch.randperm(len(trials), generator=trials.generator)[:_RANDOM_UNITS].sort().values.tolist()
    lost = trials.leave_out(chosen)[0].sum(1)
    controls["random units"] = {
        "units": [trials.units["unit"].iloc[place] for place in chosen],
        "contribution": float(lost.mean()),
        "largest": float(lost.max()),
    }
    return controls


def _reading(log_probs: Tensor, margins: Tensor) -> dict[str, float]:
    """log_prob (nats), probability and margin (logits) of the answer in one trial [1, tokens]."""
    total = float(log_probs.sum())
    return {"log_prob": total, "probability": math.exp(total), "margin": float(margins.min())}


def by_token(table: pd.DataFrame) -> pd.DataFrame:
    """The contribution of every unit (rows) to every answer token (columns, "1 tok", in order), in nats."""
    names = [f"{place} {token.strip()}" for place, token in enumerate(table.attrs["tokens"], 1)]
    return pd.DataFrame(table["by_token"].tolist(), index=table["unit"], columns=names)


def ranks(contributions: Sequence[float]) -> list[int]:
    """The rank of each unit, 1 for the largest contribution; ties keep their order."""
    order = torch.tensor(list(contributions), dtype=torch.float64).argsort(descending=True, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(1, len(order) + 1)
    return places.tolist()


# ---------------------------------------------------------------------------------------- what the methods compute with
def lasso(x: Tensor, y: Tensor, penalty: float, steps: int = 500) -> Tensor:
    """Coefficients c [features, targets] that minimise |y - x c - mean|^2 / 2 + penalty * p_max * |c|_1 (FISTA).

    Each target of y [samples, targets] is fitted alone. p_max is the smallest weight at which all its c are 0.
    """
    x, y = (x - x.mean(0)).double(), (y - y.mean(0)).double()
    gram, product = x.T @ x, x.T @ y
    step = 1 / torch.linalg.matrix_norm(gram, 2).clamp(min=1e-12)
    threshold = penalty * product.abs().amax(0) * step
    found = ahead = torch.zeros_like(product)
    momentum = 1.0
    for _ in range(steps):
        moved = ahead - step * (gram @ ahead - product)
        new = moved.sign() * (moved.abs() - threshold).clamp(min=0)
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead, found, momentum = new + (momentum - 1) / following * (new - found), new, following
    return found.float()


def _feature_gradients(trials: Trials, positions: Sequence[float], by_token: bool) -> Scores:
    """Contributions of sentences by gradients through the hypernetwork; elsewhere: those of the chat wrapping's tokens.

    Gradient times (feature - mean feature of all chunks), summed over a sentence's tokens and averaged over positions.

    positions: on the straight line from the mean feature (0) to the features (1).
    by_token: False sums the answer's tokens in the first column; the others are missing.
    """
    model, adapter = trials.model, trials.adapter
    chunks = [trials.texts[block.document][slice(*block.span)].strip() for block in adapter.blocks]
    ids = context_ids(model.encoder_tokenizer, chunks)
    n_tokens = len(trials.target.answer)
    padded, mask = (one.to(model.device) for one in pad_rows(ids, pad_id_of(model.encoder_tokenizer)))
    features = model.encoder.encode(padded, attention_mask=mask).float()
    real = mask.view(len(mask), *[1] * (features.dim() - 3), -1, 1).to(features.dtype)
    mean = (features * real).sum(0, keepdim=True).sum(-2, keepdim=True) / mask.sum()
    difference = (features - mean) * real
    gradients = torch.zeros(n_tokens + 1, *mask.shape)  # of each answer token and the margin, by each chunk's tokens
    for position in positions:
        moved = (mean + position * difference).requires_grad_()
        log_probs, margins = _likelihoods_of(trials, moved, padded, mask)
        goals = [*log_probs[0]] if by_token else [log_probs.sum()]
        for place, goal in [*enumerate(goals), (n_tokens, margins.min())]:
            (of_goal,) = torch.autograd.grad(goal, moved, retain_graph=place < n_tokens)
            by_place = (of_goal * difference).sum(-1)  # [n, T], or [n, L, T] where every layer has features
            by_place = by_place.sum(1) if by_place.dim() == 3 else by_place
            gradients[place] += by_place.detach().cpu() / len(positions)
    if not by_token:
        gradients[1:n_tokens] = math.nan
    contributions = _by_sentence(trials, gradients, chunks, [len(row) for row in ids])
    elsewhere = float(gradients[:n_tokens].nansum() - contributions[:, :n_tokens].nansum())
    return Scores(contributions[:, :n_tokens], contributions[:, n_tokens], elsewhere)


def _likelihoods_of(trials: Trials, features: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`likelihoods` of the answer with the bias and the blocks that the hypernetwork writes from these features."""
    model, blocks = trials.model, trials.adapter.blocks
    n_rows = sum(block.rank for block in blocks)
    more = {"input_ids": ids} if model.copies_tokens else {}
    loras = model.hypernetwork(features, attention_mask=mask, **more)
    written = model.adapter_of(
        [
            replace(block, A={m: A[i] for m, (A, _) in loras.items()}, B={m: B[i] for m, (_, B) in loras.items()})
            for i, block in enumerate(blocks)
        ],
        bias=False,
    )
    factors = {
        module: tuple(
            torch.cat([new, old[:, n_rows:].to(new)], dim=1)  # [L, n*r + bias, d]
            for new, old in zip(written.factors(module), trials.rows.factors[module], strict=True)
        )
        for module in written.modules
    }
    return likelihoods(model, replace(trials.rows, factors=factors), trials.target, torch.ones(1, len(blocks)))


def _by_sentence(trials: Trials, values: Tensor, chunks: Sequence[str], lengths: Sequence[int]) -> Tensor:
    """Values of the chunks' tokens [k, chunks, tokens], summed over each sentence's [units, k].

    chunks: their texts without spaces around them.
    lengths: their numbers of tokens, chat format included.
    """
    prefix, suffix = map(len, chat_affixes(trials.model.encoder_tokenizer))
    sums = torch.zeros(len(trials), len(values))
    for number in range(len(chunks)):
        n_text = lengths[number] - prefix - suffix
        sums.index_add_(0, _sentences_of(trials, number, n_text), values[:, number, prefix : prefix + n_text].T)
    return sums


def _sentences_of(trials: Trials, number: int, n_tokens: int) -> Tensor:
    """[n_tokens]: the sentence (row of `trials.units`) of each token of the text of block `number`."""
    block, units = trials.adapter.blocks[number], trials.units
    text = trials.texts[block.document][slice(*block.span)]
    inside, first = units["block"] == number, block.span[0] + len(text) - len(text.lstrip())
    ends = torch.tensor([end - first for end in units["end"][inside]])
    starts = torch.tensor(_token_places(trials.model, text.strip(), n_tokens))
    sentence = torch.searchsorted(ends, starts, right=True).clamp(max=len(ends) - 1)
    return torch.tensor(units.index[inside].tolist())[sentence]


def _token_places(model: DocToLoRA, text: str, n_tokens: int) -> list[int]:
    """The first character in `text` of each of its `n_tokens` tokens."""
    tokenizer = model.encoder_tokenizer
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(offsets) != n_tokens:  # the wrapping, or names of special tokens, changed the tokens: spread them evenly
        return [len(text) * token // n_tokens for token in range(n_tokens)]
    return [min(start, len(text) - 1) + (text[start : start + 1] == " ") for start, _ in offsets]
