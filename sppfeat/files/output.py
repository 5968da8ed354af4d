"""What all our files share: they appear at once and whole, they say what they are, and bad ones are refused by name.

Every HDF5 file of ours has the root attributes `format` and `format_version`; a gallery is a folder with a
`gallery.json` that has both keys.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import h5py
import msgspec

from sppfeat.errors import SppFeatError, UsageError, one_line
from sppfeat.files.documents import decode_document
from sppfeat.files.hdf5_check import check_hdf5, hdf5_reason

T = TypeVar("T")
STORE = "sppfeat-store"
SVM = "sppfeat-svm"
DETECTOR = "sppfeat-detector"
WINDOWS = "sppfeat-windows"
GALLERY = "sppfeat-gallery"
# What h5py, NumPy and conversions raise where a file does not hold what it should.
DAMAGE = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError)
# How messages call them.
NOUNS = {STORE: "a store", SVM: "an SVM", DETECTOR: "a detector", WINDOWS: "a file of windows", GALLERY: "a gallery"}


class _Format(msgspec.Struct):
    format: str


def format_of(path: str | os.PathLike[str]) -> str | None:
    """Which of our formats a file or folder has, without trusting it further; None: none of them, or unreadable."""
    path = Path(path)
    try:
        if path.is_dir():
            about = path / "gallery.json"
            if not about.is_file():
                return None
            found = decode_document(about.read_bytes(), _Format, what=str(about), error=UsageError).format
        else:
            check_hdf5(path)
            with h5py.File(path, "r", locking=False) as file:
                found = file.attrs.get("format")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, UsageError):
        return None
    return found if isinstance(found, str) and found in NOUNS else None


@contextlib.contextmanager
def open_hdf5(
    path: str | os.PathLike[str], kind: str | None, version: int, error: type[SppFeatError]
) -> Iterator[h5py.File]:
    """Open one of our HDF5 files for reading; whatever is wrong with it, also within the block, is raised as `error`.

    kind: its format, one of NOUNS; None: a part of a gallery, which does not say. version: the newest format version
    that is understood.
    """
    path, noun = Path(path), "an HDF5 file" if kind is None else NOUNS[kind]
    try:
        check_hdf5(path)
        with h5py.File(path, "r", locking=False) as file:
            if kind is None:
                yield file
                return
            found = file.attrs.get("format")
            if found != kind:
                what = NOUNS.get(str(found), f"an HDF5 file with format {found!r}")
                raise error(f"{path}: expected {noun} (format {kind!r}), found {what}")
            number = int(file.attrs["format_version"])
            if number > version:
                raise error(f"{path}: its format {number} is newer than this sppfeat reads ({version}): update sppfeat")
            yield file
    except FileNotFoundError:
        raise error(f"{path}: expected {noun}, found no such file") from None
    except IsADirectoryError:
        raise error(f"{path}: expected {noun}, found a folder") from None
    except OSError as reason:
        raise error(f"{path}: expected {noun}, found a file that cannot be opened: {hdf5_reason(reason)}") from None
    except (*DAMAGE, UsageError) as reason:
        raise error(f"{path}: expected {noun} that is whole, found: {one_line(reason)}") from None


def read_document(file: h5py.File, name: str, shape: type[T], error: type[SppFeatError]) -> T:
    """The JSON document in a root attribute of an open HDF5 file, as an instance of `shape`. Raises `error`."""
    what = f"{file.filename}: expected a JSON document {name!r}"
    return decode_document(str(file.attrs[name]), shape, what=what, error=error)


@contextlib.contextmanager
def appearing(path: Path, error: type[SppFeatError]) -> Iterator[Path]:
    """A path to write to that becomes the file `path` at the end, whole, or not at all."""
    partial = partial_path(path)
    try:
        partial.unlink(missing_ok=True)
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as reason:
        partial.unlink(missing_ok=True)
        raise error(f"{path}: cannot be written: {os_reason(reason)}") from None
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def appearing_hdf5(path: Path, error: type[SppFeatError]) -> Iterator[h5py.File]:
    """An HDF5 file to write that appears whole at the end, or not at all: see `appearing`."""
    with appearing(path, error) as partial, new_hdf5(partial) as file:
        yield file


@contextlib.contextmanager
def new_hdf5(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file to write. Raises OSError at the end of the block where the disk did not take it all."""
    with _HeldBack(path, "w+") as disk:
        try:
            with h5py.File(disk, "w") as file:
                yield file
        finally:
            if disk.failure is not None:
                raise disk.failure


class _HeldBack(io.FileIO):
    """A file that keeps its first failed or interrupted write in `failure`, and takes the others as if all were well.

    HDF5 cannot close a file that it cannot write to: a full disk would end the process with a crash.
    """

    failure: BaseException | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        try:
            while len(left) and self.failure is None:
                left = left[super().write(left) :]
        except BaseException as error:  # an interrupt as well, which HDF5 would turn into something else
            self.failure = error
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except BaseException as error:
            self.failure = self.failure or error
            return size or 0


def partial_path(path: Path) -> Path:
    """Where `appearing` keeps what is not yet the file `path`."""
    return path.with_name(f".{path.name}.partial")


def sync_folder(folder: Path) -> None:
    """Put a folder's new names on disk: without it, a power cut could take them, and with them their files, back."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_new_file(path: str | os.PathLike[str], *, overwrite: bool, error: type[SppFeatError], kind: str) -> Path:
    """The path, if a file may be written there: over nothing, or, with `overwrite`, over a file of `kind`.

    kind: one of NOUNS. To be asked before the work is done. A mistyped output must not cost a photograph, or other
    results; nor a folder that may not be written to the work. A link is followed, and stays.
    """
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    if not os.path.isdir(path.parent):
        raise error(f"{path}: expected its folder {path.parent} to exist, found none")
    if os.path.lexists(path):
        if not path.is_file():
            kind_found = "a folder" if path.is_dir() else "a special file"
            raise error(f"{path}: expected a file to write to, found {kind_found}")
        if path.stat().st_size:
            found = format_of(path)
            if found != kind:
                what = NOUNS.get(str(found), "another file")
                raise error(f"{path}: expected {NOUNS[kind]} or a new file, found {what}; it is left as it is")
            if not overwrite:
                raise error(f"{path}: exists already; choose another output, or --overwrite")
    check_can_write(path, error)
    return path


def check_can_write(path: Path, error: type[SppFeatError]) -> None:
    """Raise `error` unless a file can be made, or replaced, at a path whose folder exists; to be asked before work."""
    if os.path.lexists(path) and not os.access(path, os.W_OK):
        raise error(f"{path}: is not writable")
    # Rights alone do not tell: a disk may be mounted to be read, a name too long. What is written beside an output on
    # the way has no longer name than this one.
    attempt = path.with_name(f".{path.name}.writable")
    try:
        os.close(os.open(attempt, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        attempt.unlink(missing_ok=True)
    except FileExistsError:
        pass  # another process tries just now
    except OSError as reason:
        raise error(f"{path}: cannot be written: {os_reason(reason)}") from None


def os_reason(error: OSError) -> str:
    """Why the system refused, in few words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; make room, then resume"
    return error.strerror or one_line(error)
