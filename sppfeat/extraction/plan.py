"""What a run has to do, from the items, the store and the files as they are now; it needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from sppfeat.errors import UsageError
from sppfeat.images import NO_FINGERPRINT, ImageList, Item, fingerprints
from sppfeat.store import Status, Store, row_name, row_names, split_row_name, window_text


class Todo(NamedTuple):
    """An item, with the windows that are to be described, and their rows in the store."""

    item: Item
    rows: list[int]


class Job(NamedTuple):
    """Rows of one file to describe.

    shard: its number among those of the plan; 0 of a store that is one file. new: whether there is no such shard yet:
    its rows are those of `todo`.
    redo: rows that were done or failed before. changed: those of them that were done, and whose file changed.
    lost: pending rows whose file no longer exists.
    """

    shard: int
    todo: list[Todo]
    new: bool = False
    redo: list[int] = []
    changed: frozenset[int] = frozenset()
    lost: list[int] = []

    @property
    def rows(self) -> int:
        """The number of rows to describe."""
        return sum(len(one.rows) for one in self.todo)


@dataclass(frozen=True)
class Plan:
    """What a run does.

    todo: in the order of the items. redo: their rows that were done or failed before. changed: rows of `redo` that
    were done, and whose file changed. reused, failed_before: numbers of rows that stay done, and failed. gone: names of
    rows whose file no longer exists. lost: those of them that are still pending.
    """

    todo: list[Todo]
    redo: set[int]
    changed: set[int]
    reused: int
    failed_before: int
    gone: list[str]
    lost: list[int]

    @property
    def rows(self) -> int:
        """The number of rows to describe."""
        return sum(len(todo.rows) for todo in self.todo)


def with_windows(images: ImageList, windows: Mapping[str, np.ndarray]) -> tuple[ImageList, int]:
    """The images that have windows, with them, in the order of the windows; and the number of images without.

    Windows are rounded to a thousandth of a pixel, as in row names. Windows of an unlisted image make an item with a
    problem. Raises UsageError if the windows belong to none of the images.
    """
    known = {item.name: item for item in images.items}
    if not known.keys() & windows.keys():
        raise UsageError(
            f"the windows belong to none of the {len(known)} images below {images.root}: "
            f"expected names such as {next(iter(known), '')!r}, found {next(iter(windows), '')!r}"
        )
    items, count = [], 0
    for name, boxes in windows.items():
        item = known.get(name) or Item(images.root, name, problem=f"its image is not in the sources ({name})")
        first: dict[str, int] = {}
        for at, box in enumerate(boxes):
            first.setdefault(row_name(name, box), at)
        distinct = list(first.values())
        count += len(boxes)
        if distinct:
            # As the names say them, so that they are rounded once.
            rounded = [[float(edge) for edge in window_text(boxes[at]).split(",")] for at in distinct]
            items.append(replace(item, windows=np.array(rounded)))
    without = sum(name not in windows or not len(windows[name]) for name in known)
    repeated = count - sum(len(row_names(item)) for item in items)
    return ImageList(images.root, items, repeated), without


def make_plan(store: Store, rows: Mapping[str, int], images: ImageList, *, retry_failed: bool) -> Plan:
    """Compare the items with the rows of a store; `rows` has row numbers by name."""
    status = store.status.tolist()
    files = list(zip(store.file_size[:].tolist(), store.file_mtime_ns[:].tolist(), strict=True))
    todo: list[Todo] = []
    gone: list[str] = []
    redo: set[int] = set()
    listed: set[str] = set()
    reused = failed_before = 0

    def is_known(item: Item) -> bool:
        """Whether a row of it is not pending: others are read anyway."""
        return any(status[rows[name]] != Status.PENDING for name in row_names(item))

    asked = fingerprints(item for item in images.items if is_known(item))
    for item in images.items:
        wanted: list[int] = []
        names = row_names(item)
        file = next(asked) if is_known(item) else NO_FINGERPRINT
        listed.update(names)
        for at, name in enumerate(names):
            row = rows[name]
            no_image = item.problem is not None
            if status[row] == Status.PENDING:
                wanted.append(at)
            elif status[row] == Status.DONE and file == NO_FINGERPRINT:
                gone.append(name)
            elif status[row] == Status.DONE and file == files[row] and not no_image:
                reused += 1
            elif status[row] == Status.FAILED and (no_image or (file == files[row] and not retry_failed)):
                failed_before += 1
            else:
                wanted.append(at)
                redo.add(row)
        if wanted:
            part = item if item.windows is None else replace(item, windows=item.windows[wanted])
            todo.append(Todo(part, [rows[names[at]] for at in wanted]))
    gone += [n for n in store.names if n not in listed and not _is_there(images, n)]
    lost = [rows[name] for name in gone if status[rows[name]] == Status.PENDING]
    changed = {row for row in redo if status[row] == Status.DONE}
    return Plan(todo, redo, changed, reused, failed_before, gone, lost)


def _is_there(images: ImageList, name: str) -> bool:
    """Whether a row's file exists: the image of that name, or the one that its window is on."""
    return images.has(name) or images.has(split_row_name(name)[0])
