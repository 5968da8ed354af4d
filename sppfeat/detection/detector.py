"""The detector: linear scorers of windows and the recipe of their descriptors, in one HDF5 file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import h5py
import msgspec
import numpy as np

from sppfeat._version import __version__
from sppfeat.detection.calibration import sigmoid
from sppfeat.errors import ModelError
from sppfeat.files import DETECTOR, appearing_hdf5, open_hdf5, read_document
from sppfeat.recipe import Recipe
from sppfeat.recipes import named_recipe
from sppfeat.windows import ProposalOptions

FORMAT_VERSION: Final = 1


def detection_recipe(**changes: Any) -> Recipe:
    """The default recipe of detectors; changes: fields by name.

    Scales and levels are those with the best accuracy for their time in benchmarks/results/detection.md. Descriptors
    are scored as pooled, so there is nothing to normalize and nothing to fuse.
    """
    return named_recipe("detection", **changes)


@dataclass(frozen=True, kw_only=True)
class Detector:
    """A trained detector of K classes.

    recipe: of the descriptors, of D values. weights: [K, D] float32, biases: [K]; an SVM score above 0 means: of that
    class.
    background: [D + 1] float32, weights and bias of the background, if the network was tuned with the detector: scores
    are then the shares of the classes in a softmax over them and the background. None: of SVMs.
    box_weights: [K, 4, D] float32, box_biases: [K, 4], from descriptors to `box_targets`; None without box regression.
    calibration: [K, 2] float64, slope above 0 and offset of each class, see `probabilities`. None: not calibrated, as
    in files of earlier versions; scores are then SVM scores.
    proposals: how its training windows were found. training: its options and data.
    """

    recipe: Recipe
    weights_sha256: str
    classes: list[str]
    weights: np.ndarray
    biases: np.ndarray
    box_weights: np.ndarray | None
    box_biases: np.ndarray | None
    proposals: ProposalOptions
    training: dict[str, Any]
    versions: dict[str, str]
    background: np.ndarray | None = None
    calibration: np.ndarray | None = None

    @property
    def probable(self) -> bool:
        """Whether scores are probabilities."""
        return self.calibration is not None or self.background is not None

    def scores(self, descriptors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of descriptors [N, D], what ranks the detections of a class, and their scores: both [N, K], float64."""
        raw = (descriptors @ self.weights.T + self.biases).astype(np.float64)
        if self.background is None:
            return raw, raw if self.calibration is None else self.probabilities(raw)
        other = (descriptors @ self.background[:-1] + self.background[-1]).astype(np.float64)
        most = np.maximum(raw.max(1, initial=-np.inf), other)
        shares = np.exp(raw - most[:, None])
        shares /= (shares.sum(1) + np.exp(other - most))[:, None]
        return shares, shares

    def votes(self, ranks: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """[n] what boxes weigh in votes on where an object is: probabilities, or by how much SVM scores [n] are above
        the margin of the SVMs' negatives. ranks, scores: as of `scores`."""
        return scores if self.probable else np.maximum(ranks + 1, 0)

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """[N, K] float64 probabilities that detections with SVM scores [N, K] are correct; for calibrated detectors.

        Within a class they rank as the scores do. `sppfeat.detection.calibration` says how they are found.
        """
        assert self.calibration is not None
        return sigmoid(scores.astype(np.float64) * self.calibration[:, 0] + self.calibration[:, 1])


class _Training(msgspec.Struct):
    """The part of a detector's training that is shown; the file may hold more."""

    images: int = 0
    positives: dict[str, int] = {}
    hard: list[int] = []
    c: float = 0.0
    positive_weight: float = 0.0


def save_detector(detector: Detector, path: str | os.PathLike[str]) -> None:
    """Write a detector atomically to one HDF5 file. Raises ModelError."""
    with appearing_hdf5(Path(path), ModelError) as file:
        file.attrs["format"] = DETECTOR
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["recipe"] = detector.recipe.to_json()
        file.attrs["recipe_hash"] = detector.recipe.identity(detector.weights_sha256)
        file.attrs["weights_sha256"] = detector.weights_sha256
        file.attrs["proposals"] = json.dumps(asdict(detector.proposals))
        file.attrs["training"] = json.dumps(detector.training)
        file.attrs["versions"] = json.dumps({**detector.versions, "sppfeat": __version__})
        file.create_dataset("classes", data=np.asarray(detector.classes, dtype=object), dtype=h5py.string_dtype())
        file.create_dataset("weights", data=detector.weights)
        file.create_dataset("biases", data=detector.biases)
        if detector.background is not None:
            file.create_dataset("background", data=detector.background)
        if detector.box_weights is not None and detector.box_biases is not None:
            file.create_dataset("box_weights", data=detector.box_weights)
            file.create_dataset("box_biases", data=detector.box_biases)
        if detector.calibration is not None:
            file.create_dataset("calibration", data=detector.calibration)


def open_detector(path: str | os.PathLike[str]) -> Detector:
    """Read a detector. Raises ModelError for anything else, and for an incomplete one."""
    with open_hdf5(path, DETECTOR, FORMAT_VERSION, ModelError) as file:
        recipe = Recipe.from_json(str(file.attrs["recipe"]))
        read_document(file, "training", _Training, ModelError)
        classes = file["classes"].asstr()[:].tolist()
        arrays = {
            name: np.asarray(file[name][:], np.float32)
            for name in ("weights", "biases", "background", "box_weights", "box_biases")
            if name in file
        }
        if "calibration" in file:
            arrays["calibration"] = np.asarray(file["calibration"][:], np.float64)
        detector = Detector(
            recipe=recipe,
            weights_sha256=str(file.attrs["weights_sha256"]),
            classes=classes,
            weights=arrays["weights"],
            biases=arrays["biases"],
            box_weights=arrays.get("box_weights"),
            box_biases=arrays.get("box_biases"),
            proposals=ProposalOptions.from_document(read_document(file, "proposals", dict[str, Any], ModelError)),
            training=read_document(file, "training", dict[str, Any], ModelError),
            versions=read_document(file, "versions", dict[str, str], ModelError),
            background=arrays.get("background"),
            calibration=arrays.get("calibration"),
        )
        count, dim = len(classes), arrays["weights"].shape[-1]
        shapes = {"weights": (count, dim), "biases": (count,), "background": (dim + 1,), "calibration": (count, 2)}
        shapes |= {"box_weights": (count, 4, dim), "box_biases": (count, 4)}
        for name, values in arrays.items():
            if values.shape != shapes[name] or not np.isfinite(values).all():
                raise ValueError(f"{name}: expected finite numbers {list(shapes[name])}, found {list(values.shape)}")
        if ("box_weights" in arrays) != ("box_biases" in arrays):
            raise ValueError("box_weights and box_biases require each other")
        if detector.calibration is not None and not (detector.calibration[:, 0] > 0).all():
            raise ValueError("calibration: expected slopes above 0, so that probabilities rise with scores")
        if str(file.attrs["recipe_hash"]) != recipe.identity(detector.weights_sha256):
            raise ValueError("its recipe_hash does not match its recipe")
        return detector
