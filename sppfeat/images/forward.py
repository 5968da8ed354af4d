"""Reading parts of a stream that can only be read from its beginning, such as a compressed tar."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from sppfeat.errors import ImageError, SppFeatError, one_line

_BLOCK: Final = 1 << 20
# Of the stream behind the furthest part that was read: decoding threads ask for parts slightly out of order.
WINDOW: Final = 32 << 20


class Stream(Protocol):
    """What is read from its beginning."""

    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


class ForwardReader:
    """Parts of a stream, from any thread. In rising order they cost one pass over it; a part before the window of what
    was read last costs another pass from the beginning."""

    def __init__(self, start: Callable[[], Stream], *, window: int = WINDOW) -> None:
        self._start = start
        self._window = window
        self._lock = threading.Lock()
        self._stream: Stream | None = None
        self._blocks: deque[tuple[int, bytes]] = deque()  # where each begins, without gaps
        self._at = 0
        self.passes = 0

    def read(self, start: int, size: int) -> bytes:
        """Bytes `start` to `start + size`. Raises ImageError if the stream is damaged or ends before."""
        with self._lock:
            if self._stream is None or start < (self._blocks[0][0] if self._blocks else self._at):
                self._restart()
            try:
                while self._at < start + size:
                    self._advance(keep=start)
            except BaseException:
                self.close()
                raise
            found = []
            for begin, block in self._blocks:
                if begin < start + size and start < begin + len(block):
                    found.append(block[max(0, start - begin) : start + size - begin])
            return b"".join(found)

    def _restart(self) -> None:
        self.close()
        self._stream = self._start()
        self.passes += 1

    def _advance(self, *, keep: int) -> None:
        assert self._stream is not None
        try:
            block = self._stream.read(_BLOCK)
        except SppFeatError:
            raise
        except Exception as error:  # a damaged stream can raise almost anything
            raise ImageError(f"its archive is damaged: {one_line(error)}") from None
        if not block:
            raise ImageError("its archive ends before it")
        self._blocks.append((self._at, block))
        self._at += len(block)
        while self._blocks[0][0] + len(self._blocks[0][1]) <= min(keep, self._at - self._window):
            self._blocks.popleft()

    def close(self) -> None:
        """Close the stream; the next read starts again."""
        if self._stream is not None:
            with contextlib.suppress(Exception):  # a damaged stream may fail again
                self._stream.close()
        self._stream = None
        self._blocks.clear()
        self._at = 0

    def __del__(self) -> None:
        self.close()
