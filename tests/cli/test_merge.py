"""`sppfeat merge`, and every command that takes a store with a folder of shards."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeStore
from folders import make

from sppfeat.store.locking import lock_store
from sppfeat.store.shards import open_folder
from sppfeat.store.writing import StoreWriter

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    found = [tmp_path / "part-1", tmp_path / "part-2"]
    for number, part in enumerate(found, 1):
        make(part, (4, 3), prefix=f"{number}/", part=(number, 3))
    return found


def test_parts_are_merged(run_sppfeat: Run, tmp_path: Path, parts: list[Path]) -> None:
    done = run_sppfeat("merge", tmp_path / "feats", *parts)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first == f"{tmp_path}/feats: 14 images in 4 shards; added 4, 0 of them copied"
    assert last == "  not merged yet: 1 part of 3 (3)"
    again = json.loads(run_sppfeat("merge", tmp_path / "feats", *parts, "--json").stdout)
    assert again.pop("done") + again.pop("failed") == 14
    assert again == {
        "store": f"{tmp_path}/feats",
        "images": 14,
        "shards": 4,
        "linked": 0,
        "copied": 0,
        "missing": [3],
        "of": 3,
    }


def test_what_cannot_be_merged_is_one_line(run_sppfeat: Run, tmp_path: Path, parts: list[Path]) -> None:
    make(tmp_path / "other", (2,), prefix="1/")
    done = run_sppfeat("merge", tmp_path / "feats", *parts, tmp_path / "other")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "other: expected images that no other part has, found 2 that are also in " in line
    assert not (tmp_path / "feats").exists()
    for arguments in ([], [tmp_path / "feats"]):
        assert run_sppfeat("merge", *arguments).returncode == 2


def test_inspect_shows_shards(run_sppfeat: Run, tmp_path: Path, parts: list[Path]) -> None:
    done = run_sppfeat("inspect", f"{parts[0]}/", "--verify")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{parts[0]}/: store of 7 images, ") and "  in 2 shards; part 1 of 3" in lines
    with lock_store(parts[0]):
        store = open_folder(parts[0], writable=True).begin_shard(["x", "y", "z"])
        with StoreWriter(store) as writer:
            writer.fail(1, "broken")
    assert "  under work: 1 shard, 3 new images, 2 pending" in run_sppfeat("inspect", parts[0]).stdout.splitlines()
    found = json.loads(run_sppfeat("inspect", parts[0], "--json", "--failures").stdout)
    assert (found["images"], found["shards"], found["part"]) == (7, 2, [1, 3])
    assert found["building"] == {"shards": 1, "images": 3, "pending": 2}
    assert len(found["failures"]) == found["failed"]
    (parts[0] / "shard-00001.h5").unlink()
    done = run_sppfeat("inspect", parts[0])
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "found no such file" in done.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_command_reads_a_folder_here_or_in_a_bucket_as_it_reads_a_file(
    run_sppfeat: Run, tmp_path: Path, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, bucket: str
) -> None:
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    classes = np.repeat(np.arange(3), 12)
    rows = random.normal(size=(3, 32))[classes] + 0.5 * random.normal(size=(36, 32))
    names = [f"class{label}/{number:02}.jpg" for number, label in enumerate(classes)]
    stores = [make_store(rows, "file.h5", names=names)]
    pieces = [slice(0, 10), slice(10, 11), slice(11, 36)]
    stores += [make_store(rows[part], f"{number}.h5", names=names[part]) for number, part in enumerate(pieces)]
    for store in stores:  # the same image failed in both
        failed = [row for row, name in enumerate(store.names) if name == names[20]]
        with StoreWriter(store) as writer:
            for row in failed:
                writer.fail(row, "broken")
    assert run_sppfeat("merge", "of-shards", "0.h5", "1.h5", "2.h5").returncode == 0
    s3fs = pytest.importorskip("s3fs")
    s3fs.S3FileSystem(skip_instance_cache=True).put("of-shards", f"{bucket}/read", recursive=True)

    commands = [
        ["evaluate", "transfer", "STORE", "--json", "--protocol", "split", "--labels", "labels.csv"],
        ["evaluate", "retrieval", "STORE", "--relevant", "folder", "--json"],
        ["duplicates", "STORE", "--threshold", "0.5", "--json"],
        ["index", "STORE", "-o", "gallery", "--project", "8", "--json"],
        ["inspect", "gallery", "--verify", "--json"],
        ["search", "gallery", "STORE", "--json"],
        ["train", "svm", "STORE", "-o", "svm.h5", "--json"],
        ["predict", "svm.h5", "STORE", "--json"],
        ["inspect", "STORE", "--failures"],
    ]
    lines = [
        f"{name},{label},{'train' if at % 2 else 'test'}"
        for at, (name, label) in enumerate(zip(names, classes, strict=True))
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["name,label,split", *lines]))
    found: dict[str, list[Any]] = {}
    for store_name in ("file.h5", "of-shards", f"{bucket}/read/"):
        for command in commands:
            done = run_sppfeat(*[store_name if word == "STORE" else word for word in command])
            assert done.returncode in (0, 3), (command, done.stderr)
            output = done.stdout.replace(f"{tmp_path}/{store_name}", "STORE").replace(store_name, "STORE")
            if "--json" in command:
                output = without_times(json.loads(output))
            found.setdefault(store_name, []).append((command, done.returncode, output))
        for made in ("gallery", "svm.h5"):
            shutil.move(made, f"{made}-{len(found)}")
    for of_file, of_folder, of_bucket in zip(*found.values(), strict=True):
        assert of_file == of_folder == of_bucket


def without_times(document: Any) -> Any:
    """A document without what differs between two runs."""
    if isinstance(document, dict):
        return {key: without_times(value) for key, value in document.items() if key not in ("seconds", "bytes")}
    return [without_times(value) for value in document] if isinstance(document, list) else document
