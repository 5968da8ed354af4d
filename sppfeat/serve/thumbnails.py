"""Small JPEGs of images, kept in one SQLite file within a bound of bytes; the least recently used go first.

A cache that cannot be read or written costs time, but is not an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sppfeat.files import cache_folder
from sppfeat.images import NO_FINGERPRINT, Item
from sppfeat.report import small_image

SIDES: Final = (160, 320, 1280)
_QUALITY: Final = 82
# How much of the bound is left free at a time: one deletion for many thumbnails.
_FREED: Final = 0.1


def render(item: Item, side: int) -> bytes:
    """A JPEG of the upright image, its longer side at most `side`. Raises ImageError."""
    shown, _ = small_image(item, side)
    content = io.BytesIO()
    shown.save(content, "JPEG", quality=_QUALITY)
    return content.getvalue()


class Thumbnails:
    """Rendered images by what they were made from."""

    def __init__(self, most: int, file: Path | None = None) -> None:
        self._most = most
        self._file = cache_folder() / "thumbnails-1.sqlite" if file is None else file
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._bytes = 0
        with self._quietly():
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            connection = sqlite3.connect(self._file, check_same_thread=False, timeout=2, isolation_level=None)
            connection.execute("PRAGMA auto_vacuum=FULL")  # before anything is written, or it is not heard
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=OFF")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS thumbnails (key TEXT PRIMARY KEY, used REAL, length INTEGER, jpeg BLOB)"
            )
            connection.execute("CREATE INDEX IF NOT EXISTS by_use ON thumbnails (used)")
            (self._bytes,) = connection.execute("SELECT COALESCE(SUM(length), 0) FROM thumbnails").fetchone()
            self._connection = connection

    def get(self, item: Item, side: int) -> bytes:
        """A JPEG, from the cache if its file is unchanged. What has no fingerprint is not kept. Raises ImageError."""
        fingerprint = item.fingerprint()
        if fingerprint == NO_FINGERPRINT:
            return render(item, side)
        key = hashlib.sha256(repr((item.path, fingerprint, side)).encode("utf-8", "surrogateescape")).hexdigest()
        if (kept := self._read(key)) is not None:
            return kept
        jpeg = render(item, side)
        self._write(key, jpeg)
        return jpeg

    def close(self) -> None:
        """Close the file."""
        with self._lock, self._quietly():
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    def _read(self, key: str) -> bytes | None:
        with self._lock, self._quietly():
            if self._connection is None:
                return None
            found = self._connection.execute("SELECT jpeg FROM thumbnails WHERE key = ?", (key,)).fetchone()
            if found is not None:
                self._connection.execute("UPDATE thumbnails SET used = ? WHERE key = ?", (time.time(), key))
                return bytes(found[0])
        return None

    def _write(self, key: str, jpeg: bytes) -> None:
        with self._lock, self._quietly():
            if self._connection is None:
                return
            added = self._connection.execute(
                "INSERT OR IGNORE INTO thumbnails VALUES (?, ?, ?, ?)", (key, time.time(), len(jpeg), jpeg)
            )
            self._bytes += len(jpeg) * added.rowcount
            if self._bytes > self._most:
                self._free(self._connection)

    def _free(self, connection: sqlite3.Connection) -> None:
        # Other servers may have added to the same file.
        (self._bytes,) = connection.execute("SELECT COALESCE(SUM(length), 0) FROM thumbnails").fetchone()
        gone = []
        for key, length in connection.execute("SELECT key, length FROM thumbnails ORDER BY used"):
            if self._bytes <= (1 - _FREED) * self._most:
                break
            gone.append((key,))
            self._bytes -= length
        connection.execute("BEGIN")
        connection.executemany("DELETE FROM thumbnails WHERE key = ?", gone)
        connection.execute("COMMIT")

    @contextlib.contextmanager
    def _quietly(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                self._connection = None
        except (sqlite3.Error, OSError):
            self._connection = None  # a damaged file, a full disk: go on without
