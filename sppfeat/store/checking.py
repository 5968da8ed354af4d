"""Checking every row of a store, block by block."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from sppfeat.errors import StoreError
from sppfeat.files import unsafe_name
from sppfeat.store.digests import name_digests, repeated_digests
from sppfeat.store.reading import Status, Store

_BLOCK_ROWS: Final = 1 << 12


def verify_store(store: Store) -> list[str]:
    """Check every row that is not pending; returns one line per problem.

    Each shard of a folder is checked by itself; neither all names nor all values are held in memory.
    """
    if store.manifest is None or store.shards is None:
        problems = _repeated_names([0], lambda at: store)
        problems += [f"row {row} ({name!r}): {problem}" for row, name, problem in _faults(store)]
        return problems
    shards, sound, problems = store.shards, list[int](), list[str]()
    first = 0
    for at, entry in enumerate(store.manifest.shards):
        try:
            shard = shards.open(at)
            found = [
                f"row {first + row} ({name!r}, in {entry.file}): {problem}" for row, name, problem in _faults(shard)
            ]
            problems += found
            sound.append(at)
        except StoreError as error:
            problems.append(str(error))
        first += entry.rows
    return problems + _repeated_names(sound, shards.open)


def _faults(store: Store) -> Iterator[tuple[int, str, str]]:
    """The rows of one file with a problem: number, name, and what is wrong."""
    for start in range(0, len(store), _BLOCK_ROWS):
        part = slice(start, min(start + _BLOCK_ROWS, len(store)))
        names = store.names[part]
        digests = None
        if store.stored_digests is not None:
            digests = (name_digests(names) == store.stored_digests[part]).all(1)
        values = np.ascontiguousarray(store.descriptors[part])
        finite = np.isfinite(values).all(1)
        sized = np.asarray(store.image_size[part]).min(1) >= 1
        sums, reasons, states = (column[part].tolist() for column in (store.checksum, store.error, store.states))
        for at, (name, status) in enumerate(zip(names, states, strict=True)):
            row = start + at
            if (fault := unsafe_name(name)) is not None:
                yield row, name, f"its name {fault}"
            if digests is not None and not digests[at]:
                yield row, name, "its name does not match its digest"
            if status > Status.FAILED:
                yield row, name, f"expected status 0, 1 or 2, found {status}"
            elif status == Status.DONE:
                if zlib.crc32(values[at]) != sums[at]:
                    yield row, name, "its values do not match their checksum"
                elif not finite[at]:
                    yield row, name, "contains values that are not finite"
                elif not sized[at]:
                    yield row, name, "done, but its image has no size"
            elif status == Status.FAILED and not reasons[at]:
                yield row, name, "failed without a reason"


def _repeated_names(shards: list[int], open_at: Callable[[int], Store]) -> list[str]:
    """A line that counts the duplicate names of some shards, if there are any."""
    repeated = repeated_digests(lambda: (open_at(at).name_digests[:] for at in shards))
    found, first = 0, ""
    for _, row in repeated:
        if not found:
            for at in shards:
                shard = open_at(at)
                if row < len(shard):
                    first = shard.names[row]
                    break
                row -= len(shard)
        found += 1
    return [f"{found} duplicate names, such as {first!r}"] if found else []
