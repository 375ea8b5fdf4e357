"""Questions about passages of real text: the passage in the prompt, in an adapter, among others, and controls.

A plain LoRA that was trained to answer from its prompt (`training.reading_lora`) says how much of a passage the base
model could tell. Retrieval chooses among the same ten passages that one adapter holds. Another hypernetwork for the
same base model writes adapters of the published form: rank 8, a plain sum.
"""

from __future__ import annotations

import random
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from d2l_lib.adapter import Adapter, stack_factors
from d2l_lib.base_model import bundled_path
from d2l_lib.documents import question_ids
from d2l_lib.engine import greedy_texts
from d2l_lib.loading import load, reading_lora, reading_lora_folder
from d2l_lib.lora import apply_lora
from d2l_lib.model import DocToLoRA
from d2l_lib.presets import PRESETS
from d2l_lib.studies import earlier_rows
from d2l_lib.studies.retrieval import PassageIndex, Retrieval
from d2l_lib.tasks import qa, scores
from d2l_lib.training.processes import shared
from d2l_lib.training.row_features import Limits, questions_on_learned

READING = "passage in the prompt, reading LoRA"
SEEN = "Doc-to-LoRA, seen passages"
PUBLISHED = "published form"  # of a hypernetwork: see `training.published`
_TOGETHER = 10  # passages of one adapter, and of one index
_NEW_TOKENS = 24
_AT_ONCE = 64, 1e9  # questions, and bytes of their adapters, for memory
_METRICS = ("token_f1_squad", "exact_match_squad", "recall")
_ENDS = 128, 200  # tokens of a passage: the ends of the ranges that are scored apart; the rest is longer
RANGES = f"<= {_ENDS[0]}", f"{_ENDS[0] + 1}-{_ENDS[1]}", f"> {_ENDS[1]}"


def run(
    model: DocToLoRA, n: int, seed: int, questions: str, only: Sequence[str] | None = None, seen: str | None = None
) -> Iterator[list[dict]]:
    """After each method all rows so far, one for each metric: n questions, score with its interval, seconds.

    Rows with `tokens` follow, one of RANGES: scores of the questions on passages of such a length.

    questions: "DATASET" or "DATASET=FILE" (see `tasks.qa.load_named`); n of them are drawn with `seed`.
    only: methods whose names hold one of these words; rows of others that are recorded stay.
    seen: the file from which the bundled hypernetwork learned, named like `questions`. The method SEEN asks n questions
        of it, drawn with `seed`, about passages that were learned (never those of validation); without it SEEN is left
        out. Most of these questions were learned, too.

    Seconds are the processor's. ValueError if no method has such a name, for SEEN without its file and the other way
    round, and for recorded rows of other questions.
    """
    if seen is None and any("seen" in word for word in only or ()):
        raise ValueError(f"the method {SEEN!r} needs --seen, the file from which the hypernetwork learned")
    chosen = choose(model, [name for name in METHODS if name != SEEN or seen is not None], only)
    if seen is not None and SEEN not in chosen:
        raise ValueError(f"--seen is for the method {SEEN!r}, which --only leaves out")
    rows = other_rows("passages", chosen, n, seed) if only else []
    unseen = [name for name in chosen if name != SEEN]
    parts = [(qa.load_named(questions, n=n, seed=seed), unseen)] if unseen else []
    parts += [(_seen_questions(model, seen, n, seed), [SEEN])] if SEEN in chosen else []
    for frame, methods in parts:
        for new in rows_of_methods(model, _with_ranges(frame, model.tokenizer), methods, seed):
            rows += new
            yield sorted(rows, key=lambda row: list(METHODS).index(row["method"]))


def _seen_questions(model: DocToLoRA, name: str, n: int, seed: int) -> pd.DataFrame:
    """n questions about passages that the bundled hypernetwork learned, in the order of their file."""
    p = PRESETS["smollm2"].rows
    frame = qa.load_named(name, split="train")
    frame = questions_on_learned(frame, model.tokenizer, Limits(p.longest_passage), p.validation)
    drawn = random.Random(f"passages/{seed}/seen").sample(range(len(frame)), min(n, len(frame)))
    return frame.iloc[sorted(drawn)].reset_index(drop=True)


def _with_ranges(frame: pd.DataFrame, tokenizer) -> pd.DataFrame:
    """`frame` with the column `tokens`, that one of RANGES in which the passage's length lies."""
    lengths = qa.add_lengths(frame, tokenizer)["length_tokens"]
    return frame.assign(tokens=[RANGES[bisect_left(_ENDS, length)] for length in lengths])


def choose(model: DocToLoRA, methods: Sequence[str], only: Sequence[str] | None) -> list[str]:
    """Those of the methods whose names hold one of the words of `only`, or are it (None: all that this model has).

    ValueError where no name does, and for a method with a reading LoRA that this base model lacks.
    """
    chosen = [
        name
        for name in methods
        if only is None or any(word == name if word in methods else word in name for word in only)
    ]
    if not chosen:
        raise ValueError(f"no method is called {' or '.join(only)}; there are {', '.join(methods)}")
    if not published_folder(model).is_dir():
        chosen = [name for name in chosen if not METHODS[name].published]
    if not chosen:
        raise ValueError(
            f"there is no hypernetwork of the published form in {published_folder(model)}: d2l train --stage "
            "published makes one, or choose other methods"
        )
    if reading_lora_folder(model).is_dir() or not any(METHODS[name].reads for name in chosen):
        return chosen
    if only is None:
        return [name for name in chosen if not METHODS[name].reads]
    raise ValueError(
        f"there is no reading LoRA in {reading_lora_folder(model)}: d2l train --stage reading-lora makes one, or "
        "choose other methods"
    )


def other_rows(record: str, methods: Sequence[str], n: int, seed: int) -> list[dict]:
    """The recorded rows of other methods; ValueError where they are of other questions."""
    rows = [row for row in earlier_rows(record) if row["method"] not in methods]
    for row in rows:
        of_a_part = row.get("tokens") in RANGES
        if row["seed"] != seed or not (of_a_part or row["n"] == n):
            raise ValueError(
                f"the record holds rows of seed {row['seed']}, n {row['n']}: the methods of a table answer the same "
                "questions, so take its --n and --seed, or leave out --only"
            )
    return rows


def rows_of_methods(model: DocToLoRA, frame: pd.DataFrame, methods: Sequence[str], seed: int) -> Iterator[list[dict]]:
    """The rows of one of METHODS after another, one for each metric, with costs; they are printed too.

    A prompt that several methods ask without an adapter is asked once, and its seconds count for each.

    frame: questions about passages, as `tasks.qa.load_qa` gives them; with a column `tokens`, one of RANGES, each
        range that occurs has rows of its own, without costs.
    """
    documents = [document for document, _ in qa.group_by_document(frame)]
    facts = {"dataset": frame["dataset"].iloc[0], "n_passages": len(documents)}
    inside = {}  # {published or not: (model, adapters, costs)}
    for published in {METHODS[name].published for name in methods if METHODS[name].applied is not _nothing}:
        one = load(published_folder(model), device=model.device, dtype=model.base_model.dtype) if published else model
        inside[published] = one, *_internalized(one, documents)
    lora = reading_lora(model) if any(METHODS[name].reads for name in methods) else None
    known: dict[tuple[bool, str], tuple[str, float]] = {}
    for name in methods:
        method = METHODS[name]
        prompts, own = method.prompts(model, frame, seed)
        if method.applied is _nothing:
            new = [one for one in dict.fromkeys(prompts) if (method.reads, one) not in known]
            answers, seconds = ask_reading(model, new, lora) if method.reads else ask(model, new, [None] * len(new))
            known |= {(method.reads, one): (answer, seconds) for one, answer in zip(new, answers, strict=True)}
            replies, each = zip(*(known[method.reads, one] for one in prompts), strict=True)
            seconds = round(sum(each) / len(each), 4)
        else:
            one, adapters, cost = inside[method.published]
            applied, own = method.applied(adapters, seed), own | cost
            replies, seconds = ask(one, prompts, [applied[document] for document in frame["document"]])
        answered = frame.assign(method=name, prediction=replies)
        rows = scored_rows(answered, seed, seconds=seconds)
        print(name, {row["metric"]: round(row["score"], 3) for row in rows}, flush=True)
        yield [row | facts | own for row in rows] + _rows_by_length(answered, seed)


def _rows_by_length(answered: pd.DataFrame, seed: int) -> list[dict]:
    """Rows of one method's metrics for each range of the column `tokens`, if there is one."""
    rows = []
    for tokens in RANGES if "tokens" in answered else ():
        part = answered[answered["tokens"] == tokens]
        facts = {"dataset": answered["dataset"].iloc[0], "n_passages": part["document"].nunique(), "tokens": tokens}
        rows += scored_rows(part, seed, **facts) if len(part) else []
    return rows


def _internalized(model: DocToLoRA, documents: Sequence[str]) -> tuple[dict[str, Adapter], dict[str, float]]:
    """({document: its adapter}, what making one costs)."""
    start = time.process_time()
    adapters = dict(zip(documents, model.internalize_each(documents), strict=True))
    return adapters, {
        "seconds_internalizing": round((time.process_time() - start) / len(documents), 4),
        "kilobytes": round(sum(one.nbytes for one in adapters.values()) / len(adapters) / 1e3, 1),
    }


def ask(
    model: DocToLoRA, prompts: Sequence[str], adapters: Sequence[Adapter | None], new_tokens: int = _NEW_TOKENS
) -> tuple[list[str], float]:
    """(answers, seconds of the processor for each); few at a time, for memory. Several processes share the parts."""

    def work(part: slice) -> tuple[list[str], float]:
        start = time.process_time()
        return model.answer(prompts[part], adapters[part], max_new_tokens=new_tokens), time.process_time() - start

    return joined(shared(list(_batches(adapters)), work))


def _batches(adapters: Sequence[Adapter | None]) -> Iterator[slice]:
    """Parts of the questions with these adapters that fit into `_AT_ONCE`, at least one question each."""
    first: int = 0
    sizes: dict[int, int] = {}
    for place, adapter in enumerate(adapters):
        own = {} if adapter is None else {id(adapter): adapter.nbytes}
        if place > first and (place - first >= _AT_ONCE[0] or sum((sizes | own).values()) > _AT_ONCE[1]):
            yield slice(first, place)
            first, sizes = place, {}
        sizes |= own
    if len(adapters):
        yield slice(first, len(adapters))


# --- the reading LoRA -----------------------------------------------------------------------------------------------
def published_folder(model: DocToLoRA) -> Path:
    """Where the bundled hypernetwork of the published form of this base model would be."""
    return bundled_path(model.base_source or "") / "published"


def ask_reading(
    model: DocToLoRA, prompts: Sequence[str], lora: Adapter, new_tokens: int = _NEW_TOKENS
) -> tuple[list[str], float]:
    """Likewise of the base model with this LoRA in its weights' place."""

    def work(first: int) -> tuple[list[str], float]:
        start = time.process_time()
        part = question_ids(model.tokenizer, list(prompts[first : first + model.answer_batch]))
        texts = greedy_texts(model.base_model, model.tokenizer, part, [new_tokens] * len(part))
        return texts, time.process_time() - start

    with apply_lora(model.base_model, *stack_factors([lora])):
        return joined(shared(range(0, len(prompts), model.answer_batch), work))


def joined(parts: Sequence[tuple[list[str], float]]) -> tuple[list[str], float]:
    """(all answers, seconds of the processor for each) of (answers, seconds) of each part."""
    answers = [answer for own, _ in parts for answer in own]
    return answers, round(sum(seconds for _, seconds in parts) / max(1, len(answers)), 4)


# --- prompts, with what they cost -----------------------------------------------------------------------------------
_Prompts = tuple[list[str], dict[str, float]]


def _questions(model: DocToLoRA, frame: pd.DataFrame, seed: int) -> _Prompts:
    return list(frame["question"]), {}


def _with_passages(model: DocToLoRA, frame: pd.DataFrame, seed: int) -> _Prompts:
    """Each question with its passage in the prompt."""
    prompts = [
        qa.with_document(document, [question], model.tokenizer, model.window, _NEW_TOKENS)[0]
        for document, question in zip(frame["document"], frame["question"], strict=True)
    ]
    return prompts, {}


def _with_best(model: DocToLoRA, frame: pd.DataFrame, seed: int) -> _Prompts:
    """Each question with the passage of its group that shares most words with it, and what finding that costs.

    Costs: seconds and kilobytes of the index (texts included) for each passage, seconds of a search, and the share of
    prompts that hold the right passage.
    """
    method, start = Retrieval(model, max_new_tokens=_NEW_TOKENS), time.process_time()
    groups = [(group, PassageIndex(group)) for group in _groups(set(frame["document"]), seed)]
    indexed = time.process_time()
    index_of = {document: index for group, index in groups for document in group}
    pairs = list(zip(frame["document"], frame["question"], strict=True))
    prompts = [method.prompts(index_of[document], [question])[0] for document, question in pairs]
    right = [document in prompt for (document, _), prompt in zip(pairs, prompts, strict=True)]
    return prompts, {
        "seconds_indexing": round((indexed - start) / len(index_of), 4),
        "seconds_searching": round((time.process_time() - indexed) / len(prompts), 4),
        "kilobytes": round(sum(index.nbytes for _, index in groups) / len(index_of) / 1e3, 1),
        "right_passage": round(sum(right) / len(right), 4),
    }


# --- adapters -------------------------------------------------------------------------------------------------------
def _nothing(adapters: Mapping[str, Adapter], seed: int) -> dict[str, Adapter]:
    return {}


def _own(adapters: Mapping[str, Adapter], seed: int) -> Mapping[str, Adapter]:
    return adapters


def _others(adapters: Mapping[str, Adapter], seed: int) -> dict[str, Adapter]:
    """Another document's adapter for each."""
    order = _shuffled(adapters, f"passages/{seed}")
    return {document: adapters[order[(place + 1) % len(order)]] for place, document in enumerate(order)}


def _together(adapters: Mapping[str, Adapter], seed: int) -> dict[str, Adapter]:
    """For each document the sum of its group's adapters."""
    sums = {}
    for group in _groups(adapters, seed):
        sums |= dict.fromkeys(group, sum(adapters[document] for document in group))
    return sums


def _groups(documents: Iterable[str], seed: int) -> list[list[str]]:
    """All documents in groups of at most `_TOGETHER`."""
    order = _shuffled(documents, f"passages/{seed}/together")
    return [order[start : start + _TOGETHER] for start in range(0, len(order), _TOGETHER)]


def _shuffled(documents: Iterable[str], seed: str) -> list[str]:
    order = sorted(documents)
    random.Random(seed).shuffle(order)
    return order


def scored_rows(predictions: pd.DataFrame, seed: int, **facts) -> list[dict]:
    """Rows of one method's metrics."""
    scored = qa.score(predictions, "token_f1_squad")
    scored["recall"] = [
        scores.token_scores(prediction, answers, "squad").recall
        for prediction, answers in zip(scored["prediction"], scored["answers"], strict=True)
    ]
    tables = [qa.summarise_scores(scored, ["method"], metric, seed) for metric in _METRICS]
    return [row | facts for table in tables for row in table.to_dict("records")]


@dataclass(frozen=True)
class _Method:
    """How questions are asked.

    prompts: (a prompt for each question, costs), of the model, the questions and a seed.
    applied: {document: what is applied}, of {document: its adapter} and a seed.
    reads: with the reading LoRA, and no adapter of a document.
    published: with adapters of the published form, which another hypernetwork writes.
    """

    prompts: Callable[[DocToLoRA, pd.DataFrame, int], _Prompts] = _questions
    applied: Callable[[Mapping[str, Adapter], int], Mapping[str, Adapter]] = _nothing
    reads: bool = False
    published: bool = False


METHODS = {
    "question alone": _Method(),
    "passage in the prompt": _Method(_with_passages),
    READING: _Method(_with_passages, reads=True),
    "best of ten passages by BM25 in the prompt": _Method(_with_best),
    "best of ten passages by BM25, reading LoRA": _Method(_with_best, reads=True),
    "Doc-to-LoRA": _Method(applied=_own),
    SEEN: _Method(applied=_own),
    "Doc-to-LoRA and the passage in the prompt": _Method(_with_passages, _own),
    f"Doc-to-LoRA, {_TOGETHER} passages in one adapter": _Method(applied=_together),
    "another passage's adapter": _Method(applied=_others),
    PUBLISHED: _Method(applied=_own, published=True),
    f"{PUBLISHED}, another passage": _Method(applied=_others, published=True),
}
