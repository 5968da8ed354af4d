"""Rows of parquet files as images: which columns, names, order, and what is wrong with some."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from packing import image_bytes, write_parquet

from sppfeat.errors import ImageError, UsageError
from sppfeat.images import Columns, find_images, item_at
from sppfeat.images.parquet_files import ParquetRow, RowReader


def contents(path: Path, columns: Columns = Columns()) -> dict[str, bytes]:  # noqa: B008
    found = find_images([path], columns=columns)
    assert found.problems == {}
    return {item.name.split("/", 1)[1]: item.open()[0].read() for item in found.items}


def test_hugging_faces_struct_is_found_by_itself(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [("a.png", b"1"), (None, b"2"), ("", b"3"), ("a.png", b"4")])
    assert contents(path) == {"a.png": b"1", "row-1": b"2", "row-2": b"3", "a.png~2": b"4"}


def test_named_columns(tmp_path: Path) -> None:
    table = pa.table(
        {
            "jpg": pa.array([b"1", b"2"], pa.large_binary()),
            "png": pa.array([b"3", b"4"]),
            "id": [7, 7],
            "n": ["x", None],
        }
    )
    pq.write_table(table, path := tmp_path / "x.parquet")
    assert contents(path, Columns("jpg")) == {"row-0": b"1", "row-1": b"2"}
    assert contents(path, Columns("png", "id")) == {"7": b"3", "7~2": b"4"}
    assert contents(path, Columns("png", "n")) == {"x": b"3", "row-1": b"4"}
    all_columns = r"found columns jpg \(large_binary\), png \(binary\), id \(int64\), n \(string\)"
    with pytest.raises(UsageError, match=rf"x\.parquet: expected one column of images .*{all_columns}; name one"):
        contents(path)
    with pytest.raises(UsageError, match=rf"x\.parquet: expected a column 'gif' of images .*, {all_columns}$"):
        contents(path, Columns("gif"))
    with pytest.raises(UsageError, match=rf"expected a column 'id' of images .*, {all_columns}$"):
        contents(path, Columns("id"))
    with pytest.raises(UsageError, match=rf"expected a column 'no' of names .*, {all_columns}$"):
        contents(path, Columns("jpg", "no"))
    pq.write_table(pa.table({"id": [1]}), path)
    with pytest.raises(UsageError, match=r"expected one column of images .*found columns id \(int64\)"):
        contents(path)


def test_a_row_without_bytes_is_a_failed_row(tmp_path: Path) -> None:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": None, "path": "a.png"}, None, {"bytes": image_bytes(1), "path": "b.png"}]
    pq.write_table(pa.table({"image": pa.array(rows, struct)}), path := tmp_path / "x.parquet")
    items = find_images([path]).items
    assert [item.name for item in items] == ["x.parquet/a.png", "x.parquet/row-1", "x.parquet/b.png"]
    for item in items[:2]:
        with pytest.raises(ImageError, match="has no bytes: its row is empty, or only names a file"):
            item.open()
    assert items[2].open()[0].read() == image_bytes(1)


def test_in_order_a_file_is_read_once_and_back_from_the_row_group(tmp_path: Path) -> None:
    files = [(f"{at}.png", random.Random(at).randbytes(300)) for at in range(50)]
    items = find_images([write_parquet(tmp_path / "x.parquet", files)]).items
    content = items[0].content
    assert isinstance(content, ParquetRow)
    reader = RowReader(content.archive, content.column)
    for at in [1, 0, 3, 2, *range(4, 50)]:
        assert reader.read(at) == files[at][1]
    assert reader.passes == 1
    reader.close()
    assert reader.read(40) == files[40][1] and reader.passes == 2
    assert reader.read(12) == files[12][1] and reader.passes == 3
    reader.close()


def test_memory_is_that_of_a_batch(tmp_path: Path) -> None:
    files = [(f"{at}.png", random.Random(at).randbytes(1 << 20)) for at in range(96)]
    items = find_images([write_parquet(tmp_path / "x.parquet", files, rows=96)]).items
    content = items[0].content
    assert isinstance(content, ParquetRow)
    reader = RowReader(content.archive, content.column)
    tracemalloc.start()
    arrow = []
    for at in range(96):
        assert len(reader.read(at)) == 1 << 20
        arrow.append(pa.total_allocated_bytes())
    assert tracemalloc.get_traced_memory()[1] < 56 << 20
    assert max(arrow) < 48 << 20
    tracemalloc.stop()
    reader.close()


def test_damage_is_a_reason(tmp_path: Path) -> None:
    files = [(f"{at}.png", random.Random(at).randbytes(3000)) for at in range(50)]
    path = write_parquet(tmp_path / "x.parquet", files)
    whole = path.read_bytes()
    for seed in range(40):
        content = bytearray(whole)
        place = random.Random(seed).randrange(len(whole))
        content[place : place + 20] = random.Random(seed).randbytes(20)
        path.write_bytes(content)
        for item in find_images([path]).items:
            try:
                item.open()[0].close()
            except ImageError as error:
                assert "\n" not in str(error) and str(path) not in str(error)
    path.write_bytes(whole[: len(whole) // 2])
    assert "is not a parquet file, or damaged" in find_images([path]).problems["x.parquet/(rest)"]


def test_a_row_that_is_named_by_a_column_is_not_found_without_it(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"1"], "n": ["x"]}), tmp_path / "x.parquet")
    assert item_at(str(tmp_path), "x.parquet/x").problem == "is not in its archive"
    assert item_at(str(tmp_path), "x.parquet/row-0").open()[0].read() == b"1"


def test_a_row_is_not_found_where_its_column_is_not_known(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"1"], "mask": [b"2"]}), path := tmp_path / "x.parquet")
    assert contents(path, Columns("mask")) == {"row-0": b"2"}
    assert "several columns of images" in str(item_at(str(tmp_path), "x.parquet/row-0").problem)
