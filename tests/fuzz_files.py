"""Mutated files of every kind against their readers: each is read, or refused with an error that the reader declares.

    python tests/fuzz_files.py 10000 [kind ...] [--seed N]

prints for each kind of file how many were read and refused by each kind of mutation, the slowest one (processor time)
and what the process grew by. Any other exception, more than TIME_LIMIT seconds, a child process, a connection or a
written file ends it with the seed and the number of the file; it stays in the folder that is named then.
"""

import argparse
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fuzz_checkpoints import Mutator as ProgramMutator
from fuzz_checkpoints import small_checkpoint, watched
from tiny_models import N_LAYERS, build_model

import d2l_lib as d2l
from d2l_lib.formats.checkpoints import build_hypernetwork, load_checkpoint, read_published, save_checkpoint
from d2l_lib.formats.peft import check_export
from d2l_lib.formats.shards import COUNTS, HIGHEST, MANIFEST, SCHEMA, _sha256, read_shards, shard_path, write_shard
from d2l_lib.records import read_json, read_rows
from d2l_lib.studies import watch
from d2l_lib.training import loop, selfgen

TIME_LIMIT, PATIENCE = 10, 120  # seconds for one file: of the processor, and by the clock
MEMORY_LIMIT = 4 << 30  # bytes of address space beyond what the process has when it begins
HARMFUL = (
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "socket.connect",
)
# What stands in place of a value; texts between @ become what JSON writers do not write.
VALUES = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 10**12, -(10**18), 0.5, -0.0, 1e308, -1e308, "", "x", "x" * 5000,
    [], {}, [[]], [1], [1, 2, 3], [9, -3], ["x"], {"x": 1}, {"": None}, "\ud800", "\x1b[31m", "../../x", "/etc/passwd",
    "{layer}", "{layer}{0.__class__}", "{layer!r:>99999999}", "(a*)*b", "((((", "@nan@", "@inf@", "@deep@", "@huge@",
    "@far@",
)  # fmt: skip
ODD = {
    '"@nan@"': "NaN",
    '"@inf@"': "-Infinity",
    '"@deep@"': "[" * 100_000 + "]" * 100_000,
    '"@huge@"': "9" * 5000,
    '"@far@"': "1e999",
}


class TooSlow(BaseException):
    """A reader took longer than TIME_LIMIT."""


def as_json(value: object) -> str:
    text = json.dumps(value)
    for mark, odd in ODD.items():
        text = text.replace(mark, odd)
    return text


def places(value: object) -> list[tuple[object, object]]:
    """Every (list or object, key) of a JSON value."""
    found, open_values = [], [value]
    while open_values:
        inner = open_values.pop()
        items = inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ()
        for key, child in items:
            found.append((inner, key))
            open_values.append(child)
    return found


def edit(value: object, rng: random.Random) -> object:
    """A copy of a JSON value with one place of it replaced, deleted, repeated or renamed."""
    value = json.loads(json.dumps(value))
    if not (spots := places(value)) or rng.random() < 0.02:
        return rng.choice(VALUES)
    inner, key = rng.choice(spots)
    choice = rng.random()
    if choice < 0.75:
        inner[key] = rng.choice(VALUES)
    elif choice < 0.85:
        other, where = rng.choice(spots)
        inner[key] = json.loads(json.dumps(other[where]))
    elif choice < 0.93:
        del inner[key]
    elif isinstance(inner, dict):
        inner[rng.choice(("x", "", "\ud800", "x" * 5000, "rank"))] = inner.pop(key)
    else:
        inner.extend([inner[key]] * rng.choice((1, 1000)))
    return value


def split_safetensors(content: bytes) -> tuple[dict, bytes]:
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header: str, data: bytes, size: int | None = None) -> bytes:
    header = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header) if size is None else size) + header + data


class FileMutator:
    """Mutated copies of the files of one example; `other` are contents of files of other kinds."""

    kinds = ("bits", "cut", "splice", "contents", "contents", "contents", "values", "swap")

    def __init__(self, files: dict[str, bytes], other: list[bytes], seed: int):
        self.files, self.other, self.rng = files, other, random.Random(seed)
        self.programs = {name: ProgramMutator(files[name], seed) for name in files if name.endswith(".bin")}

    def make(self, kind: str) -> dict[str, bytes | None]:
        """{name: new content, or None where the file is to be missing}: one file, now and then two."""
        changed: dict[str, bytes | None] = {}
        for _ in range(1 + (self.rng.random() < 0.1)):
            name = self.rng.choice(list(self.files))
            changed[name] = getattr(self, kind)(name, self.files[name])
        return changed

    def bits(self, _: str, content: bytes) -> bytes:
        content = bytearray(content)
        reach = len(content) if self.rng.random() < 0.5 else min(len(content), 2000)  # headers more often
        for _ in range(self.rng.choice((1, 1, 2, 4, 16))):
            content[self.rng.randrange(reach)] ^= 1 << self.rng.randrange(8)
        return bytes(content)

    def cut(self, _: str, content: bytes) -> bytes:
        return content[: self.rng.randrange(len(content))] if self.rng.random() < 0.8 else content + b"\0" * 9

    def splice(self, _: str, content: bytes) -> bytes:
        content, rng = bytearray(content), self.rng
        first, second = (rng.randrange(len(content)) for _ in "12")
        length = rng.choice((1, 4, 20, 300))
        content[first : first + rng.choice((0, length))] = content[second : second + length]
        return bytes(content)

    def contents(self, name: str, content: bytes) -> bytes:
        """One place of what the file says, in its own format."""
        if name.endswith((".safetensors", ".adapter")):
            return self._header(content)
        if name.endswith(".jsonl"):
            lines = content.decode().splitlines()
            at = self.rng.randrange(len(lines))
            lines[at] = as_json(edit(json.loads(lines[at]), self.rng))
            return "\n".join(lines).encode("utf-8", "surrogatepass")
        if name.endswith(".json"):
            return as_json(edit(json.loads(content), self.rng)).encode("utf-8", "surrogatepass")
        if name.endswith(".parquet"):
            return self._rows(content)
        if name.endswith(".bin"):
            return self.programs[name].make(self.rng.choice(ProgramMutator.kinds))
        return self.bits(name, content)

    def _header(self, content: bytes) -> bytes:
        header, data = split_safetensors(content)
        metadata = header.get("__metadata__", {})
        inner = [key for key, text in metadata.items() if text[:1] == "{"]
        choice = self.rng.random()
        if inner and choice < 0.6:
            key = self.rng.choice(inner)
            metadata = metadata | {key: as_json(edit(json.loads(metadata[key]), self.rng))}
            return with_header(json.dumps(header | {"__metadata__": metadata}), data)
        if choice < 0.9:
            return with_header(as_json(edit(header, self.rng)), data)
        return with_header(json.dumps(header), data, self.rng.choice((0, 1, 2**63, 2**40, 10**8, len(content))))

    def _rows(self, content: bytes) -> bytes:
        table = pq.read_table(pa.BufferReader(content))
        column = self.rng.choice(table.column_names)
        values = table[column].to_pylist()
        spots = places(values)
        for _ in range(50):  # a value that the column's type holds
            inner, key = self.rng.choice(spots)
            before, inner[key] = inner[key], self.rng.choice((-1, 0, 7, 2**31 - 1, -5.0, 5.0, 1e-4, np.nan, np.inf,
                                                              -np.inf, None, [], [[]], "", [1, 2], [9, 1]))  # fmt: skip
            try:
                kind = table.schema.field(column).type
                whole = pa.array(self._half(values) if column == "logprobs_vals" else values, kind)
                break
            except (pa.ArrowException, TypeError, ValueError, OverflowError):
                inner[key] = before
        else:
            return content
        sink = pa.BufferOutputStream()
        pq.write_table(table.set_column(table.column_names.index(column), column, whole), sink)
        return sink.getvalue().to_pybytes()

    def _half(self, value: object) -> object:
        if isinstance(value, list):
            return [self._half(inner) for inner in value]
        return None if value is None else np.float16(value)

    def values(self, name: str, content: bytes) -> bytes:
        """The numbers of a tensor file: NaN, infinity and other bits; elsewhere a span of bytes."""
        start = 8 + struct.unpack("<Q", content[:8])[0] if name.endswith((".safetensors", ".adapter")) else 0
        content = bytearray(content)
        at = start + 4 * self.rng.randrange(max(1, (len(content) - start) // 4))
        content[at : at + 4] = self.rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\xff\xff", b"\0\0\0\0"))
        return bytes(content)

    def swap(self, name: str, content: bytes) -> bytes | None:
        choice = self.rng.random()
        if choice < 0.3:
            return None
        return self.rng.choice((b"", b"null", b"[]", b"\xef\xbb\xbf{}", *self.other, *self.files.values()))


# --------------------------------------------------------------------------------------------------------- the readers
def read_adapter(folder: Path) -> None:
    adapter = d2l.Adapter.load(folder / "a.adapter")
    repr(adapter)
    for module in adapter.modules:
        assert all(factor.isfinite().all() for factor in adapter.factors(module))


def read_peft(folder: Path) -> None:
    for loader in ("peft", "vllm", "llama.cpp"):
        repr(check_export(folder, loader))
    adapter = d2l.Adapter.from_peft(folder)
    assert all(factor.isfinite().all() for module in adapter.modules for factor in adapter.factors(module))


def read_checkpoint(folder: Path) -> None:
    hypernetwork, meta = load_checkpoint(folder)
    assert isinstance(meta, dict) and all(value.isfinite().all() for value in hypernetwork.parameters())


def read_published_file(folder: Path) -> None:
    config, tensors, _ = read_published(folder / "pytorch_model.bin")
    build_hypernetwork(config, tensors)


def read_model(folder: Path) -> None:
    assert d2l.load(folder, device="cpu").base_model.config.num_hidden_layers == N_LAYERS


def read_data(folder: Path) -> None:
    rows = read_shards(folder)[:]
    assert all(token >= 0 for ids in rows["ctx_ids"] for token in ids)
    assert all(
        value <= HIGHEST for row in rows["logprobs_vals"] for answer in row for token in answer for value in token
    )


def read_records(folder: Path) -> None:
    for read in (
        lambda: selfgen.read_texts(folder / "texts.jsonl"),
        lambda: read_rows(folder / "texts.jsonl"),
        lambda: loop.read_log(folder / "log.jsonl"),
        lambda: watch.read_scores(folder / "scores.jsonl"),
        lambda: watch.read_facts(folder / "hypernetwork.json"),
        lambda: loop.step_of(folder),
        lambda: read_json(folder / "hypernetwork.json"),
    ):
        try:
            read()
        except (ValueError, FileNotFoundError) as error:
            failed = error
        else:
            continue
        raise failed


# -------------------------------------------------------------------------------------------------------- the examples
def make_examples(root: Path) -> dict[str, tuple[Path, Callable[[Path], None]]]:
    """{kind: (folder of whole files, reader)}."""
    model = build_model(("down_proj", "q_proj"))
    texts = {"first": "The code of the door is 4217. It is red.", "second": "Ada has a boat."}
    adapter = model.internalize(texts, chunk_tokens=24)
    for name in ("adapter", "published", "records"):
        (root / name).mkdir(parents=True)
    adapter.save(root / "adapter" / "a.adapter")
    adapter.export_peft(root / "peft", rank=3)
    model.save(root / "model", include_base=True)
    meta = {"chunk_tokens": 20, "least_relevance": 3.5, "gate": {"known": 6.3, "growth": 0.2, "refusal": "No."}}
    save_checkpoint(root / "checkpoint", model.hypernetwork, meta | {"base_model": "tiny"})
    small_checkpoint(root / "published" / "pytorch_model.bin")
    write_data(root / "shards")
    write_records(root / "records", model.hypernetwork.config.to_dict())
    readers = {
        "adapter": read_adapter,
        "peft": read_peft,
        "checkpoint": read_checkpoint,
        "published": read_published_file,
        "model": read_model,
        "shards": read_data,
        "records": read_records,
    }
    examples = {name: (root / name, read) for name, read in readers.items()}
    return examples | {"manifest": (root / "shards", read_data)}


def write_data(folder: Path) -> None:
    """Two shards with their records and a manifest, as `selfgen` writes them."""
    folder.mkdir()
    rng, shards = random.Random(0), []
    counts = dict.fromkeys(COUNTS, 1)
    for number in range(2):
        row = {
            "ctx_ids": [5, 6, 7],
            "input_ids": [[1, 2, 3, 4], [1, 9, 8]],
            "response_start_end": [[2, 4], [1, 3]],
            "logprobs_vals": [[[np.float16(-0.1), np.float16(-3)]] * 2] * 2,
            "logprobs_indices": [[[3, rng.randrange(50)]] * 2] * 2,
            "document": "Ada has a boat.",
            "closed": [False, True],
        } | {name: ["a", "b"] for name in ("questions", "answers", "references", "kinds")}
        path = shard_path(folder, number)
        write_shard(path, "0" * 64, pa.Table.from_pylist([row] * 2, schema=SCHEMA), counts)
        shards.append({"file": path.name, "sha256": _sha256(path), "counts": counts})
    identity = {"format": selfgen.FORMAT, "version": selfgen.VERSION, "n_shards": 2, "settings": {"seed": 0}}
    manifest = identity | {"complete": True, "totals": counts, "shards": shards}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def write_records(folder: Path, config: dict) -> None:
    """What trainings and their watcher leave: logs, scores, facts and the step of a checkpoint."""
    lines = {
        "texts.jsonl": [{"text": "Ada has a boat."}, {"text": "It is red.", "n": 3}],
        "log.jsonl": [{"step": n, "seconds": 0.5 * n, "loss": 1.0 / n} for n in (1, 2)],
        "scores.jsonl": [{"checkpoint": f"checkpoint-{n}", "step": n, "score": 0.5, "seconds": 1.0} for n in (1, 2)],
    }
    for name, rows in lines.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "hypernetwork.json").write_text(json.dumps({"hypernetwork": config, "chunk_tokens": 20}))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 2, "log_history": [{"loss": 1.0}]}))


def files_of(kind: str, folder: Path) -> dict[str, bytes]:
    """The files of an example that are mutated."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if kind == "shards":
        paths = {name: path for name, path in paths.items() if name.endswith(".parquet")}
    if kind == "manifest":
        paths = {name: path for name, path in paths.items() if name.endswith(".json")}
    return {name: path.read_bytes() for name, path in paths.items()}


# ---------------------------------------------------------------------------------------------------------------- fuzz
@contextmanager
def limited():
    """Raises TooSlow inside the `with` block after TIME_LIMIT seconds of work, or PATIENCE seconds of waiting."""

    def stop(*_):
        raise TooSlow(f"more than {TIME_LIMIT} s")

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, TIME_LIMIT), signal.SIGALRM: (signal.ITIMER_REAL, PATIENCE)}
    before = {number: signal.signal(number, stop) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def attempt(read: Callable[[Path], None], folder: Path) -> str:
    """ "read" or "refused"; anything else that happens is an exception."""
    try:
        with limited(), watched() as seen:
            read(folder)
        outcome = "read"
    except (ValueError, FileNotFoundError) as error:
        assert len(str(error)) < 5000 and str(error).strip(), "an error message that is no message"
        str(error).encode()  # may be printed anywhere
        outcome = "refused"
    wrote = [what for what in seen if what.startswith(HARMFUL) or (what.startswith("open") and str(folder) in what)]
    wrote = [what for what in wrote if "scores.jsonl" not in what]  # its reader takes away a line that was cut off
    assert not wrote, f"reading did {wrote[:3]}"
    return outcome


def fuzz(
    kind: str, example: tuple[Path, Callable], other: list[bytes], n: int, seed: int, work: Path
) -> tuple[Counter, float, int]:
    """({(mutation, outcome): files}, seconds of the slowest, MiB that the process grew by) of n mutated examples."""
    whole, read = example
    folder = work / kind
    shutil.copytree(whole, folder)
    if kind == "shards":  # without checksums, so that the rows are looked at
        for path in folder.glob("*.json"):
            path.unlink()
    files = files_of(kind, folder)
    mutator, counts, slowest = FileMutator(files, other, seed), Counter(), 0.0
    read(folder)  # imports what it needs, which takes its time
    assert attempt(read, folder) == "read", "the whole files are not read"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(n):
        mutation = mutator.kinds[number % len(mutator.kinds)]
        changed = mutator.make(mutation)
        for name, content in changed.items():
            (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        start = time.process_time()
        try:
            outcome = attempt(read, folder)
        except BaseException as error:
            error.add_note(f"{kind}: seed {seed}, file {number}, {mutation} of {', '.join(changed)}, in {folder}")
            raise
        slowest = max(slowest, time.process_time() - start)
        counts[mutation, outcome] += 1
        for name in changed:
            (folder / name).write_bytes(files[name])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    return counts, slowest, grown


def fuzz_all(n: int, seed: int, kinds: list[str], root: Path, tell: Callable[[str], None]) -> dict[str, Counter]:
    """{kind: counts} of n mutated examples of each of these kinds (all of them where none is named)."""
    warnings.simplefilter("ignore")
    examples = make_examples(root / "whole")
    other = [max(files_of(kind, folder).values(), key=len) for kind, (folder, _) in examples.items() if kind != "model"]
    results = {}
    for kind in kinds or list(examples):
        start = time.perf_counter()
        counts, slowest, grown = fuzz(kind, examples[kind], other, n, seed, root / "work")
        results[kind] = counts
        outcomes = ", ".join(
            f"{mutation} {counts[mutation, 'read']}/{counts[mutation, 'refused']}"
            for mutation in dict.fromkeys(FileMutator.kinds)
        )
        read = sum(number for (_, outcome), number in counts.items() if outcome == "read")
        tell(
            f"{kind:10} {counts.total()} files: read {read}, refused {counts.total() - read} ({outcomes}); slowest "
            f"{slowest * 1000:.0f} ms, grew by {grown} MiB, {time.perf_counter() - start:.0f} s"
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("n", type=int, help="mutated examples of each kind")
    parser.add_argument("kinds", nargs="*", help="which kinds of files (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT, resource.RLIM_INFINITY))
    root = Path(tempfile.mkdtemp(prefix="fuzz-files-"))
    fuzz_all(a.n, a.seed, a.kinds, root, lambda line: print(line, flush=True))
    shutil.rmtree(root)


if __name__ == "__main__":
    sys.exit(main())
