"""Train the hypernetwork that writes token rows (see `d2l_lib.token_rows`) on questions about passages.

Features of the frozen base model come from disk (`row_features`); a step runs the hypernetwork, the softmax over rows
and the output head. The memory of a batch is either each question's own passage or all passages of the batch together:
then a question must find its passage among others.

    loss = - mean log (sum of p_j over rows j of the right token in places where the answer stands)
           - null_weight * mean log p_null of a question that has another question's passage
           - head_weight * mean log softmax(head(residual + scale * sum p_j B_j))[right token]

Keys are learned in whitened coordinates of x, where all directions are of like size, and written in plain ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from d2l_lib.base_model import decoder_body, final_norm_name
from d2l_lib.presets import RowsPreset
from d2l_lib.token_rows import ROLES, TokenRows, Words
from d2l_lib.training.row_features import Features

_POOL = 64  # batches of like length are drawn from so many passages


@dataclass(frozen=True)
class RowsBatch:
    """Passages [P, T] and the tokens [N] of the answers to their questions.

    mask [P, T]: True at tokens. states [P, T, S]. tokens [P, T, 3]: what each row writes.
    owner [N]: each token's passage. question [N]: each token's question in the batch. first [N]: of its answer.
    right [N, T, 3]: the rows of its passage that stand for it, where its answer stands.
    progress: share of the training before it.
    together: one memory for all. unrelated [N]: True where the memory is the next passage's alone.
    """

    ids: Tensor
    mask: Tensor
    states: Tensor
    tokens: Tensor
    x: Tensor
    residual: Tensor
    labels: Tensor
    owner: Tensor
    question: Tensor
    first: Tensor
    right: Tensor
    together: bool
    unrelated: Tensor
    progress: float = 0.0

    @property
    def n_contexts(self) -> int:
        """Passages."""
        return len(self.ids)


def answer_rows(ids: Sequence[int], tokens: Sequence[Sequence[int]], answer: Sequence[int]) -> Tensor:
    """[len(answer), T, 3]: for each token of an answer, the rows that write it where the answer stands in `ids`.

    ids [T], tokens [T][3] (see `Words.tokens`). answer: its ids, the end of the turn last. All places count.
    """
    rows = torch.zeros(len(answer), len(ids), len(ROLES), dtype=torch.bool)
    words = answer[:-1]
    for start in range(len(ids) - len(words) + 1):
        places = range(start, start + len(words))
        if all(tokens[place][min(n, 1)] == word for n, (place, word) in enumerate(zip(places, words, strict=True))):
            for n, place in enumerate(places):
                rows[n, place, min(n, 1)] = True
            rows[-1, places[-1], 2] = True
    return rows


class RowsBatches(Dataset):
    """Batches of `p.passages` passages of like length; item i is a function of (seed, i)."""

    def __init__(self, passages: Sequence[Features], words: Words, p: RowsPreset, seed: int):
        self.passages, self.words, self.p, self.seed = passages, words, p, seed
        self._order: dict[int, list[list[int]]] = {}
        self._made: dict[int, tuple[Tensor, Tensor]] = {}
        self._per_epoch = len(self._epoch(0))  # the same in each

    def __len__(self) -> int:
        return self.p.steps

    def _epoch(self, epoch: int) -> list[list[int]]:
        if epoch not in self._order:
            rng, size = random.Random(f"rows/{self.seed}/{epoch}"), self.p.passages
            order, batches = list(range(len(self.passages))), []
            rng.shuffle(order)
            for start in range(0, len(order), _POOL):
                pool = sorted(order[start : start + _POOL], key=lambda i: len(self.passages[i].ids))
                batches += [pool[i : i + size] for i in range(0, len(pool), size)]
            batches = [batch for batch in batches if len(batch) > 1]
            rng.shuffle(batches)
            self._order = {epoch: batches}
        return self._order[epoch]

    def __getitem__(self, i: int) -> RowsBatch:
        if not self._per_epoch:
            raise ValueError("a batch needs two passages or more: give more passages, or set passages=2")
        epoch, number = divmod(i, self._per_epoch)
        rng = random.Random(f"rows/{self.seed}/{i}")
        batch = self._epoch(epoch)[number]
        made = self.collate(batch, rng.random() < self.p.together_share, rng)
        return replace(made, progress=i / self.p.steps)

    def _rows(self, number: int) -> tuple[Tensor, Tensor]:
        """(tokens [T, 3], right [N, T, 3]) of a passage."""
        if number not in self._made:
            one = self.passages[number]
            tokens = self.words.tokens(one.ids[None])[0]
            lists, ids = tokens.tolist(), one.ids.tolist()
            right = [answer_rows(ids, lists, one.labels[one.question == q].tolist()) for q in one.question.unique()]
            self._made[number] = tokens, torch.cat(right)
        return self._made[number]

    def collate(self, numbers: Sequence[int], together: bool, rng: random.Random | None = None) -> RowsBatch:
        """These passages as a batch; rng: draws the unrelated questions (None: there are none)."""
        chosen = [self.passages[number] for number in numbers]
        made = [self._rows(number) for number in numbers]
        T, P, counts = max(len(one.ids) for one in chosen), len(chosen), [len(one.x) for one in chosen]

        def padded(rows: Sequence[Tensor], length: int = T) -> Tensor:
            return torch.stack([F.pad(row, (0, 0) * (row.dim() - 1) + (0, length - len(row))) for row in rows])

        owner = torch.arange(P).repeat_interleave(torch.tensor(counts))
        keys = torch.stack([owner, torch.cat([one.question for one in chosen])], 1)
        question = keys.unique(dim=0, return_inverse=True)[1]
        first = F.pad(question[1:] != question[:-1], (1, 0), value=True)
        n_questions = int(question.max()) + 1
        drawn = torch.tensor([rng is not None and rng.random() < self.p.unrelated_share for _ in range(n_questions)])
        return RowsBatch(
            ids=padded([one.ids for one in chosen]),
            mask=padded([torch.ones(len(one.ids), dtype=torch.bool) for one in chosen]),
            states=padded([one.states for one in chosen]).float(),
            tokens=padded([tokens for tokens, _ in made]),
            x=torch.cat([one.x for one in chosen]).float(),
            residual=torch.cat([one.residual for one in chosen]).float(),
            labels=torch.cat([one.labels for one in chosen]),
            owner=owner,
            question=question,
            first=first,
            right=torch.cat([F.pad(right, (0, 0, 0, T - right.shape[1])) for _, right in made]),
            together=together,
            unrelated=drawn[question],
        )


def validation_batches(passages: Sequence[Features], words: Words, p: RowsPreset) -> list[RowsBatch]:
    """All passages, in batches of at most `p.passages`, each passage alone and all of a batch together."""
    batches = RowsBatches(passages, words, p, seed=0)
    parts = [range(start, min(start + p.passages, len(passages))) for start in range(0, len(passages), p.passages)]
    return [batches.collate(part, together) for part in parts for together in (False, True)]


class RowsStep(nn.Module):
    """The loss {"loss": ...} of a `RowsBatch`, and numbers for the log."""

    def __init__(self, base_model: nn.Module, hypernetwork: TokenRows, p: RowsPreset, whitening: Tensor, tests=()):
        super().__init__()
        self.hypernetwork, self.p = hypernetwork, p
        self.register_buffer("whitening", whitening)  # [d_in, d_in], symmetric
        self._frozen = (base_model,)
        self._norm = getattr(decoder_body(base_model), final_norm_name(base_model))
        for parameter in (hypernetwork.feature_mean, hypernetwork.feature_scale):
            parameter.requires_grad_(False)
        self.tests = list(tests)  # batches that are never learned
        self._tally: dict[str, list[float]] = {}

    def forward(self, batch: RowsBatch) -> dict[str, Tensor]:
        loss, notes = self.loss(batch)
        for name, value in notes.items():
            self._tally.setdefault(name, []).append(value)
        return {"loss": loss}

    def shares(self, batch: RowsBatch, seen: Tensor) -> Tensor:
        """Log-shares [N, P * T * 3 + 1] of all rows and the null row (last); seen [N, P]: whose rows a token sees."""
        net = self.hypernetwork
        embeddings = F.embedding(batch.ids, self._frozen[0].get_input_embeddings().weight)
        features = torch.cat([embeddings, batch.states], -1)
        if self.training and self.p.dropout:  # whole tokens' states
            kept = torch.rand(*batch.mask.shape, 1, device=features.device) >= self.p.dropout
            features = torch.where(kept, features, net.feature_mean)
        codes = net.codes(features * batch.mask.unsqueeze(-1), batch.mask)  # [P, T, 3, d]
        codes = F.dropout(codes, self.p.dropout, self.training)
        unit = batch.x / batch.x.norm(dim=-1, keepdim=True) @ self.whitening
        logits = torch.einsum("nd,ptkd->nptk", unit @ net.keys.T, codes)
        hidden = ~(seen[:, :, None] & batch.mask)[..., None]
        null = unit @ net.null_key + net.null_logit
        rows = logits.masked_fill(hidden, -torch.inf).flatten(1)
        return torch.cat([rows, null[:, None]], 1).log_softmax(-1)

    def loss(self, batch: RowsBatch) -> tuple[Tensor, dict[str, float]]:
        """The loss, and what the log averages."""
        P, p = batch.n_contexts, self.p
        seen = torch.ones(len(batch.x), P, dtype=torch.bool) if batch.together else F.one_hot(batch.owner, P).bool()
        away = torch.zeros_like(batch.unrelated) if batch.together else batch.unrelated
        seen[away] = F.one_hot((batch.owner[away] + 1) % P, P).bool()
        shares = self.shares(batch, seen.to(batch.x.device))
        log_null, log_rows = shares[:, -1], shares[:, :-1]
        right = torch.zeros(len(batch.x), P, *batch.right.shape[1:], dtype=torch.bool, device=batch.x.device)
        right[torch.arange(len(batch.x)), batch.owner] = batch.right
        related = ~away
        reachable = related & right.flatten(1).any(1)
        pointer = log_null.sum() * 0  # where no answer of the batch stands in its passage
        if reachable.any():
            pointer = -log_rows.masked_fill(~right.flatten(1), -torch.inf)[reachable].logsumexp(-1).mean()
        loss = pointer
        lost = away & batch.first
        if lost.any():
            loss = loss - p.null_weight * log_null[lost].mean()
        where = "together" if batch.together else "alone"
        with torch.no_grad():
            best = right.flatten(1).gather(1, log_rows.argmax(1, keepdim=True))[:, 0]
        notes = {
            f"pointer_loss_{where}": pointer.item(),
            f"rows_right_{where}": best[reachable].float().mean().item(),
            f"first_rows_right_{where}": best[reachable & batch.first].float().mean().item(),
            "null_share_related": log_null[related & batch.first].exp().mean().item(),
        }
        if lost.any():
            notes["null_share_unrelated"] = log_null[lost].exp().mean().item()
        notes = {name: value for name, value in notes.items() if not math.isnan(value)}  # means of nothing
        if not related.any() or (self.training and not (p.head_weight and batch.progress >= p.head_from)):
            return loss, notes
        logits, labels = self.logits(batch, log_rows, related), batch.labels[related]
        loss = loss + p.head_weight * F.cross_entropy(logits, labels)
        with torch.no_grad():
            hits, first = logits.argmax(-1) == labels, batch.first[related]
            questions = batch.question[related]
            wrong = torch.zeros(int(questions.max()) + 1, device=hits.device).index_add(0, questions, (~hits).float())
            whole = wrong[questions.unique()] == 0
            notes |= {
                f"tokens_right_{where}": float(hits.float().mean()),
                f"first_right_{where}": float(hits[first].float().mean()),
                f"exact_match_{where}": float(whole.float().mean()),
            }
        return loss, notes

    def logits(self, batch: RowsBatch, log_rows: Tensor, chosen: Tensor) -> Tensor:
        """[chosen, vocabulary]: what the base model says with these shares."""
        net = self.hypernetwork
        read = log_rows[chosen].exp() @ net.values(batch.tokens).flatten(0, 2) * net.config.scale
        return self._frozen[0].get_output_embeddings()(self._norm(batch.residual[chosen] + read))

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """Means since the last report, and the same of the batches that are never learned (validation_...)."""
        means = {name: sum(values) / len(values) for name, values in self._tally.items()}
        self._tally, was_training = {}, self.training
        self.eval()
        tested: dict[str, list[float]] = {}
        for batch in self.tests:
            for name, value in self.loss(batch)[1].items():
                tested.setdefault(f"validation_{name}", []).append(value)
        self.train(was_training)
        means |= {name: sum(values) / len(values) for name, values in tested.items()}
        return {name: round(value, 4) for name, value in means.items()}


@torch.no_grad()
def start_rows(hypernetwork: TokenRows, passages: Sequence[Features], base_model: nn.Module) -> Tensor:
    """Take means and sizes of features into the hypernetwork; returns the whitening [d_in, d_in] of x / |x|."""
    embeddings = base_model.get_input_embeddings().weight
    every = passages[:: max(1, len(passages) // 512)]
    features = torch.cat([torch.cat([embeddings[one.ids], one.states.float()], -1) for one in every])
    hypernetwork.feature_mean.copy_(features.mean(0))
    hypernetwork.feature_scale.copy_(features.std(0).clamp_min(1e-6))
    x = torch.cat([one.x for one in passages]).double()
    x = x / x.norm(dim=-1, keepdim=True)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    ridge = 0.02 * values.mean()
    residual = torch.cat([one.residual for one in every]).float().norm(dim=-1).mean()
    hypernetwork.log_gain.copy_((2 * residual).log())
    return (vectors * (values + ridge).rsqrt() @ vectors.T / x.shape[1] ** 0.5).float()


@torch.no_grad()
def plain_keys(hypernetwork: TokenRows, whitening: Tensor) -> None:
    """Write keys that were learned in whitened coordinates in plain ones."""
    hypernetwork.keys.copy_(hypernetwork.keys @ whitening)
    hypernetwork.null_key.copy_(whitening @ hypernetwork.null_key)
