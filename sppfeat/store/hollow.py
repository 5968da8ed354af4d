"""Store files with a hole for their descriptors, which takes no space: all that a plan needs of a shard in a bucket."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from sppfeat.errors import StoreError
from sppfeat.files import appearing
from sppfeat.store.buckets import Span
from sppfeat.store.reading import Store

_BLOCK: Final = 1 << 24


def values_of(shard: Store) -> Span:
    """Where the descriptors are in a store file."""
    column = shard.columns["descriptors"]
    return Span(column.offset, column.row_bytes * column.shape[0])


def make_hollow(path: Path, values: Span) -> None:
    """Replace the descriptors of a store file by a hole, which takes no space. Raises StoreError."""
    with appearing(path, StoreError) as partial, open(path, "rb") as old, open(partial, "wb") as new:
        size = os.fstat(old.fileno()).st_size
        for start, end in ((0, values.offset), (sum(values), size)):
            old.seek(start)
            new.seek(start)
            for at in range(start, end, _BLOCK):
                new.write(old.read(min(_BLOCK, end - at)))
        new.truncate(size)
