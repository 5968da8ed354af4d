"""The right to write: a lock for each store, and for each shard that workers of a cluster fill."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from sppfeat.errors import StoreBusyError, StoreError
from sppfeat.files import os_reason, partial_path, sync_folder
from sppfeat.store.manifest import LOCK

# What flock says on network and FUSE file systems that have no locks.
_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# A lock may outlive a killed process by a moment, in a child that it was forking.
_PATIENCE_SECONDS: Final = 1.0
_PATIENCE_POLL_SECONDS: Final = 0.02
# Ray ends the workers of a dead driver within some seconds.
_SHARD_SECONDS: Final = 60
_SHARD_POLL_SECONDS: Final = 0.25

# Descriptors of the locks that this process holds.
_locks: set[int] = set()


def _leave_locks() -> None:
    """In a forked child, which would hold its parent's locks after a kill: opening an HDF5 file forks one."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_leave_locks)


@contextlib.contextmanager
def lock_store(path: Path, *, folder: bool = False) -> Iterator[None]:
    """Hold the exclusive right to write to a store; the lock ends with the process. Raises StoreBusyError, StoreError.

    folder: the store is a folder, which is created if needed; a new one is removed again if it stays empty.
    The lock is a hidden file beside the store, because the store itself may be replaced, and its readers must not be
    locked out; or inside its folder, whose own parent need not be writable.
    """
    inside = folder or path.is_dir()
    beside = path / LOCK if inside else path.with_name(f".{path.name}.lock")
    try:
        if new := inside and not path.is_dir():
            path.mkdir()
            sync_folder(path.parent)
    except FileExistsError:
        new = False  # by another process
        if not path.is_dir():
            raise StoreError(
                f"{path}: expected a folder of shards or nothing, found a file; it is left as it is"
            ) from None
    except FileNotFoundError:
        raise StoreError(f"{path}: its folder {path.parent} does not exist") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be created: {os_reason(error)}") from None
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            descriptor = above_standard(os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
        except OSError as error:
            raise StoreError(f"{path}: cannot write in {beside.parent}: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                raise StoreError(
                    f"{path}: cannot be locked: its file system has no locks ({error.strerror}); write to a local "
                    "disk, then copy the store"
                ) from None
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise StoreError(f"{path}: cannot be locked: {error.strerror}") from None
            if time.monotonic() < deadline:
                time.sleep(_PATIENCE_POLL_SECONDS)
                continue
            raise StoreBusyError(f"{path}: another process is writing to it; wait for it to end") from None
        # The previous holder may have removed the file between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(beside).st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)
    _locks.add(descriptor)
    try:
        if not inside:
            # Remove what a killed writer left behind: no other process may be writing now.
            with contextlib.suppress(OSError):
                os.unlink(partial_path(path))
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        _locks.discard(descriptor)
        os.close(descriptor)
        if new:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def lock_shard(path: Path, stop: Callable[[], bool] = lambda: False) -> Iterator[Path]:
    """Hold a shard under work, besides `lock_store`: a worker of a cluster may outlive its driver and that lock.

    Waits until such a worker has ended. Raises StoreBusyError if that takes too long or `stop()` is true; StoreError.
    """
    try:
        descriptor = above_standard(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {os_reason(error)}") from None
    _locks.add(descriptor)
    try:
        deadline = time.monotonic() + _SHARD_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline or stop():
                    raise StoreBusyError(f"{path}: another worker is writing to it") from None
                time.sleep(_SHARD_POLL_SECONDS)
            except OSError as error:
                raise StoreError(f"{path}: cannot be locked: {error.strerror}") from None
        yield path
    finally:
        _locks.discard(descriptor)
        os.close(descriptor)


def above_standard(descriptor: int) -> int:
    """The same file, never with the number of a standard stream: a library that prints would write into it."""
    if descriptor > 2:
        return descriptor
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(descriptor)
