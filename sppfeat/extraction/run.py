"""Extraction: folders of images, or windows on them, into a store, resumable at every row."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from sppfeat.engines import choose_engine
from sppfeat.errors import BackboneError, DeviceError, MissingExtraError, StoreError, UsageError
from sppfeat.extraction.calibration import calibrate
from sppfeat.extraction.pipeline import Describer, check_windows
from sppfeat.extraction.plan import Job, WithWindows, make_plan, with_windows
from sppfeat.extraction.pruning import check_prunable, check_something_stays, check_whole, is_removable, tell_unlisted
from sppfeat.extraction.sharded import ShardOptions, coverage, fill_shards, prepare_folder
from sppfeat.extraction.stages import Stages
from sppfeat.extraction.workers import Tally, fill_file
from sppfeat.images import (
    DEFAULT_COLUMNS,
    Columns,
    Extent,
    ImageList,
    Item,
    find_images,
    is_url,
    left_out,
    no_images,
    open_sources,
    path_to_name,
)
from sppfeat.progress import Observer
from sppfeat.recipe import Recipe, RunOptions
from sppfeat.store import (
    BucketFolder,
    Folder,
    FolderKind,
    Mirror,
    Store,
    check_output,
    create_store,
    extend_store,
    is_folder_store,
    lock_store,
    open_folder,
    open_store,
    remove_rows,
    row_names,
)

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Extraction:
    """What a run of `extract_folder` did.

    images: listed in the sources. repeated: duplicates in the sources. described: in this run. reused: described
    before, unchanged. failed: listed images whose row failed, now or before. changed: described images whose file had
    changed. gone: rows of the store whose file no longer exists, and which are kept. removed: such rows that were
    removed. pending: rows left for the next run, after an interruption. stopped: before all sources were listed.
    unread: images in the sources of kinds that are not read, by extension, which get no row. dim: length of a
    descriptor. device, engine: where and how the network ran. seconds: of this run. stages: of its work,
    summed over threads.
    If windows are described, all of these count windows, and without_windows counts the images without any; else it is
    None.
    """

    store: str
    images: int
    described: int
    reused: int
    failed: int
    changed: int
    gone: int
    pending: int
    repeated: int
    dim: int
    device: str
    engine: str
    seconds: float
    stages: Stages
    without_windows: int | None = None
    stopped: bool = False
    removed: int = 0
    unread: dict[str, int] = field(default_factory=dict)

    @property
    def bottleneck(self) -> str | None:
        """The stage that the others wait for: `decode`, `forward` or `write`; None when nothing was described.

        On a CPU, decoding and the network share the cores, and the one with more work limits the run; a GPU works
        beside them.
        """
        if not self.described:
            return None
        stages, on_cpu = self.stages, self.device == "cpu"
        decode = stages.decode if on_cpu else stages.decode / stages.workers
        forward = stages.forward if on_cpu else stages.forward / stages.streams
        # One thread writes, beside all others, which wait for it only if it never rests.
        write = stages.write if stages.write > 0.9 * self.seconds else 0.0
        busy = {"decode": decode, "forward": forward, "write": write}
        return max(busy, key=lambda stage: busy[stage])

    @property
    def interrupted(self) -> bool:
        """Whether the run was stopped before every image was described."""
        return self.pending > 0 or self.stopped

    @property
    def images_per_second(self) -> float:
        """Images (or windows) described per second of this run."""
        return self.described / self.seconds if self.seconds > 0 else 0.0


def extract_folder(
    sources: Source | Sequence[Source],
    output: Source,
    recipe: Recipe | None = None,
    options: RunOptions | None = None,
    *,
    windows: Mapping[str, np.ndarray] | None = None,
    root: Source | None = None,
    columns: Columns = DEFAULT_COLUMNS,
    resume: bool = True,
    retry_failed: bool = False,
    prune: bool = False,
    overwrite: bool = False,
    shards: ShardOptions | None = None,
    cluster: str | None = None,
    observer: Observer | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Extraction:
    """Describe the images of folders, files, lists, archives and URLs (see `open_sources`) into the store `output`.

    An existing store is resumed: rows that are done stay, pending rows and changed files are described, and new files
    are added at the end. `retry_failed` tries failed rows again. `overwrite` starts over; `resume=False` rejects an
    existing store. `prune` removes rows whose images are gone: those below the folders, archives and prefixes among the
    sources that were listed to the end, and no others; not if none of the rows that the store had would be left.
    Names are relative to `root`; by default to the root of the resumed store, if it contains all
    sources, else to the folder that does. columns: of parquet files.
    windows: [K, 4] by image name (see `read_windows`): each window is described instead, from one pass per image, in a
    row named `image#x1,y1,x2,y2` (see `split_row_name`). Images without windows get no row.
    shards: write a folder of shards, as for an `output` that is a folder or ends with a slash: then images are
    described while the sources are listed, and memory does not grow with their number.
    cluster: describe on many machines into such a folder, which all of them reach; see `RayCluster`.
    A recipe of precision int8 without a calibration gets that of the resumed store, or a new one; see `calibrate`.
    Raises StoreError for an output that is not a store or was made with another recipe, and whatever `find_images` and
    `Describer` raise. An image that cannot be described is a failed row, not an error.
    """
    began = time.perf_counter()
    observer = observer or Observer()
    options = options or RunOptions()
    recipe = recipe or Recipe()
    if recipe.precision == "int8" and cluster is not None:
        raise UsageError("precision int8: its network is calibrated and kept on one machine: expected no cluster")
    if recipe.precision == "int8" and recipe.calibration is None and shards is not None and shards.part is not None:
        raise UsageError(
            "precision int8: parts that are calibrated by themselves do not fit together: expected --calibration-of a "
            "store with --part"
        )
    for each in options.devices():
        for branch in recipe.branches():
            choose_engine(branch, replace(options, device=each))
    if windows is not None:
        check_windows(recipe)
    if prune:
        check_prunable(windows=windows is not None, cluster=cluster is not None)
    several = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    stays = resume and not overwrite
    with contextlib.ExitStack() as stack:
        kind: FolderKind = Folder
        if isinstance(output, str) and is_url(output):
            mirror = stack.enter_context(Mirror(output, overwrite=overwrite))
            kind = partial(BucketFolder, mirror=mirror)
            path, in_folder = mirror.path, True
        else:
            # The file itself, not a link to it: that is what is locked, and replaced by a longer one.
            path = Path(os.path.realpath(output)) if os.path.islink(output) else Path(output)
            in_folder = shards is not None or cluster is not None or path.is_dir() or os.fspath(output).endswith(os.sep)
            check_output(path, overwrite=overwrite, resume=resume, folder=in_folder)
        run = _Run(
            several, path, kind, recipe, options, windows, root, columns, stays, retry_failed, prune, observer, stop
        )
        found = None
        if not in_folder:  # listed before anything is created
            found = _list(run)
        if kind is Folder:
            stack.enter_context(lock_store(path, folder=in_folder))
        check_output(path, overwrite=overwrite, resume=resume, folder=in_folder)
        run = replace(run, recipe=_calibrated(run, found[0] if found is not None else None))
        describer = run.describer()
        if overwrite and path.exists() and len(options.devices()) == 1:
            describer.load()  # a network that cannot run must not destroy the existing store
        done = (
            _into_folder(run, describer, shards or ShardOptions(), cluster)
            if found is None
            else _into_file(run, describer, *found)
        )
    store = str(path) if kind is Folder else os.fspath(output)
    return replace(done, store=store, seconds=time.perf_counter() - began)


@dataclass(frozen=True)
class _Run:
    """What `extract_folder` is asked for; resume: whether what is in the output stays. kind: of a folder of shards."""

    sources: list[Source]
    path: Path
    kind: FolderKind
    recipe: Recipe
    options: RunOptions
    windows: Mapping[str, np.ndarray] | None
    root: Source | None
    columns: Columns
    resume: bool
    retry_failed: bool
    prune: bool
    observer: Observer
    stop: Callable[[], bool]

    def describer(self) -> Describer:
        """With several GPUs, this process only needs the network's description, and no room on any GPU."""
        several = len(self.options.devices()) > 1
        return Describer(self.recipe, replace(self.options, device="cpu", engine="torch") if several else self.options)

    def device(self, describer: Describer) -> str:
        """The devices by name."""
        return self.options.device if len(self.options.devices()) > 1 else describer.device


def _calibrated(run: _Run, images: ImageList | None) -> Recipe:
    """The recipe, of precision int8 with the calibration of the store that is resumed, or a new one."""
    if run.recipe.precision != "int8" or run.recipe.calibration is not None:
        return run.recipe
    if run.resume:
        made = None
        if images is None:
            made = open_folder(run.path).manifest.read_recipe() if is_folder_store(run.path) else None
        elif run.path.exists() and run.path.stat().st_size:
            made = open_store(run.path).recipe
        if made is not None and made.precision == "int8":
            return replace(run.recipe, calibration=made.calibration)
    items: Iterable[Item] = open_sources(run.sources, root=run.root, columns=run.columns)
    return calibrate(run.recipe, items if images is None else images.items, observer=run.observer, stop=run.stop)


def _into_file(run: _Run, describer: Describer, images: ImageList, without_windows: int | None) -> Extraction:
    path, device = run.path, run.device(describer)
    created = not path.exists() or not path.stat().st_size
    store, lost = _prepare_store(path, images, describer, fresh=not run.resume, prune=run.prune)
    rows = {name: row for row, name in enumerate(store.names)}
    plan = make_plan(store, rows, images, retry_failed=run.retry_failed)
    gone = [name for name in plan.gone if rows[name] not in lost]
    run.observer.started(todo=plan.rows, reused=plan.reused, gone=gone, device=device)
    if images.extent is not None:
        _tell(images.extent, run)
    tally = Tally()
    job = Job(0, plan.todo, redo=sorted(plan.redo), changed=frozenset(plan.changed), lost=plan.lost)
    try:
        fill_file(store, job, describer, run.options, tally, run.observer, run.stop)
    except (BackboneError, DeviceError, MissingExtraError):
        if created and not describer.streams and not tally.described + tally.failed:
            path.unlink()  # no network was loaded, and nothing was made but a list of names
        raise
    pending = plan.rows - tally.described - tally.failed
    removed = 0
    if lost and not pending:
        remove_rows(store, np.array(sorted(lost)))
        removed = len(lost)
    return Extraction(
        store=str(path),
        images=sum(len(row_names(item)) for item in images.items),
        described=tally.described,
        reused=plan.reused,
        failed=tally.failed + plan.failed_before,
        changed=tally.changed,
        gone=len(gone) if removed else len(plan.gone),
        pending=pending,
        repeated=images.repeated,
        dim=describer.dim,
        device=device,
        engine=describer.engine,
        seconds=0.0,
        stages=tally.stages,
        without_windows=without_windows,
        removed=removed,
        unread={} if images.extent is None else dict(images.extent.unread),
    )


def _into_folder(run: _Run, describer: Describer, shards: ShardOptions, address: str | None) -> Extraction:
    path, device, engine = run.path, run.device(describer), describer.engine
    sources = open_sources(run.sources, root=run.root, columns=run.columns)
    is_new = not run.resume or not is_folder_store(path)
    if run.root is None and not is_new and _is_below(sources.root, before := open_folder(path).manifest.source_root):
        sources = open_sources(run.sources, root=before, columns=run.columns)
    if run.prune:
        check_whole(sources.prefixes())
    items: Iterable[Item] = sources
    with_windows = None
    if run.windows is not None:
        items = with_windows = WithWindows(sources, run.windows, sources.root)
    cluster = None
    with contextlib.ExitStack() as stack:
        if address is not None:
            from sppfeat.extraction.cluster import RayCluster

            cluster = stack.enter_context(RayCluster(address, describer.recipe, run.options))
            device = cluster.device
        folder = prepare_folder(path, describer, shards, root=sources.root, fresh=is_new, kind=run.kind)
        if is_new:
            stack.callback(folder.remove_if_empty)
        if cluster is not None and isinstance(folder, BucketFolder):
            folder.leave_to_others()
        listed, tally, stopped, removed = fill_shards(
            folder,
            items,
            # Windows that are no longer asked for are not gone.
            coverage(sources) if run.windows is None else None,
            describer,
            run.options,
            shards,
            retry_failed=run.retry_failed,
            device=device if cluster is None else f"{cluster.workers} workers",
            observer=run.observer,
            stop=run.stop,
            cluster=cluster,
            removable=(lambda name: is_removable(sources.extent, name)) if run.prune else (lambda _: False),
        )
    _tell(sources.extent, run)
    if cluster is not None:
        engine = cluster.engine or engine
    if not listed.images and shards.part is None and not stopped:
        raise UsageError(no_images(run.sources))
    return Extraction(
        store=str(path),
        images=listed.images - listed.repeated,
        described=tally.described,
        reused=listed.reused,
        failed=tally.failed + listed.failed_before,
        changed=tally.changed,
        gone=listed.gone,
        pending=listed.todo - tally.described - tally.failed,
        repeated=listed.repeated,
        dim=describer.dim,
        device=device,
        engine=engine,
        seconds=0.0,
        stages=tally.stages,
        without_windows=None if with_windows is None else with_windows.without,
        stopped=stopped,
        removed=removed,
        unread=dict(sources.extent.unread),
    )


def _tell(extent: Extent, run: _Run) -> None:
    """Note what was not listed, and why."""
    if run.prune:
        tell_unlisted(extent, run.observer)
    if extent.unread:
        run.observer.note(left_out(extent.unread))


def _list(run: _Run) -> tuple[ImageList, int | None]:
    """The items, and the number of images without windows if windows are described."""
    found, without_windows = find_images(run.sources, root=run.root, columns=run.columns), None
    if not found.items:
        raise UsageError(no_images(run.sources))
    if run.prune and found.extent is not None:
        check_whole(found.extent.whole)
    if run.windows is not None:
        found, without_windows = with_windows(found, run.windows)
    if run.root is None and run.resume and run.path.exists() and run.path.stat().st_size:
        before = open_store(run.path).source_root
        if _is_below(found.root, before):
            return found.below(before), without_windows
    return found, without_windows


def _prepare_store(
    path: Path, images: ImageList, describer: Describer, *, fresh: bool, prune: bool
) -> tuple[Store, set[int]]:
    """The store with a row for each item, and the rows to remove if `prune` is set."""
    listed = [name for item in images.items for name in row_names(item)]
    if fresh or not path.exists() or not path.stat().st_size:
        create_store(
            path,
            listed,
            recipe=describer.recipe,
            weights_sha256=describer.weights_sha256,
            dim=describer.dim,
            source_root=images.root,
        )
        return open_store(path), set()
    store = open_store(path)
    describer.check_made(path, store.recipe, store.weights_sha256)
    names = store.names
    moved = store.source_root != images.root
    if moved and _is_below(store.source_root, images.root):
        prefix = path_to_name(os.path.relpath(store.source_root, images.root)) + "/"
        names = [prefix + name for name in names]
    elif moved and os.path.isdir(store.source_root):
        raise StoreError(
            f"{path}: its names are relative to {store.source_root}, these images to {images.root}; "
            "choose another output, give a root that contains both, or use --overwrite"
        )
    known = set(names)
    new = [name for name in listed if name not in known]
    if moved and names is store.names and len(new) == len(listed):
        raise StoreError(
            f"{path}: expected some of these images among its {len(store)} names, found none; "
            "choose another output, or use --overwrite"
        )
    lost: set[int] = set()
    if prune and images.extent is not None:
        here = set(listed)
        lost = {row for row, name in enumerate(names) if name not in here and is_removable(images.extent, name)}
        check_something_stays(path, len(lost), len(names))
    if new or moved:
        extend_store(store, [*names, *new], source_root=images.root)
        store = open_store(path)
    return store, lost


def _is_below(folder: str, root: str) -> bool:
    return folder.startswith(root.rstrip("/") + "/")
