"""The tiny base model, trained from nothing: its tokenizer, its curriculum on the world, and its loss.

It is a stock decoder of `transformers` with a BPE tokenizer of `tokenizers`. The curriculum is a list of batches. Batch
i is a function of (seed, i), so an interrupted run continues with the same batches. A row is one conversation up to the
row's length: a text to recite, a document with questions, closed-book questions, or a haystack.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from d2l_lib.engine import pad_rows
from d2l_lib.tasks import needles, world
from d2l_lib.training.batches import IGNORED
from d2l_lib.training.notes import Step

_SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ message['content'] | trim }}{{ '<|end|>' }}{% endgeneration %}"
    "{% elif message['content'] | trim %}{{ '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# ---------------------------------------------------------------------------------------------------------- tokenizer
def build_tokenizer(vocab_size: int, window: int, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on world text, with a chat template that marks what the model says.

    Digits are single tokens. The first digit of a number keeps the space before it, so numbers begin differently.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Prepend(" ")  # the same tokens at the start of a text as inside it
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_tokenizer_corpus(seed), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        model_max_length=window,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _tokenizer_corpus(seed: int, n_documents: int = 6000):
    rng = random.Random(f"tokenizer/{seed}")
    for _ in range(n_documents):
        document = world.draw_document(rng, "train", 8)
        yield document.text
        for question in world.questions(rng, document, n=8):
            yield question.text
            yield question.answer
    for _ in range(1000):
        needle = needles.NEEDLE.format(number=needles.draw_number(rng, "train"))
        yield f"{needles.FILLER_LINE}\n{needle}\n{needles.QUESTION}"
        yield "0 1 2 3 4 5 6 7 8 9"


def conversation(turns: Sequence[tuple[str, str]], context: str = "") -> str:
    """The chat-formatted text of (question, answer) turns, with `context` before the first question.

    It equals the tokenizer's chat template on the same messages, but is fast enough for millions of rows.
    """
    text = "<|bos|>"
    for i, (question, answer) in enumerate(turns):
        user = f"{context}\n\n{question}" if context and i == 0 else question
        text += f"<|user|>{user}<|end|><|assistant|>{answer}<|end|>"
    return text


# --------------------------------------------------------------------------------------------------------- curriculum
QUESTION_WEIGHTS = {
    "one_hop": 26, "number": 10, "date": 10, "paraphrase": 16, "two_hop": 8, "yes_no": 5, "which_of": 5, "list": 3,
    "unanswerable": 17,
}  # fmt: skip
# "I do not know" is learned last: the same relation of another subject tempts.
_POLISH_WEIGHTS = QUESTION_WEIGHTS | {"number": 8, "date": 8, "unanswerable": 28}

_ROW_KINDS = ("recital", "documents", "closed_book", "haystack")
_RECITE = "Repeat the text."


class Curriculum(Dataset):
    """`steps` batches of about `batch_tokens` tokens: texts to recite, documents, closed-book questions, haystacks.

    Item i: {input_ids [rows, length], labels [rows, length], kind}, a function of (seed, i). Labels cover the answers;
    in `lm_share` of the document rows, every token. The first stage starts with copying and goes on to longer rows. The
    second, `polish`, is mostly documents of up to 512 tokens.
    """

    def __init__(self, tokenizer, steps: int, batch_tokens: int, window: int, seed: int, polish: bool = False):
        self.tokenizer, self.steps, self.batch_tokens, self.window = tokenizer, steps, batch_tokens, window
        self.seed, self.polish = seed, polish
        self.lm_share = 0.05 if polish else 0.25
        self.document_share = (0.25, 0.65) if polish else (0.2, 0.55)
        self.question_weights = _POLISH_WEIGHTS if polish else QUESTION_WEIGHTS
        self.assistant, self.end, self.pad = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>", "<|pad|>"])

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        rng = random.Random(f"curriculum/{self.seed}/{'polish/' if self.polish else ''}{i}")
        progress = i / self.steps
        if not self.polish and progress < 0.15:  # copying first: recitals, one fact, one needle
            kind = rng.choices(("recital", "documents", "haystack"), (60, 25, 15))[0]
            length = 64 if kind == "documents" or progress < 0.05 else 128
        else:
            kind = rng.choices(_ROW_KINDS, (2, 82, 8, 8) if self.polish else (4, 68, 16, 12))[0]
            document_lengths = (5, 35, 45, 15) if progress > 0.4 else (25, 55, 20, 0)
            longest = self.window if self.polish or progress > 0.3 else 256
            length = {
                "recital": 256,
                "documents": rng.choices((64, 128, 256, 512), (3, 17, 45, 35) if self.polish else document_lengths)[0],
                "closed_book": rng.choice((32, 64)),
                "haystack": min(longest, rng.choice((64, 128, 256, 512, 1024, 1024))),
            }[kind]
        make = {
            "recital": self.recital_row,
            "documents": self.document_row,
            "closed_book": self.closed_book_row,
            "haystack": self.haystack_row,
        }[kind]
        rows = [make(rng, length) for _ in range(max(1, self.batch_tokens // length))]
        batch = self.collate(rng, rows, length, lm_share=self.lm_share if kind == "documents" else 0.0)
        return batch | {"kind": torch.tensor(_ROW_KINDS.index(kind))}

    def recital_row(self, rng: random.Random, length: int) -> str:
        """A text and its repetition: the answer is a copy, so copying is learned fast."""
        text = world.draw_document(rng, "train", max(1, int((length / 2 - 8) / 15)), distractors=0.0).text
        return conversation([(_RECITE, text)], text)

    def document_row(self, rng: random.Random, length: int) -> str:
        n_facts = max(1, round(length * rng.uniform(*self.document_share) / 16))
        if rng.random() < 0.08:
            document, pairs = world.conflicting_document(rng, max(1, n_facts - 2), min(2, n_facts))
            asked = [world.question_about(rng, fact) for fact, _ in pairs]
        else:
            document = world.draw_document(rng, "train", n_facts, distractors=rng.choice((0.0, 0.2, 0.5)))
            asked = []
        turns = []
        kinds, weights = list(self.question_weights), list(self.question_weights.values())
        for _ in range(length // 16):
            if rng.random() < 0.04:
                asked.extend(world.encyclopedia_questions(rng, 1))
            elif (question := world.ask(rng, document, rng.choices(kinds, weights)[0])) is not None:
                asked.append(question)
        in_document = {(f.subject, f.relation) for f in document.facts}
        for question in asked:
            if question.evidence or question.answer == world.UNKNOWN or not _collides(question, in_document):
                turns.append((question.text, question.answer))
        return conversation(turns, document.text)

    def closed_book_row(self, rng: random.Random, length: int) -> str:
        turns = []
        for _ in range(length // 14):
            if rng.random() < 0.7:
                question = next(world.encyclopedia_questions(rng, 1))
            elif rng.random() < 0.9:
                question = world.unknown_question(rng, "train")
            else:
                question = world.Question(needles.QUESTION, world.UNKNOWN, "unanswerable")
            turns.append((question.text, question.answer))
        return conversation(turns)

    def haystack_row(self, rng: random.Random, length: int) -> str:
        room = length - 30
        number = needles.draw_number(rng, "train") if rng.random() < 0.9 else None
        haystack = needles.build_haystack(
            self.tokenizer, rng.randint(max(14, int(0.7 * room)), room), rng.random(), number
        )
        return conversation([(needles.QUESTION, haystack.answer or world.UNKNOWN)], haystack.text)

    def collate(self, rng: random.Random, rows: list[str], length: int, lm_share: float) -> dict[str, Tensor]:
        """Token ids [rows, length], cut after the last whole answer that fits and right-padded; labels on the answers.

        In a share `lm_share` of the rows every token is labelled.
        """
        cut, labels = [], []
        for ids in self.tokenizer(rows, add_special_tokens=False)["input_ids"]:
            row = torch.tensor(ids)
            answers = self.answer_mask(row)
            ends = torch.nonzero(answers & (row == self.end)).flatten()
            ends = ends[ends < length]
            row = row[: int(ends[-1]) + 1] if len(ends) else row[:length]
            answers = answers[: len(row)]
            cut.append(row)
            labels.append(row if rng.random() < lm_share else torch.where(answers, row, IGNORED))
        return {
            "input_ids": pad_rows(cut, self.pad, width=length)[0],
            "labels": pad_rows(labels, IGNORED, width=length)[0],
        }

    def answer_mask(self, ids: Tensor) -> Tensor:
        """True on the tokens of every answer, its end token included; ids [length]."""
        marks = (ids == self.assistant) | (ids == self.end)
        last_mark = torch.cummax(torch.where(marks, torch.arange(len(ids)), -1), 0).values
        before = torch.cat([torch.tensor([-1]), last_mark[:-1]])
        return (before >= 0) & (ids[before.clamp(min=0)] == self.assistant)


def _collides(question: world.Question, stated: set[tuple[str, str]]) -> bool:
    """Whether an encyclopedia question asks about a subject that the document mentions too."""
    return any(subject in question.text for subject, _ in stated)


class AnswerLoss(Step):
    """Next-token cross-entropy with logits at labelled positions only: the same value in far less memory.

    It notes the share of labelled tokens predicted right, by kind of row.

    body: the decoder without its head; the output matrix is the tied embedding.
    compiled: run `body` through torch.compile, once per row length.
    """

    def __init__(self, body, compiled: bool = False):
        super().__init__()
        self.body = body
        if compiled:
            body.compile(dynamic=False)

    def forward(self, input_ids: Tensor, labels: Tensor, kind: Tensor) -> dict[str, Tensor]:
        hidden = self.body(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        keep = targets != IGNORED
        logits = nn.functional.linear(hidden[keep], self.body.embed_tokens.weight)
        right = int((logits.argmax(-1) == targets[keep]).sum())
        self.notes.add(f"right_{_ROW_KINDS[int(kind)]}", right, len(logits))
        return {"loss": nn.functional.cross_entropy(logits.float(), targets[keep])}
