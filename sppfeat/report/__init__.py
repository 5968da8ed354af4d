"""HTML pages: one self-contained file each."""

from __future__ import annotations

from sppfeat.report.pages import check_page, image_address, item_thumbnail, plot_line, thumbnail, write_page

__all__ = ["check_page", "image_address", "item_thumbnail", "plot_line", "thumbnail", "write_page"]
