"""The gallery: a folder with an index, the names of its rows, and everything needed to prepare a query.

`sppfeat.retrieval.gallery_files` describes its files and how they change.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sppfeat.errors import GalleryError, UsageError, one_line, unknown_name
from sppfeat.files import GALLERY
from sppfeat.recipe import Recipe
from sppfeat.retrieval.bins import Bins, BinSource, bin_layout, read_bins
from sppfeat.retrieval.faiss_files import read_index_file
from sppfeat.retrieval.faiss_index import (
    BuiltIndex,
    IndexOptions,
    build_index,
    drop_rows,
    faiss_reason,
    fill,
    from_device,
    is_exact,
    load_faiss,
    on_device,
    reconstruct,
)
from sppfeat.retrieval.gallery_files import (
    FORMAT_VERSION,
    About,
    FileEntries,
    FileEntry,
    GalleryRows,
    IndexEntry,
    ProjectionEntry,
    SourceEntry,
    changing,
    check_names,
    check_new_gallery,
    checked_file,
    made_folder,
    path_text,
    read_about,
    read_rows,
    require_gallery,
    write_generation,
)
from sppfeat.retrieval.regions import Regions, read_regions
from sppfeat.retrieval.whitening import Projection, ProjectionOptions, learn_projection, read_arrays
from sppfeat.store import Store, UnitRows, check_same_recipe, open_store, unit_rows


@dataclass(frozen=True)
class Gallery:
    """An open gallery, in memory.

    index: FAISS; its row i is row i of `rows`. exact: whether it compares a query with every full row.
    about: the contents of the folder's JSON. dim: length of a descriptor before projection. bins: what parts are found
    in, if they were kept. regions: in which of its images, if there are many.
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

    def __len__(self) -> int:
        return len(self.rows.names)

    @property
    def factory(self) -> str:
        """The factory string of the index."""
        return self.about.index.factory


@dataclass(frozen=True)
class Change:
    """What changed in a gallery: rows in it now, added, skipped (already there, unchanged), removed; the index's own
    report if one was built; notes for the user."""

    path: str
    rows: int
    added: int
    skipped: int
    removed: int
    built: BuiltIndex | None
    notes: list[str]
    about: About


def create_gallery(
    store: Store,
    output: str | os.PathLike[str],
    options: IndexOptions | None = None,
    projection: ProjectionOptions | None = None,
    *,
    whitening_from: Store | None = None,
    keep_bins: bool = False,
    overwrite: bool = False,
) -> Change:
    """Build a gallery of a finished store's described rows.

    keep_bins: also keep the bins of their finest level, one byte a value, for parts and re-ranking.
    projection: None: descriptors as they are. whitening_from: learn the projection from this store of the same recipe
    instead. Raises GalleryError, StoreError, UsageError; an old gallery at `output` stays until the end.
    """
    load_faiss()
    layout = bin_layout(store.recipe, store.dim) if keep_bins else None
    path = _folder(output)
    check_new_gallery(path, overwrite=overwrite)
    # The folder is created, locked and checked for writing before the work, which may take hours.
    with made_folder(path), changing(path):
        check_new_gallery(path, overwrite=overwrite)
        rows = unit_rows(store)
        _check_names(store, rows.names)
        notes = []
        learned = None
        if projection is not None:
            source = rows if whitening_from is None else _comparable(store, whitening_from)
            learned = learn_projection(source, projection)
            if learned.dim < projection.dims:
                notes.append(f"only {learned.dim} dimensions are kept: {len(source)} rows have no more")
            rows = dataclasses.replace(rows, projection=learned)
        built = build_index(rows, options)
        table = GalleryRows(
            rows.names, [store.source_root], np.zeros(len(rows), np.int64), np.asarray(store.checksum[rows.rows])
        )
        bins = None if layout is None else BinSource(layout, None, rows)
        described = _describe(store, built, learned)
        about = write_generation(path, described, built.index, table, learned, bins, previous=None)
    return Change(str(path), len(rows), len(rows), 0, 0, built, notes + built.notes, about)


def add_to_gallery(store: Store, gallery: str | os.PathLike[str], *, device: str = "cpu") -> Change:
    """Add a store's rows to a gallery of the same recipe; unchanged rows that it already holds are skipped.

    Raises GalleryError for another recipe, weights or dimension, and for a name whose row differs.
    """
    path = _folder(gallery)
    require_gallery(path)
    with changing(path):
        old = open_gallery(path)
        check_recipe(old, store.recipe, store.weights_sha256, store.dim, store.place)
        rows = unit_rows(store, old.projection)
        _check_names(store, rows.names)
        place = {name: row for row, name in enumerate(old.rows.names)}
        checksums = store.checksum[rows.rows]
        new = []
        for at, name in enumerate(rows.names):
            row = place.get(name)
            if row is None:
                new.append(at)
            elif old.rows.checksum[row] != checksums[at]:
                raise GalleryError(
                    f"{path}: already holds {name!r} with another descriptor (from {old.rows.image(row)[0]}); "
                    f"remove it first: sppfeat index --remove names.txt --from {path}"
                )
        skipped = len(rows) - len(new)
        if not new:
            return Change(str(path), len(old), 0, skipped, 0, None, [], old.about)
        rows = rows.only(np.array(new))
        place_on = on_device(old.index, device)
        try:
            fill(place_on, rows)
        except RuntimeError as error:
            raise GalleryError(f"{path}: FAISS cannot add rows ({faiss_reason(error)})") from None
        roots = list(dict.fromkeys([*old.rows.roots, store.source_root]))
        table = GalleryRows(
            old.rows.names + rows.names,
            roots,
            np.append(old.rows.root, np.full(len(rows), roots.index(store.source_root))),
            np.append(old.rows.checksum, store.checksum[rows.rows]),
        )
        about = msgspec.structs.replace(old.about, sources=[*old.about.sources, _source(store, len(rows))])
        index = from_device(place_on, device)
        bins = None
        if old.bins is not None:
            layout = bin_layout(old.recipe, old.dim)
            bins = BinSource(layout, old.bins.only(np.arange(len(old))), rows)
        about = write_generation(
            path, about, index, table, old.projection, bins, previous=old.about, regions=old.regions
        )
        return Change(str(path), len(table.names), len(rows), skipped, 0, None, [], about)


def remove_from_gallery(gallery: str | os.PathLike[str], names: Sequence[str]) -> Change:
    """Remove rows by name. Raises GalleryError for unknown names, before anything is changed."""
    path = _folder(gallery)
    require_gallery(path)
    with changing(path):
        old = open_gallery(path)
        place = {name: row for row, name in enumerate(old.rows.names)}
        unique = list(dict.fromkeys(names))
        missing = [name for name in unique if name not in place]
        if missing:
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise GalleryError(f"{path}: {unknown_name('name', missing[0], place)}{more}; nothing is removed")
        if not unique:
            raise UsageError("expected names to remove, found none")
        gone = np.array(sorted(place[name] for name in unique), np.int64)
        if len(gone) == len(old):
            raise GalleryError(f"{path}: these {len(gone)} names are all it holds; remove the folder instead")
        keep = np.setdiff1d(np.arange(len(old)), gone)
        index = drop_rows(old.index, gone, old.factory)
        notes = [] if index is old.index else [f"{old.factory} cannot drop rows: it was rebuilt from the others"]
        table = GalleryRows(
            [old.rows.names[row] for row in keep], old.rows.roots, old.rows.root[keep], old.rows.checksum[keep]
        )
        bins = None
        if old.bins is not None:
            bins = BinSource(bin_layout(old.recipe, old.dim), old.bins.only(keep), None)
        about = write_generation(path, old.about, index, table, old.projection, bins, previous=old.about)
        return Change(str(path), len(keep), 0, 0, len(gone), None, notes, about)


def read_names(path: str | os.PathLike[str]) -> list[str]:
    """Names from a text file, one per line, as `sppfeat search` shows them. Raises UsageError."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a readable list of names, found: {one_line(error)}") from None
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


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


def _folder(path: str | os.PathLike[str]) -> Path:
    """A path that ends in a name, which its lock is named after."""
    return Path(path) if Path(path).name not in ("", "..") else Path(path).resolve()


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
    files = {kind: checked_file(path, kind, entry, content=kind != "bins") for kind, entry in about.entries.items()}
    projection = None
    if (told := about.projection) is not None:
        arrays = read_arrays(files["projection"], about.dim, told.dim)
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
    # First, because its length bounds the number of rows.
    index = read_index_file(files["index"], about.rows, about.dim if told is None else told.dim)
    rows = read_rows(files["rows"], about.rows)
    bins = regions = None
    if "bins" in files:
        try:
            layout = bin_layout(recipe, about.dim)
        except UsageError as error:
            raise GalleryError(f"{path}: expected a gallery without bins: {error}") from None
        bins = read_bins(files["bins"], about.rows, layout)
        if "regions" in files:
            regions = read_regions(files["regions"], about.rows, layout)
    return Gallery(
        path,
        recipe,
        about.recipe_hash,
        about.weights_sha256,
        about.dim,
        index if device == "cpu" else on_device(index, device),
        is_exact(index),
        rows,
        projection,
        about,
        bins,
        regions,
    )


def check_recipe(gallery: Gallery, recipe: Recipe, weights_sha256: str, dim: int, name: str) -> None:
    """Raise GalleryError, naming what differs, unless descriptors of a recipe can be compared with the gallery's."""
    differences = gallery.recipe.differences(recipe)
    if gallery.weights_sha256 != weights_sha256:
        differences.append(f"weights: {gallery.weights_sha256[:12]} here, {weights_sha256[:12]} there")
    if gallery.dim != dim:
        differences.append(f"dimensions: {gallery.dim} here, {dim} there")
    if differences:
        raise GalleryError(f"{gallery.path}: was made with another recipe than {name} ({'; '.join(differences)})")


def _comparable(store: Store, other: Store) -> UnitRows:
    check_same_recipe(store, other)
    return unit_rows(other)


def _check_names(store: Store, names: list[str]) -> None:
    if len(set(names)) != len(names):
        raise GalleryError(f"{store.place}: expected unique names, found {len(names) - len(set(names))} duplicates")
    check_names(store.place, names)


def _describe(store: Store, built: BuiltIndex, projection: Projection | None) -> About:
    """Everything except what `write_generation` fills in."""
    unwritten = FileEntry(file="", bytes=0, crc32=0)
    return About(
        format=GALLERY,
        format_version=FORMAT_VERSION,
        rows=built.index.ntotal,
        dim=store.dim,
        recipe=msgspec.Raw(store.recipe.to_json()),
        recipe_hash=store.recipe_hash,
        weights_sha256=store.weights_sha256,
        index=IndexEntry(factory=built.choice.factory, why=built.choice.why, effort=built.effort, recall=built.recall),
        projection=None
        if projection is None
        else ProjectionEntry(
            dim=projection.dim,
            kept=projection.kept,
            power=projection.power,
            shrinkage=projection.shrinkage,
            learned_from=path_text(projection.learned_from),
            rows=projection.rows,
            route=projection.route,
        ),
        sources=[_source(store, built.index.ntotal)],
        generation=0,
        files=FileEntries(index=unwritten, rows=unwritten),
        versions={},
    )


def _source(store: Store, rows: int) -> SourceEntry:
    """What identifies the store that rows came from."""
    return SourceEntry(
        store=path_text(store.place),
        source_root=path_text(store.source_root),
        rows=rows,
        fingerprint=zlib.crc32(np.ascontiguousarray(store.checksum).data),
    )


def verify_gallery(gallery: Gallery) -> list[str]:
    """Check rows against the stores that still exist; one line per fault. Opening has checked the files.

    Rows that the index holds exactly must equal those of the store, by name; for coded rows only the names must.
    """
    problems = []
    if (kept := gallery.about.files.bins) is not None:
        try:
            checked_file(gallery.path, "bins", kept)
        except GalleryError as error:
            problems.append(str(error))
    if len(set(gallery.rows.names)) != len(gallery):
        problems.append(f"{len(gallery) - len(set(gallery.rows.names))} duplicate names")
    place = {name: row for row, name in enumerate(gallery.rows.names)}
    for source in gallery.about.sources:
        if not os.path.exists(source.store):
            continue
        try:
            rows = unit_rows(open_store(source.store), gallery.projection)
        except Exception:  # missing, moved or being written: nothing to compare with
            continue
        if rows.store.recipe_hash != gallery.recipe_hash:
            continue
        checksums = rows.store.checksum[rows.rows]
        same = [
            at
            for at, name in enumerate(rows.names)
            if name in place and gallery.rows.checksum[place[name]] == checksums[at]
        ]
        for start in range(0, len(same) if gallery.exact else 0, 1024):
            part = np.array(same[start : start + 1024])
            held = reconstruct(gallery.index, np.array([place[rows.names[at]] for at in part]))
            for at in part[np.abs(held - rows.take(part)).max(1) > 1e-4]:
                problems.append(
                    f"row {place[rows.names[at]]} ({rows.names[at]!r}): differs from that of {rows.store.place}"
                )
    return problems
