"""The bins of a gallery's images: what parts are found in. One byte a value, read on demand.

    bins-N.h5       /values [N, n, n, K] int8, the finest level of each descriptor, scaled by a factor of its own: its C
                    channels, or their K components; /image_size [N, 2] int32, width and height of the upright image
    channels-N.npz  what was learned of the channels: see `channels`

Row i is row i of the index. The maximum over bins is exact up to the rounding to a byte, and to what components leave
out; the length of a cell's values does not count: see `alignment`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from sppfeat.errors import GalleryError, StoreError, UsageError, one_line
from sppfeat.files import appearing_hdf5, open_hdf5
from sppfeat.recipe import NATIVE, Recipe
from sppfeat.retrieval.alignment import CELLS, Whitening
from sppfeat.retrieval.arrays import read_arrays, write_arrays
from sppfeat.retrieval.channels import NOT_FINITE, SAMPLE_IMAGES, SEED, Channels, learn_channels, learn_whitening
from sppfeat.retrieval.segments import JoinedValues
from sppfeat.store import UnitRows, block_rows

_VERSION: Final = 1
# Of 8 x 8 bins there are 1,296 rectangles, of 12 x 12 already 6,084, whose overlaps alone take gigabytes.
MAX_SIDE: Final = 8
_MAX_IMAGE_SIDE: Final = 1 << 24


@dataclass(frozen=True)
class BinLayout:
    """Where the bins of the finest level are in a descriptor: `side` x `side` of them, `channels` values each."""

    side: int
    channels: int
    start: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """[side, side, channels] of one image."""
        return self.side, self.side, self.channels

    def take(self, descriptors: np.ndarray) -> np.ndarray:
        """[N, side, side, channels] of descriptors [N, D]."""
        end = self.start + self.side * self.side * self.channels
        return descriptors[:, self.start : end].reshape(len(descriptors), *self.shape)


@dataclass(frozen=True)
class Bins:
    """The bins of a gallery, in its files. values: [N, side, side, K] int8. image_size: [N, 2] int32."""

    values: np.ndarray | JoinedValues
    image_size: np.ndarray
    channels: Channels

    def take(self, rows: np.ndarray) -> np.ndarray:
        """[n, side, side, C] at positions [n]."""
        return self.channels.decode(self.values[rows])


@dataclass(frozen=True)
class KeptBins:
    """Rows of a gallery's bins that stay."""

    bins: Bins
    rows: np.ndarray


def bin_layout(recipe: Recipe, dim: int) -> BinLayout:
    """The finest level of a recipe's descriptors of `dim` values.

    Raises UsageError, naming the field, for a recipe whose bins do not say where things are.
    """
    if recipe.pooling != "max":
        raise UsageError(
            f"parts need max pooling, whose maxima over rectangles of bins are exact, found pooling {recipe.pooling!r}"
        )
    if len(recipe.scales) > 1 and recipe.fuse != "max":
        raise UsageError(
            f"parts need one scale, or scales fused by max, found {len(recipe.scales)} scales fused by {recipe.fuse!r}"
        )
    if recipe.channels is not None:
        raise UsageError(
            f"parts need one layer of one backbone, found backbone {recipe.backbone!r} with layer {recipe.layer!r}"
        )
    if recipe.crop != "none":
        raise UsageError(f"parts need whole images, found crop {recipe.crop!r}")
    side = max(recipe.levels)
    if side < CELLS:
        raise UsageError(f"parts need a level of {CELLS} or more, found levels {','.join(map(str, recipe.levels))}")
    if side > MAX_SIDE:
        raise UsageError(f"parts need levels up to {MAX_SIDE}, found {side}: their rectangles would be too many")
    channels = dim // recipe.bins
    before = sum(level * level for level in recipe.levels[: recipe.levels.index(side)])
    return BinLayout(side, channels, before * channels)


@dataclass(frozen=True)
class BinSource:
    """The bins of a gallery to be written: those of an older one's rows that stay, then those of a store's rows."""

    layout: BinLayout
    channels: Channels
    kept: KeptBins | None
    new: UnitRows | None

    def __len__(self) -> int:
        return sum(len(part.rows) for part in (self.kept, self.new) if part is not None)

    def encoded(self, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n, side, side, K] int8 and [n, 2] image sizes of ascending rows."""
        before = 0 if self.kept is None else len(self.kept.rows)
        cut = int(np.searchsorted(which, before))
        values, sizes = [], []
        if self.kept is not None and cut:
            rows = self.kept.rows[which[:cut]]
            values.append(self.kept.bins.values[rows])
            sizes.append(self.kept.bins.image_size[rows])
        if self.new is not None and cut < len(which):
            at = which[cut:] - before
            values.append(self.channels.encode(bins_of(self.layout, self.new, at)))
            sizes.append(self.new.store.image_size[self.new.rows[at]])
        return np.concatenate(values), np.concatenate(sizes)

    def take(self, which: np.ndarray) -> np.ndarray:
        """[n, side, side, C] of ascending rows, as they will be read."""
        return self.channels.decode(self.encoded(which)[0])


def bins_of(layout: BinLayout, rows: UnitRows, which: np.ndarray) -> np.ndarray:
    """[n, side, side, C] of rows of a store, as it has them. Raises StoreError for values that are not finite."""
    found = layout.take(rows.store.descriptors[rows.rows[which]])
    if not np.isfinite(found.sum(dtype=np.float64)):
        raise StoreError(f"{rows.store.place}: {NOT_FINITE}")
    return found


def learn_from(layout: BinLayout, rows: UnitRows, dim: int | None = None) -> Channels:
    """What a sample of a store's rows tells of their channels; dim: see `learn_channels`."""
    return learn_channels(bins_of(layout, rows, rows.sample(SAMPLE_IMAGES, SEED)), dim, whole_side(layout.side))


def learn_again(source: BinSource) -> BinSource:
    """The same bins, whitened as a sample of all of them says: for a gallery whose images have changed."""
    count = len(source)
    which = np.arange(count)
    if count > SAMPLE_IMAGES:
        which = np.sort(np.random.default_rng(SEED).choice(count, SAMPLE_IMAGES, replace=False))
    whitening = learn_whitening(source.take(which), whole_side(source.layout.side))
    return replace(source, channels=replace(source.channels, whitening=whitening))


def whole_side(side: int) -> int:
    """Bins along a side of a rectangle that may hold a query that is a whole image: of 6, at least 5."""
    return -(-5 * side // 6)


def write_bins(file: Path, source: BinSource) -> None:
    """Write the bins of a gallery. Raises GalleryError."""
    layout, dim = source.layout, source.channels.dim
    size = block_rows(layout.side * layout.side * layout.channels)
    with appearing_hdf5(file, GalleryError) as content:
        values = content.create_dataset("values", (len(source), layout.side, layout.side, dim), np.int8)
        sizes = content.create_dataset("image_size", (len(source), 2), "<i4")
        for start in range(0, len(source), size):
            part = slice(start, min(start + size, len(source)))
            values[part], sizes[part] = source.encoded(np.arange(part.start, part.stop))


def read_bins(file: Path, count: int, layout: BinLayout, channels: Channels) -> Bins:
    """The bins of `count` images, mapped from the file. Raises GalleryError for any other file."""
    shape = (count, layout.side, layout.side, channels.dim)
    with open_hdf5(file, None, _VERSION, GalleryError) as content:
        values, sizes = content["values"], content["image_size"]
        if values.shape != shape or values.dtype != np.int8 or sizes.shape != (count, 2):
            raise GalleryError(
                f"{file}: expected bins {list(shape)} of int8, found {list(values.shape)} of {values.dtype}"
            )
        offset, length = values.id.get_offset(), values.id.get_storage_size()
        image_size = sizes[:].astype(np.int32, casting="same_kind")
        if not (image_size.min() >= 1 and image_size.max() <= _MAX_IMAGE_SIDE):
            raise GalleryError(f"{file}: expected widths and heights in pixels, found {image_size.min()} among them")
        try:  # while it is open: another process may remove it at any moment
            if offset is None or length != math.prod(shape) or offset + length > file.stat().st_size:
                raise GalleryError(f"{file}: expected its values in one piece, found fewer")
            mapped = np.memmap(file, np.int8, "r", offset, shape)
        except OSError as error:
            raise GalleryError(f"{file}: cannot be read: {one_line(error)}") from None
    return Bins(mapped, image_size, channels)


def join_bins(base: Bins, added: Bins) -> Bins:
    """The bins of a gallery's first rows and of those added since, both mapped from files."""
    if isinstance(base.values, JoinedValues) or isinstance(added.values, JoinedValues):
        raise TypeError("expected bins of one file each")
    sizes = np.concatenate([base.image_size, added.image_size])
    return Bins(JoinedValues(base.values, added.values), sizes, base.channels)


def write_channels(file: Path, channels: Channels) -> None:
    """Write what was learned of channels. Raises GalleryError."""
    arrays = {"mean": channels.whitening.mean, "matrix": channels.whitening.matrix}
    if channels.components is not None:
        arrays["components"] = channels.components
    write_arrays(file, arrays)


def read_channels(file: Path, layout: BinLayout, whitened: int, dim: int) -> Channels:
    """Channels whose cells are whitened to so many values, and whose bins are kept as so many.

    Raises GalleryError for any other file.
    """
    shapes: dict[str, tuple[int, ...]] = {"mean": (layout.channels,), "matrix": (layout.channels, whitened)}
    if dim < layout.channels:
        shapes["components"] = (dim, layout.channels)
    arrays = read_arrays(file, shapes)
    return Channels(Whitening(arrays["mean"], arrays["matrix"]), arrays.get("components"))


def part_recipe(recipe: Recipe, factors: tuple[float, ...]) -> Recipe:
    """How a query that may be a part is described: at several parts of the gallery's scale, one descriptor after the
    other. Raises UsageError for `native`."""
    if NATIVE in recipe.scales:
        raise UsageError("parts need scales in pixels, found 'native'")
    largest = max(scale for scale in recipe.scales if isinstance(scale, int))
    scales = tuple(dict.fromkeys(max(32, round(factor * largest)) for factor in factors))
    return replace(recipe, scales=scales, fuse="concat" if len(scales) > 1 else recipe.fuse)
