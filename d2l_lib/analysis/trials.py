"""Trials of one answer with parts of an adapter left out, or weighted otherwise.

    y = W x + s * sum over rows r of w_r * b_r (a_r . x)

An adapter is a sum of rows. A part is a set of rows; a weight of 0 on its rows leaves it out. Many trials run in one
batch that shares the rows. Of token rows, which are read by attention (`row_reading`), the parts are whole blocks. Only
a sentence that leaves its chunk needs the hypernetwork. A trial yields the log-probability of an answer's tokens, each
conditioned on the true ones before it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from d2l_lib.adapter import Adapter, Block, Factors, singular_vectors
from d2l_lib.analysis.options import chosen
from d2l_lib.base_model import target_linears
from d2l_lib.documents import (
    answer_ids,
    check_count,
    check_text,
    name_documents,
    question_ids,
    sentence_number,
    split_sentences,
)
from d2l_lib.lora import add_deltas
from d2l_lib.row_reading import read_rows

if TYPE_CHECKING:
    from d2l_lib.model import DocToLoRA

LEVELS = ("chunk", "sentence", "layer", "rank")
_TOKENS_AT_ONCE = 2048  # of question and answer, one copy per trial
_BYTES_AT_ONCE = 1e9  # of token rows, one copy per trial
_PLACES = ("document", "chunk", "start", "end", "layer", "module", "direction")


@dataclass(frozen=True)
class Options:
    """What one can choose beside question, answer, level and method.

    documents: the texts; sentences need them.
    wrong: the adapter of another document, a control.
    samples: random ablations of the surrogate.
    directions: how many singular directions of each layer and module are units.
    steps: of integrated gradients.
    by_token: False saves the gradient of sentences a backward pass per answer token.
    controls: whether the controls are computed.
    system: the system message of the prompt.
    progress: called as progress(done, total) now and then, in chunks written anew, then in trials. An error that it
        raises ends the work.
    """

    documents: str | Mapping[str, str] | None = None
    wrong: Adapter | None = None
    seed: int = 0
    samples: int = 64
    directions: int = 8
    steps: int = 8
    by_token: bool = True
    controls: bool = True
    system: str = ""
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self):
        for name in ("samples", "directions", "steps"):
            check_count(getattr(self, name), name)


@dataclass(frozen=True)
class Target:
    """A question and the answer whose log-probability is explained, as token ids."""

    prompt: list[int]
    answer: list[int]
    tokens: list[str]


@dataclass(frozen=True)
class Rows:
    """The rows of an adapter and the unit that each belongs to.

    factors: {module: (A [L, R, d_in], B [L, R, d_out])}.
    unit: {module: [L, R]}, -1 for rows that are always on.
    units: one row per unit, columns unit, document, chunk, start, end, layer, module, direction (missing where a unit
        has none).
    blocks: of token rows, one per unit; factors and unit are empty then.
    """

    factors: Factors
    unit: dict[str, Tensor]
    scale: float
    units: pd.DataFrame
    blocks: tuple[Block, ...] = ()


class Trials:
    """Trials of one answer: `Trials(model, adapter, question, answer, "layer").score(weights)`.

    answer: the one to explain (None: the model's own greedy one).
    options: those of `Options`.

    Attributes:
        units: the table of the parts, one row each (see `Rows.units` and `sentence_units`).
        rows: what is weighted: the parts; for sentences, the chunks.
        target: question and answer as tokens.
        texts: {document: text} for sentences, else empty.
        generator: of random numbers, from the seed.

    ValueError for an unknown level, sentences without documents or with another hypernetwork, and a question and
    answer that overflow the window.
    """

    def __init__(
        self,
        model: DocToLoRA,
        adapter: Adapter,
        question: str,
        answer: str | None = None,
        level: str = "chunk",
        **options: object,
    ):
        self.options = options = chosen(Options, "attribution", options)
        if level not in LEVELS:
            raise ValueError(f"unknown level {level!r}; choose from {', '.join(LEVELS)}")
        if level == "sentence" and options.documents is None:
            raise ValueError("sentences are read from the documents: pass documents={name: text}")
        if level == "sentence" and adapter.hypernetwork_key != model.hypernetwork_key:
            raise ValueError("sentences are taken out by the hypernetwork that wrote the adapter: this one is another")
        if answer is None:
            answer = model.answer(question, adapter, system=options.system)
        with model.applied(adapter):  # refuses an adapter that was made for another base model
            pass
        self.model, self.adapter, self.question, self.answer, self.level = model, adapter, question, answer, level
        self.target = answer_target(model, question, answer, options.system)
        self.rows = rows_of(adapter, "chunk" if level == "sentence" else level, options.directions)
        self.texts: dict[str, str] = {}
        self.units = self.rows.units
        if level == "sentence":
            self.texts = document_texts(adapter, options.documents)
            self.units = sentence_units(adapter, options.documents)
        self.generator = torch.Generator().manual_seed(options.seed)

    def __len__(self) -> int:
        return len(self.units)

    @torch.no_grad()
    def score(self, weights: Tensor, rows: Rows | None = None) -> tuple[Tensor, Tensor]:
        """(log-probability in nats, margin in logits) of each answer token, each [trials, tokens].

        weights: [trials, units], the factor of each part; 1 is the adapter as it is, 0 leaves the part out.
        rows: the rows to weight (None: `self.rows`).
        """
        rows = self.rows if rows is None else rows
        return likelihoods(self.model, rows, self.target, weights, self.options.progress)

    def whole(self, rows: Rows | None = None, weight: float = 1.0) -> tuple[Tensor, Tensor]:
        """`score` of one trial in which all units have the same weight."""
        rows = self.rows if rows is None else rows
        return self.score(torch.full((1, len(rows.units)), weight), rows)

    def leave_out(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The loss without each of these units (rows of `units`): of the log-probability of each answer token
        [places, tokens], in nats, and of the smallest margin [places], in logits.

        To leave a sentence out, its chunk is written anew without it.
        """
        if self.level == "sentence":
            rows, weights = _without_sentences(self, self.units.iloc[list(places)])
        else:
            rows, weights = self.rows, torch.ones(len(places), len(self))
            weights[torch.arange(len(places)), torch.tensor(places, dtype=torch.long)] = 0.0
        everything = torch.zeros(1, weights.shape[1])
        everything[:, : len(self.rows.units)] = 1.0
        log_probs, margins = self.score(torch.cat([everything, weights]), rows)
        return log_probs[:1] - log_probs[1:], margins[:1].amin(1) - margins[1:].amin(1)


def answer_target(model: DocToLoRA, question: str, answer: str, system: str = "") -> Target:
    """Question and answer as token ids; ValueError if the window cannot hold both."""
    check_text(answer, "the answer")
    prompt = question_ids(model.tokenizer, question, system)
    ids = answer_ids(model.tokenizer, answer, after_space=model.copies_tokens)  # a document's own tokens
    if len(prompt) + len(ids) > model.window:
        raise ValueError(f"question and answer take {len(prompt) + len(ids)} tokens, the window is {model.window}")
    return Target(prompt, ids, [model.tokenizer.decode([token]) for token in ids])


@contextmanager
def weighted(model: DocToLoRA, rows: Rows, weights: Tensor) -> Iterator[None]:
    """Inside the `with` block, unit u has the weight `weights[i, u]` in batch row i of the base model.

    weights: [batch, units]; gradients reach it, where rows are summed.

    The model on exit is the model on entry.
    """
    if rows.blocks:
        adapters = [
            model.adapter_of([block.weighted(block.weight * w) for block, w in zip(rows.blocks, own, strict=True)])
            for own in weights.tolist()
        ]
        reader, places = model.hypernetwork.reader, torch.arange(len(adapters))
        with read_rows(model.base_model, adapters, model.reading, reader, rows=places):
            yield
        return
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


def likelihoods(
    model: DocToLoRA,
    rows: Rows,
    target: Target,
    weights: Tensor,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """(log-probability, margin to the best other token in logits) of every answer token, each [trials, tokens].

    progress: called as progress(done, total), in trials.
    """
    ids = torch.tensor(target.prompt + target.answer, device=model.device)
    right = torch.tensor(target.answer, device=model.device)[None, :, None]
    log_probs, margins, done = [], [], 0
    at_once = _TOKENS_AT_ONCE // len(ids)
    if rows.blocks:
        tensors = [tensor for block in rows.blocks for side in (block.A, block.B) for tensor in side.values()]
        at_once = min(at_once, int(_BYTES_AT_ONCE // sum(tensor.nbytes for tensor in tensors)))
    for some in weights.split(max(1, at_once)):
        with weighted(model, rows, some):
            batch = ids.expand(len(some), -1)
            logits = model.base_model(batch, use_cache=False, logits_to_keep=len(target.answer) + 1).logits
        logits = logits[:, :-1].float()  # they predict the answer tokens
        place = right.expand(len(some), -1, 1)
        own = logits.gather(-1, place)[..., 0]
        log_probs.append(own - logits.logsumexp(-1))
        margins.append(own - logits.scatter(-1, place, -math.inf).amax(-1))
        done += len(some)
        if progress is not None:
            progress(done, len(weights))
    return torch.cat(log_probs).cpu(), torch.cat(margins).cpu()


# ---------------------------------------------------------------------------------------------------- rows and units
def rows_of(adapter: Adapter, level: str, directions: int = 8) -> Rows:
    """The rows of an adapter by "chunk", "layer" (of each module) or "rank"; the bias belongs to no unit.

    "rank": the rows are the singular directions of the sum of all blocks, per layer and module. The `directions`
    strongest are units (column `strength`: their singular value, the scale included); weaker ones are always on.

    ValueError for an adapter without documents, and for other levels than "chunk" of token rows.
    """
    if not adapter.blocks:
        raise ValueError("this adapter holds no document: there is nothing to trace an answer to")
    if adapter.is_rows:
        if level != "chunk":
            raise ValueError(
                f"token rows are all read in the same layers: they have no {level}s, choose chunk or sentence"
            )
        return Rows({}, {}, adapter.scale, _unit_table(_block_units(adapter)), adapter.blocks)
    if level == "rank":
        return _directions(adapter, directions)
    factors = {module: adapter.factors(module) for module in adapter.modules}
    n_rows = sum(block.rank for block in adapter.blocks)
    n_bias = adapter.rank - n_rows
    if level == "chunk":
        counts = torch.tensor([block.rank for block in adapter.blocks])
        of_row = torch.arange(len(counts)).repeat_interleave(counts)
        unit = dict.fromkeys(adapter.modules, F.pad(of_row, (0, n_bias), value=-1).expand(adapter.n_layers, -1))
        units = _block_units(adapter)
    else:
        unit, units = {}, []
        for number, module in enumerate(adapter.modules):
            of_layer = torch.arange(adapter.n_layers)[:, None] * len(adapter.modules) + number
            unit[module] = F.pad(of_layer.expand(-1, n_rows), (0, n_bias), value=-1)
        for layer in range(adapter.n_layers):
            for module in adapter.modules:
                units.append({"unit": f"layer {layer}, {module}", "layer": layer, "module": module})
    return Rows(factors, unit, adapter.scale, _unit_table(units))


def _block_units(adapter: Adapter) -> list[dict]:
    return [
        {"unit": f"{block.document}, chunk {block.chunk}", "document": block.document, "chunk": block.chunk}
        | ({} if block.span is None else {"start": block.span[0], "end": block.span[1]})
        for block in adapter.blocks
    ]


def _directions(adapter: Adapter, directions: int) -> Rows:
    """See `rows_of`: B^T A = U S V^T."""
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
            parts.append(replace(adapter, blocks=()).factors(module))
            of_row = F.pad(of_row, (0, parts[-1][0].shape[1]), value=-1)
        factors[module] = tuple(torch.cat(side, dim=1) for side in zip(*parts, strict=True))
        unit[module] = of_row
    return Rows(factors, unit, adapter.scale, _unit_table(units))


def _unit_table(units: list[dict]) -> pd.DataFrame:
    """One row per unit, with missing values where a unit has no such place."""
    table = pd.DataFrame(units)
    for name in _PLACES:
        values = table[name] if name in table else pd.Series([None] * len(table), dtype=object)
        table[name] = values.astype("string" if name in ("document", "module") else "Int64")
    first = ["unit", *_PLACES]
    return table[[*first, *(name for name in table if name not in first)]]


# --------------------------------------------------------------------------------------------------------- sentences
def document_texts(adapter: Adapter, documents: str | Mapping[str, str]) -> dict[str, str]:
    """{name: text}, checked; a single text belongs to the adapter's one document, whatever its name."""
    if isinstance(documents, str) and len(adapter.documents) == 1:
        return name_documents({adapter.documents[0]: documents})
    return name_documents(documents)


def block_texts(adapter: Adapter, documents: str | Mapping[str, str]) -> pd.DataFrame:
    """The blocks of an adapter in their order: block (its place), document, chunk, text ("" without a span)."""
    named, rows = document_texts(adapter, documents), []
    for place, block in enumerate(adapter.blocks):
        text = named.get(block.document, "")[slice(*block.span)].strip() if block.span else ""
        rows.append({"block": place, "document": block.document, "chunk": block.chunk, "text": text})
    return pd.DataFrame(rows, columns=["block", "document", "chunk", "text"])


def sentence_units(adapter: Adapter, documents: str | Mapping[str, str]) -> pd.DataFrame:
    """The sentences of an adapter's chunks, in order.

    Columns: as of `Rows.units`, text, block (the number of the block that holds the sentence). A sentence across
    several chunks is several units.

    ValueError for a document without text, or a block without span in it.
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


def _without_sentences(trials: Trials, units: pd.DataFrame) -> tuple[Rows, Tensor]:
    """(rows of all blocks and of new ones, weights [units, blocks]): trial i is the adapter as if sentence i did not
    stand in its chunk. A chunk of one sentence is left out, without the hypernetwork.
    """
    model, adapter = trials.model, trials.adapter
    shortened = {}
    for number, unit in enumerate(units.to_dict("records")):
        start, end = adapter.blocks[unit["block"]].span
        text = trials.texts[unit["document"]]
        rest = text[start : unit["start"]] + text[unit["end"] : end]
        if rest.strip():
            shortened[number] = rest.strip()
    blocks = list(adapter.blocks)
    of_unit: list[int] = []  # the unit of each new block
    if shortened:
        ids = model.encoder_tokenizer(list(shortened.values()), add_special_tokens=False)["input_ids"]
        options = {"chunk_tokens": max(map(len, ids)), "progress": trials.options.progress}
        anew = model.internalize_each(list(shortened.values()), **options)
        for number, written in zip(shortened, anew, strict=True):
            weight = adapter.blocks[units["block"].iloc[number]].weight
            new = written.in_layers(adapter.layers).blocks
            blocks += [replace(block, document=f"anew {number}", weight=weight) for block in new]
            of_unit += [number] * len(written.blocks)
    weights = torch.ones(len(units), len(blocks))
    weights[:, len(adapter.blocks) :] = 0.0
    weights[torch.arange(len(units)), torch.tensor(units["block"].tolist())] = 0.0
    for place, number in enumerate(of_unit, len(adapter.blocks)):
        weights[number, place] = 1.0
    return rows_of(replace(adapter, blocks=tuple(blocks)), "chunk"), weights
