"""Files of named float32 arrays, read without trusting them: no pickles, and no more memory than the file's length."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np

from sppfeat.errors import GalleryError, one_line
from sppfeat.files import appearing


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays of float32 to a file. Raises GalleryError."""
    with appearing(path, GalleryError) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_arrays(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Finite float32 arrays of these names and shapes. Raises GalleryError for any other file."""
    try:
        with zipfile.ZipFile(path) as file:
            arrays = {name: _read_array(file, path, name, shape) for name, shape in shapes.items()}
    except GalleryError:
        raise
    except Exception as error:  # zipfile raises nearly anything on unexpected input
        raise GalleryError(f"{path}: expected complete arrays, found: {one_line(error)}") from None
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            raise GalleryError(f"{path}: {name} holds values that are not finite")
    return arrays


def _read_array(file: zipfile.ZipFile, path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array of exactly this shape: its length is known before it is read, and pickles are never read."""
    if f"{name}.npy" not in file.namelist():
        raise GalleryError(f"{path}: expected an array {name!r}, found none")
    if file.getinfo(f"{name}.npy").compress_type != zipfile.ZIP_STORED:  # a few bytes could expand to any number
        raise GalleryError(f"{path}: expected {name} uncompressed, found it compressed")
    with file.open(f"{name}.npy") as member:
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[np.lib.format.read_magic(member)]
        found, _, dtype = read_header(member)
    if 4 * math.prod(shape) > path.stat().st_size or found != shape or dtype != np.float32:
        raise GalleryError(f"{path}: expected {name} of {list(shape)} float32, found {list(found)} {dtype}")
    with file.open(f"{name}.npy") as member:
        return np.ascontiguousarray(np.lib.format.read_array(member, allow_pickle=False))
