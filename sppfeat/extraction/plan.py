"""What a run has to do, from the items, the store and the files as they are now; it needs no network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from sppfeat.errors import UsageError
from sppfeat.images import NO_FINGERPRINT, ImageList, Item, fingerprints
from sppfeat.store import Status, Store, row_names, split_row_name, window_text


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
    rows whose file no longer exists. lost: the numbers of those that are still pending.
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


class WithWindows:
    """The items that have windows, with them, in the order of the items; then those of images that were not listed.

    windows: [K, 4] by name, rounded to a thousandth of a pixel, as in row names. without: the number of images without
    any, known at the end. Iterating raises UsageError at its end if the windows belong to none of the images.
    """

    def __init__(self, items: Iterable[Item], windows: Mapping[str, np.ndarray], root: str) -> None:
        self._items = items
        self._windows = windows
        self._root = root
        self.without = 0

    def __iter__(self) -> Iterator[Item]:
        used: set[str] = set()
        example, count, some = "", 0, False
        self.without = 0
        for item in self._items:
            example, count = example or item.name, count + 1
            boxes = self._windows.get(item.name)
            some = some or boxes is not None
            if boxes is None or not len(boxes):
                self.without += 1
                continue
            used.add(item.name)
            yield replace(item, windows=_rounded(boxes))
        if not some:
            raise UsageError(
                f"the windows belong to none of the {count} images below {self._root}: "
                f"expected names such as {example!r}, found {next(iter(self._windows), '')!r}"
            )
        for name, boxes in self._windows.items():
            if name not in used and len(boxes):
                problem = f"its image is not in the sources ({name})"
                yield Item(self._root, name, _rounded(boxes), problem)


def _rounded(boxes: np.ndarray) -> np.ndarray:
    """Windows [K, 4] as their names say them, each once, so that they are rounded by one rule."""
    distinct = dict.fromkeys(window_text(box) for box in boxes)
    return np.array([[float(edge) for edge in text.split(",")] for text in distinct])


def with_windows(images: ImageList, windows: Mapping[str, np.ndarray]) -> tuple[ImageList, int]:
    """The images that have windows, with them, and the number of images without; see `WithWindows`."""
    found = WithWindows(images.items, windows, images.root)
    items = list(found)
    repeated = sum(len(boxes) for boxes in windows.values()) - sum(len(row_names(item)) for item in items)
    return ImageList(images.root, items, repeated, images.extent), found.without


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
