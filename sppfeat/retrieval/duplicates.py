"""Near-duplicates: groups of images whose descriptors are almost equal, found by comparing every pair exactly.

Two images belong together if their cosine similarity reaches the threshold, or if a chain of such pairs links them.
In a group the image with the most pixels comes first: the one to keep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from sppfeat.errors import UsageError
from sppfeat.report import thumbnail, write_page
from sppfeat.store import Box, Store, UnitRows, block_rows, item_of, unit_rows

DEFAULT_THRESHOLD: Final = 0.95
# Cosines of equal rows differ from 1 by the rounding of float32.
ROUNDING: Final = 1e-6
# Blocks of rows kept while all others are read, so that those are seldom read and converted from float16.
KEPT_BLOCKS: Final = 8
# Rows on both sides of a block of scores: large enough for matrix products at full speed; the pairs take some tens of
# MB even if all of them match.
TILE: Final = 1024
# Pairs linked at once: linking passes over all rows, however few the pairs.
WAITING_PAIRS: Final = 1 << 18
# With more thumbnails, a phone could not open the page.
PAGE_GROUPS: Final = 200
PAGE_MEMBERS: Final = 48


@dataclass(frozen=True)
class Member:
    """An image of a group: score is its cosine similarity with the group's first. path: None if the file is missing.

    size: width and height of the image in pixels. box: the window in it, if the row describes one.
    """

    name: str
    score: float
    size: tuple[int, int]
    file_size: int
    path: str | None
    box: Box | None = None


@dataclass(frozen=True)
class Duplicates:
    """Groups of two or more, the largest first. images: the number compared. pairs: those that reach the threshold.

    root: the folder that names are relative to.
    """

    store: str
    root: str
    threshold: float
    images: int
    pairs: int
    groups: list[list[Member]]

    @property
    def spare(self) -> int:
        """Images that are not the first of their group."""
        return sum(len(group) - 1 for group in self.groups)


def find_duplicates(
    store: Store, threshold: float = DEFAULT_THRESHOLD, *, progress: Callable[[float], None] = lambda part: None
) -> Duplicates:
    """Compare all pairs of a finished store's described rows.

    threshold: cosine similarity, above 0 and at most 1. progress: called with the fraction of the work done, 0 to 1.
    Raises UsageError, StoreError.
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"threshold must be above 0 and at most 1, found {threshold}")
    rows = unit_rows(store)
    links = _Links(len(rows))
    pairs = 0
    outer = KEPT_BLOCKS * block_rows(rows.dim)
    size = min(TILE, block_rows(rows.dim))
    total = len(rows) * (len(rows) + 1) / 2
    done = 0
    for top in range(0, len(rows), outer):
        kept = rows.take(slice(top, top + outer))
        for start in range(top, len(rows), size):
            inside = start + size <= top + len(kept)
            passing = kept[start - top :][:size] if inside else rows.take(slice(start, start + size))
            # Skip blocks whose pairs were all met the other way round.
            for at in range(0, min(len(kept), start - top + size), size):
                scores = kept[at : at + size] @ passing.T
                one, other = np.nonzero(scores >= threshold - ROUNDING)
                one, other = one + (top + at), other + start
                before = one < other
                links.join(one[before], other[before])
                pairs += int(before.sum())
                done += scores.size
            progress(min(1.0, done / total))
    groups = [_members(rows, members) for members in links.groups()]
    groups.sort(key=lambda group: (-len(group), group[0].name))
    return Duplicates(store.place, store.source_root, threshold, len(rows), pairs, groups)


class _Links:
    """Which rows are linked, through any number of pairs: every row points towards the lowest of its group."""

    def __init__(self, count: int) -> None:
        self._lowest = np.arange(count)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def join(self, one: np.ndarray, other: np.ndarray) -> None:
        """Link pairs of rows. Already linked ones cost nothing; where everything is alike, they are nearly all."""
        new = self._lowest[one] != self._lowest[other]
        if new.any():
            self._waiting.append((one[new], other[new]))
            if sum(len(pairs) for pairs, _ in self._waiting) >= WAITING_PAIRS:
                self._settle()

    def _settle(self) -> None:
        """Spread the lowest numbers along the pending links until nothing changes."""
        if not self._waiting:
            return
        lowest = self._lowest
        one, other = (np.concatenate(ends) for ends in zip(*self._waiting, strict=True))
        self._waiting = []
        while True:
            a, b = lowest[one], lowest[other]
            differ = a != b
            if not differ.any():
                return
            one, other, a, b = one[differ], other[differ], a[differ], b[differ]
            np.minimum.at(lowest, np.maximum(a, b), np.minimum(a, b))
            while not np.array_equal(shorter := lowest[lowest], lowest):
                lowest[:] = shorter

    def groups(self) -> list[np.ndarray]:
        """Rows of each group of two or more, in rising order."""
        self._settle()
        order = np.argsort(self._lowest, kind="stable")
        starts = np.flatnonzero(np.diff(self._lowest[order], prepend=-1))
        return [part for part in np.split(order, starts[1:]) if len(part) > 1]


def _members(rows: UnitRows, which: np.ndarray) -> list[Member]:
    store = rows.store
    places = rows.rows[which]
    pixels = store.image_size[places].astype(np.int64).prod(1)
    order = np.lexsort((which, -store.file_size[places], -pixels))
    which, places = which[order], places[order]
    first = rows.take(which[:1])[0]
    size = block_rows(rows.dim)
    scores = np.concatenate([rows.take(which[at : at + size]) @ first for at in range(0, len(which), size)])
    members = []
    for at, place, score in zip(which, places, scores, strict=True):
        item, box = item_of(store.source_root, rows.names[at])
        width, height = store.image_size[place].tolist()
        there = item.path if item.is_there() else None
        members.append(Member(rows.names[at], float(score), (width, height), int(store.file_size[place]), there, box))
    return members


def write_duplicates_page(path: Path, found: Duplicates) -> None:
    """Write the groups with thumbnails to one HTML file. Raises ReportError, MissingExtraError."""
    shown = [
        {
            "members": [
                {
                    "name": one.name,
                    "thumbnail": thumbnail(found.root, one.name),
                    "size": one.size,
                    "score": one.score,
                }
                for one in group[:PAGE_MEMBERS]
            ],
            "count": len(group),
            "lowest": min(one.score for one in group),
        }
        for group in found.groups[:PAGE_GROUPS]
    ]
    write_page(path, "duplicates.html", {"found": found, "groups": shown})
