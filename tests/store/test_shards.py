"""A store as a folder of shards: its files, what readers see of it, and what is left after a kill or damage."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from folders import DIM, LENGTHS, ROOT, SHA, fill, make, make_large, names_of
from hypothesis import given, settings
from hypothesis import strategies as st

from sppfeat import Recipe, Status, Store, StoreBusyError, StoreError, open_store, verify_store
from sppfeat.files.formats import STORE, format_of
from sppfeat.images import Fingerprint
from sppfeat.store import joined, shards
from sppfeat.store.digests import name_digests, repeated_digests
from sppfeat.store.locking import lock_store
from sppfeat.store.reading import building_progress, require_complete
from sppfeat.store.shards import Folder, open_folder
from sppfeat.store.unit_vectors import unit_rows
from sppfeat.store.writing import StoreWriter, check_output, create_store, extend_store

# Children import what tests share.
CHILD = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
COLUMNS = ("descriptors", "image_size", "error", "file_size", "file_mtime_ns", "checksum", "states", "name_digests")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `path` is a copy of, which no test changes."""
    path = tmp_path_factory.mktemp("made") / "feats"
    make(path)
    return path


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "feats"))


@pytest.fixture(scope="module")
def read(made: Path) -> tuple[Store, dict[str, np.ndarray], list[str]]:
    """A folder, with its columns and names as plain arrays, from h5py."""
    files = [h5py.File(file) for file in open_folder(made).shards.values()]
    of_file = {"states": "status", "name_digests": "name_digest"}
    arrays = {name: np.concatenate([file[of_file.get(name, name)][:] for file in files]) for name in COLUMNS}
    arrays["name_digests"] = arrays["name_digests"].view("<u8").reshape(-1, 2)
    return open_store(made), arrays, [name for file in files for name in file["names"].asstr()[:]]


ROWS = sum(LENGTHS)
SOME = st.integers(-ROWS, ROWS - 1)
ANY_INDEX = st.one_of(
    SOME,
    st.slices(ROWS),
    st.lists(SOME, max_size=30).map(lambda rows: np.array(rows, np.int64)),
    st.lists(SOME, min_size=4, max_size=4).map(lambda rows: np.array(rows).reshape(2, 2)),
    st.lists(SOME, max_size=9),
    st.lists(st.booleans(), min_size=ROWS, max_size=ROWS).map(np.array),
)


@settings(max_examples=300, deadline=None)
@given(index=ANY_INDEX, column=st.sampled_from(COLUMNS))
def test_any_index_reads_what_one_array_would(
    read: tuple[Store, dict[str, np.ndarray], list[str]], index: Any, column: str
) -> None:
    store, arrays, _ = read
    values, expected = getattr(store, column), arrays[column]
    assert (values.shape, values.dtype, len(values)) == (expected.shape, expected.dtype, len(expected))
    found = values[index]
    wanted = expected[index] if not (isinstance(index, list) and not index) else expected[:0]
    np.testing.assert_array_equal(found, wanted)
    assert np.shape(found) == wanted.shape and found.dtype == wanted.dtype


@settings(max_examples=100, deadline=None)
@given(index=ANY_INDEX, start=st.integers(0, DIM), stop=st.integers(0, DIM))
def test_columns_of_rows(
    read: tuple[Store, dict[str, np.ndarray], list[str]], index: Any, start: int, stop: int
) -> None:
    store, arrays, _ = read
    rows = np.array([], np.int64) if isinstance(index, list) and not index else index
    np.testing.assert_array_equal(store.descriptors[rows, start:stop], arrays["descriptors"][rows, start:stop])


@settings(max_examples=100, deadline=None)
@given(index=st.one_of(SOME, st.slices(ROWS)))
def test_names_are_read_like_a_list(read: tuple[Store, dict[str, np.ndarray], list[str]], index: Any) -> None:
    store, _, names = read
    assert store.names[index] == names[index]
    assert list(store.names) == names and len(store) == len(store.names) == ROWS


@pytest.mark.parametrize("index", [ROWS, -ROWS - 1, np.array([0, ROWS]), np.zeros(3, bool), np.array([0.5])])
def test_an_index_outside_is_an_error(read: tuple[Store, dict[str, np.ndarray], list[str]], index: Any) -> None:
    with pytest.raises(IndexError):
        read[0].descriptors[index]
    with pytest.raises(IndexError):
        read[0].names[ROWS]


def test_a_folder_is_a_store(path: Path) -> None:
    store = open_store(path)
    assert format_of(path) == STORE
    assert store.recipe == Recipe() and store.source_root == ROOT and store.dim == DIM and store.weights_sha256 == SHA
    expected = {
        name: reason for file in open_folder(path).shards.values() for name, reason in open_store(file).errors().items()
    }
    assert store.errors() == expected and expected
    assert store.counts() == {"pending": 0, "done": ROWS - len(expected), "failed": len(expected)}
    assert store.status.tolist() == [Status.FAILED if name in expected else Status.DONE for name in store.names]
    require_complete(store)
    assert verify_store(store) == []
    rows = unit_rows(store)
    assert rows.names == [name for name in store.names if name not in expected]
    np.testing.assert_array_equal(rows.take(np.arange(len(rows)))[-1], rows.take(slice(len(rows) - 1, None))[0])


def test_other_programs_read_it_through_all_h5(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = path.rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    store = open_store(moved)
    with h5py.File(moved / "all.h5") as file:
        assert file["names"].asstr()[:].tolist() == list(store.names)
        for name in set(COLUMNS) - {"states", "name_digests"}:
            np.testing.assert_array_equal(file[name][:], getattr(store, name)[:])
        np.testing.assert_array_equal(file["name_digest"][:].view("<u8").reshape(-1, 2), store.name_digests[:])
    with pytest.raises(StoreError, match=r"all\.h5: is for other programs; give the folder .*/moved instead"):
        open_store(moved / "all.h5")


def test_all_h5_follows_the_manifest(path: Path) -> None:
    before = (path / "all.h5").stat().st_mtime_ns
    with lock_store(path):
        folder = open_folder(path, writable=True)
        folder.finish()
        assert (path / "all.h5").stat().st_mtime_ns == before
        time.sleep(0.02)
        store = folder.begin_shard(["new.jpg"])
        fill(store)
        folder.publish(store)
        folder.finish()
    with h5py.File(path / "all.h5") as file:
        assert file["names"].asstr()[-1] == "new.jpg" and len(file["descriptors"]) == ROWS + 1


def test_digests_are_those_of_the_names(path: Path, tmp_path: Path) -> None:
    import hashlib

    store = open_store(path)
    expected = b"".join(hashlib.blake2b(name.encode(), digest_size=16).digest() for name in store.names)
    assert np.asarray(store.name_digests).tobytes() == expected


def test_an_older_file_without_digests_still_opens(tmp_path: Path) -> None:
    file = tmp_path / "old.h5"
    create_store(file, names_of(0, 4), recipe=Recipe(), weights_sha256=SHA, dim=DIM, source_root=ROOT)
    with_digests = np.array(open_store(file).name_digests)
    with h5py.File(file, "r+") as content:
        del content["name_digest"]
    store = open_store(file)
    assert store.stored_digests is None
    np.testing.assert_array_equal(store.name_digests, with_digests)
    fill(store)
    assert verify_store(store) == []
    with lock_store(file):
        extend_store(open_store(file), [*names_of(0, 4), "new"], source_root=ROOT)
    np.testing.assert_array_equal(open_store(file).name_digests, name_digests([*names_of(0, 4), "new"]))


def test_names_with_another_prefix_get_their_own_digests(tmp_path: Path) -> None:
    file = tmp_path / "f.h5"
    create_store(file, ["a", "b"], recipe=Recipe(), weights_sha256=SHA, dim=DIM, source_root=ROOT)
    with lock_store(file):
        extend_store(open_store(file), ["x/a", "x/b", "c"], source_root="/")
    np.testing.assert_array_equal(open_store(file).name_digests, name_digests(["x/a", "x/b", "c"]))
    assert verify_store(open_store(file)) == []


def test_shards_are_iterated_without_names_and_descriptors(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: object) -> list[str]:
        raise AssertionError("names are read")

    monkeypatch.setattr(joined.FileNames, "_read", forbidden)
    found = list(open_folder(path).iter_shards())
    assert [(rows.index, rows.building, len(rows.digest)) for rows in found] == [
        (index, False, count) for index, count in enumerate(LENGTHS)
    ]
    store = open_store(path)
    for field, column in (("digest", "name_digests"), ("status", "states"), ("file_size",) * 2, ("file_mtime_ns",) * 2):
        np.testing.assert_array_equal(
            np.concatenate([getattr(rows, field) for rows in found]), getattr(store, column)[:]
        )


def test_a_reader_never_has_the_names_of_other_rows(path: Path) -> None:
    removed, reworked = open_store(path), open_store(path)
    values = np.array(removed.descriptors[: LENGTHS[0]])
    names = list(reworked.names)
    reworked.descriptors[6]  # opens the third shard
    with lock_store(path, folder=True):
        folder = open_folder(path, writable=True)
        folder.publish(folder.rework_shard(2))
        folder.remove_rows(0, np.array([0]))
        folder.finish()
    np.testing.assert_array_equal(removed.descriptors[: LENGTHS[0]], values)
    with pytest.raises(StoreError, match=r"shard-00000\.h5: was replaced while it was read; open the store again"):
        removed.names[:2]
    assert reworked.names[6:13] == names[6:13]
    assert list(open_store(path).names) == names[1:]


def test_few_shards_are_open_at_a_time(tmp_path: Path) -> None:
    make(tmp_path / "f", (1,) * (3 * joined.OPEN_SHARDS))
    store = open_store(tmp_path / "f")
    list(store.names), np.asarray(store.checksum)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    mapped = {line.split()[-1] for line in maps.read_text().splitlines() if f"{tmp_path}/f/shard-" in line}
    assert 0 < len(mapped) <= joined.OPEN_SHARDS


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path: Path) -> None:
    """Counting, listing failures and checking four times the rows takes at most a tenth more.

    What is kept at a time is made less than these few shards.
    """
    code = (
        "import sys; from memory import peak_kb; from sppfeat import open_store, verify_store\n"
        "from sppfeat.store import digests, joined; joined.OPEN_SHARDS, digests._SORTED = 1, 1 << 15\n"
        "store = open_store(sys.argv[1])\n"
        "print(len(store), store.counts()['failed'], sum(1 for _ in store.failures()), verify_store(store), peak_kb())"
    )
    peaks = []
    for count in (2, 8):
        make_large(tmp_path / str(count), count)
        command = [sys.executable, "-c", code, str(tmp_path / str(count))]
        output = subprocess.run(command, capture_output=True, text=True, check=True, env=CHILD).stdout.split()
        assert output[:4] == [str(count * 65536), str(count * 66), str(count * 66), "[]"]
        peaks.append(int(output[4]))
    assert peaks[1] < 1.1 * peaks[0], peaks


class TestWork:
    """Shards under work, and changed ones."""

    def test_a_shard_under_work_is_not_read_but_counted(self, path: Path) -> None:
        with lock_store(path):
            store = open_folder(path, writable=True).begin_shard(names_of(9, 6))
            fill(store, [0, 1])
        found = open_store(path)
        assert len(found) == ROWS and found.counts()["pending"] == 0
        progress = building_progress(found)
        assert (progress.shards, progress.new, progress.pending, progress.missing) == (1, 6, 4, 6)
        with pytest.raises(StoreError, match=rf"feats: 6 of {ROWS + 6} images are still to be described; run extract"):
            require_complete(found)
        with pytest.raises(StoreError, match="still to be described"):
            unit_rows(found)

    def test_it_resumes_where_it_was(self, path: Path) -> None:
        with lock_store(path):
            fill(open_folder(path, writable=True).begin_shard(names_of(9, 6)), [0, 1])
        with lock_store(path):
            folder = open_folder(path, writable=True)
            (file,) = folder.building.values()
            store = open_store(file)
            assert store.counts()["pending"] == 4
            with pytest.raises(StoreError, match=r"building-00004\.h5: cannot be published, found 4 pending rows"):
                folder.publish(store)
            fill(store, [2, 3, 4, 5])
            folder.publish(store)
        assert list(open_store(path).names)[ROWS:] == names_of(9, 6)
        assert verify_store(open_store(path)) == []

    def test_a_changed_shard_leaves_the_old_one_to_its_readers(self, path: Path) -> None:
        before = open_store(path)
        old, other = np.array(before.descriptors[5]), (path / "shard-00002.h5").read_bytes()
        inode = (path / "shard-00001.h5").stat().st_ino
        with lock_store(path):
            folder = open_folder(path, writable=True)
            store = folder.rework_shard(1)
            with StoreWriter(store) as writer:
                writer.reset([0])
                writer.write(0, old + 1, (1, 1), Fingerprint(9, 9))
                writer.flush()
            assert [(rows.index, rows.building) for rows in folder.iter_shards()][1] == (1, True)
            np.testing.assert_array_equal(open_store(path).descriptors[5], old)
            folder.publish(store)
        np.testing.assert_array_equal(before.descriptors[5], old)
        np.testing.assert_array_equal(open_store(path).descriptors[5], old + 1)
        assert (path / "shard-00001.h5").stat().st_ino != inode and (path / "shard-00002.h5").read_bytes() == other
        assert verify_store(open_store(path)) == []

    def test_a_rework_counts_only_its_pending_rows(self, path: Path) -> None:
        with lock_store(path):
            store = open_folder(path, writable=True).rework_shard(0)
            with StoreWriter(store) as writer:
                writer.reset([1, 2])
        with pytest.raises(StoreError, match=f"feats: 2 of {ROWS} images are still to be described"):
            require_complete(open_store(path))

    def test_a_shard_of_other_images_replaces_none(self, path: Path, tmp_path: Path) -> None:
        with lock_store(path):
            fill(store := open_folder(path, writable=True).begin_shard(["a"]))
            store.path.rename(path / ".building-00001.h5")
            with pytest.raises(StoreError, match=r"building-00001\.h5: cannot replace shard-00001\.h5, whose"):
                open_folder(path, writable=True)
        assert verify_store(open_store(path)) == []

    def test_rows_are_limited(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shards, "SHARD_ROWS", 3)
        with pytest.raises(StoreError, match="expected 1 to 3 rows in a shard, found 4"):
            open_folder(path).begin_shard(["a", "b", "c", "d"])
        with pytest.raises(StoreError, match="found 0"):
            open_folder(path).begin_shard([])

    def test_a_reader_of_a_reader_that_waits_sees_new_counts(self, path: Path) -> None:
        """A reader that has an old manifest opens a shard that was changed since."""
        reader = open_store(path)
        with lock_store(path):
            folder = open_folder(path, writable=True)
            store = folder.rework_shard(2)
            with StoreWriter(store) as writer:
                for row in range(len(store)):
                    writer.fail(row, "gone")
            folder.publish(store)
        assert (reader.states[6:13] == Status.FAILED).all()


def killed_before(step: str, monkeypatch: pytest.MonkeyPatch, folder: Folder, store: Store) -> None:
    """Publish a shard, but end before a step, as a kill does."""

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*((os, "rename") if step == "rename" else (shards, step)), killed)
        folder.publish(store)


class TestKills:
    """What a killed writer leaves is cleared, or used."""

    @pytest.mark.parametrize("before", ["rename", "write_manifest"])
    def test_while_a_new_shard_is_published(self, path: Path, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
        with lock_store(path):
            folder = open_folder(path, writable=True)
            fill(store := folder.begin_shard(names_of(9, 3)))
            killed_before(before, monkeypatch, folder, store)
        assert len(open_store(path)) == ROWS and verify_store(open_store(path)) == []
        with pytest.raises(StoreError, match=f"feats: 3 of {ROWS + 3} images are still to be described"):
            require_complete(open_store(path))
        assert len(open_folder(path).manifest.shards) == 4  # reading changes nothing
        self.finish(path)
        assert len(open_store(path)) == ROWS + 3

    @pytest.mark.parametrize("before", ["rename", "write_manifest"])
    def test_while_a_changed_shard_is_published(self, path: Path, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
        with lock_store(path):
            folder = open_folder(path, writable=True)
            store = folder.rework_shard(2)
            with StoreWriter(store) as writer:
                for row in range(len(store)):
                    writer.fail(row, "gone")
            killed_before(before, monkeypatch, folder, store)
        with pytest.raises(StoreError, match="feats: a run was interrupted before its shards were complete"):
            require_complete(open_store(path))
        if before == "write_manifest":
            fault = r"shard-00002\.h5: expected .* done .*if an extraction was interrupted, run it again"
            with pytest.raises(StoreError, match=fault):
                np.asarray(open_store(path).states)
            with pytest.raises(StoreError, match=fault):
                list(open_folder(path).iter_shards())
        self.finish(path)
        assert open_store(path).status[6:13].tolist() == [Status.FAILED] * 7

    def finish(self, path: Path) -> None:
        """As the next run does."""
        with lock_store(path):
            folder = open_folder(path, writable=True)
            list(folder.iter_shards())
            for file in list(folder.building.values()):
                folder.publish(open_store(file))
            folder.finish()
        require_complete(open_store(path))
        assert verify_store(open_store(path)) == []
        assert not [name for name in os.listdir(path) if name.startswith(".")]

    def test_partial_files_go(self, path: Path) -> None:
        left = [".manifest.json.partial", "..building-00007.h5.partial", ".all.h5.partial", ".shard-00001.h5.partial"]
        for name in left:
            (path / name).write_bytes(b"half")
        with lock_store(path):
            open_folder(path, writable=True)
        assert not {*left} & {*os.listdir(path)}

    def test_a_strange_shard_is_named_and_left(self, path: Path, tmp_path: Path) -> None:
        create_store(tmp_path / "o.h5", ["a"], recipe=Recipe(), weights_sha256=SHA, dim=DIM, source_root="/other")
        shutil.copy(tmp_path / "o.h5", path / "shard-00007.h5")
        with (
            lock_store(path),
            pytest.raises(StoreError, match=r"shard-00007\.h5: .*another source_root: '/other'; move"),
        ):
            open_folder(path, writable=True)
        assert (path / "shard-00007.h5").exists()

    @pytest.mark.parametrize("seed", range(4))
    def test_kill_at_random_moments(self, tmp_path: Path, seed: int) -> None:
        """A process fills and publishes shards and is killed, several times; nothing is lost or wrong."""
        path, chance = tmp_path / "feats", random.Random(seed)
        make(path, ())
        published = 0
        for _ in range(4):
            process = subprocess.Popen([sys.executable, __file__, str(path)], stdout=subprocess.PIPE, env=CHILD)
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(chance.random() * 0.3)
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
            store = open_store(path)
            assert verify_store(store) == [], "readers see an intact store, also before it is recovered"
            assert len(store.manifest.shards if store.manifest else ()) >= published
            published = len(store.manifest.shards if store.manifest else ())
        with lock_store(path):
            folder = open_folder(path, writable=True)
            for file in list(folder.building.values()):
                store = open_store(file)
                fill(store, np.flatnonzero(store.status == Status.PENDING).tolist())
                folder.publish(store)
            folder.finish()
        store = open_store(path)
        require_complete(store)
        assert verify_store(store) == []
        count = len(store.manifest.shards if store.manifest else ())
        assert count >= 1
        assert list(store.names) == [name for index in range(count) for name in names_of(index, 20)]
        assert not [name for name in os.listdir(path) if "partial" in name]


class TestDamage:
    """Every damage is one clear line."""

    def test_a_lost_shard(self, path: Path) -> None:
        (path / "shard-00002.h5").unlink()
        for opened in (open_store, lambda path: open_folder(path, writable=True)):
            with pytest.raises(
                StoreError, match=r"feats: damaged: its manifest names shard-00002\.h5 with 7 rows, found no"
            ):
                opened(path)

    def test_a_cut_shard(self, path: Path) -> None:
        content = (path / "shard-00002.h5").read_bytes()
        (path / "shard-00002.h5").write_bytes(content[: len(content) // 2])
        store = open_store(path)
        np.testing.assert_array_equal(store.descriptors[:6], store.descriptors[np.arange(6)])
        with pytest.raises(StoreError, match=r"shard-00002\.h5: .*cut short"):
            store.descriptors[6]
        problems = verify_store(store)
        assert len(problems) == 1 and "shard-00002.h5" in problems[0]

    def test_a_changed_byte(self, path: Path) -> None:
        file = path / "shard-00002.h5"
        column = open_store(file).columns["descriptors"]
        with open(file, "r+b") as content:
            content.seek(column.offset + column.row_bytes)
            content.write(b"\x55")
        (problem,) = verify_store(open_store(path))
        assert problem == "row 7 ('2/é 1.jpg', in shard-00002.h5): its values do not match their checksum"

    def test_a_name_that_is_not_its_digest(self, path: Path) -> None:
        with h5py.File(path / "shard-00000.h5", "r+") as file:
            file["names"][1] = "other.jpg"
        assert "row 1 ('other.jpg', in shard-00000.h5): its name does not match its digest" in verify_store(
            open_store(path)
        )

    def test_a_name_in_two_shards(self, path: Path) -> None:
        with lock_store(path):
            folder = open_folder(path, writable=True)
            fill(store := folder.begin_shard([names_of(2, 1)[0], "new"]))
            folder.publish(store)
        assert verify_store(open_store(path)) == [f"1 duplicate names, such as {names_of(2, 1)[0]!r}"]

    def test_a_shard_of_other_rows(self, path: Path) -> None:
        shutil.copy(path / "shard-00001.h5", path / "shard-00002.h5")
        with pytest.raises(StoreError, match=r"shard-00002\.h5: expected 7 rows, as in manifest\.json, found 1"):
            open_store(path).names[8]

    @pytest.mark.parametrize(
        ("change", "found"),
        [
            ({"format": "other"}, "expected the manifest of a store .* found 'other'"),
            ({"format_version": 9}, r"format 9 is newer than this sppfeat reads \(1\): update sppfeat"),
            ({"dim": 0}, r"Expected `int` >= 1 - at `\$\.dim`"),
            ({"recipe": {}}, "recipe"),
            ({"recipe_hash": "x"}, "a recipe_hash of another recipe or other weights"),
            ({"source_root": "\ud800"}, "surrogates not allowed"),
            ({"source_root": "/a\0b"}, "NUL"),
            ({"part": [5, 3]}, "part 5 of 3"),
            ({"extra": 1}, "unknown field `extra`"),
            ({"shards": [{"file": "../x.h5", "rows": 1, "done": 1, "failed": 0}]}, r"found '\.\./x\.h5'"),
            (
                {"shards": [{"file": "shard-00000.h5", "rows": 2, "done": 1, "failed": 0}]},
                "2 rows, 1 of them done",
            ),
            ({"shards": [{"file": "shard-00000.h5", "rows": 99999, "done": 1, "failed": 0}]}, "Expected `int` <="),
            ({"shards": [{"file": "shard-00000.h5", "rows": 1, "done": 1, "failed": 0}] * 2}, "repeated"),
        ],
    )
    def test_a_manifest_that_is_wrong(self, path: Path, change: dict[str, Any], found: str) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(StoreError, match=found) as caught:
            open_store(path)
        assert "\n" not in str(caught.value) and "manifest.json" in str(caught.value)

    def test_a_folder_without_a_manifest(self, path: Path) -> None:
        (path / "manifest.json").unlink()
        with pytest.raises(StoreError, match=r"feats: expected a store, found a folder without manifest\.json"):
            open_store(path)
        with pytest.raises(StoreError, match=r"expected manifest\.json beside its 4 shards, found none"):
            check_output(path, overwrite=False, resume=True)
        check_output(path, overwrite=True, resume=True)


class TestOutput:
    """What is replaced, and what is not."""

    def test_a_store_is_resumed_or_replaced(self, path: Path) -> None:
        check_output(path, overwrite=False, resume=True)
        check_output(path, overwrite=True, resume=True)
        with pytest.raises(StoreError, match="feats: already exists"):
            check_output(path, overwrite=False, resume=False)
        make(path, (2,))
        assert len(open_store(path)) == 2
        assert sorted(os.listdir(path)) == ["all.h5", "manifest.json", "shard-00000.h5"]

    @pytest.mark.parametrize("name", ["photo.jpg", "shard-1.h5", "shard-0000001.h5", ".building-x.h5", "sub"])
    def test_other_files_are_never_removed(self, path: Path, name: str) -> None:
        (path / name).mkdir() if name == "sub" else (path / name).write_text("mine")
        check_output(path, overwrite=False, resume=True)
        for refused in (lambda: check_output(path, overwrite=True, resume=True), lambda: make(path, (2,))):
            with pytest.raises(StoreError, match=f"feats: expected a store or an empty folder, found '{name}' in it"):
                refused()
        assert len(open_store(path)) == ROWS and (path / name).exists()

    def test_other_folders_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "manifest.json").write_text('{"manifest_version": 3}')
        for overwrite in (False, True):
            with pytest.raises(StoreError, match=r"found 'manifest\.json' in it; it is left as it is"):
                check_output(tmp_path, overwrite=overwrite, resume=True)

    def test_a_shard_is_not_written_by_itself(self, path: Path) -> None:
        for name in ("shard-00000.h5", "shard-00009.h5", ".building-00009.h5"):
            with pytest.raises(StoreError, match="is a shard, which never changes in place; give the folder"):
                check_output(path / name, overwrite=False, resume=True)

    def test_new_folders(self, tmp_path: Path) -> None:
        check_output(tmp_path / "new", overwrite=False, resume=True, folder=True)
        (tmp_path / "empty").mkdir()
        check_output(tmp_path / "empty", overwrite=False, resume=False, folder=True)
        with pytest.raises(StoreError, match="its folder .* does not exist"):
            check_output(tmp_path / "a" / "b", overwrite=False, resume=True, folder=True)
        (tmp_path / "file").write_text("mine")
        with pytest.raises(StoreError, match="expected a folder of shards or nothing, found a file"):
            check_output(tmp_path / "file", overwrite=True, resume=True, folder=True)


class TestLock:
    """One writer at a time."""

    def test_two_writers(self, path: Path) -> None:
        with lock_store(path), pytest.raises(StoreBusyError, match="another process is writing"), lock_store(path):
            pass
        assert ".lock" not in os.listdir(path)

    def test_a_forked_child_does_not_keep_the_lock_of_a_killed_writer(self, path: Path) -> None:
        """A child that checks a file lives a little longer than a killed parent."""
        code = (
            "import os, sys, time; from pathlib import Path; from sppfeat.store import lock_store\n"
            "with lock_store(Path(sys.argv[1])):\n"
            "    reading, writing = os.pipe()\n"
            "    child = os.fork()\n"
            "    if not child: os.write(writing, b'.'); time.sleep(60)\n"
            "    os.read(reading, 1)\n"
            "    print(child, flush=True); time.sleep(60)"
        )
        writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        child = int(writer.stdout.readline())
        try:
            with pytest.raises(StoreBusyError), lock_store(path):
                pass
            writer.kill()
            writer.wait()
            os.kill(child, 0)  # still there
            with lock_store(path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)
            writer.stdout.close()

    def test_a_new_folder_that_stays_empty_goes(self, tmp_path: Path) -> None:
        with lock_store(tmp_path / "new", folder=True):
            assert (tmp_path / "new").is_dir()
        assert not (tmp_path / "new").exists()

    def test_here(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(path)
        with lock_store(Path(".")):
            assert Path(".lock").exists()

    @pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
    def test_a_file_system_without_locks(self, path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        def refuse(*arguments: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", refuse)
        with (
            pytest.raises(StoreError, match="cannot be locked: its file system has no locks"),
            lock_store(path),
        ):
            pass


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(0, 40), max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    size=st.integers(1, 9),
)
def test_repeated_digests_are_found(rows: list[int], cuts: list[int], size: int) -> None:
    digests = name_digests([str(row) for row in rows])
    blocks = np.split(digests, sorted(cuts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sppfeat.store.digests._SORTED", size)
        found = sorted(repeated_digests(lambda: blocks))
    assert found == sorted((rows.index(row), at) for at, row in enumerate(rows) if rows.index(row) != at)


def work(path: Path) -> None:
    """Fill and publish shards until killed."""
    with lock_store(path):
        folder = open_folder(path, writable=True)
        print("ready", flush=True)
        while True:
            if not folder.building:
                folder.begin_shard(names_of(1 + max(folder.shards, default=-1), 20))
            (file,) = folder.building.values()
            store = open_store(file)
            fill(store, np.flatnonzero(store.status == Status.PENDING).tolist())
            folder.publish(store)
            folder.finish()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
