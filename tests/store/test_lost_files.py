"""Rows that have lost their file are counted, on a part of a large store, and told by the commands that use them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import MakeStore

from sppfeat import count_lost
from sppfeat.images import fingerprint_of
from sppfeat.store import Store, lost_files, split_row_name

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with some of the images that stores name."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    for name in ("a/0.jpg", "a/1.jpg", "b.tar"):
        (tmp_path / "images" / name).touch()
    (tmp_path / "images" / "link.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "secret.jpg").touch()
    return tmp_path / "images"


def as_described(store: Store) -> None:
    """Write the size and time of each file that is there into the store, as describing it does."""
    assert store.path is not None
    with h5py.File(store.path, "r+") as file:
        for row, name in enumerate(store.names):
            path = f"{store.source_root}/{split_row_name(name)[0]}"
            if os.path.isfile(path):
                file["file_size"][row], file["file_mtime_ns"][row] = fingerprint_of(path)


def test_every_kind_of_name(make_store: MakeStore, folder: Path) -> None:
    there = ["a/0.jpg", "a/1.jpg#0,0,9,9", "b.tar/x.jpg", "link.jpg", "../secret.jpg", "../gone.jpg"]
    gone = ["a/2.jpg", "a/2.jpg#0,0,9,9", "c.tar/x.jpg", "c/0.jpg"]
    store = make_store(np.ones((10, 4)), names=[*there, *gone], root=str(folder))
    found = count_lost(store)
    assert found is not None and (found.checked, found.lost, found.rows) == (10, 4, 10)
    assert found.changed == 2 and str(found) == "4 of 10 images have lost their file and 2 have changed since"
    as_described(store)
    assert str(count_lost(store)) == "4 of 10 images have lost their file"
    assert count_lost(replace(store, source_root="/nowhere")) is None
    assert count_lost(replace(store, url="s3://bucket/f/")) is None


def test_a_part_of_a_large_store_is_checked(
    make_store: MakeStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_files, "CHECKED_ROWS", 40)
    monkeypatch.setattr(lost_files, "_RUN", 10)
    names = [f"{number:04}.jpg" for number in range(205)]
    for name in names[:100]:
        (folder / name).touch()
    store = make_store(np.ones((205, 2)), names=names, root=str(folder))
    as_described(store)
    looked: list[str] = []
    monkeypatch.setattr(
        lost_files, "is_lost", lambda root, name: looked.append(name) or not os.path.exists(f"{root}/{name}")
    )
    found = count_lost(store)
    assert found is not None and (found.checked, found.lost) == (40, 20) and len(set(looked)) == 40
    assert str(found) == "20 of 40 images that were looked for have lost their file (205 in all)"
    monkeypatch.setattr(lost_files, "CHECK_SECONDS", 0)
    hurried = count_lost(store)
    assert hurried is not None and (hurried.checked, hurried.lost) == (10, 0)


@pytest.mark.parametrize("rows", [0, 1, 5, 1024, 1025, 65_536, 65_537, 1_000_000, 10_000_001])
def test_runs_are_within_the_store_and_differ(rows: int) -> None:
    starts = list(lost_files._spread(rows))
    assert len(set(starts)) == len(starts) == min(-(-rows // 1024), 64)
    assert all(0 <= start < rows and start % 1024 == 0 for start in starts)
    if rows > 70_000:  # the first two are half the store apart
        assert abs(starts[1] - starts[0] - rows / 2) < 2048


def test_commands_tell(make_store: MakeStore, folder: Path, tmp_path: Path, run_sppfeat: Run) -> None:
    pytest.importorskip("faiss")
    names = ["a/0.jpg", "a/1.jpg", "b/0.jpg", "b/1.jpg", "b/2.jpg"]
    made = make_store(np.eye(5), names=names, root=str(folder))
    as_described(made)
    store = made.path
    told = f"note: {store}: 3 of 5 images have lost their file; `sppfeat extract --prune` removes their rows\n"
    about = run_sppfeat("inspect", store)
    assert "  files: 3 of 5 images have lost their file\n" in about.stdout and "--prune" in about.stdout
    files = json.loads(run_sppfeat("inspect", store, "--json").stdout)["files"]
    assert files == {"checked": 5, "lost": 3, "changed": 0}
    index = run_sppfeat("index", store, "-o", tmp_path / "g")
    assert index.returncode == 0 and told in index.stderr
    quiet = run_sppfeat("index", store, "-o", tmp_path / "q", "--quiet")
    assert (quiet.returncode, quiet.stderr) == (0, "")
    train = run_sppfeat("train", "svm", store, "-o", tmp_path / "m.h5", "--c", "1", "--json")
    assert train.returncode == 0 and told in train.stderr and json.loads(train.stdout)["images"] == 5
    for name in names[2:]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    as_described(made)
    assert "  files: all 5 are there\n" in run_sppfeat("inspect", store).stdout
    assert "lost" not in run_sppfeat("train", "svm", store, "-o", tmp_path / "n.h5", "--c", "1").stderr
    (folder / "a" / "0.jpg").write_bytes(b"another")
    told = "1 of 5 images have changed since"
    assert f"  files: {told}\n" in run_sppfeat("inspect", store).stdout
    train = run_sppfeat("train", "svm", store, "-o", tmp_path / "o.h5", "--c", "1")
    assert f"note: {store}: {told}; `sppfeat extract` describes them again\n" in train.stderr
    (folder / "a" / "1.jpg").unlink()
    both = "1 of 5 images have lost their file and 1 have changed since; `sppfeat extract --prune` removes the rows of"
    assert both in run_sppfeat("index", store, "-o", tmp_path / "h").stderr
