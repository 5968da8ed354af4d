"""Files that can be made again at any time: below `$XDG_CACHE_HOME/sppfeat`, or `~/.cache/sppfeat`.

An entry appears at once, whole, with a checksum; one that is damaged or another user's is as good as none. A cache that
cannot be read or written costs time, and is no error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_MAGIC: Final = b"sppfeat-cache-1\n"
_HEADER: Final = len(_MAGIC) + 32


def cache_folder() -> Path:
    """Where sppfeat keeps what it can make again."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "sppfeat"


def cache_key(made_from: dict[str, object]) -> str:
    """A file name for what is made from these facts, and changes with any of them."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def read_entry(entry: Path) -> bytes | None:
    """What an entry holds; None when there is none that is whole and this user's."""
    try:
        with open(entry, "rb", buffering=0) as file:  # a body is some 10 MB: read once, into its place
            # Compiled networks are trusted as programs are: another user's are not read.
            if hasattr(os, "geteuid") and os.fstat(file.fileno()).st_uid != os.geteuid():
                return None
            header, body = file.read(_HEADER), file.read()
    except OSError:
        return None
    if header != _MAGIC + hashlib.sha256(body).digest():
        return None
    with contextlib.suppress(OSError):
        os.utime(entry)
    return body


def write_entry(entry: Path, body: bytes, *, kept: int) -> None:
    """Keep an entry, and of those with its suffix beside it the `kept` that were used last.

    Writers at the same moment each put a whole file in place.
    """
    try:
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Not `output.appearing`, whose name beside the file would be the same for all writers.
        descriptor, partial = tempfile.mkstemp(dir=entry.parent, prefix=".", suffix=".partial")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(body).digest() + body)
            os.replace(partial, entry)
        except BaseException:
            os.unlink(partial)
            raise
        for old in _oldest(entry.parent, entry.suffix, kept):
            old.unlink(missing_ok=True)
    except OSError:
        return


def _oldest(folder: Path, suffix: str, kept: int) -> Iterator[Path]:
    """Entries beyond those that are kept, and what killed writers left."""
    used = {path: path.stat().st_mtime for path in folder.iterdir()}
    newest = max(used.values(), default=0.0)
    entries = sorted((path for path in used if path.suffix == suffix), key=lambda path: used[path], reverse=True)
    yield from entries[kept:]
    yield from (path for path in used if path.suffix == ".partial" and used[path] < newest - 3600)
