"""Compare recipes: transfer and retrieval accuracy, descriptor length and speed of each, in one table.

    python benchmarks/accuracy.py DATA

DATA holds `caltech101-subset` (train/CLASS, test/CLASS) and `kth-buildings` (server/objN_*, client/objN_*).
Transfer: scikit-learn's LinearSVC, one against the rest, C = 1, mean accuracy over the classes. Retrieval: mean average
precision of the gallery ranked by cosine similarity. Speed: `Describer` on the same 64 Caltech images, recipes in
turn, medians of three rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from sppfeat import Describer, Recipe, Store, extract_folder, open_store
from sppfeat.images.sources import find_images
from sppfeat.machine import available_cores

HABIT = dict(crop="center", levels=(1,), pooling="avg", layer="bn2")


def recipes() -> dict[str, Recipe]:
    """The recipes to compare, by a short description of how they differ from the default."""
    found = {
        "centre crop 224, global average, bn2 (common practice)": Recipe(**HABIT),
        "whole image, global average, bn2": Recipe(levels=(1,), pooling="avg", layer="bn2"),
        "whole image, global average, blocks": Recipe(levels=(1,), pooling="avg"),
    }
    for levels in ((1,), (2, 1), (3, 2, 1), (6, 3, 2, 1), (4, 3, 2, 1)):
        found[f"SPP {','.join(map(str, levels))} max, blocks"] = Recipe(levels=levels)
    for pooling in ("avg", "gem"):
        found[f"SPP 6,3,2,1 {pooling}, blocks"] = Recipe(pooling=pooling)
    for layer in ("conv_head", "bn2"):
        found[f"SPP 3,2,1 max, {layer}"] = Recipe(levels=(3, 2, 1), layer=layer)
    for scale in (288, 320, 448):
        found[f"SPP 6,3,2,1 max, blocks, scale {scale}"] = Recipe(scales=(scale,))
    for scales in ((224, 320), (224, 448)):
        found[f"SPP 6,3,2,1 max, blocks, scales {scales[0]}+{scales[1]}"] = Recipe(scales=scales)
    found["SPP 6,3,2,1 max, blocks, signed square root"] = Recipe(normalize="signed-sqrt-l2")
    found["SPP 6,3,2,1 max, blocks, sides exact (multiple of 1)"] = Recipe(size_multiple=1)
    found["SPP 6,3,2,1 max, blocks, JPEG draft"] = Recipe(jpeg_draft=True)
    found["SPP 6,3,2,1 max, blocks, bfloat16 arithmetic"] = Recipe(precision="bfloat16")
    return found


@dataclass
class Figures:
    transfer: float
    retrieval: float
    dim: int
    rates: list[float]


def transfer_accuracy(store: Store) -> float:
    """Mean per-class accuracy in percent: trained on train/CLASS, tested on test/CLASS."""
    from scipy.linalg import solve_triangular
    from sklearn.svm import LinearSVC

    split, labels = np.array([name.split("/")[:2] for name in store.names]).T
    train = split == "train"
    descriptors = np.asarray(store.descriptors, dtype=np.float32)
    fit, held = descriptors[train], descriptors[~train]
    if fit.shape[1] > len(fit):
        # Coordinates in the span of the training rows: all inner products, and so the SVM, stay the same, with far
        # fewer columns to fit. The tiny ridge keeps duplicate images from breaking the factorisation.
        triangle = np.linalg.cholesky((fit @ fit.T).astype(np.float64) + 1e-6 * np.eye(len(fit)))
        fit, held = triangle, solve_triangular(triangle, (fit @ held.T).astype(np.float64), lower=True).T
    model = LinearSVC(C=1.0, max_iter=10_000, dual=True, random_state=0).fit(fit, labels[train])
    hits = model.predict(held) == labels[~train]
    return 100 * float(np.mean([hits[labels[~train] == label].mean() for label in np.unique(labels)]))


def retrieval_map(store: Store) -> float:
    """Mean average precision in percent: each client image against the server images, same object = relevant."""
    objects = np.array([int(re.search(r"obj(\d+)_", name)[1]) for name in store.names])  # type: ignore[index]
    is_query = np.array([name.startswith("client/") for name in store.names])
    rows = np.asarray(store.descriptors, dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    precisions = []
    for row, wanted in zip(rows[is_query], objects[is_query], strict=True):
        ranked = objects[~is_query][np.argsort(-(rows[~is_query] @ row), kind="stable")] == wanted
        precisions.append(float((np.cumsum(ranked) / np.arange(1, len(ranked) + 1))[ranked].mean()))
    return 100 * float(np.mean(precisions))


def measure(data: Path, rounds: int, only: str, keep: Path | None) -> dict[str, Figures]:
    figures: dict[str, Figures] = {}
    chosen = {name: recipe for name, recipe in recipes().items() if re.search(only, name)}
    kept = json.loads(keep.read_text()) if keep is not None and keep.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in chosen.items():
            if recipe.to_json() not in kept:
                values = []
                for dataset, score in (("caltech101-subset", transfer_accuracy), ("kth-buildings", retrieval_map)):
                    output = Path(folder, "store.h5")
                    done = extract_folder(data / dataset, output, recipe, overwrite=True)
                    if done.failed:
                        raise SystemExit(f"{dataset}: {done.failed} images failed")
                    values.append(score(open_store(output)))
                kept[recipe.to_json()] = (*values, done.dim)
                if keep is not None:
                    keep.write_text(json.dumps(kept))
            transfer, retrieval, dim = kept[recipe.to_json()]
            figures[name] = Figures(transfer, retrieval, dim, [])
            print(f"  {name}: {transfer:.2f} {retrieval:.2f}", flush=True)
    images = find_images([data / "caltech101-subset" / "test"])
    few = images.items[:: len(images.items) // 64][:64]
    describers = {name: Describer(recipe) for name, recipe in chosen.items()}
    for _ in range(rounds):
        for name, describer in describers.items():
            start = time.perf_counter()
            count = sum(1 for _ in describer.describe(few))
            figures[name].rates.append(count / (time.perf_counter() - start))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=3, help="of the speed measurement")
    parser.add_argument("--keep", type=Path, help="JSON file that keeps the accuracies, so that a run can be resumed")
    parser.add_argument("--only", default="", help="regular expression on the descriptions")
    arguments = parser.parse_args()
    figures = measure(arguments.data, arguments.rounds, arguments.only, arguments.keep)
    print(f"\n{platform.machine()}, {available_cores()} cores, Python {platform.python_version()}, ", end="")
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "pillow", "scikit-learn")))
    print("\n| recipe | length | Caltech-101 | KTH mAP | images/s |")
    print("|---|---|---|---|---|")
    for name, row in figures.items():
        rate = statistics.median(row.rates or [0.0])
        print(f"| {name} | {row.dim:,} | {row.transfer:.1f} | {row.retrieval:.1f} | {rate:.1f} |")


if __name__ == "__main__":
    main()
