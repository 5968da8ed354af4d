"""Stores of archives and URLs: the values of a folder, resumed and failing row by row as a folder does."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from image_server import ImageServer
from packing import KINDS, image_bytes, numbered_images, pack, write_tar

from sppfeat import Recipe, RunOptions, extract_folder, open_store
from sppfeat.extraction.plan import Todo
from sppfeat.extraction.workers import _heard, _told
from sppfeat.images import find_images
from sppfeat.report import thumbnail

CPU = RunOptions(device="cpu", engine="torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, with its store beside it."""
    top = tmp_path_factory.mktemp("folder")
    for name, content in numbered_images(12):
        (top / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (top / "in" / name).write_bytes(content)
    extract_folder(top / "in", top / "in.h5", TINY, CPU)
    return top


def described(path: Path) -> dict[str, np.ndarray]:
    store = open_store(path)
    return {"/".join(name.split("/")[-2:]): row for name, row in zip(store.names, store.descriptors, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_has_the_values_of_the_folder(folder: Path, tmp_path: Path, kind: str) -> None:
    path = pack(tmp_path, kind, numbered_images(12))
    done = extract_folder(path, tmp_path / "f.h5", TINY, CPU)
    assert (done.images, done.described, done.failed) == (12, 12, 0)
    expected, found = described(folder / "in.h5"), described(tmp_path / "f.h5")
    assert expected.keys() == found.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    store = open_store(tmp_path / "f.h5")
    assert store.file_size.min() > 0
    again = extract_folder(path, tmp_path / "f.h5", TINY, CPU)
    assert (again.described, again.reused, again.gone) == (0, 12, 0)
    for name in store.names:
        assert thumbnail(store.source_root, name) is not None
    assert thumbnail(store.source_root, f"{path.name}/other.png") is None


def test_urls_have_the_values_of_the_folder(folder: Path, tmp_path: Path) -> None:
    with ImageServer().running() as server:
        server.files = {f"/a/{name}": content for name, content in numbered_images(12)}
        (tmp_path / "list.txt").write_text("".join(f"{server.url}{path}\n" for path in server.files))
        done = extract_folder(tmp_path / "list.txt", tmp_path / "f.h5", TINY, CPU)
        assert (done.described, done.failed) == (12, 0)
        assert len(server.requests) == 12  # planning asks for nothing that is read anyway
        expected, found = described(folder / "in.h5"), described(tmp_path / "f.h5")
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
        server.files["/a/0/003.png"] = image_bytes(99)
        del server.files["/a/1/004.png"]
        again = extract_folder(tmp_path / "list.txt", tmp_path / "f.h5", TINY, CPU)
        assert (again.described, again.changed, again.reused, again.gone) == (1, 1, 10, 1)
        assert thumbnail(server.url, "a/0/003.png") is not None


def test_a_tar_that_grows_is_described_where_it_grew(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", numbered_images(5))
    path.write_bytes(path.read_bytes()[:-9000])  # cut within the marks of its end
    first = extract_folder(path, tmp_path / "f.h5", TINY, CPU)
    os.unlink(path)
    write_tar(path, numbered_images(8))
    second = extract_folder(path, tmp_path / "f.h5", TINY, CPU)
    assert (first.described, second.described, second.reused) == (5, 3, 5)


def test_the_rest_of_a_truncated_archive_is_one_failed_row(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", numbered_images(5))
    whole = path.read_bytes()
    path.write_bytes(whole[:2000])
    cut = extract_folder(path, tmp_path / "f.h5", TINY, CPU)
    assert cut.failed == 1 and cut.described == cut.images - 1
    assert list(open_store(tmp_path / "f.h5").errors()) == ["x.tar/(rest)"]
    path.write_bytes(whole)
    mended = extract_folder(path, tmp_path / "f.h5", TINY, CPU)
    assert (mended.failed, mended.described + mended.reused) == (0, 5)


def test_other_processes_hear_the_same_items(tmp_path: Path) -> None:
    for kind in KINDS:
        for item in find_images([pack(tmp_path, kind, numbered_images(2))]).items:
            heard = _heard(_told(Todo(item, [3])))
            assert heard == Todo(item, [3])
            assert heard.item.open()[0].read() == item.open()[0].read()


def test_a_folder_above_an_archive_names_its_rows(tmp_path: Path, tiny: Recipe) -> None:
    (tmp_path / "top/a").mkdir(parents=True)
    write_tar(tmp_path / "top/a/x.tar", numbered_images(2))
    (tmp_path / "top/y.png").write_bytes(image_bytes(1))
    extract_folder([tmp_path / "top/y.png", tmp_path / "top/a/x.tar"], tmp_path / "f.h5", tiny, CPU)
    names = ["y.png", "a/x.tar/0/000.png", "a/x.tar/1/001.png"]
    assert open_store(tmp_path / "f.h5").names == names
    again = extract_folder(tmp_path / "top/a/x.tar", tmp_path / "f.h5", tiny, CPU)
    assert (again.reused, again.gone) == (2, 0)
