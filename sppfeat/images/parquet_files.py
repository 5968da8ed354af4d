"""Rows of parquet files as images: Hugging Face's `image` of bytes and path, or columns that are named."""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Final, NamedTuple

import msgspec

from sppfeat.errors import ImageError, SppFeatError, UsageError, one_line, require_extra
from sppfeat.images.blobs import Blob
from sppfeat.images.items import Fingerprint
from sppfeat.images.members import REST, Member
from sppfeat.images.memory import hold

PARQUET_EXTENSIONS: Final = frozenset({".parquet"})
# Of images that are read at once, and of those behind the last that are kept for threads slightly out of order.
_BATCH_BYTES: Final = 8 << 20
_WINDOW_BYTES: Final = 32 << 20
_MAX_BATCH: Final = 256
_NAMES: Final = 8192


class Columns(NamedTuple):
    """Which columns of a parquet file have the images and their names; None: as the file suggests."""

    image: str | None = None
    name: str | None = None


DEFAULT_COLUMNS: Final = Columns()


class ParquetRow(msgspec.Struct, frozen=True, tag=True):
    """An image in a row of a parquet file. column: of its bytes, with a dot within a struct."""

    archive: Blob
    column: str
    row: int

    def fingerprint(self) -> Fingerprint:
        """Of the whole file: nothing is known of a row before its bytes are read."""
        return Fingerprint(self.archive.size, self.archive.stamp)

    def open(self) -> tuple[io.RawIOBase, Fingerprint]:
        found = _reader(self.archive, self.column).read(self.row)
        return hold(len(found), lambda: found), self.fingerprint()

    def expect(self) -> None:
        """Nothing: rows are read in order, many at once."""

    def is_apart(self) -> bool:
        return False


def parquet_members(archive: Blob, columns: Columns) -> Iterator[Member]:
    """The rows of a parquet file, named by their path, or `row-` and their number; `(rest)` with the reason if it is
    damaged.

    Raises UsageError, with the columns that there are, for a column that is not there or not of images.
    """
    try:
        with _Parquet(archive) as file:
            bytes_column, name_column = _chosen(file.schema, columns, archive)
            yield from _rows(file, archive, bytes_column, name_column)
    except ImageError as error:
        yield Member(REST, problem=str(error))
    except SppFeatError:
        raise
    except Exception as error:  # Arrow's own errors
        yield Member(REST, problem=f"is not a parquet file, or damaged: {one_line(error)}")


class _Parquet:
    """An open parquet file, closed with its file."""

    def __init__(self, archive: Blob) -> None:
        require_extra("pyarrow", "data", "a parquet file")
        parquet = require_extra("pyarrow.parquet", "data", "a parquet file")
        self._file = archive.open()
        try:
            self.parquet = parquet.ParquetFile(self._file, buffer_size=1 << 20, pre_buffer=False)
            self.schema = self.parquet.schema_arrow
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> _Parquet:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.parquet.close()
        self._file.close()


def has_one_column(archive: Blob) -> bool:
    """Whether a row's name alone tells its image: a store does not say which columns were chosen."""
    try:
        with _Parquet(archive) as file:
            return sum(_bytes_of(field.name, field.type) is not None for field in file.schema) == 1
    except SppFeatError:
        raise
    except Exception:  # Arrow's own errors
        return False


def _chosen(schema: Any, columns: Columns, archive: Blob) -> tuple[str, str | None]:
    """The columns of bytes and names, with a dot within a struct."""
    types = {field.name: field.type for field in schema}
    found = ", ".join(f"{name} ({type_})" for name, type_ in types.items())
    images = {name: leaf for name, type_ in types.items() if (leaf := _bytes_of(name, type_)) is not None}
    structs = [name for name, leaf in images.items() if leaf != name]
    if columns.image is not None:
        image = columns.image
    elif "image" in images:
        image = "image"
    elif len(structs) == 1 or (not structs and len(images) == 1):
        image = structs[0] if structs else next(iter(images))
    else:
        raise UsageError(
            f"{archive.place}: expected one column of images (bytes, or a struct with bytes), found columns {found}; "
            "name one by --image-column"
        )
    if image not in images:
        raise UsageError(
            f"{archive.place}: expected a column {image!r} of images (bytes, or a struct with bytes), "
            f"found columns {found}"
        )
    if columns.name is not None:
        if columns.name not in types or not _is_text(types[columns.name]):
            raise UsageError(
                f"{archive.place}: expected a column {columns.name!r} of names (text or numbers), found columns {found}"
            )
        return images[image], columns.name
    has_path = images[image] != image and any(
        field.name == "path" and _is_text(field.type) for field in _fields(types[image])
    )
    return images[image], f"{image}.path" if has_path else None


def _fields(type_: Any) -> list[Any]:
    return [type_.field(at) for at in range(type_.num_fields)]


def _bytes_of(name: str, type_: Any) -> str | None:
    """Where the bytes of a column of images are; None for any other column."""
    types = import_module("pyarrow.types")
    if types.is_binary(type_) or types.is_large_binary(type_):
        return name
    if types.is_struct(type_) and any(
        field.name == "bytes" and _bytes_of("", field.type) == "" for field in _fields(type_)
    ):
        return f"{name}.bytes"
    return None


def _is_text(type_: Any) -> bool:
    types = import_module("pyarrow.types")
    return bool(types.is_string(type_) or types.is_large_string(type_) or types.is_integer(type_))


def _leaf(batch: Any, column: str) -> Any:
    """A column of a batch, or the field of a struct in it; a struct that is null has null fields."""
    parts = [column] if column in batch.schema.names else column.rsplit(".", 1)
    found = batch.column(parts[0])
    return found if len(parts) == 1 else found.flatten()[[field.name for field in _fields(found.type)].index(parts[1])]


def _rows(file: _Parquet, archive: Blob, bytes_column: str, name_column: str | None) -> Iterator[Member]:
    row = 0
    if name_column is None:
        for row in range(file.parquet.metadata.num_rows):
            yield Member(f"row-{row}", ParquetRow(archive, bytes_column, row))
        return
    for batch in file.parquet.iter_batches(batch_size=_NAMES, columns=[name_column], use_threads=False):
        for name in _leaf(batch, name_column).to_pylist():
            text = "" if name is None else str(name)
            yield Member(text or f"row-{row}", ParquetRow(archive, bytes_column, row))
            row += 1


@functools.lru_cache(maxsize=2)
def _reader(archive: Blob, column: str) -> RowReader:
    return RowReader(archive, column)


class RowReader:
    """The bytes of rows, from any thread. In rising order they cost one pass over the file; a row before the last ones
    costs another pass from the beginning of its row group."""

    def __init__(self, archive: Blob, column: str) -> None:
        self._archive, self._column = archive, column
        self._lock = threading.Lock()
        self._file: _Parquet | None = None
        self._batches: Iterator[Any] = iter(())
        self._kept: dict[int, bytes | None] = {}  # by row, ascending
        self._held = 0
        self._next = 0
        self.passes = 0

    def read(self, row: int) -> bytes:
        """Raises ImageError for a row without bytes, and for a file that is damaged or changed."""
        with self._lock:
            try:
                if row not in self._kept and (self._file is None or row < self._next or row >= self._group_end(row)):
                    self._seek(row)
                while row not in self._kept:
                    self._advance(row)
            except SppFeatError:
                self.close()
                raise
            except Exception as error:  # Arrow's own errors
                self.close()
                raise ImageError(f"its parquet file is damaged: {one_line(error)}") from None
            found = self._kept[row]
        if found is None:
            raise ImageError("has no bytes: its row is empty, or only names a file")
        return found

    def _group_end(self, row: int) -> int:
        """Rows from here on are reached sooner by seeking: two row groups ahead."""
        assert self._file is not None
        end, groups = 0, 0
        metadata = self._file.parquet.metadata
        for group in range(metadata.num_row_groups):
            end += metadata.row_group(group).num_rows
            groups += end > self._next
            if groups == 2:
                return int(end)
        return int(max(end, row + 1))

    def _seek(self, row: int) -> None:
        self.close()
        self._file = file = _Parquet(self._archive)
        self.passes += 1
        metadata = file.parquet.metadata
        if row >= metadata.num_rows:
            raise ImageError("its parquet file changed after it was listed")
        first, group = 0, 0
        while row >= first + metadata.row_group(group).num_rows:
            first += metadata.row_group(group).num_rows
            group += 1
        groups = list(range(group, metadata.num_row_groups))
        size = sum(metadata.row_group(one).total_byte_size for one in groups)
        rows = metadata.num_rows - first
        batch = max(1, min(_MAX_BATCH, _BATCH_BYTES * rows // max(1, size)))
        self._batches = file.parquet.iter_batches(
            batch_size=batch, row_groups=groups, columns=[self._column], use_threads=False
        )
        self._next = first

    def _advance(self, wanted: int) -> None:
        batch = next(self._batches, None)
        if batch is None:
            raise ImageError("its parquet file ends before it")
        column = _leaf(batch, self._column)
        for at in range(len(column)):
            content = column[at].as_buffer() if column[at].is_valid else None
            self._kept[self._next] = None if content is None else content.to_pybytes()
            self._held += 0 if content is None else content.size
            self._next += 1
        for row in list(self._kept):
            if self._held <= _WINDOW_BYTES or row >= wanted:
                break
            self._held -= len(self._kept.pop(row) or b"")

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._file is not None:
            self._file.close()
        self._file = None
        self._batches = iter(())
        self._kept.clear()
        self._held = self._next = 0

    def __del__(self) -> None:
        self.close()
