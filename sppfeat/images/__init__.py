"""Finding images, reading one safely, resizing it, and batching images of equal shape."""

from __future__ import annotations

from sppfeat.images.batching import ShapeBatcher
from sppfeat.images.reading import decode, open_image, read_image, upright_size
from sppfeat.images.resizing import PreparedImage, prepare_image
from sppfeat.images.sources import (
    EXTENSIONS,
    NO_FINGERPRINT,
    Fingerprint,
    ImageList,
    Item,
    find_images,
    fingerprint_of,
    name_to_path,
    path_to_name,
)

__all__ = [
    "EXTENSIONS",
    "Fingerprint",
    "ImageList",
    "Item",
    "NO_FINGERPRINT",
    "PreparedImage",
    "ShapeBatcher",
    "decode",
    "find_images",
    "fingerprint_of",
    "name_to_path",
    "open_image",
    "path_to_name",
    "prepare_image",
    "read_image",
    "upright_size",
]
