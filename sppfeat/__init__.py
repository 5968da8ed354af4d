"""Fixed-length image descriptors by spatial pyramid pooling.

The public names are imported when they are first used, so that `import sppfeat` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sppfeat._version import __version__

if TYPE_CHECKING:
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
    from sppfeat.extraction import Described, Describer, Extraction, calibrate, calibrated_as, extract_folder
    from sppfeat.pyramid.pooling import SpatialPyramidPool, pool_pyramid, pool_rois
    from sppfeat.recipe import Recipe, RunOptions
    from sppfeat.retrieval import (
        Duplicates,
        Gallery,
        IndexOptions,
        ProjectionOptions,
        Retrieval,
        RetrievalOptions,
        SearchOptions,
        SearchResult,
        add_map,
        add_to_gallery,
        create_gallery,
        evaluate_retrieval,
        find_duplicates,
        open_gallery,
        remove_from_gallery,
        search_descriptors,
        search_images,
        search_store,
    )
    from sppfeat.store import (
        Block,
        Exported,
        Status,
        Store,
        export_store,
        iter_blocks,
        merge_stores,
        open_store,
        split_row_name,
        to_numpy,
        verify_store,
    )
    from sppfeat.store.dataset import StoreDataset
    from sppfeat.svm import LinearSvm
    from sppfeat.svm.solver import train_linear_svm
    from sppfeat.transfer import TransferOptions
    from sppfeat.transfer.evaluation import Transfer, evaluate_transfer
    from sppfeat.windows import read_windows

_HOMES = {
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
    "extraction": (
        "Described",
        "Describer",
        "Extraction",
        "calibrate",
        "calibrated_as",
        "extract_folder",
    ),
    "pyramid.pooling": (
        "SpatialPyramidPool",
        "pool_pyramid",
        "pool_rois",
    ),
    "recipe": (
        "Recipe",
        "RunOptions",
    ),
    "retrieval": (
        "Duplicates",
        "Gallery",
        "IndexOptions",
        "ProjectionOptions",
        "Retrieval",
        "RetrievalOptions",
        "SearchOptions",
        "SearchResult",
        "add_map",
        "add_to_gallery",
        "create_gallery",
        "evaluate_retrieval",
        "find_duplicates",
        "open_gallery",
        "remove_from_gallery",
        "search_descriptors",
        "search_images",
        "search_store",
    ),
    "store": (
        "Block",
        "Exported",
        "Status",
        "Store",
        "export_store",
        "iter_blocks",
        "merge_stores",
        "open_store",
        "split_row_name",
        "to_numpy",
        "verify_store",
    ),
    "store.dataset": ("StoreDataset",),
    "svm": ("LinearSvm",),
    "svm.solver": ("train_linear_svm",),
    "transfer": ("TransferOptions",),
    "transfer.evaluation": (
        "Transfer",
        "evaluate_transfer",
    ),
    "windows": ("read_windows",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "BackboneError",
    "Block",
    "Described",
    "Describer",
    "DeviceError",
    "Duplicates",
    "Exported",
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
    "StoreDataset",
    "StoreError",
    "Transfer",
    "TransferOptions",
    "UsageError",
    "WindowsError",
    "__version__",
    "add_map",
    "add_to_gallery",
    "calibrate",
    "calibrated_as",
    "create_gallery",
    "evaluate_retrieval",
    "evaluate_transfer",
    "export_store",
    "extract_folder",
    "find_duplicates",
    "iter_blocks",
    "merge_stores",
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
    "to_numpy",
    "train_linear_svm",
    "verify_store",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(f"sppfeat.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'sppfeat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
