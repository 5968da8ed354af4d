"""Learning a vocabulary: k-means over SIFT descriptors of a sample of images, by FAISS."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Final

import numpy as np

from sppfeat._version import __version__
from sppfeat.backbones import MAX_WORDS, SIFT_PATCH, Vocabulary, import_cv2, save_vocabulary
from sppfeat.errors import MissingExtraError, ModelError, UsageError, one_line, require_extra
from sppfeat.files import VOCABULARY, check_new_file
from sppfeat.images import DEFAULT_COLUMNS, Columns, no_images, open_sources
from sppfeat.machine import available_cores
from sppfeat.progress import Observer
from sppfeat.recipe import NATIVE, Recipe, RunOptions
from sppfeat.vocabulary.sampling import choose_items, sample_descriptors

# FAISS's default; the objective falls by less than 0.1 % in the last round on photographs.
ROUNDS: Final = 25
# How images are read: as they are, photographs of 60 megapixels included. The network is not looked at.
READING: Final = Recipe(scales=(NATIVE,), max_pixels=60_000_000)


@dataclass(frozen=True, kw_only=True)
class VocabularyOptions:
    """How a vocabulary is learned.

    words: how many. images: at most as many are read, a random sample of the sources. descriptors: at most as many of
    each image, a random sample of its grid. seed: of both, and of k-means.
    Raises UsageError, naming the field, for an invalid value.
    """

    words: int = 200
    images: int = 1000
    descriptors: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("words", self.words, 2, MAX_WORDS),
            ("images", self.images, 1, 1 << 20),
            ("descriptors", self.descriptors, 1, 1 << 16),
            ("seed", self.seed, 0, (1 << 31) - 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise UsageError(f"{name} must be a whole number from {low} to {high}, found {value!r}")


@dataclass(frozen=True)
class Learned:
    """What `learn_vocabulary` did. failed: images of the sample that could not be read, with reasons, by name."""

    file: str
    vocabulary: Vocabulary
    failed: dict[str, str]
    seconds: float


def learn_vocabulary(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    options: VocabularyOptions | None = None,
    *,
    workers: int | None = None,
    root: str | os.PathLike[str] | None = None,
    columns: Columns = DEFAULT_COLUMNS,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> Learned:
    """Learn visual words from images of folders, files, lists, archives and URLs (see `open_sources`) into a file.

    Images are read at their native size, within the limits of a default recipe. One that cannot be read is reported
    and left out. workers: threads. Raises UsageError, ModelError, MissingExtraError.
    """
    began = time.perf_counter()
    options, observer = options or VocabularyOptions(), observer or Observer()
    RunOptions(num_workers=workers)
    path = check_new_file(output, overwrite=overwrite, error=ModelError, kind=VOCABULARY)
    import_cv2()
    faiss = _import_faiss()
    several = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    shown = ", ".join(os.fspath(source) for source in several)
    items = choose_items(open_sources(several, root=root, columns=columns), options.images, options.seed)
    if not items:
        raise UsageError(no_images(several))
    observer.started(todo=len(items), reused=0)
    sample = sample_descriptors(
        items,
        READING,
        most=options.descriptors,
        seed=options.seed,
        workers=workers or available_cores(),
        minimum=SIFT_PATCH,
        observer=observer,
    )
    different = _count_different(sample.descriptors)
    if different < options.words:
        raise UsageError(
            f"{shown}: expected at least {options.words} different SIFT descriptors for as many words, found "
            f"{different} in {sample.images} of {len(items)} images: use more images, or fewer words"
        )
    centers, objective = _k_means(faiss, sample.descriptors, options)
    vocabulary = Vocabulary(
        centers=centers,
        seed=options.seed,
        images=sample.images,
        descriptors=len(sample.descriptors),
        objective=objective,
        versions=_versions(),
    )
    save_vocabulary(vocabulary, path, overwrite=overwrite)
    return Learned(os.fspath(output), vocabulary, sample.failed, time.perf_counter() - began)


def _k_means(faiss: ModuleType, descriptors: np.ndarray, options: VocabularyOptions) -> tuple[np.ndarray, float]:
    """Centers [words, 128] float32 of descriptors [P, 128] uint8, and their mean squared distance to the nearest."""
    k_means = faiss.Kmeans(
        descriptors.shape[1],
        options.words,
        niter=ROUNDS,
        seed=options.seed,
        # All descriptors are used, and FAISS does not print that they are few.
        min_points_per_centroid=1,
        max_points_per_centroid=len(descriptors),
    )
    k_means.train(descriptors.astype(np.float32))
    # A cluster that stayed empty is half of another, moved by a thousandth: it may leave the range by as much.
    centers: np.ndarray = np.clip(np.asarray(k_means.centroids, np.float32), 0, 255)
    return centers, float(k_means.obj[-1]) / len(descriptors)


def _count_different(descriptors: np.ndarray) -> int:
    """How many of [P, 128] uint8 differ."""
    whole = np.ascontiguousarray(descriptors).view(np.dtype((np.void, descriptors.shape[1])))
    return len(np.unique(whole))


def _import_faiss() -> ModuleType:
    purpose = "learning a vocabulary"
    try:
        return require_extra("faiss", "cpu", purpose)
    except RuntimeError as error:  # faiss-gpu without NVIDIA's libraries
        raise MissingExtraError(f"{purpose} needs faiss, which fails to load: {one_line(error)}") from None


def _versions() -> dict[str, str]:
    """What the words depend on."""
    found = {"sppfeat": __version__, "opencv": str(import_cv2().__version__), "numpy": np.__version__}
    for package in ("faiss-cpu", "faiss-gpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
