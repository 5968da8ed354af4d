"""Galleries built from stores, and changed: rows added, rows removed. One process at a time changes one."""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from sppfeat.errors import GalleryError, UsageError, near_path, one_line, unknown_name
from sppfeat.files import GALLERY
from sppfeat.images import path_to_name
from sppfeat.retrieval.about import About, BinsEntry, FileEntries, FileEntry, IndexEntry, ProjectionEntry, SourceEntry
from sppfeat.retrieval.bins import BinLayout, BinSource, KeptBins, bin_layout, learn_again, learn_from
from sppfeat.retrieval.channels import check_bin_dim
from sppfeat.retrieval.faiss_index import (
    BuiltIndex,
    IndexOptions,
    build_index,
    drop_rows,
    effort_name,
    fill,
    reconstruct,
    retune,
)
from sppfeat.retrieval.faiss_library import faiss_reason, from_device, load_faiss, on_device
from sppfeat.retrieval.gallery import Gallery, check_recipe, open_gallery
from sppfeat.retrieval.gallery_files import (
    FORMAT_VERSION,
    Content,
    GalleryRows,
    changing,
    check_names,
    check_new_gallery,
    made_folder,
    path_text,
    require_gallery,
    write_generation,
    write_map_generation,
)
from sppfeat.retrieval.map import MOST, SAMPLE, SEED, HeldVectors, check_map, lay_out
from sppfeat.retrieval.segments import JOIN_PART, JoinedIndex
from sppfeat.retrieval.whitening import Projection, ProjectionOptions, learn_projection
from sppfeat.store import Store, UnitRows, check_same_recipe, unit_rows

# On buildings and on kinds of objects, 64 components rank as well as all channels, and 32 worse.
FEW_COMPONENTS: Final = 64
# Fewer images hardly tell which components others have.
FEW_IMAGES: Final = 100


@dataclass(frozen=True)
class Change:
    """What changed in a gallery: rows in it now, added, skipped (already there, unchanged), removed; the index's own
    report if one was built; notes for the user; whether a map of all rows was laid out, or went since rows changed."""

    path: str
    rows: int
    added: int
    skipped: int
    removed: int
    built: BuiltIndex | None
    notes: list[str]
    about: About
    mapped: bool = False
    map_lost: bool = False


def create_gallery(
    store: Store,
    output: str | os.PathLike[str],
    options: IndexOptions | None = None,
    projection: ProjectionOptions | None = None,
    *,
    whitening_from: Store | None = None,
    keep_bins: bool = False,
    bin_dim: int | None = None,
    overwrite: bool = False,
) -> Change:
    """Build a gallery of a finished store's described rows.

    keep_bins: also keep the bins of their finest level, one byte a value, for parts and re-ranking. bin_dim: keep so
    many principal components of each bin; None: all its channels.
    projection: None: descriptors as they are. whitening_from: learn the projection from this store of the same recipe
    instead. Raises GalleryError, StoreError, UsageError; an old gallery at `output` stays until the end.
    """
    load_faiss()
    layout = bin_layout(store.recipe, store.dim) if keep_bins else None
    check_bin_dim(bin_dim)
    if bin_dim is not None and not keep_bins:
        raise UsageError("bin_dim: expected keep_bins too")
    path = _folder(output)
    check_new_gallery(path, overwrite=overwrite)
    # The folder is created, locked and checked for writing before the work, which may take hours.
    with made_folder(path), changing(path):
        check_new_gallery(path, overwrite=overwrite)
        rows = unit_rows(store)
        _check_names(store, rows.names)
        notes: list[str] = []
        learned = None
        if projection is not None:
            source = rows if whitening_from is None else _comparable(store, whitening_from)
            learned = learn_projection(source, projection)
            notes += learned.notes(projection.dims)
            rows = dataclasses.replace(rows, projection=learned)
        built = build_index(rows, options)
        table = GalleryRows(
            rows.names, [store.source_root], np.zeros(len(rows), np.int64), np.asarray(store.checksum[rows.rows])
        )
        bins = None
        if layout is not None:
            bins = BinSource(layout, learn_from(layout, rows, bin_dim), None, rows)
            notes += _bin_notes(layout, bin_dim, len(rows))
        described = _describe(store, built, learned, bins)
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
        remedy = f"extract its images with the gallery's recipe, which `sppfeat inspect {path}` shows"
        check_recipe(old, store.recipe, store.weights_sha256, store.dim, store.place, remedy=remedy)
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
                base_index, old.rows.followed_by(table), _base_bins(old, everything, rows), _base_regions(old)
            )
            about = write_generation(path, about, old.projection, content, previous=old.about)
        else:
            _fill(path, index, np.zeros((0, index.d), np.float32), rows, "cpu")
            content = Content(index, old.rows.only(late).followed_by(table), _bin_source(old, late, rows))
            about = write_generation(path, about, old.projection, None, content, previous=old.about)
        return Change(str(path), about.rows, len(rows), skipped, 0, None, notes, about, map_lost=_had_map(old))


def _row_of(name: str, roots: Sequence[str], place: Mapping[str, int]) -> str:
    """The row's name for a name, or for the path of a file, as search prints it."""
    if name not in place:
        for root in roots:
            if name.startswith(prefix := root.rstrip("/") + "/"):
                below = path_to_name(name.removeprefix(prefix))
                if below in place:
                    return below
    return name


def remove_from_gallery(gallery: str | os.PathLike[str], names: Sequence[str]) -> Change:
    """Remove rows by name, or by the path of a file below the gallery's folder of images.

    Raises GalleryError for unknown names, before anything is changed.
    """
    path = _folder(gallery)
    require_gallery(path)
    with changing(path):
        old = open_gallery(path)
        place = {name: row for row, name in enumerate(old.rows.names)}
        unique = list(dict.fromkeys(_row_of(name, old.rows.roots, place) for name in names))
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
            content = Content(index, old.rows.only(keep), _base_bins(old, keep, None))
            about = write_generation(path, about, old.projection, content, previous=old.about)
        return Change(str(path), len(keep), 0, 0, len(gone), None, notes, about, map_lost=_had_map(old))


def add_map(
    gallery: str | os.PathLike[str],
    *,
    seed: int = SEED,
    progress: Callable[[float], None] = lambda part: None,
    stop: Callable[[], bool] = lambda: False,
) -> Change | None:
    """Lay out all images of a gallery on a map, from what its index holds, in place of an earlier one; see `lay_out`.

    The gallery cannot be changed meanwhile. progress: called with the fraction of the work done, 0 to 1. stop: asked
    often; once it is true, the result is None and the gallery stays as it is. Raises GalleryError, MissingExtraError.
    """
    path = _folder(gallery)
    require_gallery(path)
    check_map()
    with changing(path):
        old = open_gallery(path)
        try:
            points = lay_out(HeldVectors(old.index), seed=seed, progress=progress, stop=stop)
        except (UsageError, RuntimeError) as error:
            raise GalleryError(f"{path}: its images cannot be laid out: {one_line(error)}") from None
        if points is None:
            return None
        notes = []
        if len(old) > MOST:
            notes.append(
                f"{SAMPLE} of the {len(old)} images were laid out; the others were placed among their neighbors"
            )
        about = write_map_generation(path, old.about, points)
        return Change(str(path), len(old), 0, 0, 0, None, notes, about, mapped=True)


def _had_map(old: Gallery) -> bool:
    return old.about.files.map is not None


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


def _bin_notes(layout: BinLayout, dim: int | None, images: int) -> list[str]:
    """What users should know of components that bins are kept in."""
    if dim is None:
        return []
    if dim >= layout.channels:
        return [f"bin_dim is {dim}, but a bin has {layout.channels} channels: they are kept as they are"]
    notes = []
    if dim < FEW_COMPONENTS:
        notes.append(
            f"bins of {dim} values may rank below the plain search; `sppfeat evaluate retrieval --rerank bins "
            f"--bin-dim {dim}` measures it"
        )
    if images < FEW_IMAGES:
        notes.append(
            f"the components of bins were learned from {images} images and stay as they are: build the gallery again "
            "once it has many more"
        )
    return notes


def _base_regions(old: Gallery) -> Any:
    """The index of the regions of a gallery's base; None without."""
    return None if old.regions is None else old.regions.parts[0][1]


def _bin_source(old: Gallery, kept: np.ndarray, new: UnitRows | None) -> BinSource | None:
    """The bins of kept rows, then of new ones; None for a gallery without."""
    if old.bins is None:
        return None
    return BinSource(bin_layout(old.recipe, old.dim), old.bins.channels, KeptBins(old.bins, kept), new)


def _base_bins(old: Gallery, kept: np.ndarray, new: UnitRows | None) -> BinSource | None:
    """The same for a new base, whose whitening is learned again."""
    source = _bin_source(old, kept, new)
    return None if source is None else learn_again(source)


def read_names(path: str | os.PathLike[str]) -> list[str]:
    """Names from a text file, one per line, as `sppfeat search` shows them. Raises UsageError."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except FileNotFoundError:
        raise UsageError(
            f"{path}: expected a text file of names, one per line, found no such file{near_path(path)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a readable list of names, found: {one_line(error)}") from None
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


def _folder(path: str | os.PathLike[str]) -> Path:
    """A path that ends in a name, which its lock is named after."""
    return Path(path) if Path(path).name not in ("", "..") else Path(path).resolve()


def _comparable(store: Store, other: Store) -> UnitRows:
    check_same_recipe(store, other)
    return unit_rows(other)


def _check_names(store: Store, names: list[str]) -> None:
    if len(set(names)) != len(names):
        raise GalleryError(f"{store.place}: expected unique names, found {len(names) - len(set(names))} duplicates")
    check_names(store.place, names)


def _describe(store: Store, built: BuiltIndex, projection: Projection | None, bins: BinSource | None) -> About:
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
        bins=None if bins is None else _bins_entry(bins),
        sources=[_source(store, built.index.ntotal)],
        generation=0,
        files=FileEntries(index=unwritten, rows=unwritten),
        versions={},
    )


def _bins_entry(bins: BinSource) -> BinsEntry:
    kept = bins.channels.dim
    return BinsEntry(dim=kept, whitened=bins.channels.whitening.matrix.shape[1], bytes=bins.layout.side**2 * kept)


def _source(store: Store, rows: int) -> SourceEntry:
    """What identifies the store that rows came from."""
    return SourceEntry(
        store=path_text(store.place),
        source_root=path_text(store.source_root),
        rows=rows,
        fingerprint=zlib.crc32(np.ascontiguousarray(store.checksum).data),
    )
