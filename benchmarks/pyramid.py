"""The pyramid on a CPU against torch and torchvision: whole maps, and windows on one map.

    python benchmarks/pyramid.py

Values are compared first. Both sides of a row take turns within one process; medians are printed. Whole maps: against
`adaptive_max_pool2d` per level and `cat`, in the memory format named (the engines give channels last). Windows: against
`roi_pool` per level, on the map in the format that roi_pool expects. Gradients of maxima over windows: against the
same, and against autograd through tables of blocks, as on other devices; forward and backward, and backward alone.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
import torch.nn.functional as F
from extract import processor
from torchvision.ops import roi_pool

from sppfeat import SpatialPyramidPool, pool_pyramid, pool_rois
from sppfeat.machine import available_cores
from sppfeat.pyramid.blocks import max_of_blocks
from sppfeat.pyramid.pooling import pool_blocks

LEVELS = (6, 3, 2, 1)
# Channels, height and width: last blocks and heads of common networks at 224 and 448 pixels, and earlier layers.
MAPS = (
    (320, 7, 7),
    (320, 7, 10),
    (320, 14, 20),
    (1280, 7, 10),
    (2048, 7, 10),
    (512, 14, 20),
    (256, 43, 64),
    (64, 56, 56),
    (24, 112, 112),
)
BATCHES = (1, 8, 32)
LARGEST = 60_000_000  # values in a map; larger ones are left out


def whole(maps: torch.Tensor) -> torch.Tensor:
    """What people write: each level separately."""
    return torch.cat([F.adaptive_max_pool2d(maps, level).flatten(1) for level in LEVELS], 1)


def turns(
    sides: list[Callable[[], object]],
    repeats: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Median seconds of one call of each side; they take turns, each for about `seconds`."""
    counts = []
    for side in sides:
        side()
        start = clock()
        side()
        counts.append(max(1, round(seconds / max(1e-7, clock() - start))))
    found: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, count, times in zip(sides, counts, found, strict=True):
            start = clock()
            for _ in range(count):
                side()
            times.append((clock() - start) / count)
    return [statistics.median(times) for times in found]


def same_maps(ours: torch.Tensor, theirs: torch.Tensor, channels: int) -> bool:
    """Whether values are equal; theirs has each level's bins innermost, ours its channels."""
    parts = theirs.split([channels * level * level for level in LEVELS], 1)
    return torch.equal(ours, torch.cat([part.unflatten(1, (channels, -1)).mT.flatten(1) for part in parts], 1))


def random_rois(count: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, width, (count, 2), generator=generator).sort(1)[0]
    y = torch.randint(0, height, (count, 2), generator=generator).sort(1)[0]
    return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)


def by_roi_pool(feature_map: torch.Tensor, rois: torch.Tensor, levels: tuple[int, ...]) -> torch.Tensor:
    return maps_by_roi_pool(feature_map[None], [rois], levels)


def maps_by_roi_pool(maps: torch.Tensor, rois: list[torch.Tensor], levels: tuple[int, ...]) -> torch.Tensor:
    numbered = [torch.cat([torch.full_like(some[:, :1], at), some], 1) for at, some in enumerate(rois)]
    boxes = torch.cat(numbered).to(maps.dtype)
    return torch.cat([roi_pool(maps, boxes, n).permute(0, 2, 3, 1).flatten(1) for n in levels], 1)


def by_autograd(maps: torch.Tensor, rois: list[torch.Tensor], levels: tuple[int, ...]) -> torch.Tensor:
    cells = [one.permute(1, 2, 0).contiguous() for one in maps]
    return torch.cat([pool_blocks(c, r, levels, "max", 1.0, max_of_blocks) for c, r in zip(cells, rois, strict=True)])


def gradients(repeats: int, seconds: float, clock: Callable[[], float]) -> None:
    """The table of gradients."""
    print("\n| images x windows | map | pass | roi_pool per level, ms | autograd, ms | sppfeat, ms | than roi_pool |")
    print("|---|---|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)
    pool = SpatialPyramidPool(LEVELS)
    for images, count, (channels, height, width) in ((1, 2000, (256, 43, 64)), (2, 64, (320, 15, 20))):
        maps = torch.randn(images, channels, height, width, generator=generator).requires_grad_()
        rois = list(random_rois(images * count, height, width).split(count))
        forwards: list[Callable[[], torch.Tensor]] = [
            lambda m=maps, r=rois: maps_by_roi_pool(m, r, LEVELS),  # type: ignore[misc]
            lambda m=maps, r=rois: by_autograd(m, r, LEVELS),  # type: ignore[misc]
            lambda m=maps, r=rois: pool(m, r),  # type: ignore[misc]
        ]
        rows = [forward() for forward in forwards]
        of_rows = torch.randn(rows[0].shape, generator=generator)

        def back(pooled: torch.Tensor, m: torch.Tensor = maps, g: torch.Tensor = of_rows) -> torch.Tensor:
            return torch.autograd.grad(pooled, m, g, retain_graph=True)[0]

        # Autograd halves the gradient of two equal maxima; roi_pool, as sppfeat, gives it to the first.
        same = all(torch.equal(rows[0], one) for one in rows)
        if not same or not torch.allclose(back(rows[2]), back(rows[0]), rtol=1e-4, atol=1e-3):
            raise SystemExit(f"gradients, {images} x {count} windows: other values")
        both = turns([lambda f=f, b=back: b(f()) for f in forwards], repeats, seconds, clock)  # type: ignore[misc]
        alone = turns([lambda one=one, b=back: b(one) for one in rows], repeats, seconds, clock)  # type: ignore[misc]
        for name, times in (("forward and backward", both), ("backward", alone)):
            theirs, autograd, ours = (1e3 * time for time in times)
            print(
                f"| {images} x {count} | {channels} x {height} x {width} | {name} | {theirs:.1f} | {autograd:.1f} | "
                f"{ours:.1f} | {theirs / ours:.1f} |",
                flush=True,
            )


def values(repeats: int, seconds: float) -> None:
    """The tables of pooling without gradients: whole maps, then windows."""
    print("| channels x height x width | batch | memory | per level, us | sppfeat, us | times as fast |")
    print("|---|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for channels, height, width in MAPS:
            for batch in BATCHES:
                if batch * channels * height * width > LARGEST:
                    continue
                contiguous = torch.randn(batch, channels, height, width, generator=generator)
                for memory, maps in (
                    ("channels last", contiguous.contiguous(memory_format=torch.channels_last)),
                    ("contiguous", contiguous),
                ):
                    if not same_maps(pool_pyramid(maps, LEVELS), whole(maps), channels):
                        raise SystemExit(f"{list(maps.shape)}: other values")
                    theirs, ours = turns(
                        [lambda maps=maps: whole(maps), lambda maps=maps: pool_pyramid(maps, LEVELS)],  # type: ignore[misc]
                        repeats,
                        seconds,
                    )
                    print(
                        f"| {channels} x {height} x {width} | {batch} | {memory} | {1e6 * theirs:.0f} | "
                        f"{1e6 * ours:.0f} | {theirs / ours:.2f} |",
                        flush=True,
                    )

        print("\n| windows | map | levels | roi_pool per level, ms | sppfeat, ms | times as fast |")
        print("|---|---|---|---|---|---|")
        for count, (channels, height, width), levels in (
            (2000, (256, 43, 64), LEVELS),
            (2000, (256, 43, 64), (3, 2, 1)),
            (2000, (256, 43, 64), (4, 2, 1)),
            (2000, (320, 15, 20), LEVELS),
            (200, (256, 43, 64), LEVELS),
        ):
            feature_map = torch.randn(channels, height, width, generator=generator)
            rois = random_rois(count, height, width)
            if not torch.equal(pool_rois(feature_map, rois, levels), by_roi_pool(feature_map, rois, levels)):
                raise SystemExit(f"windows, levels {levels}: other values")
            theirs, ours = turns(
                [
                    lambda m=feature_map, r=rois, n=levels: by_roi_pool(m, r, n),  # type: ignore[misc]
                    lambda m=feature_map, r=rois, n=levels: pool_rois(m, r, n),  # type: ignore[misc]
                ],
                repeats,
                seconds,
            )
            print(
                f"| {count} | {channels} x {height} x {width} | {','.join(map(str, levels))} | {1e3 * theirs:.0f} | "
                f"{1e3 * ours:.0f} | {theirs / ours:.1f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.05, help="of each side in each turn")
    parser.add_argument("--gradients", action="store_true", help="only the table of gradients")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, on all sides")
    parser.add_argument(
        "--processor-time", action="store_true", help="of gradients; with one thread, for a machine that is not idle"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision"))
    print(f"{processor()}, {available_cores()} cores, Python {platform.python_version()}, {libraries}")
    print(f"levels {LEVELS}, float32; torch's threads {arguments.threads}; medians of {arguments.repeats}\n")
    if not arguments.gradients:
        values(arguments.repeats, arguments.seconds)
    gradients(
        arguments.repeats, arguments.seconds, time.process_time if arguments.processor_time else time.perf_counter
    )


if __name__ == "__main__":
    main()
