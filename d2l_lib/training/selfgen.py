"""Self-generated data: answers of the frozen base model to questions on a document in its prompt.

    documents  ->  questions  ->  the teacher's answers and their top-16 log-probabilities  ->  parquet shards

    d2l generate --model tiny --source world --documents 2000 --seed 0 --shard-size 100 --out FOLDER
    d2l generate --model smollm2 --source TEXTS --writer-style openings --prompt brief --out FOLDER    # a small model
    torchrun --nproc_per_node 2 -m d2l_lib generate ...                    # every process makes its share of the shards

One row is one document. The published columns (paper, main stage) and their axes:

    ctx_ids              [tokens]                     the document alone, in chat format (`documents.context_ids`)
    input_ids            [questions][tokens]          chat-formatted question and its answer, without the document
    response_start_end   [questions][2]               the answer within input_ids, as [start, end)
    logprobs_vals        [questions][end - start][16] float16, natural logarithms, largest first
    logprobs_indices     [questions][end - start][16] their token ids

An answer includes its stop token. Our shards also have text columns: document, questions, answers, references, kinds,
closed, evidence. Readers of the published columns can ignore them.

A shard is a function of the settings, the models and its index. Each worker makes its shards on one thread, so a killed
run continues to the same bytes with any number of workers on the same kind of machine and library versions (not with
vLLM). On a CPU start a process for each core.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from d2l_lib.base_model import load_base_model, load_config, load_tokenizer, locate
from d2l_lib.documents import (
    check_text,
    check_texts,
    context_ids,
    question_ids,
    stop_ids,
    tokenizer_fingerprint,
)
from d2l_lib.engine import TOP_K, Prompts, Reply, TransformersEngine
from d2l_lib.formats.shards import COUNTS, MANIFEST, SCHEMA, shard_path, shard_problem, shard_record, write_shard
from d2l_lib.records import read_json, read_jsonl, write_json
from d2l_lib.tasks import short_questions, world
from d2l_lib.training.processes import own_device
from d2l_lib.training.settings import PROMPTS, Settings

FORMAT, VERSION = "doc-to-lora self-generated data", 1


# ------------------------------------------------------------------------------------------------------------- prompts
CLOSED_WORDINGS = (
    "Answer with only the fact that was asked for.",
    "Give just the answer, in as few words as possible.",
    "Reply with nothing but the answer: no sentence around it, no explanation.",
)
_WRITER_PROMPTS = (
    "Here is a text.\n\n{document}\n\nWrite {n} questions that this text answers. A reader who cannot see the text "
    "must understand each of them, so call people, places and things by their full names. Cover different parts of the "
    "text. Reply with a numbered list of questions and nothing else.",
    "Here is a text.\n\n{document}\n\nThese questions about it exist already:\n{earlier}\n\nWrite {n} new questions "
    "that this text answers and that are harder: let them need several places of the text, a comparison or a "
    "conclusion. None may ask again for what an existing question asks. Call people, places and things by their full "
    "names. Reply with a numbered list of questions and nothing else.",
)


# ------------------------------------------------------------------------------------------------------------- engines


class VllmEngine:
    """The interface of `TransformersEngine` on vLLM, which is far faster for large models.

    It takes the share `gpu_share` of a GPU's memory, and a whole GPU per process: start each worker with its own
    CUDA_VISIBLE_DEVICES, --worker and --workers, not with torchrun. ImportError says how to install vLLM.
    """

    def __init__(self, name: str, gpu_share: float = 0.9):
        try:
            import vllm
        except ImportError as error:
            raise ImportError(
                "engine vllm needs the package vllm, which brings its own versions of torch and transformers: "
                "pip install vllm in a separate environment, or use engine transformers"
            ) from error
        location = locate(name)
        self.name, self._vllm = name, vllm
        self.config = load_config(location).get_text_config()
        self.tokenizer = load_tokenizer(location)
        self.stops, self.window = stop_ids(self.tokenizer), self.config.max_position_embeddings
        options = {"max_model_len": self.window, "max_logprobs": TOP_K, "gpu_memory_utilization": gpu_share}
        self._llm = vllm.LLM(model=location, **options)

    def facts(self) -> dict[str, Any]:
        """As `TransformersEngine.facts`, but with the hash of the configuration: vLLM does not show the weights."""
        return {
            "engine": f"vllm {self._vllm.__version__}",
            "name": self.name,
            "config_sha256": hashlib.sha256(self.config.to_json_string().encode()).hexdigest(),
            "tokenizer_sha256": tokenizer_fingerprint(self.tokenizer),
        }

    def reply(
        self, prompts: Prompts, max_new_tokens: int, temperature: float, seed: int, guesses: Prompts | None = None
    ) -> list[Reply | None]:
        """As `TransformersEngine.reply`; guesses are not used."""
        fitting = [i for i, ids in enumerate(prompts) if len(ids) < self.window]
        common = {"temperature": temperature, "logprobs": TOP_K, "stop_token_ids": self.stops}
        limits = [min(max_new_tokens, self.window - len(prompts[i])) for i in fitting]
        sampling = [
            self._vllm.SamplingParams(max_tokens=limit, seed=(seed + i) % 2**62, **common)
            for i, limit in zip(fitting, limits, strict=True)
        ]
        replies: list[Reply | None] = [None] * len(prompts)
        outputs = self._llm.generate([{"prompt_token_ids": list(prompts[i])} for i in fitting], sampling)
        for i, output in zip(fitting, outputs, strict=True):
            written = output.outputs[0]
            ids = list(written.token_ids)
            # A step also lists the chosen token, even outside the top 16.
            steps = [
                sorted(((p.logprob, token) for token, p in step.items()), key=lambda pair: (-pair[0], pair[1]))[:TOP_K]
                for step in written.logprobs
            ]
            values, indices = np.array(steps, dtype=np.float64).reshape(len(ids), -1, 2).transpose(2, 0, 1)
            replies[i] = Reply.rounded(ids, bool(ids) and ids[-1] in self.stops, values, indices)
        return replies


# ----------------------------------------------------------------------------------------------------------- questions
@dataclass(frozen=True)
class _Asked:
    """A question as student and teacher read it.

    reference: the right answer, where known.
    with_document: whether the teacher sees the document. False for unrelated questions: there the student learns what
        the base model does alone.
    evidence: the characters of the document that the answer rests on, where the source knows them.
    """

    text: str
    kind: str
    reference: str | None = None
    closed: bool = False
    with_document: bool = True
    evidence: Sequence[tuple[int, int]] | None = None


def world_documents(rng: random.Random, settings: Settings, n: int) -> list[tuple[str, list[_Asked]]]:
    """`n` documents of the world with distinct questions on each; unrelated questions are from the encyclopedia."""
    kinds = [kind for kind in world.KINDS if kind != "unanswerable"]
    drawn = []
    for _ in range(n):
        n_facts = rng.randint(settings.shortest, settings.longest)
        document = world.draw_document(rng, settings.split, n_facts, distractors=rng.choice((0.0, 0.2, 0.5)))
        asked: dict[str, _Asked] = {}
        for _ in range(settings.questions):
            sort = _draw_sort(rng, settings)
            for _ in range(16):  # not every document supports every kind, and questions repeat
                if sort == "unrelated":
                    question = next(world.encyclopedia_questions(rng, 1))
                else:
                    question = world.ask(rng, document, "unanswerable" if sort == "unanswerable" else rng.choice(kinds))
                if question is not None and question.text not in asked:
                    kind = "encyclopedia" if sort == "unrelated" else question.kind
                    about = sort != "unrelated"  # an encyclopedia's evidence is not in this document
                    asked[question.text] = _Asked(
                        *(question.text, kind, question.answer),
                        with_document=about,
                        evidence=question.evidence if about else (),
                    )
                    break
        drawn.append((document.text, list(asked.values())))
    return drawn


def _draw_sort(rng: random.Random, settings: Settings) -> str:
    unrelated, unanswerable = settings.unrelated_share, settings.unanswerable_share
    weights = (unrelated, unanswerable, max(0.0, 1 - unrelated - unanswerable))
    return rng.choices(("unrelated", "unanswerable", "about"), weights)[0]


def _maybe_closed(rng: random.Random, settings: Settings, question: _Asked) -> _Asked:
    """The question; with probability `closed_share`, one of CLOSED_WORDINGS follows it."""
    if rng.random() >= settings.closed_share:
        return question
    return replace(question, text=f"{question.text} {rng.choice(CLOSED_WORDINGS)}", closed=True)


def written_documents(
    rng: random.Random, settings: Settings, texts: Sequence[str], writer, counts: Counter
) -> list[tuple[str, list[_Asked]]]:
    """The texts with the questions that `writer` (an engine) wrote on them, as `settings.writer_style` says.

    Unrelated and unanswerable questions were written on another text of the same shard. `counts` gains what was
    dropped.
    """
    texts = check_texts(texts, "texts")
    if settings.writer_style == "openings":
        written = [
            [_Asked(question.text, question.kind, evidence=[question.span]) for question in questions]
            for questions in short_questions.write_questions(rng, texts, writer, counts, **_of_writer(settings))
        ]
    else:
        written = _listed_questions(rng, settings, texts, writer, counts)
    mixed = []
    for text, own in zip(texts, written, strict=True):
        others = [q.text for questions in written if questions is not own for q in questions]
        asked = {}
        for question in own:
            sort = _draw_sort(rng, settings)
            if sort != "about" and others:
                question = _Asked(rng.choice(others), sort, with_document=sort != "unrelated")
            asked.setdefault(question.text, question)
        mixed.append((text, list(asked.values())))
    return mixed


def _of_writer(settings: Settings) -> dict[str, Any]:
    """What `short_questions.write_questions` takes of the settings."""
    return {
        "most": settings.questions,
        "max_new_tokens": settings.writer_max_new_tokens,
        "temperature": settings.writer_temperature,
    }


def _listed_questions(
    rng: random.Random, settings: Settings, texts: Sequence[str], writer, counts: Counter
) -> list[list[_Asked]]:
    """For each text the questions of the writer's lists in two rounds: kinds level_0 and level_1."""
    written: list[list[_Asked]] = [[] for _ in texts]
    for level, template in enumerate(_WRITER_PROMPTS):
        earlier = [[question.text for question in questions] for questions in written]
        prompts = [
            template.format(document=text, n=settings.questions, earlier="\n".join(f"- {q}" for q in known) or "- none")
            for text, known in zip(texts, earlier, strict=True)
        ]
        prompts, most = question_ids(writer.tokenizer, prompts), settings.writer_max_new_tokens
        replies = writer.reply(prompts, most, settings.writer_temperature, rng.getrandbits(63))
        for questions, known, reply in zip(written, earlier, replies, strict=True):
            if reply is None:
                counts["writer_too_long"] += 1
                continue
            said = writer.tokenizer.decode(reply.ids, skip_special_tokens=True)
            found, dropped = parse_questions(said, settings.questions, known, complete=reply.finished)
            questions += [_Asked(text, f"level_{level}") for text in found]
            counts.update({f"writer_{reason}": n for reason, n in dropped.items()})
    return written


# ----------------------------------------------------------------------------------------- a model's list of questions
_THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)|\A.*?</think(?:ing)?>", re.S | re.I)
_MARK = re.compile(  # what may stand before an item of a list
    r"""\s*(?: [-*+•·–—](?:\s+|$)                                        # a bullet
      | [*_]*[(\[]?\d{1,3}[*_]*[.):\]、]+[*_]*(?!\d)                      # 1.  1)  (1)  **1.**  but not 3.5
      | \d{1,3}\s+[-–—]\s                                                # 1 -
      | [*_]*[(\[]?[a-h]\)                                               # a)  (a)
      | [*_\#\s]*\bq(?:uestion)?\s*\#?\d*\s*[*_]*\s*[.:)][*_]*             # Question 1:  Q1.  Q:
    )\s*""",
    re.I | re.X,
)
_ANSWER = re.compile(r"[*_\s]*(?:answer|ans|a)\s*\d*\s*[*_]*\s*:", re.I)
_AFTER_QUESTION = re.compile(r"(?<=[?？])(?:\s*[(\[][^?]*[)\]]|\s*[*_]*answer\s*[*_]*:.*)[.\s]*$", re.I)
_TASK = re.compile(
    r"(?:calculate|compare|define|describe|discuss|explain|find|give|identify|list|name|outline|show|state|"
    r"summari[sz]e|tell)\b",
    re.I,
)
_QUOTES = "\"'“”‘’«»„`"


def parse_questions(
    text: str, limit: int | None = None, earlier: Sequence[str] = (), complete: bool = True
) -> tuple[list[str], dict[str, int]]:
    """(the questions in a model's reply, {reason in `formats.shards.LISTS_DROPPED`: number of dropped items}).

    Reads numbers and bullets of any style, quotes, bold type, JSON lists and plain lines; drops thinking, introductions
    and answers. Unmarked lines count only where no item is marked.

    limit: most questions to keep.
    earlier: existing questions. Duplicates, also of these, differ only in case and punctuation.
    complete: False if the reply was cut off; the last item is then dropped.
    """
    dropped: Counter[str] = Counter()
    text, dropped["thinking"] = _THOUGHT.subn("", text)
    text = re.sub(r"^\s*```\w*\s*$", "", text, flags=re.M).strip()
    items = _json_items(text)
    if items is None:
        lines = re.sub(r"([?？])[ \t]+(?=[(\[]?\d{1,3}[.)\]]\s)", r"\1\n", text)  # a list on one line
        items = _line_items(lines.splitlines())
    if not complete and items:
        items.pop()
        dropped["cut_off"] += 1
    any_marked = any(marked and _is_question(item, marked) for marked, item in items)
    found: list[str] = []
    seen = {_essence(question) for question in check_texts(earlier, "earlier questions")}
    for marked, item in items:
        if not _is_question(item, marked) or (any_marked and not marked):
            dropped["not_a_question"] += 1
        elif (essence := _essence(item)) in seen:
            dropped["duplicate"] += 1
        elif limit is not None and len(found) == limit:
            dropped["surplus"] += 1
        else:
            seen.add(essence)
            found.append(item)
    return found, {reason: n for reason, n in dropped.items() if n}


def _json_items(text: str) -> list[tuple[bool, str]] | None:
    """The items of a JSON list of texts, or of objects with a question; None if the text is no such list."""
    try:
        value = json.loads(text) if text[:1] in ("[", "{") else None
    except (ValueError, RecursionError):  # no JSON, or nested too deeply
        return None
    value = value.get("questions") if isinstance(value, dict) else value
    if not isinstance(value, list):
        return None
    texts = [item.get("question", "") if isinstance(item, dict) else item for item in value]
    return [(True, _tidy(item) if isinstance(item, str) else "") for item in texts]


def _line_items(lines: Sequence[str]) -> list[tuple[bool, str]]:
    """(has a list mark, text) of each item; continuation lines are joined to their item."""
    items: list[tuple[bool, str]] = []
    open_item = pending_mark = False
    for line in lines:
        marked = False
        while (match := _MARK.match(line)) and match.end():
            marked, line = True, line[match.end() :]
        if not line.strip(" \t*_#`"):
            pending_mark, open_item = marked, False
            continue
        if open_item and not marked:
            items[-1] = (True, _tidy(f"{items[-1][1]} {line}"))
        else:
            items.append((marked or pending_mark, _tidy(line)))
        open_item = items[-1][0] and items[-1][1][-1:] not in tuple(".?!:。？！")
        pending_mark = False
    return items


def _tidy(item: str) -> str:
    """An item without bold type, surrounding quotes and a following answer."""
    item = re.sub(r"\s+", " ", item).strip().rstrip(",").strip("*_ ")
    if len(item) > 1 and item[0] in _QUOTES and item[-1] in _QUOTES:
        item = item[1:-1].strip("*_ ")
    return item if _ANSWER.match(item) else _AFTER_QUESTION.sub("", item)


def _is_question(item: str, marked: bool) -> bool:
    if _ANSWER.match(item) or sum(map(str.isalnum, item)) < 3:
        return False
    if marked:
        return bool(re.search("[?？؟]", item)) or (_TASK.match(item) is not None and not item.endswith(":"))
    return item.endswith(("?", "？", "؟"))


def _essence(question: str) -> str:
    return "".join(filter(str.isalnum, question.casefold()))


# -------------------------------------------------------------------------------------------------------------- shards


def make_shard(
    settings: Settings, index: int, teacher, texts: Sequence[str] | None = None, writer=None
) -> tuple[pa.Table, dict[str, int]]:
    """(the rows of shard `index`, its counts): documents of the world, or the shard's share of `texts`.

    Counts (`formats.shards.COUNTS`): documents kept and dropped (none of their answers was kept); questions asked,
    kept, unfinished (no stop token in time) and too long (the prompt fills the teacher's window); tokens of the kept
    answers; what was dropped of the writer's questions, and with the style "openings" of the answers.
    """
    rng = random.Random(f"self-generated/{settings.seed}/{index}")
    counts: Counter[str] = Counter()
    start = index * settings.shard_size
    end = min(start + settings.shard_size, settings.documents)
    if texts is None:
        documents = world_documents(rng, settings, end - start)
    else:
        documents = written_documents(rng, settings, texts[start:end], writer, counts)
    documents = [(text, [_maybe_closed(rng, settings, question) for question in asked]) for text, asked in documents]
    tokenizer, template = teacher.tokenizer, PROMPTS[settings.prompt]
    is_filtered = texts is not None and settings.writer_style == "openings"
    questions = [question for _, asked in documents for question in asked]
    prompts = [
        template.format(document=text, question=question.text) if question.with_document else question.text
        for text, asked in documents
        for question in asked
    ]
    prompts, contexts = question_ids(tokenizer, prompts), context_ids(tokenizer, [text for text, _ in documents])
    arguments = [prompts, settings.max_new_tokens, settings.temperature, rng.getrandbits(63)]
    if texts is None and questions:  # most of the world's own answers are the teacher's
        references = [question.reference for question in questions]
        arguments.append(tokenizer(references, add_special_tokens=False)["input_ids"])
    replies = iter(teacher.reply(*arguments))
    alone = iter(question_ids(tokenizer, [question.text for question in questions]))
    rows = []
    for (text, asked), ids_of_text in zip(documents, contexts, strict=True):
        row: dict[str, Any] = {name: [] for name in SCHEMA.names}
        row |= {"document": text, "ctx_ids": ids_of_text}
        for question in asked:
            ids = next(alone)
            reply = next(replies)
            counts["questions"] += 1
            if reply is None or not reply.finished:
                counts["too_long" if reply is None else "unfinished"] += 1
                continue
            answer = tokenizer.decode(reply.ids[:-1], skip_special_tokens=True).strip()
            if is_filtered and (problem := short_questions.answer_problem(answer, question.text, text)):
                counts[f"answer_{problem}"] += 1
                continue
            counts["kept"] += 1
            counts["answer_tokens"] += len(reply.ids)
            row["input_ids"].append(ids + reply.ids)
            row["response_start_end"].append([len(ids), len(ids) + len(reply.ids)])
            row["logprobs_vals"].append(list(reply.values))
            row["logprobs_indices"].append(list(reply.indices))
            row["questions"].append(question.text)
            row["answers"].append(answer)
            row["references"].append(question.reference)
            row["kinds"].append(question.kind)
            row["closed"].append(question.closed)
            row["evidence"].append(None if question.evidence is None else [[*span] for span in question.evidence])
        if row["input_ids"]:
            rows.append(row)
    counts["documents"], counts["documents_dropped"] = len(rows), len(documents) - len(rows)
    return pa.Table.from_pylist(rows, schema=SCHEMA), {name: counts[name] for name in COUNTS}


# ------------------------------------------------------------------------------------------------------------- the run
def generate(
    settings: Settings,
    folder: str | Path,
    teacher,
    texts: Sequence[str] | None = None,
    writer=None,
    *,
    worker: int = 0,
    workers: int = 1,
) -> dict[str, Any] | None:
    """Make the missing shards `worker`, `worker` + `workers`, ...; the manifest if all are there then, else None.

    teacher, writer: engines; the writer (default: the teacher) asks the questions on `texts`.
    texts: the documents; None draws them from the world.

    Shards are made on one thread, so that they are the same with any number of workers. Whole ones are kept; a damaged
    one is made again, as a printed line says. The last worker to finish writes the manifest. ValueError if the folder
    holds other data, or if the settings do not fit the texts.
    """
    if not 0 <= worker < workers:
        raise ValueError(f"worker {worker} of {workers}: workers are numbered from 0")
    if texts is not None and len(texts) < settings.documents:
        raise ValueError(f"the source has {len(texts)} documents, {settings.documents} are asked for")
    writer = None if texts is None else writer or teacher
    folder = Path(folder)
    identity = _identity(settings, teacher, texts, writer)
    run = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    _open_folder(folder, identity)
    todo = []
    for index in range(worker, settings.n_shards, workers):
        if (problem := shard_problem(path := shard_path(folder, index), run)) is not None:
            todo.append(index)
            if problem:
                print(f"{path}: {problem}; it is made again", flush=True)
    made: Counter[str] = Counter()
    began = time.monotonic()
    for n, index in enumerate(todo, 1):
        with _one_thread():
            table, counts = make_shard(settings, index, teacher, texts, writer)
        write_shard(shard_path(folder, index), run, table, counts)
        made.update(counts)
        seconds = max(time.monotonic() - began, 1e-9)
        print(
            f"{f'worker {worker}: ' if workers > 1 else ''}shard {n} of {len(todo)}: {counts['kept']} answers "
            f"({counts['unfinished']} unfinished, {counts['too_long']} too long)   "
            f"{made['documents'] / seconds:.1f} documents/s   {made['answer_tokens'] / seconds:.0f} answer tokens/s   "
            f"{seconds / n * (len(todo) - n):.0f} s left",
            flush=True,
        )
    return _finish(folder, identity, run, settings.n_shards)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Inside the `with` block torch computes on one thread: the last bits of its sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _identity(settings: Settings, teacher, texts: Sequence[str] | None, writer) -> dict[str, Any]:
    """What the data are a function of, as JSON values."""
    source = {"kind": "world"}
    if texts is not None:
        read = json.dumps(list(texts[: settings.documents])).encode()
        source = {"kind": "texts", "sha256": hashlib.sha256(read).hexdigest()}
    facts = teacher.facts()
    return {
        "format": FORMAT,
        "version": VERSION,
        "settings": asdict(settings),
        "source": source,
        "teacher": facts,
        "writer": None if writer is None else facts if writer is teacher else writer.facts(),
        "prompts": {
            "answer": PROMPTS[settings.prompt],
            "closed": list(CLOSED_WORDINGS),
            "writer": None if writer is None else _writer_prompts(settings),
        },
        "n_shards": settings.n_shards,
    }


def _writer_prompts(settings: Settings) -> list[str] | dict[str, Any]:
    if settings.writer_style == "openings":
        return {"prompt": short_questions.PROMPT, "openings": dict(short_questions.OPENINGS)}
    return list(_WRITER_PROMPTS)


def _open_folder(folder: Path, identity: dict[str, Any]) -> None:
    """Start or continue a run in `folder`; ValueError says how an earlier run there differs."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder for the shards")
    path = folder / MANIFEST
    if not path.exists():
        if any(folder.glob("*.parquet")):
            raise ValueError(f"{folder} holds parquet files but no {MANIFEST}: choose an empty folder")
        if others := sorted(file.name for file in folder.glob("shard-*.json")):
            raise ValueError(f"{folder} holds {others[0]} but no {MANIFEST}: choose an empty folder")
        write_json(path, identity | {"complete": False})
        return
    try:
        found = read_json(path)
    except ValueError as error:
        begin = json.dumps(identity, indent=2, ensure_ascii=False).encode()[:40]
        if path.read_bytes()[:40] != begin[: path.stat().st_size] and not any(
            shard_record(file) for file in folder.glob("shard-*.parquet")
        ):
            raise ValueError(f"{path} is not of this program: choose another folder") from error
        print(f"{error}; it is made again", flush=True)
        return
    different = _differences(identity, found if isinstance(found, dict) else {})
    if different:
        raise ValueError(f"{folder} holds data of another run ({'; '.join(different)}): choose another folder")


def _differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for name, value in ours.items():
        other = theirs.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            lines += _differences(value, other, f"{prefix}{name}.")
        elif value != other:
            lines.append(f"{prefix}{name} is {other!r} there, {value!r} here")
    return lines


def _finish(folder: Path, identity: dict[str, Any], run: str, n_shards: int) -> dict[str, Any] | None:
    """Write and return the complete manifest if every shard is there, else None; any worker writes the same bytes."""
    records = []
    for path in (shard_path(folder, index) for index in range(n_shards)):
        record = shard_record(path)
        if record is None or record["run"] != run or not path.exists():
            return None
        records.append({name: record[name] for name in ("file", "sha256", "counts")})
    totals = {name: sum(record["counts"].get(name, 0) for record in records) for name in COUNTS}
    manifest = identity | {"complete": True, "totals": totals, "shards": records}
    write_json(folder / MANIFEST, manifest)
    return manifest


# ------------------------------------------------------------------------------------------------------------- reading


def read_texts(source: str | Path) -> list[str]:
    """The documents of a folder of .txt and .md files, by name, or of a .jsonl file with a "text" in every line.

    FileNotFoundError and ValueError name the file or line that is missing, blank, not text or not UTF-8.
    """
    from d2l_lib.formats.schemas import TextLine, check

    path = Path(source)
    if path.is_dir():
        try:
            files = sorted(file for file in path.iterdir() if file.suffix in (".txt", ".md"))
            named = {str(file): file.read_text(encoding="utf-8") for file in files}
        except UnicodeDecodeError as error:
            raise ValueError(f"a text file in {path} is not UTF-8 ({error}): convert it first") from error
    elif path.suffix == ".jsonl" and path.is_file():
        rows = {f"{path}, line {number}": row for number, row in enumerate(read_jsonl(path), 1)}
        advice = 'every line needs a "text", as {"text": "..."}'
        named = {where: check(TextLine, row, where, advice).text for where, row in rows.items()}
    else:
        raise FileNotFoundError(
            f"no source {str(source)!r}: give 'world', a folder of .txt and .md files or a .jsonl file"
        )
    if not named:
        raise ValueError(f"{path} holds no documents")
    for name, text in named.items():
        check_text(text, name)
    return list(named.values())


# --------------------------------------------------------------------------------------------------------- the command
def load_engine(kind: str, name: str, batch_tokens: int, gpu_share: float = 0.9):
    if kind == "vllm":
        return VllmEngine(name, gpu_share)
    return TransformersEngine(name, *load_base_model(name, device=own_device()), batch_tokens)
