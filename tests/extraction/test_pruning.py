"""Rows of images that are gone leave the store, and no others, whatever ends the run."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from test_sharded import rows

from sppfeat import RunOptions, StoreError, UsageError, extract_folder, open_store, verify_store
from sppfeat.extraction import ShardOptions
from sppfeat.images import is_lost
from sppfeat.progress import Observer

MakeImages = Callable[..., Path]
CPU = RunOptions(device="cpu")
KINDS = {"one file": None, "shards": ShardOptions(rows=4)}
both = pytest.mark.parametrize("kind", KINDS)


class Notes(Observer):
    def __init__(self) -> None:
        self.found: list[str] = []

    def note(self, text: str) -> None:
        self.found.append(text)


def names(output: Path) -> list[str]:
    store = open_store(output)
    assert verify_store(store) == [] and not store.unfinished
    return list(store.names)


@both
def test_the_other_rows_stay_as_they_are(make_images: MakeImages, tmp_path: Path, kind: str) -> None:
    folder, output, shards = make_images(11), tmp_path / "f", KINDS[kind]
    (folder / "0008.png").write_bytes(b"damaged")
    extract_folder(folder, output, TINY, CPU, shards=shards)
    held = open_store(output)
    before, first = rows(held), held.descriptors[:4]
    gone = ["0001.png", "0002.png", "0008.png", *(["0004.png", "0005.png", "0006.png", "0007.png"] if shards else [])]
    for name in gone:
        (folder / name).unlink()

    kept = extract_folder(folder, output, TINY, CPU)
    assert (kept.gone, kept.removed) == (len(gone), 0) and rows(open_store(output)) == before
    done = extract_folder(folder, output, TINY, CPU, prune=True)
    assert (done.gone, done.removed, done.described, done.reused) == (0, len(gone), 0, 11 - len(gone))
    assert rows(open_store(output)) == {name: row for name, row in before.items() if name not in gone}
    assert names(output) == [name for name in before if name not in gone]
    np.testing.assert_array_equal(held.descriptors[:4], first)  # its readers keep the old rows
    again = extract_folder(folder, output, TINY, CPU, prune=True)
    assert (again.gone, again.removed, again.reused) == (0, 0, 11 - len(gone))


@both
def test_new_images_are_described_by_the_run_that_removes_others(
    make_images: MakeImages, tmp_path: Path, kind: str
) -> None:
    folder, output = make_images(6), tmp_path / "f"
    extract_folder(folder, output, TINY, CPU, shards=KINDS[kind])
    (folder / "0001.png").rename(folder / "new.png")
    (folder / "0003.png").write_bytes((folder / "0004.png").read_bytes())
    done = extract_folder(folder, output, TINY, CPU, prune=True)
    assert (done.described, done.changed, done.removed) == (2, 1, 1)
    assert names(output) == ["0000.png", "0002.png", "0003.png", "0004.png", "0005.png", "new.png"]
    store = open_store(output)
    np.testing.assert_array_equal(store.descriptors[2], store.descriptors[3])


@both
def test_only_rows_below_the_sources_are_removed(make_images: MakeImages, tmp_path: Path, kind: str) -> None:
    one, other = make_images(3, "images/one"), make_images(3, "images/other")
    output = tmp_path / "f"
    extract_folder([one, other], output, TINY, CPU, shards=KINDS[kind])
    (one / "0000.png").unlink()
    (other / "0000.png").unlink()
    done = extract_folder(one, output, TINY, CPU, prune=True)
    assert done.removed == 1 and "one/0000.png" not in names(output) and "other/0000.png" in names(output)
    assert extract_folder([one, other], output, TINY, CPU, prune=True).removed == 1
    assert names(output) == [f"{part}/000{number}.png" for part in ("one", "other") for number in (1, 2)]


@both
def test_what_may_not_be_mounted_is_kept(make_images: MakeImages, tmp_path: Path, kind: str) -> None:
    """A folder without images, one behind a link that leads nowhere, and an image behind such a link."""
    folder, disk = make_images(2, "images/here"), make_images(2, "disk")
    empty = make_images(2, "images/empty")
    (folder / "linked").symlink_to(disk)
    (folder / "image.png").symlink_to(disk / "0000.png")
    output, sources = tmp_path / "f", [folder, empty]
    extract_folder(sources, output, TINY, CPU, shards=KINDS[kind])
    before = names(output)
    assert len(before) == 7
    disk.rename(tmp_path / "unplugged")
    for path in empty.iterdir():
        path.unlink()
    (folder / "0001.png").unlink()
    notes = Notes()
    done = extract_folder(sources, output, TINY, CPU, prune=True, observer=notes)
    assert done.removed == 1 and names(output) == [name for name in before if name != "here/0001.png"]
    assert notes.found == [f"{empty}: no images found, or not all could be listed; its rows are kept"]
    # Below a folder that has images, an empty one is what it seems.
    assert extract_folder(folder.parent, output, TINY, CPU, prune=True).removed == 2


@both
def test_members_of_archives(make_images: MakeImages, tmp_path: Path, kind: str) -> None:
    folder = make_images(4)
    archive, output = folder / "some.zip", tmp_path / "f"

    def pack(count: int) -> None:
        with zipfile.ZipFile(archive, "w") as file:
            for number in range(count):
                file.write(folder / f"{number:04}.png", f"{number:04}.png")

    pack(3)
    sources = [folder, archive]
    extract_folder(sources, output, TINY, CPU, shards=KINDS[kind])
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    damaged = extract_folder(sources, output, TINY, CPU, prune=True)
    assert damaged.removed == 0 and {f"some.zip/000{number}.png" for number in range(3)} <= set(names(output))
    pack(1)
    assert extract_folder(folder, output, TINY, CPU, prune=True).removed == 0  # the archive is not listed
    assert extract_folder(sources, output, TINY, CPU, prune=True).removed == 3  # two members, and the row `(rest)`
    assert names(output) == ["0000.png", "0001.png", "0002.png", "0003.png", "some.zip/0000.png"]


@both
def test_nothing_is_removed_if_nothing_would_be_left(make_images: MakeImages, tmp_path: Path, kind: str) -> None:
    folder, output = make_images(5), tmp_path / "f"
    extract_folder(folder, output, TINY, CPU, shards=KINDS[kind])
    before = rows(open_store(output))
    for path in sorted(folder.iterdir()):
        path.rename(path.with_name(f"other-{path.name}"))
    with pytest.raises(StoreError, match="expected some of its 5 images in the sources, found none; nothing is remov"):
        extract_folder(folder, output, TINY, CPU, prune=True)
    after = rows(open_store(output))
    assert before.items() <= after.items() and verify_store(open_store(output)) == []


@both
def test_pruning_is_refused_where_nobody_can_tell(make_images: MakeImages, tmp_path: Path, kind: str) -> None:
    folder, output = make_images(3), tmp_path / "f"
    extract_folder(folder, output, TINY, CPU, shards=KINDS[kind])
    (listed := tmp_path / "list.txt").write_text(f"{folder}/0000.png\n")
    for source in (listed, folder / "0000.png"):
        with pytest.raises(UsageError, match="--prune: expected a folder, an archive or a prefix of a bucket among"):
            extract_folder(source, output, TINY, CPU, prune=True)
    windows = {"0000.png": np.array([[0, 0, 9, 9.0]])}
    with pytest.raises(UsageError, match="--prune: expected whole images"):
        extract_folder(folder, output, TINY, CPU, prune=True, windows=windows)
    with pytest.raises(UsageError, match="--prune: expected no --cluster"):
        extract_folder(folder, output, TINY, CPU, prune=True, cluster="local")
    assert len(names(output)) == 3


@both
def test_an_interrupted_run_removes_nothing(make_images: MakeImages, tmp_path: Path, kind: str) -> None:
    folder, output = make_images(6), tmp_path / "f"
    extract_folder(folder, output, TINY, CPU, shards=KINDS[kind])
    (folder / "0000.png").unlink()
    make_images(60)
    (folder / "0000.png").unlink()
    stopped = extract_folder(folder, output, TINY, CPU, prune=True, stop=lambda: True)
    assert stopped.interrupted and stopped.removed == 0 and "0000.png" in open_store(output).names
    done = extract_folder(folder, output, TINY, CPU, prune=True)
    assert done.removed == 1 and names(output)[0] == "0001.png" and len(names(output)) == 59


# Ends at once at a call of a function, as `kill -9` does.
KILLED = """
import os, sys
from conftest import TINY
from sppfeat import RunOptions, extract_folder
from sppfeat.store import shards, writing

def die(*arguments, **options):
    os._exit(9)

module, _, name = sys.argv[1].rpartition(".")
setattr({"Folder": shards.Folder, "shards": shards, "writing": writing}[module], name, die)
extract_folder(sys.argv[2], sys.argv[3], TINY, RunOptions(device="cpu"), prune=True)
"""


@pytest.mark.parametrize(
    "place",
    ["shards.copy_without", "Folder.place", "Folder.write", "shards.remove_marks", "Folder.drop", "Folder.finish"],
)
def test_a_killed_run_leaves_a_valid_folder(make_images: MakeImages, tmp_path: Path, place: str) -> None:
    folder, output = make_images(12), tmp_path / "f"
    extract_folder(folder, output, TINY, CPU, shards=ShardOptions(rows=4))
    before = rows(open_store(output))
    gone = {"0000.png", "0004.png", "0005.png", "0006.png", "0007.png"}
    for name in gone:
        (folder / name).unlink()
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root.parent), os.environ.get("PYTHONPATH", "")])}
    child = subprocess.run([sys.executable, "-c", KILLED, place, str(folder), str(output)], env=env, timeout=60)
    assert child.returncode == 9
    extract_folder(folder, output, TINY, CPU)  # recovers, and removes nothing more
    left = rows(open_store(output))
    assert {name: row for name, row in before.items() if name not in gone}.items() <= left.items()
    assert left.items() <= before.items() and verify_store(open_store(output)) == []
    extract_folder(folder, output, TINY, CPU, prune=True)
    assert set(names(output)) == before.keys() - gone
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]


def test_a_file_that_cannot_be_looked_at_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "there.png").touch()
    (tmp_path / "b.tar").touch()
    root = str(tmp_path)
    assert is_lost(root, "a/gone.png") and is_lost(root, "gone/deep/gone.png") and is_lost(root, "a/there.png/gone.png")
    assert not is_lost(root, "a/there.png") and not is_lost(root, "b.tar/gone.png") and is_lost(root, "c.tar/gone.png")
    assert not is_lost("s3://bucket", "gone.png") and not is_lost(root, "nul\0.png")

    def forbidden(path: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "lstat", forbidden)
    assert not is_lost(root, "a/gone.png")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # botocore's own
def test_a_store_in_a_bucket(bucket: str, make_images: MakeImages, tmp_path: Path) -> None:
    """Shards are replaced or removed there, too; what is kept of them here stays without descriptors."""
    folder, url = make_images(12), f"{bucket}/pruned/feats/"
    extract_folder(folder, url, TINY, CPU, shards=ShardOptions(rows=4))
    before = rows(open_store(url))
    gone = {"0000.png", "0004.png", "0005.png", "0006.png", "0007.png"}
    for name in gone:
        (folder / name).unlink()
    assert extract_folder(folder, url, TINY, CPU, prune=True).removed == 5
    store = open_store(url)
    assert rows(store) == {name: row for name, row in before.items() if name not in gone}
    assert verify_store(store) == [] and not store.unfinished
    make_images(14)
    again = extract_folder(folder, url, TINY, CPU, prune=True)
    assert (again.described, again.reused, again.removed) == (7, 7, 0) and len(open_store(url)) == 14


@both
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_images_in_a_bucket(bucket: str, make_images: MakeImages, tmp_path: Path, kind: str) -> None:
    """What the listing of a prefix lacks is gone."""
    s3 = pytest.importorskip("s3fs").S3FileSystem(skip_instance_cache=True)
    place = f"{bucket}/images-{'-'.join(kind.split())}"
    s3.put(str(make_images(5)), f"{place}/", recursive=True)
    extract_folder(place, tmp_path / "f", TINY, CPU, shards=KINDS[kind])
    before = names(tmp_path / "f")
    s3.rm(f"{place}/{before[1]}")
    assert extract_folder(place, tmp_path / "f", TINY, CPU, prune=True).removed == 1
    assert names(tmp_path / "f") == [before[0], *before[2:]]
