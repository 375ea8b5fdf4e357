"""Train the hypernetwork that writes token rows, and what reads them, on questions about passages.

What the frozen layers below make of passages and questions comes from disk (`row_features`); a step runs the
hypernetwork, the upper layers and the output head. The memory of a batch is either each question's own passage or all
passages of the batch together: then a question must find its passage among others.

    loss = - mean log (sum of p_j over rows j of the right token in places where the answer stands)   p: last layer's
           - match_weight * mean log (sum of p(i, t) over t with the word of token i)             p(i, t): match layer's
           - null_weight * mean log p_null of a question that has another question's passage
    and after a part of the run
           + keep_weight * KL(base model || adapted model) at the answer of such a question
           - head_weight * mean log softmax(output head)[right token]

Keys are learned in whitened coordinates of x / |x|, where all directions are of like size, and written in plain ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from d2l_lib.base_model import decoder_layers, final_norm
from d2l_lib.lora import add_deltas, hooked, without_lora
from d2l_lib.presets import RowsPreset
from d2l_lib.row_reader import part_of_layers
from d2l_lib.token_rows import WORD_ROLES, TokenRows, Words
from d2l_lib.training.row_features import Features

_POOL = 64  # batches of like length are drawn from so many passages
_AT_ONCE = 16  # questions of a pass through the upper layers: of like length, so little is padded
_RARE = 3  # times that a word stands in a passage, at most, to be looked for


@dataclass(frozen=True)
class RowsBatch:
    """Passages [P, T] and the tokens [N] of the answers to their questions.

    mask [P, T]: True at tokens. states [P, T, S]. tokens [P, T, 3]: what each row writes.
    streams: of each of Q questions what goes into the upper layers [its tokens, hidden]. prompts: ids of its prompt.
    alike: for each question [its prompt's tokens, T], True at its passage's tokens that write the same rare word.
    owner [N]: each token's passage. question [N]: each token's question, in order. first [N]: of its answer.
    right [N, T, 3]: the rows of its passage that stand for it, where its answer stands.
    progress: share of the training before it.
    together: one memory for all. unrelated [N]: True where the memory is the next passage's alone.
    """

    ids: Tensor
    mask: Tensor
    states: Tensor
    tokens: Tensor
    streams: tuple[Tensor, ...]
    prompts: tuple[Tensor, ...]
    alike: tuple[Tensor, ...]
    labels: Tensor
    owner: Tensor
    question: Tensor
    first: Tensor
    right: Tensor
    together: bool
    unrelated: Tensor
    progress: float = 0.0

    def seen(self) -> Tensor:
        """[Q, P]: whose rows each question sees."""
        P = self.n_contexts
        first = self.first.nonzero()[:, 0]
        owner, away = self.owner[first], self.unrelated[first]
        if self.together:
            return torch.ones(len(first), P, dtype=torch.bool)
        return F.one_hot(torch.where(away, (owner + 1) % P, owner), P).bool()

    @property
    def n_contexts(self) -> int:
        """Passages."""
        return len(self.ids)


def answer_rows(ids: Sequence[int], tokens: Sequence[Sequence[int]], answer: Sequence[int]) -> Tensor:
    """[len(answer), T, 3]: for each token of an answer, the rows that write it where the answer stands in `ids`.

    ids [T], tokens [T][3] (see `Words.tokens`). answer: its ids, the end of the turn last. All places count.
    """
    rows = torch.zeros(len(answer), len(ids), len(WORD_ROLES), dtype=torch.bool)
    words = answer[:-1]
    for start in range(len(ids) - len(words) + 1):
        places = range(start, start + len(words))
        if all(tokens[place][min(n, 1)] == word for n, (place, word) in enumerate(zip(places, words, strict=True))):
            for n, place in enumerate(places):
                rows[n, place, min(n, 1)] = True
            rows[-1, places[-1], 2] = True
    return rows


def same_words(asked: Tensor, words: Tensor) -> Tensor:
    """[n, T]: where words of a passage [T] are those of a question [n], if they stand there at most `_RARE` times."""
    same = asked[:, None] == words
    return same & (same.sum(1, keepdim=True) <= _RARE)


class RowsBatches(Dataset):
    """Batches of `p.passages` passages of like length; item i is a function of (seed, i)."""

    def __init__(self, passages: Sequence[Features], words: Words, p: RowsPreset, seed: int):
        self.passages, self.words, self.p, self.seed = passages, words, p, seed
        self._order: dict[int, list[list[int]]] = {}
        self._made: dict[int, tuple[Tensor, Tensor, list[Tensor]]] = {}
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

    def _rows(self, number: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(tokens [T, 3], right [N, T, 3], alike of each question [its prompt's tokens, T]) of a passage."""
        if number not in self._made:
            one = self.passages[number]
            tokens = self.words.tokens(one.ids[None])[0]
            lists, ids = tokens.tolist(), one.ids.tolist()
            right = [answer_rows(ids, lists, answer.tolist()) for answer in one.answers]
            asked = [self.words.tokens(prompt[None])[0, :, 0] for prompt in one.prompts]
            self._made[number] = tokens, torch.cat(right), [same_words(words, tokens[:, 0]) for words in asked]
        return self._made[number]

    def collate(self, numbers: Sequence[int], together: bool, rng: random.Random | None = None) -> RowsBatch:
        """These passages as a batch; rng: draws the unrelated questions (None: there are none)."""
        chosen = [self.passages[number] for number in numbers]
        made = [self._rows(number) for number in numbers]
        T, P = max(len(one.ids) for one in chosen), len(chosen)
        answers = [answer for one in chosen for answer in one.answers]
        lengths = torch.tensor([len(answer) for answer in answers])

        def padded(rows: Sequence[Tensor], length: int = T) -> Tensor:
            return torch.stack([F.pad(row, (0, 0) * (row.dim() - 1) + (0, length - len(row))) for row in rows])

        questions = torch.tensor([len(one.answers) for one in chosen])
        owner = torch.arange(P).repeat_interleave(questions).repeat_interleave(lengths)
        question = torch.arange(len(answers)).repeat_interleave(lengths)
        first = F.pad(question[1:] != question[:-1], (1, 0), value=True)
        drawn = torch.tensor([rng is not None and rng.random() < self.p.unrelated_share for _ in answers])
        drawn = torch.zeros_like(drawn) if together else drawn
        return RowsBatch(
            ids=padded([one.ids for one in chosen]),
            mask=padded([torch.ones(len(one.ids), dtype=torch.bool) for one in chosen]),
            states=padded([one.states for one in chosen]).float(),
            tokens=padded([tokens for tokens, *_ in made]),
            streams=tuple(stream for one in chosen for stream in one.streams),
            prompts=tuple(prompt for one in chosen for prompt in one.prompts),
            alike=tuple(F.pad(alike, (0, T - alike.shape[1])) for *_, several in made for alike in several),
            labels=torch.cat(answers),
            owner=owner,
            question=question,
            first=first,
            right=torch.cat([F.pad(right, (0, 0, 0, T - right.shape[1])) for _, right, _ in made]),
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

    def __init__(self, base_model: nn.Module, hypernetwork: TokenRows, p: RowsPreset, tests=()):
        super().__init__()
        self.hypernetwork, self.p = hypernetwork, p
        reader = hypernetwork.reader
        size = hypernetwork.config.d_in[hypernetwork.module]
        for layer in (reader.match_layer, reader.last_layer):  # of x / |x|: [d_in, d_in], symmetric
            self.register_buffer(f"whitening_{layer}", torch.eye(size))
        self._frozen = (base_model, part_of_layers(base_model, slice(p.reader_layers[0], None)))
        for parameter in (hypernetwork.feature_mean, hypernetwork.feature_scale):
            parameter.requires_grad_(False)
        self.tests = list(tests)  # batches that are never learned
        self._tally: dict[str, list[float]] = {}

    def whitening(self, layer: int) -> Tensor:
        """[d_in, d_in]: brings x / |x| of a layer to whitened coordinates."""
        return getattr(self, f"whitening_{layer}")

    def forward(self, batch: RowsBatch) -> dict[str, Tensor]:
        loss, notes = self.loss(batch)
        for name, value in notes.items():
            self._tally.setdefault(name, []).append(value)
        return {"loss": loss}

    def codes(self, batch: RowsBatch) -> Tensor:
        """c [P, T, 4, d] of the batch's passages."""
        net = self.hypernetwork
        embeddings = F.embedding(batch.ids, self._frozen[0].get_input_embeddings().weight)
        features = torch.cat([embeddings, batch.states], -1)
        if self.training and self.p.dropout:  # whole tokens' states
            kept = torch.rand(*batch.mask.shape, 1, device=features.device) >= self.p.dropout
            features = torch.where(kept, features, net.feature_mean)
        codes = net.codes(features * batch.mask.unsqueeze(-1), batch.mask)
        return F.dropout(codes, self.p.dropout, self.training)

    def asked(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """`RowReader.asked` of x in whitened coordinates."""
        unit = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        return self.hypernetwork.reader.asked(layer, unit @ self.whitening(layer))

    def upper(
        self, batch: RowsBatch, updated: bool = True, questions: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """What the upper layers make of questions and right answers.

        x [N, d_in] of the last layer, and the residual stream [N, hidden] after it without its rows, at the tokens that
        choose the answers; and for each question x [its tokens, d_in] of the match layer.

        updated: with the low-rank updates; else it is the base model. questions: these alone, in this order.
        """
        questions = range(len(batch.streams)) if questions is None else questions
        base_model, body = self._frozen
        reader, last, kept = self.hypernetwork.reader, {}, {}
        lengths = torch.bincount(batch.question).tolist()
        order = sorted(questions, key=lambda i: len(batch.streams[i]))

        def keep(layer: int, _, inputs) -> None:
            last[layer] = inputs[0]

        def keep_stream(_, __, out) -> None:
            last["stream"] = out if isinstance(out, Tensor) else out[0]

        with ExitStack() as stack:
            for layer, linear in reader.linears(base_model).items():
                stack.enter_context(hooked(linear.register_forward_pre_hook, partial(keep, layer)))
            stack.enter_context(hooked(decoder_layers(base_model)[-1].register_forward_hook, keep_stream))
            stack.enter_context(
                add_deltas(base_model, list(reader.updates(base_model)), self.hypernetwork.config.scale)
                if updated
                else without_lora(base_model)
            )
            for start in range(0, len(order), _AT_ONCE):
                part = order[start : start + _AT_ONCE]
                streams = nn.utils.rnn.pad_sequence([batch.streams[i] for i in part], batch_first=True)
                body(inputs_embeds=streams.to(batch.ids.device, base_model.dtype), use_cache=False)
                for row, i in enumerate(part):
                    first = len(batch.prompts[i]) - 1
                    own = slice(first, first + lengths[i])
                    match = last[reader.match_layer][row, : len(batch.streams[i])]
                    kept[i] = last[reader.last_layer][row, own], last["stream"][row, own], match
        x, stream, match = zip(*(kept[i] for i in questions), strict=True)
        return torch.cat(x).float(), torch.cat(stream).float(), [one.float() for one in match]

    def matches(self, batch: RowsBatch, codes: Tensor, match: Sequence[Tensor]) -> Tensor:
        """p(i, t) [Q, L, P, T]: what each token of the questions finds in the passages that its question sees."""
        q, none = self.asked(self.hypernetwork.reader.match_layer, nn.utils.rnn.pad_sequence(match, batch_first=True))
        context, seen = codes[:, :, len(WORD_ROLES)], batch.seen().to(codes.device)
        if batch.together:
            rows, mask = context.flatten(0, 1), batch.mask.flatten()[None]  # [P * T, d]
        else:
            own = seen.int().argmax(1)
            rows, mask = context[own], batch.mask[own]  # [Q, T, d]
        logits = (q @ rows.mT).masked_fill(~mask[:, None], -torch.inf)
        found = torch.cat([logits, none[..., None]], -1).softmax(-1)[..., :-1]
        return found.unflatten(-1, context.shape[:2]) if batch.together else found.unsqueeze(2) * seen[:, None, :, None]

    def shares(self, batch: RowsBatch, codes: Tensor, x: Tensor, found: Tensor) -> Tensor:
        """Log-shares [N, P * T * 3 + 1] of all rows of words and the null row (last) in the last layer.

        found: of `matches`.
        """
        reader = self.hypernetwork.reader
        q, none = self.asked(reader.last_layer, x)
        logits = torch.einsum("nd,ptkd->nptk", q, codes[:, :, : len(WORD_ROLES)])
        starts = torch.tensor([len(prompt) - 1 for prompt in batch.prompts])
        place = torch.arange(len(x)) - batch.first.nonzero()[:, 0][batch.question]  # in its answer
        evidence = found.cumsum(1)[batch.question, starts[batch.question] + place]  # [N, P, T]
        hidden = ~(batch.seen()[batch.question].to(x.device)[:, :, None] & batch.mask)[..., None]
        logits = (logits + reader.favour(evidence)).masked_fill(hidden, -torch.inf)
        return torch.cat([logits.flatten(1), none[:, None]], 1).log_softmax(-1)

    def match_loss(self, batch: RowsBatch, found: Tensor) -> Tensor:
        """Mean of - log of what the words of questions find at their like in the right passage."""
        first = batch.first.nonzero()[:, 0]
        losses = []
        for i, alike in enumerate(batch.alike):
            has = alike.any(1)
            if has.any() and not batch.unrelated[first[i]]:
                here = found[i, : len(alike), batch.owner[first[i]]]
                losses.append(-(here * alike).sum(1)[has].clamp_min(1e-9).log())
        return torch.cat(losses).mean() if losses else found.sum() * 0

    def loss(self, batch: RowsBatch) -> tuple[Tensor, dict[str, float]]:
        """The loss, and what the log averages."""
        P, p, away = batch.n_contexts, self.p, batch.unrelated
        codes = self.codes(batch)
        x, stream, match = self.upper(batch)
        found = self.matches(batch, codes, match)
        shares = self.shares(batch, codes, x, found)
        log_null, log_rows = shares[:, -1], shares[:, :-1]
        right = torch.zeros(len(x), P, *batch.right.shape[1:], dtype=torch.bool, device=x.device)
        right[torch.arange(len(x)), batch.owner] = batch.right
        related = ~away
        reachable = related & right.flatten(1).any(1)
        pointer = log_null.sum() * 0  # where no answer of the batch stands in its passage
        if reachable.any():
            pointer = -log_rows.masked_fill(~right.flatten(1), -torch.inf)[reachable].logsumexp(-1).mean()
        matched = self.match_loss(batch, found)
        loss = pointer + p.match_weight * matched
        lost = away & batch.first
        if lost.any():
            loss = loss - p.null_weight * log_null[lost].mean()
        where = "together" if batch.together else "alone"
        with torch.no_grad():
            best = right.flatten(1).gather(1, log_rows.argmax(1, keepdim=True))[:, 0]
        notes = {
            f"pointer_loss_{where}": pointer.item(),
            f"match_loss_{where}": matched.item(),
            f"rows_right_{where}": best[reachable].float().mean().item(),
            f"first_rows_right_{where}": best[reachable & batch.first].float().mean().item(),
            "null_share_related": log_null[related & batch.first].exp().mean().item(),
        }
        if lost.any():
            notes["null_share_unrelated"] = log_null[lost].exp().mean().item()
        notes = {name: value for name, value in notes.items() if not math.isnan(value)}  # means of nothing
        net = self.hypernetwork
        if self.training and batch.progress < p.head_from:
            return loss, notes
        stream = stream + log_rows.exp() @ net.values(batch.tokens).flatten(0, 2) * net.config.scale
        if away.any():
            with torch.no_grad():
                questions = batch.question[away].unique().tolist()
                before = self.head(self.upper(batch, False, questions)[1]).log_softmax(-1)
            kept = F.kl_div(self.head(stream[away]).log_softmax(-1), before, reduction="batchmean", log_target=True)
            loss, notes["change_unrelated"] = loss + p.keep_weight * kept, kept.item()
        if not related.any():
            return loss, notes
        return self._with_head(loss, notes, batch, stream)

    def _with_head(self, loss: Tensor, notes: dict, batch: RowsBatch, stream: Tensor) -> tuple[Tensor, dict]:
        """The loss and notes with what the output head says to questions that have their passage."""
        where, related = "together" if batch.together else "alone", ~batch.unrelated
        logits, labels = self.head(stream[related]), batch.labels[related]
        loss = loss + self.p.head_weight * F.cross_entropy(logits, labels)
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

    def head(self, stream: Tensor) -> Tensor:
        """[N, vocabulary]: what the base model says from its last residual stream [N, hidden]."""
        base_model = self._frozen[0]
        return base_model.get_output_embeddings()(final_norm(base_model)(stream))

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
    def start(self, passages: Sequence[Features], batches: RowsBatches) -> None:
        """Take means and sizes of features into the hypernetwork, and whitenings of x from these passages."""
        net, base_model = self.hypernetwork, self._frozen[0]
        embeddings = base_model.get_input_embeddings().weight
        chosen = range(0, len(passages), max(1, len(passages) // 512))
        some = [passages[i] for i in chosen]
        features = torch.cat([torch.cat([embeddings[one.ids], one.states.float()], -1) for one in some])
        net.feature_mean.copy_(features.mean(0))
        net.feature_scale.copy_(features.std(0).clamp_min(1e-6))
        found = [self.upper(batches.collate(chosen[i : i + 16], False), False) for i in range(0, len(chosen), 16)]
        x, stream = (torch.cat(each) for each in list(zip(*found, strict=True))[:2])
        size = stream.norm(dim=-1).mean()
        self.whitening(net.reader.last_layer).copy_(_whitening(x))
        self.whitening(net.reader.match_layer).copy_(_whitening(torch.cat([m[::3] for *_, own in found for m in own])))
        net.log_gain.copy_((2 * size).log())

    @torch.no_grad()
    def plain_keys(self) -> None:
        """Write keys that were learned in whitened coordinates in plain ones."""
        reader = self.hypernetwork.reader
        for layer in (reader.match_layer, reader.last_layer):
            for key in (reader.keys[str(layer)], reader.null_keys[str(layer)]):
                key.copy_(self.whitening(layer) @ key)
            self.whitening(layer).copy_(torch.eye(len(self.whitening(layer))))


def _whitening(x: Tensor) -> Tensor:
    """[d, d], symmetric: x / |x| [N, d] times it has like size in all directions."""
    x = x[x.norm(dim=-1) > 0].double()
    x = x / x.norm(dim=-1, keepdim=True)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    ridge = 0.02 * values.mean()
    return (vectors * (values + ridge).rsqrt() @ vectors.T / x.shape[1] ** 0.5).float()
