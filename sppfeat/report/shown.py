"""Images as a page shows them: a thumbnail that links to the image's file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sppfeat.images import Item
from sppfeat.report.names import image_link
from sppfeat.report.thumbnails import THUMBNAIL_SIDE, Heat, Mark, item_thumbnail, row_item, thumbnail
from sppfeat.store import Box


@dataclass(frozen=True)
class Shown:
    """An image on a page: its name; its thumbnail in a `data:` address, and a link to its file. None: not available."""

    name: str
    address: str | None
    link: str | None


def shown_row(
    page: Path,
    root: str,
    name: str,
    *,
    side: int = THUMBNAIL_SIDE,
    mark: Box | None = None,
    heat: Heat | None = None,
    orientation: str = "exif",
) -> Shown:
    """The image of a row, on a page that is written to `page`; see `thumbnail`."""
    address = thumbnail(root, name, side=side, mark=mark, heat=heat, orientation=orientation)
    found = row_item(root, name) if address is not None else None
    return Shown(name, address, image_link(page, found[0]) if found is not None else None)


def shown_item(
    page: Path,
    item: Item,
    name: str,
    *,
    side: int = THUMBNAIL_SIDE,
    box: Box | None = None,
    marks: Sequence[Mark] = (),
    heat: Heat | None = None,
    orientation: str = "exif",
) -> Shown:
    """The image of an item; see `item_thumbnail`."""
    address = item_thumbnail(item, side=side, box=box, marks=marks, heat=heat, orientation=orientation)
    return Shown(name, address, image_link(page, item) if address is not None else None)
