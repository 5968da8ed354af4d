"""The page of a search: queries and their neighbors, with thumbnails."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Final

from sppfeat.report import item_thumbnail, thumbnail, write_page
from sppfeat.retrieval.gallery import Gallery
from sppfeat.retrieval.search import Answer, SearchResult
from sppfeat.store import window_text

# With more thumbnails, a phone could not open the page.
PAGE_QUERIES: Final = 200


def write_hits_page(path: Path, gallery: Gallery, result: SearchResult) -> None:
    """Write queries and their neighbors with thumbnails to one HTML file. Raises ReportError, MissingExtraError."""
    small = functools.cache(thumbnail)  # an image is often found by several queries

    def of_query(answer: Answer) -> str | None:
        if answer.error:
            return None
        if answer.root:
            return small(answer.root, answer.query)
        return None if answer.item is None else item_thumbnail(answer.item, box=answer.box)

    shown = [
        {
            "query": answer.query,
            "error": answer.error,
            "note": "" if answer.box is None else f"part {window_text(answer.box)}",
            "thumbnail": of_query(answer),
            "neighbors": [
                {
                    "name": one.name,
                    "rank": one.rank,
                    "score": one.score,
                    "thumbnail": small(one.root, one.name, mark=one.box if result.located else None),
                }
                for one in answer.neighbors
            ],
        }
        for answer in result.answers[:PAGE_QUERIES]
    ]
    write_page(
        path,
        "hits.html",
        {
            "gallery": str(gallery.path),
            "count": len(gallery),
            "factory": gallery.factory,
            "exact": gallery.exact,
            "located": result.located,
            "notes": result.notes,
            "answers": shown,
            "more": len(result.answers) - len(shown),
        },
    )
