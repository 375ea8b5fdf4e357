"""Records of results: JSON, JSON lines and figures, complete under their final name (see formats.writing)."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from d2l_lib.formats.writing import atomic_file, name_failed_writes, write_atomic

_FIGURE_NAME = re.compile(r"\d\d_[a-z0-9_]+_by_[a-z0-9_]+")


def project_root() -> Path:
    """The nearest folder above the working directory that holds `d2l_lib`, else this package's parent."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "d2l_lib" / "__init__.py").is_file():
            return folder
    return Path(__file__).resolve().parent.parent


def write_json(path: str | Path, value: Any) -> Path:
    """Write one value as indented JSON; ValueError for NaN and infinity."""
    return write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _not_a_number(text: str) -> float:
    raise ValueError(f"a number must be a finite number, not {text.lower()}")


def _finite_float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _not_a_number(text[:40])


def _parse(content: str | bytes) -> Any:
    """The value of a strict JSON text; ValueError with the reason for anything else."""
    text = content.decode("utf-8") if isinstance(content, bytes) else content
    if text.startswith("\ufeff"):
        raise ValueError("it begins with a byte order mark: save it as UTF-8 without one")
    try:
        return json.loads(text, parse_constant=_not_a_number, parse_float=_finite_float)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_json(content: str | bytes, what: str, advice: str = "write it again") -> Any:
    """The value of a JSON text or of its UTF-8 bytes; of a repeated key the last value counts.

    what, advice: the text's name and what to do, in the error.
    ValueError for anything else: also for NaN and infinity, numbers with too many digits, values nested too deeply,
    other encodings, and a byte order mark.
    """
    try:
        return _parse(content)
    except ValueError as error:
        raise ValueError(f"{what} is not JSON ({error}): {advice}") from error


def read_json(path: str | Path) -> Any:
    """The value of a JSON file; ValueError names the file and the line of what is no JSON (see parse_json)."""
    try:
        return _parse(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a complete JSON file ({error}): write it again") from error


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> Path:
    """Write one JSON value per line; ValueError for NaN and infinity."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    return Path(path)


def read_jsonl(path: str | Path) -> list[Any]:
    """The values of a JSON-lines file without blank lines; ValueError names the line that is no JSON."""
    return list(iter_jsonl(path))


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; ValueError names a line that is no JSON or no object."""
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, value {number} is {type(row).__name__}, not an object: take that line out")
    return rows


def iter_jsonl(path: str | Path) -> Iterator[Any]:
    """The values of `read_jsonl`, one after another."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield _parse(line)
                except ValueError as error:
                    reason = f"{path}, line {number} is not JSON ({error})"
                    raise ValueError(f"{reason}: was the file cut off?") from error


def read_appended(path: str | Path) -> list[Any]:
    """The values of a file by `append_jsonl`, without blank lines and a last line that was cut off (by a kill).

    No file: no values. ValueError names any other line that is not JSON.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    named = [(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    return [parse_json(line, name, "take that line out") for name, line in named]


def append_jsonl(path: str | Path, row: Any) -> None:
    """Add one JSON value as a line and wait until it is on the disk; on failure the file stays as it was."""
    line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    with name_failed_writes(path), open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += file.write(line[written:])
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(size)
            raise


def save_figure(figure, name: str) -> Path:
    """Save a matplotlib figure as `figures/<name>.png`, name NN_what_by_what; the same figure gives the same bytes."""
    name = name.removesuffix(".png")
    if not _FIGURE_NAME.fullmatch(name):
        raise ValueError(f"figure name {name!r} is not of the form NN_what_by_what, e.g. '03_exact_match_by_length'")
    path = project_root() / "figures" / f"{name}.png"
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return path


def claim(text: str, figure: Any, aim: str = "", met: bool | None = None) -> dict[str, Any]:
    """A row of the table of results: the claim, its figure, the aim, and whether it is met.

    met: None decides an aim like ">= 99%" or "<= 20 minutes": every number of `figure` has to meet it.
    ValueError for such an aim and a figure without a number.
    """
    bound = re.match(r"(>=|<=) (\S*\d)", aim)
    if met is None and bound:
        numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?", str(figure))]
        if not numbers:
            raise ValueError(f"{text}: the figure {figure!r} holds no number to hold against the aim {aim!r}")
        limit = float(bound[2])
        met = min(numbers) >= limit if bound[1] == ">=" else max(numbers) <= limit
    return {"claim": text, "figure": figure, "aim": aim, "met": met}


def write_results(page: str, facts: dict[str, Any], *claims: dict[str, Any]) -> None:
    """Write a notebook's facts, then its claims, to data/results/<page>.jsonl, and print the path."""
    path = write_jsonl(project_root() / "data" / "results" / f"{page}.jsonl", [facts, *claims])
    print(f"recorded in data/results/{path.name}")


def environment_line(preset: str, model=None) -> str:
    """Preset and model in one line, device, precision and versions in a second.

    model: a DocToLoRA, any torch module, or None.
    """
    import torch
    import transformers

    parts, place = [f"preset {preset}"], []
    if model is not None:
        network = model.base_model if hasattr(model, "hypernetwork") else model  # transformers has a .base_model too
        first = next(network.parameters())
        count = sum(parameter.numel() for parameter in network.parameters())
        parts.append(f"base model {type(network).__name__} ({count / 1e6:.1f} M parameters)")
        if hasattr(model, "hypernetwork"):
            count = sum(parameter.numel() for parameter in model.hypernetwork.parameters())
            parts.append(f"hypernetwork {count / 1e6:.1f} M parameters")
        place.append(f"{first.device}, {str(first.dtype).removeprefix('torch.')}")
    place.append(f"{torch.get_num_threads()} thread(s)")
    place.append(f"python {platform.python_version()}")
    place.append(f"torch {torch.__version__}, transformers {transformers.__version__}")
    return "\n".join(" · ".join(of_line) for of_line in (parts, place))
