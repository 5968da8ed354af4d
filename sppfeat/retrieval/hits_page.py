"""The page of a search: queries and their neighbors, with thumbnails, and what made their scores."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Final

import numpy as np

from sppfeat.report import Heat, item_thumbnail, thumbnail, write_page
from sppfeat.retrieval.gallery import Gallery
from sppfeat.retrieval.search import Answer, Neighbor, SearchResult
from sppfeat.store import window_text

# With more thumbnails, a phone could not open the page.
PAGE_QUERIES: Final = 200
PAGE_HITS: Final = 1000
PAGE_EXPLAINED: Final = 100


def write_hits_page(path: Path, gallery: Gallery, result: SearchResult, *, queries: int | None = None) -> None:
    """Write queries and their neighbors with thumbnails to one HTML file. Raises ReportError.

    queries: how many there were, if not all answers are here: the page shows PAGE_QUERIES.
    """
    small = functools.cache(thumbnail)  # an image is often found by several queries
    hits, explained = PAGE_HITS, PAGE_EXPLAINED
    shown = []
    for answer in result.answers[:PAGE_QUERIES]:
        neighbors: list[dict[str, Any]] = []
        for one in answer.neighbors[:hits]:
            mark = one.box if result.located else None
            pair = None
            if one.explanation is not None and explained:
                pair = _explained(answer, one)
                explained -= 1
            alone = small(one.root, one.name, mark=mark) if pair is None else None
            neighbors.append({"name": one.name, "rank": one.rank, "score": one.score, "thumbnail": alone, "pair": pair})
        hits -= len(neighbors)
        shown.append(
            {
                "query": answer.query,
                "error": answer.error,
                "note": "" if answer.box is None else f"part {window_text(answer.box)}",
                "thumbnail": _query(answer),
                "neighbors": neighbors,
                "more": len(answer.neighbors) - len(neighbors),
            }
        )
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
            "more": (len(result.answers) if queries is None else queries) - len(shown),
        },
    )


def _query(answer: Answer, heat: Heat | None = None) -> str | None:
    if answer.error:
        return None
    if answer.root:
        return thumbnail(answer.root, answer.query, heat=heat)
    return None if answer.item is None else item_thumbnail(answer.item, box=answer.box, heat=heat)


def _explained(answer: Answer, one: Neighbor) -> dict[str, Any]:
    """The query and a neighbor with what each of their bins adds to the score."""
    why = one.explanation
    assert why is not None
    # One measure for both images, so that their colors can be compared.
    largest = max(float(why.query.max()), float(why.image.max()), 1e-9)
    asked, there = ([getattr(link, side) for link in why.links] for side in ("query", "image"))
    return {
        "query": _query(answer, Heat(np.maximum(why.query, 0) / largest, asked)),
        "image": thumbnail(one.root, one.name, mark=one.box, heat=Heat(np.maximum(why.image, 0) / largest, there)),
        "links": [f"{number}: {link.score:.3f}" for number, link in enumerate(why.links, 1)],
    }
