"""Small images, packed in every kind of archive by the library that owns the format."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Files = list[tuple[str, bytes]]


def image_bytes(number: int, *, side: int = 48) -> bytes:
    """A PNG that differs from those of other numbers."""
    content = io.BytesIO()
    Image.new("RGB", (side + number % 7, side), (number * 37 % 256, number * 11 % 256, 99)).save(content, "PNG")
    return content.getvalue()


def numbered_images(count: int) -> Files:
    return [(f"{number % 3}/{number:03}.png", image_bytes(number)) for number in range(count)]


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], mode: str = "w", mtime: float = 1.5e9) -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime
            tar.addfile(info, io.BytesIO(content))
    return path


def write_zip(path: Path, files: Iterable[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in files:
            file.writestr(zipfile.ZipInfo(name), content, method)
    return path


def write_parquet(path: Path, files: Iterable[tuple[str | None, bytes | None]], rows: int = 5) -> Path:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": content, "path": name} for name, content in files], struct)
    table = pa.table({"image": images, "label": list(range(len(images)))})
    # As `datasets` writes images: no dictionary, which would hold all of a row group.
    pq.write_table(table, path, row_group_size=rows, use_dictionary=False, write_batch_size=4)
    return path


def pack(folder: Path, kind: str, files: Files) -> Path:
    """An archive of the files; kind: its extension."""
    path = folder / f"pack.{kind}"
    if kind == "zip":
        return write_zip(path, files)
    if kind == "parquet":
        return write_parquet(path, files)
    compression = {"tar": "w", "tar.gz": "w:gz", "tgz": "w:gz", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}
    if kind != "tar.zst":
        return write_tar(path, files, compression[kind])
    plain = write_tar(folder / "plain.tar", files).read_bytes()
    with pa.OSFile(str(path), "wb") as file, pa.CompressedOutputStream(file, "zstd") as stream:
        stream.write(plain)
    return path


KINDS = ["tar", "tar.gz", "tgz", "tar.bz2", "tar.xz", "tar.zst", "zip", "parquet"]
