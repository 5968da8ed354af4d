"""Learning to tell windows apart and to move them: Fast R-CNN's batches and losses, on the pyramid.

Source: Girshick, "Fast R-CNN", ICCV 2015 (arXiv:1504.08083), section 2.3: two images a step, 64 windows of each, a
quarter of them objects (overlap at least 0.5), the others with an overlap from 0.1 to 0.5; softmax over the classes and
the background, smooth L1 of the box targets of a window's own class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from sppfeat.backbones import Description
from sppfeat.backbones.backbone import Trunk
from sppfeat.detection.annotations import AnnotatedImages, Annotation
from sppfeat.detection.average_precision import Objects, voc_average_precision
from sppfeat.detection.detecting import DetectOptions, Found, find_in
from sppfeat.detection.detector import Detector
from sppfeat.errors import ImageError
from sppfeat.images import prepare_image
from sppfeat.pyramid.pooling import pool_rois
from sppfeat.recipe import Recipe
from sppfeat.settings import quiet_pillow
from sppfeat.svm.logistic import LogisticProblem
from sppfeat.training import LearningOptions, ahead
from sppfeat.training.heads import start_head
from sppfeat.training.passes import Passes
from sppfeat.training.trunks import TunedTrunk
from sppfeat.windows import ProposalOptions, box_targets, fit_ridge, map_windows, outside, overlaps

IMAGES: Final = 2
WINDOWS: Final = 64
POSITIVES: Final = 0.25
POSITIVE_OVERLAP: Final = 0.5
NEGATIVE_OVERLAP: Final = 0.1
# Of the heads that learning starts from, on descriptors of mean length 1: C of logistic regression, the ridge of box
# regression, how exact the first is, and the most memory for descriptors.
HEAD_COST: Final = 1.0
HEAD_RIDGE: Final = 0.5
_HEAD_TOLERANCE: Final = 1e-3
_HEAD_BYTES: Final = 1 << 30
# The fewest windows that an image gives the heads; of very many images, some are left out.
_FEWEST_WINDOWS: Final = 16
# Usual spreads of box targets, which bring the four to one size.
TARGET_SPREAD: Final = (0.1, 0.1, 0.2, 0.2)


@dataclass(frozen=True)
class Sample:
    """One image of a step: pixels [H, W, 3] uint8 at a scale, and windows [K, 4] of the original of `size`.

    labels: [K] class numbers, the number of classes for the background. targets: [K, 4], of objects alone.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    windows: np.ndarray
    labels: np.ndarray
    targets: np.ndarray


def sample_windows(
    annotation: Annotation,
    labels: np.ndarray,
    windows: np.ndarray,
    classes: int,
    random: np.random.Generator,
    count: int = WINDOWS,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Up to `count` of an image's windows [K, 4] with labels [K] and box targets [K, 4]; its objects are windows, too.

    labels: [G] class numbers of the annotated boxes, -1 for those of other classes. Windows on difficult objects and
    on those of other classes are neither objects nor background. Where no window overlaps an object by 0.1 to 0.5,
    those that overlap one by less are the background.
    """
    counted = ~annotation.difficult & (labels >= 0)
    places = np.concatenate([annotation.boxes[counted], windows])
    if not len(annotation.boxes):
        chosen = random.permutation(len(places))[:count]
        return places[chosen], np.full(len(chosen), classes), np.zeros((len(chosen), 4))
    touched = overlaps(places, annotation.boxes, crowd=annotation.crowd)
    best = touched.argmax(1)
    most = touched.max(1)
    is_object = (most >= POSITIVE_OVERLAP) & counted[best]
    is_background = (most < POSITIVE_OVERLAP) & (most >= NEGATIVE_OVERLAP)
    if not is_background.any():  # then windows far from any object serve as well
        is_background = most < POSITIVE_OVERLAP
    objects = random.permutation(np.flatnonzero(is_object))[: round(POSITIVES * count)]
    background = random.permutation(np.flatnonzero(is_background))[: count - len(objects)]
    chosen = np.concatenate([objects, background])
    found = np.concatenate([labels[best[objects]], np.full(len(background), classes)])
    targets = np.zeros((len(chosen), 4))
    targets[: len(objects)] = box_targets(places[objects], annotation.boxes[best[objects]])
    return places[chosen], found, targets


def mirrored(sample: Sample) -> Sample:
    """The mirror image, with its windows."""
    width = sample.size[0]
    windows = sample.windows.copy()
    windows[:, [0, 2]] = width - 1 - sample.windows[:, [2, 0]]
    targets = sample.targets * [-1, 1, 1, 1]
    return replace(sample, pixels=sample.pixels[:, ::-1], windows=windows, targets=targets)


class WindowLearner:
    """Learns the classes of windows; a `sppfeat.training.learning.Learner`.

    names, held: of the images that are learned from, and of those that the best epoch is chosen by, by mAP.
    factor: descriptors are multiplied by it, so that their mean length is 1.
    """

    def __init__(
        self,
        trunk: Trunk,
        descriptions: Sequence[Description],
        annotated: AnnotatedImages,
        windows: Mapping[str, np.ndarray],
        classes: list[str],
        names: list[str],
        held: list[str],
        options: LearningOptions,
        device: torch.device,
        failed: Callable[[str, str], None],
        seen: Callable[[str], None],
    ) -> None:
        self._recipe, self._descriptions = trunk.recipe, descriptions
        self._annotated, self._windows, self.classes = annotated, windows, classes
        self._names, self._held, self._options, self._device = names, held, options, device
        self._failed, self._seen = failed, seen
        self.network = TunedTrunk(trunk, options.from_layer)
        dim = trunk.recipe.bins * sum(each.channels for each in descriptions)
        self.scores, self.moves = nn.Linear(dim, len(classes) + 1), nn.Linear(dim, 4 * len(classes))
        for linear in (self.scores, self.moves):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.module: nn.Module = nn.ModuleDict(
            {"network": self.network, "scores": self.scores, "moves": self.moves}
        ).to(device)
        self.factor, self._runner = 1.0, Passes(device)
        self._parameters = [*self.network.tuned, *self.scores.parameters(), *self.moves.parameters()]
        rate = options.learning_rate
        self.groups: Sequence[dict[str, Any]] = [
            {"params": self.network.tuned, "lr": rate},
            {"params": [*self.scores.parameters(), *self.moves.parameters()], "lr": rate * options.head_rate},
        ]

    def steps(self) -> int:
        return -(-len(self._names) // IMAGES)

    def batches(self, epoch: int, first: int) -> Iterator[list[Sample]]:
        random = np.random.default_rng([self._options.seed, epoch])
        order = random.permutation(len(self._names))
        is_mirrored = random.random(len(self._names)) < 0.5
        chunks = [order[start : start + IMAGES].tolist() for start in range(first * IMAGES, len(order), IMAGES)]
        scales = self._options.scales or self._recipe.scales
        scale = scales[(epoch - 1) % len(scales)]

        def prepared(at: int) -> Sample | str:
            name = self._names[at]
            found = self._read(name, scale)
            if isinstance(found, str):
                return found
            annotation = self._annotated.images[name]
            places, labels, targets = sample_windows(
                annotation,
                self._labels(annotation),
                self._inside(name),
                len(self.classes),
                np.random.default_rng([self._options.seed, epoch, at]),
            )
            sample = replace(found, windows=places, labels=labels, targets=targets)
            return mirrored(sample) if is_mirrored[at] else sample

        for chunk, results in zip(chunks, ahead(iter(chunks), prepared), strict=True):
            samples = []
            for at, result in zip(chunk, results, strict=True):
                if isinstance(result, str):
                    self._failed(self._names[at], result)
                else:
                    samples.append(result)
                self._seen(self._names[at])
            yield samples

    def backward(self, batch: list[Sample]) -> tuple[float, int]:
        count = sum(len(sample.labels) for sample in batch)

        def loss_of(sample: Sample) -> torch.Tensor:
            rows = self.descriptors(sample)
            labels = torch.from_numpy(sample.labels).to(self._device)
            loss = F.cross_entropy(self.scores(rows), labels, reduction="sum")
            objects = torch.nonzero(labels < len(self.classes)).squeeze(1)
            if len(objects):
                moves = self.moves(rows[objects]).view(len(objects), len(self.classes), 4)
                moves = moves[torch.arange(len(objects)), labels[objects]]
                wanted = torch.from_numpy(sample.targets / TARGET_SPREAD).float().to(self._device)[objects]
                loss = loss + F.smooth_l1_loss(moves, wanted, reduction="sum")
            return loss

        passes = [sample for sample in batch if len(sample.labels)]
        return self._runner.backward(passes, loss_of, self._parameters, 1 / max(count, 1)), count

    def held_out(self) -> float | None:
        """mAP on held-out images, in percent."""
        if not self._held:
            return None
        detector, options = self.detector(self._recipe, ""), DetectOptions(threshold=0.01)
        objects: list[list[Objects]] = [[] for _ in self.classes]
        scale = self._recipe.scales[0]

        def found_in(name: str) -> Found | str:
            found = self._read(name, scale)
            if isinstance(found, str):
                return found
            windows = self._inside(name)
            with torch.no_grad():
                rows = self.descriptors(replace(found, windows=windows)) / self.factor
            return find_in(detector, rows.cpu().numpy(), windows, found.size, options)

        for name, result in zip(self._held, self._runner.run(self._held, found_in), strict=True):
            if isinstance(result, str):
                self._failed(name, result)
                continue
            annotation = self._annotated.images[name]
            for label, known in enumerate(self.classes):
                of = np.array([each == known for each in annotation.labels], bool)
                mine = result.labels == label
                truth = annotation.boxes[of], annotation.difficult[of], annotation.crowd[of]
                objects[label].append(Objects(*truth, result.boxes[mine], result.ranks[mine]))
        values = [voc_average_precision(images) for images in objects]
        known_values = [value for value in values if not np.isnan(value)]
        return 100 * float(np.mean(known_values)) if known_values else None

    def descriptors(self, sample: Sample) -> torch.Tensor:
        """[K, D] of a sample's windows, times the factor."""
        half = self._device.type == "cuda" and self._options.precision != "float32"
        pixels = torch.from_numpy(np.array(sample.pixels))[None].to(self._device)
        with torch.autocast("cuda", getattr(torch, self._options.precision), enabled=half):
            maps = self.network(pixels)
        height, width = sample.pixels.shape[:2]
        parts = []
        for of_layer, description in zip(maps, self._descriptions, strict=True):
            rows, columns = description.geometry(height, width)
            rois = torch.from_numpy(map_windows(sample.windows, sample.size, (width, height), columns, rows))
            parts.append(
                pool_rois(of_layer[0], rois.to(self._device), self._recipe.levels, pooling=self._recipe.pooling)
            )
        return self.factor * torch.cat(parts, 1)

    def detector(self, recipe: Recipe, weights_sha256: str) -> Detector:
        """What is learned, for descriptors without the factor."""
        with torch.no_grad():
            spread = torch.tensor(TARGET_SPREAD)
            scores = (self.factor * self.scores.weight).cpu().numpy(), self.scores.bias.cpu().numpy()
            moves = self.moves.weight.cpu().view(len(self.classes), 4, -1) * self.factor * spread[None, :, None]
            shifts = self.moves.bias.cpu().view(len(self.classes), 4) * spread
        return Detector(
            recipe=recipe,
            weights_sha256=weights_sha256,
            classes=self.classes,
            weights=np.ascontiguousarray(scores[0][:-1]),
            biases=np.ascontiguousarray(scores[1][:-1]),
            background=np.append(scores[0][-1], scores[1][-1]).astype(np.float32),
            box_weights=moves.numpy(),
            box_biases=shifts.numpy(),
            proposals=ProposalOptions(),
            training={},
            versions={},
        )

    def set_factor(self, names: Sequence[str]) -> None:
        """Choose the factor by the windows of some images."""
        lengths = []
        for name in names:
            found = self._read(name, self._recipe.scales[0])
            windows = self._inside(name)
            if not isinstance(found, str) and len(windows):
                with torch.no_grad():
                    lengths.append(float(self.descriptors(replace(found, windows=windows)).norm(dim=1).mean()))
        self.factor /= float(np.mean(lengths)) if lengths else 1.0

    def start_heads(self) -> str | None:
        """Start from the best heads on the untuned network, logistic regression and ridge regression: heads that know
        nothing would first spoil the network that they learn on (Kumar et al., "Fine-Tuning can Distort Pretrained
        Features and Underperform Out-of-Distribution", ICLR 2022). Returns what to note: that they did not converge.
        """
        dim, scale = self.scores.in_features, self._recipe.scales[0]
        room = _HEAD_BYTES // (4 * dim)
        most = int(np.clip(room // len(self._names), _FEWEST_WINDOWS, WINDOWS))
        some = np.random.default_rng([self._options.seed, 1]).permutation(len(self._names))[: max(1, room // most)]

        def described(at: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | str:
            name = self._names[at]
            found = self._read(name, scale)
            if isinstance(found, str):
                return found
            annotation, random = self._annotated.images[name], np.random.default_rng([self._options.seed, 0, at])
            drawn = self._labels(annotation), self._inside(name), len(self.classes), random, most
            places, labels, targets = sample_windows(annotation, *drawn)
            with torch.no_grad():
                return self.descriptors(replace(found, windows=places)).cpu().numpy(), labels, targets

        parts = [(np.zeros((0, dim), np.float32), np.zeros(0, np.int64), np.zeros((0, 4)))]
        chosen = np.sort(some).tolist()
        for at, result in zip(chosen, self._runner.run(chosen, described), strict=True):
            if isinstance(result, str):
                self._failed(self._names[at], result)
            else:
                parts.append(result)
        rows, labels, targets = (np.concatenate(each) for each in zip(*parts, strict=True))
        if not (labels < len(self.classes)).any():
            return None
        problem = LogisticProblem(rows, np.arange(len(rows)), device=str(self._device))
        solution = problem.solve(labels, len(self.classes) + 1, c=HEAD_COST, tolerance=_HEAD_TOLERANCE)
        start_head(self.scores, *problem.weights(solution), labels)
        with torch.no_grad():
            moves = self.moves.weight.view(len(self.classes), 4, dim), self.moves.bias.view(len(self.classes), 4)
            for label in range(len(self.classes)):
                mine = labels == label
                if mine.any():
                    fitted = fit_ridge(rows[mine], targets[mine] / TARGET_SPREAD, HEAD_RIDGE)
                    for head, values in zip(moves, fitted, strict=True):
                        head[label] = torch.from_numpy(values)
        if solution.gap <= _HEAD_TOLERANCE:
            return None
        return f"the heads start from a fit that did not converge: gap {solution.gap:.1e}, wanted {_HEAD_TOLERANCE:g}"

    def _read(self, name: str, scale: int | str) -> Sample | str:
        try:
            with quiet_pillow:
                prepared = prepare_image(self._annotated.item(name), replace(self._recipe, scales=(scale,)))
        except ImageError as error:
            return str(error)
        none = np.zeros((0, 4))
        return Sample(prepared.inputs[0], prepared.size, none, np.zeros(0, np.int64), none)

    def _inside(self, name: str) -> np.ndarray:
        """[K, 4] the windows of an image that lie inside it."""
        windows = np.asarray(self._windows.get(name, np.zeros((0, 4))), np.float64)
        found: np.ndarray = windows[~outside(windows, self._annotated.images[name].size)]
        return found

    def _labels(self, annotation: Annotation) -> np.ndarray:
        return np.array([self.classes.index(x) if x in self.classes else -1 for x in annotation.labels], np.int64)
