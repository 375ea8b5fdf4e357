"""Question answering: published data sets as one table of questions about documents, and scores of predictions.

    file or hub -> one record per question -> `load_qa` -> predictions -> `score` -> `summarise_scores`

Original files nest questions in paragraphs (SQuAD, ROPES), passages (DROP) or papers (Qasper), as lists of objects. The
hub's files store some of these lists as one object of lists. FairytaleQA has two files for each story, of questions and
of numbered sections. All become one record per question first.
"""

from __future__ import annotations

import csv
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from d2l_lib.documents import check_texts, question_ids
from d2l_lib.formats.writing import name_failed_writes
from d2l_lib.records import iter_jsonl, project_root, read_json, read_jsonl
from d2l_lib.tasks import scores
from d2l_lib.tasks.facts import fact_samples
from d2l_lib.tasks.questions import world_samples
from d2l_lib.tasks.scores import wilson
from d2l_lib.tasks.world import check_split

_logger = logging.getLogger(__name__)

COLUMNS = ("dataset", "id", "document", "question", "answers", "kind", "title")
PROMPT = "{document}\n\n{question}"  # the user's turn when the document is in the prompt

# Answer-only instructions in our words; `load_qa` takes other templates.
ANSWER_ONLY = "Answer with as few words as possible and without an explanation.\n\nQuestion: {question}"
_ANSWER_QASPER = (
    "Answer with one phrase or sentence and without an explanation. Where the text does not hold the answer, reply "
    '"unanswerable"; where yes or no is the answer, reply "yes" or "no".\n\nQuestion: {question}'
)

METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "token_f1": scores.token_f1,
    "token_f1_squad": partial(scores.token_f1, form="squad"),
    "exact_match": scores.exact_match,
    "exact_match_squad": partial(scores.exact_match, form="squad"),
    "rouge_l": scores.rouge_l,
    "rouge_l_first": lambda prediction, answers: scores.rouge_l(prediction, answers[0]),
}


@dataclass(frozen=True)
class _Dataset:
    """What an evaluation needs to know about a data set.

    hub, config, split, revision: its place on the Hugging Face hub, and the split for evaluation.
    metric: the column of `score` that counts, as in the published code: token F1 with the best answer for closed
        questions, ROUGE-L with the first answer for all else (the paper names ROUGE-L for SQuAD, DROP and ROPES too).
        FairytaleQA is not in that paper: ROUGE-L with the better of two answers, as in its own.
    template: an answer-only instruction around "{question}".
    no_answer: the right answer to a question without answers (None: it cannot be used).
    """

    name: str
    hub: str | None
    config: str | None
    split: str
    metric: str = "token_f1"
    template: str = ANSWER_ONLY
    no_answer: str | None = None
    revision: str | None = None


_GENERATED = {"world": "the world is", "facts": "the facts are"}
_CONVERTED = "refs/convert/parquet"  # the hub's own copy of a data set as parquet files
DATASETS: dict[str, _Dataset] = {
    dataset.name: dataset
    for dataset in (
        _Dataset("squad", "rajpurkar/squad", "plain_text", "validation"),
        _Dataset("squad_v2", "rajpurkar/squad_v2", "squad_v2", "validation", no_answer=""),
        _Dataset("drop", "ucinlp/drop", None, "validation"),
        _Dataset("ropes", "allenai/ropes", "plain_text", "validation"),
        _Dataset("pwc", "sggetao/PwC", None, "test", metric="rouge_l_first", template="{question}"),
        # The main branches of these, LongBench and Qasper hold loading scripts, which `datasets` no longer runs.
        _Dataset(
            "fairytaleqa", "WorkInTheDark/FairytaleQA", "plain_text", "test", metric="rouge_l", revision=_CONVERTED
        ),
        _Dataset("qasper", "zai-org/LongBench", "qasper_e", "test", template=_ANSWER_QASPER, revision=_CONVERTED),
        _Dataset("2wikimqa", "zai-org/LongBench", "2wikimqa_e", "test", revision=_CONVERTED),
        _Dataset("multifieldqa_en", "zai-org/LongBench", "multifieldqa_en_e", "test", revision=_CONVERTED),
        # The papers themselves.
        _Dataset("qasper_papers", "allenai/qasper", None, "validation", template=_ANSWER_QASPER, revision=_CONVERTED),
        _Dataset("world", None, None, "test", metric="exact_match", template="{question}"),
        _Dataset("facts", None, None, "test", metric="exact_match_squad", template="{question}"),
    )
}


# ------------------------------------------------------------------------------------------------------------- loading
def load_qa(
    name: str,
    source: str | Path | None = None,
    *,
    split: str | None = None,
    n: int | None = None,
    seed: int = 0,
    template: str = "{question}",
) -> pd.DataFrame:
    """Questions about documents, one per row, of a data set in DATASETS.

    Columns: dataset, id (text), document, question (in `template`), answers (list of str, at least one, each is right),
    kind (of question) and title (of the article that the document is part of), both empty if the data set does not
    tell. Texts are stripped, equal answers kept once.

    source: a file or folder in the data set's own format (.json, .jsonl) or the hub's (.parquet). None: the folder
        data/qa/<name> if there is one, else the hub.
    split: default: the data set's split for evaluation.
    n: draw at most `n` questions, with `seed`; rows stay in file order.

    In DROP each span is an answer of its own (the hub's form cannot tell lists from alternatives). A document of
    FairytaleQA is the section (or sections) that the question is about, its line ends within paragraphs are spaces; the
    answers are the first ones of its two annotators, and the kind says whether the text tells the answer (explicit) or
    it has to be concluded (implicit). A folder of it holds questions/<split> and section-stories/<split>. `world` and
    `facts` are generated: they need `n` and take no source; `questions.world_samples` also gives the evidence,
    `facts.fact_samples` takes the number of facts.

    Records without document, question or answer are left out, with a warning; `frame.attrs["unusable"]` counts them by
    reason. ValueError for an unknown name, an unreadable file, a missing or ill-formed column (it names file, record
    and column), or no usable record. FileNotFoundError if there is nothing to load.
    """
    dataset = _dataset(name)
    split = split or dataset.split
    if n is not None and n < 1:
        raise ValueError(f"n is {n}: ask for at least one question, or leave it out for all")
    if "{question}" not in template:
        raise ValueError(f"template {template!r} has no place for the question: put {{question}} into it")
    if name in _GENERATED:
        frame = _generated(name, split, n, seed, source)
    else:
        place = local_place(name, source)
        records = _hub_records(dataset, split) if place is None else _local_records(dataset, place, split)
        frame = _table(dataset, records, f"{place or dataset.hub}, {split}")
    if n is not None and n < len(frame):
        rows = sorted(random.Random(f"{name}/{split}/{seed}").sample(range(len(frame)), n))
        frame = frame.iloc[rows].reset_index(drop=True)
    frame["question"] = [template.replace("{question}", question) for question in frame["question"]]
    return frame


def load_named(name: str, **options) -> pd.DataFrame:
    """`load_qa` of "DATASET" or "DATASET=FILE", as commands name it; options: its other arguments."""
    dataset, _, file = name.partition("=")
    return load_qa(dataset, file or None, **options)


def stream_qa(name: str, source: str | Path | None = None, *, split: str | None = None) -> Iterator[dict]:
    """The rows of `load_qa` in file order, one by one, without the whole data set in memory.

    The hub streams them; a .json file is read at once. Errors are those of `load_qa`, raised at the row. A warning at
    the end counts unusable records.
    """
    dataset = _dataset(name)
    if name in _GENERATED:
        raise ValueError(f"{_GENERATED[name]} generated, not read: take load_qa with n")
    split, place = split or dataset.split, local_place(name, source)
    records = _hub_records(dataset, split, streaming=True) if place is None else _local_records(dataset, place, split)
    unusable = Counter()
    yield from _usable(dataset, records, unusable)
    _judge(f"{place or dataset.hub}, {split}", unusable)


def local_place(name: str, source: str | Path | None) -> Path | None:
    """`source`, else the folder data/qa/<name> if it exists, else None (the hub)."""
    folder = project_root() / "data" / "qa" / name
    return Path(source) if source is not None else folder if folder.exists() else None


def _dataset(name: str) -> _Dataset:
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}")
    return DATASETS[name]


def _generated(name: str, split: str, n: int | None, seed: int, source: str | Path | None) -> pd.DataFrame:
    if n is None or source is not None:
        raise ValueError(f"{_GENERATED[name]} generated without end: pass n, the number of questions, and no source")
    frame = _world(split, n, seed) if name == "world" else fact_samples(n, seed, split=split)[list(COLUMNS)]
    frame.attrs["unusable"] = {}
    return frame


def _world(split: str, n: int, seed: int) -> pd.DataFrame:
    check_split(split)
    samples = world_samples(n, seed, split=split)
    answers = [[answer] for answer in samples["answer"]]
    ids = [f"{split}/{seed}/{number}" for number in range(n)]
    return samples.assign(dataset="world", id=ids, answers=answers, title="")[list(COLUMNS)]


def _usable(dataset: _Dataset, records: Iterable[tuple[str, object]], unusable: Counter) -> Iterator[dict]:
    """Rows of `load_qa` from (where, record) pairs; `unusable` counts the others by reason, and all under ""."""
    for where, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{where} is {type(record).__name__}, not an object with columns: {_ADVICE}")
        for question, at in _questions(record, where):
            unusable[""] += 1
            row = {"dataset": dataset.name, **_FORMS[dataset.name].read(question, at)}
            row["id"] = row["id"] or str(unusable[""])
            if not row["answers"] and dataset.no_answer is not None:
                row["answers"], row["kind"] = [dataset.no_answer], "unanswerable"
            missing = [column for column in ("document", "question", "answers") if not row[column]]
            if missing:
                unusable[f"no {missing[0].removesuffix('s')}"] += 1
            else:
                yield row


def _judge(place: str, unusable: Counter) -> None:
    """Warn with counts of unusable questions; ValueError if no question is usable."""
    total = unusable.pop("", 0)
    counts = ", ".join(f"{reason}: {count}" for reason, count in unusable.items())
    if total == unusable.total():
        reason = f"none of {total} questions can be used ({counts})" if total else "it holds no questions"
        raise ValueError(f"{place}: {reason}; is it complete, and a split with public answers?")
    if unusable:
        _logger.warning("%s: %d of %d questions cannot be used (%s)", place, unusable.total(), total, counts)


def _table(dataset: _Dataset, records: Iterable[tuple[str, object]], place: str) -> pd.DataFrame:
    """The table of `load_qa` from (where, record) pairs."""
    unusable = Counter()
    frame = pd.DataFrame(list(_usable(dataset, records, unusable)), columns=list(COLUMNS))
    _judge(place, unusable)
    frame.attrs["unusable"] = dict(unusable)
    return frame


# --------------------------------------------------------------------------------------------------- files and the hub
_SPLIT_WORDS = {"train": {"train"}, "validation": {"validation", "valid", "val", "dev"}, "test": {"test"}}
_SHARD = re.compile(r".*-\d{5}-of-(\d{5})\.parquet|\d{4}\.parquet")


def _hub_records(dataset: _Dataset, split: str, streaming: bool = False) -> Iterator[tuple[str, object]]:
    import datasets

    folder = project_root() / "data" / "qa" / dataset.name
    options = {"streaming": True} if streaming else {}
    try:
        with name_failed_writes(datasets.config.HF_DATASETS_CACHE):
            rows = datasets.load_dataset(dataset.hub, dataset.config, split=split, revision=dataset.revision, **options)
    except (OSError, RuntimeError) as error:
        if getattr(error, "filename", None) is not None:  # a file of this machine, not the hub
            raise
        config = f", config {dataset.config}" if dataset.config else ""
        raise FileNotFoundError(
            f"data set {dataset.name} could not be loaded ({error}). It is {dataset.hub}{config}, split {split} on "
            f"the Hugging Face hub: load it once with a connection, or put its files into {folder} (or anywhere, and "
            "pass that folder or file as source)"
        ) from error
    return ((f"{dataset.hub} {split}, record {number}", row) for number, row in enumerate(rows, 1))


def _local_records(dataset: _Dataset, place: Path, split: str) -> Iterator[tuple[str, object]]:
    files = files_of(dataset.name, place, split)
    readers = _readers(dataset)
    rows = ((file, number, row) for file in files for number, row in enumerate(readers[file.suffix](file), 1))
    return ((f"{file}, record {number}", row) for file, number, row in rows)


def files_of(name: str, place: Path, split: str) -> list[Path]:
    """The file (or shards, or stories) of a data set and split at `place`, a file or folder; errors as in `load_qa`."""
    dataset = _dataset(name)
    if not place.exists():
        raise FileNotFoundError(f"{place} does not exist: pass the file or folder that holds {dataset.hub}")
    files = [place] if place.is_file() else _story_files(dataset, place, split) or _files(dataset, place, split)
    if files[0].suffix not in (readers := _readers(dataset)):
        raise ValueError(f"{place} cannot be read: pass a folder, or a file that ends in {', '.join(readers)}")
    return files


def _files(dataset: _Dataset, folder: Path, split: str) -> list[Path]:
    """The file (or shards) of a data set and split, recognised by the names of files and folders."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in _readers(dataset))
    own = [path for path in paths if dataset.config in (path.stem, *path.relative_to(folder).parts)]
    words = {
        path: set(re.split(r"[^a-z0-9]+", str(path.relative_to(folder)).lower())) & set().union(*_SPLIT_WORDS.values())
        for path in own or paths
    }
    files = [path for path, named in words.items() if named & _SPLIT_WORDS.get(split, {split})]
    files = files or [path for path, named in words.items() if not named]
    names = ", ".join(str(path.relative_to(folder)) for path in files or paths) or "nothing that can be read"
    if not files:
        raise FileNotFoundError(
            f"{folder} has no file of {dataset.name}, split {split} (it has {names}): pass the file"
        )
    shards = [_SHARD.fullmatch(path.name) for path in files]
    complete = all(shard and int(shard.group(1) or len(files)) == len(files) for shard in shards)
    if len({path.parent for path in files}) > 1 or not (complete or shards == [None]):
        raise ValueError(
            f"{folder} has several files for {dataset.name}, split {split}, or only some of its shards ({names}): "
            "pass one file, or complete the folder"
        )
    return files


def _story_files(dataset: _Dataset, folder: Path, split: str) -> list[Path]:
    """FairytaleQA's files of questions, one for each story, in a folder named after the split; [] for other data."""
    every = sorted(folder.rglob(f"*{_QUESTIONS}.csv")) if dataset.name == "fairytaleqa" else []
    files = [file for file in every if file.parent.name in _SPLIT_WORDS.get(split, {split})]
    names = ", ".join(str(parent) for parent in sorted({file.parent for file in files or every}))
    if every and not files:
        raise FileNotFoundError(
            f"{folder} has no questions of {dataset.name}, split {split} (it has {names}): pass the folder"
        )
    if len({file.parent for file in files}) > 1:
        raise ValueError(f"{folder} has several folders for {dataset.name}, split {split} ({names}): pass one of them")
    return files


def read_parquet(path: Path) -> Iterator[dict]:
    """The rows of a parquet file, one by one; ValueError if it is incomplete."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1000):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"{path} is not a complete parquet file ({error}): download it again") from error


def _read_objects(path: Path) -> list:
    """The records of a .json file: a list, {"data": list} (SQuAD), {id: record} (DROP, Qasper), or JSON lines."""
    try:
        value = read_json(path)
    except ValueError as error:
        if "Extra data" in str(error):  # a whole JSON value, then another one
            return read_jsonl(path)
        raise
    if isinstance(value, dict) and "data" in value:
        value = value["data"]
    elif isinstance(value, dict) and all(isinstance(record, dict) for record in value.values()):
        value = [{"id": key, **record} for key, record in value.items()]
    if not isinstance(value, list):
        raise ValueError(f"{path} holds {type(value).__name__} and no list of records: {_ADVICE}")
    return value


_READ: dict[str, Callable[[Path], Iterable]] = {
    ".parquet": read_parquet,
    ".jsonl": iter_jsonl,
    ".json": _read_objects,
}


def _readers(dataset: _Dataset) -> dict[str, Callable[[Path], Iterable]]:
    """What reads a data set's files, by their endings."""
    return {**_READ, ".csv": _read_stories} if dataset.name == "fairytaleqa" else _READ


def _read_csv(path: Path) -> Iterator[dict]:
    """The rows of a .csv file whose first line names the columns; ValueError if it is incomplete."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, strict=True), 1):
                if None in row or None in row.values():  # too many cells, too few
                    raise ValueError(f"{path}, record {number} has not as many cells as columns: download it again")
                yield row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a complete CSV file ({error}): download it again") from error


_QUESTIONS = "-questions"  # how the name of a file of questions about one story ends


def _read_stories(path: Path) -> Iterator[dict]:
    """Rows in the hub's form: of its own file, or of questions about one story, with the sections of each."""
    if not path.stem.endswith(_QUESTIONS):
        yield from _read_csv(path)
        return
    title, home = path.stem.removesuffix(_QUESTIONS), path.resolve().parent
    story = home.parent.parent / "section-stories" / home.name / f"{title}-story.csv"
    if not story.is_file():
        raise FileNotFoundError(f"{story} does not exist: {path} needs it, the sections of its story")
    sections: dict[str, list[str]] = {}
    for number, row in enumerate(_read_csv(story), 1):
        where = f"{story}, record {number}"
        sections.setdefault(_text(row, "section", where), []).append(_text(row, "text", where))
    for number, row in enumerate(_read_csv(path), 1):
        where = f"{path}, record {number}"
        about = [one.strip() for one in _text(row, "cor_section", where).split(",")]
        if missing := [one for one in about if one not in sections]:
            raise ValueError(
                f"{where}, column 'cor_section' names section {', '.join(map(repr, missing))}; {story} has "
                f"{', '.join(sections)}: are both of one version?"
            )
        texts = (text for section, own in sections.items() if section in about for text in own)
        yield row | {"story_name": title, "story_section": "\n\n".join(texts)}


# ------------------------------------------------------------------------------------------------------------- records
_ADVICE = "is the file in the data set's own format or the hub's, and of this data set?"


def _value(record: object, column: str, where: str):
    if not isinstance(record, dict) or column not in record:
        there = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where} has no column {column!r}, only {there}: {_ADVICE}")
    return record[column]


def _text(record: object, column: str, where: str) -> str:
    """A stripped text; null is empty."""
    value = _value(record, column, where)
    if not isinstance(value, str | None):
        raise ValueError(f"{where}, column {column!r} is {type(value).__name__}, not text: {_ADVICE}")
    return (value or "").strip()


def _texts(record: object, column: str, where: str) -> list[str]:
    value = _value(record, column, where)
    if not isinstance(value, list | None) or not all(isinstance(text, str) for text in value or []):
        raise ValueError(f"{where}, column {column!r} is not a list of texts: {_ADVICE}")
    return [text.strip() for text in value or []]


def _rows(record: dict, column: str, where: str) -> list[dict]:
    """A list of objects, also from the hub's object of lists of one length."""
    value = _value(record, column, where)
    if isinstance(value, dict) and all(isinstance(items, list) for items in value.values()):
        if len({len(items) for items in value.values()}) > 1:
            lengths = ", ".join(f"{len(items)} {name}" for name, items in value.items())
            raise ValueError(f"{where}, column {column!r} is ragged ({lengths}): download the file again")
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, list | None) or not all(isinstance(row, dict) for row in value or []):
        raise ValueError(f"{where}, column {column!r} is not a list of objects: {_ADVICE}")
    return value or []


def _questions(record: dict, where: str) -> Iterator[tuple[dict, str]]:
    """Every question inside a record as a flat record, with the columns around it."""
    nested = next((column for column in ("paragraphs", "qas", "qa_pairs") if column in record), None)
    if nested is None:
        yield record, where
        return
    around = {column: value for column, value in record.items() if column != nested}
    for number, inner in enumerate(_rows(record, nested, where), 1):
        yield from _questions({**around, **inner}, f"{where}, {nested} {number}")


# Answers as (text, kind of question) pairs.
def _listed_answers(record: dict, where: str) -> list[tuple[str, str]]:
    return [(_text(answer, "text", where), "") for answer in _rows(record, "answers", where)]


def _drop_answers(record: dict, where: str) -> list[tuple[str, str]]:
    """Every span, number and date; the hub's form has them all as typed spans."""
    if "answer" not in record:
        spans = _rows(record, "answers_spans", where)
        return [(_text(span, "spans", where), _text(span, "types", where)) for span in spans]
    answers = []
    validated = _rows(record, "validated_answers", where) if "validated_answers" in record else []
    for answer in (record["answer"], *validated):
        date = _value(answer, "date", where)
        parts = [part for part in ("day", "month", "year") if not isinstance(date, dict) or part in date]
        answers += [(text, "span") for text in _texts(answer, "spans", where)]
        answers += [(_text(answer, "number", where), "number")]
        answers += [(" ".join(filter(None, (_text(date, part, where) for part in parts))), "date")]
    return [(text, kind) for text, kind in answers if text]


def _paper_answers(record: dict, where: str) -> list[tuple[str, str]]:
    """One answer per annotator; several spans become one text."""
    answers = []
    for row in _rows(record, "answers", where):
        answer = _value(row, "answer", where)
        yes = _value(answer, "yes_no", where)
        if _value(answer, "unanswerable", where):
            answers.append(("unanswerable", "unanswerable"))
        elif spans := _texts(answer, "extractive_spans", where):
            answers.append((", ".join(spans), "extractive"))
        elif text := _text(answer, "free_form_answer", where):
            answers.append((text, "free_form"))
        elif yes is not None:
            answers.append(("yes" if yes else "no", "yes_no"))
    return answers


def _paper(record: dict, where: str) -> str:
    """Title, abstract and sections, separated by blank lines."""
    parts = [_text(record, "title", where), _text(record, "abstract", where)]
    for section in _rows(record, "full_text", where):
        parts += [_text(section, "section_name", where), *_texts(section, "paragraphs", where)]
    return "\n\n".join(filter(None, parts))


def _story_text(record: dict, where: str) -> str:
    """Paragraphs; the ends of printed lines inside them are spaces."""
    paragraphs = re.split(r"\n\s*\n", _text(record, "story_section", where))
    return "\n\n".join(filter(None, (" ".join(one.split()) for one in paragraphs)))


def _story_answers(record: dict, where: str) -> list[tuple[str, str]]:
    """The first answer of each annotator; the original files have three columns for each, the hub's one."""
    original = "answer4" in record
    kind = _text(record, "ex-or-im1" if original else "ex-or-im", where)
    return [(_text(record, column, where), kind) for column in ("answer1", "answer4" if original else "answer2")]


@dataclass(frozen=True)
class _Form:
    """Where a record of one question holds what: columns to join by new lines, or a function; title: its column."""

    id: str | None
    question: str
    document: tuple[str, ...] | Callable[[dict, str], str]
    answers: Callable[[dict, str], list[tuple[str, str]]]
    title: str | None = None

    def read(self, record: dict, where: str) -> dict:
        if callable(self.document):
            document = self.document(record, where)
        else:
            document = "\n".join(filter(None, (_text(record, column, where) for column in self.document)))
        pairs = self.answers(record, where)
        return {
            "id": _text(record, self.id, where) if self.id else "",
            "document": document,
            "question": _text(record, self.question, where),
            "answers": list(dict.fromkeys(text for text, _ in pairs if text)),
            "kind": pairs[0][1] if pairs else "",
            "title": _text(record, self.title, where) if self.title in record else "",
        }


_SQUAD = _Form("id", "question", ("context",), _listed_answers, title="title")
_LONGBENCH = _Form("_id", "input", ("context",), lambda r, where: [(text, "") for text in _texts(r, "answers", where)])
_FORMS = {
    "squad": _SQUAD,
    "squad_v2": _SQUAD,
    "drop": _Form("query_id", "question", ("passage",), _drop_answers),
    "ropes": _Form("id", "question", ("background", "situation"), _listed_answers),
    "pwc": _Form(None, "prompt", ("input",), lambda record, where: [(_text(record, "answer", where), "")]),
    "fairytaleqa": _Form(None, "question", _story_text, _story_answers, title="story_name"),
    "qasper": _LONGBENCH,
    "2wikimqa": _LONGBENCH,
    "multifieldqa_en": _LONGBENCH,
    "qasper_papers": _Form("question_id", "question", _paper, _paper_answers),
}


# ----------------------------------------------------------------------------------------------------------- documents
def group_by_document(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(document, its rows) for each document of each data set, in order of first appearance; rows keep their index."""
    groups = frame.groupby(["dataset", "document"], sort=False)
    return [(document, rows) for (_, document), rows in groups]


def add_lengths(frame: pd.DataFrame, tokenizer) -> pd.DataFrame:
    """`frame` with the column length_tokens: tokens of the document alone, without chat wrapping."""
    lengths = {document: len(_ids(tokenizer, document)) for document in frame["document"].unique()}
    return frame.assign(length_tokens=[lengths[document] for document in frame["document"]])


def truncate_document(document: str, question: str, tokenizer, window: int, max_new_tokens: int = 0) -> str:
    """`document` without its middle, so that PROMPT with `question` in chat format fits into `window` tokens.

    `max_new_tokens` stay free for the answer. Equal parts of both ends stay (see `truncate_middle`); a document that
    fits is unchanged. ValueError if the question leaves no room for a document.
    """

    def excess(text: str) -> int:
        prompt = question_ids(tokenizer, PROMPT.format(document=text, question=question))
        return len(prompt) + max_new_tokens - window

    over, shortened = excess(document), document
    ids = _ids(tokenizer, document)
    room = len(ids)
    while over > 0:
        room -= over  # mostly one pass; rarely, the cut text has more tokens than its ids
        if room < 2:
            raise ValueError(
                f"no room for a document in a window of {window} tokens with {max_new_tokens} new ones: "
                f"the question {question[:60]!r} and the chat format fill it"
            )
        ends = truncate_middle(ids, room)
        halves = [tokenizer.decode(half) for half in (ends[: len(ends) // 2], ends[len(ends) // 2 :])]
        # a cut may split a character of several tokens
        shortened = halves[0].rstrip("\ufffd") + halves[1].lstrip("\ufffd")
        over = excess(shortened)
    return shortened


def truncate_middle(ids: Sequence[int], max_length: int, max_new_tokens: int = 0) -> list[int]:
    """`ids` with equal parts of both ends, so that `max_new_tokens` more fit into `max_length`; unchanged if they fit.

    ValueError if `max_new_tokens` alone fills `max_length`.
    """
    room = max_length - max_new_tokens
    if room < 2:
        raise ValueError(f"no room for a prompt: {max_new_tokens} new tokens in a window of {max_length}")
    if len(ids) <= room:
        return list(ids)
    half = room // 2
    return list(ids[:half]) + list(ids[-half:])


def with_document(
    document: str, questions: Sequence[str], tokenizer, window: float, max_new_tokens: int = 0
) -> list[str]:
    """PROMPT for each question, with the document cut as in `truncate_document`."""
    return [
        PROMPT.format(
            document=truncate_document(document, question, tokenizer, window, max_new_tokens), question=question
        )
        for question in check_texts(questions, "questions")
    ]


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


# -------------------------------------------------------------------------------------------------------------- scores
def score(predictions: pd.DataFrame, metric: str | None = None) -> pd.DataFrame:
    """`predictions` with the columns of METRICS (each 0 to 1), metric (the one that counts) and score (its value).

    predictions: columns prediction (text), answers (list of str), and dataset if `metric` is None.

    The best answer counts, in rouge_l_first the first one. The normal form is "published", or "squad" where the
    metric's name says so. An empty prediction matches an empty reference answer (SQuAD 2), but not in ROUGE-L, where it
    scores 0.

    ValueError for missing columns, no rows, an unknown metric or data set, or an ill-formed row.
    """
    _need(predictions, ["prediction", "answers"] + ([] if metric else ["dataset"]))
    if metric is not None and metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; choose one of {', '.join(METRICS)}")
    pairs = list(zip(predictions["prediction"], predictions["answers"], strict=True))
    for row, (prediction, answers) in zip(predictions.index, pairs, strict=True):
        several = isinstance(answers, list | tuple | np.ndarray) and len(answers) > 0
        if not several or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"row {row}, column 'answers': {answers!r} is not a list of at least one text")
        if not isinstance(prediction, str):
            raise ValueError(f"row {row}, column 'prediction': {prediction!r} is not text; use '' for no answer")
    values = {name: [measure(*pair) for pair in pairs] for name, measure in METRICS.items()}
    own = [metric or _dataset(name).metric for name in predictions.get("dataset", [None] * len(pairs))]
    return predictions.assign(**values, metric=own, score=[values[name][i] for i, name in enumerate(own)])


def summarise_scores(
    scores: pd.DataFrame,
    by: Sequence[str] = ("method", "dataset", "length_bin"),
    metric: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """The mean score of each group; columns: those of `by`, metric, n (questions), score, low, high (95% interval).

    scores: a table of `score`.
    metric: one of its columns, instead of each data set's own.

    The interval is Wilson for exact match, else from 1,000 bootstrap samples of the questions with `seed`. The column
    length_bin ("128-255") comes from length_tokens (`length_bin`). Groups are in order of first appearance, bins in
    order of length. ValueError for missing or empty columns, or mixed metrics.
    """
    by, bins = check_texts(by, "columns"), None
    if "length_bin" in by and "length_bin" not in scores:
        _need(scores, ["length_tokens"])
        scores = scores.assign(length_bin=[_bin_name(length) for length in scores["length_tokens"]])
        bins = [_bin_name(first) for first, _ in LENGTH_BINS]
    columns = [metric] if metric else ["metric", "score"]
    _need(scores, by + columns)
    orders = {column: bins if bins and column == "length_bin" else scores[column].unique() for column in by}
    ordered = {column: pd.Categorical(scores[column], order, ordered=True) for column, order in orders.items()}
    rows = []
    for key, group in scores.assign(**ordered).groupby(by, sort=True, observed=True):
        names = [metric] if metric else list(group["metric"].unique())
        if len(names) > 1:
            raise ValueError(f"group {key} mixes {', '.join(names)}: add 'dataset' to by, or name one metric")
        values = group[columns[-1]].to_numpy(dtype=float)
        if names[0].startswith("exact_match"):
            low, high = wilson(round(values.sum()), len(values))
        else:
            low, high = bootstrap_interval(values, seed)
        spread = {"metric": names[0], "n": len(values), "score": values.mean(), "low": low, "high": high}
        rows.append(dict(zip(by, key, strict=True)) | spread)
    return pd.DataFrame(rows)


LENGTH_BINS = ((0, 127), *((2**k, 2 ** (k + 1) - 1) for k in range(7, 15)), (32768, math.inf))


def length_bin(length: int) -> tuple[int, float]:
    """The (first, last) bin of LENGTH_BINS for `length` tokens, both ends included."""
    if length < 0:
        raise ValueError(f"a length of {length} tokens has no bin")
    return next((first, last) for first, last in LENGTH_BINS if length <= last)


def _bin_name(length_tokens: float) -> str:
    """A bin as text: "128-255", the last one "32768+"."""
    first, last = length_bin(length_tokens)
    return f"{first}+" if math.isinf(last) else f"{first}-{last}"


def bootstrap_interval(values: np.ndarray, seed: int = 0, n_samples: int = 1000) -> tuple[float, float]:
    """95% percentile interval of the mean over `n_samples` draws with replacement; one value has no spread."""
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, len(values)).mean() for _ in range(n_samples)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def _need(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """ValueError if a column is missing or has empty cells, or if there are no rows."""
    missing = [column for column in columns if column not in frame]
    if missing:
        raise ValueError(f"the table has no column {', '.join(missing)}, only {', '.join(map(str, frame.columns))}")
    if frame.empty:
        raise ValueError("the table has no rows: nothing to score")
    for column in columns:
        if (empty := frame[column].isna()).any():
            raise ValueError(f"row {frame.index[empty][0]}, column {column!r} is empty: fill it, or leave the row out")
