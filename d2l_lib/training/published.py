"""Train the published form on questions about passages: blocks of rank r, all rows added (see `pooled_rows`).

What the frozen layers make of passages and questions comes from disk (`row_features`); the mixing layers are those of
trained token rows and stay as they are. Two stages:

    pointer   no step runs the base model, whose x at the tokens of answers are kept. Rows learn by a softmax over all
              of a block's rows which of them a token reads, and latents which tokens of the passage a row stands for
                  loss = - mean log (sum over rows i of softmax(a_i x)_i * share_i of the right token)
                         - TOKENS * the same with a softmax over the passage's own rows, without latents
    sum       the upper layers run with the blocks, all rows added, and gradients go through them
                  loss = cross-entropy over the vocabulary + POINTER * the pointer's loss, its first term

The vocabulary's sum is taken over the batch's own tokens, frequent ones and a sample of all others that stands for them
(sampled softmax: Jean et al. 2015, arXiv 1412.2007). The first token of an answer counts `first_weight` times. Keys are
learned in whitened coordinates of x, and values in units of the residual stream; `fold` writes both in plain ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from d2l_lib.base_model import final_norm, target_linears
from d2l_lib.lora import add_deltas, hooked, without_lora
from d2l_lib.pooled_rows import PooledRows
from d2l_lib.presets import PublishedPreset
from d2l_lib.row_reader import part_of_layers
from d2l_lib.training.notes import Notes, Step
from d2l_lib.training.row_features import Features, batches_of_like_size, layer_output, whitening

_AT_ONCE = 16  # questions of a pass through the upper layers
_FREQUENT, _SAMPLED = 3000, 4000  # tokens of the vocabulary: the first ones, and others in a step
TOKENS, POINTER = 0.3, 0.3  # weights of losses
_START = 0.05  # of a row's value, in units of the residual stream
_LEAST = 1e-5  # of a probability


@dataclass(frozen=True)
class PassageBatch:
    """Passages ids [P, T], mask [P, T], states [P, T, S], mixed [P, T, d], words [P, T, 3], and their questions.

    owner [Q]: each question's passage. streams, prompts, answers: of each question, see `Features`.
    x: of each question [its answer's tokens, L, d_in], whitened.
    """

    ids: Tensor
    mask: Tensor
    states: Tensor
    mixed: Tensor
    words: Tensor
    owner: Tensor
    streams: tuple[Tensor, ...]
    prompts: tuple[Tensor, ...]
    answers: tuple[Tensor, ...]
    x: tuple[Tensor, ...]

    @property
    def n_contexts(self) -> int:
        """Passages."""
        return len(self.ids)

    @property
    def labels(self) -> Tensor:
        """[N]: the tokens of all answers."""
        return torch.cat(self.answers)

    @property
    def first(self) -> Tensor:
        """[N]: True at the first token of each answer."""
        return torch.cat([torch.arange(len(one)) == 0 for one in self.answers])

    @property
    def question(self) -> Tensor:
        """[N]: the question of each token."""
        return torch.arange(len(self.answers)).repeat_interleave(torch.tensor([len(one) for one in self.answers]))


class PassageBatches(Dataset):
    """Batches of `p.passages` passages of like length; item i is a function of (seed, i).

    step: what the base model makes of questions, and mixing layers of passages, is asked of it once for each passage.
    """

    def __init__(self, passages: Sequence[Features], step: PublishedStep, p: PublishedPreset, steps: int, seed: int):
        self.passages, self.step, self.p, self.steps, self.seed = passages, step, p, steps, seed
        self._known: dict[int, tuple[Tensor, tuple[Tensor, ...]]] = {}
        self._order: dict[int, list[list[int]]] = {}

    def __len__(self) -> int:
        return self.steps

    def _epoch(self, epoch: int) -> list[list[int]]:
        if epoch not in self._order:
            rng = random.Random(f"published/{self.seed}/{epoch}")
            batches = batches_of_like_size(rng, [len(one.ids) for one in self.passages], self.p.passages)
            batches = [batch for batch in batches if len(batch) > 1]
            if not batches:
                raise ValueError("a batch needs two passages or more: give more passages")
            rng.shuffle(batches)
            self._order = {epoch: batches}
        return self._order[epoch]

    def __getitem__(self, i: int) -> PassageBatch:
        epoch, place = divmod(i, len(self._epoch(0)))
        return self.collate(self._epoch(epoch)[place])

    def collate(self, numbers: Sequence[int]) -> PassageBatch:
        """These passages as a batch."""
        chosen, padded = [self.passages[number] for number in numbers], nn.utils.rnn.pad_sequence
        for number in (number for number in numbers if number not in self._known):
            self._known[number] = self.step.mixed(self.passages[number]), self.step.asked([self.passages[number]])
        mixed, x = zip(*(self._known[number] for number in numbers), strict=True)
        ids = padded([one.ids for one in chosen], batch_first=True)
        return PassageBatch(
            ids=ids,
            mask=padded([torch.ones(len(one.ids), dtype=torch.bool) for one in chosen], batch_first=True),
            states=padded([one.states for one in chosen], batch_first=True).float(),
            mixed=padded(list(mixed), batch_first=True).float(),
            words=self.step.hypernetwork.words.tokens(ids),
            owner=torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(one.answers) for one in chosen])),
            streams=tuple(stream for one in chosen for stream in one.streams),
            prompts=tuple(prompt for one in chosen for prompt in one.prompts),
            answers=tuple(answer for one in chosen for answer in one.answers),
            x=tuple(one for several in x for one in several),
        )


class PublishedStep(Step):
    """The loss {"loss": ...} of a `PassageBatch`, and numbers for the log.

    adds: the second stage, where blocks act in the upper layers; else the first. tests: batches that are never learned.
    """

    def __init__(self, base_model: nn.Module, hypernetwork: PooledRows, p: PublishedPreset):
        super().__init__()
        self.hypernetwork, self.p = hypernetwork, p
        config = hypernetwork.config
        self.module, self.layers = hypernetwork.module, config.written_layers
        self.register_buffer("whitening", torch.eye(config.d_in[self.module]).repeat(len(self.layers), 1, 1))
        self.register_buffer("stream_size", torch.ones(()))
        self._frozen = (base_model, part_of_layers(base_model, slice(self.layers[0], None)))
        for part in (hypernetwork.feature_mean, hypernetwork.feature_scale, hypernetwork.place_scaler):
            part.requires_grad_(False)
        for part in (hypernetwork.project, hypernetwork.mixers, hypernetwork.norm):
            part.requires_grad_(False)
        self.adds = False
        self.tests: list[PassageBatch] = []

    # --- what frozen parts make of passages and questions -------------------------------------------------------------
    @torch.no_grad()
    def mixed(self, one: Features) -> Tensor:
        """[T, d]: a passage's mixed states, float16."""
        ids, mask = one.ids[None], torch.ones(1, len(one.ids), dtype=torch.bool)
        self.hypernetwork.mixers.eval()
        return self.hypernetwork.states(self._features(ids, one.states[None].float()), mask)[0].half()

    def _features(self, ids: Tensor, states: Tensor) -> Tensor:
        return torch.cat([F.embedding(ids, self._frozen[0].get_input_embeddings().weight), states], -1)

    @torch.no_grad()
    def asked(self, passages: Sequence[Features], sizes: list[Tensor] | None = None) -> tuple[Tensor, ...]:
        """For each of their questions x [its answer's tokens, L, d_in], whitened, float16.

        sizes: takes the norms of the last residual stream at these tokens.
        """
        base_model, body = self._frozen
        flat = [one for own in passages for one in zip(own.streams, own.prompts, own.answers, strict=True)]
        order, done, found = sorted(range(len(flat)), key=lambda i: len(flat[i][0])), {}, {}

        def keep(place: int):
            return lambda _, inputs: found.__setitem__(place, inputs[0])

        with ExitStack() as stack:
            for place, linear in enumerate(self._linears()):
                stack.enter_context(hooked(linear.register_forward_pre_hook, keep(place)))
            stack.enter_context(
                hooked(body.layers[-1].register_forward_hook, lambda _, __, out: found.update(stream=layer_output(out)))
            )
            stack.enter_context(without_lora(base_model))
            for start in range(0, len(order), _AT_ONCE):
                part = order[start : start + _AT_ONCE]
                body(inputs_embeds=self._padded([flat[i][0] for i in part]), use_cache=False)
                for row, i in enumerate(part):
                    _, prompt, answer = flat[i]
                    own = slice(len(prompt) - 1, len(prompt) - 1 + len(answer))
                    x = torch.stack([found[place][row, own] for place in range(len(self.layers))], 1).float()
                    done[i] = torch.einsum("nld,lde->nle", x, self.whitening).half()
                    if sizes is not None:
                        sizes.append(found["stream"][row, own].float().norm(dim=-1))
        return tuple(done[i] for i in range(len(flat)))

    def _linears(self) -> list[nn.Linear]:
        (linears,) = target_linears(self._frozen[0], [self.module]).values()
        return [linears[layer] for layer in self.layers]

    def _padded(self, rows: Sequence[Tensor]) -> Tensor:
        base_model = self._frozen[0]
        return nn.utils.rnn.pad_sequence([row.float() for row in rows], batch_first=True).to(
            base_model.device, base_model.dtype
        )

    @torch.no_grad()
    def start(self, passages: Sequence[Features]) -> None:
        """Measure whitenings and the stream on these passages; a bias block that sees x and adds nothing."""
        sizes: list[Tensor] = []
        plain = torch.cat(self.asked(passages, sizes))
        for place in range(len(self.layers)):
            self.whitening[place] = whitening(plain[:, place])
        self.stream_size.fill_(torch.cat(sizes).mean() / self.hypernetwork.config.scale)
        x = torch.einsum("nld,lde->nle", plain.float(), self.whitening)
        middle = x.mean(0)
        bias = torch.randn(self.hypernetwork.bias_A.shape) / (x - middle).norm(dim=-1).mean()
        bias[:, 0] = middle / middle.square().sum(-1, keepdim=True)
        self.hypernetwork.bias_A.copy_(bias)
        self.hypernetwork.log_gain.fill_(math.log(_START))

    # --- losses -------------------------------------------------------------------------------------------------------
    def forward(self, batch: PassageBatch) -> dict[str, Tensor]:
        loss, notes = self.loss(batch)
        for name, value in notes.items():
            self.notes.add(name, value)
        return {"loss": loss}

    def pooled(self, batch: PassageBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(a, share, c) of the batch's passages, see `PooledRows.pooled`."""
        features, mixed = self._features(batch.ids, batch.states), batch.mixed
        if self.training and self.p.dropout:  # whole tokens
            kept = torch.rand(*batch.mask.shape, 1) >= self.p.dropout
            features, mixed = torch.where(kept, features, self.hypernetwork.feature_mean), mixed * kept
        return self.hypernetwork.pooled(features, batch.mask, mixed)

    def loss(self, batch: PassageBatch) -> tuple[Tensor, dict[str, float]]:
        """The loss of the stage, and what the log averages."""
        a, share, c = self.pooled(batch)
        pointed, of_tokens, notes = self._pointer_losses(batch, a, share, c)
        if not self.adds:
            return pointed + TOKENS * of_tokens, notes
        b = self.hypernetwork.values(share, batch.words)
        lost, more = self._sum_loss(batch, a, b, batch.owner, "own")
        if not self.training:
            notes |= self._sum_loss(batch, a, b, (batch.owner + 1) % len(a), "wrong")[1]
        return lost + POINTER * pointed, notes | more

    def _weights(self, batch: PassageBatch) -> Tensor:
        return 1 + (self.p.first_weight - 1) * batch.first.float()

    def _pointer_losses(
        self, batch: PassageBatch, a: Tensor, share: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        x, labels, weights = torch.cat(batch.x).float(), batch.labels, self._weights(batch)
        of, L = batch.owner[batch.question], len(self.layers)
        words = batch.words.flatten(1).masked_fill(~batch.mask.repeat_interleave(3, 1), -1)
        seen = torch.stack([x[:, place] @ self.hypernetwork.keys[place].T for place in range(L)]).sum(0)
        pointed, of_tokens, hits = x.new_zeros(len(x)), x.new_zeros(len(x)), torch.zeros(len(x), dtype=torch.bool)
        reachable = torch.zeros_like(hits)
        for passage in range(len(a)):
            own = (of == passage).nonzero()[:, 0]
            right = words[passage] == labels[own, None]  # [n, 3 T]
            scores = torch.einsum("nli,lri->nlr", x[own], a[passage]).flatten(1)
            found = scores.softmax(-1) @ share[passage]
            direct = (seen[own] @ c[passage].T).masked_fill(words[passage] < 0, -torch.inf).softmax(-1)
            pointed = pointed.index_add(0, own, -(found * right).sum(-1).clamp_min(_LEAST).log())
            of_tokens = of_tokens.index_add(0, own, -(direct * right).sum(-1).clamp_min(_LEAST).log())
            hits[own], reachable[own] = right.gather(1, found.argmax(-1, keepdim=True))[:, 0], right.any(1)
        weights = weights * reachable
        mean = weights.sum().clamp_min(1)
        notes = {
            "pointer": ((pointed * weights).sum() / mean).item(),
            "pointer_right": float(hits[reachable].float().mean()),
            "pointer_first_right": float(hits[reachable & batch.first].float().mean()),
        }
        return (pointed * weights).sum() / mean, (of_tokens * weights).sum() / mean, notes

    def _sum_loss(
        self, batch: PassageBatch, a: Tensor, b: Tensor, owner: Tensor, name: str
    ) -> tuple[Tensor, dict[str, float]]:
        labels, first, weights = batch.labels, batch.first, self._weights(batch)
        kept = [slice(len(q) - 1, len(q) - 1 + len(n)) for q, n in zip(batch.prompts, batch.answers, strict=True)]
        stream = final_norm(self._frozen[0])(torch.cat(self.upper(batch.streams, owner, a, b, kept)))
        logits, places = self._logits(stream, torch.cat([batch.ids.flatten(), labels]), labels)
        lost, hits = F.cross_entropy(logits, places, reduction="none"), logits.argmax(-1) == places
        loss = (lost * weights).sum() / weights.sum()
        return loss, {
            name: loss.item(),
            f"{name}_right": hits.float().mean().item(),
            f"{name}_first_right": hits[first].float().mean().item(),
        }

    def _logits(self, normed: Tensor, own: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [N, some tokens], places of the labels [N]): in training of a sample of the vocabulary."""
        E = self._frozen[0].get_output_embeddings().weight
        sure = torch.unique(torch.cat([own, torch.arange(min(_FREQUENT, len(E)))]))
        rest = len(E) - len(sure)
        if not self.training or rest <= _SAMPLED:
            return normed @ E.T, labels
        others = torch.ones(len(E), dtype=torch.bool)
        others[sure] = False
        drawn = others.nonzero()[:, 0][torch.randperm(rest)[:_SAMPLED]]
        stands_for = math.log(rest / _SAMPLED)
        logits = torch.cat([normed @ E[sure].T, normed @ E[drawn].T + stands_for], 1)
        return logits, torch.searchsorted(sure, labels)

    def upper(
        self, streams: Sequence[Tensor], owner: Tensor, a: Tensor, b: Tensor, kept: Sequence[slice]
    ) -> list[Tensor]:
        """For each stream the last residual stream [n, hidden] at its tokens `kept`, with the blocks of `owner`."""
        base_model, body = self._frozen
        net, found, done = self.hypernetwork, {}, {}
        order = sorted(range(len(streams)), key=lambda i: len(streams[i]))
        A = torch.cat([a, net.bias_A.expand(len(a), -1, -1, -1)], 2)
        A = torch.einsum("plri,lij->plrj", A, self.whitening)
        B = torch.cat([b, net.bias_B.expand(len(b), -1, -1, -1)], 2) * self.stream_size

        def delta(place: int):
            def add(x: Tensor) -> Tensor:
                own = owner[found["part"]]
                return torch.bmm(torch.bmm(x, A[own, place].transpose(1, 2)), B[own, place])

            return add

        deltas = [(linear, delta(place)) for place, linear in enumerate(self._linears())]
        with (
            hooked(body.layers[-1].register_forward_hook, lambda _, __, out: found.update(stream=layer_output(out))),
            add_deltas(base_model, deltas, net.config.scale),
        ):
            for start in range(0, len(order), _AT_ONCE):
                part = order[start : start + _AT_ONCE]
                found["part"] = torch.tensor(part)
                body(inputs_embeds=self._padded([streams[i] for i in part]), use_cache=False)
                done |= {i: found["stream"][row][kept[i]].float() for row, i in enumerate(part)}
        return [done[i] for i in range(len(streams))]

    # --- reports, and the end -----------------------------------------------------------------------------------------
    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """Means since the last report, and the same of the batches that are never learned (validation_...)."""
        means, tested, was_training = super().report(), Notes(), self.training
        self.eval()
        for batch in self.tests:
            for name, value in self.loss(batch)[1].items():
                tested.add(f"validation_{name}", value)
        self.train(was_training)
        return means | tested.take()

    @torch.no_grad()
    def fold(self) -> None:
        """Write keys, values and the bias block in plain coordinates; the blocks stay what they are."""
        net = self.hypernetwork
        for keys in (net.keys, net.free_keys, net.bias_A):
            keys.copy_(torch.einsum("lri,lij->lrj", keys, self.whitening))
        net.log_gain += self.stream_size.log()
        net.bias_B *= self.stream_size
        self.whitening.copy_(torch.eye(self.whitening.shape[-1]).expand_as(self.whitening))
        self.stream_size.fill_(1.0)


def few_of(one: Features, questions: int) -> Features:
    """A passage with its first questions."""
    return Features(one.ids, one.states, one.streams[:questions], one.answers[:questions], one.prompts[:questions])
