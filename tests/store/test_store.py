"""The store: its layout, its integrity, and every way in which a file can fail to be a store."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from sppfeat import Recipe, Status, StoreBusyError, StoreError, open_store, verify_store
from sppfeat.images import Fingerprint
from sppfeat.store.locking import lock_store
from sppfeat.store.reading import ERROR_BYTES
from sppfeat.store.writing import StoreWriter, check_output, create_store, extend_store

NAMES = ["a.jpg", "b/with space.png", "c/ünïcode\nnewline.gif", "d\\\\x.jpg"]
DIM = 7
SHA = "0" * 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "feats.h5"
    create_store(target, NAMES, recipe=Recipe(), weights_sha256=SHA, dim=DIM, source_root="/somewhere")
    return target


def fill(path: Path, rows: range | list[int]) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(len(NAMES), DIM)).astype("float16")
    with StoreWriter(open_store(path)) as writer:
        for row in rows:
            writer.write(row, values[row], (10 + row, 20), Fingerprint(100 + row, 5))
    return values


def test_round_trip(path: Path) -> None:
    values = fill(path, [0, 2])
    with StoreWriter(open_store(path)) as writer:
        writer.fail(1, "broken:\n  really", Fingerprint(3, 4))
    store = open_store(path)
    assert store.names == NAMES
    assert store.status.tolist() == [Status.DONE, Status.FAILED, Status.DONE, Status.PENDING]
    np.testing.assert_array_equal(store.descriptors[[0, 2]], values[[0, 2]])
    assert not store.descriptors[[1, 3]].any()
    assert store.errors() == {NAMES[1]: "broken: really"}
    assert store.image_size[2].tolist() == [12, 20]
    assert [store.file_size.tolist(), store.file_mtime_ns.tolist()] == [[100, 3, 102, 0], [5, 4, 5, 0]]
    assert store.counts() == {"pending": 1, "done": 2, "failed": 1}
    assert store.recipe == Recipe() and store.source_root == "/somewhere" and store.dim == DIM
    assert verify_store(store) == []


def test_any_hdf5_program_can_read_it(path: Path) -> None:
    values = fill(path, range(len(NAMES)))
    with h5py.File(path) as file:
        assert file["names"].asstr()[:].tolist() == NAMES
        np.testing.assert_array_equal(file["descriptors"][:], values)
        assert file["descriptors"].chunks is None  # contiguous: what makes mapping and plain writes possible
        assert file.attrs["format"] == "sppfeat-store"


def test_filling_rows_changes_nothing_but_rows(path: Path) -> None:
    """The promise behind `kill -9`: outside the columns, not one byte differs before and after."""
    before = path.read_bytes()
    fill(path, range(len(NAMES)))
    after = path.read_bytes()
    inside = np.zeros(len(before), bool)
    for column in open_store(path).columns.values():
        inside[column.offset : column.offset + column.row_bytes * len(NAMES)] = True
    differs = np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8)
    assert len(before) == len(after) and differs.any() and not differs[~inside].any()


def test_status_comes_after_the_values_are_on_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    store = open_store(path)
    real_write, real_sync = os.pwrite, os.fdatasync
    status = store.columns["status"].offset

    def write(descriptor: int, data: memoryview, place: int) -> int:
        events.append("status" if status <= place < status + len(NAMES) else "values")
        return real_write(descriptor, data, place)

    monkeypatch.setattr(os, "pwrite", write)
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: (events.append("sync"), real_sync(descriptor)))
    fill(path, range(3))
    assert events == ["values"] * 6 + ["sync", "status", "sync"]  # consecutive rows are one write per column


def test_a_reader_sees_rows_as_they_are_written(path: Path) -> None:
    store = open_store(path)
    assert store.counts()["done"] == 0
    fill(path, [1])
    assert store.counts()["done"] == 1 and store.descriptors[1].any()


def test_extend_keeps_rows_and_appends_names(path: Path) -> None:
    values = fill(path, [0, 2])
    with lock_store(path):
        extend_store(open_store(path), [*NAMES, "new.jpg", "newer.jpg"], source_root="/elsewhere")
    store = open_store(path)
    assert store.names == [*NAMES, "new.jpg", "newer.jpg"] and store.source_root == "/elsewhere"
    np.testing.assert_array_equal(store.descriptors[[0, 2]], values[[0, 2]])
    assert store.counts() == {"pending": 4, "done": 2, "failed": 0}
    assert verify_store(store) == []
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_open_store_stays_the_file_it_was(path: Path) -> None:
    """Offsets belong to one file: a reader must not apply them to the file that replaces it."""
    values = fill(path, range(len(NAMES)))
    before = open_store(path)
    extend_store(before, [*NAMES, *(f"{n}.jpg" for n in range(500))], source_root="/")
    np.testing.assert_array_equal(before.descriptors, values)
    assert before.counts() == {"pending": 0, "done": 4, "failed": 0} and before.errors() == {}
    assert len(open_store(path)) == 504


def test_a_failed_extend_leaves_the_store_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(path, [0])
    before = path.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match=r"feats\.h5: cannot be written: the disk is full; free some space"):
        extend_store(open_store(path), [*NAMES, "new.jpg"], source_root="/")
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_long_reasons_are_cut_between_characters(path: Path) -> None:
    with StoreWriter(open_store(path)) as writer:
        writer.fail(0, "ü" * ERROR_BYTES)
        writer.fail(1, "x" + "ü" * ERROR_BYTES)
        writer.fail(2, "stray \udcff byte")
    reasons = list(open_store(path).errors().values())
    assert reasons[0] == "ü" * (ERROR_BYTES // 2)
    assert reasons[1] == "x" + "ü" * (ERROR_BYTES // 2 - 1)
    assert reasons[2] == "stray \\udcff byte"


@pytest.mark.parametrize("column", ["descriptors", "status", "checksum"])
def test_verify_finds_a_damaged_byte(path: Path, column: str) -> None:
    fill(path, range(len(NAMES)))
    place = open_store(path).columns[column]
    with open(path, "r+b") as file:
        file.seek(place.offset + place.row_bytes)  # row 1
        value = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([value ^ 0x15]))
    problems = verify_store(open_store(path))
    assert len(problems) == 1 and "row 1" in problems[0] and repr(NAMES[1]) in problems[0]


def test_verify_finds_values_that_are_not_finite(path: Path) -> None:
    with StoreWriter(open_store(path)) as writer:
        writer.write(0, np.full(DIM, np.inf, np.float16), (1, 1), Fingerprint(1, 1))
    assert "not finite" in verify_store(open_store(path))[0]


def test_checksum_is_crc32_of_the_row(path: Path) -> None:
    values = fill(path, [3])
    assert open_store(path).checksum[3] == zlib.crc32(values[3].tobytes())


def test_two_writers(path: Path) -> None:
    with lock_store(path):
        with pytest.raises(StoreBusyError, match="another process is writing"), lock_store(path):
            pass
        code = (
            f"from sppfeat.store.locking import *; from pathlib import Path\nwith lock_store(Path({str(path)!r})): pass"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "StoreBusyError" in other.stderr
    with lock_store(path):  # and free again
        pass
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_lock_of_a_killed_writer_is_free(path: Path) -> None:
    (path.parent / f".{path.name}.lock").touch()
    with lock_store(path):
        pass


def test_cut_short(path: Path) -> None:
    fill(path, range(len(NAMES)))
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=r"feats\.h5: .*(cut short|cannot be opened)"):
            open_store(path)


def test_not_a_store(tmp_path: Path) -> None:
    path = tmp_path / "other.h5"
    with pytest.raises(StoreError, match="found no such file"):
        open_store(path)
    path.write_text("hello")
    with pytest.raises(StoreError, match="cannot be opened"):
        open_store(path)
    with h5py.File(path, "w") as file:
        file["x"] = 1
    with pytest.raises(StoreError, match="found an HDF5 file with format None"):
        open_store(path)


def test_newer_format(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 99
    with pytest.raises(StoreError, match=r"store format 99 is newer than this sppfeat reads \(1\)"):
        open_store(path)


def test_missing_parts(path: Path) -> None:
    for part in ("names", "checksum"):
        copy = path.with_name("copy.h5")
        shutil.copy(path, copy)
        with h5py.File(copy, "r+") as file:
            del file[part]
        with pytest.raises(StoreError, match="damaged: expected a store, found: "):
            open_store(copy)


def test_space_is_taken_at_creation(tmp_path: Path) -> None:
    """A sparse file would find the full disk only after hours of work."""
    path = tmp_path / "big.h5"
    create_store(path, [f"{n}" for n in range(100)], recipe=Recipe(), weights_sha256=SHA, dim=50_000, source_root="/")
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("this system cannot reserve space")
    assert path.stat().st_blocks * 512 >= 100 * 50_000 * 2


def test_disk_full_while_filling(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If space cannot be reserved, a write fails; what was flushed stays, and the rest can follow."""
    store = open_store(path)
    values = np.ones(DIM, np.float16)
    with pytest.raises(StoreError, match="disk is full"), StoreWriter(store) as writer:
        writer.write(0, values, (1, 1), Fingerprint(1, 1))
        writer.flush()

        def full(*arguments: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        writer.write(1, values, (1, 1), Fingerprint(1, 1))
    monkeypatch.undo()
    assert open_store(path).counts() == {"pending": 3, "done": 1, "failed": 0}
    fill(path, [1, 2, 3])
    assert verify_store(open_store(path)) == []


def test_a_recipe_that_was_changed_is_refused(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["recipe"] = Recipe(pooling="avg").to_json()
    with pytest.raises(StoreError, match="recipe_hash is of another recipe"):
        open_store(path)


def test_verify_names_rows_that_lead_elsewhere(tmp_path: Path) -> None:
    names = ["a.jpg", "../b.jpg", "/etc/passwd", r"\x2e\x2e/c.jpg"]
    create_store(tmp_path / "f.h5", names, recipe=Recipe(), weights_sha256=SHA, dim=DIM, source_root="/r")
    problems = verify_store(open_store(tmp_path / "f.h5"))
    assert [problem.split(" ")[1] for problem in problems] == ["1", "2", "3"]


def test_the_next_writer_clears_what_a_killed_one_left(path: Path) -> None:
    (left := path.with_name(f".{path.name}.partial")).write_bytes(b"half")
    with lock_store(path):
        assert not left.exists()


@pytest.mark.parametrize("kind", ["group", "chunks", "link"])
def test_other_programs_hdf5_files_are_never_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights.h5"
    with h5py.File(path, "w") as file:
        if kind == "group":
            file.create_group("model_weights")["kernel"] = np.zeros(3)
        elif kind == "chunks":
            file.create_dataset("x", data=np.zeros(100), chunks=(10,), compression="gzip")
        else:
            file["x"] = h5py.SoftLink("/y")
    with pytest.raises(StoreError, match="expected a store or a new file, found an HDF5 file that does not seem"):
        check_output(path, overwrite=True, resume=True)


def test_a_store_with_a_broken_header_may_be_overwritten(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8:60] = b"\xff" * 52
    path.write_bytes(content)
    check_output(path, overwrite=True, resume=True)


def test_a_store_without_permissions_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.chmod(0o400)
    if os.geteuid() == 0:  # root may write to anything
        monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(StoreError, match=r"feats\.h5: the store is not writable$"):
        check_output(path, overwrite=True, resume=True)
