"""Small folders of shards, for the tests of several rooms."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from sppfeat import Recipe, Store
from sppfeat.images import Fingerprint
from sppfeat.store.digests import name_digests
from sppfeat.store.locking import lock_store
from sppfeat.store.manifest import SHARD_ROWS
from sppfeat.store.shards import Folder, create_folder
from sppfeat.store.writing import StoreWriter

DIM = 3
SHA = "0" * 64
ROOT = "/images \udcff"  # not UTF-8, as paths may be
LENGTHS = (5, 1, 7, 4)


def fill(store: Store, rows: list[int] | None = None) -> None:
    """Describe rows with values that follow from their names; every seventh fails."""
    with StoreWriter(store) as writer:
        for row in range(len(store)) if rows is None else rows:
            values = np.frombuffer(name_digests([store.names[row]]).tobytes()[:DIM], np.uint8)
            if values[0] % 7 == 0:
                writer.fail(row, f"bad {store.names[row]}", Fingerprint(row, 2))
            else:
                writer.write(row, values, (1 + int(values[0]), 2), Fingerprint(row, int(values[1])))


def names_of(index: int, count: int) -> list[str]:
    return [f"{index}/é {number}.jpg" for number in range(count)]


def make(path: Path, lengths: tuple[int, ...] = LENGTHS, *, prefix: str = "", **about: Any) -> Folder:
    """A finished folder of some shards."""
    with lock_store(path, folder=True):
        folder = create_folder(path, recipe=Recipe(), weights_sha256=SHA, dim=DIM, source_root=ROOT, **about)
        for index, count in enumerate(lengths):
            store = folder.begin_shard([prefix + name for name in names_of(index, count)])
            fill(store)
            folder.publish(store)
        folder.finish()
    return folder


def make_large(path: Path, count: int) -> None:
    """A folder of `count` full shards, each filled column by column; one row in a thousand failed."""
    with lock_store(path, folder=True):
        folder = create_folder(path, recipe=Recipe(), weights_sha256=SHA, dim=DIM, source_root=ROOT)
        values = np.zeros(DIM, np.float16)
        for index in range(count):
            store = folder.begin_shard(names_of(index, SHARD_ROWS))
            columns = {
                name: np.memmap(store.path, one.dtype, "r+", one.offset, one.shape)
                for name, one in store.columns.items()
            }
            columns["checksum"][:] = zlib.crc32(values)
            columns["image_size"][:] = 9
            columns["error"][::1000] = b"broken"
            columns["status"][:] = 1
            columns["status"][::1000] = 2
            folder.publish(store)
