"""The map that the page shows: points that the gallery keeps, and sheets of thumbnails in the cache."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from sppfeat.files import cache_folder, cache_key
from sppfeat.images import Item
from sppfeat.retrieval import Gallery, add_map, tile_order
from sppfeat.serve.collection import Collection
from sppfeat.serve.sheets import build_sheets, sheet_count, sheet_file
from sppfeat.store import Box

# Of the work for a gallery without a map, the part that laying out takes.
_LAYING_OUT: Final = 0.7
# Maps whose sheets stay in the cache: those of 100,000 images take some 100 MB.
_KEPT: Final = 4


def sheet_folder(gallery: Gallery) -> Path:
    """Where the sheets of a gallery's map are; another map has another folder."""
    entry = gallery.about.files.map
    assert entry is not None
    made_from = {"rows": gallery.about.row_state, "crc32": [entry.crc32, gallery.about.files.rows.crc32]}
    return cache_folder() / "sheets" / cache_key({"gallery": str(gallery.path.resolve()), **made_from})[:32]


def sheet_of(gallery: Gallery, number: int) -> Path | None:
    """A sheet that is there."""
    if gallery.points is None or not 0 <= number < sheet_count(len(gallery)):
        return None
    file = sheet_file(sheet_folder(gallery), number)
    return file if file.is_file() else None


def is_charted(gallery: Gallery) -> bool:
    """Whether a gallery has a map and all its sheets."""
    if gallery.points is None:
        return False
    folder = sheet_folder(gallery)
    return all(sheet_file(folder, number).is_file() for number in range(sheet_count(len(gallery))))


def chart(collection: Collection, tell: Callable[[float], None]) -> bool:
    """Lay out a gallery's images unless they are, and make the sheets that are missing. Raises GalleryError,
    ReportError, MissingExtraError; StoreBusyError while another process changes the gallery."""
    gallery, share = collection.current(), 0.0
    if gallery.points is None:
        share = _LAYING_OUT
        add_map(collection.path, progress=lambda part: tell(share * part))
        collection.again()
        gallery = collection.current(wait=True)
    assert gallery.points is not None

    def image(row: int) -> tuple[Item, Box | None]:
        shown = collection.shown(gallery, row)
        return shown.item, shown.window

    folder = sheet_folder(gallery)
    _forget(folder.parent, folder)
    build_sheets(image, tile_order(gallery.points), folder, progress=lambda part: tell(share + (1 - share) * part))
    return True


def _forget(folder: Path, kept: Path) -> None:
    """Remove the sheets of maps that were not looked at for the longest time."""
    with contextlib.suppress(OSError):
        kept.mkdir(parents=True, exist_ok=True)
        os.utime(kept)
        others = sorted(folder.iterdir(), key=lambda one: one.stat().st_mtime, reverse=True)
        for old in others[_KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
