"""The writer's thread: what is on disk, in which order, and what happens when the disk fails or is slow."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sppfeat import Recipe, Status, Store, StoreError, open_store, verify_store
from sppfeat.images import Fingerprint
from sppfeat.store import StoreWriter, create_store, writing

ROWS, DIM = 23, 5


def new_store(folder: Path) -> Store:
    path = folder / "f.h5"
    names = [f"{row}.jpg" for row in range(ROWS)]
    create_store(path, names, recipe=Recipe(), weights_sha256="0" * 64, dim=DIM, source_root="/")
    return open_store(path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path)


def values_of(row: int, version: int = 0) -> np.ndarray:
    return np.random.default_rng([row, version]).normal(size=DIM).astype(np.float16)


class Disk:
    """Records what is written and synced: a power cut may lose any write since the last sync."""

    def __init__(self, store: Store) -> None:
        self._columns = store.columns
        self._write, self._sync = os.pwrite, os.fdatasync
        self._rows: dict[int, set[str]] = {}  # columns written since the last sync
        self.unsynced_status = False
        self.values_before_status = True

    def pwrite(self, descriptor: int, data: memoryview, place: int) -> int:
        for name, column in self._columns.items():
            first, rest = divmod(place - column.offset, column.row_bytes)
            if rest == 0 and 0 <= first < ROWS:
                rows = range(first, first + len(data) // column.row_bytes)
                assert len(rows) * column.row_bytes == len(data)
                for row in rows:
                    if name == "status":
                        self.unsynced_status = True
                        self.values_before_status &= not self._rows.get(row)
                    else:
                        self._rows.setdefault(row, set()).add(name)
                break
        else:
            raise AssertionError(f"a write outside the columns, at {place}")
        return self._write(descriptor, data, place)

    def fdatasync(self, descriptor: int) -> None:
        self._rows.clear()
        self.unsynced_status = False
        self._sync(descriptor)


class Given(NamedTuple):
    row: int
    fails: bool
    flushes: bool


given_rows = st.lists(st.builds(Given, st.integers(0, ROWS - 1), st.booleans(), st.booleans()), max_size=60)


@settings(max_examples=60, deadline=None)
@given(rows=given_rows, block_rows=st.integers(1, 9))
def test_rows_in_any_order(rows: list[Given], block_rows: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Against a plain dictionary; of a row that is given twice, the last one stays, and what it had before goes."""
    store = new_store(tmp_path_factory.mktemp("store"))
    disk, expected = Disk(store), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "BLOCK_ROWS", block_rows)
        patch.setattr(os, "pwrite", disk.pwrite)
        patch.setattr(os, "fdatasync", disk.fdatasync)
        with StoreWriter(store) as writer:
            for version, one in enumerate(rows):
                if one.fails:
                    writer.fail(one.row, f"reason {version}", Fingerprint(version, 1))
                    expected[one.row] = (Status.FAILED, np.zeros(DIM), (0, 0), f"reason {version}".encode(), version, 1)
                else:
                    values = values_of(one.row, version)
                    writer.write(one.row, values, (version + 1, 7), Fingerprint(version, 2))
                    expected[one.row] = (Status.DONE, values, (version + 1, 7), b"", version, 2)
                if one.flushes:
                    writer.flush()
                    assert store.status[one.row] == expected[one.row][0]
    assert disk.values_before_status and not disk.unsynced_status
    for row in range(ROWS):
        status, values, size, error, file_size, time_ns = expected.get(row, (0, np.zeros(DIM), (0, 0), b"", 0, 0))
        assert (store.status[row], bytes(store.error[row])) == (status, error)
        np.testing.assert_array_equal(store.descriptors[row], values)
        assert (tuple(store.image_size[row]), store.file_size[row], store.file_mtime_ns[row]) == (
            size,
            file_size,
            time_ns,
        )
        assert store.checksum[row] == (zlib.crc32(np.float16(values).tobytes()) if status else 0)
    assert verify_store(store) == []


def test_consecutive_rows_are_one_write(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[int] = []
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, place: writes.append(len(data)) or real(fd, data, place))
    with StoreWriter(store) as writer:
        for row in (3, 1, 2, 0, 10, 11):
            writer.write(row, values_of(row), (1, 1), Fingerprint(1, 1))
    assert len(writes) == 2 * len(store.columns)  # two runs


def eventually(check: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not check() and time.monotonic() < end:
        time.sleep(0.01)
    return check()


def test_rows_reach_the_disk_without_being_asked_for(store: Store) -> None:
    with StoreWriter(store) as writer:
        writer.write(4, values_of(4), (1, 1), Fingerprint(1, 1))
        assert eventually(lambda: store.counts()["done"] == 1)
        np.testing.assert_array_equal(store.descriptors[4], values_of(4))


# Gives a row every few milliseconds, and says when.
GIVING = """
import sys, time
import numpy as np
from sppfeat import open_store
from sppfeat.images import Fingerprint
from sppfeat.store import StoreWriter
with StoreWriter(open_store(sys.argv[1])) as writer:
    for row in range(10**9):
        writer.write(row, np.full(5, row, np.float16), (1, 1), Fingerprint(1, 1))
        print(row, time.monotonic(), flush=True)
        time.sleep(0.005)
"""


def test_a_kill_loses_only_the_latest_rows(tmp_path: Path) -> None:
    path = tmp_path / "f.h5"
    names = [f"{row}.jpg" for row in range(2000)]
    create_store(path, names, recipe=Recipe(), weights_sha256="0" * 64, dim=5, source_root="/")
    with subprocess.Popen([sys.executable, "-c", GIVING, str(path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline()
        time.sleep(1.5)
        child.kill()
        killed = time.monotonic()
        given = [line.split() for line in child.stdout.read().split("\n")[:-1]]  # the last line may be cut
    store = open_store(path)
    done = store.counts()["done"]
    # What the thread was writing may be lost, too: a second, on a disk that others use.
    safe = [int(row) for row, at, *_ in given if float(at) < killed - writing.FLUSH_SECONDS - 1]
    assert len(safe) > 10 and done > safe[-1]
    assert store.status[:done].all() and verify_store(store) == []


def test_what_is_given_may_change_at_once(store: Store) -> None:
    values = values_of(0)
    with StoreWriter(store) as writer:
        writer.write(0, values, (1, 1), Fingerprint(1, 1))
        values[:] = 7
    np.testing.assert_array_equal(store.descriptors[0], values_of(0))


def test_a_failure_of_the_thread_is_raised_by_the_next_call(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = StoreWriter(store)
    with pytest.raises(StoreError, match=r"f\.h5: cannot be written: the disk is full"), writer:
        writer.write(0, values_of(0), (1, 1), Fingerprint(1, 1))
        writer.flush()
        monkeypatch.setattr(os, "fdatasync", full)
        writer.write(1, values_of(1), (1, 1), Fingerprint(1, 1))
        time.sleep(2 * writing.FLUSH_SECONDS)
        for row in range(2, ROWS):  # nobody flushes
            writer.write(row, values_of(row), (1, 1), Fingerprint(1, 1))
            time.sleep(0.1)
    monkeypatch.undo()
    assert store.counts() == {"pending": ROWS - 1, "done": 1, "failed": 0}
    for call in (writer.flush, lambda: writer.fail(3, "x")):
        with pytest.raises(StoreError, match="disk is full"):
            call()


def test_a_failure_to_sync_the_last_statuses_is_raised(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = os.fdatasync

    def second_fails(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", second_fails)
    with pytest.raises(StoreError, match="Input/output error"), StoreWriter(store) as writer:
        writer.write(1, values_of(1), (1, 1), Fingerprint(1, 1))


def test_another_error_of_the_thread_is_not_lost(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> int:
        raise MemoryError

    monkeypatch.setattr(writing.zlib, "crc32", broken)
    with pytest.raises(MemoryError), StoreWriter(store) as writer:
        writer.write(1, values_of(1), (1, 1), Fingerprint(1, 1))


def test_a_slow_disk_holds_up_who_gives_rows(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded: at most the block that is written and the one that is filled."""
    monkeypatch.setattr(writing, "BLOCK_ROWS", 4)
    go, real, handed = threading.Event(), os.fdatasync, []

    def slow(descriptor: int) -> None:
        go.wait(20)
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", slow)

    def hand_over() -> None:
        with StoreWriter(store) as writer:
            for row in range(ROWS):
                writer.write(row, values_of(row), (1, 1), Fingerprint(1, 1))
                handed.append(row)

    thread = threading.Thread(target=hand_over)
    thread.start()
    assert eventually(lambda: len(handed) == 8)
    time.sleep(0.3)
    assert len(handed) == 8 and store.counts()["done"] == 0
    go.set()
    thread.join(20)
    assert store.counts()["done"] == ROWS and verify_store(store) == []


def test_an_interrupt_keeps_what_was_given(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt), StoreWriter(store) as writer:
        writer.write(2, values_of(2), (1, 1), Fingerprint(1, 1))
        raise KeyboardInterrupt
    assert store.counts()["done"] == 1
    assert not any(thread.name == "store" for thread in threading.enumerate())


def test_reset_comes_after_what_was_given(store: Store) -> None:
    with StoreWriter(store) as writer:
        for row in range(6):
            writer.write(row, values_of(row), (1, 1), Fingerprint(1, 1))
        writer.reset([4, 0, 1])
        assert np.flatnonzero(store.status).tolist() == [2, 3, 5]
        writer.write(1, values_of(1, 1), (1, 1), Fingerprint(1, 1))
    assert np.flatnonzero(store.status).tolist() == [1, 2, 3, 5]
    np.testing.assert_array_equal(store.descriptors[1], values_of(1, 1))


def test_a_descriptor_of_another_length_is_refused_alone(store: Store) -> None:
    with StoreWriter(store) as writer:
        writer.write(0, values_of(0), (1, 1), Fingerprint(1, 1))
        with pytest.raises(StoreError, match=r"expected a descriptor of \(5,\), found \(1,\)"):
            writer.write(1, np.ones(1, np.float16), (1, 1), Fingerprint(1, 1))
        writer.write(2, values_of(2), (1, 1), Fingerprint(1, 1))
    assert np.flatnonzero(store.status).tolist() == [0, 2]
