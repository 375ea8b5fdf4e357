"""Losses against plain loops, and what happens to questions that the original code cannot handle."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import build_base_model, random_hypernetwork, random_loras

from d2l_lib.engine import pad_rows
from d2l_lib.training import losses

VOCABULARY, TOP = 11, 4
# Four questions of three contexts; -100 where no answer is.
QUESTIONS = [[-100, -100, 3, 4], [-100, 5, 6, 7, 8], [-100, 9], [-100, -100, 1, 2, 3]]
N_QUESTIONS = torch.tensor([2, 1, 1])


@pytest.fixture()
def batch():
    """(logits, labels) of QUESTIONS, one a row, padded."""
    labels = pad_rows(QUESTIONS, -100)[0]
    return torch.randn(*labels.shape, VOCABULARY, generator=torch.Generator().manual_seed(0)), labels


def by_hand(logits):
    """Cross-entropy per answer token, per question."""
    return [
        [-log_q[i - 1, label] for i, label in enumerate(question) if label != -100]
        for log_q, question in zip(logits.log_softmax(-1), QUESTIONS, strict=True)
    ]


def test_cross_entropy_and_both_averages(batch):
    logits, labels = batch
    answers = losses.find_answer_tokens(labels)
    per_token, expected = losses.cross_entropy(logits, answers), by_hand(logits)
    torch.testing.assert_close(per_token, torch.stack(sum(expected, [])))
    means = [torch.stack(question).mean() for question in expected]
    contexts = torch.stack([(means[0] + means[1]) / 2, means[2], means[3]])
    torch.testing.assert_close(losses.loss_of_contexts(per_token, answers, N_QUESTIONS), contexts)
    torch.testing.assert_close(losses.context_average(per_token, answers, N_QUESTIONS), contexts.mean())


def test_their_mean_is_the_usual_shifted_loss(batch):
    logits, labels = batch
    ours = losses.cross_entropy(logits, losses.find_answer_tokens(labels)).mean()
    torch.testing.assert_close(ours, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


def test_longer_padding_changes_nothing(batch):
    logits, labels = batch
    wider = F.pad(logits, (0, 0, 0, 3), value=torch.nan), F.pad(labels, (0, 3), value=-100)
    one, other = losses.find_answer_tokens(labels), losses.find_answer_tokens(wider[1])
    assert torch.equal(one.row, other.row) and torch.equal(one.label, other.label)
    assert torch.equal(losses.cross_entropy(logits, one), losses.cross_entropy(wider[0], other))


def test_distillation_is_an_unnormalised_cross_entropy(batch):
    logits, labels = batch
    answers = losses.find_answer_tokens(labels)
    teacher = torch.randn(len(answers), VOCABULARY, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    values, indices = teacher.topk(TOP)
    ours = losses.distillation(logits, answers, values, indices.int())
    log_q = logits[answers.row, answers.position].log_softmax(-1)
    expected = [-sum(values[t, j].exp() * log_q[t, indices[t, j]] for j in range(TOP)) for t in range(len(answers))]
    torch.testing.assert_close(ours, torch.stack(expected))
    full = losses.distillation(logits, answers, *teacher.topk(VOCABULARY))
    torch.testing.assert_close(full, -(teacher.exp() * log_q).sum(-1))
    half = losses.distillation(logits, answers, values.half(), indices)
    torch.testing.assert_close(half, ours, rtol=2e-3, atol=2e-3)


def test_distillation_is_least_where_the_student_is_the_teacher(batch):
    logits, labels = batch
    answers = losses.find_answer_tokens(labels)
    teacher = logits[answers.row, answers.position].log_softmax(-1)
    values, indices = teacher.topk(VOCABULARY)
    equal = losses.distillation(logits, answers, values, indices)
    other = losses.distillation(logits.flip(-1), answers, values, indices)
    assert (equal < other).all()


def test_distillation_refuses_another_number_of_rows(batch):
    logits, labels = batch
    answers = losses.find_answer_tokens(labels)
    with pytest.raises(ValueError, match="same answers"):
        losses.distillation(logits, answers, torch.zeros(2, TOP), torch.zeros(2, TOP).long())


def test_questions_that_crash_the_original():
    """No answer, two answer turns, and an answer from the first token on."""
    labels = pad_rows([[-100, -100], [-100, 1, -100, 2], [3, 4, 5]], -100)[0]
    logits = torch.randn(3, 4, VOCABULARY)
    answers = losses.find_answer_tokens(labels)
    # Label 3 opens its question: nothing of its own question predicts it, so it is not scored.
    assert answers.label.tolist() == [1, 2, 4, 5]
    assert answers.row.tolist() == [1, 1, 2, 2]
    assert answers.position.tolist() == [0, 2, 0, 1]
    assert answers.scored.tolist() == [True, True, False, True, True] and answers.n_questions == 3
    per_token = losses.cross_entropy(logits, answers)
    contexts = losses.loss_of_contexts(per_token, answers, torch.tensor([2, 1]))
    torch.testing.assert_close(contexts, torch.stack([per_token[:2].mean(), per_token[2:].mean()]))
    teacher = torch.zeros(5, 2), torch.arange(10).view(5, 2)
    assert len(losses.distillation(logits, answers, *teacher)) == 4


def test_no_answer_at_all_is_zero_and_differentiable():
    logits = torch.randn(1, 4, VOCABULARY, requires_grad=True)
    answers = losses.find_answer_tokens(torch.full((1, 4), -100))
    per_token = losses.cross_entropy(logits, answers)
    loss = per_token.sum() + losses.context_average(per_token, answers, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_wrong_counts(batch):
    logits, labels = batch
    answers = losses.find_answer_tokens(labels)
    with pytest.raises(ValueError, match="adds up to 3"):
        losses.loss_of_contexts(losses.cross_entropy(logits, answers), answers, torch.tensor([3]))


def test_l1_of_a_context_does_not_depend_on_its_batch():
    config = random_hypernetwork(build_base_model(), modules=("down_proj", "q_proj")).config
    torch.manual_seed(0)
    short, long = random_loras(config, 1, 4), random_loras(config, 1, 8)  # rank 2: one and three chunks, and the bias
    batch = {}
    for m in config.modules:
        padded = [torch.cat([f, torch.zeros_like(f)], dim=2) for f in short[m]]
        batch[m] = tuple(torch.cat([p, q]) for p, q in zip(padded, long[m], strict=True))
    one, three = torch.tensor([1]), torch.tensor([3])
    apart = losses.l1_penalty(short, one, 2) + losses.l1_penalty(long, three, 2)
    torch.testing.assert_close(losses.l1_penalty(batch, torch.tensor([1, 3]), 2), apart)
    expected = sum(f.abs().mean() for pair in short.values() for f in pair) / 2
    torch.testing.assert_close(losses.l1_penalty(short, one, 2), expected)
    without_bias = losses.l1_penalty(short, torch.tensor([2]), 2, has_bias=False)
    torch.testing.assert_close(without_bias, expected)
