"""The gallery that is served: opened once, and again when it was replaced; its images, and answers to queries."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from sppfeat.errors import GalleryError, ImageError, SppFeatError, UsageError
from sppfeat.files import unsafe_name
from sppfeat.images import Item, is_url
from sppfeat.recipe import RunOptions
from sppfeat.retrieval import (
    Duplicates,
    Gallery,
    Member,
    SearchOptions,
    SearchResult,
    describer_for,
    find_duplicates,
    open_gallery,
    part_factors,
    rows_of_image,
    search_items,
)
from sppfeat.serve.uploads import Query, quick_size, read_size
from sppfeat.store import Box, item_of, open_store

if TYPE_CHECKING:
    from sppfeat.extraction import Describer

# A gallery is looked at again for a newer one at most so often.
_LOOK_SECONDS: Final = 1.0


@dataclass(frozen=True)
class Shown:
    """A row of the gallery as a page shows it: its image, and the window that it is of."""

    row: int
    name: str
    item: Item
    window: Box | None


class Collection:
    """A gallery that is served. Raises GalleryError if there is none.

    images: a folder instead of source folders that are gone. weights: where the gallery's weights are now.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        run_options: RunOptions | None = None,
        *,
        images: str | None = None,
        weights: str | None = None,
        max_pixels: int = 100_000_000,
    ) -> None:
        if images is not None and not os.path.isdir(images):
            raise UsageError(f"images: expected a folder, found {images!r}")
        self._path, self._options = Path(path), run_options
        self._images, self._weights, self._max_pixels = images, weights, max_pixels
        # Of what is known of the gallery; and of the networks, which may take long to load.
        self._lock, self._loading = threading.Lock(), threading.Lock()
        self._opened = threading.Condition(self._lock)
        self._opening = False
        # Stamps of what could not be opened, twice and once.
        self._failed: tuple[int, ...] | None = ()
        self._tried: tuple[int, ...] | None = ()
        self._seen = self._stamp()
        self._gallery = open_gallery(self._path)
        self._looked = time.monotonic()
        self._fault: str | None = None
        # By recipe, too: a request may still be about the gallery before.
        self._describers: dict[tuple[str, tuple[float, ...] | None], Describer] = {}
        self._sizes: dict[tuple[str, int], tuple[int, int]] = {}

    def current(self, *, wait: bool = False) -> Gallery:
        """The gallery as it is on disk, or the last one that could be opened: see `notes`.

        While one request opens a newer one, others get the one before, unless they wait.
        """
        with self._lock:
            if wait:
                self._opened.wait_for(lambda: not self._opening)
            if self._opening or time.monotonic() - self._looked < _LOOK_SECONDS:
                return self._gallery
            self._looked = time.monotonic()
            stamp = self._stamp()
            if stamp == self._seen:  # perhaps it was away and is back
                self._fault, self._failed, self._tried = None, (), ()
                return self._gallery
            if stamp == self._failed:
                return self._gallery
            self._opening = True
        opened, fault = None, None
        try:
            opened = open_gallery(self._path)
        except GalleryError as error:
            fault = f"the gallery was changed and cannot be opened: {error}; this is the one before"
        finally:
            if opened is None and fault is None:  # something else was raised
                with self._lock:
                    self._ended()
        with self._lock:
            self._ended()
            self._fault = fault
            if opened is None:
                # Once more, if it is just being replaced; after that when something changes.
                self._failed = stamp if self._tried == stamp else ()
                self._tried = stamp
                return self._gallery
            other_network = opened.recipe_hash != self._gallery.recipe_hash
            self._gallery, self._seen, self._failed, self._tried = opened, stamp, (), ()
            self._sizes.clear()
        if other_network:
            with self._loading:
                self._describers.clear()
        return opened

    def _ended(self) -> None:
        self._opening = False
        self._opened.notify_all()

    def again(self) -> None:
        """Look at the folder with the next request, however soon."""
        with self._lock:
            self._looked = -_LOOK_SECONDS

    @property
    def path(self) -> Path:
        """The gallery's folder."""
        return self._path

    def notes(self) -> list[str]:
        """What users should know of the gallery."""
        gallery = self.current()
        found = [] if self._fault is None else [self._fault]
        if missing := self.missing(gallery):
            found.append(
                f"{', '.join(missing)}: no such folder, so its images are not shown; "
                "`sppfeat serve --images DIR` says where they are now"
            )
        return found

    def missing(self, gallery: Gallery) -> list[str]:
        """Source folders that are not there, and which no folder was given for."""
        if self._images is not None:
            return []
        return [root for root in gallery.rows.roots if not is_url(root) and not os.path.exists(root)]

    def shown(self, gallery: Gallery, row: int) -> Shown:
        """A row's image, found below its source folder alone. Raises ImageError."""
        if not 0 <= row < len(gallery):
            raise ImageError(f"expected a row from 0 to {len(gallery) - 1}, found {row}")
        name = gallery.rows.names[row]
        root = gallery.rows.roots[int(gallery.rows.root[row])]
        if self._images is not None and not is_url(root) and not os.path.exists(root):
            root = self._images
        if unsafe_name(name) is not None:  # checked when the gallery was opened, too
            raise ImageError("its name leads out of its folder")
        try:
            item, window = item_of(root, name)
        except ValueError:  # a path that is invalid on this system
            raise ImageError("its name is no path on this system") from None
        return Shown(row, name, item, window)

    def size_of(self, gallery: Gallery, row: int, *, quick: bool = False) -> tuple[int, int] | None:
        """Width and height of a row's upright image; None if it cannot be read. quick: None if pixels are decoded."""
        if gallery.bins is not None:
            width, height = gallery.bins.image_size[row].tolist()
            return width, height
        key = gallery.about.row_state, row
        if (known := self._sizes.get(key)) is None:
            try:
                known = (quick_size if quick else read_size)(self.shown(gallery, row).item, self._max_pixels)
            except ImageError:
                return None
            if known is not None:
                self._sizes[key] = known
        return known

    def query(self, gallery: Gallery, row: int) -> Query:
        """A row's image as a query. Raises ImageError."""
        shown = self.shown(gallery, row)
        return Query(f"r-{row}", shown.name, shown.item, read_size(shown.item, self._max_pixels), row)

    def duplicates(
        self, gallery: Gallery, threshold: float | None, progress: Callable[[float], None]
    ) -> tuple[Duplicates, list[list[tuple[int, Member]]]]:
        """What `find_duplicates` finds in the store that the gallery was built from, and its groups with the rows'
        numbers, of what is still in the gallery.

        Raises StoreError, UsageError: descriptors as they are stored are compared, which an index may not hold.
        """
        stores = [source.store for source in gallery.about.sources]
        if len(stores) != 1:
            raise UsageError(
                f"expected a gallery of one store, found {len(stores)}: `sppfeat duplicates` compares each"
            )
        store = open_store(stores[0])
        moved = self._images is not None and not is_url(store.source_root) and not os.path.exists(store.source_root)
        found = find_duplicates(store, threshold, root=self._images if moved else None, progress=progress)
        row_of = {name: row for row, name in enumerate(gallery.rows.names)}
        groups = [[(row_of[one.name], one) for one in group if one.name in row_of] for group in found.groups]
        return found, [group for group in groups if len(group) > 1]

    def search(self, gallery: Gallery, query: Query, options: SearchOptions, box: Box | None) -> SearchResult:
        """Search with an image, or with a part of it, but for the gallery's own rows of it. Raises SppFeatError."""
        describer = self.describer(gallery, part_factors(options, box))
        own = None if query.row is None else rows_of_image(gallery, query.row)[None]
        return search_items(gallery, [replace(query.item, windows=None)], options, describer, box=box, own=own)

    def describer(self, gallery: Gallery, factors: tuple[float, ...] | None = None) -> Describer:
        """The gallery's network at parts of its scale, loaded once."""
        with self._loading:
            key = gallery.recipe_hash, factors
            found = self._describers.get(key)
            if found is None:
                found = describer_for(gallery, self._options, weights=self._weights, factors=factors)
                self._describers[key] = found
        return found

    def warm(self, failed: Callable[[str], None]) -> None:
        """Load what the first search needs, with a search for nothing in particular."""
        try:
            gallery = self.current()
            scale = max((one for one in gallery.recipe.scales if isinstance(one, int)), default=224)
            for engine in self.describer(gallery).load():
                # A network may take other sizes alone; then the first search finds it cold.
                with contextlib.suppress(RuntimeError, AssertionError):
                    engine.feature_maps(np.zeros((1, scale, scale, 3), np.uint8))
        except SppFeatError as error:
            failed(str(error))

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self._path / "gallery.json")
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns
