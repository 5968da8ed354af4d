"""Duplicates among a million rows, 2 % of them near-duplicates of others: seconds, peak memory, found and missed.

    python benchmarks/duplicates.py

prints one line per size. Every search is a separate process, so that peak memory is its own. `--rows 50000,200000`
tries smaller stores, `--dim 16000` longer descriptors.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from extract import processor
from search import CLUSTERS, DECAY, NOISE, ROWS, Memory

from sppfeat.machine import available_cores

THRESHOLD = 0.95
PLANTED = 50  # rows for each near-duplicate
BLOCK = 1 << 25  # values at a time


def make_store(path: Path, count: int, dim: int, clustered: bool) -> np.ndarray:
    """A store of rows around centers, or of none, and pairs [P, 2] of rows, second a noisy copy of the first.

    Cosines of the pairs are spread evenly from the threshold to 1; a row is in one pair at most.
    """
    from sppfeat import Recipe, open_store
    from sppfeat.store.writing import create_store

    generator = np.random.default_rng(0)
    weights = np.arange(1, dim + 1, dtype=np.float32) ** -DECAY
    centers = generator.standard_normal((max(10, count * CLUSTERS // ROWS), dim), np.float32) * weights
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    names = [f"{number:07}.jpg" for number in range(count)]
    create_store(path, names, recipe=Recipe(), weights_sha256="0" * 64, dim=dim, source_root="/nowhere")
    view = {
        name: np.memmap(path, column.dtype, "r+", column.offset, column.shape)
        for name, column in open_store(path).columns.items()
    }
    size = max(1, BLOCK // dim)
    for start in range(0, count, size):
        rows = generator.standard_normal((min(size, count - start), dim), np.float32)
        if clustered:
            rows *= weights * (NOISE / np.sqrt((weights**2).sum()))
            rows += centers[generator.integers(0, len(centers), len(rows))]
        view["descriptors"][start : start + len(rows)] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = generator.permutation(count)[: 2 * (count // PLANTED)].reshape(-1, 2)
    for start in range(0, len(pairs), size):
        rows = view["descriptors"][pairs[start : start + size, 0]].astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        noise = generator.standard_normal(rows.shape, np.float32)
        if clustered:
            noise *= weights
        noise -= (noise * rows).sum(1, keepdims=True) * rows
        noise /= np.linalg.norm(noise, axis=1, keepdims=True)
        cosines = generator.uniform(THRESHOLD, 1, (len(rows), 1)).astype(np.float32)
        view["descriptors"][pairs[start : start + size, 1]] = cosines * rows + np.sqrt(1 - cosines**2) * noise
    for start in range(0, count, size):
        rows = view["descriptors"][start : start + size]
        view["checksum"][start : start + len(rows)] = [zlib.crc32(row.data) for row in rows]
    view["image_size"][:] = 100
    view["status"][:] = 1
    return pairs


def true_pairs(path: Path, pairs: np.ndarray) -> np.ndarray:
    """Those pairs that, as stored, reach the threshold."""
    from sppfeat import open_store

    rows = open_store(path).descriptors
    cosines = []
    for one, other in pairs:
        a, b = rows[one].astype(np.float64), rows[other].astype(np.float64)
        cosines.append(a @ b / np.sqrt((a @ a) * (b @ b)))
    return pairs[np.array(cosines) >= THRESHOLD]


def search(path: str) -> dict[str, Any]:
    """Find the duplicates of a store."""
    from sppfeat import find_duplicates, open_store

    store = open_store(path)
    with Memory() as memory:
        started = time.perf_counter()
        found = find_duplicates(store, THRESHOLD)
        seconds = time.perf_counter() - started
    groups = [[int(one.name.partition(".")[0]) for one in group] for group in found.groups]
    return {"seconds": seconds, "peak_mb": memory.peak, "pairs": found.pairs, "groups": groups, "notes": found.notes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=str(ROWS), help="numbers of rows (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=512, help="length of a row (default: %(default)s)")
    parser.add_argument("--kinds", default="clustered,even", help="rows around centers, or in all directions alike")
    parser.add_argument("--folder", type=Path, help="folder for the stores (default: a temporary one)")
    arguments = parser.parse_args()
    print(f"{processor()}, {available_cores()} cores, Python {platform.python_version()}, numpy {version('numpy')}\n")
    print("| rows | values | kind | seconds | peak memory, MB | planted pairs | found | missed | others |")
    print(f"|{'---|' * 9}", flush=True)
    for count in map(int, arguments.rows.split(",")):
        for kind in arguments.kinds.split(","):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                path = Path(folder, "rows.h5")
                planted = true_pairs(path, make_store(path, count, arguments.dim, kind == "clustered"))
                command = [sys.executable, __file__, "--child", str(path)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
            group_of = {row: number for number, group in enumerate(found["groups"]) for row in group}
            together = sum(one in group_of and group_of[one] == group_of.get(other) for one, other in planted.tolist())
            print(
                f"| {count:,} | {arguments.dim} | {kind} | {found['seconds']:.1f} | {found['peak_mb']:.0f} "
                f"| {len(planted):,} | {together:,} | {len(planted) - together:,} | {found['pairs'] - together:,} |",
                flush=True,
            )
            for note in found["notes"]:
                print(f"note: {note}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(search(sys.argv[2])))
    else:
        main()
