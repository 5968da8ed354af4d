"""Retrieval evaluation: rank a gallery for every query by cosine similarity, exactly, and score the rankings.

What is relevant to a query comes from the folders of the names, from a part of the names, or from a file of ground
truth. Junk rows are taken out of a ranking as if they were not there, and so is the query itself.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sppfeat.errors import StoreError, UsageError, one_line, unknown_name
from sppfeat.metrics import AP_METHODS, ranked_average_precision, recall_at
from sppfeat.rows import UnitRows, check_same_recipe, unit_rows
from sppfeat.store import Store
from sppfeat.whitening import Projection, ProjectionOptions, learn_projection

DIFFICULTIES: Final = ("easy", "medium", "hard")
RECALLS: Final = (1, 5, 10)
# Scores of a block of queries with the whole gallery, in float32.
_SCORE_BYTES: Final = 1 << 27


@dataclass(frozen=True)
class GroundTruth:
    """For each query, by name: names of the gallery that are relevant, and those that do not count."""

    relevant: dict[str, frozenset[str]]
    junk: dict[str, frozenset[str]]


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions:
    """How retrieval is evaluated.

    relevant: `folder`: the folder that holds the query's picture; `regex:PATTERN`: the same text in the pattern's
    group. Not used with ground truth. method: of average precision, see `ranked_average_precision`; None: `trapezoid`
    with ground truth, as Oxford, Paris and Holidays are evaluated, else `step`.
    expand, alpha: alpha query expansion as in `SearchOptions`.
    Raises UsageError, naming the field, when a value cannot be.
    """

    relevant: str = "folder"
    method: str | None = None
    projection: ProjectionOptions | None = None
    expand: int = 0
    alpha: float = 3.0

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in AP_METHODS:
            raise UsageError(unknown_name("method", self.method, AP_METHODS))
        if self.relevant != "folder":
            _pattern(self.relevant)
        if self.expand < 0:
            raise UsageError(f"expand must be at least 0 neighbors, found {self.expand}")


@dataclass(frozen=True)
class Retrieval:
    """What was reached: mean average precision and recall@k over the queries, in percent.

    average_precisions: by query, in percent. left_out: queries without any relevant row. projection: that was used.
    """

    queries: int
    gallery: int
    mean_average_precision: float
    recall: dict[int, float]
    average_precisions: dict[str, float]
    left_out: list[str]
    method: str
    dim: int
    projection: Projection | None


def evaluate_retrieval(
    gallery: Store,
    queries: Store | None = None,
    options: RetrievalOptions | None = None,
    *,
    truth: GroundTruth | None = None,
    whitening_from: Store | None = None,
) -> Retrieval:
    """Rank the gallery for every query. queries: None: the gallery's own rows, each left out of its own ranking.

    A projection is learned from the gallery, or from `whitening_from`. Raises StoreError for stores that cannot be
    compared, UsageError for relevance that cannot be told, and names of the ground truth that are not there.
    """
    options = options or RetrievalOptions()
    for other in (queries, whitening_from):
        if other is not None:
            check_same_recipe(gallery, other)
    projection = None
    if options.projection is not None:
        projection = learn_projection(unit_rows(whitening_from or gallery), options.projection)
    rows = unit_rows(gallery, projection)
    leave_one_out = queries is None
    asked = rows if queries is None else unit_rows(queries, projection)
    if truth is not None:
        truth, asked = _checked(truth, rows, asked)
        targets = _targets_from_truth(truth, rows, asked)
    else:
        targets = _targets_from_keys(options.relevant, rows, asked)
    method = options.method or ("step" if truth is None else "trapezoid")
    places = {name: row for row, name in enumerate(rows.names)} if leave_one_out else {}
    precisions: dict[str, float] = {}
    left_out: list[str] = []
    recalls = {k: 0.0 for k in RECALLS}
    for (name, target), order in zip(targets, rankings(rows, asked, places, options), strict=True):
        if name in places:
            target[places[name]] = 0
        ranked = target[order]
        if not (ranked > 0).any():
            left_out.append(name)
            continue
        precisions[name] = 100 * ranked_average_precision(ranked, method=method)
        for k in RECALLS:
            recalls[k] += 100 * recall_at(ranked, k)
    if not precisions:
        raise UsageError(f"{gallery.path}: none of the {len(asked)} queries has a relevant image in it")
    return Retrieval(
        queries=len(precisions),
        gallery=len(rows),
        mean_average_precision=float(np.mean(list(precisions.values()))),
        recall={k: total / len(precisions) for k, total in recalls.items()},
        average_precisions=precisions,
        left_out=left_out,
        method=method,
        dim=rows.dim,
        projection=projection,
    )


def rankings(
    rows: UnitRows, queries: UnitRows, own: Mapping[str, int], options: RetrievalOptions | None = None
) -> Iterator[np.ndarray]:
    """For each query, all rows [N] by falling cosine similarity, equal ones in their order.

    own: by name, each query's own row, which a query expansion must not take for a neighbour.
    """
    options = options or RetrievalOptions()
    rows = rows.in_memory()  # every block of queries passes over all of them
    size = max(1, _SCORE_BYTES // (4 * len(rows)))
    for start in range(0, len(queries), size):
        units = queries.take(slice(start, start + size))
        scores = _scores(rows, units)
        if options.expand:
            for at, name in enumerate(queries.names[start : start + size]):
                if name in own:
                    scores[at, own[name]] = -np.inf
            nearest = np.argsort(-scores, axis=1, kind="stable")[:, : options.expand]
            weights = np.maximum(np.take_along_axis(scores, nearest, 1), 0) ** options.alpha
            for at, (which, weight) in enumerate(zip(nearest, weights, strict=True)):
                order = np.argsort(which)
                units[at] += weight[order] @ rows.take(which[order])
            scores = _scores(rows, units)
        for one in scores:
            yield np.argsort(-one, kind="stable")


def _scores(rows: UnitRows, units: np.ndarray) -> np.ndarray:
    scores = np.empty((len(units), len(rows)), np.float32)
    for start, block in rows.blocks():
        scores[:, start : start + len(block)] = units @ block.T
    return scores


def read_ground_truth(path: str | os.PathLike[str], *, difficulty: str = "medium") -> GroundTruth:
    """Read ground truth from JSON: a query's name -> {"relevant": [names], "junk": [names]}; junk may be missing.

    Or, as in revisited Oxford and Paris, -> {"easy": [names], "hard": [names], "junk": [names]}. There, `difficulty`
    says what is relevant: `easy` counts the hard ones as junk, `medium` takes both, `hard` counts the easy ones as junk
    (Radenovic, Iscen, Tolias, Avrithis, Chum 2018, "Revisiting Oxford and Paris", 3.3). Their own layout, lists
    `imlist`, `qimlist` and `gnd` with places in `imlist`, is read as well. Raises UsageError.
    """
    if difficulty not in DIFFICULTIES:
        raise UsageError(unknown_name("difficulty", difficulty, DIFFICULTIES))
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
        if isinstance(content, dict) and {"imlist", "qimlist", "gnd"} <= content.keys():
            content = _named(content)
        if not isinstance(content, dict) or not content:
            raise UsageError(f"{path}: expected a JSON object, query -> relevant and junk, found {str(content)[:40]!r}")
        relevant, junk = {}, {}
        for query, lists in content.items():
            relevant[query], junk[query] = _judged(query, lists, difficulty)
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UsageError(f"{path}: expected ground truth in JSON, found: {one_line(error)}") from None
    return GroundTruth(relevant, junk)


def _named(content: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of places as lists of names."""
    images = content["imlist"]
    return {
        query: {kind: [images[at] for at in lists[kind]] for kind in ("easy", "hard", "junk")}
        for query, lists in zip(content["qimlist"], content["gnd"], strict=True)
    }


def _judged(query: str, lists: Any, difficulty: str) -> tuple[frozenset[str], frozenset[str]]:
    kinds = ("relevant", "junk") if isinstance(lists, dict) and "relevant" in lists else ("easy", "hard", "junk")
    if not isinstance(lists, dict) or not lists.keys() <= set(kinds) or len(lists.keys() - {"junk"}) < len(kinds) - 1:
        found = ", ".join(lists) if isinstance(lists, dict) else type(lists).__name__
        raise UsageError(f"query {query!r}: expected lists relevant and junk, or easy, hard and junk, found {found}")
    named: dict[str, frozenset[str]] = {}
    for kind in kinds:
        names = lists.get(kind, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UsageError(f"query {query!r}: expected {kind} to be a list of names, found {str(names)[:40]!r}")
        named[kind] = frozenset(names)
    if "relevant" in named:
        relevant, junk = named["relevant"], named["junk"]
    else:
        relevant = {"easy": named["easy"], "medium": named["easy"] | named["hard"], "hard": named["hard"]}[difficulty]
        junk = named["junk"] | {"easy": named["hard"], "medium": frozenset(), "hard": named["easy"]}[difficulty]
    if both := relevant & junk:
        raise UsageError(f"query {query!r}: {min(both)!r} is relevant and junk")
    return relevant, junk


def _checked(truth: GroundTruth, rows: UnitRows, asked: UnitRows) -> tuple[GroundTruth, UnitRows]:
    """Ground truth with the stores' own names, and its queries among the rows asked.

    A name may leave out the folders and the ending, where that says which is meant. Raises UsageError.
    """
    in_gallery, in_queries = _Names(rows), _Names(asked)
    relevant, junk, places = {}, {}, []
    for query in truth.relevant:
        name = in_queries.find(query, f"query {query!r}")
        places.append(in_queries.places[name])
        about = f"ground truth of {query!r}"
        relevant[name] = frozenset(in_gallery.find(one, about) for one in truth.relevant[query])
        junk[name] = frozenset(in_gallery.find(one, about) for one in truth.junk[query])
    return GroundTruth(relevant, junk), asked.only(np.array(places))


class _Names:
    """A store's names, found whole, or by what stands between the last folder and the ending."""

    def __init__(self, rows: UnitRows) -> None:
        self._rows = rows
        self.places = {name: place for place, name in enumerate(rows.names)}
        self._stems: dict[str, str | None] = {}
        for name in rows.names:
            for short in {_stem(name), posixpath.basename(name), posixpath.splitext(name)[0]}:
                self._stems[short] = name if short not in self._stems else None

    def find(self, name: str, about: str) -> str:
        found = name if name in self.places else self._stems.get(name)
        if found is not None:
            return found
        store = self._rows.store
        if name in store.errors():
            raise StoreError(f"{store.path}: {about}: image {name!r} could not be described")
        raise UsageError(f"{store.path}: {about}: {unknown_name('image', name, self.places)}")


def _stem(name: str) -> str:
    return posixpath.splitext(posixpath.basename(name))[0]


def _targets_from_truth(truth: GroundTruth, rows: UnitRows, asked: UnitRows) -> Iterator[tuple[str, np.ndarray]]:
    places = {name: row for row, name in enumerate(rows.names)}
    for name in asked.names:
        target = np.full(len(rows), -1, np.int8)
        target[[places[one] for one in truth.relevant[name]]] = 1
        target[[places[one] for one in truth.junk[name]]] = 0
        yield name, target


def _targets_from_keys(relevant: str, rows: UnitRows, asked: UnitRows) -> Iterator[tuple[str, np.ndarray]]:
    of_rows, of_queries = _keys(relevant, rows.names), _keys(relevant, asked.names)
    numbers = {key: number for number, key in enumerate(dict.fromkeys([*of_rows, *of_queries]))}
    known = np.array([numbers[key] for key in of_rows])
    for name, key in zip(asked.names, of_queries, strict=True):
        yield name, np.where(known == numbers[key], 1, -1).astype(np.int8)


def _keys(relevant: str, names: Sequence[str]) -> list[str]:
    """What images must share to be relevant to each other. Raises UsageError for a name that has no such part."""
    if relevant == "folder":
        keys = [posixpath.dirname(name) for name in names]
        if len(set(keys)) == 1:
            raise UsageError(
                f"relevant folder: expected images in several folders, found {len(names)} in one, such as {names[0]!r}"
            )
        return keys
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
    """mAP and recalls by the names under which they are reported."""
    return {"mAP": done.mean_average_precision, **{f"recall@{k}": value for k, value in done.recall.items()}}
