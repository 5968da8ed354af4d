"""Proposals: windows that may hold objects, found once per image (see `selective_search`) and kept in a file.

The file (`sppfeat-windows`, HDF5) appears whole, when a run ends or is interrupted. Until then every finished image is
a line of a journal beside it, from which a killed run resumes.

    /names       (N,)    UTF-8; see `sppfeat.images.path_to_name`
    /start       (N+1,)  int64, the windows of image n are rows start[n] .. start[n+1]
    /windows     (M, 4)  int32, x1, y1, x2, y2 in pixels of the upright original, inclusive
    /image_size  (N, 2)  int32, width and height of the upright original
    /error       (N,)    UTF-8, why an image has no windows; else empty
    /file_size, /file_mtime_ns  (N,) int64, the file as it was
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Final, Self

import h5py
import msgspec
import numpy as np

from sppfeat._version import __version__
from sppfeat.errors import UsageError, WindowsError, require_extra
from sppfeat.files import WINDOWS, appearing_hdf5, check_new_file, decode_document, open_hdf5, os_reason, read_document
from sppfeat.images import Fingerprint, find_images, fingerprints, no_images
from sppfeat.machine import available_cores
from sppfeat.progress import Observer
from sppfeat.recipe import RunOptions
from sppfeat.store import lock_store
from sppfeat.windows.reading import read_windows
from sppfeat.windows.selective_search import ProposalOptions, Proposed, Proposer

FORMAT_VERSION: Final = 1


class WindowFile(Mapping[str, np.ndarray]):
    """An open file of windows: [K, 4] float64 by name, read on demand.

    names, options, source_root, method: as they were made. errors: why images have no windows, by name.
    image_size: [N, 2] int32. file_size, file_mtime_ns: [N] int64.
    """

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self.names: list[str] = file["names"].asstr()[:].tolist()
        self.options = ProposalOptions.from_document(read_document(file, "options", dict[str, Any], WindowsError))
        self.source_root = os.fsdecode(bytes(file.attrs["source_root"]))
        self.versions: dict[str, str] = read_document(file, "versions", dict[str, str], WindowsError)
        self.errors = {n: e for n, e in zip(self.names, file["error"].asstr()[:].tolist(), strict=True) if e}
        self.image_size: np.ndarray = file["image_size"][:]
        self.file_size: np.ndarray = file["file_size"][:]
        self.file_mtime_ns: np.ndarray = file["file_mtime_ns"][:]
        self._start: np.ndarray = file["start"][:]
        dataset = file["windows"]
        rows = int(dataset.shape[0])
        if (
            len(self._start) != len(self.names) + 1
            or self._start[-1] != rows
            or self._start[0]
            or (np.diff(self._start) < 0).any()
        ):
            raise ValueError("its windows do not add up")
        columns = (self.image_size, (2,)), (self.file_size, ()), (self.file_mtime_ns, ())
        if any(values.shape != (len(self.names), *width) or values.dtype.kind != "i" for values, width in columns):
            raise ValueError("its columns differ in length")
        if dataset.dtype != np.int32 or dataset.shape != (rows, 4):
            raise ValueError(f"windows: expected int32 [M, 4], found {dataset.dtype} {list(dataset.shape)}")
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
        """The number of windows of all images."""
        return len(self._windows)

    def size_of(self, name: str) -> tuple[int, int]:
        """Width and height of the upright image; zeros if it could not be read."""
        width, height = self.image_size[self._row[name]].tolist()
        return width, height

    def fingerprint(self, name: str) -> Fingerprint:
        """The fingerprint of the image's file as it was."""
        row = self._row[name]
        return Fingerprint(int(self.file_size[row]), int(self.file_mtime_ns[row]))


def open_windows(path: str | os.PathLike[str]) -> WindowFile:
    """Open a file that `propose_folder` made. Raises WindowsError if it is not one."""
    with open_hdf5(path, WINDOWS, FORMAT_VERSION, WindowsError) as file:
        return WindowFile(Path(path), file)


def windows_from(path: str | os.PathLike[str]) -> Mapping[str, np.ndarray]:
    """Windows [K, 4] by image name, from a file of `propose_folder`, or CSV or JSON (see `read_windows`)."""
    if os.path.splitext(path)[1].lower() in (".csv", ".json"):
        return read_windows(path)
    return open_windows(path)


@dataclass(frozen=True)
class Proposals:
    """What a run of `propose_folder` did.

    images: listed in the sources. proposed: in this run. reused: from before. failed: listed images that failed, now
    or before. empty: images in which nothing was found. pending: left, after an interruption. windows: of the listed
    images; the file may hold those of others, too.
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


def propose_folder(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    options: ProposalOptions | None = None,
    *,
    workers: int | None = None,
    root: str | os.PathLike[str] | None = None,
    resume: bool = True,
    overwrite: bool = False,
    observer: Observer | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Proposals:
    """Propose windows for the images of folders, files or lists (see `find_images`) into the file `output`.

    An existing file is resumed: unchanged images keep their windows; other options, or another root, are an error.
    Raises WindowsError, UsageError, MissingExtraError. An image that cannot be read is kept with its reason.
    """
    began = time.perf_counter()
    options, observer = options or ProposalOptions(), observer or Observer()
    RunOptions(num_workers=workers)
    path = Path(os.path.realpath(output)) if os.path.islink(output) else Path(output)
    check_new_file(path, overwrite=overwrite or resume, error=WindowsError, kind=WINDOWS)
    several = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    images = find_images(several, root=root)
    if not images.items:
        raise UsageError(no_images(several))
    with lock_store(path):
        if overwrite:
            journal = _Journal(path, options, images.root, fresh=True)
            before: WindowFile | None = None
        else:
            before = open_windows(path) if path.exists() and path.stat().st_size else None
            _check_same(path, before, options, images.root)
            journal = _Journal(path, options, images.root, fresh=not resume)
        files = dict(zip(images.names, fingerprints(images.items), strict=True))
        done = {n for n in before or () if n not in files or (before is not None and before.fingerprint(n) == files[n])}
        done |= {n for n in journal.places if n not in files or journal.fingerprints[n] == files[n]}
        todo = [item for item in images.items if item.name not in done]
        observer.started(todo=len(todo), reused=len(images.names) - len(todo))
        proposed = 0
        with journal, Proposer(options, workers=workers or available_cores()) as proposer:
            for item, result in proposer.stream(todo, stop=stop):
                journal.add(item.name, result)
                observer.row(item.name, result.error)
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
        windows=sum(len(written[name]) for name in known),
        seconds=time.perf_counter() - began,
    )


def _check_same(path: Path, before: WindowFile | None, options: ProposalOptions, root: str) -> None:
    if before is None:
        return
    if before.options != options:
        raise WindowsError(
            f"{path}: expected {_show(options)}, found {_show(before.options)}; choose another output, or use "
            "--overwrite"
        )
    if before.source_root != root and os.path.isdir(before.source_root):
        raise WindowsError(
            f"{path}: its names are relative to {before.source_root}, these images to {root}; "
            "choose another output, or use --overwrite"
        )


def _show(options: ProposalOptions) -> str:
    return f"{options.method}, base k {options.base_k}, at most {options.max_windows} windows, seed {options.seed}"


# The types of the file's columns: text in HDF5 ends at a NUL byte.
_Text = Annotated[str, msgspec.Meta(pattern=r"^[^\0]*\Z")]
_Int32 = Annotated[int, msgspec.Meta(ge=-(1 << 31), le=(1 << 31) - 1)]
_Int64 = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class _Finished(msgspec.Struct, forbid_unknown_fields=True):
    """A line of the journal: an image with its width and height, its file's fingerprint, and what was found."""

    name: _Text
    size: tuple[_Int32, _Int32]
    file: tuple[_Int64, _Int64]
    windows: list[tuple[_Int32, _Int32, _Int32, _Int32]]
    error: _Text


class _Journal:
    """Finished images, one JSON line each, kept until the file is written. An incomplete last line is dropped.

    places: where each image's last line starts, by name. fingerprints: of the images then.
    """

    def __init__(self, path: Path, options: ProposalOptions, root: str, *, fresh: bool) -> None:
        self._path = path.with_name(f".{path.name}.journal")
        header = json.dumps({"options": asdict(options), "root": root}).encode() + b"\n"
        self.places: dict[str, int] = {}
        self.fingerprints: dict[str, Fingerprint] = {}
        try:
            self._file = open(self._path, "w+b" if fresh or not self._path.exists() else "r+b")  # noqa: SIM115
            try:
                self._begin(header)
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise WindowsError(f"{self._path}: cannot be written: {os_reason(error)}") from None

    def _begin(self, header: bytes) -> None:
        """Read the existing lines, or write the first line."""
        if (found := self._file.readline()) != header:
            if found.endswith(b"\n"):
                raise WindowsError(
                    f"{self._path}: belongs to an unfinished search with other options or another root; "
                    "resume that search, or use --overwrite to start over"
                )
            self._file.seek(0)
            self._file.truncate()
            self._file.write(header)
        end = self._file.tell()
        while (line := self._file.readline()).endswith(b"\n"):
            entry = self._decoded(line)
            self.places[entry.name] = end
            self.fingerprints[entry.name] = Fingerprint(*entry.file)
            end = self._file.tell()
        self._file.truncate(end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            with contextlib.suppress(OSError):  # a full disk, which has been reported
                self._file.close()

    def add(self, name: str, result: Proposed) -> None:
        file = (result.fingerprint.file_size, result.fingerprint.mtime_ns)
        entry = _Finished(name, result.image_size, file, result.windows.tolist(), result.error or "")
        try:
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(json.dumps(msgspec.structs.asdict(entry)).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise WindowsError(f"{self._path}: cannot be written: {os_reason(error)}") from None
        self.places[name] = place
        self.fingerprints[name] = result.fingerprint

    def read(self, name: str) -> _Finished:
        self._file.seek(self.places[name])
        return self._decoded(self._file.readline())

    def _decoded(self, line: bytes) -> _Finished:
        what = f"{self._path}: expected an intact journal (remove it to start over)"
        return decode_document(line, _Finished, what=what, error=WindowsError)

    def remove(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


def _write(path: Path, before: WindowFile | None, journal: _Journal, options: ProposalOptions, root: str) -> WindowFile:
    names = list(dict.fromkeys([*(before or ()), *journal.places]))
    text = h5py.string_dtype()
    with appearing_hdf5(path, WindowsError) as file:
        columns: dict[str, list[Any]] = {"error": [], "image_size": [], "file_size": [], "file_mtime_ns": []}
        start = [0]
        for name in names:
            if name in journal.places:
                entry = journal.read(name)
                count, print_ = len(entry.windows), Fingerprint(*entry.file)
                size, error = entry.size, entry.error
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
                windows[first:last] = journal.read(name).windows if name in journal.places else before[name]  # type: ignore[index]
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
