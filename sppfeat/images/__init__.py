"""Finding images in folders, archives and buckets, reading one safely, resizing it, and batching equal shapes."""

from __future__ import annotations

from sppfeat.images.archives import from_builtins, places_within, to_builtins
from sppfeat.images.batching import ShapeBatcher
from sppfeat.images.decoder import Answer, Decoded, Decoder, Part, Unreadable, heard_answer, told_item
from sppfeat.images.extent import Extent, is_lost
from sppfeat.images.given import as_given
from sppfeat.images.instead import found_instead, left_out, no_images
from sppfeat.images.items import (
    EXTENSIONS,
    NO_FINGERPRINT,
    Content,
    Fingerprint,
    Item,
    fingerprint_of,
    is_image_name,
    member_to_name,
    name_to_path,
    path_to_name,
)
from sppfeat.images.memory import HeldFile
from sppfeat.images.parquet_files import DEFAULT_COLUMNS, Columns
from sppfeat.images.read_ahead import read_ahead
from sppfeat.images.reading import decode, open_image, read_image, upright_size
from sppfeat.images.remote import fingerprints
from sppfeat.images.resampling import coefficients
from sppfeat.images.resizing import (
    MOST_UNRESIZED,
    DecodedImage,
    PreparedImage,
    decode_image,
    decoding,
    lend_decoding,
    prepare_image,
    regain_decoding,
    scaled_size,
)
from sppfeat.images.sources import ImageList, Sources, find_images, is_there, item_at, open_sources
from sppfeat.images.unresized import Input, Unresized
from sppfeat.images.urls import absolute, file_system, is_url, leads_out, tried
from sppfeat.images.voc import find_voc, voc_root

__all__ = [
    "Answer",
    "Columns",
    "Content",
    "DEFAULT_COLUMNS",
    "Decoded",
    "DecodedImage",
    "Decoder",
    "EXTENSIONS",
    "Extent",
    "Fingerprint",
    "HeldFile",
    "ImageList",
    "Input",
    "Item",
    "MOST_UNRESIZED",
    "NO_FINGERPRINT",
    "Part",
    "PreparedImage",
    "ShapeBatcher",
    "Sources",
    "Unreadable",
    "Unresized",
    "absolute",
    "as_given",
    "coefficients",
    "decode",
    "decode_image",
    "decoding",
    "file_system",
    "find_images",
    "find_voc",
    "fingerprint_of",
    "fingerprints",
    "found_instead",
    "from_builtins",
    "heard_answer",
    "is_image_name",
    "is_lost",
    "is_there",
    "is_url",
    "item_at",
    "leads_out",
    "left_out",
    "lend_decoding",
    "member_to_name",
    "name_to_path",
    "no_images",
    "open_image",
    "open_sources",
    "path_to_name",
    "places_within",
    "prepare_image",
    "read_ahead",
    "read_image",
    "regain_decoding",
    "scaled_size",
    "to_builtins",
    "told_item",
    "tried",
    "upright_size",
    "voc_root",
]
