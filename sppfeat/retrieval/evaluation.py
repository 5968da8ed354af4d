"""Retrieval evaluation: rank a gallery for every query by cosine similarity, exactly, and score the rankings.

What is relevant to a query comes from the folders of the names, from a part of the names, or from a ground truth
file. Junk rows are removed from a ranking, and so are all rows of the query's own image. `rankings` makes the rankings.
"""

from __future__ import annotations

import functools
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from sppfeat.errors import StoreError, UsageError, unknown_name
from sppfeat.recipe import Recipe
from sppfeat.retrieval.bins import part_recipe
from sppfeat.retrieval.channels import check_bin_dim
from sppfeat.retrieval.ground_truth import GroundTruth
from sppfeat.retrieval.hard_queries import Hardest, HardQuery
from sppfeat.retrieval.parts import PART_FACTORS, in_pixels
from sppfeat.retrieval.rankings import Ranking, rankings
from sppfeat.retrieval.rerank import RerankOptions
from sppfeat.retrieval.whitening import Projection, ProjectionOptions, learn_projection
from sppfeat.store import Box, Store, UnitRows, check_same_recipe, image_of, row_name, split_row_name, unit_rows
from sppfeat.svm import AP_METHODS, interval, precision_at, ranked_average_precision, recall_at
from sppfeat.windows import overlaps

RECALLS: Final = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions(RerankOptions):
    """How retrieval is evaluated.

    relevant: `folder`: the folder that holds the query's image; `regex:PATTERN`: the same text in the pattern's
    group. Not used with ground truth. ap: average precision, a method of `ranked_average_precision`; None: `trapezoid`
    with ground truth, as Oxford, Paris and Holidays are evaluated, else `step`.
    whole_queries: search with whole images even if the ground truth has a box for the query.
    bin_dim: values of a bin that parts and `bins` compare, as a gallery with so many would; None: all channels.
    The rest: see `RerankOptions`; what is not among the candidates keeps its order after them.
    Raises UsageError, naming the field, for an invalid value.
    """

    relevant: str = "folder"
    ap: str | None = None
    projection: ProjectionOptions | None = None
    whole_queries: bool = False
    bin_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ap is not None and self.ap not in AP_METHODS:
            raise UsageError(unknown_name("average precision", self.ap, AP_METHODS))
        check_bin_dim(self.bin_dim)
        if self.bin_dim is not None and not self.aligned:
            raise UsageError(f"bin_dim: expected parts or rerank bins, which compare bins, found {self.rerank!r}")
        if self.relevant != "folder":
            _pattern(self.relevant)


@dataclass(frozen=True)
class Retrieval:
    """The result: mean average precision and recall@k over the queries, in percent.

    store: the gallery's; recipe, weights_sha256: of its descriptors. gallery_root, queries_root: what names are
    relative to. queries, gallery: how many.
    precision: mean precision at k, of revisited ground truth; else empty. average_precisions: by query, in percent.
    left_out: queries without any relevant row. hardest: those with the lowest average precision. projection: the one
    used. learned_here: from evaluated rows.
    overlap: mean intersection over union of the boxes found in relevant images and the true ones, 0 to 1, and 0 where
    the query was not looked for. located: how many of them are over 0.5, in percent. Both None without true boxes.
    notes: for the user.
    """

    store: str
    recipe: Recipe
    weights_sha256: str
    gallery_root: str
    queries_root: str
    queries: int
    gallery: int
    mean_average_precision: float
    recall: dict[int, float]
    precision: dict[int, float]
    average_precisions: dict[str, float]
    left_out: list[str]
    hardest: list[HardQuery]
    ap: str
    dim: int
    projection: Projection | None
    learned_here: bool
    overlap: float | None = None
    located: float | None = None
    notes: list[str] = field(default_factory=list)

    @functools.cached_property
    def interval(self) -> tuple[float, float]:
        """Of the mean average precision: that of 95 % of bootstrap draws of queries."""
        values = np.array(list(self.average_precisions.values()))
        return interval([(np.zeros(len(values), int), lambda times: float(times @ values / len(values)))])


def evaluate_retrieval(
    gallery: Store,
    queries: Store | None = None,
    options: RetrievalOptions | None = None,
    *,
    truth: GroundTruth | None = None,
    whitening_from: Store | None = None,
) -> Retrieval:
    """Rank the gallery for every query. queries: None: the gallery's own rows; then a query's ranking excludes the rows
    of its own image, windows included.

    With `parts`, queries are described smaller, see `part_recipe`. A projection is learned from the gallery, or from
    `whitening_from`. Raises StoreError for stores that cannot be compared, UsageError for names without relevance, and
    for ground truth names that are not found.
    """
    options = options or RetrievalOptions()
    if truth is not None and truth.boxed and not options.aligned:
        raise UsageError("boxes: expected parts or rerank bins, which find boxes, found neither")
    if options.parts:
        _check_parts(gallery, queries)
    elif queries is not None:
        check_same_recipe(gallery, queries)
    if whitening_from is not None:
        check_same_recipe(gallery, whitening_from)
    projection = None
    if options.projection is not None:
        projection = learn_projection(unit_rows(whitening_from or gallery), options.projection)
    rows = unit_rows(gallery, projection)
    asked = rows if queries is None else unit_rows(queries, None if options.parts else projection)
    boxes: list[dict[int, Box]] = []
    own: dict[str, np.ndarray] = {}
    if truth is not None:
        matched, asked = _matched(truth, rows, asked, whole=options.whole_queries)
        targets = _targets_from_truth(matched, len(rows))
        own = {one.name: np.array(one.own, np.int64) for one in matched if one.own}
        boxes = [one.boxes for one in matched]
    else:
        targets = _targets_from_keys(options.relevant, rows, asked)
        if queries is None:
            own = _own_rows(rows)
    ap = options.ap or ("step" if truth is None or truth.boxed else "trapezoid")
    values: dict[str, float] = {}
    left_out: list[str] = []
    hardest = Hardest(rows)
    recalls = {k: 0.0 for k in RECALLS}
    precisions = {k: 0.0 for k in RECALLS} if truth is not None and truth.revisited else {}
    found: list[float] = []
    boxed = truth is not None and truth.boxed
    ranked_rows = rankings(rows, asked, own, options, bin_dim=options.bin_dim, boxes=boxed)
    for at, ((name, target), ranking) in enumerate(zip(targets, ranked_rows, strict=True)):
        if name in own:
            target[own[name]] = 0
        if boxes:
            found += _overlaps(rows, ranking, boxes[at])
        ranked = target[ranking.order]
        if not (ranked > 0).any():
            left_out.append(name)
            continue
        values[name] = 100 * ranked_average_precision(ranked, method=ap)
        hardest.add(name, values[name], ranking.order, ranked)
        for k in recalls:
            recalls[k] += 100 * recall_at(ranked, k)
        for k in precisions:
            precisions[k] += 100 * precision_at(ranked, k)
    if not values:
        raise UsageError(f"{gallery.path}: none of the {len(asked)} queries has a relevant image in it")
    return Retrieval(
        store=gallery.place,
        recipe=gallery.recipe,
        weights_sha256=gallery.weights_sha256,
        gallery_root=gallery.source_root,
        queries_root=asked.store.source_root,
        queries=len(values),
        gallery=len(rows),
        mean_average_precision=float(np.mean(list(values.values()))),
        recall={k: total / len(values) for k, total in recalls.items()},
        precision={k: total / len(values) for k, total in precisions.items()},
        average_precisions=values,
        left_out=left_out,
        hardest=hardest.queries,
        ap=ap,
        dim=rows.dim,
        projection=projection,
        learned_here=projection is not None
        and (whitening_from is None or any(_same_file(whitening_from, one) for one in (gallery, queries))),
        overlap=float(np.mean(found)) if found else None,
        located=100 * float(np.mean(np.array(found) > 0.5)) if found else None,
        notes=[
            *_without_rows(gallery, queries),
            *([] if projection is None or options.projection is None else projection.notes(options.projection.dims)),
        ],
    )


def _without_rows(gallery: Store, queries: Store | None) -> list[str]:
    """How many rows of each store have no descriptor: they are neither asked for nor found."""
    stores = [gallery] if queries is None or _same_file(gallery, queries) else [gallery, queries]
    counts = [(store.place, store.counts()) for store in stores]
    return [
        f"{place}: of {sum(count.values())} rows, {count['failed']} failed and are left out"
        for place, count in counts
        if count["failed"]
    ]


def _check_parts(gallery: Store, queries: Store | None) -> None:
    """Raise UsageError unless queries are described as parts of the gallery's images are looked for."""
    wanted = part_recipe(gallery.recipe, PART_FACTORS)
    if queries is None:
        raise UsageError("parts: expected queries of their own, which are described smaller, found none")
    weights = gallery.weights_sha256, queries.weights_sha256
    if differences := wanted.differences(queries.recipe, ("expected", "found"), weights=weights):
        scales = ",".join(map(str, wanted.scales))
        raise UsageError(
            f"{queries.place}: parts: expected queries described as the gallery, but with --scales {scales} --fuse "
            f"concat, found another recipe ({'; '.join(differences)})"
        )


def _overlaps(rows: UnitRows, ranking: Ranking, boxes: dict[int, Box]) -> list[float]:
    """Intersection over union of true boxes, by row, with those found there."""
    values = []
    for row, box in boxes.items():
        place = np.flatnonzero(ranking.order == row)[0]
        if ranking.boxes is None or place >= len(ranking.boxes):
            values.append(0.0)
            continue
        width, height = rows.store.image_size[rows.rows[row]].tolist()
        whole = split_row_name(rows.names[row])[1] or (0, 0, width - 1, height - 1)
        found = in_pixels(ranking.boxes[place], whole)
        values.append(float(overlaps(np.array([found], np.float64), np.array([box], np.float64))[0, 0]))
    return values


def _same_file(one: Store, other: Store | None) -> bool:
    return other is not None and os.path.realpath(one.path) == os.path.realpath(other.path)


@dataclass(frozen=True)
class _Asked:
    """A query with its row's name, and rows of the gallery: relevant ones, junk, and those excluded from its ranking:
    the query's own image, and images that are only queries."""

    name: str
    relevant: list[int]
    junk: list[int]
    own: list[int]
    boxes: dict[int, Box]


def _matched(truth: GroundTruth, rows: UnitRows, asked: UnitRows, *, whole: bool) -> tuple[list[_Asked], UnitRows]:
    """The queries of ground truth by the stores' own names, and their rows among those asked, in the same order.

    A name may omit the folders and the extension if it stays unambiguous. whole: use no windows.
    Raises UsageError.
    """
    in_gallery, in_queries = _Names(rows, rows.names), _Names(asked, asked.names)
    images = _Names(asked, list(dict.fromkeys(split_row_name(name)[0] for name in asked.names)))
    own_rows = _own_rows(rows)
    outside = [in_gallery.places[name] for one in truth.outside if (name := in_gallery.known(one)) is not None]
    found: list[_Asked] = []
    for query in truth.queries:
        window = None if whole else query.window
        if window is None:
            name = in_queries.find(query.image, f"query {query.image!r}")
        else:
            name = row_name(images.find(query.image, f"query {query.image!r}"), window)
            if name not in in_queries.places:
                if name in asked.store.errors():
                    raise StoreError(f"{asked.store.place}: query {name!r} could not be described")
                raise UsageError(
                    f"{asked.store.place}: query {query.image!r}: expected a row for its box, {name!r}, found none; "
                    "--write-windows FILE writes the boxes, `sppfeat extract IMAGES --windows FILE` describes them, "
                    "and --whole-queries searches with whole images"
                )
        about = f"ground truth of {query.image!r}"
        relevant = [in_gallery.places[in_gallery.find(one, about)] for one in query.relevant]
        junk = [in_gallery.places[in_gallery.find(one, about)] for one in query.junk]
        # An image is not searched for with itself, or with a part of itself.
        own = None if truth.own_counts else in_gallery.known(query.image)
        kept_out = {*outside} - {*relevant} | {*(() if own is None else own_rows[own].tolist())}
        boxes = {in_gallery.places[in_gallery.find(one, about)]: box for one, box in query.boxes.items()}
        found.append(_Asked(name, relevant, junk, sorted(kept_out), boxes))
    places = [in_queries.places[one.name] for one in found]
    if len(set(places)) < len(places):
        twice = next(one.name for at, one in enumerate(found) if places.index(places[at]) < at)
        raise UsageError(f"{asked.store.place}: expected unique queries, found duplicate {twice!r}")
    return found, asked.only(np.array(places))


class _Names:
    """Names of a store, looked up whole or by file name without folders and extension."""

    def __init__(self, rows: UnitRows, names: Sequence[str]) -> None:
        self._rows = rows
        self.places = {name: place for place, name in enumerate(names)}
        self._stems: dict[str, str | None] = {}
        for name in names:
            for short in {_stem(name), posixpath.basename(name), posixpath.splitext(name)[0]}:
                self._stems[short] = name if short not in self._stems else None

    def known(self, name: str) -> str | None:
        return name if name in self.places else self._stems.get(name)

    def find(self, name: str, about: str) -> str:
        found = self.known(name)
        if found is not None:
            return found
        store = self._rows.store
        if name in store.errors():
            raise StoreError(f"{store.place}: {about}: image {name!r} could not be described")
        raise UsageError(f"{store.place}: {about}: {unknown_name('image', name, self.places)}")


def _stem(name: str) -> str:
    return posixpath.splitext(posixpath.basename(name))[0]


def _targets_from_truth(queries: list[_Asked], count: int) -> Iterator[tuple[str, np.ndarray]]:
    for query in queries:
        target = np.full(count, -1, np.int8)
        target[query.relevant] = 1
        target[query.junk] = 0
        yield query.name, target


def _targets_from_keys(relevant: str, rows: UnitRows, asked: UnitRows) -> Iterator[tuple[str, np.ndarray]]:
    of_rows, of_queries = _keys(relevant, rows.names), _keys(relevant, asked.names)
    numbers = {key: number for number, key in enumerate(dict.fromkeys([*of_rows, *of_queries]))}
    # All queries may be in one folder, and so may a gallery; but not both in the same one.
    if relevant == "folder" and len(numbers) == 1:
        raise UsageError(
            f"relevant folder: expected images in several folders, found {len(rows)} in one, such as {rows.names[0]!r}"
        )
    known = np.array([numbers[key] for key in of_rows])
    for name, key in zip(asked.names, of_queries, strict=True):
        yield name, np.where(known == numbers[key], 1, -1).astype(np.int8)


def _own_rows(rows: UnitRows) -> dict[str, np.ndarray]:
    """For each row, by name, all rows of the same image: itself, and those of the image's other windows."""
    found: dict[str, list[int]] = {}
    images = [image_of(rows.store.source_root, name)[0] for name in rows.names]
    for row, image in enumerate(images):
        found.setdefault(image, []).append(row)
    of_image = {image: np.array(numbers) for image, numbers in found.items()}
    return {name: of_image[image] for name, image in zip(rows.names, images, strict=True)}


def _keys(relevant: str, names: Sequence[str]) -> list[str]:
    """What images must share to be relevant to each other. Raises UsageError for a name without that part."""
    if relevant == "folder":
        return [posixpath.dirname(name) for name in names]
    pattern = _pattern(relevant)
    keys = []
    for name in names:
        found = pattern.search(name)
        if found is None or found[1] is None:
            raise UsageError(f"relevant {relevant!r}: expected the pattern in every name, not found in {name!r}")
        keys.append(found[1])
    return keys


def _pattern(relevant: str) -> re.Pattern[str]:
    kind, _, text = relevant.partition(":")
    if kind != "regex":
        raise UsageError(f"relevant must be folder or regex:PATTERN, such as 'regex:(obj\\d+)_', found {relevant!r}")
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UsageError(f"relevant {relevant!r}: not a regular expression: {error}") from None
    if pattern.groups != 1:
        raise UsageError(f"relevant {relevant!r}: expected one group in parentheses, found {pattern.groups}")
    return pattern


def percent(done: Retrieval) -> dict[str, float]:
    """mAP, precisions and recalls under the names they are reported by."""
    return {
        "mAP": done.mean_average_precision,
        **{f"mP@{k}": value for k, value in done.precision.items()},
        **{f"recall@{k}": value for k, value in done.recall.items()},
        **({} if done.located is None else {"IoU>0.5": done.located}),
    }
