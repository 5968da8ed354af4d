"""Images on pages: names without what they share, and links that lead to the images' files and nowhere else."""

from __future__ import annotations

import base64
import io
import os
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from image_server import ImageServer
from packing import write_tar
from PIL import Image

from sppfeat.images import Item
from sppfeat.images.remote import UrlFile
from sppfeat.report import common_folder, shown_item, shown_row
from sppfeat.report.names import image_link, short_name


@pytest.mark.parametrize(
    ("names", "folder"),
    [
        ([], ""),
        (["a.jpg"], ""),
        (["x/y/a.jpg"], "x/y"),
        (["x/y/a.jpg", "x/y/b.jpg"], "x/y"),
        (["x/y/a.jpg", "x/b.jpg", "x/z/c.jpg"], "x"),
        (["ab/a.jpg", "abc/a.jpg"], ""),
        (["x/a.jpg", "x/a.jpg/b.jpg"], "x"),
        (["/x/y/a.jpg", "/x/b.jpg"], "/x"),
        (["/a.jpg", "/b.jpg"], ""),
        (["s3://b/x/1.jpg", "s3://b/y/2.jpg"], "s3://b"),
    ],
)
def test_the_folder_in_common(names: list[str], folder: str) -> None:
    assert common_folder(names) == folder
    for name in names:
        assert not folder or short_name(name, folder, 1000) == name[len(folder) + 1 :]


def test_names_lose_their_middle() -> None:
    name = f"test/{'very_' * 12}long/image_0019.jpg"
    short = short_name(name, "test", 30)
    assert len(short) == 30 and short.startswith("very_very_v\u2026") and short.endswith("ong/image_0019.jpg")
    assert short_name("x" * 30, length=30) == "x" * 30 and len(short_name("x" * 31, length=30)) == 30
    assert short_name("testing/a.jpg", "test") == "testing/a.jpg"


@pytest.mark.parametrize(
    ("page", "image", "relative"),
    [
        ("w/p.html", "w/a.jpg", True),
        ("w/p.html", "w/x/y/a b#1?&%41.jpg", True),
        ("w/p.html", "w/http:a.jpg", True),
        ("w/p.html", "w/caf\udce9.jpg", True),
        ("w/out/p.html", "w/images/a.jpg", True),
        ("w/out/x/p.html", "w/images/a.jpg", False),
        ("w/out/x/p.html", "images/\u732b #.jpg", False),
    ],
)
def test_links_lead_to_the_file(tmp_path: Path, page: str, image: str, relative: bool) -> None:
    """Whatever characters its name has. Those to files near the page survive a move of both."""
    link = image_link(tmp_path / page, Item.at(tmp_path / image))
    assert link is not None and link.startswith("./" if relative else "file:///")
    path = urllib.parse.urlsplit(urllib.parse.urljoin((tmp_path / page).as_uri(), link))
    assert (path.scheme, path.query, path.fragment) == ("file", "", "")
    assert urllib.parse.unquote_to_bytes(path.path) == os.fsencode(tmp_path / image)


@pytest.mark.parametrize(
    ("orientation", "size", "red"), [("exif", (80, 120), (15, 105)), ("ignore", (120, 80), (15, 15))]
)
def test_boxes_are_by_the_orientation(
    tmp_path: Path, orientation: str, size: tuple[int, int], red: tuple[int, int]
) -> None:
    """A corner is red as stored; the image is shown turned by its EXIF, or not, and a box is outlined in that frame."""
    stored = Image.new("RGB", (120, 80), "white")
    stored.paste("red", (0, 0, 30, 30))
    exif = Image.Exif()
    exif[0x0112] = 8  # upright after a turn to the left
    stored.save(tmp_path / "a.jpg", quality=95, exif=exif)
    page, box = tmp_path / "p.html", (40, 50, 60, 70)

    def shown(mark: tuple[float, float, float, float] | None) -> np.ndarray:
        found = shown_row(page, str(tmp_path), "a.jpg", mark=mark, orientation=orientation)
        assert found.address is not None
        with Image.open(io.BytesIO(base64.b64decode(found.address.partition(",")[2]))) as image:
            assert image.size == size
            return np.asarray(image.convert("RGB"), np.int16)

    plain = shown(None)
    x, y = red
    assert plain[y, x, 0] > 200 and plain[y, x, 1] < 60
    rows, columns = np.nonzero(np.abs(shown(box) - plain).max(2) > 100)
    assert abs(columns.min() - 40) < 5 and abs(columns.max() - 60) < 5
    assert abs(rows.min() - 50) < 5 and abs(rows.max() - 70) < 5


def test_nothing_but_images_is_linked(tmp_path: Path) -> None:
    """No file outside the root, none that is no image, and no member of an archive, which a browser cannot open."""
    root, page = tmp_path / "images", tmp_path / "p.html"
    root.mkdir()
    for path in (tmp_path / "secret.jpg", root / "a.jpg"):
        Image.new("RGB", (20, 20)).save(path)
    (root / "text.jpg").write_text("no image")
    write_tar(root / "x.tar", [("a.jpg", (root / "a.jpg").read_bytes())])
    assert shown_row(page, str(root), "a.jpg").link == "./images/a.jpg"
    assert shown_row(page, str(root), "a.jpg#2,2,9,9").link == "./images/a.jpg"
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg"), "text.jpg", "gone.jpg"):
        shown = shown_row(page, str(root), name)
        assert (shown.name, shown.address, shown.link) == (name, None, None)
    member = shown_row(page, str(root), "x.tar/a.jpg")
    assert member.address is not None and member.link is None
    assert shown_item(page, Item.at(root / "text.jpg"), "text.jpg").link is None


def test_images_of_the_web_are_linked_where_they_came_from(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.jpg")
    with ImageServer().running() as server:
        server.files = {"/in/a.jpg": (tmp_path / "a.jpg").read_bytes()}
        shown = shown_row(tmp_path / "p.html", f"{server.url}/in", "a.jpg")
        assert shown.link == f"{server.url}/in/a.jpg"
        assert shown_row(tmp_path / "p.html", "", f"{server.url}/in/a.jpg").link is None
    assert image_link(tmp_path / "p.html", Item("s3://bucket", "a.jpg", content=UrlFile("s3://bucket/a.jpg"))) is None
