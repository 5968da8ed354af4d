"""Files that can be recreated at any time: below `$XDG_CACHE_HOME/sppfeat`, or `~/.cache/sppfeat`.

An entry appears atomically, with a checksum; a damaged entry, or another user's, is ignored. A cache that cannot be
read or written costs time, but is not an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_MAGIC: Final = b"sppfeat-cache-1\n"
_HEADER: Final = len(_MAGIC) + 32


def cache_folder() -> Path:
    """The folder of everything that sppfeat can recreate."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and must be ignored.
    if os.path.isabs(base):
        return Path(base, "sppfeat")
    try:
        return Path.home() / ".cache" / "sppfeat"
    except RuntimeError:  # a user without a home, as in some containers: below a file there is nothing
        return Path(os.devnull, "sppfeat")


def cache_key(made_from: dict[str, object]) -> str:
    """A file name for an entry made from these facts; it changes with any of them."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def read_entry(entry: Path) -> bytes | None:
    """The content of an entry; None unless it is intact and this user's."""
    try:
        # A body is some 10 MB: read once, into its place. O_NONBLOCK: opening a pipe would wait for a writer.
        with open(entry, "rb", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            about = os.fstat(file.fileno())
            # Compiled networks run as programs do: never read another user's.
            if not stat.S_ISREG(about.st_mode) or (hasattr(os, "geteuid") and about.st_uid != os.geteuid()):
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
    """Write an entry; of the entries with its suffix, only the `kept` most recently used stay.

    Concurrent writers each put a whole file in place.
    """
    try:
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Not `output.appearing`, whose partial file would have the same name for all writers.
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
    """Entries beyond those that are kept, and leftovers of killed writers."""
    used = {path: path.stat().st_mtime for path in folder.iterdir()}
    newest = max(used.values(), default=0.0)
    entries = sorted((path for path in used if path.suffix == suffix), key=lambda path: used[path], reverse=True)
    yield from entries[kept:]
    yield from (path for path in used if path.suffix == ".partial" and used[path] < newest - 3600)
