"""What an adapter stored of its documents and what it lost, sentence by sentence, for any text.

    sentence -> the base model's questions about it -> its answers with the sentence in the prompt
             -> does the adapter give the same answers without the sentence, and with which margin?

No question has to be known beforehand. The margin of an answer is the smallest lead of its tokens over the best other
token: above 0 the adapter gives exactly this answer. Controls: the adapter without its documents (its bias alone), and
with another document in their place.

A base model that has read the web (`ask_by_openings`) is asked for one question at a time, and answers from the
sentence with its reading LoRA, if it has one: in a few words, as adapters of token rows do. Where rows say the same in
other or fewer words, the words that both answers share count (`tasks.scores.token_scores`).
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from d2l_lib import presets
from d2l_lib.adapter import Adapter, Block
from d2l_lib.analysis.options import chosen as options_of
from d2l_lib.analysis.rows import row_ranks
from d2l_lib.analysis.weights import bias_and_documents, norms
from d2l_lib.documents import (
    answer_ids,
    check_count,
    check_texts,
    name_documents,
    open_turn,
    question_ids,
    sentence_number,
    split_sentences,
    stop_ids,
)
from d2l_lib.engine import Reply, TransformersEngine, pad_id_of, pad_rows
from d2l_lib.formats.peft import merge
from d2l_lib.loading import reading_lora, reading_lora_folder
from d2l_lib.model import DocToLoRA
from d2l_lib.records import project_root, read_rows
from d2l_lib.routing import route
from d2l_lib.tasks import world
from d2l_lib.tasks.scores import token_scores
from d2l_lib.tasks.short_questions import write_questions

_FLAG_BELOW = 0.5  # of `kept`: below it a sentence counts as lost; `studies.flags.flag_curve` tries others
_UNSURE = ("i do not know", "i don't know", "i am not sure", "i'm not sure", "not stated", "unknown")
_TOKENS = 48  # of a question, and of an answer
_WORLD = "tiny"  # the base model that knows the generated world
_GENERAL = 20  # questions
_PUBLISHED_CHUNKS, _PUBLISHED_CHUNK_TOKENS = 8, 512  # of the published recipe's training
Ask = Callable[[DocToLoRA, Sequence[str], int, int], list[dict[str, int]]]


# ------------------------------------------------------------------------------------------------------------ questions
def ask_about(
    model: DocToLoRA, sentences: Sequence[str], n: int, seed: int, temperature: float = 0.7
) -> list[dict[str, int]]:
    """{question: count} of `n` questions about each sentence, sampled from the base model as ends of the user's turn.

    For base models trained on documents followed by questions, such as the bundled one; others need another `ask`.
    """
    tokenizer, sentences = model.tokenizer, check_texts(sentences, "sentences")
    prompts = [open_turn(tokenizer, f"{sentence}\n\n") for sentence in sentences for _ in range(n)]
    replies = TransformersEngine("base", model.base_model, tokenizer).reply(prompts, _TOKENS, temperature, seed)
    questions = []
    for start in range(0, len(prompts), n):
        finished = [reply for reply in replies[start : start + n] if reply is not None and reply.finished]
        texts = (tokenizer.decode(reply.ids, skip_special_tokens=True).strip() for reply in finished)
        questions.append(dict(Counter(text for text in texts if text.endswith("?"))))
    return questions


def ask_by_openings(model: DocToLoRA, sentences: Sequence[str], n: int, seed: int) -> list[dict[str, int]]:
    """{question: 1} of at most `n` questions about each sentence, which an English base model goes on with.

    An opening ("Who", "When") that suits the sentence is put into its mouth (see `tasks.short_questions`).
    """
    engine, rng = TransformersEngine("base", model.base_model, model.tokenizer), random.Random(f"openings/{seed}")
    sentences = check_texts(sentences, "sentences")
    written = write_questions(rng, sentences, engine, Counter(), most=n, max_new_tokens=_TOKENS)
    return [dict.fromkeys((question.text for question in own), 1) for own in written]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def is_about(sentence: str, question: str, answer: str) -> bool:
    """Whether the question and its answer come from this sentence.

    Every name and number in the question (after its first word) stands in the sentence, and so do most of the answer's
    words that the question does not hold.
    """
    inside = {word.lower() for word in _words(sentence)}
    names = {word.lower() for word in _words(question)[1:] if word[0].isupper() or word[0].isdigit()}
    new = {word.lower() for word in _words(answer)} - {word.lower() for word in _words(question)}
    return names <= inside and len(new & inside) > len(new) / 2


@torch.no_grad()
def score_answers(
    model: DocToLoRA, questions: Sequence[str], answers: Sequence[Sequence[int]], adapters: Sequence[Adapter | None]
) -> list[tuple[float, float]]:
    """(log-probability, margin) of each answer (token ids, end of turn included), in nats, with its adapter.

    The margin is the minimum over the answer's tokens of log p(token) - log p(best other token), each conditioned on
    the tokens before it. It is above 0 exactly if the greedy answer is this one.
    """
    prompts = question_ids(model.tokenizer, check_texts(questions, "questions"))
    scores: list[tuple[float, float]] = []
    for start in range(0, len(prompts), model.answer_batch):
        batch = slice(start, start + model.answer_batch)
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts[batch], answers[batch], strict=True)]
        ids, mask = pad_rows(rows, pad_id_of(model.tokenizer))
        chosen = list(adapters[batch])
        with model.applied(chosen if any(one is not chosen[0] for one in chosen) else chosen[0]):
            logits = model.base_model(
                ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
            ).logits
        for row, prompt, answer in zip(logits, prompts[batch], answers[batch], strict=True):
            log_probs = row[len(prompt) - 1 : len(prompt) + len(answer) - 1].float().log_softmax(-1).cpu()
            own = torch.tensor(list(answer)).unsqueeze(1)
            of_answer = log_probs.gather(1, own).squeeze(1)
            others = log_probs.scatter(1, own, -torch.inf).amax(1)
            scores.append((float(of_answer.sum()), float((of_answer - others).min())))
    return scores


def margins_by_condition(
    model: DocToLoRA, questions: Sequence[world.Question], conditions: Mapping[str, Sequence[Adapter]]
) -> pd.DataFrame:
    """The margins of right answers (see `score_answers`), each with its own adapter, under several conditions.

    conditions: {name: one adapter per question}.

    Columns: condition, margin (nats), norm (Frobenius, of the adapter's update without its bias).
    """
    stop = stop_ids(model.tokenizer)[-1]
    ids = [[*model.tokenizer(question.answer, add_special_tokens=False)["input_ids"], stop] for question in questions]
    texts = [question.text for question in questions]
    tables = []
    for condition, adapters in conditions.items():
        margins = [margin for _, margin in score_answers(model, texts, ids, adapters)]
        sizes = [(bias_and_documents(adapter)["documents"] ** 2).sum() ** 0.5 for adapter in adapters]
        tables.append(pd.DataFrame({"condition": condition, "margin": margins, "norm": sizes}))
    return pd.concat(tables, ignore_index=True)


def find_questions(
    model: DocToLoRA,
    sentences: Sequence[str],
    *,
    n: int = 12,
    seed: int = 0,
    ask: Ask = ask_about,
    teacher: nn.Module | None = None,
) -> pd.DataFrame:
    """The questions about these sentences (`is_about`), of `n` sampled for each: one row per question.

    teacher: what answers with the sentence in its prompt (None: the base model), of the same tokenizer.

    Columns: sentence (its place), question, times (its count), told (the answer with the sentence in the prompt),
    told_ids (its tokens, end of turn included).
    """
    sentences = check_texts(sentences, "sentences")
    questions = [
        (place, text, times)
        for place, texts in enumerate(ask(model, sentences, n, seed))
        for text, times in texts.items()
    ]
    replies = _replies(model, [f"{sentences[place]}\n\n{text}" for place, text, _ in questions], teacher)
    rows = []
    for (place, text, times), reply in zip(questions, replies, strict=True):
        if reply is None or not reply.finished:
            continue
        answer = model.tokenizer.decode(reply.ids, skip_special_tokens=True).strip()
        if is_about(sentences[place], text, answer):
            ids = _as_rows_say(model, answer) if model.writes_rows else reply.ids
            rows.append({"sentence": place, "question": text, "times": times, "told": answer, "told_ids": ids})
    return pd.DataFrame(rows, columns=["sentence", "question", "times", "told", "told_ids"])


def _replies(model: DocToLoRA, prompts: list[str], teacher: nn.Module | None = None) -> list[Reply | None]:
    """Greedy answers of a teacher (None: the base model), with their log-probabilities."""
    engine = TransformersEngine("base", model.base_model if teacher is None else teacher, model.tokenizer)
    return engine.reply(question_ids(model.tokenizer, prompts), _TOKENS, 0.0, 0) if prompts else []


def _as_rows_say(model: DocToLoRA, answer: str) -> list[int]:
    """An answer in the tokens that it has inside a text, end of turn included: rows write a document's own tokens."""
    return [*answer_ids(model.tokenizer, answer, after_space=True), stop_ids(model.tokenizer)[0]]


def probe_questions(
    model: DocToLoRA, questions: pd.DataFrame, adapter: Adapter, wrong: Adapter, blocks: int | None = None
) -> pd.DataFrame:
    """How well the adapter answers these questions (`find_questions`): their rows with more columns.

    wrong: the adapter of another document, a control.
    blocks: how many blocks answer, the most relevant (None: all).

    New columns:
        margin, log_prob: nats, of the answer that the sentence gives.
        kept: the logistic function of the margin: near 1 for a sure answer, 0.5 in doubt, near 0 for another answer.
        over_zero, over_wrong: log_prob less that with the bias alone, and less that with `wrong` (nats).
    """
    texts, ids = questions["question"].tolist(), questions["told_ids"].tolist()
    inside, others = ([one] * len(texts) for one in (adapter, wrong))
    if blocks is not None:
        inside, others = (route(model, texts, both, blocks) for both in (inside, others))
    zero = [replace(adapter, blocks=())] * len(texts)
    scores, zeros, wrongs = (score_answers(model, texts, ids, one) for one in (inside, zero, others))
    log_probs = [log_prob for log_prob, _ in scores]
    margins = [margin for _, margin in scores]
    return questions.assign(
        margin=margins,
        kept=[1 / (1 + math.exp(-max(margin, -500.0))) for margin in margins],
        log_prob=log_probs,
        over_zero=[log_prob - control for log_prob, (control, _) in zip(log_probs, zeros, strict=True)],
        over_wrong=[log_prob - control for log_prob, (control, _) in zip(log_probs, wrongs, strict=True)],
    )


def kept(questions: pd.DataFrame) -> float:
    """The mean of `kept` over the questions about a sentence, weighted by count."""
    return float((questions["kept"] * questions["times"]).sum() / questions["times"].sum())


def most_frequent(questions: pd.DataFrame) -> pd.Series:
    """The most frequent question about a sentence (of ties, the first)."""
    return questions.loc[questions["times"].idxmax()]


def _with_answers(model: DocToLoRA, probed: pd.DataFrame, adapter: Adapter, blocks: int | None) -> pd.DataFrame:
    """The rows with the adapter's answer (said), and the base model's without the sentence (alone) with its probability
    (confidence). Where rows are read, an answer that shares the words of the right one is kept as far as it does.
    """
    answers = probed["told"].copy()
    lost = probed["margin"] <= 0  # the greedy answer is another
    if lost.any():
        answers[lost] = model.answer(probed["question"][lost].tolist(), adapter, max_new_tokens=_TOKENS, blocks=blocks)
    if model.writes_rows:
        shared = [token_scores(*both, "squad").f1 for both in zip(answers, probed["told"], strict=True)]
        probed = probed.assign(kept=[max(one, f1) for one, f1 in zip(probed["kept"], shared, strict=True)])
    alone, confidence = [], []
    for reply in _replies(model, probed["question"].tolist()):
        alone.append("" if reply is None else model.tokenizer.decode(reply.ids, skip_special_tokens=True).strip())
        confidence.append(0.0 if reply is None else math.exp(reply.values[:, 0].astype(float).sum()))
    return probed.assign(said=answers, alone=alone, confidence=confidence)


# ----------------------------------------------------------------------------------------------------------- the report
@dataclass(frozen=True)
class Report:
    """What was stored and what was lost, in numbers; `views.report` shows them.

    table: one row per sentence: document, sentence (its number, from 1 on through all documents), start, end
        (characters), text, chunk, asked (number of questions), kept (0 to 1, see `kept`), margin, over_zero, over_wrong
        (nats, of the most frequent question; see `probe_questions`), status ("stored", "lost", or "not asked", with NaN
        for the numbers), believed (the base model's confident other answer, or "").
    questions: one row per question.
    capacity: the rows of `weights.norms` without the bias, and the rank; of token rows those of `rows.row_ranks`.
    unrelated: one row per question: question, alone, said, changed.
    facts: {name: number}.
    warnings: sentences to read.
    """

    table: pd.DataFrame
    questions: pd.DataFrame
    capacity: pd.DataFrame
    unrelated: pd.DataFrame
    facts: dict[str, float]
    warnings: tuple[str, ...]
    texts: dict[str, str]
    flag_below: float

    def __str__(self) -> str:
        counts = self.table["status"].value_counts()
        lines = [f"{counts.get(status, 0)} sentences {status}" for status in STATUSES]
        lines += [f"{name}: {format_fact(value)}" for name, value in self.facts.items()]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


STATUSES = ("stored", "lost", "not asked")


def format_fact(value: float) -> str:
    """A count in full, other numbers to three digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


@dataclass(frozen=True)
class Options:
    """What one can choose of a report.

    adapter: the one to examine; it holds the documents and perhaps others (None: made here).
    blocks: how many blocks answer a question (None: all).
    wrong: another text, internalized as a control (None: a generated document).
    unrelated: questions without relation to the documents (None: what the base model may know: for "tiny" some about
        its encyclopedia, for others twenty general ones).
    n: questions sampled for each sentence.
    flag_below: a sentence is lost if its `kept` is smaller.
    belief: the least probability at which an answer of the base model alone is a belief.
    ask: writes the questions; called as `ask_about` (None: that one for "tiny" and for a model without a source,
        for others `ask_by_openings`).
    """

    adapter: Adapter | None = None
    blocks: int | None = None
    wrong: str | None = None
    unrelated: Sequence[str] | None = None
    n: int = 12
    flag_below: float = _FLAG_BELOW
    belief: float = 0.5
    ask: Ask | None = None
    seed: int = 0


def report(
    model: DocToLoRA, documents: str | Path | Sequence[str | Path] | Mapping[str, str | Path], **options: object
) -> Report:
    """What an adapter of these documents stored of them and what it lost.

    documents: as of `model.internalize`, with its errors.
    options: those of `Options`.
    """
    chosen = options_of(Options, "a report", options)
    named = name_documents(documents)
    unrelated = None if chosen.unrelated is None else check_texts(chosen.unrelated, "unrelated questions")
    check_count(chosen.n, "n")
    rng, blocks = random.Random(f"report/{chosen.seed}"), chosen.blocks
    adapter = sum(model.internalize_each(named)) if chosen.adapter is None else chosen.adapter
    of_world = model.base_source in (None, _WORLD)
    spans = [(name, *span) for name, text in named.items() for span in split_sentences(text)]
    sentences = [named[name][start:end].strip() for name, start, end in spans]
    wrong = chosen.wrong
    if wrong is None:
        wrong = world.draw_document(rng, "train", max(1, min(len(sentences), 40))).text
    (other,) = model.internalize_each([wrong])
    ask = chosen.ask or (ask_about if of_world else ask_by_openings)
    teacher = merge(model.base_model, reading_lora(model)) if reading_lora_folder(model).is_dir() else None
    questions = find_questions(model, sentences, n=chosen.n, seed=chosen.seed, ask=ask, teacher=teacher)
    questions = _with_answers(model, probe_questions(model, questions, adapter, other, blocks), adapter, blocks)
    table = _sentence_table(questions, spans, sentences, adapter, chosen)
    if unrelated is None:
        unrelated = [question.text for question in world.encyclopedia_questions(rng, 50)] if of_world else _general()
    disturbed = _disturbed(model, unrelated, adapter, blocks)
    capacity = _capacity_table(adapter)
    facts = {
        "documents": len(named),
        "blocks": len(adapter.blocks),
        "rank": adapter.rank,
        "bytes": adapter.nbytes,
        "effective rank, largest": float(capacity["effective_rank"].max()),
        "answers to unrelated questions changed": float(disturbed["changed"].mean()) if len(disturbed) else 0.0,
        "sentences that contradict the base model": int((table["believed"] != "").sum()),
    }
    warnings = beyond_training(model, named, adapter)
    questions = questions.assign(document=[spans[place][0] for place in questions["sentence"]])
    return Report(table, questions, capacity, disturbed, facts, warnings, named, chosen.flag_below)


def _sentence_table(
    questions: pd.DataFrame, spans: list[tuple[str, int, int]], sentences: list[str], adapter: Adapter, chosen: Options
) -> pd.DataFrame:
    by_sentence = dict(list(questions.groupby("sentence")))
    blocks = _blocks_by_document(adapter)
    rows = []
    for place, ((name, start, end), text) in enumerate(zip(spans, sentences, strict=True)):
        row = {"document": name, "sentence": sentence_number(place), "start": start, "end": end, "text": text}
        row["chunk"] = _chunk_of(blocks.get(name, []), start)
        about = by_sentence.get(place)
        row["asked"] = 0 if about is None else len(about)
        row["kept"] = math.nan if about is None else kept(about)
        for column in ("margin", "over_zero", "over_wrong"):
            row[column] = math.nan if about is None else float(most_frequent(about)[column])
        row["status"] = STATUSES[2] if about is None else STATUSES[int(row["kept"] < chosen.flag_below)]
        row["believed"] = "" if about is None else _belief(about, chosen.belief)
        rows.append(row)
    return pd.DataFrame(rows)


def _blocks_by_document(adapter: Adapter) -> dict[str, list[Block]]:
    blocks: dict[str, list[Block]] = {}
    for block in adapter.blocks:
        blocks.setdefault(block.document, []).append(block)
    return blocks


def _chunk_of(blocks: Sequence[Block], start: int) -> int:
    """The chunk of one document's blocks in which a sentence begins; -1 if the blocks do not say."""
    for block in blocks:
        if block.span is not None and block.span[0] <= start < block.span[1]:
            return block.chunk
    return -1


def _belief(questions: pd.DataFrame, belief: float) -> str:
    """The base model's most confident answer against the sentence, or ""."""
    sure = questions[(questions["confidence"] >= belief) & (questions["alone"] != questions["told"])]
    sure = sure[[not answer.lower().startswith(_UNSURE) for answer in sure["alone"]]]
    return "" if sure.empty else str(sure.loc[sure["confidence"].idxmax(), "alone"])


def _disturbed(model: DocToLoRA, unrelated: list[str], adapter: Adapter, blocks: int | None) -> pd.DataFrame:
    """The base model's answer to each question alone and with the adapter, and whether they differ."""
    alone, inside = (model.answer(unrelated, one, blocks=blocks) if unrelated else [] for one in (None, adapter))
    changed = pd.Series([a != b for a, b in zip(alone, inside, strict=True)], dtype=bool)  # bool even if empty
    return pd.DataFrame({"question": unrelated, "alone": alone, "said": inside, "changed": changed})


def _general() -> list[str]:
    return [row["question"] for row in read_rows(project_root() / "data" / "general_questions.jsonl")[:_GENERAL]]


def _capacity_table(adapter: Adapter) -> pd.DataFrame:
    """How much of an adapter's capacity its documents take: `weights.norms` without the bias, and the rank.

    Of token rows, which are as many as the text has tokens: `rows.row_ranks`.
    """
    if adapter.is_rows:
        return row_ranks({"": adapter}).drop(columns="adapter")
    documents = replace(adapter, bias=None)
    return norms(documents).assign(rank=documents.rank)


def trained_on(model: DocToLoRA) -> tuple[int, int]:
    """(chunks of a document, tokens of a chunk) in training: from a bundled preset, else from the published recipe."""
    config = model.config
    for name, preset in presets.PRESETS.items():
        if config.base_model != name:
            continue
        if model.writes_rows:
            return preset.rows.passages, preset.rows.longest_passage
        if model.chunk_tokens == preset.needle.chunk_tokens:
            return max(preset.needle.chunk_probabilities), preset.needle.longest
        stages = [stage for stage in preset.qa.stages.values() if model.chunk_tokens <= stage.longest_chunk]
        if stages:
            return max(stage.most_facts for stage in stages), max(stage.longest_chunk for stage in stages)
    return _PUBLISHED_CHUNKS, _PUBLISHED_CHUNK_TOKENS


def beyond_training(model: DocToLoRA, documents: Mapping[str, str], adapter: Adapter) -> tuple[str, ...]:
    """A sentence for each way in which these documents exceed those of training (see `trained_on`)."""
    most, longest = trained_on(model)
    warnings = []
    if len(adapter.blocks) > most:
        warnings.append(f"the adapter has {len(adapter.blocks)} blocks; in training there were at most about {most}")
    blocks = _blocks_by_document(adapter)
    for name, text in documents.items():
        chunks = [text[slice(*block.span)] for block in blocks.get(name, []) if block.span is not None]
        sizes = [len(model.tokenizer(chunk, add_special_tokens=False)["input_ids"]) for chunk in chunks]
        if sizes and max(sizes) > longest:
            warnings.append(f"{name}: a chunk has {max(sizes)} tokens; in training there were at most {longest}")
    return tuple(warnings)
