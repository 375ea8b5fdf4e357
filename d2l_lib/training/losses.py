"""Training losses of Doc-to-LoRA (arXiv 2602.15902): cross-entropy, top-k distillation, and L1.

Only answer tokens are looked at: `find_answer_tokens` says where they are, the per-token losses score exactly those
positions, and the averages weigh them per token or per context.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from d2l_lib.hypernetwork import Loras
from d2l_lib.training.batches import IGNORED


@dataclass(frozen=True)
class AnswerTokens:
    """The n answer tokens of a batch, in order.

    Token i is `label[i]` of question `row[i]`, predicted by the logits at [`row[i]`, `position[i]`]. `scored` [all
    labels] is False for labels that no position of their question precedes.
    """

    row: Tensor
    position: Tensor
    label: Tensor
    scored: Tensor
    n_questions: int

    def __len__(self) -> int:
        return len(self.label)

    def among_answers(self) -> AnswerTokens:
        """The same tokens as places in logits [n, 1, vocabulary] that hold nothing else."""
        row = torch.arange(len(self), device=self.row.device)
        return replace(self, row=row, position=torch.zeros_like(self.position))


def find_answer_tokens(labels: Tensor) -> AnswerTokens:
    """Where the labels [questions, length] that are not IGNORED are predicted from: one position before each.

    A label at a question's first token has nothing before it and is not scored.
    """
    row, place = (labels != IGNORED).nonzero(as_tuple=True)
    scored = place > 0
    row, place = row[scored], place[scored]
    return AnswerTokens(row, place - 1, labels[row, place], scored, len(labels))


def cross_entropy(logits: Tensor, answers: AnswerTokens) -> Tensor:
    """-log q(label) of each answer token, [n]; q is the softmax of logits [questions, length, vocabulary]."""
    return F.cross_entropy(_predicting(logits, answers), answers.label, reduction="none")


def distillation(logits: Tensor, answers: AnswerTokens, teacher_log_probs: Tensor, teacher_indices: Tensor) -> Tensor:
    """-sum_j p_teacher(j) log q(j) over the teacher's top-k tokens j, for each answer token, [n].

    teacher_log_probs, teacher_indices: [labels, k], one row per label of the batch in order. q is the full softmax.
    It is a cross-entropy: the teacher's entropy is not subtracted and its top-k mass is not scaled to one, so the
    minimum is not zero. ValueError if the teacher has another number of rows than the batch has labels.
    """
    if len(teacher_indices) != len(answers.scored) or teacher_log_probs.shape != teacher_indices.shape:
        raise ValueError(
            f"the batch has {len(answers.scored)} answer tokens, the teacher {list(teacher_log_probs.shape)} "
            f"log-probabilities and {list(teacher_indices.shape)} indices: they must come from the same answers"
        )
    log_q = _predicting(logits, answers).log_softmax(-1)
    teacher = teacher_log_probs[answers.scored].float().exp()
    return -(teacher * log_q.gather(-1, teacher_indices[answers.scored].long())).sum(-1)


def loss_of_contexts(per_token: Tensor, answers: AnswerTokens, n_questions: Tensor) -> Tensor:
    """Per context [contexts]: the mean over its questions of the mean over each question's answer tokens.

    `n_questions` [contexts] counts the questions of each context, in batch order. A question without answer tokens
    is left out of its context's mean; a context without any has loss 0.
    """
    n_questions = torch.as_tensor(n_questions, device=per_token.device)
    if int(n_questions.sum()) != answers.n_questions:
        raise ValueError(f"n_questions adds up to {int(n_questions.sum())}, the batch has {answers.n_questions}")
    tokens = torch.bincount(answers.row, minlength=answers.n_questions)
    of_question = per_token.new_zeros(answers.n_questions).index_add(0, answers.row, per_token)
    of_question = of_question / tokens.clamp_min(1)
    context = torch.arange(len(n_questions), device=per_token.device).repeat_interleave(n_questions)
    answered = torch.bincount(context[tokens > 0], minlength=len(n_questions))
    return per_token.new_zeros(len(n_questions)).index_add(0, context, of_question) / answered.clamp_min(1)


def context_average(per_token: Tensor, answers: AnswerTokens, n_questions: Tensor) -> Tensor:
    """The mean of `loss_of_contexts` over the contexts."""
    of_context = loss_of_contexts(per_token, answers, n_questions)
    return of_context.sum() / max(len(of_context), 1)


def l1_penalty(loras: Loras, n_chunks: Tensor, rank: int, *, has_bias: bool = True) -> Tensor:
    """Size of combined adapters, summed over contexts: mean over modules of mean |A| + mean |B|.

    loras: {module: (A [contexts, L, R, d_in], B [contexts, L, R, d_out])} as `combine` returns them. The mean runs
    over layers, a context's own rows ((chunks + 1) * rank, or chunks * rank without a bias block) and size. Divide by
    the number of contexts before weighing it. (The published one counts all R rows, zero padding included, so that a
    context's penalty depends on the longest context beside it.)
    """
    total = 0.0
    for A, B in loras.values():
        n_chunks = torch.as_tensor(n_chunks, device=A.device)
        rows = (n_chunks + int(has_bias)) * rank
        for factor in (A, B):
            _, n_layers, _, size = factor.shape
            total = total + (factor.abs().sum(dim=(1, 2, 3)) / (n_layers * size * rows.clamp_min(1))).sum()
    return total / len(loras)


def _predicting(logits: Tensor, answers: AnswerTokens) -> Tensor:
    """Logits [n, vocabulary] in float32 from which the answer tokens are predicted."""
    return logits[answers.row, answers.position].float()
