"""From a file to network inputs: decoding, and resizing to the size of each scale."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
from PIL import Image

from sppfeat.errors import ImageError, one_line
from sppfeat.images.items import Fingerprint, Item
from sppfeat.images.limits import MAX_WORKING_SET, working_set
from sppfeat.images.memory import DecodingMemory
from sppfeat.images.reading import decode, open_image, upright_size
from sppfeat.images.resampling import resample
from sppfeat.images.unresized import Unresized
from sppfeat.machine import available_cores, available_memory
from sppfeat.recipe import Recipe

# timm's and torchvision's evaluation transforms resize to 256 and keep the central 224.
CENTER_CROP_FRACTION: Final = 0.875
# Decoding memory per core: with it, photographs of 30 megapixels never wait for each other.
CORE_BYTES: Final = 256 << 20
# Larger images are resized before they wait for the network.
MOST_UNRESIZED: Final = 1 << 20  # pixels

# Set by `limit_decoding`.
_most_lent: int | None = None


@functools.cache
def _decoding_memory() -> DecodingMemory:
    """The limit of this process: what the largest image takes, or, with many cores, what keeps them busy."""
    return DecodingMemory(max(MAX_WORKING_SET, min(available_cores() * CORE_BYTES, available_memory() // 4)))


def lend_decoding(count: int) -> int:
    """Bytes of this process's limit that each of `count` others may use from now on: all but the largest image's."""
    return _decoding_memory().lend(count, keep=MAX_WORKING_SET)


def regain_decoding(amount: int) -> None:
    """Count bytes that were lent among this process's again."""
    _decoding_memory().regain(amount)


def limit_decoding(most: int) -> None:
    """From now on, an image that takes more bytes to decode is a MemoryError; for a process that was lent so much."""
    global _most_lent
    _most_lent = most


def decoding(image: Image.Image) -> contextlib.AbstractContextManager[None]:
    """Wait until this process may hold what an opened image takes to decode, and hold it within the block.

    Raises MemoryError for more than a limit that was set.
    """
    amount = working_set(image, turned=True)
    if _most_lent is not None and amount > _most_lent:
        raise MemoryError(f"{amount:,} bytes to decode: expected at most {_most_lent:,}")
    return _decoding_memory().take(amount)


class PreparedImage(NamedTuple):
    """One image at every scale of one or several recipes.

    inputs: uint8 arrays [height, width, 3], in the order of the recipes and their scales.
    size: width and height of the upright original.
    """

    inputs: list[np.ndarray]
    size: tuple[int, int]
    fingerprint: Fingerprint


class DecodedImage(NamedTuple):
    """As `PreparedImage`, for a device that resizes."""

    inputs: list[Unresized]
    size: tuple[int, int]
    fingerprint: Fingerprint


class _Opened(NamedTuple):
    """views: each recipe and scale, with the width and height that the image gets there."""

    pixels: Image.Image
    views: list[tuple[Recipe, int | str, tuple[int, int]]]
    size: tuple[int, int]
    fingerprint: Fingerprint


def scaled_size(size: tuple[int, int], scale: int | str, recipe: Recipe, *, minimum: int = 1) -> tuple[int, int]:
    """Width and height of an image of `size` at a scale; `minimum` is the backbone's shortest side.

    The short side becomes the scale and the other keeps the aspect ratio, both rounded to `size_multiple`.
    Raises ImageError for an image outside the recipe's limits.
    """
    width, height = size
    if min(size) < recipe.min_side:
        raise ImageError(f"{width} x {height} pixels: expected a short side of at least {recipe.min_side} (min_side)")
    aspect = max(size) / min(size)
    if aspect > recipe.max_aspect:
        raise ImageError(
            f"{width} x {height} pixels: aspect ratio {aspect:.4g} exceeds {recipe.max_aspect:g} (max_aspect)"
        )
    if isinstance(scale, str):
        if min(size) < minimum:
            raise ImageError(
                f"{width} x {height} pixels: the backbone needs at least {minimum} per side at native scale"
            )
        new_width, new_height = width, height
    elif recipe.crop == "center":
        # Rounded down, as torchvision does: one pixel more would shift the whole crop.
        short = int(scale / CENTER_CROP_FRACTION)
        new_width, new_height = (side * short // min(size) for side in size)
    else:
        multiple = recipe.size_multiple
        new_width, new_height = (max(multiple, round(side * scale / min(size) / multiple) * multiple) for side in size)
    if new_width * new_height > recipe.max_pixels:
        raise ImageError(
            f"{new_width} x {new_height} pixels at scale {scale}: more than {recipe.max_pixels} (max_pixels)"
        )
    return new_width, new_height


def prepare_image(source: Item | str, *recipes: Recipe, minimum: int = 1) -> PreparedImage:
    """Read one image, an item's or a file's, and resize it to every scale of a resolved recipe, or of several that
    differ in the network alone: scales, mean, std, interpolation. Raises ImageError."""
    with _opened(source, recipes, minimum) as opened:
        made: dict[tuple[object, ...], np.ndarray] = {}
        inputs = []
        for recipe, scale, target in opened.views:
            if (key := (target, recipe.interpolation, scale)) not in made:
                made[key] = _resized(opened.pixels, target, recipe, scale)
            inputs.append(made[key])
        return PreparedImage(inputs, opened.size, opened.fingerprint)


def decode_image(source: Item | str, *recipes: Recipe, minimum: int = 1) -> DecodedImage:
    """As `prepare_image`, for a device that resizes; images of more than MOST_UNRESIZED pixels are resized here."""
    with _opened(source, recipes, minimum) as opened:
        pixels, (width, height) = opened.pixels, opened.pixels.size
        small = width * height <= MOST_UNRESIZED
        whole = np.ascontiguousarray(pixels) if small else None
        inputs = []
        for recipe, scale, target in opened.views:
            by = recipe.interpolation or "bicubic"
            if whole is None:
                made = _resized(pixels, target, recipe, scale)
                rows, columns = made.shape[:2]
                inputs.append(Unresized(np.ascontiguousarray(made), (columns, rows), by, (0, 0), (rows, columns, 3)))
            elif recipe.crop == "none":
                inputs.append(Unresized(whole, target, by, (0, 0), (target[1], target[0], 3)))
            else:
                side = int(scale)
                inputs.append(Unresized(whole, target, by, _center_corner(target[::-1], side), (side, side, 3)))
        return DecodedImage(inputs, opened.size, opened.fingerprint)


@contextlib.contextmanager
def _opened(source: Item | str, recipes: Sequence[Recipe], minimum: int) -> Iterator[_Opened]:
    """Decode an image; within the block, the memory that this takes is held. Raises ImageError."""
    recipe = recipes[0]
    views = [(each, scale) for each in recipes for scale in each.scales]
    image, fingerprint = open_image(source)
    with image, contextlib.ExitStack() as stack:
        for one, scale in views:
            scaled_size(image.size, scale, one, minimum=minimum)  # the limits, before any pixel is decoded
        drafted = recipe.jpeg_draft and image.format in ("JPEG", "MPO")
        if not drafted:
            # Before `upright_size`, which decodes some PNGs; only it knows whether the image is turned.
            stack.enter_context(decoding(image))
        size, turn = upright_size(image, orientation=recipe.orientation)
        targets = [scaled_size(size, scale, one, minimum=minimum) for one, scale in views]
        if drafted:
            # The decoder keeps at least this size, so resizing only ever shrinks the draft.
            needed = (max(w for w, _ in targets), max(h for _, h in targets))
            image.draft(None, needed if image.size == size else needed[::-1])
            stack.enter_context(decoding(image))
        pixels = decode(image, turn, orientation=recipe.orientation)
        sized = [(one, scale, target) for (one, scale), target in zip(views, targets, strict=True)]
        yield _Opened(pixels, sized, size, fingerprint)


def _resized(pixels: Image.Image, target: tuple[int, int], recipe: Recipe, scale: int | str) -> np.ndarray:
    try:
        resized = resample(pixels, target, recipe.interpolation or "bicubic")
    except Exception as error:  # out of memory, for example
        raise ImageError(f"cannot be resized to {target[0]} x {target[1]}: {one_line(error)}") from None
    return resized if recipe.crop == "none" else _center_square(resized, int(scale))


def _center_square(pixels: np.ndarray, side: int) -> np.ndarray:
    top, left = _center_corner(pixels.shape, side)
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])


def _center_corner(shape: tuple[int, ...], side: int) -> tuple[int, int]:
    """Top and left of a square in the middle of height and width."""
    return round((shape[0] - side) / 2), round((shape[1] - side) / 2)
