"""Ways out of a store: files that other programs read, with the names beside the values.

Every format is written block by block, so that memory does not depend on the number of rows, and appears whole at the
end or not at all. What can carry it carries the recipe, under the key `sppfeat`; it also marks what may be overwritten.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import h5py
import numpy as np

from sppfeat.errors import StoreError, UsageError, one_line, require_extra, unknown_name
from sppfeat.files import appearing, check_new_file, new_hdf5, os_reason, partial_path, sync_folder
from sppfeat.store.blocks import Block, DescribedRows
from sppfeat.store.reading import Store

MARK: Final = "sppfeat"
# Digits that bring back the same value: 1 + 11 log10(2) and 1 + 24 log10(2), rounded up.
_DIGITS: Final = {"float16": 5, "float32": 9}


@dataclass(frozen=True)
class Exported:
    """What `export_store` wrote.

    output: the file, or folder. names: the file of the names, if they are not in `output`. exported: the number of
    rows. failed: of rows that were left out, because their images could not be described. dim, dtype: of a descriptor.
    """

    store: str
    output: str
    names: str | None
    format: str
    exported: int
    failed: int
    dim: int
    dtype: str
    levels: tuple[int, ...]


def export_store(
    store: Store,
    output: str | os.PathLike[str],
    *,
    format: str | None = None,
    levels: Sequence[int] | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[float], None] = lambda done: None,
) -> Exported:
    """Write the described rows of a finished store, in its order, to a file of another format.

    format: one of FORMATS; None: by the extension of `output`.

    * `npy`: values [N, D]; the names in `NAME.names.txt` beside `NAME.npy`, see `name_line`.
    * `parquet`: columns name, width, height (of the upright image) and descriptor, a list of fixed size. Needs pyarrow.
    * `zarr`: a folder with the arrays descriptors [N, D], names [N] and image_size [N, 2]. Needs zarr.
    * `csv`: a header, then name and values; a value read back in its type is the same.
    * `hloc`: HDF5 with a group for each name and its dataset `global_descriptor` [D], as hloc reads it.

    levels, dtype: see `DescribedRows`. progress: called with the part that is done, from 0 to 1.
    Raises UsageError for an unknown format, levels or type, MissingExtraError, and StoreError for a store with pending
    rows or without a described one, for an output that exists and is not such an export or is not to be overwritten,
    and for one that cannot be written.
    """
    kind = _format_of(Path(output), format)
    rows = DescribedRows(store, levels, dtype)
    check, write = FORMATS[kind].check, FORMATS[kind].write
    path = check(Path(os.path.realpath(output)) if os.path.islink(output) else Path(output), overwrite)
    write(path, _Export(rows, progress))
    return Exported(
        store=store.place,
        output=str(path),
        names=str(names_path(path)) if kind == "npy" else None,
        format=kind,
        exported=rows.count,
        failed=rows.failed,
        dim=rows.dim,
        dtype=rows.dtype.name,
        levels=rows.recipe.levels,
    )


def names_path(npy: Path) -> Path:
    """The file of the names that belong to an exported `.npy`."""
    return npy.with_suffix(".names.txt")


def name_line(name: str) -> str:
    r"""A name as a line of text: its line breaks become `\x0a` and `\x0d`, which no name contains otherwise, because a
    backslash in a name is doubled."""
    return name.replace("\n", r"\x0a").replace("\r", r"\x0d") + "\n"


def _format_of(path: Path, asked: str | None) -> str:
    if asked is not None:
        if asked not in FORMATS:
            raise UsageError(unknown_name("format", asked, FORMATS))
        return asked
    found = [name for name, known in FORMATS.items() if known.suffix == path.suffix.lower() != ""]
    if not found:
        expected = ", ".join(known.suffix for known in FORMATS.values() if known.suffix)
        raise UsageError(f"{path}: expected one of {expected}, or format hloc, found {path.suffix or 'no extension'!r}")
    return found[0]


@dataclass(frozen=True)
class _Export:
    """Rows that are written, and who is told how far they have come."""

    rows: DescribedRows
    progress: Callable[[float], None]

    def blocks(self) -> Iterator[tuple[slice, Block]]:
        """Blocks, and the places of their rows among all that are written."""
        done = 0
        for block in self.rows.blocks():
            yield slice(done, done + len(block.names)), block
            done += len(block.names)
            self.progress(done / self.rows.count)

    @property
    def about(self) -> str:
        """Where the values come from, as JSON."""
        store, recipe = self.rows.store, dataclasses.asdict(self.rows.recipe)
        return json.dumps({"recipe": recipe, "weights_sha256": store.weights_sha256, "versions": store.versions})


# NumPy.


def _check_npy(path: Path, overwrite: bool) -> Path:
    names = names_path(path)
    both = path.is_file() and names.is_file()

    def other(existing: Path) -> str | None:
        return None if both else f"a file without {(names if existing == path else path).name}"

    for each in (path, names):
        check_new_file(each, overwrite=overwrite, error=StoreError, kind="an export", other=other)
    return path


def _write_npy(path: Path, export: _Export) -> None:
    rows = export.rows
    # Plain writes, because a disk that is full would kill a process that writes to a memory map.
    header = {
        "descr": np.lib.format.dtype_to_descr(rows.dtype),
        "fortran_order": False,
        "shape": (rows.count, rows.dim),
    }
    with appearing(names_path(path), StoreError) as partial_names, appearing(path, StoreError) as partial:
        with open(partial, "wb") as values, open(partial_names, "w", encoding="utf-8", newline="\n") as names:
            np.lib.format.write_array_header_1_0(values, header)
            for _, block in export.blocks():
                values.write(np.ascontiguousarray(block.values).data)
                names.writelines(map(name_line, block.names))
            for file in (values, names):
                file.flush()
                os.fsync(file.fileno())
        # A kill between the two that appear now leaves values without names, and never with those of another export.
        names_path(path).unlink(missing_ok=True)


# Parquet.


def _pyarrow() -> tuple[Any, Any]:
    purpose = "export to parquet"
    return require_extra("pyarrow", "data", purpose), require_extra("pyarrow.parquet", "data", purpose)


def _check_parquet(path: Path, overwrite: bool) -> Path:
    _, parquet = _pyarrow()

    def other(existing: Path) -> str | None:
        try:
            found = parquet.read_schema(existing).metadata or {}
        except (OSError, ValueError):
            return "another file"
        return None if MARK.encode() in found else "another parquet file"

    return check_new_file(path, overwrite=overwrite, error=StoreError, kind="an export", other=other)


def _write_parquet(path: Path, export: _Export) -> None:
    rows = export.rows
    pa, parquet = _pyarrow()
    schema = pa.schema(
        [
            pa.field("name", pa.string(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("descriptor", pa.list_(pa.from_numpy_dtype(rows.dtype), rows.dim), nullable=False),
        ],
        metadata={MARK: export.about},
    )
    with appearing(path, StoreError) as partial, parquet.ParquetWriter(partial, schema, use_dictionary=False) as writer:
        for _, block in export.blocks():
            flat = pa.array(np.ascontiguousarray(block.values).reshape(-1))
            columns = [
                pa.array(block.names, pa.string()),
                pa.array(np.ascontiguousarray(block.image_size[:, 0])),
                pa.array(np.ascontiguousarray(block.image_size[:, 1])),
                pa.FixedSizeListArray.from_arrays(flat, rows.dim),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=len(block.names))


# Zarr.


def _check_zarr(path: Path, overwrite: bool) -> Path:
    require_extra("zarr", "data", "export to zarr")
    if not os.path.lexists(path):
        return check_new_file(path, overwrite=False, error=StoreError, kind="an export")
    if not path.is_dir():
        raise StoreError(f"{path}: expected an export or a new folder, found a file; it is left as it is")
    if not any(path.iterdir()):
        return path
    try:
        ours = MARK in json.loads((path / "zarr.json").read_bytes())["attributes"]
    except (OSError, ValueError, LookupError, TypeError):
        ours = False
    if not ours:
        raise StoreError(f"{path}: expected an export or a new folder, found another folder; it is left as it is")
    if not overwrite:
        raise StoreError(f"{path}: already exists; choose another output, or use --overwrite")
    return path


def _write_zarr(path: Path, export: _Export) -> None:
    import zarr

    rows = export.rows
    chunk = min(rows.count, rows.block_rows)
    with _appearing_folder(path) as partial:
        group: Any = zarr.open_group(partial, mode="w", zarr_format=3, attributes={MARK: json.loads(export.about)})
        shape, chunks = (rows.count, rows.dim), (chunk, rows.dim)
        values = group.create_array("descriptors", shape=shape, chunks=chunks, dtype=rows.dtype)
        names = group.create_array("names", shape=(rows.count,), chunks=(chunk,), dtype=str)
        sizes = group.create_array("image_size", shape=(rows.count, 2), chunks=(chunk, 2), dtype=np.int32)
        for place, block in export.blocks():
            values[place] = block.values
            names[place] = np.array(block.names, object)
            sizes[place] = block.image_size


@contextlib.contextmanager
def _appearing_folder(path: Path) -> Iterator[Path]:
    """A folder to write to that becomes the folder `path` at the end, whole, or not at all."""
    import shutil  # loads three compression libraries

    partial, old = partial_path(path), path.with_name(f".{path.name}.old")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        yield partial
        for folder, _, files in os.walk(partial):
            for name in files:
                with open(os.path.join(folder, name), "rb") as file:
                    os.fsync(file.fileno())
            sync_folder(Path(folder))
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
        os.rename(partial, path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as reason:
        raise StoreError(f"{path}: cannot be written: {os_reason(reason)}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# CSV.


def _check_csv(path: Path, overwrite: bool) -> Path:
    def other(existing: Path) -> str | None:
        with open(existing, "rb") as file:
            return None if file.read(len(_CSV_START)) == _CSV_START else "another file"

    return check_new_file(path, overwrite=overwrite, error=StoreError, kind="an export", other=other)


_CSV_START: Final = b"name,d0"


def _write_csv(path: Path, export: _Export) -> None:
    rows = export.rows
    form = ",".join([f"%.{_DIGITS[rows.dtype.name]}g"] * rows.dim)
    with appearing(path, StoreError) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["name", *(f"d{place}" for place in range(rows.dim))])
        for _, block in export.blocks():
            for name, values in zip(block.names, block.values, strict=True):
                table.writerow([name, *(form % tuple(values.tolist())).split(",")])


# hloc.


def _check_hloc(path: Path, overwrite: bool) -> Path:
    def other(existing: Path) -> str | None:
        if not h5py.is_hdf5(existing):
            return "another file"
        try:
            with h5py.File(existing, "r", locking=False) as file:
                return None if MARK in file.attrs else "another HDF5 file"
        except OSError:
            return "a damaged HDF5 file"

    return check_new_file(path, overwrite=overwrite, error=StoreError, kind="an export", other=other)


def _write_hloc(path: Path, export: _Export) -> None:
    with appearing(path, StoreError) as partial, new_hdf5(partial) as file:
        file.attrs[MARK] = export.about
        for _, block in export.blocks():
            for name, values in zip(block.names, block.values, strict=True):
                try:
                    # hloc makes a group of a name as it is: its slashes become groups within groups.
                    file.create_dataset(f"{name}/global_descriptor", data=values)
                except (ValueError, TypeError, OSError) as error:
                    raise StoreError(
                        f"{name}: cannot be a group of HDF5 beside the others: {one_line(error)}"
                    ) from None


class _Format(NamedTuple):
    suffix: str
    check: Callable[[Path, bool], Path]
    write: Callable[[Path, _Export], None]


FORMATS: Final[dict[str, _Format]] = {
    "npy": _Format(".npy", _check_npy, _write_npy),
    "parquet": _Format(".parquet", _check_parquet, _write_parquet),
    "zarr": _Format(".zarr", _check_zarr, _write_zarr),
    "csv": _Format(".csv", _check_csv, _write_csv),
    "hloc": _Format("", _check_hloc, _write_hloc),
}
