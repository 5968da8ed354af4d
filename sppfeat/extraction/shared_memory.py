"""Memory that other processes write into, in parts; each is free again when no array lies in it any more."""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections import deque
from typing import Any, Final

import numpy as np

# Parts begin and end at multiples of this: no two processes write to a page of memory.
_PAGE: Final = 4096


class SharedMemory:
    """Bytes without a name: they are gone with the processes that hold `descriptor`. Raises OSError.

    whole: all of them, uint8 [bytes]; whoever keeps it keeps the memory. One thread at a time calls `take`.
    """

    def __init__(self, size: int) -> None:
        self.descriptor = os.memfd_create("sppfeat-images", os.MFD_CLOEXEC)
        try:
            os.truncate(self.descriptor, size)
            self.whole = np.frombuffer(mmap.mmap(self.descriptor, size), np.uint8)
        except BaseException:
            self.close()
            raise
        # Free parts in their order; none adjoins the next.
        self._begins, self._ends = [0], [size]
        self._at = 0
        # Any thread may drop the last array of a part, in the middle of anything: this alone needs no lock.
        self._returned: deque[tuple[int, int]] = deque()

    def close(self) -> None:
        """Close the descriptor; what was mapped stays as long as arrays do."""
        os.close(self.descriptor)

    def take(self, size: int) -> Taken | None:
        """A part of so many bytes; None if there is no room."""
        while self._returned:
            self._free(*self._returned.popleft())
        size = -(-size // _PAGE) * _PAGE
        # Behind the last part: what was taken first is mostly what comes back first.
        first = max(0, bisect_right(self._begins, self._at) - 1)
        for hole in (*range(first, len(self._begins)), *range(first)):
            begin, end = self._begins[hole], self._ends[hole]
            if end - begin < size:
                continue
            self._at = begin + size
            if self._at == end:
                del self._begins[hole], self._ends[hole]
            else:
                self._begins[hole] = self._at
            return Taken(self, begin, begin + size)
        return None

    def give_back(self, begin: int, end: int) -> None:
        """Bytes that nothing uses any more, from any thread."""
        self._returned.append((begin, end))

    def _free(self, begin: int, end: int) -> None:
        after = bisect_right(self._begins, begin)
        if after < len(self._begins) and self._begins[after] == end:
            end = self._ends[after]
            del self._begins[after], self._ends[after]
        if after and self._ends[after - 1] == begin:
            self._ends[after - 1] = end
        else:
            self._begins.insert(after, begin)
            self._ends.insert(after, end)


class Taken:
    """A part of the memory, from begin to end; it is given back when neither it nor an array over it is used."""

    def __init__(self, memory: SharedMemory, begin: int, end: int) -> None:
        self._memory, self.begin, self.end = memory, begin, end

    def keep(self, size: int) -> None:
        """Give back all but the first bytes."""
        end = min(self.end, self.begin + -(-size // _PAGE) * _PAGE)
        if end < self.end:
            self._memory.give_back(end, self.end)
            self.end = end

    def array(self) -> np.ndarray:
        """The bytes, uint8 [bytes]. An array over it keeps it, however it was made of it, and it keeps this part."""
        # Not a slice of the whole: slices of slices keep the first array alone, which knows no parts.
        return np.asarray(self)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        address = self._memory.whole.ctypes.data + self.begin
        return {"version": 3, "typestr": "|u1", "shape": (self.end - self.begin,), "data": (address, False)}

    def __del__(self) -> None:
        if self.end > self.begin:
            self._memory.give_back(self.begin, self.end)
