"""How many rows of a store have lost their file: counted on a part of them, since each costs a look at the disk."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from sppfeat.errors import StoreError
from sppfeat.files import unsafe_name
from sppfeat.images import is_lost, is_url
from sppfeat.store.reading import Store
from sppfeat.store.row_names import split_row_name

# 0.2 s on a local disk; of ten million rows, every 150th.
CHECKED_ROWS: Final = 1 << 16
# A network's file system may take a millisecond a file.
CHECK_SECONDS: Final = 2.0
_RUN: Final = 1 << 10  # names that are read together
_THREADS: Final = 8  # which wait for the file system, not for a core


@dataclass(frozen=True)
class LostFiles:
    """checked: rows looked at. lost: those of them whose file no longer exists. rows: of the store."""

    checked: int
    lost: int
    rows: int

    def __str__(self) -> str:
        looked = "" if self.checked == self.rows else " that were looked for"
        among = "" if self.checked == self.rows else f" ({self.rows} in all)"
        if not self.lost:
            return f"all {self.checked}{looked} are there{among}"
        return f"{self.lost} of {self.checked} images{looked} have lost their file{among}"


def count_lost(store: Store) -> LostFiles | None:
    """Count the rows whose file no longer exists; None if that cannot be told: the folder of the images is not on this
    machine, the store is in a bucket, or its names cannot be read.

    All rows are looked at, or of more than CHECKED_ROWS so many, spread evenly; after CHECK_SECONDS no more are. Of a
    member of an archive the archive is looked for, and of a window its image. Names that lead out of the folder are not
    followed.
    """
    root = store.source_root
    if store.url is not None or is_url(root) or not os.path.isdir(root):
        return None
    ends = time.monotonic() + CHECK_SECONDS
    checked = lost = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in _spread(len(store)):
            try:
                names = store.names[first : first + _RUN]
            except StoreError:  # of a damaged shard; to find those is for others
                continue
            parts = [names[at::_THREADS] for at in range(_THREADS)]
            checked += len(names)
            lost += sum(pool.map(lambda part: sum(_is_lost(root, name) for name in part), parts))
            if time.monotonic() > ends:
                break
    return LostFiles(checked, lost, len(store)) if checked or not len(store) else None


def _spread(rows: int) -> Iterator[int]:
    """Where runs of rows begin, CHECKED_ROWS in all, in an order in which the first few are spread evenly, too."""
    runs = -(-rows // _RUN)
    taken = min(runs, max(1, CHECKED_ROWS // _RUN))
    bits = max(1, taken.bit_length())
    for number in range(1 << bits):
        place = int(f"{number:0{bits}b}"[::-1], 2)
        if place < taken:
            yield place * runs // taken * _RUN


def _is_lost(root: str, name: str) -> bool:
    image, window = split_row_name(name)
    return unsafe_name(name) is None and is_lost(root, name) and (window is None or is_lost(root, image))
