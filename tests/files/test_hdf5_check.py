"""HDF5 files from untrusted sources are refused before they can hang, kill or fill this process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from sppfeat.files import hdf5_check as untrusted
from sppfeat.files.hdf5_check import check_hdf5


def test_a_sound_file_passes_quickly(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["rows"] = np.zeros((100, 4))
        file.create_dataset("names", data=["a"] * 100_000, dtype=h5py.string_dtype())
        file.attrs["recipe"] = "{}"
    start = time.monotonic()
    check_hdf5(tmp_path / "f.h5")
    assert time.monotonic() - start < 3


def _chunked(file: h5py.File) -> None:
    file.create_dataset("x", (1 << 40,), "f4", chunks=(1024,), compression="gzip")


def _external(file: h5py.File) -> None:
    file.create_dataset("x", (100,), np.uint8, external=[("/etc/passwd", 0, 100)])


def _virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", (4,))
    file.create_virtual_dataset("x", layout)


def _external_link(file: h5py.File) -> None:
    file["x"] = h5py.ExternalLink("other.h5", "/x")


def _soft_link(file: h5py.File) -> None:
    file["y"] = np.zeros(3)
    file["x"] = h5py.SoftLink("/y")


def _group(file: h5py.File) -> None:
    file.create_group("x")


def _claims(file: h5py.File) -> None:
    file.create_dataset("x", (1 << 50,), "f4")  # contiguous, and never written: it takes no space in the file


@pytest.mark.parametrize("make", [_chunked, _external, _virtual, _external_link, _soft_link, _group, _claims])
def test_what_we_never_write_is_refused(tmp_path: Path, make: Callable[[h5py.File], None]) -> None:
    with h5py.File(tmp_path / "f.h5", "w") as file:
        make(file)
    with pytest.raises(OSError, match="/x "):
        check_hdf5(tmp_path / "f.h5")


def test_a_hang_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["x"] = 1
    monkeypatch.setattr(untrusted, "DEADLINE_SECONDS", 1)
    monkeypatch.setattr(untrusted, "_look", lambda *_: time.sleep(60))
    start = time.monotonic()
    with pytest.raises(OSError, match="cannot be read within 1 s"):
        check_hdf5(tmp_path / "f.h5")
    assert time.monotonic() - start < 5


def test_a_crash_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["x"] = 1
    monkeypatch.setattr(untrusted, "_look", lambda *_: os.abort())
    with pytest.raises(OSError, match="signal 6"):
        check_hdf5(tmp_path / "f.h5")


def test_a_memory_bomb_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["x"] = 1
    monkeypatch.setattr(untrusted, "_look", lambda *_: bytearray(4 << 30))
    with pytest.raises(OSError, match="MemoryError"):
        check_hdf5(tmp_path / "f.h5")


def test_other_threads_inside_hdf5_do_no_harm(tmp_path: Path) -> None:
    """A fork while another thread holds h5py's lock must not leave a child that waits for it forever."""
    with h5py.File(tmp_path / "busy.h5", "w") as file:
        file["x"] = np.zeros(100_000)
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            with h5py.File(tmp_path / "busy.h5", "r", locking=False) as file:
                file["x"][:]

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for number in range(30):
                with h5py.File(path := tmp_path / f"{number}.h5", "w") as file:
                    file["x"] = number
                check_hdf5(path)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_failure_that_passes_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = [1.0]

    def stalled(path: Path, sender: int) -> None:
        raise OSError("stalled")

    with monkeypatch.context() as patch:
        patch.setattr(untrusted, "_look", stalled)
        with pytest.raises(OSError, match="stalled"):
            untrusted.check_hdf5(tmp_path / "a.h5")
    untrusted.check_hdf5(tmp_path / "a.h5")


def test_where_nobody_waits_for_children(tmp_path: Path) -> None:
    """A program that ignores SIGCHLD, as a supervisor may have set it, learns no exit codes."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = [1.0]
    script = (
        "import signal, sys; from sppfeat.files.hdf5_check import check_hdf5\n"
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN); check_hdf5(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.h5")], check=True, timeout=60)


def test_a_pipe_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.h5")
    with pytest.raises(OSError, match="a pipe"):
        untrusted.check_hdf5(tmp_path / "a.h5")
