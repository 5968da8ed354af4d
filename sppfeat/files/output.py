"""Output files: they appear atomically, and replace nothing by mistake."""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py

from sppfeat.errors import SppFeatError, one_line
from sppfeat.files.formats import NOUNS, format_of


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
    """An HDF5 file to write. Raises OSError at the end of the block if a write failed."""
    with _HeldBack(path, "w+") as disk:
        try:
            with h5py.File(disk, "w") as file:
                yield file
        finally:
            if disk.failure is not None:
                raise disk.failure


class _HeldBack(io.FileIO):
    """A file that keeps its first failed or interrupted write in `failure`, and pretends that later writes succeed.

    HDF5 cannot close a file that it cannot write to: a full disk would crash the process.
    """

    failure: BaseException | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        try:
            while len(left) and self.failure is None:
                left = left[super().write(left) :]
        except BaseException as error:  # also an interrupt, which HDF5 would turn into another error
            self.failure = error
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except BaseException as error:
            self.failure = self.failure or error
            return size or 0


def partial_path(path: Path) -> Path:
    """Where `appearing` writes before it becomes the file `path`."""
    return path.with_name(f".{path.name}.partial")


def sync_folder(folder: Path) -> None:
    """Flush a folder's new names to disk: otherwise a power cut could lose them, and their files with them."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_new_file(
    path: str | os.PathLike[str],
    *,
    overwrite: bool,
    error: type[SppFeatError],
    kind: str,
    other: Callable[[Path], str | None] | None = None,
) -> Path:
    """The path, if a file may be written there: a new file, or, with `overwrite`, in place of a file of `kind`.

    kind: one of NOUNS; or any noun, with `other`, which says what a file is if it is not of that kind, else None. By
    default its format says so.
    Call it before the work starts: a mistyped output must not destroy a photograph or other results, and an unwritable
    folder must not waste the work. A symlink is followed, and stays.
    """
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    if not os.path.isdir(path.parent):
        raise error(f"{path}: its folder {path.parent} does not exist")
    if os.path.lexists(path):
        if not path.is_file():
            kind_found = "a folder" if path.is_dir() else "a special file"
            raise error(f"{path}: expected a file to write to, found {kind_found}")
        if path.stat().st_size:
            what = other(path) if other is not None else _other_than(kind, path)
            if what is not None:
                raise error(
                    f"{path}: expected {NOUNS.get(kind, kind)} or a new file, found {what}; it is left as it is"
                )
            if not overwrite:
                raise error(f"{path}: already exists; choose another output, or use --overwrite")
    check_can_write(path, error)
    return path


def _other_than(kind: str, path: Path) -> str | None:
    found = format_of(path)
    return None if found == kind else NOUNS.get(str(found), "another file")


def check_can_write(path: Path, error: type[SppFeatError]) -> None:
    """Raise `error` unless a file can be created or replaced at a path whose folder exists; call it before the work."""
    if os.path.lexists(path) and not os.access(path, os.W_OK):
        raise error(f"{path}: is not writable")
    # Permissions alone do not tell: a disk may be mounted read-only, a name too long. No temporary file beside an
    # output has a longer name than this one.
    attempt = path.with_name(f".{path.name}.writable")
    try:
        os.close(os.open(attempt, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        attempt.unlink(missing_ok=True)
    except FileExistsError:
        pass  # another process is checking right now
    except OSError as reason:
        raise error(f"{path}: cannot be written: {os_reason(reason)}") from None


def os_reason(error: OSError) -> str:
    """Why a system call failed, in a few words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space, then resume"
    return error.strerror or one_line(error)
