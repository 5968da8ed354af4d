"""Members of tar archives, held against `tarfile`, and what is wrong with some."""

from __future__ import annotations

import gzip
import io
import random
import re
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packing import image_bytes, numbered_images, write_tar

from sppfeat.errors import ImageError
from sppfeat.images import find_images, open_sources
from sppfeat.images.blobs import Blob
from sppfeat.images.tar_files import TarMember, _reader, tar_members

LONG = "/".join(["folder" * 6] * 8) + "/ü.png"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a.png", "b/c.jpg", "notes.txt", LONG, "x" * 99 + ".png", "x" * 300 + ".gif", "名.png"]),
            st.binary(max_size=1500),
            st.sampled_from([0, 1.5e9, 1234567890.25]),
        ),
        max_size=8,
    ),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_every_format_is_read_as_tarfile_reads_it(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, bytes, float]], form: int
) -> None:
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for name, content, mtime in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime
            try:
                tar.addfile(info, io.BytesIO(content))
            except ValueError:  # a name that ustar has no room for
                assert form == tarfile.USTAR_FORMAT
    with tarfile.open(path) as tar:
        expected = [
            (info.name, file.read(), int(info.mtime * 10**9))
            for info in tar
            if info.name[-4:] != ".txt" and (file := tar.extractfile(info))
        ]
    archive = Blob.at(str(path))
    found = []
    for member in tar_members(archive, Counter()):
        assert isinstance(member.content, TarMember) and member.problem is None
        found.append((member.name, archive.read(member.content.start, member.content.size), member.content.mtime_ns))
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    # `tarfile` keeps times as floats.
    times = [mtime or archive.stamp for _, _, mtime in expected]
    assert [entry[2] for entry in found] == pytest.approx(times, rel=1e-15)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_truncated_tar_keeps_all_members_before_the_break(tmp_path: Path, mode: str) -> None:
    files = numbered_images(6)
    path = write_tar(tmp_path / ("x.tar" if mode == "w" else "x.tar.gz"), files, mode)
    whole = path.read_bytes()
    ends = []
    with tarfile.open(path) as tar:
        ends = [info.offset_data + info.size for info in tar]
    packed = gzip.compress(write_tar(tmp_path / "plain.tar", files).read_bytes())
    for cut in random.Random(1).sample(range(1, ends[-1] + 512), 60):
        path.write_bytes(whole[:cut] if mode == "w" else packed[: len(packed) * cut // ends[-1]])
        found = find_images([path])
        good = [item for item in found.items if item.problem is None]
        if mode == "w":
            assert len(good) == sum(end <= cut for end in ends)
        assert found.names == [f"{path.name}/{name}" for name, _ in files[: len(good)]] + (
            [f"{path.name}/(rest)"] if len(found.items) > len(good) else []
        )
        if len(good) < 6:
            assert re.search("cut off|cannot be read further|is not a tar", found.items[-1].problem)
        for item, (_, content) in zip(good, files, strict=False):
            assert item.open()[0].read() == content


def test_a_damaged_header_ends_the_archive_with_its_place(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", numbered_images(4))
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        place = tar.getmembers()[2].offset
    content[place + 20] ^= 0xFF
    path.write_bytes(content)
    found = find_images([path])
    assert len(found.items) == 3
    assert found.problems["x.tar/(rest)"] == f"archive is damaged: header at byte {place:,}: bad checksum"


def test_damaged_gzip_fails_its_members_and_the_rest(tmp_path: Path) -> None:
    files = [(f"{at}.png", random.Random(at).randbytes(200_000)) for at in range(8)]
    path = write_tar(tmp_path / "x.tgz", files, "w:gz")
    sound = find_images([path]).items
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    found = find_images([path])
    # Random bytes are stored as they are, so that only the checksum at the end tells.
    assert len(found.items) == 9
    assert found.problems["x.tgz/(rest)"].startswith("archive cannot be read further: CRC check failed")
    with pytest.raises(ImageError, match="changed after it was listed"):
        sound[0].open()


def test_links_devices_and_folders(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
            ("folder.png", tarfile.DIRTYPE),
            ("folder", tarfile.DIRTYPE),
            ("other", tarfile.SYMTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("good.png")
        info.size = len(image_bytes(1))
        tar.addfile(info, io.BytesIO(image_bytes(1)))
    assert find_images([tmp_path / "x.tar"]).problems == {
        "x.tar/link.png": "is a symbolic link, not an image",
        "x.tar/hard.png": "is a hard link to another member, not an image",
        "x.tar/pipe.png": "is not a regular file",
        "x.tar/folder.png": "is a folder, not an image",
    }
    assert len(find_images([tmp_path / "x.tar"]).items) == 5


def test_a_header_that_claims_gigabytes_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 8 << 30
    plain = info.tobuf(tarfile.GNU_FORMAT) + b"\0" * (64 << 20)
    (tmp_path / "x.tgz").write_bytes(gzip.compress(plain, 1))
    tracemalloc.start()
    found = find_images([tmp_path / "x.tgz"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.problems == {"x.tgz/(rest)": f"archive is damaged: headers of {8 << 30:,} bytes at byte 0"}
    assert peak < 8 << 20


def test_headers_without_a_member_are_not_collected(tmp_path: Path) -> None:
    parts = []
    for at in range(64):
        info = tarfile.TarInfo("pax")
        info.type, info.size = tarfile.XHDTYPE, 1 << 19
        parts += [info.tobuf(tarfile.GNU_FORMAT), f"524288 {at:06}=".encode().ljust((1 << 19) - 1, b"x") + b"\n"]
    (tmp_path / "x.tgz").write_bytes(gzip.compress(b"".join(parts), 1))
    tracemalloc.start()
    found = find_images([tmp_path / "x.tgz"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.problems == {"x.tgz/(rest)": f"archive is damaged: headers of {3 << 19:,} bytes at byte 1,049,600"}
    assert peak < 8 << 20


def test_a_member_that_is_too_large_to_be_held_is_a_failed_row(tmp_path: Path) -> None:
    plain = tarfile.TarInfo("bomb.png")
    plain.size = 300 << 20
    with gzip.open(tmp_path / "x.tgz", "wb", 1) as file:
        file.write(plain.tobuf())
        for _ in range(300):
            file.write(b"\0" * (1 << 20))
        file.write(b"\0" * 1024)
    (item,) = find_images([tmp_path / "x.tgz"]).items
    with pytest.raises(ImageError, match=r"image of 314,572,800 bytes: expected at most 134,217,728 here"):
        item.open()


def test_in_order_a_compressed_tar_is_read_once(tmp_path: Path) -> None:
    files = [(f"{at}.png", random.Random(at).randbytes(50_000)) for at in range(60)]
    items = find_images([write_tar(tmp_path / "x.tgz", files, "w:gz")]).items
    for at in [1, 0, 3, 2, *range(4, 60)]:  # as decoding threads ask
        assert items[at].open()[0].read() == files[at][1]
    assert isinstance(items[0].content, TarMember)
    assert _reader(items[0].content.archive, "gz").passes == 1


def test_listing_holds_little_for_each_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sppfeat.images.members._RECENT", 500)

    def peak(count: int) -> int:
        path = write_tar(tmp_path / f"{count}.tar", ((f"{at}.png", b"x") for at in range(count)))
        stream = open_sources([path])
        tracemalloc.start()
        assert sum(1 for _ in stream) == count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(2000), peak(10_000)
    assert (many - few) / 8000 < 60  # bytes for each; names alone would take more


@given(st.binary(max_size=300), st.integers(0, 2**32), st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_damage_is_a_reason_and_never_another_error(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, seed: int, form: int
) -> None:
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in [("n" * 120 + ".png", image_bytes(1)), *numbered_images(3)]:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.25
            tar.addfile(info, io.BytesIO(content))
    content = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(len(content))
    content[place : place + len(noise)] = noise
    path.write_bytes(content)
    for item in find_images([path]).items:
        try:
            item.open()[0].close()
        except ImageError as error:
            assert str(path) not in str(error) and "\n" not in str(error)
