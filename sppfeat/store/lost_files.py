"""How many rows of a store have lost their file, or have another one now: counted on a part of them, since each costs a
look at the disk."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from sppfeat.errors import StoreError
from sppfeat.files import unsafe_name
from sppfeat.images import NO_FINGERPRINT, Fingerprint, fingerprint_of, is_lost, is_url, name_to_path, places_within
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
    """checked: rows looked at. lost: those of them whose file no longer exists. rows: of the store. changed: those
    looked at whose file has another size or time than the one that was described, or that failed."""

    checked: int
    lost: int
    rows: int
    changed: int = 0

    @property
    def as_described(self) -> bool:
        """Whether all that were looked at are there and unchanged."""
        return not self.lost and not self.changed

    def __str__(self) -> str:
        looked = "" if self.checked == self.rows else " that were looked for"
        among = "" if self.checked == self.rows else f" ({self.rows} in all)"
        if self.as_described:
            return f"all {self.checked}{looked} are there{among}"
        found = [f"{self.lost} of {self.checked} images{looked} have lost their file"] if self.lost else []
        if self.changed:
            whole = "" if found else f" of {self.checked} images{looked}"
            found.append(f"{self.changed}{whole} have changed since")
        return " and ".join(found) + among


def count_lost(store: Store) -> LostFiles | None:
    """Count the rows whose file no longer exists or was changed; None if that cannot be told: the folder of the images
    is not on this machine, the store is in a bucket, or its names cannot be read.

    All rows are looked at, or of more than CHECKED_ROWS so many, spread evenly; after CHECK_SECONDS no more are. Of a
    member of an archive the archive is looked for, and whether it changed is not told; of a window its image is looked
    at. Names that lead out of the folder are not followed.
    """
    root = store.source_root
    if store.url is not None or is_url(root) or not os.path.isdir(root):
        return None
    ends = time.monotonic() + CHECK_SECONDS
    checked = lost = changed = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in _spread(len(store)):
            try:
                names = store.names[first : first + _RUN]
            except StoreError:  # of a damaged shard; to find those is for others
                continue
            sizes, times = (each[first : first + _RUN].tolist() for each in (store.file_size, store.file_mtime_ns))
            files = list(zip(names, map(Fingerprint, sizes, times), strict=True))
            checked += len(names)
            parts = [files[at::_THREADS] for at in range(_THREADS)]
            for states in pool.map(lambda part: [file_state(root, *file) for file in part], parts):
                lost += states.count("lost")
                changed += states.count("changed")
            if time.monotonic() > ends:
                break
    return LostFiles(checked, lost, len(store), changed) if checked or not len(store) else None


def _spread(rows: int) -> Iterator[int]:
    """Where runs of rows begin, CHECKED_ROWS in all, in an order in which the first few are spread evenly, too."""
    runs = -(-rows // _RUN)
    taken = min(runs, max(1, CHECKED_ROWS // _RUN))
    bits = max(1, taken.bit_length())
    for number in range(1 << bits):
        place = int(f"{number:0{bits}b}"[::-1], 2)
        if place < taken:
            yield place * runs // taken * _RUN


def file_state(root: str, name: str, described: Fingerprint) -> str | None:
    """Of a row's file: `lost`, `changed`, or None: as it was described, not described yet, or not to be told."""
    image, window = split_row_name(name)
    if unsafe_name(name) is not None:
        return None
    if is_lost(root, name) and (window is None or is_lost(root, image)):
        return "lost"
    if described == NO_FINGERPRINT or any(places_within(image)):
        return None
    found = fingerprint_of(name_to_path(root, image))
    return None if found in (described, NO_FINGERPRINT) else "changed"
