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
from d2l_lib.training.row_features import Features, batches_of_like_size

_AT_ONCE = 16  # questions of a pass through the upper layers
_CANDIDATES = 3000  # tokens that are always among those to choose from
Prompt = tuple[Tensor, Tensor]  # its stream into the first upper layer, its ids


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

    owner [Q]: each question's passage. asked: each as the base model sees it. streams, prompts, answers: see `Features`.
    others: prompts about something else. whole: run the upper layers.
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
        flat = [(q[0].float(), len(q[1]), q[2]) for one in passages for q in zip(one.streams, one.prompts, one.answers, strict=True)]
        order, done = sorted(range(len(flat)), key=lambda i: len(flat[i][0])), {}

        def keep(layer: int):
            return lambda _, inputs: found.__setitem__(layer, inputs[0])

        with ExitStack() as stack:
            for place, linear in enumerate(linears):
                stack.enter_context(hooked(linear.register_forward_pre_hook, keep(place)))
            stack.enter_context(hooked(body.layers[-1].register_forward_hook, lambda _, __, out: found.update(stream=_plain(out))))
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
        return nn.utils.rnn.pad_sequence([row.float() for row in rows], batch_first=True).to(base_model.device, base_model.dtype)

    @torch.no_grad()
    def measure(self, asked: Sequence[Sequence[Asked]]) -> None:
        """Take the whitenings of x and the size of the stream from these questions."""
        flat = [one for several in asked for one in several]
        for place in range(len(self.layers)):
            x = torch.cat([one.x[:, place] for one in flat]).double()
            values, vectors = torch.linalg.eigh(x.T @ x / len(x))
            ridge = 0.02 * values.mean()
            self.coordinates.whitening[place] = (vectors * (values + ridge).rsqrt() @ vectors.T / x.shape[1] ** 0.5).float()
        self.coordinates.gain.fill_(torch.cat([one.stream for one in flat]).float().norm(dim=-1).mean() / self.hypernetwork.config.scale)

    @torch.no_grad()
    def whitened(self, asked: Sequence[Sequence[Asked]]) -> list[list[Asked]]:
        """The same questions with x in whitened coordinates."""
        W = self.coordinates.whitening
        return [
            [Asked(torch.einsum("nld,lde->nle", one.x.float(), W).half(), one.stream, one.labels) for one in several]
            for several in asked
        ]

    # --- the loss ------------------------------------------------------------------------------------------------------
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
            if name == "wrong" and self.training:
                continue
            stream = self.pointer_streams(batch.asked, owner, A, B)
            logits = final_norm(self._frozen[0])(stream) @ E.T
            lost = F.cross_entropy(logits, places, reduction="none")
            losses[name] = (lost * weights).sum() / weights.sum()
            hits = logits.argmax(-1) == places
            notes |= {f"pointer_{name}": losses[name].item(), f"pointer_{name}_right": hits.float().mean().item(),
                      f"pointer_{name}_first_right": hits[first].float().mean().item()}
        return losses["own"], notes

    # --- through the upper layers ---------------------------------------------------------------------------------------
    def upper(self, streams: Sequence[Tensor], owner: Tensor, A: Tensor | None, B: Tensor | None, kept: Sequence[slice]) -> list[Tensor]:
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
        acting = without_lora(base_model) if A is None else add_deltas(base_model, deltas, self.hypernetwork.config.scale)
        with hooked(body.layers[-1].register_forward_hook, lambda _, __, out: found.update(stream=_plain(out))), acting:
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
            notes.update({f"{name}": ((lost * weights).sum() / weights.sum()).item(), f"{name}_right": hits.float().mean().item(),
                          f"{name}_first_right": hits[first].float().mean().item()})
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
        for bias, plain in zip((net.bias_A, net.bias_B), to.plain(net.bias_A[self.module], net.bias_B[self.module]), strict=True):
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


def _plain(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


@torch.no_grad()
def start_copying(hypernetwork: Hypernetwork, base_model: nn.Module, words: Words, passages: Sequence[Features], seed: int) -> None:
    """Start a fresh hypernetwork as a copier: rows read single tokens, and their values write them.

    Half of the latent numbers are a code of the token, z = P^T d_t (d_t: the direction that writes it, P: its main
    directions); the other half is a code of the encoder's state. They pass through attention unchanged.
    """
    net, generator = hypernetwork, torch.Generator().manual_seed(seed)
    config, perceiver = net.config, net.aggregator.perceiver
    (module,) = config.modules
    d, hidden = config.latent_size, base_model.config.get_text_config().hidden_size
    half = d // 2
    some = passages[:: max(1, len(passages) // 256)]
    embeddings = base_model.get_input_embeddings().weight
    ids = torch.cat([one.ids for one in some])
    f = torch.cat([embeddings[ids], torch.cat([one.states for one in some]).float()], -1).double()
    # the token's code
    directions = words.directions(ids).double()
    main = torch.linalg.eigh(directions.T @ directions / len(directions))[1].flip(1)[:, :half]  # [hidden, half]
    mean = f.mean(0)
    second = f.T @ f / len(f)
    ridge = 0.01 * torch.diag(second.diagonal().clamp_min(1e-12))
    centred = f - mean
    code = (directions - directions.mean(0)) @ main
    covariance = centred.T @ centred / len(f) + 0.01 * torch.diag(centred.var(0))
    to_code = torch.linalg.solve(covariance[:hidden, :hidden], centred[:, :hidden].T @ code / len(f))  # [hidden, half]
    to_code = F.pad(to_code.T, (0, f.shape[1] - hidden))  # [half, F]
    state = centred[:, hidden:]
    values, vectors = torch.linalg.eigh(state.T @ state / len(f))
    best = vectors.flip(1)[:, : d - half] * values.flip(0)[: d - half].rsqrt()
    to_state = F.pad(best.T, (hidden, 0))  # [d - half, F]
    through = torch.cat([to_code / (f @ to_code.T).std(), to_state / (f @ to_state.T - (mean @ to_state.T)).std()])
    opening = torch.tensor(2.0, dtype=f.dtype)
    gates = opening * torch.linalg.solve(second + ridge, mean)
    gates = gates / (mean @ gates) * opening
    projection = perceiver.modality_projection
    size = projection.up_proj.weight.shape[0]
    fresh = torch.randn(size, f.shape[1], generator=generator, dtype=f.dtype) / f.std(0) / f.shape[1] ** 0.5
    gate = 0.5 * fresh
    up = 1.0 * fresh[torch.randperm(size, generator=generator)]
    gate[:d], up[:d] = gates, through
    projection.gate_proj.weight.copy_(gate)
    projection.up_proj.weight.copy_(up)
    down = 0.1 * torch.randn(d, size, generator=generator, dtype=f.dtype) / size**0.5
    down[:, :d] = torch.eye(d, dtype=f.dtype) / F.silu(opening)
    projection.down_proj.weight.copy_(down)
    spread = (f @ gates).std()
    print(f"gates open by {opening:.1f} +- {float(spread):.2f}", flush=True)
    for resampler in (perceiver.encoder, perceiver.decoder):
        for layer in resampler.layers:
            attention = layer.self_attn
            heads = config.n_heads
            attention.v_proj.weight.copy_(torch.eye(config.head_dim * config.n_kv_heads, d))
            attention.o_proj.weight.copy_(torch.eye(d, config.head_dim).repeat(1, heads) / heads)
            layer.post_ff_layernorm.weight.fill_(0.1)
    tags = torch.randn(perceiver.encoder.latents_q.shape, generator=generator)
    tags[:, :half] = 0
    perceiver.encoder.latents_q.copy_(tags)
    for layer in perceiver.encoder.layers:  # latents look for kinds of states
        same = torch.randn(config.head_dim, d, generator=generator) / d**0.5
        layer.self_attn.k_proj.weight.copy_(2.0 * same.repeat(config.n_kv_heads, 1))
        layer.self_attn.q_proj.weight.copy_(2.0 * torch.randn(config.n_heads * config.head_dim, d, generator=generator) / d**0.5)
    rows = perceiver.decoder.latents_q
    rows.copy_(tags[torch.arange(len(rows)) % len(tags)])
    for layer in perceiver.decoder.layers:  # each row reads the latent with its own tag
        only_tags = torch.eye(config.head_dim, d)
        only_tags[:half] = 0
        layer.self_attn.k_proj.weight.copy_(2.0 * only_tags)
        layer.self_attn.q_proj.weight.copy_(2.0 * only_tags.repeat(config.n_heads, 1))
    d_in = config.d_in[module]
    head = 0.1 * torch.randn(net.head.weight.shape, generator=generator)
    head[..., d_in:] = 0
    head[..., :half, d_in:] = main.T.float()
    net.head.weight.copy_(head)
    net.scaler_A[module].fill_(1.0)
    net.scaler_B[module].fill_(1.0)
