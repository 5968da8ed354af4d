"""Members of zip archives, held against `zipfile`, and what is wrong with some."""

from __future__ import annotations

import io
import random
import stat
import struct
import time
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packing import image_bytes, numbered_images, write_zip

from sppfeat.errors import ImageError
from sppfeat.images import find_images, read_image
from sppfeat.images.blobs import Blob
from sppfeat.images.zip_files import zip_members

METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]


class NoSeek(io.RawIOBase):
    """A file that zipfile cannot seek in, so that sizes follow the bytes."""

    def __init__(self) -> None:
        self.content = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.content += data
        return len(data)


@given(
    st.lists(st.tuples(st.binary(max_size=3000), st.sampled_from(METHODS)), max_size=6),
    st.booleans(),
    st.binary(max_size=40),
    st.binary(max_size=60),
    st.booleans(),
)
def test_every_zip_is_read_as_zipfile_reads_it(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[tuple[bytes, int]],
    streamed: bool,
    before: bytes,
    comment: bytes,
    wide: bool,
) -> None:
    target = NoSeek() if streamed else io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        if wide:
            patch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 0)
        with zipfile.ZipFile(target, "w") as file:  # type: ignore[arg-type]
            for at, (content, method) in enumerate(files):
                info = zipfile.ZipInfo(f"ü/{at}.png")
                info.compress_type = method
                with file.open(info, "w", force_zip64=wide) as member:
                    member.write(content)
            file.comment = comment
    content = bytes(target.content) if isinstance(target, NoSeek) else target.getvalue()
    path = tmp_path_factory.mktemp("zip") / "x.zip"
    path.write_bytes((b"" if wide else before) + content)
    try:
        with zipfile.ZipFile(path) as file:
            expected = [(info.filename, file.read(info)) for info in file.infolist()]
    except zipfile.BadZipFile:
        return  # a comment may hold what looks like an end
    found = list(zip_members(Blob.at(str(path)), Counter()))
    assert [member.name for member in found] == [name for name, _ in expected]
    for member, (_, content) in zip(found, expected, strict=True):
        assert member.content is not None
        raw, _ = member.content.open()
        assert raw.read() == content
        raw.close()


def test_a_truncated_zip_keeps_all_members_before_the_break(tmp_path: Path) -> None:
    files = numbered_images(6)
    path = write_zip(tmp_path / "x.zip", files)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        ends = [i.header_offset + 30 + len(i.filename) + i.compress_size for i in file.infolist()]
    for cut in random.Random(1).sample(range(1, len(whole) - 22), 60):
        path.write_bytes(whole[:cut])
        found = find_images([path])
        good = [item for item in found.items if item.problem is None]
        assert len(good) == sum(end <= cut for end in ends)
        assert found.names == [f"x.zip/{name}" for name, _ in files[: len(good)]] + ["x.zip/(rest)"]
        assert "cut off" in found.items[-1].problem or "is not a zip" in found.items[-1].problem
        for item, (_, content) in zip(good, files, strict=False):
            assert item.open()[0].read() == content


def test_a_truncated_zip_whose_sizes_follow_the_bytes(tmp_path: Path) -> None:
    files = numbered_images(5)
    target = NoSeek()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:  # type: ignore[arg-type]
        for name, content in files:
            file.writestr(name, content)
    path = tmp_path / "x.zip"
    path.write_bytes(target.content[: target.content.index(b"PK\1\2")])
    found = find_images([path])
    assert len(found.items) == 6 and found.names[-1] == "x.zip/(rest)"
    assert [item.open()[0].read() for item in found.items[:5]] == [content for _, content in files]


def test_a_bomb_is_a_failed_row_in_bounded_memory_and_time(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", [("bomb.png", b"\0" * (400 << 20)), ("liar.png", b"\0" * (60 << 20))])
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\1\2")
    content[entry + 24 : entry + 28] = struct.pack("<L", 1_000_000)  # it claims to be small
    path.write_bytes(content)
    tracemalloc.start()
    start = time.perf_counter()
    bomb, liar = find_images([path]).items
    with pytest.raises(ImageError, match="image of 419,430,400 bytes: expected at most 134,217,728 here"):
        read_image(bomb)
    with pytest.raises(ImageError, match="damaged: expected 1,000,000 bytes when unpacked, as declared, found more"):
        read_image(liar)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    assert time.perf_counter() - start < 2


def test_members_that_cannot_be_read_have_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("lzma.png", image_bytes(1), zipfile.ZIP_LZMA)
        file.writestr("secret.png", image_bytes(2))
        file.writestr("damaged.png", image_bytes(3))
        link = zipfile.ZipInfo("link.png")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "/etc/passwd")
        file.mkdir("folder.png")
        file.writestr("good.png", image_bytes(4))
    content = bytearray(path.read_bytes())
    content[content.index(image_bytes(3)) + 60] ^= 1
    entry = content.index(b"secret.png", content.index(b"PK\1\2"))
    content[entry - 46 + 8] |= 1
    path.write_bytes(content)
    found = {item.name.removeprefix("x.zip/"): item for item in find_images([path]).items}
    reasons = {}
    for name, item in found.items():
        try:
            read_image(item)
        except ImageError as error:
            reasons[name] = str(error)
    damaged = reasons.pop("damaged.png")
    assert "cannot be decoded" in damaged or "damaged" in damaged
    assert reasons == {
        "lzma.png": "is compressed by method 14: expected stored, deflate or bzip2 (0, 8 or 12)",
        "secret.png": "is encrypted, which is not supported",
        "link.png": "is a symbolic link, not an image",
        "folder.png": "is a folder, not an image",
    }


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    one = find_images([write_zip(tmp_path / "x.zip", numbered_images(3))]).items
    other = find_images([write_zip(tmp_path / "y.zip", numbered_images(3), zipfile.ZIP_STORED)]).items
    assert [item.fingerprint() for item in one] == [item.fingerprint() for item in other]
    assert len({item.fingerprint() for item in one}) == 3


@given(st.binary(max_size=400), st.integers(0, 2**32))
def test_damage_is_a_reason_and_never_another_error(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, seed: int
) -> None:
    path = write_zip(tmp_path_factory.mktemp("zip") / "x.zip", numbered_images(4))
    content = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(len(content))
    content[place : place + len(noise)] = noise
    path.write_bytes(content)
    for item in find_images([path]).items:
        try:
            item.open()[0].close()
        except ImageError as error:
            assert str(path) not in str(error) and "\n" not in str(error)
