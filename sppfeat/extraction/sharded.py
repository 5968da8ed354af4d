"""Extraction into a folder of shards: planned while the sources are listed, and published shard by shard."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import numpy as np

from sppfeat.errors import BackboneError, DeviceError, MissingExtraError, StoreError, UsageError
from sppfeat.extraction.pipeline import Describer
from sppfeat.extraction.plan import Job
from sppfeat.extraction.pruning import check_something_stays, prune_shards
from sppfeat.extraction.streaming import Listed, StreamingPlan
from sppfeat.extraction.workers import Tally, fill_file
from sppfeat.images import Item, Sources, is_there
from sppfeat.progress import Observer
from sppfeat.recipe import RunOptions
from sppfeat.store import (
    SHARD_ROWS,
    Folder,
    FolderKind,
    Status,
    Store,
    create_folder,
    lock_shard,
    name_digests,
    open_file,
    open_folder,
    row_names,
    split_row_name,
)

if TYPE_CHECKING:
    from sppfeat.extraction.cluster import RayCluster

# Shards whose columns are mapped at a time: what is searched next is mostly what was searched last.
_OPEN_SHARDS: Final = 4
_T = TypeVar("_T")


@dataclass(frozen=True)
class ShardOptions:
    """How a folder of shards is written.

    rows: the most in a shard, at most `SHARD_ROWS`. part: describe only part i of n of the images, i from 1 to n: those
    whose names' digests are i - 1 modulo n, so that every part of one collection is the same wherever it runs.
    """

    rows: int = SHARD_ROWS
    part: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= SHARD_ROWS:
            raise UsageError(f"shard_rows must be from 1 to {SHARD_ROWS}, found {self.rows}")
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise UsageError(f"part must be i/n with i from 1 to n, found {self.part[0]}/{self.part[1]}")


def prepare_folder(
    path: Path,
    describer: Describer,
    options: ShardOptions,
    *,
    root: str,
    fresh: bool,
    kind: FolderKind = Folder,
) -> Folder:
    """The folder to write to, new or as it is. Raises StoreError if it was made with another recipe or of other images.

    kind: what it is opened as. Hold its lock.
    """
    if fresh:
        return create_folder(
            path,
            recipe=describer.recipe,
            weights_sha256=describer.weights_sha256,
            dim=describer.dim,
            source_root=root,
            part=options.part,
            kind=kind,
        )
    folder = open_folder(path, writable=True, kind=kind)
    manifest = folder.manifest
    describer.check_made(path, folder.recipe, manifest.weights_sha256)
    if manifest.part != options.part:
        raise StoreError(
            f"{path}: expected {_show_part(manifest.part)}, which this store describes, "
            f"found {_show_part(options.part)}; choose another output"
        )
    if manifest.source_root != root:
        raise StoreError(
            f"{path}: its names are relative to {manifest.source_root}, these images to {root}; "
            "choose another output, give a root that contains both, or use --overwrite"
        )
    return folder


def _show_part(part: tuple[int, int] | None) -> str:
    return "all images" if part is None else f"part {part[0]}/{part[1]}"


class Filled(NamedTuple):
    """What a run found and did; stopped: before all sources were listed. removed: rows that left the store."""

    listed: Listed
    tally: Tally
    stopped: bool
    removed: int = 0


def fill_shards(
    folder: Folder,
    items: Iterable[Item],
    covers: Callable[[str], bool] | None,
    describer: Describer,
    options: RunOptions,
    shards: ShardOptions,
    *,
    retry_failed: bool,
    device: str,
    observer: Observer,
    stop: Callable[[], bool],
    cluster: RayCluster | None = None,
    removable: Callable[[str], bool] = lambda _: False,
) -> Filled:
    """Describe the items that a folder lacks, or whose files changed, and then remove rows. Hold its lock.

    covers, removable: see `StreamingPlan`. Raises StoreError if all rows that were there are to be removed.
    """
    root = folder.manifest.source_root
    _open_shard.cache_clear()  # of an earlier run in this process; the files may be others now
    numbers = sorted(folder.shards.keys() | folder.building.keys())
    before = [OnDisk(folder, number) for number in numbers]
    plan = StreamingPlan(
        before,
        _part_of(items, shards.part),
        shard_rows=shards.rows,
        workers=1 if cluster is None else cluster.workers,
        retry_failed=retry_failed,
        covers=covers,
        exists=lambda name: is_there(root, name) or is_there(root, split_row_name(name)[0]),
        removable=removable,
    )
    writing = Writing(folder, plan, numbers, Tally(), device, observer, stop)
    with contextlib.ExitStack() as stack:
        stack.callback(_open_shard.cache_clear)  # or the last ones stay open, also those of a mirror that is deleted
        jobs = stack.enter_context(contextlib.closing(_ahead(plan.jobs())))
        if cluster is None:
            writing.run_here(jobs, describer, options)
        else:
            cluster.run(jobs, writing)
    if plan.listed.images:
        writing.tell()
    folder.finish(complete=not writing.stopped)
    lost = {numbers[shard]: rows for shard, rows in plan.to_remove.items()}
    removed = 0
    if lost and not writing.stopped and not folder.building:
        check_something_stays(folder.path, sum(map(len, lost.values())), sum(map(len, before)))
        removed = prune_shards(folder, lost, writing.must_stop)
    return Filled(plan.listed, writing.tally, writing.stopped, removed)


@dataclass
class Writing:
    """The jobs of a plan as shards of a folder: where each is filled, and what is told."""

    folder: Folder
    plan: StreamingPlan
    numbers: list[int]
    tally: Tally
    device: str
    observer: Observer
    stop: Callable[[], bool]
    stopped: bool = False
    started: bool = False

    def run_here(self, jobs: Iterable[Job], describer: Describer, options: RunOptions) -> None:
        """Fill one shard after the other in this process, or with its GPUs."""
        for job in jobs:
            if self.must_stop():
                return
            self.tell()
            before = set(self.folder.building)
            store = self.begin(job)
            try:
                with lock_shard(store.path, self.stop):
                    fill_file(store, job, describer, options, self.tally, self.observer, self.stop)
            except (BackboneError, DeviceError, MissingExtraError):
                # No network was loaded: what was begun for this job alone is as it was.
                if not describer.streams and len(self.folder.building) > len(before):
                    self.folder.discard(store)
                raise
            self.end(store)

    def must_stop(self) -> bool:
        """Whether to stop; remembered."""
        self.stopped = self.stopped or self.stop()
        return self.stopped

    def tell(self) -> None:
        """Tell the observer how much work is known."""
        listed = self.plan.listed
        if not self.started:
            self.started = True
            self.observer.started(todo=listed.todo, reused=listed.reused, device=self.device)
        else:
            self.observer.planned(listed.todo)

    def begin(self, job: Job) -> Store:
        """The shard under work that a job is to fill."""
        if job.new:
            store = self.folder.begin_shard([name for item, _ in job.todo for name in row_names(item)])
            self.plan.settle(job.shard, OnDisk(self.folder, max(self.folder.building)))
            return store
        number = self.numbers[job.shard]
        if number in self.folder.building:
            return open_file(self.folder.building[number])
        return self.folder.rework_shard(number)

    def end(self, store: Store) -> None:
        """Publish a shard if all its rows are described."""
        if not (store.status == Status.PENDING).any():
            self.folder.publish(store)


class OnDisk:
    """The rows of a shard as a plan wants them, opened when they are asked for."""

    def __init__(self, folder: Folder, number: int) -> None:
        self._folder = folder
        self._number = number
        shard = self._open()
        self._count = len(shard)
        self.complete = not (shard.status == Status.PENDING).any()

    def __len__(self) -> int:
        return self._count

    def digests(self) -> np.ndarray:
        return np.asarray(self._open().name_digests)

    def states(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shard = self._open()
        return shard.status, np.asarray(shard.file_size), np.asarray(shard.file_mtime_ns)

    def names(self, rows: np.ndarray) -> list[str]:
        names = self._open().names
        return [names[row] for row in rows.tolist()]

    def _open(self) -> Store:
        while True:
            path = self._folder.building.get(self._number) or self._folder.shards[self._number]
            try:
                return _open_shard(path)
            except StoreError:
                # It may have been published meanwhile.
                if path == (self._folder.building.get(self._number) or self._folder.shards[self._number]):
                    raise


@lru_cache(maxsize=_OPEN_SHARDS)
def _open_shard(path: Path) -> Store:
    return open_file(path, names=False)


def _part_of(items: Iterable[Item], part: tuple[int, int] | None) -> Iterable[Item]:
    if part is None:
        return items
    number, count = part
    return (item for item in items if int(name_digests([item.name])[0, 0]) % count == number - 1)


def _ahead(items: Iterator[_T]) -> Generator[_T, None, None]:
    """The same, produced by a thread: while one is used, the next one is ready, and the one after it being made."""
    ready: queue.Queue[tuple[_T | None, BaseException | None]] = queue.Queue(maxsize=1)
    ending = threading.Event()

    def produce() -> None:
        failure: BaseException | None = None
        try:
            for item in items:
                while not ending.is_set():
                    try:
                        ready.put((item, None), timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if ending.is_set():
                    return
        except BaseException as error:  # raised where the items are used
            failure = error
        while not ending.is_set():
            try:
                ready.put((None, failure), timeout=0.1)
                return
            except queue.Full:
                continue

    thread = threading.Thread(target=produce, name="plan", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        ending.set()
        thread.join()


def coverage(sources: Sources) -> Callable[[str], bool] | None:
    """Whether a name would have been listed by these sources; None: they are single images and lists."""
    prefixes = tuple(sources.prefixes())
    if not prefixes:
        return None
    return lambda name: name.startswith(prefixes)
