"""Networks of whole numbers (int8), as they are kept in the user's cache, by the fingerprint that recipes name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from sppfeat.backbones import Description
from sppfeat.errors import BackboneError
from sppfeat.files import cache_folder, read_entry, write_entry

# Each is some 5 to 100 MB. Unlike other entries they cannot be made again without the images, so more of them stay.
_KEPT: Final = 100


class Array(msgspec.Struct, frozen=True):
    """An array of one of NumPy's types."""

    shape: tuple[int, ...]
    dtype: str
    values: bytes

    @classmethod
    def of(cls, array: np.ndarray) -> Array:
        return cls(array.shape, array.dtype.name, np.ascontiguousarray(array).tobytes())

    def array(self) -> np.ndarray:
        return np.frombuffer(self.values, self.dtype).reshape(self.shape)


class Sample(msgspec.Struct, frozen=True):
    """An image [H, W, 3] uint8, and the cells [h, w, C] of each layer that the network gave where it was calibrated."""

    image: Array
    cells: list[Array]


class CalibratedNetwork(msgspec.Struct, frozen=True):
    """A network with its whole numbers, as OpenVINO's model: its structure (XML) and its constants."""

    structure: bytes
    constants: bytes
    kept_samples: list[Sample]

    def model(self) -> Any:
        """OpenVINO's model."""
        from sppfeat.engines.openvino_engine import import_openvino

        openvino = import_openvino()
        constants = openvino.Tensor(np.frombuffer(self.constants, np.uint8))
        return openvino.Core().read_model(self.structure, constants)

    def samples(self) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        """Images with the cells of each layer."""
        for sample in self.kept_samples:
            yield sample.image.array(), [cells.array() for cells in sample.cells]


def keep_calibrated(network: CalibratedNetwork) -> str:
    """Keep a network; returns its fingerprint. Raises BackboneError."""
    body = msgspec.msgpack.encode(network)
    fingerprint = _fingerprint(body)
    write_entry(_entry(fingerprint), body, kept=_KEPT)
    if not is_calibrated(fingerprint):
        raise BackboneError(f"precision int8: its network cannot be kept: {_entry(fingerprint)} cannot be written")
    return fingerprint


def is_calibrated(fingerprint: str) -> bool:
    """Whether a network is in the cache."""
    return _entry(fingerprint).exists()


def read_calibrated(descriptions: Sequence[Description]) -> CalibratedNetwork:
    """The network of a recipe's calibration. Raises BackboneError."""
    recipe = descriptions[0].recipe
    what = f"backbone {recipe.backbone}, precision int8"
    if recipe.calibration is None:
        raise BackboneError(f"{what}: expected a calibration, found none: `sppfeat extract` makes one")
    entry = _entry(recipe.calibration)
    body = read_entry(entry)
    if body is None:
        raise BackboneError(
            f"{what}: expected the network of calibration {recipe.calibration} in the cache, found none: {entry}; copy "
            "it from where the store was made, or describe the images again with --overwrite"
        )
    if (found := _fingerprint(body)) != recipe.calibration:
        raise BackboneError(f"{what}: {entry}: expected the network of that calibration, found that of {found}")
    try:
        return msgspec.msgpack.decode(body, type=CalibratedNetwork)
    except msgspec.DecodeError as error:
        raise BackboneError(f"{what}: {entry}: expected a network, found another file ({error})") from None


def _fingerprint(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]


def _entry(fingerprint: str) -> Path:
    return cache_folder() / "calibrated" / f"{fingerprint}.network"
