"""HTML pages: one self-contained file each, with thumbnails and curves inside, that works offline and on a phone.

The pages' templates lie in `templates/`; `base.html` holds their looks.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from PIL import Image

from sppfeat._version import __version__
from sppfeat.errors import ImageError, ReportError, require_extra
from sppfeat.files import appearing, check_new_file
from sppfeat.images import decode, open_image, upright_size

THUMBNAIL_SIDE: Final = 240  # twice what a page shows, for screens with two dots a pixel


def check_page(path: str | os.PathLike[str]) -> Path:
    """The path, if a page may be written there, also over another page. To be asked before the work is done.

    Raises ReportError: no file but one that is called .html is ever replaced.
    """
    page = Path(path)
    return check_new_file(page, overwrite=page.suffix.lower() in (".html", ".htm"), error=ReportError, kind=None)


def write_page(path: Path, template: str, values: Mapping[str, Any]) -> None:
    """Fill a template of `templates/` and write the page; it appears whole. Text is escaped.

    Raises ReportError when it cannot be written, MissingExtraError without jinja2.
    """
    jinja2 = require_extra("jinja2", "report", "an HTML page")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sppfeat"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template).render({"version": __version__, **values})
    with appearing(path, ReportError) as partial:
        # A name may hold what no encoding takes; a browser shows the escape.
        partial.write_text(text, "utf-8", errors="backslashreplace")


def thumbnail(
    path: str, *, side: int = THUMBNAIL_SIDE, box: tuple[float, float, float, float] | None = None
) -> str | None:
    """A picture as a small JPEG in a `data:` address, for the `src` of an image; None where it cannot be read.

    side: of the square that it fits into. box: x1, y1, x2, y2 in pixels of the upright original; it alone is shown.
    """
    try:
        image, _ = open_image(path)
        with image:
            size, turn = upright_size(image, orientation="exif")
            if box is None:
                # Decoding at an eighth of the size is several times faster, and no one sees it here.
                image.draft("RGB", (2 * side, 2 * side))
            shown = decode(image, turn, orientation="exif")
    except ImageError:
        return None
    if box is not None:
        shown = shown.crop((round(box[0]), round(box[1]), round(box[2]) + 1, round(box[3]) + 1))
    shown.thumbnail((side, side), Image.Resampling.BICUBIC)
    return picture_address(shown, "JPEG")


def picture_address(picture: Image.Image, kind: str) -> str:
    """A picture in a `data:` address; kind: `JPEG` or `PNG`."""
    content = io.BytesIO()
    picture.save(content, kind, quality=82)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"
