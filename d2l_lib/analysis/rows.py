"""The geometry of token rows: what a document's codes and words look like as matrices.

    codes of a role   A_role  [T, d]      role "first", "inside", "end" or "context" of T tokens (see `token_rows`)
    words             B       [T, d_out]  what the rows of role "first" write: the direction of the token's own word

Rows are read by attention and never added up, so there is no update dW to decompose, as `weights` does. Each row stands
for one token and keeps its meaning alone. Codes all have the norm sqrt(d), and words the norm exp(log_gain): by
construction, so norms tell nothing about a document. A block's weight is left aside.

Geometry only describes. To see what a row does, leave its block out (`Adapter.without`) or look at what was read
(`row_reading.answer_rows`).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from d2l_lib.adapter import Adapter
from d2l_lib.analysis.weights import cluster_order, effective_rank, stable_rank
from d2l_lib.token_rows import ROLES

PARTS = (*ROLES, "words")


def row_parts(adapter: Adapter) -> dict[str, Tensor]:
    """{part: [T, size] float64} of all tokens of an adapter, for each of PARTS.

    ValueError for an adapter that is summed and for one without a document.
    """
    if not adapter.is_rows:
        raise ValueError("this adapter is summed: analysis.weights measures it; token rows are what this is for")
    if not adapter.blocks:
        raise ValueError("this adapter holds no documents: there is no row to measure")
    (module,) = adapter.modules
    A, B = (
        torch.cat([getattr(block, side)[module][0] for block in adapter.blocks]).double().unflatten(0, (-1, len(ROLES)))
        for side in ("A", "B")
    )
    return {role: A[:, place] for place, role in enumerate(ROLES)} | {"words": B[:, 0]}


def row_spectra(adapters: Mapping[str, Adapter]) -> pd.DataFrame:
    """The singular values of every part of named adapters: one row per adapter, part and index.

    Columns: adapter, part (one of PARTS), index (1 = largest), value (no unit), share (of the squared Frobenius norm, 0
    to 1).
    """
    tables = []
    for name, adapter in adapters.items():
        for part, rows in row_parts(adapter).items():
            values = torch.linalg.svdvals(rows).numpy()
            place = {"adapter": name, "part": part, "index": np.arange(1, len(values) + 1), "value": values}
            tables.append(pd.DataFrame(place | {"share": values**2 / (values**2).sum()}))
    return pd.concat(tables, ignore_index=True)


def row_ranks(adapters: Mapping[str, Adapter]) -> pd.DataFrame:
    """Over how many directions each part is spread: one row per adapter and part.

    Columns: adapter, part, rows (tokens), different (different tokens, told by their words), size (of a row), norm
    (mean of the rows' norms), norm_spread (their standard deviation), effective_rank, stable_rank (see `weights`).
    """
    values = row_spectra(adapters).groupby(["adapter", "part"])["value"]
    lines = []
    for name, adapter in adapters.items():
        parts = row_parts(adapter)
        different = len(_different(parts["words"]))
        for part, rows in parts.items():
            norms, own = rows.norm(dim=1), values.get_group((name, part)).to_numpy()
            line = {"adapter": name, "part": part, "rows": len(rows), "different": different, "size": rows.shape[1]}
            line |= {"norm": float(norms.mean()), "norm_spread": float(norms.std(unbiased=False))}
            lines.append(line | {"effective_rank": effective_rank(own), "stable_rank": stable_rank(own)})
    return pd.DataFrame(lines)


def row_similarity(adapters: Mapping[str, Adapter], part: str = "context", *, ordered: bool = True) -> pd.DataFrame:
    """How alike the rows of named adapters are: a square table with the names on both sides, -1 to 1.

    For each row of one adapter the largest cosine with a row of the other, a mean over rows and over both directions:
    1 where each row has its equal in the other, in any order. The mean of all rows of all adapters is taken off first,
    for it is what they share.

    part: one of PARTS; ValueError for others. ordered: similar ones stand together (see `weights.cluster_order`).
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, not {part!r}")
    if len(adapters) == 0:
        raise ValueError("no adapter to compare: give {name: adapter}")
    rows = {name: row_parts(adapter)[part] for name, adapter in adapters.items()}
    mean = torch.cat(list(rows.values())).mean(0)
    unit = {name: torch.nn.functional.normalize(own - mean, dim=1) for name, own in rows.items()}
    table = pd.DataFrame(np.eye(len(unit)), index=list(unit), columns=list(unit))
    for one, other in combinations(unit, 2):
        cosines = unit[one] @ unit[other].T
        table.loc[one, other] = table.loc[other, one] = float((cosines.amax(0).mean() + cosines.amax(1).mean()) / 2)
    if not ordered:
        return table
    order = cluster_order(table)
    return table.loc[order, order]


def shared_words(adapters: Mapping[str, Adapter]) -> pd.DataFrame:
    """The share of different tokens that named adapters have in common: a square table of |a and b| / |a or b|."""
    own = {name: _different(row_parts(one)["words"]) for name, one in adapters.items()}
    values = [[len(a & b) / len(a | b) for b in own.values()] for a in own.values()]
    return pd.DataFrame(values, index=list(own), columns=list(own))


def same_and_other(table: pd.DataFrame) -> pd.Series:
    """Means of a table whose names are "document, part": pairs of parts of the same document, and of two documents."""
    values: dict[str, list[float]] = {"the same document": [], "another document": []}
    for one, other in combinations(table.index, 2):
        same = one.partition(", ")[0] == other.partition(", ")[0]
        values["the same document" if same else "another document"].append(table.loc[one, other])
    return pd.Series({kind: np.mean(own) if own else np.nan for kind, own in values.items()})


def _different(words: Tensor) -> set[tuple[float, ...]]:
    """The different rows of words [T, d_out]; the same word in another batch may differ in the last bits."""
    return set(map(tuple, words.round(decimals=4).tolist()))
