"""HTML pages: one self-contained file each."""

from __future__ import annotations

from sppfeat.report.learning import write_learning_page
from sppfeat.report.names import common_folder, image_link
from sppfeat.report.pages import Origin, check_page, write_page
from sppfeat.report.plots import plot_counts, plot_line
from sppfeat.report.shown import Shown, shown_item, shown_row
from sppfeat.report.thumbnails import (
    FOUND_COLOR,
    TRUE_COLOR,
    Heat,
    Mark,
    image_address,
    small_image,
    thumbnail,
)

__all__ = [
    "FOUND_COLOR",
    "Heat",
    "Mark",
    "Origin",
    "Shown",
    "TRUE_COLOR",
    "check_page",
    "common_folder",
    "image_address",
    "image_link",
    "plot_counts",
    "plot_line",
    "shown_item",
    "shown_row",
    "small_image",
    "thumbnail",
    "write_learning_page",
    "write_page",
]
