"""Which rows of a store the items of a source are: found by digests of names, shard by shard, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, Protocol

import numpy as np

# A row that is new is told from those of the store by one bit of its digest: 64 MiB, whatever the number of rows. Of
# 10 million rows 2 in 100 new ones are looked up in vain, of 100 million 17.
_FILTER_BITS: Final = 29


class KnownRows(Protocol):
    """The rows of one shard, read when they are asked for.

    digests: [n, 2] uint64, see `sppfeat.store.digests`.
    """

    def digests(self) -> np.ndarray: ...


class Found(NamedTuple):
    """The place of a row: shard -1 if it is in none."""

    shard: np.ndarray
    row: np.ndarray


def repeats(digests: np.ndarray) -> np.ndarray:
    """[n] whether a digest [n, 2] occurred before in the same list."""
    order = np.lexsort((np.arange(len(digests)), digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    found = np.zeros(len(digests), bool)
    found[order[1:]] = (ordered[1:] == ordered[:-1]).all(1)
    return found


def locate(wanted: np.ndarray, shards: Sequence[KnownRows], order: Iterable[int]) -> Found:
    """Where the digests [n, 2] are, each of which occurs once; shards are read in this order until all are found."""
    by_first = np.argsort(wanted[:, 0], kind="stable")
    first, second = wanted[by_first, 0], wanted[by_first, 1]
    shard_of, row_of = np.full(len(wanted), -1, np.int64), np.full(len(wanted), -1, np.int64)
    left = len(wanted)
    for shard in order:
        if not left:
            break
        known = shards[shard].digests()
        place = np.searchsorted(first, known[:, 0])
        place[place == len(first)] = 0
        same = np.flatnonzero((first[place] == known[:, 0]) & (second[place] == known[:, 1]))
        found = by_first[place[same]]
        left -= int((shard_of[found] < 0).sum())
        shard_of[found], row_of[found] = shard, same
    return Found(shard_of, row_of)


class BloomFilter:
    """Tells most digests that were never added from those that may have been, by one bit each."""

    def __init__(self) -> None:
        self._bits = np.zeros(1 << (_FILTER_BITS - 3), np.uint8)

    def add(self, digests: np.ndarray) -> None:
        """Add digests [n, 2]."""
        place = digests[:, 0] >> np.uint64(64 - _FILTER_BITS)
        np.bitwise_or.at(self._bits, (place >> np.uint64(3)).astype(np.intp), _bit(place))

    def may_hold(self, digests: np.ndarray) -> np.ndarray:
        """[n] False for digests [n, 2] that were never added."""
        place = digests[:, 0] >> np.uint64(64 - _FILTER_BITS)
        held: np.ndarray = self._bits[(place >> np.uint64(3)).astype(np.intp)] & _bit(place) != 0
        return held


class RowSet:
    """Some rows of a shard, one bit each."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._bits = np.zeros(-(-count // 8), np.uint8)

    def add(self, rows: np.ndarray) -> np.ndarray:
        """Add different rows [n]; returns [n] whether each was there before."""
        bits = _bit(rows.astype(np.uint64))
        before: np.ndarray = (self._bits[rows >> 3] & bits) != 0
        np.bitwise_or.at(self._bits, rows >> 3, bits)
        return before

    def missing(self) -> np.ndarray:
        """The rows that were not added, ascending."""
        held = np.unpackbits(self._bits, count=self._count, bitorder="little")
        return np.flatnonzero(held == 0)


def _bit(place: np.ndarray) -> np.ndarray:
    bit: np.ndarray = np.uint8(1) << (place & np.uint64(7)).astype(np.uint8)
    return bit
