"""A trained linear SVM together with the recipe of its descriptors: one HDF5 file that sorts images into classes.

    /weights  (K, D) float32      /biases  (K,) float32      /classes  (K,) UTF-8      /costs, /gaps  (K,) float64

with the root attributes `format`, `format_version`, `recipe` (JSON), `weights_sha256` (of the network), `images` (the
number it was trained on), `positive_weight`, `route`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

import h5py
import numpy as np

from sppfeat.errors import ModelError
from sppfeat.files import SVM, appearing_hdf5, check_new_file, open_hdf5
from sppfeat.recipe import Recipe
from sppfeat.svm import Convergence, LinearSvm

FORMAT_VERSION: Final = 1


@dataclass(frozen=True)
class Classifier:
    """Linear SVMs and what they were trained on.

    recipe, weights_sha256: of the descriptors, and of the network that makes them. images: trained on.
    curve: every C of the grid and its mean value in cross-validation, in percent; empty where C was given, or when
    read from a file. choice_gap: the largest relative duality gap of the SVMs that C was chosen with; else 0.
    """

    svm: LinearSvm
    recipe: Recipe
    weights_sha256: str
    images: int
    positive_weight: float
    curve: list[tuple[float, float]]
    choice_gap: float = 0.0

    @property
    def convergence(self) -> Convergence:
        """How close the SVMs are to the optimum."""
        return Convergence(self.classes, self.svm.gaps[None], self.choice_gap)

    @property
    def classes(self) -> list[str]:
        """The classes, in rising order."""
        return [str(name) for name in self.svm.classes]


def save_classifier(classifier: Classifier, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write the file atomically. Raises ModelError."""
    path = check_new_file(path, overwrite=overwrite, error=ModelError, kind=SVM)
    with appearing_hdf5(path, ModelError) as file:
        file.attrs["format"] = SVM
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["recipe"] = classifier.recipe.to_json()
        file.attrs["weights_sha256"] = classifier.weights_sha256
        file.attrs["images"] = classifier.images
        file.attrs["positive_weight"] = classifier.positive_weight
        file.attrs["route"] = classifier.svm.route
        file["weights"] = classifier.svm.weights.astype(np.float32)
        file["biases"] = classifier.svm.biases.astype(np.float32)
        file["costs"] = classifier.svm.costs
        file["gaps"] = classifier.svm.gaps
        file.create_dataset("classes", data=classifier.classes, dtype=h5py.string_dtype())


def open_classifier(path: str | os.PathLike[str]) -> Classifier:
    """Read a file of `save_classifier`. Raises ModelError if it is another file, or incomplete."""
    with open_hdf5(path, SVM, FORMAT_VERSION, ModelError) as file:
        svm = LinearSvm(
            weights=np.asarray(file["weights"], np.float64),
            biases=np.asarray(file["biases"], np.float64),
            classes=np.array(file["classes"].asstr()[:].tolist()),
            costs=np.asarray(file["costs"], np.float64),
            route=str(file.attrs["route"]),
            gaps=np.asarray(file["gaps"], np.float64),
        )
        count = len(svm.classes)
        if svm.weights.ndim != 2 or any(len(part) != count for part in (svm.weights, svm.biases, svm.costs, svm.gaps)):
            raise ModelError(f"{path}: expected one row per class ({count}), found other lengths")
        if count < 2:
            raise ModelError(f"{path}: expected at least two classes, found {count}")
        positive_weight = float(file.attrs["positive_weight"])
        numbers = (svm.weights, svm.costs, np.array(positive_weight))
        if not all(np.isfinite(part).all() for part in numbers) or np.isnan(svm.biases).any():
            raise ModelError(f"{path}: expected finite weights and costs, found NaN or infinity")
        if len(np.unique(svm.classes)) != count:
            raise ModelError(f"{path}: expected unique class names, found duplicates")
        return Classifier(
            svm=svm,
            recipe=Recipe.from_json(str(file.attrs["recipe"])),
            weights_sha256=str(file.attrs["weights_sha256"]),
            images=int(file.attrs["images"]),
            positive_weight=positive_weight,
            curve=[],
        )
