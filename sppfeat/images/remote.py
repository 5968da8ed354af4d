"""Images behind URLs, one object each."""

from __future__ import annotations

import contextlib
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec

from sppfeat.errors import ImageError
from sppfeat.images.items import NO_FINGERPRINT, Fingerprint, Item
from sppfeat.images.limits import MAX_WHOLE_FILE
from sppfeat.images.memory import check_held, hold
from sppfeat.images.read_ahead import MAX_AHEAD, READERS, read_ahead
from sppfeat.images.urls import info_of, read_object, read_part

_UNKNOWN: Final = -1


def fingerprints(items: Iterable[Item]) -> Iterator[Fingerprint]:
    """The fingerprints of items, in their order; where each takes a request, many are asked for at a time."""
    waiting: deque[Callable[[], Fingerprint]] = deque()
    with contextlib.ExitStack() as stack:
        pool: ThreadPoolExecutor | None = None
        for item in items:
            if isinstance(item.content, UrlFile) and item.content.size == _UNKNOWN:
                pool = pool or stack.enter_context(ThreadPoolExecutor(READERS, thread_name_prefix="ask-ahead"))
                waiting.append(pool.submit(item.fingerprint).result)
            elif waiting:
                waiting.append(item.fingerprint)
            else:
                yield item.fingerprint()
            if len(waiting) > 2 * READERS:
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()


class UrlFile(msgspec.Struct, frozen=True, tag=True):
    """An object behind a URL. size, stamp: its fingerprint where a listing gave it."""

    url: str
    size: int = _UNKNOWN
    stamp: int = 0

    def fingerprint(self) -> Fingerprint:
        """As listed; an object that was named alone is asked for."""
        if self.size != _UNKNOWN:
            return Fingerprint(self.size, self.stamp)
        try:
            return info_of(self.url)
        except ImageError:
            return NO_FINGERPRINT

    def open(self) -> tuple[io.RawIOBase, Fingerprint]:
        found, fingerprint = read_ahead.take(self) or self._fetch(0 if self.size > MAX_AHEAD else MAX_AHEAD)
        if found is None:
            check_held(fingerprint.file_size)
            return hold(fingerprint.file_size, lambda: self._fetch_all()[0]), fingerprint
        return hold(len(found), lambda: found), fingerprint

    def expect(self) -> None:
        if self.size <= MAX_AHEAD:
            read_ahead.expect(self, lambda: self._fetch(MAX_AHEAD))

    def is_apart(self) -> bool:
        return False

    def _fetch(self, most: int) -> tuple[bytes | None, Fingerprint]:
        if self.size == _UNKNOWN:
            return read_object(self.url, most=most)
        fingerprint = Fingerprint(self.size, self.stamp)
        if self.size > most:
            return None, fingerprint
        found = read_part(self.url, 0, self.size)
        if len(found) < self.size:
            raise ImageError(f"changed after it was listed: expected {self.size:,} bytes, found {len(found):,}")
        return found, fingerprint

    def _fetch_all(self) -> tuple[bytes, Fingerprint]:
        found, fingerprint = self._fetch(MAX_WHOLE_FILE)
        if found is None:
            raise ImageError(f"sends more than {MAX_WHOLE_FILE:,} bytes")
        return found, fingerprint
