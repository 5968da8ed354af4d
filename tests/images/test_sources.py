"""Sources as streams: the same as listing everything, in a stable order, without holding it."""

from __future__ import annotations

import io
import os
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packing import numbered_images, write_tar

from sppfeat.errors import UsageError
from sppfeat.images import Item, find_images, item_at, open_sources
from sppfeat.images.items import EXTENSIONS

PARTS = st.sampled_from(["a", "b.jpg", "a.png", "ü", "Z", "b", "ab.PNG", "x.txt", "a-b", "a.b"])


def slow_walk(folder: str) -> list[str]:
    """Files with an image's extension, folders entered in name order among the files."""
    found = []
    for name in sorted(os.listdir(folder), key=os.fsencode):
        path = os.path.join(folder, name)
        is_image = os.path.splitext(name)[1].lower() in EXTENSIONS
        if is_image:
            found.append(path)
        if os.path.isdir(path):
            found += slow_walk(path)
    return found


@given(st.lists(st.lists(PARTS, min_size=1, max_size=4), max_size=12))
def test_folders_stream_in_the_order_of_their_names(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[str]]
) -> None:
    top = tmp_path_factory.mktemp("top")
    for parts in files:
        path = top.joinpath(*parts)
        if not any(parent.is_file() for parent in path.parents) and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    stream = open_sources([top])
    found = [item.path for item in stream]
    assert found == slow_walk(str(top)) == [item.path for item in stream]
    assert find_images([top]).items == list(stream)


def test_a_stream_holds_no_list(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        top = tmp_path / str(count)
        for at in range(count):
            if at % 50 == 0:
                folder = top / f"{at:05}"
                folder.mkdir(parents=True)
            (folder / f"{at}.jpg").touch()
        (tmp_path / "list.txt").write_text("".join(f"{top}/{at // 50 * 50:05}/{at}.jpg\n" for at in range(count)))
        tracemalloc.start()
        assert sum(1 for _ in open_sources([top])) == count
        assert sum(1 for _ in open_sources([tmp_path / "list.txt"])) == count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(500), peak(5000)
    assert many - few < 40_000  # the names of the folders in `top`; the files take 1 MB


def test_the_root_is_known_before_anything_is_listed(tmp_path: Path) -> None:
    for name in ("a/x", "a/y", "b"):
        (tmp_path / name).mkdir(parents=True)
    write_tar(tmp_path / "a/y/t.tar", numbered_images(1))
    (tmp_path / "list.txt").write_text(f"{tmp_path}/a/x/1.jpg\n{tmp_path}/a/x/2.jpg\n{tmp_path}/a/3.jpg\n")
    roots = {
        ("a/x",): "a/x",
        ("a/x", "b"): "",
        ("a/y/t.tar",): "a/y",
        ("a/y/t.tar", "a/x"): "a",
        ("list.txt",): "a",
        ("list.txt", "a/y/t.tar"): "a",
    }
    for sources, root in roots.items():
        assert open_sources([tmp_path / each for each in sources]).root == str(tmp_path / root)
    with pytest.raises(UsageError, match=r"a/3\.jpg: expected a path below the root .*/a/x$"):
        open_sources([tmp_path / "list.txt"], root=str(tmp_path / "a/x"))


def test_standard_input_is_read_once_and_iterated_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = f"{tmp_path}/x.jpg\n{tmp_path}/y.jpg\n{tmp_path}/x.jpg\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    stream = open_sources(["-"])
    assert [item.name for item in stream] == ["x.jpg", "y.jpg", "x.jpg"] == [item.name for item in stream]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    found = find_images(["-"])
    assert found.names == ["x.jpg", "y.jpg"] and found.repeated == 1


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("x-{0..2}.jpg", ["x-0.jpg", "x-1.jpg", "x-2.jpg"]),
        ("x-{08..11}.jpg", ["x-08.jpg", "x-09.jpg", "x-10.jpg", "x-11.jpg"]),
        ("x-{2..0}.jpg", ["x-2.jpg", "x-1.jpg", "x-0.jpg"]),
        ("{1..2}-{01..02}.jpg", ["1-01.jpg", "1-02.jpg", "2-01.jpg", "2-02.jpg"]),
        ("x-{a..b}.jpg", ["x-{a..b}.jpg"]),
    ],
)
def test_ranges_in_braces(tmp_path: Path, pattern: str, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert find_images([tmp_path / pattern]).names == names
    (tmp_path / "list.txt").write_text(f"{tmp_path}/{pattern}\n")
    assert find_images([tmp_path / "list.txt"]).names == names
    (tmp_path / pattern).touch()  # a file of that very name
    assert find_images([tmp_path / pattern]).names == [pattern]


def test_a_range_with_a_gap_names_the_file(tmp_path: Path) -> None:
    write_tar(tmp_path / "s-00.tar", numbered_images(1))
    with pytest.raises(UsageError, match=r"s-01\.tar: no such file or folder"):
        find_images([tmp_path / "s-{00..99}.tar"])


def test_a_range_without_end(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^\{0\.\.999999999999\}: expected a range of at most 1,000,000"):
        open_sources(["https://a.example/{0..999999999999}.jpg"])


def test_a_list_that_changes_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{tmp_path}/a/x.jpg\n")
    stream = open_sources([tmp_path / "list.txt"])
    (tmp_path / "list.txt").write_text(f"{tmp_path}/b/x.jpg\n")
    with pytest.raises(UsageError, match=r"b/x\.jpg: expected a path below the root .*/a$"):
        list(stream)


def test_a_local_name_is_its_file(tmp_path: Path) -> None:
    assert item_at(str(tmp_path), "a/b.jpg") == Item(str(tmp_path), "a/b.jpg")
    (tmp_path / "x.tar").mkdir()  # a folder that is named like an archive
    (tmp_path / "x.tar/a.jpg").touch()
    assert item_at(str(tmp_path), "x.tar/a.jpg") == find_images([tmp_path]).items[0]


def test_images_of_kinds_that_are_not_read_are_counted(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("a.jpg", "b.HEIC", "below/c.heic", "below/d.nef", "e.txt", ".hidden.heic", "f.mov"):
        (tmp_path / name).touch()
    (tmp_path / "folder.heic").mkdir()
    sources = open_sources([tmp_path, tmp_path / "a.jpg"])
    for _ in range(2):  # each time anew
        assert [item.name for item in sources] == ["a.jpg", "a.jpg"]
        assert sources.extent.unread == ((".heic", 2), (".nef", 1))
    found = find_images([tmp_path / "below", tmp_path / "a.jpg"])
    assert found.extent is not None and found.extent.unread == ((".heic", 1), (".nef", 1))
    assert found.below(str(tmp_path.parent)).items[0].name == f"{tmp_path.name}/a.jpg"


@pytest.mark.parametrize("end", [".tar", ".tar.gz", ".zip", " cut.zip"])
def test_images_of_kinds_that_are_not_read_are_counted_in_archives(tmp_path: Path, end: str) -> None:
    folder, path = tmp_path / "folder", tmp_path / f"archive{end}"
    (folder / "folder.heic").mkdir(parents=True)
    for name in ("a.jpg", "b.HEIC", "c.heic", "d.nef", "e.txt", "._b.HEIC"):
        (folder / name).write_bytes(b"0123456789")
    if end.startswith(".tar"):
        with tarfile.open(path, f"w:{end[5:]}") as tar:
            tar.add(folder, ".")
    else:
        with zipfile.ZipFile(path, "w") as file:
            for one in sorted(folder.rglob("*")):
                file.write(one, one.name)
        if "cut" in end:  # without its directory
            whole = path.read_bytes()
            path.write_bytes(whole[: whole.index(b"PK\1\2")])
    sources = open_sources([path])
    for _ in range(2):
        (name,) = (item.name for item in sources if item.problem is None)
        assert name == f"{path.name}/a.jpg"
        assert sources.extent.unread == ((".heic", 2), (".nef", 1))
