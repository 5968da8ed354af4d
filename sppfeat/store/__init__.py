"""The HDF5 store, a file or a folder of shards: its layout, writing, reading, merging, checks, views and ways out."""

from __future__ import annotations

from sppfeat.store.blocks import Block, DescribedRows, iter_blocks, to_numpy
from sppfeat.store.checking import verify_store
from sppfeat.store.digests import name_digests
from sppfeat.store.export import FORMATS, Exported, export_store
from sppfeat.store.locking import lock_shard, lock_store
from sppfeat.store.lost_files import LostFiles, count_lost, file_state
from sppfeat.store.manifest import SHARD_ROWS, Manifest
from sppfeat.store.merging import Merged, merge_stores
from sppfeat.store.mirrors import BucketFolder, Mirror, RemoteShard
from sppfeat.store.reading import (
    Building,
    Status,
    Store,
    building_progress,
    is_store,
    open_file,
    open_store,
    reason_text,
    require_complete,
    store_bytes,
)
from sppfeat.store.row_names import Box, row_name, row_names, split_row_name, window_text
from sppfeat.store.shards import Folder, FolderKind, ShardRows, create_folder, is_folder_store, open_folder
from sppfeat.store.subset import DescriptorView, Matrix
from sppfeat.store.unit_vectors import (
    BLOCK_BYTES,
    UnitRows,
    block_rows,
    check_same_recipe,
    image_of,
    item_of,
    normalize_rows,
    to_units,
    unit_rows,
)
from sppfeat.store.writing import StoreWriter, check_output, create_store, extend_store, remove_rows

__all__ = [
    "BLOCK_BYTES",
    "Block",
    "Box",
    "BucketFolder",
    "Building",
    "DescribedRows",
    "DescriptorView",
    "Exported",
    "FORMATS",
    "Folder",
    "FolderKind",
    "LostFiles",
    "Manifest",
    "Matrix",
    "Merged",
    "Mirror",
    "RemoteShard",
    "SHARD_ROWS",
    "ShardRows",
    "Status",
    "Store",
    "StoreWriter",
    "UnitRows",
    "block_rows",
    "building_progress",
    "check_output",
    "check_same_recipe",
    "count_lost",
    "create_folder",
    "create_store",
    "export_store",
    "extend_store",
    "file_state",
    "image_of",
    "is_folder_store",
    "is_store",
    "item_of",
    "iter_blocks",
    "lock_shard",
    "lock_store",
    "merge_stores",
    "name_digests",
    "normalize_rows",
    "open_file",
    "open_folder",
    "open_store",
    "reason_text",
    "remove_rows",
    "require_complete",
    "row_name",
    "row_names",
    "split_row_name",
    "store_bytes",
    "to_numpy",
    "to_units",
    "unit_rows",
    "verify_store",
    "window_text",
]
