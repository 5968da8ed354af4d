"""Search: what the library adds to the raw FAISS call, one query image's stages, ten images more in a large gallery,
and a million rows in each index.

    python benchmarks/search.py

prints four tables. Every index is built in a separate process, so that peak memory is its own; figures in a row come
from the same rows and queries. `--scale 0.02` shrinks the rows to try the script.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from extract import processor

from sppfeat.machine import available_cores

PHOTOS = Path(__file__).parents[1] / "photos"
ROWS, DIM, CLUSTERS, QUERIES, K = 1_000_000, 512, 10_000, 1_000, 10
# Directions weigh like those of descriptors: the i-th standard deviation falls with the square root of i.
DECAY = 0.5
# Length of the noise in a cluster against that of its center.
NOISE = 0.7


def make_rows(generator: np.random.Generator, centers: np.ndarray, count: int) -> np.ndarray:
    """Rows [count, DIM] of length 1 around centers, as float16."""
    weights = np.arange(1, DIM + 1, dtype=np.float32) ** -DECAY
    noise = generator.standard_normal((count, DIM), np.float32) * weights
    noise *= NOISE / np.sqrt((weights**2).sum())
    rows = centers[generator.integers(0, len(centers), count)] + noise
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def make_data(folder: Path, count: int) -> None:
    """A store of `count` rows, and queries of the same clusters that are not in it, with their true neighbors."""
    from sppfeat import Recipe, open_store
    from sppfeat.store.writing import create_store

    generator = np.random.default_rng(0)
    weights = np.arange(1, DIM + 1, dtype=np.float32) ** -DECAY
    centers = generator.standard_normal((max(10, count * CLUSTERS // ROWS), DIM), np.float32) * weights
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    path = folder / "rows.h5"
    names = [f"{number:07}.jpg" for number in range(count)]
    create_store(path, names, recipe=Recipe(), weights_sha256="0" * 64, dim=DIM, source_root="/nowhere")
    columns = open_store(path).columns
    view = {
        name: np.memmap(path, column.dtype, "r+", column.offset, column.shape)
        for name, column in columns.items()
        if name in ("descriptors", "status", "checksum", "image_size")
    }
    queries = make_rows(generator, centers, QUERIES)
    best: list[tuple[np.ndarray, np.ndarray]] = []
    asked = queries.astype(np.float32)
    for start in range(0, count, 50_000):
        rows = make_rows(generator, centers, min(50_000, count - start))
        part = slice(start, start + len(rows))
        view["descriptors"][part] = rows
        view["checksum"][part] = [zlib.crc32(row.data) for row in rows]
        units = rows.astype(np.float32)
        units /= np.linalg.norm(units, axis=1, keepdims=True)
        scores = asked @ units.T
        at = np.argpartition(-scores, K, 1)[:, :K]
        best.append((np.take_along_axis(scores, at, 1), at + start))
    view["image_size"][:] = 100
    view["status"][:] = 1
    scores, rows = (np.hstack(parts) for parts in zip(*best, strict=True))
    truth = np.take_along_axis(rows, np.argsort(-scores, axis=1)[:, :K], 1)
    np.savez(folder / "queries.npz", queries=queries, truth=truth)


def one_index(folder: str, factory: str | None, memory: int | None) -> dict[str, Any]:
    """Build one index of the rows, and query it: all at once, and one by one."""
    from sppfeat import open_store
    from sppfeat.retrieval.faiss_index import IndexOptions, build_index
    from sppfeat.store.unit_vectors import to_units, unit_rows

    data = np.load(Path(folder, "queries.npz"))
    queries, truth = to_units(data["queries"]), data["truth"]
    rows = unit_rows(open_store(Path(folder, "rows.h5")))
    with Memory() as memory_used:
        built = build_index(rows, IndexOptions(factory=factory, memory=memory))
    file = Path(folder, "index.faiss")
    import faiss

    faiss.write_index(built.index, str(file))
    started = time.perf_counter()
    _, found = built.index.search(queries, K)
    together = time.perf_counter() - started
    started = time.perf_counter()
    for query in queries[:200]:
        built.index.search(query[None], K)
    single = (time.perf_counter() - started) / 200
    return {
        "factory": built.choice.factory,
        "effort": built.effort,
        "seconds": built.seconds,
        "tuned": built.recall,
        "peak_mb": memory_used.peak,
        "file_mb": file.stat().st_size / 1e6,
        "recall": float(np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, truth, strict=True)])),
        "queries_per_second": QUERIES / together,
        "single_ms": 1000 * single,
    }


class Memory:
    """The peak memory of this process within the block, in MB, sampled 50 times per second.

    The store's mapped pages are not counted: the system drops them when memory is needed.
    """

    def __enter__(self) -> Memory:
        self.peak = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            text = Path("/proc/self/status").read_text()
            self.peak = max(self.peak, int(text.partition("RssAnon:")[2].split()[0]) / 1000)


def overhead(folder: str, count: int, dim: int) -> dict[str, Any]:
    """A search through the library beside the raw FAISS call, on the same rows, in turn; medians."""
    from sppfeat import Recipe, open_store
    from sppfeat.retrieval import create_gallery, open_gallery
    from sppfeat.retrieval.faiss_index import IndexOptions
    from sppfeat.retrieval.search import SearchOptions, search_descriptors
    from sppfeat.store.writing import create_store

    path = Path(folder, f"small-{count}-{dim}.h5")
    names = [f"{number:07}.jpg" for number in range(count)]
    create_store(path, names, recipe=Recipe(), weights_sha256="0" * 64, dim=dim, source_root="/nowhere")
    columns = open_store(path).columns
    generator = np.random.default_rng(0)
    units = generator.standard_normal((count + QUERIES, dim), np.float32)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    for name, value in (("descriptors", units[:count].astype(np.float16)), ("status", 1)):
        np.memmap(path, columns[name].dtype, "r+", columns[name].offset, columns[name].shape)[:] = value
    create_gallery(open_store(path), Path(folder, f"g-{count}-{dim}"), IndexOptions(factory="Flat"))
    gallery = open_gallery(Path(folder, f"g-{count}-{dim}"))
    queries = units[count:]
    options = SearchOptions(k=K)
    raw: list[float] = []
    ours: list[float] = []
    for _ in range(7):
        started = time.perf_counter()
        gallery.index.search(queries, K)
        raw.append(time.perf_counter() - started)
        started = time.perf_counter()
        search_descriptors(gallery, queries, options)
        ours.append(time.perf_counter() - started)
    return {"raw": float(np.median(raw)), "ours": float(np.median(ours))}


def adding(folder: str, factory: str, count: int) -> dict[str, Any]:
    """Ten images more, three times, in a gallery of `count` rows: seconds and bytes written, medians."""
    from sppfeat import Recipe, open_store
    from sppfeat.retrieval import add_to_gallery, create_gallery
    from sppfeat.retrieval.faiss_index import IndexOptions
    from sppfeat.store.writing import create_store

    generator = np.random.default_rng(0)

    def store_of(name: str, rows: int) -> Path:
        path = Path(folder, f"{name}.h5")
        names = [f"{name}/{number:07}.jpg" for number in range(rows)]
        create_store(path, names, recipe=Recipe(), weights_sha256="0" * 64, dim=DIM, source_root="/nowhere")
        columns = open_store(path).columns
        values = generator.standard_normal((rows, DIM), np.float32).astype(np.float16)
        checksums = [zlib.crc32(row.data) for row in values]
        for column, content in (("descriptors", values), ("checksum", checksums), ("image_size", 100), ("status", 1)):
            at = columns[column]
            np.memmap(path, at.dtype, "r+", at.offset, at.shape)[:] = content
        return path

    gallery = Path(folder, f"added-{factory}")
    create_gallery(open_store(store_of(f"base-{factory}", count)), gallery, IndexOptions(factory=factory, recall=0.9))
    seconds, written = [], []
    for number in range(3):
        more = open_store(store_of(f"{factory}-{number}", 10))
        before = {file.stat().st_ino for file in gallery.iterdir()}
        started = time.perf_counter()
        add_to_gallery(more, gallery)
        seconds.append(time.perf_counter() - started)
        written.append(sum(file.stat().st_size for file in gallery.iterdir() if file.stat().st_ino not in before))
    whole = sum(file.stat().st_size for file in gallery.iterdir())
    return {"seconds": float(np.median(seconds)), "written": float(np.median(written)), "whole": whole}


def stages(folder: str) -> dict[str, Any]:
    """One query image on the CPU, warm: medians of 15, in milliseconds. The gallery is the photographs."""
    from sppfeat import Recipe, RunOptions, extract_folder, open_store
    from sppfeat.retrieval import create_gallery, open_gallery
    from sppfeat.retrieval.queries import describer_for
    from sppfeat.retrieval.search import SearchOptions, search_descriptors, search_images

    options = RunOptions(device="cpu")
    extract_folder(PHOTOS, Path(folder, "photos.h5"), Recipe(), options)
    create_gallery(open_store(Path(folder, "photos.h5")), Path(folder, "photos"))
    started = time.perf_counter()
    gallery = open_gallery(Path(folder, "photos"))
    opening = time.perf_counter() - started
    started = time.perf_counter()
    describer = describer_for(gallery, options)
    loading = time.perf_counter() - started
    image = str(next(iter(sorted(PHOTOS.rglob("*.jpg")))))
    rounds: dict[str, list[float]] = {"decode": [], "forward": [], "search": [], "whole": []}
    for _ in range(18):
        before = (describer.times.decode, describer.times.forward)
        started = time.perf_counter()
        search_images(gallery, [image], SearchOptions(k=K), describer=describer)
        rounds["whole"].append(time.perf_counter() - started)
        rounds["decode"].append(describer.times.decode - before[0])
        rounds["forward"].append(describer.times.forward - before[1])
        (done,) = describer.describe([image])
        assert done.rows is not None
        started = time.perf_counter()
        search_descriptors(gallery, done.rows, SearchOptions(k=K))
        rounds["search"].append(time.perf_counter() - started)
    found = {name: 1000 * float(np.median(values[3:])) for name, values in rounds.items()}
    return {"opening": 1000 * opening, "loading": 1000 * loading, **found}


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    child.__name__: child for child in (one_index, overhead, adding, stages)
}


def run(child: str, *arguments: object) -> dict[str, Any]:
    """Run a child in a separate process; its figures."""
    command = [sys.executable, __file__, "--child", child, json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(title: str, header: str) -> None:
    print(f"\n{title}\n\n| {header} |\n|{'---|' * (header.count('|') + 1)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="overhead,stages,adding,million", help="what to run (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="shrink the million rows by this, to try the script")
    parser.add_argument("--folder", type=Path, help="folder that keeps the rows, to reuse them")
    arguments = parser.parse_args()
    print(f"{processor()}, {available_cores()} cores, Python {platform.python_version()}, ", end="")
    print(", ".join(f"{name} {version(name)}" for name in ("faiss-cpu", "numpy", "torch")))
    with tempfile.TemporaryDirectory() as temporary:
        if "overhead" in arguments.parts:
            table(
                f"{QUERIES:,} queries of a ready matrix, Flat, {K} neighbors, medians of 7",
                "rows | values | raw FAISS, ms | library, ms | more",
            )
            for count, dim in ((20_000, 512), (100_000, 512), (2_000, 16_000)):
                found = run("overhead", temporary, count, dim)
                print(
                    f"| {count:,} | {dim:,} | {1000 * found['raw']:.1f} | {1000 * found['ours']:.1f} "
                    f"| {100 * (found['ours'] / found['raw'] - 1):+.1f} % |",
                    flush=True,
                )
        if "stages" in arguments.parts:
            found = run("stages", temporary)
            table(
                "one query image, 1 thread per image, default recipe, on the CPU, warm, medians of 15",
                "once: open the gallery | once: load the network | decode and resize | network and pooling | search "
                "13 x 16,000 | whole call",
            )
            names = ("opening", "loading", "decode", "forward", "search", "whole")
            print("| " + " | ".join(f"{found[name]:.1f} ms" for name in names) + " |", flush=True)
        if "adding" in arguments.parts:
            count = int(100_000 * arguments.scale)
            table(
                f"10 images added to a gallery of {count:,} x {DIM}, medians of 3",
                "index | seconds | kB written | MB of the gallery",
            )
            for factory in ("Flat", "HNSW32", f"IVF{256 if arguments.scale < 1 else 1024},SQ8"):
                found = run("adding", temporary, factory, count)
                sizes = f"{found['written'] / 1e3:.0f} | {found['whole'] / 1e6:.0f}"
                print(f"| {factory} | {found['seconds']:.2f} | {sizes} |", flush=True)
        if "million" in arguments.parts:
            count = int(ROWS * arguments.scale)
            folder = arguments.folder or Path(temporary)
            if not (folder / "queries.npz").exists():
                make_data(folder, count)
            table(
                f"{count:,} x {DIM} clustered rows, {QUERIES:,} queries beside them, {K} neighbors",
                "requested | index | set to | build, s | peak memory, MB | file, MB | recall@10 | queries/s, together "
                "| one by one, ms",
            )
            budget = int(1e9 * arguments.scale)
            for text, factory, memory in (
                ("--memory 1GB", None, budget),
                ("--memory 250MB", None, budget // 4),
                ("--memory 4GB", None, 4 * budget),
                ("--factory Flat", "Flat", None),
            ):
                found = run("one_index", str(folder), factory, memory)
                effort = ", ".join(f"{name} {value}" for name, value in found["effort"].items()) or "exact"
                print(
                    f"| {text} | {found['factory']} | {effort} | {found['seconds']:.0f} | {found['peak_mb']:.0f} "
                    f"| {found['file_mb']:.0f} | {found['recall']:.3f} | {found['queries_per_second']:.0f} "
                    f"| {found['single_ms']:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(CHILDREN[sys.argv[2]](*json.loads(sys.argv[3]))))
    else:
        main()
