"""The choice of a FAISS index, by the number of rows N, their length d, and a memory budget M: the first that fits.

    Flat                  exact; 4 N d bytes, up to FLAT_BYTES, so that a query takes at most about 0.1 s
    HNSW32                a graph over the full rows; 4 N d + 284 N bytes, while N (d + 256) is at most GRAPH_COST
    HRp,IVFn,SQ8          n lists of rows, 8 bits per value
    HRp,IVFn,RaBitQb      the same with b bits per value, 7 to 1, as many as fit

Codes of lists are made of rotated rows, where every value matters as much as any other: the rotation is random, by
Hadamard matrices of the next power of two p (HRp) or by a full matrix (RRd), whichever takes less. On 100,000 clustered
rows of 512 values, 8 bits reach a recall@10 of 0.992 (0.976 without rotation), 5 bits 0.984, 4 bits 0.972, 3 bits 0.94,
2 bits 0.89, 1 bit 0.79; product codes of 128 bytes reach 0.595, and take 30 times as long to train. RaBitQ: Gao and
others, "Practical and asymptotically optimal quantization of high-dimensional vectors", SIGMOD 2025.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from sppfeat.errors import UsageError
from sppfeat.machine import available_memory
from sppfeat.retrieval.whitening import DEFAULT_DIMS

# At the 10 to 20 GB/s that two cores read, an exact search through this much takes 0.05 to 0.1 s per query: no more
# than describing the query.
FLAT_BYTES: Final = 1 << 30
# To build a graph is to compare each row with hundreds of others, scattered in memory: reaching one takes about as long
# as reading ROW_COST values of it. One core takes 0.10 ms per row for 200,000 rows of 64 values, 0.12 for 100,000 of
# 512, 0.22 for 25,000 of 2,048, 0.98 for 25,000 of 8,192 and 1.1 for 12,000 of 16,000: 1 to 3 seconds per 10 million
# of N (d + ROW_COST). For a million rows of 512 it is ten times as much: few of them are in the processor's caches. So
# a graph of GRAPH_COST takes from some minutes to an hour, and up to 6 GB, which opening the gallery reads and checks
# in some 6 s.
ROW_COST: Final = 256
GRAPH_COST: Final = 1_500_000_000
HNSW_LINKS: Final = 32
# Links per row of HNSW32: 64 on the bottom level, 32 on the next for every 32nd row, and so on; offsets and levels.
HNSW_ROW_BYTES: Final = 284
ID_BYTES: Final = 8


@dataclass(frozen=True)
class Choice:
    """A factory string, about how many bytes its index takes (None: unknown), and why it was chosen.

    note: what would do better, for the user.
    """

    factory: str
    bytes: int | None
    why: str
    note: str | None = None


def default_memory() -> int:
    """Half of the memory that this process may use."""
    return available_memory() // 2


def choose_index(rows: int, dim: int, memory: int | None = None) -> Choice:
    """The index for this many rows of this length; see the module. Raises UsageError if none fits into `memory`."""
    budget = default_memory() if memory is None else memory
    shown = f"{_show_bytes(budget)} ({'--memory' if memory else 'half of the memory available'})"
    smallest = 0
    for factory, taken, why in _candidates(rows, dim):
        if taken <= budget:
            return Choice(factory, taken, why.format(shown), _shorter(rows, dim, budget, factory, taken))
        smallest = taken
    short = [dims for dims in (512, 256, 128, 64) if dims < dim and _fits(rows, dims, budget)]
    raise UsageError(
        f"memory: {rows:,} rows of {dim:,} values take at least {_show_bytes(smallest)} in an index, found a budget of "
        + f"{shown}; "
        + (f"--project {short[0]} fits" if short else "fewer dimensions (--project) take less")
    )


def list_count(rows: int) -> int:
    """Lists of an IVF index: the power of 2 near 4 sqrt(N), as FAISS advises, with at least 39 rows in each."""
    return max(1, min(1 << round(math.log2(4 * math.sqrt(max(rows, 1)))), 1 << int(math.log2(max(rows // 39, 1)))))


def _candidates(rows: int, dim: int) -> Iterator[tuple[str, int, str]]:
    """Factory strings, their bytes and reasons, the best first; each takes less than those before."""
    flat = 4 * rows * dim
    graph = flat + HNSW_ROW_BYTES * rows
    cheap = rows * (dim + ROW_COST) <= GRAPH_COST
    if flat <= FLAT_BYTES:
        yield "Flat", flat, "exact; small enough to compare a query with every row"
    elif cheap:
        yield f"HNSW{HNSW_LINKS}", graph, "a graph over the full rows is the fastest that fits {}"
    reason = f"full rows would take {_show_bytes(flat)}"
    if not cheap:
        reason = f"a graph over {rows:,} rows of {dim:,} values takes too long to build"
    least = flat
    for bits in range(8, 0, -1):
        factory, taken = _lists(rows, dim, bits)
        if taken < least:
            yield factory, taken, f"{reason}; {bits} bit{'s' if bits > 1 else ''} per value fit {{}}"
            reason = f"{bits} bits per value would take {_show_bytes(taken)}"
            least = taken


def _lists(rows: int, dim: int, bits: int) -> tuple[str, int]:
    """The factory string of rotated rows in lists, and its bytes."""
    lists = list_count(rows)
    padded = 1 << (dim - 1).bit_length()
    rotated = _coded(rows, padded, bits, lists)
    full = _coded(rows, dim, bits, lists) + 4 * dim * dim
    rotation, taken = (f"HR{padded}", rotated) if rotated <= full else (f"RR{dim}", full)
    return f"{rotation},IVF{lists},{'SQ8' if bits == 8 else f'RaBitQ{bits}' if bits > 1 else 'RaBitQ'}", taken


def _coded(rows: int, dim: int, bits: int, lists: int) -> int:
    """Bytes of codes, ids, centers, and what a list or a value takes once."""
    whole = (dim + 7) // 8
    code = {8: dim, 1: whole + 8}.get(bits, whole + 12 + (dim * (bits - 1) + 7) // 8 + 8)
    return rows * (code + ID_BYTES) + lists * (4 * dim + 8) + 8 * dim


def _fits(rows: int, dim: int, budget: int) -> bool:
    return any(taken <= budget for _, taken, _ in _candidates(rows, dim))


def _shorter(rows: int, dim: int, budget: int, factory: str, taken: int) -> str | None:
    """What a projection would give, where long rows get an index that is not exact."""
    if factory == "Flat" or dim < 2 * DEFAULT_DIMS:
        return None
    for other, bytes_, _ in _candidates(rows, DEFAULT_DIMS):
        if bytes_ <= budget:
            return (
                f"rows of {dim:,} values are slow to index and to search: --project {DEFAULT_DIMS} would take "
                f"{_show_bytes(bytes_)} ({other}) instead of {_show_bytes(taken)}"
            )
    return None


def _show_bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
