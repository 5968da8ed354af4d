"""The gallery: a folder with an index, the names of its rows, and all that a query must go through.

    gallery.json          what it is and which files make it up; the recipe, the index, the projection, the stores
    index-N.faiss         the FAISS index; its row i is ...
    rows-N.h5             ... /names[i], from the folder /roots[/root[i]], with /checksum[i] of its row in the store
    projection-N.npz      mean, matrix, eigenvalues; none without a projection

A change writes files of the next number N beside the present ones, then replaces `gallery.json`, then removes what it
no longer names. Whoever is stopped in between leaves the old gallery or the new one, whole; a reader never sees a mix.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np

from sppfeat._version import __version__
from sppfeat.errors import GalleryError, UsageError, one_line, unknown_name
from sppfeat.files import GALLERY, NOUNS, appearing, format_of, os_reason, sync_folder
from sppfeat.index import (
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
    typed,
)
from sppfeat.recipe import Recipe
from sppfeat.rows import Box, UnitRows, check_same_recipe, picture_of, unit_rows
from sppfeat.store import Store, lock_store, open_store
from sppfeat.whitening import Projection, ProjectionOptions, learn_projection, read_arrays, write_projection

FORMAT_VERSION: Final = 1
DESCRIPTION: Final = "gallery.json"
_OURS: Final = re.compile(r"\.?(index|rows|projection)-\d+\.(faiss|h5|npz)(\.partial)?|\.gallery\.json\.partial")
# What the JSON tells of a projection, besides its size; its arrays have a file of their own.
_TOLD: Final = ("kept", "power", "shrinkage", "learned_from", "rows", "route")
_LIBRARIES: Final = ("faiss-cpu", "faiss-gpu", "numpy", "h5py")


@dataclass(frozen=True)
class GalleryRows:
    """What is known of each row of an index.

    names: [N], each once. roots: folders that names are relative to. root: [N] which of them. checksum: [N] of the row
    in the store, by which a changed picture is told from the same one.
    """

    names: list[str]
    roots: list[str]
    root: np.ndarray
    checksum: np.ndarray

    def picture(self, row: int) -> tuple[str, Box | None]:
        """Where the picture of a row was when it was described, and its window where the row is one's."""
        return picture_of(self.roots[int(self.root[row])], self.names[row])


@dataclass(frozen=True)
class Gallery:
    """An open gallery, in memory.

    index: FAISS; its row i is row i of `rows`. exact: whether it compares a query with every full row.
    about: the JSON as it stands in the folder. dim: length of a descriptor before projection.
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
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.rows.names)

    @property
    def factory(self) -> str:
        """The factory string of the index."""
        return str(self.about["index"]["factory"])


@dataclass(frozen=True)
class Change:
    """What was done to a gallery: rows in it now, added, skipped (there before, unchanged), removed; the index's own
    report where one was built; notes for people."""

    path: str
    rows: int
    added: int
    skipped: int
    removed: int
    built: BuiltIndex | None
    notes: list[str]
    about: dict[str, Any]


def create_gallery(
    store: Store,
    output: str | os.PathLike[str],
    options: IndexOptions | None = None,
    projection: ProjectionOptions | None = None,
    *,
    whitening_from: Store | None = None,
    overwrite: bool = False,
) -> Change:
    """Build a gallery of a finished store's described rows.

    projection: None: descriptors as they are. whitening_from: learn the projection from this store of the same recipe
    instead. Raises GalleryError, StoreError, UsageError; an old gallery at `output` stays until the new one is whole.
    """
    load_faiss()
    path = Path(output)
    check_new_gallery(path, overwrite=overwrite)
    rows = unit_rows(store)
    _check_names(store, rows.names)
    notes = []
    learned = None
    if projection is not None:
        source = rows if whitening_from is None else _comparable(store, whitening_from)
        learned = learn_projection(source, projection)
        if learned.dim < projection.dims:
            notes.append(f"{learned.dim} dimensions are kept: {len(source)} rows have no more")
        rows = dataclasses.replace(rows, projection=learned)
    built = build_index(rows, options)
    with _folder(path), lock_store(path):
        check_new_gallery(path, overwrite=overwrite)
        about = _describe(store, built, learned)
        table = GalleryRows(
            rows.names, [store.source_root], np.zeros(len(rows), np.int64), np.asarray(store.checksum[rows.rows])
        )
        _write(path, about, built.index, table, learned, previous=None)
    return Change(str(path), len(rows), len(rows), 0, 0, built, notes + built.notes, about)


def add_to_gallery(store: Store, gallery: str | os.PathLike[str], *, device: str = "cpu") -> Change:
    """Add a store's rows to a gallery of the same recipe; rows that are there already, unchanged, are skipped.

    Raises GalleryError for another recipe, weights or dimension, and for a name whose row differs.
    """
    path = Path(gallery)
    _require_gallery(path)
    with lock_store(path):
        old = open_gallery(path)
        check_recipe(old, store.recipe, store.weights_sha256, store.dim, str(store.path))
        rows = unit_rows(store, old.projection)
        _check_names(store, rows.names)
        place = {name: row for row, name in enumerate(old.rows.names)}
        new = []
        for at, name in enumerate(rows.names):
            row = place.get(name)
            if row is None:
                new.append(at)
            elif old.rows.checksum[row] != store.checksum[rows.rows[at]]:
                raise GalleryError(
                    f"{path}: holds {name!r} already, with another descriptor (from {old.rows.picture(row)[0]}); "
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
        about = old.about | {"rows": len(table.names), "sources": [*old.about["sources"], _source(store, len(rows))]}
        _write(path, about, from_device(place_on, device), table, old.projection, previous=old.about)
        return Change(str(path), len(table.names), len(rows), skipped, 0, None, [], about)


def remove_from_gallery(gallery: str | os.PathLike[str], names: Sequence[str]) -> Change:
    """Remove rows by name. Raises GalleryError for names that are not there, before anything is changed."""
    path = Path(gallery)
    _require_gallery(path)
    with lock_store(path):
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
            raise GalleryError(f"{path}: {len(gone)} names are all that it holds; remove the folder instead")
        keep = np.setdiff1d(np.arange(len(old)), gone)
        index = drop_rows(old.index, gone, old.factory)
        notes = [] if index is old.index else [f"{old.factory} cannot forget rows: it was built anew from the others"]
        table = GalleryRows(
            [old.rows.names[row] for row in keep], old.rows.roots, old.rows.root[keep], old.rows.checksum[keep]
        )
        about = old.about | {"rows": len(keep)}
        _write(path, about, index, table, old.projection, previous=old.about)
        return Change(str(path), len(keep), 0, 0, len(gone), None, notes, about)


def read_names(path: str | os.PathLike[str]) -> list[str]:
    """Names from a text file, one a line, as `sppfeat search` shows them. Raises UsageError."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a readable list of names, found: {one_line(error)}") from None
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


def open_gallery(path: str | os.PathLike[str], *, device: str = "cpu") -> Gallery:
    """Open a gallery, also while another process changes it; device: where its index is searched.

    Raises GalleryError when it is not a whole gallery, DeviceError.
    """
    path = Path(path)
    load_faiss()
    while True:
        about = read_about(path)
        try:
            return _open(path, about, device)
        except GalleryError:
            # Its files may have been replaced between our two looks: then there is a newer description.
            if read_about(path).get("generation") == about["generation"]:
                raise


def read_about(path: Path) -> dict[str, Any]:
    """A gallery's JSON. Raises GalleryError when the folder is no gallery that this version reads."""
    _require_gallery(path)
    try:
        about = json.loads((path / DESCRIPTION).read_text("utf-8"))
        number = int(about["format_version"])
        if number > FORMAT_VERSION:
            raise GalleryError(
                f"{path}: its format {number} is newer than this sppfeat reads ({FORMAT_VERSION}): update sppfeat"
            )
        return dict(about) | {"generation": int(about["generation"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GalleryError(f"{path}: expected a gallery that is whole, found: {one_line(error)}") from None


def _require_gallery(path: Path) -> None:
    if format_of(path) == GALLERY and path.is_dir():
        return
    if not path.exists():
        found = "no such folder"
    elif not path.is_dir():
        found = NOUNS.get(str(format_of(path)), "a file") + " (a gallery is a folder)"
    elif (path / DESCRIPTION).exists():
        found = f"a folder whose {DESCRIPTION} is not that of a gallery"
    elif any(_OURS.fullmatch(name) for name in os.listdir(path)):
        found = "one that was interrupted before it was whole; build it again with `sppfeat index`"
    else:
        found = f"a folder without {DESCRIPTION}"
    raise GalleryError(f"{path}: expected a gallery, found {found}")


def _open(path: Path, about: dict[str, Any], device: str) -> Gallery:
    try:
        recipe = Recipe.from_json(json.dumps(about["recipe"]))
        files = {kind: _checked_file(path, entry) for kind, entry in about["files"].items()}
        rows = _read_rows(files["rows"], int(about["rows"]))
        index = _read_index(files["index"])
        projection = None
        width = dim = int(about["dim"])
        if about["projection"] is not None:
            known = about["projection"]
            width = int(known["dim"])
            arrays: Mapping[str, Any] = read_arrays(files["projection"], dim, width)
            told = {key: known[key] for key in _TOLD}
            projection = Projection(**{**told, **arrays})
        if (index.ntotal, index.d) != (len(rows.names), width):
            raise GalleryError(
                f"{files['index']}: expected {len(rows.names)} rows of {width} values, "
                f"found {index.ntotal} of {index.d}"
            )
        if index.metric_type != load_faiss().METRIC_INNER_PRODUCT:
            raise GalleryError(f"{files['index']}: expected an index of inner products, found another")
        return Gallery(
            path,
            recipe,
            str(about["recipe_hash"]),
            str(about["weights_sha256"]),
            dim,
            index if device == "cpu" else on_device(index, device),
            is_exact(index),
            rows,
            projection,
            about,
        )
    except (KeyError, ValueError, TypeError, AttributeError, UsageError) as error:
        raise GalleryError(f"{path}: expected a gallery that is whole, found: {one_line(error)}") from None


def _checked_file(path: Path, entry: Mapping[str, Any]) -> Path:
    name = str(entry["file"])
    if not _OURS.fullmatch(name):
        raise GalleryError(f"{path}: expected a file of a gallery, found {name!r}")
    try:
        size = os.stat(path / name).st_size
    except OSError as error:
        raise GalleryError(f"{path / name}: belongs to the gallery, and cannot be read: {os_reason(error)}") from None
    if size != entry["bytes"]:
        raise GalleryError(f"{path / name}: expected {entry['bytes']} bytes, found {size}")
    return path / name


def _read_index(file: Path) -> Any:
    try:
        return typed(load_faiss().read_index(str(file)))
    except (RuntimeError, MemoryError, TypeError) as error:
        raise GalleryError(f"{file}: expected a FAISS index that is whole, found: {faiss_reason(error)}") from None


def _read_rows(file: Path, count: int) -> GalleryRows:
    try:
        with h5py.File(file, "r", locking=False) as content:
            rows = GalleryRows(
                content["names"].asstr()[:].tolist(),
                [os.fsdecode(bytes(root)) for root in content["roots"][:]],
                content["root"][:],
                content["checksum"][:],
            )
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise GalleryError(f"{file}: expected the names of a gallery, found: {one_line(error)}") from None
    lengths = {len(rows.names), len(rows.root), len(rows.checksum), count}
    if len(lengths) > 1 or (count and not 0 <= rows.root.min() <= rows.root.max() < len(rows.roots)):
        raise GalleryError(f"{file}: expected {count} names, one a row, found {len(rows.names)}")
    return rows


def _write(
    path: Path,
    about: dict[str, Any],
    index: Any,
    rows: GalleryRows,
    projection: Projection | None,
    *,
    previous: dict[str, Any] | None,
) -> None:
    """Write the next generation of files, then let `gallery.json` name them, then remove the others.

    Hold `lock_store`. previous: where the projection's file is kept from it.
    """
    if index.ntotal != len(rows.names) or len(rows.names) != len(rows.root):
        raise GalleryError(f"{path}: {index.ntotal} rows in the index, {len(rows.names)} names; nothing is written")
    numbers = [int(number) for name in os.listdir(path) if _OURS.fullmatch(name) for number in re.findall(r"\d+", name)]
    generation = max(numbers, default=0) + 1
    files: dict[str, Any] = {}

    def put(kind: str, suffix: str, write: Callable[[Path], None]) -> None:
        file = path / f"{kind}-{generation}.{suffix}"
        write(file)
        files[kind] = {"file": file.name, "bytes": file.stat().st_size, "crc32": _crc32(file)}

    put("index", "faiss", lambda file: _write_index(file, index))
    put("rows", "h5", lambda file: _write_rows(file, rows))
    if previous is not None and "projection" in previous["files"]:
        files["projection"] = previous["files"]["projection"]
    elif projection is not None:
        put("projection", "npz", lambda file: write_projection(file, projection))
    about |= {"generation": generation, "rows": len(rows.names), "files": files, "versions": _versions()}
    with appearing(path / DESCRIPTION, GalleryError) as partial:
        partial.write_text(json.dumps(about, indent=1), "utf-8")
    _remove_others(path, {str(entry["file"]) for entry in files.values()})


def _remove_others(path: Path, kept: set[str]) -> None:
    """Remove the files of other generations, and what interrupted writers left."""
    for name in os.listdir(path):
        if _OURS.fullmatch(name) and name not in kept:
            with contextlib.suppress(OSError):
                os.unlink(path / name)


def _write_index(file: Path, index: Any) -> None:
    with appearing(file, GalleryError) as partial:
        try:
            load_faiss().write_index(index, str(partial))
        except RuntimeError as error:
            raise GalleryError(f"{file}: cannot be written: {faiss_reason(error)}") from None


def _write_rows(file: Path, rows: GalleryRows) -> None:
    with appearing(file, GalleryError) as partial, h5py.File(partial, "w", locking=False) as content:
        content.create_dataset("names", data=np.asarray(rows.names, dtype=object), dtype=h5py.string_dtype())
        # Paths may hold any byte; HDF5's text may not.
        roots = [np.frombuffer(os.fsencode(root), np.uint8) for root in rows.roots]
        table = content.create_dataset("roots", (len(roots),), dtype=h5py.vlen_dtype(np.uint8))
        for number, root in enumerate(roots):
            table[number] = root
        content["root"] = np.asarray(rows.root, np.int32)
        content["checksum"] = np.asarray(rows.checksum, np.uint32)


def _crc32(file: Path) -> int:
    found = 0
    with open(file, "rb") as content:
        while block := content.read(1 << 24):
            found = zlib.crc32(block, found)
    return found


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    """The folder, made if needed; and gone again if nothing came to lie in it."""
    try:
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise GalleryError(f"{path}: cannot be made: {os_reason(error)}") from None
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            path.rmdir()
        raise


def check_new_gallery(path: Path, *, overwrite: bool) -> None:
    """Raise GalleryError unless a gallery can be built at a path: nothing, an empty folder, or one to overwrite."""
    if not path.parent.is_dir():
        raise GalleryError(f"{path}: expected its folder {path.parent} to exist, found none")
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise GalleryError(f"{path}: expected a gallery's folder or nothing, found a file; it is left as it is")
    if format_of(path) == GALLERY:
        if not overwrite:
            raise GalleryError(f"{path}: exists already; choose another output, --overwrite or --add-to")
    elif foreign := [name for name in os.listdir(path) if not _OURS.fullmatch(name)]:
        raise GalleryError(
            f"{path}: expected a gallery or an empty folder, found {min(foreign)!r} in it; it is left as it is"
        )


def check_recipe(gallery: Gallery, recipe: Recipe, weights_sha256: str, dim: int, name: str) -> None:
    """Raise GalleryError, naming what differs, unless descriptors of a recipe can be compared with the gallery's."""
    differences = gallery.recipe.differences(recipe)
    if gallery.weights_sha256 != weights_sha256:
        differences.append(f"weights: {gallery.weights_sha256[:12]} here, {weights_sha256[:12]} there")
    if gallery.dim != dim:
        differences.append(f"dimensions: {gallery.dim} here, {dim} there")
    if differences:
        raise GalleryError(f"{gallery.path}: was made by another recipe than {name} ({'; '.join(differences)})")


def _comparable(store: Store, other: Store) -> UnitRows:
    check_same_recipe(store, other)
    return unit_rows(other)


def _check_names(store: Store, names: list[str]) -> None:
    if len(set(names)) != len(names):
        raise GalleryError(f"{store.path}: expected every name once, found {len(names) - len(set(names))} repeated")


def _describe(store: Store, built: BuiltIndex, projection: Projection | None) -> dict[str, Any]:
    return {
        "format": GALLERY,
        "format_version": FORMAT_VERSION,
        "rows": built.index.ntotal,
        "dim": store.dim,
        "recipe": json.loads(store.recipe.to_json()),
        "recipe_hash": store.recipe_hash,
        "weights_sha256": store.weights_sha256,
        "index": {
            "factory": built.choice.factory,
            "why": built.choice.why,
            "effort": built.effort,
            "recall@10": built.recall,
        },
        "projection": None
        if projection is None
        else {
            "dim": projection.dim,
            **{
                key: getattr(projection, key) for key in ("kept", "power", "shrinkage", "learned_from", "rows", "route")
            },
        },
        "sources": [_source(store, built.index.ntotal)],
    }


def _source(store: Store, rows: int) -> dict[str, Any]:
    """What tells the store that rows came from."""
    return {
        "store": os.path.abspath(store.path),
        "source_root": store.source_root,
        "rows": rows,
        "fingerprint": zlib.crc32(np.ascontiguousarray(store.checksum).data),
    }


def verify_gallery(gallery: Gallery) -> list[str]:
    """Check every file, and rows against the stores that are still there; one line for each fault.

    Rows that the index holds as they are must equal those of the store, by name; of coded rows the names must.
    """
    problems = []
    for entry in gallery.about["files"].values():
        if _crc32(gallery.path / entry["file"]) != entry["crc32"]:
            problems.append(f"{entry['file']}: its bytes do not match their checksum")
    if len(set(gallery.rows.names)) != len(gallery):
        problems.append(f"{len(gallery) - len(set(gallery.rows.names))} names stand more than once")
    place = {name: row for row, name in enumerate(gallery.rows.names)}
    for source in gallery.about["sources"]:
        try:
            rows = unit_rows(open_store(source["store"]), gallery.projection)
        except Exception:  # gone, moved or being written: nothing to compare with
            continue
        if rows.store.recipe_hash != gallery.recipe_hash:
            continue
        same = [
            at
            for at, name in enumerate(rows.names)
            if name in place and gallery.rows.checksum[place[name]] == rows.store.checksum[rows.rows[at]]
        ]
        for start in range(0, len(same) if gallery.exact else 0, 1024):
            part = np.array(same[start : start + 1024])
            held = reconstruct(gallery.index, np.array([place[rows.names[at]] for at in part]))
            for at in part[np.abs(held - rows.take(part)).max(1) > 1e-4]:
                problems.append(f"row {place[rows.names[at]]} ({rows.names[at]!r}): is not that of {rows.store.path}")
    return problems


def _versions() -> dict[str, str]:
    found = {"sppfeat": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[library] = version(library)
    return found
