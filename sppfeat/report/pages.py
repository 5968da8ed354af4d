"""HTML pages: one self-contained file each, with thumbnails and curves inside, that works offline and on a phone.

The pages' templates are in `templates/`; `base.html` holds their style, and the footer that says what made a page.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from sppfeat._version import __version__
from sppfeat.errors import ReportError
from sppfeat.files import appearing, check_new_file, os_reason
from sppfeat.recipe import Recipe
from sppfeat.report.names import NAME_LENGTH, short_name

_BEGINNING: Final = b"<!doctype html>"


class Origin(NamedTuple):
    """What a page is about, for its footer: a store, gallery or model by name, its recipe, and SHA-256 of its weights;
    None if the recipe alone is known."""

    name: str
    recipe: Recipe
    weights_sha256: str | None = None

    def fields(self) -> list[tuple[str, str]]:
        """The recipe's fields that are set, as text."""
        values = {field.name: getattr(self.recipe, field.name) for field in dataclasses.fields(self.recipe)}
        if self.weights_sha256 is not None:
            values["weights_sha256"] = self.weights_sha256
        return [
            (name, ",".join(map(str, value)) if isinstance(value, tuple) else str(value))
            for name, value in values.items()
            if value is not None
        ]

    def summary(self) -> str:
        """The recipe on one line."""
        recipe = self.recipe
        layer = f"layer {recipe.layer}, " if recipe.layer is not None else ""
        scales, levels = (",".join(map(str, each)) for each in (recipe.scales, recipe.levels))
        return f"{recipe.backbone}, {layer}scales {scales}, levels {levels}, pooling {recipe.pooling}"


def check_page(path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The path, if a page may be written there; call this before the work that fills it.

    Raises ReportError for a folder that does not exist or is not writable, and for an existing file, unless it
    is a page and `overwrite` is set.
    """
    return check_new_file(path, overwrite=overwrite, error=ReportError, kind="an HTML page", other=_other_than_page)


def _other_than_page(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return None if file.read(len(_BEGINNING)).lower() == _BEGINNING else "another file"
    except OSError as error:
        raise ReportError(f"{path}: expected an HTML page or a new file, found: {os_reason(error)}") from None


def write_page(
    path: Path, template: str, values: Mapping[str, Any], *, origins: Sequence[Origin] = (), command: str = ""
) -> None:
    """Fill a template of `templates/` and write the page atomically. Text is escaped.

    origins, command: what the page's footer says it was made from, and with. Templates have a filter `short`, which
    writes a name without a folder and shortened.
    Raises ReportError if it cannot be written.
    """
    import jinja2  # only where a page is written
    import markupsafe

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sppfeat.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def short(name: str, folder: str = "", length: int = NAME_LENGTH) -> Any:
        # A browser breaks a name between folders first.
        return markupsafe.escape(short_name(name, folder, length)).replace("/", markupsafe.Markup("/<wbr>"))

    environment.filters["short"] = short
    text = environment.get_template(template).render(
        {"version": __version__, "origins": origins, "command": command, **values}
    )
    with appearing(path, ReportError) as partial:
        # A name may hold characters that cannot be encoded; a browser shows the escape.
        partial.write_text(text, "utf-8", errors="backslashreplace")
