"""The images that a gallery is searched with, which of its rows are their own, and the network that describes them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from sppfeat.errors import UsageError
from sppfeat.images import Item, as_given, find_images, left_out, no_images
from sppfeat.recipe import RunOptions
from sppfeat.retrieval.bins import part_recipe
from sppfeat.retrieval.gallery import Gallery, check_recipe
from sppfeat.store import Box, image_of, split_row_name

if TYPE_CHECKING:
    from sppfeat.extraction import Describer


def check_box(box: Box) -> None:
    """Raise UsageError unless x1, y1, x2, y2 can be a part of an image."""
    x1, y1, x2, y2 = box
    if 0 < max(box) <= 1 and not all(value == int(value) for value in box if math.isfinite(value)):
        raise UsageError(f"box must be in pixels, found fractions {','.join(f'{v:g}' for v in box)}")
    if not all(math.isfinite(value) for value in box) or x1 < 0 or y1 < 0 or x2 < x1 or y2 < y1:
        raise UsageError(
            f"box must be x1,y1,x2,y2 in pixels with x1 <= x2 and y1 <= y2, found {','.join(f'{v:g}' for v in box)}"
        )


def own_rows(gallery: Gallery, paths: list[str]) -> np.ndarray:
    """[Q, M] the rows of each query's own file, windows included, padded with -1.

    Files are identified by their paths; links to folders are followed.
    """
    table = gallery.rows
    roots = [os.path.realpath(root) for root in table.roots]
    known: dict[str, list[int]] = {}
    for row, (name, root) in enumerate(zip(table.names, table.root, strict=True)):
        known.setdefault(os.path.normpath(image_of(roots[int(root)], name)[0]), []).append(row)
    own = []
    for path in paths:
        folder = os.path.realpath(os.path.dirname(path))
        files = {os.path.join(folder, os.path.basename(path)), os.path.realpath(path)}
        own.append([row for file in files for row in known.get(file, ())])
    found = np.full((len(paths), max(map(len, own), default=0)), -1, np.int64)
    for at, rows in enumerate(own):
        found[at, : len(rows)] = rows
    return found


def rows_of_image(gallery: Gallery, row: int) -> np.ndarray:
    """[M] the rows of a row's image, windows included, by their names: wherever the image is now."""
    table = gallery.rows
    image, _ = split_row_name(table.names[row])
    root = table.root[row]
    near = [at for at, name in enumerate(table.names) if name.startswith(image) and table.root[at] == root]
    return np.array([at for at in near if at == row or split_row_name(table.names[at])[0] == image], np.int64)


def list_queries(sources: Sequence[str | os.PathLike[str]]) -> tuple[list[str], list[Item], dict[int, str], list[str]]:
    """The queries' names, their items, the reasons for failed ones by number, and notes. Raises UsageError.

    They are named by their paths as given. A source without images is a failed query, unless there is no other.
    """
    queries: list[str] = []
    items: list[Item] = []
    errors: dict[int, str] = {}
    seen: set[str] = set()
    notes: list[str] = []
    refused: UsageError | None = None
    for source in [os.fspath(source) for source in sources]:
        try:
            images = find_images([source])
        except UsageError as error:
            refused = refused or error
            errors[len(queries)] = str(error).removeprefix(f"{source}: ")
            queries.append(source)
            items.append(Item("", source))
            continue
        if images.extent is not None and images.extent.unread:
            notes.append(left_out(images.extent.unread))
        for item in images.items:
            path = item.path
            if path in seen:
                continue
            seen.add(path)
            if item.problem is not None:
                errors[len(queries)] = item.problem
            queries.append(as_given(path, [source]))
            items.append(item)
    if refused is not None and len(errors) == len(queries):
        raise refused
    if not queries:
        raise UsageError(no_images(sources))
    return queries, items, errors, notes


def describer_for(
    gallery: Gallery,
    run_options: RunOptions | None = None,
    *,
    weights: str | None = None,
    factors: tuple[float, ...] | None = None,
) -> Describer:
    """The network that the gallery was described with. Raises GalleryError if the local one differs.

    factors: describe at these parts of the gallery's scale instead, one descriptor after the other.
    """
    from sppfeat.extraction import Describer

    recipe = gallery.recipe if weights is None else replace(gallery.recipe, weights=weights)
    if factors is not None:
        recipe = part_recipe(recipe, factors)
    describer = Describer(recipe, run_options)
    made_with = describer.recipe
    if factors is not None:
        made_with = replace(made_with, scales=gallery.recipe.scales, fuse=gallery.recipe.fuse)
    dim = describer.dim // len(recipe.scales) if factors is not None else describer.dim
    check_recipe(gallery, made_with, describer.weights_sha256, dim, "the network", kind="network")
    return describer
