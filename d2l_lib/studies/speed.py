"""Seconds and memory: what internalizing and answering cost, beside what they cannot cost less than.

    d2l study speed-tiny                                                   # the bundled models, on the CPU in minutes
    d2l study speed-gemma --layers 26 --lengths 1024 4096 32768 131072     # Gemma-2-2B's sizes, on a GPU

A `Measurement` says what is measured; `measure` does it here, `measure_alone` in a process of its own, so that the peak
memory of one does not hold another's, and `record` adds one row each to a record, going on where it was interrupted.

The floor of internalizing is one pass of the context encoder over the document's tokens: no method that reads the
document with this encoder can be quicker. Gemma-2-2B's sizes come with random weights, for time and memory do not
depend on what the numbers are.
"""

from __future__ import annotations

import multiprocessing
import platform
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from d2l_lib.adapter import Adapter
from d2l_lib.base_model import decoder_body, default_device, generate, load_base_model, module_sizes
from d2l_lib.documents import check_count, check_texts, chunk_document, question_ids
from d2l_lib.encoder import ContextEncoder
from d2l_lib.hypernetwork import Hypernetwork, HypernetworkConfig
from d2l_lib.loading import load
from d2l_lib.model import DocToLoRA
from d2l_lib.records import read_rows
from d2l_lib.routing import route
from d2l_lib.studies import record_path
from d2l_lib.studies.memory import peak_memory_mib, reset_peak_memory
from d2l_lib.tasks import needles, world

# The published sizes of google/gemma-2-2b-it.
GEMMA_2_2B = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
}
# The paper's hypernetworks for it: rank 8 on the down projections, latents of 512. With one pre-head layer per base
# layer they have 310 and 315 million parameters; 309 million are published.
RECIPES = {
    "needle": {"encoder_type": "early_exit", "n_latent_queries": 208, "n_blocks": 8},
    "main": {"encoder_type": "per_layer_activations", "n_latent_queries": 8, "n_blocks": 9},
}
CHUNK_TOKENS = 1024  # of the published evaluation
# Seconds and GB on LongBench documents of up to 32K tokens, on the authors' GPU (arXiv 2602.15902, long question
# answering, gemma-2-2b-it).
PUBLISHED = pd.DataFrame(
    [
        {"dataset": "2WikiMultihopQA", "mode": "batched", "seconds": 0.21, "memory_gb": 11.5},
        {"dataset": "MultiFieldQA", "mode": "batched", "seconds": 0.20, "memory_gb": 19.4},
        {"dataset": "Qasper", "mode": "batched", "seconds": 0.18, "memory_gb": 31.2},
        {"dataset": "2WikiMultihopQA", "mode": "iterative", "seconds": 0.55, "memory_gb": 3.8},
    ]
)
PUBLISHED_LENGTH = 32_768  # tokens, the longest of these documents

MODES = {
    "internalize": ("batched", "iterative"),
    "floor": ("",),
    "answer": ("all blocks", "routed", "no adapter"),
    "in context": ("",),
    "documents": ("",),
    "save": ("",),
    "load": ("",),
}
NEW_TOKENS = 16  # of every answer, so that answers of different length compare
DOCUMENT_FACTS = 20  # of each document that is internalized along with others
REPEATS, LEAST_REPEATS, BUDGET_S = 5, 3, 6.0
PARTS = ("text", "encoder", "Perceiver", "head", "moving")  # of internalizing, in the order in which they come
# Imported once by the process from which those of the measurements are forked: importing takes longer than measuring.
PRELOAD = [
    "d2l_lib.model",
    "torch.utils.flop_counter",
    "transformers.generation",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gemma2.modeling_gemma2",
    "transformers.models.qwen3.modeling_qwen3",
]


@dataclass(frozen=True)
class Measurement:
    """What is measured; two equal ones are the same measurement.

    what and mode: one of MODES. model: what `d2l.load` takes, or "gemma-2-2b/<recipe>" with a recipe out of RECIPES:
    random weights of those sizes, with `layers` base layers and a vocabulary of `vocabulary` (None: all of them).
    length_tokens: of the document (of the adapter's document where a question is answered or a file is written; 0
    without one). documents: how many are internalized in one call, for "documents". device, dtype and threads: None is
    this machine's own.
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
        without_document = self.what == "documents" or self.mode == "no adapter"
        if not without_document:
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
    """The model that a measurement is about."""
    m = m.here()
    name, _, recipe = m.model.partition("/")
    if name != "gemma-2-2b":
        return load(m.model, device=m.device, dtype=getattr(torch, m.dtype))
    with torch.device(m.device):
        torch.manual_seed(m.seed)
        base_model, hypernetwork = _random_parts(recipe, m.layers, m.vocabulary, getattr(torch, m.dtype))
        for parameter in hypernetwork.scaler_B.values():
            parameter.fill_(1.0)  # a fresh hypernetwork writes B = 0
    _, tokenizer = load_base_model("tiny", device="cpu")
    if len(tokenizer) > base_model.config.vocab_size:
        raise ValueError(
            f"a vocabulary of {base_model.config.vocab_size} is too small: documents are written with the "
            f"{len(tokenizer)} tokens of the bundled tokenizer"
        )
    return DocToLoRA(base_model, tokenizer, hypernetwork, chunk_tokens=CHUNK_TOKENS)


def _random_parts(recipe: str, layers: int | None, vocabulary: int | None, dtype: torch.dtype):
    """(base model of Gemma-2-2B's sizes, hypernetwork of the recipe), random and frozen, on the default device."""
    if recipe not in RECIPES:
        raise ValueError(f"there is no recipe {recipe!r} for gemma-2-2b; there are {', '.join(RECIPES)}")
    sizes = GEMMA_2_2B | ({} if layers is None else {"num_hidden_layers": layers})
    sizes |= {} if vocabulary is None else {"vocab_size": vocabulary}
    config = AutoConfig.for_model("gemma2", **sizes)
    base_model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    d_in, d_out = module_sizes(base_model, ["down_proj"])
    hypernetwork = Hypernetwork(
        HypernetworkConfig(
            n_layers=config.num_hidden_layers,
            d_in=d_in,
            d_out=d_out,
            feature_size=config.hidden_size,
            latent_size=512,
            rank=8,
            per_layer_processing=True,
            **RECIPES[recipe],
        )
    )
    return base_model.eval().requires_grad_(False), hypernetwork.eval().requires_grad_(False)


def distinct_text(tokenizer, length_tokens: int, seed: int) -> str:
    """A text of `length_tokens` tokens (one more or less) out of documents of the generated world, no two alike."""
    rng = random.Random(f"speed/{seed}")
    parts, tokens = [], 0
    while tokens < length_tokens:
        parts.append(world.draw_document(rng, "test", DOCUMENT_FACTS).text)
        tokens += len(tokenizer(parts[-1], add_special_tokens=False, verbose=False)["input_ids"])
    text = "\n".join(parts)
    ends = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    return text[: ends[length_tokens - 1][1]]


def adapter_of_length(model: DocToLoRA, length_tokens: int, seed: int) -> Adapter:
    """An adapter with as many blocks, of the same sizes, as a document of that length has.

    Only its first chunks are read; the other blocks hold copies of theirs, each its own tensors, as different chunks'
    have: what it costs to apply, to save and to load does not depend on the numbers.
    """
    text = distinct_text(model.tokenizer, length_tokens, seed)
    chunks = chunk_document(text, model.encoder_tokenizer, model.chunk_tokens)
    (read,) = model.internalize_each([text[: chunks[: model.chunk_batch][-1].span[1]]])
    blocks = []
    for chunk in chunks:
        block = read.blocks[chunk.index % len(read.blocks)]
        A, B = ({module: tensor.clone() for module, tensor in side.items()} for side in (block.A, block.B))
        blocks.append(replace(block, chunk=chunk.index, span=chunk.span, A=A, B=B))
    return replace(read, blocks=tuple(blocks))


# ------------------------------------------------------------------------------------------------------------- watches
def _wait(device: torch.device) -> None:
    """Until the device has done what it was told: a GPU works on while Python goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Stopwatch:
    """Seconds by part: `lap(part)` adds the time since the last lap to that part, so that parts add up to the whole."""

    def __init__(self, device: torch.device):
        self.device = device
        self.parts: dict[str, float] = {}
        _wait(device)
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        _wait(self.device)
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now

    @property
    def seconds(self) -> float:
        """All parts together."""
        return sum(self.parts.values())


@contextmanager
def watching(model: DocToLoRA, watch: Stopwatch) -> Iterator[None]:
    """Inside the `with` block what is internalized is timed by part; the model on exit is the model on entry.

    text: cutting the document into chunks and tokens. encoder: the pass over the tokens. Perceiver. head: the layers
    after it and the two factors. moving: checking the blocks, copying them to the CPU, and the next batch's padding.
    """
    body, hypernetwork = decoder_body(model.encoder.model), model.hypernetwork
    aggregator = hypernetwork.aggregator
    handles = [
        body.register_forward_pre_hook(lambda *_: watch.lap("moving" if "encoder" in watch.parts else "text")),
        hypernetwork.register_forward_pre_hook(lambda *_: watch.lap("encoder")),
        # layer by layer the Perceiver is called again after the head of the layer before
        aggregator.register_forward_pre_hook(lambda *_: watch.lap("head")),
        aggregator.register_forward_hook(lambda *_: watch.lap("Perceiver")),
        hypernetwork.register_forward_hook(lambda *_: watch.lap("head")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        watch.lap("moving" if "encoder" in watch.parts else "text")


# -------------------------------------------------------------------------------------------------------- measurements
def _internalization(model: DocToLoRA, m: Measurement) -> tuple[Callable[[], Stopwatch], dict]:
    text = distinct_text(model.encoder_tokenizer, m.length_tokens, m.seed)
    model.iterative = m.mode == "iterative"
    chunks = chunk_document(text, model.encoder_tokenizer, model.chunk_tokens)
    size = adapter_bytes(model, len(chunks))

    def run() -> Stopwatch:
        watch = Stopwatch(model.device)
        with watching(model, watch):
            model.internalize_each([text])
        return watch

    return run, {"chunks": len(chunks), "adapter_mib": round(size / 2**20, 3)}


def adapter_bytes(model: DocToLoRA, n_chunks: int) -> int:
    """Bytes of an adapter of so many chunks that all differ, its bias block included."""
    config, width = model.config, next(model.hypernetwork.parameters()).element_size()
    blocks = n_chunks + (1 if config.use_bias else 0)
    rows = blocks * config.n_layers * config.rank
    return rows * width * sum(config.d_in[module] + config.d_out[module] for module in config.modules)


def _floor(model: DocToLoRA, m: Measurement) -> tuple[Callable[[], Stopwatch], dict]:
    """The document's tokens alone, without chat wrapping and padding, in rows of one chunk's length."""
    text = distinct_text(model.encoder_tokenizer, m.length_tokens, m.seed)
    ids = model.encoder_tokenizer(text, add_special_tokens=False, verbose=False, return_tensors="pt")["input_ids"][0]
    rows = max(1, min(model.chunk_batch, model.batch_tokens // model.chunk_tokens))
    pieces = ids.split(rows * model.chunk_tokens)
    batches = []
    for piece in pieces:
        whole = len(piece) // model.chunk_tokens * model.chunk_tokens
        batches += [piece[:whole].view(-1, model.chunk_tokens)] if whole else []
        batches += [piece[whole:].view(1, -1)] if whole < len(piece) else []

    def run() -> Stopwatch:
        watch = Stopwatch(model.device)
        for batch in batches:
            model.encoder.encode(batch.to(model.device))
        watch.lap("encoder")
        return watch

    return run, {"tokens": sum(batch.numel() for batch in batches)}


def _answering(model: DocToLoRA, m: Measurement) -> tuple[Callable[[], Stopwatch], dict]:
    adapter = None if m.mode == "no adapter" else adapter_of_length(model, m.length_tokens, m.seed)
    prompt = question_ids(model.tokenizer, needles.QUESTION)

    def run() -> Stopwatch:
        watch, chosen = Stopwatch(model.device), adapter
        if m.mode == "routed":
            (chosen,) = route(model, [needles.QUESTION], [adapter])
            watch.lap("choosing the block")
        with model.applied(chosen) as network:
            watch.lap("putting the adapter on")
            _generate(network, model, prompt)
            watch.lap("generating")
        return watch

    blocks, rank = (0, 0) if adapter is None else (len(adapter.blocks), adapter.rank)
    return run, {"blocks": blocks, "rank": rank, "prompt_tokens": len(prompt), "new_tokens": NEW_TOKENS}


def _in_context(model: DocToLoRA, m: Measurement) -> tuple[Callable[[], Stopwatch], dict]:
    text = distinct_text(model.tokenizer, m.length_tokens, m.seed)
    prompt = question_ids(model.tokenizer, f"{text}\n\n{needles.QUESTION}")

    def run() -> Stopwatch:
        watch = Stopwatch(model.device)
        with model.applied(None) as network:
            _generate(network, model, prompt)
            watch.lap("generating")
        return watch

    beyond = len(prompt) + NEW_TOKENS > model.window
    return run, {"prompt_tokens": len(prompt), "new_tokens": NEW_TOKENS, "beyond_window": beyond}


@torch.no_grad()
def _generate(network, model: DocToLoRA, prompt: list[int]) -> None:
    """NEW_TOKENS tokens after the prompt, whatever they are."""
    ids = torch.tensor([prompt], device=model.device)
    count = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    generate(network, model.tokenizer, ids, torch.ones_like(ids), **count)


def _together(model: DocToLoRA, m: Measurement) -> tuple[Callable[[], Stopwatch], dict]:
    rng = random.Random(f"speed/{m.seed}")
    texts = [world.draw_document(rng, "test", DOCUMENT_FACTS).text for _ in range(m.documents)]
    tokens = sum(len(ids) for ids in model.tokenizer(texts, add_special_tokens=False)["input_ids"])

    def run() -> Stopwatch:
        watch = Stopwatch(model.device)
        with watching(model, watch):
            model.internalize_each(texts)
        return watch

    return run, {"tokens": tokens, "facts": DOCUMENT_FACTS}


def _file(model: DocToLoRA, m: Measurement) -> tuple[Callable[[], Stopwatch], dict]:
    adapter = adapter_of_length(model, m.length_tokens, m.seed)
    folder = tempfile.TemporaryDirectory(prefix="d2l-speed-")
    path = adapter.save(Path(folder.name) / "adapter.safetensors")

    def run(folder=folder) -> Stopwatch:  # the folder is deleted along with this function
        watch = Stopwatch(model.device)
        if m.what == "save":
            adapter.save(path)
        else:
            Adapter.load(path)
        watch.lap(m.what)
        return watch

    return run, {
        "blocks": len(adapter.blocks),
        "adapter_mib": round(adapter.nbytes / 2**20, 3),
        "file_mib": round(path.stat().st_size / 2**20, 3),
    }


_PREPARE = {
    "internalize": _internalization,
    "floor": _floor,
    "answer": _answering,
    "in context": _in_context,
    "documents": _together,
    "save": _file,
    "load": _file,
}


def measure(
    m: Measurement,
    model: DocToLoRA | None = None,
    *,
    repeats: int = REPEATS,
    least: int = LEAST_REPEATS,
    budget_s: float = BUDGET_S,
) -> dict:
    """One row of a record, measured in this process (whose peak memory holds all that came before).

    After a short document (the first call sets up memory pools) the thing is done `repeats` times, or, when `budget_s`
    seconds are over, at least `least` times. Keys, besides those of `m`: status ("measured" or "out of memory"), n,
    seconds (median), seconds_low and seconds_high (quartiles), parts ({part: seconds} of the median run),
    peak_memory_mib, resting_memory_mib (with the model loaded, before), cpu_share (CPU seconds for each second and
    thread: well below 1 on the CPU means that others were at work on it), what was run on, and the model's sizes.
    model: what `build` gives, where it is at hand; its `iterative` is set by the measurement.
    """
    m = m.here()
    row = asdict(m)
    try:
        model = build(m) if model is None else model
        row |= where(m) | sizes(model)
        model.internalize_each([world.draw_document(random.Random(m.seed), "test", 2).text])
        run, facts = _PREPARE[m.what](model, m)
        reset_peak_memory()
        row["resting_memory_mib"] = round(peak_memory_mib(), 1)
        row |= facts
        watches, cpu, began = [], time.process_time(), time.perf_counter()
        while len(watches) < least or (len(watches) < repeats and time.perf_counter() - began < budget_s):
            watches.append(run())
        share = (time.process_time() - cpu) / (time.perf_counter() - began) / m.threads
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return row | {"status": "out of memory"}
    middle = sorted(watches, key=lambda watch: watch.seconds)[len(watches) // 2]
    low, median, high = np.quantile([watch.seconds for watch in watches], (0.25, 0.5, 0.75))
    return row | {
        "status": "measured",
        "n": len(watches),
        "seconds": round(float(median), 6),
        "seconds_low": round(float(low), 6),
        "seconds_high": round(float(high), 6),
        "parts": {part: round(seconds, 6) for part, seconds in middle.parts.items()},
        "peak_memory_mib": round(peak_memory_mib(), 1),
        "cpu_share": round(share, 3),
    }


NO_ROOM = (
    "can't allocate",
    "cannot allocate",
    "not enough",
    "out of",
)  # memory, in the words of torch and of the system


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory left, on a GPU or here."""
    said = str(error).lower()
    no_room = isinstance(error, RuntimeError) and any(f"{no} memory" in said for no in NO_ROOM)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or no_room


def where(m: Measurement) -> dict:
    """What a measurement ran on: device_name and versions."""
    name = torch.cuda.get_device_name(m.device) if m.device.startswith("cuda") else processor_name()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device_name": name, "python": platform.python_version()} | versions


def processor_name() -> str:
    """The CPU's name as the system gives it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def sizes(model: DocToLoRA) -> dict:
    """The shapes that a cost depends on: base_model, hypernetwork, and how a document is cut and batched."""
    base, config = model.base_model.config, model.config
    names = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "vocab_size")
    chosen = ("encoder_type", "latent_size", "rank", "n_latent_queries", "n_blocks", "modules")
    written = {name: getattr(config, name) for name in chosen}
    return {
        "base_model": {name: getattr(base, name, None) for name in names} | {"parameters": _count(model.base_model)},
        "hypernetwork": written
        | {"encoder_layers": model.encoder.n_layers_run, "parameters": _count(model.hypernetwork)},
        "chunk_tokens": model.chunk_tokens,
        "chunk_batch": model.chunk_batch,
        "batch_tokens": model.batch_tokens,
    }


def parameter_counts(recipe: str, layers: int | None = None) -> dict[str, int]:
    """Parameters of the base model and the hypernetwork at Gemma-2-2B's sizes."""
    with torch.device("meta"):
        base_model, hypernetwork = _random_parts(recipe, layers, None, torch.bfloat16)
    return {"base model": _count(base_model), "hypernetwork": _count(hypernetwork)}


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ------------------------------------------------------------------------------------------------ a process for each
def measure_alone(m: Measurement, *, limit_s: float = 600.0, memory_limit_mib: int | None = None, **options) -> dict:
    """`measure` in a process of its own, which is ended after `limit_s` seconds.

    memory_limit_mib: as much as it may allocate on the CPU beyond what it begins with (Linux; None: no limit). A
    process that the system ends for want of memory gives a row whose status says so, one that took too long "stopped
    after <limit> s". RuntimeError with its last words where it fails otherwise. options go to `measure`.
    """
    m = m.here()
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_and_send, args=(m, options, memory_limit_mib, sender), daemon=True)
    process.start()
    sender.close()
    try:
        said = receiver.recv() if receiver.poll(limit_s) else {"status": f"stopped after {limit_s:g} s"}
    except EOFError:
        process.join()
        if process.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"measuring {m} ended with exit status {process.exitcode}") from None
        said = {"status": "out of memory", "killed": True}
    finally:
        process.kill()
        process.join()
    if "error" in said:
        raise RuntimeError(f"measuring {m} failed:\n{said['error']}")
    return asdict(m) | where(m) | said


def _measure_and_send(m: Measurement, options: dict, memory_limit_mib: int | None, sender) -> None:
    """What the process of one measurement does."""
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
    """Let this process allocate so much more than it has now."""
    import resource  # not on Windows

    (held,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:")]
    resource.setrlimit(resource.RLIMIT_DATA, (int(held.split()[1]) * 1024 + mib * 2**20,) * 2)


def record(
    measurements: Sequence[Measurement], rows: Sequence[dict] = (), *, again: bool = False, **options
) -> Iterator[list[dict]]:
    """The rows of a record after each of the measurements that it lacks, one after another.

    again: rows of the same models and depths on the same device are dropped first. options go to `measure_alone`.
    """
    wanted, rows = [m.here() for m in measurements], list(rows)
    if again:
        replaced = {(m.model, m.layers, m.device) for m in wanted}
        rows = [row for row in rows if (row["model"], row["layers"], row["device"]) not in replaced]
    present = {measurement_of(row) for row in rows}
    missing = [m for m in dict.fromkeys(wanted) if m not in present]
    for done, m in enumerate(missing, 1):
        began = time.perf_counter()
        row = measure_alone(m, **options)
        rows.append(row | {"spent_s": round(time.perf_counter() - began, 1)})
        result = f"{row['seconds']:.4f} s" if row["status"] == "measured" else row["status"]
        print(f"{done} of {len(missing)}: {m}: {result}", flush=True)
        yield rows


def measurement_of(row: dict) -> Measurement:
    """The measurement that a row of a record is the result of."""
    return Measurement(**{name: row[name] for name in Measurement.__dataclass_fields__})


def read_records(name: str) -> pd.DataFrame:
    """All rows recorded for "tiny" or "gemma"; FileNotFoundError says which command makes them."""
    path = record_path(f"speed_{name}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: d2l study speed-{name} records it")
    return pd.DataFrame(read_rows(path))


# ---------------------------------------------------------------------------------------------------------- the tables
METHODS = {
    ("internalize", "batched"): "internalize",
    ("internalize", "iterative"): "internalize, layer by layer",
    ("floor", ""): "floor: one pass of the encoder",
    ("answer", "all blocks"): "answer, all blocks",
    ("answer", "routed"): "answer, one block of all (routed)",
    ("answer", "no adapter"): "floor: the question alone",
    ("in context", ""): "answer, document in the prompt",
}


def cost_table(rows: pd.DataFrame, whats: Sequence[str]) -> pd.DataFrame:
    """What `plots.plot_cost_by_length` reads, out of the rows of a record that are of these `whats`.

    Columns: panel (model, and where it ran), method, length_tokens, seconds, seconds_low, seconds_high, memory_mib, n,
    floor (bool), seed. Rows that ran out of memory have NaN there. A question without an adapter is a floor at every
    length that is answered.
    """
    chosen = rows[rows["what"].isin(check_texts(whats, "measurements"))].copy()
    chosen["panel"] = [panel_of(row) for row in chosen.to_dict("records")]
    chosen["method"] = [METHODS[key] for key in zip(chosen["what"], chosen["mode"], strict=True)]
    chosen["floor"] = chosen["method"].str.startswith("floor")
    alone = chosen[chosen["mode"] == "no adapter"].drop(columns="length_tokens")
    with_document = chosen[chosen["mode"] != "no adapter"]
    lengths = with_document.loc[with_document["what"] == "answer", ["panel", "length_tokens"]].drop_duplicates()
    table = pd.concat([with_document, alone.merge(lengths, on="panel")], ignore_index=True)
    table = table.rename(columns={"peak_memory_mib": "memory_mib"})
    columns = ["panel", "method", "length_tokens", "seconds", "seconds_low", "seconds_high", "memory_mib", "n", "floor"]
    return table[[*columns, "seed"]]


def memory_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The same of internalizing, with the floor of memory: the model at rest and, on the CPU, the adapter itself."""
    internalized = rows[(rows["what"] == "internalize") & (rows["status"] == "measured")]
    least = internalized[internalized["mode"] == "batched"].copy()
    held = least["adapter_mib"].where(~least["device"].str.startswith("cuda"), 0.0)
    least["peak_memory_mib"] = least["resting_memory_mib"] + held
    floor = cost_table(least, ["internalize"]).assign(method="floor: the model and the adapter", floor=True)
    return pd.concat([cost_table(rows, ["internalize"]), floor], ignore_index=True)


def panel_of(row: dict) -> str:
    """What a panel of a figure is called."""
    if not row["model"].startswith("gemma"):
        return row["model"]
    name, recipe = row["model"].split("/")
    place = "CPU" if row["device"] == "cpu" else row["device_name"]
    return f"{name}, {recipe}: {layers_of(row)} layers, {row['dtype']}, {place}"


def layers_of(row: dict) -> int:
    """Base layers of a row of Gemma-2-2B's sizes."""
    return GEMMA_2_2B["num_hidden_layers"] if pd.isna(row["layers"]) else int(row["layers"])


def parts_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Seconds by part of internalizing, all layers at once: panel, length_tokens, part, seconds, n, seed."""
    chosen = rows[(rows["what"] == "internalize") & (rows["mode"] == "batched") & (rows["status"] == "measured")]
    return pd.DataFrame(
        [
            {"panel": panel_of(row), "part": part, "seconds": row["parts"].get(part, 0.0)}
            | {name: row[name] for name in ("length_tokens", "n", "seed")}
            for row in chosen.sort_values("length_tokens", kind="stable").to_dict("records")
            for part in PARTS
        ]
    )


# --------------------------------------------------------------------------------------------- operations, not seconds
def operations(recipe: str, layers: int | None = None, tokens: int = CHUNK_TOKENS) -> pd.DataFrame:
    """Floating-point operations for each document token at Gemma-2-2B's sizes, counted without computing anything.

    Columns: part (encoder, Perceiver, head, all layers), gflop_per_token (billions; one multiplication and one addition
    are two). One chunk of `tokens` tokens is read; "all layers" is the base model with the chunk in its prompt, its
    language-model head for the last token alone.
    """
    check_count(tokens, "tokens")
    with torch.device("meta"):
        base_model, hypernetwork = _random_parts(recipe, layers, None, torch.bfloat16)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        mask = torch.ones_like(ids)
    encoder = ContextEncoder.from_config(base_model, hypernetwork.config)
    found = {}
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            features = encoder.encode(ids, attention_mask=mask)
        found["encoder"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            embedding = hypernetwork.aggregator(features.float(), None)
        found["Perceiver"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            for residual in hypernetwork.layers:
                embedding = residual(embedding)
            hypernetwork.head(F.normalize(embedding, dim=-1))
        found["head"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            base_model(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        found["all layers"] = counter.get_total_flops()
    return pd.DataFrame([{"part": part, "gflop_per_token": count / tokens / 1e9} for part, count in found.items()])


# -------------------------------------------------------------------------------------------------------- the commands
TINY_LENGTHS = (1024, 8192, 32_768, 131_072)
QA_LENGTHS = (1024, 8192)
IN_CONTEXT_LENGTHS = (512, 1024, 2048, 4096, 8192)
DOCUMENTS = (1, 2, 4, 8, 16, 32)
GEMMA_LENGTHS = {"cpu": (1024, 2048), "gpu": tuple(2**k for k in range(10, 18))}
GEMMA_ON_CPU = {"layers": 2, "vocabulary": 4096, "dtype": "bfloat16"}


def tiny_measurements(seed: int = 0, lengths: Sequence[int] | None = None) -> list[Measurement]:
    """What is measured of the bundled models; lengths replaces every list of lengths."""
    found = []
    for model, of_model in (("tiny", TINY_LENGTHS), ("tiny/qa", QA_LENGTHS)):
        of_model = of_model if lengths is None else lengths
        found.append(Measurement("answer", model, mode="no adapter", seed=seed))
        for length in of_model:
            found += [Measurement("internalize", model, length, mode, seed=seed) for mode in MODES["internalize"]]
            found += [Measurement("answer", model, length, mode, seed=seed) for mode in ("all blocks", "routed")]
            found += [Measurement(what, model, length, seed=seed) for what in ("floor", "save", "load")]
        found += [Measurement("documents", model, documents=count, seed=seed) for count in DOCUMENTS]
    found += [Measurement("in context", "tiny", length, seed=seed) for length in lengths or IN_CONTEXT_LENGTHS]
    return found


def gemma_measurements(
    lengths: Sequence[int] | None = None,
    layers: int | None = None,
    vocabulary: int | None = None,
    dtype: str | None = None,
    seed: int = 0,
) -> list[Measurement]:
    """What is measured at Gemma-2-2B's sizes; None is everything on a GPU, GEMMA_ON_CPU and a few lengths on a CPU."""
    on_cpu = default_device().type == "cpu"
    given = {"layers": layers, "vocabulary": vocabulary, "dtype": dtype}
    options = {
        name: (GEMMA_ON_CPU[name] if on_cpu else None) if value is None else value for name, value in given.items()
    }
    lengths = GEMMA_LENGTHS["cpu" if on_cpu else "gpu"] if lengths is None else lengths
    found = []
    for recipe in RECIPES:
        model = f"gemma-2-2b/{recipe}"
        for length in lengths:
            found += [Measurement("internalize", model, length, mode) for mode in MODES["internalize"]]
            found.append(Measurement("floor", model, length))
    # a question costs the same whichever recipe wrote the blocks
    found.append(Measurement("answer", "gemma-2-2b/needle", mode="no adapter"))
    for length in lengths:
        found += [Measurement("answer", "gemma-2-2b/needle", length, mode) for mode in ("all blocks", "routed")]
        found.append(Measurement("in context", "gemma-2-2b/needle", length))
    return [replace(m, seed=seed, **options) for m in found]


def run_tiny(n: int, seed: int, lengths: Sequence[int] | None, **limits) -> Iterator[list[dict]]:
    """The record of the bundled models; times mean something only where nothing else uses the cores."""
    return _recorded("tiny", tiny_measurements(seed, lengths), n, **limits)


def run_gemma(
    n: int,
    seed: int,
    lengths: Sequence[int] | None,
    layers: int | None,
    vocabulary: int | None,
    dtype: str | None,
    **limits,
) -> Iterator[list[dict]]:
    """The record at Gemma-2-2B's sizes."""
    return _recorded("gemma", gemma_measurements(lengths, layers, vocabulary, dtype, seed), n, **limits)


def _recorded(
    name: str, plan: Sequence[Measurement], n: int, *, limit: float, memory_limit: int | None, again: bool
) -> Iterator[list[dict]]:
    path = record_path(f"speed_{name}")
    limits = {"repeats": n, "least": min(LEAST_REPEATS, n), "limit_s": limit, "memory_limit_mib": memory_limit}
    return record(plan, read_rows(path) if path.is_file() else [], again=again, **limits)
