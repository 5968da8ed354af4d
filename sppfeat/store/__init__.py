"""The HDF5 store: its layout, writing, reading and verification, and views of its rows."""

from __future__ import annotations

from sppfeat.store.reading import Status, Store, open_store, require_complete, verify_store
from sppfeat.store.row_names import Box, row_name, row_names, split_row_name, window_text
from sppfeat.store.subset import DescriptorView, Matrix
from sppfeat.store.unit_vectors import (
    BLOCK_BYTES,
    UnitRows,
    block_rows,
    check_same_recipe,
    image_of,
    normalize_rows,
    to_units,
    unit_rows,
)
from sppfeat.store.writing import StoreWriter, check_output, create_store, extend_store, lock_store

__all__ = [
    "BLOCK_BYTES",
    "Box",
    "DescriptorView",
    "Matrix",
    "Status",
    "Store",
    "StoreWriter",
    "UnitRows",
    "block_rows",
    "check_output",
    "check_same_recipe",
    "create_store",
    "extend_store",
    "image_of",
    "lock_store",
    "normalize_rows",
    "open_store",
    "require_complete",
    "row_name",
    "row_names",
    "split_row_name",
    "to_units",
    "unit_rows",
    "verify_store",
    "window_text",
]
