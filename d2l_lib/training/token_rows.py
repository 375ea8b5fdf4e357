"""Train the hypernetwork that writes token rows, and what reads them, on questions about passages.

What the frozen layers below make of passages and questions comes from disk (`row_features`); a step runs the
hypernetwork, the upper layers and the output head. The memory of a batch is either each question's own passage or all
passages of the batch together: then a question must find its passage among others. And each question, like prompts
about something else, meets a memory that has nothing for it: the next passage, or all passages but its own. A
token of an answer reads the rows of all passages of its memory here; which chunk it reads is weighed later, on articles
(`studies.chunks`).

    loss = - mean log (sum of p_j over rows j of the right token in places where the answer stands)   p: last layer's
           - match_weight * (mean log (sum of p(i, t) over t with the word of token i)            p(i, t): match layer's
                             + mean log (share of the null row) of words that the other memory lacks)
           - gate_weight * (mean log sigmoid(gate) with its memory + mean log sigmoid(-gate) with the other)

The first token of an answer counts `first_weight` times. The base model's words are not in the loss, for rows say them
where the gate is open. Keys are learned in whitened coordinates of x / |x|, where all directions are of like size, and
written in plain ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from d2l_lib.base_model import final_norm
from d2l_lib.lora import add_deltas, hooked, without_lora
from d2l_lib.presets import RowsPreset
from d2l_lib.row_reader import nearness, part_of_layers
from d2l_lib.token_rows import WORD_ROLES, TokenRows, Words
from d2l_lib.training.notes import Notes, Step
from d2l_lib.training.row_features import Features, Prompt, batches_of_like_size, layer_output, whitening

_AT_ONCE = 16  # questions of a pass through the upper layers: of like length, so little is padded
_RARE = 3  # times that a word stands in a passage, at most, to be looked for


@dataclass(frozen=True)
class RowsBatch:
    """Passages [P, T] and the tokens [N] of the answers to their questions.

    mask [P, T]: True at tokens. states [P, T, S]. tokens [P, T, 3]: what each row writes.
    streams: of each of Q questions what goes into the match layer [its tokens, hidden]. prompts: ids of its prompt.
    others: streams of prompts about something else.
    alike: for each question [its prompt's tokens, T], True at its passage's tokens that write the same rare word.
    lacking: for each question, then each other prompt [its tokens], True where the other memory has no such word.
    owner [N]: each token's passage. question [N]: each token's question, in order. first [N]: of its answer.
    right [N, T, 3]: the rows of its passage that stand for it, where its answer stands.
    together: one memory for all.
    """

    ids: Tensor
    mask: Tensor
    states: Tensor
    tokens: Tensor
    streams: tuple[Tensor, ...]
    prompts: tuple[Tensor, ...]
    others: tuple[Tensor, ...]
    alike: tuple[Tensor, ...]
    lacking: tuple[Tensor, ...]
    labels: Tensor
    owner: Tensor
    question: Tensor
    first: Tensor
    right: Tensor
    together: bool

    def to(self, device: torch.device) -> RowsBatch:
        """The same on a device."""

        def moved(value):
            if isinstance(value, tuple):
                return tuple(map(moved, value))
            return value.to(device) if isinstance(value, Tensor) else value

        return RowsBatch(**{field.name: moved(getattr(self, field.name)) for field in fields(self)})

    @property
    def own(self) -> Tensor:
        """[Q]: each question's passage."""
        return self.owner[self.first]

    @property
    def starts(self) -> Tensor:
        """[Q]: the last token of each prompt, which chooses the first of its answer."""
        return torch.tensor([len(prompt) - 1 for prompt in self.prompts], device=self.labels.device)

    @property
    def n_contexts(self) -> int:
        """Passages."""
        return len(self.ids)


def answer_rows(ids: Sequence[int], answer: Sequence[int]) -> Tensor:
    """[len(answer), T, 3]: for each token of an answer, the rows that write it where the answer stands in `ids` [T].

    answer: its ids, the end of the turn last. All places count.
    """
    rows = torch.zeros(len(answer), len(ids), len(WORD_ROLES), dtype=torch.bool)
    words = answer[:-1]
    for start in range(len(ids) - len(words) + 1):
        if list(ids[start : start + len(words)]) == list(words):
            for n in range(len(words)):
                rows[n, start + n, min(n, 1)] = True
            rows[-1, start + len(words) - 1, 2] = True
    return rows


def same_words(asked: Tensor, words: Tensor) -> Tensor:
    """[n, T]: where words of a passage [T] are those of a question [n], if they stand there at most `_RARE` times."""
    same = asked[:, None] == words
    return same & (same.sum(1, keepdim=True) <= _RARE)


class RowsBatches(Dataset):
    """Batches of `p.passages` passages of like length; item i is a function of (seed, i).

    others: (stream, ids) of prompts about something else; `p.others` of them are in each batch.
    """

    def __init__(
        self, passages: Sequence[Features], words: Words, p: RowsPreset, seed: int, others: Sequence[Prompt] = ()
    ):
        self.passages, self.words, self.p, self.seed, self.others = passages, words, p, seed, others
        self._order: dict[int, list[list[int]]] = {}
        self._made: dict[int, tuple[Tensor, Tensor, list[Tensor], list[Tensor]]] = {}
        self._per_epoch = len(self._epoch(0))  # the same in each

    def __len__(self) -> int:
        return self.p.steps

    def _epoch(self, epoch: int) -> list[list[int]]:
        if epoch not in self._order:
            rng = random.Random(f"rows/{self.seed}/{epoch}")
            batches = batches_of_like_size(rng, [len(one.ids) for one in self.passages], self.p.passages)
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
        together = rng.random() < self.p.together_share
        return self.collate(batch, together, rng.sample(self.others, min(self.p.others, len(self.others))))

    def _rows(self, number: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Of a passage: words [T], right [N, T, 3]; of its questions: words of the prompt, alike [those, T]."""
        if number not in self._made:
            one = self.passages[number]
            own = self.words.alike(one.ids)
            right = [answer_rows(one.ids.tolist(), answer.tolist()) for answer in one.answers]
            asked = [self.words.alike(prompt) for prompt in one.prompts]
            alike = [same_words(words, own) for words in asked]
            self._made[number] = own, torch.cat(right), asked, alike
        return self._made[number]

    def collate(self, numbers: Sequence[int], together: bool, others: Sequence[Prompt] = ()) -> RowsBatch:
        """These passages as a batch."""
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
        return RowsBatch(
            ids=padded([one.ids for one in chosen]),
            mask=padded([torch.ones(len(one.ids), dtype=torch.bool) for one in chosen]),
            states=padded([one.states for one in chosen]).float(),
            tokens=padded([self.words.tokens(one.ids) for one in chosen]),
            streams=tuple(stream for one in chosen for stream in one.streams),
            prompts=tuple(prompt for one in chosen for prompt in one.prompts),
            others=tuple(stream for stream, _ in others),
            lacking=self._lacking(made, [ids for _, ids in others], together),
            alike=tuple(F.pad(alike, (0, T - alike.shape[1])) for *_, several in made for alike in several),
            labels=torch.cat(answers),
            owner=owner,
            question=question,
            first=first,
            right=torch.cat([F.pad(right, (0, 0, 0, T - right.shape[1])) for _, right, *_ in made]),
            together=together,
        )

    def _lacking(self, made: Sequence[tuple], others: Sequence[Tensor], together: bool) -> tuple[Tensor, ...]:
        """`RowsBatch.lacking` of passages as `_rows` gives them."""
        P, asked = len(made), [(own, words) for own, (_, _, several, _) in enumerate(made) for words in several]
        lacking = []
        for number, (own, words) in enumerate([*asked, *((None, self.words.alike(ids)) for ids in others)]):
            seen = [i for i in range(P) if i != own] if together else [(number if own is None else own + 1) % P]
            lacking.append(~torch.isin(words, torch.cat([words[:0], *(made[i][0] for i in seen)])))
        return tuple(lacking)


def validation_batches(
    passages: Sequence[Features], words: Words, p: RowsPreset, others: Sequence[Prompt] = ()
) -> list[RowsBatch]:
    """All passages, in batches of at most `p.passages`, each passage alone and all of a batch together.

    others: (stream, ids) of prompts about something else, shared out among the batches.
    """
    batches = RowsBatches(passages, words, p, seed=0)
    starts = range(0, len(passages), p.passages)
    parts = [range(start, min(start + p.passages, len(passages))) for start in starts]
    shares = [others[number :: len(parts)] for number in range(len(parts))]
    return [
        batches.collate(part, together, share)
        for part, share in zip(parts, shares, strict=True)
        for together in (False, True)
    ]


@dataclass(frozen=True)
class Found:
    """p(i, t) of the match layer, for Q questions and other prompts of at most L tokens.

    found [Q, L, P', T]: with their memory, one softmax over all of it. of_each [Q, L, P', T]: one over each passage.
    astray [Q + others, L, P', T]: one over each passage of the other memory. log_null [Q + others, L]: the log of the
    null row's share there, the mean of the passages. content [Q + others, L]: how much is asked up to each token. P' is
    1 where each question sees one passage.
    """

    found: Tensor
    of_each: Tensor
    astray: Tensor
    log_null: Tensor
    content: Tensor


class RowsStep(Step):
    """The loss {"loss": ...} of a `RowsBatch`, and numbers for the log."""

    def __init__(self, base_model: nn.Module, hypernetwork: TokenRows, p: RowsPreset, tests=()):
        super().__init__()
        self.hypernetwork, self.p = hypernetwork, p
        reader = hypernetwork.reader
        size = hypernetwork.config.d_in[hypernetwork.module]
        for layer in (reader.match_layer, reader.last_layer):  # of x / |x|: [d_in, d_in], symmetric
            self.register_buffer(f"whitening_{layer}", torch.eye(size))
        lowest, upper = reader.match_layer, reader.match_layer + 1
        parts = [part_of_layers(base_model, slice(lowest, upper)), part_of_layers(base_model, slice(upper, None))]
        self._frozen = (base_model, *parts)
        for parameter in (hypernetwork.feature_mean, hypernetwork.feature_scale, reader.gate_rise):
            parameter.requires_grad_(False)
        self.tests = list(tests)  # batches that are never learned

    def whitening(self, layer: int) -> Tensor:
        """[d_in, d_in]: brings x / |x| of a layer to whitened coordinates."""
        return getattr(self, f"whitening_{layer}")

    def forward(self, batch: RowsBatch) -> dict[str, Tensor]:
        loss, notes = self.loss(batch.to(next(self.hypernetwork.parameters()).device))
        for name, value in notes.items():
            self.notes.add(name, value)
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

    def unit(self, layer: int, x: Tensor) -> Tensor:
        """x / |x| in whitened coordinates."""
        return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6) @ self.whitening(layer)

    @torch.no_grad()
    def lower(self, streams: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Of streams [tokens, hidden] into the match layer: x [tokens, d_in] there, and the streams after it."""
        base_model, body, _ = self._frozen
        linear, found = self.hypernetwork.reader.linears(base_model)[self.hypernetwork.reader.match_layer], {}
        order, xs, after = sorted(range(len(streams)), key=lambda i: len(streams[i])), {}, {}
        with (
            hooked(linear.register_forward_pre_hook, lambda _, inputs: found.update(x=inputs[0])),
            hooked(body.layers[-1].register_forward_hook, lambda _, __, out: found.update(stream=layer_output(out))),
            without_lora(base_model),
        ):
            for start in range(0, len(order), _AT_ONCE):
                part = order[start : start + _AT_ONCE]
                body(inputs_embeds=self._padded([streams[i] for i in part]), use_cache=False)
                for row, i in enumerate(part):
                    xs[i], after[i] = (found[name][row, : len(streams[i])].float() for name in ("x", "stream"))
        return [xs[i] for i in range(len(streams))], [after[i] for i in range(len(streams))]

    def upper(self, batch: RowsBatch, streams: Sequence[Tensor], gates: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        """x [N, d_in] of the last layer and the residual stream [N, hidden] after it, at tokens that choose answers.

        streams: of each question, out of the match layer. gates: at its tokens, 1 where the updates act; None: nowhere.
        """
        base_model, _, body = self._frozen
        reader, found, kept = self.hypernetwork.reader, {}, {}
        linear = reader.linears(base_model)[reader.last_layer]
        lengths = torch.bincount(batch.question).tolist()
        order = sorted(range(len(streams)), key=lambda i: len(streams[i]))
        updates = [] if gates is None else list(reader.updates(base_model, lambda: found["gates"]))
        with (
            hooked(linear.register_forward_pre_hook, lambda _, inputs: found.update(x=inputs[0])),
            hooked(body.layers[-1].register_forward_hook, lambda _, __, out: found.update(stream=layer_output(out))),
            add_deltas(base_model, updates, self.hypernetwork.config.scale) if updates else without_lora(base_model),
        ):
            for start in range(0, len(order), _AT_ONCE):
                part = order[start : start + _AT_ONCE]
                if updates:
                    found["gates"] = self._padded([gates[i] for i in part])
                body(inputs_embeds=self._padded([streams[i] for i in part]), use_cache=False)
                for row, i in enumerate(part):
                    first = len(batch.prompts[i]) - 1
                    own = slice(first, first + lengths[i])
                    kept[i] = found["x"][row, own], found["stream"][row, own]
        x, stream = zip(*(kept[i] for i in range(len(streams))), strict=True)
        return torch.cat(x).float(), torch.cat(stream).float()

    def _padded(self, rows: Sequence[Tensor]) -> Tensor:
        """These rows of one pass side by side, in the base model's precision."""
        base_model = self._frozen[0]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(base_model.device, base_model.dtype)

    def matches(self, batch: RowsBatch, codes: Tensor, xs: Sequence[Tensor]) -> Found:
        """What tokens of the questions and other prompts find."""
        reader, P, Q = self.hypernetwork.reader, batch.n_contexts, len(batch.streams)
        unit = self.unit(reader.match_layer, nn.utils.rnn.pad_sequence(xs, batch_first=True))
        q, none = reader.asked(reader.match_layer, unit), reader.nothing(unit)
        content = reader.content(unit).cumsum(1)
        context = codes[:, :, len(WORD_ROLES)]
        logits = (q.flatten(0, 1) @ context.flatten(0, 1).T).unflatten(1, context.shape[:2])
        logits = logits.masked_fill(~batch.mask, -torch.inf).unflatten(0, q.shape[:2])  # [Q + others, L, P, T]
        each = torch.cat([none[..., None, None].expand(-1, -1, P, 1), logits], -1).log_softmax(-1)
        rows, own = torch.arange(len(xs), device=logits.device), batch.own
        if not batch.together:
            here = each[rows[:Q], :, own, 1:].exp().unsqueeze(2)
            away = each[rows, :, torch.cat([own + 1, rows[Q:]]) % P]
            return Found(here, here, away[..., 1:].exp().unsqueeze(2), away[..., 0], content)
        joint = torch.cat([none[:Q, :, None], logits[:Q].flatten(2)], -1).softmax(-1)[..., 1:]
        kept = torch.ones(len(xs), 1, P, device=logits.device)
        kept[rows[:Q], 0, own] = 0
        log_null = (each[..., 0] * kept).sum(-1) / kept.sum(-1)
        of_each = each[..., 1:].exp()
        astray = of_each * kept.unsqueeze(-1)
        return Found(joint.unflatten(-1, logits.shape[2:]), of_each[:Q], astray, log_null, content)

    def gate_logits(self, batch: RowsBatch, match: Found) -> tuple[Tensor, Tensor]:
        """The gate's logit when all is asked: [Q] with each question's memory, [Q + others] with the other one."""
        starts = batch.starts
        ends = torch.cat([starts, starts.new_tensor([len(one) - 1 for one in batch.others])])
        of_each, astray, every = match.of_each.cumsum(1), match.astray.cumsum(1), range(len(ends))
        chunks = torch.full_like(ends, of_each.shape[2])
        chunks[: len(starts)] -= int(batch.together)  # all but its own
        content = match.content[every, ends]
        related = self.gates(of_each[every[: len(starts)], starts], content[: len(starts)])
        return related, self.gates(astray[every, ends], content, chunks)

    def gates(self, evidence: Tensor, content: Tensor, chunks: Tensor | None = None) -> Tensor:
        """[...]: the gate's logit of evidence [..., P', T] and content [...].

        chunks: [...], how many count (None: all P').
        """
        near = nearness(evidence).flatten(-3, -2)
        return self.hypernetwork.reader.gate(near, content, evidence.shape[-2] if chunks is None else chunks)

    def _acting(self, match: Found, streams: Sequence[Tensor], starts: Tensor) -> list[Tensor]:
        """For each question [its tokens], 1 where the updates act: from the answer on, and where the gate opens before.

        In training the gate opens at a place of its question that is drawn.
        """
        if self.training:
            opened = (torch.rand(len(starts), device=starts.device) * (starts + 1)).long()
        else:
            with torch.no_grad():
                is_open = self.gates(match.of_each.cumsum(1), match.content[: len(starts)]) > 0  # [Q, L]
            opened = torch.where(is_open.any(1), is_open.int().argmax(1), len(is_open[0]))
            opened = torch.minimum(opened, starts)
        return [
            (torch.arange(len(stream), device=starts.device) >= place).float()
            for stream, place in zip(streams, opened, strict=True)
        ]

    def shares(self, batch: RowsBatch, codes: Tensor, x: Tensor, evidence: Tensor) -> Tensor:
        """Log-shares [N, P' * T * 3] of rows of words in the last layer; evidence [N, P', T] at the same tokens."""
        reader = self.hypernetwork.reader
        unit = self.unit(reader.last_layer, x)
        words = codes[:, :, : len(WORD_ROLES)]
        logits = (reader.asked(reader.last_layer, unit) @ words.flatten(0, 2).T).unflatten(1, words.shape[:3])
        hidden = ~batch.mask.expand(len(x), -1, -1)
        if not batch.together:
            every = torch.arange(len(x), device=x.device)
            logits, hidden = (one[every, batch.owner].unsqueeze(1) for one in (logits, hidden))
        near = nearness(evidence)  # [N, P', T, k]
        logits = logits + reader.favour(near.flatten(1, 2), unit).unflatten(1, near.shape[1:3])
        return logits.masked_fill(hidden.unsqueeze(-1), -torch.inf).flatten(1).log_softmax(-1)

    def match_loss(self, batch: RowsBatch, found: Tensor) -> Tensor:
        """Mean of - log of what the words of questions find at their like in the right passage."""
        losses = []
        for i, (alike, own) in enumerate(zip(batch.alike, batch.own.tolist(), strict=True)):
            has = alike.any(1)
            if has.any():
                here = found[i, : len(alike), own if batch.together else 0]
                losses.append(-(here * alike).sum(1)[has].clamp_min(1e-9).log())
        return torch.cat(losses).mean() if losses else found.sum() * 0

    def loss(self, batch: RowsBatch) -> tuple[Tensor, dict[str, float]]:
        """The loss, and what the log averages."""
        p, Q, where = self.p, len(batch.streams), "together" if batch.together else "alone"
        codes = self.codes(batch)
        xs, streams = self.lower((*batch.streams, *batch.others))
        match = self.matches(batch, codes, xs)
        starts = batch.starts
        related, unrelated = self.gate_logits(batch, match)
        gate_loss = F.softplus(-related).mean() + F.softplus(unrelated).mean()
        x, stream = self.upper(batch, streams[:Q], self._acting(match, streams[:Q], starts))
        place = torch.arange(len(x), device=x.device) - batch.first.nonzero()[:, 0][batch.question]  # in its answer
        evidence = match.found.cumsum(1)[batch.question, starts[batch.question] + place]
        log_rows = self.shares(batch, codes, x, evidence)
        right = self._right(batch)
        reachable = right.any(1)
        pointer = log_rows.sum() * 0  # where no answer of the batch stands in its passage
        if reachable.any():
            weights = 1 + (p.first_weight - 1) * batch.first[reachable].float()
            lost = -log_rows.masked_fill(~right, -torch.inf)[reachable].logsumexp(-1)
            pointer = (lost * weights).sum() / weights.sum()
        matched = self.match_loss(batch, match.found)
        lacked = [own[: len(lacking)][lacking] for own, lacking in zip(match.log_null, batch.lacking, strict=True)]
        missed = -torch.cat(lacked).mean() if any(map(len, lacked)) else match.log_null.sum() * 0
        with torch.no_grad():
            best = right.gather(1, log_rows.argmax(1, keepdim=True))[:, 0]
        notes = {
            f"pointer_loss_{where}": pointer.item(),
            f"match_loss_{where}": matched.item(),
            f"miss_loss_{where}": missed.item(),
            f"gate_loss_{where}": gate_loss.item(),
            f"rows_right_{where}": best[reachable].float().mean().item(),
            f"first_rows_right_{where}": best[reachable & batch.first].float().mean().item(),
            f"open_related_{where}": (related > 0).float().mean().item(),
            f"open_unrelated_{where}": (unrelated[:Q] > 0).float().mean().item(),
            f"open_others_{where}": (unrelated[Q:] > 0).float().mean().item(),
        }
        if not self.training:
            notes |= self._said(batch, stream, log_rows, where)
        notes = {name: value for name, value in notes.items() if not math.isnan(value)}  # means of nothing
        return pointer + p.match_weight * (matched + missed) + p.gate_weight * gate_loss, notes

    def _right(self, batch: RowsBatch) -> Tensor:
        """[N, P' * T * 3]: the right rows of each token's memory."""
        if not batch.together:
            return batch.right.flatten(1)
        right = batch.right.new_zeros(len(batch.right), batch.n_contexts, *batch.right.shape[1:])
        right[torch.arange(len(right), device=right.device), batch.owner] = batch.right
        return right.flatten(1)

    @torch.no_grad()
    def _said(self, batch: RowsBatch, stream: Tensor, log_rows: Tensor, where: str) -> dict[str, float]:
        """What the output head says where the gate is open: right tokens, first tokens and whole answers."""
        net = self.hypernetwork
        values = net.values(batch.tokens).flatten(1, 2)  # [P, T * 3, d_out]
        if batch.together:
            read = log_rows.exp() @ values.flatten(0, 1)
        else:
            read = torch.einsum("nr,nro->no", log_rows.exp(), values[batch.owner])
        hits = self.head(stream + read * net.config.scale).argmax(-1) == batch.labels
        wrong = torch.zeros(len(batch.streams), device=hits.device).index_add(0, batch.question, (~hits).float())
        return {
            f"tokens_right_{where}": float(hits.float().mean()),
            f"first_right_{where}": float(hits[batch.first].float().mean()),
            f"exact_match_{where}": float((wrong == 0).float().mean()),
        }

    def head(self, stream: Tensor) -> Tensor:
        """[N, vocabulary]: what the base model says from its last residual stream [N, hidden]."""
        base_model = self._frozen[0]
        return base_model.get_output_embeddings()(final_norm(base_model)(stream))

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
    def start(self, passages: Sequence[Features], batches: RowsBatches) -> None:
        """Take means and sizes of features into the hypernetwork, and whitenings of x from these passages."""
        net, base_model = self.hypernetwork, self._frozen[0]
        embeddings = base_model.get_input_embeddings().weight
        chosen = range(0, len(passages), max(1, len(passages) // 512))
        some = [passages[i] for i in chosen]
        features = torch.cat([torch.cat([embeddings[one.ids], one.states.float()], -1) for one in some])
        net.feature_mean.copy_(features.mean(0))
        net.feature_scale.copy_(features.std(0).clamp_min(1e-6))
        last, match, sizes = [], [], []
        for start in range(0, len(chosen), 16):
            batch = batches.collate(chosen[start : start + 16], False).to(net.feature_mean.device)
            xs, streams = self.lower(batch.streams)
            x, stream = self.upper(batch, streams, None)
            last.append(x)
            match += [own[::3] for own in xs]
            sizes.append(stream.norm(dim=-1))
        self.whitening(net.reader.last_layer).copy_(whitening(_directions(torch.cat(last))))
        self.whitening(net.reader.match_layer).copy_(whitening(_directions(torch.cat(match))))
        net.log_gain.copy_((2 * torch.cat(sizes).mean()).log())

    @torch.no_grad()
    def calibrate(self, batches: Sequence[RowsBatch]) -> dict[str, float]:
        """Set the gate so that a share of `p.gate_error` of the other prompts open it, with one passage and with all.

        batches: half of them alone and half together. Shares that it lets pass then, for the log.
        """
        self.eval()
        logits: dict[tuple[str, bool], list[Tensor]] = {}
        for batch in batches:
            match = self.matches(batch, self.codes(batch), self.lower((*batch.streams, *batch.others))[0])
            related, unrelated = self.gate_logits(batch, match)
            for who, own in (("related", related), ("others", unrelated[len(related) :])):
                logits.setdefault((who, batch.together), []).append(own)
        alone, among = (
            float(torch.cat(logits["others", together]).quantile(1 - self.p.gate_error)) for together in (False, True)
        )
        rise = max(0.0, (among - alone) / math.log(max(batch.n_contexts for batch in batches)))
        self.hypernetwork.reader.raise_gate(alone, rise)
        shares: dict[str, float] = {}
        for (who, together), several in logits.items():
            counts = [batch.n_contexts if together else 1 for batch in batches if batch.together == together]
            is_open = [own > alone + rise * math.log(n) for own, n in zip(several, counts, strict=True)]
            where = "together" if together else "alone"
            shares[f"open_{who}_{where}"] = round(float(torch.cat(is_open).float().mean()), 4)
        return shares

    @torch.no_grad()
    def plain_keys(self) -> None:
        """Write keys that were learned in whitened coordinates in plain ones."""
        reader = self.hypernetwork.reader
        own = {
            reader.match_layer: (reader.null_key, reader.content_key),
            reader.last_layer: (reader.evidence_keys,),
        }
        for layer, keys in own.items():
            for key in (reader.keys[str(layer)], *keys):
                key.copy_(self.whitening(layer) @ key)
            self.whitening(layer).copy_(torch.eye(len(self.whitening(layer))))


def _directions(x: Tensor) -> Tensor:
    """x / |x| of those x [N, d] that are not zero."""
    x = x[x.norm(dim=-1) > 0].double()
    return x / x.norm(dim=-1, keepdim=True)
