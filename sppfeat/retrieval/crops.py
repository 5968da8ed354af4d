"""Crops: images of a store that show a part of another one of it.

Every image is described once more, smaller, as a part of another image would appear in it, and its cells are compared
with all rectangles of the bins that the store has of the images nearest to it: see `alignment`. Unrelated images have
rectangles that are alike, too, more so in some collections and at some scales than in others: so it also counts how far
an image stands out from the others that were compared. Descriptors alone do not tell parts from images of the same
thing, so their pixels decide: see `registration`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from sppfeat.errors import StoreError, UsageError
from sppfeat.files import unsafe_name
from sppfeat.images import Item
from sppfeat.machine import available_cores
from sppfeat.recipe import RunOptions
from sppfeat.retrieval.alignment import align, cells_of, locate, rectangles
from sppfeat.retrieval.bins import BinLayout, bin_layout, bins_of, part_recipe
from sppfeat.retrieval.channels import to_bytes
from sppfeat.retrieval.faiss_index import build_index
from sppfeat.retrieval.faiss_library import load_faiss
from sppfeat.retrieval.members import Member, member_of
from sppfeat.retrieval.parts import in_pixels
from sppfeat.retrieval.registration import PART_SIDE, WHOLE_SIDE, place_part
from sppfeat.retrieval.same_images import gray_image
from sppfeat.store import Box, Store, UnitRows, item_of, unit_rows

if TYPE_CHECKING:
    from sppfeat.extraction import Describer

# From here on images are compared: of 300 crops of 30 to 80 % of the area of 600 images of VOC 2007, half of them
# enlarged to the original's width, saved as JPEG 70, 298 are found so at a short side of 224, 296 at 448
# (benchmarks/results/duplicates.md).
COMPARED_FROM: Final = 0.95
# Images nearest to each that it may be a part of. The original is among them for 299 of those 300 crops at 224, and for
# 297 at 448.
CANDIDATES: Final = 20
# Weight of how far an image stands out: its similarity less the median of all candidates'.
LEAD: Final = 2.0
# What the similarity itself must reach: among images that have nothing in common, all that have something stand out. It
# is 0.75 or more for 99 % of those crops.
LEAST: Final = 0.7
# Side at which images are described again, of that in the store: a crop of half the area has this side in the whole. By
# the stored descriptors alone, 297 and 292 of those crops are found; this way, 298 and 296.
_FACTORS: Final = (0.71,)
# Descriptors in memory at a time.
_BLOCK: Final = 64


@dataclass(frozen=True)
class Crop:
    """An image that shows a part of another one, `whole`.

    score: see `find_crops`; box: where the part is, x1, y1, x2, y2 in pixels of the upright whole. The scores of the
    two members are cosine similarities of the descriptors, 1 of the whole.
    """

    part: Member
    whole: Member
    score: float
    box: Box


@dataclass(frozen=True)
class Crops:
    """Crops by whole, in the order of the store; those of a whole by falling score. images: the number compared.

    compared: whether pixels decided; then the threshold is that of candidates. failed: images that could not be
    described again, or read to be compared, and why. notes: for the user.
    """

    threshold: float
    images: int
    found: list[Crop]
    compared: bool = False
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def by_whole(crops: list[Crop]) -> list[tuple[Member, list[Crop]]]:
    """Crops of `Crops`, by the image that they are parts of."""
    groups: list[tuple[Member, list[Crop]]] = []
    for crop in crops:
        if not groups or groups[-1][0].name != crop.whole.name:
            groups.append((crop.whole, []))
        groups[-1][1].append(crop)
    return groups


def check_crops(store: Store, threshold: float | None = None) -> BinLayout:
    """The bins of a store's descriptors. Call it before the work.

    Raises UsageError for a threshold that is not above 0, and for recipes whose bins do not say where things are;
    MissingExtraError without FAISS.
    """
    if threshold is not None and not threshold > 0:
        raise UsageError(f"part threshold must be above 0, found {threshold}")
    layout = bin_layout(store.recipe, store.dim)
    part_recipe(store.recipe, _FACTORS)
    load_faiss()
    return layout


def find_crops(
    store: Store,
    threshold: float | None = None,
    *,
    without: Collection[str] = (),
    run_options: RunOptions | None = None,
    weights: str | None = None,
    progress: Callable[[float], None] = lambda part: None,
) -> Crops:
    """Find the images of a finished store that are a part of another one of it; of several wholes, the best.

    An image is compared with the CANDIDATES nearest to it, found by an index. score: the mean cosine similarity of its
    cells and those of the best rectangle, which is LEAST or more, plus LEAD times what this is above the median of the
    candidates; about 0.9 for unrelated images. threshold: what the score of a part reaches. None: where it reaches
    COMPARED_FROM, or in a store of few images LEAST, both images are read, and their pixels decide; the box is then
    right to a pixel or two. Of two images that are each a part of the other, one is, by pixels or by score.
    without: names to leave out, such as those of duplicates. weights: where the store's weights are now, if they moved.
    progress: called with the fraction of the work done, 0 to 1.
    Raises UsageError for a threshold that is not above 0, and for recipes whose bins do not say where things are;
    StoreError if the local network differs from the store's; MissingExtraError without FAISS.
    """
    layout = check_crops(store, threshold)
    rows = unit_rows(store)
    if without:
        left_out = set(without)
        rows = rows.only(np.array([at for at, name in enumerate(rows.names) if name not in left_out], np.int64))
    describer = _describer(store, run_options, weights)
    if len(rows) < 2:
        return Crops(COMPARED_FROM if threshold is None else threshold, len(rows), [], threshold is None)
    built = build_index(rows)
    count = min(CANDIDATES, len(rows) - 1)
    notes = list(built.notes)
    if built.recall is not None and built.recall < 1:
        notes.append(f"the nearest images were found by {built.choice.factory}, {100 * built.recall:.1f} % of them")
    compared = threshold is None
    if threshold is None:
        # Among few, nothing stands out.
        threshold = COMPARED_FROM if count == CANDIDATES else LEAST
    elif count < CANDIDATES:
        notes.append(
            f"only {len(rows)} images to compare: how far one stands out from {CANDIDATES} others is not known"
        )
    failed: dict[str, str] = {}
    matches: list[_Match] = []
    done = 0

    def look(at: int, descriptor: np.ndarray, candidates: np.ndarray) -> tuple[list[_Match], dict[str, str]]:
        found = _compare(layout, rows, at, descriptor, candidates, threshold)
        return _by_pixels(rows, found) if compared else (found, {})

    with ThreadPoolExecutor(available_cores()) as pool:
        for block, descriptors, errors in _described_again(describer, rows):
            failed |= errors
            done += len(block) + len(errors)
            if len(block):
                _, near = built.index.search(rows.take(block), count + 1)
                others = [
                    of_one[(of_one != at) & (of_one >= 0)][:count] for at, of_one in zip(block, near, strict=True)
                ]
                for found, unread in pool.map(look, block.tolist(), descriptors, others):
                    failed |= unread
                    matches += found
            progress(done / len(rows))
    # What an image that was not described again is a part of is not known.
    matches = [each for each in matches if rows.names[each.whole] not in failed]
    crops = [_crop(rows, each) for each in sorted(_chosen(matches), key=lambda one: (one.whole, -one.score, one.part))]
    return Crops(threshold, len(rows), crops, compared, failed, notes)


def _describer(store: Store, options: RunOptions | None, weights: str | None) -> Describer:
    from sppfeat.extraction import Describer

    recipe = store.recipe if weights is None else replace(store.recipe, weights=weights)
    describer = Describer(part_recipe(recipe, _FACTORS), options)
    made = replace(describer.recipe, scales=store.recipe.scales, fuse=store.recipe.fuse)
    both = store.weights_sha256, describer.weights_sha256
    if differences := store.recipe.differences(made, ("store", "network"), weights=both):
        raise StoreError(f"{store.place}: was made with another network ({'; '.join(differences)})")
    return describer


def _described_again(
    describer: Describer, rows: UnitRows
) -> Iterator[tuple[np.ndarray, list[np.ndarray], dict[str, str]]]:
    """Positions of images, their new descriptors, and why others have none, block by block."""
    block: list[int] = []
    descriptors: list[np.ndarray] = []
    errors: dict[str, str] = {}

    def items() -> Iterator[Item]:
        for name in rows.names:
            item, window = item_of(rows.store.source_root, name)
            if (reason := unsafe_name(name)) is not None:
                item = replace(item, problem=f"its name {reason}")
            yield item if window is None else replace(item, windows=np.array([window], np.float64))

    for done in describer.describe(items()):
        descriptor, error = done.row()
        if descriptor is None:
            errors[rows.names[done.position]] = error or ""
        else:
            block.append(done.position)
            descriptors.append(descriptor)
        if len(block) + len(errors) >= _BLOCK:
            yield np.array(block, np.int64), descriptors, errors
            block, descriptors, errors = [], [], {}
    yield np.array(block, np.int64), descriptors, errors


class _Match(NamedTuple):
    """An image that may be a part of another one, both by position, and where: box, [4] from 0 to 1 of the whole.

    difference: of their pixels; 0 if these were not compared.
    """

    part: int
    whole: int
    score: float
    box: np.ndarray
    difference: float = 0.0


def _chosen(matches: list[_Match]) -> list[_Match]:
    """The best whole of each part, such that no image is a part of one of its parts.

    Of two images that are each a part of the other, the one is whose pixels differ less, or else whose score is higher;
    unless it is a part of a third image, and the other one would be lost.
    """
    by_pair = {(each.part, each.whole): each for each in matches}
    by_score = sorted(matches, key=lambda one: (-one.score, one.part, one.whole))
    chosen: dict[int, _Match] = {}
    above: dict[int, int] = {}  # an image further up, for a short way to the last whole

    def last_whole(at: int) -> int:
        while (up := above.get(at)) is not None:
            above[at] = above.get(up, up)
            at = up
        return at

    def better(one: _Match) -> tuple[float, float, int]:
        return one.difference, -one.score, -one.whole

    for preferred in (True, False):
        for each in by_score:
            back = by_pair.get((each.whole, each.part))
            if each.part in chosen or (preferred and back is not None and better(back) < better(each)):
                continue
            if last_whole(each.whole) != each.part:
                chosen[each.part] = each
                above[each.part] = each.whole
    return list(chosen.values())


def _compare(
    layout: BinLayout, rows: UnitRows, part: int, descriptor: np.ndarray, candidates: np.ndarray, threshold: float
) -> list[_Match]:
    """The candidates whose score reaches the threshold, the best first."""
    if not len(candidates):
        return []
    bins = to_bytes(bins_of(layout, rows, candidates))
    query, shapes = cells_of(layout.take(descriptor[None]))[0], rectangles(layout.side)
    found = align(query, bins, shapes).scores.astype(np.float64)
    boxes = locate(query, bins, shapes)
    scores = np.where(found < LEAST, 0, found + LEAD * (found - np.median(found)))
    reached = np.flatnonzero(scores >= threshold)
    reached = reached[np.lexsort((candidates[reached], -scores[reached]))]
    return [_Match(part, int(candidates[at]), float(scores[at]), boxes[at]) for at in reached]


def _by_pixels(rows: UnitRows, matches: list[_Match]) -> tuple[list[_Match], dict[str, str]]:
    """The matches of one image that it is a part of, with where exactly; and why images could not be read."""
    if not matches:
        return [], {}
    part = matches[0].part
    shown = gray_image(rows, part, PART_SIDE)
    if isinstance(shown, str):
        return [], {rows.names[part]: shown}
    found, unread = [], {}
    for match in matches:
        whole = gray_image(rows, match.whole, WHOLE_SIDE)
        if isinstance(whole, str):
            unread[rows.names[match.whole]] = whole
        elif (placed := place_part(shown, whole)) is not None:
            found.append(match._replace(box=placed.box, difference=placed.near))
    return found, unread


def _crop(rows: UnitRows, match: _Match) -> Crop:
    one, other = rows.take(np.array([match.part, match.whole]))
    members = member_of(rows, match.part, float(one @ other)), member_of(rows, match.whole, 1.0)
    width, height = members[1].size
    return Crop(*members, match.score, in_pixels(match.box, members[1].box or (0, 0, width - 1, height - 1)))
