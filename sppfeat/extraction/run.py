"""Extraction: folders of images, or windows on them, into a store, resumable at every row."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sppfeat.engines import resolve_device
from sppfeat.errors import BackboneError, DeviceError, MissingExtraError, StoreError, UsageError
from sppfeat.extraction.pipeline import Describer, check_windows
from sppfeat.extraction.plan import make_plan, with_windows
from sppfeat.extraction.stages import Stages
from sppfeat.extraction.workers import fill_rows, fill_rows_with
from sppfeat.images import ImageList, find_images, path_to_name
from sppfeat.progress import Observer
from sppfeat.recipe import Recipe, RunOptions
from sppfeat.store import (
    Store,
    StoreWriter,
    check_output,
    create_store,
    extend_store,
    lock_store,
    open_store,
    row_names,
)

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Extraction:
    """What a run of `extract_folder` did.

    images: listed in the sources. repeated: duplicates in the sources. described: in this run. reused: described
    before, unchanged. failed: listed images whose row failed, now or before. changed: described images whose file had
    changed. gone: rows of the store whose file no longer exists; they are kept. pending: rows left for the next run,
    after an interruption. dim: length of a descriptor. device, engine: where and how the network ran.
    seconds: of this run. stages: of its work, summed over threads.
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
        # One thread writes, beside all others.
        busy = {"decode": decode, "forward": forward, "write": stages.write if stages.write > self.seconds / 2 else 0.0}
        return max(busy, key=lambda stage: busy[stage])

    @property
    def interrupted(self) -> bool:
        """Whether the run was stopped before every image was described."""
        return self.pending > 0

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
    root: str | None = None,
    resume: bool = True,
    retry_failed: bool = False,
    overwrite: bool = False,
    observer: Observer | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Extraction:
    """Describe the images of folders, files or lists (see `find_images`) into the store `output`.

    An existing store is resumed: rows that are done stay, pending rows and changed files are described, and new files
    are added at the end. `retry_failed` tries failed rows again. `overwrite` starts over; `resume=False` rejects an
    existing store. Names are relative to `root`; by default to the root of the resumed store, if it contains all
    sources, else to the folder that does.
    windows: [K, 4] by image name (see `read_windows`): each window is described instead, from one pass per image, in a
    row named `image#x1,y1,x2,y2` (see `split_row_name`). Images without windows get no row.
    Raises StoreError for an output that is not a store or was made with another recipe, and whatever `find_images` and
    `Describer` raise. An image that cannot be described is a failed row, not an error.
    """
    began = time.perf_counter()
    observer = observer or Observer()
    options = options or RunOptions()
    devices = options.devices()
    for each in devices:
        resolve_device(each)
    if windows is not None and recipe is not None:
        check_windows(recipe)
    # The file itself, not a link to it: that is what is locked, and replaced by a longer one.
    path = Path(os.path.realpath(output)) if os.path.islink(output) else Path(output)
    check_output(path, overwrite=overwrite, resume=resume)
    images, without_windows = _list(sources, path if resume and not overwrite else None, root, windows)
    if not images.items:
        raise UsageError(f"{_show_sources(sources)}: expected images, found none")
    with lock_store(path):
        check_output(path, overwrite=overwrite, resume=resume)
        # With several GPUs, this process only needs the network's description, and no room on any GPU.
        own = replace(options, device="cpu", engine="torch") if len(devices) > 1 else options
        describer = Describer(recipe or Recipe(), own)
        device = options.device if len(devices) > 1 else describer.device
        if overwrite and path.exists() and len(devices) == 1:
            describer.load()  # a network that cannot run must not destroy the existing store
        created = not path.exists() or not path.stat().st_size
        store = _prepare_store(path, images, describer, fresh=overwrite)
        rows = {name: row for row, name in enumerate(store.names)}
        plan = make_plan(store, rows, images, retry_failed=retry_failed)
        observer.started(todo=plan.rows, reused=plan.reused, gone=plan.gone, device=device)
        described = failed = changed = 0
        work = Stages()
        try:
            with StoreWriter(store) as writer:
                readable = [todo for todo in plan.todo if todo.item.problem is None]
                redo = plan.redo.intersection(row for todo in readable for row in todo.rows)
                writer.reset(sorted(plan.redo - redo))
                for item, of_item in plan.todo:
                    if item.problem is not None:
                        for row, name in zip(of_item, row_names(item), strict=True):
                            writer.fail(row, item.problem)
                            observer.row(name, item.problem)
                            failed += 1
                for row in plan.lost:
                    writer.fail(row, "the file no longer exists")
                if len(devices) > 1:
                    writer.flush()
                    filled = fill_rows_with(devices, options, store, readable, sorted(redo), stop, work)
                else:
                    filled = fill_rows(writer, describer, readable, sorted(redo), stop, work)
                with contextlib.closing(filled):  # also if the observer raises: processes must not outlive the lock
                    for name, error in filled:
                        described += error is None
                        failed += error is not None
                        changed += error is None and rows[name] in plan.changed
                        observer.row(name, error)
        except (BackboneError, DeviceError, MissingExtraError):
            if created and not describer.streams and not described + failed:
                path.unlink()  # no network was loaded, and nothing was made but a list of names
            raise
        pending = plan.rows - described - failed
        return Extraction(
            store=str(path),
            images=sum(len(row_names(item)) for item in images.items),
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
            stages=work,
            without_windows=without_windows,
        )


def _list(
    sources: Source | Sequence[Source],
    resumed: Path | None,
    root: str | None,
    windows: Mapping[str, np.ndarray] | None,
) -> tuple[ImageList, int | None]:
    """The items, and the number of images without windows if windows are described."""
    several = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    found, without_windows = find_images(several, root=root), None
    if windows is not None:
        found, without_windows = with_windows(found, windows)
    if root is None and resumed is not None and resumed.exists() and resumed.stat().st_size:
        before = open_store(resumed).source_root
        if _is_below(found.root, before):
            return found.below(before), without_windows
    return found, without_windows


def _prepare_store(path: Path, images: ImageList, describer: Describer, *, fresh: bool) -> Store:
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
        return open_store(path)
    store = open_store(path)
    differences = store.recipe.differences(describer.recipe)
    if store.weights_sha256 != describer.weights_sha256:
        differences.append(f"weights: {store.weights_sha256[:12]} here, {describer.weights_sha256[:12]} there")
    if differences:
        raise StoreError(
            f"{path}: was made with another recipe ({'; '.join(differences)}); "
            "choose another output, or use --overwrite"
        )
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
    if new or moved:
        extend_store(store, [*names, *new], source_root=images.root)
        return open_store(path)
    return store


def _is_below(folder: str, root: str) -> bool:
    return folder.startswith(root.rstrip("/") + "/")


def _show_sources(sources: Source | Sequence[Source]) -> str:
    several = [sources] if isinstance(sources, (str, os.PathLike)) else sources
    return ", ".join(os.fspath(source) for source in several)
