"""Methods of answering questions about a document, and their comparison with Doc-to-LoRA.

    prepare(document, questions) -> whatever the method needs to answer, once per document
    answer(prepared, questions)  -> one text per question

Only `ContextDistillation(queries="oracle")` (see `training.context_distillation`) reads the questions in `prepare`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd
import torch
from torch import nn

from d2l_lib.adapter import Adapter
from d2l_lib.documents import check_texts, open_turn
from d2l_lib.lora import without_lora
from d2l_lib.model import DocToLoRA
from d2l_lib.studies.watches import peak_memory_mib, reset_peak_memory
from d2l_lib.tasks import qa


class Method(Protocol):
    """A method of answering questions about a document; `name` is unique within a comparison."""

    name: str

    def prepare(self, document: str, questions: Sequence[str]) -> Any:
        """What `answer` needs, once per document."""

    def answer(self, prepared: Any, questions: Sequence[str]) -> list[str]:
        """One answer to each question, in order."""


# ----------------------------------------------------------------------------------------------- adapters and prompts
@dataclass
class Internalized:
    """Doc-to-LoRA: the document becomes an adapter, the prompt holds the question.

    iterative: write blocks layer by layer: less memory, same numbers.
    with_context: put the document into the prompt too.
    blocks: how many blocks answer a question, the most relevant (None: all).
    read: how they are read, as `DocToLoRA.answer` takes it (None: blocks as their sum, token rows by attention).
    """

    model: DocToLoRA
    name: str = "Doc-to-LoRA"
    blocks: int | None = None
    chunk_tokens: int | None = None
    iterative: bool = False
    with_context: bool = False
    max_new_tokens: int = 48
    read: str | None = None

    def prepare(self, document: str, questions: Sequence[str]) -> tuple[Adapter, str | None]:
        before = self.model.iterative
        self.model.iterative = self.iterative
        try:
            (adapter,) = self.model.internalize_each([document], chunk_tokens=self.chunk_tokens)
        finally:
            self.model.iterative = before
        return adapter, document if self.with_context else None

    def answer(self, prepared: tuple[Adapter, str | None], questions: Sequence[str]) -> list[str]:
        adapter, document = prepared
        questions = check_texts(questions, "questions")
        if self.with_context:
            model = self.model
            questions = qa.with_document(document, questions, model.tokenizer, model.window, self.max_new_tokens)
        options = {"max_new_tokens": self.max_new_tokens, "blocks": self.blocks, "read": self.read}
        return self.model.answer(questions, adapter, **options)


@dataclass
class InContext:
    """The base model with the document in its prompt; its middle is cut to fit the window, or `tokens`."""

    model: DocToLoRA
    name: str = "in context"
    tokens: int | None = None
    max_new_tokens: int = 48

    def prepare(self, document: str, questions: Sequence[str]) -> str:
        return document

    def answer(self, prepared: str, questions: Sequence[str]) -> list[str]:
        window = self.model.window if self.tokens is None else min(self.model.window, self.tokens)
        prompts = qa.with_document(prepared, questions, self.model.tokenizer, window, self.max_new_tokens)
        return self.model.answer(prompts, None, max_new_tokens=self.max_new_tokens)


@dataclass
class NoContext:
    """The base model alone."""

    model: DocToLoRA
    name: str = "no context"
    max_new_tokens: int = 48

    def prepare(self, document: str, questions: Sequence[str]) -> None:
        return None

    def answer(self, prepared: None, questions: Sequence[str]) -> list[str]:
        return self.model.answer(check_texts(questions, "questions"), None, max_new_tokens=self.max_new_tokens)


# ------------------------------------------------------------------------------------------------- prompt compression
@dataclass
class PromptCompression:
    """The base model with the share `rate` of the document's tokens in its prompt: the most informative ones.

    With `use_llmlingua` LLMLingua-2 chooses them (None: if the package llmlingua is installed). Otherwise a token's
    information is -log p(token | the document before it) by the base model itself, as in Selective Context (Li et al.
    2023, arXiv 2310.06201). Documents beyond the window are scored window by window.
    """

    model: DocToLoRA
    rate: float
    name: str = ""
    use_llmlingua: bool | None = None
    llmlingua_model: str = "microsoft/llmlingua-2-xlm-roberta-large-meetingbank"
    max_new_tokens: int = 48

    def __post_init__(self):
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate is the share of tokens to keep, more than 0 and at most 1, not {self.rate}")
        self._compressor = None
        if self.use_llmlingua is not False:
            try:
                from llmlingua import PromptCompressor
            except ImportError as error:
                if self.use_llmlingua:
                    raise ImportError(
                        "LLMLingua-2 needs the package llmlingua (pip install llmlingua); use_llmlingua=False "
                        "compresses with the base model's own token information"
                    ) from error
            else:
                self._compressor = PromptCompressor(self.llmlingua_model, str(self.model.device), use_llmlingua2=True)
        kind = "token information" if self._compressor is None else "LLMLingua-2"
        self.name = self.name or f"compressed to {self.rate:.0%} ({kind})"

    def prepare(self, document: str, questions: Sequence[str]) -> str:
        if self._compressor is not None:
            return self._compressor.compress_prompt(document, rate=self.rate)["compressed_prompt"]
        ids = self.model.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        information = token_information(self.model, ids)
        n = max(1, round(self.rate * len(ids)))
        kept = sorted(sorted(range(len(ids)), key=lambda i: -information[i])[:n])
        return self.model.tokenizer.decode([ids[i] for i in kept]).strip()

    def answer(self, prepared: str, questions: Sequence[str]) -> list[str]:
        model = self.model
        prompts = qa.with_document(prepared, questions, model.tokenizer, model.window, self.max_new_tokens)
        return self.model.answer(prompts, None, max_new_tokens=self.max_new_tokens)


@torch.no_grad()
def token_information(model: DocToLoRA, ids: Sequence[int]) -> list[float]:
    """-log p of each token in nats, given those before it in the user's turn; windows overlap by half."""
    prefix = open_turn(model.tokenizer, "")
    room = model.window - len(prefix)
    values: list[float] = []
    start = 0
    while len(values) < len(ids):
        piece = list(ids[start : start + room])
        with without_lora(model.base_model):
            logits = model.base_model(torch.tensor([prefix + piece], device=model.device), use_cache=False).logits[0]
        targets = torch.tensor(piece, device=logits.device)
        steps = logits[len(prefix) - 1 : -1].float()
        surprise = nn.functional.cross_entropy(steps, targets, reduction="none").tolist()
        values += surprise[len(values) - start :]
        start += room // 2
    return values


# ---------------------------------------------------------------------------------------------------------- comparison
def compare(methods: Iterable[Method], questions: pd.DataFrame, report: bool = False) -> pd.DataFrame:
    """Every method on every question, document by document: the rows of `questions` once per method, in order.

    questions: a table of `qa.load_qa`.
    report: print a line per method.

    New columns: method, prediction, seconds_prepare and seconds_answer (of the question's document, all its questions
    together; without a GPU the processor's seconds, so that other programs do not count), peak_memory_mib (the most
    that the process, or the GPU, held during that document), bytes_kept (`kept_bytes` of what `prepare` returned).
    ValueError for methods of the same name.
    """
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    methods, questions = list(methods), questions.reset_index(drop=True)
    names = [method.name for method in methods]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"several methods are called {', '.join(sorted(twice))}: give each a name of its own")
    documents = qa.group_by_document(questions)
    tables = []
    for method in methods:
        added, seconds = [], 0.0
        for document, rows in documents:
            texts = list(rows["question"])
            gc.collect()
            reset_peak_memory()
            began = clock()
            prepared = method.prepare(document, texts)
            between = clock()
            predictions = method.answer(prepared, texts)
            costs_of = {"seconds_prepare": between - began, "seconds_answer": clock() - between}
            costs_of |= {"peak_memory_mib": peak_memory_mib(), "bytes_kept": kept_bytes(prepared)}
            added.append(pd.DataFrame({"prediction": predictions}, index=rows.index).assign(**costs_of))
            seconds += len(rows) * costs_of["seconds_prepare"]
        tables.append(questions.assign(method=method.name).join(pd.concat(added)))
        if report:
            per_document = seconds / max(1, len(questions))
            print(f"{method.name}: {len(questions)} questions, {per_document:.3f} s to prepare a document", flush=True)
    return pd.concat(tables, ignore_index=True)


def kept_bytes(prepared: Any) -> int:
    """Bytes of a text, an adapter, an index, or several of them."""
    if isinstance(prepared, tuple):
        return sum(kept_bytes(part) for part in prepared)
    return len(prepared.encode()) if isinstance(prepared, str) else getattr(prepared, "nbytes", 0)


def costs(compared: pd.DataFrame, by: Sequence[str] = ("method",)) -> pd.DataFrame:
    """Per group: documents; means of seconds_prepare, seconds_answer and bytes_kept; the largest peak_memory_mib."""
    of_document = compared.drop_duplicates(["method", "dataset", "document"])
    return (
        of_document.groupby(check_texts(by, "columns"), sort=False)
        .agg(
            documents=("document", "size"),
            seconds_prepare=("seconds_prepare", "mean"),
            seconds_answer=("seconds_answer", "mean"),
            bytes_kept=("bytes_kept", "mean"),
            peak_memory_mib=("peak_memory_mib", "max"),
        )
        .reset_index()
    )
