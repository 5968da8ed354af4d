"""The files of a gallery: how they are written so that it is whole at every moment, and read without trusting them.

    gallery.json          what it is and which files make it up; the recipe, the index, the projection, the stores
    index-N.faiss         the FAISS index; its row i is ...
    rows-N.h5             ... /names[i], from the folder /roots[/root[i]], with /checksum[i] of its row in the store
    projection-N.npz      mean, matrix, eigenvalues; none without a projection

A change writes files of the next number N beside the present ones, then replaces `gallery.json`, then removes what it
no longer names. Whoever is stopped in between leaves the old gallery or the new one, whole; a reader never sees a mix.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np

from sppfeat._version import __version__
from sppfeat.errors import GalleryError, one_line
from sppfeat.files import GALLERY, NOUNS, appearing, format_of, os_reason, sync_folder
from sppfeat.index import faiss_reason, load_faiss, typed
from sppfeat.rows import Box, picture_of
from sppfeat.untrusted import check_hdf5
from sppfeat.whitening import Projection, write_projection

FORMAT_VERSION: Final = 1
DESCRIPTION: Final = "gallery.json"
_OURS: Final = re.compile(r"\.?(index|rows|projection)-\d+\.(faiss|h5|npz)(\.partial)?|\.gallery\.json\.partial")
_LIBRARIES: Final = ("faiss-cpu", "faiss-gpu", "numpy", "h5py")


@dataclass(frozen=True)
class GalleryRows:
    """What is known of each row of an index.

    names: [N], each once. roots: folders that names are relative to. root: [N] which of them. checksum: [N] of the row
    in the store, by which a changed picture is told from the same one.
    """

    names: list[str]
    roots: list[str]
    root: np.ndarray
    checksum: np.ndarray

    def picture(self, row: int) -> tuple[str, Box | None]:
        """Where the picture of a row was when it was described, and its window where the row is one's."""
        return picture_of(self.roots[int(self.root[row])], self.names[row])


def read_about(path: Path) -> dict[str, Any]:
    """A gallery's JSON. Raises GalleryError when the folder is no gallery that this version reads."""
    require_gallery(path)
    try:
        about = json.loads((path / DESCRIPTION).read_text("utf-8"))
        number = int(about["format_version"])
        if number > FORMAT_VERSION:
            raise GalleryError(
                f"{path}: its format {number} is newer than this sppfeat reads ({FORMAT_VERSION}): update sppfeat"
            )
        return dict(about) | {"generation": int(about["generation"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GalleryError(f"{path}: expected a gallery that is whole, found: {one_line(error)}") from None


def require_gallery(path: Path) -> None:
    if format_of(path) == GALLERY and path.is_dir():
        return
    if not path.exists():
        found = "no such folder"
    elif not path.is_dir():
        found = NOUNS.get(str(format_of(path)), "a file") + " (a gallery is a folder)"
    elif (path / DESCRIPTION).exists():
        found = f"a folder whose {DESCRIPTION} is not that of a gallery"
    elif any(_OURS.fullmatch(name) for name in os.listdir(path)):
        found = "one that was interrupted before it was whole; build it again with `sppfeat index`"
    else:
        found = f"a folder without {DESCRIPTION}"
    raise GalleryError(f"{path}: expected a gallery, found {found}")


def checked_file(path: Path, entry: Mapping[str, Any]) -> Path:
    name = str(entry["file"])
    if not _OURS.fullmatch(name):
        raise GalleryError(f"{path}: expected a file of a gallery, found {name!r}")
    try:
        size = os.stat(path / name).st_size
    except OSError as error:
        raise GalleryError(f"{path / name}: belongs to the gallery, and cannot be read: {os_reason(error)}") from None
    if size != entry["bytes"]:
        raise GalleryError(f"{path / name}: expected {entry['bytes']} bytes, found {size}")
    return path / name


def read_index_file(file: Path) -> Any:
    try:
        return typed(load_faiss().read_index(str(file)))
    except (RuntimeError, MemoryError, TypeError) as error:
        raise GalleryError(f"{file}: expected a FAISS index that is whole, found: {faiss_reason(error)}") from None


def read_rows(file: Path, count: int) -> GalleryRows:
    try:
        check_hdf5(file)
        with h5py.File(file, "r", locking=False) as content:
            rows = GalleryRows(
                content["names"].asstr()[:].tolist(),
                [os.fsdecode(bytes(root)) for root in content["roots"][:]],
                content["root"][:],
                content["checksum"][:],
            )
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise GalleryError(f"{file}: expected the names of a gallery, found: {one_line(error)}") from None
    lengths = {len(rows.names), len(rows.root), len(rows.checksum), count}
    if len(lengths) > 1 or (count and not 0 <= rows.root.min() <= rows.root.max() < len(rows.roots)):
        raise GalleryError(f"{file}: expected {count} names, one a row, found {len(rows.names)}")
    return rows


def write_generation(
    path: Path,
    about: dict[str, Any],
    index: Any,
    rows: GalleryRows,
    projection: Projection | None,
    *,
    previous: dict[str, Any] | None,
) -> None:
    """Write the next generation of files, then let `gallery.json` name them, then remove the others.

    Hold `lock_store`. previous: where the projection's file is kept from it.
    """
    if index.ntotal != len(rows.names) or len(rows.names) != len(rows.root):
        raise GalleryError(f"{path}: {index.ntotal} rows in the index, {len(rows.names)} names; nothing is written")
    numbers = [int(number) for name in os.listdir(path) if _OURS.fullmatch(name) for number in re.findall(r"\d+", name)]
    generation = max(numbers, default=0) + 1
    files: dict[str, Any] = {}

    def put(kind: str, suffix: str, write: Callable[[Path], None]) -> None:
        file = path / f"{kind}-{generation}.{suffix}"
        write(file)
        files[kind] = {"file": file.name, "bytes": file.stat().st_size, "crc32": crc32_of(file)}

    put("index", "faiss", lambda file: _write_index(file, index))
    put("rows", "h5", lambda file: _write_rows(file, rows))
    if previous is not None and "projection" in previous["files"]:
        files["projection"] = previous["files"]["projection"]
    elif projection is not None:
        put("projection", "npz", lambda file: write_projection(file, projection))
    about |= {"generation": generation, "rows": len(rows.names), "files": files, "versions": _versions()}
    with appearing(path / DESCRIPTION, GalleryError) as partial:
        partial.write_text(json.dumps(about, indent=1), "utf-8")
    _remove_others(path, {str(entry["file"]) for entry in files.values()})


def _remove_others(path: Path, kept: set[str]) -> None:
    """Remove the files of other generations, and what interrupted writers left."""
    for name in os.listdir(path):
        if _OURS.fullmatch(name) and name not in kept:
            with contextlib.suppress(OSError):
                os.unlink(path / name)


def _write_index(file: Path, index: Any) -> None:
    with appearing(file, GalleryError) as partial:
        try:
            load_faiss().write_index(index, str(partial))
        except RuntimeError as error:
            raise GalleryError(f"{file}: cannot be written: {faiss_reason(error)}") from None


def _write_rows(file: Path, rows: GalleryRows) -> None:
    with appearing(file, GalleryError) as partial, h5py.File(partial, "w", locking=False) as content:
        content.create_dataset("names", data=np.asarray(rows.names, dtype=object), dtype=h5py.string_dtype())
        # Paths may hold any byte; HDF5's text may not.
        roots = [np.frombuffer(os.fsencode(root), np.uint8) for root in rows.roots]
        table = content.create_dataset("roots", (len(roots),), dtype=h5py.vlen_dtype(np.uint8))
        for number, root in enumerate(roots):
            table[number] = root
        content["root"] = np.asarray(rows.root, np.int32)
        content["checksum"] = np.asarray(rows.checksum, np.uint32)


def crc32_of(file: Path) -> int:
    found = 0
    with open(file, "rb") as content:
        while block := content.read(1 << 24):
            found = zlib.crc32(block, found)
    return found


@contextlib.contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """The folder, made if needed; and gone again if nothing came to lie in it."""
    try:
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise GalleryError(f"{path}: cannot be made: {os_reason(error)}") from None
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            path.rmdir()
        raise


def check_new_gallery(path: Path, *, overwrite: bool) -> None:
    """Raise GalleryError unless a gallery can be built at a path: nothing, an empty folder, or one to overwrite."""
    if not path.parent.is_dir():
        raise GalleryError(f"{path}: expected its folder {path.parent} to exist, found none")
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise GalleryError(f"{path}: expected a gallery's folder or nothing, found a file; it is left as it is")
    if format_of(path) == GALLERY:
        if not overwrite:
            raise GalleryError(f"{path}: exists already; choose another output, --overwrite or --add-to")
    elif foreign := [name for name in os.listdir(path) if not _OURS.fullmatch(name)]:
        raise GalleryError(
            f"{path}: expected a gallery or an empty folder, found {min(foreign)!r} in it; it is left as it is"
        )


def _versions() -> dict[str, str]:
    found = {"sppfeat": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[library] = version(library)
    return found
