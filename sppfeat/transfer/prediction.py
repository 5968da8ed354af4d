"""Prediction: a classifier's scores of images or of stores' rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from typing import Final, NamedTuple

import numpy as np

from sppfeat.errors import ModelError, UsageError
from sppfeat.extraction import Described, Describer
from sppfeat.files import unsafe_name
from sppfeat.images import ImageList, Item, as_given, find_images, left_out, no_images
from sppfeat.progress import Observer
from sppfeat.recipe import RunOptions, short_sha
from sppfeat.store import (
    Box,
    DescriptorView,
    Status,
    Store,
    count_lost,
    is_store,
    item_of,
    open_store,
    reason_text,
    require_complete,
)
from sppfeat.transfer.classifier import Classifier

_BLOCK_ROWS: Final = 256  # scored at once: the weights are read once for all of them


@dataclass(frozen=True)
class Prediction:
    """The scores [K] of one image, or the reason why there are none.

    root: what the name is relative to. path: of the image as its source was given, or the name of a store's row.
    """

    name: str
    scores: np.ndarray | None
    error: str | None
    root: str = ""
    path: str = ""


def predict(
    classifier: Classifier,
    sources: Sequence[str | os.PathLike[str]],
    options: RunOptions | None = None,
    *,
    weights: str | None = None,
    root: str | os.PathLike[str] | None = None,
    note: Callable[[str], None] = lambda text: None,
    observer: Observer | None = None,
) -> Iterator[Prediction]:
    """Score images of folders, files and lists, or of stores, roughly in order; memory does not grow with their number.

    root: what names are relative to; None: the folder that holds all images. weights: where the network's weights are
    now, if they moved.
    Images are described with the classifier's own recipe. A store's descriptors are used as is if that recipe made
    them, or one that its levels can be cut out of; else its images are described again. `note` is told why, and how
    many images of a store are gone or have changed.
    Raises UsageError for sources without images, ModelError if the network's weights are not those of the classifier.
    """
    options = options or RunOptions()
    observer = observer or Observer()
    todo = 0
    stores = [source for source in sources if os.fspath(source) != "-" and is_store(source)]
    others = [source for source in sources if source not in stores]
    jobs: list[Callable[[Describer], Iterator[_Row]]] = []
    for path in stores:
        store = open_store(path)
        view = _fitting_view(store, classifier)
        if isinstance(view, str):
            note(f"{path}: {view}; its images are described again with the classifier's recipe")
            jobs.append(partial(_describe_store, store))
            todo += len(store)
        else:
            files = count_lost(store)
            if files is not None and not files.as_described:
                note(f"{path}: {files}; classes are those of the images as they were described")
            for one in _predict_rows(classifier, store, view):
                observer.row(one.path, one.error)
                yield one
    if others:
        found = find_images(others, root=root)
        if not found.names:
            raise UsageError(no_images(others))
        if found.extent is not None and found.extent.unread:
            note(left_out(found.extent.unread))
        shown = (lambda item: item.name) if root is not None else (lambda item: as_given(item.path, others))
        jobs.append(partial(_describe_images, found, shown))
        todo += len(found.items)
    if not jobs:
        return
    describer = classifier_describer(classifier, options, weights=weights)
    observer.started(todo=todo, reused=0, device=describer.device)
    for job in jobs:
        rows = job(describer)
        while block := list(islice(rows, _BLOCK_ROWS)):
            good = [row.descriptor for row in block if row.descriptor is not None]
            scores = iter(classifier.svm.scores(np.stack(good)) if good else ())
            for row in block:
                observer.row(row.path, row.error)
                yield Prediction(
                    row.name, None if row.descriptor is None else next(scores), row.error, row.root, row.path
                )


def classifier_describer(
    classifier: Classifier, options: RunOptions | None = None, *, weights: str | None = None
) -> Describer:
    """The network that a classifier was trained with. Raises ModelError if the one here differs.

    weights: where its weights are now, if they moved.
    """
    recipe = classifier.recipe if weights is None else replace(classifier.recipe, weights=weights)
    describer = Describer(recipe, options)
    if describer.weights_sha256 != classifier.weights_sha256:
        raise ModelError(
            f"backbone {classifier.recipe.backbone}: expected the weights that the classifier was trained with (sha256 "
            f"{short_sha(classifier.weights_sha256)}), found others ({short_sha(describer.weights_sha256)})"
        )
    if describer.dim != classifier.svm.weights.shape[1]:
        raise ModelError(
            f"expected a classifier of {describer.dim} values, as in its recipe, "
            f"found {classifier.svm.weights.shape[1]}"
        )
    return describer


class _Row(NamedTuple):
    """A row to score: its descriptor, or the reason why there is none."""

    name: str
    descriptor: np.ndarray | None
    error: str | None
    root: str
    path: str


def _describe_images(images: ImageList, shown: Callable[[Item], str], describer: Describer) -> Iterator[_Row]:
    for one in describer.describe(images.items):
        item = images.items[one.position]
        yield _Row(item.name, *one.row(), images.root, shown(item))


def _describe_store(store: Store, describer: Describer) -> Iterator[_Row]:
    """The images or windows that a store's rows are named after; windows in the order of the rows."""
    items: list[Item] = []
    names: list[list[str]] = []
    for _, group in groupby(
        (_row_item(store, name) for name in store.names), key=lambda row: (row.item.path, row.kind)
    ):
        rows = list(group)
        first = rows[0]
        if first.kind == "window":
            windows = np.array([row.window for row in rows], np.float64)
            items.append(replace(first.item, windows=windows))
            names.append([row.name for row in rows])
        else:  # a duplicate name is described as often as it occurs
            items += [row.item for row in rows]
            names += [[row.name] for row in rows]
    if describer.recipe.crop != "none" and any(item.windows is not None for item in items):
        raise UsageError(
            f"{store.place}: expected images, found windows: the classifier's recipe crops "
            f"({describer.recipe.crop}), and windows cannot be cropped"
        )
    ready: dict[int, Described] = {}
    position = 0
    for one in describer.describe(items):
        ready[one.position] = one
        while (done := ready.pop(position, None)) is not None:
            yield from (_Row(name, *done.row(at), store.source_root, name) for at, name in enumerate(names[position]))
            position += 1


class _RowItem(NamedTuple):
    """The image that a row is named after, and its window if it has one; refused: its name is not followed."""

    name: str
    item: Item
    window: Box | None = None
    refused: bool = False

    @property
    def kind(self) -> str:
        return "refused" if self.refused else "image" if self.window is None else "window"


def _row_item(store: Store, name: str) -> _RowItem:
    if (reason := unsafe_name(name)) is not None:
        problem = f"the name {reason}, and is not followed"
        return _RowItem(name, Item("", name, problem=problem), refused=True)
    return _RowItem(name, *item_of(store.source_root, name))


def _fitting_view(store: Store, classifier: Classifier) -> DescriptorView | str:
    """The store's descriptors as the classifier takes them, or the reason why they do not fit."""
    recipe, reason = classifier.recipe, "was made with other weights"
    branches = recipe.branches()
    # All parts, or those of some layers or backbones.
    parts = [None, [name for one in branches for name in one.layers], [one.backbone for one in branches]]
    for only in parts:
        try:
            view = DescriptorView(store, levels=recipe.levels, only=only)
        except UsageError:
            if only is not None:
                continue
            view = DescriptorView(store)
        if view.weights_sha256 == classifier.weights_sha256:
            differences = recipe.differences(view.recipe, ("model", "store"))
            if not differences:
                return view
            reason = f"was made with another recipe ({'; '.join(differences)})"
    return reason


def _predict_rows(classifier: Classifier, store: Store, view: DescriptorView) -> Iterator[Prediction]:
    require_complete(store)
    for first in range(0, len(store), _BLOCK_ROWS):
        rows = np.arange(first, min(first + _BLOCK_ROWS, len(store)))
        part = slice(first, first + len(rows))
        done = store.states[part] == Status.DONE
        scores = iter(classifier.svm.scores(view, rows[done], names=store.names) if done.any() else ())
        for name, is_done, reason in zip(store.names[part], done, store.error[part], strict=True):
            if is_done:
                yield Prediction(name, next(scores), None, store.source_root, name)
            else:
                yield Prediction(name, None, reason_text(reason), store.source_root, name)
