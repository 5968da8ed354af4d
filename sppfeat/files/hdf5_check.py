"""Untrusted HDF5 files: checked in a child process first, because HDF5 can hang or crash on a damaged one.

HDF5 cannot be interrupted: its calls hold the interpreter's lock until they return. A forked child reads all of the
file's structure that opening it will read. If the child hangs, is killed or reports an error, the file is rejected.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import select
import signal
import stat
import time
import warnings
from pathlib import Path
from typing import Final

import h5py
from h5py._objects import phil

from sppfeat.errors import one_line

# Without progress in the child. Sound files take milliseconds, and the child reports after every block of names.
DEADLINE_SECONDS: Final = 8
# The child's memory on top of this process's: sound files with many names need about 100 MB.
MEMORY_BYTES: Final = 1 << 30
_BLOCK_ROWS: Final = 1 << 16
_SIGNATURE: Final = b"\x89HDF\r\n\x1a\n"
# The child's last message about a sound file.
_SOUND: Final = b"\0"
# Sound files by path, size, time and inode: one command opens a file several times.
_sound: set[tuple[str, int, int, int, bool]] = set()
_MOST_KNOWN: Final = 1024


def check_hdf5(path: str | os.PathLike[str], *, strings: bool = True) -> None:
    """Raise OSError unless a file is of the kind of HDF5 that sppfeat writes, and safe to read.

    Such a file has plain datasets at its root, each contiguous in the file: no filters, no chunks, no links, and no
    external storage. strings: also read all text of variable length; without, the caller must not read any.
    """
    path = Path(path)
    if stat.S_ISFIFO(os.stat(path).st_mode):
        raise OSError("a pipe, not a file")  # opening it would block forever
    with open(path, "rb") as file:
        info = os.fstat(file.fileno())
        if file.read(len(_SIGNATURE)) != _SIGNATURE:
            raise OSError("not an HDF5 file")
    key = (os.path.realpath(path), info.st_size, info.st_mtime_ns, info.st_ino)
    if (*key, True) in _sound or (*key, strings) in _sound:
        return
    # A failed check is repeated each time: the cause may have been a stall, or a shortage of memory.
    if (reason := _reason_in_child(path, strings)) is not None:
        raise OSError(reason)
    if len(_sound) >= _MOST_KNOWN:
        _sound.clear()
    _sound.add((*key, strings))


def hdf5_reason(error: OSError) -> str:
    """Why HDF5 failed: it puts its reason in parentheses, after a sentence that says nothing."""
    text = error.strerror or one_line(error)
    inner = text[text.find("(") + 1 : -1] if text.startswith("Unable to") and text.endswith(")") else text
    return f"cut short ({inner})" if "truncated file" in inner else inner


def _reason_in_child(path: Path, strings: bool) -> str | None:
    """What is wrong with a file, as a child process finds it; the child uses h5py alone."""
    receiver, sender = os.pipe()
    with warnings.catch_warnings():
        # Python warns that other threads' locks stay locked in the child, which uses none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        # No other thread may be inside HDF5 during the fork: its lock would stay locked in the child.
        with phil:
            try:
                child = os.fork()
            except OSError:
                os.close(receiver)
                os.close(sender)
                raise
    if not child:
        _look_and_exit(path, strings, sender)
    os.close(sender)
    said, ended, status = bytearray(), False, None
    try:
        last = time.monotonic()
        while not ended and (left := last + DEADLINE_SECONDS - time.monotonic()) > 0:
            if select.select([receiver], [], [], left)[0]:
                block = os.read(receiver, 1 << 16)
                said += block
                # The end of the pipe is not enough: a process that another thread forked meanwhile may hold it open.
                ended = not block or said.endswith(_SOUND)
                last = time.monotonic()
    finally:
        os.close(receiver)
        if not ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # where the program ignores SIGCHLD
            _, status = os.waitpid(child, 0)
    if said.endswith(_SOUND):
        return None
    if not ended or (status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM):
        return f"its header cannot be read within {DEADLINE_SECONDS} s"
    if status is not None and os.WIFSIGNALED(status):
        return f"its header is damaged (reading it ends with signal {os.WTERMSIG(status)})"
    return said.lstrip(b".").decode("utf-8", "replace") or "its header is damaged"


def _look_and_exit(path: Path, strings: bool, sender: int) -> None:
    status = 1
    try:
        faulthandler.disable()
        # A killed parent must not leave a hanging child behind.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(DEADLINE_SECONDS)
        with open("/proc/self/statm", "rb") as statm:
            taken = int(statm.read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = taken + MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(taken + MEMORY_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (OSError, ValueError):
        pass  # a system without /proc has no such limit
    try:
        _look(path, strings, sender)
        os.write(sender, _SOUND)
        status = 0
    except OSError as error:
        os.write(sender, hdf5_reason(error).encode("utf-8", "replace"))
    except BaseException as error:
        os.write(sender, one_line(error).encode("utf-8", "replace"))
    finally:
        os._exit(status)


def _look(path: Path, strings: bool, sender: int) -> None:
    """Read a file's attributes, dataset offsets and, if wanted, strings. Raises OSError and whatever h5py raises."""
    size = path.stat().st_size
    with h5py.File(path, "r", locking=False) as file:
        for key in file.attrs:
            if file.attrs.get_id(key).get_storage_size() > size:
                raise OSError(f"attribute {key!r} is larger than the file")
            file.attrs[key]
        for name in file:
            if not isinstance(file.get(name, getlink=True), h5py.HardLink):
                raise OSError(f"/{name} is a link to another location")
            dataset = file[name]
            if not isinstance(dataset, h5py.Dataset):
                raise OSError(f"/{name} is not a dataset")
            layout = dataset.id.get_create_plist()
            if layout.get_layout() != h5py.h5d.CONTIGUOUS or layout.get_external_count() or layout.get_nfilters():
                raise OSError(f"/{name} is not stored contiguously in this file")
            held = dataset.id.get_type().get_size()
            for length in dataset.shape or ():
                held *= int(length)
            place = dataset.id.get_offset()
            if held and (place is None or place + held > size):
                raise OSError(f"cut short: /{name} ends beyond the {size} bytes of the file")
            if dataset.dtype.kind == "O" and dataset.ndim == 1:
                for start in range(0, len(dataset) if strings else 0, _BLOCK_ROWS):
                    dataset[start : start + _BLOCK_ROWS]
                    signal.alarm(DEADLINE_SECONDS)
                    os.write(sender, b".")
            elif dataset.dtype.kind not in "biufSV" or dataset.dtype.names:
                raise OSError(f"/{name} holds values of type {dataset.dtype}")
