"""Training-free pooling from the literature, on the feature maps of one network at one scale, in one table.

    python benchmarks/pooling.py DATA [--backbone efficientnet_lite0] [--scale 224]

DATA: see accuracy.py. Maps are computed once (and those of mirror images), then pooled in each way. Caltech-101: mean
accuracy over the classes of the fixed split, linear SVMs with C = 1 and 10. KTH: mean average precision. What is
learned (means, principal components) is learned from the training images of Caltech-101, for both.
"""

from __future__ import annotations

import argparse
import platform
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
from extract import processor

from sppfeat import Recipe, RunOptions, train_linear_svm
from sppfeat.backbones import Network
from sppfeat.engines import load_engine
from sppfeat.images import find_images, prepare_image
from sppfeat.machine import available_cores
from sppfeat.pyramid import pool_maps

LEVELS = (6, 3, 2, 1)
Maps = Sequence[np.ndarray]


def unit(rows: np.ndarray) -> np.ndarray:
    found: np.ndarray = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
    return found


def pooled(maps: Maps, pooling: str = "max", gem_p: float = 3.0) -> np.ndarray:
    """[N, bins, C] of maps [1, h, w, C]."""
    channels = maps[0].shape[-1]
    return np.stack([pool_maps(one, LEVELS, pooling, gem_p).reshape(-1, channels) for one in maps])


class Learned:
    """Principal components of the bins of some rows [N, bins, C]."""

    def __init__(self, rows: np.ndarray) -> None:
        bins = rows.reshape(-1, rows.shape[-1]).astype(np.float64)
        self._mean = bins.mean(0)
        self._values, self._vectors = np.linalg.eigh(np.cov(bins.T))

    def __call__(self, rows: np.ndarray, *, keep: int | None = None, power: float = 0.0) -> np.ndarray:
        """Bins projected onto the first components, each divided by its deviation to some power, a tenth of the mean
        variance added."""
        values = 0.9 * self._values + 0.1 * self._values.mean()
        matrix = (self._vectors * values ** (-power / 2))[:, ::-1][:, :keep]
        found: np.ndarray = ((rows - self._mean) @ matrix).astype(np.float32)
        return found


def accuracy(rows: np.ndarray, names: Sequence[str], c: float) -> float:
    part, label, *_ = np.array([name.split("/")[:2] for name in names]).T
    train = part == "train"
    svm = train_linear_svm(rows[train], label[train], c=c)
    found = np.array(svm.classes)[(rows[~train] @ svm.weights.T + svm.biases).argmax(1)]
    right, label = found == label[~train], label[~train]
    return 100 * float(np.mean([right[label == one].mean() for one in np.unique(label)]))


def mean_average_precision(rows: np.ndarray, names: Sequence[str]) -> float:
    rows = unit(rows)
    objects = np.array([int(re.search(r"obj(\d+)_", name)[1]) for name in names])  # type: ignore[index]
    asked = np.array([name.startswith("client/") for name in names])
    values = []
    for row, wanted in zip(rows[asked], objects[asked], strict=True):
        hit = objects[~asked][np.argsort(-(rows[~asked] @ row), kind="stable")] == wanted
        values.append(float((np.cumsum(hit) / np.arange(1, len(hit) + 1))[hit].mean()))
    return 100 * float(np.mean(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--backbone", default=Recipe.backbone)
    parser.add_argument("--scale", type=int, default=224)
    arguments = parser.parse_args()
    network = Network(Recipe(backbone=arguments.backbone, scales=(arguments.scale,)))
    engine = load_engine(network, RunOptions(device="cpu"))

    def maps_of(folder: Path) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
        found = find_images([folder])
        pixels = [prepare_image(item, network.recipe).inputs[0] for item in found.items]
        with ThreadPoolExecutor(engine.streams) as threads:
            plain = list(threads.map(lambda one: engine.feature_maps(one[None])[0], pixels))
            mirror = list(
                threads.map(lambda one: engine.feature_maps(np.ascontiguousarray(one[None, :, ::-1]))[0], pixels)
            )
        return [item.name for item in found.items], plain, mirror

    sets = [maps_of(arguments.data / name) for name in ("caltech101-subset", "kth-buildings")]
    train = [at for at, name in enumerate(sets[0][0]) if name.startswith("train/")]
    learned = Learned(pooled([sets[0][1][at] for at in train]))
    ways: dict[str, Callable[[Maps, Maps], np.ndarray]] = {
        "maximum (default)": lambda maps, _: pooled(maps),
        "average": lambda maps, _: pooled(maps, "avg"),
        "generalized mean, p = 3": lambda maps, _: pooled(maps, "gem"),
        "generalized mean, p = 6": lambda maps, _: pooled(maps, "gem", 6.0),
        "regional maxima, unit length each, averaged (R-MAC)": lambda maps, _: unit(pooled(maps)).mean(1),
        "regional generalized means, averaged (SuperGlobal)": lambda maps, _: pooled(maps, "gem").mean(1),
        "bins of unit length": lambda maps, _: unit(pooled(maps)),
        "signed square root": lambda maps, _: signed(pooled(maps), 0.5),
        "signed power 0.25": lambda maps, _: signed(pooled(maps), 0.25),
        "128 principal components of bins": lambda maps, _: learned(pooled(maps), keep=128),
        "bins half whitened": lambda maps, _: learned(pooled(maps), power=0.5),
        "bins whitened": lambda maps, _: learned(pooled(maps), power=1.0),
        "mean with the mirror image": lambda maps, other: unit(flat(pooled(maps))) + unit(flat(pooled(other))),
        "maximum with the mirror image": lambda maps, other: np.maximum(pooled(maps), pooled(other)),
        "maximum and average beside each other": lambda maps, _: np.hstack(
            [unit(flat(pooled(maps))), unit(flat(pooled(maps, "avg")))]
        ),
    }
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "openvino", "pillow"))
    print(f"{processor()}, {available_cores()} cores, Python {platform.python_version()}, {libraries}")
    print(f"{arguments.backbone}, {network.descriptions[0].layer.name}, scale {arguments.scale}\n")
    print("| pooling | values | Caltech-101, C = 1 | C = 10 | KTH mAP |\n|---|---|---|---|---|")
    for name, way in ways.items():
        classes, buildings = (unit(flat(way(plain, mirror))) for _, plain, mirror in sets)
        values = [accuracy(classes, sets[0][0], c) for c in (1.0, 10.0)]
        found = mean_average_precision(buildings, sets[1][0])
        print(f"| {name} | {classes.shape[1]:,} | {values[0]:.2f} | {values[1]:.2f} | {found:.1f} |", flush=True)


def signed(rows: np.ndarray, power: float) -> np.ndarray:
    found: np.ndarray = np.copysign(np.abs(rows) ** power, rows)
    return found


def flat(rows: np.ndarray) -> np.ndarray:
    return rows.reshape(len(rows), -1)


if __name__ == "__main__":
    main()
