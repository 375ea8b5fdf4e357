"""Where an answer came from: which chunk, sentence, layer or direction of an adapter carries it.

    y = W x + s * sum over rows r of w_r * b_r (a_r . x)

An adapter is a sum of rows, so every part of it is a set of rows, and leaving a part out is a weight of 0 on its rows.
Many such trials run in one batch that shares the rows; none needs the hypernetwork, unless a sentence is taken out of
its chunk. What is explained is the log-probability of an answer's tokens, each read after the true ones before it.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from d2l_lib.adapter import Adapter, Factors, singular_vectors
from d2l_lib.base_model import target_linears
from d2l_lib.documents import (
    chat_affixes,
    check_count,
    check_text,
    context_ids,
    name_documents,
    question_ids,
    sentence_number,
    split_sentences,
)
from d2l_lib.lora import add_deltas
from d2l_lib.routing import relevance

if TYPE_CHECKING:
    from d2l_lib.model import DocToLoRA

METHODS = {
    "chunk": ("leave_one_out", "add_one_in", "gradient", "surrogate", "relevance", "random"),
    "sentence": ("leave_one_out", "gradient", "integrated_gradients", "random"),
    "layer": ("leave_one_out", "add_one_in", "gradient", "surrogate", "random"),
    "rank": ("leave_one_out", "add_one_in", "gradient", "random"),
}
TOKENS_AT_ONCE = 2048  # of questions with their answer, one copy for each trial
RANDOM_UNITS = 4  # how many are left out as a control
PLACES = ("document", "chunk", "start", "end", "layer", "module", "direction")


@dataclass(frozen=True)
class Target:
    """A question and the answer whose log-probability is explained, as token ids."""

    prompt: list[int]
    answer: list[int]
    tokens: list[str]


@dataclass(frozen=True)
class Rows:
    """The rows of an adapter and the unit that each belongs to.

    factors {module: (A [L, R, d_in], B [L, R, d_out])}; unit {module: [L, R]}, -1 for rows that are always on; `units`
    names them: one row each, columns `unit` and PLACES.
    """

    factors: Factors
    unit: dict[str, Tensor]
    scale: float
    units: pd.DataFrame


@contextmanager
def weighted(model: DocToLoRA, rows: Rows, weights: Tensor) -> Iterator[None]:
    """Inside the `with` block batch row i of the base model has unit u counted `weights[i, u]` times.

    weights: [batch, units], and gradients reach it. The model on exit is the model on entry.
    """
    of_unit = F.pad(weights, (0, 1), value=1.0)  # unit -1 is the last column
    deltas = []
    for module, linears in target_linears(model.base_model, sorted(rows.factors)).items():
        A, B = rows.factors[module]
        for layer, linear in enumerate(linears):
            place = linear.weight.device
            of_row = of_unit[:, rows.unit[module][layer]].to(place, A.dtype)
            factors = {"A": A[layer].to(place), "B": B[layer].to(place), "weights": of_row}
            deltas.append((linear, partial(_weighted_delta, **factors)))
    with add_deltas(model.base_model, deltas, rows.scale):
        yield


def _weighted_delta(x: Tensor, *, A: Tensor, B: Tensor, weights: Tensor) -> Tensor:
    """x [batch, tokens, d_in], A [R, d_in], B [R, d_out], weights [batch, R] -> [batch, tokens, d_out]."""
    return ((x.to(A.dtype) @ A.T) * weights[:, None]) @ B


def _likelihoods(model: DocToLoRA, rows: Rows, target: Target, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability, margin to the best other token in logits) of every answer token, each [trials, tokens]."""
    ids = torch.tensor(target.prompt + target.answer, device=model.device)
    right = torch.tensor(target.answer, device=model.device)[None, :, None]
    log_probs, margins = [], []
    for some in weights.split(max(1, TOKENS_AT_ONCE // len(ids))):
        with weighted(model, rows, some):
            batch = ids.expand(len(some), -1)
            logits = model.base_model(batch, use_cache=False, logits_to_keep=len(target.answer) + 1).logits
        logits = logits[:, :-1].float()  # what predicts each answer token
        place = right.expand(len(some), -1, 1)
        said = logits.gather(-1, place)[..., 0]
        log_probs.append(said - logits.logsumexp(-1))
        margins.append(said - logits.scatter(-1, place, -math.inf).amax(-1))
    return torch.cat(log_probs).cpu(), torch.cat(margins).cpu()


# ---------------------------------------------------------------------------------------------------- rows and units
def rows_of(adapter: Adapter, level: str, directions: int = 8) -> Rows:
    """The rows of an adapter by "chunk", "layer" (of each module) or "rank"; the bias belongs to no unit.

    At the level of ranks the rows are the singular directions of the sum of all blocks, per layer and module, and the
    `directions` strongest of them are units (column `strength`: their singular value, the scale included); the weaker
    ones are always on.
    """
    if not adapter.blocks:
        raise ValueError("this adapter holds no document: there is nothing to trace an answer to")
    if level == "rank":
        return _directions(adapter, directions)
    factors = {module: adapter.factors(module) for module in adapter.modules}
    n_rows = sum(block.rank for block in adapter.blocks)
    n_bias = adapter.rank - n_rows
    if level == "chunk":
        counts = torch.tensor([block.rank for block in adapter.blocks])
        of_row = torch.arange(len(counts)).repeat_interleave(counts)
        unit = dict.fromkeys(adapter.modules, F.pad(of_row, (0, n_bias), value=-1).expand(adapter.n_layers, -1))
        units = [
            {"unit": f"{block.document}, chunk {block.chunk}", "document": block.document, "chunk": block.chunk}
            | ({} if block.span is None else {"start": block.span[0], "end": block.span[1]})
            for block in adapter.blocks
        ]
    else:
        unit, units = {}, []
        for number, module in enumerate(adapter.modules):
            of_layer = torch.arange(adapter.n_layers)[:, None] * len(adapter.modules) + number
            unit[module] = F.pad(of_layer.expand(-1, n_rows), (0, n_bias), value=-1)
        for layer in range(adapter.n_layers):
            for module in adapter.modules:
                units.append({"unit": f"layer {layer}, {module}", "layer": layer, "module": module})
    return Rows(factors, unit, adapter.scale, _unit_table(units))


def _directions(adapter: Adapter, directions: int) -> Rows:
    """See `rows_of`: B^T A = U S V^T."""
    check_count(directions, "directions")
    documents = replace(adapter, bias=None)
    factors, unit, units = {}, {}, []
    for module in adapter.modules:
        A, B = documents.factors(module)
        U, S, V = singular_vectors(A, B)
        root = S.sqrt().unsqueeze(-1)  # [L, R, 1]
        parts = [((root * V.mT).to(A.dtype), (root * U.mT).to(B.dtype))]
        of_row = torch.full(S.shape, -1)
        for layer in range(adapter.n_layers):
            for direction in range(min(directions, S.shape[1])):
                of_row[layer, direction] = len(units)
                units.append(
                    {"unit": f"layer {layer}, {module}, direction {direction}", "layer": layer, "module": module}
                    | {"direction": direction, "strength": adapter.scale * float(S[layer, direction])}
                )
        if adapter.bias is not None:
            bias_A, bias_B = adapter.bias[module]
            parts.append((bias_A * adapter.bias_weight, bias_B))
            of_row = F.pad(of_row, (0, bias_A.shape[1]), value=-1)
        factors[module] = tuple(torch.cat(side, dim=1) for side in zip(*parts, strict=True))
        unit[module] = of_row
    return Rows(factors, unit, adapter.scale, _unit_table(units))


def _unit_table(units: list[dict]) -> pd.DataFrame:
    """One row per unit; places that it has none of are missing values."""
    table = pd.DataFrame(units)
    for name in PLACES:
        values = table[name] if name in table else pd.Series([None] * len(table), dtype=object)
        table[name] = values.astype("string" if name in ("document", "module") else "Int64")
    first = ["unit", *PLACES]
    return table[[*first, *(name for name in table if name not in first)]]


# --------------------------------------------------------------------------------------------------------- sentences
def document_texts(adapter: Adapter, documents: str | Mapping[str, str]) -> dict[str, str]:
    """{name: text}, checked; one text alone belongs to the adapter's one document, whatever its name is."""
    if isinstance(documents, str) and len(adapter.documents) == 1:
        return name_documents({adapter.documents[0]: documents})
    return name_documents(documents)


def sentence_units(adapter: Adapter, documents: str | Mapping[str, str]) -> pd.DataFrame:
    """The sentences of an adapter's chunks, in order: columns as of `Rows.units`, and `text` and `block`, the number
    of the block that holds it. A sentence that was cut into several chunks is several units.

    ValueError where a document's text is missing, or a block has no span in it.
    """
    named = document_texts(adapter, documents)
    sentences: dict[str, list[tuple[int, int]]] = {}
    units = []
    for number, block in enumerate(adapter.blocks):
        if block.span is None:
            raise ValueError(f"{block!r} was made from token ids: it has no sentences, use level='chunk'")
        if block.document not in named or block.span[1] > len(named[block.document]):
            raise ValueError(f"pass documents={{{block.document!r}: its text}}: sentences are read from it")
        text = named[block.document]
        spans = sentences.setdefault(block.document, [])
        spans += [] if spans else split_sentences(text)
        first = bisect_right(spans, block.span[0], key=lambda span: span[1])
        last = bisect_left(spans, block.span[1], key=lambda span: span[0])
        for start, end in spans[first:last]:
            start, end = max(start, block.span[0]), min(end, block.span[1])
            if start < end and text[start:end].strip():
                end = start + len(text[start:end].rstrip())
                units.append(
                    {"unit": f"{block.document}, sentence {sentence_number(len(units))}", "document": block.document}
                    | {"chunk": block.chunk, "start": start, "end": end, "text": text[start:end], "block": number}
                )
    return _unit_table(units)


def _without_sentences(
    model: DocToLoRA, adapter: Adapter, texts: Mapping[str, str], units: pd.DataFrame
) -> tuple[Rows, Tensor]:
    """(rows of all blocks and of those that were written anew, weights [units, blocks]): trial i is the adapter as if
    sentence i did not stand in its chunk. A chunk that is one sentence is left out, without the hypernetwork.
    """
    shortened = {}
    for number, unit in enumerate(units.to_dict("records")):
        start, end = adapter.blocks[unit["block"]].span
        text = texts[unit["document"]]
        rest = text[start : unit["start"]] + text[unit["end"] : end]
        if rest.strip():
            shortened[number] = rest.strip()
    blocks = list(adapter.blocks)
    of_unit: list[int] = []  # of each block that is written anew
    if shortened:
        ids = model.encoder_tokenizer(list(shortened.values()), add_special_tokens=False)["input_ids"]
        anew = model.internalize_each(list(shortened.values()), chunk_tokens=max(map(len, ids)))
        for number, written in zip(shortened, anew, strict=True):
            weight = adapter.blocks[units["block"].iloc[number]].weight
            blocks += [replace(block, document=f"anew {number}", weight=weight) for block in written.blocks]
            of_unit += [number] * len(written.blocks)
    weights = torch.ones(len(units), len(blocks))
    weights[:, len(adapter.blocks) :] = 0.0
    weights[torch.arange(len(units)), torch.tensor(units["block"].tolist())] = 0.0
    for place, number in enumerate(of_unit, len(adapter.blocks)):
        weights[number, place] = 1.0
    return rows_of(replace(adapter, blocks=tuple(blocks)), "chunk"), weights


def _token_places(model: DocToLoRA, text: str, n_tokens: int) -> list[int]:
    """The character in `text` at which each of its `n_tokens` tokens begins."""
    tokenizer = model.encoder_tokenizer
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(offsets) != n_tokens:  # the wrapping, or names of special tokens, cut it otherwise: spread them evenly
        return [len(text) * token // n_tokens for token in range(n_tokens)]
    return [min(start, len(text) - 1) + (text[start : start + 1] == " ") for start, _ in offsets]


def _feature_gradients(
    model: DocToLoRA,
    adapter: Adapter,
    texts: Mapping[str, str],
    units: pd.DataFrame,
    target: Target,
    steps: int,
    by_token: bool,
) -> tuple[Tensor, Tensor, float]:
    """Contributions [units, answer tokens] and margin contributions [units] by gradients through the hypernetwork, and
    what falls on tokens of no sentence, those of the chat wrapping.

    Gradient times (feature - mean feature of all chunks), summed over a sentence's tokens. steps = 1: the gradient at
    the features themselves; more: its mean along the straight line from the mean feature (integrated gradients).
    Without `by_token` the first column holds the sum over the answer's tokens and the others are missing.
    """
    tokenizer = model.encoder_tokenizer
    chunks = [texts[block.document][slice(*block.span)].strip() for block in adapter.blocks]
    ids = context_ids(tokenizer, chunks)
    prefix, suffix = chat_affixes(tokenizer)
    length = max(map(len, ids))
    padded = torch.tensor([row + [row[-1]] * (length - len(row)) for row in ids], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids], device=model.device)
    features = model.encoder.encode(padded, attention_mask=mask).float()
    real = mask.view(len(mask), *[1] * (features.dim() - 3), length, 1).to(features.dtype)
    mean = (features * real).sum(0, keepdim=True).sum(-2, keepdim=True) / mask.sum()
    difference = (features - mean) * real
    of_block = torch.tensor([block.weight for block in adapter.blocks], device=model.device)[:, None, None, None]
    chunk_rows = rows_of(adapter, "chunk")
    n_bias = adapter.rank - sum(block.rank for block in adapter.blocks)
    n_tokens = len(target.answer)
    found = torch.zeros(n_tokens + 1, *mask.shape)
    positions = [(step + 0.5) / steps for step in range(steps)] if steps > 1 else [1.0]
    for position in positions:
        given = (mean + position * difference).requires_grad_()
        loras = model.hypernetwork(given, attention_mask=mask)
        factors = {}
        for module, (A, B) in loras.items():
            bias = chunk_rows.factors[module]
            written = ((A * of_block).transpose(0, 1).flatten(1, 2), B.transpose(0, 1).flatten(1, 2))  # [L, n*r, d]
            factors[module] = tuple(
                torch.cat([new, old[:, old.shape[1] - n_bias :].to(new)], dim=1)
                for new, old in zip(written, bias, strict=True)
            )
        log_probs, margins = _likelihoods(
            model, replace(chunk_rows, factors=factors), target, torch.ones(1, len(adapter.blocks))
        )
        goals = [*log_probs[0]] if by_token else [log_probs.sum()]
        for place, goal in [*enumerate(goals), (n_tokens, margins.min())]:
            (gradient,) = torch.autograd.grad(goal, given, retain_graph=place < n_tokens)
            by_place = (gradient * difference).sum(-1)  # [n, T], or [n, L, T] where every layer has features
            found[place] += (by_place.sum(1) if by_place.dim() == 3 else by_place).detach().cpu() / steps
    if not by_token:
        found[1:n_tokens] = math.nan
    contributions = torch.zeros(len(units), n_tokens + 1)
    for number, block in enumerate(adapter.blocks):
        inside = units["block"] == number
        first = block.span[0] + texts[block.document][slice(*block.span)].find(chunks[number])
        n_text = len(ids[number]) - len(prefix) - len(suffix)
        ends = torch.tensor([end - first for end in units["end"][inside]])
        starts = torch.tensor(_token_places(model, chunks[number], n_text))
        sentence = torch.searchsorted(ends, starts, right=True).clamp(max=len(ends) - 1)
        index = torch.tensor(units.index[inside].tolist())[sentence]
        contributions.index_add_(0, index, found[:, number, len(prefix) : len(prefix) + n_text].T)
    elsewhere = float(found[:n_tokens].nansum() - contributions[:, :n_tokens].nansum())
    return contributions[:, :n_tokens], contributions[:, n_tokens], elsewhere


# ----------------------------------------------------------------------------------------------------------- trials
class Trials:
    """Trials of one answer with parts of an adapter weighted: `Trials(model, adapter, question, answer).score(w)`.

    `rows` says what the parts are (see `rows_of`), `units` is their table, `target` the question and answer as tokens.
    """

    def __init__(
        self,
        model: DocToLoRA,
        adapter: Adapter,
        question: str,
        answer: str,
        level: str = "chunk",
        *,
        directions: int = 8,
        system: str = "",
    ):
        with model.applied(adapter):  # refuses an adapter that was made for another base model
            pass
        self.model, self.adapter = model, adapter
        self.target = answer_target(model, question, answer, system)
        self.rows = rows_of(adapter, level, directions)
        self.units = self.rows.units

    def __len__(self) -> int:
        return len(self.units)

    @torch.no_grad()
    def score(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probability in nats, margin in logits) of each answer token, each [trials, tokens].

        weights [trials, units]: how often each part counts; 1 is the adapter as it is, 0 leaves the part out.
        """
        return _likelihoods(self.model, self.rows, self.target, weights)

    def leave_one_out(self) -> tuple[Tensor, Tensor]:
        """What is lost without each unit: contributions [units, tokens] in nats, margin contributions [units]."""
        n = len(self)
        log_probs, margins = self.score(torch.cat([torch.ones(1, n), 1 - torch.eye(n)]))
        return log_probs[:1] - log_probs[1:], margins[:1].amin(1) - margins[1:].amin(1)

    def add_one_in(self) -> tuple[Tensor, Tensor]:
        """What each unit alone adds to the bias."""
        n = len(self)
        log_probs, margins = self.score(torch.cat([torch.zeros(1, n), torch.eye(n)]))
        return log_probs[1:] - log_probs[:1], margins[1:].amin(1) - margins[:1].amin(1)

    def gradient(self) -> tuple[Tensor, Tensor]:
        """The derivative by each unit's weight where all are 1: gradient times input, in one backward pass."""
        n_tokens = len(self.target.answer)
        weights = torch.ones(n_tokens, len(self), requires_grad=True)  # row t is for token t
        log_probs, margins = _likelihoods(self.model, self.rows, self.target, weights)
        weakest = int(margins[0].argmin())
        (by_token,) = torch.autograd.grad(log_probs.diagonal().sum(), weights, retain_graph=True)
        (by_margin,) = torch.autograd.grad(margins[weakest, weakest], weights)
        return by_token.T, by_margin[weakest]

    def surrogate(self, samples: int, generator: torch.Generator, penalty: float = 0.05) -> tuple[Tensor, Tensor]:
        """Coefficients of a sparse linear model (lasso) of `samples` trials in which every unit is in or out by a coin.

        `penalty`: as a share of the one that would leave no coefficient.
        """
        weights = torch.randint(0, 2, (samples, len(self)), generator=generator).float()
        log_probs, margins = self.score(weights)
        fitted = lasso(weights, torch.cat([log_probs, margins.amin(1, keepdim=True)], 1), penalty)
        return fitted[:, :-1], fitted[:, -1]


def lasso(x: Tensor, y: Tensor, penalty: float, steps: int = 500) -> Tensor:
    """Coefficients [features, targets] that minimise |y - x c - mean|^2 / 2 + penalty * p_max * |c|_1, each target of
    y [samples, targets] alone; p_max is the smallest weight at which all its coefficients are 0 (FISTA).
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


def answer_target(model: DocToLoRA, question: str, answer: str, system: str = "") -> Target:
    """Question and answer as token ids; ValueError where the window cannot hold both."""
    check_text(answer, "the answer")
    prompt = question_ids(model.tokenizer, question, system)
    ids = model.tokenizer(answer.strip(), add_special_tokens=False)["input_ids"]
    if len(prompt) + len(ids) > model.window:
        raise ValueError(f"question and answer take {len(prompt) + len(ids)} tokens, the window is {model.window}")
    return Target(prompt, ids, [model.tokenizer.decode([token]) for token in ids])


# -------------------------------------------------------------------------------------------------------- attribute
def attribute(
    model: DocToLoRA,
    adapter: Adapter,
    question: str,
    answer: str | None = None,
    level: str = "chunk",
    method: str = "leave_one_out",
    *,
    documents: str | Mapping[str, str] | None = None,
    wrong: Adapter | None = None,
    seed: int = 0,
    samples: int = 64,
    directions: int = 8,
    steps: int = 8,
    by_token: bool = True,
    controls: bool = True,
    system: str = "",
) -> pd.DataFrame:
    """How much each part of an adapter supports an answer: one row per unit of `level`, in the adapter's order.

    Columns: level, unit (a label), document, chunk, start, end (characters), layer, module, direction (missing where a
    unit has none), contribution (nats of the answer's log-probability; positive: the unit supports it),
    margin_contribution (logits; of the smallest margin over the answer's tokens to the best other token: while it is
    positive, the answer is what is said), by_token (the contribution to each answer token, a list). Further columns:
    `strength` of directions, `text` and `block` of sentences.

    answer: None takes the model's own greedy one. Methods (`METHODS` says which level has which):
    leave_one_out (exact; a sentence is left out by writing its chunk's block anew without it), add_one_in (the unit
    alone with the bias), gradient (by the unit's weight, or by its features through the hypernetwork, times input),
    integrated_gradients (in `steps` steps), surrogate (sparse linear model of `samples` random ablations), relevance
    (nats, but of a divergence, see `routing`; of the first token only, and without a margin), random (a control).
    documents: the texts, for sentences. directions: how many per layer and module. by_token=False spares the gradient
    methods of sentences a backward pass per token (integrated_gradients never has them).

    `.attrs` holds plain values: question, answer, level, method, seed, tokens (the answer's, as texts), seconds (the
    method alone), elsewhere (nats that gradients through the hypernetwork give to the chat wrapping), and controls
    (unless controls=False): log_prob, probability and margin of the answer with "all blocks", the "zero adapter" (the
    bias alone), the "wrong document" (the adapter `wrong`, or None), and what leaving out a few "random units" costs on
    average and at most.
    """
    if level not in METHODS:
        raise ValueError(f"unknown level {level!r}; choose from {', '.join(METHODS)}")
    if method not in METHODS[level]:
        raise ValueError(f"level {level!r} has no method {method!r}; it has {', '.join(METHODS[level])}")
    check_count(samples, "samples")
    check_count(steps, "steps")
    if level == "sentence" and documents is None:
        raise ValueError("sentences are read from the documents: pass documents={name: text}")
    if level == "sentence" and adapter.hypernetwork_key != model.hypernetwork_key:
        raise ValueError("sentences are taken out by the hypernetwork that wrote the adapter: this one is another")
    if answer is None:
        answer = model.answer(question, adapter, system=system)
    trials = Trials(
        model,
        adapter,
        question,
        answer,
        "chunk" if level == "sentence" else level,
        directions=directions,
        system=system,
    )
    units = sentence_units(adapter, documents) if level == "sentence" else trials.units
    texts = document_texts(adapter, documents) if level == "sentence" else {}
    generator = torch.Generator().manual_seed(seed)
    elsewhere = 0.0
    began = time.perf_counter()
    if method == "random":
        found = torch.randn(len(units), len(trials.target.answer), generator=generator)
        margin = torch.randn(len(units), generator=generator)
    elif level == "sentence" and method == "leave_one_out":
        found, margin = _leave_sentences_out(trials, texts, units)
    elif level == "sentence":
        steps = 1 if method == "gradient" else steps
        by_token = by_token and method == "gradient"
        found, margin, elsewhere = _feature_gradients(model, adapter, texts, units, trials.target, steps, by_token)
    elif method == "relevance":
        (first,) = relevance(model, [question], [adapter], system=system)
        found = torch.full((len(units), len(trials.target.answer)), math.nan)
        found[:, 0], margin = first, torch.full((len(units),), math.nan)
    elif method == "surrogate":
        found, margin = trials.surrogate(samples, generator)
    else:
        found, margin = getattr(trials, method)()
    seconds = time.perf_counter() - began
    table = units.assign(
        contribution=found.nansum(1).tolist(), margin_contribution=margin.tolist(), by_token=found.tolist()
    )
    table.insert(0, "level", level)
    table.attrs = {"question": question, "answer": answer, "level": level, "method": method, "seed": seed}
    table.attrs |= {"tokens": trials.target.tokens, "seconds": seconds, "elsewhere": elsewhere}
    if controls:
        table.attrs["controls"] = _controls(trials, texts, units, wrong, generator)
    return table


def _leave_sentences_out(trials: Trials, texts: Mapping[str, str], units: pd.DataFrame) -> tuple[Tensor, Tensor]:
    """As `Trials.leave_one_out`, for these sentences."""
    rows, weights = _without_sentences(trials.model, trials.adapter, texts, units)
    everything = torch.zeros(1, weights.shape[1])
    everything[:, : len(trials.adapter.blocks)] = 1.0
    with torch.no_grad():
        log_probs, margins = _likelihoods(trials.model, rows, trials.target, torch.cat([everything, weights]))
    return log_probs[:1] - log_probs[1:], margins[:1].amin(1) - margins[1:].amin(1)


def _controls(
    trials: Trials, texts: Mapping[str, str], units: pd.DataFrame, wrong: Adapter | None, generator: torch.Generator
) -> dict:
    """See `attribute`."""
    n = len(trials)
    log_probs, margins = trials.score(torch.ones(1, n))
    found = {"all blocks": _reading(log_probs, margins)}
    # no block in any layer: at the level of ranks some rows belong to no unit
    layers = rows_of(trials.adapter, "layer")
    with torch.no_grad():
        zero = _likelihoods(trials.model, layers, trials.target, torch.zeros(1, len(layers.units)))
    found["zero adapter"] = _reading(*zero)
    found["wrong document"] = None
    if wrong is not None:
        with trials.model.applied(wrong):
            pass
        rows = rows_of(wrong, "chunk")
        with torch.no_grad():
            other = _likelihoods(trials.model, rows, trials.target, torch.ones(1, len(wrong.blocks)))
        found["wrong document"] = _reading(*other)
    chosen = torch.randperm(len(units), generator=generator)[:RANDOM_UNITS].sort().values.tolist()
    if texts:
        lost = _leave_sentences_out(trials, texts, units.iloc[chosen])[0].sum(1)
    else:
        weights = torch.ones(len(chosen), n)
        weights[torch.arange(len(chosen)), torch.tensor(chosen)] = 0.0
        lost = log_probs[0].sum() - trials.score(weights)[0].sum(1)
    found["random units"] = {
        "units": [units["unit"].iloc[place] for place in chosen],
        "contribution": float(lost.mean()),
        "largest": float(lost.max()),
    }
    return found


def _reading(log_probs: Tensor, margins: Tensor) -> dict[str, float]:
    """Of one trial [1, tokens]: log_prob (nats), probability, and margin (logits) of the answer."""
    total = float(log_probs.sum())
    return {"log_prob": total, "probability": math.exp(total), "margin": float(margins.min())}


def by_token(table: pd.DataFrame) -> pd.DataFrame:
    """The contribution of every unit (rows) to every answer token (columns, "1 tok", in order), in nats."""
    names = [f"{place} {token.strip()}" for place, token in enumerate(table.attrs["tokens"], 1)]
    return pd.DataFrame(table["by_token"].tolist(), index=table["unit"], columns=names)


def ranks(contributions: Sequence[float]) -> list[int]:
    """The rank of each unit, 1 for the largest contribution; of equal ones the later comes after."""
    order = torch.tensor(list(contributions), dtype=torch.float64).argsort(descending=True, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(1, len(order) + 1)
    return places.tolist()
