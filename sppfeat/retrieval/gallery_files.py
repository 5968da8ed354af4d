"""The files of a gallery: written so that it is complete at every moment, and read without trusting them.

    gallery.json          what it is and which files belong to it; the recipe, the index, the projection, the stores
    index-N.faiss         the FAISS index; its row i is ...
    rows-N.h5             ... /names[i], from the folder /roots[/root[i]], with /checksum[i] of its row in the store
    projection-N.npz      mean, matrix, eigenvalues; none without a projection
    bins-N.h5             what parts are found in, see `bins`; only if it was asked for, and so are ...
    channels-N.npz        ... what was learned of their channels, see `channels`, and ...
    regions-N.faiss       ... if images are many, which of them are worth a look, see `regions`
    map-N.npz             a point for each row, see `map`; only if it was asked for, and no longer once rows change

Rows added to a large gallery have an index, rows and bins of their own, which every addition writes again, while those
of the base stay as they are: see `segments`. Rows of the base come first.

A change writes files of the next number N beside the current ones, then replaces `gallery.json`, then removes the files
it no longer names. An interrupted change leaves the old gallery or the new one, complete; a reader never sees a mix.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import h5py
import msgspec
import numpy as np

from sppfeat._version import __version__
from sppfeat.errors import GalleryError, near_path, one_line
from sppfeat.files import (
    GALLERY,
    appearing,
    appearing_hdf5,
    decode_document,
    format_of,
    open_hdf5,
    os_reason,
    sync_folder,
    unsafe_name,
)
from sppfeat.images import absolute, found_instead
from sppfeat.retrieval.about import About, AddedEntries, FileEntries, FileEntry, Version
from sppfeat.retrieval.arrays import write_arrays
from sppfeat.retrieval.bins import BinSource, write_bins, write_channels
from sppfeat.retrieval.faiss_library import faiss_reason, load_faiss
from sppfeat.retrieval.map import write_map
from sppfeat.retrieval.regions import write_regions
from sppfeat.retrieval.whitening import Projection
from sppfeat.store import Box, image_of, lock_store

FORMAT_VERSION: Final = 1
# Parts are looked for in every image of a gallery up to this size, which takes about a second on two cores; in a larger
# one, in the images with the nearest regions.
ALL_ROWS: Final = 20_000
DESCRIPTION: Final = "gallery.json"
_OURS: Final = re.compile(
    r"\.?(index|rows|projection|bins|channels|regions|map)-\d+\.(faiss|h5|npz)(\.partial)?|\.gallery\.json\.partial"
)
_LOCK: Final = ".lock"  # of `lock_store`
_SUFFIXES: Final = {
    "index": "faiss",
    "rows": "h5",
    "projection": "npz",
    "bins": "h5",
    "channels": "npz",
    "regions": "faiss",
    "map": "npz",
}
_LIBRARIES: Final = ("faiss-cpu", "faiss-gpu", "numpy", "h5py")


@dataclass(frozen=True)
class GalleryRows:
    """The name, folder and checksum of each row of an index.

    names: [N], unique. roots: folders that names are relative to. root: [N] which of them. checksum: [N] of the row
    in the store; it tells a changed image from an unchanged one.
    """

    names: list[str]
    roots: list[str]
    root: np.ndarray
    checksum: np.ndarray

    def image(self, row: int) -> tuple[str, Box | None]:
        """The path of a row's image when it was described, and the window if the row describes one."""
        return image_of(self.roots[int(self.root[row])], self.names[row])

    def only(self, keep: np.ndarray) -> GalleryRows:
        """The rows at these positions."""
        return GalleryRows([self.names[row] for row in keep.tolist()], self.roots, self.root[keep], self.checksum[keep])

    def followed_by(self, other: GalleryRows) -> GalleryRows:
        """These rows, then others."""
        roots = list(dict.fromkeys([*self.roots, *other.roots]))
        moved = np.array([roots.index(root) for root in other.roots], np.int64)[other.root]
        return GalleryRows(
            self.names + other.names,
            roots,
            np.append(self.root, moved),
            np.append(self.checksum, other.checksum),
        )


@dataclass(frozen=True)
class Content:
    """What is written of the base, or of the added rows.

    bins: None for a gallery without. regions: an index of the regions of its first rows, to be continued, if any.
    """

    index: Any
    rows: GalleryRows
    bins: BinSource | None
    regions: Any = None


@dataclass(frozen=True)
class _RowFiles:
    index: FileEntry
    rows: FileEntry
    bins: FileEntry | None
    regions: FileEntry | None


def read_about(path: Path) -> About:
    """A gallery's JSON. Raises GalleryError if the folder is not a gallery that this version can read."""
    require_gallery(path)
    what = f"{path}: expected a complete gallery"
    try:
        content = (path / DESCRIPTION).read_bytes()
    except OSError as error:
        raise GalleryError(f"{what}, found: {os_reason(error)}") from None
    number = decode_document(content, Version, what=what, error=GalleryError).format_version
    if number > FORMAT_VERSION:
        raise GalleryError(
            f"{path}: its format {number} is newer than this sppfeat can read ({FORMAT_VERSION}): update sppfeat"
        )
    about = decode_document(content, About, what=what, error=GalleryError)
    if (about.projection is None) != (about.files.projection is None):
        raise GalleryError(f"{what}, found a projection without its file, or the other way round")
    if len({about.bins is None, about.files.bins is None, about.files.channels is None}) > 1:
        raise GalleryError(f"{what}, found bins without their files, or the other way round")
    if (added := about.files.added) is not None:
        if about.base_rows < 1:
            raise GalleryError(f"{what}, found {added.count} added rows of {about.rows}")
        if (added.bins is None) != (about.files.bins is None):
            raise GalleryError(f"{what}, found bins of some of its rows alone")
    return about


def require_gallery(path: Path) -> None:
    if format_of(path) == GALLERY and path.is_dir():
        return
    if not path.exists():
        found = "no such folder" + (near_path(path) or "; first: sppfeat index feats.h5 -o gallery/")
    elif not path.is_dir():
        found = found_instead(path, GALLERY) or "a file (a gallery is a folder)"
    elif (path / DESCRIPTION).exists():
        found = f"a folder whose {DESCRIPTION} is not that of a gallery"
    elif any(_OURS.fullmatch(name) for name in os.listdir(path)):
        found = "one that was interrupted before it was complete; build it again with `sppfeat index`"
    else:
        found = found_instead(path, GALLERY) or f"a folder without {DESCRIPTION}"
    raise GalleryError(f"{path}: expected a gallery, found {found}")


def checked_file(path: Path, kind: str, entry: FileEntry, *, content: bool = True) -> Path:
    """A file of the gallery, checked for the bytes that were written. Raises GalleryError.

    It is read whole: at 1.7 to 2.5 GB/s that takes less time than FAISS needs to read an index. content: False: only
    its length is checked, of a file in which any bytes are values.
    """
    file = path / entry.file
    if not re.fullmatch(rf"{kind}-\d+\.{_SUFFIXES[kind]}", entry.file, re.ASCII):
        raise GalleryError(f"{path}: expected the name of a gallery file, found {entry.file!r}")
    try:
        info = os.stat(file)
        if not stat.S_ISREG(info.st_mode):
            raise GalleryError(f"{file}: expected a file, found something else")
        if info.st_size != entry.bytes:
            raise GalleryError(f"{file}: expected {entry.bytes} bytes, found {info.st_size}")
        if content and crc32_of(file) != entry.crc32:
            raise GalleryError(f"{file}: is damaged: its bytes do not match their checksum")
    except OSError as error:
        raise GalleryError(f"{file}: belongs to the gallery, but could not be read: {os_reason(error)}") from None
    return file


def read_rows(file: Path, count: int) -> GalleryRows:
    """The names, folders and checksums of `count` rows. Raises GalleryError for any other file.

    Names that lead out of their folder are also rejected: pages show the images that names lead to.
    """
    try:
        with open_hdf5(file, None, FORMAT_VERSION, GalleryError) as content:
            for column in ("names", "root", "checksum"):
                if content[column].shape != (count,):
                    raise GalleryError(f"{file}: expected {count} {column}, one per row, found {content[column].shape}")
            rows = GalleryRows(
                content["names"].asstr()[:].tolist(),
                [os.fsdecode(np.asarray(root, np.uint8).tobytes()) for root in content["roots"][:]],
                content["root"][:].astype(np.int64, casting="safe"),
                content["checksum"][:].astype(np.uint32, casting="safe"),
            )
    except GalleryError:
        raise
    except Exception as error:  # h5py raises nearly anything on unexpected input, unknown encodings included
        raise GalleryError(f"{file}: expected the names of a gallery, found: {one_line(error)}") from None
    if count and not 0 <= rows.root.min() <= rows.root.max() < len(rows.roots):
        raise GalleryError(f"{file}: expected every row in one of {len(rows.roots)} folders")
    for root in rows.roots:
        if not os.path.isabs(root) or "\0" in root:
            raise GalleryError(f"{file}: expected the absolute path of a folder, found {root!r}")
    check_names(file, rows.names)
    return rows


def check_names(file: Path | str, names: Sequence[str]) -> None:
    """Raise GalleryError for a name that leads out of the folder that it is relative to."""
    for row, name in enumerate(names):
        if (reason := unsafe_name(name)) is not None:
            raise GalleryError(
                f"{file}: row {row} ({name!r}): expected a name inside its folder, found one that {reason}"
            )


@contextlib.contextmanager
def changing(path: Path) -> Iterator[None]:
    """Lock a gallery's folder for changes, and first remove what interrupted writers left.

    Raises StoreBusyError while another process holds the lock, and GalleryError for a folder that is not writable.
    """
    with lock_store(path):
        try:
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise GalleryError(f"{path}: is not writable: {os_reason(error)}") from None
        if not (path / DESCRIPTION).exists():
            _remove_others(path, set())
        else:
            # Files of an unreadable description may still be needed.
            with contextlib.suppress(GalleryError):
                _remove_others(path, {entry.file for entry in read_about(path).entries})
        yield


def write_generation(
    path: Path,
    about: About,
    projection: Projection | None,
    base: Content | None,
    added: Content | None = None,
    *,
    previous: About | None,
) -> About:
    """Write the next generation of files, then let `gallery.json` name them, then remove the others.

    Call it within `changing`. base: None: that of `previous` stays as it is. added: rows after it. previous: its
    projection is kept, and so are its channels unless there is a new base; its map is not, since it is of other rows.
    Returns the description as written.
    """
    for content in (base, added):
        if content is not None and not content.index.ntotal == len(content.rows.names) == len(content.rows.root):
            raise GalleryError(
                f"{path}: {content.index.ntotal} rows in the index, {len(content.rows.names)} names; nothing is written"
            )
    generation = _next_generation(path)

    def put(kind: str, write: Callable[[Path], None]) -> FileEntry:
        return _put(path, kind, generation, write)

    def put_rows(content: Content) -> _RowFiles:
        index = put("index", lambda file: _write_index(file, content.index))
        rows = put("rows", lambda file: _write_rows(file, content.rows))
        bins = regions = None
        if (source := content.bins) is not None:
            bins = put("bins", lambda file: write_bins(file, source))
            if len(source) > ALL_ROWS:
                regions = put("regions", lambda file: write_regions(file, source, content.regions))
        return _RowFiles(index, rows, bins, regions)

    if base is not None:
        files = put_rows(base)
        count = len(base.rows.names)
    elif previous is not None:
        old = previous.files
        files = _RowFiles(old.index, old.rows, old.bins, old.regions)
        count = previous.base_rows
    else:
        raise ValueError("expected a base, or the gallery that has it")
    learned = None if previous is None else previous.files.projection
    if learned is None and projection is not None:
        arrays = {"mean": projection.mean, "matrix": projection.matrix, "eigenvalues": projection.eigenvalues}
        learned = put("projection", lambda file: write_arrays(file, arrays))
    channels = None if previous is None else previous.files.channels
    if base is not None and (source := base.bins) is not None:
        channels = put("channels", lambda file: write_channels(file, source.channels))
    later = None
    if added is not None:
        generation += base is not None
        later = AddedEntries(count=len(added.rows.names), **vars(put_rows(added)))
    about = msgspec.structs.replace(
        about,
        generation=generation,
        rows=count + (0 if later is None else later.count),
        files=FileEntries(**vars(files), projection=learned, channels=channels, added=later),
        versions=_versions(),
    )
    _publish(path, about)
    return about


def write_map_generation(path: Path, about: About, points: np.ndarray) -> About:
    """Write a map of a gallery's rows, [N, 2], beside its other files, and let `gallery.json` name it; see
    `write_generation`."""
    generation = _next_generation(path)
    entry = _put(path, "map", generation, lambda file: write_map(file, points))
    files = msgspec.structs.replace(about.files, map=entry)
    about = msgspec.structs.replace(about, generation=generation, files=files)
    _publish(path, about)
    return about


def _next_generation(path: Path) -> int:
    ours = filter(_OURS.fullmatch, os.listdir(path))
    return max((int(number) for name in ours for number in re.findall(r"-(\d+)\.", name)), default=0) + 1


def _put(path: Path, kind: str, generation: int, write: Callable[[Path], None]) -> FileEntry:
    file = path / f"{kind}-{generation}.{_SUFFIXES[kind]}"
    write(file)
    return FileEntry(file=file.name, bytes=file.stat().st_size, crc32=crc32_of(file))


def _publish(path: Path, about: About) -> None:
    """Let `gallery.json` name a description's files, then remove the others."""
    with appearing(path / DESCRIPTION, GalleryError) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(about), indent=1))
    _remove_others(path, {entry.file for entry in about.entries})


def path_text(path: str | os.PathLike[str]) -> str:
    r"""The absolute path, or the URL, as JSON can hold it: a byte that is not UTF-8 as `\xNN`."""
    return os.fsencode(absolute(path)).decode("utf-8", "backslashreplace")


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
    with appearing_hdf5(file, GalleryError) as content:
        content.create_dataset("names", data=np.asarray(rows.names, dtype=object), dtype=h5py.string_dtype())
        # Paths may hold any byte; HDF5 text may not.
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
    """The folder, created if needed; a new one is removed again if it stays empty."""
    there = path.is_dir()
    try:
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise GalleryError(f"{path}: could not be created: {os_reason(error)}") from None
    try:
        yield
    except BaseException:
        if not there:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def check_new_gallery(path: Path, *, overwrite: bool) -> None:
    """Raise GalleryError unless a gallery can be built at a path: nothing, an empty folder, or one to overwrite."""
    if not path.parent.is_dir():
        raise GalleryError(f"{path}: its folder {path.parent} does not exist")
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise GalleryError(f"{path}: expected a gallery folder or no file, found a file; it is left as it is")
    if format_of(path) == GALLERY:
        if not overwrite:
            raise GalleryError(f"{path}: already exists; choose another output, --overwrite or --add-to")
    elif foreign := [name for name in os.listdir(path) if not _OURS.fullmatch(name) and name != _LOCK]:
        raise GalleryError(
            f"{path}: expected a gallery or an empty folder, found {min(foreign)!r} in it; it is left as it is"
        )


def _versions() -> dict[str, str]:
    found = {"sppfeat": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[library] = version(library)
    return found
