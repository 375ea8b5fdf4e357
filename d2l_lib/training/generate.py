"""The command `generate`: self-generated data as shards. `selfgen` does the work; nothing here imports torch."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from d2l_lib.training.processes import process_index, processes
from d2l_lib.training.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command `generate`."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards; a run that was killed continues")
    parser.add_argument("--model", default="tiny", help="base model: bundled name, folder or hub id")
    parser.add_argument("--source", default="world", help="world, a folder of .txt and .md files, or a .jsonl file")
    parser.add_argument("--writer", help="model that writes the questions on texts (default: the base model)")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--worker", type="count or none", default=process_index(), help="of this process, from 0")
    parser.add_argument("--workers", type="count", default=processes(), help="how many there are")
    for setting in fields(Settings):
        flag, kind = "--" + setting.name.replace("_", "-"), type(setting.default)
        kind = "seed" if setting.name == "seed" else kind
        whatever = " (default: all, or 1000 of the world)" if setting.name == "documents" else f" ({setting.default})"
        parser.add_argument(flag, type=kind, default=None, help=setting.metadata["help"] + whatever)


def run(a: argparse.Namespace) -> None:
    """Write questions on documents, and the base model's answers with the document in its prompt, as parquet shards."""
    from d2l_lib.training import selfgen  # torch and transformers: not for --help

    given = {s.name: getattr(a, s.name) for s in fields(Settings) if getattr(a, s.name) is not None}
    of_texts, of_world = (
        {"writer", "writer_style", "writer_max_new_tokens", "writer_temperature"},
        {"shortest", "longest", "split"},
    )
    flags_given = {*given} | ({"writer"} if a.writer else set())
    if wrong := sorted(flags_given & (of_texts if a.source == "world" else of_world)):
        flags = ", ".join("--" + name.replace("_", "-") for name in wrong)
        a.error(f"{flags} has no meaning with --source {a.source}")
    texts = None if a.source == "world" else selfgen.read_texts(a.source)
    settings = Settings(**({} if texts is None else {"documents": len(texts)}) | given)
    two_models = a.writer is not None and a.writer != a.model
    share = 0.45 if two_models else 0.9
    teacher = selfgen.load_engine(a.engine, a.model, settings.batch_tokens, share)
    writer = selfgen.load_engine(a.engine, a.writer, settings.batch_tokens, share) if two_models else None
    manifest = selfgen.generate(settings, a.out, teacher, texts, writer, worker=a.worker, workers=a.workers)
    if manifest is not None:
        totals = "  ".join(f"{name} {n}" for name, n in manifest["totals"].items() if n)
        print(f"{a.out}: {manifest['n_shards']} shards are complete: {totals}")
