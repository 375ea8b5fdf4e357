"""Context distillation, a baseline for Doc-to-LoRA: a LoRA trained by gradient descent for one document.

document -> questions -> answers of the base model with the document in its prompt -> LoRA that gives them without
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from d2l_lib.adapter import Adapter, Block
from d2l_lib.base_model import module_sizes
from d2l_lib.documents import check_texts, open_turn, question_ids
from d2l_lib.engine import Reply, TransformersEngine, pad_id_of, pad_rows
from d2l_lib.lora import apply_lora
from d2l_lib.model import DocToLoRA
from d2l_lib.tasks import qa
from d2l_lib.training.batches import IGNORED
from d2l_lib.training.losses import context_average, distillation
from d2l_lib.training.step import answer_logits


def sample_questions(model: DocToLoRA, document: str, n: int, seed: int, rounds: int = 8) -> list[str]:
    """Up to `n` different questions on the document, which the base model itself asks: samples at temperature 1.

    It continues the user's turn after the document. It must have seen questions after documents in training, as the
    bundled one has.
    """
    tokenizer = model.tokenizer
    document = qa.truncate_document(document, "?", tokenizer, model.window, 64)
    prompt = open_turn(tokenizer, document + "\n\n")
    engine = TransformersEngine("base", model.base_model, tokenizer)
    questions: dict[str, None] = {}
    for k in range(rounds):
        for reply in engine.reply([prompt] * max(8, n), 48, 1.0, seed + k):
            text = tokenizer.decode(reply.ids, skip_special_tokens=True).strip() if reply else ""
            if reply and reply.finished and text.endswith("?"):
                questions.setdefault(text)
        if len(questions) >= n:
            break
    return list(questions)[:n]


@dataclass
class ContextDistillation:
    """A LoRA trained by gradient descent on a teacher's answers with the document in its prompt.

    queries: "oracle" (the questions that are asked later), or a number for `questions_from(model, document, n, seed)`.
    steps: of AdamW (published: 300), on at most `batch` questions each.
    teacher: what answers with the document in its prompt (None: the base model), of the same tokenizer.

    Answers and top-16 log-probabilities are as in self-generated data. Target linears, rank and scale are those of the
    model's hypernetwork; ValueError for one that writes token rows.
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
    teacher: nn.Module | None = None

    def __post_init__(self):
        if self.queries != "oracle" and not (isinstance(self.queries, int) and self.queries > 0):
            raise ValueError(f'queries must be "oracle" or a number of questions, not {self.queries!r}')
        if self.model.writes_rows:
            raise ValueError(
                "this hypernetwork writes token rows, and distillation trains a LoRA: give a model whose adapters are "
                'summed, for the same base model (for "smollm2" that is "smollm2/published")'
            )
        queries = "oracle" if self.queries == "oracle" else f"{self.queries} queries"
        self.name = self.name or f"distillation ({queries})"

    def prepare(self, document: str, questions: Sequence[str]) -> Adapter:
        if self.queries != "oracle":
            questions = self.questions_from(self.model, document, self.queries, self.seed)
        questions = check_texts(questions, "questions")
        tokenizer = self.model.tokenizer
        prompts = qa.with_document(document, questions, tokenizer, self.model.window, self.max_new_tokens)
        teacher = self.model.base_model if self.teacher is None else self.teacher
        engine = TransformersEngine("teacher", teacher, tokenizer)
        replies = engine.reply(question_ids(tokenizer, prompts), self.max_new_tokens, 0.0, self.seed)
        pairs = zip(question_ids(tokenizer, questions), replies, strict=True)
        return self._train([(ids, reply) for ids, reply in pairs if reply and reply.finished])

    def _train(self, pairs: list[tuple[list[int], Reply]]) -> Adapter:
        """One block of the hypernetwork's rank, scale and modules, trained on (question ids, teacher's reply) pairs."""
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
        empty = self.model.adapter_of([], bias=False)
        return replace(empty, blocks=(Block("document", 0, None, 1.0, *factors),), layers=())

    def answer(self, prepared: Adapter, questions: Sequence[str]) -> list[str]:
        return self.model.answer(check_texts(questions, "questions"), prepared, max_new_tokens=self.max_new_tokens)


def _distillation_loss(base_model, tokenizer, pairs: Sequence[tuple[list[int], Reply]]) -> Tensor:
    """The loss of hypernetwork training (`losses.distillation`, averaged per question), for one context."""
    input_ids, _ = pad_rows([[*ids, *reply.ids] for ids, reply in pairs], pad_id_of(tokenizer))
    labels, _ = pad_rows([[IGNORED] * len(ids) + reply.ids for ids, reply in pairs], IGNORED)
    device = base_model.device
    logits, answers = answer_logits(base_model, input_ids.to(device), labels.to(device))
    values = torch.cat([torch.from_numpy(reply.values).float() for _, reply in pairs]).to(device)
    indices = torch.cat([torch.from_numpy(reply.indices) for _, reply in pairs]).to(device)
    per_token = distillation(logits, answers.among_answers(), values, indices)
    return context_average(per_token, answers, torch.tensor([len(pairs)]))
