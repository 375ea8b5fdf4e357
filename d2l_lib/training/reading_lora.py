"""Train a plain LoRA that answers from the passage in its prompt: what a base model reads once it is taught the task.

    prompt "passage, question" (`tasks.qa.PROMPT`) -> - mean log of the right answer's tokens

It is the upper line for adapters of the same passages: base model, questions and the form of the answers are the same.

A passage with all its questions is one row, so that the passage is computed once: what all prompts begin with, then the
rest of each prompt with its answer as a branch. A branch sees the beginning and itself, and its positions go on from
the beginning, so its logits are those of a row of its own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from d2l_lib.adapter import Adapter, Block
from d2l_lib.base_model import (
    Fingerprint,
    decoder_body,
    decoder_layers,
    load_base_model,
    module_paths,
    module_sizes,
    window_of,
)
from d2l_lib.documents import question_ids, stop_ids
from d2l_lib.engine import pad_id_of, pad_rows
from d2l_lib.formats.peft import export_peft
from d2l_lib.lora import apply_lora
from d2l_lib.presets import Preset, ReadingLoraPreset, RowsPreset
from d2l_lib.records import write_jsonl
from d2l_lib.tasks import qa
from d2l_lib.training.batches import IGNORED
from d2l_lib.training.loop import Run, fit, read_log
from d2l_lib.training.notes import Notes, Step
from d2l_lib.training.processes import is_first_process, own_device
from d2l_lib.training.row_features import Limits, batches_of_like_size, never_learned, passages_of
from d2l_lib.training.step import logits_of

_WRAPPING = 20  # characters of an answer's turn, about
_NEW_TOKENS = 24  # room for the answer, where a passage has to be cut


@dataclass(frozen=True)
class Questions:
    """A passage and (question, answer) pairs about it."""

    passage: str
    pairs: tuple[tuple[str, str], ...]

    @property
    def size(self) -> int:
        """About how many characters its row has."""
        return len(self.passage) + sum(len(question) + len(answer) + _WRAPPING for question, answer in self.pairs)


def questions_of(
    frame: pd.DataFrame, tokenizer, p: RowsPreset, validation: int = 0
) -> tuple[list[Questions], list[Questions]]:
    """(to learn, never to learn): the questions from which token rows learn, by passage (`row_features.passages_of`).

    frame: as `tasks.qa.load_qa` gives it.
    validation: how many passages are never learned, the same as in the training of token rows.

    ValueError for data with too few usable passages.
    """
    asked = list(dict.fromkeys(frame["question"]))
    texts = dict(zip(map(tuple, question_ids(tokenizer, asked)), asked, strict=True))
    every = [
        Questions(one.text.strip(), tuple((texts[tuple(prompt)], answer) for prompt, _, answer in one.questions))
        for one in passages_of(frame, tokenizer, Limits(p.longest_passage))
    ]
    if len(every) <= validation:
        raise ValueError(
            f"{len(every)} passages have a question whose answer stands in at most {p.longest_passage} tokens; this "
            f"training needs more than {validation}"
        )
    drawn = never_learned(len(every), validation)
    return [one for i, one in enumerate(every) if i not in drawn], [every[i] for i in sorted(drawn)]


# --- rows with branches ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PackedBatch:
    """Passages [P, T]; in each row what its prompts have in common, then a branch for each question.

    branch: 0 in the common beginning, k in the k-th branch, -1 at padding.
    labels: the token of an answer that each place predicts, else IGNORED.
    """

    ids: Tensor
    positions: Tensor
    branch: Tensor
    labels: Tensor

    def to(self, device) -> PackedBatch:
        """The same on a device."""
        return PackedBatch(*(one.to(device) for one in (self.ids, self.positions, self.branch, self.labels)))

    def mask(self, dtype: torch.dtype) -> Tensor:
        """[P, 1, T, T]: what is added to attention scores, so that a branch sees the beginning and itself."""
        query, key = self.branch[:, :, None], self.branch[:, None]
        seen = ((key == 0) | (key == query)).tril()
        added = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return added.masked_fill(~seen, torch.finfo(dtype).min)[:, None]

    @property
    def n_questions(self) -> int:
        """Branches of all passages."""
        return int(self.branch.amax(1).sum())

    @property
    def n_tokens(self) -> int:
        """Tokens without padding."""
        return int((self.branch >= 0).sum())


def pack(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> tuple[list[int], ...]:
    """(ids, positions, branch, labels) of one row of a `PackedBatch`.

    prompts: token ids of prompts about one passage. answers: theirs, with the end of the turn.
    """
    n = next((i for i, same in enumerate(zip(*prompts, strict=False)) if len(set(same)) > 1), len(prompts[0]))
    n = min(n, *(len(prompt) - 1 for prompt in prompts))  # the last token of a prompt predicts its own answer
    ids, positions, branch, labels = prompts[0][:n], list(range(n)), [0] * n, [IGNORED] * n
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
        own = prompt[n:] + answer[:-1]
        ids = ids + own
        positions += range(n, n + len(own))
        branch += [number] * len(own)
        labels += [IGNORED] * (len(prompt) - n - 1) + answer
    return ids, positions, branch, labels


class PackedBatches(Dataset):
    """Batches of `p.passages` passages of like length; item i is a function of (seed, i)."""

    def __init__(self, passages: Sequence[Questions], tokenizer, window: int, p: ReadingLoraPreset, seed: int):
        self.passages, self.tokenizer, self.window, self.p, self.seed = passages, tokenizer, window, p, seed
        self._order: dict[int, list[list[int]]] = {}

    def __len__(self) -> int:
        return self.p.steps

    def _epoch(self, epoch: int) -> list[list[int]]:
        if epoch not in self._order:
            rng = random.Random(f"reading LoRA/{self.seed}/{epoch}")
            batches = batches_of_like_size(rng, [one.size for one in self.passages], self.p.passages)
            rng.shuffle(batches)
            self._order = {epoch: batches}
        return self._order[epoch]

    def __getitem__(self, i: int) -> PackedBatch:
        epoch, number = divmod(i, len(self._epoch(0)))
        return self.collate([self.passages[place] for place in self._epoch(epoch)[number]])

    def collate(self, passages: Sequence[Questions]) -> PackedBatch:
        """These passages with all their questions."""
        rows, end = [], stop_ids(self.tokenizer)[0]
        for one in passages:
            asked, answers = zip(*one.pairs, strict=True)
            prompts = qa.with_document(one.passage, asked, self.tokenizer, self.window, _NEW_TOKENS)
            written = self.tokenizer(list(answers), add_special_tokens=False)["input_ids"]
            rows.append(pack(question_ids(self.tokenizer, prompts), [[*ids, end] for ids in written]))
        padding = pad_id_of(self.tokenizer), 0, -1, IGNORED
        return PackedBatch(
            *(pad_rows(several, value)[0] for several, value in zip(zip(*rows, strict=True), padding, strict=True))
        )


# --- the step -------------------------------------------------------------------------------------------------------
def linear_names(model: nn.Module) -> list[str]:
    """The names of all linears of a decoder layer."""
    named = decoder_layers(model)[0].named_modules()
    return [path.rpartition(".")[2] for path, module in named if isinstance(module, nn.Linear)]


class ReadingLoraStep(Step):
    """The loss {"loss": ...} of a `PackedBatch` with a LoRA in every linear of every layer.

    tests: batches that are never learned, for the report.

    The base model stays outside this module's state, which counts the questions and tokens learned, and its reports.
    """

    def __init__(self, base_model: nn.Module, p: ReadingLoraPreset, seed: int, tests: Sequence[PackedBatch] = ()):
        super().__init__()
        self.p, self.tests, self._frozen = p, list(tests), (base_model,)
        d_in, d_out = module_sizes(base_model, linear_names(base_model))
        generator, shape = torch.Generator().manual_seed(seed), (len(decoder_layers(base_model)), p.rank)
        device = base_model.device
        self.A = nn.ParameterDict(
            {m: torch.randn(*shape, size, generator=generator).to(device) / math.sqrt(size) for m, size in d_in.items()}
        )
        self.B = nn.ParameterDict({m: torch.zeros(*shape, size, device=device) for m, size in d_out.items()})
        self.register_buffer("learned", torch.zeros(2, dtype=torch.long))  # questions, tokens
        self.register_buffer("reports", torch.zeros((), dtype=torch.long))

    def forward(self, batch: PackedBatch) -> dict[str, Tensor]:
        losses, right = self.losses(batch)
        self.notes.add("questions", batch.n_questions, 0)
        self.notes.add("tokens", batch.n_tokens, 0)
        _note(self.notes, losses, right)
        return {"loss": losses.mean()}

    def losses(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """(nats of each answer token, whether all tokens of each answer are the likeliest), row by row."""
        batch = batch.to(self._frozen[0].device)
        places = batch.labels != IGNORED
        logits, labels = self.logits(batch), batch.labels[places]
        place = torch.arange(len(batch.ids), device=labels.device)[:, None] * (1 + batch.branch.max()) + batch.branch
        question = place[places].unique_consecutive(return_inverse=True)[1]
        wrong = torch.zeros(int(question[-1]) + 1, device=labels.device)
        wrong.index_add_(0, question, (logits.argmax(-1) != labels).float())
        return F.cross_entropy(logits.float(), labels, reduction="none"), wrong == 0

    def logits(self, batch: PackedBatch) -> Tensor:
        """[n, vocabulary]: logits of the places that predict answers."""
        base_model = self._frozen[0]
        with apply_lora(base_model, {m: (self.A[m][None], self.B[m][None]) for m in self.A}, self.p.scale):
            hidden = decoder_body(base_model)(
                input_ids=batch.ids,
                attention_mask=batch.mask(base_model.dtype),
                position_ids=batch.positions,
                use_cache=False,
            ).last_hidden_state
        return logits_of(base_model, hidden[batch.labels != IGNORED])[:, 0]

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """Means since the last report: nats per answer token, and exact match (every answer token the likeliest).

        The same of the batches that are never learned, in every `p.validation_reports`-th report, and the questions and
        tokens that were learned so far.
        """
        self.reports += 1
        means, tested = super().report(), Notes()
        self.learned += self.learned.new_tensor([means.get(name, 0) for name in ("questions", "tokens")])
        if self.tests and self.reports % self.p.validation_reports == 0:
            for batch in self.tests:
                _note(tested, *self.losses(batch), "validation_")
        return means | tested.take() | dict(zip(("questions", "tokens"), self.learned.tolist(), strict=True))

    def adapter(self, source: str) -> Adapter:
        """The LoRA as an adapter for the base model `source`."""
        base_model = self._frozen[0]
        A, B = ({m: one.detach().cpu().clone() for m, one in side.items()} for side in (self.A, self.B))
        return Adapter(
            blocks=(Block("reading", 0, None, 1.0, A, B),),
            bias=None,
            scale=self.p.scale,
            base_model=source,
            base_key=Fingerprint().key(base_model),
            paths=module_paths(base_model, list(A)),
        )


def _note(notes: Notes, losses: Tensor, right: Tensor, prefix: str = "") -> None:
    notes.add(f"{prefix}loss", losses.sum().item(), len(losses))
    notes.add(f"{prefix}exact_match", int(right.sum()), len(right))


# --- runs -----------------------------------------------------------------------------------------------------------
def train_reading_lora(
    p: ReadingLoraPreset,
    rows: RowsPreset,
    source: str,
    tables: Mapping[str, pd.DataFrame],
    run: Run,
    final: Path | None = None,
) -> Path:
    """The folder `final` (None: `run.folder`/final): a PEFT LoRA for `source`, in float16. Resumable.

    rows: which of the questions are used, as in the training of token rows.
    tables: {name: questions about passages} (see `tasks.qa.load_qa`); `rows.validation` passages of the first one are
        never learned, and `p.validation` of them are in the report.

    ValueError for data with too few usable passages.
    """
    base_model, tokenizer = load_base_model(source, device=own_device())
    train, held_out = [], []
    for frame in tables.values():
        learned, others = questions_of(frame, tokenizer, rows, 0 if train else rows.validation)
        train, held_out = train + learned, held_out + others
    batches = PackedBatches(train, tokenizer, window_of(base_model), p, run.seed)
    held_out = sorted(held_out[: p.validation], key=lambda one: one.size)
    tests = [batches.collate(held_out[i : i + p.passages]) for i in range(0, len(held_out), p.passages)]
    step = ReadingLoraStep(base_model, p, run.seed, tests)
    if is_first_process():
        questions = sum(len(one.pairs) for one in train)
        print(f"{run.folder}: a LoRA for {source} from {questions} questions about {len(train)} passages", flush=True)
    fit(step, batches, p, run)
    final = run.folder / "final" if final is None else final
    if is_first_process():
        export_peft(step.adapter(source), final, dtype=torch.float16)
    return final


def remake_reading_lora(p: Preset, tables: Mapping[str, pd.DataFrame], run: Run, data: Path) -> Path:
    """`train_reading_lora` as the preset says; its log goes to `data`, and seed 0's LoRA becomes the bundled one."""
    bundled = data / p.name / "reading_lora" if run.seed == 0 else None
    final = train_reading_lora(p.reading_lora, p.rows, p.base_source, tables, run, bundled)
    if is_first_process():
        log = [{"seed": run.seed, **line} for line in read_log(run.folder / "log.jsonl")]
        write_jsonl(data / "full_runs" / f"{p.name}_reading_lora_seed{run.seed}_training.jsonl", log)
    return final
