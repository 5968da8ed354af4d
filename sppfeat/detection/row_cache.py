"""What a detector is trained on: rows of windows, gathered image by image in bounded memory, and saved to disk.

A stopped training resumes from its file, which holds all of it: rows, targets, their origin, and which
images of which pass are done.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np

from sppfeat.errors import ModelError, one_line
from sppfeat.files import DAMAGE, appearing_hdf5, check_hdf5, read_document

_COPY_ROWS: Final = 4096
GROUND_TRUTH: Final = -1


class RowCache:
    """Rows [N, D] float16 with targets [N, K] of +1, -1 and 0, up to a fixed capacity.

    origin: [N, 2] the image and the window of each row; windows that are ground truth are `GROUND_TRUTH`.
    Memory is allocated as rows come.
    """

    def __init__(self, capacity: int, dim: int, classes: int) -> None:
        self.capacity = capacity
        self.count = 0
        self._rows = np.empty((capacity, dim), np.float16)
        self._targets = np.empty((capacity, classes), np.int8)
        self._origin = np.empty((capacity, 2), np.int32)
        self._known: set[tuple[int, int]] = set()

    @property
    def rows(self) -> np.ndarray:
        """[N, D]; may be written to."""
        return self._rows[: self.count]

    @property
    def targets(self) -> np.ndarray:
        return self._targets[: self.count]

    @property
    def origin(self) -> np.ndarray:
        return self._origin[: self.count]

    @property
    def free(self) -> int:
        """How many more rows there is room for."""
        return self.capacity - self.count

    def unknown(self, image: int, windows: np.ndarray) -> np.ndarray:
        """The windows [k] of an image that are not among the rows yet."""
        return np.array([w for w in windows.tolist() if (image, w) not in self._known], np.int64)

    def add(self, rows: np.ndarray, targets: np.ndarray, image: int, windows: np.ndarray) -> None:
        """Add rows of one image's windows; there must be room."""
        first, last = self.count, self.count + len(rows)
        self._rows[first:last] = rows
        self._targets[first:last] = targets
        self._origin[first:last, 0] = image
        self._origin[first:last, 1] = windows
        self._known.update((image, w) for w in windows.tolist() if w != GROUND_TRUTH)
        self.count = last

    def keep(self, kept: np.ndarray) -> None:
        """Drop the rows that are false in `kept` [N], in place."""
        rows = np.flatnonzero(kept)
        for start in range(0, len(rows), _COPY_ROWS):
            block = rows[start : start + _COPY_ROWS]
            for values in (self._rows, self._targets, self._origin):
                values[start : start + len(block)] = values[block]
        self.count = len(rows)
        self._known = {(p, w) for p, w in self.origin.tolist() if w != GROUND_TRUTH}

    def drop_easiest(self, weights: np.ndarray, biases: np.ndarray) -> None:
        """Drop a quarter of the rows: those of negatives alone whose highest score by any class is lowest.

        weights: [K, D], biases: [K].
        """
        hardness = np.empty(self.count, np.float32)
        for first in range(0, self.count, _COPY_ROWS):
            block = slice(first, first + _COPY_ROWS)
            scores = self.rows[block].astype(np.float32) @ weights.T + biases
            hardness[block] = np.where(self.targets[block] == -1, scores, -np.inf).max(1)
        hardness[(self.targets == 1).any(1)] = np.inf
        kept = np.ones(self.count, bool)
        kept[np.argsort(hardness, kind="stable")[: self.count // 4]] = False
        kept[np.isposinf(hardness)] = True
        self.keep(kept)

    def keep_classes(self, kept: np.ndarray) -> None:
        """Drop the classes that are false in `kept` [K]; the rows stay."""
        self._targets = np.ascontiguousarray(self._targets[:, kept])

    def state(self) -> dict[str, np.ndarray]:
        """What `restore` takes."""
        return {"rows": self.rows, "targets": self.targets, "origin": self.origin}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over another cache's state. Raises ValueError for rows of another kind, or too many."""
        mine: dict[str, np.ndarray] = {"rows": self._rows, "targets": self._targets, "origin": self._origin}
        count = len(state["rows"])
        if count > self.capacity or any(state[k].shape != (count, v.shape[1]) for k, v in mine.items()):
            raise ValueError("its rows are of another kind")
        for key, values in mine.items():
            values[:count] = state[key]
        self.count = count
        self._known = {(p, w) for p, w in self.origin.tolist() if w != GROUND_TRUTH}


class Reservoir:
    """Per class, a uniform sample of up to `capacity` of the offered rows [D] with targets [4] and their images.

    Vitter, "Random sampling with a reservoir", 1985 (algorithm R).
    """

    def __init__(self, capacity: int, dim: int, classes: int) -> None:
        self.capacity = capacity
        self.offered = np.zeros(classes, np.int64)
        self._rows = np.empty((classes, capacity, dim), np.float16)
        self._targets = np.empty((classes, capacity, 4), np.float32)
        self._images = np.empty((classes, capacity), np.int32)

    def offer(
        self, label: int, rows: np.ndarray, targets: np.ndarray, image: int, generator: np.random.Generator
    ) -> None:
        """Offer rows [n, D] of a class, from one image."""
        for row, target in zip(rows, targets, strict=True):
            place = int(self.offered[label])
            if place >= self.capacity:
                place = int(generator.integers(0, place + 1))
            self.offered[label] += 1
            if place < self.capacity:
                self._rows[label, place] = row
                self._targets[label, place] = target
                self._images[label, place] = image

    def of(self, label: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows [n, D] and targets [n, 4] of a class."""
        count = min(int(self.offered[label]), self.capacity)
        return self._rows[label, :count], self._targets[label, :count]

    def images_of(self, label: int) -> np.ndarray:
        """[n] the image of each row of a class."""
        return self._images[label, : min(int(self.offered[label]), self.capacity)]

    def keep_classes(self, kept: np.ndarray) -> None:
        """Drop the classes that are false in `kept` [K]."""
        self.offered, self._rows, self._targets = self.offered[kept], self._rows[kept], self._targets[kept]
        self._images = self._images[kept]

    def state(self) -> dict[str, np.ndarray]:
        """What `restore` takes."""
        held = [self.of(label) for label in range(len(self.offered))]
        return {
            "offered": self.offered,
            "rows": np.concatenate([rows for rows, _ in held]),
            "targets": np.concatenate([targets for _, targets in held]),
            "images": np.concatenate([self.images_of(label) for label in range(len(self.offered))]),
        }

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over another reservoir's state. Raises ValueError for rows of another kind."""
        if state["offered"].shape != self.offered.shape or state["rows"].shape[1:] != self._rows.shape[2:]:
            raise ValueError("its box rows are of another kind")
        self.offered[:] = state["offered"]
        start = 0
        for label in range(len(self.offered)):
            rows, targets = self.of(label)
            rows[:] = state["rows"][start : start + len(rows)]
            targets[:] = state["targets"][start : start + len(rows)]
            self.images_of(label)[:] = state["images"][start : start + len(rows)]
            start += len(rows)


def save_state(path: Path, identity: str, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
    """Save a training's state to disk atomically."""
    with appearing_hdf5(path, ModelError) as file:
        file.attrs["format"] = "sppfeat-training"
        file.attrs["identity"] = identity
        file.attrs["values"] = json.dumps(values)
        for key, array in arrays.items():
            file.create_dataset(key, data=array)


def read_state(path: Path, identity: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """A training's state; None if there is none. Raises ModelError for that of another training."""
    if not path.exists():
        return None
    try:
        check_hdf5(path)
        with h5py.File(path, "r", locking=False) as file:
            same = file.attrs.get("identity") == identity
            values = read_document(file, "values", dict[str, Any], ModelError)
            arrays = {key: dataset[:] for key, dataset in _datasets(file)} if same else {}
    except (OSError, *DAMAGE) as error:
        raise ModelError(
            f"{path}: expected a stopped training, found: {one_line(error)}; --overwrite starts over"
        ) from None
    if not same:
        raise ModelError(
            f"{path}: a training with other images, windows, recipe or options was stopped here; "
            "use the same ones to resume, or --overwrite to start over"
        )
    return arrays, values


def _datasets(file: h5py.File) -> Iterator[tuple[str, h5py.Dataset]]:
    for key in file:
        yield key, file[key]
