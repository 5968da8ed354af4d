"""How long a page waits for its hits: from upload to answer, alone and twenty at once, and from start to first answer.
And how long it takes to lay out the map, to make its sheets, and to draw it.

    python benchmarks/serve.py hits FOLDER-OF-IMAGES [--rows 100000]
    python benchmarks/serve.py map FOLDER-OF-IMAGES [--rows 100000]

The gallery holds the folder's images, projected to 512 values, and as many rows besides, which are theirs with noise.
Queries are the folder's images at 640 x 480. Tables are printed as Markdown.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

from sppfeat import Recipe, RunOptions, extract_folder, open_store
from sppfeat.retrieval import ProjectionOptions, create_gallery, open_gallery
from sppfeat.retrieval.gallery_files import Content, GalleryRows, changing, write_generation
from sppfeat.store import normalize_rows

QUERIES, AT_ONCE, ROUNDS = 100, 20, 5


def make_gallery(given: Path, path: Path, rows: int) -> None:
    folder = path.parent / "images"
    shutil.copytree(given, folder)
    extract_folder(folder, path.parent / "f.h5", Recipe(), RunOptions(device="cpu"))
    create_gallery(open_store(path.parent / "f.h5"), path, projection=ProjectionOptions(dims=512))
    gallery = open_gallery(path)
    index, table = gallery.index, gallery.rows
    generator = np.random.default_rng(0)
    held = index.reconstruct_n(0, index.ntotal)
    missing = rows - index.ntotal
    like = generator.integers(0, len(held), missing)
    copies = held[like]
    index.add(normalize_rows(copies + 0.05 * generator.standard_normal(copies.shape, np.float32)))
    images = [folder / name for name in table.names]
    (folder / "copies").mkdir()
    for number, one in enumerate(like.tolist()):
        os.link(images[one], folder / f"copies/{number:07}.jpg")
    names = [*table.names, *(f"copies/{number:07}.jpg" for number in range(missing))]
    more = GalleryRows(
        names,
        table.roots,
        np.append(table.root, np.zeros(missing, np.int64)),
        np.append(table.checksum, np.zeros(missing, np.uint32)),
    )
    with changing(path):
        about = msgspec.structs.replace(gallery.about, sources=[])
        write_generation(path, about, gallery.projection, Content(index, more, None), previous=gallery.about)


def started(path: Path) -> tuple[subprocess.Popen[str], str]:
    given = [sys.executable, "-c", "from sppfeat_cli import main; main()"]
    given += ["serve", str(path), "--port", "0", "--device", "cpu"]
    child = subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    return child, child.stdout.readline().split()[1]


def ask(client: httpx.Client, address: str, jpeg: bytes) -> tuple[float, dict[str, float]]:
    """Milliseconds from upload to hits, and those that the server counted."""
    began = time.perf_counter()
    done = client.post(f"{address}api/search", files={"image": ("q.jpg", jpeg)})
    spent = 1000 * (time.perf_counter() - began)
    done.raise_for_status()
    assert len(done.json()["hits"]) == 24
    return spent, done.json()["milliseconds"]


def draw(path: Path) -> None:
    """The map: laid out, made into sheets, and drawn while it is moved and zoomed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run(["sppfeat", "index", "--map", "--add-to", str(path)], check=True, capture_output=True)
    spent, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    assert peak > before.ru_maxrss / 1024  # no other child was larger
    print("| what | |\n|---|---|")
    print(f"| laid out by `index --map`, s | {spent:.1f} |\n| its peak memory, MB | {peak:.0f} |", flush=True)
    child, address = started(path)
    with httpx.Client(timeout=60, base_url=address) as client:
        began = time.perf_counter()
        client.post("/api/map")
        while client.get("/api/map").json()["state"] == "computing":
            time.sleep(0.2)
        assert client.get("/api/map").json()["state"] == "ready"
    print(f"| sheets of thumbnails, s | {time.perf_counter() - began:.1f} |", flush=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        began = time.perf_counter()
        page.goto(f"{address}#/map")
        page.locator("#map-status", has_text="in view").wait_for(timeout=60_000)
        print(f"| from address to drawn map, s | {time.perf_counter() - began:.1f} |")
        page.evaluate(
            """() => {
                window.frames_ = [];
                let before = performance.now();
                const tick = (now) => { window.frames_.push(now - before); before = now; requestAnimationFrame(tick); };
                requestAnimationFrame(tick);
            }"""
        )
        area = page.locator("#map-canvas").bounding_box()
        assert area is not None
        x, y = area["x"] + area["width"] / 2, area["y"] + area["height"] / 2
        page.mouse.move(x, y)
        for what, turns in (("of all images", 0), ("four times as large", 8), ("64 times as large", 24)):
            for _ in range(turns):
                page.mouse.wheel(0, -120)
            page.wait_for_timeout(3000)  # sheets arrive
            page.mouse.move(x, y)
            page.mouse.down()
            page.evaluate("window.frames_.length = 0")
            for step in range(120):
                page.mouse.move(x + (step % 40) * 4, y + (step % 30) * 4)
                page.wait_for_timeout(8)
            frames = sorted(page.evaluate("window.frames_"))
            page.mouse.up()
            print(
                f"| a frame while it is dragged, {what}: median, 95 %, ms | {statistics.median(frames):.0f}, "
                f"{frames[int(0.95 * len(frames))]:.0f} |"
            )
        browser.close()
    child.terminate()
    child.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("hits", "map"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        path = Path(work, "g")
        make_gallery(given.folder, path, given.rows)
        if given.what == "map":
            return draw(path)
        queries = []
        for file in sorted(given.folder.rglob("*.jpg"))[:QUERIES]:
            content = io.BytesIO()
            with Image.open(file) as image:
                image.convert("RGB").resize((640, 480)).save(content, "JPEG", quality=90)
            queries.append(content.getvalue())
        first = []
        for _ in range(3):
            began = time.perf_counter()
            child, address = started(path)
            ready = time.perf_counter() - began
            with httpx.Client(timeout=60) as client:
                ask(client, address, queries[0])
            first.append((ready, time.perf_counter() - began))
            child.terminate()
            child.wait()
        child, address = started(path)
        with httpx.Client(timeout=60) as client:
            for query in queries[:5]:
                ask(client, address, query)
            alone = [ask(client, address, query) for query in queries]
        together: list[float] = []
        with ThreadPoolExecutor(AT_ONCE) as threads:
            clients = [httpx.Client(timeout=60) for _ in range(AT_ONCE)]
            for number in range(ROUNDS):
                part = [queries[(number * AT_ONCE + at) % len(queries)] for at in range(AT_ONCE)]
                done = threads.map(lambda at, part=part: ask(clients[at], address, part[at])[0], range(AT_ONCE))
                together += list(done)
        child.terminate()
        child.wait()
        spent = sorted(one for one, _ in alone)
        print(f"{given.rows:,} x 512, Flat; {len(queries)} queries of 640 x 480; 24 hits\n")
        print("| what | median, ms | 95 %, ms |\n|---|---|---|")
        print(f"| from upload to hits | {statistics.median(spent):.0f} | {spent[int(0.95 * len(spent))]:.0f} |")
        for name in ("describe", "search"):
            values = sorted(times[name] for _, times in alone)
            print(f"| of which {name} | {statistics.median(values):.1f} | {values[int(0.95 * len(values))]:.1f} |")
        together.sort()
        print(
            f"| {AT_ONCE} at once, {ROUNDS} times, none failed | {statistics.median(together):.0f} | "
            f"{together[int(0.95 * len(together))]:.0f} |"
        )
        page, answer = (1000 * statistics.median(times) for times in zip(*first, strict=True))
        print(f"| from start to the page | {page:.0f} | |\n| from start to the first answer | {answer:.0f} | |")


if __name__ == "__main__":
    main()
