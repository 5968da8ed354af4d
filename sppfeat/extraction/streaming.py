"""What a run over a store of shards has to do, told as the sources are listed: nothing here grows with their number."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Final, NamedTuple, Protocol

import numpy as np

from sppfeat.extraction.matching import BloomFilter, KnownRows, RowSet, locate, repeats
from sppfeat.extraction.plan import Job, Todo
from sppfeat.images import NO_FINGERPRINT, Item, fingerprints
from sppfeat.store import Status, name_digests, row_names

# The least rows of a new shard where several workers share the work, and the shards of each. Shards grow with the
# number of images listed so far, so that at the end no worker is alone with more than an eighth of its work.
_LEAST_ROWS: Final = 256
_SHARDS_OF_A_WORKER: Final = 8
# Rows that are looked up together: a few dozen megabytes of items, and a shard is searched in milliseconds.
BATCH_ROWS: Final = 65_536


class ShardRows(KnownRows, Protocol):
    """The rows of one shard, as it is on disk.

    states: status [n], file_size [n] and file_mtime_ns [n]. names: of some rows [k]. complete: no row is pending.
    """

    @property
    def complete(self) -> bool: ...

    def __len__(self) -> int: ...

    def states(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...

    def names(self, rows: np.ndarray) -> list[str]: ...


@dataclass
class Listed:
    """What a plan has found so far, counted in rows; gone are those whose file no longer exists, and that stay."""

    images: int = 0
    repeated: int = 0
    reused: int = 0
    failed_before: int = 0
    todo: int = 0
    gone: int = 0


@dataclass
class _Work:
    """What is to be done in one shard."""

    todo: list[Todo] = field(default_factory=list)
    redo: list[int] = field(default_factory=list)
    changed: set[int] = field(default_factory=set)
    rows: int = 0


class _Held:
    """Rows that are not in a file yet."""

    def __init__(self, digests: Sequence[np.ndarray]) -> None:
        self._digests = np.concatenate(digests)

    def digests(self) -> np.ndarray:
        return self._digests


class _Rows(NamedTuple):
    """Rows of listed items: the item, which of its windows, and the digest [2] of the row's name, of each."""

    items: list[Item]
    at: list[int]
    digests: np.ndarray

    def only(self, keep: np.ndarray) -> _Rows:
        places = np.flatnonzero(keep).tolist()
        return _Rows([self.items[n] for n in places], [self.at[n] for n in places], self.digests[keep])


class StreamingPlan:
    """Matches the items of sources with the rows of shards; `jobs` yields what is to be done as soon as it is known.

    A file is looked at only if its row is done or failed. listed: counts, final once `jobs` has ended.
    covers: whether an image of this name would have been listed if it existed; None: of no name. exists: whether there
    is an image of this name. removable: whether a row that was not listed is to be removed, asked once all is listed.
    to_remove: such rows of each shard, ascending, once `jobs` has ended. workers: how many share the jobs; for several,
    new shards are smaller than `shard_rows` until many images are listed. Call `settle` for a new shard that is a file:
    then its digests are not held in memory.
    """

    def __init__(
        self,
        shards: Sequence[ShardRows],
        items: Iterable[Item],
        *,
        shard_rows: int,
        workers: int = 1,
        retry_failed: bool = False,
        covers: Callable[[str], bool] | None = None,
        exists: Callable[[str], bool] = lambda _: True,
        removable: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.listed = Listed()
        self.to_remove: dict[int, np.ndarray] = {}
        self._items = items
        self._shards = shards
        self._known: list[KnownRows] = [*shards]  # and those of this run
        self._filter = BloomFilter()
        self._seen = [RowSet(len(shard)) for shard in shards]
        for shard in shards:
            self._filter.add(shard.digests())
        self._shard_rows = shard_rows
        self._workers = workers
        self._rows_given = 0  # in jobs for new shards
        self._retry_failed = retry_failed
        self._covers, self._exists, self._removable = covers, exists, removable
        self._work: dict[int, _Work] = defaultdict(_Work)
        self._near = 0  # the shard in which rows were last found
        # New rows that wait for their shard to be full.
        self._new: list[tuple[Item, list[int]]] = []
        self._new_digests: list[np.ndarray] = []
        self._new_rows = 0

    def settle(self, shard: int, rows: KnownRows) -> None:
        """A new shard is a file."""
        self._known[shard] = rows

    def jobs(self) -> Iterator[Job]:
        """What is to be done, in the order of the items as far as this is known."""
        deferred: list[_Rows] = []
        waiting = 0
        for batch in self._batches():
            again = repeats(batch.digests)
            self.listed.images += len(again)
            self.listed.repeated += int(again.sum())
            batch = batch.only(~again)
            old = self._filter.may_hold(batch.digests)
            self._add_new(batch.only(~old))
            rest = self._match(batch.only(old), self._nearby())
            if rest.items:
                deferred.append(rest)
                waiting += len(rest.items)
            if waiting >= BATCH_ROWS:
                yield from self._everywhere(deferred)
                deferred, waiting = [], 0
            yield from self._full()
        yield from self._everywhere(deferred)
        yield from self._full()
        while self._new:
            yield self._new_job(min(self._size(), self._new_rows))
        lost = self._look_for_the_missing()
        for shard in sorted(self._work.keys() | lost.keys()):
            yield self._job(shard, lost.get(shard, []))

    def _batches(self) -> Iterator[_Rows]:
        items: list[Item] = []
        at: list[int] = []
        names: list[str] = []
        for item in self._items:
            of_item = row_names(item)
            names += of_item
            items += [item] * len(of_item)
            at += range(len(of_item))
            if len(names) >= BATCH_ROWS:
                yield _Rows(items, at, name_digests(names))
                items, at, names = [], [], []
        if names:
            yield _Rows(items, at, name_digests(names))

    def _nearby(self) -> list[int]:
        return [shard for shard in (self._near, self._near + 1) if shard < len(self._known)]

    def _everywhere(self, deferred: list[_Rows]) -> Iterator[Job]:
        """Look for rows in all shards; what is in none is new after all."""
        for rows in deferred:
            near = self._near
            order = sorted(range(len(self._known)), key=lambda shard: abs(shard - near))
            rows = self._match(rows, order)
            if self._new:
                waiting = locate(rows.digests, [_Held(self._new_digests)], [0]).shard >= 0
                self.listed.repeated += int(waiting.sum())
                rows = rows.only(~waiting)
            self._add_new(rows)
            yield from self._full()

    def _match(self, rows: _Rows, order: Sequence[int]) -> _Rows:
        """Take the rows that are in these shards; returns the others."""
        found = locate(rows.digests, self._known, order)
        for shard in np.unique(found.shard[found.shard >= 0]).tolist():
            which = np.flatnonzero(found.shard == shard)
            if shard >= len(self._shards):  # added by this run
                self.listed.repeated += len(which)
                continue
            self._near = shard
            before = self._seen[shard].add(found.row[which])
            self.listed.repeated += int(before.sum())
            which = which[~before]
            self._sort_out(shard, rows, which.tolist(), found.row[which].tolist())
        return rows.only(found.shard < 0)

    def _sort_out(self, shard: int, rows: _Rows, which: list[int], found: list[int]) -> None:
        """What is to be done with rows of a shard, by their state and that of their files."""
        status, sizes, times = self._shards[shard].states()
        states = list(zip(status[found].tolist(), sizes[found].tolist(), times[found].tolist(), strict=True))
        work = self._work[shard]
        wanted: dict[int, tuple[Item, list[int], list[int]]] = {}
        known = (rows.items[place] for place, (state, *_) in zip(which, states, strict=True) if state != Status.PENDING)
        # Windows of an image come together.
        asked = fingerprints(next(one) for _, one in groupby(known, key=id))
        last: Item | None = None
        file = NO_FINGERPRINT
        for place, row, (state, size, mtime) in zip(which, found, states, strict=True):
            item = rows.items[place]
            no_image = item.problem is not None
            if state != Status.PENDING:
                if item is not last:
                    last, file = item, next(asked)
                same = file == (size, mtime)
                if state == Status.DONE and (file == NO_FINGERPRINT or (same and not no_image)):
                    self.listed.gone += file == NO_FINGERPRINT
                    self.listed.reused += file != NO_FINGERPRINT
                    continue
                if state == Status.FAILED and (no_image or (same and not self._retry_failed)):
                    self.listed.failed_before += 1
                    continue
                work.redo.append(row)
                if state == Status.DONE:
                    work.changed.add(row)
            _, parts, numbers = wanted.setdefault(id(item), (item, [], []))
            parts.append(rows.at[place])
            numbers.append(row)
        for item, parts, numbers in wanted.values():
            part = item if item.windows is None else replace(item, windows=item.windows[parts])
            work.todo.append(Todo(part, numbers))
            work.rows += len(numbers)
            self.listed.todo += len(numbers)
        if not work.rows:
            del self._work[shard]

    def _add_new(self, rows: _Rows) -> None:
        if not rows.items:
            return
        self._filter.add(rows.digests)
        self._new_digests.append(rows.digests)
        for item, at in zip(rows.items, rows.at, strict=True):
            if self._new and self._new[-1][0] is item:
                self._new[-1][1].append(at)
            else:
                self._new.append((item, [at]))
        self._new_rows += len(rows.items)
        self.listed.todo += len(rows.items)

    def _full(self) -> Iterator[Job]:
        """Jobs for full new shards, and for the shard with most to do, if too much is held."""
        while self._new_rows >= (size := self._size()):
            yield self._new_job(size)
        while sum(work.rows for work in self._work.values()) > BATCH_ROWS:
            yield self._job(max(self._work, key=lambda shard: self._work[shard].rows), [])

    def _size(self) -> int:
        """The rows of the next new shard."""
        if self._workers == 1:
            return self._shard_rows
        share = self._rows_given // (_SHARDS_OF_A_WORKER * self._workers)
        return min(self._shard_rows, max(_LEAST_ROWS, share))

    def _job(self, shard: int, lost: list[int]) -> Job:
        work = self._work.pop(shard, _Work())
        return Job(shard, work.todo, redo=sorted(work.redo), changed=frozenset(work.changed), lost=lost)

    def _new_job(self, count: int) -> Job:
        """The first `count` new rows as a shard; the windows of an image may be in two."""
        todo: list[Todo] = []
        row = 0
        taken = 0
        for item, at in self._new:
            here = at[: count - row]
            part = item if item.windows is None else replace(item, windows=item.windows[here])
            todo.append(Todo(part, list(range(row, row + len(here)))))
            row += len(here)
            if len(here) < len(at):
                self._new[taken] = (item, at[len(here) :])
                break
            taken += 1
            if row == count:
                break
        del self._new[:taken]
        self._new_rows -= row
        self._rows_given += row
        digests = np.concatenate(self._new_digests)
        self._new_digests = [digests[row:]]
        self._known.append(_Held([digests[:row]]))
        return Job(len(self._known) - 1, todo, new=True)

    def _look_for_the_missing(self) -> dict[int, list[int]]:
        """Count the rows that no item has, where one would be listed; returns the pending ones whose file is gone."""
        lost: dict[int, list[int]] = {}
        for number, shard in enumerate(self._shards):
            missing = self._seen[number].missing()
            if not len(missing) or (self._covers is None and shard.complete):
                continue
            status = shard.states()[0][missing]
            remove = np.zeros(len(missing), bool)
            for at, (row, name, state) in enumerate(
                zip(missing.tolist(), shard.names(missing), status.tolist(), strict=True)
            ):
                remove[at] = self._removable(name)
                if state == Status.PENDING:
                    if not self._exists(name):
                        lost.setdefault(number, []).append(row)
                elif self._covers is not None and self._covers(name):
                    self.listed.gone += not remove[at]
            if remove.any():
                self.to_remove[number] = missing[remove].astype(np.int32)
        return lost
