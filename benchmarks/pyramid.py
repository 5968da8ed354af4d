"""The pyramid on a CPU against torch and torchvision: whole maps, and windows on one map.

    python benchmarks/pyramid.py

Values are compared first. Both sides of a row take turns within one process; medians are printed. Whole maps: against
`adaptive_max_pool2d` per level and `cat`, in the memory format named (the engines give channels last). Windows: against
`roi_pool` per level, on the map in the format that roi_pool expects.
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

from sppfeat import pool_pyramid, pool_rois
from sppfeat.machine import available_cores

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


def turns(sides: list[Callable[[], object]], repeats: int, seconds: float) -> list[float]:
    """Median seconds of one call of each side; they take turns, each for about `seconds`."""
    counts = []
    for side in sides:
        side()
        start = time.perf_counter()
        side()
        counts.append(max(1, round(seconds / max(1e-7, time.perf_counter() - start))))
    found: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, count, times in zip(sides, counts, found, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                side()
            times.append((time.perf_counter() - start) / count)
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
    boxes = torch.cat([torch.zeros_like(rois[:, :1]), rois], 1).to(feature_map.dtype)
    return torch.cat([roi_pool(feature_map[None], boxes, n).permute(0, 2, 3, 1).flatten(1) for n in levels], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.05, help="of each side in each turn")
    arguments = parser.parse_args()
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision"))
    print(f"{processor()}, {available_cores()} cores, Python {platform.python_version()}, {libraries}")
    print(f"levels {LEVELS}, float32; medians of {arguments.repeats}\n")

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
                        arguments.repeats,
                        arguments.seconds,
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
                arguments.repeats,
                arguments.seconds,
            )
            print(
                f"| {count} | {channels} x {height} x {width} | {','.join(map(str, levels))} | {1e3 * theirs:.0f} | "
                f"{1e3 * ours:.0f} | {theirs / ours:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
