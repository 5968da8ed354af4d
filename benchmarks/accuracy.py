"""Accuracy, length and speed of the recipes of accuracy.toml on three data sets, in one table.

    python benchmarks/accuracy.py DATA -o FOLDER [--only REGEX] [--rounds 3]

DATA holds `caltech101-subset` (train/CLASS, test/CLASS), `voc2007-subset/VOC2007` and `kth-buildings` (server, client;
images of one object are named alike). FOLDER keeps stores and results: a second run only does what is missing.
Images/s in the first table is of the extraction, over all three data sets. With --rounds, a second table tells the
speed on a quarter of the Caltech test images, recipes in turn, medians.
"""

from __future__ import annotations

import argparse
import platform
import re
import statistics
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from extract import processor

from sppfeat import Describer
from sppfeat.images import find_images
from sppfeat.machine import available_cores
from sppfeat.matrix import Cell, DataSet, evaluate_matrix, read_recipes, table
from sppfeat.recipe import SIFT_BOW, Recipe
from sppfeat.retrieval import RetrievalOptions
from sppfeat.transfer import TransferOptions
from sppfeat.vocabulary import VocabularyOptions, learn_vocabulary

HERE = Path(__file__).parent
WORDS = 200


def data_sets(data: Path) -> list[DataSet]:
    kth = data / "kth-buildings"
    return [
        DataSet("caltech101", data / "caltech101-subset", None, False, TransferOptions(protocol="split")),
        DataSet("voc2007", data / "voc2007-subset" / "VOC2007", None, True, TransferOptions(protocol="voc2007")),
        DataSet("kth", kth / "server", kth / "client", False, RetrievalOptions(relevant=r"regex:(obj\d+)_")),
    ]


def with_vocabulary(recipe: Recipe, data: Path, folder: Path) -> Recipe:
    """The recipe with the vocabulary of the training images, where it needs one."""
    if recipe.backbone != SIFT_BOW:
        return recipe
    path = folder / "vocabulary.h5"
    if not path.exists():
        learn_vocabulary([data / "caltech101-subset" / "train"], path, VocabularyOptions(words=WORDS))
    return replace(recipe, weights=str(path))


def speeds(recipes: dict[str, Recipe], data: Path, rounds: int) -> dict[str, float]:
    items = find_images([data / "caltech101-subset" / "test"]).items[::4]
    describers = {name: Describer(recipe) for name, recipe in recipes.items()}
    rates: dict[str, list[float]] = {name: [] for name in recipes}
    for describer in describers.values():
        describer.load()
    for _ in range(rounds):
        for name, describer in describers.items():
            began = time.perf_counter()
            count = sum(1 for _ in describer.describe(items))
            rates[name].append(count / (time.perf_counter() - began))
    return {name: statistics.median(each) for name, each in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of stores and results")
    parser.add_argument("--only", default="", help="regular expression on the recipes' names")
    parser.add_argument("--recipes", type=Path, default=HERE / "accuracy.toml")
    parser.add_argument("--rounds", type=int, default=0, help="of the speed measurement")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    recipes = {
        name: with_vocabulary(recipe, arguments.data, arguments.output)
        for name, recipe in read_recipes(arguments.recipes).items()
        if re.search(arguments.only, name)
    }

    def told(cell: Cell) -> None:
        print(f"  {cell.recipe}, {cell.data}: {cell.value:.2f}", flush=True)

    cells = evaluate_matrix(recipes, data_sets(arguments.data), arguments.output, done=told)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "openvino", "pillow"))
    print(f"\n{processor()}, {available_cores()} cores, Python {platform.python_version()}, {libraries}\n")
    print(table(cells))
    if arguments.rounds:
        print("\n| recipe | images/s |\n|---|---|")
        for name, rate in speeds(recipes, arguments.data, arguments.rounds).items():
            print(f"| {name} | {rate:.0f} |")


if __name__ == "__main__":
    main()
