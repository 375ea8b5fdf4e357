"""A cache of adapters: to internalize the same document again, in another process too, is to read a file.

    model.cache = AdapterCache()        # from now on `internalize` and `internalize_each` read and fill it

Each document has a file of its own, named by a hash of its text and of all that made its blocks (see
`DocToLoRA.cache_facts`). While hooks act on the models, nothing is kept or read. Several processes may share a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from d2l_lib.adapter import Adapter
from d2l_lib.documents import check_count
from d2l_lib.formats.tensors import checksum, safetensors_metadata

PLACE = Path(__file__).resolve().parents[1] / ".cache" / "adapters"
LIMIT_BYTES = 2 * 2**30
_VERSION = 7  # raise it where the same model writes other blocks, or files hold something else
_NOTE = "d2l-cache"
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")


@dataclass(frozen=True)
class CachedFile:
    """A file of the cache: its size in bytes, and when it was last used, in nanoseconds since 1970."""

    path: Path
    n_bytes: int
    used: int


def document_key(text: str, facts: Mapping[str, object]) -> str:
    """The name of a document's file: a hash of its text, of what made its blocks, and of the format's version."""
    made_by = json.dumps([_VERSION, facts], sort_keys=True).encode()
    return hashlib.sha256(made_by + b"\0" + text.encode("utf-8", "surrogatepass")).hexdigest()


class AdapterCache:
    """Files of adapters, one to a document; when they are too many, the least recently used leave first.

    folder: None is $D2L_ADAPTER_CACHE, else .cache/adapters beside the package.
    limit_bytes: of all files together. An adapter that is larger is not kept, with a warning.

    Files are complete or absent, also with several writers. Files of others are neither replaced nor deleted: the
    cache's own have a hash as their name, and the same hash inside.
    """

    def __init__(self, folder: str | Path | None = None, *, limit_bytes: int = LIMIT_BYTES):
        check_count(limit_bytes, "limit_bytes")
        self.folder = Path(folder or os.environ.get("D2L_ADAPTER_CACHE") or PLACE)
        self.limit_bytes = limit_bytes

    def __repr__(self) -> str:
        return f"AdapterCache({str(self.folder)!r}, limit_bytes={self.limit_bytes})"

    def path(self, key: str) -> Path:
        """The file of a key, whether it is there or not."""
        return self.folder / f"{key}.safetensors"

    def read(self, key: str) -> Adapter | None:
        """The adapter that was written under this key, bit for bit, or None. Its file is mapped into memory.

        A damaged file counts as absent, with a warning: the next `write` replaces it.
        """
        path = self.path(key)
        try:
            adapter = Adapter.load(path)
            notes = safetensors_metadata(path) or {}
            if notes.get(_NOTE) != key:
                raise ValueError(f"{path} was not written by the cache")
            if notes.get("checksum") != checksum(path):
                raise ValueError(f"{path} holds other numbers than were written")
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            warnings.warn(f"the cache of adapters skips a file, its document is internalized: {error}", stacklevel=2)
            return None
        return adapter

    def write(self, key: str, adapter: Adapter) -> None:
        """Keep an adapter under this key. A warning says why it was not: a full disk, a file of others, the limit."""
        if adapter.nbytes > self.limit_bytes:
            size, limit = adapter.nbytes / 1e6, self.limit_bytes / 1e6
            advice = "AdapterCache(limit_bytes=...) sets another limit"
            what = f"one of {size:,.1f} MB, its limit is {limit:,.1f} MB; {advice}"
            warnings.warn(f"the cache of adapters does not keep {what}", stacklevel=2)
            return
        path = self.path(key)
        try:
            adapter.save(path, notes={_NOTE: key})
            self._trim(path)
        except OSError as error:
            warnings.warn(f"the cache of adapters could not keep one: {error}", stacklevel=2)

    def files(self) -> list[CachedFile]:
        """The cache's own files, the least recently used first."""
        return [file for file in self._named() if _is_own(file.path)]

    def clear(self) -> int:
        """Delete the cache's own files; how many there were."""
        files = self.files()
        for file in files:
            file.path.unlink(missing_ok=True)
        return len(files)

    def _named(self) -> list[CachedFile]:
        """The ordinary files with names as the cache gives them, the least recently used first."""
        files = []
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process deleted it
                    if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        facts = entry.stat(follow_symlinks=False)
                        files.append(CachedFile(Path(entry.path), facts.st_size, facts.st_mtime_ns))
        return sorted(files, key=lambda file: (file.used, file.path))

    def _trim(self, newest: Path) -> None:
        """Delete files until all others and the newest are within the limit."""
        files = self._named()
        total = sum(file.n_bytes for file in files)
        for file in files:
            if total <= self.limit_bytes:
                return
            if file.path != newest and _is_own(file.path):
                file.path.unlink(missing_ok=True)
                total -= file.n_bytes


def _is_own(path: Path) -> bool:
    """Whether the cache wrote a file: its key stands inside."""
    try:
        return (safetensors_metadata(path) or {}).get(_NOTE) == path.stem
    except OSError:
        return False
