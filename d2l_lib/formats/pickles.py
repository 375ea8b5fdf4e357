"""The published `pytorch_model.bin`, read without running its code and written without the authors' package.

Such a file is a zip of raw tensor values and one pickle, `data.pkl`. A pickle is a program for a stack machine.
Python's own machine imports and calls whatever the program names. The machine here knows only the instructions that
PyTorch writes and the names in KNOWN. It imports nothing, calls nothing that the file names, and reads no more bytes
than the file has.

`torch.load(weights_only=True)` promises less. It accepts a long list of names, and whatever other code has registered
under one of them. A set of nested tuples keeps it busy for ever, and a compressed record fills the memory. A stride of
0 makes a tensor of 2**62 values. It does not compare checksums.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import re
import struct
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from d2l_lib.formats.writing import atomic_file, check_replaceable

COMMENT = b"doc-to-lora export"  # at the end of the zip files by `write`; torch.load ignores it
LONGEST_PICKLE = 2 << 20  # bytes; published ones have some tens of thousands
_REQUIRED = ("base_model_name_or_path", "hypernet_config")


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message says what is wrong and what to do."""


# --- the names that a checkpoint may use ----------------------------------------------------------------------------


class Record:
    """Stands in for a configuration class of the published code or of peft: attributes only."""

    published = ""

    def __init__(self, **values: Any):
        vars(self).update(values)


class Name(str):
    """Stands in for an enumeration whose values are strings."""

    published = ""

    def __reduce__(self):
        return type(self), (str(self),)


# Older files name the configuration classes in ctx_to_lora.modeling_utils.
_RECORDS = (
    "ctx_to_lora.configs.CtxEncoderArguments",
    "ctx_to_lora.modeling.hypernet.HypernetConfig",
    "ctx_to_lora.modeling.aggregator.AggregatorConfig",
    "ctx_to_lora.modeling_utils.CtxEncoderArguments",
    "ctx_to_lora.modeling_utils.HypernetConfig",
    "ctx_to_lora.modeling_utils.AggregatorConfig",
    "peft.tuners.lora.config.LoraConfig",
    "peft.tuners.lora.config.LoraRuntimeConfig",
)
_NAMES = ("peft.utils.peft_types.PeftType", "peft.utils.peft_types.TaskType")
_STAND_INS: dict[str, type] = {
    full: type(full.rpartition(".")[2], (base,), {"published": full})
    for base, group in ((Record, _RECORDS), (Name, _NAMES))
    for full in group
}
_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.HalfStorage": torch.float16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
}
_TENSOR = "torch._utils._rebuild_tensor_v2"
_DICT = "collections.OrderedDict"
_SET = "builtins.set"
KNOWN = frozenset([*_STAND_INS, *_DTYPES, _TENSOR, _DICT, _SET])


def stand_in(name: str) -> type:
    """The stand-in for a published configuration class, by its full name."""
    return _STAND_INS[name]


@dataclass(frozen=True)
class _Global:
    """A known name on the stack."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """Values in the zip: the number of their record, their type and their count."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class _Place:
    """The place of an unread tensor in a storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


# --- reading --------------------------------------------------------------------------------------------------------


def read(source: str | Path | BinaryIO) -> OrderedDict[str, Any]:
    """The content of a published checkpoint: tensors on the CPU by name, and records with attributes.

    source: a path or an open binary file.
    CheckpointError, before any tensor is read, for other formats, other models' files and a pickle that asks for a name
    outside KNOWN (the message has the name); also for damaged files.
    """
    if isinstance(source, (str, Path)):
        with open(source, "rb") as file:
            return _read(file, str(source))
    return _read(source, str(getattr(source, "name", "the checkpoint")))


def _read(file: BinaryIO, name: str) -> OrderedDict[str, Any]:
    try:
        with _Archive(file, name) as archive:
            program = archive.record("data.pkl", LONGEST_PICKLE)
            _check_program(program, name)
            content = _run(program)
            if not isinstance(content, OrderedDict) or any(key not in content for key in _REQUIRED):
                raise CheckpointError(
                    f"{name} is not a Doc-to-LoRA checkpoint: it lacks {' and '.join(_REQUIRED)} "
                    "(a base model goes into base_model=, a PEFT adapter into peft)"
                )
            storages: dict[_Storage, Tensor] = {}
            for key, value in content.items():
                if isinstance(value, _Place):
                    content[key] = archive.tensor(value, storages)
            for value in content.values():
                if isinstance(value, Record) and isinstance(getattr(value, "layer_indices", None), _Place):
                    value.layer_indices = archive.tensor(value.layer_indices, storages)
            return content
    except CheckpointError:
        raise
    except (
        zipfile.BadZipFile,
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        NotImplementedError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        raise CheckpointError(f"{name} is damaged or not a checkpoint ({_shown(str(error))}): copy it again") from error


def _shown(text: str) -> str:
    """A file's text as one short line of plain characters, safe to print."""
    plain = ascii((text.splitlines() or [""])[0])[1:-1]
    return plain if len(plain) <= 120 else plain[:120] + "..."


class _Archive:
    """The zip around the pickle; nothing is ever unpacked to disk.

    Before it reads a record, it checks that all are uncompressed and lie inside the file, in one folder.
    """

    _RECORD = re.compile(r"data\.pkl|byteorder|version|data/\d+|\.\w+|\.data/\w+")

    def __init__(self, file: BinaryIO, name: str):
        file.seek(0)
        head = file.read(4)
        if head != b"PK\x03\x04":
            _refuse_other_format(file, name)
        size = file.seek(0, io.SEEK_END)
        try:
            self.zip = zipfile.ZipFile(file)
            comment = self.zip.comment
            file.seek(-2 - len(comment), io.SEEK_END)
            if int.from_bytes(file.read(2), "little") != len(comment):  # zipfile accepts a comment that is cut off
                raise zipfile.BadZipFile("the comment is shorter than it says")
        except zipfile.BadZipFile as error:
            raise CheckpointError(f"{name} is cut off or damaged (its end is missing): copy it again") from error
        entries = self.zip.infolist()
        roots = [e.filename.removesuffix("/data.pkl") for e in entries if e.filename.endswith("/data.pkl")]
        root = roots[0] + "/" if roots and roots[0] and "/" not in roots[0] else None
        for entry in entries:
            inside = root and entry.filename.startswith(root) and root not in ("../", "./")
            if not inside or not self._RECORD.fullmatch(entry.filename[len(root) :]):
                raise CheckpointError(
                    f"{name} holds '{_shown(entry.filename)}', which no PyTorch checkpoint does: not opened"
                )
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise CheckpointError(f"{name} holds a compressed record '{_shown(entry.filename)}': not opened")
        if root is None:
            raise CheckpointError(f"{name} is a zip without a checkpoint in it (no data.pkl)")
        self.records = {entry.filename[len(root) :]: entry for entry in entries}
        if len(self.records) < len(entries) or sum(entry.file_size for entry in entries) > size:
            raise CheckpointError(f"{name} names the same bytes several times: not opened")
        if "byteorder" in self.records and self.record("byteorder", 16) != b"little":
            raise CheckpointError(f"{name} was written by a big-endian machine, which is not supported")

    def __enter__(self) -> _Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.zip.close()

    def record(self, name: str, longest: int | None = None) -> bytearray:
        """The bytes of a record, with its checksum compared."""
        entry = self.records[name]
        if longest is not None and entry.file_size > longest:
            raise ValueError(f"{name} has {entry.file_size} bytes, at most {longest} are expected")
        content = bytearray(entry.file_size)
        done, view = 0, memoryview(content)
        with self.zip.open(entry) as stream:
            while done < len(content):
                part = stream.read(min(1 << 24, len(content) - done))
                if not part:
                    raise EOFError(f"{name} ends after {done} of {len(content)} bytes")
                view[done : done + len(part)] = part
                done += len(part)
            stream.read(1)  # the checksum is compared at the end
        return content

    def tensor(self, place: _Place, storages: dict[_Storage, Tensor]) -> Tensor:
        """The tensor at `place`; tensors of one storage share memory."""
        storage = place.storage
        if storage not in storages:
            expected, actual = storage.count * storage.dtype.itemsize, self.records[f"data/{storage.key}"].file_size
            if expected != actual:
                raise ValueError(f"data/{storage.key} has {actual} bytes, its tensors need {expected}")
            storages[storage] = torch.frombuffer(self.record(f"data/{storage.key}"), dtype=storage.dtype)
        return storages[storage].as_strided(place.size, place.stride, place.offset)


def _refuse_other_format(file: BinaryIO, name: str) -> None:
    """CheckpointError for a file that is no zip, with the first unknown name in its pickles."""
    file.seek(0)
    start = file.read(LONGEST_PICKLE)
    if not start:
        raise CheckpointError(f"{name} is empty: copy it again")
    kind, programs = "not a PyTorch checkpoint", [start]
    if start[257:262] == b"ustar":
        kind = "a tar archive"
        programs = []
        try:
            with tarfile.open(fileobj=io.BytesIO(start), mode="r:") as archive:
                programs = [start[member.offset_data :] for _, member in zip(range(16), archive, strict=False)]
        except (tarfile.TarError, ArithmeticError, LookupError, OSError, ValueError):
            pass  # a damaged tar is refused below
    elif start[:1] == b"\x80":
        kind = "a pickle without PyTorch's zip around it"
    for program in programs:
        stream = io.BytesIO(program)
        try:
            while True:  # older formats are several pickles in a row
                for full_name in _names(stream):
                    if full_name not in KNOWN:
                        raise _refusal(name, full_name)
        except CheckpointError:
            raise
        except (ArithmeticError, LookupError, ValueError):
            continue  # no pickle, or its end
    raise CheckpointError(
        f"{name} is damaged or {kind}; the published checkpoints are zip files as torch.save has written since "
        "PyTorch 1.6: copy it again"
    )


def _refusal(name: str, full_name: str) -> CheckpointError:
    return CheckpointError(f"{name} asks for {_shown(full_name)}, which no Doc-to-LoRA checkpoint needs: not opened")


def _names(stream: BinaryIO) -> Iterator[str]:
    """Every "module.name" that one pickle asks for, by any instruction, in order."""
    strings: list[str] = ["?", "?"]
    memo: dict[int, str] = {}
    last: object = None
    for code, argument, _ in pickletools.genops(stream):
        if code.name in ("GLOBAL", "INST"):
            yield _dotted(argument)
        elif code.name == "STACK_GLOBAL":
            yield _dotted(" ".join(strings))
        elif code.name in ("EXT1", "EXT2", "EXT4"):
            yield f"extension {argument}"
        elif code.name == "MEMOIZE":
            memo[len(memo)] = last if isinstance(last, str) else "?"
            continue
        elif code.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = last if isinstance(last, str) else "?"
            continue
        elif code.name in ("GET", "BINGET", "LONG_BINGET"):
            argument = memo.get(argument, "?")
        last = argument
        if isinstance(argument, str) and code.name not in ("GLOBAL", "INST"):
            strings = [strings[-1], argument]


def _dotted(argument: str) -> str:
    """ "module name" as "module.name"; protocol 2 calls the builtins as Python 2 did."""
    return re.sub("^__builtin__ ", "builtins ", argument).replace(" ", ".", 1)


def _check_program(program: bytes, name: str) -> None:
    """CheckpointError for an unknown name or instruction, before any instruction runs."""
    for full_name in _names(io.BytesIO(program)):
        if full_name not in KNOWN:
            raise _refusal(name, full_name)
    for code, _, _ in pickletools.genops(io.BytesIO(program)):
        if code.name not in _INSTRUCTIONS:
            raise CheckpointError(
                f"{name} uses the pickle instruction {code.name}, which torch.save does not write: not opened"
            )


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_ARGUMENTS = ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_OTHERS = "PROTO STOP MARK TUPLE EMPTY_LIST EMPTY_DICT APPEND APPENDS SETITEM SETITEMS BINPERSID GLOBAL REDUCE".split()
_OTHERS += "NEWOBJ BUILD BINPUT LONG_BINPUT BINGET LONG_BINGET".split()
_INSTRUCTIONS = frozenset([*_CONSTANTS, *_ARGUMENTS, *_TUPLES, *_OTHERS])


def _run(program: bytes) -> Any:
    """The value that a checked program builds; keys are texts, so hashing stays cheap."""
    stack: list[Any] = []
    outer: list[list[Any]] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, outer.pop()
        return items

    for code, argument, _ in pickletools.genops(io.BytesIO(program)):
        match code.name:
            case "PROTO":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                outer.append(stack)
                stack = []
            case "TUPLE":
                items = since_mark()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = _TUPLES[code.name]
                if len(stack) < count:
                    raise IndexError("a tuple of more values than there are")
                stack[-count:] = [tuple(stack[-count:])]
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if code.name == "APPEND" else since_mark()
                _expect(stack[-1], list).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _expect(stack[-1], dict)[_expect(key, str)] = value
            case "SETITEMS":
                items = since_mark()
                for key, value in zip(items[::2], items[1::2], strict=True):
                    _expect(stack[-1], dict)[_expect(key, str)] = value
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "GLOBAL":
                stack.append(_Global(_dotted(argument)))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_call(_expect(stack.pop(), _Global).name, _expect(arguments, tuple)))
            case "NEWOBJ":
                arguments, kind = stack.pop(), _STAND_INS[_expect(stack.pop(), _Global).name]
                if arguments != () or not issubclass(kind, Record):
                    raise TypeError(f"cannot make a {kind.__name__} like this")
                stack.append(kind())
            case "BUILD":
                _build(stack[-2], _expect(stack.pop(), dict))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case name:
                stack.append(_CONSTANTS.get(name, argument))
    raise EOFError("the pickle has no end")


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"the pickle has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _call(name: str, arguments: tuple) -> Any:
    """The value of one of the calls in a checkpoint."""
    if name == _DICT and not arguments:
        return OrderedDict()
    if name == _SET and len(arguments) == 1:
        return {_expect(item, str) for item in _expect(arguments[0], list)}
    if name in _NAMES and len(arguments) == 1:
        return _STAND_INS[name](_expect(arguments[0], str))
    if name == _TENSOR and len(arguments) in (6, 7):  # storage, offset, size, stride, requires_grad, hooks[, metadata]
        return _place(*arguments[:4])
    raise TypeError(f"{name} is not called like this")


def _build(target: Any, state: dict[str, Any]) -> None:
    """Set the attributes of a record; the versions of modules in the dictionary of tensors are ignored."""
    if isinstance(target, Record):
        vars(target).update(state)
    elif not isinstance(target, OrderedDict) or set(state) != {"_metadata"}:
        raise TypeError(f"the pickle sets attributes of a {type(target).__name__}")


def _storage(identity: Any) -> _Storage:
    word, kind, key, _, count = _expect(identity, tuple)  # ("storage", type, record, device, number of values)
    dtype = _DTYPES.get(_expect(kind, _Global).name)
    if word != "storage" or dtype is None or not re.fullmatch(r"\d{1,9}", _expect(key, str), re.ASCII):
        raise ValueError("a storage that torch.save does not write")
    return _Storage(key, dtype, _whole(count))


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError("a size, stride or offset that no tensor has")
    return value


def _place(storage: Any, offset: Any, size: Any, stride: Any) -> _Place:
    """The place of a tensor; ValueError where it is outside its storage, or larger."""
    storage = _expect(storage, _Storage)
    size, stride = (tuple(_whole(value) for value in _expect(each, tuple)) for each in (size, stride))
    last = _whole(offset) + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if len(size) > 8 or 0 in size or max(math.prod(size), last + 1, *stride) > storage.count:
        raise ValueError(f"a tensor lies outside its storage data/{storage.key}")
    return _Place(storage, offset, size, stride)


# --- writing --------------------------------------------------------------------------------------------------------


class _Pickler(pickle._Pickler):
    """Writes stand-ins under their published names, which Python's C pickler would import.

    Equal contents give equal bytes: equal texts are written once, whether they are one object or not, and a set is
    written in alphabetical order, for its own depends on how it was filled.
    """

    dispatch = pickle._Pickler.dispatch.copy()

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        super().save(sys.intern(obj) if type(obj) is str else obj, save_persistent_id)

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if isinstance(obj, type) and issubclass(obj, (Record, Name)) and obj.published:
            module, _, short = obj.published.rpartition(".")
            self.write(pickle.GLOBAL + f"{module}\n{short}\n".encode("ascii"))
            self.memoize(obj)
        else:
            super().save_global(obj, name)

    def save_set(self, obj: set[str]) -> None:
        self.save_reduce(set, (sorted(obj),), obj=obj)

    dispatch[set] = save_set


def _is_ours(path: Path) -> bool:
    """Whether `write` made this file."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(COMMENT)))
        return file.read() == COMMENT


def check_file(path: str | Path) -> None:
    """FileExistsError for a file that `write` did not make: it is never replaced."""
    check_replaceable(path, _is_ours)


def write(path: str | Path, content: OrderedDict[str, Any]) -> Path:
    """Write tensors and records as `torch.save` does with the published classes; FileExistsError as in `check_file`."""
    module = types.SimpleNamespace(__name__="pickle", Pickler=_Pickler)
    with atomic_file(path, replaces=_is_ours) as temporary:
        with open(temporary, "wb") as file:
            torch.save(content, file, pickle_module=module, pickle_protocol=2)
        with open(temporary, "r+b") as file:  # a zip file ends with the length of its comment, 0 here
            file.seek(-2, os.SEEK_END)
            file.write(len(COMMENT).to_bytes(2, "little") + COMMENT)
    return Path(path)
