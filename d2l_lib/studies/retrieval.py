"""Retrieval: the passages of a document that share words with the question go into the prompt with it.

    document -> passages (the chunks that an adapter has as blocks, or sentences) -> BM25 index
    question -> the best k passages, in order of the document -> prompt

BM25 is that of bm25s (Lù 2024, arXiv 2407.03618) as it comes: words in lower case, no English stop words, no stemming.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d2l_lib.documents import check_count, check_text, check_texts, chunk_document, split_sentences
from d2l_lib.model import DocToLoRA
from d2l_lib.tasks import qa

_UNITS = ("chunk", "sentence")


def passages_of(document: str, unit: str, tokenizer, chunk_tokens: int) -> list[str]:
    """The passages of a document in order, without the white space around them.

    unit: "chunk", those of `internalize`, or "sentence".
    chunk_tokens: the longest chunk; sentences have no limit.

    ValueError for another unit and for a document without text.
    """
    if unit == "chunk":
        return [chunk.text.strip() for chunk in chunk_document(document, tokenizer, chunk_tokens)]
    if unit != "sentence":
        raise ValueError(f"unit is {unit!r}; choose one of {', '.join(_UNITS)}")
    return [document[slice(*span)].strip() for span in split_sentences(check_text(document, "the document"))]


class PassageIndex:
    """A BM25 index of passages.

    passages: texts, in order.

    ValueError for no passages. ImportError without bm25s.
    """

    def __init__(self, passages: Sequence[str]):
        self.passages = check_texts(passages, "passages")
        if not self.passages:
            raise ValueError("no passages: an index needs at least one")
        words = self._words(self.passages)
        self._index = None  # for passages without a word
        if any(words):
            self._index = _bm25s().BM25()
            self._index.index(words, show_progress=False)

    @staticmethod
    def _words(texts: list[str]) -> list[list[str]]:
        return _bm25s().tokenize(texts, return_ids=False, show_progress=False)

    def scores(self, question: str) -> np.ndarray:
        """BM25 of every passage [n_passages]: 0 for one that shares no word with the question."""
        (words,) = self._words([check_text(question, "the question")])
        if self._index is None or not words:
            return np.zeros(len(self.passages), dtype=np.float32)
        return self._index.get_scores(words)

    def best(self, question: str, k: int) -> list[int]:
        """Places of the k passages with the highest score, best first; of equal ones the earlier comes first.

        There are fewer where fewer share a word with the question.
        """
        scores = self.scores(question)
        check_count(k, "k")
        return [int(place) for place in np.argsort(-scores, kind="stable")[:k] if scores[place] > 0]

    def excerpt(self, question: str, k: int) -> str:
        """The texts of `best` in the order of the document; "" if no passage shares a word with the question."""
        return " ".join(self.passages[place] for place in sorted(self.best(question, k)))

    @property
    def nbytes(self) -> int:
        """Bytes of the texts and of the index, which is three arrays and the words in it."""
        texts = sum(len(text.encode()) for text in self.passages)
        if self._index is None:
            return texts
        arrays = sum(value.nbytes for value in self._index.scores.values() if isinstance(value, np.ndarray))
        return texts + arrays + sum(len(word.encode()) for word in self._index.vocab_dict)


def _bm25s():
    try:
        import bm25s
    except ImportError as error:
        raise ImportError(
            "retrieval needs bm25s (the extra retrieval), which is not installed: pip install bm25s"
        ) from error
    return bm25s


@dataclass
class Retrieval:
    """The base model with the best `k` passages of the document in its prompt. A `baselines.Method`.

    A question that shares no word with the document goes into the prompt alone.

    unit: "chunk", the chunks that Doc-to-LoRA makes blocks of, or "sentence".
    """

    model: DocToLoRA
    k: int = 1
    unit: str = "chunk"
    name: str = ""
    max_new_tokens: int = 48

    def __post_init__(self):
        _bm25s()  # an error now, not in the middle of a comparison
        check_count(self.k, "k")
        self.name = self.name or f"BM25, best {self.unit if self.k == 1 else f'{self.k} {self.unit}s'}"

    def prepare(self, document: str, questions: Sequence[str]) -> PassageIndex:
        return self.index([document])

    def index(self, documents: Sequence[str]) -> PassageIndex:
        """The index of the passages of these documents, which follow each other."""
        model = self.model
        each = [passages_of(one, self.unit, model.encoder_tokenizer, model.chunk_tokens) for one in documents]
        return PassageIndex([passage for passages in each for passage in passages])

    def prompts(self, prepared: PassageIndex, questions: Sequence[str]) -> list[str]:
        """The user's turn for each question."""
        model, prompts = self.model, []
        for question in check_texts(questions, "questions"):
            excerpt = prepared.excerpt(question, self.k)
            fits = qa.with_document(excerpt, [question], model.tokenizer, model.window, self.max_new_tokens)
            prompts += fits if excerpt else [question]
        return prompts

    def answer(self, prepared: PassageIndex, questions: Sequence[str]) -> list[str]:
        return self.model.answer(self.prompts(prepared, questions), None, max_new_tokens=self.max_new_tokens)
