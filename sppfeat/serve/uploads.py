"""Query images that were sent: kept in memory within a bound, the last used the longest.

None is kept on disk: while a request is read, a large one is in a temporary file without a name.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
from collections import OrderedDict
from dataclasses import dataclass

from sppfeat.errors import ImageError
from sppfeat.images import NO_FINGERPRINT, Fingerprint, HeldFile, Item, decoding, open_image, upright_size


@dataclass(frozen=True)
class _Bytes:
    """The content of an item that is in memory."""

    data: bytes

    def open(self) -> tuple[io.RawIOBase, Fingerprint]:
        return HeldFile(self.data), self.fingerprint()

    def fingerprint(self) -> Fingerprint:
        return NO_FINGERPRINT

    def expect(self) -> None:
        pass

    def is_apart(self) -> bool:
        return False


@dataclass(frozen=True)
class Query:
    """An image that is searched with: its id, the name to show, the item, and width and height of it upright.

    row: of the gallery, if it is one of its images.
    """

    id: str
    name: str
    item: Item
    size: tuple[int, int]
    row: int | None = None


def read_size(item: Item, max_pixels: int) -> tuple[int, int]:
    """Width and height of the upright image, from its header; PNG may say only after its pixels which side is up.

    Raises ImageError if it is none, or if it has more than `max_pixels`.
    """
    image, _ = open_image(item)
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(f"expected at most {max_pixels:,} pixels, found {width} x {height}")
        with decoding(image) if image.format == "PNG" else contextlib.nullcontext():
            return upright_size(image, orientation="exif")[0]


def quick_size(item: Item, max_pixels: int) -> tuple[int, int] | None:
    """The same, but None where pixels would be decoded for it."""
    image, _ = open_image(item)
    with image:
        if image.format == "PNG" and "exif" not in image.info:
            return None
    return read_size(item, max_pixels)


class Uploads:
    """The last query images, by id, `most` bytes of them."""

    def __init__(self, most: int, max_pixels: int) -> None:
        self._most, self._max_pixels = most, max_pixels
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[Query, int]] = OrderedDict()
        self._bytes = 0

    def add(self, name: str, data: bytes) -> Query:
        """Keep an image; the same bytes of the same name get the same id. Raises ImageError."""
        told = hashlib.sha256(name.encode("utf-8", "surrogatepass") + b"\0")
        told.update(data)
        key = f"u-{told.hexdigest()[:32]}"
        if (known := self.get(key)) is not None:
            return known
        # A name without a folder: nothing of it is ever used as a path.
        item = Item("", key, content=_Bytes(data))
        query = Query(key, name, item, read_size(item, self._max_pixels))
        with self._lock:
            if key not in self._kept:
                self._kept[key] = query, len(data)
                self._bytes += len(data)
            while self._bytes > self._most and len(self._kept) > 1:
                _, (_, length) = self._kept.popitem(last=False)
                self._bytes -= length
        return query

    def get(self, key: str) -> Query | None:
        """A query that is still kept."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            self._kept.move_to_end(key)
            return found[0]
