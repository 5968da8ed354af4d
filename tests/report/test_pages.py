"""Pages: what they show of images, nothing from elsewhere, and where they may be written."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_server import ImageServer
from packing import write_tar, write_zip
from PIL import Image

from sppfeat import GalleryError, ModelError, ReportError, Store
from sppfeat.files.formats import SVM
from sppfeat.files.names import unsafe_name
from sppfeat.files.output import check_new_file
from sppfeat.images import Item, find_images
from sppfeat.report import check_page, thumbnail
from sppfeat.retrieval.changes import create_gallery
from sppfeat.retrieval.duplicates import find_duplicates
from sppfeat.retrieval.duplicates_page import write_duplicates_page
from sppfeat.retrieval.gallery import open_gallery
from sppfeat.retrieval.hits_page import write_hits_page
from sppfeat.retrieval.keeping import Files
from sppfeat.retrieval.search import Answer, SearchOptions, SearchResult, search_store
from sppfeat.transfer.evaluation import evaluate_transfer
from sppfeat.transfer.options import TransferOptions
from sppfeat.transfer.page import write_transfer_report

HOSTILE = ["<script>\"'.jpg", "\x1b[31m.jpg", "a b&amp;.jpg"]
OUTSIDE = [
    "../secret.jpg",
    "in/../../secret.jpg",
    r"\x2e\x2e/secret.jpg",
    r"..\\secret.jpg\x41",
    "../secret.jpg#1,1,9,9",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A root with `a.jpg`, red on the left, blue on the right; a secret lies beside it."""
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[:, :50, 0] = pixels[:, 50:, 2] = 255
    Image.fromarray(pixels).save(root / "a.jpg", quality=95)
    Image.new("RGB", (30, 30)).save(tmp_path / "secret.jpg")
    return root


def shown(address: str | None) -> Image.Image:
    assert address is not None
    kind, _, content = address.partition(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def test_a_thumbnail_shows_a_row(folder: Path) -> None:
    assert shown(thumbnail(str(folder), "a.jpg", side=50)).size == (50, 30)
    part = shown(thumbnail(str(folder), "a.jpg#60,10,99,39"))
    assert part.size == (40, 30) and np.asarray(part)[15, 20].argmax() == 2


@pytest.mark.parametrize(
    ("window", "size"),
    [
        ("0,0,1000000,1000000", (100, 60)),
        (f"0,0,1{300 * '0'},9", (100, 10)),
        ("-50,-1000000000,9,9", (10, 10)),
        ("500,500,600,600", (100, 60)),
        ("99,59,99,59", (1, 1)),
    ],
)
def test_windows_that_are_too_large(folder: Path, window: str, size: tuple[int, int]) -> None:
    """The part inside the image is shown, or the whole image if there is none."""
    assert shown(thumbnail(str(folder), f"a.jpg#{window}")).size == size


@pytest.mark.parametrize("window", ["nan,0,1,1", "inf,0,1,1", "0,0,1e6,1e6", "90,50,20,10"])
def test_what_is_no_window_is_part_of_a_name(folder: Path, window: str) -> None:
    assert thumbnail(str(folder), f"a.jpg#{window}") is None


def test_nothing_from_outside_the_root_is_shown(folder: Path) -> None:
    secret = folder.parent / "secret.jpg"
    for name in (*OUTSIDE, str(secret), f"/{secret}", f"{secret}#1,1,9,9"):
        assert unsafe_name(name) is not None and thumbnail(str(folder), name) is None
    for name in ("a.jpg", "in/..a.jpg", "..a/b..jpg", r"caf\xe9.jpg", r"back\\slash.jpg", r"\\x41.jpg", "猫.jpg"):
        assert unsafe_name(name) is None
    # Links below the root are the user's own.
    (folder / "link.jpg").symlink_to(secret)
    assert shown(thumbnail(str(folder), "link.jpg")).size == (30, 30)


def test_thumbnails_from_archives(folder: Path, tmp_path: Path) -> None:
    image = (folder / "a.jpg").read_bytes()
    write_tar(folder / "in/x.tar", [("y/a.jpg", image), ("../../secret.jpg", image), ("y/a.jpg", image[:700])])
    write_zip(tmp_path / "beside.zip", [("a.jpg", image)])
    (folder / "link.zip").symlink_to(tmp_path / "beside.zip")
    (folder / "no.tar").write_bytes(b"no archive")
    root = str(folder)
    assert shown(thumbnail(root, "in/x.tar/y/a.jpg", side=50)).size == (50, 30)
    assert shown(thumbnail(root, "in/x.tar/y/a.jpg#60,10,99,39")).size == (40, 30)
    assert shown(thumbnail(root, r"in/x.tar/\x2e./\x2e./secret.jpg")).size == (100, 60)  # the member of that name
    assert shown(thumbnail(root, "link.zip/a.jpg")).size == (100, 60)
    for name in (
        "in/x.tar/y/b.jpg",
        "in/x.tar/y/a.jpg~2",
        "in/x.tar/../../secret.jpg",
        "../beside.zip/a.jpg",
        "no.tar/a.jpg",
        "no.tar/(rest)",
        "in/x.tar",
        "in/x.tar/",
        "in/y.parquet/a.jpg",
    ):
        assert thumbnail(root, name) is None, name


def test_a_page_connects_only_to_a_root_that_is_a_url(folder: Path) -> None:
    with ImageServer().running() as server:
        server.files = {"/in/a.jpg": (folder / "a.jpg").read_bytes(), "/secret.jpg": (folder / "a.jpg").read_bytes()}
        for root, name in (
            (str(folder), f"{server.url}/in/a.jpg"),
            ("", f"{server.url}/in/a.jpg"),
            (f"{server.url}/in", "../secret.jpg"),
            (f"{server.url}/in", "%2e%2e/secret.jpg"),
        ):
            assert thumbnail(root, name) is None
        assert server.requests == []
        assert shown(thumbnail(f"{server.url}/in", "a.jpg")).size == (100, 60)
        assert shown(thumbnail(f"{server.url}/in", "a.jpg#60,10,99,39")).size == (40, 30)
        assert {path for _, path in server.requests} == {"/in/a.jpg"}


def test_a_thumbnail_never_raises(folder: Path) -> None:
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:700])
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    names = [
        "gone.jpg",
        "broken.jpg",
        "folder.jpg",
        "pipe.jpg",
        "loop.jpg",
        "x" * 5000,
        "a\0b.jpg",
        "\ud800.jpg",
        "",
        ".",
    ]
    assert [name for name in names if thumbnail(str(folder), name) is not None] == []
    assert thumbnail("/nowhere", "a.jpg") is None


def test_pages_of_a_store_from_elsewhere(
    folder: Path, make_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names outside the root, invalid windows and markup in names neither break a page nor get into it."""
    # As if all of these files were there until the page is written.
    monkeypatch.setattr("sppfeat.retrieval.duplicates.different_files", lambda rows, **_: Files(rows))
    names = ["x/a.jpg#nan,0,1,1", "x/a.jpg#0,0,1000000,1000000", *(f"x/{name}" for name in HOSTILE)]
    names += [f"../{name}" for name in ("secret.jpg", "secret.jpg#1,1,9,9", "y/a.jpg")] + ["y/b.jpg"]
    (folder / "x").mkdir()
    (folder / "a.jpg").rename(folder / "x/a.jpg")
    rows = np.random.default_rng(0).normal(size=(len(names), 8)) * 0.01 + 1
    store = make_store(rows, names=names, root=str(folder))
    pages = [tmp_path / "dups.html", tmp_path / "transfer.html", tmp_path / "hits.html"]
    write_duplicates_page(pages[0], find_duplicates(store, 0.9))
    options = TransferOptions(protocol="random", per_class=1, trials=1, costs=(1.0,))
    write_transfer_report(pages[1], evaluate_transfer([store], options))
    with pytest.raises(GalleryError, match="expected a name inside its folder"):
        create_gallery(store, tmp_path / "g")
    sound = [name for name in names if unsafe_name(name) is None]
    store = make_store(rows[: len(sound)], "g.h5", names=sound, root=str(folder))
    create_gallery(store, tmp_path / "g")
    gallery = open_gallery(tmp_path / "g")
    write_hits_page(pages[2], gallery, search_store(gallery, store, SearchOptions(k=4)))
    for page in pages:
        text = page.read_text()
        assert "<script>" not in text
        assert {shown(address).size for address in re.findall(r'src="(data:[^"]+)"', text)} <= {(100, 60)}
    text = pages[0].read_text()
    assert text.count("data:image/jpeg") == 1 and text.count("image not available") == len(names) - 1
    assert "x/&lt;script&gt;&#34;&#39;.jpg" in text and "x/a b&amp;amp;.jpg" in text


def test_pages_and_files_that_cannot_be_written_are_refused_before_the_work(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "image.jpg").write_bytes(b"\xff\xd8\xff")
    for path, message in (
        (tmp_path / "pipe", "found a special file"),
        (tmp_path / "folder", "found a folder"),
        (tmp_path / "none/p", "its folder .* does not exist"),
        (tmp_path / "image.jpg", "found another file; it is left as it is"),
        (tmp_path / ("x" * 250), "cannot be written: File name too long"),
        (Path("/proc/page"), "/proc/page: cannot be written: "),
    ):
        with pytest.raises(ReportError, match=message):
            check_page(path, overwrite=True)
        with pytest.raises(ModelError, match=message):
            check_new_file(path, overwrite=True, error=ModelError, kind=SVM)
    assert check_page(tmp_path / "new.html", overwrite=False) == tmp_path / "new.html"
    assert check_new_file(tmp_path / "new.h5", overwrite=False, error=ModelError, kind=SVM) == tmp_path / "new.h5"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "image.jpg", "pipe"]


def test_a_file_that_is_read_only_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "p.html"
    page.write_text("<!doctype html>")
    page.chmod(0o444)
    if os.geteuid() == 0:  # root may write to anything
        monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK and Path(path) == page))
    with pytest.raises(ReportError, match=r"p\.html: is not writable"):
        check_page(page, overwrite=True)


def test_hits_of_an_archive_are_shown(folder: Path, make_store: Callable[..., Store], tmp_path: Path) -> None:
    image = (folder / "a.jpg").read_bytes()
    write_tar(folder / "x.tar", [("a.jpg", image), ("b.jpg", image)])
    store = make_store(np.eye(2, 8), names=["x.tar/a.jpg", "x.tar/b.jpg"], root=str(folder))
    create_gallery(store, tmp_path / "g")
    (item,) = (item for item in find_images([folder / "x.tar"]).items if item.name == "x.tar/b.jpg")
    found = search_store(open_gallery(tmp_path / "g"), store, SearchOptions(k=2))
    own = Answer("b.jpg", item.path, [], item=item)
    page = SearchResult([*found.answers, own], [], 0.0, 0.0)
    write_hits_page(tmp_path / "p.html", open_gallery(tmp_path / "g"), page)
    assert len(re.findall(r'src="(data:[^"]+)"', (tmp_path / "p.html").read_text())) == 2 + 4 + 1
    assert [one.path for one in found.answers[0].neighbors][0] == f"{folder}/x.tar/a.jpg"
    groups = find_duplicates(
        make_store(np.ones((3, 8)), names=["x.tar/a.jpg", "x.tar/b.jpg", "x.tar/c.jpg"], root=str(folder))
    )
    assert [one.path for one in groups.groups[0]] == [f"{folder}/x.tar/a.jpg", f"{folder}/x.tar/b.jpg", None]


def test_a_query_given_by_its_path_is_shown(folder: Path, make_store: Callable[..., Store], tmp_path: Path) -> None:
    """Wherever it is: the user named it. Its name says nothing about windows. A part of it is outlined in the whole."""
    odd = tmp_path / r"back\slash#1,1,9,9.jpg"
    (tmp_path / "secret.jpg").rename(odd)
    store = make_store(np.ones((2, 8)), names=["a.jpg", "b.jpg"], root=str(folder))
    create_gallery(store, tmp_path / "g")
    answer = Answer("query", str(odd), [], box=(5, 5, 14, 9), item=Item.at(odd))
    write_hits_page(tmp_path / "p.html", open_gallery(tmp_path / "g"), SearchResult([answer], [], 0.0, 0.0))
    (address,) = re.findall(r'src="(data:[^"]+)"', (tmp_path / "p.html").read_text())
    assert shown(address).size == (30, 30)
    pixels = np.asarray(shown(address)).astype(int)
    assert pixels[7, 10].max() < 90 and pixels[4, 10, 0] > 150  # black inside, an outline above
    answer = Answer("query", str(odd), [], item=Item.at(odd))
    write_hits_page(tmp_path / "p.html", open_gallery(tmp_path / "g"), SearchResult([answer], [], 0.0, 0.0))
    (address,) = re.findall(r'src="(data:[^"]+)"', (tmp_path / "p.html").read_text())
    assert np.asarray(shown(address)).max() < 60


def test_few_hits_are_shown_large(make_store: Callable[..., Store], tmp_path: Path) -> None:
    """And as fine as they are large, unless there are many of them on the page."""
    for number in range(12):
        Image.new("RGB", (900, 600)).save(tmp_path / f"{number:02}.jpg")
    store = make_store(np.eye(12), names=[f"{number:02}.jpg" for number in range(12)], root=str(tmp_path))
    create_gallery(store, tmp_path / "g")
    gallery = open_gallery(tmp_path / "g")
    for k, queries, side, width in ((2, 1, 280, 560), (4, 1, 206, 412), (12, 1, 120, 240), (9, 12, 120, 240)):
        done = search_store(gallery, store, SearchOptions(k=k))
        write_hits_page(tmp_path / "p.html", gallery, SearchResult(done.answers[:queries], [], 0.0, 0.0))
        text = (tmp_path / "p.html").read_text()
        assert text.count(f'style="--side: {side}px"') == queries
        addresses = re.findall(r'class="hit">.*?src="(data:[^"]+)"', text, re.DOTALL)
        assert len(addresses) == k * queries and {shown(one).width for one in addresses} == {width}
