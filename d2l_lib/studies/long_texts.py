"""Long texts: tokens a second, memory, and the same text again from the cache of adapters.

Each text is internalized in a process of its own, with a cache in an empty folder, and again in another process.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import pandas as pd
import torch

from d2l_lib.cache import AdapterCache
from d2l_lib.loading import load
from d2l_lib.model import DocToLoRA
from d2l_lib.studies import earlier_rows, recorded_rows
from d2l_lib.studies.measurements import own_processes, processor_name
from d2l_lib.studies.watches import growth_of_peak_mib, peak_of_process_mib
from d2l_lib.training.selfgen import read_texts

MB = 10**6
_LIMIT_BYTES = 64 * 10**9  # of the cache
_MIB = 2**20
_LONGEST_TOKEN = 8  # characters, in the mean
_FIRST = "Ada lives in Velm. She mends clocks there. Bo lives in Arn."  # sets up memory pools


def run(
    n: int, seed: int, models: Sequence[str], texts: str, tokens: Sequence[int], megabytes: Sequence[int]
) -> Iterator[list[dict]]:
    """After each text all rows so far: a row for each model and length; recorded rows of others stay.

    n: how often the same text is read again, each time in a new process. seed: nothing is drawn.
    models: what `d2l.load` takes. texts: a folder of .txt files, or a .jsonl file, put one after another.
    tokens, megabytes: lengths, of a model's tokens and of UTF-8.

    Columns: model, length (as it was asked for), tokens, bytes, chunks, seconds (of internalizing and writing the
    file), cpu_seconds, tokens_per_second, peak_mb (of the process), growth_mb (of that, above the model at rest),
    adapter_mb (its tensors, in half precision), beyond_adapter_mb (peak_mb - adapter_mb), file_mb, and for the run of
    median seconds of those that read it again: again_seconds, again_cpu_seconds, again_peak_mb and again_growth_mb. 1
    MB is a million bytes.
    """
    whole = "\n\n".join(read_texts(texts))
    lengths = [f"{count:,} tokens" for count in tokens] + [f"{count} MB" for count in megabytes]
    rows = [row for row in earlier_rows("long_texts") if row["model"] not in models or row["length"] not in lengths]
    for model in models:
        for length in lengths:
            rows.append(_measured(model, length, whole, n))
            print({name: rows[-1][name] for name in ("model", "length", "seconds", "peak_mb")}, flush=True)
            yield rows


def read_record() -> pd.DataFrame:
    """All recorded rows; FileNotFoundError says which command makes them."""
    return pd.DataFrame(recorded_rows("long_texts", "d2l study long-texts"))


def _measured(model: str, length: str, whole: str, n: int) -> dict:
    """The row of one text."""
    with tempfile.TemporaryDirectory(prefix="d2l-long-texts-") as folder:
        text = _alone(_cut, model, length, whole)
        row = {"model": model, "length": length} | _alone(_first_run, model, text, folder)
        later = [_alone(_second_run, model, text, folder) for _ in range(n)]
    again = sorted(later, key=lambda one: one["seconds"])[n // 2]
    more = {f"again_{name}": value for name, value in again.items()} | {"n": n}
    return row | more | {"device_name": processor_name()}


def _alone(what: Callable[..., dict], *arguments: str) -> dict:
    """The result of a function in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=own_processes()) as process:
        return process.submit(what, torch.get_num_threads(), *arguments).result()


def _cut(_: int, name: str, length: str, whole: str) -> str:
    """The beginning of a text, of this length."""
    count, unit = length.replace(",", "").split()
    if unit == "MB":
        return whole.encode()[: int(count) * MB].decode(errors="ignore")
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    ends = load(name).encoder_tokenizer(whole[: _LONGEST_TOKEN * int(count)], **options)["offset_mapping"]
    return whole[: ends[int(count) - 1][1]]


def _prepared(threads: int, name: str, folder: str) -> DocToLoRA:
    """The model, which has read something short, with half precision and a cache."""
    torch.set_num_threads(threads)
    model = load(name)
    model.block_dtype = torch.float16
    model.internalize(_FIRST)
    model.cache = AdapterCache(folder, limit_bytes=_LIMIT_BYTES)
    return model


def _internalize(model: DocToLoRA, text: str) -> dict:
    """Seconds, of the processor too, and memory."""
    costs = {}

    def internalize() -> None:
        began, cpu = time.perf_counter(), time.process_time()
        model.internalize(text)
        costs["seconds"], costs["cpu_seconds"] = time.perf_counter() - began, time.process_time() - cpu

    growth, peak = growth_of_peak_mib(internalize), peak_of_process_mib()
    costs = {name: round(value, 3) for name, value in costs.items()}
    return costs | {"peak_mb": round(peak * _MIB / MB, 1), "growth_mb": round(growth * _MIB / MB, 1)}


def _first_run(threads: int, name: str, text: str, folder: str) -> dict:
    """What it costs to internalize a text, and to write the file of the cache."""
    model = _prepared(threads, name, folder)
    costs = _internalize(model, text)
    size = model.current.nbytes / MB
    tokens = len(model.encoder_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    (file,) = model.cache.files()
    return {
        "tokens": tokens,
        "bytes": len(text.encode()),
        "chunks": len(model.current.blocks),
        "tokens_per_second": round(tokens / costs["seconds"], 1),
        **costs,
        "adapter_mb": round(size, 1),
        "beyond_adapter_mb": round(costs["peak_mb"] - size, 1),
        "file_mb": round(file.n_bytes / MB, 1),
    }


def _second_run(threads: int, name: str, text: str, folder: str) -> dict:
    """What it costs to internalize a text that the cache holds."""
    return _internalize(_prepared(threads, name, folder), text)
