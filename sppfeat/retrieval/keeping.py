"""Which images of a group of duplicates may be removed for another, and which one to keep."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

import numpy as np
from PIL import Image

from sppfeat.errors import ImageError, UsageError, unknown_name
from sppfeat.files import unsafe_name
from sppfeat.images import Fingerprint, fingerprint_of, is_url, read_image
from sppfeat.machine import available_cores
from sppfeat.store import Box, Store, UnitRows, file_state, image_of, item_of

KEEP: Final = ("largest", "sharpest", "oldest")
# Images are compared at one size: a blurred enlargement must not win because edges are wider in it.
SHARPNESS_SIDE: Final = 512
# Stored times up to here, four seconds of 1970, are none: members of zip files have their CRC-32 instead.
_NO_TIME: Final = 1 << 32
_WAITING: Final = 8  # threads, which wait for the file system, not for a core
_PART: Final = 1 << 10


@dataclass(frozen=True)
class Keeping:
    """What the images of groups are ordered by, the one to keep first.

    largest: most pixels, then most bytes. sharpest: highest sharpness, see `sharpness`; images that could not be read
    come last. oldest: earliest modification time, as it was when the image was described; images without one come last.
    Equal ones are ordered by pixels, by bytes, then as in the store.
    sharpness: by row of the store, if `keep` is sharpest. unreadable: reasons by name.
    """

    keep: str
    sharpness: dict[int, float] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)

    def order(self, rows: UnitRows, which: np.ndarray) -> np.ndarray:
        """The ascending positions of a group, the one to keep first."""
        places = rows.rows[which]
        pixels = rows.store.image_size[places].astype(np.int64).prod(1)
        keys = [which, -rows.store.file_size[places], -pixels]
        if self.keep == "sharpest":
            keys.append(np.array([-self.sharpness[place] for place in places.tolist()]))
        elif self.keep == "oldest":
            times = rows.store.file_mtime_ns[places].astype(np.int64)
            keys += [times, times <= _NO_TIME]
        return which[np.lexsort(keys)]


@dataclass(frozen=True)
class Files:
    """What `different_files` leaves of rows. lost: how many have no file any more. changed: names of images whose file
    is another by now. links: names that are further paths of a file.
    """

    rows: UnitRows
    lost: int = 0
    changed: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)


def different_files(rows: UnitRows, *, copied: bool = False) -> Files:
    """The rows without what must not be kept, or removed, for another: those whose file is gone, or changed since it
    was described, and further paths of one file, of which the first that is no link stays.

    Where the folder of the images is not on this machine, nothing is known of the files, and all rows stay. copied:
    whether the folder may be a copy of the one that was described: then sizes alone tell changed files.
    """
    root = rows.store.source_root
    if is_url(root) or not os.path.isdir(root):
        return Files(rows)
    sizes, times = (column[rows.rows].tolist() for column in (rows.store.file_size, rows.store.file_mtime_ns))
    described = list(zip(rows.names, map(Fingerprint, sizes, times), strict=True))

    def state(name: str, before: Fingerprint) -> str | None:
        found = file_state(root, name, before)
        if found == "changed" and copied and fingerprint_of(image_of(root, name)[0]).file_size == before.file_size:
            return None
        return found

    with ThreadPoolExecutor(_WAITING) as pool:
        parts = [described[start : start + _PART] for start in range(0, len(described), _PART)]
        states = chain.from_iterable(pool.map(lambda part: [state(*one) for one in part], parts))
        files = chain.from_iterable(pool.map(lambda part: [_file_of(root, name) for name, _ in part], parts))
    lost = 0
    changed: list[str] = []
    links: list[str] = []
    first: dict[object, int] = {}
    for at, (found, file) in enumerate(zip(states, files, strict=True)):
        if found == "lost":
            lost += 1
        elif found == "changed":
            changed.append(rows.names[at])
        elif file not in first:
            first[file] = at
        else:
            link = at
            if _is_link(root, rows.names[first[file]]) and not _is_link(root, rows.names[at]):
                link, first[file] = first[file], at
            links.append(rows.names[link])
    return Files(rows.only(np.sort(np.array(list(first.values()), np.int64))), lost, changed, links)


def _file_of(root: str, name: str) -> object:
    """What tells a row's file, and window in it, from others."""
    if unsafe_name(name) is None:
        with contextlib.suppress(OSError, ValueError):  # gone, or a path that is invalid on this system
            path, window = image_of(root, name)
            info = os.stat(path)
            return info.st_dev, info.st_ino, window
    return name


def _is_link(root: str, name: str) -> bool:
    """Whether there is a symbolic link on the way from the folder to a row's file."""
    path, _ = image_of(root, name)
    return os.path.realpath(path) != os.path.realpath(root) + path.removeprefix(root.rstrip("/"))


def check_keeping(store: Store, keep: str) -> None:
    """Raise UsageError unless `keep` is one of KEEP that the store has what it needs for.

    Images behind URLs are stored with an ETag or checksum for a time.
    """
    if keep not in KEEP:
        raise UsageError(unknown_name("keep", keep, KEEP))
    if keep == "oldest" and is_url(store.source_root):
        raise UsageError(f"keep oldest: expected files with modification times, found images of {store.source_root}")


def plan_keeping(rows: UnitRows, groups: list[np.ndarray], keep: str) -> Keeping:
    """Find out what is needed to order groups of positions: for `sharpest`, all their images are read."""
    keeping = Keeping(keep)
    if keep == "sharpest" and groups:
        members = np.sort(np.concatenate(groups)).tolist()
        names = [rows.names[at] for at in members]
        with ThreadPoolExecutor(available_cores()) as pool:
            found = pool.map(lambda name: _sharpness_of(rows.store.source_root, name), names)
            for at, name, value in zip(members, names, found, strict=True):
                keeping.sharpness[int(rows.rows[at])] = value if isinstance(value, float) else -1.0
                if not isinstance(value, float):
                    keeping.unreadable[name] = value
    return keeping


def sharpness(image: Image.Image) -> float:
    """The variance of the Laplacian of an image in gray, its short side SHARPNESS_SIDE; 0 if it has one value.

    See Pech-Pacheco et al., ICPR 2000.
    """
    scale = SHARPNESS_SIDE / min(image.size)
    width, height = (max(3, round(side * scale)) for side in image.size)
    gray = np.asarray(image.convert("L").resize((width, height), Image.Resampling.BICUBIC), np.float32)
    across = gray[1:-1, :-2] + gray[1:-1, 2:]
    down = gray[:-2, 1:-1] + gray[2:, 1:-1]
    return float((across + down - 4 * gray[1:-1, 1:-1]).var(dtype=np.float64))


def _sharpness_of(root: str, name: str) -> float | str:
    """The sharpness of a row's image, or of its window; or why it could not be read."""
    if (reason := unsafe_name(name)) is not None:
        return f"its name {reason}"
    item, window = item_of(root, name)
    try:
        pixels = read_image(item).pixels
        return sharpness(pixels if window is None else pixels.crop(_edges(window, pixels.size)))
    except ImageError as error:
        return str(error)


def _edges(window: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The pixels of a window inside an image, for `crop`; one pixel at least."""
    (x1, y1, x2, y2), (width, height) = window, size
    left, top = min(max(0, int(x1)), width - 1), min(max(0, int(y1)), height - 1)
    return left, top, max(left, min(int(x2), width - 1)) + 1, max(top, min(int(y2), height - 1)) + 1
