"""Limits in bytes for what all threads of a process hold at once: images being decoded, and bytes read whole."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from typing import Final

from sppfeat.errors import ImageError
from sppfeat.images.limits import MAX_WHOLE_FILE

# Of members and objects that are held whole while they are decoded: two of the largest, or hundreds of photographs.
HELD_BYTES: Final = 2 * MAX_WHOLE_FILE


class DecodingMemory:
    """A limit in bytes for all images that are being decoded; an image above it is decoded alone.

    Images wait in order, so that a large one does not wait forever.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0
        self._turn = threading.Lock()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, amount: int) -> Iterator[None]:
        """Wait for `amount` bytes, and hold them within the block."""
        with self._turn, self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + amount <= self._most)
            self._taken += amount
        try:
            yield
        finally:
            with self._changed:
                self._taken -= amount
                self._changed.notify_all()

    def lend(self, count: int, *, keep: int) -> int:
        """Lower the limit by what each of `count` other processes may use, which is returned, but not below `keep`."""
        with self._changed:
            each = max(0, self._most - keep) // count
            self._most -= each * count
            return each

    def regain(self, amount: int) -> None:
        """Raise the limit by what was lent."""
        with self._changed:
            self._most += amount
            self._changed.notify_all()


_held: Final = DecodingMemory(HELD_BYTES)


class HeldFile(io.RawIOBase):
    """A file in memory, which counts among `HELD_BYTES` until it is closed if that was `taken`."""

    def __init__(self, content: bytes, taken: contextlib.ExitStack | None = None) -> None:
        self._content = io.BytesIO(content)
        self._taken = taken or contextlib.ExitStack()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        return self._content.readinto(buffer)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._content.seek(offset, whence)

    def close(self) -> None:
        if not self.closed:
            self._content.close()
            self._taken.close()
        super().close()


def hold(size: int, read: Callable[[], bytes]) -> HeldFile:
    """What `read` returns, as a file. size: its length in bytes, which is waited for before. Raises ImageError for more
    than `MAX_WHOLE_FILE`."""
    check_held(size)
    taken = contextlib.ExitStack()
    taken.enter_context(_held.take(size))
    try:
        return HeldFile(read(), taken)
    except BaseException:
        taken.close()
        raise


def check_held(size: int) -> None:
    """Raise ImageError for an image of so many bytes, if it is one that is read whole."""
    if size > MAX_WHOLE_FILE:
        raise ImageError(f"image of {size:,} bytes: expected at most {MAX_WHOLE_FILE:,} here, where it is read whole")
