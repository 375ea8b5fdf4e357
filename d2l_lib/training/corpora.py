"""The paper's training data sets: their sizes, their documents one by one, and files for `selfgen`.

    d2l corpora size                                             # what there is, and how large
    d2l corpora size squad --source FOLDER
    d2l corpora write fineweb-edu --documents 1000 --out texts.jsonl
    d2l corpora download self-generated --model google/gemma-2-2b-it --out FOLDER

| name | on the hub | a document is |
|---|---|---|
| fineweb-edu | HuggingFaceFW/fineweb-edu, config sample-10BT | a passage of at most 2,000 tokens |
| squad, ropes, drop, pwc | those of `qa.DATASETS`, split train | a text and all questions on it |
| qasper, 2wikimqa, multifieldqa_en | LongBench-E, split test | the same, for evaluation |
| self-generated | SakanaAI/self_gen_qa_d2l, a folder for each base model | a row as in `selfgen` |

Each is read from a folder in its own format, or streamed from the hub. If the hub is out of reach (or
HF_HUB_OFFLINE=1), the error says which files to put where.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq

from d2l_lib.formats.shards import PUBLISHED, find_shards, read_shards, training_files
from d2l_lib.formats.writing import name_failed_writes
from d2l_lib.records import iter_jsonl, write_jsonl
from d2l_lib.tasks import qa

_PASSAGE_TOKENS = 2000  # the longest passage, as published
OPEN_DOCUMENTS = 1000  # documents that wait for further questions at a time
TRAINING_SETS = ("squad", "ropes", "drop", "pwc")
LONG_SETS = ("qasper", "2wikimqa", "multifieldqa_en")
PASSAGES, SHARDS = "fineweb-edu", "self-generated"
CORPORA = (PASSAGES, *TRAINING_SETS, *LONG_SETS, SHARDS)
FINEWEB, FINEWEB_CONFIG = "HuggingFaceFW/fineweb-edu", "sample-10BT"
_SELF_GENERATED = "SakanaAI/self_gen_qa_d2l"


@dataclass(frozen=True)
class Size:
    """The size of a corpus; `rows` are questions in question sets, None is unknown, and `note` says why."""

    name: str
    place: str
    documents: int | None
    rows: int | None
    bytes: int | None
    note: str = ""

    def __str__(self) -> str:
        known = [
            f"{count:,} {what}"
            for what, count in (("documents", self.documents), ("rows", self.rows))
            if count is not None
        ]
        known += [f"{self.bytes / 2**20:,.1f} MiB"] if self.bytes is not None else []
        note = f" ({self.note})" if self.note else ""
        return f"{self.name}: {', '.join(known) or 'size unknown'}, at {self.place}{note}"


# ------------------------------------------------------------------------------------------------------------- reading
def stream(
    name: str,
    source: str | Path | None = None,
    *,
    split: str | None = None,
    model: str = "google/gemma-2-2b-it",
    most_tokens: int = _PASSAGE_TOKENS,
    tokenizer=None,
) -> Iterator[dict]:
    """The documents of a corpus, one by one, from `source` (file or folder) or else from the hub.

    Passages: {"document"}. Question sets: {"document", "questions", "answers"}; questions on one text are put together
    if at most OPEN_DOCUMENTS other texts lie between them. Self-generated data: rows with the published columns,
    checked file by file.

    split: None is the training split (LongBench-E: test).
    model: base model of the self-generated data on the hub.
    most_tokens, tokenizer: longest passage, and what counts its tokens (None: the file's own count).

    ValueError for an unknown name, or files that are not in the format. FileNotFoundError if there is nothing.
    """
    _check_name(name)
    if name == PASSAGES:
        return _passages(source, most_tokens, tokenizer)
    if name == SHARDS:
        return _shard_rows(source, model)
    return _grouped(qa.stream_qa(name, source, split=split or _split(name)))


def _check_name(name: str) -> None:
    if name not in CORPORA:
        raise ValueError(f"unknown corpus {name!r}; choose one of {', '.join(CORPORA)}")


def _split(name: str) -> str:
    return "test" if name in LONG_SETS else "train"


def _grouped(rows: Iterable[dict]) -> Iterator[dict]:
    """Documents with all their questions, from rows of one question each, in order of first appearance."""
    waiting: OrderedDict[str, dict] = OrderedDict()
    for row in rows:
        text = row["document"]
        if text not in waiting and len(waiting) == OPEN_DOCUMENTS:
            yield waiting.popitem(last=False)[1]
        group = waiting.setdefault(text, {"document": text, "questions": [], "answers": []})
        group["questions"].append(row["question"])
        group["answers"].append(row["answers"])
    yield from waiting.values()


def _passages(source: str | Path | None, most_tokens: int, tokenizer) -> Iterator[dict]:
    records = _hub_passages() if source is None else _local_passages(Path(source))
    for where, row in records:
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f'{where} has no "text", only {found}: is it a file of {FINEWEB}?')
        if not text.strip():
            continue
        if tokenizer is not None:
            length = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        elif isinstance(length := row.get("token_count"), int):
            pass
        else:
            raise ValueError(f"{where} has no token_count: pass a tokenizer to count with")
        if length <= most_tokens:
            yield {"document": text}


def _local_passages(place: Path) -> Iterator[tuple[str, object]]:
    for file in _passage_files(place):
        read = qa.read_parquet if file.suffix == ".parquet" else iter_jsonl
        for number, row in enumerate(read(file), 1):
            yield f"{file}, record {number}", row


def _passage_files(place: Path) -> list[Path]:
    files = [place] if place.is_file() else sorted(f for f in place.rglob("*") if f.suffix in (".parquet", ".jsonl"))
    if not files or any(file.suffix not in (".parquet", ".jsonl") for file in files):
        raise FileNotFoundError(f"no .parquet or .jsonl files of {FINEWEB} at {place}")
    return files


def _hub_passages() -> Iterator[tuple[str, object]]:
    import datasets

    try:
        _check_online()
        rows = datasets.load_dataset(FINEWEB, FINEWEB_CONFIG, split="train", streaming=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{PASSAGES} could not be reached ({_first_line(error)}). It is {FINEWEB}, config {FINEWEB_CONFIG}, on the "
            "Hugging Face hub: put some of its files (sample/10BT/*.parquet) into a folder and pass that as source"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{FINEWEB} train, record {number}", row


def _shard_rows(source: str | Path | None, model: str) -> Iterator[dict]:
    if source is not None:
        for files in find_shards([source]).values():
            for file in files:
                yield from read_shards(file).select_columns(list(PUBLISHED))
        return
    import datasets

    try:
        _check_online()
        names = training_files([Path(name) for name in _hub_shards(model)])
        files = [f"hf://datasets/{_SELF_GENERATED}/{name.as_posix()}" for name in names]
        rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise FileNotFoundError(_shards_advice(model, error)) from error
    yield from rows.select_columns(list(PUBLISHED))


def _hub_folder(model: str) -> str:
    """The hub folder of a base model's published data: greedy answers, with answer-only instructions."""
    return f"{model}_temp_0.0_closed_qa_prob_*"


def _shards_advice(model: str, error: Exception) -> str:
    return (
        f"the self-generated data of {model} could not be reached ({_first_line(error)}). They are the folders "
        f"{_hub_folder(model)} of the data set {_SELF_GENERATED} on the Hugging Face hub: download them where there is "
        "a connection and pass the folder as source (d2l train --stage qa: as --shards)"
    )


def _check_online() -> None:
    """OSError if the hub must not be asked: a request would only fail, slowly."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------------------------- size
def size(
    name: str, source: str | Path | None = None, *, split: str | None = None, model: str = "google/gemma-2-2b-it"
) -> Size:
    """The size of a corpus, with as little reading and fetching as possible.

    Local files give rows and bytes; question sets are read to count documents. The hub gives what it states, in one
    request. The size is unknown, with the reason, if the hub does not answer or must not be asked.
    """
    _check_name(name)
    split = split or _split(name)
    place = qa.local_place(name, source) if name not in (PASSAGES, SHARDS) else source and Path(source)
    if place is None:
        return _hub_size(name, split, model)
    if name == SHARDS:
        files = [file for own in find_shards([place]).values() for file in own]
        rows = documents = sum(pq.read_metadata(file).num_rows for file in files)
    elif name == PASSAGES:
        files = _passage_files(place)
        rows = documents = sum(
            pq.read_metadata(file).num_rows if file.suffix == ".parquet" else sum(1 for _ in iter_jsonl(file))
            for file in files
        )
    else:
        files = qa.files_of(name, place, split)
        texts, rows = set(), 0
        for row in qa.stream_qa(name, place, split=split):
            texts.add(hash(row["document"]))
            rows += 1
        documents = len(texts)
    return Size(name, str(place), documents, rows, sum(file.stat().st_size for file in files))


def _hub_size(name: str, split: str, model: str) -> Size:
    hub, config, revision = _hub_place(name)
    place = " ".join(filter(None, (hub, config, None if name == SHARDS else split)))
    try:
        _check_online()
        if name == SHARDS:
            files = _hub_shards(model)
            return Size(name, place, None, None, sum(files.values()), f"{len(files)} files for {model}")
        import datasets

        info = datasets.load_dataset_builder(hub, config, revision=revision).info
    except (OSError, RuntimeError, ValueError) as error:
        return Size(name, place, None, None, None, f"unknown: {_first_line(error)}")
    known = (info.splits or {}).get(split)
    rows = None if known is None else known.num_examples
    note = "bytes to download, of all splits" if info.download_size else "the hub does not tell"
    return Size(name, place, rows if name == PASSAGES else None, rows, info.download_size, note)


def _hub_place(name: str) -> tuple[str, str | None, str | None]:
    if name == PASSAGES:
        return FINEWEB, FINEWEB_CONFIG, None
    if name == SHARDS:
        return _SELF_GENERATED, None, None
    dataset = qa.DATASETS[name]
    return dataset.hub, dataset.config, dataset.revision


def _hub_shards(model: str) -> dict[str, int]:
    """{file: bytes} of a base model's published data; ValueError if there are none."""
    from fnmatch import fnmatch

    from huggingface_hub import HfApi

    info = HfApi().dataset_info(_SELF_GENERATED, files_metadata=True, timeout=20)
    pattern = f"{_hub_folder(model)}/*.parquet"
    files = {file.rfilename: file.size or 0 for file in info.siblings if fnmatch(file.rfilename, pattern)}
    if not files:
        raise ValueError(f"{_SELF_GENERATED} has no folder {_hub_folder(model)}")
    return files


# --------------------------------------------------------------------------------------------------------- the command
def _write_texts(path: str | Path, documents: Iterable[dict], n: int | None = None) -> int:
    """Write the first `n` documents (None: all) as the .jsonl file of `selfgen --source`; how many there were.

    A line is {"text"}, with {"questions", "answers"} where known.
    """
    count = 0

    def lines() -> Iterator[dict]:
        nonlocal count
        for document in islice(documents, n):
            count += 1
            rest = {name: document[name] for name in ("questions", "answers") if name in document}
            yield {"text": document["document"], **rest}

    write_jsonl(path, lines())
    return count


def download(folder: str | Path, model: str) -> Path:
    """`folder` with the published self-generated data of base model `model`.

    FileNotFoundError says what to do if the hub is out of reach. OSError names a file that cannot be written.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        _check_online()
        with name_failed_writes(folder):
            snapshot_download(
                _SELF_GENERATED, repo_type="dataset", local_dir=str(folder), allow_patterns=[f"{_hub_folder(model)}/*"]
            )
    except (OSError, HfHubHTTPError) as error:
        if getattr(error, "filename", None) is not None:  # a file of this machine, not the hub
            raise
        raise FileNotFoundError(_shards_advice(model, error)) from error
    return Path(folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command `corpora`."""
    parser.add_argument("what", choices=("size", "write", "download"))
    parser.add_argument("name", nargs="?", choices=CORPORA, help="default for size: all of them")
    parser.add_argument("--source", type=Path, help="file or folder in the data set's format (default: the hub)")
    parser.add_argument("--split", help="default: what is trained on; of LongBench-E: test")
    parser.add_argument("--model", default="google/gemma-2-2b-it", help="base model of self-generated data")
    parser.add_argument("--documents", type="count", help="write so many (default: all)")
    parser.add_argument("--out", type=Path, help="file to write (.jsonl), or folder for a download")


def run(a: argparse.Namespace) -> None:
    """Tell how large data sets are, write their documents for `generate`, or download self-generated data."""
    if a.what != "size" and (a.name is None or a.out is None):
        a.error(f"{a.what} needs a name and --out")
    if (a.what == "download") != (a.name == SHARDS) and a.what != "size":
        a.error(f"{SHARDS} is for download, all others for write")
    for name in [a.name] if a.name else CORPORA:
        print(size(name, a.source, split=a.split, model=a.model), flush=True)
    if a.what == "write":
        documents = stream(a.name, a.source, split=a.split)
        print(f"{a.out}: {_write_texts(a.out, documents, a.documents):,} documents")
    elif a.what == "download":
        print(f"{download(a.out, a.model)}: complete")
