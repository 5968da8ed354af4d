"""An image of a store, as groups of duplicates and crops show it."""

from __future__ import annotations

from dataclasses import dataclass

from sppfeat.store import Box, UnitRows, item_of


@dataclass(frozen=True)
class Member:
    """An image of a group. score: its cosine similarity with the first of the group. path: None if the file is missing.

    size: width and height of the image in pixels. box: the window in it, if the row describes one.
    """

    name: str
    score: float
    size: tuple[int, int]
    file_size: int
    path: str | None
    box: Box | None = None


def member_of(rows: UnitRows, at: int, score: float) -> Member:
    """The image at a position among rows."""
    store, place = rows.store, int(rows.rows[at])
    item, box = item_of(store.source_root, rows.names[at])
    width, height = store.image_size[place].tolist()
    there = item.path if item.is_there() else None
    return Member(rows.names[at], score, (width, height), int(store.file_size[place]), there, box)
