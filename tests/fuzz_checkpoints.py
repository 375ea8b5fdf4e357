"""Mutated checkpoints against the reader: it reads them or raises CheckpointError, and does nothing else.

    python tests/fuzz_checkpoints.py 10000 [seed]

prints how many files of each kind of mutation were read and refused, the slowest one, and what the process grew by.
"""

import codecs
import io
import pickletools
import random
import resource
import struct
import sys
import time
import zipfile
from collections import Counter
from contextlib import contextmanager

from d2l_lib.formats import pickles
from d2l_lib.formats.checkpoints import CheckpointError, build_hypernetwork, parse_published

PROGRAM = "archive/data.pkl"
# Pieces of programs that call, import, build, or ask for much.
FRAGMENTS = (
    b"cposix\nsystem\n",
    b"cbuiltins\ngetattr\n",
    b"cbuiltins\nexec\n(X\x08\x00\x00\x00raise xxtR0",
    b"(S'touch x'\niposix\nsystem\n",
    b"\x8c\x05posix\x8c\x06system\x93",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n)R",
    b"c__builtin__\nset\n]\x85R",
    b"\x82\x01",
    b"\x92",
    b"R",
    b"b",
    b"\x81",
    b"Q",
    b"Pabc\n",
    b"(((((",
    b"\x85\x85\x85",
    b"r\xff\xff\xff\x7f",
    b"j\xff\xff\xff\x7f",
    b"X\xff\xff\xff\x7f",
    b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\x7f",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"J\xff\xff\xff\xff",
    b"2" * 50,
    b"2\x86" * 200,
    b".",
)
_seen: list[str] | None = None


def _watch(event: str, arguments: tuple) -> None:
    """What a reader must not do. `open` for reading is no harm."""
    harmful = event.startswith(("os.", "subprocess.", "socket.", "shutil.", "pickle.", "ctypes."))
    harmful = harmful and event not in ("os.listdir", "os.scandir")
    writes = event == "open" and any(c in str(arguments[1] or "") for c in "wxa+")
    if _seen is not None and (harmful or writes or event in ("exec", "compile", "import")):
        _seen.append(f"{event} {arguments[:1]}")


@contextmanager
def watched():
    """The list of harmful things that the interpreter did inside the `with` block, filled as they happen."""
    global _seen
    for codec in ("cp437", "latin-1", "raw_unicode_escape", "unicode_escape"):
        codecs.lookup(codec)  # Python imports these when zipfile and pickletools first use them
    if not getattr(sys, "_d2l_watched", False):
        sys.addaudithook(_watch)  # a hook cannot be taken out again
        sys._d2l_watched = True
    kept, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # of what is imported late
    _seen = seen = []
    try:
        yield seen
    finally:
        _seen, sys.dont_write_bytecode = None, kept


def records_of(content: bytes) -> dict[str, bytes]:
    """{name: bytes} of a checkpoint's zip."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(records: dict[str, bytes]) -> bytes:
    """A zip of stored records with right checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, value in records.items():
            archive.writestr(name, value)
    return file.getvalue()


class Mutator:
    """Makes mutated copies of a checkpoint; `kinds` are the names of the mutations."""

    kinds = ("bytes", "cut", "splice", "headers", "program bytes", "program fragment", "numbers", "texts", "records")

    def __init__(self, content: bytes, seed: int):
        self.content = content
        self.records = records_of(content)
        self.program = self.records[PROGRAM]
        self.rng = random.Random(seed)
        self.numbers = [(op, at) for op, _, at in pickletools.genops(self.program) if op.name.startswith("BININT")]
        self.texts = [(text, at) for op, text, at in pickletools.genops(self.program) if op.name == "BINUNICODE"]

    def make(self, kind: str) -> bytes:
        rng, content = self.rng, bytearray(self.content)
        if kind == "bytes":
            return self._flipped(content)
        if kind == "cut":
            return bytes(content[: rng.randrange(len(content))])
        if kind == "splice":
            return self._spliced(content)
        if kind == "headers":
            return self._flipped(content, content.index(b"PK\x01\x02"))
        if kind == "records":
            return packed(self._changed_records())
        if kind == "program bytes":
            program = rng.choice((self._flipped, self._spliced))(bytearray(self.program))
        elif kind == "program fragment":
            at = rng.choice([at for _, _, at in pickletools.genops(self.program)])
            program = self.program[:at] + rng.choice(FRAGMENTS) * rng.choice((1, 1, 1, 3)) + self.program[at:]
        elif kind == "numbers":
            op, at = rng.choice(self.numbers)
            length = {"BININT": 5, "BININT1": 2, "BININT2": 3}[op.name]
            value = rng.choice((0, 1, 2, 5, 255, 65535, 2**31 - 1, -1, -(2**31), rng.randrange(2**31)))
            wide = struct.pack("<q", rng.choice((2**62, -(2**62), 2**48, 2**40)))
            number = b"J" + struct.pack("<i", value) if rng.random() < 0.7 else b"\x8a\x08" + wide
            program = self.program[:at] + number + self.program[at + length :]
        else:
            text, at = rng.choice(self.texts)
            other = rng.choice((*[t for t, _ in self.texts], "", "x" * 5000, "\x1b[31m", "../../x", "0", "-1", "999"))
            program = self.program[:at] + b"X" + struct.pack("<I", len(other.encode())) + other.encode()
            program += self.program[at + 5 + len(text.encode()) :]
        return packed(self.records | {PROGRAM: bytes(program)})

    def _flipped(self, content: bytearray, start: int = 0) -> bytes:
        for _ in range(self.rng.choice((1, 1, 2, 4, 16))):
            content[self.rng.randrange(start, len(content))] = self.rng.randrange(256)
        return bytes(content)

    def _spliced(self, content: bytearray) -> bytes:
        first, second = (self.rng.randrange(len(content)) for _ in "12")
        length = self.rng.choice((1, 4, 20, 300))
        content[first : first + self.rng.choice((0, length))] = content[second : second + length]
        return bytes(content)

    def _changed_records(self) -> dict[str, bytes]:
        records, rng = dict(self.records), self.rng
        name = rng.choice(list(records))
        choice = rng.randrange(4)
        if choice == 0:
            del records[name]
        elif choice == 1:
            records[rng.choice(("../../evil", "/evil", "archive/../evil", "archive/code/x.py", "archive/data/1e9"))] = (
                b"x"
            )
        elif choice == 2:
            records[name] = records[name][: rng.randrange(len(records[name]) + 1)]
        else:
            records[name] = records[rng.choice(list(records))]
        return records


def attempt(content: bytes) -> str:
    """ "read" or "refused"; anything else that happens is an exception."""
    try:
        config, tensors, _ = parse_published(pickles.read(io.BytesIO(content)))
        build_hypernetwork(config, tensors)
    except CheckpointError as error:
        assert str(error).isprintable() and len(str(error)) < 3000, "an error message that is no message"
        return "refused"
    return "read"


def fuzz(content: bytes, n: int, seed: int = 0, longest: float = 10.0) -> tuple[Counter, float, int]:
    """({(kind, outcome): files}, seconds of the slowest, MiB that the process's peak grew by) of n mutated files.

    AssertionError, and whatever the reader raised, with the seed and number of the file.
    """
    mutator, counts, slowest = Mutator(content, seed), Counter(), 0.0
    assert attempt(content) == "read"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(n):
        kind = Mutator.kinds[number % len(Mutator.kinds)]
        mutated = mutator.make(kind)
        start = time.perf_counter()
        try:
            with watched() as seen:
                outcome = attempt(mutated)
            assert not seen, f"reading did {seen[:3]}"
        except Exception as error:
            error.add_note(f"seed {seed}, file {number}, {kind}")
            raise
        seconds = time.perf_counter() - start
        assert seconds < longest, f"seed {seed}, file {number}, {kind}: {seconds:.1f} s"
        slowest = max(slowest, seconds)
        counts[kind, outcome] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    return counts, slowest, grown


def small_checkpoint(path) -> bytes:
    """The smallest checkpoint in the published format that still has two modules, two blocks and a shared layer."""
    import torch

    from d2l_lib.formats.checkpoints import export
    from d2l_lib.hypernetwork import Hypernetwork, HypernetworkConfig

    config = HypernetworkConfig(
        n_layers=2,
        d_in={"down_proj": 6, "v_proj": 4},
        d_out={"down_proj": 4, "v_proj": 2},
        feature_size=4,
        latent_size=2,
        rank=1,
        n_latent_queries=2,
        n_blocks=3,
        shared_weights=True,
        base_model="some/base",
    )
    hypernetwork = Hypernetwork(config)
    with torch.no_grad():
        for parameter in hypernetwork.parameters():
            parameter.normal_()
    return export(hypernetwork, path).read_bytes()


def main() -> None:
    import tempfile
    from pathlib import Path

    n, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as folder:
        content = small_checkpoint(Path(folder) / "pytorch_model.bin")
    start = time.perf_counter()
    counts, slowest, grown = fuzz(content, n, seed)
    for kind in Mutator.kinds:
        print(f"{kind:17} read {counts[kind, 'read']:6}   refused {counts[kind, 'refused']:6}")
    print(
        f"{counts.total()} files of about {len(content)} bytes, seed {seed}: no other error; slowest "
        f"{slowest * 1000:.0f} ms, peak memory grew by {grown} MiB, {time.perf_counter() - start:.0f} s in all"
    )


if __name__ == "__main__":
    main()
