"""A local page over a gallery: search by an image or a part of one, and see where and why it was found."""

from __future__ import annotations

from sppfeat.serve.options import ServeOptions
from sppfeat.serve.server import open_in_browser, serve_gallery

__all__ = ["ServeOptions", "open_in_browser", "serve_gallery"]
