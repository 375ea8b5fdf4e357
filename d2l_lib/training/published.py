"""Train the published form on questions about passages: a Perceiver that writes blocks of a plain sum.

    y = W x + s * B^T (A x)    in the last layers of the base model alone

What the frozen layers make of passages and questions comes from disk (`row_features`). The training has two stages.

    pointer    the base model runs without blocks, once. Its x at the answer's tokens are kept, and what a block adds
               goes straight to the output head:
                   logits = head(h + sum over layers of s B^T (A x))
               This is exact for the last layer. No step runs the base model, so a step is cheap.
    whole      the upper layers run with the blocks, and gradients go through them. Other passages' blocks and prompts
               about something else keep the base model's words.

Keys are learned in whitened coordinates of x, and values in units of the residual stream (`Coordinates`); `fold` then
writes both in plain ones. The hypernetwork starts as a copier (`start_copying`): each row reads one kind of token, and
its value is the direction that writes this token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from d2l_lib.base_model import final_norm, target_linears
from d2l_lib.hypernetwork import Hypernetwork
from d2l_lib.lora import add_deltas, hooked, without_lora
from d2l_lib.presets import PublishedPreset
from d2l_lib.row_reader import part_of_layers
from d2l_lib.token_rows import Words
from d2l_lib.training.row_features import Features, Prompt, batches_of_like_size, layer_output, whitening

_AT_ONCE = 16  # questions of a pass through the upper layers
_CANDIDATES = 3000  # tokens that are always among those to choose from
_TAG = 8.0  # of a row among latents; their other numbers have a root mean square near 1
_LIKE_ANSWERS, _ASTRAY, _FAITHFUL = 2.0, 3.0, 1.2  # a fresh row's attention: to answers, at random, to its latent
_MATCH = 0.4  # a fresh key's match with its own x


@dataclass(frozen=True)
class Asked:
    """A question as the base model without blocks sees it, at the tokens that choose its answer.

    x [n, L, d_in]: inputs of the target linears, whitened. stream [n, hidden]: after the last layer. labels [n].
    """

    x: Tensor
    stream: Tensor
    labels: Tensor


@dataclass(frozen=True)
class PassageBatch:
    """Passages ids [P, T], mask [P, T], states [P, T, S], and their questions.

    owner [Q]: each question's passage. asked: each as the base model sees it.
    streams, prompts, answers: see `Features`. others: prompts about something else. whole: run the upper layers.
    """

    ids: Tensor
    mask: Tensor
    states: Tensor
    owner: Tensor
    asked: tuple[Asked, ...]
    streams: tuple[Tensor, ...]
    prompts: tuple[Tensor, ...]
    answers: tuple[Tensor, ...]
    others: tuple[Tensor, ...]
    whole: bool

    @property
    def n_contexts(self) -> int:
        """Passages."""
        return len(self.ids)


class PassageBatches(Dataset):
    """Batches of `p.passages` passages of like length; item i is a function of (seed, i).

    ask: (passages) -> for each its questions as the base model sees them; called once for each passage.
    others: prompts about something else.
    """

    def __init__(
        self,
        passages: Sequence[Features],
        ask: Callable[[Sequence[Features]], list[list[Asked]]],
        p: PublishedPreset,
        seed: int,
        others: Sequence[Prompt] = (),
    ):
        self.passages, self.ask, self.p, self.seed, self.others = passages, ask, p, seed, others
        self._asked: dict[int, list[Asked]] = {}
        self._order: dict[tuple[bool, int], list[list[int]]] = {}

    def __len__(self) -> int:
        return self.p.steps

    def _epoch(self, whole: bool, epoch: int) -> list[list[int]]:
        if (whole, epoch) not in self._order:
            n = self.p.whole_passages if whole else self.p.passages
            rng = random.Random(f"published/{self.seed}/{whole}/{epoch}")
            batches = batches_of_like_size(rng, [len(one.ids) for one in self.passages], n)
            batches = [batch for batch in batches if len(batch) > 1]
            if not batches:
                raise ValueError("a batch needs two passages or more: give more passages")
            rng.shuffle(batches)
            self._order = {(whole, epoch): batches}
        return self._order[whole, epoch]

    def __getitem__(self, i: int) -> PassageBatch:
        whole = i >= self.p.pointer_steps
        number = i - self.p.pointer_steps * whole
        epoch, place = divmod(number, len(self._epoch(whole, 0)))
        batches = self._epoch(whole, epoch)
        rng = random.Random(f"published/{self.seed}/{i}")
        others = rng.sample(self.others, min(self.p.others, len(self.others))) if whole else []
        return self.collate(batches[place % len(batches)], whole, others)

    def collate(self, numbers: Sequence[int], whole: bool, others: Sequence[Prompt] = ()) -> PassageBatch:
        """These passages as a batch."""
        chosen = [self.passages[number] for number in numbers]
        padded = nn.utils.rnn.pad_sequence
        if not whole and (new := [number for number in numbers if number not in self._asked]):
            self._asked |= dict(zip(new, self.ask([self.passages[number] for number in new]), strict=True))
        counts = torch.tensor([len(one.answers) for one in chosen])
        return PassageBatch(
            ids=padded([one.ids for one in chosen], batch_first=True),
            mask=padded([torch.ones(len(one.ids), dtype=torch.bool) for one in chosen], batch_first=True),
            states=padded([one.states for one in chosen], batch_first=True).float(),
            owner=torch.arange(len(chosen)).repeat_interleave(counts),
            asked=() if whole else tuple(one for number in numbers for one in self._asked[number]),
            streams=tuple(stream for one in chosen for stream in one.streams),
            prompts=tuple(prompt for one in chosen for prompt in one.prompts),
            answers=tuple(answer for one in chosen for answer in one.answers),
            others=tuple(stream for stream, _ in others),
            whole=whole,
        )


class Coordinates(nn.Module):
    """Linear maps from the coordinates in which blocks are learned to plain ones: A = a W, B = gain b.

    W [L, d_in, d_in], symmetric: W x has like size in all directions, and a length near 1. gain: a number.
    """

    def __init__(self, n_layers: int, d_in: int):
        super().__init__()
        self.register_buffer("whitening", torch.eye(d_in).repeat(n_layers, 1, 1))
        self.register_buffer("gain", torch.ones(()))

    def plain(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """(A, B) [..., L, r, size] of learned (a, b)."""
        return A @ self.whitening, B * self.gain


class PublishedStep(nn.Module):
    """The loss {"loss": ...} of a `PassageBatch`, and numbers for the log.

    tests: batches that are never learned.
    """

    def __init__(self, base_model: nn.Module, hypernetwork: Hypernetwork, p: PublishedPreset, tests=()):
        super().__init__()
        config = hypernetwork.config
        (self.module,) = config.modules
        self.hypernetwork, self.p = hypernetwork, p
        self.layers = config.written_layers
        self.coordinates = Coordinates(config.n_written, config.d_in[self.module])
        self._frozen = (base_model, part_of_layers(base_model, slice(p.below, None)))
        self.tests, self.whole_tests = list(tests), []
        self._whole = False
        self.candidates = torch.arange(min(_CANDIDATES, base_model.get_output_embeddings().weight.shape[0]))
        self._tally: dict[str, list[float]] = {}

    # --- what the base model makes of questions -----------------------------------------------------------------------
    def ask(self, passages: Sequence[Features]) -> list[list[Asked]]:
        """For each passage its questions, x in whitened coordinates; float16."""
        return self.whitened(self.asked(passages))

    @torch.no_grad()
    def asked(self, passages: Sequence[Features]) -> list[list[Asked]]:
        """For each passage its questions, x in plain coordinates; float16."""
        base_model, body = self._frozen
        linears, found = self._linears(), {}
        flat = [
            (q[0].float(), len(q[1]), q[2])
            for one in passages
            for q in zip(one.streams, one.prompts, one.answers, strict=True)
        ]
        order, done = sorted(range(len(flat)), key=lambda i: len(flat[i][0])), {}

        def keep(layer: int):
            return lambda _, inputs: found.__setitem__(layer, inputs[0])

        with ExitStack() as stack:
            for place, linear in enumerate(linears):
                stack.enter_context(hooked(linear.register_forward_pre_hook, keep(place)))
            stack.enter_context(
                hooked(body.layers[-1].register_forward_hook, lambda _, __, out: found.update(stream=layer_output(out)))
            )
            stack.enter_context(without_lora(base_model))
            for start in range(0, len(order), _AT_ONCE):
                part = order[start : start + _AT_ONCE]
                body(inputs_embeds=self._padded([flat[i][0] for i in part]), use_cache=False)
                x = torch.stack([found[place] for place in range(len(linears))], 2)
                for row, i in enumerate(part):
                    _, n_prompt, answer = flat[i]
                    own = slice(n_prompt - 1, n_prompt - 1 + len(answer))
                    done[i] = Asked(x[row, own].half().cpu(), found["stream"][row, own].half().cpu(), answer)
        every = iter([done[i] for i in range(len(flat))])
        return [[next(every) for _ in one.streams] for one in passages]

    def _linears(self) -> list[nn.Linear]:
        (linears,) = target_linears(self._frozen[0], [self.module]).values()
        return [linears[layer] for layer in self.layers]

    def _padded(self, rows: Sequence[Tensor]) -> Tensor:
        base_model = self._frozen[0]
        return nn.utils.rnn.pad_sequence([row.float() for row in rows], batch_first=True).to(
            base_model.device, base_model.dtype
        )

    @torch.no_grad()
    def measure(self, asked: Sequence[Sequence[Asked]]) -> None:
        """Take the whitenings of x and the size of the stream from these questions."""
        flat = [one for several in asked for one in several]
        for place in range(len(self.layers)):
            self.coordinates.whitening[place] = whitening(torch.cat([one.x[:, place] for one in flat]))
        self.coordinates.gain.fill_(
            torch.cat([one.stream for one in flat]).float().norm(dim=-1).mean() / self.hypernetwork.config.scale
        )

    @torch.no_grad()
    def whitened(self, asked: Sequence[Sequence[Asked]]) -> list[list[Asked]]:
        """The same questions with x in whitened coordinates."""
        W = self.coordinates.whitening
        return [
            [Asked(torch.einsum("nld,lde->nle", one.x.float(), W).half(), one.stream, one.labels) for one in several]
            for several in asked
        ]

    # --- the loss -----------------------------------------------------------------------------------------------------
    def forward(self, batch: PassageBatch) -> dict[str, Tensor]:
        loss, notes = self.loss(batch)
        for name, value in notes.items():
            self._tally.setdefault(name, []).append(value)
        return {"loss": loss}

    def rows(self, batch: PassageBatch) -> tuple[Tensor, Tensor]:
        """Learned (a, b) [P, L, r, size] of the passages."""
        net = self.hypernetwork
        parts = [F.embedding(batch.ids, self._frozen[0].get_input_embeddings().weight), batch.states]
        features = torch.cat(parts, -1)
        if self.training and self.p.dropout:
            kept = torch.rand(*batch.mask.shape, device=features.device) >= self.p.dropout
            kept[:, 0] = True
            mask = batch.mask & kept
        else:
            mask = batch.mask
        features = features.masked_fill(~mask.unsqueeze(-1), 0.0)
        embedding = net._embed(features, mask, False, None)
        return net._write(embedding, None)[self.module]

    def loss(self, batch: PassageBatch) -> tuple[Tensor, dict[str, float]]:
        A, B = self.rows(batch)
        self._whole = batch.whole
        return self._whole_loss(batch, A, B) if batch.whole else self._pointer_loss(batch, A, B)

    def _with_bias(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        net = self.hypernetwork
        n = len(A)
        A = torch.cat([A, net.bias_A[self.module].expand(n, -1, -1, -1)], 2)
        return A, torch.cat([B, net.bias_B[self.module].expand(n, -1, -1, -1)], 2)

    def pointer_streams(self, asked: Sequence[Asked], owner: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """[N, hidden]: the last stream at all answer tokens, with the blocks of passages `owner` [Q]."""
        lengths = torch.tensor([len(one.labels) for one in asked])
        of = owner.repeat_interleave(lengths)
        x = torch.cat([one.x for one in asked]).float()
        stream = torch.cat([one.stream for one in asked]).float()
        A, B = self._with_bias(A, B)
        added = []
        for passage in range(len(A)):
            own = (of == passage).nonzero()[:, 0]
            if len(own):
                seen = torch.einsum("nld,lrd->nlr", x[own], A[passage])
                added.append((own, torch.einsum("nlr,lro->no", seen, B[passage])))
        places = torch.cat([own for own, _ in added])
        total = torch.cat([one for _, one in added]) * (self.coordinates.gain * self.hypernetwork.config.scale)
        return stream.index_add(0, places, total)

    def _pointer_loss(self, batch: PassageBatch, A: Tensor, B: Tensor) -> tuple[Tensor, dict[str, float]]:
        labels = torch.cat([one.labels for one in batch.asked])
        first = _firsts([one.labels for one in batch.asked])
        tokens = torch.unique(torch.cat([batch.ids.flatten(), labels, self.candidates]))
        places = torch.searchsorted(tokens, labels)
        E = F.embedding(tokens, self._frozen[0].get_output_embeddings().weight)
        weights = 1 + (self.p.first_weight - 1) * first.float()
        notes, losses = {}, {}
        for name, owner in (("own", batch.owner), ("wrong", (batch.owner + 1) % len(A))):
            stream = self.pointer_streams(batch.asked, owner, A, B)
            logits = final_norm(self._frozen[0])(stream) @ E.T
            lost = F.cross_entropy(logits, places, reduction="none")
            losses[name] = lost
            hits = logits.argmax(-1) == places
            notes |= {
                f"pointer_{name}": ((lost * weights).sum() / weights.sum()).item(),
                f"pointer_{name}_right": hits.float().mean().item(),
                f"pointer_{name}_first_right": hits[first].float().mean().item(),
            }
        contrast = F.softplus(losses["own"] - losses["wrong"])
        loss = losses["own"] + self.p.contrast_weight * contrast
        return (loss * weights).sum() / weights.sum(), notes

    # --- through the upper layers -------------------------------------------------------------------------------------
    def upper(
        self, streams: Sequence[Tensor], owner: Tensor, A: Tensor | None, B: Tensor | None, kept: Sequence[slice]
    ) -> list[Tensor]:
        """For each stream the last residual stream [n, hidden] at its tokens `kept`, with plain blocks of `owner`."""
        base_model, body = self._frozen
        found, done = {}, {}
        order = sorted(range(len(streams)), key=lambda i: len(streams[i]))
        if A is not None:
            A, B = self.coordinates.plain(*self._with_bias(A, B))

        def delta(place: int):
            def add(x: Tensor) -> Tensor:
                own = owner[found["part"]]
                return torch.bmm(torch.bmm(x, A[own, place].transpose(1, 2)), B[own, place])

            return add

        deltas = [] if A is None else [(linear, delta(place)) for place, linear in enumerate(self._linears())]
        acting = (
            without_lora(base_model) if A is None else add_deltas(base_model, deltas, self.hypernetwork.config.scale)
        )
        with (
            hooked(body.layers[-1].register_forward_hook, lambda _, __, out: found.update(stream=layer_output(out))),
            acting,
        ):
            for start in range(0, len(order), _AT_ONCE):
                part = order[start : start + _AT_ONCE]
                found["part"] = torch.tensor(part)
                body(inputs_embeds=self._padded([streams[i] for i in part]), use_cache=False)
                done |= {i: found["stream"][row][kept[i]].float() for row, i in enumerate(part)}
        return [done[i] for i in range(len(streams))]

    def head(self, stream: Tensor) -> Tensor:
        base_model = self._frozen[0]
        return base_model.get_output_embeddings()(final_norm(base_model)(stream))

    def _whole_loss(self, batch: PassageBatch, A: Tensor, B: Tensor) -> tuple[Tensor, dict[str, float]]:
        labels = torch.cat(batch.answers)
        first = _firsts(batch.answers)
        kept = [slice(len(q) - 1, len(q) - 1 + len(a)) for q, a in zip(batch.prompts, batch.answers, strict=True)]
        weights = 1 + (self.p.first_weight - 1) * first.float()
        notes = {}

        def scored(name: str, owner: Tensor) -> Tensor:
            logits = self.head(torch.cat(self.upper(batch.streams, owner, A, B, kept)))
            lost = F.cross_entropy(logits, labels, reduction="none")
            hits = logits.argmax(-1) == labels
            notes.update(
                {
                    f"{name}": ((lost * weights).sum() / weights.sum()).item(),
                    f"{name}_right": hits.float().mean().item(),
                    f"{name}_first_right": hits[first].float().mean().item(),
                }
            )
            return (lost * weights).sum() / weights.sum()

        loss = scored("own", batch.owner)
        if not self.training:
            scored("wrong", (batch.owner + 1) % len(A))
        if batch.others:
            last = [slice(len(stream) - 1, None) for stream in batch.others]
            owner = torch.arange(len(batch.others)) % len(A)
            with torch.no_grad():
                target = self.head(torch.cat(self.upper(batch.others, owner, None, None, last))).log_softmax(-1)
            said = self.head(torch.cat(self.upper(batch.others, owner, A, B, last))).log_softmax(-1)
            moved = F.kl_div(said, target, log_target=True, reduction="batchmean")
            notes["others_moved"] = moved.item()
            loss = loss + self.p.others_weight * moved
        return loss, notes

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """Means since the last report, and the same of the batches that are never learned (validation_...)."""
        means = {name: sum(values) / len(values) for name, values in self._tally.items()}
        self._tally, was_training = {}, self.training
        self.eval()
        tested: dict[str, list[float]] = {}
        for batch in self.whole_tests if self._whole else self.tests:
            for name, value in self.loss(batch)[1].items():
                tested.setdefault(f"validation_{name}", []).append(value)
        self.train(was_training)
        means |= {name: sum(values) / len(values) for name, values in tested.items()}
        return {name: round(value, 4) for name, value in means.items()}

    @torch.no_grad()
    def fold(self) -> None:
        """Write head and bias block in plain coordinates; the blocks stay what they are."""
        net, to = self.hypernetwork, self.coordinates
        d_in = net.config.d_in[self.module]
        keys, values = to.plain(net.head.weight[..., :d_in], net.head.weight[..., d_in:])
        net.head.weight.copy_(torch.cat([keys, values], -1))
        for bias, plain in zip(
            (net.bias_A, net.bias_B), to.plain(net.bias_A[self.module], net.bias_B[self.module]), strict=True
        ):
            bias[self.module].copy_(plain)
        to.whitening.copy_(torch.eye(d_in).expand_as(to.whitening))
        to.gain.fill_(1.0)


def few_of(one: Features, states: Sequence[int], n_states: int, questions: int) -> Features:
    """A passage with some of its `n_states` states, by place, and its first questions."""
    parts = one.states.chunk(n_states, -1)
    few = {name: getattr(one, name)[:questions] for name in ("streams", "answers", "prompts")}
    return replace(one, states=torch.cat([parts[place] for place in states], -1), **few)


def _firsts(answers: Sequence[Tensor]) -> Tensor:
    """[N]: True at the first token of each answer."""
    return torch.cat([torch.arange(len(one)) == 0 for one in answers])


@torch.no_grad()
def start_copying(
    step: PublishedStep, words: Words, passages: Sequence[Features], asked: Sequence[Sequence[Asked]], seed: int
) -> None:
    """Start a fresh hypernetwork as a copier: rows read single tokens, look for their questions, and write them.

    Latent numbers are, in this order, a code of the token (z = P^T d_t; d_t: the direction that writes it, P: its main
    directions), a code of the encoder's state, and one tag for each row. The first two pass through attention as they
    are. A row's query is a random direction and, for all rows alike, the one that tells tokens of answers from others
    (least squares). Keys are the linear map of both codes to x where this token is the answer (least squares).

    asked: of these passages, x in whitened coordinates.
    """
    net, base_model, generator = step.hypernetwork, step._frozen[0], torch.Generator().manual_seed(seed)
    config, perceiver = net.config, net.aggregator.perceiver
    d, hidden, rows = config.latent_size, base_model.config.get_text_config().hidden_size, config.n_latent_queries
    n_code, n_passed = d // 2, d - rows  # numbers of the token's code; of both codes
    if n_passed < n_code or (config.head_dim, config.n_kv_heads, config.n_pre_head_layers) != (d, 1, 0):
        raise ValueError(
            f"latents of {d} numbers cannot pass codes and {rows} tags: they need twice as many as rows, heads of "
            "their own size, one of keys, and nothing between Perceiver and head"
        )
    projection = perceiver.modality_projection
    embeddings = base_model.get_input_embeddings().weight
    ids = torch.cat([one.ids for one in passages])
    f = torch.cat([embeddings[ids], torch.cat([one.states for one in passages]).float()], -1).double()
    mean, centred = f.mean(0), f - f.mean(0)
    directions = words.directions(ids).double()
    main = torch.linalg.eigh(directions.T @ directions)[1].flip(1)[:, :n_code]  # [hidden, n_code]
    to_code = _least_squares(centred[:, :hidden], (directions - directions.mean(0)) @ main)
    values, vectors = torch.linalg.eigh(centred[:, hidden:].T @ centred[:, hidden:] / len(f))
    to_state = vectors.flip(1)[:, : n_passed - n_code] * values.flip(0)[: n_passed - n_code].rsqrt()
    through = f.new_zeros(d, f.shape[1])
    through[:n_code, :hidden] = to_code.T / (centred[:, :hidden] @ to_code).std()
    through[n_code:n_passed, hidden:] = to_state.T
    # gates that open alike for all tokens: what they multiply passes without its mean
    opening = torch.tensor(2.0, dtype=f.dtype)
    second = f.T @ f / len(f)
    gates = torch.linalg.solve(second + 0.01 * torch.diag(second.diagonal()), mean)
    gates = gates / (mean @ gates)
    through = through - torch.outer(through @ mean, gates)
    fresh = (
        torch.randn(projection.up_proj.weight.shape, generator=generator, dtype=f.dtype) / f.std(0) / f.shape[1] ** 0.5
    )
    gate, up = 0.5 * fresh, fresh[torch.randperm(len(fresh), generator=generator)]
    gate[:d], up[:d] = opening * gates, through
    down = 0.1 * torch.randn(d, len(fresh), generator=generator, dtype=f.dtype) / len(fresh) ** 0.5
    down[:, :d] = torch.eye(d, dtype=f.dtype) / F.silu(opening)
    down[n_passed:] = 0
    for own, weight in zip(
        (projection.gate_proj, projection.up_proj, projection.down_proj), (gate, up, down), strict=True
    ):
        own.weight.copy_(weight)
    # attention that passes both codes, and adds them to a tag
    passed = (torch.arange(d) < n_passed).float()
    for layer in (*perceiver.encoder.layers, *perceiver.decoder.layers):
        attention = layer.self_attn
        attention.v_proj.weight.copy_(torch.eye(config.head_dim, d) * passed)
        attention.o_proj.weight.copy_(torch.eye(d, config.head_dim).repeat(1, config.n_heads) / config.n_heads)
        layer.post_ff_layernorm.weight.fill_(0.1)
    tags = torch.zeros(rows, d)
    tags[torch.arange(rows), n_passed + torch.arange(rows)] = _TAG
    perceiver.encoder.latents_q.copy_(tags)
    perceiver.decoder.latents_q.copy_(tags)
    codes = F.rms_norm(projection(f.float()), (d,))
    is_answer, places = [], []  # at tokens of all passages; of each answer's tokens
    start = 0
    for one in passages:
        own = torch.zeros(len(one.ids))
        for answer in one.answers:
            at = _place(one.ids.tolist(), answer[:-1].tolist())
            own[at : at + len(answer) - 1] = 1
            places.append(torch.arange(start + at, start + at + len(answer) - 1))
        is_answer.append(own)
        start += len(one.ids)
    is_answer = torch.cat(is_answer).double()
    probe = _least_squares(codes.double() * passed, (is_answer - is_answer.mean()).unsqueeze(1))[:, 0].float()
    probe = probe / (codes @ probe).std()
    for layer in perceiver.encoder.layers:
        queries = _LIKE_ANSWERS * probe + _ASTRAY * torch.randn(rows, d, generator=generator) * passed / n_passed**0.5
        q = torch.zeros(d, d)
        q[:, n_passed:] = (queries * config.head_dim**0.5 / d**0.5).T  # the tag of a latent has the size sqrt(d)
        layer.self_attn.q_proj.weight.copy_(q[: config.head_dim].repeat(config.n_heads, 1))
        layer.self_attn.k_proj.weight.copy_(torch.eye(config.head_dim, d))
    for layer in perceiver.decoder.layers:  # each row reads the latent with its own tag
        only_tags = _FAITHFUL * torch.eye(config.head_dim, d) * (1 - passed)
        layer.self_attn.k_proj.weight.copy_(only_tags)
        layer.self_attn.q_proj.weight.copy_(only_tags.repeat(config.n_heads, 1))
    # keys and values
    d_in = config.d_in[step.module]
    flat = [one for several in asked for one in several]
    x = torch.cat([one.x[:-1] for one in flat]).double()  # without the end of the turn
    read = codes[torch.cat(places)].double() * passed
    head = 0.02 * torch.randn(net.head.weight.shape, generator=generator)
    for place in range(config.n_written):
        keys = _least_squares(read - read.mean(0), x[:, place] - x[:, place].mean(0), 0.3)
        scores = (((read - read.mean(0)) @ keys) * (x[:, place] - x[:, place].mean(0))).sum(1)
        head[place, :, :d_in] += (keys * _MATCH / scores.mean() * d**0.5).float()
    head[..., d_in:] = 0
    head[:, :n_code, d_in:] = main.T.float()
    net.head.weight.copy_(head)
    # the bias block sees x at once: its mean, and random directions
    middle = x.mean(0).float()  # [L, d_in]
    size = (x - x.mean(0)).norm(dim=-1).mean().float()
    bias = torch.randn(net.bias_A[step.module].shape, generator=generator) / size
    bias[:, 0] = middle / middle.square().sum(-1, keepdim=True)
    net.bias_A[step.module].copy_(bias)
    net.scaler_A[step.module].fill_(1.0)
    net.scaler_B[step.module].fill_(1.0)
    spread = float((f @ gates).std() * opening)
    print(f"gates open by {float(opening):.1f} +- {spread:.2f}", flush=True)


def _least_squares(x: Tensor, y: Tensor, ridge: float = 0.02) -> Tensor:
    """[d, k]: the linear map from x [n, d] to y [n, k]; ridge: of the mean variance of x."""
    moment = x.T @ x
    return torch.linalg.solve(
        moment + ridge * moment.diagonal().mean() * torch.eye(len(moment), dtype=x.dtype), x.T @ y
    )


def _place(ids: list[int], answer: list[int]) -> int:
    """Where an answer's tokens first stand among a passage's."""
    return next(i for i in range(len(ids)) if ids[i : i + len(answer)] == answer)
