"""The rows of several files as one, read on demand: what a folder of shards looks like to its readers."""

from __future__ import annotations

import operator
import os
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, overload

import h5py
import numpy as np

from sppfeat.errors import StoreError, one_line
from sppfeat.files import DAMAGE, check_hdf5, hdf5_reason
from sppfeat.store.digests import name_digests

if TYPE_CHECKING:
    from sppfeat.store.reading import Store

# Shards that are mapped at a time: rows are mostly read in order, or in ascending order.
OPEN_SHARDS: Final = 8
# Names that are read and kept together, and such blocks of one file: less than 1 MB for each open shard.
_NAME_ROWS: Final = 1 << 10
_NAME_BLOCKS: Final = 4


class Values(Protocol):
    """[N, ...] values that are indexed like an array: an array, a memory map, or the joined columns of shards."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...

    def __array__(self, dtype: Any = ..., /) -> np.ndarray: ...


class Shards:
    """Several stores as one; each is opened when it is read, and only the last OPEN_SHARDS stay open.

    rows: of each. open_shard: by place.
    """

    def __init__(self, rows: Sequence[int], open_shard: Callable[[int], Store]) -> None:
        self.starts = [0]
        for count in rows:
            self.starts.append(self.starts[-1] + count)
        self.open = lru_cache(OPEN_SHARDS)(open_shard)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def rows(self) -> int:
        """The number of rows of all shards."""
        return self.starts[-1]

    def find(self, row: int) -> tuple[Store, int]:
        """The shard of a row, and its place there. Raises IndexError."""
        at = row + self.rows if row < 0 else row
        if not 0 <= at < self.rows:
            raise IndexError(f"row {row} of {self.rows}")
        shard = bisect_right(self.starts, at) - 1
        return self.open(shard), at - self.starts[shard]

    def parts(self, start: int, stop: int) -> Iterator[tuple[Store, slice]]:
        """The shards of consecutive rows, and their places there."""
        shard = bisect_right(self.starts, start) - 1
        while start < stop:
            first, end = self.starts[shard], min(stop, self.starts[shard + 1])
            yield self.open(shard), slice(start - first, end - first)
            start, shard = end, shard + 1


class JoinedRows:
    """One column of all shards, indexed as an array is by its first axis: by a number, a slice, rows or a mask.

    get: the column of an open shard. shape: [N, ...]. Further indices, as in `values[rows, 3:5]`, are slices or
    numbers. A slice within one shard is a view of its file; anything else is a copy.
    """

    def __init__(self, shards: Shards, get: Callable[[Store], Values], dtype: Any, width: tuple[int, ...]) -> None:
        self._shards = shards
        self._get = get
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.shape = (shards.rows, *width)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found: np.ndarray = self[:]
        return found if dtype is None or found.dtype == dtype else found.astype(dtype)

    def __getitem__(self, index: Any, /) -> Any:
        rows, *rest = index if isinstance(index, tuple) else (index,)
        if isinstance(rows, slice) or rows is Ellipsis:
            start, stop, step = slice(None).indices(len(self)) if rows is Ellipsis else rows.indices(len(self))
            if step == 1:
                return self._consecutive(start, stop, rest)
            return self._gather(np.arange(start, stop, step), rest)
        if isinstance(rows, (np.ndarray, list)):
            wanted = np.asarray(rows, None if len(rows) else np.int64)
            if wanted.dtype == bool:
                if wanted.shape != (len(self),):
                    raise IndexError(f"expected a mask of {len(self)} rows, found {list(wanted.shape)}")
                wanted = np.flatnonzero(wanted)
            return self._gather(wanted, rest)
        shard, place = self._shards.find(operator.index(rows))
        return self._get(shard)[(place, *rest)]

    def _consecutive(self, start: int, stop: int, rest: Sequence[Any]) -> np.ndarray:
        pieces = [self._get(shard)[(place, *rest)] for shard, place in self._shards.parts(start, stop)]
        if not pieces:
            return self._empty(0, rest)
        return np.asarray(pieces[0]) if len(pieces) == 1 else np.concatenate(pieces)

    def _gather(self, rows: np.ndarray, rest: Sequence[Any]) -> np.ndarray:
        if rows.dtype.kind not in "iu":
            raise IndexError(f"expected rows by number, found {rows.dtype}")
        flat = rows.reshape(-1).astype(np.int64)
        if len(odd := np.flatnonzero((flat < -len(self)) | (flat >= len(self)))):
            raise IndexError(f"row {flat[odd[0]]} of {len(self)}")
        flat = np.where(flat < 0, flat + len(self), flat)
        out = self._empty(len(flat), rest)
        starts = np.asarray(self._shards.starts)
        of_row = np.searchsorted(starts, flat, "right") - 1
        order = np.argsort(of_row, kind="stable")
        cuts = np.flatnonzero(np.diff(of_row[order])) + 1
        for places in np.split(order, cuts) if len(order) else ():
            shard = int(of_row[places[0]])
            out[places] = self._get(self._shards.open(shard))[(flat[places] - starts[shard], *rest)]
        return out.reshape(*rows.shape, *out.shape[1:])

    def _empty(self, count: int, rest: Sequence[Any]) -> np.ndarray:
        row = np.broadcast_to(np.empty((), self.dtype), (1, *self.shape[1:]))[(0, *rest)]
        return np.empty((count, *np.shape(row)), self.dtype)


def joined(shards: Shards, name: str, dtype: Any, width: tuple[int, ...]) -> JoinedRows:
    """The column that `Store` has by this name."""
    return JoinedRows(shards, operator.attrgetter(name), dtype, width)


class _LazyNames(Sequence[str]):
    """Names that are read on demand; a slice is a list."""

    @abstractmethod
    def _read(self, start: int, stop: int) -> list[str]:
        """The names of consecutive rows."""

    @abstractmethod
    def _one(self, row: int) -> str:
        """The name of a row, not below 0."""

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._read(start, stop)
            return [self[row] for row in range(start, stop, step)]
        row = operator.index(index)
        at = row + len(self) if row < 0 else row
        if not 0 <= at < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self._one(at)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _NAME_ROWS * _NAME_BLOCKS):
            yield from self._read(start, min(len(self), start + _NAME_ROWS * _NAME_BLOCKS))


class FileNames(_LazyNames):
    """The names of one store file, read by its path: a file that has replaced it must have the same names there.

    opened: the file as it was opened. digests: [N, 2] of its names; None: it has none. Raises StoreError.
    """

    def __init__(self, path: Path, count: int, opened: os.stat_result, digests: np.ndarray | None) -> None:
        self._path = path
        self._count = count
        self._opened = opened
        self._digests = digests
        # Not `lru_cache`, which would refer to these names and so keep them until garbage is collected.
        self._blocks: dict[int, list[str]] = {}

    def __len__(self) -> int:
        return self._count

    def _one(self, row: int) -> str:
        number = row // _NAME_ROWS
        block = self._blocks.get(number)
        if block is None:
            block = self._read(number * _NAME_ROWS, min(self._count, (number + 1) * _NAME_ROWS))
            while len(self._blocks) >= _NAME_BLOCKS:
                self._blocks.pop(next(iter(self._blocks)), None)
            self._blocks[number] = block
        return block[row % _NAME_ROWS]

    def _read(self, start: int, stop: int) -> list[str]:
        if stop <= start:
            return []
        try:
            check_hdf5(self._path)
            with h5py.File(self._path, "r", locking=False) as file:
                found: list[str] = file["names"].asstr()[start:stop].tolist()
            # Afterwards, so that no file can come in between.
            is_same = os.path.samestat(os.stat(self._path), self._opened)
        except OSError as error:
            raise StoreError(f"{self._path}: its names could not be read: {hdf5_reason(error)}") from None
        except DAMAGE as error:
            raise StoreError(f"{self._path}: damaged: expected names, found: {one_line(error)}") from None
        if not is_same and (
            self._digests is None or not np.array_equal(name_digests(found), self._digests[start:stop])
        ):
            raise StoreError(f"{self._path}: was replaced while it was read; open the store again")
        if len(found) != stop - start:
            raise StoreError(f"{self._path}: expected {self._count} names, found fewer")
        return found


class JoinedNames(_LazyNames):
    """The names of all shards."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    def __len__(self) -> int:
        return self._shards.rows

    def _one(self, row: int) -> str:
        shard, at = self._shards.find(row)
        return shard.names[at]

    def _read(self, start: int, stop: int) -> list[str]:
        return [name for shard, place in self._shards.parts(start, stop) for name in shard.names[place]]
