"""Search a gallery with images, which are described with the gallery's recipe, with a store, or with descriptors."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from sppfeat.errors import GalleryError, UsageError
from sppfeat.images import Item, is_url
from sppfeat.recipe import RunOptions
from sppfeat.retrieval.bins import bin_layout
from sppfeat.retrieval.explanation import Explanation, explain
from sppfeat.retrieval.faiss_index import reconstruct
from sppfeat.retrieval.faiss_library import faiss_reason
from sppfeat.retrieval.flat import search_index
from sppfeat.retrieval.gallery import Gallery, check_recipe, lost_notes
from sppfeat.retrieval.parts import (
    BOX_FACTORS,
    PART_FACTORS,
    Matching,
    in_pixels,
    order_by_bins,
    part_matching,
    require_bins,
    whole_matching,
)
from sppfeat.retrieval.queries import check_box, describer_for, list_queries, own_rows
from sppfeat.retrieval.rerank import MAX_TOGETHER, RerankOptions, reordered
from sppfeat.store import (
    Box,
    Store,
    UnitRows,
    block_rows,
    image_of,
    normalize_rows,
    to_units,
    unit_rows,
)

if TYPE_CHECKING:
    from sppfeat.extraction import Describer

# Neighbors of a query that are explained: a page shows each beside the query.
EXPLAINED: Final = 50
STREAMED: Final = 1024  # queries of a store that are answered at once


@dataclass(frozen=True, kw_only=True)
class SearchOptions(RerankOptions):
    """How a gallery is searched.

    k: neighbors per query, the nearest first. exclude_self: exclude the query's own file, and all its windows.
    The rest: see `RerankOptions`. As parts, queries are looked for in all images of a gallery, or of a large one in the
    `candidates` with the nearest regions. Parts and `bins` need a gallery with bins, and give each neighbor the box
    where the query was found. explain: also what adds up to the scores of the first EXPLAINED neighbors.
    Raises UsageError, naming the field, for an invalid value.
    """

    k: int = 10
    exclude_self: bool = False
    explain: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise UsageError(f"k must be at least 1 neighbor, found {self.k}")
        if self.together and self.k > MAX_TOGETHER:
            raise UsageError(f"k must be at most {MAX_TOGETHER} neighbors for rerank {self.rerank}, found {self.k}")
        if self.explain and not self.aligned:
            raise UsageError(f"explain: expected parts or rerank bins, which align bins, found rerank {self.rerank!r}")


@dataclass(frozen=True)
class Neighbor:
    """A row of the gallery, by number. score: its cosine similarity with the query, or what re-ranking orders by. rank:
    from 1.

    path: of the image, if the folder that names are relative to, `root`, still exists; else None. box: where the query
    was found in it, x1, y1, x2, y2 in pixels of the upright image, if its bins were searched; else the window in it, if
    the row describes one. explanation: of the score, if that was asked for.
    """

    row: int
    name: str
    score: float
    rank: int
    path: str | None
    box: Box | None = None
    root: str = ""
    explanation: Explanation | None = None


@dataclass(frozen=True)
class Answer:
    """A query and its neighbors, or why it could not be described. path: of its image. box: the part searched with.

    root: the folder that `query` is relative to, if it is the name of a store's row; "" for an image given by path, or
    as a part of a source: then `item` is the image.
    """

    query: str
    path: str
    neighbors: list[Neighbor] = field(default_factory=list)
    error: str | None = None
    box: Box | None = None
    root: str = ""
    item: Item | None = None


@dataclass(frozen=True)
class SearchResult:
    """Answers in the order of the queries. notes: for the user. describing, searching: seconds.

    located: whether the boxes of neighbors are where the query was found.
    """

    answers: list[Answer]
    notes: list[str]
    describing: float
    searching: float
    located: bool = False

    @property
    def failed(self) -> int:
        """Queries that could not be described."""
        return sum(answer.error is not None for answer in self.answers)


def search_descriptors(
    gallery: Gallery,
    descriptors: np.ndarray,
    options: SearchOptions | None = None,
    *,
    own_rows: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Neighbors of descriptors [Q, D] of the gallery's recipe: rows [Q, k] int64 and scores [Q, k] float32.

    Scores are cosine similarities, falling; equal ones keep the order of the rows, and with an exact index this
    also decides which k are chosen. k is at most the size of the gallery. Missing neighbors, which an
    approximate index may have, are row -1 with score -inf. own_rows: [Q, M] the rows to exclude per query, those
    of its own image; -1 for none.
    Raises UsageError for other shapes, and for values that are not finite.
    """
    options = options or SearchOptions()
    if descriptors.ndim != 2 or descriptors.shape[1] != gallery.dim:
        raise UsageError(f"descriptors must be [Q, {gallery.dim}], found {list(descriptors.shape)}")
    return search_units(gallery, _units(gallery, descriptors), options, own_rows=own_rows)


def _units(gallery: Gallery, descriptors: np.ndarray) -> np.ndarray:
    units = to_units(descriptors)
    return units if gallery.projection is None else gallery.projection.apply(units)


def search_units(
    gallery: Gallery, units: np.ndarray, options: SearchOptions, *, own_rows: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The same, for projected vectors [Q, d] of length 1."""
    k = min(options.k, len(gallery))
    if not options.together:
        return _nearest_others(gallery, units, k, own_rows)
    count = min(max(k, options.count), len(gallery))
    rows, scores = _nearest_others(gallery, units, count, own_rows)
    for query, unit in enumerate(units):
        near = rows[query, rows[query] >= 0]  # the missing ones are last
        found = reordered(_similarities(gallery, unit, near), options)
        order = np.lexsort((near, -found))
        rows[query, : len(near)], scores[query, : len(near)] = near[order], found[order]
    return rows[:, :k], scores[:, :k]


def _nearest_others(
    gallery: Gallery, units: np.ndarray, k: int, own_rows: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """k neighbors, without each query's own rows."""
    leave_out = 0 if own_rows is None else int((own_rows >= 0).sum(1).max(initial=0))
    rows, scores = _nearest(gallery, units, min(k + leave_out, len(gallery)))
    if leave_out and own_rows is not None:
        rows, scores = _without(rows, scores, own_rows)
    return rows[:, :k], scores[:, :k]


def _nearest(gallery: Gallery, units: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """k neighbors, equal scores in the order of the rows."""
    size = len(gallery)
    # One more than requested shows whether more rows have the last score.
    scores, rows = _ask(gallery, units, min(k + 1, size))
    if gallery.exact and scores.shape[1] > k:
        cut = np.flatnonzero(scores[:, k - 1] == scores[:, k])
        width = k + 1
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        while len(cut) and width < size:
            width = min(4 * width, size)
            more, at = _ask(gallery, units[cut], width)
            settled = (more[:, k - 1] != more[:, -1]) | (width == size)
            for number in np.flatnonzero(settled):
                found[int(cut[number])] = _sorted(more[number : number + 1], at[number : number + 1])
            cut = cut[~settled]
        scores, rows = _sorted(scores, rows)
        for query, (more, at) in found.items():
            scores[query, :k], rows[query, :k] = more[0, :k], at[0, :k]
    else:
        scores, rows = _sorted(scores, rows)
    return rows[:, :k], scores[:, :k]


def _ask(gallery: Gallery, units: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        scores, rows = search_index(gallery.index, units, k)
    except (RuntimeError, MemoryError) as error:
        raise GalleryError(f"{gallery.path}: FAISS cannot search ({faiss_reason(error)})") from None
    missing = rows < 0
    if rows.max(initial=-1) >= len(gallery) or not (np.isfinite(scores) | missing).all():
        raise GalleryError(f"{gallery.path}: its index returns unknown rows; build the gallery again")
    scores[missing] = -np.inf
    return scores, rows


def _sorted(scores: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort by falling score, then rising row. FAISS sorts by score, but leaves equal scores in any order."""
    tied = (scores[:, 1:] == scores[:, :-1]).any(1)
    if tied.any():
        order = np.lexsort((rows[tied], -scores[tied]), axis=1)
        rows[tied] = np.take_along_axis(rows[tied], order, 1)
        scores[tied] = np.take_along_axis(scores[tied], order, 1)
    return scores, rows


def _without(rows: np.ndarray, scores: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Move each query's own rows to the end, as missing ones."""
    mine = np.stack([np.isin(found, of_query) for found, of_query in zip(rows, own, strict=True)])
    rows, scores = np.where(mine, -1, rows), np.where(mine, -np.inf, scores).astype(np.float32)
    at_end = np.argsort(mine, axis=1, kind="stable")
    return np.take_along_axis(rows, at_end, 1), np.take_along_axis(scores, at_end, 1)


def _similarities(gallery: Gallery, unit: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[1 + M, 1 + M] of a query and rows, as the index holds them."""
    try:
        held = reconstruct(gallery.index, rows)
    except (RuntimeError, AttributeError) as error:
        raise GalleryError(f"{gallery.path}: {gallery.factory} does not keep rows to order again") from error
    if not gallery.exact:
        held = normalize_rows(held)  # decoded ones are only about of length 1
    similar = np.ones((1 + len(rows),) * 2, np.float32)
    similar[0, 1:] = similar[1:, 0] = held @ unit
    similar[1:, 1:] = held @ held.T
    if not np.abs(similar).max() < 2:  # also of values that are not finite
        raise GalleryError(f"{gallery.path}: its index returns rows that are not of length 1; build the gallery again")
    return similar


def search_images(
    gallery: Gallery,
    sources: Sequence[str | os.PathLike[str]],
    options: SearchOptions | None = None,
    run_options: RunOptions | None = None,
    *,
    weights: str | None = None,
    describer: Describer | None = None,
    box: Box | None = None,
) -> SearchResult:
    """Search with the images of folders, files or lists, as `find_images` takes them.

    They are described with the gallery's recipe, with `parts` smaller than the gallery's images: see PART_FACTORS. An
    image that cannot be described gives an answer with the reason.
    weights: where the gallery's weights are now, if they moved. describer: one made by `describer_for`.
    box: search with this part of every image, pooled from its feature map; an image that does not contain it fails.
    Raises GalleryError if the local network differs from that of the gallery, UsageError for an invalid box.
    """
    queries, items, errors, notes = list_queries(sources)
    if box is not None:
        check_box(box)
    options = options or SearchOptions()
    if options.aligned:
        require_bins(gallery)
    describer = describer or describer_for(gallery, run_options, weights=weights, factors=part_factors(options, box))
    found = search_items(gallery, items, options, describer, box=box, queries=queries, errors=errors)
    return replace(found, notes=notes + found.notes)


def part_factors(options: SearchOptions, box: Box | None) -> tuple[float, ...] | None:
    """The parts of a gallery's scale at which queries are described for `describer_for`; None: that scale."""
    return None if not options.parts else PART_FACTORS if box is None else BOX_FACTORS


def search_items(
    gallery: Gallery,
    items: Sequence[Item],
    options: SearchOptions,
    describer: Describer,
    *,
    box: Box | None = None,
    queries: Sequence[str] | None = None,
    errors: Mapping[int, str] | None = None,
    own: np.ndarray | None = None,
) -> SearchResult:
    """Search with the images of items, from wherever they come; see `search_images`.

    describer: for the factors of `part_factors`. queries: what to call them; None: their names. errors: why some cannot
    be described, by their number. own: [Q, M] rows to leave out for each, padded with -1; None: as the options say.
    """
    if box is not None:
        check_box(box)
    if options.aligned:
        require_bins(gallery)
    queries = [item.name for item in items] if queries is None else queries
    problems = dict(errors or {})
    paths = [item.path for item in items]
    started = time.perf_counter()
    readable = [at for at in range(len(items)) if at not in problems]
    windows = None if box is None else np.array([box], np.float64)
    descriptors: dict[int, np.ndarray] = {}
    for done in describer.describe(replace(items[at], windows=windows) for at in readable):
        at = readable[done.position]
        descriptor, error = done.row()
        if descriptor is None:
            problems[at] = f"the box {error}" if box is not None and done.error is None else error or ""
        else:
            descriptors[at] = descriptor
    describing = time.perf_counter() - started
    good = sorted(descriptors)
    # [Q, F, D]: one descriptor for each scale of a part.
    rows = np.zeros((0, 1, gallery.dim), np.float32)
    if good:
        rows = np.stack([descriptors[at].reshape(-1, gallery.dim) for at in good])
    files = [paths[at] for at in good]
    if own is not None:
        own = own[good]
    elif options.exclude_self:
        own = own_rows(gallery, files)
    shown = None if box is None or not options.aligned else _shown_by(describer, gallery)
    result = _answer(gallery, rows, [queries[at] for at in good], files, options, own, shown)
    answers = dict(zip(good, result.answers, strict=True)) | {
        at: Answer(queries[at], paths[at], error=reason) for at, reason in problems.items()
    }
    ordered = [replace(answers[at], box=box, item=items[at]) for at in range(len(paths))]
    found = {(one.root, one.name) for answer in result.answers for one in answer.neighbors}
    return replace(result, answers=ordered, notes=result.notes + lost_notes(found), describing=describing)


def search_store(gallery: Gallery, store: Store, options: SearchOptions | None = None) -> SearchResult:
    """Search with the described rows of a store of the gallery's recipe."""
    options = options or SearchOptions()
    blocks = list(stream_store(gallery, store, options))
    answers = [answer for block in blocks for answer in block.answers]
    notes = blocks[-1].notes if blocks else []
    return SearchResult(answers, notes, 0.0, sum(block.searching for block in blocks), options.aligned)


def stream_store(gallery: Gallery, store: Store, options: SearchOptions | None = None) -> Iterator[SearchResult]:
    """The same, block by block: what is yielded need not be kept. What cannot be searched with is refused at once."""
    options = options or SearchOptions()
    if options.parts:
        raise UsageError("parts: expected images as queries, which are described smaller, found a store")
    if options.aligned:
        require_bins(gallery)
    remedy = "search by the images themselves, which are described with the gallery's recipe"
    check_recipe(gallery, store.recipe, store.weights_sha256, store.dim, store.place, remedy=remedy)
    rows = unit_rows(store)
    return _blocks(gallery, rows, options)


def _blocks(gallery: Gallery, rows: UnitRows, options: SearchOptions) -> Iterator[SearchResult]:
    root = rows.store.source_root
    files = [image_of(root, name)[0] for name in rows.names]
    own = own_rows(gallery, files) if options.exclude_self else None
    size = min(block_rows(rows.store.dim), STREAMED)
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        done = _answer(
            gallery,
            rows.take(part)[:, None],
            rows.names[part],
            files[part],
            options,
            own if own is None else own[part],
        )
        yield replace(done, answers=[replace(answer, root=root) for answer in done.answers])


def _answer(
    gallery: Gallery,
    descriptors: np.ndarray,
    queries: list[str],
    files: list[str],
    options: SearchOptions,
    own: np.ndarray | None,
    shown: Callable[[np.ndarray, tuple[int, int]], np.ndarray] | None = None,
) -> SearchResult:
    """Answers to descriptors [Q, F, D] at F scales each. shown: see `_shown_by`."""
    started = time.perf_counter()
    there = [os.path.isdir(root) or is_url(root) for root in gallery.rows.roots]
    neighbors: list[list[Neighbor]] = []
    fewest = len(gallery)
    if options.aligned:
        for at in range(len(descriptors)):
            mine = None if own is None else own[at : at + 1]
            candidates = _candidates(gallery, descriptors[at], options, mine)
            fewest = min(fewest, len(candidates))
            neighbors.append(_located(gallery, descriptors[at], candidates, options, there, shown))
    else:
        rows, scores = search_units(gallery, _units(gallery, descriptors[:, 0]), options, own_rows=own)
        for near, values in zip(rows, scores, strict=True):
            ranked = enumerate(zip(near[near >= 0].tolist(), values.tolist(), strict=False), 1)
            neighbors.append([_neighbor(gallery, row, score, rank, there) for rank, (row, score) in ranked])
    notes = []
    if options.parts and gallery.regions is not None and fewest + (0 if own is None else own.shape[1]) < len(gallery):
        notes.append(
            f"parts were looked for in {fewest} of {len(gallery)} images, those with the nearest regions; more "
            "candidates may find more"
        )
    if options.k > len(gallery):
        notes.append(f"k is {options.k}, but the gallery has {len(gallery)} images: all are returned")
    answers = [Answer(query, path, found) for query, path, found in zip(queries, files, neighbors, strict=True)]
    return SearchResult(answers, notes, 0.0, time.perf_counter() - started, options.aligned)


def _candidates(
    gallery: Gallery, descriptors: np.ndarray, options: SearchOptions, own: np.ndarray | None
) -> np.ndarray:
    """Ascending rows that a query with descriptors [F, D] is to be aligned with."""
    count = max(options.k, options.count)
    if options.parts:
        if gallery.regions is None:
            near = np.arange(len(gallery))
        else:
            query = _matching(gallery, options).query(descriptors)
            near = gallery.regions.nearest(query, count + (0 if own is None else own.size))
        return near if own is None else np.setdiff1d(near, own)
    wide = replace(options, k=count)
    owns = None if own is None else np.repeat(own, len(descriptors), 0)
    near, _ = search_units(gallery, _units(gallery, descriptors), wide, own_rows=owns)
    return np.unique(near[near >= 0])


def _matching(gallery: Gallery, options: SearchOptions) -> Matching:
    layout = bin_layout(gallery.recipe, gallery.dim)
    channels = require_bins(gallery).channels
    return part_matching(layout, channels) if options.parts else whole_matching(layout, channels)


def _shown_by(describer: Describer, gallery: Gallery) -> Callable[[np.ndarray, tuple[int, int]], np.ndarray]:
    """What part of an image of a size its bins show, for queries that are parts of images.

    A network's cells are centered up to a stride off where equal shares of the image would be. A part is mapped onto
    cells by their centers, so what is found is mapped back by them, too; where a whole image is the query, both are
    off alike.
    """
    scale = max(scale for scale in gallery.recipe.scales if isinstance(scale, int))
    return lambda part, size: describer.part_of_image(part, size, scale)


def _located(
    gallery: Gallery,
    descriptors: np.ndarray,
    candidates: np.ndarray,
    options: SearchOptions,
    there: list[bool],
    shown: Callable[[np.ndarray, tuple[int, int]], np.ndarray] | None,
) -> list[Neighbor]:
    """The best of the candidates [N], with boxes in pixels."""
    bins = require_bins(gallery)
    matching = _matching(gallery, options)
    found = order_by_bins(matching, descriptors, candidates, bins.take, options.k)
    asked = matching.bins(descriptors).astype(np.float64)
    neighbors = []
    for rank, row in enumerate(found.rows[: options.k].tolist(), 1):
        one = _neighbor(gallery, row, float(found.scores[rank - 1]), rank, there)
        width, height = bins.image_size[row].tolist()
        part = found.boxes[rank - 1]
        if shown is not None and one.box is None:
            part = shown(part, (width, height))
        box = in_pixels(part, one.box or (0, 0, width - 1, height - 1))
        why = None
        if options.explain and rank <= EXPLAINED:
            image, best = bins.take(np.array([row]))[0], int(found.rectangles[rank - 1])
            why = explain(asked, image, matching.shapes, best, matching.whitening)
        neighbors.append(replace(one, box=box, explanation=why))
    return neighbors


def _neighbor(gallery: Gallery, row: int, score: float, rank: int, there: list[bool]) -> Neighbor:
    path, box = gallery.rows.image(row)
    root = int(gallery.rows.root[row])
    name = gallery.rows.names[row]
    return Neighbor(row, name, score, rank, path if there[root] else None, box, gallery.rows.roots[root])
