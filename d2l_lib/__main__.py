"""The one command, `d2l` (also `python -m d2l_lib`, and under torchrun).

A command is a pair of functions: `add_arguments(parser)` and `run(options)`. Those of `ask`, `internalize` and
`convert` stand here, the others in the module that does the work, imported on demand.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from d2l_lib.formats.writing import check_replaceable, write_failure

MOST = 2**40  # of any count on a command line
LARGEST_SEED = 2**32 - 1  # every generator of random numbers takes it

# Name -> (module, what it does); "" is this file. Modules import torch in `run` only, so --help is quick.
COMMANDS = {
    "ask": ("", "a question about documents (.txt, .md, .html, .pdf), answered from an adapter"),
    "internalize": ("", "documents as an adapter in a file"),
    "cache": ("", "what is kept of internalized documents: number, size, place; --clear deletes it"),
    "train": ("training.command", "remake what is bundled, or train for a base model of your own"),
    "generate": ("training.generate", "questions on documents, answered by a base model: data to train on"),
    "corpora": ("training.corpora", "size | write | download: data sets of documents"),
    "study": ("studies", "a measurement that data/full_runs records; `d2l study list` names all"),
    "watch": ("studies.watch", "score the checkpoints of a training as they appear"),
    "slurm": ("training.slurm", "print a script that trains on a cluster"),
    "convert": ("", "published checkpoint to folder, or folder to published checkpoint"),
    "notebooks": ("studies.notebooks", "run all notebooks in order, and print the table of figures"),
}
HELP = "\n".join(
    [
        "usage: d2l COMMAND ...        (d2l COMMAND --help says more)",
        "",
        "Doc-to-LoRA: turn documents into low-rank adapters of a language model, and ask.",
        "",
        *(f"  {name:<12} {about}" for name, (_, about) in COMMANDS.items()),
        "",
        '  d2l ask notes.md "Who founded the mill?"',
        "  d2l internalize notes.md report.pdf -o adapter.safetensors",
    ]
)


# ---------------------------------------------------------------------------------------------------------- the parser
class Parser(argparse.ArgumentParser):
    """argparse's parser, with one line and status 2 for wrong options, and four more types of numbers.

    `type=` may be "count" (a whole number of at least 1), "count or none" (at least 0), "seed" or "positive".
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        for name, read in KINDS.items():
            self.register("type", name, read)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see --help)\n")


def _whole(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        number = int(text) if re.fullmatch(r"[+-]?[0-9]{1,40}", text) else None
        if number is None or not least <= number <= most:
            raise argparse.ArgumentTypeError(f"a whole number from {least} to {most} is expected, not {text[:40]!r}")
        return number

    return read


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"a number above 0 is expected, not {text[:40]!r}")
    return number


KINDS = {
    "count": _whole(1, MOST),
    "count or none": _whole(0, MOST),
    "seed": _whole(0, LARGEST_SEED),
    "positive": _positive,
}


def parse(words: Sequence[str]) -> tuple[Callable[[argparse.Namespace], int | None], argparse.Namespace]:
    """(`run` of the command, its options) for a command line without its first word.

    The options also hold the command line (`command`) and the parser's `error`. Wrong options exit with status 2.
    """
    name, *rest = words
    if name not in COMMANDS:
        Parser(prog="d2l").error(f"there is no command {name[:40]!r}; there are {', '.join(COMMANDS)}")
    module, about = COMMANDS[name]
    parser = Parser(prog=f"d2l {name}", description=f"{about[0].upper()}{about[1:]}.")
    if module:
        home = importlib.import_module(f"d2l_lib.{module}")
        add_arguments, run = home.add_arguments, home.run
    else:
        add_arguments, run = _HERE[name]
    add_arguments(parser)
    if "" in rest:
        parser.error("an argument is empty (''): give a name, or leave its option out")
    a = parser.parse_args(rest) if module else parser.parse_intermixed_args(rest)
    a.command, a.error = shlex.join(["d2l", *words]), parser.error
    return run, a


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of the command line: 2 for wrong options, else as of the command or of `one_line_errors`."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        return 0 if words else 2
    run, a = parse(words)
    with one_line_errors(f"d2l {words[0]}"):
        return run(a) or 0


@contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Inside the `with` block, bad input, a failed write and Ctrl-C end the command with one line and a status.

    OSError, ValueError, ImportError, FloatingPointError and failed writes of other libraries: status 1, and
    "command: reason" on stderr. KeyboardInterrupt: status 130. Any other error is a bug and keeps its traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"{command}: stopped; files that were finished are kept", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        failure = write_failure(error)
        if isinstance(error, OSError) and error.strerror and error.filename is not None:
            line = f"{error.filename}: {error.strerror}"
        elif isinstance(error, (OSError, ValueError, ImportError, FloatingPointError)):
            line = str(error) or type(error).__name__
        elif failure is not None:
            line = f"{failure.strerror}: {failure.filename}" if failure.filename else f"{failure.strerror} ({error})"
        else:
            raise
        stop = SystemExit(f"{command}: {' '.join(line.split())}")
        print(stop, file=sys.stderr)
        stop.code = 1
        raise stop from error


# --------------------------------------------------------------------------------------------------- ask, internalize
def _add_document_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny/qa", help="bundled name, folder, or hub id (default: tiny/qa)")
    parser.add_argument("--chunk-tokens", type="count", help="longest chunk (default: the model's own)")
    parser.add_argument("--no-cache", action="store_true", help="internalize anew, and keep nothing (see d2l cache)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with seconds by part")
    parser.add_argument("--quiet", action="store_true", help="say nothing on the way")


def _ask_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help=".txt, .md, .html, .pdf (with the extra pdf), ...")
    parser.add_argument("question")
    parser.add_argument(
        "--blocks",
        type="count",
        help="so many blocks answer, those most relevant to the question (default: 1 where the model has a threshold "
        "for it, else all)",
    )
    parser.add_argument("--all-blocks", action="store_true", help="all blocks answer")
    _add_document_arguments(parser)


def _internalize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help=".txt, .md, .html, .pdf (with the extra pdf), ...")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the adapter's file (.safetensors)")
    _add_document_arguments(parser)


class _Steps:
    """Prints each step to stderr, and keeps the seconds of each part."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str, line: str) -> Iterator[None]:
        if not self.quiet:
            print(f"{line} ...", file=sys.stderr, flush=True)
        began = time.perf_counter()
        yield
        self.seconds[part] = round(time.perf_counter() - began, 3)


def _read_and_internalize(a: argparse.Namespace, steps: _Steps):
    """(model, adapter) of the files, which are read before the slow imports: a wrong name fails at once."""
    from d2l_lib.documents import name_documents

    with steps("read", f"reading {len(a.files)} file{'s' if len(a.files) > 1 else ''}"):
        texts = name_documents([Path(file) for file in a.files])
    with steps("import", "importing torch and transformers"):
        from transformers.utils import logging

        from d2l_lib.cache import AdapterCache
        from d2l_lib.loading import load
    logging.disable_progress_bar()
    with steps("load", f"loading {a.model}"):
        model = load(a.model)
        model.cache = None if a.no_cache else AdapterCache()
    with steps("internalize", f"internalizing {sum(map(len, texts.values())):,} characters"):
        adapter = model.internalize(texts, chunk_tokens=a.chunk_tokens, progress=not a.quiet)
    if not a.quiet:
        _warn(model, texts, "" if a.model.startswith("smollm2") else "; --model smollm2 knows plain English")
    return model, adapter


def _warn(model, texts: dict[str, str], advice: str) -> None:
    """Say on stderr which texts are strange to the model, with the reason."""
    from d2l_lib.analysis.familiarity import familiarity

    for name, text in texts.items():
        familiar = familiarity(model.base_model, model.tokenizer, text)
        if familiar is not None and familiar.is_strange:
            print(f"{name}: {familiar.warning()}{advice}", file=sys.stderr, flush=True)


def _ask(a: argparse.Namespace) -> None:
    from d2l_lib.documents import is_name_of_file

    if is_name_of_file(a.question):
        a.error(f"the question comes last, behind the files; {a.question[:40]!r} is a file")
    if not a.question.strip():
        a.error("the question is blank")
    steps = _Steps(a.quiet)
    model, adapter = _read_and_internalize(a, steps)
    blocks = None if a.all_blocks else a.blocks or (1 if model.least_relevance > -math.inf else None)
    with steps("answer", f"asking {'all' if blocks is None else blocks} of {len(adapter.blocks)} blocks"):
        answer = model.answer(a.question, adapter, blocks=blocks)
    if not a.json:
        print(answer)
        return
    facts = {"answer": answer, "question": a.question, "documents": a.files, "model": a.model}
    print(json.dumps(facts | {"blocks": len(adapter.blocks), "answering": blocks, "seconds": steps.seconds}))


def _internalize(a: argparse.Namespace) -> None:
    check_replaceable(a.output)
    steps = _Steps(a.quiet)
    _, adapter = _read_and_internalize(a, steps)
    with steps("save", f"writing {a.output}"):
        path = adapter.save(a.output)
    if not a.json:
        print(path)
        return
    facts = {"adapter": str(path), "documents": a.files, "model": a.model, "blocks": len(adapter.blocks)}
    print(json.dumps(facts | {"rank": adapter.rank, "bytes": path.stat().st_size, "seconds": steps.seconds}))


# -------------------------------------------------------------------------------------------------------------- cache
def _cache_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clear", action="store_true", help="delete the kept adapters; other files stay")


def _cache(a: argparse.Namespace) -> None:
    from d2l_lib.cache import AdapterCache

    cache = AdapterCache()
    if a.clear:
        print(f"deleted {cache.clear()} adapters in {cache.folder}")
        return
    files = cache.files()
    size, most = sum(file.n_bytes for file in files) / 1e6, cache.limit_bytes / 1e6
    print(f"{len(files)} adapters, {size:,.1f} MB of at most {most:,.0f} MB, in {cache.folder}")


# ------------------------------------------------------------------------------------------------------------ convert
def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a pytorch_model.bin, or a folder with hypernetwork.safetensors")
    parser.add_argument("target", help="the folder, or the *.bin, to write")
    parser.add_argument("--base-model", help="store this name or path instead of the source's")


def _convert(a: argparse.Namespace) -> None:
    from d2l_lib.formats.checkpoints import convert

    print(convert(a.source, a.target, a.base_model))


_HERE = {
    "ask": (_ask_arguments, _ask),
    "internalize": (_internalize_arguments, _internalize),
    "cache": (_cache_arguments, _cache),
    "convert": (_convert_arguments, _convert),
}

if __name__ == "__main__":
    sys.exit(main())
