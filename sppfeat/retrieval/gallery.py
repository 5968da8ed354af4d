"""The gallery: a folder with an index, the names of its rows, and everything needed to prepare a query.

`sppfeat.retrieval.gallery_files` describes its files and how they change.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sppfeat.errors import GalleryError, SppFeatError, UsageError, one_line
from sppfeat.images import is_lost, is_url
from sppfeat.recipe import Recipe
from sppfeat.retrieval.about import About, AddedEntries, FileEntries
from sppfeat.retrieval.arrays import read_arrays
from sppfeat.retrieval.bins import BinLayout, Bins, bin_layout, join_bins, read_bins, read_channels
from sppfeat.retrieval.channels import Channels
from sppfeat.retrieval.faiss_files import read_index_file
from sppfeat.retrieval.faiss_index import is_exact, reconstruct
from sppfeat.retrieval.faiss_library import load_faiss, on_device
from sppfeat.retrieval.gallery_files import GalleryRows, checked_file, read_about, read_rows
from sppfeat.retrieval.map import read_map
from sppfeat.retrieval.regions import Regions, read_regions
from sppfeat.retrieval.segments import JoinedIndex
from sppfeat.retrieval.whitening import Projection
from sppfeat.store import open_store, split_row_name, unit_rows


@dataclass(frozen=True)
class Gallery:
    """An open gallery, in memory.

    index: of FAISS, or two of them joined; its row i is row i of `rows`. exact: whether it compares a query with every
    full row.
    about: the contents of the folder's JSON. dim: length of a descriptor before projection. bins: what parts are found
    in, if they were kept. regions: in which of its images, if there are many. points: [N, 2] float32 from 0 to 1, where
    each row is on the map, if there is one.
    """

    path: Path
    recipe: Recipe
    recipe_hash: str
    weights_sha256: str
    dim: int
    index: Any
    exact: bool
    rows: GalleryRows
    projection: Projection | None
    about: About
    bins: Bins | None = None
    regions: Regions | None = None
    points: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows.names)

    @property
    def factory(self) -> str:
        """The factory string of the index."""
        return self.about.index.factory


def open_gallery(path: str | os.PathLike[str], *, device: str = "cpu") -> Gallery:
    """Open a gallery, even while another process changes it; device: where its index is searched.

    Raises GalleryError if it is not a complete gallery, DeviceError.
    """
    path = Path(path)
    while True:
        about = read_about(path)
        load_faiss()  # after a path that is no gallery has been refused
        try:
            return _open(path, about, device)
        except GalleryError:
            # Its files may have been replaced between our two reads: then there is a newer description.
            if read_about(path).generation == about.generation:
                raise


def describe_gallery(path: str | os.PathLike[str]) -> tuple[About, Recipe]:
    """What a gallery's JSON says, without opening its other files, and so without FAISS. Raises GalleryError."""
    about = read_about(Path(path))
    return about, _recipe(Path(path), about)


def _recipe(path: Path, about: About) -> Recipe:
    what = f"{path}: expected a complete gallery"
    try:
        recipe = Recipe.from_json(bytes(about.recipe).decode("utf-8"))
    except (UsageError, UnicodeDecodeError) as error:
        raise GalleryError(f"{what}, found: {one_line(error)}") from None
    if recipe.identity(about.weights_sha256) != about.recipe_hash:
        raise GalleryError(f"{what}, found a recipe that does not match its recipe_hash")
    return recipe


def _open(path: Path, about: About, device: str) -> Gallery:
    recipe = _recipe(path, about)
    projection = None
    if (told := about.projection) is not None and about.files.projection is not None:
        shapes = {"mean": (about.dim,), "matrix": (about.dim, told.dim), "eigenvalues": (told.dim,)}
        arrays = read_arrays(checked_file(path, "projection", about.files.projection), shapes)
        projection = Projection(
            mean=arrays["mean"],
            matrix=arrays["matrix"],
            eigenvalues=arrays["eigenvalues"],
            kept=told.kept,
            power=told.power,
            shrinkage=told.shrinkage,
            learned_from=told.learned_from,
            rows=told.rows,
            route=told.route,
        )
    dim = about.dim if told is None else told.dim
    layout = channels = None
    if about.bins is not None and about.files.channels is not None:
        try:
            layout = bin_layout(recipe, about.dim)
        except UsageError as error:
            raise GalleryError(f"{path}: expected a gallery without bins: {error}") from None
        if about.bins.dim > layout.channels or about.bins.bytes != layout.side**2 * about.bins.dim:
            raise GalleryError(
                f"{path}: expected at most {layout.channels} values of a bin and bytes of {layout.side**2} bins, found "
                f"{about.bins.dim} and {about.bins.bytes}"
            )
        file = checked_file(path, "channels", about.files.channels)
        channels = read_channels(file, layout, about.bins.whitened, about.bins.dim)
    index, rows, bins, regions = _read_part(path, about.files, about.base_rows, dim, layout, channels)
    in_regions = [(about.base_rows, regions)]
    exact = is_exact(index)
    if (added := about.files.added) is not None:
        more, more_rows, more_bins, more_regions = _read_part(path, added, added.count, dim, layout, channels)
        in_regions.append((added.count, more_regions))
        if not is_exact(more):
            raise GalleryError(f"{path / added.index.file}: expected an exact index of added rows, found another")
        index, rows = JoinedIndex(index, more), rows.followed_by(more_rows)
        bins = join_bins(bins, more_bins) if bins is not None and more_bins is not None else None
    points = None
    if about.files.map is not None:
        points = read_map(checked_file(path, "map", about.files.map), about.rows)
    return Gallery(
        path,
        recipe,
        about.recipe_hash,
        about.weights_sha256,
        about.dim,
        index if device == "cpu" else on_device(index, device),
        exact,
        rows,
        projection,
        about,
        bins,
        Regions(in_regions) if any(one is not None for _, one in in_regions) else None,
        points,
    )


def _read_part(
    path: Path,
    files: FileEntries | AddedEntries,
    count: int,
    dim: int,
    layout: BinLayout | None,
    channels: Channels | None,
) -> tuple[Any, GalleryRows, Bins | None, Any]:
    """The index, names, bins and regions of the base or of added rows. Raises GalleryError for damaged files."""
    # All are checked before one is read.
    index, rows = checked_file(path, "index", files.index), checked_file(path, "rows", files.rows)
    # Any bytes of it are values; `verify_gallery` reads them all.
    bins = None if files.bins is None else checked_file(path, "bins", files.bins, content=False)
    regions = None if files.regions is None else checked_file(path, "regions", files.regions)
    # The index first, because its length bounds the number of rows.
    found = read_index_file(index, count, dim)
    table = read_rows(rows, count)
    if bins is None or layout is None or channels is None:
        return found, table, None, None
    kept = read_bins(bins, count, layout, channels)
    return found, table, kept, None if regions is None else read_regions(regions, count, layout)


def check_recipe(
    gallery: Gallery, recipe: Recipe, weights_sha256: str, dim: int, name: str, *, kind: str = "store", remedy: str = ""
) -> None:
    """Raise GalleryError, naming what differs, unless descriptors of a recipe can be compared with the gallery's.

    name, kind: of what makes such descriptors. remedy: what to do, the end of the message.
    """
    weights, dims = (gallery.weights_sha256, weights_sha256), (gallery.dim, dim)
    if differences := gallery.recipe.differences(recipe, ("gallery", kind), weights=weights, dims=dims):
        found = f"was made with another recipe than {name} ({'; '.join(differences)})"
        raise GalleryError(f"{gallery.path}: {found}{f'; {remedy}' if remedy else ''}")


def lost_notes(found: set[tuple[str, str]]) -> list[str]:
    """Notes of rows, by their root and name, whose folder or file is gone."""
    away = sorted(root for root in {root for root, _ in found} if not is_url(root) and not os.path.isdir(root))
    notes = [f"the folder of images found, {root}, is not there" for root in away]
    gone = [name for root, name in found if root not in away and is_lost(root, split_row_name(name)[0])]
    if gone:
        then = "`sppfeat index --remove` takes a list of names"
        notes.append(f"images found that have lost their file: {len(gone)}, such as {min(gone)!r}; {then}")
    return notes


@dataclass(frozen=True)
class GalleryCheck:
    """What `verify_gallery` found. problems: one line per fault. compared: rows that were held against those of their
    stores. passed_over: why others were not, one line each.
    """

    problems: list[str]
    compared: int
    passed_over: list[str]


def verify_gallery(gallery: Gallery) -> GalleryCheck:
    """Hold rows against the stores that they came from. Opening has checked the files, but for the values of bins.

    Rows that the index holds exactly must equal those of a store with the same name and checksum. Coded rows, and those
    of a store that cannot be opened, or is of another recipe or of other descriptors by now, cannot be compared.
    """
    problems, passed_over = [], []
    added = gallery.about.files.added
    for kept in (gallery.about.files.bins, None if added is None else added.bins):
        if kept is not None:
            try:
                checked_file(gallery.path, "bins", kept)
            except GalleryError as error:
                problems.append(str(error))
    if len(set(gallery.rows.names)) != len(gallery):
        problems.append(f"{len(gallery) - len(set(gallery.rows.names))} duplicate names")
    if not gallery.exact:
        return GalleryCheck(problems, 0, ["the index holds codes, not rows"])
    place = {name: row for row, name in enumerate(gallery.rows.names)}
    seen, compared = np.zeros(len(gallery), bool), np.zeros(len(gallery), bool)
    for path in dict.fromkeys(source.store for source in gallery.about.sources):  # one that grew is there once more
        try:
            rows = unit_rows(open_store(path), gallery.projection)
        except SppFeatError as error:
            passed_over.append(str(error))
            continue
        if rows.store.recipe_hash != gallery.recipe_hash:
            passed_over.append(f"{rows.store.place} has another recipe by now")
            continue
        checksums = rows.store.checksum[rows.rows]
        known = [(at, place[name]) for at, name in enumerate(rows.names) if name in place]
        same = [(at, row) for at, row in known if gallery.rows.checksum[row] == checksums[at]]
        for start in range(0, len(same), 1024):
            ours, theirs = (np.array(side) for side in zip(*same[start : start + 1024], strict=True))
            apart = np.abs(reconstruct(gallery.index, theirs) - rows.take(ours)).max(1)
            problems += [
                f"row {row} ({gallery.rows.names[row]!r}): differs from that of {rows.store.place}"
                for row in theirs[apart > 1e-4].tolist()
            ]
        seen[[row for _, row in known]] = True
        compared[[row for _, row in same]] = True
    for count, reason in (
        (int((seen & ~compared).sum()), "described again in the store since"),
        (int((~seen).sum()), "in no store that could be compared"),
    ):
        if count:
            passed_over.append(f"{count} row{'s' * (count > 1)} {reason}")
    return GalleryCheck(problems, int(compared.sum()), passed_over)
