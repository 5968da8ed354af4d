"""Each format is read back by the library that owns it, and appears whole or not at all."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import MakeStore

from sppfeat import Exported, MissingExtraError, Recipe, Store, StoreError, UsageError, export_store, to_numpy
from sppfeat.files import output as files_output
from sppfeat.images import Fingerprint
from sppfeat.store import StoreWriter, blocks, export

# A name may hold anything that a file's name may, apart from what no text can.
NAMES = [
    "plain.jpg",
    'a/"quoted", with comma.png',
    "a/line\nbreak.jpg",
    "carriage\r\nreturn.jpg",
    r"back\\x0aslash.jpg",
    "ünïcode 图.jpg",
    "failed.jpg",
    "photo.jpg#1,2,30,40.5",
    "=1+1.jpg",
    " spaces .jpg",
    "a/b/c/deep.jpg",
]
LEVELS = (2, 1)
DIM = 5 * 4
FORMATS = {"npy": "out.npy", "parquet": "out.parquet", "zarr": "out.zarr", "csv": "out.csv", "hloc": "out.h5"}


@pytest.fixture
def store(make_store: MakeStore) -> Store:
    return filled(make_store, "float16")


def filled(make_store: MakeStore, dtype: str) -> Store:
    """Values of all sizes, the smallest of the type included; one row has failed."""
    random = np.random.default_rng(0)
    values = random.normal(size=(len(NAMES), DIM)) * 10.0 ** random.integers(-8, 4, (len(NAMES), DIM))
    made = make_store(values, names=NAMES, recipe=Recipe(levels=LEVELS, dtype=dtype, normalize="none"))
    with StoreWriter(made) as writer:
        writer.fail(NAMES.index("failed.jpg"), "no image", Fingerprint(1, 1))
    return made


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MOST_ROWS", 3)  # after the block with the failed row, blocks do not fit zarr's chunks


def read_npy(path: Path) -> tuple[list[str], np.ndarray]:
    lines = path.with_suffix(".names.txt").read_bytes().decode().split("\n")
    assert lines.pop() == ""
    names = []
    for line in lines:
        name = ""
        while line:
            taken = re.match(r"\\\\|\\x0a|\\x0d|.", line, re.DOTALL)
            assert taken is not None
            name += {r"\x0a": "\n", r"\x0d": "\r"}.get(taken[0], taken[0])
            line = line[taken.end() :]
        names.append(name)
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    return names, mapped


def read_parquet(path: Path) -> tuple[list[str], np.ndarray]:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(path)
    assert table.column_names == ["name", "width", "height", "descriptor"]
    assert set(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)) == {(10, 10)}
    values = np.array(table["descriptor"].combine_chunks().values).reshape(len(table), -1)
    assert parquet.ParquetFile(path).num_row_groups == 4
    assert json.loads(table.schema.metadata[b"sppfeat"])["recipe"]["normalize"] == "none"
    return table["name"].to_pylist(), values


def read_zarr(path: Path) -> tuple[list[str], np.ndarray]:
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(path, mode="r")
    assert group.attrs["sppfeat"]["recipe"]["normalize"] == "none" and group["descriptors"].chunks[0] == 3
    assert group["image_size"][:].tolist() == [[10, 10]] * (len(NAMES) - 1)
    return group["names"][:].tolist(), group["descriptors"][:]


def read_csv(path: Path) -> tuple[list[str], np.ndarray]:
    with open(path, encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    assert header[:3] == ["name", "d0", "d1"]
    return [line[0] for line in lines], np.array([line[1:] for line in lines], np.float64)


def read_hloc(path: Path) -> tuple[list[str], np.ndarray]:
    """As hloc's `list_h5_names` and `get_descriptors` do."""
    names: list[str] = []

    def visit(_: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            names.append(item.parent.name.strip("/"))

    with h5py.File(path, "r", libver="latest") as file:
        file.visititems(visit)
    listed, values = list(set(names)), []
    for name in listed:
        with h5py.File(path, "r", libver="latest") as file:
            values.append(file[name]["global_descriptor"].__array__())
    return listed, np.stack(values)


READERS: dict[str, Callable[[Path], tuple[list[str], np.ndarray]]] = {
    "npy": read_npy,
    "parquet": read_parquet,
    "zarr": read_zarr,
    "csv": read_csv,
    "hloc": read_hloc,
}


def write(store: Store, kind: str, folder: Path, **options: Any) -> Exported:
    if kind in ("parquet", "zarr"):
        pytest.importorskip("pyarrow" if kind == "parquet" else "zarr")
    return export_store(store, folder / FORMATS[kind], format="hloc" if kind == "hloc" else None, **options)


def by_name(names: list[str], values: np.ndarray) -> dict[str, np.ndarray]:
    assert len(names) == len(values) == len(set(names))
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", FORMATS)
def test_read_back(make_store: MakeStore, tmp_path: Path, kind: str, dtype: str) -> None:
    store, told = filled(make_store, dtype), []
    done = write(store, kind, tmp_path, progress=told.append)
    names, values = READERS[kind](tmp_path / FORMATS[kind])
    expected_names, expected = to_numpy(store)
    if kind != "hloc":  # in which names have no order
        assert names == expected_names
    if kind == "csv":
        values = values.astype(dtype)
    assert values.dtype == expected.dtype == dtype
    found, wanted = by_name(names, values), by_name(expected_names, expected)
    assert found.keys() == wanted.keys() == set(NAMES) - {"failed.jpg"}
    for name, row in wanted.items():
        assert found[name].tobytes() == row.tobytes(), name
    assert (done.format, done.exported, done.failed, done.dim, done.dtype) == (kind, len(NAMES) - 1, 1, DIM, dtype)
    assert told == sorted(told) and told[-1] == 1.0 and len(told) == 4
    assert done.names == (str(tmp_path / "out.names.txt") if kind == "npy" else None)


@pytest.mark.parametrize("kind", FORMATS)
def test_levels_and_type(store: Store, tmp_path: Path, kind: str) -> None:
    done = write(store, kind, tmp_path, levels=(1,), dtype="float32")
    found = by_name(*READERS[kind](tmp_path / FORMATS[kind]))
    names, expected = to_numpy(store, levels=(1,), dtype="float32")
    assert done.levels == (1,) and done.dim == 4
    for name, row in zip(names, expected, strict=True):
        np.testing.assert_array_equal(found[name].astype(np.float32), row)


def test_every_half_and_many_floats_survive_csv() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    floats = np.random.default_rng(0).integers(0, 1 << 32, 200_000, np.uint32).view(np.float32)
    floats = floats[np.isfinite(floats)]
    for values in (halves, floats):
        form = f"%.{export._DIGITS[values.dtype.name]}g"
        read = np.array([float(form % value) for value in values.tolist()]).astype(values.dtype)
        assert read.tobytes() == values.tobytes()


@pytest.mark.parametrize("kind", FORMATS)
def test_an_export_is_replaced_only_on_request(store: Store, tmp_path: Path, kind: str) -> None:
    write(store, kind, tmp_path)
    path = tmp_path / FORMATS[kind]
    with pytest.raises(StoreError, match=r"out\S*: already exists; choose another output, or use --overwrite"):
        write(store, kind, tmp_path)
    write(store, kind, tmp_path, levels=(1,), overwrite=True)
    assert by_name(*READERS[kind](path))["plain.jpg"].shape == (4,)
    assert sorted(each.name for each in tmp_path.glob(".*")) == []


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_else_is_ever_replaced(store: Store, tmp_path: Path, kind: str) -> None:
    path = tmp_path / FORMATS[kind]
    if kind == "zarr":
        path.mkdir()
        (path / "zarr.json").write_text('{"attributes": {}}')
    elif kind == "hloc":
        path.write_bytes(store.path.read_bytes())
    elif kind == "npy":
        np.save(path, np.ones(3))
    elif kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.table({"x": [1]}), path)
    else:
        path.write_text("name,label\na.jpg,1\n")
    before = {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}
    with pytest.raises(StoreError, match="expected an export or a new .*, found a.*left as it is"):
        write(store, kind, tmp_path, overwrite=True)
    assert before == {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_of_another_kind(store: Store, tmp_path: Path, kind: str) -> None:
    path = tmp_path / FORMATS[kind]
    path.write_bytes(b"\xff\xd8\xff a photograph")
    with pytest.raises(StoreError, match="left as it is"):
        write(store, kind, tmp_path, overwrite=True)
    path.write_bytes(b"")
    if kind == "zarr":
        with pytest.raises(StoreError, match="expected an export or a new folder, found a file; it is left as it is"):
            write(store, kind, tmp_path)
    elif kind == "hloc":
        path.write_bytes(store.path.read_bytes()[:2000])
        with pytest.raises(StoreError, match="found a damaged HDF5 file; it is left as it is"):
            write(store, kind, tmp_path, overwrite=True)
    path.unlink()
    if kind == "zarr":
        path.mkdir()
        write(store, kind, tmp_path)  # into an empty folder
        return
    path.mkdir()
    with pytest.raises(StoreError, match="expected a file to write to, found a folder"):
        write(store, kind, tmp_path, overwrite=True)


def test_names_without_their_values_are_not_replaced(store: Store, tmp_path: Path) -> None:
    (tmp_path / "out.names.txt").write_text("my notes")
    with pytest.raises(
        StoreError, match=r"names\.txt: expected an export or a new file, found a file without out\.npy"
    ):
        write(store, "npy", tmp_path, overwrite=True)
    assert (tmp_path / "out.names.txt").read_text() == "my notes" and not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("before", [False, True])
def test_a_full_disk_leaves_what_was_there(
    store: Store, tmp_path: Path, kind: str, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if before:
        write(store, kind, tmp_path)
    there = {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"out\S*: cannot be written: the disk is full"):
        write(store, kind, tmp_path, levels=(1,), overwrite=True)
    monkeypatch.undo()
    assert there == {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}


@pytest.mark.parametrize("kind", FORMATS)
def test_an_interrupt_leaves_nothing(store: Store, tmp_path: Path, kind: str) -> None:
    def interrupt(done: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(store, kind, tmp_path, progress=interrupt)
    assert [each.name for each in tmp_path.iterdir()] == [store.path.name]


def test_hdf5_that_cannot_be_written(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, data: object) -> int:
        self.failure = OSError(errno.ENOSPC, "No space left on device")  # type: ignore[attr-defined]
        return len(data)  # type: ignore[arg-type]

    monkeypatch.setattr(files_output._HeldBack, "write", full)
    with pytest.raises(StoreError, match=r"out\.h5: cannot be written: the disk is full"):
        write(store, "hloc", tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == [store.path.name]


def test_names_that_hloc_cannot_hold(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(np.ones((2, 3)), names=["a", "a/global_descriptor"])
    with pytest.raises(StoreError, match="a/global_descriptor: cannot be a group of HDF5 beside the others"):
        export_store(store, tmp_path / "out.h5", format="hloc")
    assert [each.name for each in tmp_path.iterdir()] == [store.path.name]


@pytest.mark.parametrize(("kind", "module"), [("parquet", "pyarrow"), ("zarr", "zarr")])
def test_a_missing_library_is_named(
    store: Store, tmp_path: Path, kind: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"export to {kind} needs {module}, .*: pip install 'sppfeat\[data\]'"):
        export_store(store, tmp_path / FORMATS[kind])


def test_the_format_follows_the_extension(store: Store, tmp_path: Path) -> None:
    assert export_store(store, tmp_path / "OUT.NPY").format == "npy"
    assert export_store(store, tmp_path / "values.bin", format="csv").format == "csv"
    for name, found in (("out.h5", "'.h5'"), ("out", "'no extension'")):
        expected = rf"expected one of \.npy, \.parquet, \.zarr, \.csv, or format hloc, found {found}"
        with pytest.raises(UsageError, match=expected):
            export_store(store, tmp_path / name)
    with pytest.raises(UsageError, match="unknown format 'npz'"):
        export_store(store, tmp_path / "out.npy", format="npz")


def test_a_link_stays_a_link(store: Store, tmp_path: Path) -> None:
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    assert export_store(store, tmp_path / "link.csv").output == str(tmp_path / "real.csv")
    assert (tmp_path / "link.csv").is_symlink() and len(read_csv(tmp_path / "real.csv")[0]) == len(NAMES) - 1
