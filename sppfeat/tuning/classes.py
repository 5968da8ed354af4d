"""Learning classes: images at the scale of an epoch, through the network, the pyramid and a linear head."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from sppfeat.backbones.backbone import Trunk
from sppfeat.errors import ImageError
from sppfeat.images import Item, prepare_image
from sppfeat.machine import available_cores
from sppfeat.pyramid.pooling import pool_pyramid
from sppfeat.recipe import Recipe
from sppfeat.settings import quiet_pillow
from sppfeat.tuning.options import TuningOptions

# Images of one pass on a processor: activations of a batch are kept for its gradient, some 60 MB an image at 224.
_PASS: Final = 8
_PASS_ON_CARD: Final = 64


class Pixels(NamedTuple):
    """One image of a batch, [H, W, 3] uint8, and its class."""

    pixels: np.ndarray
    label: int


class Network(nn.Module):
    """From uint8 images [N, H, W, 3] of one size to descriptors [N, D] as the recipe makes them, in float32."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, trunk: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.trunk = trunk
        self._recipe = recipe
        mean, std = (torch.tensor(each, dtype=torch.float64) for each in (recipe.mean, recipe.std))
        self.register_buffer("scale", (1 / (255 * std)).float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).float().view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        inputs = images.permute(0, 3, 1, 2).float() * self.scale + self.shift
        recipe = self._recipe
        rows = [
            pool_pyramid(one.float(), recipe.levels, pooling=recipe.pooling, gem_p=recipe.gem_p)
            for one in self.trunk(inputs)
        ]
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
        self._recipe = replace(trunk.recipe, scales=(options.test_scale,))
        self.network = Network(trunk.module, trunk.recipe)
        self.module: nn.Module = nn.ModuleDict({"network": self.network, "head": head}).to(device).eval()
        tuned = trunk.parameters_from(options.from_layer)
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)
        for parameter in (*tuned, *head.parameters()):
            parameter.requires_grad_(True)
        rate = options.learning_rate
        self.groups: Sequence[dict[str, Any]] = [
            {"params": tuned, "lr": rate},
            {"params": list(head.parameters()), "lr": rate * options.head_rate},
        ]
        self._train, self._held, self._options, self._device = train, held, options, device
        self._failed, self._seen = failed, seen
        self._head = head

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
        total = 0.0
        for images, labels in self._passes(batch):
            loss = F.cross_entropy(self._scores(images), labels, reduction="sum")
            (loss / len(batch)).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total, len(batch)

    def held_out(self) -> float | None:
        if not len(self._held):
            return None
        size = self._options.batch_size
        chunks = [np.arange(start, min(start + size, len(self._held))) for start in range(0, len(self._held), size)]
        right = count = 0
        with torch.no_grad():
            for batch in self._decoded(self._held, chunks, self._options.test_scale, told=False):
                for images, labels in self._passes([each for each in batch if each is not None]):
                    right += int((self._scores(images).argmax(1) == labels).sum())
                    count += len(labels)
        return 100 * right / count if count else None

    def _scores(self, images: torch.Tensor) -> torch.Tensor:
        half = self._device.type == "cuda" and self._options.precision != "float32"
        with torch.autocast("cuda", getattr(torch, self._options.precision), enabled=half):
            rows = self.network(images)
        scores: torch.Tensor = self._head(rows.float())
        return scores

    def _passes(self, batch: list[Pixels]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Images of one shape, and their labels, on the device."""
        shapes: dict[tuple[int, ...], list[Pixels]] = {}
        for each in batch:
            shapes.setdefault(each.pixels.shape, []).append(each)
        most = _PASS if self._device.type == "cpu" else _PASS_ON_CARD
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

        waiting: deque[tuple[np.ndarray, list[Future[Pixels | str]]]] = deque()
        with ThreadPoolExecutor(available_cores(), thread_name_prefix="decode") as decoders:
            try:
                for number, chunk in enumerate([*chunks, None, None]):
                    if chunk is not None:
                        waiting.append((chunk, [decoders.submit(prepared, int(at)) for at in chunk]))
                    if waiting and (number >= 2 or len(waiting) > 2):
                        yield self._finished(examples, *waiting.popleft(), told=told)
                while waiting:
                    yield self._finished(examples, *waiting.popleft(), told=told)
            finally:
                decoders.shutdown(cancel_futures=True)

    def _finished(
        self, examples: Examples, chunk: np.ndarray, futures: list[Future[Pixels | str]], *, told: bool
    ) -> list[Pixels | None]:
        found: list[Pixels | None] = []
        for at, future in zip(chunk, futures, strict=True):
            result, name = future.result(), examples.items[int(at)].name
            if isinstance(result, str):
                self._failed(name, result)
            if told:
                self._seen(name)
            found.append(None if isinstance(result, str) else result)
        return found
