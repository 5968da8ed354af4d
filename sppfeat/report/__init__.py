"""HTML pages: one self-contained file each."""

from __future__ import annotations

from sppfeat.report.learning import write_learning_page
from sppfeat.report.pages import (
    Heat,
    check_page,
    image_address,
    item_thumbnail,
    plot_line,
    small_image,
    thumbnail,
    write_page,
)

__all__ = [
    "Heat",
    "check_page",
    "image_address",
    "item_thumbnail",
    "plot_line",
    "small_image",
    "thumbnail",
    "write_learning_page",
    "write_page",
]
