"""Files of arrays are read as they were written, or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sppfeat import GalleryError
from sppfeat.retrieval.arrays import read_arrays, write_arrays

SHAPES: dict[str, tuple[int, ...]] = {"mean": (3,), "matrix": (3, 2)}


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "projection-1.npz"
    arrays = {"mean": np.ones(3, np.float32), "matrix": np.arange(6, dtype=np.float32).reshape(3, 2)}
    write_arrays(path, arrays)
    assert (read_arrays(path, SHAPES)["matrix"] == arrays["matrix"]).all()
    with pytest.raises(GalleryError, match=r"expected matrix of \[3, 1\] float32, found \[3, 2\] float32"):
        read_arrays(path, SHAPES | {"matrix": (3, 1)})
    whole = path.read_bytes()
    for damaged in (b"", b"PK\x03\x04", whole[:-30], whole[:100] + b"\xff" + whole[101:]):
        path.write_bytes(damaged)
        with pytest.raises(GalleryError, match=r"projection-1\.npz: expected complete arrays"):
            read_arrays(path, SHAPES)
    np.savez(path, **(arrays | {"mean": np.array([object()] * 3)}))  # pickled inside
    with pytest.raises(GalleryError, match=r"expected mean of \[3\] float32, found \[3\] object"):
        read_arrays(path, SHAPES)
    np.savez_compressed(path, **arrays)  # a bomb would be
    with pytest.raises(GalleryError, match="found it compressed"):
        read_arrays(path, SHAPES)
    np.savez(path, **(arrays | {"matrix": np.full((3, 2), np.inf, np.float32)}))
    with pytest.raises(GalleryError, match="matrix holds values that are not finite"):
        read_arrays(path, SHAPES)
    with pytest.raises(GalleryError, match="expected mean of"):
        read_arrays(path, {"mean": (1 << 31,), "matrix": (1 << 31, 1 << 31)})
