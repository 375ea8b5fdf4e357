"""Which chunk of an article a token of the answer should read: the right one first, by what speaks for a chunk.

What speaks for a chunk is in `row_reader`: its rows, nearness in it, and the words of the question that it holds, alone
and with the word before.
Weights are fitted on articles of the training set, and judged on others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2l_lib.documents import question_ids
from d2l_lib.model import DocToLoRA
from d2l_lib.row_reader import NEAR
from d2l_lib.row_reading import RowReading, read_rows
from d2l_lib.studies.articles import questions_on_articles
from d2l_lib.studies.fits import keep_in_reader, minimised
from d2l_lib.tasks import scores

_ARTICLES = 15  # that weights are fitted on
_NEAREST = NEAR.index((24.0, 0))  # of all nearnesses the one that finds the chunk best
_USED = {  # parts by method
    "rows": (0,),
    "nearness": (1,),
    "words": (2,),
    "pairs of words": (3,),
    "rows and nearness": (0, 1),
    "words and pairs": (2, 3),
    "rows, nearness and words": (0, 1, 2),
    "all four": (0, 1, 2, 3),
}
_RIDGE = 0.01


@dataclass(frozen=True)
class _Asked:
    """Of one question when all of it is read: parts [chunks, 4], and right [chunks], True at chunks of its passage."""

    parts: Tensor
    right: Tensor


def run(model: DocToLoRA, n: int, seed: int, questions: str, test: str, keep: str | None) -> list[dict]:
    """A row for each method and set of questions: how often the right passage is first, and among three.

    n: questions of each set, on articles of 20,000 to 50,000 characters. questions: those that the weights of the
    methods are fitted on; test: others. Both "DATASET" or "DATASET=FILE" (see `tasks.qa.load_named`).
    keep: the model whose folder takes the weights of "all four"; None: they are recorded alone.

    ValueError for `keep` where rows have no weight, as those of the other parts are kept in proportion to it.
    """
    fitted, rows = [], []
    for name, source, most in (("fitted", questions, _ARTICLES), ("test", test, None)):
        asked = _ask(model, source, n, seed, most)
        for method, used in _USED.items():
            if name == "fitted":
                fitted.append(fit([one.parts[:, used] for one in asked], [one.right for one in asked]))
            weights = fitted[list(_USED).index(method)]
            rows.append(_row(asked, used, weights) | {"method": method, "split": name, "seed": seed})
            print(name, method, rows[-1], flush=True)
    if keep is not None:
        if not fitted[-1][0]:
            raise ValueError("rows tell nothing about the right chunk, so other parts cannot be weighed beside them")
        nearness, *words = (fitted[-1][1:] / fitted[-1][0]).tolist()
        keep_in_reader(keep, lambda reader: reader.weigh_chunks(_NEAREST, nearness, words))
    return rows


def _ask(model: DocToLoRA, questions: str, n: int, seed: int, most: int | None) -> list[_Asked]:
    articles, drawn = questions_on_articles(questions, n, seed, most)
    asked, reader, reading = [], model.hypernetwork.reader, RowReading()
    for title in dict.fromkeys(drawn["title"]):
        adapters = model.internalize_each(articles[title])
        owner = torch.tensor([number for number, one in enumerate(adapters) for _ in one.blocks])
        whole = sum(adapters)
        for question, document in drawn.loc[drawn["title"] == title, ["question", "document"]].itertuples(index=False):
            ids = torch.tensor(question_ids(model.tokenizer, [question]), device=model.device)
            with torch.no_grad(), read_rows(model.base_model, [whole], reading, reader) as state:
                model.base_model(ids, use_cache=False, logits_to_keep=1)
            found = state.chunk_parts[0]
            parts = [found.rows[0, -1], found.nearness[0, -1, :, _NEAREST], *found.words[0, -1].unbind(-1)]
            right = owner == articles[title].index(document)
            asked.append(_Asked(torch.stack(parts, -1).float().cpu(), right))
        print(f"{len(asked)} of {len(drawn)} questions", flush=True)
    return asked


def fit(parts: list[Tensor], right: list[Tensor]) -> Tensor:
    """[k]: weights, none below 0, with which a softmax over chunks finds the right ones most surely.

    parts: of each question [chunks, k]. right: [chunks], True at right chunks.
    """
    parts = [one - one.mean(0) for one in parts]
    size = torch.cat(parts).std(0).clamp_min(1e-6)

    def loss(weights: Tensor) -> Tensor:
        of_each = [
            -(one / size @ weights).log_softmax(0)[own].logsumexp(0) for one, own in zip(parts, right, strict=True)
        ]
        return torch.stack(of_each).mean() + _RIDGE * weights.square().sum()

    return (minimised(loss, len(size)) / size).clamp_min(0)


def _row(asked: list[_Asked], used: tuple[int, ...], weights: Tensor) -> dict:
    first, among = 0, 0
    for one in asked:
        order = (one.parts[:, used] @ weights).argsort(descending=True)
        first += int(one.right[order[0]])
        among += int(one.right[order[:3]].any())
    low, high = scores.wilson(first, len(asked))
    row = {"n": len(asked), "first": first / len(asked), "low": low, "high": high, "among_three": among / len(asked)}
    chunks = sum(len(one.right) for one in asked) / len(asked)
    return row | {"chunks": round(chunks, 1), "weights": [round(one, 4) for one in weights.tolist()]}
