"""A vocabulary of visual words: centers of SIFT descriptors in one HDF5 file, the weights of backbone sift-bow.

    /centers  (words, 128)  float32

with the root attributes `format`, `format_version`, `seed`, `images` and `descriptors` (the numbers it was learned
from), `objective` (the mean squared distance of these descriptors to their nearest center), `versions` (JSON).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from sppfeat.backbones.description import PROBE, Description, Layer
from sppfeat.backbones.geometry import Step, follow
from sppfeat.backbones.sift import DIM, PATCH, SIFT_VERSION, SPACING
from sppfeat.errors import ModelError, UsageError, unknown_name
from sppfeat.files import VOCABULARY, appearing_hdf5, check_new_file, open_hdf5, read_document
from sppfeat.recipe import SIFT_BOW, Recipe

FORMAT_VERSION: Final = 1
# A descriptor is compared with all of them. Published vocabularies of spatial pyramids have 200 to some thousands.
MAX_WORDS: Final = 1 << 16
# Of a bag of words: there is only one.
LAYER: Final = "words"
# Descriptors compared at a time, for a table that stays in the cache.
_BLOCK_VALUES: Final = 1 << 18


@dataclass(frozen=True, eq=False, kw_only=True)
class Vocabulary:
    """Visual words, and what they were learned from.

    centers: [words, 128] float32, from 0 to 256. seed: of the choice of images and descriptors, and of k-means.
    images, descriptors: how many. objective: mean squared distance of these descriptors to their nearest center.
    versions: of the libraries that computed it.
    """

    centers: np.ndarray
    seed: int
    images: int
    descriptors: int
    objective: float
    versions: dict[str, str]

    @property
    def words(self) -> int:
        """The number of words."""
        return len(self.centers)

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the centers, and of how descriptors are made: what decides about words."""
        digest = hashlib.sha256(f"{SIFT_BOW} {SIFT_VERSION} {list(self.centers.shape)}\n".encode())
        digest.update(np.ascontiguousarray(self.centers, "<f4").data)
        return digest.hexdigest()

    @functools.cached_property
    def _half_squares(self) -> np.ndarray:
        half: np.ndarray = np.einsum("wd,wd->w", self.centers, self.centers) / 2
        return half

    def words_of(self, descriptors: np.ndarray) -> np.ndarray:
        """[P] int32 the nearest word of descriptors [P, 128] float32; of equally near ones the first."""
        found = np.empty(len(descriptors), np.int32)
        size = max(1, _BLOCK_VALUES // self.words)
        for first in range(0, len(descriptors), size):
            block = descriptors[first : first + size]
            # |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2)
            found[first : first + size] = (block @ self.centers.T - self._half_squares).argmax(1)
        return found


def save_vocabulary(vocabulary: Vocabulary, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write the file atomically. Raises ModelError."""
    path = check_new_file(path, overwrite=overwrite, error=ModelError, kind=VOCABULARY)
    with appearing_hdf5(path, ModelError) as file:
        file.attrs["format"] = VOCABULARY
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["seed"] = vocabulary.seed
        file.attrs["images"] = vocabulary.images
        file.attrs["descriptors"] = vocabulary.descriptors
        file.attrs["objective"] = vocabulary.objective
        file.attrs["versions"] = json.dumps(vocabulary.versions)
        file["centers"] = vocabulary.centers.astype(np.float32)


def open_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """Read a file of `save_vocabulary`. Raises ModelError if it is another file, or damaged."""
    with open_hdf5(path, VOCABULARY, FORMAT_VERSION, ModelError) as file:
        stored = file["centers"]
        shape = tuple(stored.shape)
        if len(shape) != 2 or not 1 <= shape[0] <= MAX_WORDS or shape[1] != DIM or stored.dtype != np.float32:
            raise ModelError(
                f"{path}: expected float32 centers of 1 to {MAX_WORDS} words x {DIM} values, "
                f"found {stored.dtype} {list(shape)}"
            )
        centers = np.asarray(stored[:], np.float32)
        # Not finite ones included.
        if not ((centers >= 0) & (centers <= 256)).all():
            raise ModelError(f"{path}: expected centers with values from 0 to 256, found others")
        objective = float(file.attrs["objective"])
        if not math.isfinite(objective):
            raise ModelError(f"{path}: expected a finite objective, found {objective}")
        return Vocabulary(
            centers=centers,
            seed=int(file.attrs["seed"]),
            images=int(file.attrs["images"]),
            descriptors=int(file.attrs["descriptors"]),
            objective=objective,
            versions=read_document(file, "versions", dict[str, str], ModelError),
        )


def describe_words(recipe: Recipe, vocabulary: Vocabulary) -> Description:
    """A bag of words as a layer: a cell per patch, a channel per word. recipe: of backbone sift-bow alone.

    Raises UsageError for a layer that it does not have.
    """
    if recipe.layer not in (None, LAYER):
        raise UsageError(f"backbone {SIFT_BOW}: " + unknown_name("layer", str(recipe.layer), [LAYER]))
    steps = (Step(name=LAYER, inputs=(0,), extent=PATCH, stride=SPACING),)
    resolved = replace(
        recipe,
        layer=LAYER,
        weights=os.path.abspath(recipe.weights),
        # That of most networks: with one of these, an image is resized once.
        interpolation=recipe.interpolation or "bicubic",
    )
    layer = Layer(LAYER, vocabulary.words, SPACING, follow(steps, PROBE).size)
    return Description(resolved, layer, vocabulary.sha256, PATCH, steps)
