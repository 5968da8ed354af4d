"""Networks tuned through the pyramid against frozen ones: classes of Caltech-101, and detectors.

    python benchmarks/tuning.py DATA -o FOLDER [classes] [--from blocks.5] [--epochs 10] [--scales 160,224,288]
    python benchmarks/tuning.py DATA -o FOLDER raccoon voc [--from blocks.5] [--epochs 10] [--levels 6,3,2,1]

classes: DATA holds `caltech101-subset` (train/CLASS, test/CLASS). Networks are tuned on train/ at several sizes, and at
one, then all images are described at each test scale, and linear SVMs are trained and tested on the fixed split, C
chosen inside the training part.
raccoon, voc: the data sets of benchmarks/detection.py, with all windows of selective search. SVMs on the frozen network
against a detector that is tuned with its network, with and without box voting.
FOLDER keeps windows, weights, stores and results: a second run only does what is missing.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from detection import Data
from extract import processor

from sppfeat.detection import DetectOptions, complete_options, detection_recipe, evaluate_detector, open_detector
from sppfeat.detection.train_detector import train_detector
from sppfeat.detection.tune_detector import tune_detector
from sppfeat.machine import available_cores
from sppfeat.matrix import DataSet, evaluate_matrix
from sppfeat.progress import Observer
from sppfeat.recipe import Recipe
from sppfeat.training import LearningOptions
from sppfeat.transfer import TransferOptions
from sppfeat.tuning import TuningOptions
from sppfeat.tuning.tune import tune

WAYS = {"frozen": (), "one size": (224,), "several sizes": (192, 224, 256)}


class Told(Observer):
    def say(self, text: str) -> None:
        print(f"    {text}", flush=True)

    note = say


def tuned(name: str, scales: tuple[int, ...], arguments: argparse.Namespace) -> Recipe:
    """The recipe with the weights of a network that was tuned at these scales."""
    recipe = Recipe(backbone=arguments.backbone)
    if not scales:
        return recipe
    way = f"{name.replace(' ', '-')}-{arguments.epochs}-{arguments.learning_rate:g}-{arguments.from_layer}"
    weights = arguments.output / f"{way}.safetensors"
    if not weights.exists():
        options = TuningOptions(
            scales=scales,
            epochs=arguments.epochs,
            from_layer=arguments.from_layer,
            learning_rate=arguments.learning_rate,
        )
        print(f"  {name}", flush=True)
        done = tune(arguments.data / "caltech101-subset" / "train", weights, recipe, options, observer=Told())
        seconds = [one.seconds for one in done.history[1:]]
        about = {"seconds": sum(seconds) / len(seconds), "best": done.best, "peak": done.peak_bytes}
        weights.with_suffix(".json").write_text(json.dumps(about))
    return replace(recipe, weights=str(weights))


def detectors(kind: str, arguments: argparse.Namespace) -> None:
    """The table of one data set."""
    data = Data(arguments.data, arguments.output)
    if kind == "voc":
        train, test, windows = data.voc()
    else:
        train, test, _ = data.raccoon()
        windows = data.windows("raccoon", Path(train.root))
    recipe = detection_recipe(levels=tuple(int(level) for level in arguments.levels.split(",")))
    options = LearningOptions(
        epochs=arguments.epochs,
        from_layer=arguments.from_layer,
        learning_rate=arguments.learning_rate,
        head_rate=arguments.head_rate,
    )
    if arguments.train_scales:
        options = replace(options, scales=tuple(int(scale) for scale in arguments.train_scales.split(",")))
    setting = f"{arguments.epochs}-{arguments.learning_rate:g}-{arguments.head_rate:g}-{arguments.from_layer}"
    setting += f"-{arguments.train_scales}" * bool(arguments.train_scales)
    ways = {f"{kind}-svms-{arguments.levels}": "SVMs, frozen", f"{kind}-tuned-{arguments.levels}-{setting}": "tuned"}
    print(f"\n| {kind}, levels {arguments.levels} | box voting | AP, 11 points | area | COCO | precision | recall |")
    print("|---|---|---|---|---|---|---|")
    for name, way in ways.items():
        path, began = arguments.output / f"{name}.h5", time.perf_counter()
        if not path.exists() and way == "tuned":
            done = tune_detector(train, windows, path, recipe, options, observer=Told())
            curve = [(one.number, one.loss, one.held_out, round(one.seconds)) for one in done.history]
            print(f"  {time.perf_counter() - began:.0f} s, best {done.best}, curve {curve}", flush=True)
        elif not path.exists():
            train_detector(train, windows, path, recipe)
            print(f"  {time.perf_counter() - began:.0f} s", flush=True)
        model = open_detector(path)
        for voting in (False, True):
            chosen = complete_options(model, DetectOptions(voting=voting))
            found = evaluate_detector(model, test, windows, chosen)
            print(
                f"| {way} | {'yes' if voting else 'no'} | {found.eleven_point:.1f} | {found.area:.1f} | "
                f"{found.coco:.1f} | {found.kept_precision:.1f} | {found.kept_recall:.1f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("parts", nargs="*", default=["classes"], help="classes, raccoon, voc")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of weights, stores and results")
    parser.add_argument("--backbone", default=Recipe.backbone)
    parser.add_argument("--from", dest="from_layer", default="blocks.5", help="first layer that is tuned")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=TuningOptions.learning_rate)
    parser.add_argument("--head-rate", type=float, default=LearningOptions.head_rate, help="of detectors")
    parser.add_argument("--scales", default="160,224,288", help="test scales of classes")
    parser.add_argument("--train-scales", default="", help="of detectors, one an epoch; the default: 480 alone")
    parser.add_argument("--levels", default="6,3,2,1", help="levels of detectors")
    arguments = parser.parse_intermixed_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "openvino"))
    print(f"\n{processor()}, {available_cores()} cores, Python {platform.python_version()}, {libraries}")
    print(f"{arguments.backbone}, tuned from {arguments.from_layer} on, {arguments.epochs} epochs", flush=True)
    for part in arguments.parts:
        if part == "classes":
            classes(arguments)
        else:
            detectors(part, arguments)


def classes(arguments: argparse.Namespace) -> None:
    """The table of Caltech-101."""
    scales = [int(text) for text in arguments.scales.split(",")]
    data = [DataSet("caltech101", arguments.data / "caltech101-subset", None, False, TransferOptions(protocol="split"))]
    rows = []
    for name, sizes in WAYS.items():
        recipe = tuned(name, sizes, arguments)
        cells = evaluate_matrix(
            {f"{name.replace(' ', '-')}-{scale}": replace(recipe, scales=(scale,)) for scale in scales},
            data,
            arguments.output,
        )
        about = {"seconds": 0, "best": 0, "peak": 0}
        if sizes:
            about = json.loads(Path(recipe.weights).with_suffix(".json").read_text())
        rows.append((name, [cell.value for cell in cells], about))
    print(
        "\n| tuned at | "
        + " | ".join(f"tested at {scale}" for scale in scales)
        + " | epoch kept | s an epoch | peak, MB |"
    )
    print("|---|" + "---|" * (len(scales) + 3))
    for name, values, about in rows:
        figures = (
            f"{about['best']} | {about['seconds']:.0f} | {about['peak'] / 1e6:.0f}" if about["peak"] else "- | - | -"
        )
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in values) + f" | {figures} |")


if __name__ == "__main__":
    main()
