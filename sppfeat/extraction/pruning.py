"""Pruning: rows whose images are gone from the sources of a run leave the store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from sppfeat.errors import StoreError, UsageError
from sppfeat.images import Extent, is_lost
from sppfeat.progress import Observer
from sppfeat.store import Folder, split_row_name


def check_prunable(*, windows: bool, cluster: bool) -> None:
    """Raise UsageError for a run that removes no rows."""
    if windows:
        raise UsageError("--prune: expected whole images, found --windows, which list images that may be gone")
    if cluster:
        raise UsageError("--prune: expected no --cluster; the same command without it removes rows afterwards")


def check_whole(prefixes: Iterable[str]) -> None:
    """Raise UsageError unless some source is listed whole; prefixes: see `Sources.prefixes`."""
    if not any(True for _ in prefixes):
        raise UsageError(
            "--prune: expected a folder, an archive or a prefix of a bucket among the sources, found only images and "
            "lists, which do not tell what is gone"
        )


def is_removable(extent: Extent, name: str) -> bool:
    """Whether a row that was not listed has certainly lost its image; see `Extent.lost`."""
    image, window = split_row_name(name)
    return extent.lost(name) and (window is None or is_lost(extent.root, image))


def check_something_stays(place: str | Path, removed: int, rows: int) -> None:
    """Raise StoreError if all rows that a store had are to be removed: the source may be another, or not be there."""
    if removed and removed == rows:
        raise StoreError(
            f"{place}: expected some of its {rows} images in the sources, found none; nothing is removed: is it the "
            "right folder, and its disk mounted? --overwrite starts over"
        )


def tell_unlisted(extent: Extent, observer: Observer) -> None:
    """Note which sources lose no rows because they may be incomplete."""
    for start in extent.unlisted:
        place = f"{extent.root.rstrip('/')}/{start}".rstrip("/")
        observer.note(f"{place}: no images found, or not all could be listed; its rows are kept")


def prune_shards(folder: Folder, lost: Mapping[int, np.ndarray], stop: Callable[[], bool]) -> int:
    """Remove rows from published shards, by their number; returns how many: fewer if `stop` ends it early."""
    removed = 0
    for number, rows in lost.items():
        if stop():
            break
        folder.remove_rows(number, rows)
        removed += len(rows)
    folder.finish(complete=removed == sum(map(len, lost.values())))
    return removed
