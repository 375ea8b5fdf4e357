"""Execute the project's notebooks again and write their claims to data/RESULTS.md: `make notebooks`.

    d2l notebooks                     # all of them
    d2l notebooks 3 06_trace_a_fact   # some, by number or name

Each notebook runs in a process of its own through nbconvert, in `notebooks/`, and replaces the committed page only
after a complete run. Two run at a time, except those that measure time; no notebook needs another's files. A notebook
that hangs (not one that fails) is started once more, and the run says so.
"""

import argparse
import ast
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from d2l_lib.documents import check_texts, some_of
from d2l_lib.formats.writing import write_atomic
from d2l_lib.records import project_root, read_rows

_CELL_TIMEOUT_S = 300
_NOTEBOOK_TIMEOUT_S = 420
_TIMED = ("03", "07")  # pages that measure seconds: nothing runs beside them
# The command, without a grammar of web addresses that no notebook is checked by: it takes three seconds of a core.
NBCONVERT = (
    sys.executable,
    "-c",
    "import sys; sys.modules['rfc3987_syntax'] = None; from nbconvert.nbconvertapp import main; main()",
)
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
_MARKS = {True: "✓", False: "✗", None: ""}
_ABOUT_RESULTS = """# Results

`d2l notebooks` writes this page from what the notebooks record. Figures of page 09, and those of page 06
that say "real text", are of SmolLM2-135M-Instruct and its bundled hypernetwork. All others are of the bundled models on
the generated world: a base model of 2.3 M parameters, and a hypernetwork of 2.2 M for needles or of 3.4 M for questions
about documents. Aims are this project's own; ✓ met, ✗ missed.

- *In context*: the base model answers with the document in its prompt.
- *All blocks*: the whole adapter answers. *Routed*: only the block that the router chooses, or none (page 08: the most
  relevant of all, by trial).
- *Read sparsely in one pass*: at each token of the answer the block that matches adds its part.
- *Three trainings*: mean and range over three trainings, from three seeds, of the router (routed) or of the null block
  (read sparsely); the other blocks are the same.
- *Share of one*: exact match with many documents in one adapter, divided by that with one document in it.
- *Encyclopedia*: facts that the base model learned by heart. *Gate*: the rule that keeps a document out of an answer.
- n: questions, haystacks or documents. Seeds and commands stand in `data/results` and `data/full_runs`.
"""
WIDGET_PLACEHOLDER = "(interactive viewer: run this cell to use it)"


class NotebookFailed(RuntimeError):
    """A notebook did not run to its end; the message names it and shows the end of nbconvert's output."""


def list_notebooks(folder: Path) -> list[Path]:
    """The notebooks of `folder` by their numbers."""
    return sorted(folder.glob("[0-9][0-9]_*.ipynb"))


def inject_parameters(notebook: dict, values: dict) -> dict:
    """A copy of `notebook` whose cell tagged `parameters` assigns `values` instead of its own.

    The cell must already assign every name, once and alone on its line. KeyError names an unknown name and the known
    ones: a renamed parameter cannot silently keep its old value.
    """
    copy = json.loads(json.dumps(notebook))
    tagged = [cell for cell in copy["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"expected one cell tagged 'parameters', found {len(tagged)}")
    lines = "".join(tagged[0]["source"]).splitlines()
    line_of = {line.split("=")[0].strip(): i for i, line in enumerate(lines) if "=" in line and line[0].isalpha()}
    for name, value in values.items():
        if name not in line_of:
            raise KeyError(f"the parameters cell does not assign {name!r}; it assigns {sorted(line_of)}")
        lines[line_of[name]] = f"{name} = {value!r}"
    source = "\n".join(lines)
    try:
        ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"the parameters cell is no Python any more ({error}): keep each value on one line") from error
    tagged[0]["source"] = source
    return copy


def without_widget_state(notebook: dict) -> dict:
    """A copy of `notebook` without the widgets' random model ids, which mean nothing without their kernel.

    A viewer keeps its plain form, or becomes a short note if it has none. Progress bars are dropped.
    """
    copy = json.loads(json.dumps(notebook))
    copy["metadata"].pop("widgets", None)
    for cell in copy["cells"]:
        if "outputs" in cell:
            cell["outputs"] = [output for output in cell["outputs"] if not _is_progress_bar(output)]
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if data.pop(WIDGET_MIME, None) is not None:
                data["text/plain"] = WIDGET_PLACEHOLDER
    return copy


def _is_progress_bar(output: dict) -> bool:
    """Whether an output is tqdm's widget, whose plain form reads like '  0%|   | 0/29 [00:00<?, ?it/s]'."""
    data = output.get("data", {})
    return WIDGET_MIME in data and "%|" in "".join(data.get("text/plain", ""))


def execute(
    path: Path,
    executed_folder: Path,
    timeout_s: float = _NOTEBOOK_TIMEOUT_S,
    environment: Mapping[str, str] | None = None,
) -> Path:
    """The path of an executed copy of the notebook `path` in `executed_folder`; `path` itself stays unchanged.

    environment: variables for it, on top of those of this process.

    NotebookFailed if a cell raises, or if the notebook hangs or its kernel dies twice in a row.
    """
    return asyncio.run(_execute(path, executed_folder, timeout_s, environment))


async def _execute(
    path: Path, executed_folder: Path, timeout_s: float, environment: Mapping[str, str] | None = None
) -> Path:
    path, executed_folder = path.resolve(), executed_folder.resolve()
    executed_folder.mkdir(parents=True, exist_ok=True)
    command = [
        *(*NBCONVERT, "--to", "notebook", "--execute", "--log-level=WARN"),
        *("--output-dir", str(executed_folder), "--output", path.name),
        f"--ExecutePreprocessor.timeout={_CELL_TIMEOUT_S}",
        "--ExecutePreprocessor.record_timing=False",
        "--ExecutePreprocessor.store_widget_state=False",
        str(path),
    ]
    printed = ""
    for attempt in ("first", "second"):
        returncode, printed = await _run_and_wait(command, path.parent, timeout_s, environment)
        if returncode == 0:
            return executed_folder / path.name
        if "CellExecutionError" in printed:
            break
        if attempt == "first":
            reason = (
                f"gave no answer within {timeout_s:.0f} s" if returncode is None else "stopped without a cell failing"
            )
            print(f"  {path.name} {reason}; trying once more", flush=True)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed)
    raise NotebookFailed(f"{path.name} did not run to its end:\n{plain[-4000:]}")


async def _run_and_wait(
    command: list[str], folder: Path, timeout_s: float, environment: Mapping[str, str] | None
) -> tuple[int | None, str]:
    """(exit status, output) of `command`; status None if it was ended after `timeout_s`."""
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            returncode = await asyncio.wait_for(process.wait(), timeout_s)
        except TimeoutError:
            returncode = None
        finally:  # also where another page failed, or a person stopped the command
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        log.seek(0)
        return returncode, log.read().decode(errors="replace")


def headline_rows(results_folder: Path) -> list[dict]:
    """Every claim that the notebooks recorded (see `records.claim`), with the notebook's name and a tick or a cross.

    Columns: claim, figure, aim, met (✓, ✗, or empty if no aim decides), notebook.
    """
    rows = []
    for path in sorted(results_folder.glob("*.jsonl")):
        for row in read_rows(path):
            if "claim" in row:
                rows.append(row | {"met": _MARKS[row.get("met")], "notebook": path.stem})
    return rows


def format_table(rows: list[dict], columns: Sequence[str] = ("claim", "figure", "aim", "met", "notebook")) -> str:
    """The rows as a Markdown table, columns padded to their widest cell."""
    cells = [[str(row.get(column, "")).replace("|", "\\|") for column in columns] for row in rows]
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    lines = [list(columns), ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def results_page(rows: list[dict]) -> str:
    """The text of data/RESULTS.md: every claim of every notebook, whether it meets its aim or not."""
    return f"{_ABOUT_RESULTS}\n{format_table(rows)}\n"


def choose_notebooks(pages: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """The `pages` of these numbers ("3", "03") or names, in reading order; without names all of them."""
    by_name = {name: page for page in pages for name in (page.name, page.stem, page.name[:2], str(int(page.name[:2])))}
    if unknown := [name for name in check_texts(names, "notebooks") if Path(name).name not in by_name]:
        raise ValueError(f"no notebook {some_of(unknown, quoted=True)}; there are {', '.join(p.stem for p in pages)}")
    chosen = {by_name[Path(name).name] for name in names}
    return [page for page in pages if page in chosen or not names]


async def _refresh_all(pages: Sequence[Path], root: Path) -> None:
    """Execute pages in place: one on each of two cores, then those that measure time, one by one."""
    cores = asyncio.Semaphore(min(2, os.cpu_count() or 1))

    async def refresh(path: Path) -> None:
        async with cores:
            print(f"{path.name} ...", flush=True)
            start = time.monotonic()
            executed = await _execute(path, root / ".cache" / "executed", _NOTEBOOK_TIMEOUT_S)
            page = without_widget_state(json.loads(executed.read_text(encoding="utf-8")))
            write_atomic(path, json.dumps(page, indent=1, ensure_ascii=False) + "\n")
            print(f"  {path.name}: {time.monotonic() - start:.0f} s", flush=True)

    async with asyncio.TaskGroup() as group:
        for path in pages:
            if path.name[:2] not in _TIMED:
                group.create_task(refresh(path))
    for path in pages:
        if path.name[:2] in _TIMED:
            await refresh(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command `notebooks`."""
    parser.add_argument("notebook", nargs="*", help="number or name, as 3 or 06_trace_a_fact (default: all)")


def run(a: argparse.Namespace) -> int:
    """Execute notebooks in place, write data/RESULTS.md and print its table; exit status 1 if one failed."""
    root = project_root()
    try:
        pages = choose_notebooks(list_notebooks(root / "notebooks"), a.notebook)
    except ValueError as error:
        a.error(str(error))
    started = time.monotonic()
    failed: Sequence[Exception] = ()
    try:
        asyncio.run(_refresh_all(pages, root))
    except* NotebookFailed as failures:
        failed = failures.exceptions
    if failed:
        print(*failed, sep="\n", file=sys.stderr)
        return 1
    rows = headline_rows(root / "data" / "results")
    write_atomic(root / "data" / "RESULTS.md", results_page(rows))
    print("\n" + (format_table(rows) if rows else "no notebook recorded a claim"))
    print(f"\n{len(pages)} notebooks executed in {(time.monotonic() - started) / 60:.1f} minutes.")
    return 0
