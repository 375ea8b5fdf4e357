"""Safetensors files: what is read is floating, finite and of the size that the file has; what is written is always the
same bytes.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2l_lib.formats.schemas import expected, first_line, shown

_LONGEST_HEADER = 100_000_000  # bytes; the format allows no more
_FLOATING = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_SUMMED = 1 << 16  # bytes that one sum of a checksum takes


def read_tensors(path: str | Path, error: type[ValueError] = ValueError) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors on the CPU, metadata) of a safetensors file; nothing is read before the header fits the file's size.

    FileNotFoundError where there is no such file. `error` for a file that is cut off or damaged, and for tensors that
    are no floating numbers, empty, or hold NaN or infinity; its message names the file and the tensor.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    incomplete = f"{path} is not a complete safetensors file, it is damaged ({{}}): was it cut off? Copy it again"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if size < 8 or header > min(size - 8, _LONGEST_HEADER):
            raise error(incomplete.format(f"its header would have {header} bytes, the file has {size}"))
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise
    except error:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, OverflowError) as problem:
        raise error(incomplete.format(first_line(problem))) from problem
    check_tensors(tensors, path, error)
    return tensors, metadata


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, the same bytes for the same values: the library itself writes metadata in any order."""
    from safetensors.torch import save_file

    save_file(tensors, path, metadata=metadata)
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) | {"__metadata__": metadata}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        file.seek(8)
        file.write(text.ljust(length))


def write_parts(path: str | Path, parts: Mapping[str, Tensor | list[Tensor]], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file from tensors as they lie, without a copy of them all.

    parts: tensors, or lists of tensors of one shape and type, which are stored as one tensor [number, ...].

    The metadata gets "checksum", that of the function.
    """
    lists = {name: part if isinstance(part, list) else [part] for name, part in parts.items()}
    names = sorted(lists, key=lambda name: (-lists[name][0].element_size(), name))  # so numbers are aligned
    header, end = {}, 0
    for name in names:
        first, start = lists[name][0], end
        end += sum(one.nbytes for one in lists[name])
        shape = [*([len(lists[name])] if lists[name] is parts[name] else []), *first.shape]
        header[name] = {"dtype": _FLOATING[first.dtype], "shape": shape, "data_offsets": [start, end]}

    def head(total: str) -> bytes:
        whole = {"__metadata__": {"checksum": total, **metadata}} | header
        text = json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    with open(path, "w+b") as file:
        file.write(head("0" * 8))
        for name in names:
            for one in lists[name]:
                file.write(one.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        file.seek(0)
        file.write(head(checksum(path)))


def checksum(path: str | Path) -> str:
    """A sum of all numbers of a safetensors file, which shows damage: the CRC-32 of the sums of its parts.

    Far quicker than the CRC-32 of everything. Numbers that change places inside 64 kB go unseen.
    """
    total, content = 0, bytearray(16 * _SUMMED)
    sums = torch.frombuffer(content, dtype=torch.int64).view(-1, _SUMMED // 8)
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while size := file.readinto(content):
            content[size:] = bytes(len(content) - size)
            total = zlib.crc32(sums.sum(1).numpy().data, total)
    return f"{total:08x}"


def check_tensors(tensors: Mapping[str, Tensor], file: object, error: type[ValueError] = ValueError) -> None:
    """`error` for the first tensor that is not of finite floating numbers. Each is read once, nothing is copied."""
    for name, tensor in tensors.items():
        advice = "the file is damaged, copy or write it again"
        if tensor.dtype not in _FLOATING:
            kind = str(tensor.dtype).removeprefix("torch.")
            what = "a tensor of numbers with a fraction (float32, bfloat16, float16)"
            raise error(expected(file, shown(name).strip("'"), what, kind, advice))
        if tensor.numel() == 0:
            raise error(expected(file, shown(name).strip("'"), "a tensor that is not empty", "one without", advice))
        if not all(math.isfinite(value) for value in torch.stack(tensor.detach().aminmax()).tolist()):
            place = shown(name).strip("'")
            raise error(f"{file}: {place}: finite numbers are expected, it holds NaN or infinity: {advice}")


def safetensors_metadata(path: str | Path) -> dict[str, Any] | None:
    """The text fields in the header of a safetensors file, without reading a tensor; None for any other file."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= 100_000_000:
            return None
        try:
            header = json.loads(file.read(size).decode("utf-8"))
        except (ValueError, RecursionError):
            return None
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    return metadata if isinstance(metadata, dict) else None
