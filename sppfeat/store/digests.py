"""Digests that identify rows by name, so that planning and merging read 16 bytes a row and no names.

A digest is BLAKE2b with 128 bits of the UTF-8 name. The chance that any two of N different names share one is below
N^2 / 2^129: 1.5e-23 for 10^8 names, far below that of an undetected error of the disk; and nobody can make two such
names on purpose without some 2^64 trials.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import numpy as np

DIGEST_BYTES: Final = 16
# First words of digests that are sorted at once: the memory of `repeated_digests`, 8 bytes for each.
_SORTED: Final = 1 << 20


def name_digests(names: Iterable[str]) -> np.ndarray:
    """[N, 2] uint64: the digests of names, their bytes in order."""
    joined = b"".join(hashlib.blake2b(name.encode(), digest_size=DIGEST_BYTES).digest() for name in names)
    return np.frombuffer(joined, "<u8").reshape(-1, 2)


def repeated_digests(blocks: Callable[[], Iterable[np.ndarray]]) -> Iterator[tuple[int, int]]:
    """Pairs of rows with one digest: each later row, with the first row that has it; ordered by digest.

    blocks: gives the digests [n, 2] of all rows, in order, each time it is called: once more for every million rows.
    So the memory does not grow with their number.
    """
    passes = max(1, -(-sum(map(len, blocks())) // _SORTED))
    for number in range(passes):
        if len(suspects := _repeated_words(blocks, number, passes)):
            yield from _pairs(blocks, suspects)


def _repeated_words(blocks: Callable[[], Iterable[np.ndarray]], number: int, passes: int) -> np.ndarray:
    """First words that several digests have. Digests are spread evenly: each pass takes its share of their words."""
    shares = [np.empty(0, np.uint64)]
    for block in blocks():
        shares.append(block[block[:, 0] % np.uint64(passes) == number, 0])
    words = np.concatenate(shares)
    del shares
    words.sort()
    return np.unique(words[1:][words[1:] == words[:-1]])


def _pairs(blocks: Callable[[], Iterable[np.ndarray]], suspects: np.ndarray) -> Iterator[tuple[int, int]]:
    """The pairs of rows among those whose first word is one of some."""
    held: dict[bytes, int] = {}
    start = 0
    for block in blocks():
        for at in np.flatnonzero(np.isin(block[:, 0], suspects)).tolist():
            if (before := held.setdefault(block[at].tobytes(), start + at)) != start + at:
                yield before, start + at
        start += len(block)
