"""Extraction: folders of images, or windows on them, into a store, resumable at every row."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from sppfeat.engines import resolve_device
from sppfeat.errors import StoreError, UsageError
from sppfeat.extraction.pipeline import Describer
from sppfeat.extraction.workers import Work, fill_rows, fill_rows_with
from sppfeat.images import NO_FINGERPRINT, ImageList, find_images, fingerprint_of, name_to_path, path_to_name
from sppfeat.recipe import Recipe, RunOptions
from sppfeat.store import (
    Status,
    Store,
    StoreWriter,
    check_output,
    create_store,
    extend_store,
    lock_store,
    open_store,
    row_name,
    split_row_name,
)

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Extraction:
    """What a run of `extract_folder` did.

    images: listed in the sources. repeated: listed more than once. described: in this run. reused: described before,
    unchanged. failed: listed images whose row is failed, now or before. changed: of those described, how many had
    another file before. gone: rows of the store whose file is no longer there; they are kept. pending: rows left for
    a next run, after an interruption. dim: length of a descriptor. device, engine: where and how the network ran.
    seconds, decode, forward, write: of this run; decode and forward are summed over their threads, of which there were
    `workers` and `streams`.
    Where windows are described, all these count windows, and without_windows the images that have none; else it is
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
    decode: float
    forward: float
    write: float
    workers: int
    streams: int
    without_windows: int | None = None

    @property
    def bottleneck(self) -> str | None:
        """The stage that the others wait for: `decode`, `forward` or `write`; None when nothing was described.

        On a processor decoding and the network share its cores, and the one with more work holds up the run; a GPU
        works beside them.
        """
        if not self.described:
            return None
        decode = self.decode if self.device == "cpu" else self.decode / self.workers
        forward = self.forward if self.device == "cpu" else self.forward / self.streams
        # Writing is done by one thread, beside all others.
        busy = {"decode": decode, "forward": forward, "write": self.write if self.write > self.seconds / 2 else 0.0}
        return max(busy, key=lambda stage: busy[stage])

    @property
    def interrupted(self) -> bool:
        """Whether the run was stopped before every image was described."""
        return self.pending > 0

    @property
    def images_per_second(self) -> float:
        """Images (or windows) described in this run, for each second of it."""
        return self.described / self.seconds if self.seconds > 0 else 0.0


class Observer(Protocol):
    """Who wants to follow an extraction; called from the thread that called `extract_folder`."""

    def started(self, *, todo: int, reused: int, gone: list[str], device: str) -> None:
        """The work is known: images to describe, rows kept, names whose file is gone."""

    def row(self, name: str, error: str | None) -> None:
        """One image, or one window, is described, or failed for a reason."""


class _Silent:
    def started(self, *, todo: int, reused: int, gone: list[str], device: str) -> None:
        pass

    def row(self, name: str, error: str | None) -> None:
        pass


def extract_folder(
    sources: Source | Sequence[Source],
    output: Source,
    recipe: Recipe | None = None,
    options: RunOptions | None = None,
    *,
    windows: Mapping[str, np.ndarray] | None = None,
    root: str | None = None,
    resume: bool = True,
    retry_failed: bool = False,
    overwrite: bool = False,
    observer: Observer | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Extraction:
    """Describe the images of folders, files or lists (see `find_images`) into the store `output`.

    A store that is there already is resumed: rows that are done stay, pending rows and changed files are described,
    new files are added at the end. With `retry_failed` the failed ones are tried again. `overwrite` starts anew;
    `resume=False` refuses a store that is there. Names are relative to `root`; by default to the root of the store
    that is resumed, if it holds all sources, else to the folder that does.
    windows: [K, 4] by image name (see `read_windows`): then each of them is described instead, from one pass for each
    image, in a row named `image#x1,y1,x2,y2` (see `split_row_name`). Images without windows get no row.
    Raises StoreError for an output that is no store or was made by another recipe, and whatever `find_images` and
    `Describer` raise. An image that cannot be described is a failed row, not an error.
    """
    began = time.perf_counter()
    observer = observer or _Silent()
    options = options or RunOptions()
    devices = options.devices()
    for each in devices:
        resolve_device(each)
    # The file itself, not a link to it: that is what is locked, and replaced by a longer one.
    path = Path(os.path.realpath(output)) if os.path.islink(output) else Path(output)
    check_output(path, overwrite=overwrite, resume=resume)
    images, without_windows = _list(sources, path if resume and not overwrite else None, root, windows)
    if not images.names:
        raise UsageError(f"{_show_sources(sources)}: expected images, found none")
    windowed = windows is not None
    with lock_store(path):
        check_output(path, overwrite=overwrite, resume=resume)
        # Beside several cards, this process only knows the network: it needs no place on any.
        own = replace(options, device="cpu", engine="torch") if len(devices) > 1 else options
        describer = Describer(recipe or Recipe(), own)
        device = options.device if len(devices) > 1 else describer.device
        if overwrite and path.exists() and len(devices) == 1:
            describer.load()  # a network that cannot run must not cost the store that is there
        store = _prepare_store(path, images, describer, fresh=overwrite)
        rows = {name: row for row, name in enumerate(store.names)}
        plan = _plan(store, rows, images, windowed=windowed, retry_failed=retry_failed)
        observer.started(todo=len(plan.todo), reused=plan.reused, gone=plan.gone, device=device)
        described = failed = changed = 0
        work = Work()
        with StoreWriter(store) as writer:
            writer.reset(sorted(plan.redo))
            readable = [name for name in plan.todo if name not in images.problems]
            for name in plan.todo:
                if name in images.problems:
                    writer.fail(rows[name], images.problems[name])
                    observer.row(name, images.problems[name])
                    failed += 1
            for name in plan.lost:
                writer.fail(rows[name], "the file is gone")
            if len(devices) > 1:
                writer.flush()
                filled = fill_rows_with(devices, options, store, images.root, rows, readable, windowed, stop, work)
            else:
                filled = fill_rows(writer, describer, images.root, rows, readable, windowed, stop, work)
            with contextlib.closing(filled):  # also when the observer raises: processes must not outlive the lock
                for name, error in filled:
                    described += error is None
                    failed += error is not None
                    changed += error is None and rows[name] in plan.changed
                    observer.row(name, error)
        pending = len(plan.todo) - described - failed
        return Extraction(
            store=str(path),
            images=len(images.names),
            described=described,
            reused=plan.reused,
            failed=failed + plan.failed_before,
            changed=changed,
            gone=len(plan.gone),
            pending=pending,
            repeated=images.repeated,
            dim=describer.dim,
            device=device,
            engine=describer.engine,
            seconds=time.perf_counter() - began,
            decode=work.decode,
            forward=work.forward,
            write=work.write,
            workers=work.workers,
            streams=work.streams,
            without_windows=without_windows,
        )


@dataclass(frozen=True)
class _Plan:
    """todo: names to describe, in order. redo: rows of them that were done or failed before. lost: pending, and gone.

    changed: rows of `redo` that were done, with another file.
    """

    todo: list[str]
    redo: set[int]
    changed: set[int]
    reused: int
    failed_before: int
    gone: list[str]
    lost: list[str]


def _list(
    sources: Source | Sequence[Source],
    resumed: Path | None,
    root: str | None,
    windows: Mapping[str, np.ndarray] | None,
) -> tuple[ImageList, int | None]:
    """The rows, and how many images have no window, where windows are described."""
    several = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    found, without_windows = find_images(several, root=root), None
    if windows is not None:
        without_windows = sum(name not in windows or not len(windows[name]) for name in found.names)
        found = _window_rows(found, windows)
    if root is None and resumed is not None and resumed.exists() and resumed.stat().st_size:
        before = open_store(resumed).source_root
        if _is_below(found.root, before):
            return _rebased(found, before), without_windows
    return found, without_windows


def _window_rows(images: ImageList, windows: Mapping[str, np.ndarray]) -> ImageList:
    """The windows' rows instead of the images'; those of pictures that are not among the images have a problem."""
    known = set(images.names)
    if not known & set(windows):
        raise UsageError(
            f"the windows are of none of the {len(known)} images below {images.root}: "
            f"expected names such as {images.names[0] if images.names else ''!r}, found {next(iter(windows), '')!r}"
        )
    problems: dict[str, str] = {}
    names: dict[str, None] = {}
    count = 0
    for picture, boxes in windows.items():
        reason = images.problems.get(picture)
        if picture not in known:
            reason = f"its picture is not among the images of the sources ({picture})"
        for box in boxes:
            name = row_name(picture, box)
            names[name] = None
            count += 1
            if reason is not None:
                problems[name] = reason
    return ImageList(root=images.root, names=list(names), problems=problems, repeated=count - len(names))


def _rebased(found: ImageList, root: str) -> ImageList:
    """The same images, named from a folder further up."""
    prefix = path_to_name(os.path.relpath(found.root, root)) + "/"
    return ImageList(
        root=root,
        names=[prefix + name for name in found.names],
        problems={prefix + name: reason for name, reason in found.problems.items()},
        repeated=found.repeated,
    )


def _prepare_store(path: Path, images: ImageList, describer: Describer, *, fresh: bool) -> Store:
    if fresh or not path.exists() or not path.stat().st_size:
        create_store(
            path,
            images.names,
            recipe=describer.recipe,
            weights_sha256=describer.weights_sha256,
            dim=describer.dim,
            source_root=images.root,
        )
        return open_store(path)
    store = open_store(path)
    differences = store.recipe.differences(describer.recipe)
    if store.weights_sha256 != describer.weights_sha256:
        differences.append(f"weights: {store.weights_sha256[:12]} here, {describer.weights_sha256[:12]} there")
    if differences:
        raise StoreError(
            f"{path}: was made by another recipe ({'; '.join(differences)}); choose another output, or --overwrite"
        )
    names = store.names
    moved = store.source_root != images.root
    if moved and _is_below(store.source_root, images.root):
        prefix = path_to_name(os.path.relpath(store.source_root, images.root)) + "/"
        names = [prefix + name for name in names]
    elif moved and os.path.isdir(store.source_root):
        raise StoreError(
            f"{path}: its names are relative to {store.source_root}, these images to {images.root}; "
            "choose another output, give a root that holds both, or --overwrite"
        )
    known = set(names)
    new = [name for name in images.names if name not in known]
    if moved and names is store.names and len(new) == len(images.names):
        raise StoreError(
            f"{path}: none of its {len(store)} names is among these images; choose another output, or --overwrite"
        )
    if new or moved:
        extend_store(store, [*names, *new], source_root=images.root)
        return open_store(path)
    return store


def _is_below(folder: str, root: str) -> bool:
    return folder.startswith(root.rstrip("/") + "/")


def _plan(store: Store, rows: dict[str, int], images: ImageList, *, windowed: bool, retry_failed: bool) -> _Plan:
    fingerprint = functools.lru_cache(maxsize=1)(fingerprint_of)  # an image's windows stand together
    status = store.status.tolist()
    files = list(zip(store.file_size.tolist(), store.file_mtime_ns.tolist(), strict=True))
    todo: list[str] = []
    gone: list[str] = []
    redo: set[int] = set()
    reused = failed_before = 0
    for name in images.names:
        row = rows[name]
        file = fingerprint(name_to_path(images.root, split_row_name(name)[0] if windowed else name))
        no_image = name in images.problems
        if status[row] == Status.PENDING:
            todo.append(name)
        elif status[row] == Status.DONE and file == NO_FINGERPRINT:
            gone.append(name)
        elif status[row] == Status.DONE and file == files[row] and not no_image:
            reused += 1
        elif status[row] == Status.FAILED and (no_image or (file == files[row] and not retry_failed)):
            failed_before += 1
        else:
            todo.append(name)
            redo.add(row)
    listed = set(images.names)
    gone += [n for n in store.names if n not in listed and not _is_there(images.root, n)]
    lost = [name for name in gone if status[rows[name]] == Status.PENDING]
    changed = {row for row in redo if status[row] == Status.DONE}
    return _Plan(todo, redo, changed, reused, failed_before, gone, lost)


def _is_there(root: str, name: str) -> bool:
    """Whether a row's file is there: the image of that name, or the one that its window is on."""
    return any(os.path.lexists(name_to_path(root, each)) for each in (name, split_row_name(name)[0]))


def _show_sources(sources: Source | Sequence[Source]) -> str:
    several = [sources] if isinstance(sources, (str, os.PathLike)) else sources
    return ", ".join(os.fspath(source) for source in several)
