"""Finding images, and reading one: every orientation and color mode against pixels laid out by hand."""

from __future__ import annotations

import io
import os
import socket
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageCms, TiffImagePlugin, features

from sppfeat.errors import ImageError, UsageError
from sppfeat.images import NO_FINGERPRINT, find_images, fingerprint_of, name_to_path, path_to_name
from sppfeat.images.reading import open_image, read_image, upright_size

PHOTOS = Path(__file__).parents[2] / "photos"
ORIENTATION, XMP = 0x0112, 700
AVIF = "avif" in features.modules and features.check("avif")
needs_byte_names = pytest.mark.skipif(sys.platform == "darwin", reason="file names are Unicode here")
needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")


def touch(*paths: Path) -> None:
    # find_images looks at names only, so that these need not be images.
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def pixels(path: Path, orientation: str = "exif") -> np.ndarray:
    """Read, and hold the announced size against the pixels that come."""
    image, size = read_image(str(path), orientation=orientation)
    assert image.mode == "RGB"
    assert image.size == size
    with open_image(str(path))[0] as opened:
        assert upright_size(opened, orientation=orientation)[0] == size
    return np.asarray(image)


# ---------------------------------------------------------------- finding


def test_a_folder_is_searched_recursively_in_name_order(tmp_path):
    touch(
        *(tmp_path / name for name in ("b.JPG", "a/z.png", "a/b/c.TiFf", "a.jpg", "Z.gif", "notes.md", "jpg", "x.jpgx"))
    )
    found = find_images([tmp_path])
    # Depth first, each folder's entries by the bytes of their names.
    assert found.names == ["Z.gif", "a/b/c.TiFf", "a/z.png", "a.jpg", "b.JPG"]
    assert found.root == str(tmp_path)
    assert (found.problems, found.repeated) == ({}, 0)


@pytest.mark.parametrize("extension", ["jpg", "JPEG", "png", "WebP", "bmp", "tif", "TIFF", "gif"])
def test_every_extension_counts_in_any_case(tmp_path, extension):
    touch(tmp_path / f"x.{extension}")
    assert find_images([tmp_path]).names == [f"x.{extension}"]
    assert find_images([tmp_path / f"x.{extension}"]).names == [f"x.{extension}"]


@pytest.mark.parametrize("parents", [("train", "test"), ("a/train", "b/train")])
def test_several_folders_keep_names_apart(tmp_path, parents):
    touch(*(tmp_path / parent / "x.jpg" for parent in parents))
    found = find_images([tmp_path / parent for parent in parents])
    assert found.names == [f"{parent}/x.jpg" for parent in parents]
    assert found.root == str(tmp_path)


def test_a_source_given_twice_or_inside_another_counts_once(tmp_path):
    touch(tmp_path / "a/x.jpg", tmp_path / "y.jpg")
    found = find_images([tmp_path, tmp_path / "a", tmp_path / "y.jpg"])
    assert found.names == ["a/x.jpg", "y.jpg"]
    assert found.repeated == 2


@pytest.mark.parametrize("spelled", ["{}/", "{}/.", "{}/sub/..", "/{}", "//{}"])
def test_spelling_of_a_folder_does_not_matter(tmp_path, spelled):
    touch(tmp_path / "x.jpg", tmp_path / "sub/y.jpg")
    found = find_images([spelled.format(tmp_path)])
    assert (found.root, found.names) == (str(tmp_path), ["sub/y.jpg", "x.jpg"])
    assert find_images([spelled.format(tmp_path) + "/x.jpg"], root=spelled.format(tmp_path)).names == ["x.jpg"]


def test_folders_are_relative_to_the_current_one(tmp_path, monkeypatch):
    touch(tmp_path / "photos/x.jpg")
    monkeypatch.chdir(tmp_path)
    assert find_images(["photos"]) == find_images([tmp_path / "photos"])
    assert find_images(["."]).names == ["photos/x.jpg"]


def test_root_names_from_further_up_and_must_hold_the_sources(tmp_path):
    touch(tmp_path / "a/b/x.jpg", tmp_path / "ab/x.jpg")
    assert find_images([tmp_path / "a/b"], root=str(tmp_path)).names == ["a/b/x.jpg"]
    assert find_images([tmp_path], root="/").names[0] == f"{tmp_path}/a/b/x.jpg".lstrip("/")
    # `ab` begins with the letters of `a`, and still is not below it.
    with pytest.raises(UsageError, match=r"/ab: expected a path below the root .*/a$"):
        find_images([tmp_path / "ab"], root=str(tmp_path / "a"))


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("name", ["list.txt", "LIST.LST"])
def test_a_list_keeps_its_order_and_counts_repeats(tmp_path, monkeypatch, name, newline):
    lines = [b"z.jpg", b"", b"sub/a b.png", b"./z.jpg", str(tmp_path / "missing.jpg").encode(), b"no-extension", b""]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / name).write_bytes(newline.join(lines))
    monkeypatch.chdir(tmp_path)  # where the entries start from; not the folder of the list
    found = find_images([tmp_path / "lists" / name])
    assert found.root == str(tmp_path)
    assert found.names == ["z.jpg", "sub/a b.png", "missing.jpg", "no-extension"]
    assert found.repeated == 1


def test_a_list_comes_on_standard_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a/x.jpg\na/y\xff.jpg\n")))
    found = find_images(["-"])
    assert (found.root, found.names) == (str(tmp_path / "a"), ["x.jpg", "y\\xff.jpg"])


@pytest.mark.parametrize("content", [b"", b"\n\r\n\n"])
def test_an_empty_list_or_folder_has_no_images(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    assert find_images([tmp_path / "list.txt"]).names == []
    (tmp_path / "folder").mkdir()
    found = find_images([tmp_path / "folder"])
    assert (found.root, found.names) == (str(tmp_path / "folder"), [])


def test_a_list_saved_by_a_windows_editor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("x.jpg\r\ny.jpg", "utf-8-sig")
    assert find_images(["list.txt"]).names == ["x.jpg", "y.jpg"]
    (tmp_path / "list.txt").write_text("x.jpg\r\ny.jpg", "utf-16")
    with pytest.raises(UsageError, match=r"list\.txt: expected a UTF-8 list with one path per line, found NUL"):
        find_images(["list.txt"])


def test_the_output_of_find_print0_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x.jpg\0y.jpg\0")))
    with pytest.raises(UsageError, match="standard input: .* NUL"):
        find_images(["-"])


def test_wrong_sources_are_named(tmp_path):
    with pytest.raises(UsageError, match="no source"):
        find_images([])
    with pytest.raises(UsageError, match=r"nowhere: no such file or folder"):
        find_images([tmp_path / "nowhere"])
    touch(tmp_path / "movie.mp4", tmp_path / "none")
    for name in ("movie.mp4", "none"):
        with pytest.raises(UsageError, match=rf"{name}: expected a folder, an image \(.*\.jpg.*\) or a text list"):
            find_images([tmp_path / name])


def test_symlinks_are_followed(tmp_path):
    touch(tmp_path / "away/deep/x.jpg", tmp_path / "away/file.png")
    here = tmp_path / "here"
    here.mkdir()
    (here / "folder").symlink_to(tmp_path / "away")
    (here / "again").symlink_to("../away/deep")
    (here / "link.png").symlink_to("../away/file.png")
    found = find_images([here])
    assert found.names == ["again/x.jpg", "folder/deep/x.jpg", "folder/file.png", "link.png"]
    assert found.problems == {}
    os.symlink(here, tmp_path / "top")
    assert find_images([tmp_path / "top"]).names == found.names


def test_symlinks_that_lead_nowhere_or_round_are_problems(tmp_path):
    touch(tmp_path / "a/x.jpg")
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    (tmp_path / "dangling").symlink_to("nowhere")  # nothing says that this was to be an image
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "a/up").symlink_to("..")
    (tmp_path / "a/up.jpg").symlink_to(".")
    (tmp_path / "ping").symlink_to("pong")
    (tmp_path / "pong").symlink_to("ping")
    found = find_images([tmp_path])
    assert found.problems == {
        "dangling.jpg": "symlink points to nothing",
        "self.jpg": "symlink loops",
        "a/up": "symlink loops back to a folder that contains it",
        "a/up.jpg": "symlink loops back to a folder that contains it",
        "ping": "symlink loops",
        "pong": "symlink loops",
    }
    assert sorted(found.names) == sorted(["a/x.jpg", *found.problems])
    assert found.repeated == 0
    assert find_images([tmp_path / "dangling.jpg"]).names == ["dangling.jpg"]


def test_a_folder_named_like_an_image_is_a_problem_and_is_searched(tmp_path):
    touch(tmp_path / "x.jpg/y.jpg")
    found = find_images([tmp_path])
    assert found.names == ["x.jpg", "x.jpg/y.jpg"]
    assert found.problems == {"x.jpg": "is a folder, not an image"}
    # Given by the user, it is a folder like any other.
    assert find_images([tmp_path / "x.jpg"]).problems == {}


@needs_permissions
def test_an_unreadable_folder_is_a_problem(tmp_path):
    touch(tmp_path / "closed/x.jpg", tmp_path / "open/y.jpg")
    (tmp_path / "closed").chmod(0)
    try:
        found = find_images([tmp_path])
    finally:
        (tmp_path / "closed").chmod(0o700)
    assert found.names == ["closed", "open/y.jpg"]
    assert found.problems == {"closed": "cannot be read: Permission denied"}


@pytest.mark.parametrize(("name", "depth"), [("d", 1100), ("d" * 200, 25)])
def test_a_very_deep_folder_is_searched_or_reported(tmp_path, monkeypatch, name, depth):
    monkeypatch.chdir(tmp_path)
    for _ in range(depth):  # step by step: the system takes no path beyond 4096 bytes
        os.mkdir(name)
        os.chdir(name)
    touch(Path("x.jpg"))
    try:
        found = find_images([tmp_path])
    finally:  # pytest's own cleaning would meet Python's recursion limit
        os.remove("x.jpg")
        for _ in range(depth):
            os.chdir("..")
            os.rmdir(name)
    # Deeper than Python could recurse; and where the system gives up, the folder is a problem, not a gap.
    assert len(found.names) == 1
    if name == "d":
        assert found.names[0].endswith("/d/x.jpg")
    else:
        assert found.problems[found.names[0]] == "cannot be read: File name too long"


@needs_permissions
def test_a_folder_that_may_be_listed_but_not_entered_is_a_problem(tmp_path):
    touch(tmp_path / "closed/x.jpg", tmp_path / "closed/sub/y.jpg")
    (tmp_path / "closed").chmod(0o400)
    try:
        found = find_images([tmp_path])
    finally:
        (tmp_path / "closed").chmod(0o700)
    assert found.problems == dict.fromkeys(("closed/sub", "closed/x.jpg"), "cannot be read: Permission denied")


# ---------------------------------------------------------------- names

byte_names = st.binary(min_size=1, max_size=40).filter(lambda name: not {0, ord("/")} & set(name))
nasty_bytes = st.lists(
    st.sampled_from([b"\\", b"x", b"\\x", b"ff", b"\xff", b"\xc3", b"\xbc", b"a", b"\n", b"\xed\xb2\x80"]), min_size=1
).map(b"".join)


@given(byte_names | nasty_bytes)
@example(b"\\xff.jpg")
@example(b"\\\\xff\xff.jpg")
def test_names_are_utf8_and_lead_back_to_the_file(raw):
    name = path_to_name(os.fsdecode(raw))
    assert os.fsencode(name_to_path("/top", name)) == b"/top/" + raw
    assert name.encode("utf-8").decode("utf-8") == name


@given(st.sets(byte_names | nasty_bytes, min_size=2))
def test_different_files_have_different_names(raws):
    assert len({path_to_name(os.fsdecode(raw)) for raw in raws}) == len(raws)


def test_plain_names_stay_as_they_are():
    for name in ("a/b c.jpg", "ü/日本.png", "new\nline\ttab.gif"):
        assert path_to_name(name) == name
    assert path_to_name("back\\slash") == r"back\\slash"
    assert path_to_name(os.fsdecode(b"\xff\xfe")) == r"\xff\xfe"


@needs_byte_names
def test_any_file_name_is_found_and_opened(tmp_path):
    raws = [b"a b.jpg", b"new\nline.jpg", b"tab\t.jpg", "ü日本.jpg".encode(), b"\xff\xfe.jpg", b"back\\slash.jpg"]
    raws += [
        rb"\xff.jpg",
        rb"\\.jpg",
        b"\x1b[31m.jpg",
        b" .jpg",
        b"-.jpg",
        b"\r.jpg",
        b"%s{}*?.jpg",
        b"x" * 251 + b".jpg",
    ]
    for raw in raws:
        with open(os.path.join(os.fsencode(tmp_path), raw), "wb") as file:
            file.write(raw)
    found = find_images([tmp_path])
    assert len(set(found.names)) == len(raws)
    for name in found.names:
        with open(name_to_path(found.root, name), "rb") as file:
            raw = file.read()
        assert os.path.basename(os.fsencode(name_to_path(found.root, name))) == raw
    # The same through a list, save the one name that holds the list's own separator.
    lines = [os.path.join(os.fsencode(tmp_path), raw) for raw in raws if b"\n" not in raw]
    (tmp_path / "list.txt").write_bytes(b"\n".join(lines))
    assert set(find_images([tmp_path / "list.txt"]).names) == set(found.names) - {"new\nline.jpg"}


# ---------------------------------------------------------------- orientation

# What EXIF's 8 values mean, by their definition: where the stored rows and columns start in the upright image
#     a b
#     c d
#     e f
STORED = {
    1: ["ab", "cd", "ef"],  # rows from the top, columns from the left
    2: ["ba", "dc", "fe"],  # top, right
    3: ["fe", "dc", "ba"],  # bottom, right
    4: ["ef", "cd", "ab"],  # bottom, left
    5: ["ace", "bdf"],  # left, top
    6: ["bdf", "ace"],  # right, top
    7: ["fdb", "eca"],  # right, bottom
    8: ["eca", "fdb"],  # left, bottom
}
COLORS = {
    "a": (250, 10, 10), "b": (10, 250, 10), "c": (10, 10, 250),
    "d": (240, 240, 20), "e": (130, 130, 130), "f": (245, 245, 245),
}  # fmt: skip


def image_from(rows: list[str], block: int = 16) -> np.ndarray:
    """Each letter a block of its color: blocks of 16 stay apart in JPEG's 8 x 8 transforms and halved color."""
    cells = np.array([[COLORS[letter] for letter in row] for row in rows], np.uint8)
    return cells.repeat(block, 0).repeat(block, 1)


def assert_same(found: np.ndarray, expected: np.ndarray, tolerance: int) -> None:
    """Equal; or, where a format loses color at the blocks' edges, of equal shape and close in their middle."""
    assert found.shape == expected.shape
    step = slice(8, None, 16) if tolerance else slice(None)
    np.testing.assert_allclose(found[step, step].astype(int), expected[step, step], atol=tolerance)


FORMATS = {
    "x.jpg": ({"quality": 95}, 6),
    "x.png": ({}, 0),
    "x.webp": ({"lossless": True}, 0),
    "raw.tif": ({}, 0),
    "lzw.tif": ({"compression": "tiff_lzw"}, 0),
    "jpeg.tif": ({"compression": "jpeg", "quality": 95}, 6),
}
if AVIF:
    FORMATS["x.avif"] = ({"quality": 95}, 8)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("name", FORMATS)
def test_every_orientation_gives_the_same_upright_image(tmp_path, name, orientation):
    options, tolerance = FORMATS[name]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = image_from(STORED[orientation])
    Image.fromarray(stored).save(tmp_path / name, exif=exif, **options)
    assert_same(pixels(tmp_path / name), image_from(STORED[1]), tolerance)
    assert_same(pixels(tmp_path / name, "ignore"), stored, tolerance)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_other_modes_are_turned_too(tmp_path, mode):
    gray = image_from(STORED[6])[..., 0]
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image = Image.fromarray(gray.astype(np.uint16) << 8) if mode == "I;16" else Image.fromarray(gray).convert(mode)
    image.save(tmp_path / "x.tif", exif=exif)
    np.testing.assert_array_equal(pixels(tmp_path / "x.tif")[..., 0], image_from(STORED[1])[..., 0])


@pytest.mark.parametrize("name", ["x.tif", "x.png", "x.jpg"])
def test_xmp_says_the_orientation_where_exif_does_not(tmp_path, name):
    packet = b'<rdf:Description tiff:Orientation="6"/>'
    options: dict = {"xmp": packet}
    if name == "x.tif":
        info = TiffImagePlugin.ImageFileDirectory_v2()
        info[XMP], info.tagtype[XMP] = packet, 1
        options = {"tiffinfo": info}
    elif name == "x.png":
        from PIL.PngImagePlugin import PngInfo

        options = {"pnginfo": PngInfo()}
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", packet.decode())
    stored = image_from(STORED[6])
    Image.fromarray(stored).save(tmp_path / name, **options)
    # Pillow's readers differ in whether they look; whichever they do, size and pixels must agree (`pixels` checks).
    assert pixels(tmp_path / name).shape in (stored.shape, image_from(STORED[1]).shape)
    assert_same(pixels(tmp_path / name, "ignore"), stored, 12)


def exif_block(kind: int, count: int, value: bytes, order: str = ">") -> bytes:
    """EXIF whose only entry is an orientation of that type."""
    head = b"MM\0*" if order == ">" else b"II*\0"
    return b"Exif\0\0" + head + struct.pack(f"{order}IHHHI", 8, 1, ORIENTATION, kind, count) + value + bytes(4)


@pytest.mark.parametrize(
    ("block", "turned"),
    [
        (exif_block(3, 1, b"\0\6\0\0"), True),
        (exif_block(3, 1, b"\6\0\0\0", "<"), True),
        (exif_block(4, 1, b"\0\0\0\6"), True),  # a long instead of a short
        (exif_block(3, 1, b"\0\0\0\0"), False),  # 0 and 9 are no orientation: the image stays
        (exif_block(3, 1, b"\0\x09\0\0"), False),
        (exif_block(2, 2, b"6\0\0\0"), False),
        (exif_block(12, 1, b"\0\0\0\x08"), False),  # points behind the end
        (b"Exif\0\0", False),
        (b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0", False),  # no entries: what Pillow writes for an empty EXIF
        (b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0", False),
    ],
)
@pytest.mark.parametrize("name", ["x.jpg", "x.webp", "x.png"])
def test_unusual_but_valid_exif_does_not_fail(tmp_path, name, block, turned):
    if name != "x.jpg" and block == b"Exif\0\0":
        pytest.skip("only JPEG has a marker that can be empty")
    Image.new("RGB", (40, 24)).save(tmp_path / name, exif=block)
    assert pixels(tmp_path / name).shape == ((40, 24, 3) if turned else (24, 40, 3))


DAMAGED_EXIF = {
    "garbage": b"Exif\0\0garbage, garbage",
    "zeros": b"Exif\0\0" + bytes(40),
    "header only": b"Exif\0\0MM\0*",
    "cut in the directory": b"Exif\0\0MM\0*\0\0\0\x08\0\x05\1\x12",
    "directory behind the end": b"Exif\0\0MM\0*\0\0\xff\xff\0\x05",
}


@pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning:PIL")
@pytest.mark.filterwarnings("ignore:.*corrupt:UserWarning:PIL")
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp"])
@pytest.mark.parametrize("block", DAMAGED_EXIF.values(), ids=DAMAGED_EXIF)
def test_damaged_exif_fails_unless_it_is_ignored(tmp_path, name, block):
    Image.new("RGB", (40, 24)).save(tmp_path / name, exif=block)
    with pytest.raises(ImageError, match=r"^EXIF cannot be read \(.+\); orientation 'ignore' takes"):
        read_image(str(tmp_path / name))
    assert read_image(str(tmp_path / name), orientation="ignore").size == (40, 24)


def test_exif_behind_the_pixels_counts_and_damaged_pixels_are_not_blamed_on_exif(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(image_from(STORED[6])).save(tmp_path / "x.png", exif=exif)
    content = (tmp_path / "x.png").read_bytes()
    at = content.index(b"eXIf") - 4
    chunk = content[at : at + 12 + struct.unpack(">I", content[at : at + 4])[0]]
    moved = content.replace(chunk, b"").replace(bytes(4) + b"IEND", chunk + bytes(4) + b"IEND")
    (tmp_path / "x.png").write_bytes(moved)
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), image_from(STORED[1]))
    (tmp_path / "x.png").write_bytes(content.replace(chunk, b"")[:120])
    with pytest.raises(ImageError, match="^cannot be decoded: .*truncated"):
        read_image(str(tmp_path / "x.png"))


# ---------------------------------------------------------------- color


def png(width: int, height: int, bits: int, kind: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand, for what Pillow cannot write; each row starts with its filter byte, 0."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return content


def tiff(width: int, height: int, data: bytes, *, bits: int, order: str = "<", photometric: int = 1, kind: int = 1):
    """A TIFF of one gray strip by hand; kind: 1 unsigned, 2 signed, 3 float."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    if kind != 1:
        tags[339] = kind
    content = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(data)) + data
    content += struct.pack(order + "H", len(tags))
    for tag, value in tags.items():
        content += struct.pack(order + "HHII", tag, 4, 1, value)
    return content + bytes(4)


def row_of(path: Path, content: bytes) -> list[tuple[int, ...]]:
    path.write_bytes(content)
    return [tuple(pixel) for pixel in pixels(path)[0].tolist()]


def grays(*values: int) -> list[tuple[int, ...]]:
    return [(value,) * 3 for value in values]


def test_gray_and_one_bit(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), np.stack([ramp] * 3, axis=-1))
    for name in ("x.png", "x.tif", "x.bmp"):
        Image.fromarray(ramp > 100).save(tmp_path / name)
        np.testing.assert_array_equal(pixels(tmp_path / name)[..., 1], np.where(ramp > 100, 255, 0))
    assert row_of(tmp_path / "x.png", png(4, 1, 2, 0, b"\0\x1b")) == grays(0, 85, 170, 255)


@pytest.mark.parametrize("name", ["x.png", "x.gif", "x.bmp", "x.tif"])
def test_palettes(tmp_path, name):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 0, 7, 8, 9])
    image.putdata([2, 0, 1])
    image.save(tmp_path / name)
    assert pixels(tmp_path / name)[0].tolist() == [[7, 8, 9], [10, 20, 30], [200, 100, 0]]


def test_transparent_pixels_are_laid_over_white_exactly(tmp_path):
    value, alpha = np.meshgrid(np.arange(256), np.arange(256))
    expected = np.floor((value * alpha + 255 * (255 - alpha)) / 255 + 0.5)
    gray = np.stack([value, alpha], axis=-1).astype(np.uint8)
    Image.fromarray(gray).save(tmp_path / "la.png")
    np.testing.assert_array_equal(pixels(tmp_path / "la.png"), np.stack([expected] * 3, axis=-1))
    rgba = np.stack([value, 255 - value, value // 2, alpha], axis=-1).astype(np.uint8)
    expected = np.floor((rgba[..., :3] * 1.0 * alpha[..., None] + 255 * (255 - alpha[..., None])) / 255 + 0.5)
    for name in ("rgba.png", "rgba.tif", "rgba.webp"):
        Image.fromarray(rgba).save(tmp_path / name, **({"lossless": True, "exact": True} if "webp" in name else {}))
        np.testing.assert_array_equal(pixels(tmp_path / name), expected)


def test_transparent_palette_entries_and_colors(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 0, 7, 8, 9])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "p.png", transparency=bytes([255, 0, 255]))
    assert pixels(tmp_path / "p.png")[0].tolist() == [[10, 20, 30], [255, 255, 255], [7, 8, 9]]
    image.save(tmp_path / "p.gif", transparency=2)
    assert pixels(tmp_path / "p.gif")[0].tolist() == [[10, 20, 30], [200, 100, 0], [255, 255, 255]]
    image.convert("RGB").save(tmp_path / "rgb.png", transparency=(200, 100, 0))
    assert pixels(tmp_path / "rgb.png")[0].tolist() == [[10, 20, 30], [255, 255, 255], [7, 8, 9]]
    assert row_of(tmp_path / "l.png", png(2, 1, 8, 0, b"\0\x10\x20", (b"tRNS", b"\0\x10"))) == grays(255, 32)
    assert row_of(tmp_path / "1.png", png(8, 1, 1, 0, b"\0\x0f", (b"tRNS", b"\0\1"))) == grays(*[0] * 4, *[255] * 4)


def test_cmyk_is_converted_without_a_profile(tmp_path):
    stored = Image.new("CMYK", (64, 16))
    for at, ink in enumerate([(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 200)]):
        stored.paste(ink, (16 * at, 0, 16 * at + 16, 16))
    expected = [[255, 255, 255], [0, 255, 255], [255, 0, 0], [55, 55, 55]]
    stored.save(tmp_path / "x.jpg", quality=95)
    stored.save(tmp_path / "x.tif")
    np.testing.assert_allclose(pixels(tmp_path / "x.jpg")[8, 8::16].astype(int), expected, atol=3)
    np.testing.assert_array_equal(pixels(tmp_path / "x.tif")[8, 8::16], expected)


def test_sixteen_bits_keep_the_upper_eight(tmp_path):
    values = [0, 0x00FF, 0x0100, 0x1234, 0x80FF, 0xFFFF]
    upper = grays(0, 0, 1, 0x12, 0x80, 0xFF)
    assert row_of(tmp_path / "x.png", png(6, 1, 16, 0, b"\0" + struct.pack(">6H", *values))) == upper
    for order in "<>":
        data = struct.pack(f"{order}6H", *values)
        assert row_of(tmp_path / "x.tif", tiff(6, 1, data, bits=16, order=order)) == upper
    color = struct.pack(">3H", 0x12FF, 0x8000, 0xFFFF)
    assert row_of(tmp_path / "x.png", png(1, 1, 16, 2, b"\0" + color)) == [(0x12, 0x80, 0xFF)]
    half = round(0x12 * 0x80 / 255 + 255 * 0x7F / 255)
    assert row_of(tmp_path / "x.png", png(1, 1, 16, 4, b"\0\x12\x34\x80\0")) == grays(half)


def test_tiffs_of_twelve_bits_and_counted_from_white(tmp_path):
    assert row_of(tmp_path / "x.tif", tiff(2, 1, b"\xff\xf8\x00", bits=12)) == grays(255, 128)
    assert row_of(tmp_path / "x.tif", tiff(2, 1, b"\x00\xf0", bits=8, photometric=0)) == grays(255, 15)
    data = struct.pack("<2H", 0x0000, 0xF012)
    assert row_of(tmp_path / "x.tif", tiff(2, 1, data, bits=16, photometric=0)) == grays(255, 15)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tiff(2, 1, struct.pack("<2I", 1, 70000), bits=32), "32-bit integer pixels have no fixed range"),
        (tiff(2, 1, struct.pack("<2i", 1, -7), bits=32, kind=2), "32-bit integer pixels have no fixed range"),
        (tiff(2, 1, struct.pack("<2f", 0.5, 7), bits=32, kind=3), "floating-point pixels have no fixed range"),
        (tiff(2, 1, struct.pack(">2f", 0.5, 7), bits=32, kind=3, order=">"), "floating-point pixels"),
    ],
)
def test_pixels_without_a_range_are_refused(tmp_path, content, reason):
    (tmp_path / "x.tif").write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        read_image(str(tmp_path / "x.tif"))


@pytest.mark.parametrize("profile", [ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(), b"no profile"])
def test_color_profiles_are_left_alone(tmp_path, profile):
    stored = image_from(STORED[1])
    Image.fromarray(stored).save(tmp_path / "x.png", icc_profile=profile)
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), stored)


# ---------------------------------------------------------------- formats


@pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning")
@pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO:UserWarning")
@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png", "x.tif", "x.mpo.jpg"])
def test_the_first_of_several_frames_counts(tmp_path, name):
    frames = [Image.new("RGB", (32, 24), color) for color in ((200, 10, 20), (10, 200, 20), (10, 20, 200))]
    kind = {"x.mpo.jpg": "MPO", "x.webp": "WEBP"}.get(name)
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(tmp_path / name, kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(tmp_path / name) as image:
        if kind == "MPO" and image.format == "JPEG":
            pytest.skip("this Pillow (11.0) writes a damaged MPO")
        assert image.n_frames == 3
    np.testing.assert_allclose(pixels(tmp_path / name).astype(int)[5, 5], (200, 10, 20), atol=2)


def test_a_progressive_jpeg_equals_its_baseline_twin(tmp_path):
    with Image.open(PHOTOS / "animals/cat.jpg") as image:
        image.save(tmp_path / "base.jpg", quality=80)
        image.save(tmp_path / "steps.jpg", quality=80, progressive=True)
    np.testing.assert_array_equal(pixels(tmp_path / "steps.jpg"), pixels(tmp_path / "base.jpg"))


@pytest.mark.skipif(not AVIF, reason="this Pillow has no AVIF")
def test_avif(tmp_path):
    Image.fromarray(image_from(STORED[1])).save(tmp_path / "x.avif", quality=95)
    assert find_images([tmp_path]).names == ["x.avif"]
    assert_same(pixels(tmp_path / "x.avif"), image_from(STORED[1]), 8)


def test_the_content_decides_not_the_extension(tmp_path):
    Image.fromarray(image_from(STORED[1])).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.jpg")
    np.testing.assert_array_equal(pixels(tmp_path / "x.jpg"), image_from(STORED[1]))


@pytest.mark.parametrize("kind", ["EPS", "PDF", "PPM", "ICO", "TGA", "PCX", "JPEG2000", "SGI", "DDS"])
def test_other_decoders_are_never_reached(tmp_path, kind):
    Image.new("RGB", (16, 16)).save(tmp_path / "x.jpg", kind)
    found = "JPEG 2000; convert it to JPEG or PNG$" if kind == "JPEG2000" else "a file that starts with "
    with pytest.raises(ImageError, match=f"^not an image: expected JPEG, PNG, .* found {found}"):
        read_image(str(tmp_path / "x.jpg"))


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0", "HEIC"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\xff\x0a\xfa\x1f\x41\x00", "JPEG XL"),
        (b"8BPS\0\1\0\0", "a Photoshop document"),
    ],
)
def test_kinds_that_are_not_read_are_named(tmp_path, start, kind):
    (tmp_path / "x.jpg").write_bytes(start + bytes(100))
    with pytest.raises(ImageError, match=f"^not an image: expected JPEG, .* found {kind}; convert it to JPEG or PNG$"):
        read_image(str(tmp_path / "x.jpg"))


# ---------------------------------------------------------------- what is no file


def test_what_is_not_a_file_is_refused_at_once(tmp_path):
    # Opening a pipe without a writer, or reading a terminal or a device, would never end.
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "socket.jpg"))  # a socket's path must be short
        for name, reason in {
            "pipe.jpg": "is not a regular file",
            "device.jpg": "is not a regular file",
            "socket.jpg": "cannot be read",
            "folder.jpg": "is a folder, not an image",
            "missing.jpg": "no such file",
            "x" * 300 + ".jpg": "cannot be read: File name too long",
        }.items():
            with pytest.raises(ImageError, match=reason):
                read_image(str(tmp_path / name))


@needs_permissions
def test_an_unreadable_file_is_refused(tmp_path):
    touch(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").chmod(0)
    with pytest.raises(ImageError, match="cannot be read: Permission denied"):
        read_image(str(tmp_path / "x.jpg"))


def test_a_fingerprint_tells_a_changed_file(tmp_path):
    path = tmp_path / "x.png"
    assert fingerprint_of(str(path)) == NO_FINGERPRINT
    Image.new("RGB", (16, 16)).save(path)
    image, before = open_image(str(path))
    image.close()
    assert before == fingerprint_of(str(path)) != NO_FINGERPRINT
    os.utime(path, ns=(0, before.mtime_ns + 1))
    assert fingerprint_of(str(path)) != before


def test_no_file_stays_open(tmp_path):
    # A run over 10^6 images would end at the limit of open files.
    for name in ("x.jpg", "x.png", "x.webp", "x.tif", "x.gif"):
        frames = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (0, 200)]
        frames[0].save(tmp_path / name, save_all=name != "x.jpg", append_images=frames[1:])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:-200])
    before = len(os.listdir("/dev/fd"))
    for path in tmp_path.iterdir():
        try:
            read_image(str(path))
        except ImageError:
            assert path.name in ("text.jpg", "cut.jpg")
    assert len(os.listdir("/dev/fd")) == before
