"""Items to what a network takes, in this process or in others, which write pixels into memory that they share with it.

Such a process runs `main` with two descriptors as its arguments: one for its answers, and the memory. The first line of
JSON on its standard input says what items become. It answers `[]` when it is ready, and then each line with a line.
The end of its input, when its parent is gone, ends it.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from sppfeat.errors import ImageError
from sppfeat.images.archives import from_builtins, to_builtins
from sppfeat.images.items import Fingerprint, Item
from sppfeat.images.resizing import DecodedImage, PreparedImage, decode_image, limit_decoding, prepare_image
from sppfeat.images.unresized import Input, Unresized
from sppfeat.recipe import Recipe
from sppfeat.settings import quiet_pillow

OUT_OF_MEMORY: Final = "cannot be decoded: out of memory"
# Arrays begin at multiples of a cache line.
_LINE: Final = 64


class Unreadable(NamedTuple):
    """An item without an image, and why."""

    reason: str
    fingerprint: Fingerprint


Decoded = PreparedImage | DecodedImage | Unreadable


@dataclass(frozen=True)
class Decoder:
    """What items become: inputs of recipes that differ in the network alone.

    minimum: the shortest side that their networks take. unresized: for a device that resizes; see `decode_image`.
    """

    recipes: tuple[Recipe, ...]
    minimum: int
    unresized: bool

    def decode(self, item: Item) -> Decoded:
        """The inputs of an item, or why there are none."""
        # Taken first: a file that is still being copied is another one by the next run. To ask a bucket takes time.
        early = item.fingerprint() if item.content is None else None
        if item.problem is not None:
            return Unreadable(item.problem, early or item.fingerprint())
        try:
            with quiet_pillow:
                read = decode_image if self.unresized else prepare_image
                return read(item, *self.recipes, minimum=self.minimum)
        except ImageError as error:
            return Unreadable(str(error), early or item.fingerprint())
        except MemoryError:
            return Unreadable(OUT_OF_MEMORY, early or item.fingerprint())

    def told(self, memory: int) -> dict[str, Any]:
        """The first line for a process that decodes so. memory: bytes that an image may take while it is decoded."""
        return {"decoder": msgspec.to_builtins(self), "memory": memory}


class Part(NamedTuple):
    """Bytes of the shared memory, from begin to end."""

    begin: int
    end: int


def told_item(number: int, item: Item, part: Part) -> list[Any]:
    """The line for an item; its pixels go into a part of the memory. A root may contain bytes that are not UTF-8."""
    return [number, os.fsencode(item.root).hex(), item.name, to_builtins(item.content), *part]


class Answer(NamedTuple):
    """What a process says of an item.

    decoded: with arrays in the part of the memory; None where this has no room for them, or decoding takes more memory
    than the process may use, or fails as it never should: the parent then decodes it. used: bytes of the part.
    """

    number: int
    seconds: float
    decoded: Decoded | None
    used: int


def heard_answer(line: Sequence[Any], memory: np.ndarray) -> Answer:
    """An answer. memory: the item's part of it, uint8 [bytes]; arrays are views of it."""
    number, seconds, *rest = line
    if not rest:
        return Answer(number, seconds, None, 0)
    fingerprint = Fingerprint(*rest[0])
    if len(rest) == 2:
        return Answer(number, seconds, Unreadable(rest[1], fingerprint), 0)
    _, size, unresized, used, inputs = rest
    arrays: dict[int, np.ndarray] = {}
    found: list[Any] = []
    for begin, shape, *how in inputs:
        if begin not in arrays:
            height, width, channels = shape
            arrays[begin] = memory[begin : begin + height * width * channels].reshape(shape)
        if unresized:
            to, interpolation, corner, part = how
            found.append(Unresized(arrays[begin], tuple(to), interpolation, tuple(corner), tuple(part)))
        else:
            found.append(arrays[begin])
    made = DecodedImage if unresized else PreparedImage
    return Answer(number, seconds, made(found, tuple(size), fingerprint), used)


def _said(decoded: Decoded, memory: np.ndarray) -> list[Any]:
    """The end of an answer; pixels are written to the item's part of the memory. Empty if that has no room."""
    if isinstance(decoded, Unreadable):
        return [] if decoded.reason == OUT_OF_MEMORY else [decoded.fingerprint, decoded.reason]
    places: dict[int, int] = {}
    used, inputs = 0, []
    for each in decoded.inputs:
        pixels = _pixels(each)
        if id(pixels) not in places:
            begin = -(-used // _LINE) * _LINE
            if begin + pixels.nbytes > len(memory):
                return []
            places[id(pixels)], used = begin, begin + pixels.nbytes
            memory[begin:used].reshape(pixels.shape)[:] = pixels
        how = [each.size, each.interpolation, each.corner, each.shape] if isinstance(each, Unresized) else []
        inputs.append([places[id(pixels)], pixels.shape, *how])
    return [decoded.fingerprint, decoded.size, isinstance(decoded, DecodedImage), used, inputs]


def _pixels(each: Input) -> np.ndarray:
    return each.pixels if isinstance(each, Unresized) else each


def main() -> None:
    """The process that decodes for another; see the module."""
    answers, shared = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8"), int(sys.argv[2])
    memory = np.frombuffer(mmap.mmap(shared, 0), np.uint8)
    told = json.loads(sys.stdin.readline())
    decoder = msgspec.convert(told["decoder"], type=Decoder)
    limit_decoding(told["memory"])

    def say(message: Sequence[Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    try:
        say([])
        for line in sys.stdin:
            number, root, name, content, begin, end = json.loads(line)
            start = time.perf_counter()
            try:
                item = Item(os.fsdecode(bytes.fromhex(root)), name, content=from_builtins(content))
                said = _said(decoder.decode(item), memory[begin:end])
            except Exception:  # the parent decodes the image, and raises the same where it is heard
                said = []
            say([number, time.perf_counter() - start, *said])
    except BrokenPipeError:
        pass
    # Nothing is left to be written, not even to the parent's pipe.
    os._exit(0)
