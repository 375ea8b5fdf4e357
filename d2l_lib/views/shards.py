"""Look at self-generated training data: each document, its questions, and the teacher's answers token by token.

    folder of parquet shards (see `training.selfgen`)  ->  ShardFile  ->  Sample  ->  page

A sample is one question on one document. Texts are decoded where a file lacks our text columns. Opening a file reads
its footer and its two lightest columns. A page reads the rows up to its own in one row group. A filter reads its
columns once. Every text from data is escaped; a page needs no JavaScript.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ipywidgets as W
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from d2l_lib.analysis.options import chosen
from d2l_lib.documents import context_ids, question_ids, split_sentences, stop_ids, tokenizer_fingerprint
from d2l_lib.formats import markup
from d2l_lib.formats.shards import ANSWERS_DROPPED, LISTS_DROPPED, MANIFEST, PUBLISHED, QUESTIONS_DROPPED, SCHEMA
from d2l_lib.records import read_json
from d2l_lib.tasks.scores import normalize_answer
from d2l_lib.views.page import (
    Pager,
    Report,
    Viewer,
    Work,
    listen,
    plural,
    quietly,
    render_message,
    render_view,
    visible,
    wrapped,
)
from d2l_lib.views.samples import ALL_KINDS, STATIC_ROWS, render_document, render_excerpt

_UNRELATED = ("encyclopedia", "unrelated")  # kinds that the teacher answered without the document
AGREEMENTS = ("agrees", "contains the reference", "differs", "no reference")
_ANY_AGREEMENT = "any agreement"
_LEVELS = ((0.99, "99 or more"), (0.9, "90 to 99"), (0.5, "50 to 90"), (0.1, "10 to 50"), (0.0, "below 10"))
TEXTS = ("document", "questions", "answers", "references", "kinds")  # a file counts as ours if it has all of them
_TEACHER = ("input_ids", "logprobs_vals", "logprobs_indices")
PAGE_ROWS, SCAN_ROWS = 32, 1024  # documents decoded at once
CSS = """
.d2l-view .d2l-facts th { width: 11em; }
.d2l-view .d2l-level0 { background: #f7fbff; color: #000; } .d2l-view .d2l-level1 { background: #c6dbef; color: #000; }
.d2l-view .d2l-level2 { background: #6baed6; color: #000; } .d2l-view .d2l-level3 { background: #2171b5; color: #fff; }
.d2l-view .d2l-level4 { background: #08306b; color: #fff; }
.d2l-view .d2l-swatch { border: 1px solid #8888; border-radius: 3px; padding: 0 5px; }
.d2l-view .d2l-strip { position: relative; padding: 4px 0 9.8em; }
.d2l-view .d2l-token { display: inline-block; vertical-align: top; margin: 0 2px 4px 0; padding: 0 1px; }
.d2l-view .d2l-token { cursor: pointer; border: 1px solid #8888; border-radius: 3px; text-align: center; }
.d2l-view .d2l-token:hover, .d2l-view .d2l-token:focus { outline: 2px solid #d95f0e; }
.d2l-view .d2l-piece { white-space: pre; font-size: 14px; }
.d2l-view .d2l-percent { display: block; font-size: 10px; line-height: 1.2; }
.d2l-view .d2l-panel { position: absolute; left: 0; right: 0; bottom: 0; height: 9em; overflow: auto; cursor: auto; }
.d2l-view .d2l-panel { border: 1px solid #8886; border-radius: 4px; padding: 3px 8px; text-align: left; }
.d2l-view .d2l-panel { background: var(--jp-layout-color1, #fff); box-sizing: border-box; font-size: 13px; }
.d2l-view .d2l-alternatives { display: none; z-index: 1; color: var(--jp-ui-font-color1, #000); }
.d2l-view .d2l-token:focus .d2l-alternatives { display: block; }
.d2l-view .d2l-token:hover .d2l-alternatives { display: block; z-index: 2; }
.d2l-view .d2l-choices { display: grid; grid-template-rows: repeat(4, auto); grid-auto-flow: column; column-gap: 12px; }
.d2l-view .d2l-choices { grid-auto-columns: minmax(9em, 1fr); white-space: pre; }
.d2l-view .d2l-choices code { background: #8883; border-radius: 3px; padding: 0 1px; }
"""


# --- what is in a file ------------------------------------------------------------------------------------------------


class Decoder:
    """From token ids to text. ValueError for a tokenizer without chat template, and for unknown ids."""

    def __init__(self, tokenizer):
        self.tokenizer, self.stops = tokenizer, stop_ids(tokenizer)
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._affixes = {}
        for wrap in (context_ids, question_ids):  # what two texts without a common token share
            a, b = wrap(tokenizer, ["one", "7"])
            before, after = os.path.commonprefix([a, b]), os.path.commonprefix([a[::-1], b[::-1]])[::-1]
            self._affixes[wrap] = before, after

    def decode(self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        """The text of each list of token ids."""
        size = len(self.tokenizer)
        if unknown := next((i for ids in sequences for i in ids if not 0 <= i < size), None):
            raise ValueError(f"token {unknown} is not in this tokenizer of {size:,}: give the base model's own")
        options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        return self.tokenizer.batch_decode(sequences, **options)

    def unwrap(self, wrapping: Callable, sequences: Sequence[Sequence[int]]) -> list[str]:
        """The texts inside the chat format of `context_ids` or `question_ids`, if it is the tokenizer's own."""
        before, after = self._affixes[wrapping]
        inner = []
        for ids in sequences:
            end = len(ids) - len(after)
            inner.append(ids[len(before) : end] if (ids[: len(before)], ids[end:]) == (before, after) else ids)
        return [text.strip() for text in self.decode(inner, skip_special_tokens=True)]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token within a text, its space included; "\ufffd" for part of a character."""
        first = len(self.decode([self._anchor])[0])
        return [text[first:] for text in self.decode([[*self._anchor, i] for i in ids])]


class Rows:
    """Some rows of a shard, one value per question. ValueError names file, column and row of a wrong count."""

    def __init__(self, file: str, first_row: int, batch: pa.RecordBatch, decoder: Decoder):
        self._file, self._first_row, self._batch, self._decoder = file, first_row, batch, decoder
        self.n_questions = _lengths(batch["response_start_end"])  # [rows]
        self._row_of = np.repeat(np.arange(len(self.n_questions)), self.n_questions)  # [questions]

    def _check(self, column: str, right: np.ndarray, rows: np.ndarray, what: str) -> None:
        if not right.all():
            row = self._first_row + rows[int(np.argmin(right))]
            raise ValueError(f"{self._file}, column {column}, row {row}: {what}")

    def _each(self, column: str) -> pa.Array:
        rows, lists = np.arange(len(self.n_questions)), self._batch[column]
        self._check(column, _lengths(lists) == self.n_questions, rows, "not one value for each question")
        return lists.flatten()

    def _spans(self) -> tuple[pa.Array, np.ndarray]:
        """(input_ids [questions][tokens], start and end of the answers within them [questions, 2])."""
        ids, pairs = self._each("input_ids"), self._each("response_start_end")
        self._check("response_start_end", _lengths(pairs) == 2, self._row_of, "an answer needs [start, end]")
        spans = pairs.flatten().to_numpy(zero_copy_only=False).reshape(-1, 2)
        inside = (spans[:, 0] >= 0) & (spans[:, 0] < spans[:, 1]) & (spans[:, 1] <= _lengths(ids))
        self._check("response_start_end", inside, self._row_of, "an answer is empty or lies outside input_ids")
        return ids, spans

    def document_tokens(self) -> np.ndarray:
        """Tokens of the document, chat format included [questions]."""
        return _lengths(self._batch["ctx_ids"])[self._row_of]

    def documents(self) -> list[str]:
        """The documents [rows]."""
        if "document" in self._batch.schema.names:
            return [text or "" for text in self._batch["document"].to_pylist()]
        return self._decoder.unwrap(context_ids, [ids or [] for ids in self._batch["ctx_ids"].to_pylist()])

    def questions_and_answers(self) -> tuple[list[str], list[str]]:
        """(questions [questions], the teacher's answers [questions])."""
        if "answers" in self._batch.schema.names:
            return [text or "" for text in self.stored("questions")], [text or "" for text in self.stored("answers")]
        ids, spans = self._spans()
        pairs = list(zip(ids.to_pylist(), spans.tolist(), strict=True))
        questions = self._decoder.unwrap(question_ids, [ids[:start] for ids, (start, _) in pairs])
        answers = self._decoder.decode([ids[start:end] for ids, (start, end) in pairs], skip_special_tokens=True)
        return questions, [answer.strip() for answer in answers]

    def stored(self, column: str) -> list[str | None]:
        """A text column [questions]; None for a missing text."""
        known = column in self._batch.schema.names
        return self._each(column).to_pylist() if known else [None] * len(self._row_of)

    def evidence(self) -> list[list[list[int]] | None]:
        """Character spans of each answer's evidence in its document [questions]; None if the file holds none."""
        rows = np.arange(len(self.n_questions))
        if "evidence" not in self._batch.schema.names:
            return [None] * len(self._row_of)
        lists = self._batch["evidence"]
        n = _lengths(lists)
        self._check("evidence", (n == self.n_questions) | (n == 0), rows, "not one value for each question")
        known = [of_row or [None] * n for of_row, n in zip(lists.to_pylist(), self.n_questions, strict=True)]
        spans = [of_question for of_row in known for of_question in of_row]
        lengths = [len(text) for text in self.documents()]
        right = [
            all(len(span or ()) == 2 and 0 <= span[0] < span[1] <= lengths[row] for span in of_question or ())
            for of_question, row in zip(spans, self._row_of, strict=True)
        ]
        self._check("evidence", np.array(right, dtype=bool), self._row_of, "a span is outside the document")
        return spans

    def agreements(self) -> np.ndarray:
        """One of AGREEMENTS [questions]."""
        return np.array([*map(agreement, self.stored("answers"), self.stored("references"))], dtype=object)

    def contain(self, needle: str) -> np.ndarray:
        """Whether document, question, answer or reference holds `needle`, in any case [questions]."""
        needle = needle.casefold()
        holds = np.array([needle in text.casefold() for text in self.documents()], dtype=bool)[self._row_of]
        for texts in (*self.questions_and_answers(), self.stored("references")):
            holds |= np.array([needle in (text or "").casefold() for text in texts], dtype=bool)
        return holds

    def teacher(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(number of answer tokens [questions], their ids [tokens], log-probabilities and their ids [tokens, k])."""
        ids, spans = self._spans()
        n = spans[:, 1] - spans[:, 0]
        tables = []
        for column in _TEACHER[1:]:
            lists = self._each(column)
            self._check(column, _lengths(lists) == n, self._row_of, "not one list for each answer token")
            lists = lists.flatten()
            k = max(1, int(_lengths(lists[:1]).sum()))
            right = _lengths(lists) == k
            self._check(column, right, np.repeat(self._row_of, n), "lists of different lengths, or empty")
            tables.append(lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, k))
        right = np.full(n.sum(), tables[0].shape == tables[1].shape)
        self._check("logprobs_indices", right, np.repeat(self._row_of, n), "not as long as logprobs_vals")
        begins = _starts(_lengths(ids)) + spans[:, 0] - _starts(n)
        chosen = ids.flatten().to_numpy(zero_copy_only=False)[np.repeat(begins, n) + np.arange(n.sum())]
        return n, chosen, tables[0].astype(np.float32), tables[1]

    def lowest(self) -> np.ndarray:
        """The lowest probability of the answer's tokens, 0 to 1 [questions]; see `probabilities`."""
        n, chosen, values, indices = self.teacher()
        return np.minimum.reduceat(probabilities(chosen, values, indices)[0], _starts(n)) if len(n) else np.zeros(0)


def _lengths(lists: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths) - lengths


def probabilities(chosen: np.ndarray, values: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(probability of each chosen token [tokens], its rank from 1 among the k alternatives [tokens]).

    values, indices: log-probabilities and their token ids [tokens, k].

    A token that is no alternative has rank 0 and the probability of the last alternative, an upper bound.
    """
    hit = indices == chosen[:, None]
    listed = hit.any(1)
    log_p = np.where(listed, np.where(hit, values, -np.inf).max(1), values.min(1))
    return np.exp(log_p), np.where(listed, hit.argmax(1) + 1, 0)


def agreement(answer: str | None, reference: str | None) -> str:
    """One of AGREEMENTS; case, punctuation and articles do not count (see `tasks.scores.normalize_answer`)."""
    if reference is None:
        return "no reference"
    answer, reference = normalize_answer(answer or ""), normalize_answer(reference)
    if answer == reference:
        return "agrees"
    return "contains the reference" if reference and f" {reference} " in f" {answer} " else "differs"


def matching_sentences(document: str, answer: str) -> list[tuple[int, int]]:
    """Character spans of the sentences that hold `answer`, else an item of its list, as whole words in any case.

    This compares text; it does not know what the answer rests on. Empty for "yes" and "no".
    """
    wanted, hits = answer.strip().rstrip("."), []
    for parts in ([wanted], re.split(r",\s*(?:and\s+)?|\s+and\s+", wanted)):
        words = [re.escape(part) for part in parts if part and part.casefold() not in ("yes", "no")]
        pattern = rf"(?<!\w)(?:{'|'.join(words)})(?!\w)"
        hits = hits or [match.span() for match in re.finditer(pattern, document, re.I) if words]
    sentences = [(start, start + len(document[start:end].rstrip())) for start, end in split_sentences(document)]
    return [(start, end) for start, end in sentences if any(a < end and b > start for a, b in hits)]


class AnswerToken(NamedTuple):
    """A token of an answer. At rank 0 it is no alternative, and its probability is an upper bound."""

    text: str
    probability: float  # 0 to 1
    rank: int
    alternatives: tuple[tuple[str, float], ...]  # (text, probability), most likely first


class Sample(NamedTuple):
    """One question on one document, ready to be shown. kind and reference: None if the file holds none."""

    document: str
    document_tokens: int
    question: str
    answer: str
    kind: str | None
    reference: str | None
    finished: bool  # the answer ends with a stop token
    tokens: tuple[AnswerToken, ...]
    spans: Sequence[Sequence[int]] | None = None  # of the evidence in the document, if the file holds them

    def evidence(self) -> tuple[list[tuple[int, int]], str]:
        """(character spans to mark in the document, their meaning in words)."""
        if self.kind in _UNRELATED:
            return [], "nothing is marked: the question is not about the document, and the teacher did not see it"
        if self.spans is not None:
            n = plural(len(self.spans), "sentence") if self.spans else "nothing"
            return [(start, end) for start, end in self.spans], f"marked: the evidence that is stored ({n})"
        whose, text = ("reference", self.reference) if self.reference is not None else ("teacher's", self.answer)
        spans = matching_sentences(self.document, text)
        n = plural(len(spans), "sentence") if spans else "nothing"
        return spans, f"marked by a search for the words of the {whose} answer (no evidence is stored): {n}"


# quantity: (columns, columns where texts are not stored, one value per question of some rows). Cheapest first.
_QUANTITIES: dict[str, tuple[Sequence[str], Sequence[str], Callable[[Rows, str], np.ndarray]]] = {
    "kind": (["kinds"], [], lambda rows, _: np.array(rows.stored("kinds"), dtype=object)),
    "agreement": (["questions", "answers", "references"], [], lambda rows, _: rows.agreements()),
    "document tokens": (["ctx_ids"], ["ctx_ids"], lambda rows, _: rows.document_tokens()),
    "text": (TEXTS[:4], ["ctx_ids", "input_ids"], lambda rows, needle: rows.contain(needle)),
    "probability": (_TEACHER, _TEACHER, lambda rows, _: rows.lowest()),
}


@dataclass(frozen=True)
class Filters:
    """Which samples to show; the defaults keep all.

    document_tokens: least and most.
    probability: least and most of the lowest of an answer's tokens.
    """

    text: str = ""
    kind: str = ALL_KINDS
    agreement: str = _ANY_AGREEMENT
    document_tokens: tuple[float, float] = (0, math.inf)
    probability: tuple[float, float] = (0, 1)

    def tests(self) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        """{quantity: test of its values} of the filters that are set, the cheapest first."""
        (fewest, most), (least, highest) = self.document_tokens, self.probability
        tests = {
            "kind": (self.kind != ALL_KINDS, lambda values: values == self.kind),
            "agreement": (self.agreement != _ANY_AGREEMENT, lambda values: values == self.agreement),
            "document tokens": ((fewest, most) != (0, math.inf), lambda n: (n >= fewest) & (n <= most)),
            "text": (bool(self.text), lambda values: values),
            "probability": ((least, highest) != (0, 1), lambda p: (p >= least) & (p <= highest)),
        }
        return {quantity: passes for quantity, (is_wanted, passes) in tests.items() if is_wanted}


class ShardFile:
    """The samples of one parquet file, read on demand.

    Attributes: `n_samples`, `n_documents`, `has_texts` (all of TEXTS), `kinds` (sorted; empty without stored texts).
    ValueError names a file that is unreadable or of another format.
    """

    def __init__(self, path: str | Path, decoder: Decoder):
        self.path, self._decoder = Path(path), decoder
        try:
            self._file = pq.ParquetFile(self.path, buffer_size=1 << 20)  # streams column chunks, whatever their size
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.path.name} is not a readable parquet file ({error})") from error
        names, metadata = self._file.schema_arrow.names, self._file.metadata
        if missing := [name for name in PUBLISHED if name not in names]:
            raise ValueError(f"{self.path.name} has no column {', '.join(missing)}; it has {', '.join(names)}")
        self.has_texts = {*TEXTS} <= {*names}
        self.n_groups, self.n_documents = metadata.num_row_groups, metadata.num_rows
        self._first_row = np.cumsum([0, *(metadata.row_group(group).num_rows for group in range(self.n_groups))])
        in_rows = [rows.n_questions for group in range(self.n_groups) for rows in self._read(group, ())]
        self._first_sample = np.concatenate([[0], *in_rows]).cumsum().astype(np.int64)  # of each row
        self.n_samples = int(self._first_sample[-1])
        self._known: dict[tuple[str, str, int], np.ndarray] = {}
        self._page: tuple[int, pa.RecordBatch] = (0, pa.RecordBatch.from_pylist([], SCHEMA))
        kinds = [self._values("kind", "", group) for group in range(self.n_groups)] if self.has_texts else []
        self.kinds = sorted({kind for values in kinds for kind in values} - {None})

    def _batches(self, group: int, names: Collection[str], size: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(number of the first row, rows) of a row group, in order: these columns, in the types of SCHEMA."""
        schema = pa.schema([SCHEMA.field(name) for name in SCHEMA.names if name in names])
        first = int(self._first_row[group])
        try:
            for batch in self._file.iter_batches(size, [group], schema.names):
                yield first, batch.select(schema.names).cast(schema)
                first += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            where = f"{self.path.name}, row group {group + 1} of {self.n_groups}, columns {', '.join(schema.names)}"
            raise ValueError(f"{where}: cannot be read ({error})") from error

    def _read(self, group: int, columns: Collection[str]) -> Iterator[Rows]:
        for first, batch in self._batches(group, {*columns, "response_start_end"}, SCAN_ROWS):
            yield Rows(self.path.name, first, batch, self._decoder)

    def cost(self, quantity: str) -> int:
        """Compressed bytes of the columns that a filter by `quantity` (of _QUANTITIES) reads."""
        needed = {*_QUANTITIES[quantity][0 if self.has_texts else 1], "response_start_end"}
        groups = map(self._file.metadata.row_group, range(self.n_groups))
        chunks = (group.column(number) for group in groups for number in range(group.num_columns))
        return sum(c.total_compressed_size for c in chunks if c.path_in_schema.split(".")[0] in needed)

    def _values(
        self, quantity: str, argument: str, group: int, report: Callable[[int], None] = lambda n_rows: None
    ) -> np.ndarray:
        """One value per sample of a row group, kept for later. report(n_rows) counts newly read rows."""
        key = (quantity, argument, group)
        if key not in self._known:
            ours, published, compute = _QUANTITIES[quantity]
            values = []
            for rows in self._read(group, ours if self.has_texts else published):
                values.append(compute(rows, argument))
                report(len(rows.n_questions))
            self._known[key] = np.concatenate(values or [[]])
        return self._known[key]

    def find(
        self, tell: Callable[[str, int], None] | None = None, report: Report | None = None, **filters: Any
    ) -> np.ndarray:
        """Numbers of the samples that pass all of these `Filters` [matches], in order.

        tell: called as tell(quantity, row group) before a row group is read.
        report: called as report(done, total) meanwhile, in rows.

        A filter reads a row group once, and only if cheaper filters leave a sample of it. ValueError names what is
        damaged or ragged.
        """
        wanted = chosen(Filters, "a search", filters)
        tests = wanted.tests()
        matches = [np.zeros(0, dtype=np.int64)]
        done, total = 0, self.n_documents * max(1, len(tests))

        def count(n_rows: int) -> None:
            nonlocal done
            done += n_rows
            if report:
                report(min(done, total), total)

        for group in range(self.n_groups):
            first, last = self._first_sample[self._first_row[group : group + 2]]
            kept = np.ones(last - first, dtype=bool)
            for quantity, passes in tests.items():
                if kept.any():
                    argument = wanted.text if quantity == "text" else ""
                    if tell and (quantity, argument, group) not in self._known:
                        tell(quantity, group)
                    kept &= passes(self._values(quantity, argument, group, count))
            matches.append(first + np.flatnonzero(kept))
        return np.concatenate(matches)

    def sample(self, number: int) -> Sample:
        """Sample `number` (from 0). ValueError if its row is damaged or ragged, or made with another tokenizer."""
        row = int(np.searchsorted(self._first_sample, number, side="right")) - 1
        first, batch = self._page
        if not first <= row < first + batch.num_rows:
            group = int(np.searchsorted(self._first_row, row, side="right")) - 1
            for first, batch in self._batches(group, SCHEMA.names if self.has_texts else PUBLISHED, PAGE_ROWS):
                if row < first + batch.num_rows:
                    break
            self._page = first, batch
        rows = Rows(self.path.name, row, batch.slice(row - first, 1), self._decoder)
        question = number - int(self._first_sample[row])
        n, chosen, values, indices = rows.teacher()
        own = slice(n[:question].sum(), n[: question + 1].sum())
        chosen, values, indices = chosen[own], values[own], indices[own]
        pieces = self._decoder.pieces
        others = [
            tuple(zip(pieces(ids), row, strict=True))
            for ids, row in zip(indices.tolist(), np.exp(values).tolist(), strict=True)
        ]
        p, ranks = (numbers.tolist() for numbers in probabilities(chosen, values, indices))
        questions, answers = rows.questions_and_answers()
        return Sample(
            document=rows.documents()[0],
            document_tokens=int(rows.document_tokens()[question]),
            question=questions[question],
            answer=answers[question],
            kind=rows.stored("kinds")[question],
            reference=rows.stored("references")[question],
            finished=chosen[-1] in self._decoder.stops,
            tokens=tuple(map(AnswerToken, pieces(chosen.tolist()), p, ranks, others)),
            spans=rows.evidence()[question],
        )


# --- pages ------------------------------------------------------------------------------------------------------------


def _percent(probability: float, digits: int = 0) -> str:
    if math.isnan(probability):
        return "?"
    smallest = 10.0**-digits
    return f"<{smallest:g}" if 100 * probability < smallest / 2 else f"{100 * probability:.{digits}f}"


def _lowest(sample: Sample) -> str:
    return f"{_percent(min(token.probability for token in sample.tokens), 1)} %"


def _visible(text: str) -> str:
    """Text of a token as HTML: line ends, tabs and the empty text become signs."""
    return markup.inline(visible(text) or "∅")


def render_token(token: AnswerToken, number: int) -> str:
    """A token coloured by its probability, which stands below in %; hover and focus open its alternatives."""
    k = len(token.alternatives)
    rank = f"rank {token.rank} of {k}" if token.rank else f"at most: it is not among the {k} most likely"
    title = markup.escape(f"token {number}: {_percent(token.probability, 1)} %, {rank}")
    level = next((level for level, (least, _) in enumerate(_LEVELS) if token.probability >= least), len(_LEVELS) - 1)
    choices = [
        f"<span>{'▸' if place == token.rank else ' '}{place:2d} <code>{_visible(text)}</code> "
        f"{markup.escape(_percent(p, 1))}</span>"
        for place, (text, p) in enumerate(token.alternatives, 1)
    ]
    percent = markup.escape(("" if token.rank else "≤") + _percent(token.probability))
    return (
        f'<span class="d2l-token d2l-level{level}" tabindex="0" title="{title}">'
        f'<span class="d2l-piece">{_visible(token.text)}</span><span class="d2l-percent">{percent}</span>'
        f'<span class="d2l-panel d2l-alternatives"><b>{title}</b><span class="d2l-choices">{"".join(choices)}</span>'
        f"</span></span>{'<br>' if token.text.endswith(chr(10)) else ''}"
    )


def render_shard_sample(sample: Sample, position: int, n_matches: int, n_samples: int, file: str, dropped: str) -> str:
    """One sample as a page: question, answers, the answer token by token, the document.

    position: from 0, within the n_matches of n_samples that pass the filters.
    dropped: see `_describe_dropped`.
    """
    spans, marked = sample.evidence()
    text = render_document(sample.document, [start for start, _ in spans], [end for _, end in spans])
    verdict, kind = agreement(sample.answer, sample.reference), sample.kind or "kind not stored"
    where = f"sample {position + 1:,} of {n_matches:,} ({n_samples:,} in all)"
    names = f"{markup.inline(file)} · {markup.inline(kind)}"
    note = f"{where} · {names} · document of {sample.document_tokens:,} tokens"
    facts = (
        ("Question", "question", sample.question),
        ("Teacher's answer", "answer", sample.answer),
        ("Reference answer", "reference", "not stored in this file" if sample.reference is None else sample.reference),
        ("Agreement", "agreement", verdict),
    )
    rows = [
        f'<tr><th>{name}</th><td class="d2l-text d2l-{css}">{markup.escape(text)}</td></tr>'
        for name, css, text in facts
    ]
    legend = [f'<span class="d2l-swatch d2l-level{level}">{text}</span>' for level, (_, text) in enumerate(_LEVELS)]
    tokens = [render_token(token, number) for number, token in enumerate(sample.tokens, 1)]
    hint = "Point at a token, click it, or reach it with Tab: what else the teacher could have said stands here, in %."
    ended = "" if sample.finished else "; cut off: no stop token at its end"
    body = (
        f'<div class="d2l-note">{note}</div><table class="d2l-facts">{"".join(rows)}</table>'
        f"<h4>Answer, token by token (lowest probability {markup.escape(_lowest(sample))}{ended})</h4>"
        f'<div class="d2l-note">below each token its probability in %: {" ".join(legend)}</div>'
        f'<div class="d2l-strip">{"".join(tokens)}<div class="d2l-panel d2l-note">{hint}</div></div>'
        f'<h4>Document</h4><div class="d2l-note d2l-marked">{markup.escape(marked)}</div>'
        f'<div class="d2l-text d2l-document" tabindex="0">{text}</div>'
        f'<div class="d2l-note d2l-dropped">{markup.escape(dropped)}</div>'
    )
    data = {"matches": n_matches, "samples": n_samples, "file": file, "kind": kind, "agreement": verdict}
    return f"<style>{CSS}</style>{render_view('shard', body, position=position, **data)}"


def _render_shard_table(samples: Sequence[Sample | str], n_samples: int, file: str) -> str:
    """The first samples of a file as a plain table. A text in place of a sample is the reason for its absence."""
    names = ("kind", "question", "teacher's answer", "lowest probability", "reference", "document (evidence marked)")
    rows = []
    for sample in samples:
        if isinstance(sample, str):
            rows.append(f'<td colspan="{len(names)}" class="d2l-error">{markup.escape(sample)}</td>')
            continue
        spans, _ = sample.evidence()
        reference = f"{markup.inline(sample.reference or '')} ({agreement(sample.answer, sample.reference)})"
        excerpt = render_excerpt(sample.document, spans)
        texts = (sample.kind or "", sample.question, sample.answer, _lowest(sample))
        rows.append("".join(f"<td>{cell}</td>" for cell in [*map(markup.escape, texts), reference, excerpt]))
    head = "".join(f"<th>{name}</th>" for name in names)
    note = f'<div class="d2l-note">the first {len(rows)} of {n_samples:,} samples of {markup.inline(file)}</div>'
    body = f"{note}<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
    return render_view("shard-table", body, rows=len(rows), samples=n_samples)


def _describe_dropped(path: Path, manifest: dict[str, Any]) -> str:
    """What the making of the shard `path` left out and why, in words, from the record beside it or the manifest."""
    shards = manifest.get("shards")
    records = [_read_dict(path.with_suffix(".json")), *(shards if isinstance(shards, list) else [])]
    named = [record for record in records if isinstance(record, dict) and record.get("file") == path.name]
    counts = named[0].get("counts") if named else None
    if not isinstance(counts, dict):
        return "What was left out is not recorded for this file."
    settings = manifest.get("settings")
    limit = settings.get("max_new_tokens", "?") if isinstance(settings, dict) else "?"
    reasons = {
        "unfinished": f"answers without a stop token within {limit} tokens",
        "too_long": "prompts too long for the teacher's window",
        "documents_dropped": "documents without any answer left",
        "writer_too_long": "documents too long for the writer of questions",
    }
    in_words = {reason: reason.replace("_", " ") for reason in (*LISTS_DROPPED, *QUESTIONS_DROPPED, *ANSWERS_DROPPED)}
    lists = settings.get("writer_style", "lists") == "lists" if isinstance(settings, dict) else True
    whose = "items of the writer's lists" if lists else "written questions"
    reasons |= {f"writer_{reason}": f"{whose}: {in_words[reason]}" for reason in (*LISTS_DROPPED, *QUESTIONS_DROPPED)}
    reasons |= {f"answer_{reason}": f"answers: {in_words[reason]}" for reason in ANSWERS_DROPPED}
    left_out = [f"{reason} ({counts[name]})" for name, reason in reasons.items() if counts.get(name)]
    total = f"{markup.isolated(path.name)}: {counts.get('kept', '?')} of {counts.get('questions', '?')} questions kept"
    return f"{total}; left out: {'; '.join(left_out) or 'nothing'}."


def _read_dict(path: Path) -> dict[str, Any]:
    """A JSON object, empty if none can be read."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


# --- the viewer -------------------------------------------------------------------------------------------------------


class _ShardViewer(Viewer):
    """The page of `view_shards`. Files are read by one job after another (see `page.Work`)."""

    def __init__(self, folder: str | Path, tokenizer, background: bool | None = None):
        self._decoder = Decoder(tokenizer)
        super().__init__([], "")
        self._file: ShardFile | None = None
        self._manifest: dict[str, Any] = {}
        self._matches = np.zeros(0, dtype=np.int64)
        self.work = Work(background)
        self._make_controls(str(folder))
        self._open()
        table = ""
        if self._file:
            table = _render_shard_table(list(self._first_samples()), self._file.n_samples, self._file.path.name)
        self.static_html = self._about.value + table + (self._page.value or self.work.status.value)

    def _make_controls(self, folder: str) -> None:
        late, narrow = {"continuous_update": False}, {"layout": W.Layout(width="190px"), "placeholder": "any"}
        wide = W.Layout(width="600px", max_width="100%")
        self._where = W.Text(description="Folder", value=folder, layout=wide, **late)
        self._name = W.Dropdown(description="File")
        self._search = W.Text(description="Search", placeholder="text, then Enter", **late)
        self._kind = W.Dropdown(description="Kind", options=[ALL_KINDS])
        self._agrees = W.Dropdown(description="Teacher", options=[_ANY_AGREEMENT, *AGREEMENTS])
        self._shortest, self._longest = (
            W.Text(description=f"Tokens {end}", **late, **narrow) for end in ("from", "to")
        )
        self._lowest = W.IntRangeSlider(description="Lowest p, %", value=(0, 100), min=0, max=100, **late)
        clear = W.Button(description="Clear filters", icon="times", tooltip="all samples again")
        self._about, self._page = W.HTML(), W.HTML()
        self._pager = Pager("sample", 0, self._show, self.work)
        filters = (self._search, self._kind, self._agrees, self._shortest, self._longest, self._lowest)
        for control in filters:
            listen(control, self._select)
        listen(self._where, lambda _: self._open())
        listen(self._name, lambda change: self._open(change["new"]))
        clear.on_click(self._reset)
        self.children = [
            wrapped([self._where, self._name]),
            self._about,
            wrapped(filters),
            wrapped([clear, *self._pager.controls]),
            self.work.status,
            self.work.bar,
            self._page,
        ]

    # --- opening --------------------------------------------------------------------------------------------------

    def _open(self, name: str | None = None) -> None:
        """Open a file of the folder; None: the first readable one."""
        folder = Path(self._where.value)
        with self.work.lock:
            self._close()
            if name is None:
                with quietly():
                    self._name.options = ()
            self.work.leave_out(lambda key: key in ("scan", "show"))
            self.work.start(
                "opening ...",
                lambda report: self._read(folder, name, report),
                lambda result: self._opened(folder, *result),
                lambda reason: self._close(),
                key="open",
                replaces=True,
                ready="",
                unit="files",
            )

    def _read(self, folder: Path, name: str | None, report: Report) -> tuple:
        """(manifest, names of the files, name of the open file, the open file, unreadable files)."""
        manifest, names, unreadable = _read_dict(folder / MANIFEST), [*self._name.options], []
        if name is not None:
            return manifest, names, name, ShardFile(folder / name, self._decoder), unreadable
        names = sorted(path.name for path in folder.glob("*.parquet"))
        if not names:
            reason = "is a file: give its folder" if folder.is_file() else "holds no .parquet files"
            raise ValueError(f"{folder} {reason if folder.exists() else 'does not exist'}")
        for number, candidate in enumerate(names):
            report(number, len(names))
            try:
                return manifest, names, candidate, ShardFile(folder / candidate, self._decoder), unreadable
            except ValueError as error:
                unreadable.append(f"{type(error).__name__}: {error}")
        return manifest, names, names[-1], None, unreadable

    def _opened(
        self, folder: Path, manifest: dict, names: list[str], name: str, file: ShardFile | None, unreadable: list[str]
    ) -> None:
        self._manifest, self._file = manifest, file
        with quietly():
            self._name.options = names
            self._name.value = name
            self._kind.options = [ALL_KINDS, *(file.kinds if file else [])]
        self._about.value = "".join(render_message(message, is_error=True) for message in unreadable)
        if file is None:
            self._close(keep_about=True)
            return
        self._kind.disabled = self._agrees.disabled = not file.has_texts
        self._about.value += _describe(file, manifest, self._decoder.tokenizer)
        self._reset()

    def _close(self, keep_about: bool = False) -> None:
        self._file = None
        self._no_matches()
        self.work.tell("", key="scan")
        if not keep_about:
            self._about.value = ""

    # --- filters and samples --------------------------------------------------------------------------------------

    def _no_matches(self) -> None:
        self._matches, self._page.value = np.zeros(0, dtype=np.int64), ""
        self._pager.restart(0)

    def _reset(self, _: Any = None) -> None:
        with quietly():
            self._search.value = self._shortest.value = self._longest.value = ""
            self._kind.value, self._agrees.value, self._lowest.value = ALL_KINDS, _ANY_AGREEMENT, (0, 100)
        self._select()

    def _select(self, _: Any = None) -> None:
        with self.work.lock:
            file = self._file
            if file is None:
                return
            self._no_matches()
            self.work.leave_out(lambda key: key == "show")
            self.work.start(
                "filtering ...",
                lambda report: self._scan(file, report),
                self._show_matches,
                lambda reason: self._no_matches(),
                key="scan",
                replaces=True,
                ready="",
                unit="rows",
            )

    def _scan(self, file: ShardFile, report: Report) -> tuple[np.ndarray, str]:
        """(numbers of the samples that pass the filters, what was found and read in words)."""
        scanned: list[str] = []
        matches = file.find(
            text=self._search.value,
            kind=self._kind.value,
            agreement=self._agrees.value,
            document_tokens=(_whole(self._shortest, 0), _whole(self._longest, math.inf)),
            probability=(self._lowest.value[0] / 100, self._lowest.value[1] / 100),
            tell=lambda quantity, group: scanned.append(quantity),
            report=report,
        )
        times = [f"{what} in {n} of {file.n_groups} row groups" for what, n in Counter(scanned).items()]
        read = f" (scanned once for this: {', '.join(times)})" if times else ""
        return matches, f"{len(matches):,} of {file.n_samples:,} samples match{read}"

    def _show_matches(self, matches: tuple[np.ndarray, str]) -> None:
        self._matches, text = matches
        self.work.tell(text, key="scan")
        self._pager.restart(len(self._matches))
        self._show()

    def _show(self) -> None:
        with self.work.lock:
            file, place, matches = self._file, self._pager.place, self._matches
            if file is None:
                return
            if not len(matches):
                nothing = {"position": -1, "matches": 0, "samples": file.n_samples}
                self._page.value = render_view("shard", "No sample matches.", **nothing)
                return
            self.work.start(
                "",
                lambda report: self._render(file, place, matches),
                self._turn_to,
                lambda reason: self._turn_to(""),
                key="show",
                replaces=True,
                ready="",
            )

    def _render(self, file: ShardFile, place: int, matches: np.ndarray) -> str:
        sample, dropped = file.sample(int(matches[place])), _describe_dropped(file.path, self._manifest)
        return render_shard_sample(sample, place, len(matches), file.n_samples, file.path.name, dropped)

    def _turn_to(self, page: str) -> None:
        self._page.value = page

    def _first_samples(self) -> Iterator[Sample | str]:
        for number in range(min(STATIC_ROWS, self._file.n_samples)):
            try:
                yield self._file.sample(number)
            except ValueError as error:
                yield str(error)


def view_shards(folder: str | Path, tokenizer) -> Viewer:
    """A viewer for the self-generated data in `folder`, of ours or with the published columns only.

    tokenizer: of the base model that made the data. ValueError if it has no chat template.

    The page tells of a folder, file, filter or sample that cannot be used; everything else stays usable. Keys: Tab
    moves between controls and answer tokens, Enter applies a field, the arrow keys move sliders, space presses a
    button.
    """
    return _ShardViewer(folder, tokenizer)


def _whole(control: W.Text, default: float) -> float:
    text = control.value.strip()
    if text and not text.isdecimal():
        raise ValueError(f"{control.description}: {text!r} is not a whole number of tokens (empty means any)")
    return int(text) if text else default


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:,.0f} kB"


def _describe(file: ShardFile, manifest: dict[str, Any], tokenizer) -> str:
    """The facts of a file that a person should know first, as HTML."""
    filters = [name for name in _QUANTITIES if name != "kind" and _QUANTITIES[name][not file.has_texts]]
    costs = ", ".join(f"{name} {_size(file.cost(name))}" for name in filters)
    facts = (
        f"{markup.isolated(file.path.name)}: {file.n_samples:,} samples on {file.n_documents:,} documents, "
        f"{_size(file.path.stat().st_size)}. The first use of a filter scans it, reading: {costs}."
    )
    if not file.has_texts:
        facts += " It stores no texts, kinds and references: texts are decoded, all of them for a search."
    warnings = []
    if manifest and not manifest.get("complete"):
        warnings.append(f"The folder is unfinished: not all of its {manifest.get('n_shards', '?')} shards are there.")
    teacher = manifest.get("teacher")
    made_with = teacher.get("tokenizer_sha256") if isinstance(teacher, dict) else None
    if made_with is not None and made_with != tokenizer_fingerprint(tokenizer):
        warnings.append("The data were made with another tokenizer than the one given: tokens may show wrong texts.")
    return render_message(facts) + "".join(render_message(warning, is_error=True) for warning in warnings)
