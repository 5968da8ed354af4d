"""Fills the table: describes what is missing, evaluates what is new, and keeps every result beside its stores.

OUTPUT/RECIPE/DATA/*.h5          the stores
OUTPUT/RECIPE/DATA/result.json   the result, and what it was made from
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from sppfeat.errors import SppFeatError
from sppfeat.extraction import extract_folder
from sppfeat.files import appearing, cache_key, decode_document
from sppfeat.matrix.reading import DataSet
from sppfeat.progress import Observer
from sppfeat.recipe import Recipe, RunOptions
from sppfeat.retrieval import RetrievalOptions, evaluate_retrieval, percent
from sppfeat.store import Store, open_store
from sppfeat.transfer import read_voc_labels

_VERSION: Final = 1


class Cell(msgspec.Struct, frozen=True):
    """A recipe on a data set. metric: what `value` is, in percent; low, high: the interval of 95 % of draws of test
    images or queries; None where there is none. described, seconds: images of the last run that described any."""

    recipe: str
    data: str
    metric: str
    value: float
    low: float | None
    high: float | None
    images: int
    failed: int
    values: int
    described: int
    seconds: float


class _Kept(msgspec.Struct):
    """A result as a file: key tells what it was made from."""

    version: int
    key: str
    cell: Cell


class _Unusable(SppFeatError):
    pass


def evaluate_matrix(
    recipes: Mapping[str, Recipe],
    data: Sequence[DataSet],
    output: Path,
    run: RunOptions | None = None,
    *,
    observer: Callable[[str], Observer] = lambda title: Observer(),
    done: Callable[[Cell], None] = lambda cell: None,
) -> list[Cell]:
    """Every recipe on every data set. What an earlier run into the folder `output` described or evaluated is kept.

    observer: of the extraction of a store of that title. done: told of each cell. Raises what `extract_folder` and the
    evaluations raise; what was finished before stays.
    """
    cells = []
    for data_set in data:
        for name, recipe in recipes.items():
            cell = _cell(name, recipe, data_set, output / name / data_set.name, run, observer)
            done(cell)
            cells.append(cell)
    return cells


def _cell(
    name: str,
    recipe: Recipe,
    data_set: DataSet,
    folder: Path,
    run: RunOptions | None,
    observer: Callable[[str], Observer],
) -> Cell:
    folder.mkdir(parents=True, exist_ok=True)
    stores: dict[str, Store] = {}
    described, seconds, failed = 0, 0.0, 0
    for part, images in data_set.parts.items():
        path = folder / f"{part}.h5"
        found = extract_folder(images, path, recipe, run, observer=observer(f"{name}, {data_set.name}: {part}"))
        stores[part] = store = open_store(path)
        # Queries are described by the gallery's network.
        recipe = replace(recipe, calibration=store.recipe.calibration)
        described, seconds, failed = described + found.described, seconds + found.seconds, failed + found.failed
    made_from = {
        "stores": {
            part: [zlib.crc32(np.ascontiguousarray(store.checksum).data), _crc(store.names), store.recipe_hash]
            for part, store in stores.items()
        },
        "options": json.loads(json.dumps(asdict(data_set.options))),
        "lists": _lists(data_set) if data_set.voc else 0,
    }
    key = cache_key(made_from)
    file = folder / "result.json"
    kept = _read(file)
    if not described:
        if kept is not None and kept.key == key:
            return kept.cell
        described, seconds = (kept.cell.described, kept.cell.seconds) if kept is not None else (0, 0.0)
    metric, value, interval = _evaluated(data_set, stores)
    first = next(iter(stores.values()))
    cell = Cell(
        recipe=name,
        data=data_set.name,
        metric=metric,
        value=value,
        low=None if np.isnan(interval[0]) else interval[0],
        high=None if np.isnan(interval[1]) else interval[1],
        images=sum(len(store.names) for store in stores.values()),
        failed=failed,
        values=first.dim,
        described=described,
        seconds=seconds,
    )
    with appearing(file, SppFeatError) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(_Kept(_VERSION, key, cell))))
    return cell


def _evaluated(data_set: DataSet, stores: Mapping[str, Store]) -> tuple[str, float, tuple[float, float]]:
    options = data_set.options
    if isinstance(options, RetrievalOptions):
        searched = evaluate_retrieval(stores["gallery"], stores["queries"], options)
        return "retrieval mAP", percent(searched)["mAP"], searched.interval
    from sppfeat.transfer.evaluation import evaluate_transfer  # torch is needed only where something is evaluated

    labels = read_voc_labels(data_set.path) if data_set.voc else None
    (found,) = evaluate_transfer([stores["images"]], options, labels=labels)
    metric = "mAP" if found.metric == "mAP" else "accuracy"
    return f"{metric}, {options.classifier}", found.value, found.interval


def _crc(names: Sequence[str]) -> int:
    total = 0
    for name in names:
        total = zlib.crc32(name.encode("utf-8", "surrogateescape") + b"\0", total)
    return total


def _lists(data_set: DataSet) -> int:
    total = 0
    for path in sorted((data_set.path / "ImageSets" / "Main").glob("*.txt")):
        total = zlib.crc32(path.name.encode() + path.read_bytes(), total)
    return total


def _read(file: Path) -> _Kept | None:
    """An earlier result, if there is one that can be read."""
    try:
        kept = decode_document(file.read_bytes(), _Kept, what=str(file), error=_Unusable)
    except (OSError, _Unusable):
        return None
    return kept if kept.version == _VERSION else None


def table(cells: Sequence[Cell]) -> str:
    """The results as a Markdown table: a row for each recipe, a column for each data set."""
    data = {cell.data: cell.metric for cell in cells}
    recipes = {cell.recipe: cell.values for cell in cells}
    of = {(cell.recipe, cell.data): cell for cell in cells}
    lines = [
        "| recipe | values | " + " | ".join(f"{name} ({metric})" for name, metric in data.items()) + " | images/s |",
        "|---|---|" + "---|" * (len(data) + 1),
    ]
    for recipe, values in recipes.items():
        mine = [of[recipe, name] for name in data if (recipe, name) in of]
        spent = sum(cell.seconds for cell in mine)
        speed = f"{sum(cell.described for cell in mine) / spent:.0f}" if spent else "-"
        shown = [_shown(of.get((recipe, name))) for name in data]
        lines.append(f"| {recipe} | {values:,} | " + " | ".join(shown) + f" | {speed} |")
    return "\n".join(lines)


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    return f"{cell.value:.2f}" + ("" if cell.low is None else f" [{cell.low:.1f}, {cell.high:.1f}]")
