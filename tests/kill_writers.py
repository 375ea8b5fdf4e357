"""Real processes that write are killed with SIGKILL at random moments, and several write one name at once.

    python tests/kill_writers.py 200               # so many kills of each kind of output, and 240 concurrent writes
    python tests/kill_writers.py 200 240 training  # only of the kinds with such a word in their names

After every kill the output is a complete old or a complete new version, and the files of others beside it and the
user's own hidden files are untouched. Concurrent writers end without an error, and a reader never sees a mixture. The
suite runs it small (see test_writing).
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from tiny_models import build_model, random_hypernetwork
from transformers.utils.logging import disable_progress_bar

from d2l_lib.formats.checkpoints import convert, export, save_checkpoint
from d2l_lib.formats.shards import COUNTS, SCHEMA, shard_path, shard_problem, write_shard
from d2l_lib.formats.writing import read_whole
from d2l_lib.presets import Schedule
from d2l_lib.training import loop
from d2l_lib.training.notes import Step

HEADS = {"n_heads": 16, "n_kv_heads": 4, "head_dim": 128}  # of the published code
N_VERSIONS = 4
RUN = hashlib.sha256(b"run").hexdigest()  # of the shards
FOREIGN = {"thesis.txt": b"three years of work", ".out.notes.tmp": b"hidden", "out2/config.json": b"{}"}


@dataclass
class Output:
    """write(i, path) writes version i of 0 to 3; what lies at `path` afterwards is told by `digest`."""

    name: str
    write: Callable[[int, Path], object]


def digest(path: Path) -> str:
    """A hash of the names and contents of a file or folder: of a folder as `read_whole` gives it."""

    def of_folder(folder: Path) -> str:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return hashlib.sha256(
            repr([(str(file.relative_to(folder)), of_file(file)) for file in files]).encode()
        ).hexdigest()

    def of_file(file: Path) -> str:
        content = file.read_bytes()
        if file.suffix == ".safetensors" or file.name == "out":  # its header is written in any order
            end = 8 + int.from_bytes(content[:8], "little")
            content = json.dumps(json.loads(content[8:end]), sort_keys=True).encode() + content[end:]
        return hashlib.sha256(content).hexdigest()

    if path.is_file():
        return of_file(path)
    return read_whole(path, of_folder)


def outputs(work: Path) -> list[Output]:
    """Every kind of output that is replaced, with four versions each."""
    models = [build_model(seed=seed) for seed in range(N_VERSIONS)]
    adapters = [model.internalize(f"The code is {index}. " * (index + 1)) for index, model in enumerate(models)]
    own, published = [], []
    for index in range(N_VERSIONS):
        hypernetwork = random_hypernetwork(models[0].base_model, seed=index, latent_size=8, n_blocks=1, **HEADS)
        own.append(save_checkpoint(work / f"own{index}", hypernetwork, {"base_model": "some/base"}))
        published.append(export(hypernetwork, work / f"published{index}.bin", "some/base"))
    return [
        Output("adapter.save", lambda i, path: adapters[i].save(path)),
        Output("model.save", lambda i, path: models[i].save(path, include_base=True)),
        Output("export_peft", lambda i, path: adapters[i].export_peft(path)),
        Output("convert to a folder", lambda i, path: convert(published[i], path)),
        Output("convert to a file", lambda i, path: convert(own[i], path.with_suffix(".bin"))),
    ]


def fork(work: Callable[[], object]) -> tuple[int, int]:
    """A child process that does `work` and ends with status 0; (its id, a pipe that gives a byte when it begins)."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    status = 1
    try:
        os.write(writing, b".")
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def killed_after(work: Callable[[], object], seconds: float | None) -> tuple[bool, float]:
    """(whether the child was killed before it ended, how long it ran); None: never killed, and its error is raised."""
    child, pipe = fork(work)
    os.read(pipe, 1)
    os.close(pipe)
    began = time.monotonic()
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "a writer failed"
    return os.WIFSIGNALED(status), time.monotonic() - began


def lay_foreign(folder: Path) -> None:
    """Put the files of somebody else beside the output."""
    for name, content in FOREIGN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def check_foreign(folder: Path) -> None:
    """They are as they were."""
    for name, content in FOREIGN.items():
        assert (folder / name).read_bytes() == content, f"{name} was touched"


def leftovers(folder: Path) -> list[str]:
    """What killed processes left beside the output."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".") and path.name not in FOREIGN]


def kill_output(output: Output, folder: Path, n: int, rng: random.Random) -> Counter:
    """Kill n writes of an output that already exists; how often the old and how often the new version was there."""
    path = folder / ("out.bin" if "a file" in output.name else "out")
    lay_foreign(folder)
    versions = []
    for index in (0, 1):
        output.write(index, path)
        versions.append(digest(path))
    assert versions[0] != versions[1]
    duration = sorted(killed_after(lambda: output.write(1, path), None)[1] for _ in range(3))[1]
    found, now = Counter(), 1
    while sum(found.values()) < n:
        new = 1 - now
        killed, _ = killed_after(lambda new=new: output.write(new, path), rng.uniform(0, duration))
        assert (here := digest(path)) in versions, f"{output.name}: neither the old nor the new version"
        check_foreign(folder)
        if killed:
            found["new" if here == versions[new] else "old"] += 1
        now = versions.index(here)
    output.write(1 - now, path)
    assert digest(path) == versions[1 - now] and not leftovers(folder), f"{output.name}: {leftovers(folder)} stay"
    return found


def kill_shards(folder: Path, n: int, rng: random.Random) -> Counter:
    """Kill n writes of shards, of which every second one is there already; a shard is whole, or is made again."""
    lay_foreign(folder)
    table = pa.Table.from_pylist(
        [
            {
                **{name: [] for name in SCHEMA.names},
                "document": "d" * 500,
                "ctx_ids": [rng.randrange(1000) for _ in range(20_000)],
            }
            for _ in range(20)
        ],
        schema=SCHEMA,
    )
    counts = dict.fromkeys(COUNTS, 1)
    path = shard_path(folder, 0)
    begun = time.monotonic()
    write_shard(path, RUN, table, counts)
    whole, duration = path.read_bytes(), time.monotonic() - begun
    found: Counter = Counter()
    while sum(found.values()) < n:
        if sum(found.values()) % 2:
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)
        killed, _ = killed_after(lambda: write_shard(path, RUN, table, counts), rng.uniform(0, duration * 1.5))
        assert not path.exists() or path.read_bytes() == whole, "half a shard"
        problem = shard_problem(path, RUN)
        assert problem in (None, "", "it has no checksum (was the run interrupted?)"), problem
        check_foreign(folder)
        if killed:
            found["whole" if problem is None else "made again"] += 1
    write_shard(path, RUN, table, counts)
    assert shard_problem(path, RUN) is None and not leftovers(folder)
    return found


class _Small(Step):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.line = torch.nn.Linear(64, 64)

    def forward(self, x):
        loss = self.line(x).square().mean()
        self.notes.add("total_loss", float(loss.detach()))
        return {"loss": loss}


class _Batches(torch.utils.data.Dataset):
    def __len__(self):
        return 10_000

    def __getitem__(self, index):
        return {"x": torch.full((4, 64), index / 10_000)}


def kill_training(folder: Path, n: int, rng: random.Random) -> Counter:
    """Kill a training n times while it writes one checkpoint after another; it goes on from a whole one each time."""
    lay_foreign(folder)
    run = folder / "run"

    def train() -> None:
        schedule = Schedule(steps=10_000, learning_rate=1e-3, warmup_steps=1)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            loop.fit(_Small(), _Batches(), schedule, loop.Run(run, save_steps=1, report_steps=1))

    found, last, noted = Counter(), 0, None
    while sum(found.values()) < n:
        before = len(loop.checkpoints(run)) and last
        child, pipe = fork(train)
        os.read(pipe, 1)
        os.close(pipe)
        deadline = time.monotonic() + 120
        while _newest(run) <= before and time.monotonic() < deadline:  # it has begun to save
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the training ended by itself"
        whole = [folder for folder in loop.checkpoints(run) if loop.is_whole(folder)]
        assert whole, "no whole checkpoint"
        newest = whole[-1]
        state = torch.load(newest / "optimizer.pt", weights_only=True)
        step = int(newest.name.rpartition("-")[2])
        moments = state["state"][0]["step"] if state["state"] else torch.tensor(0)
        assert int(moments) == step >= last, f"{newest.name} holds the optimizer of step {int(moments)}"
        found["half-written beside it" if loop.checkpoints(run)[-1] != newest else "whole"] += 1
        last = step
        check_foreign(folder)
        if noted is None:
            noted = newest / "notes.txt"
            noted.write_text("mine")
        assert noted.read_text() == "mine", "a file of somebody else was deleted"
    return found


def _newest(run: Path) -> int:
    return max((int(folder.name.rpartition("-")[2]) for folder in loop.checkpoints(run)), default=0)


def concurrent(output: Output, folder: Path, n: int, n_writers: int = 4) -> Counter:
    """n writes of one name in all by several processes, with a reader beside them; how often it saw each version."""
    path = folder / ("out.bin" if "a file" in output.name else "out")
    lay_foreign(folder)
    versions = []
    for index in range(N_VERSIONS):
        output.write(index, path)
        versions.append(digest(path))
    assert len(set(versions)) == N_VERSIONS

    def work(writer: int) -> None:
        for turn in range(n // n_writers):
            output.write((writer + turn) % N_VERSIONS, path)

    children = []
    for writer in range(n_writers):
        child, pipe = fork(lambda writer=writer: work(writer))
        os.close(pipe)
        children.append(child)
    seen, running = Counter(), set(children)
    while running:
        seen[versions.index(digest(path))] += 1  # ValueError: a mixture
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                running.remove(child)
                assert status == 0, f"{output.name}: a writer failed"
    assert digest(path) in versions and not leftovers(folder), leftovers(folder)
    check_foreign(folder)
    return seen


def main(n: int, n_writes: int = 240, only: str = "") -> None:
    """All kinds whose name contains a word of `only` (commas between them); AssertionError names what fails."""
    torch.set_num_threads(1)
    disable_progress_bar()  # its lock, shared by all processes, would be held for ever by one that was killed
    work = Path(tempfile.mkdtemp(prefix="kill_writers_"))
    rng = random.Random(0)
    try:
        for output in outputs(work):
            if not any(word in output.name for word in only.split(",")):
                continue
            folder = work / output.name.replace(" ", "_")
            print(f"{output.name}: {n} kills: {dict(kill_output(output, folder / 'kills', n, rng))}", flush=True)
            seen = concurrent(output, folder / "together", n_writes)
            print(
                f"{output.name}: {n_writes} writes by 4 processes, {sum(seen.values())} reads, no mixture", flush=True
            )
        for name, kill in (("shards", kill_shards), ("training checkpoints", kill_training)):
            if any(word in name for word in only.split(",")):
                print(f"{name}: {n} kills: {dict(kill(work / name, n, rng))}", flush=True)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3] or ["3"]), *sys.argv[3:])
