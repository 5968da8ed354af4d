"""Merging parts into one folder: what is linked, refused and recovered."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import DIM, ROOT, SHA, fill, make, names_of

from sppfeat import Recipe, StoreError, UsageError, open_store, verify_store
from sppfeat.store import merging
from sppfeat.store.locking import lock_store
from sppfeat.store.manifest import read_manifest
from sppfeat.store.merging import Merged, merge_stores
from sppfeat.store.shards import create_folder, open_folder
from sppfeat.store.writing import create_store, extend_store

# Children import what tests share.
CHILD = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


def parts_in(folder: Path, count: int = 3, shards: tuple[int, ...] = (4, 3)) -> list[Path]:
    found = [folder / f"part-{number}" for number in range(1, count + 1)]
    for number, part in enumerate(found, 1):
        make(part, shards, prefix=f"p{number}/", part=(number, count))
    return found


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file, with its time of change."""
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in sorted(folder.iterdir())}


def test_parts_become_one_store_without_copies(tmp_path: Path) -> None:
    parts = parts_in(tmp_path)
    before = [content(part) for part in parts]
    merged = merge_stores(tmp_path / "feats", parts)
    assert [content(part) for part in parts] == before
    store, apart = open_store(tmp_path / "feats"), [open_store(part) for part in parts]
    assert list(store.names) == [name for part in apart for name in part.names]
    for column in ("descriptors", "states", "checksum", "error", "file_mtime_ns"):
        expected = np.concatenate([getattr(part, column)[:] for part in apart])
        np.testing.assert_array_equal(getattr(store, column)[:], expected)
    assert verify_store(store) == [] and (tmp_path / "feats" / "all.h5").exists()
    failed = store.counts()["failed"]
    assert merged == Merged(str(tmp_path / "feats"), 21, 21 - failed, failed, 6, 6, 0, [], 3)
    for number, file in enumerate(open_folder(tmp_path / "feats").shards.values()):
        assert file.samefile(parts[number // 2] / f"shard-0000{number % 2}.h5")


def test_it_is_copied_where_it_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_in(tmp_path)

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    merged = merge_stores(tmp_path / "feats", parts)
    assert (merged.linked, merged.copied) == (0, 6)
    assert not (tmp_path / "feats" / "shard-00000.h5").samefile(parts[0] / "shard-00000.h5")
    assert verify_store(open_store(tmp_path / "feats")) == []


def test_a_later_change_leaves_the_part_as_it_was(tmp_path: Path) -> None:
    (part,) = parts_in(tmp_path, 1)
    merge_stores(tmp_path / "feats", [part])
    before = content(part)
    with lock_store(tmp_path / "feats"):
        folder = open_folder(tmp_path / "feats", writable=True)
        store = folder.rework_shard(0)
        fill(store, [0, 1])
        folder.publish(store)
    assert content(part) == before


def test_again_changes_nothing_and_more_parts_are_added(tmp_path: Path) -> None:
    parts, output = parts_in(tmp_path), tmp_path / "feats"
    assert merge_stores(output, parts[:2]).missing == [3]
    before = content(output)
    again = merge_stores(output, parts[:2])
    assert (again.images, again.linked, again.copied) == (14, 0, 0) and content(output) == before
    assert merge_stores(output, parts[2:]).missing == []
    assert merge_stores(output, parts).images == 21
    assert read_manifest(output).merged == [(1, 3), (2, 3), (3, 3)]


def test_merged_stores_are_merged_again(tmp_path: Path) -> None:
    parts = parts_in(tmp_path, 4)
    merge_stores(tmp_path / "a", parts[:2])
    merge_stores(tmp_path / "b", parts[2:])
    merged = merge_stores(tmp_path / "all", [tmp_path / "a", tmp_path / "b"])
    assert (merged.images, merged.missing, merged.of) == (28, [], 4)


def test_a_part_without_images(tmp_path: Path) -> None:
    parts = parts_in(tmp_path, 2, (3,))
    make(tmp_path / "empty", (), part=(3, 3))
    make(tmp_path / "one", (2,), prefix="x/", part=(1, 3))
    assert merge_stores(tmp_path / "feats", [tmp_path / "one", tmp_path / "empty"]).missing == [2]
    with pytest.raises(StoreError, match="expected a part of 3, as .* is, found a part of 2"):
        merge_stores(tmp_path / "feats", [parts[1]])


class TestFiles:
    """A store of one file as a part."""

    def test_it_is_copied_because_it_may_change(self, tmp_path: Path) -> None:
        file = tmp_path / "one.h5"
        create_store(file, ["a", "b"], recipe=Recipe(), weights_sha256=SHA, dim=DIM, source_root=ROOT)
        fill(open_store(file))
        merged = merge_stores(tmp_path / "feats", [file, *parts_in(tmp_path, 1)])
        assert (merged.copied, merged.linked) == (1, 2)
        with lock_store(file):
            fill(open_store(file), [0])
            extend_store(open_store(file), ["a", "b", "c"], source_root=ROOT)
        assert list(open_store(tmp_path / "feats").names)[:2] == ["a", "b"]
        assert verify_store(open_store(tmp_path / "feats")) == []

    def test_it_may_not_be_too_large(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "one.h5"
        create_store(file, ["a", "b", "c"], recipe=Recipe(), weights_sha256=SHA, dim=DIM, source_root=ROOT)
        fill(open_store(file))
        monkeypatch.setattr(merging, "SHARD_ROWS", 2)
        with pytest.raises(StoreError, match="expected a folder of shards, or a file of at most 2 images, found"):
            merge_stores(tmp_path / "feats", [file])


class TestRefused:
    """What cannot be merged is named, and nothing is written."""

    def test_an_image_in_two_parts(self, tmp_path: Path) -> None:
        one, two = parts_in(tmp_path, 2)
        make(tmp_path / "three", (5,), prefix="p2/")
        fault = (
            r"three: expected images that no other part has, found 4 that are also in \S+part-2, such as "
            r"'p2/0/é \d\.jpg', 'p2/0/é \d\.jpg', 'p2/0/é \d\.jpg'; nothing is merged"
        )
        with pytest.raises(StoreError, match=fault):
            merge_stores(tmp_path / "feats", [one, two, tmp_path / "three"])
        assert not (tmp_path / "feats").exists()
        merge_stores(tmp_path / "feats", [one, two])
        before = content(tmp_path / "feats")
        with pytest.raises(StoreError, match=r"three: expected .* found 4 that are also in \S+feats, such as"):
            merge_stores(tmp_path / "feats", [tmp_path / "three"])
        assert content(tmp_path / "feats") == before

    @pytest.mark.parametrize(
        ("about", "fault"),
        [
            (
                {"recipe": Recipe(pooling="avg")},
                r"other: was made with another recipe than \S+part-1 \(pooling: part-1 max, other avg",
            ),
            ({"weights_sha256": "1" * 64}, r"other: was made .* \(weights: part-1 000000000000, other 111111111111\)"),
            ({"dim": 4}, r"other: was made .* \(dimensions: part-1 3, other 4\)"),
            (
                {"source_root": "/elsewhere"},
                r"other: expected images below /images .*, as in \S+part-1, found",
            ),
        ],
    )
    @pytest.mark.parametrize("there", [False, True])
    def test_another_recipe(self, tmp_path: Path, about: dict[str, Any], fault: str, there: bool) -> None:
        (part,) = parts_in(tmp_path, 1)
        usual = {"recipe": Recipe(), "weights_sha256": SHA, "dim": DIM, "source_root": ROOT}
        with lock_store(tmp_path / "other", folder=True):
            create_folder(tmp_path / "other", **(usual | about)).finish()
        parts = [part, tmp_path / "other"]
        if there:
            merge_stores(tmp_path / "feats", [part])
            parts, fault = parts[1:], fault.replace("part-1", "feats")
        with pytest.raises(StoreError, match=fault):
            merge_stores(tmp_path / "feats", parts)
        assert (tmp_path / "feats").exists() == there

    def test_an_unfinished_part(self, tmp_path: Path) -> None:
        (part,) = parts_in(tmp_path, 1)
        with lock_store(part):
            open_folder(part, writable=True).begin_shard(["x", "y"])
        with pytest.raises(StoreError, match="part-1: 2 of 9 images are still to be described"):
            merge_stores(tmp_path / "feats", [part])

    def test_the_same_part_number(self, tmp_path: Path) -> None:
        parts = parts_in(tmp_path, 2)
        make(tmp_path / "other", (2,), prefix="x/", part=(2, 2))
        with pytest.raises(StoreError, match=r"other: is part 2 of 2, and so is \S+part-2"):
            merge_stores(tmp_path / "feats", [*parts, tmp_path / "other"])

    def test_a_part_twice_and_the_output(self, tmp_path: Path) -> None:
        (part,) = parts_in(tmp_path, 1)
        with pytest.raises(UsageError, match="expected parts to merge, found none"):
            merge_stores(tmp_path / "feats", [])
        with pytest.raises(UsageError, match="part-1: expected a part of its own, found that it is also given as"):
            merge_stores(tmp_path / "feats", [part, f"{part}/"])
        with pytest.raises(UsageError, match="part-1: expected a part of its own, found that it is also the output"):
            merge_stores(part, [part])

    def test_a_folder_of_other_things(self, tmp_path: Path) -> None:
        (part,) = parts_in(tmp_path, 1)
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "a.jpg").write_text("mine")
        with pytest.raises(StoreError, match=r"photos: expected a store or an empty folder, found 'a\.jpg' in it"):
            merge_stores(tmp_path / "photos", [part])
        with pytest.raises(StoreError, match=r"a\.jpg: expected a folder of shards or nothing, found a file"):
            merge_stores(tmp_path / "photos" / "a.jpg", [part])
        with pytest.raises(StoreError, match=r"none/feats: its folder \S+none does not exist"):
            merge_stores(tmp_path / "none" / "feats", [part])
        make(tmp_path / "lost", (2,), prefix="z")
        (tmp_path / "lost" / "manifest.json").unlink()
        before = content(tmp_path / "lost")
        with pytest.raises(StoreError, match=r"lost: .* found shard-00000\.h5 without a manifest\.json"):
            merge_stores(tmp_path / "lost", [part])
        assert content(tmp_path / "lost") == before


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_kill_at_random_moments(tmp_path: Path, exists: bool, copied: bool) -> None:
    """Readers see the store as it was or as it will be, and the same command finishes."""
    parts, output, chance = parts_in(tmp_path, 3, (2,) * 6), tmp_path / "feats", random.Random(exists)
    if exists:
        merge_stores(output, parts[:1])
    old, stopped = 12 if exists else 0, 0
    for _ in range(8):
        command = [sys.executable, __file__, str(int(copied)), str(output), *map(str, parts)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=CHILD)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.random() * 0.25)
        process.send_signal(signal.SIGKILL)
        stopped += process.wait() == -signal.SIGKILL
        process.stdout.close()
        if (output / "manifest.json").exists():
            assert len(open_store(output)) in (old, 36)
            assert verify_store(open_store(output)) == []
        else:
            assert not exists
    assert stopped
    assert merge_stores(output, parts).images == 36
    store = open_store(output)
    assert verify_store(store) == []
    assert sorted(store.names) == sorted(
        f"p{number}/{name}" for number in (1, 2, 3) for index in range(6) for name in names_of(index, 2)
    )
    assert not [name for name in os.listdir(output) if "partial" in name]


def test_a_kill_before_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that were placed are recognized, and not placed again."""
    parts, output = parts_in(tmp_path), tmp_path / "feats"

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(merging, "write_manifest", killed)
        merge_stores(output, parts)
    assert len(list(output.glob("shard-*"))) == 6
    with pytest.raises(StoreError, match=r"found a folder without manifest\.json"):
        open_store(output)
    merged = merge_stores(output, parts)
    assert (merged.images, merged.linked, merged.shards) == (21, 0, 6)
    assert len(list(output.glob("shard-*"))) == 6


def main(copied: bool, output: str, parts: list[str]) -> None:
    """Merge slowly, so that a kill comes in the middle."""
    place = merging._place

    def slow(shard: merging._Shard, final: Path) -> bool:
        time.sleep(0.01)
        return place(shard, final)

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    merging._place = slow
    if copied:
        os.link = refuse  # type: ignore[assignment]
    print("ready", flush=True)
    merge_stores(output, parts)


if __name__ == "__main__":
    main(sys.argv[1] == "1", sys.argv[2], sys.argv[3:])
