"""A trained linear SVM together with the recipe of its descriptors: one HDF5 file that sorts images into classes.

    /weights  (K, D) float32      /biases  (K,) float32      /classes  (K,) UTF-8      /costs, /gaps  (K,) float64

with the root attributes `format`, `format_version`, `recipe` (JSON), `weights_sha256` (of the network), `images` (how
many it was trained with), `positive_weight`, `route`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import Final, NamedTuple

import h5py
import numpy as np

from sppfeat.errors import ModelError, SppFeatWarning, UsageError
from sppfeat.extraction.pipeline import DescribedWindows, Describer
from sppfeat.files.names import unsafe_name
from sppfeat.files.output import STORE, SVM, appearing_hdf5, check_new_file, format_of, open_hdf5
from sppfeat.images.reading import ImageList, find_images, name_to_path
from sppfeat.recipe import Recipe, RunOptions
from sppfeat.store.store import Status, Store, open_store
from sppfeat.store.subset import DescriptorView
from sppfeat.store.unit_rows import Box, picture_of
from sppfeat.svm.convergence import Convergence
from sppfeat.svm.cost_selection import SvmOptions, choose_cost
from sppfeat.svm.solver import LinearSvm, SvmProblem, class_targets
from sppfeat.transfer.evaluation import labelled_names, require_complete
from sppfeat.transfer.labels import Labels, labels_from_folders

FORMAT_VERSION: Final = 1
_BLOCK_ROWS: Final = 256  # scored at once: the weights are read once for all of them


@dataclass(frozen=True)
class Classifier:
    """Linear SVMs and what they were trained on.

    recipe, weights_sha256: of the descriptors, and of the network that makes them. images: trained with.
    curve: every C of the grid and its mean value in cross-validation, in percent; empty where C was given, or when
    read from a file. choice_gap: the largest relative duality gap of the SVMs that C was chosen with; 0 likewise.
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
        """How near the SVMs came to the best possible ones."""
        return Convergence(self.classes, self.svm.gaps[None], self.choice_gap)

    @property
    def classes(self) -> list[str]:
        """The classes, in rising order."""
        return [str(name) for name in self.svm.classes]


@dataclass(frozen=True)
class Prediction:
    """The scores [K] of one image, or why there are none."""

    name: str
    scores: np.ndarray | None
    error: str | None


def train_classifier(store: Store, options: SvmOptions | None = None, *, labels: Labels | None = None) -> Classifier:
    """Train on every image of a store that has a label; labels: None: from the names (`labels_from_folders`).

    Raises StoreError for a store with pending rows, UsageError for labels that cannot be used. Warns, as
    SppFeatWarning, of SVMs that do not converge, and of classes whose images all failed.
    """
    options = options or SvmOptions()
    require_complete(store)
    labels = labels or labels_from_folders(store.names)
    names = labelled_names(store, labels, set(store.errors()))
    known = np.array([labels.classes[name] for name in names])
    classes = np.unique(known)
    if len(classes) < 2:
        raise UsageError(f"expected images of at least two classes, found {len(classes)}: {', '.join(classes)}")
    place = {name: row for row, name in enumerate(store.names)}
    view = DescriptorView(store, np.array([place[name] for name in names]), options.levels)
    problem = SvmProblem(view, device=options.device, names=names)
    choice = choose_cost(problem, known, np.arange(len(names)), options)
    targets, _ = class_targets(known, classes)
    solution = problem.solve(targets, c=choice.costs, positive_weight=options.positive_weight, start=choice.start)
    classifier = Classifier(
        svm=problem.svm(solution, classes),
        recipe=view.recipe,
        weights_sha256=store.weights_sha256,
        images=len(names),
        positive_weight=options.positive_weight,
        curve=[(cost, 100 * value) for cost, value in choice.curve],
        choice_gap=choice.gap,
    )
    for text in classifier.convergence.warnings():
        warnings.warn(f"{store.path}: {text}", SppFeatWarning, stacklevel=2)
    return classifier


def save_classifier(classifier: Classifier, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write the file; it appears whole. Raises ModelError."""
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
    """Read a file of `save_classifier`. Raises ModelError when it is none, or not whole."""
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
            raise ModelError(f"{path}: expected a row for each of its {count} classes, found other lengths")
        if count < 2:
            raise ModelError(f"{path}: expected at least two classes, found {count}")
        positive_weight = float(file.attrs["positive_weight"])
        numbers = (svm.weights, svm.costs, np.array(positive_weight))
        if not all(np.isfinite(part).all() for part in numbers) or np.isnan(svm.biases).any():
            raise ModelError(f"{path}: expected weights and costs that are finite, found some that are not")
        if len(np.unique(svm.classes)) != count:
            raise ModelError(f"{path}: expected classes of different names, found duplicates")
        return Classifier(
            svm=svm,
            recipe=Recipe.from_json(str(file.attrs["recipe"])),
            weights_sha256=str(file.attrs["weights_sha256"]),
            images=int(file.attrs["images"]),
            positive_weight=positive_weight,
            curve=[],
        )


def predict(
    classifier: Classifier,
    sources: Sequence[str | os.PathLike[str]],
    options: RunOptions | None = None,
    *,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[Prediction]:
    """Score images of folders, files and lists, or of stores, about in order; memory does not grow with them.

    Images are described by the classifier's own recipe. A store's descriptors are taken as they are when that recipe
    made them, or one of which its levels can be cut out; else its images are described anew, and `note` is told why.
    Raises UsageError for sources without images, ModelError when the network's weights are not those of the classifier.
    """
    options = options or RunOptions()
    stores = [source for source in sources if os.fspath(source) != "-" and format_of(source) == STORE]
    others = [source for source in sources if source not in stores]
    jobs: list[Callable[[Describer], Iterator[_Row]]] = []
    for path in stores:
        store = open_store(path)
        view = _fitting_view(store, classifier)
        if isinstance(view, str):
            note(f"{path}: {view}; its images are described anew by the recipe of the classifier")
            jobs.append(partial(_describe_store, store))
        else:
            yield from _predict_rows(classifier, store, view)
    if others:
        found = find_images(others)
        if not found.names:
            raise UsageError(f"{', '.join(os.fspath(source) for source in others)}: expected images, found none")
        jobs.append(partial(_describe_images, found))
    if not jobs:
        return
    describer = Describer(classifier.recipe, options)
    if describer.weights_sha256 != classifier.weights_sha256:
        raise ModelError(
            f"backbone {classifier.recipe.backbone}: expected the weights that the classifier was trained with (sha256 "
            f"{classifier.weights_sha256[:12]}), found others ({describer.weights_sha256[:12]})"
        )
    if describer.dim != classifier.svm.weights.shape[1]:
        raise ModelError(
            f"expected a classifier of {describer.dim} values by its recipe, found {classifier.svm.weights.shape[1]}"
        )
    for job in jobs:
        rows = job(describer)
        while block := list(islice(rows, _BLOCK_ROWS)):
            good = [row.descriptor for row in block if row.descriptor is not None]
            scores = iter(classifier.svm.scores(np.stack(good)) if good else ())
            yield from (
                Prediction(row.name, None if row.descriptor is None else next(scores), row.error) for row in block
            )


class _Row(NamedTuple):
    """What is to be scored: its descriptor, or why there is none."""

    name: str
    descriptor: np.ndarray | None
    error: str | None


def _describe_images(images: ImageList, describer: Describer) -> Iterator[_Row]:
    yield from (_Row(name, None, reason) for name, reason in images.problems.items())
    names = [name for name in images.names if name not in images.problems]
    for one in describer.describe(name_to_path(images.root, name) for name in names):
        yield _Row(names[one.position], one.descriptor, one.error)


def _describe_store(store: Store, describer: Describer) -> Iterator[_Row]:
    """The images or windows that a store's rows are named after; windows in the order of the rows."""
    for kind, group in groupby((_place(store, name) for name in store.names), key=lambda place: place.kind):
        places = list(group)
        if kind == "refused":
            yield from (_Row(place.name, None, place.refused) for place in places)
        elif kind == "window":
            yield from _describe_windows(store, places, describer)
        else:
            for one in describer.describe(place.path for place in places):
                yield _Row(places[one.position].name, one.descriptor, one.error)


class _Place(NamedTuple):
    """The file that a row is named after, its window where it is one's, and why the name is not followed, if so."""

    name: str
    path: str
    window: Box | None = None
    refused: str | None = None

    @property
    def kind(self) -> str:
        return "refused" if self.refused is not None else "image" if self.window is None else "window"


def _place(store: Store, name: str) -> _Place:
    if (reason := unsafe_name(name)) is not None:
        return _Place(name, "", refused=f"the name {reason}, and is not followed")
    return _Place(name, *picture_of(store.source_root, name))


def _describe_windows(store: Store, places: list[_Place], describer: Describer) -> Iterator[_Row]:
    if describer.recipe.crop != "none":
        raise UsageError(
            f"{store.path}: expected images, found windows: the recipe of the classifier crops "
            f"({describer.recipe.crop}), and windows have no crop"
        )
    images = [list(group) for _, group in groupby(places, key=lambda place: place.path)]
    tasks = ((group[0].path, np.array([place.window for place in group], np.float64)) for group in images)
    ready: dict[int, DescribedWindows] = {}
    position = 0
    for one in describer.describe_windows(tasks):
        ready[one.position] = one  # an image that cannot be read comes before others that were begun earlier
        while (done := ready.pop(position, None)) is not None:
            for at, place in enumerate(images[position]):
                error = done.error or done.window_errors.get(at)
                good = done.descriptors is not None and error is None
                yield _Row(place.name, done.descriptors[at] if good and done.descriptors is not None else None, error)
            position += 1


def _fitting_view(store: Store, classifier: Classifier) -> DescriptorView | str:
    """The store's descriptors as the classifier takes them, or why that cannot be."""
    if store.weights_sha256 != classifier.weights_sha256:
        return "was made with other weights"
    try:
        view = DescriptorView(store, levels=classifier.recipe.levels)
    except UsageError:
        view = DescriptorView(store)
    if differences := classifier.recipe.differences(view.recipe):
        return f"was made by another recipe ({'; '.join(differences)})"
    return view


def _predict_rows(classifier: Classifier, store: Store, view: DescriptorView) -> Iterator[Prediction]:
    require_complete(store)
    errors = store.errors()
    for first in range(0, len(store), _BLOCK_ROWS):
        rows = np.arange(first, min(first + _BLOCK_ROWS, len(store)))
        done = store.status[rows] == Status.DONE
        scores = iter(classifier.svm.scores(view, rows[done], names=store.names) if done.any() else ())
        for row, is_done in zip(rows, done, strict=True):
            name = store.names[row]
            yield Prediction(name, next(scores), None) if is_done else Prediction(name, None, errors[name])
