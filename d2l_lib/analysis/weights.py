"""The geometry of an adapter's summed update, from its factors alone.

    dW = scale * B^T A = U S V^T        A [R, d_in], B [R, d_out], U [d_out, k], S [k], V [d_in, k]

Single rows of A and B mean nothing (A -> M A, B -> M^-T B is the same update): everything here is a function of dW. The
[d_out, d_in] product is formed for intruder dimensions, which need W + dW, and for many blocks. Norms and singular
values have no unit; they include the scale and all weights. Geometry only describes. To see what a part does, leave it
out (`Adapter.without`, `singular_part`, `only_layers`) and ask again (`exact_match`).

To add a measure, write one function here from an adapter to a DataFrame with named columns, and one in `views.plots`
from that table to a figure; a notebook calls both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from d2l_lib.adapter import Adapter, decompose, only_layers, singular_part
from d2l_lib.base_model import target_linears
from d2l_lib.documents import check_count
from d2l_lib.model import DocToLoRA
from d2l_lib.tasks.world import Question

# ----------------------------------------------------------------------------------------------------- singular values


def spectra(adapter: Adapter) -> pd.DataFrame:
    """The singular values of the update: one row per module, layer and index.

    Columns: module, layer (0, 1, ...), index (1 = largest), value (no unit), share (of the layer's squared Frobenius
    norm, 0 to 1; NaN where that is 0).
    """
    tables = []
    for module in adapter.modules:
        _, S, _ = decompose(adapter, module)
        for layer, values in enumerate(S.numpy()):
            energy = (values**2).sum()
            share = values**2 / energy if energy else np.full(len(values), np.nan)
            index = np.arange(1, len(values) + 1)
            tables.append(
                pd.DataFrame({"module": module, "layer": layer, "index": index, "value": values, "share": share})
            )
    return pd.concat(tables, ignore_index=True)


def effective_rank(values: Sequence[float]) -> float:
    """exp(-sum p log p), p = values / their sum: between 1 and their number; 0 where all are 0.

    Roy and Vetterli, The effective rank (EUSIPCO 2007). ValueError for negative values.
    """
    values = np.asarray(values, dtype=float)
    if (values < 0).any():
        raise ValueError("singular values are not negative")
    p = values[values > 0] / values.sum() if values.sum() else np.empty(0)
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0


def stable_rank(values: Sequence[float]) -> float:
    """||dW||_F^2 / ||dW||_2^2 of singular values: between 1 and their number; 0 where all are 0.

    Rudelson and Vershynin, Sampling from large matrices (2007).
    """
    values = np.asarray(values, dtype=float)
    return float((values**2).sum() / (values**2).max()) if values.any() else 0.0


def norms(adapter: Adapter, base_model: nn.Module | None = None) -> pd.DataFrame:
    """Norms and ranks of the update: one row per module and layer.

    Columns: module, layer, frobenius, spectral, effective_rank, stable_rank. `base_model` adds relative_frobenius and
    relative_spectral, the update's norm over that of the base weight (shares, not percent).

    ValueError for a base model of other layers or sizes.
    """
    rows = []
    for (module, layer), group in spectra(adapter).groupby(["module", "layer"], sort=False):
        values = group["value"].to_numpy()
        row = {"module": module, "layer": layer}
        row |= {"frobenius": float(np.sqrt((values**2).sum())), "spectral": float(values.max())}
        row |= {"effective_rank": effective_rank(values), "stable_rank": stable_rank(values)}
        rows.append(row)
    table = pd.DataFrame(rows)
    if base_model is not None:
        weights = _base_weights(adapter, base_model)
        own = [weights[module][layer] for module, layer in zip(table["module"], table["layer"], strict=True)]
        for name, order in (("frobenius", "fro"), ("spectral", 2)):
            table[f"relative_{name}"] = table[name] / [float(torch.linalg.matrix_norm(W, order)) for W in own]
    return table


def _base_weights(adapter: Adapter, base_model: nn.Module) -> dict[str, list[Tensor]]:
    """{module: W [d_out, d_in] of every layer}, float64 on the CPU."""
    adapter.check_summed()
    of_module = {}
    for module, linears in target_linears(base_model, adapter.modules).items():
        weights = [linear.weight.detach().double().cpu() for linear in linears]
        sizes = {(W.shape[1], W.shape[0]) for W in weights}
        if len(weights) != adapter.n_layers or sizes != {adapter.sizes[module]}:
            raise ValueError(
                f"adapter writes {module} {adapter.sizes[module]} in {adapter.n_layers} layers, this base model has "
                f"{sorted(sizes)} in {len(weights)}: was it made for another model?"
            )
        of_module[module] = weights
    return of_module


# ------------------------------------------------------------------------------------------------------ inner products
def _inner(first: Adapter, second: Adapter, module: str) -> Tensor:
    """<dW_1, dW_2> = s_1 s_2 trace(A_1^T B_1 B_2^T A_2) of every layer, [L] float64."""
    (A1, B1), (A2, B2) = ([factor.double() for factor in one.factors(module)] for one in (first, second))
    return first.scale * second.scale * ((A1 @ A2.mT) * (B1 @ B2.mT)).sum((1, 2))


def _only_documents(adapter: Adapter) -> Adapter:
    if adapter.bias_inside:
        raise ValueError("a compressed adapter holds the bias inside its block: take the parts of it before it is one")
    return replace(adapter, bias=None)


def bias_and_documents(adapter: Adapter) -> pd.DataFrame:
    """The two parts of the update, one row per module and layer.

    Columns: module, layer, documents, bias, whole (Frobenius norms), cosine (of the documents' part and the bias; NaN
    where one of them is 0).

    ValueError for a compressed adapter, whose parts cannot be told apart.
    """
    documents, bias = _only_documents(adapter), replace(adapter, blocks=())
    rows = []
    for module in adapter.modules:
        dd, bb, db = (_inner(*pair, module) for pair in ((documents, documents), (bias, bias), (documents, bias)))
        for layer, (d, b, both) in enumerate(zip(dd.tolist(), bb.tolist(), db.tolist(), strict=True)):
            d, b = max(0.0, d), max(0.0, b)
            cosine = both / math.sqrt(d * b) if d and b else math.nan
            row = {"module": module, "layer": layer, "documents": math.sqrt(d), "bias": math.sqrt(b)}
            rows.append(row | {"whole": math.sqrt(max(0.0, d + b + 2 * both)), "cosine": cosine})
    return pd.DataFrame(rows)


def block_energy(adapter: Adapter) -> pd.DataFrame:
    """The norm of each block and its share of the update: one row per block, module and layer.

    Columns: document, chunk, start, end (characters; missing without a span), module, layer, norm (Frobenius, of the
    block's own update), share (<dW_block, dW> / ||dW||_F^2; NaN where dW is 0). dW is the sum of the blocks without the
    bias, so the shares of a layer add up to 1.
    """
    documents = _only_documents(adapter)
    if not documents.blocks:
        raise ValueError("this adapter holds no documents: there is no block to measure")
    of_module = {module: _energies(documents, module) for module in adapter.modules}
    rows = []
    for number, block in enumerate(documents.blocks):
        start, end = block.span if block.span is not None else (None, None)
        for module, (own, shared, whole) in of_module.items():
            for layer, total in enumerate(whole.tolist()):
                row = {"document": block.document, "chunk": block.chunk, "start": start, "end": end}
                row |= {"module": module, "layer": layer, "norm": math.sqrt(max(0.0, float(own[number, layer])))}
                rows.append(row | {"share": float(shared[number, layer]) / total if total else math.nan})
    return pd.DataFrame(rows)


def _energies(documents: Adapter, module: str) -> tuple[Tensor, Tensor, Tensor]:
    """(<dW_block, dW_block>, <dW_block, dW>, each [blocks, L], ||dW||_F^2 [L]) in float64.

    dW is formed, layer by layer, if that is less work than all pairs of rows.
    """
    A, B = (factor.double() for factor in documents.factors(module))
    ranks = [block.rank for block in documents.blocks]
    each = list(zip(A.split(ranks, 1), B.split(ranks, 1), strict=True))
    own = torch.stack([((a @ a.mT) * (b @ b.mT)).sum((1, 2)) for a, b in each])
    d_in, d_out = documents.sizes[module]
    if A.shape[1] * (d_in + d_out) <= d_in * d_out:
        shared = torch.stack([((a @ A.mT) * (b @ B.mT)).sum((1, 2)) for a, b in each])
        total = _inner(documents, documents, module) / documents.scale**2
    else:
        layers = []
        for a, b in zip(A, B, strict=True):
            whole = b.T @ a  # [d_out, d_in]
            layers.append((((b @ whole) * a).sum(1), whole.square().sum()))
        of_rows, totals = zip(*layers, strict=True)
        shared = torch.stack([part.sum(1) for part in torch.stack(of_rows).split(ranks, 1)])
        total = torch.stack(totals)
    return tuple(documents.scale**2 * value for value in (own, shared, total))


def block_norms(adapter: Adapter) -> pd.DataFrame:
    """One row per block: document, chunk, start, end, norm (Frobenius, of all modules and layers together)."""
    energy = block_energy(adapter)
    squares = energy.assign(norm=energy["norm"] ** 2)
    names = ["document", "chunk", "start", "end"]
    return squares.groupby(names, sort=False, dropna=False)["norm"].sum().pow(0.5).reset_index()


# ---------------------------------------------------------------------------------------------------------- similarity
def similarity(
    adapters: Mapping[str, Adapter], measure: str = "cosine", *, rank: int = 8, bias: bool = False, ordered: bool = True
) -> pd.DataFrame:
    """The similarity of the updates of named adapters: a square table with the names on both sides.

    measure:
        "cosine": <dW_1, dW_2> / (||dW_1|| ||dW_2||) over all layers and modules, -1 to 1.
        "left", "right": ||U_1^T U_2||_F^2 / rank, the share of one top-`rank` singular subspace that lies in the other
            (0 to 1; `rank` / d by chance), a mean over layers and modules. Left: the outputs of dW; right: its inputs.
    bias: include the bias, which all adapters of a hypernetwork share.
    ordered: similar adapters stand together (see `cluster_order`); False keeps the order of `adapters`.

    ValueError for adapters of different sizes, a zero one, and one of fewer than `rank` directions. Subspaces: Hu et
    al., LoRA (2021), section 7.2.
    """
    if measure not in ("cosine", "left", "right"):
        raise ValueError(f"measure must be 'cosine', 'left' or 'right', not {measure!r}")
    check_count(rank, "rank")
    if len(adapters) == 0:
        raise ValueError("no adapter to compare: give {name: adapter}")
    parts = {name: adapter if bias else _only_documents(adapter) for name, adapter in adapters.items()}
    first = next(iter(parts))
    for name, part in parts.items():
        if (part.n_layers, part.sizes) != (parts[first].n_layers, parts[first].sizes):
            raise ValueError(f"{name!r} and {first!r} are adapters for different base models: they cannot be compared")
    values = _cosines(parts) if measure == "cosine" else _overlaps(parts, measure, rank)
    table = pd.DataFrame(values, index=list(parts), columns=list(parts))
    if not ordered:
        return table
    order = cluster_order(table)
    return table.loc[order, order]


def _cosines(parts: Mapping[str, Adapter]) -> np.ndarray:
    each = list(parts.values())
    products = np.zeros((len(each), len(each)))
    for i, one in enumerate(each):
        for j, other in enumerate(each[: i + 1]):
            products[i, j] = products[j, i] = sum(float(_inner(one, other, module).sum()) for module in one.modules)
    sizes = np.sqrt(np.maximum(products.diagonal(), 0.0))
    if not sizes.all():
        name = list(parts)[int(np.argmin(sizes))]
        raise ValueError(f"{name!r} is zero: it points nowhere and cannot be compared")
    return products / np.outer(sizes, sizes)


def _overlaps(parts: Mapping[str, Adapter], side: str, rank: int) -> np.ndarray:
    bases: dict[str, list[Tensor]] = {}
    for name, part in parts.items():
        bases[name] = []
        for module in part.modules:
            U, S, V = decompose(part, module)
            present = int((S / S[:, :1].clamp(min=1e-300) > 1e-10).sum(1).min())
            if present < rank:
                raise ValueError(f"{name!r} has {present} directions in {module}, fewer than rank={rank}")
            bases[name].append((U if side == "left" else V)[:, :, :rank])
    each = list(bases.values())
    shares = [[[(a.mT @ b).square().sum((1, 2)).mean() for a, b in zip(x, y, strict=True)] for y in each] for x in each]
    return torch.tensor(shares, dtype=torch.float64).mean(-1).numpy() / rank


def cluster_order(table: pd.DataFrame) -> list[str]:
    """The names of a square similarity table, similar ones side by side: the leaves of average-linkage clustering.

    Branches are turned so that similar ends meet. Sokal and Michener (1958).
    """
    if list(table.index) != list(table.columns):
        raise ValueError("the table must be square, with the same names on both sides")
    values = table.to_numpy()
    branches = [[place] for place in range(len(table))]
    while len(branches) > 1:
        pairs = [(i, j) for i in range(len(branches)) for j in range(i + 1, len(branches))]
        i, j = max(pairs, key=lambda pair: values[np.ix_(branches[pair[0]], branches[pair[1]])].mean())
        left, right = branches[i], branches.pop(j)
        turned = [(a, b) for a in (left, left[::-1]) for b in (right, right[::-1])]
        a, b = max(turned, key=lambda pair: values[pair[0][-1], pair[1][0]])
        branches[i] = a + b
    return [table.index[place] for place in branches[0]]


# ------------------------------------------------------------------------------------------------- intruder dimensions
def intruder_dimensions(
    adapter: Adapter, base_model: nn.Module, *, top: int = 10, threshold: float = 0.6
) -> pd.DataFrame:
    """The `top` left singular vectors of W + dW, each compared with those of W: one row per module, layer, index.

    Columns: module, layer, index (1 = largest singular value of W + dW), value (that singular value), cosine (the
    largest |cosine| with a left singular vector of W), intruder (cosine < `threshold`).

    Shuttleworth et al., LoRA vs full fine-tuning: an illusion of equivalence (2024), algorithm 1.
    """
    check_count(top, "top")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is a cosine between 0 and 1, not {threshold}")
    rows = []
    for module, weights in _base_weights(adapter, base_model).items():
        A, B = (factor.double().cpu() for factor in adapter.factors(module))
        for layer, W in enumerate(weights):
            U, _, _ = torch.linalg.svd(W, full_matrices=False)
            changed, S, _ = torch.linalg.svd(W + adapter.scale * B[layer].mT @ A[layer], full_matrices=False)
            cosines = (U.mT @ changed[:, :top]).abs().amax(0)
            for index, (value, cosine) in enumerate(zip(S.tolist(), cosines.tolist(), strict=False), 1):
                row = {"module": module, "layer": layer, "index": index, "value": value, "cosine": cosine}
                rows.append(row | {"intruder": cosine < threshold})
    return pd.DataFrame(rows)


def count_intruders(parts: Mapping, base_model: nn.Module) -> pd.Series:
    """The number of intruders (`intruder_dimensions`) in each of several adapters, by their names in `parts`."""
    return pd.Series({name: int(intruder_dimensions(one, base_model)["intruder"].sum()) for name, one in parts.items()})


# --------------------------------------------------------------------------------------- taking parts, and asking again
def exact_match(model: DocToLoRA, questions: Sequence[Question], adapter: Adapter | Sequence[Adapter] | None) -> float:
    """The share of questions (with `text` and `answer`) that are answered word for word, 0 to 1.

    adapter: as of `model.answer`: one for all questions, or a list with one per question.

    ValueError without a question.
    """
    if not questions:
        raise ValueError("no question to ask")
    answers = model.answer([question.text for question in questions], adapter)
    return sum(answer == question.answer for answer, question in zip(answers, questions, strict=True)) / len(questions)


def by_direction(adapter: Adapter, counts: Sequence[int]) -> dict[tuple[int, str], Adapter]:
    """{(k, "first k" | "all but the first k"): that part} of every layer's singular directions, the largest first."""
    parts = {}
    for k in counts:
        parts[k, "first k"] = singular_part(adapter, 0, k)
        parts[k, "all but the first k"] = singular_part(adapter, k, None)
    return parts


def by_layer(adapter: Adapter) -> dict[tuple[int, str], Adapter]:
    """{(layer, "only this layer" | "all but this layer"): that part}, the bias's rows of other layers left out too."""
    adapter.check_summed()
    parts = {}
    for layer in range(adapter.n_layers):
        parts[layer, "only this layer"] = only_layers(adapter, [layer])
        parts[layer, "all but this layer"] = only_layers(adapter, [i for i in range(adapter.n_layers) if i != layer])
    return parts


def by_origin(adapter: Adapter) -> dict[str, Adapter]:
    """{"both": the adapter, "documents without the bias": ..., "bias alone": ...}."""
    return {"both": adapter, "documents without the bias": adapter.scaled_bias(0.0), "bias alone": adapter.scaled(0.0)}


def ask_parts(model: DocToLoRA, questions: Sequence[str], parts: Mapping, **settings) -> pd.DataFrame:
    """The answers with each of several adapters: one row per name in `parts`, one column per question.

    settings: as of `model.answer`.
    """
    rows = [model.answer(list(questions), adapter, **settings) for adapter in parts.values()]
    names = pd.MultiIndex.from_tuples(parts) if isinstance(next(iter(parts)), tuple) else list(parts)
    return pd.DataFrame(rows, index=names, columns=list(questions))


def shares_right(model: DocToLoRA, questions: Sequence[Question], parts: Mapping) -> pd.Series:
    """`exact_match` with each of several adapters, by their names in `parts`."""
    answers = ask_parts(model, [question.text for question in questions], parts)
    return (answers == [question.answer for question in questions]).mean(axis=1)


def overlap(blocks: pd.DataFrame, spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether a block (a row of `block_norms`) holds a character of one of the `spans` of its document."""
    own = zip(blocks["start"], blocks["end"], strict=True)
    return [any(start < b and a < end for a, b in spans) for start, end in own]


def ask_without_blocks(model: DocToLoRA, questions: Sequence[Question], adapter: Adapter) -> pd.DataFrame:
    """Which questions on the adapter's one document are right without some blocks: one row per question.

    Columns (bool): all blocks, without the evidence, without the largest other, the evidence alone. Evidence: the
    blocks of the question's first evidence sentence. Largest other: by norm, of all other blocks.
    """
    by_size = block_norms(adapter).sort_values("norm", ascending=False)
    rows = []
    for question in questions:
        holds = pd.Series(overlap(by_size, question.evidence[:1]), index=by_size.index)
        evidence, largest = by_size.loc[holds, "chunk"].tolist(), int(by_size.loc[~holds, "chunk"].iloc[0])
        parts = {
            "all blocks": adapter,
            "without the evidence": adapter.without(chunk=evidence),
            "without the largest other": adapter.without(chunk=largest),
            "the evidence alone": adapter.only(chunk=evidence),
        }
        answers = model.answer([question.text] * len(parts), list(parts.values()))
        rows.append({name: one == question.answer for name, one in zip(parts, answers, strict=True)})
    return pd.DataFrame(rows)


def compare_variants(table: pd.DataFrame) -> pd.Series:
    """Means of a similarity table whose names are documents ("1") and variants of them ("1, shuffled").

    Values: each variant with its own document; "another document", all pairs of documents; "itself".
    """
    originals = [name for name in table.index if ", " not in name]
    pairs = {"another document": list(combinations(originals, 2))}
    for name in table.index:
        original, _, variant = name.partition(", ")
        if variant:
            pairs.setdefault(variant, []).append((original, name))
    pairs["itself"] = [(name, name) for name in originals]
    return pd.Series({kind: np.mean([table.loc[pair] for pair in of_kind]) for kind, of_kind in pairs.items()})


def ask_variants(
    model: DocToLoRA, questions: Mapping[str, Sequence[Question]], adapters: Mapping[str, Adapter]
) -> pd.Series:
    """Exact match of documents' questions with adapters of variants, a mean over documents; see `compare_variants`."""
    originals = list(questions)
    chosen = {"another document": dict(zip(originals, [*originals[1:], originals[0]], strict=True))}
    for name in adapters:
        original, _, variant = name.partition(", ")
        chosen.setdefault(variant or "itself", {})[original] = name
    return pd.Series(
        {
            kind: np.mean([exact_match(model, questions[one], adapters[name]) for one, name in names.items()])
            for kind, names in chosen.items()
        }
    )


# ------------------------------------------------------------------------------------------------------- recompression
def recompression(adapter: Adapter, ranks: Sequence[int]) -> pd.DataFrame:
    """The error and size of the update at smaller ranks, from its singular values (Eckart and Young 1936).

    Columns: rank, error (||dW - dW_rank||_F / ||dW||_F over all layers and modules, 0 to 1; NaN where dW is 0), bytes
    (of factors of that rank in the adapter's layers and modules, as of `export_peft`; never more than before).
    """
    if len(ranks) == 0:
        raise ValueError("no rank to try: give whole numbers from 1")
    for rank in ranks:
        check_count(rank, "rank")
    values = spectra(adapter)
    energy = values["value"] ** 2
    per_rank = next(adapter._tensors()).element_size() * len(adapter.layers) * sum(map(sum, adapter.sizes.values()))
    lost = {rank: float(energy[values["index"] > rank].sum()) for rank in ranks}
    total = float(energy.sum())
    return pd.DataFrame(
        {
            "rank": list(ranks),
            "error": [math.sqrt(lost[rank] / total) if total else math.nan for rank in ranks],
            "bytes": [per_rank * min(rank, adapter.rank) for rank in ranks],
        }
    )
