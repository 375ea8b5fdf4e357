"""Training with sparse reading switched on: a null block learns what no block is about, and blocks to be found.

With `blocks_learn=False` blocks stay what they were, and so does the published sum of them.

S(k, t) and N(t) are those of `d2l_lib.reading`; b is a learned sharpness of each layer that reads.

    prompt    y += scale * sum of w_k B_k^T (A_k x),  w = softmax over blocks and null of (b S, b N)
    answer    the same with w = softmax over blocks of b S, times the share of all blocks against null at t0
    loss      cross-entropy of the answers + evidence_weight * -log(share of the evidence at t0), mean over layers

With `prompt=False` prompts have the bias alone. Without a block that says the answer, the evidence is the null block.
Where there is one, the answer is read whatever the null block says, or answers would learn nothing while it is too
large. But for that, a very large b is the rule of `d2l_lib.reading`.

All chunks of a batch, and a bank of blocks of the batches before, are one adapter: the documents of the other questions
distract. `own_share` of the questions has its own document alone.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from d2l_lib.base_model import target_linears
from d2l_lib.documents import chunk_document, context_ids, question_ids, stop_ids
from d2l_lib.engine import pad_rows
from d2l_lib.hypernetwork import Hypernetwork
from d2l_lib.lora import add_deltas
from d2l_lib.presets import ReadingPreset
from d2l_lib.reading import TINY, Reading, null_score
from d2l_lib.tasks import world
from d2l_lib.training.batches import IGNORED, Batch, Chunks
from d2l_lib.training.losses import context_average, cross_entropy
from d2l_lib.training.step import Internalization, answer_logits


@dataclass(frozen=True, kw_only=True)
class ReadingBatch(Batch):
    """Documents in chunks, and questions about any of them, as one context.

    Prompts are padded on the left, answers on the right; input_ids lack the last column of labels.

    attention_mask: [questions, length], 0 at the padding of prompts.
    evidence: [questions, chunks], True where a chunk says the answer; nowhere: the null block is right.
    hidden: [questions, chunks], chunks that are not in the question's adapter.
    alone: [questions], True where the adapter has no blocks of the bank.
    start: the column of the prompts' last token.
    kinds: of the questions.
    """

    attention_mask: Tensor
    evidence: Tensor
    hidden: Tensor
    alone: Tensor
    start: int
    kinds: list[str]


class ReadingBatches(Dataset):
    """Batches of `p.chunks` chunks or a few more, from documents of many sizes; item i is a function of (seed, i).

    A document has up to `p.most_facts` facts, or up to a half, a quarter or an eighth of it in a whole batch.
    Questions about the encyclopedia use every second fact of it: the others stay for tests.
    Chunks are in the tokens of `encoder_tokenizer` (None: the base model's).
    """

    def __init__(self, tokenizer, p: ReadingPreset, seed: int, encoder_tokenizer=None):
        self.tokenizer, self.p, self.seed = tokenizer, p, seed
        self.encoder_tokenizer = tokenizer if encoder_tokenizer is None else encoder_tokenizer
        self.known, self.stop = world.encyclopedia()[::2], stop_ids(tokenizer)[-1]

    def __len__(self) -> int:
        return self.p.steps

    def __getitem__(self, i: int) -> ReadingBatch:
        rng, p = random.Random(f"reading/{self.seed}/{i}"), self.p
        most = max(1, p.most_facts >> rng.randrange(4))
        chunks, owners, asked = [], [], []  # asked: (question, its document's first chunk, its evidence)
        while len(chunks) < p.chunks:
            n_facts, first = max(1, round(most ** rng.random())), len(chunks)
            document = world.draw_document(rng, "train", n_facts, rng.choice((0.0, 0.2, 0.5)))
            own = chunk_document(document.text, self.encoder_tokenizer, rng.randint(p.shortest_chunk, p.longest_chunk))
            for _ in range(math.ceil(p.questions / p.chunks) * min(len(own) + 2, n_facts + 3)):
                question = self._ask(rng, document)
                spans = () if question.kind == "unanswerable" else question.evidence
                inside = [any(one.span[0] < end and start < one.span[1] for start, end in spans) for one in own]
                asked.append((question, first, [first + place for place, says in enumerate(inside) if says]))
            chunks += [one.text for one in own]
            owners += [first] * len(own)
        return self._batch(rng, chunks, owners, rng.sample(asked, min(len(asked), p.questions)))

    def _ask(self, rng: random.Random, document: world.Document) -> world.Question:
        p = self.p
        if rng.random() < p.unrelated_share:
            question = world.question_about(rng, rng.choice(self.known), paraphrase=rng.random() < 0.3)
            return replace(question, kind="encyclopedia", evidence=())
        unanswerable = rng.random() < p.unanswerable_share
        kind = "unanswerable" if unanswerable else rng.choices(list(p.weights), list(p.weights.values()))[0]
        return world.ask(rng, document, kind) or world.question_about(rng, rng.choice(document.facts))

    def _batch(self, rng: random.Random, chunks: list[str], owners: list[int], asked: list[tuple]) -> ReadingBatch:
        questions, own, places = zip(*asked, strict=True)
        pad_id = self.tokenizer.pad_token_id
        prompts = question_ids(self.tokenizer, [question.text for question in questions])
        answers = self.tokenizer([question.answer for question in questions], add_special_tokens=False)["input_ids"]
        answers = [ids + [self.stop] for ids in answers]
        prompts, mask = pad_rows(prompts, pad_id, side="left")
        alone = torch.tensor([rng.random() < self.p.own_share for _ in asked])
        evidence = torch.zeros(len(asked), len(chunks), dtype=torch.bool)
        for row, chosen in enumerate(places):
            evidence[row, chosen] = True
        return ReadingBatch(
            chunks=Chunks.of(
                context_ids(self.encoder_tokenizer, chunks), [len(chunks)], self.encoder_tokenizer.pad_token_id
            ),
            input_ids=torch.cat([prompts, pad_rows(answers, pad_id)[0][:, :-1]], 1),
            labels=torch.cat([torch.full_like(prompts, IGNORED), pad_rows(answers, IGNORED)[0]], 1),
            n_questions=torch.tensor([len(asked)]),
            attention_mask=torch.cat([mask, mask.new_ones(len(asked), max(map(len, answers)) - 1)], 1),
            evidence=evidence,
            hidden=alone[:, None] & (torch.tensor(own)[:, None] != torch.tensor(owners)),
            alone=alone,
            start=prompts.shape[1] - 1,
            kinds=[question.kind for question in questions],
        )


@dataclass
class SoftReading:
    """One pass with the blocks of one module, read softly; `delta` is what they add at one linear, without the scale.

    A [L, K, r, d_in], B [L, K, r, d_out]: of the pool.
    hidden: [rows, K], blocks that a row's adapter lacks.
    start: the column of t0. forced: [rows], True where the answer is read whatever the null block says.
    shares: of each linear so far, the log-shares [rows, K + 1] of blocks and null at t0.
    """

    A: Tensor
    B: Tensor
    hidden: Tensor
    start: int
    forced: Tensor
    reading: Reading
    so_far: Tensor | float = 0.0  # S [rows, tokens, K]
    null_so_far: Tensor | float = 0.0  # N [rows, tokens]
    shares: list[Tensor] = field(default_factory=list)

    def delta(self, x: Tensor, *, layer: int, sharpness: Tensor, null: tuple[Tensor, Tensor]) -> Tensor:
        """[rows, tokens, d_out] for x [rows, tokens, d_in]; null: keys and floor of the layer."""
        A, B = self.A[layer], self.B[layer]
        before = 0 if self.reading.prompt else self.start  # columns that do not read
        x, t0 = x[:, before:], self.start - before
        products = (x @ A.flatten(0, 1).T).unflatten(2, A.shape[:2])  # [rows, tokens, K, r]
        self.so_far = self.so_far + self._over_time((products.square().sum(-1) + TINY).sqrt(), t0)
        self.null_so_far = self.null_so_far + null_score(x, *null)
        logits = (sharpness * self.so_far).masked_fill(self.hidden[:, None], -math.inf)
        blocks, nothing = logits.logsumexp(-1), sharpness * self.null_so_far  # [rows, tokens]
        self.shares.append(torch.cat([logits[:, t0], nothing[:, t0, None]], -1).log_softmax(-1))
        is_open = F.logsigmoid(blocks - nothing)[:, t0].masked_fill(self.forced, 0.0)  # log share of all blocks
        prompt = torch.logaddexp(blocks[:, :t0], nothing[:, :t0])
        weights = (logits - torch.cat([prompt, blocks[:, t0:] - is_open[:, None]], 1).unsqueeze(-1)).exp()
        return F.pad((products * weights.unsqueeze(-1)).flatten(2) @ B.flatten(0, 1), (0, 0, before, 0))

    def _over_time(self, scores: Tensor, t0: int) -> Tensor:
        """Z [rows, tokens, K]: evidence over time from t0 on, before it the scores themselves."""
        steps = [scores[:, t0]]
        for score in scores[:, t0 + 1 :].unbind(1):
            steps.append(self.reading.decay * steps[-1] + score)
        return torch.cat([scores[:, :t0], torch.stack(steps, 1)], 1)


class ReadingStep(Internalization):
    """The loss {"loss": ...} of a `ReadingBatch` (see above), for a hypernetwork with one module and a null block.

    The bank is `p.bank` blocks of the two batches before, which do not learn; as buffers they are part of a checkpoint.
    Several processes would each have a bank of their own, so there is one.
    """

    def __init__(self, base_model, hypernetwork: Hypernetwork, p: ReadingPreset, encoder_model=None):
        super().__init__(base_model, hypernetwork, p, encoder_model)
        config = hypernetwork.config
        (self.module,) = config.modules
        self.reading = Reading(decay=p.decay, prompt=p.prompt, null_threshold=p.null_threshold)
        self.layers = self.reading.layers_of(config.n_layers)
        self.log_sharpness = nn.Parameter(torch.full((len(self.layers),), math.log(p.sharpness)))
        if not p.blocks_learn:
            for name, parameter in hypernetwork.named_parameters():
                parameter.requires_grad_(name.startswith("null_"))
        names = ("log_sharpness", f"hypernetwork.null_floor.{self.module}")
        self.rates = dict.fromkeys(names, p.null_rate)  # see `loop.InOrderTrainer`
        for side, sizes in (("A", config.d_in), ("B", config.d_out)):
            empty = torch.zeros(p.bank, config.n_layers, config.rank, sizes[self.module])
            self.register_buffer(f"bank_{side}", empty)

    def forward(self, batch: ReadingBatch) -> dict[str, Tensor]:
        base_model = self._frozen[0]
        for model in (base_model, self._frozen[1].model):
            model.to(batch.input_ids.device)
        A, B = self._read(batch)[self.module]  # [chunks, L, r, d]
        empty = (self.bank_A == 0).flatten(1).all(1)
        state = SoftReading(
            torch.cat([A, self.bank_A]).transpose(0, 1),
            torch.cat([B, self.bank_B]).transpose(0, 1),
            torch.cat([batch.hidden, batch.alone[:, None] | empty], 1),
            batch.start,
            batch.evidence.any(1),
            self.reading,
        )
        scale = self.hypernetwork.config.scale
        with add_deltas(base_model, self.deltas(state), scale):
            logits, answers = answer_logits(base_model, batch.input_ids, batch.labels, batch.attention_mask)
        per_token = cross_entropy(logits, answers.among_answers())
        loss = context_average(per_token, answers, batch.n_questions)
        right = F.pad(batch.evidence, (0, len(empty) + 1))
        right[:, -1] = ~state.forced
        shares = torch.stack(state.shares)  # [layers, questions, K + 1]
        evidence_loss = -shares.masked_fill(~right, -math.inf).logsumexp(-1).mean()
        self._count(batch, self._note(loss, logits, answers), shares[-1].detach(), right, evidence_loss)
        self._keep(A.detach(), B.detach())
        return {"loss": loss + self.p.evidence_weight * evidence_loss}

    def deltas(self, state: SoftReading) -> list[tuple[nn.Linear, partial]]:
        """(linear, its delta) of each layer: the bias, and what is read."""
        linears = target_linears(self._frozen[0], [self.module])[self.module]
        return [(linear, partial(self._delta, layer=layer, state=state)) for layer, linear in enumerate(linears)]

    def _delta(self, x: Tensor, *, layer: int, state: SoftReading) -> Tensor:
        bias, null = self.hypernetwork.bias(), self.hypernetwork.null()[self.module]
        added = 0.0
        if bias is not None:
            A, B = bias[self.module]
            added = x @ A[layer].T @ B[layer]
        if layer not in self.layers:
            return added
        sharpness = self.log_sharpness[self.layers.index(layer)].exp()
        return added + state.delta(x, layer=layer, sharpness=sharpness, null=tuple(part[layer] for part in null))

    def _keep(self, A: Tensor, B: Tensor) -> None:
        """Exchange the older half of the bank for blocks of this batch."""
        half = len(self.bank_A) // 2
        chosen = torch.arange(half, device=A.device) * len(A) // max(1, half)
        self.bank_A = torch.cat([self.bank_A[half:], A[chosen]])
        self.bank_B = torch.cat([self.bank_B[half:], B[chosen]])

    def _count(
        self, batch: ReadingBatch, answered: Tensor, shares: Tensor, right: Tensor, evidence_loss: Tensor
    ) -> None:
        """Notes for `report`; answered: [questions], True where right; shares: of the last layer."""
        first = right.gather(1, shares[:, :-1].argmax(1, keepdim=True))[:, 0].tolist()
        is_open = (shares[:, -1] < math.log(0.5)).tolist()
        note = lambda name, value: self.notes.add(name, float(value))  # noqa: E731
        self.notes.add("questions", len(batch.kinds), 0)
        note("evidence_loss", evidence_loss.item())
        for row, (kind, has_evidence) in enumerate(zip(batch.kinds, batch.evidence.any(1).tolist(), strict=True)):
            note(f"exact_match_{kind}", answered[row])
            note("open_answerable" if has_evidence else "open_other", is_open[row])
            if has_evidence:
                note("evidence_first", first[row])

    def report(self) -> dict[str, float]:
        """Means since the last report: those of `Internalization`, and of these questions and their evidence.

        questions: their number.
        evidence_loss: nats. evidence_first: share of answerable questions whose block with the most evidence at t0
            says the answer. open_answerable, open_other: share of questions that read blocks. All of the last layer
            but evidence_loss.
        sharpness: mean over layers. exact_match_KIND: by kind of question.
        """
        return super().report() | {"sharpness": round(self.log_sharpness.detach().exp().mean().item(), 3)}


@torch.no_grad()
def with_null_block(hypernetwork: Hypernetwork, p: ReadingPreset, seed: int) -> Hypernetwork:
    """A copy that can learn, with a null block that starts at `p.null_floor`, whatever there was.

    ValueError unless `p.null_floor` has one number for each layer.
    """
    config = hypernetwork.config
    if len(p.null_floor) != config.n_layers:
        raise ValueError(f"null_floor has {len(p.null_floor)} numbers for {config.n_layers} layers: one each")
    torch.manual_seed(seed)
    new = Hypernetwork(replace(config, null_rows=p.null_rows))
    kept = {name: value for name, value in hypernetwork.state_dict().items() if not name.startswith("null_")}
    new.load_state_dict(kept, strict=False)
    for floor in new.null_floor.values():
        floor.copy_(torch.tensor(p.null_floor))
    return new.to(next(hypernetwork.parameters()).device)
