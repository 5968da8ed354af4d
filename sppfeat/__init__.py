"""Fixed-length image descriptors by spatial pyramid pooling.

The public names are imported when they are first used, so that `import sppfeat` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sppfeat._version import __version__

if TYPE_CHECKING:
    from sppfeat.describe import Described, DescribedWindows, Describer
    from sppfeat.duplicates import Duplicates, find_duplicates
    from sppfeat.errors import (
        BackboneError,
        DeviceError,
        GalleryError,
        ImageError,
        MissingExtraError,
        ModelError,
        ReportError,
        SppFeatError,
        SppFeatWarning,
        StoreBusyError,
        StoreError,
        UsageError,
        WindowsError,
    )
    from sppfeat.extract import Extraction, extract_folder
    from sppfeat.gallery import Gallery, add_to_gallery, create_gallery, open_gallery, remove_from_gallery
    from sppfeat.index import IndexOptions
    from sppfeat.pyramid import SpatialPyramidPool, pool_pyramid, pool_rois
    from sppfeat.recipe import Recipe, RunOptions
    from sppfeat.retrieval import Retrieval, RetrievalOptions, evaluate_retrieval
    from sppfeat.search import SearchOptions, SearchResult, search_descriptors, search_images, search_store
    from sppfeat.store import Status, Store, open_store, verify_store
    from sppfeat.svm import LinearSvm, train_linear_svm
    from sppfeat.transfer import Transfer, TransferOptions, evaluate_transfer
    from sppfeat.whitening import ProjectionOptions
    from sppfeat.windows import read_windows, split_row_name

_HOMES = {
    "whitening": ("ProjectionOptions",),
    "search": ("SearchOptions", "SearchResult", "search_descriptors", "search_images", "search_store"),
    "retrieval": ("Retrieval", "RetrievalOptions", "evaluate_retrieval"),
    "index": ("IndexOptions",),
    "gallery": ("Gallery", "add_to_gallery", "create_gallery", "open_gallery", "remove_from_gallery"),
    "duplicates": ("Duplicates", "find_duplicates"),
    "describe": ("Described", "DescribedWindows", "Describer"),
    "errors": (
        "BackboneError",
        "DeviceError",
        "GalleryError",
        "ImageError",
        "MissingExtraError",
        "ModelError",
        "ReportError",
        "SppFeatError",
        "SppFeatWarning",
        "StoreBusyError",
        "StoreError",
        "UsageError",
        "WindowsError",
    ),
    "extract": ("Extraction", "extract_folder"),
    "pyramid": ("SpatialPyramidPool", "pool_pyramid", "pool_rois"),
    "recipe": ("Recipe", "RunOptions"),
    "store": ("Status", "Store", "open_store", "verify_store"),
    "svm": ("LinearSvm", "train_linear_svm"),
    "transfer": ("Transfer", "TransferOptions", "evaluate_transfer"),
    "windows": ("read_windows", "split_row_name"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "BackboneError",
    "Described",
    "DescribedWindows",
    "Describer",
    "DeviceError",
    "Duplicates",
    "Extraction",
    "Gallery",
    "GalleryError",
    "ImageError",
    "IndexOptions",
    "LinearSvm",
    "MissingExtraError",
    "ModelError",
    "ProjectionOptions",
    "Recipe",
    "ReportError",
    "Retrieval",
    "RetrievalOptions",
    "RunOptions",
    "SearchOptions",
    "SearchResult",
    "SpatialPyramidPool",
    "SppFeatError",
    "SppFeatWarning",
    "Status",
    "Store",
    "StoreBusyError",
    "StoreError",
    "Transfer",
    "TransferOptions",
    "UsageError",
    "WindowsError",
    "__version__",
    "add_to_gallery",
    "create_gallery",
    "evaluate_retrieval",
    "evaluate_transfer",
    "extract_folder",
    "find_duplicates",
    "open_gallery",
    "open_store",
    "pool_pyramid",
    "pool_rois",
    "read_windows",
    "remove_from_gallery",
    "search_descriptors",
    "search_images",
    "search_store",
    "split_row_name",
    "train_linear_svm",
    "verify_store",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(f"sppfeat.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'sppfeat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
