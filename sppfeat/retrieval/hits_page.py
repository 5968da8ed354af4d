"""The page of a search: queries and their neighbors, with thumbnails, and what made their scores."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Final

import numpy as np

from sppfeat.report import Heat, Mark, Origin, Shown, common_folder, shown_item, shown_row, write_page
from sppfeat.retrieval.gallery import Gallery
from sppfeat.retrieval.search import Answer, Neighbor, SearchResult
from sppfeat.store import window_text

# With more thumbnails, a phone could not open the page.
PAGE_QUERIES: Final = 200
PAGE_HITS: Final = 1000
PAGE_EXPLAINED: Final = 100
# Pixels of the page: the side of thumbnails, from many hits of a query to few, and the room that a row of them has.
_SIDES: Final = (120, 280)
_ROOM: Final = 880
# Up to so many hits of all queries together, thumbnails are twice as fine as the page's pixels.
_FINE_HITS: Final = 100


def write_hits_page(
    path: Path, gallery: Gallery, result: SearchResult, *, queries: int | None = None, command: str = ""
) -> None:
    """Write queries and their neighbors with thumbnails to one HTML file. Raises ReportError.

    queries: how many there were, if not all answers are here: the page shows PAGE_QUERIES. command: what made it.
    """
    turned = gallery.recipe.orientation
    # An image is often found by several queries.
    small = functools.cache(functools.partial(shown_row, orientation=turned))
    hits, explained = PAGE_HITS, PAGE_EXPLAINED
    answers = result.answers[:PAGE_QUERIES]
    fine = sum(len(answer.neighbors) for answer in answers) <= _FINE_HITS
    shown = []
    for answer in answers:
        neighbors: list[dict[str, Any]] = []
        side = _side(len(answer.neighbors))
        for one in answer.neighbors[:hits]:
            mark = one.box if result.located else None
            pair = None
            if one.explanation is not None and explained:
                pair = _explained(path, answer, one, turned)
                explained -= 1
            pixels = 2 * (side if fine else _SIDES[0])
            alone = small(path, one.root, one.name, side=pixels, mark=mark) if pair is None else None
            neighbors.append({"name": one.name, "rank": one.rank, "score": one.score, "image": alone, "pair": pair})
        hits -= len(neighbors)
        shown.append(
            {
                "query": _name(answer),
                "error": answer.error,
                "note": "" if answer.box is None else f"outlined: {window_text(answer.box)}",
                "image": _query(path, answer, turned),
                "neighbors": neighbors,
                "found": len(answer.neighbors),
                "side": side,
            }
        )
    roots = {one.root for answer in answers for one in answer.neighbors}
    write_page(
        path,
        "hits.html",
        {
            "gallery": str(gallery.path),
            "count": len(gallery),
            "factory": gallery.factory,
            "exact": gallery.exact,
            "located": result.located,
            "explained": explained < PAGE_EXPLAINED,
            "notes": result.notes,
            "answers": shown,
            "queries": len(result.answers) if queries is None else queries,
            "root": roots.pop() if len(roots) == 1 else "",
            "folder": common_folder(one.name for answer in answers for one in answer.neighbors),
            "asked_root": answers[0].root if answers else "",
            "asked_folder": common_folder(_name(answer) for answer in answers if answer.error is None),
        },
        origins=[Origin(str(gallery.path), gallery.recipe, gallery.weights_sha256)],
        command=command,
    )


def _side(count: int) -> int:
    """Few hits are shown large: as many as fit into one row."""
    return min(_SIDES[1], max(_SIDES[0], _ROOM // max(count, 1) - 14))


def _name(answer: Answer) -> str:
    """Of a query: its row's name, or its path, because images of several folders may have the same name below them."""
    return answer.query if answer.root or answer.item is None else answer.path


def _query(page: Path, answer: Answer, orientation: str, heat: Heat | None = None) -> Shown:
    if answer.error is None and answer.root:
        return shown_row(page, answer.root, answer.query, heat=heat, orientation=orientation)
    if answer.error is not None or answer.item is None:
        return Shown(answer.query, None, None)
    if answer.box is None:
        return shown_item(page, answer.item, answer.path, side=2 * _SIDES[0], heat=heat, orientation=orientation)
    if heat is not None:
        heat = Heat(heat.grid, heat.points, answer.box)
    marks = [Mark(answer.box)]
    return shown_item(page, answer.item, answer.path, side=420, marks=marks, heat=heat, orientation=orientation)


def _explained(page: Path, answer: Answer, one: Neighbor, orientation: str) -> dict[str, Any]:
    """The query and a neighbor with what each of their bins adds to the score."""
    why = one.explanation
    assert why is not None
    # One measure for both images, so that their colors can be compared.
    largest = max(float(why.query.max()), float(why.image.max()), 1e-9)
    asked, there = ([getattr(link, side) for link in why.links] for side in ("query", "image"))
    image = Heat(np.maximum(why.image, 0) / largest, there)
    return {
        "query": _query(page, answer, orientation, Heat(np.maximum(why.query, 0) / largest, asked)),
        "image": shown_row(page, one.root, one.name, mark=one.box, heat=image, orientation=orientation),
        "links": [f"{number}: {link.score:.3f}" for number, link in enumerate(why.links, 1)],
    }
