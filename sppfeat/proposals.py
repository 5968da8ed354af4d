"""Proposals: windows that may hold objects, found once for each picture and kept in a file.

Selective search: Uijlings, van de Sande, Gevers, Smeulders, "Selective Search for Object Recognition", IJCV 2013, as
OpenCV's contrib modules have it. As in R-CNN's code, pictures are shrunk to 500 pixels before, and windows narrower
than 20 of these are dropped.

The file (`sppfeat-windows`, HDF5) appears whole, when a run ends or is interrupted. Until then every finished picture
is a line of a journal beside it, from which a killed run goes on.

    /names       (N,)    UTF-8; see `sppfeat.images.path_to_name`
    /start       (N+1,)  int64, the windows of picture n are rows start[n] .. start[n+1]
    /windows     (M, 4)  int32, x1, y1, x2, y2 in pixels of the upright original, inclusive
    /image_size  (N, 2)  int32, width and height of the upright original
    /error       (N,)    UTF-8, why a picture has none; else empty
    /file_size, /file_mtime_ns  (N,) int64, the file as it was
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Protocol, Self

import h5py
import numpy as np
from PIL import Image

from sppfeat._version import __version__
from sppfeat.errors import ImageError, UsageError, WindowsError, one_line, require_extra, unknown_name
from sppfeat.files import WINDOWS, appearing, check_new_file, open_hdf5, os_reason
from sppfeat.images import Fingerprint, find_images, fingerprint_of, name_to_path, read_image
from sppfeat.store import lock_store
from sppfeat.windows import read_windows

FORMAT_VERSION: Final = 1
METHODS: Final = ("selective-search", "selective-search-quality")
# R-CNN's code (selective_search_boxes.m): pictures 500 wide, boxes at least 20 wide.
SEARCH_SIDE: Final = 500
MIN_SIDE: Final = 20
MAX_WINDOWS: Final = 100_000


@dataclass(frozen=True, kw_only=True)
class ProposalOptions:
    """How windows are proposed.

    method: `selective-search` (OpenCV's fast mode) or `selective-search-quality` (more windows, several times slower).
    max_windows: the most for a picture; those of the best ranks stay, which are drawn by `seed`.
    """

    method: str = "selective-search"
    max_windows: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(unknown_name("method", self.method, METHODS))
        for name, value, low, high in (
            ("max_windows", self.max_windows, 1, MAX_WINDOWS),
            ("seed", self.seed, 0, 1 << 31),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise UsageError(f"{name} must be a whole number from {low} to {high}, found {value!r}")


class Proposed(NamedTuple):
    """One picture's windows [K, 4] int32, or why it has none."""

    windows: np.ndarray
    image_size: tuple[int, int]
    fingerprint: Fingerprint
    error: str | None


def propose(path: str, options: ProposalOptions | None = None) -> Proposed:
    """Propose windows for one picture, in this process; a picture that cannot be read has its reason.

    Two pictures must not be searched by threads of one process: OpenCV ranks by the C library's random numbers.
    Raises MissingExtraError without OpenCV's contrib modules.
    """
    options = options or ProposalOptions()
    fingerprint = fingerprint_of(path)
    try:
        pixels, size = read_image(path)
        small = pixels
        if max(size) > SEARCH_SIDE:
            ratio = SEARCH_SIDE / max(size)
            target = (max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio)))
            small = pixels.resize(target, Image.Resampling.BILINEAR, reducing_gap=2.0)
        boxes = _selective_search(np.asarray(small)[:, :, ::-1], options)
    except ImageError as error:
        return Proposed(np.zeros((0, 4), np.int32), (0, 0), fingerprint, str(error))
    return Proposed(_scaled(boxes, small.size, size)[: options.max_windows], size, fingerprint, None)


def _selective_search(pixels: np.ndarray, options: ProposalOptions) -> np.ndarray:
    """Windows [K, 4] of BGR pixels [H, W, 3], the best ranks first."""
    cv2 = require_extra("cv2", "detect", "selective search")
    if not hasattr(cv2, "ximgproc"):
        require_extra("cv2.ximgproc", "detect", "selective search (in OpenCV's contrib modules)")
    if min(pixels.shape[:2]) < MIN_SIDE:
        return np.zeros((0, 4), np.int64)
    try:
        cv2.setNumThreads(1)
        # OpenCV draws the ranks with `rand`, from wherever earlier pictures have left it.
        ctypes.CDLL(None).srand(options.seed + 1)  # glibc takes 0 for 1
        search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
        search.setBaseImage(np.ascontiguousarray(pixels))
        if options.method == "selective-search":
            search.switchToSelectiveSearchFast()
        else:
            search.switchToSelectiveSearchQuality()
        x, y, width, height = np.asarray(search.process(), np.int64).reshape(-1, 4).T
    except cv2.error as error:
        raise ImageError(f"selective search failed: {one_line(error)}") from None
    kept = (width >= MIN_SIDE) & (height >= MIN_SIDE)
    return np.stack([x, y, x + width - 1, y + height - 1], 1)[kept]


def _scaled(boxes: np.ndarray, small: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Windows of the shrunk picture on the original; each once."""
    if small != size:
        ratio = np.array([size[0] / small[0], size[1] / small[1]] * 2)
        edges = (boxes + [0, 0, 1, 1]) * ratio - [0, 0, 1, 1]
        boxes = np.clip(np.rint(edges), 0, [size[0] - 1, size[1] - 1] * 2)
    _, first = np.unique(boxes, axis=0, return_index=True)
    result: np.ndarray = boxes[np.sort(first)].astype(np.int32)
    return result


class Proposer:
    """Worker processes that propose windows. Use as a context manager.

    A script that uses it must have the usual `if __name__ == "__main__":`, since processes import it anew.
    """

    def __init__(self, options: ProposalOptions | None = None, *, workers: int) -> None:
        require_extra("cv2", "detect", "selective search")
        self._options = options or ProposalOptions()
        self._workers = workers
        self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin_worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def stream(
        self, paths: Iterable[str], *, stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[str, Proposed]]:
        """Every path with its windows, in order; once `stop()` is true no further picture is begun.

        Raises WindowsError when a worker process dies (of too little memory, say).
        """
        waiting: deque[tuple[str, Future[Proposed]]] = deque()
        paths = iter(paths)
        while True:
            while len(waiting) < 4 * self._workers and not stop():
                path = next(paths, None)
                if path is None:
                    break
                waiting.append((path, self._pool.submit(propose, path, self._options)))
            if not waiting:
                return
            path, future = waiting.popleft()
            try:
                yield path, future.result()
            except BrokenProcessPool:
                raise WindowsError(
                    f"{path}: a process that proposed windows died, on this picture or one of the next "
                    f"{len(waiting)}; too little memory?"
                ) from None


def _begin_worker() -> None:
    # Ctrl-C, and `timeout`, reach every process of a group; the parent decides what is finished.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    # Else workers of a killed parent would wait for work for ever.
    threading.Thread(target=end_with_parent, daemon=True).start()


class WindowFile(Mapping[str, np.ndarray]):
    """An open file of windows: [K, 4] float64 by name, read when asked for.

    names, options, source_root, method: as they were made. errors: why pictures have no windows, by name.
    image_size: [N, 2] int32. file_size, file_mtime_ns: [N] int64.
    """

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self.names: list[str] = file["names"].asstr()[:].tolist()
        self.options = ProposalOptions(**json.loads(str(file.attrs["options"])))
        self.source_root = os.fsdecode(bytes(file.attrs["source_root"]))
        self.versions: dict[str, str] = json.loads(str(file.attrs["versions"]))
        self.errors = {n: e for n, e in zip(self.names, file["error"].asstr()[:].tolist(), strict=True) if e}
        self.image_size: np.ndarray = file["image_size"][:]
        self.file_size: np.ndarray = file["file_size"][:]
        self.file_mtime_ns: np.ndarray = file["file_mtime_ns"][:]
        self._start: np.ndarray = file["start"][:]
        dataset = file["windows"]
        rows = int(dataset.shape[0])
        if len(self._start) != len(self.names) + 1 or self._start[-1] != rows or (np.diff(self._start) < 0).any():
            raise ValueError("its windows do not add up")
        if rows:
            place = dataset.id.get_offset()
            self._windows: np.ndarray = np.memmap(path, dataset.dtype, "r", offset=place, shape=(rows, 4))
        else:
            self._windows = np.zeros((0, 4), np.int32)
        self._row = {name: row for row, name in enumerate(self.names)}

    def __getitem__(self, name: str) -> np.ndarray:
        row = self._row[name]
        return np.asarray(self._windows[self._start[row] : self._start[row + 1]], np.float64)

    def __contains__(self, name: object) -> bool:
        return name in self._row

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def count(self) -> int:
        """Windows of all pictures together."""
        return len(self._windows)

    def size_of(self, name: str) -> tuple[int, int]:
        """Width and height of the upright picture; zeros where it could not be read."""
        width, height = self.image_size[self._row[name]].tolist()
        return width, height

    def fingerprint(self, name: str) -> Fingerprint:
        """The picture's file as it was."""
        row = self._row[name]
        return Fingerprint(int(self.file_size[row]), int(self.file_mtime_ns[row]))


def open_windows(path: str | os.PathLike[str]) -> WindowFile:
    """Open a file that `propose_folder` made. Raises WindowsError when it is none."""
    with open_hdf5(path, WINDOWS, FORMAT_VERSION, WindowsError) as file:
        return WindowFile(Path(path), file)


def windows_from(path: str | os.PathLike[str]) -> Mapping[str, np.ndarray]:
    """Windows [K, 4] by image name, from a file of `propose_folder`, or of one's own (see `read_windows`)."""
    if os.path.splitext(path)[1].lower() in (".csv", ".json"):
        return read_windows(path)
    return open_windows(path)


@dataclass(frozen=True)
class Proposals:
    """What a run of `propose_folder` did.

    images: listed in the sources. proposed: in this run. reused: from before. failed: listed images without windows
    for a reason, now or before. empty: images in which nothing was found. pending: left, after an interruption.
    windows: of all images in the file.
    """

    file: str
    images: int
    proposed: int
    reused: int
    failed: int
    empty: int
    pending: int
    windows: int
    seconds: float


class Observer(Protocol):
    """Who wants to follow; called from the thread that called `propose_folder`."""

    def started(self, *, todo: int, reused: int) -> None:
        """The work is known."""

    def row(self, name: str, error: str | None) -> None:
        """One image has its windows, or failed."""


class _Silent:
    def started(self, *, todo: int, reused: int) -> None:
        pass

    def row(self, name: str, error: str | None) -> None:
        pass


def propose_folder(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    options: ProposalOptions | None = None,
    *,
    workers: int | None = None,
    root: str | None = None,
    resume: bool = True,
    overwrite: bool = False,
    observer: Observer | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Proposals:
    """Propose windows for the images of folders, files or lists (see `find_images`) into the file `output`.

    A file that is there is resumed: unchanged images keep their windows; other options, or another root, are refused.
    Raises WindowsError, UsageError, MissingExtraError. An image that cannot be read is kept with its reason.
    """
    from sppfeat.devices import available_cores  # brings torch along, which the processes have no use for

    began = time.perf_counter()
    options, observer = options or ProposalOptions(), observer or _Silent()
    path = Path(os.path.realpath(output)) if os.path.islink(output) else Path(output)
    check_new_file(path, overwrite=overwrite or resume, error=WindowsError, kind=WINDOWS)
    several = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    images = find_images(several, root=root)
    if not images.names:
        raise UsageError(f"{', '.join(str(source) for source in several)}: expected images, found none")
    with lock_store(path):
        if overwrite:
            journal = _Journal(path, options, images.root, fresh=True)
            before: WindowFile | None = None
        else:
            before = open_windows(path) if path.exists() and path.stat().st_size else None
            _check_same(path, before, options, images.root)
            journal = _Journal(path, options, images.root, fresh=False)
        files = {name: fingerprint_of(name_to_path(images.root, name)) for name in images.names}
        done = {n for n in before or () if n not in files or (before is not None and before.fingerprint(n) == files[n])}
        done |= {n for n in journal.places if n not in files or journal.fingerprints[n] == files[n]}
        todo = [name for name in images.names if name not in done]
        observer.started(todo=len(todo), reused=len(images.names) - len(todo))
        proposed = 0
        with journal, Proposer(options, workers=workers or available_cores()) as proposer:
            good = [name for name in todo if name not in images.problems]
            for name in todo:
                if name in images.problems:
                    journal.add(name, Proposed(np.zeros((0, 4)), (0, 0), files[name], images.problems[name]))
                    observer.row(name, images.problems[name])
            found = proposer.stream((name_to_path(images.root, name) for name in good), stop=stop)
            for name, (_, result) in zip(good, found, strict=False):
                journal.add(name, result)
                observer.row(name, result.error)
                proposed += result.error is None
        written = _write(path, before, journal, options, images.root)
        journal.remove()
    failed = sum(name in written.errors for name in images.names)
    known = [name for name in images.names if name in written]
    empty = sum(not len(written[name]) for name in known) - failed
    return Proposals(
        file=str(path),
        images=len(images.names),
        proposed=proposed,
        reused=len(images.names) - len(todo),
        failed=failed,
        empty=empty,
        pending=len(images.names) - len(known),
        windows=written.count,
        seconds=time.perf_counter() - began,
    )


def _check_same(path: Path, before: WindowFile | None, options: ProposalOptions, root: str) -> None:
    if before is None:
        return
    if before.options != options:
        raise WindowsError(
            f"{path}: was made with {_show(before.options)}, now {_show(options)}; "
            "choose another output, or --overwrite"
        )
    if before.source_root != root and os.path.isdir(before.source_root):
        raise WindowsError(
            f"{path}: its names are relative to {before.source_root}, these images to {root}; "
            "choose another output, give its root, or --overwrite"
        )


def _show(options: ProposalOptions) -> str:
    return f"{options.method}, at most {options.max_windows} windows, seed {options.seed}"


class _Journal:
    """Finished pictures, one JSON line each, kept until the file is written. A line that was cut short is dropped.

    places: where each picture's last line starts, by name. fingerprints: of the pictures then.
    """

    def __init__(self, path: Path, options: ProposalOptions, root: str, *, fresh: bool) -> None:
        self._path = path.with_name(f".{path.name}.journal")
        header = json.dumps({"options": asdict(options), "root": root}).encode() + b"\n"
        self.places: dict[str, int] = {}
        self.fingerprints: dict[str, Fingerprint] = {}
        try:
            self._file = open(self._path, "w+b" if fresh or not self._path.exists() else "r+b")  # noqa: SIM115
            if self._file.readline() != header:
                self._file.seek(0)
                self._file.truncate()
                self._file.write(header)
            end = self._file.tell()
            while (line := self._file.readline()).endswith(b"\n"):
                entry = json.loads(line)
                self.places[entry["name"]] = end
                self.fingerprints[entry["name"]] = Fingerprint(*entry["file"])
                end = self._file.tell()
            self._file.truncate(end)
        except OSError as error:
            raise WindowsError(f"{self._path}: cannot be written: {os_reason(error)}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise WindowsError(f"{self._path}: expected a journal, found: {one_line(error)}; remove it") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._file.close()

    def add(self, name: str, result: Proposed) -> None:
        entry = {
            "name": name,
            "size": result.image_size,
            "file": result.fingerprint,
            "windows": result.windows.tolist(),
            "error": result.error or "",
        }
        try:
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise WindowsError(f"{self._path}: cannot be written: {os_reason(error)}") from None
        self.places[name] = place
        self.fingerprints[name] = result.fingerprint

    def read(self, name: str) -> dict[str, Any]:
        self._file.seek(self.places[name])
        entry: dict[str, Any] = json.loads(self._file.readline())
        return entry

    def remove(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


def _write(path: Path, before: WindowFile | None, journal: _Journal, options: ProposalOptions, root: str) -> WindowFile:
    names = list(dict.fromkeys([*(before or ()), *journal.places]))
    text = h5py.string_dtype()
    with appearing(path, WindowsError) as partial, h5py.File(partial, "w", locking=False) as file:
        columns: dict[str, list[Any]] = {"error": [], "image_size": [], "file_size": [], "file_mtime_ns": []}
        start = [0]
        for name in names:
            if name in journal.places:
                entry = journal.read(name)
                count, print_ = len(entry["windows"]), Fingerprint(*entry["file"])
                size, error = entry["size"], entry["error"]
            else:
                assert before is not None
                count, print_ = len(before[name]), before.fingerprint(name)
                size, error = before.size_of(name), before.errors.get(name, "")
            start.append(start[-1] + count)
            for key, value in zip(columns, (error, size, *print_), strict=True):
                columns[key].append(value)
        windows = file.create_dataset("windows", (start[-1], 4), np.int32)
        for name, first, last in zip(names, start, start[1:], strict=False):
            if last > first:
                windows[first:last] = journal.read(name)["windows"] if name in journal.places else before[name]  # type: ignore[index]
        file.create_dataset("names", data=np.asarray(names, dtype=object), dtype=text)
        file.create_dataset("start", data=np.asarray(start, np.int64))
        file.create_dataset("error", data=np.asarray(columns["error"], dtype=object), dtype=text)
        file.create_dataset("image_size", data=np.asarray(columns["image_size"], np.int32).reshape(-1, 2))
        for key in ("file_size", "file_mtime_ns"):
            file.create_dataset(key, data=np.asarray(columns[key], np.int64))
        cv2 = require_extra("cv2", "detect", "selective search")
        file.attrs["format"] = WINDOWS
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["options"] = json.dumps(asdict(options))
        file.attrs["source_root"] = np.void(os.fsencode(root))
        file.attrs["versions"] = json.dumps({"sppfeat": __version__, "opencv": cv2.__version__})
    return open_windows(path)
