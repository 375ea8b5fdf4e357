"""The costs of internalizing and answering, one `Measurement` at a time: seconds by part and peak memory.

`measure` runs in this process. `measure_alone` runs in a process of its own, so that peak memories stay apart.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers

from d2l_lib.adapter import Adapter, SharedRows
from d2l_lib.base_model import default_device
from d2l_lib.documents import Chunk, check_count, chunk_document, context_ids, question_ids
from d2l_lib.engine import generate
from d2l_lib.loading import load
from d2l_lib.model import DocToLoRA
from d2l_lib.routing import route
from d2l_lib.studies import gemma_sizes
from d2l_lib.studies.watches import Stopwatch, peak_memory_mib, reset_peak_memory, watching
from d2l_lib.tasks import needles, world

MODES = {
    "internalize": ("batched", "iterative"),
    "floor": ("",),
    "answer": ("all blocks", "routed", "no adapter"),
    "in context": ("",),
    "documents": ("",),
    "save": ("",),
    "load": ("",),
    "start": ("first", "later"),
}
_WITHOUT_DOCUMENT = ("documents", "start")
NEW_TOKENS = 16  # of every answer, so that answers compare
DOCUMENT_FACTS = 20  # of each document in "documents"
_FLOOR_TOKENS = 288  # of one pass on a CPU, whose own memory then holds its states
# Imported once, before the fork: imports take longer than measurements.
_PRELOAD = [
    "d2l_lib.model",
    "torch.utils.flop_counter",
    "transformers.generation",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gemma2.modeling_gemma2",
    "transformers.models.qwen3.modeling_qwen3",
]


@dataclass(frozen=True)
class Measurement:
    """What is measured; equal values are the same measurement.

    what, mode: one of MODES. "save" and "load" are of an adapter; "start" is of the model itself, in a new Python, and
        "first" also prepares a base model that comes in a package.
    model: what `d2l.load` takes, or "gemma-2-2b/<recipe>" (see `gemma_sizes`).
    length_tokens: of the document, also of an adapter's (0: none).
    documents: how many one call internalizes, for "documents".
    layers, vocabulary: of a gemma-2-2b base model (None: all).
    device, dtype, threads: None is this machine's default.
    """

    what: str
    model: str = "tiny"
    length_tokens: int = 0
    mode: str = ""
    documents: int = 1
    layers: int | None = None
    vocabulary: int | None = None
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.what not in MODES or self.mode not in MODES[self.what]:
            known = "; ".join(f"{what}: {', '.join(modes) or 'none'}" for what, modes in MODES.items())
            raise ValueError(f"there is no measurement {self.what!r} with the mode {self.mode!r}; there are {known}")
        check_count(self.documents, "documents")
        if self.what not in _WITHOUT_DOCUMENT and self.mode != "no adapter":
            check_count(self.length_tokens, "length_tokens")
        for name in ("layers", "vocabulary", "threads"):
            if getattr(self, name) is not None:
                check_count(getattr(self, name), name)
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, not {self.dtype!r}")

    def here(self) -> Measurement:
        """The same with device, dtype and threads filled in."""
        device = str(default_device()) if self.device is None else self.device
        dtype = ("bfloat16" if device.startswith("cuda") else "float32") if self.dtype is None else self.dtype
        threads = torch.get_num_threads() if self.threads is None else self.threads
        return replace(self, device=device, dtype=dtype, threads=threads)

    def __str__(self) -> str:
        parts = [self.model, f"{self.what} {self.mode}".strip()]
        parts += [f"{self.length_tokens:,} tokens"] if self.length_tokens else []
        parts += [f"{self.documents} documents"] if self.what == "documents" else []
        return ", ".join(parts)


# ---------------------------------------------------------------------------------------------- models and documents
def build(m: Measurement) -> DocToLoRA:
    """The model of a measurement."""
    m = m.here()
    name, _, recipe = m.model.partition("/")
    dtype = getattr(torch, m.dtype)
    if name == "gemma-2-2b":
        return gemma_sizes.random_model(recipe, m.layers, m.vocabulary, dtype, m.device, m.seed)
    return load(m.model, device=m.device, dtype=dtype)


def distinct_text(tokenizer, length_tokens: int, seed: int) -> str:
    """A text of `length_tokens` tokens (give or take one) from documents of the generated world, no two alike."""
    rng = random.Random(f"speed/{seed}")
    parts, tokens = [], 0
    while tokens < length_tokens:
        parts.append(world.draw_document(rng, "test", DOCUMENT_FACTS).text)
        tokens += len(tokenizer(parts[-1], add_special_tokens=False, verbose=False)["input_ids"])
    text = "\n".join(parts)
    ends = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    return text[: ends[length_tokens - 1][1]]


def adapter_of_length(model: DocToLoRA, length_tokens: int, seed: int) -> Adapter:
    """An adapter with the number and sizes of blocks of a document of this length.

    Only the first chunks are read. Further blocks are copies with tensors of their own: the cost to apply, save and
    load does not depend on the numbers.
    """
    text = distinct_text(model.tokenizer, length_tokens, seed)
    chunks = chunk_document(text, model.encoder_tokenizer, model.chunk_tokens)
    (read,) = model.internalize_each([text[: chunks[: model.chunk_batch][-1].span[1]]])
    blocks = []
    for chunk in chunks:
        block = read.blocks[chunk.index % len(read.blocks)]
        A, B = ({module: tensor.clone() for module, tensor in side.items()} for side in (block.A, block.B))
        B = block.B if isinstance(block.B, SharedRows) else B
        blocks.append(replace(block, chunk=chunk.index, span=chunk.span, A=A, B=B))
    return replace(read, blocks=tuple(blocks))


def bytes_of_rows(model: DocToLoRA, chunks: Sequence[Chunk]) -> int:
    """Bytes of an adapter of token rows of these different chunks of one document."""
    B = model.hypernetwork.shared_rows(context_ids(model.encoder_tokenizer, [one.text for one in chunks]))
    width, n_rows = (model.block_dtype or B[0].table.dtype).itemsize, sum(len(one.rows) for one in B)
    return width * (n_rows * model.config.latent_size + B[0].table.numel()) + n_rows * B[0].rows.element_size()


def adapter_bytes(model: DocToLoRA, n_chunks: int) -> int:
    """Bytes of an adapter of `n_chunks` different chunks, with its bias block."""
    config, width = model.config, next(model.hypernetwork.parameters()).element_size()
    rows = (n_chunks + config.use_bias) * (len(config.written_layers) or config.n_layers) * config.rank
    return rows * width * sum(config.d_in[module] + config.d_out[module] for module in config.modules)


# ----------------------------------------------------------------- what is done, under a watch, and facts for its row
_Prepared = tuple[Callable[[Stopwatch], None], dict]


def _internalizing(model: DocToLoRA, texts: list[str]) -> Callable[[Stopwatch], None]:
    def run(watch: Stopwatch) -> None:
        with watching(model, watch):
            model.internalize_each(texts)

    return run


def _internalization(model: DocToLoRA, m: Measurement) -> _Prepared:
    text = distinct_text(model.encoder_tokenizer, m.length_tokens, m.seed)
    model.iterative = m.mode == "iterative"
    chunks = chunk_document(text, model.encoder_tokenizer, model.chunk_tokens)
    size = bytes_of_rows(model, chunks) if model.writes_rows else adapter_bytes(model, len(chunks))
    return _internalizing(model, [text]), {"chunks": len(chunks), "adapter_mib": round(size / 2**20, 3)}


def _together(model: DocToLoRA, m: Measurement) -> _Prepared:
    rng = random.Random(f"speed/{m.seed}")
    texts = [world.draw_document(rng, "test", DOCUMENT_FACTS).text for _ in range(m.documents)]
    tokens = sum(len(ids) for ids in model.tokenizer(texts, add_special_tokens=False)["input_ids"])
    return _internalizing(model, texts), {"tokens": tokens, "facts": DOCUMENT_FACTS}


def _floor(model: DocToLoRA, m: Measurement) -> _Prepared:
    """The encoder on the document's tokens alone, without chat wrapping and padding, in rows of one chunk's length.

    No method that reads the document with this encoder can be faster.
    """
    text, width = distinct_text(model.encoder_tokenizer, m.length_tokens, m.seed), model.chunk_tokens
    ids = model.encoder_tokenizer(text, add_special_tokens=False, verbose=False, return_tensors="pt")["input_ids"][0]
    batches = []
    tokens = min(model.batch_tokens, _FLOOR_TOKENS) if model.device.type == "cpu" else model.batch_tokens
    for piece in ids.split(max(1, min(model.chunk_batch, tokens // width)) * width):
        whole = len(piece) // width * width
        batches += [rows for rows in (piece[:whole].view(-1, width), piece[None, whole:]) if rows.numel()]

    def run(watch: Stopwatch) -> None:
        for batch in batches:
            model.encoder.encode(batch.to(model.device))
        watch.lap("encoder")

    return run, {"tokens": len(ids)}


def _answering(model: DocToLoRA, m: Measurement) -> _Prepared:
    adapter = None if m.mode == "no adapter" else adapter_of_length(model, m.length_tokens, m.seed)
    prompt = question_ids(model.tokenizer, needles.QUESTION)

    def run(watch: Stopwatch) -> None:
        chosen = adapter
        if m.mode == "routed":
            (chosen,) = route(model, [needles.QUESTION], [adapter])
            watch.lap("choosing the block")
        with model.applied(chosen) as network:
            watch.lap("putting the adapter on")
            _generate(network, model, prompt)
            watch.lap("generating")

    blocks, rank = (0, 0) if adapter is None else (len(adapter.blocks), adapter.rank)
    return run, {"blocks": blocks, "rank": rank, "prompt_tokens": len(prompt), "new_tokens": NEW_TOKENS}


def _in_context(model: DocToLoRA, m: Measurement) -> _Prepared:
    text = distinct_text(model.tokenizer, m.length_tokens, m.seed)
    prompt = question_ids(model.tokenizer, f"{text}\n\n{needles.QUESTION}")

    def run(watch: Stopwatch) -> None:
        with model.applied(None) as network:
            _generate(network, model, prompt)
            watch.lap("generating")

    beyond = len(prompt) + NEW_TOKENS > model.window
    return run, {"prompt_tokens": len(prompt), "new_tokens": NEW_TOKENS, "beyond_window": beyond}


@torch.no_grad()
def _generate(network, model: DocToLoRA, prompt: list[int]) -> None:
    """Generate exactly NEW_TOKENS tokens after the prompt."""
    ids = torch.tensor([prompt], device=model.device)
    count = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    generate(network, model.tokenizer, ids, torch.ones_like(ids), **count)


def _file(model: DocToLoRA, m: Measurement) -> _Prepared:
    adapter = adapter_of_length(model, m.length_tokens, m.seed)
    folder = tempfile.TemporaryDirectory(prefix="d2l-speed-")
    path = adapter.save(Path(folder.name) / "adapter.safetensors")

    def run(watch: Stopwatch, folder=folder) -> None:  # the folder lives as long as this function
        if m.what == "save":
            adapter.save(path)
        else:
            Adapter.load(path)
        watch.lap(m.what)

    sizes = {"adapter_mib": adapter.nbytes, "file_mib": path.stat().st_size}
    return run, {"blocks": len(adapter.blocks)} | {name: round(size / 2**20, 3) for name, size in sizes.items()}


_PREPARE: dict[str, Callable[[DocToLoRA, Measurement], _Prepared]] = {
    "internalize": _internalization,
    "floor": _floor,
    "answer": _answering,
    "in context": _in_context,
    "documents": _together,
    "save": _file,
    "load": _file,
}


_START = """
import json, pathlib, sys, time
import torch
from d2l_lib.formats import packaged
from d2l_lib.loading import load
from d2l_lib.studies.watches import peak_memory_mib
model, device, dtype, threads, folder = sys.argv[1:]
torch.set_num_threads(int(threads))
if folder:
    packaged.CACHE = pathlib.Path(folder)
began, cpu = time.perf_counter(), time.process_time()
load(model, device=device, dtype=getattr(torch, dtype))
facts = {"loading": time.perf_counter() - began, "loading_cpu_seconds": time.process_time() - cpu}
print(json.dumps(facts | {"peak_memory_mib": peak_memory_mib()}))
"""


def _starting(m: Measurement, repeats: int) -> dict:
    """The rest of the row of a "start": each run is a new Python from its first line to its end.

    The first load prepares the base model in an empty folder, once, and that folder is deleted. loading_cpu_seconds is
    the part of cpu_seconds after Python has started and imported.
    """
    runs = []
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    for _ in range(1 if m.mode == "first" else repeats):
        with tempfile.TemporaryDirectory(prefix="d2l-speed-") as folder:
            place = folder if m.mode == "first" else ""
            command = [sys.executable, "-c", _START, m.model, m.device, m.dtype, str(m.threads), place]
            started = time.perf_counter()
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            seconds = time.perf_counter() - started
        if done.returncode:
            raise RuntimeError(f"loading {m.model} failed:\n{done.stderr[-2000:]}")
        runs.append({"seconds": seconds} | json.loads(done.stdout.splitlines()[-1]))
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    middle = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
    parts = {"starting Python": middle["seconds"] - middle["loading"], "loading": middle["loading"]}
    return {
        **_measured([run["seconds"] for run in runs], parts),
        "peak_memory_mib": round(max(run["peak_memory_mib"] for run in runs), 1),
        "cpu_seconds": round(busy / len(runs), 4),
        "loading_cpu_seconds": round(sum(run["loading_cpu_seconds"] for run in runs) / len(runs), 4),
        "cpu_share": round(busy / wall / m.threads, 3),
    }


# ------------------------------------------------------------------------------------------------------- measured here
def measure(
    m: Measurement, model: DocToLoRA | None = None, *, repeats: int = 5, least: int = 3, budget_s: float = 6.0
) -> dict:
    """One row of a record, measured in this process (peak memory includes what came before).

    model: that of `build`, if at hand; the measurement sets its `iterative`.
    repeats, least, budget_s: measure `repeats` times, or at least `least` times once `budget_s` seconds are over. A
        short document comes first, as the first call sets up memory pools.

    Keys besides those of `m`: status ("measured" or "out of memory"), n, seconds (median), seconds_low and seconds_high
    (quartiles), parts ({part: seconds} of the median run), peak_memory_mib, resting_memory_mib (before, with the model
    loaded), cpu_seconds (of the processor, a mean of the runs; they stand also where other programs run), cpu_share
    (CPU seconds per second and thread; well below 1 on the CPU means that others used it too), machine and model
    sizes, which a "start" lacks.
    """
    m = m.here()
    row = asdict(m)
    if m.what == "start":
        return row | _place(m) | _starting(m, repeats)
    try:
        model = build(m) if model is None else model
        row |= _place(m) | _sizes(model)
        model.internalize_each([world.draw_document(random.Random(m.seed), "test", 2).text])
        run, facts = _PREPARE[m.what](model, m)
        reset_peak_memory()
        row |= {"resting_memory_mib": round(peak_memory_mib(), 1)} | facts
        watches, cpu, began = [], time.process_time(), time.perf_counter()
        while len(watches) < min(least, repeats) or (len(watches) < repeats and time.perf_counter() - began < budget_s):
            watches.append(Stopwatch(model.device))
            run(watches[-1])
        wall, busy = time.perf_counter() - began, time.process_time() - cpu
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return row | {"status": "out of memory"}
    middle = sorted(watches, key=lambda watch: watch.seconds)[len(watches) // 2]
    return row | {
        **_measured([watch.seconds for watch in watches], middle.parts),
        "peak_memory_mib": round(peak_memory_mib(), 1),
        "cpu_seconds": round(busy / len(watches), 6),
        "cpu_share": round(busy / wall / m.threads, 3),
    }


def _measured(seconds: Sequence[float], parts: dict[str, float]) -> dict:
    """The columns of what was timed: status, n, median and quartiles of the runs, and the parts of the median run."""
    low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75))
    return {
        "status": "measured",
        "n": len(seconds),
        "seconds": round(float(median), 6),
        "seconds_low": round(float(low), 6),
        "seconds_high": round(float(high), 6),
        "parts": {part: round(of_part, 6) for part, of_part in parts.items()},
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or the system says that memory ran out."""
    text = str(error).lower()
    words = ("can't allocate", "cannot allocate", "not enough", "out of")
    no_room = isinstance(error, RuntimeError) and any(f"{word} memory" in text for word in words)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or no_room


def _place(m: Measurement) -> dict:
    """The machine and software of a measurement: device_name and versions."""
    name = torch.cuda.get_device_name(m.device) if m.device.startswith("cuda") else processor_name()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device_name": name, "python": platform.python_version()} | versions


def processor_name() -> str:
    """The CPU's name in the system's words."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _sizes(model: DocToLoRA) -> dict:
    """The shapes that a cost depends on: base_model, hypernetwork, and how a document is cut and batched."""
    of_base = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    of_base += ("num_key_value_heads", "head_dim", "vocab_size")
    own = ("encoder_type", "latent_size", "rank", "n_latent_queries", "n_blocks", "modules")
    base_model = {name: getattr(model.base_model.config, name, None) for name in of_base}
    hypernetwork = {name: getattr(model.config, name) for name in own} | {"encoder_layers": model.encoder.n_layers_run}
    return {
        "base_model": base_model | {"parameters": gemma_sizes.n_parameters(model.base_model)},
        "hypernetwork": hypernetwork | {"parameters": gemma_sizes.n_parameters(model.hypernetwork)},
        "chunk_tokens": model.chunk_tokens,
        "chunk_batch": model.chunk_batch,
        "batch_tokens": model.batch_tokens,
    }


# --------------------------------------------------------------------------------------------- a process for each
def measure_alone(m: Measurement, *, limit_s: float = 600.0, memory_limit_mib: int | None = None, **options) -> dict:
    """`measure` in a process of its own, which is ended after `limit_s` seconds; options are those of `measure`.

    memory_limit_mib: most that it may allocate on the CPU beyond its start (Linux only; None: no limit).

    The status is "out of memory" if the system killed the process, and "stopped after <limit> s" if it took too long.
    RuntimeError shows the process's last words after any other failure.
    """
    m = m.here()
    context = own_processes()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_and_send, args=(m, options, memory_limit_mib, sender), daemon=True)
    process.start()
    sender.close()
    try:
        row = receiver.recv() if receiver.poll(limit_s) else {"status": f"stopped after {limit_s:g} s"}
    except EOFError:
        process.join()
        if process.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"measuring {m} ended with exit status {process.exitcode}") from None
        row = {"status": "out of memory", "killed": True}
    finally:
        process.kill()
        process.join()
    if "error" in row:
        raise RuntimeError(f"measuring {m} failed:\n{row['error']}")
    return asdict(m) | _place(m) | row


def own_processes():
    """The `multiprocessing` context whose new processes hold nothing of this one, and have imported already."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(_PRELOAD)
    return context


def _measure_and_send(m: Measurement, options: dict, memory_limit_mib: int | None, sender) -> None:
    """Run one measurement and send its row: the body of the process."""
    try:
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        torch.set_num_threads(m.threads)
        if memory_limit_mib is not None:
            _limit_memory(memory_limit_mib)
        sender.send(measure(m, **options))
    except BaseException:
        sender.send({"error": traceback.format_exc()[-3000:]})


def _limit_memory(mib: int) -> None:
    """Let this process allocate `mib` MiB more than it has now."""
    (held,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:")]
    resource.setrlimit(resource.RLIMIT_DATA, (int(held.split()[1]) * 1024 + mib * 2**20,) * 2)
