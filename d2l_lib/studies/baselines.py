"""What Doc-to-LoRA is compared with: ways of answering questions about a document.

    prepare(document, questions) -> whatever it needs to answer, once per document
    answer(prepared, questions)  -> one text per question

Only `ContextDistillation(queries="oracle")` looks at the questions while it prepares. `compare` runs methods over a
table of questions (`qa.load_qa`) and says for each question what was answered, in how many seconds, with how much
memory.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd
import torch
from torch import Tensor, nn

from d2l_lib.adapter import Adapter, Block
from d2l_lib.base_model import module_sizes
from d2l_lib.documents import check_texts, open_turn, question_ids
from d2l_lib.engine import Reply, TransformersEngine
from d2l_lib.lora import apply_lora, without_lora
from d2l_lib.model import DocToLoRA
from d2l_lib.studies import memory
from d2l_lib.tasks import qa
from d2l_lib.training.batches import IGNORED
from d2l_lib.training.losses import context_average, distillation
from d2l_lib.training.selfgen import WRITER_PROMPTS, parse_questions
from d2l_lib.training.step import answer_logits


class Method(Protocol):
    """A way of answering questions about a document; `name` is unique within a comparison."""

    name: str

    def prepare(self, document: str, questions: Sequence[str]) -> Any:
        """What has to be done once per document."""

    def answer(self, prepared: Any, questions: Sequence[str]) -> list[str]:
        """One answer to each question, in order."""


# ----------------------------------------------------------------------------------------------- adapters and prompts
@dataclass
class Internalized:
    """Doc-to-LoRA: the document becomes an adapter, the prompt holds the question.

    `iterative`: blocks are written layer by layer, which takes less memory and gives the same numbers. `with_context`:
    the document is in the prompt too. `blocks`: how many blocks answer a question, the most relevant (None: all).
    """

    model: DocToLoRA
    name: str = "Doc-to-LoRA"
    blocks: int | None = None
    chunk_tokens: int | None = None
    iterative: bool = False
    with_context: bool = False
    max_new_tokens: int = 48

    def prepare(self, document: str, questions: Sequence[str]) -> tuple[Adapter, str]:
        before = self.model.iterative
        self.model.iterative = self.iterative
        try:
            (adapter,) = self.model.internalize_each([document], chunk_tokens=self.chunk_tokens)
        finally:
            self.model.iterative = before
        return adapter, document

    def answer(self, prepared: tuple[Adapter, str], questions: Sequence[str]) -> list[str]:
        adapter, document = prepared
        questions = check_texts(questions, "questions")
        if self.with_context:
            questions = _with_document(self.model, document, questions, self.max_new_tokens)
        return self.model.answer(questions, adapter, max_new_tokens=self.max_new_tokens, blocks=self.blocks)


@dataclass
class InContext:
    """The base model with the document in its prompt, its middle cut out where the window asks for it, or `tokens`: of
    the whole prompt and the answer.
    """

    model: DocToLoRA
    name: str = "in context"
    tokens: int | None = None
    max_new_tokens: int = 48

    def prepare(self, document: str, questions: Sequence[str]) -> str:
        return document

    def answer(self, prepared: str, questions: Sequence[str]) -> list[str]:
        prompts = _with_document(self.model, prepared, questions, self.max_new_tokens, self.tokens)
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


def _with_document(
    model: DocToLoRA, document: str, questions: Sequence[str], max_new_tokens: int, tokens: int | None = None
) -> list[str]:
    window = model.window if tokens is None else min(model.window, tokens)
    return [
        qa.PROMPT.format(
            document=qa.truncate_document(document, question, model.tokenizer, window, max_new_tokens),
            question=question,
        )
        for question in check_texts(questions, "questions")
    ]


# ------------------------------------------------------------------------------------------------- prompt compression
@dataclass
class PromptCompression:
    """The base model with a part of the document's tokens in its prompt: a share `rate` of them, the most informative.

    With the package llmlingua (`use_llmlingua`: None takes it where it is installed) LLMLingua-2 chooses; otherwise
    a token's information is what the base model itself did not expect: -log p(token | the document before it), as in
    Selective Context (Li et al. 2023, arXiv 2310.06201). Documents beyond the window are scored window by window.
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
        prompts = _with_document(self.model, prepared, questions, self.max_new_tokens)
        return self.model.answer(prompts, None, max_new_tokens=self.max_new_tokens)


@torch.no_grad()
def token_information(model: DocToLoRA, ids: Sequence[int]) -> list[float]:
    """-log p of each token, in nats, given those before it in the user's turn; windows overlap by half."""
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


# ------------------------------------------------------------------------------------------------ context distillation
def sample_questions(model: DocToLoRA, document: str, n: int, seed: int, rounds: int = 8) -> list[str]:
    """Up to `n` different questions that the base model itself asks after the document: samples of how the user's turn
    goes on (temperature 1). For base models that saw questions behind documents in training, as the bundled one did.
    """
    tokenizer = model.tokenizer
    document = qa.truncate_document(document, "?", tokenizer, model.window, 64)
    prompt = open_turn(tokenizer, document + "\n\n")
    engine = TransformersEngine("base", model.base_model, tokenizer)
    found: dict[str, None] = {}
    for k in range(rounds):
        for reply in engine.reply([prompt] * max(8, n), 48, 1.0, seed + k):
            text = tokenizer.decode(reply.ids, skip_special_tokens=True).strip() if reply else ""
            if reply and reply.finished and text.endswith("?"):
                found.setdefault(text)
        if len(found) >= n:
            break
    return list(found)[:n]


def write_questions(model: DocToLoRA, document: str, n: int, seed: int) -> list[str]:
    """Up to `n` different questions that the base model writes when asked for them (`selfgen.WRITER_PROMPTS`), ten at a
    time: for models that follow instructions.
    """
    engine = TransformersEngine("base", model.base_model, model.tokenizer)
    found: list[str] = []
    for k in range(max(8, 2 * math.ceil(n / 10))):
        rest = {"n": min(10, n - len(found)), "earlier": "\n".join(f"- {q}" for q in found) or "- none"}
        template = WRITER_PROMPTS[min(k, 1)]
        around = template.format(document="", **rest)
        shortened = qa.truncate_document(document, around, model.tokenizer, model.window, 1024)
        prompt = template.format(document=shortened, **rest)
        (reply,) = engine.reply(question_ids(model.tokenizer, [prompt]), 1024, 0.0 if k < 2 else 1.0, seed + k)
        if reply is not None:
            said = model.tokenizer.decode(reply.ids, skip_special_tokens=True)
            found += parse_questions(said, n - len(found), found, complete=reply.finished)[0]
        if len(found) >= n:
            break
    return found


@dataclass
class ContextDistillation:
    """A LoRA trained by gradient descent for one document: it learns what the base model answers with the document.

    queries: "oracle" trains on the very questions that are asked later; a number, on that many questions which
    `questions_from(model, document, n, seed)` gives. The teacher's answers and top-16 log-probabilities are those of
    self-generated data, and so are the target linears, rank and scale of the LoRA those of the model's hypernetwork.
    `steps` of AdamW on batches of at most `batch` questions (published: 300 steps).
    """

    model: DocToLoRA
    queries: str | int
    steps: int = 300
    learning_rate: float = 1e-3
    batch: int = 16
    seed: int = 0
    name: str = ""
    questions_from: Callable[[DocToLoRA, str, int, int], list[str]] = sample_questions
    max_new_tokens: int = 48

    def __post_init__(self):
        if self.queries != "oracle" and not (isinstance(self.queries, int) and self.queries > 0):
            raise ValueError(f'queries must be "oracle" or a number of questions, not {self.queries!r}')
        asked = "oracle" if self.queries == "oracle" else f"{self.queries} queries"
        self.name = self.name or f"distillation ({asked})"

    def prepare(self, document: str, questions: Sequence[str]) -> Adapter:
        if self.queries != "oracle":
            questions = self.questions_from(self.model, document, self.queries, self.seed)
        questions = check_texts(questions, "questions")
        prompts = _with_document(self.model, document, questions, self.max_new_tokens)
        engine = TransformersEngine("teacher", self.model.base_model, self.model.tokenizer)
        replies = engine.reply(question_ids(self.model.tokenizer, prompts), self.max_new_tokens, 0.0, self.seed)
        asked = question_ids(self.model.tokenizer, questions)
        pairs = [(ids, reply) for ids, reply in zip(asked, replies, strict=True) if reply and reply.finished]
        return self._train(pairs)

    def _train(self, pairs: list[tuple[list[int], Reply]]) -> Adapter:
        """One block of the hypernetwork's rank, scale and modules, trained on (question ids, teacher's reply)."""
        config, base_model = self.model.config, self.model.base_model
        generator = torch.Generator().manual_seed(self.seed)
        d_in, d_out = module_sizes(base_model, config.modules)
        shape = (config.n_layers, config.rank)
        A = {m: torch.randn(*shape, d_in[m], generator=generator) / math.sqrt(d_in[m]) for m in config.modules}
        B = {m: torch.zeros(*shape, d_out[m]) for m in config.modules}
        device = self.model.device
        A, B = ({m: t.to(device).requires_grad_() for m, t in side.items()} for side in (A, B))
        optimizer = torch.optim.AdamW([*A.values(), *B.values()], lr=self.learning_rate, weight_decay=0.0)
        rng = random.Random(self.seed)
        for _ in range(self.steps if pairs else 0):
            some = pairs if len(pairs) <= self.batch else rng.sample(pairs, self.batch)
            with torch.enable_grad(), apply_lora(base_model, {m: (A[m][None], B[m][None]) for m in A}, config.scale):
                loss = _distillation_loss(base_model, self.model.tokenizer, some)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        factors = ({m: t.detach().cpu() for m, t in side.items()} for side in (A, B))
        return self.model.adapter_of([Block("document", 0, None, 1.0, *factors)], bias=False)

    def answer(self, prepared: Adapter, questions: Sequence[str]) -> list[str]:
        return self.model.answer(check_texts(questions, "questions"), prepared, max_new_tokens=self.max_new_tokens)


def _distillation_loss(base_model, tokenizer, pairs: Sequence[tuple[list[int], Reply]]) -> Tensor:
    """The loss of hypernetwork training (`losses.distillation`, averaged per question), for one context."""
    longest = max(len(ids) + len(reply.ids) for ids, reply in pairs)
    input_ids = torch.full((len(pairs), longest), tokenizer.pad_token_id or 0)
    labels = torch.full((len(pairs), longest), IGNORED)
    for row, (ids, reply) in enumerate(pairs):
        end = len(ids) + len(reply.ids)
        input_ids[row, :end] = torch.tensor([*ids, *reply.ids])
        labels[row, len(ids) : end] = torch.tensor(reply.ids)
    device = base_model.device
    logits, answers, here = answer_logits(base_model, input_ids.to(device), labels.to(device))
    values = torch.cat([torch.from_numpy(reply.values).float() for _, reply in pairs]).to(device)
    indices = torch.cat([torch.from_numpy(reply.indices) for _, reply in pairs]).to(device)
    per_token = distillation(logits, here, values, indices)
    return context_average(per_token, answers, torch.tensor([len(pairs)]))


# ---------------------------------------------------------------------------------------------------------- comparison
def compare(methods: Iterable[Method], questions: pd.DataFrame, report: bool = False) -> pd.DataFrame:
    """Every method on every question, document by document; the rows of `questions` once per method, in order.

    questions: as `qa.load_qa` returns them. Added columns: method, prediction, seconds_prepare and seconds_answer (of
    the question's document, all its questions together), peak_memory_mib (the most that the process, or the GPU, held
    while that document was worked on). `report` prints a line per method. ValueError for methods of the same name.
    """
    methods, questions = list(methods), questions.reset_index(drop=True)
    names = [method.name for method in methods]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"several methods are called {', '.join(sorted(twice))}: give each a name of its own")
    documents = qa.group_by_document(questions)
    tables = []
    for method in methods:
        table = questions.assign(method=method.name)
        found: dict[str, list] = {"prediction": [], "seconds_prepare": [], "seconds_answer": [], "peak_memory_mib": []}
        index: list = []
        for document, rows in documents:
            asked = list(rows["question"])
            gc.collect()
            memory.reset_peak_memory()
            began = time.perf_counter()
            prepared = method.prepare(document, asked)
            between = time.perf_counter()
            found["prediction"] += method.answer(prepared, asked)
            ended = time.perf_counter()
            index += list(rows.index)
            found["seconds_prepare"] += [between - began] * len(rows)
            found["seconds_answer"] += [ended - between] * len(rows)
            found["peak_memory_mib"] += [memory.peak_memory_mib()] * len(rows)
        tables.append(table.join(pd.DataFrame(found, index=index)))
        if report:
            per_document = sum(found["seconds_prepare"]) / max(1, len(index))
            print(f"{method.name}: {len(index)} questions, {per_document:.3f} s to prepare a document", flush=True)
    return pd.concat(tables, ignore_index=True)


def costs(compared: pd.DataFrame, by: Sequence[str] = ("method",)) -> pd.DataFrame:
    """Per group: documents, seconds_prepare and seconds_answer (means over documents), peak_memory_mib (largest)."""
    of_document = compared.drop_duplicates(["method", "dataset", "document"])
    return (
        of_document.groupby(check_texts(by, "columns"), sort=False)
        .agg(
            documents=("document", "size"),
            seconds_prepare=("seconds_prepare", "mean"),
            seconds_answer=("seconds_answer", "mean"),
            peak_memory_mib=("peak_memory_mib", "max"),
        )
        .reset_index()
    )
