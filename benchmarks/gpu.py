"""An NVIDIA GPU, in one command: are the values right, and how close is each part to the GPU's limits?

    python benchmarks/gpu.py [--images FOLDER]

Prints Markdown: values first (it stops at a wrong one), then resizing against a processor's, the pyramid over whole
maps against torch and against the bandwidth of a copy, windows against roi_pool, images per second of bare networks and
from JPEG files to a store, the SVM's Gram matrix and solution, and FAISS. Without a GPU it says so, and compares the
kernels in Triton's interpreter with a processor instead: values, no times. Without `--images`, random images are
written as JPEG files.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from extract import processor
from pyramid import LEVELS, by_roi_pool, random_rois, same_maps, whole

from sppfeat import Recipe, RunOptions, extract_folder, open_store, pool_pyramid, pool_rois
from sppfeat.machine import available_cores
from sppfeat.pyramid import pooling as pyramid

INTERPRETED = """
import torch
from sppfeat import pool_pyramid, pool_rois
from sppfeat.pyramid import triton_kernels as pyramid_triton
pyramid_triton._CHANNELS, pyramid_triton._CELLS = 4, 8
maps = torch.randn(2, 3, 7, 10, generator=torch.Generator().manual_seed(0))
whole = torch.tensor([[0, 0, 0, 9, 6], [1, 0, 0, 9, 6]], dtype=torch.int32)
some = torch.tensor([[0, 2, 1, 8, 5], [0, 3, 3, 3, 3]], dtype=torch.int32)
cells = maps.permute(0, 2, 3, 1).contiguous()
for levels in ((6, 3, 2, 1), (4, 3, 2, 1)):
    assert torch.equal(pyramid_triton.max_of_windows(cells, whole, levels), pool_pyramid(maps, levels))
    assert torch.equal(pyramid_triton.max_of_windows(cells, some, levels), pool_rois(maps[0], some[:, 1:], levels))
from gpu import resized_alike
assert resized_alike("cpu", [((31, 23), (20, 32)), ((16, 16), (32, 16))])
"""


def median(call: Callable[[], object], repeats: int = 20) -> float:
    """Median seconds of a call on the GPU, by its own clock."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def check(what: str, right: bool) -> None:
    if not right:
        raise SystemExit(f"{what}: wrong values")
    print(f"* {what}: as expected")


def resized_alike(device: str, sizes: list[tuple[tuple[int, int], tuple[int, int]]]) -> bool:
    """Whether the kernel that resizes gives the bytes that a processor gives, from a width and height to another."""
    from PIL import Image

    from sppfeat.engines.card_resize import resize_into
    from sppfeat.images.resampling import resample

    every_byte = torch.arange(256, dtype=torch.float32, device=device)[:, None].expand(256, 3).contiguous()
    generator, alike = np.random.default_rng(0), True
    for (width, height), (to_width, to_height) in sizes:
        pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
        into = torch.empty((to_height, to_width, 3), device=device).permute(2, 0, 1)
        resize_into(into, torch.from_numpy(pixels).to(device), (to_width, to_height), "bicubic", every_byte)
        expected = resample(Image.fromarray(pixels), (to_width, to_height), "bicubic")
        alike = alike and np.array_equal(into.permute(1, 2, 0).cpu().numpy(), expected)
    return alike


def resizing() -> None:
    from PIL import Image

    from sppfeat.engines.card_resize import resize_into
    from sppfeat.images.resampling import resample

    print("\n| resizing, bicubic, to bfloat16 | kernel, us | launched from Python, us | one core, to bytes, us |")
    print("|---|---|---|---|")
    table = torch.rand((256, 3), device="cuda").bfloat16()
    for size, target in (((500, 375), (288, 224)), ((1024, 768), (288, 224)), ((500, 375), (608, 448))):
        pixels = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8)
        image, there = Image.fromarray(pixels.numpy()), pixels.cuda()
        into = torch.empty((target[1], target[0], 3), device="cuda", dtype=torch.bfloat16).permute(2, 0, 1)

        def launch(into: torch.Tensor = into, there: torch.Tensor = there, to: tuple[int, int] = target) -> None:
            resize_into(into, there, to, "bicubic", table)

        kernel = median(launch)
        began = time.perf_counter()
        for _ in range(1000):
            launch()
        launched = (time.perf_counter() - began) / 1000
        torch.cuda.synchronize()
        began = time.process_time()
        for _ in range(20):
            resample(image, target, "bicubic")
        core = (time.process_time() - began) / 20
        print(
            f"| {size[0]} x {size[1]} to {target[0]} x {target[1]} | {1e6 * kernel:.1f} | {1e6 * launched:.1f} | "
            f"{1e6 * core:.0f} |"
        )


def check_values(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        maps = torch.randn(8, 320, 14, 20, generator=generator).to(dtype)
        rois = random_rois(500, 14, 20)
        check(f"whole maps, {dtype}", torch.equal(pool_pyramid(maps.cuda(), LEVELS).cpu(), pool_pyramid(maps, LEVELS)))
        here, there = pool_rois(maps[0].cuda(), rois, LEVELS).cpu(), pool_rois(maps[0], rois, LEVELS)
        check(f"windows, {dtype}", torch.equal(here, there))
    if pyramid._triton_failed:
        raise SystemExit("the Triton kernels did not run: see the warning above")
    sizes = [((500, 375), (288, 224)), ((375, 500), (224, 288)), ((100, 80), (448, 352)), ((224, 900), (224, 896))]
    check("resized images, as a processor's", resized_alike("cuda", sizes))
    some = sorted(folder.rglob("*.jpg"))[:64]
    listing = folder / "some.txt"
    listing.write_text("\n".join(map(str, some)) + "\n")
    rows = []
    for device in ("cpu", "cuda"):
        extract_folder(
            listing, folder / f"{device}.h5", Recipe(), RunOptions(device=device, engine="torch"), overwrite=True
        )
        rows.append(np.array(open_store(folder / f"{device}.h5").descriptors, np.float64))
    worst = float((np.linalg.norm(rows[0] - rows[1], axis=1) / np.linalg.norm(rows[0], axis=1)).max())
    check(f"descriptors in float32, at most {worst:.1e} from the CPU's", worst < 1e-3)


def extraction(folder: Path, count: int) -> None:
    for recipe in (
        Recipe(precision="bfloat16", size_multiple=224),
        Recipe(backbone="torchvision:resnet50", weights="random", precision="bfloat16", size_multiple=224),
        Recipe(backbone="timm:convnext_tiny", weights="random", precision="bfloat16", size_multiple=224),
    ):
        print(f"\n| {recipe.backbone} | images/s | share of the bare network |\n|---|---|---|")
        extraction_by(recipe, folder, count)


def extraction_by(recipe: Recipe, folder: Path, count: int) -> None:
    from sppfeat.backbones.backbone import load_backbone
    from sppfeat.images.resizing import prepare_image

    files = sorted(folder.rglob("*.jpg"))[:count]
    backbone = load_backbone(recipe).to(torch.device("cuda"))
    shape = prepare_image(str(files[0]), backbone.descriptions[0].recipe).inputs[0].shape
    images = torch.randint(0, 256, (128, *shape), dtype=torch.uint8, device="cuda")
    with torch.inference_mode():
        eager = len(images) / median(lambda: backbone.feature_maps(images))
        print(f"| bare network, bfloat16, eager, batches of 128, {shape[0]} x {shape[1]} | {eager:.0f} | |")
        compiled = torch.compile(backbone.trunk, mode="max-autotune-no-cudagraphs")
        inputs = images.permute(0, 3, 1, 2).to(torch.bfloat16)
        fastest = len(images) / median(lambda: compiled(inputs))
        print(f"| bare network, bfloat16, compiled | {fastest:.0f} | 1.00 |")
    listing = folder / "all.txt"
    listing.write_text("\n".join(map(str, files)) + "\n")
    for _ in range(2):  # the first run warms files and card up
        done = extract_folder(listing, folder / "gpu.h5", recipe, RunOptions(device="cuda"), overwrite=True)
    busy = done.stages.decode / done.stages.workers
    print(
        f"| from {len(files)} JPEG files to a store | {done.images_per_second:.0f} | "
        f"{done.images_per_second / fastest:.2f} |"
    )
    print(f"| decoding alone would allow ({done.stages.workers} threads) | {done.described / busy:.0f} | |")


def pooling() -> None:
    print("\n| whole maps, bfloat16 | torch form, us | per level, us | kernel, us | times torch | share of a copy |")
    print("|---|---|---|---|---|---|")
    for shape in ((128, 320, 7, 10), (128, 1280, 7, 10), (32, 256, 43, 64), (128, 256, 43, 64)):
        maps = torch.randn(shape, device="cuda").bfloat16().contiguous(memory_format=torch.channels_last)
        check(f"maps of {list(shape)}", same_maps(pool_pyramid(maps, LEVELS), whole(maps), shape[1]))
        kernel = median(lambda maps=maps: pool_pyramid(maps, LEVELS))  # type: ignore[misc]
        level = median(lambda maps=maps: whole(maps))  # type: ignore[misc]
        with torch_form():
            plain = median(lambda maps=maps: pool_pyramid(maps, LEVELS))  # type: ignore[misc]
        target = torch.empty_like(maps)
        copy = 2 * maps.nbytes / median(lambda a=target, b=maps: a.copy_(b))  # type: ignore[misc]
        moved = maps.nbytes + 2 * shape[0] * 50 * shape[1]
        print(
            f"| {' x '.join(map(str, shape))} | {1e6 * plain:.0f} | {1e6 * level:.0f} | {1e6 * kernel:.0f} | "
            f"{plain / kernel:.2f} | {moved / kernel / copy:.2f} |"
        )
    print("\n| windows on 256 x 43 x 64, float32 | roi_pool per level, ms | kernel, ms | times as fast |")
    print("|---|---|---|---|")
    feature_map = torch.randn(256, 43, 64, device="cuda")
    for count in (500, 2000, 8000):
        rois = random_rois(count, 43, 64).cuda()
        check(
            f"{count} windows",
            torch.equal(pool_rois(feature_map, rois, LEVELS), by_roi_pool(feature_map, rois, LEVELS)),
        )
        theirs = median(lambda r=rois: by_roi_pool(feature_map, r, LEVELS))  # type: ignore[misc]
        ours = median(lambda r=rois: pool_rois(feature_map, r, LEVELS))  # type: ignore[misc]
        print(f"| {count} | {1e3 * theirs:.2f} | {1e3 * ours:.2f} | {theirs / ours:.1f} |")


def one_image(folder: Path, device: str = "cuda", count: int = 2000) -> None:
    """Descriptors of the windows of one image, from its file on, and what R-CNN's passes alone would take."""
    from sppfeat.backbones.backbone import load_backbone
    from sppfeat.extraction import Describer
    from sppfeat.images import Item
    from sppfeat.images.reading import read_image

    path = min(folder.rglob("*.jpg"))
    width, height = read_image(str(path)).size
    corners = np.sort(np.random.default_rng(0).uniform(0, [[width], [height]], (count, 2, 2)), 2)
    windows = corners.transpose(0, 2, 1).reshape(count, 4)
    recipe = Recipe(scales=(448,))
    describer = Describer(recipe, RunOptions(device=device, engine="torch"))
    for _ in range(3):
        start = time.perf_counter()
        (found,) = describer.describe([Item(str(path.parent), path.name, windows)])
        ours = time.perf_counter() - start
        if found.rows is None or len(found.rows) != count:
            raise SystemExit(f"windows of one image: {found.error}")
    backbone = load_backbone(recipe).to(torch.device(device))
    crops = torch.zeros((min(128, count), 224, 224, 3), dtype=torch.uint8, device=device)
    for _ in range(2):
        start = time.perf_counter()
        for _ in range(-(-count // len(crops))):
            rows = pool_pyramid(backbone.feature_maps(crops)[0], LEVELS)
        rows.cpu()  # waits for it
        theirs = time.perf_counter() - start
    print(f"\n{count} windows of one image: {1e3 * ours:.0f} ms from its file to rows, at short side 448, float32,")
    print(f"R-CNN's passes alone, over {count} squares of 224: {theirs:.2f} s, {theirs / ours:.0f} times as long")


@contextlib.contextmanager
def torch_form() -> Iterator[None]:
    before, pyramid._triton_failed = pyramid._triton_failed, True
    try:
        yield
    finally:
        pyramid._triton_failed = before


def svm() -> None:
    from sppfeat import train_linear_svm

    print("\n| linear SVMs, 3030 x 16000, 101 classes | seconds |\n|---|---|")
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(101), 30)
    rows = generator.standard_normal((101, 16000), np.float32)[labels]
    rows += 3 * generator.standard_normal(rows.shape, np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for device in ("cuda", "cpu"):
        for _ in range(2):
            start = time.perf_counter()
            train_linear_svm(rows, labels, c=1.0, device=device)
            seconds = time.perf_counter() - start
        print(f"| Gram matrix and solution on {device} | {seconds:.2f} |")


def search() -> None:
    try:
        import faiss
    except ImportError:
        print("\nFAISS is not installed.")
        return
    if not getattr(faiss, "get_num_gpus", lambda: 0)():
        print(f"\nFAISS {faiss.__version__} sees no GPU (faiss-cpu is installed, or there is none).")
        return
    rows = np.random.default_rng(0).standard_normal((200_000, 512), np.float32)
    index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(512))
    index.add(rows)
    index.search(rows[:1000], 10)
    start = time.perf_counter()
    _, found = index.search(rows[:10_000], 10)
    seconds = time.perf_counter() - start
    exact = faiss.IndexFlatIP(512)
    exact.add(rows)
    check("FAISS's neighbors", np.array_equal(found[:50, 0], exact.search(rows[:50], 10)[1][:, 0]))
    print(f"\nFAISS, exact, 200,000 x 512, 10 neighbors: {10_000 / seconds:.0f} queries/s")


def images_in(folder: Path, count: int) -> None:
    """Random images, smooth as photographs are, as baseline JPEG files of 500 x 375."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        data = io.BytesIO()
        small.resize((500, 375), Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
        (folder / f"{number:05}.jpg").write_bytes(data.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of JPEG files")
    parser.add_argument("--count", type=int, default=4000)
    arguments = parser.parse_args()
    versions = []
    for name in ("torch", "torchvision", "triton"):
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    print(f"{processor()}, {available_cores()} cores, Python {platform.python_version()}, {', '.join(versions)}")
    if not torch.cuda.is_available():
        print("\nNo NVIDIA GPU found: nothing was measured on one.")
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
        done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the kernels, interpreted: wrong values\n{done.stderr}")
        print("\n* the kernels of the pyramid, in Triton's interpreter: the values of the torch form, bit by bit")
        print("* the kernel that resizes: the bytes of a processor")
        return
    driver = torch.cuda.get_device_properties(0)
    print(f"{driver.name}, {driver.total_memory >> 30} GiB, CUDA {torch.version.cuda}\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.images is None:
            images_in(folder, arguments.count)
        else:
            for number, path in enumerate(sorted(arguments.images.rglob("*.jpg"))[: arguments.count]):
                (folder / f"{number:05}.jpg").symlink_to(path.resolve())
        check_values(folder)
        with torch.inference_mode():
            resizing()
            pooling()
            one_image(folder)
        extraction(folder, arguments.count)
        svm()
        search()


if __name__ == "__main__":
    main()
