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
from sppfeat.retrieval.bins import BinLayout, Bins, BinSource, bin_layout, join_bins, read_bins
from sppfeat.retrieval.faiss_files import read_index_file
from sppfeat.retrieval.faiss_index import (
    BuiltIndex,
    IndexOptions,
    build_index,
    drop_rows,
    effort_name,
    faiss_reason,
    fill,
    from_device,
    is_exact,
    load_faiss,
    on_device,
    reconstruct,
    retune,
)
from sppfeat.retrieval.gallery_files import (
    FORMAT_VERSION,
    About,
    AddedEntries,
    Content,
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
from sppfeat.retrieval.segments import JOIN_PART, JoinedIndex
from sppfeat.retrieval.whitening import Projection, ProjectionOptions, learn_projection, read_arrays
from sppfeat.store import Store, UnitRows, check_same_recipe, open_store, unit_rows


@dataclass(frozen=True)
class Gallery:
    """An open gallery, in memory.

    index: of FAISS, or two of them joined; its row i is row i of `rows`. exact: whether it compares a query with every
    full row.
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
        about = write_generation(path, described, learned, Content(built.index, table, bins), previous=None)
    return Change(str(path), len(rows), len(rows), 0, 0, built, notes + built.notes, about)


def add_to_gallery(store: Store, gallery: str | os.PathLike[str], *, device: str = "cpu") -> Change:
    """Add a store's rows to a gallery of the same recipe; unchanged rows that it already holds are skipped.

    A few rows are written beside those of the base; many join it, and its search effort is tuned again: see `segments`.
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
        table = GalleryRows(
            rows.names, [store.source_root], np.zeros(len(rows), np.int64), np.asarray(store.checksum[rows.rows])
        )
        about = msgspec.structs.replace(old.about, sources=[*old.about.sources, _source(store, len(rows))])
        base = old.about.base_rows
        late = np.arange(base, len(old))
        base_index, index = _parts(old)
        notes: list[str] = []
        if JOIN_PART * 4 * index.d * (len(late) + len(rows)) > about.files.index.bytes:
            everything = np.arange(len(old))
            base_index = _fill(path, base_index, reconstruct(index, late - base), rows, device)
            about, notes = _retuned(about, base_index, len(late) + len(rows))
            content = Content(
                base_index, old.rows.followed_by(table), _bin_source(old, everything, rows), _base_regions(old)
            )
            about = write_generation(path, about, old.projection, content, previous=old.about)
        else:
            _fill(path, index, np.zeros((0, index.d), np.float32), rows, "cpu")
            content = Content(index, old.rows.only(late).followed_by(table), _bin_source(old, late, rows))
            about = write_generation(path, about, old.projection, None, content, previous=old.about)
        return Change(str(path), about.rows, len(rows), skipped, 0, None, notes, about)


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
        base = old.about.base_rows
        early, late = gone[gone < base], keep[keep >= base]
        base_index, added = _parts(old)
        about, notes = old.about, list[str]()
        if not len(early):
            added = drop_rows(added, gone - base, "Flat")
            content = Content(added, old.rows.only(late), _bin_source(old, late, None)) if len(late) else None
            about = write_generation(path, about, old.projection, None, content, previous=old.about)
        else:
            index = drop_rows(base_index, early, old.factory)
            if index is not base_index:
                notes.append(f"{old.factory} cannot drop rows: it was rebuilt from the others")
            if len(late):
                index = _fill(path, index, reconstruct(added, late - base), None, "cpu")
                about, told = _retuned(about, index, len(late))
                notes += told
            content = Content(index, old.rows.only(keep), _bin_source(old, keep, None))
            about = write_generation(path, about, old.projection, content, previous=old.about)
        return Change(str(path), len(keep), 0, 0, len(gone), None, notes, about)


def _parts(gallery: Gallery) -> tuple[Any, Any]:
    """The index of the base, and that of added rows, which may be empty."""
    if isinstance(gallery.index, JoinedIndex):
        return gallery.index.base, gallery.index.added
    return gallery.index, load_faiss().IndexFlatIP(gallery.index.d)


def _fill(path: Path, index: Any, values: np.ndarray, rows: UnitRows | None, device: str) -> Any:
    """Add vectors, then a store's rows, to an index; returns it. Raises GalleryError, DeviceError."""
    place = on_device(index, device)
    try:
        if len(values):
            place.add(values)
        if rows is not None:
            fill(place, rows)
    except RuntimeError as error:
        raise GalleryError(f"{path}: FAISS cannot add rows ({faiss_reason(error)})") from None
    return from_device(place, device)


def _retuned(about: About, index: Any, added: int) -> tuple[About, list[str]]:
    """The description with the search effort that an index needs after rows joined it, which is set; and notes."""
    name = effort_name(index)
    if name is None:
        return about, []
    before = about.index.effort.get(name)
    target = IndexOptions().recall if about.index.recall is None else about.index.recall
    try:
        effort, share = retune(index, added, target)
    except (RuntimeError, AttributeError):
        return about, [f"{about.index.factory} does not keep rows to tune with: its {name} stays {before}"]
    note = (
        f"{added} added rows joined the index; {name} is {effort[name]} now"
        + (f" ({before} before)" if before is not None and before != effort[name] else "")
        + f", which finds {100 * share:.1f} % of the 10 neighbors that the highest finds"
    )
    return msgspec.structs.replace(about, index=msgspec.structs.replace(about.index, effort=effort)), [note]


def _base_regions(old: Gallery) -> Any:
    """The index of the regions of a gallery's base; None without."""
    return None if old.regions is None else old.regions.parts[0][1]


def _bin_source(old: Gallery, kept: np.ndarray, new: UnitRows | None) -> BinSource | None:
    """The bins of kept rows, then of new ones; None for a gallery without."""
    return None if old.bins is None else BinSource(bin_layout(old.recipe, old.dim), old.bins.only(kept), new)


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
    projection = None
    if (told := about.projection) is not None and about.files.projection is not None:
        arrays = read_arrays(checked_file(path, "projection", about.files.projection), about.dim, told.dim)
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
    layout = None
    if about.files.bins is not None:
        try:
            layout = bin_layout(recipe, about.dim)
        except UsageError as error:
            raise GalleryError(f"{path}: expected a gallery without bins: {error}") from None
    index, rows, bins, regions = _read_part(path, about.files, about.base_rows, dim, layout)
    in_regions = [(about.base_rows, regions)]
    exact = is_exact(index)
    if (added := about.files.added) is not None:
        more, more_rows, more_bins, more_regions = _read_part(path, added, added.count, dim, layout)
        in_regions.append((added.count, more_regions))
        if not is_exact(more):
            raise GalleryError(f"{path / added.index.file}: expected an exact index of added rows, found another")
        index, rows = JoinedIndex(index, more), rows.followed_by(more_rows)
        bins = join_bins(bins, more_bins) if bins is not None and more_bins is not None else None
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
    )


def _read_part(
    path: Path, files: FileEntries | AddedEntries, count: int, dim: int, layout: BinLayout | None
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
    if bins is None or layout is None:
        return found, table, None, None
    kept = read_bins(bins, count, layout)
    return found, table, kept, None if regions is None else read_regions(regions, count, layout)


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
    added = gallery.about.files.added
    for kept in (gallery.about.files.bins, None if added is None else added.bins):
        if kept is not None:
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
