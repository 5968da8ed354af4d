"""What holds for every kind of archive: members as items, names, bytes, and the way back from a name."""

from __future__ import annotations

import json
import os
import pickle
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packing import KINDS, image_bytes, numbered_images, pack, write_parquet, write_tar, write_zip

from sppfeat.errors import ImageError
from sppfeat.files import unsafe_name
from sppfeat.images import (
    Item,
    find_images,
    from_builtins,
    item_at,
    member_to_name,
    name_to_path,
    open_image,
    open_sources,
    read_image,
    to_builtins,
)
from sppfeat.images.members import MemberNames


def content_of(item: Item) -> bytes:
    raw, _ = item.open()
    with raw:
        return raw.read()


@pytest.mark.parametrize("kind", KINDS)
def test_members_are_items_with_the_bytes_that_were_packed(tmp_path: Path, kind: str) -> None:
    files = numbered_images(23)
    path = pack(tmp_path, kind, files)
    found = find_images([path])
    assert found.root == str(tmp_path) and found.problems == {} and found.repeated == 0
    assert found.names == [f"pack.{kind}/{name}" for name, _ in files]
    assert [content_of(item) for item in found.items] == [content for _, content in files]
    for item in found.items:
        raw, fingerprint = item.open()
        raw.close()
        assert fingerprint == item.fingerprint() and fingerprint.file_size > 0
    assert find_images([path]).items == found.items  # fingerprints, too


@pytest.mark.parametrize("kind", KINDS)
def test_threads_that_read_in_any_order_get_the_same(tmp_path: Path, kind: str) -> None:
    files = numbered_images(40)
    items = find_images([pack(tmp_path, kind, files)]).items
    order = [(at * 17) % 40 for at in range(40)]
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda at: content_of(items[at]), order))
    assert got == [files[at][1] for at in order]


@pytest.mark.parametrize("kind", KINDS)
def test_an_item_is_small_and_goes_to_other_processes(tmp_path: Path, kind: str) -> None:
    item = find_images([pack(tmp_path, kind, numbered_images(3))]).items[1]
    assert len(pickle.dumps(item)) < 1000
    assert pickle.loads(pickle.dumps(item)) == item
    assert from_builtins(json.loads(json.dumps(to_builtins(item.content)))) == item.content
    assert from_builtins(to_builtins(None)) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_leads_back_to_its_image(tmp_path: Path, kind: str) -> None:
    files = numbered_images(5)
    found = find_images([pack(tmp_path, kind, files)])
    for item, (_, content) in zip(found.items, files, strict=True):
        assert content_of(item_at(found.root, item.name)) == content
        assert found.has(item.name)
    missing = item_at(found.root, f"pack.{kind}/nothing.png")
    assert missing.problem == "is not in its archive" and not found.has(missing.name)
    with pytest.raises(ImageError, match="is not in its archive"):
        open_image(missing)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_archive_is_one_row_with_a_reason(tmp_path: Path, kind: str) -> None:
    for content in (b"", b"not an archive at all" * 100, os.urandom(5000)):
        (tmp_path / f"x.{kind}").write_bytes(content)
        found = find_images([tmp_path / f"x.{kind}"])
        assert found.names == [f"x.{kind}/(rest)"]
        assert "\n" not in found.items[0].problem and str(tmp_path) not in found.items[0].problem


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_archive_has_no_images(tmp_path: Path, kind: str) -> None:
    assert find_images([pack(tmp_path, kind, [])]).names == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_that_changes_after_it_was_listed_is_not_read(tmp_path: Path, kind: str) -> None:
    path = pack(tmp_path, kind, numbered_images(4))
    item = find_images([path]).items[0]
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content + b"\0")
    with pytest.raises(ImageError, match="changed after it was listed"):
        item.open()
    path.unlink()
    with pytest.raises(ImageError, match="no such file"):
        item.open()


@pytest.mark.parametrize("kind", ["tar", "zip", "parquet"])
def test_two_members_of_one_name_are_both_described(tmp_path: Path, kind: str) -> None:
    files = [
        ("a.png", image_bytes(1)),
        ("b.png", image_bytes(2)),
        ("a.png", image_bytes(3)),
        ("./a.png", image_bytes(4)),
    ]
    with pytest.warns(UserWarning, match="Duplicate name") if kind == "zip" else open(os.devnull):
        path = pack(tmp_path, kind, files)
    found = find_images([path])
    assert [name.split("/")[1] for name in found.names] == ["a.png", "b.png", "a.png~2", "a.png~3"]
    assert [content_of(item) for item in found.items] == [content for _, content in files]
    assert content_of(item_at(found.root, f"pack.{kind}/a.png~2")) == files[2][1]


HOSTILE = [
    "../../etc/a.png",
    "/etc/passwd.png",
    "a/../../b.png",
    "a..png",
    "back\\slash.png",
    "dir/./c.png",
    "ü/名.png",
]


@pytest.mark.parametrize("kind", ["tar", "zip", "parquet"])
def test_members_that_lead_elsewhere_are_names_not_paths(tmp_path: Path, kind: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "b.png").write_bytes(image_bytes(99))  # what `a/../../b.png` would lead to
    files = [(name, image_bytes(at)) for at, name in enumerate(HOSTILE)]
    found = find_images([pack(tmp_path / "in", kind, files)])
    assert len(set(found.names)) == len(files)
    for item, (_, content) in zip(found.items, files, strict=True):
        assert unsafe_name(item.name) is None, item.name
        path = os.path.normpath(name_to_path(found.root, item.name))
        assert path.startswith(f"{found.root}/pack.{kind}/")
        assert content_of(item) == content == content_of(item_at(found.root, item.name))


NAMES = st.lists(st.sampled_from(["..", ".", "", "a", "a.png", "\\", "\\x2e.", "~2", "\0", "ü"]), max_size=5)


@given(NAMES.map("/".join))
def test_every_member_has_a_sound_name(member: str) -> None:
    name = MemberNames().name(member)
    assert unsafe_name(name) is None
    assert os.path.normpath(name_to_path("/top", name)).startswith("/top/")


@given(NAMES, NAMES)
def test_names_differ_where_their_parts_do(one: list[str], other: list[str]) -> None:
    def parts(name: str) -> tuple[bool, list[str]]:
        return name.startswith("/"), [part for part in name.split("/") if part not in ("", ".")]

    a, b = "/".join(one), "/".join(other)
    assert (member_to_name(a) == member_to_name(b)) == (parts(a) == parts(b))


@given(st.lists(st.sampled_from(["a", "b", "a~2", "a~3", "c"]), max_size=30))
def test_names_are_distinct_whatever_repeats(members: list[str]) -> None:
    names = MemberNames()
    found = [names.name(member) for member in members]
    assert len(set(found)) == len(found)
    first = {member: at for at, member in reversed(list(enumerate(members)))}
    assert all(found[at] == member for member, at in first.items() if "~" not in member)


def test_many_names_are_known_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sppfeat.images.members._RECENT", 7)
    names = MemberNames()
    assert [names.name(f"{at}.png") for at in range(100)] == [f"{at}.png" for at in range(100)]
    assert [names.name(f"{at}.png") for at in range(100)] == [f"{at}.png~2" for at in range(100)]


def test_members_of_a_mixture_stream_and_archives_in_folders_stay_closed(tmp_path: Path) -> None:
    write_tar(tmp_path / "s-00.tar", numbered_images(2))
    write_zip(tmp_path / "s-01.zip", numbered_images(2))
    (tmp_path / "x.png").write_bytes(image_bytes(1))
    assert find_images([tmp_path]).names == ["x.png"]
    (tmp_path / "list.txt").write_text(f"{tmp_path}/x.png\n{tmp_path}/s-0{{0..0}}.tar\n{tmp_path}/s-01.zip\n")
    sources = open_sources([tmp_path / "list.txt"])
    names = ["x.png", "s-00.tar/0/000.png", "s-00.tar/1/001.png", "s-01.zip/0/000.png", "s-01.zip/1/001.png"]
    assert [item.name for item in sources] == names == [item.name for item in sources]


def test_a_list_may_name_archives_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{tmp_path}/gone.tar\n{tmp_path}/gone.png\n")
    found = find_images([tmp_path / "list.txt"])
    assert found.problems == {"gone.tar/(rest)": "no such file"}


def test_no_file_stays_open(tmp_path: Path) -> None:
    for at in range(40):
        write_tar(tmp_path / f"{at:02}.tar", numbered_images(2))
        write_tar(tmp_path / f"{at:02}.tgz", numbered_images(2), "w:gz")
        write_zip(tmp_path / f"{at:02}.zip", numbered_images(2))
        write_parquet(tmp_path / f"{at:02}.parquet", numbered_images(2))
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    sources = [tmp_path / ("{00..39}." + kind) for kind in ("tar", "tgz", "zip", "parquet")]
    items = find_images(sources).items
    assert len(items) == 320
    for item in items:
        content_of(item)
    assert len(os.listdir("/proc/self/fd")) <= before + 16 + 4
    stream = iter(open_sources(sources))
    next(stream)
    del stream
    assert threading.active_count() < threads + 40


def test_limits_hold_in_archives(tmp_path: Path) -> None:
    # A pipe-like name, an empty member, and a PNG whose header claims far too much.
    huge = bytearray(image_bytes(1))
    huge[16:24] = (200_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    for kind in ("tar", "tar.gz", "zip", "parquet"):
        items = find_images([pack(tmp_path, kind, [("e.png", b""), ("h.png", bytes(huge)), ("t.png", b"text")])]).items
        for item, reason in zip(items, ("empty file", "decoding takes about|pixels", "not an image"), strict=True):
            with pytest.raises(ImageError, match=reason):
                read_image(item)
