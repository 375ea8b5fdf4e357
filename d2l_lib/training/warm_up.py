"""A warm-up of the hypernetwork: the latents of a block must tell what its one sentence says.

    sentence -> context encoder -> hypernetwork's latents -> two linear readouts -> answer tokens, words of the question

Without it, learning starts slowly: the answer's tokens are learned one after another, each through the whole frozen
base model. Here no base model answers. Row j of every layer gives token j of the answer at once. The mean of the rows
gives the words of the question: the subject and relation by which a block is found. The readouts are then dropped, and
the hypernetwork stays as published.

`KeysAndValues` is for documents of many facts. There the rows of A are keys that match their own question, and the rows
of B are values that point to the answer's tokens. The base model is frozen, so the inputs of its target linears at the
answer tokens are known before training, and keys are learned by regression.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import Dataset

from d2l_lib.base_model import default_modules, final_norm
from d2l_lib.documents import chunk_document, context_ids, question_ids
from d2l_lib.encoder import ContextEncoder, check_writes_residual, linear_inputs
from d2l_lib.engine import pad_rows
from d2l_lib.hypernetwork import Hypernetwork, PerLayerLinear
from d2l_lib.lora import hooked
from d2l_lib.presets import WarmUpPreset
from d2l_lib.tasks import needles, world
from d2l_lib.training.batches import IGNORED, Chunks, SentenceBatch
from d2l_lib.training.loop import Run, fit
from d2l_lib.training.notes import Step

_Sentence = tuple[str, str, str]  # a text, a question about it, the answer
_SHARPNESS, _KEY_WEIGHT = 20.0, 10.0  # logit scale of the values; weight of the keys' loss


def fact_sentences(rng: random.Random, tokenizer, chunk_tokens: int = 20) -> Iterator[_Sentence]:
    """An endless stream of chunks that state one fact of the world each, in one sentence or with a distractor."""
    while True:
        document = world.draw_document(rng, "train", 4, distractors=rng.choice((0.0, 0.3)))
        for chunk in chunk_document(document.text, tokenizer, chunk_tokens):
            start, end = chunk.span
            inside = [fact for fact in document.facts if start <= fact.span[0] and fact.span[1] <= end]
            if len(inside) == 1:
                question = world.question_about(rng, inside[0], paraphrase=rng.random() < 0.3)
                yield chunk.text, question.text, question.answer


def needle_sentences(rng: random.Random, tokenizer) -> Iterator[_Sentence]:
    """An endless stream of needles among a few lines of filler."""
    while True:
        number = needles.draw_number(rng, "train")
        haystack = needles.build_haystack(tokenizer, rng.randint(20, 80), rng.random(), number)
        yield haystack.text, haystack.question, haystack.answer


class ReadoutBatches(Dataset):
    """Batches of sentences from `draw` with one question each; item i is a function of (seed, i)."""

    def __init__(self, tokenizer, p: WarmUpPreset, seed: int, draw: Callable = fact_sentences):
        self.tokenizer, self.p, self.seed, self.draw = tokenizer, p, seed, draw

    def __len__(self) -> int:
        return self.p.steps

    def __getitem__(self, i: int) -> SentenceBatch:
        rng = random.Random(f"readout/{self.seed}/{i}")
        sentences, questions, answers = zip(*islice(self.draw(rng, self.tokenizer), self.p.sentences), strict=True)
        answer_rows = [ids + [self.tokenizer.eos_token_id] for ids in self._plain_ids(answers)]
        chunks = context_ids(self.tokenizer, list(sentences))
        prompts = question_ids(self.tokenizer, list(questions))
        rows = [prompt + answer for prompt, answer in zip(prompts, answer_rows, strict=True)]
        return SentenceBatch(
            chunks=Chunks.of(chunks, [1] * len(chunks), self.tokenizer.pad_token_id),
            answer_ids=pad_rows(answer_rows, IGNORED)[0],
            question_ids=pad_rows(self._plain_ids(questions), IGNORED)[0],
            input_ids=pad_rows(rows, self.tokenizer.pad_token_id)[0],
            starts=torch.tensor([len(ids) for ids in prompts]),
        )

    def _plain_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]


class Readout(Step):
    """The warm-up step of `train_readout`: the sum of two cross-entropies.

    Row j of each layer predicts token j of the answer. The mean of the rows predicts the words of the question, all
    equally likely. It notes nats per answer token and per question word, and the share of answer tokens right.
    """

    def __init__(self, base_model, hypernetwork: Hypernetwork):
        super().__init__()
        self.hypernetwork = hypernetwork
        d, vocabulary = hypernetwork.config.latent_size, base_model.get_input_embeddings().num_embeddings
        self.answer, self.question = nn.Linear(d, vocabulary), nn.Linear(d, vocabulary)
        self._frozen = (ContextEncoder.from_config(base_model, hypernetwork.config),)

    def forward(self, batch: SentenceBatch) -> dict[str, Tensor]:
        """{"loss": ...} of a batch."""
        (encoder,) = self._frozen
        encoder.model.to(batch.answer_ids.device)
        latents, _ = _write(self.hypernetwork, encoder, batch.chunks)
        rows = _unit_rows(latents.flatten(2, 3))  # [n, L, M * r, d]
        n_slots = min(rows.shape[2], batch.answer_ids.shape[1])
        logits = self.answer(rows[:, :, :n_slots])  # [n, L, slots, vocabulary]
        targets = batch.answer_ids[:, None, :n_slots].expand(logits.shape[:3])
        answer_loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=IGNORED)
        words = _word_shares(batch.question_ids, logits.shape[-1])
        question_loss = -(words[:, None] * self.question(rows.mean(2)).log_softmax(-1)).sum(-1).mean()
        scored = targets != IGNORED
        right = int(((logits.argmax(-1) == targets) & scored).sum())
        self.notes.add("loss", answer_loss.item())
        self.notes.add("question_loss", question_loss.item())
        self.notes.add("answer_tokens_right", right, int(scored.sum()))
        return {"loss": answer_loss + question_loss}


@torch.no_grad()
def start_linear(hypernetwork: Hypernetwork, base_model, tokenizer, seed: int, n_documents: int = 64) -> None:
    """Start the modality projection of a fresh hypernetwork as a linear map of whitened features.

    The published projection (SwiGLU without a bias) starts as a random quadratic function of the features. Features
    have a common mean. With the gates along it, all gates open by nearly the same amount, and the rest passes the
    features without their mean, with equal variance in all directions. The encoder's features of `n_documents`
    documents of the world give mean and directions.
    """
    encoder = ContextEncoder.from_config(base_model, hypernetwork.config)
    rng = random.Random(f"start/{seed}")
    generator = torch.Generator().manual_seed(seed)
    features = []
    for _ in range(n_documents):
        ids = torch.tensor(
            [context_ids(tokenizer, world.draw_document(rng, "train", 4).text)], device=base_model.device
        )
        features.append(encoder.encode(ids, attention_mask=torch.ones_like(ids)).flatten(0, -2).double().cpu())
    x = torch.cat(features)
    mean = x.mean(0)
    without_mean = torch.eye(len(mean), dtype=x.dtype) - torch.outer(mean, mean) / mean.dot(mean)
    centred = x @ without_mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    size = values.clamp_min(1e-2 * values.max()).rsqrt() * (values > 1e-4 * values.max())
    whiten = vectors * size @ vectors.T @ without_mean
    projection = hypernetwork.aggregator.perceiver.modality_projection
    (hidden, n_features), d = projection.gate_proj.weight.shape, projection.down_proj.out_features
    draw = {"generator": generator, "dtype": x.dtype}
    spread = torch.linalg.qr(torch.randn(hidden, n_features, **draw))[0]
    mix = torch.linalg.qr(torch.randn(max(n_features, d), min(n_features, d), **draw))[0]
    mix = mix if d > n_features else mix.T
    opening = torch.tensor(2.0, dtype=x.dtype)
    gates = opening * mean / mean.dot(mean)
    projection.gate_proj.weight.copy_(0.3 * projection.gate_proj.weight + gates.to(projection.gate_proj.weight))
    projection.up_proj.weight.copy_(spread @ whiten)
    projection.down_proj.weight.copy_(mix @ spread.T / F.silu(opening))


# ----------------------------------------------------------------------------------------------------- keys and values
class KeysAndValues(Step):
    """The warm-up step for many facts: row j of a block, s * B_j (A_j x), is a key A_j and a value B_j.

    values: B_j points to the output embedding (times the final norm's weights) of token j of the answer.
    keys: A_j points to x; the loss is 1 - cos(A_j, x). x is the target linear's input in the base model without an
        adapter, where it predicts token j of the answer to the block's own question.
    words: the latents give the words of the question, as in `Readout`.

    Keys and x live in whitened coordinates W x, where the x of many questions have the unit matrix as second moment
    (see `key_whitening`). There a key along its own x matches all others least. No backward pass runs through the base
    model. The hypernetwork writes whitened keys until `fit_scalers` makes them plain. It must have one target module,
    which writes into the residual stream, as published. With `last_layer` only the last base layer is written and
    learned.
    """

    def __init__(self, base_model, hypernetwork: Hypernetwork, whitening: Tensor, last_layer: bool = False):
        super().__init__()
        config = hypernetwork.config
        (self.module,) = config.modules
        check_writes_residual(base_model, self.module)
        self.layer = config.n_layers - 1 if last_layer else None
        self.layers = slice(self.layer, None)
        self.hypernetwork = hypernetwork
        self.question = nn.Linear(config.latent_size, base_model.get_input_embeddings().num_embeddings)
        embeddings = base_model.get_output_embeddings().weight.detach().float()
        directions = F.normalize(embeddings * final_norm(base_model).weight.detach().float(), dim=-1)
        self.register_buffer("directions", directions, persistent=False)
        self.register_buffer("whitening", whitening, persistent=False)
        self._frozen = (base_model, ContextEncoder.from_config(base_model, config))

    def forward(self, batch: SentenceBatch) -> dict[str, Tensor]:
        """{"loss": ...} of a batch."""
        latents, A, B = self.rows(batch.chunks)
        n_slots = min(A.shape[2], batch.answer_ids.shape[1])
        answer_ids = batch.answer_ids[:, :n_slots]
        scored = answer_ids != IGNORED  # [n, slots]

        logits = _SHARPNESS * F.normalize(B[:, :, :n_slots], dim=-1) @ self.directions.T
        targets = answer_ids[:, None].expand(logits.shape[:3])
        value_loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=IGNORED)

        inputs = self.whitened_inputs(batch, n_slots).to(A.dtype)[:, scored]  # [L, queries, d_in]
        keys = F.normalize(A[:, :, :n_slots].transpose(0, 1)[:, scored], dim=-1)
        cosines = F.cosine_similarity(keys, inputs, dim=-1)  # [L, queries]
        key_loss = (1 - cosines).mean()

        words = _word_shares(batch.question_ids, len(self.directions))
        read = self.question(_unit_rows(latents).mean(2)).log_softmax(-1)
        question_loss = -(words[:, None] * read).sum(-1).mean()
        with torch.no_grad():
            matches = (keys @ inputs.transpose(1, 2)).sum(0)  # [keys, queries]
            own_wins = matches.argmax(0) == torch.arange(len(matches), device=matches.device)
            right = ((logits.argmax(-1) == targets) & scored[:, None]).sum() / scored.sum() / logits.shape[1]
        noted = {
            "loss": value_loss, "key_cosine": cosines.mean(), "question_loss": question_loss,
            "keys_found": own_wins.float().mean(), "values_right": right,
        }  # fmt: skip
        for name, value in noted.items():
            self.notes.add(name, value.item())
        return {"loss": value_loss + _KEY_WEIGHT * key_loss + question_loss}

    def rows(self, chunks: Chunks) -> tuple[Tensor, Tensor, Tensor]:
        """(latents [n, L, r, d], keys [n, L, r, d_in], values [n, L, r, d_out]) of the chunks, before the scalers."""
        encoder = self._frozen[1]
        encoder.model.to(chunks.order.device)
        latents, rows = (part[:, :, 0] for part in _write(self.hypernetwork, encoder, chunks, layer=self.layer))
        d_in = self.hypernetwork.config.d_in[self.module]
        return latents, rows[..., :d_in], rows[..., d_in:]

    def whitened_inputs(self, batch: SentenceBatch, n_slots: int) -> Tensor:
        """W x [L, n, slots, d_in] of the target linears at the positions that predict answer token j."""
        input_ids, starts = batch.input_ids, batch.starts
        x = linear_inputs(self._frozen[0], self.module, input_ids)[self.layers]  # [L, n, length, d_in]
        places = starts[:, None] - 1 + torch.arange(n_slots, device=starts.device)
        places = places.clamp_max(input_ids.shape[1] - 1)
        rows = torch.arange(len(input_ids), device=starts.device)[:, None]
        return x[:, rows, places] @ self.whitening[self.layers, None]

    def report(self) -> dict[str, float]:
        """Means since the last report.

        loss, question_loss: nats of the values and of the question's words.
        key_cosine: cosine between a key and its x.
        keys_found: share of keys with the best match for their own question in the batch.
        values_right: share of values that point to the right token.
        """
        return super().report()


def key_whitening(
    base_model, module: str, batches: Dataset, n_batches: int = 40, floor: float = 1e-2, directions: bool = True
) -> Tensor:
    """W [L, d_in, d_in], symmetric, with W S W = 1 for the second moment S of x at the answer tokens of `batches`.

    floor: variances below `floor` times the mean variance count as that much.
    directions: False treats all directions alike; W is a multiple of the unit matrix.
    """
    return _whitening(_second_moment(base_model, module, batches, n_batches), floor, directions)


def _second_moment(base_model, module: str, batches: Dataset, n_batches: int) -> Tensor:
    """S [L, d_in, d_in], float64."""
    total = product = None  # in place: a sum in new memory takes twice as long
    count = 0
    for i in range(n_batches):
        batch = batches[i]
        x = linear_inputs(base_model, module, batch.input_ids.to(base_model.device))
        for row, (start, answer) in enumerate(zip(batch.starts, batch.answer_ids, strict=True)):
            here = x[:, row, start - 1 : start - 1 + int((answer != IGNORED).sum())].double().cpu()
            product = torch.matmul(here.transpose(1, 2), here, out=product)
            total = product.clone() if total is None else total.add_(product)
            count += here.shape[1]
    return total / count


def _whitening(moment: Tensor, floor: float, directions: bool) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    if not directions:
        values = values.mean(-1, keepdim=True).expand_as(values)
    values = values.clamp_min(floor * values.mean(-1, keepdim=True))
    return (vectors * values.rsqrt()[:, None] @ vectors.transpose(1, 2)).float()


def key_limits(base_model, tokenizer, sizes: Sequence[int], seed: int, n_documents: int = 8) -> pd.DataFrame:
    """How well linear keys can tell the facts of a document apart, whatever hypernetwork writes them.

    The key of an answer token is the mean x of all wordings of its question but the last, which is asked. The right
    tokens stand before each answer token. Every key votes for its own token with its match. A fact is right if the
    right token wins at each position of its answer. Test split. x is plain, then whitened (see `key_whitening`).

    sizes: numbers of facts in a document.

    Columns: layers ("0", ..., "all"), facts, n, exact_match, whitened.
    """
    (module,) = default_modules(base_model)
    p = WarmUpPreset(steps=1, sentences=32, learning_rate=0.0, warmup_steps=0)
    moment = _second_moment(base_model, module, ReadoutBatches(tokenizer, p, seed), 40)
    whitenings = [_whitening(moment, 1e-2, whiten) for whiten in (False, True)]
    rows = []
    for n_facts in sizes:
        rng = random.Random(f"key limits/{seed}")
        documents = [world.draw_document(rng, "test", n_facts, distractors=0.0) for _ in range(n_documents)]
        each = [_facts_told_apart(base_model, tokenizer, document.facts, whitenings) for document in documents]
        for whiten, of_documents in zip((False, True), zip(*each, strict=True), strict=True):
            n = n_documents * n_facts
            for name, right in pd.DataFrame(of_documents).sum().items():
                rows.append({"layers": name, "facts": n_facts, "n": n, "exact_match": right / n, "whitened": whiten})
    return pd.DataFrame(rows).sort_values("whitened", kind="stable", ignore_index=True)


def _facts_told_apart(
    base_model, tokenizer, facts: Sequence[world.Fact], whitenings: Sequence[Tensor]
) -> list[dict[str, int]]:
    """For each whitening {layers: how many facts are right}; see `key_limits`."""
    (module,) = default_modules(base_model)
    answers = tokenizer([fact.value for fact in facts], add_special_tokens=False)["input_ids"]
    answers = [ids + [tokenizer.eos_token_id] for ids in answers]
    of_fact = torch.tensor([i for i, ids in enumerate(answers) for _ in ids])
    tokens = torch.tensor([token for ids in answers for token in ids])
    worded = []
    for texts in zip(*(world.wordings(fact) for fact in facts), strict=True):
        prompts = question_ids(tokenizer, list(texts))
        ids = pad_rows([q + a for q, a in zip(prompts, answers, strict=True)], tokenizer.pad_token_id)[0]
        places = [len(q) - 1 + j for q, a in zip(prompts, answers, strict=True) for j in range(len(a))]
        x = linear_inputs(base_model, module, ids.to(base_model.device)).cpu()
        worded.append(x[:, of_fact, torch.tensor(places)])
    return [_right_facts([x @ whitening for x in worded], of_fact, tokens, len(tokenizer)) for whitening in whitenings]


def _right_facts(worded: Sequence[Tensor], of_fact: Tensor, tokens: Tensor, vocabulary: int) -> dict[str, int]:
    """{layers: how many facts are right} of the x [L, tokens, d_in] of every wording."""
    *known, last = worded
    matches = F.normalize(torch.stack(known).mean(0), dim=-1) @ last.transpose(1, 2)  # [L, keys, queries]
    right = {}
    for name, of_layer in [(str(layer), one) for layer, one in enumerate(matches)] + [("all", matches.sum(0))]:
        votes = torch.zeros(len(tokens), vocabulary).index_add(1, tokens, of_layer.T)
        wrong = torch.bincount(of_fact, weights=(votes.argmax(1) != tokens).float())
        right[name] = int((wrong == 0).sum())
    return right


class WhitenedKeys(nn.Module):
    """A head's weight (G_A, G_B), trained with whitened keys, as the plain weight (G_A W, G_B)."""

    def __init__(self, whitening: Tensor):
        super().__init__()
        self.register_buffer("whitening", whitening)

    def forward(self, weight: Tensor) -> Tensor:
        d_in = self.whitening.shape[-1]
        return torch.cat([weight[..., :d_in] @ self.whitening, weight[..., d_in:]], dim=-1)


@torch.no_grad()
def fit_scalers(step: KeysAndValues, batch: SentenceBatch, size: float = 0.3) -> None:
    """End the warm-up: plain keys, and scalers with which blocks act, in the layers that the step has learned.

    scaler_A: an own key matches with 1 on average.
    scaler_B: the values of one match are `size` times as large as the residual stream behind the last layer.

    The head's weight stays a function of whitened keys (`WhitenedKeys`) for further training, until `unwhiten_keys`.
    ValueError if the keys do not match their own questions yet.
    """
    hypernetwork, (base_model, _) = step.hypernetwork, step._frozen
    batch = batch.to(next(hypernetwork.parameters()).device)
    config, module = hypernetwork.config, step.module
    norms: list[Tensor] = []
    note_norm = lambda _, inputs: norms.append(inputs[0].norm(dim=-1).mean())  # noqa: E731
    with hooked(final_norm(base_model).register_forward_pre_hook, note_norm):
        _, A, B = step.rows(batch.chunks)
        norms.clear()  # those of the context encoder
        scored = batch.answer_ids[:, : A.shape[2]] != IGNORED
        n_slots = scored.shape[1]
        inputs = step.whitened_inputs(batch, n_slots)[:, scored]
    matches = (A[:, :, :n_slots].transpose(0, 1)[:, scored] * inputs).sum(-1).mean(1)  # [L]
    if (matches <= 0).any():
        raise ValueError("keys do not match their own questions yet: give the warm-up more steps")
    values = size * norms[-1] / (config.scale * B.norm(dim=-1).mean((0, 2)))
    hypernetwork.scaler_A[module][0, step.layers, :, 0] = 1 / matches[:, None]
    hypernetwork.scaler_B[module][0, step.layers, :, 0] = values[:, None]
    parametrize.register_parametrization(hypernetwork.head, "weight", WhitenedKeys(step.whitening))


@torch.no_grad()
def spread_to_all_layers(step: KeysAndValues, batches: Dataset, n_batches: int = 60, share: float = 0.03) -> None:
    """Start the earlier layers as copies of the last one, which alone has learned so far.

    Their rows get the last layer's latents and values. Their keys are the linear map of these latents to W x of their
    own layer, by least squares over the answer tokens of `n_batches` batches. An own key matches as in the last layer.
    A match adds `share` of what it adds there. Call it after `fit_scalers`, with a step of all layers.
    """
    hypernetwork, module = step.hypernetwork, step.module
    config = hypernetwork.config
    last, d_in, r = config.n_layers - 1, config.d_in[module], config.rank
    queries = hypernetwork.aggregator.perceiver.decoder.latents_q
    queries.copy_(queries[-r:].repeat(config.n_layers, 1))
    for linear in hypernetwork.layers.modules():
        if isinstance(linear, PerLayerLinear):
            linear.weight.copy_(linear.weight[last:].clone().expand_as(linear.weight))
            linear.bias.copy_(linear.bias[:, last:].clone().expand_as(linear.bias))
    latents, inputs = [], []
    for i in range(n_batches):
        batch = batches[i].to(queries.device)
        rows, _, _ = step.rows(batch.chunks)
        scored = batch.answer_ids[:, :r] != IGNORED
        x = step.whitened_inputs(batch, scored.shape[1])
        latents.append(F.normalize(rows[:, last, : scored.shape[1]][scored], dim=-1).double())
        inputs.append(x[:, scored].double())
    unit, x = torch.cat(latents), torch.cat(inputs, dim=1)  # [n, d], [L, n, d_in]
    ridge = 1e-3 * len(unit) / unit.shape[1] * torch.eye(unit.shape[1], dtype=unit.dtype, device=unit.device)
    keys = torch.linalg.solve(unit.T @ unit + ridge, unit.T @ x)  # [L, d, d_in]
    head = hypernetwork.head.parametrizations.weight.original
    matches = ((unit @ keys) * x).sum(-1).mean(1)  # [L]
    of_last = ((unit @ head[last, :, :d_in].double()) * x[last]).sum(-1).mean()
    for layer in range(last):
        head[layer, :, :d_in] = keys[layer]
        head[layer, :, d_in:] = head[last, :, d_in:]
        scaler = hypernetwork.scaler_A[module]
        scaler[0, layer] = scaler[0, last] * (of_last / matches[layer])
        hypernetwork.scaler_B[module][0, layer] = share * hypernetwork.scaler_B[module][0, last]


@torch.no_grad()
def whiten_keys(hypernetwork: Hypernetwork, whitening: Tensor) -> None:
    """Train a hypernetwork of plain keys with whitened ones, until `unwhiten_keys`; the function stays the same."""
    d_in = whitening.shape[-1]
    parametrize.register_parametrization(hypernetwork.head, "weight", WhitenedKeys(whitening))
    head = hypernetwork.head.parametrizations.weight.original
    head[..., :d_in] = torch.linalg.solve(whitening, head[..., :d_in], left=False)


def unwhiten_keys(hypernetwork: Hypernetwork) -> None:
    """Make the head's weight a plain parameter again; the function stays the same."""
    parametrize.remove_parametrizations(hypernetwork.head, "weight")


def _write(hypernetwork: Hypernetwork, encoder: ContextEncoder, chunks: Chunks, **options) -> tuple[Tensor, Tensor]:
    """(latents [n, L, M, r, d], flat rows of A and B [n, L, M, r, D]) of all chunks, in order."""
    latents, rows = [], []
    for ids, mask, _ in chunks.groups():
        taps: dict[str, Tensor] = {}
        hypernetwork(encoder.encode(ids, attention_mask=mask), attention_mask=mask, taps=taps, **options)
        latents.append(taps["lora_emb"])
        rows.append(taps["flat_loras"])
    return torch.cat(latents)[chunks.order], torch.cat(rows)[chunks.order]


def _unit_rows(latents: Tensor) -> Tensor:
    """Each latent scaled to a root mean square of 1."""
    return F.normalize(latents, dim=-1) * latents.shape[-1] ** 0.5


def _word_shares(question_ids: Tensor, vocabulary: int) -> Tensor:
    """[n, vocabulary]: the different tokens of a question, all equally likely."""
    words = torch.zeros(len(question_ids), vocabulary, device=question_ids.device)
    real = question_ids != IGNORED
    words[real.nonzero()[:, 0], question_ids[real]] = 1.0
    return words / words.sum(1, keepdim=True)


def train_readout(p: WarmUpPreset, step: Readout | KeysAndValues, batches: ReadoutBatches, run: Run) -> None:
    """Warm up the hypernetwork of `step` in place, resumable."""
    unused = {"ddp_find_unused_parameters": True}  # only the blocks themselves need some parameters
    fit(step, batches, p, replace(run, arguments=unused | dict(run.arguments)))
