"""Learning classes: images at the scale of an epoch, through the network, the pyramid and a linear head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from sppfeat.backbones.backbone import Trunk
from sppfeat.errors import ImageError
from sppfeat.images import Item, prepare_image
from sppfeat.pyramid.pooling import pool_pyramid
from sppfeat.recipe import Recipe
from sppfeat.settings import quiet_pillow
from sppfeat.training import ahead
from sppfeat.training.passes import Passes
from sppfeat.training.trunks import TunedTrunk
from sppfeat.tuning.options import TuningOptions

# Images of one pass on a processor: activations of a batch are kept for its gradient, some 60 MB per image at 224.
_PASS: Final = 8
_PASS_ON_GPU: Final = 64


class Pixels(NamedTuple):
    """One image of a batch, [H, W, 3] uint8, and its class."""

    pixels: np.ndarray
    label: int


def descriptors(maps: Sequence[torch.Tensor], recipe: Recipe) -> torch.Tensor:
    """[N, D] of each layer's maps [N, C, h, w], as the recipe makes them, in float32."""
    rows = [pool_pyramid(one, recipe.levels, pooling=recipe.pooling, gem_p=recipe.gem_p) for one in maps]
    return torch.cat([_normalized(one, recipe.normalize) for one in rows], 1)


def _normalized(rows: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "none":
        return rows
    if kind == "signed-sqrt-l2":
        # The root's slope is infinite at 0.
        rows = rows.sign() * (rows.abs() + 1e-6).sqrt()
    return F.normalize(rows, dim=1, eps=1e-12)


@dataclass(frozen=True)
class Examples:
    """Images with their classes, as numbers from 0."""

    items: list[Item]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.items)


class ClassLearner:
    """Learns the classes of images; a `sppfeat.training.learning.Learner`.

    Batch norms stay as they are: an image's gradient does not depend on the others of its batch, and images of
    different shapes go through the network one after the other, never padded. Half of the images are mirrored.
    failed: told the name and the reason of an image that cannot be read. seen: told the name of each training image.
    """

    def __init__(
        self,
        trunk: Trunk,
        head: nn.Linear,
        train: Examples,
        held: Examples,
        options: TuningOptions,
        device: torch.device,
        failed: Callable[[str, str], None],
        seen: Callable[[str], None],
    ) -> None:
        self._recipe = trunk.recipe
        self.network = TunedTrunk(trunk, options.from_layer)
        self.module: nn.Module = nn.ModuleDict({"network": self.network, "head": head}).to(device)
        rate = options.learning_rate
        self.groups: Sequence[dict[str, Any]] = [
            {"params": self.network.tuned, "lr": rate},
            {"params": list(head.parameters()), "lr": rate * options.head_rate},
        ]
        self._train, self._held, self._options, self._device = train, held, options, device
        self._failed, self._seen = failed, seen
        self._head, self._runner = head, Passes(device)
        self._parameters = [*self.network.tuned, *head.parameters()]

    def steps(self) -> int:
        return -(-len(self._train) // self._options.batch_size)

    def batches(self, epoch: int, first: int) -> Iterator[list[Pixels]]:
        random = np.random.default_rng([self._options.seed, epoch])
        order = random.permutation(len(self._train))
        mirrored = random.random(len(self._train)) < 0.5
        size = self._options.batch_size
        chunks = [order[start : start + size] for start in range(first * size, len(order), size)]
        scale = self._options.scale_of(epoch)
        for chunk, batch in zip(chunks, self._decoded(self._train, chunks, scale), strict=True):
            pairs = zip(chunk, batch, strict=True)
            yield [
                each._replace(pixels=each.pixels[:, ::-1]) if mirrored[at] else each
                for at, each in pairs
                if each is not None
            ]

    def backward(self, batch: list[Pixels]) -> tuple[float, int]:
        def loss_of(one: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            images, labels = one
            return F.cross_entropy(self._scores(images), labels, reduction="sum")

        total = self._runner.backward(self._passes(batch), loss_of, self._parameters, 1 / max(len(batch), 1))
        return total, len(batch)

    def held_out(self) -> float | None:
        if not len(self._held):
            return None
        size = self._options.batch_size
        chunks = [np.arange(start, min(start + size, len(self._held))) for start in range(0, len(self._held), size)]

        def hits(one: tuple[torch.Tensor, torch.Tensor]) -> int:
            images, labels = one
            with torch.no_grad():
                return int((self._scores(images).argmax(1) == labels).sum())

        right = count = 0
        for batch in self._decoded(self._held, chunks, self._options.test_scale, told=False):
            readable = [each for each in batch if each is not None]
            right += sum(self._runner.run(self._passes(readable), hits))
            count += len(readable)
        return 100 * right / count if count else None

    def _scores(self, images: torch.Tensor) -> torch.Tensor:
        half = self._device.type == "cuda" and self._options.precision != "float32"
        with torch.autocast("cuda", getattr(torch, self._options.precision), enabled=half):
            maps = self.network(images)
        scores: torch.Tensor = self._head(descriptors(maps, self._recipe))
        return scores

    def _passes(self, batch: list[Pixels]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Images of one shape, and their labels, on the device."""
        shapes: dict[tuple[int, ...], list[Pixels]] = {}
        for each in batch:
            shapes.setdefault(each.pixels.shape, []).append(each)
        most = _PASS if self._device.type == "cpu" else _PASS_ON_GPU
        for alike in shapes.values():
            for start in range(0, len(alike), most):
                some = alike[start : start + most]
                pixels = torch.from_numpy(np.stack([each.pixels for each in some])).to(self._device)
                yield pixels, torch.tensor([each.label for each in some], device=self._device)

    def _decoded(
        self, examples: Examples, chunks: Sequence[np.ndarray], scale: int, *, told: bool = True
    ) -> Iterator[list[Pixels | None]]:
        """Chunk by chunk, the images at a scale; None for one that cannot be read. The next chunks are decoded
        meanwhile."""
        recipe = replace(self._recipe, scales=(scale,))

        def prepared(at: int) -> Pixels | str:
            try:
                with quiet_pillow:
                    return Pixels(prepare_image(examples.items[at], recipe).inputs[0], int(examples.labels[at]))
            except ImageError as error:
                return str(error)

        for chunk, results in zip(chunks, ahead((chunk.tolist() for chunk in chunks), prepared), strict=True):
            found: list[Pixels | None] = []
            for at, result in zip(chunk, results, strict=True):
                name = examples.items[int(at)].name
                if isinstance(result, str):
                    self._failed(name, result)
                if told:
                    self._seen(name)
                found.append(None if isinstance(result, str) else result)
            yield found
