"""Self-generated training data on disk: parquet shards in the published schema, checked when read.

A row is a document: its token ids, and for each question the token ids, the answer's place in them, and the teacher's
likeliest next tokens with their log-probabilities. A folder holds shards, a .json file with a checksum beside each, and
a manifest that says whether all of them are there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from d2l_lib.formats.schemas import Manifest, ShardRecord, check, first_line
from d2l_lib.formats.writing import atomic_file
from d2l_lib.records import read_json, write_json

MANIFEST = "manifest.json"
HIGHEST = 1e-3  # of a log-probability, which rounding may lift above 0
_IDS = pa.list_(pa.int32())
TEACHER_COLUMNS = ("logprobs_vals", "logprobs_indices")
PUBLISHED = {
    "ctx_ids": _IDS,
    "input_ids": pa.list_(_IDS),
    "response_start_end": pa.list_(_IDS),
    "logprobs_vals": pa.list_(pa.list_(pa.list_(pa.float16()))),
    "logprobs_indices": pa.list_(pa.list_(_IDS)),
}
SCHEMA = pa.schema(
    PUBLISHED
    | {"document": pa.string(), "closed": pa.list_(pa.bool_()), "evidence": pa.list_(pa.list_(_IDS))}
    | {name: pa.list_(pa.string()) for name in ("questions", "answers", "references", "kinds")}
)
# Why items of a writer's lists, questions of a small writer and a teacher's answers to those are left out.
LISTS_DROPPED = ("thinking", "not_a_question", "duplicate", "surplus", "cut_off")
QUESTIONS_DROPPED = ("about_the_text", "goes_round", "repeats_text", "off_text")
ANSWERS_DROPPED = ("empty", "no_answer", "repeats_question", "goes_round", "repeats_text")
_FIRST_COUNTS = (
    "documents", "documents_dropped", "questions", "kept", "unfinished", "too_long", "answer_tokens",
    "writer_too_long", *(f"writer_{reason}" for reason in LISTS_DROPPED),
)  # fmt: skip
COUNTS = (
    *_FIRST_COUNTS, *(f"writer_{reason}" for reason in QUESTIONS_DROPPED),
    *(f"answer_{reason}" for reason in ANSWERS_DROPPED),
)  # fmt: skip
_LEVEL = re.compile(r"_level_(\d+)_")  # in the names of published files
# Limits of a file's unpacked size in bytes, of which the larger counts. Most files unpack to 2 to 10 times their size.
_MOST_UNPACKED, _UNPACKED_PER_BYTE = 1 << 28, 200


def shard_path(folder: str | Path, index: int) -> Path:
    """The path of shard `index`; a .json file of the same name beside it holds its checksum and counts."""
    return Path(folder) / f"shard-{index:05d}.parquet"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shard(path: Path, run: str, table: pa.Table, counts: dict[str, int]) -> None:
    """Write one shard, then its checksum, run and counts beside it."""
    with atomic_file(path) as temporary:
        with pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as file:
            if table.num_rows:  # `datasets` cannot read an empty row group
                file.write_table(table)
        checksum = _sha256(temporary)
    write_json(path.with_suffix(".json"), {"file": path.name, "run": run, "sha256": checksum, "counts": counts})


def shard_record(path: Path) -> dict[str, Any] | None:
    """The record beside a shard, or None where it is missing, damaged or of another program."""
    try:
        record = read_json(path.with_suffix(".json"))
        check(ShardRecord, record, path.with_suffix(".json"), "make the shard again")
    except (FileNotFoundError, ValueError):
        return None
    return record if record["counts"].keys() >= set(_FIRST_COUNTS) else None


def shard_problem(path: Path, run: str) -> str | None:
    """Why a shard has to be made: "" where there is none yet; None where it is whole."""
    record = shard_record(path)
    if not path.exists():
        return "" if record is None else "the file is missing"
    if record is None:
        return "it has no checksum (was the run interrupted?)"
    if record["run"] != run:
        return "it was made with other settings"
    return None if _sha256(path) == record["sha256"] else "its checksum is wrong: the file is damaged"


def read_shards(
    source: str | Path | Sequence[str | Path], cache: str | Path | None = None, *, vocabulary: int | None = None
):
    """A `datasets.Dataset` of all rows, checked.

    source: a folder, a parquet file or several of either. Files need the published columns; other columns stay where
        all files have them, of one type.
    cache: a folder for one Arrow file of all rows, for data beyond the memory; None: rows are in memory. Under torchrun
        one process of each machine writes it and the others wait.
    vocabulary: number of the model's token ids (None: any id is right).

    FileNotFoundError for a missing file. ValueError names the file and the column for
    - an unfinished folder, and a file that is damaged, differs from its checksum or unpacks to far more than its size;
    - a missing column, one of another type, and empty values;
    - log-probabilities that are no numbers or above HIGHEST, and minus infinity for the first token of a list (the
      others may have it: their probability is 0);
    - token ids below 0, or from `vocabulary` on;
    - counts that differ: of questions between columns, of answer tokens between response_start_end and the
      log-probabilities, and k.
    """
    several = [source] if isinstance(source, (str, Path)) else list(source)
    checksums = {file: checksum for path in several for file, checksum in _files_of(Path(path)).items()}
    if not checksums:
        raise FileNotFoundError("no shards given: name a folder or files")
    identity = hashlib.sha256(json.dumps([[str(file), file.stat().st_mtime_ns] for file in checksums]).encode())
    fingerprint = identity.hexdigest()[:16]
    if cache is not None:
        path = Path(cache) / f"{fingerprint}.arrow"
        _fill_cache(path, checksums, vocabulary)
        return Dataset.from_file(str(path))
    tables, ks = zip(*(_read_table(*pair, vocabulary) for pair in checksums.items()), strict=True)
    _check_one_k(ks)
    names = _common_columns([table.schema for table in tables])
    whole = pa.concat_tables([table.select(names) for table in tables])
    return Dataset(whole, fingerprint=fingerprint)


def _check_one_k(ks: Sequence[int | None]) -> None:
    if len(set(ks) - {None}) > 1:
        raise ValueError(f"the numbers of log-probabilities per token differ between files: {set(ks) - {None}}")


def _common_columns(schemas: Sequence[pa.Schema]) -> list[str]:
    """The published columns, and those that all files have of one type."""
    same = set.intersection(*({(field.name, field.type) for field in schema} for schema in schemas))
    return [field.name for field in schemas[0] if field.name in PUBLISHED or (field.name, field.type) in same]


def _fill_cache(path: Path, checksums: dict[Path, str | None], vocabulary: int | None = None) -> None:
    """Write the rows of these files to one Arrow file, unless it exists."""
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        while not path.exists():
            time.sleep(1)
    if path.exists():
        return
    for file in checksums:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: run the command that made it again")
    names = _common_columns([_schema_of(file) for file in checksums])
    ks, writer = set(), None
    with atomic_file(path) as temporary, pa.OSFile(str(temporary), "wb") as file:
        for pair in checksums.items():
            table, k = _read_table(*pair, vocabulary)
            table = table.select(names)
            ks.add(k)
            _check_one_k(list(ks))
            writer = writer or pa.ipc.new_stream(file, table.schema)
            writer.write_table(table, max_chunksize=256)
        writer.close()


def _schema_of(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path).remove_metadata()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({first_line(error)})") from error


def find_shards(places: str | Path | Sequence[str | Path]) -> dict[str, list[Path]]:
    """{data set: its parquet files} in files and folders; each file, or folder with `training_files`, is a data set.

    FileNotFoundError for a place that is missing or holds none.
    """
    shards: dict[str, list[Path]] = {}
    for place in map(Path, [places] if isinstance(places, (str, Path)) else places):
        if not place.exists():
            raise FileNotFoundError(f"no shards at {place}: give folders or .parquet files")
        files = training_files(sorted(place.rglob("*.parquet"))) if place.is_dir() else [place]
        if not files:
            raise FileNotFoundError(f"{place} holds no .parquet files of training data")
        for file in files:
            shards.setdefault(str(file.parent if place.is_dir() else file), []).append(file)
    return shards


def training_files(files: Sequence[Path]) -> list[Path]:
    """The parquet files for training, as published: no validation data ("_val_" in the name).

    Where a folder's files are numbered by the level of their questions, only the last level.
    """
    levels = {file: _LEVEL.search(file.name) for file in files if "_val_" not in file.name}
    last: dict[Path, int] = {}
    for file, level in levels.items():
        last[file.parent] = max(last.get(file.parent, 0), int(level.group(1)) if level else 0)
    return [file for file, level in levels.items() if level is None or int(level.group(1)) == last[file.parent]]


def _files_of(path: Path) -> dict[Path, str | None]:
    """{file: its checksum, or None where none is recorded} of a folder or of one file."""
    if not path.exists():
        raise FileNotFoundError(f"no shards at {path}: give a folder or .parquet files")
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    checksums = {file: (shard_record(file) or {}).get("sha256") for file in files}
    if (path / MANIFEST).exists():
        advice = "run the command that made the data again, or name the files that you want"
        manifest = check(Manifest, read_json(path / MANIFEST), path / MANIFEST, advice)
        if not manifest.complete:
            raise ValueError(
                f"{path} is unfinished: {len(files)} of {manifest.n_shards} shards are there; run the same "
                "command again to make the others, or name the files that you want"
            )
        checksums = {path / shard.file: shard.sha256 for shard in manifest.shards}
    if not checksums:
        raise FileNotFoundError(f"{path} holds no .parquet files")
    return checksums


def _rows_of(path: Path) -> pa.Table:
    """All rows of a parquet file; ValueError for damage and, early, for what unpacks to far more than its size."""
    most = max(_MOST_UNPACKED, _UNPACKED_PER_BYTE * path.stat().st_size)
    unpacked = f"{path} would unpack to more than {most >> 20} MiB, as no shard does: is it damaged?"
    try:
        with pq.ParquetFile(path) as file:
            # not the columns' own records: pyarrow ends the whole process at a damaged one
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            if sum(max(group.total_byte_size, group.num_rows) for group in groups) > most:
                raise ValueError(unpacked)
            # one stored text may stand in every row, so a long one allows few rows at a time
            largest = max((group.total_byte_size for group in groups), default=0)
            at_once, held, batches = min(4096, max(1, most // max(largest, 1))), 0, []
            for batch in file.iter_batches(at_once):
                held += batch.nbytes
                if held > most:
                    raise ValueError(unpacked)
                batches.append(batch)
            return pa.Table.from_batches(batches, file.schema_arrow).replace_schema_metadata(None)
    except ValueError as error:
        if isinstance(error, pa.ArrowException):
            raise ValueError(f"{path} is not a readable parquet file ({first_line(error)})") from error
        raise
    except (pa.ArrowException, OSError, MemoryError, OverflowError, TypeError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({first_line(error)})") from error


def _read_table(path: Path, checksum: str | None, vocabulary: int | None = None) -> tuple[pa.Table, int | None]:
    """(table, k) of one file, with the published columns in their types; raises as `read_shards` does."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the command that made it again")
    if checksum is not None and _sha256(path) != checksum:
        raise ValueError(f"{path} is damaged (its checksum is wrong): run the command that made it again")
    table = _rows_of(path)
    if missing := [name for name in PUBLISHED if name not in table.column_names]:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(table.column_names)}")
    levels: dict[str, list[pa.Array]] = {}
    for name, kind in PUBLISHED.items():
        try:
            column = table[name].combine_chunks().cast(kind)
        except pa.ArrowException as error:
            raise ValueError(f"{path}, column {name} holds {table[name].type}, not {kind}") from error
        table = table.set_column(table.column_names.index(name), name, column)
        levels[name] = [column]
        while pa.types.is_list(levels[name][-1].type):
            levels[name].append(levels[name][-1].flatten())
        if any(level.null_count for level in levels[name]):
            raise ValueError(f"{path}, column {name} has empty (null) values")
    return table, _check_shapes(path, levels, vocabulary)


def _check_shapes(path: Path, levels: dict[str, list[pa.Array]], vocabulary: int | None = None) -> int | None:
    """k, if all counts agree; levels: {column: [its rows, their members, ..., the numbers]}."""

    def expect(column: str, right: np.ndarray, rows: np.ndarray, what: str) -> None:
        if not right.all():
            raise ValueError(f"{path}, column {column}, row {rows[int(np.argmin(right))]}: {what}")

    lengths = {
        name: [level.value_lengths().to_numpy(zero_copy_only=False) for level in own[:-1]]
        for name, own in levels.items()
    }
    n_questions = lengths["input_ids"][0]
    rows = np.arange(len(n_questions))
    expect("ctx_ids", lengths["ctx_ids"][0] > 0, rows, "the document has no tokens")
    for name in ("response_start_end", *TEACHER_COLUMNS):
        expect(name, lengths[name][0] == n_questions, rows, "not as many questions as in input_ids")
    rows = np.repeat(rows, n_questions)
    expect("response_start_end", lengths["response_start_end"][1] == 2, rows, "an answer needs [start, end]")
    start, end = levels["response_start_end"][-1].to_numpy().reshape(-1, 2).T
    inside = (start >= 0) & (start < end) & (end <= lengths["input_ids"][1])
    expect("response_start_end", inside, rows, "an answer is empty or lies outside input_ids")
    for name in TEACHER_COLUMNS:
        expect(name, lengths[name][1] == end - start, rows, "not one list for each answer token")
    rows = np.repeat(rows, end - start)
    k = lengths[TEACHER_COLUMNS[0]][2]
    for name in TEACHER_COLUMNS:
        expect(name, lengths[name][2] == k[:1], rows, "lists of different lengths")
    values = levels["logprobs_vals"][-1].to_numpy(zero_copy_only=False)
    expect("logprobs_vals", ~np.isnan(values), np.repeat(rows, k), "a value is not a number")
    expect("logprobs_vals", values <= HIGHEST, np.repeat(rows, k), "a log-probability is above 0")
    if len(k) and k[0]:
        likeliest = values.reshape(-1, k[0])[:, 0]
        expect("logprobs_vals", np.isfinite(likeliest), rows, "the likeliest token has the probability 0")
    for name in ("ctx_ids", "input_ids", "logprobs_indices"):
        _check_ids(path, name, levels[name], vocabulary)
    return int(k[0]) if len(k) else None


def _check_ids(path: Path, column: str, levels: list[pa.Array], vocabulary: int | None) -> None:
    """ValueError names the first row with a token id that is negative or outside the vocabulary."""
    ids = levels[-1].to_numpy(zero_copy_only=False)
    right = ids >= 0
    if vocabulary is not None:
        right &= ids < vocabulary
    if right.all():
        return
    place = int(np.argmin(right))
    for level in reversed(levels[:-1]):  # up to its row
        ends = np.cumsum(level.value_lengths().to_numpy(zero_copy_only=False))
        place = int(np.searchsorted(ends, place, side="right"))
    allowed = "" if vocabulary is None else f" to {vocabulary - 1}: is it of another model's tokenizer?"
    wrong = ids[int(np.argmin(right))]
    raise ValueError(f"{path}, column {column}, row {place}: {wrong} is no token id, they go from 0{allowed}")
