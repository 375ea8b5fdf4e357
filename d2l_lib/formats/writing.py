"""Files and folders that are complete under their final name and replace nothing of others.

A write goes to a temporary name and is then renamed, so a reader never sees half of it. `atomic_folder` replaces only
folders that it recognises. `read_whole` reads several files of one version.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import re
import shutil
import stat
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from glob import escape
from pathlib import Path
from typing import TypeVar

from d2l_lib.documents import check_texts, some_of

T = TypeVar("T")
_NEW = "new"  # an unfinished file, in a temporary folder of its own
_LIBRARYS_OWN = re.compile(r"\.tmp[A-Za-z0-9]{6}")  # the temporary files of safetensors
_INSIDE = re.compile(r"\..+\.\d+\.[0-9a-f]{14}\.tmp")  # the folder of an unfinished file in a temporary folder
_written: dict[Path, tuple[int, frozenset[str]]] = {}  # folders without a kind that this process wrote
_TRIES = 1000


# --------------------------------------------------------------------------------------------------- temporary names
@cache
def _place() -> str:
    """Six hex digits for this host and process namespace, in which a process id is unique."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:6]


def _stem(path: Path) -> str:
    """The first part of a temporary's name: hidden, and cut to keep the whole name within the limit."""
    return "." + os.fsdecode(os.fsencode(path.name)[:200])


def _temporary_name(path: Path, ending: str = "tmp") -> Path:
    """A hidden sibling of `path`, so on the same disk: the final rename is one step."""
    return path.with_name(f"{_stem(path)}.{os.getpid()}.{_place()}{uuid.uuid4().hex[:8]}.{ending}")


def _leftovers(path: Path, ending: str, *, dead: bool) -> list[Path]:
    """Temporaries of `path` by processes of this host, oldest first; dead: only by ended processes."""
    pattern = re.compile(re.escape(_stem(path)) + rf"\.(\d+)\.{_place()}[0-9a-f]{{8}}\.{ending}")
    try:
        matches = [(entry, pattern.fullmatch(entry.name)) for entry in os.scandir(path.parent)]
    except FileNotFoundError:
        return []
    left = [Path(entry.path) for entry, match in matches if match and not (dead and _is_alive(int(match[1])))]
    return sorted(left, key=lambda file: file.lstat().st_mtime_ns if os.path.lexists(file) else 0)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or no number of a process
        pass
    return True


def _remove(path: Path) -> None:
    """Delete a temporary of this process, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------ failed writes
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS)


_OS_ERROR = re.compile(r"\((?:os error|errno) (\d+)\)|\[[Ee]rrno (\d+)\]")


_TORCH_WRITER = ("PytorchStreamWriter failed", "unexpected pos", "basic_ios::clear", "iostream error")


def write_failure(error: BaseException) -> OSError | None:
    """The operating system's error behind a failed write (a full disk, say), or None for any other `error`.

    safetensors and torch raise errors of their own; the reason is in their text or context.
    """
    seen: BaseException | None = error
    met: set[int] = set()
    while seen is not None and id(seen) not in met:  # errors may name each other as their reason
        met.add(id(seen))
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen if seen.errno in _FULL else None
        is_writer = isinstance(seen, OSError) or type(seen).__name__ in ("SafetensorError", "RuntimeError")
        if is_writer and (match := _OS_ERROR.search(str(seen))):
            number = int(match[1] or match[2])
            return OSError(number, os.strerror(number)) if number in _FULL else None
        seen = seen.__cause__ or seen.__context__
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _TORCH_WRITER):
        return OSError(errno.EIO, "the file could not be written to its end: is the disk full?")
    return None


@contextmanager
def name_failed_writes(path: str | Path) -> Iterator[None]:
    """Inside the `with` block a failed write (a full disk, say) raises OSError with `path` and the reason."""
    try:
        yield
    except Exception as error:
        failure = write_failure(error)
        if failure is None or (isinstance(error, OSError) and error.filename):
            raise
        is_torch = not isinstance(error, OSError) and failure.errno == errno.EIO
        reason = failure.strerror if is_torch else os.strerror(failure.errno)
        raise OSError(failure.errno, reason, str(path)) from error


# ------------------------------------------------------------------------------------------------------- single files
def _resolved(path: str | Path) -> Path:
    """The target of a write to `path`, through symbolic links: a link stays one."""
    return Path(os.path.realpath(path))


@contextmanager
def atomic_file(path: str | Path, replaces: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """A temporary path to write; on success it takes the name `path`, after an error it is deleted.

    replaces: whether an old file may be replaced (None: any may).

    A write goes through a symbolic link. The old file's permissions stay. Temporaries of killed processes of this host
    for the same name are deleted. IsADirectoryError for a folder, FileExistsError for a device, a pipe and a file that
    may not be replaced, PermissionError for a write-protected file. OSError names the file where a write fails; the old
    file then stays as it was.
    """
    target = _resolved(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    mode = check_replaceable(target, replaces)
    for stale in _leftovers(target, "tmp", dead=True):
        _remove_stale(stale)
    # a folder of its own, as some libraries write temporary files beside the path
    folder = _temporary_name(target)
    temporary = folder / _NEW
    try:
        with name_failed_writes(target):
            folder.mkdir()
            yield temporary
            if mode is not None and not temporary.is_symlink():
                os.chmod(temporary, mode)
            _flush(temporary)
            os.replace(temporary, target)
    finally:
        _remove(folder)


def _remove_stale(temporary: Path) -> None:
    """Delete the leftovers of a killed write; all other files stay."""
    if temporary.is_symlink() or not temporary.is_dir():
        temporary.unlink(missing_ok=True)
        return
    for file in temporary.iterdir():
        if file.name == _NEW or _LIBRARYS_OWN.fullmatch(file.name):
            file.unlink(missing_ok=True)
    with suppress(OSError):
        temporary.rmdir()


def _flush(file: Path) -> None:
    """Wait until a file is on the disk; some full disks give their error only here."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_replaceable(path: str | Path, replaces: Callable[[Path], bool] | None = None) -> int | None:
    """The permissions of the file that `atomic_file` would replace, or None; raises as it does."""
    target = _resolved(path)
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{target} is a folder, a file is to be written there: choose another name")
    if not stat.S_ISREG(mode):
        raise FileExistsError(f"{target} is no ordinary file (a device or a pipe): choose another name")
    if _is_protected(target):
        raise PermissionError(errno.EACCES, "the file is write-protected", str(target))
    if replaces is not None and not replaces(target):
        raise FileExistsError(f"{target} is a file of another kind, which is not overwritten: choose another name")
    return stat.S_IMODE(mode)


# ------------------------------------------------------------------------------------------------------------ folders
@dataclass(frozen=True)
class FolderKind:
    """A kind of output folder: its name in errors, its files, and how to recognise one.

    files: names and patterns (`*` stays within a name) relative to the folder.
    recognise: the members of `files` that a folder was written with, by its own settings; () or an error for a folder
        of others.
    """

    name: str
    files: tuple[str, ...]
    recognise: Callable[[Path], Sequence[str]]


# The files of a model or tokenizer folder by transformers.
PRETRAINED_FILES = (
    "config.json generation_config.json model.safetensors model-*-of-*.safetensors model.safetensors.index.json "
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt "
    "tokenizer.model spiece.model sentencepiece.bpe.model chat_template.jinja chat_template.json "
    "additional_chat_templates/*.jinja preprocessor_config.json processor_config.json video_preprocessor_config.json"
).split()


def _entries(folder: Path, prefix: str = "") -> list[tuple[str, os.stat_result]]:
    """(relative name, lstat) of every file and link below a folder, and of empty folders ("name/")."""
    entries = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name, facts = prefix + entry.name, entry.stat(follow_symlinks=False)
        if entry.is_dir(follow_symlinks=False):
            entries += _entries(Path(entry.path), f"{name}/") or [(f"{name}/", facts)]
        else:
            entries.append((name, facts))
    return entries


def _is_kept(name: str, keep: Sequence[str]) -> bool:
    return any(name == part or name.startswith(f"{part}/") for part in keep)


def _is_own(name: str, facts: os.stat_result, patterns: Iterable[str]) -> bool:
    """Whether an entry of `_entries` is an ordinary file whose name fits one of the patterns."""
    parts = name.split("/")
    split = (pattern.split("/") for pattern in patterns)
    fits = any(len(parts) == len(own) and all(map(fnmatchcase, parts, own)) for own in split)
    return fits and stat.S_ISREG(facts.st_mode)


def _remove_empty(folder: Path) -> None:
    """Delete the empty folders in a folder, and the folder itself if it is empty."""
    for inner, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):
            os.rmdir(inner)


def _inspect(folder: Path, kind: FolderKind | None, keep: Sequence[str]) -> tuple[list[str], Sequence[str]]:
    """(names of a folder's other files, patterns of the files by an earlier output of this kind)."""
    entries = _entries(folder)
    patterns: Sequence[str] = ()
    if kind is None:
        inode, names = _written.get(folder, (0, frozenset()))
        patterns = [escape(name) for name in names] if folder.stat().st_ino == inode else ()
    elif entries:
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            patterns = kind.recognise(folder)
    others = [name for name, facts in entries if not (_is_kept(name, keep) or _is_own(name, facts, patterns))]
    return others, patterns


def check_folder(path: str | Path, kind: FolderKind | None = None, keep: Sequence[str] = ()) -> Path:
    """The folder that `atomic_folder` would write, after its checks; arguments and errors are the same."""
    check_texts(keep, "names to keep")
    target = _resolved(path)
    here = Path(os.path.realpath(os.getcwd()))
    if target == here or target in here.parents or target in (Path(target.anchor), _resolved(Path.home())):
        raise FileExistsError(
            f"{str(path)!r} is {target}, which is the working directory, a folder above it or your home: nothing is "
            "written over it, give the name of a new folder"
        )
    _recover(target)
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return target
    if not stat.S_ISDIR(mode):
        raise NotADirectoryError(f"{path} is a file, a folder is to be written there: choose another name")
    if os.path.ismount(target):
        raise FileExistsError(f"{path} is where a disk is mounted: give the name of a folder in it")
    if _is_protected(target):
        raise PermissionError(errno.EACCES, "the folder is write-protected", str(target))
    others, _ = read_whole(target, lambda folder: _inspect(folder, kind, keep))
    if others:
        raise _refusal(path, kind, others)
    return target


def _is_protected(path: Path) -> bool:
    """Whether a file or folder is write-protected; several tries, as another writer may replace it just now."""
    return all(not os.access(path, os.W_OK) and os.path.exists(path) for _ in range(20))


def _refusal(path: str | Path, kind: FolderKind | None, others: Sequence[str]) -> FileExistsError:
    what = "an earlier output of this program" if kind is None else f"an earlier {kind.name}"
    return FileExistsError(
        f"{path} holds files that do not belong to {what}: {some_of(others, 5)}. Nothing was written: give a new or "
        "empty folder, or move these files away"
    )


@contextmanager
def atomic_folder(path: str | Path, kind: FolderKind | None = None, keep: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder to fill; on success it takes the name `path`, after an error it is deleted.

    path: a new folder, an empty one, or an earlier output of the same kind, which is replaced. A write goes through a
        symbolic link.
    kind: recognises an earlier output; None: only a folder that this process wrote is one.
    keep: names of files and folders that stay from the old version, whoever wrote them (hard links, else copies).

    The versions change places in one step (Linux, macOS). So one of them is always there, even if the process is killed
    or several write at once. Other systems and disks first move the old version aside under a hidden name. If the
    process is killed then, `read_whole` and the next write bring it back. The next write to the same name deletes what
    killed processes of this host left. Only files of the kind are ever deleted.

    FileExistsError, before the first write, names files that do not belong to the kind. It also refuses the working
    directory, folders above it, the home and a mount point. NotADirectoryError for a file, PermissionError for a
    write-protected folder. OSError names the folder where a write fails; the old version then stays as it was.
    """
    target = check_folder(path, kind, keep)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target, kind, keep)
    temporary, inode = _temporary_name(target), None
    try:
        with name_failed_writes(target):
            temporary.mkdir()
            inode = temporary.stat().st_ino
            if keep and target.is_dir():
                read_whole(target, lambda folder: _carry(folder, temporary, keep))
            yield temporary
            _put_in_place(temporary, target, path, kind, keep)
    finally:
        if inode is not None and temporary.is_dir() and temporary.stat().st_ino == inode:  # not the old version
            shutil.rmtree(temporary)


def _carry(folder: Path, temporary: Path, keep: Sequence[str]) -> None:
    """Link or copy the kept parts of the old version into the new one."""
    for name in keep:
        _remove(temporary / name)
        _link(folder / name, temporary / name)


def _link(source: Path, copy: Path) -> None:
    if source.is_symlink():
        os.symlink(os.readlink(source), copy)
    elif source.is_dir():
        copy.mkdir()
        for entry in os.scandir(source):
            _link(Path(entry.path), copy / entry.name)
        shutil.copystat(source, copy)
    elif source.exists():
        try:
            os.link(source, copy)
        except OSError:
            shutil.copy2(source, copy)


def _put_in_place(
    temporary: Path, target: Path, path: str | Path, kind: FolderKind | None, keep: Sequence[str]
) -> None:
    """Give a complete folder its name, also while other processes do the same."""
    entries = _entries(temporary)
    new = (temporary.stat().st_ino, frozenset(name for name, _ in entries))
    for name, facts in entries:
        if stat.S_ISREG(facts.st_mode) and not _is_kept(name, keep):
            _flush(temporary / name)
    for _ in range(_TRIES):
        try:
            _place_once(temporary, target, path, kind, keep)
        except FileNotFoundError:
            if not temporary.exists():
                raise
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            _written[target] = new
            return
    raise OSError(errno.EBUSY, "other processes keep on writing this folder: try again", str(target))


def _place_once(temporary: Path, target: Path, path: str | Path, kind: FolderKind | None, keep: Sequence[str]) -> None:
    """One attempt; FileNotFoundError or ENOTEMPTY where another process was faster."""
    if not target.exists():
        os.rename(temporary, target)
        return
    others, patterns = read_whole(target, lambda folder: _inspect(folder, kind, keep))
    if others:
        raise _refusal(path, kind, others)
    os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
    if next(os.scandir(target), None) is None:
        os.rename(temporary, target)
        return
    old = temporary
    if not _exchange(temporary, target):
        old = _temporary_name(target, "old")
        os.rename(target, old)
        try:
            os.rename(temporary, target)
        except OSError:
            try:
                os.rename(old, target)
            except OSError:  # another process was faster: its version is newer
                _discard(old, target, patterns, keep)
            raise
    _discard(old, target, patterns, keep)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where this system or disk cannot."""
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    names = (os.fsencode(one), os.fsencode(other))
    if hasattr(library, "renameat2"):  # Linux
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        failed = library.renameat2(here, names[0], here, names[1], exchange)
    elif hasattr(library, "renamex_np"):  # macOS
        failed = library.renamex_np(*names, 2)  # RENAME_SWAP
    else:
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _discard(old: Path, target: Path, patterns: Sequence[str], keep: Sequence[str]) -> None:
    """Delete a replaced version, file by file; files of others go back to their place."""
    left = []
    for name, facts in _entries(old):
        file = old / name
        kept = _is_kept(name, keep) and (facts.st_nlink > 1 or os.path.lexists(target / name))
        try:
            if kept or _is_own(name, facts, patterns):
                file.unlink()
            elif not _move_back(file, target / name):
                left.append(name)
        except FileNotFoundError:
            continue
        except OSError:
            left.append(name)
    _remove_empty(old)
    if left:
        place = f"they are kept in {old}: {some_of(left, 5)}"
        warnings.warn(f"{target} was replaced while files came into it; {place}", stacklevel=2)


def _move_back(file: Path, place: Path) -> bool:
    """Move a file of others back to its name, unless the name is taken; whether it moved."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir():
        place.mkdir(exist_ok=True)
        file.rmdir()
        return True
    try:
        os.link(file, place, follow_symlinks=False)
    except OSError:
        return False
    file.unlink()
    return True


def _sweep(target: Path, kind: FolderKind | None, keep: Sequence[str]) -> None:
    """Delete what killed processes of this host left of this folder, as far as it belongs to the kind."""
    if kind is None:
        return
    stale = _leftovers(target, "tmp", dead=True) + (_leftovers(target, "old", dead=True) if target.exists() else [])
    for folder in stale:
        if folder.is_symlink() or not folder.is_dir():
            continue
        for name, facts in _entries(folder):
            file = folder / name
            unfinished = _LIBRARYS_OWN.fullmatch(file.name) or _INSIDE.fullmatch(Path(name).parent.name)
            own = _is_own(name, facts, [escape(name)] if unfinished else kind.files)
            if own or (_is_kept(name, keep) and facts.st_nlink > 1):
                file.unlink(missing_ok=True)
        _remove_empty(folder)


def _recover(target: Path) -> bool:
    """Bring back a version that a killed process moved aside; whether there was one."""
    if os.path.lexists(target):
        return False
    for aside in reversed(_leftovers(target, "old", dead=True)):
        with suppress(OSError):
            os.rename(aside, target)
            return True
    return False


def read_whole(folder: str | Path, read: Callable[[Path], T]) -> T:
    """`read(folder)`, all from one version of a folder that others may replace meanwhile; its errors are raised.

    Where the folder was replaced while it read, it is called again; OSError where that never ends.
    """
    folder = Path(folder)
    for _ in range(_TRIES):
        try:
            pin = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))  # while open, its inode is not reused
        except FileNotFoundError:
            target = _resolved(folder)
            if _recover(target):
                continue
            if not os.path.lexists(target) and not _leftovers(target, "old", dead=False):
                return read(folder)
            time.sleep(0.01)  # another process is between two steps
            continue
        except OSError:
            return read(folder)
        try:
            version = os.fstat(pin)
            try:
                value = read(folder)
            except Exception:
                if _is_version(folder, version):
                    raise
                continue
            if _is_version(folder, version):
                return value
        finally:
            os.close(pin)
    raise OSError(errno.EBUSY, "the folder is replaced again and again while it is read: try again", str(folder))


def _is_version(folder: Path, version: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(folder), version)
    except OSError:
        return False


def write_atomic(path: str | Path, content: bytes | str) -> Path:
    """Write bytes, or text as UTF-8; on any error (a full disk, say) the old file stays as it was."""
    if isinstance(content, str):
        content = content.encode("utf-8")
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)


def remove_output(folder: Path, kind: FolderKind) -> list[str]:
    """Delete a folder's files of the kind, in the order of `kind.files`, then the folder unless it holds others.

    The names of the other files are returned.
    """
    for pattern in kind.files:
        for name, facts in _entries(folder) if folder.is_dir() else []:
            if _is_own(name, facts, [pattern]):
                (folder / name).unlink(missing_ok=True)
    _remove_empty(folder)
    return [name for name, _ in _entries(folder)] if folder.is_dir() else []
