"""Which image of a group of duplicates to keep."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from PIL import Image

from sppfeat.errors import ImageError, UsageError, unknown_name
from sppfeat.files import unsafe_name
from sppfeat.images import is_url, read_image
from sppfeat.machine import available_cores
from sppfeat.store import Box, Store, UnitRows, item_of

KEEP: Final = ("largest", "sharpest", "oldest")
# Images are compared at one size: a blurred enlargement must not win because edges are wider in it.
SHARPNESS_SIDE: Final = 512
# Stored times up to here, four seconds of 1970, are none: members of zip files have their CRC-32 instead.
_NO_TIME: Final = 1 << 32


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
