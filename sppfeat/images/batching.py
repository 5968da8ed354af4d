"""Batches of images of equal shape: nothing is ever padded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final, Generic, TypeVar

from sppfeat.images.unresized import Input

# An image of 448 x 448; memory is planned for a batch of `batch_size` of them.
FULL_BATCH_PIXELS: Final = 448 * 448
PATIENT_BATCHES: Final = 8
Key = TypeVar("Key")


class ShapeBatcher(Generic[Key]):
    """Groups inputs of equal shape into batches, depending only on their order.

    A batch holds `batch_size` images of up to `FULL_BATCH_PIXELS` each; larger images come in smaller batches,
    so that memory stays bounded. A group that is not full after `patience` further inputs is yielded as it is; so is
    the oldest group when all waiting groups reach the size of `PATIENT_BATCHES` full batches. A rare shape thus neither
    waits forever nor piles up. `most`, which may change meanwhile, has a lower limit for some shapes.
    """

    def __init__(
        self, batch_size: int, *, patience: int, most: Mapping[tuple[int, ...], int] = MappingProxyType({})
    ) -> None:
        self._batch_size = batch_size
        self._patience = patience
        self._most = most
        self._count = 0
        self._waiting = 0  # bytes
        self._groups: dict[tuple[int, ...], tuple[int, list[tuple[Key, Input]]]] = {}

    def add(self, key: Key, pixels: Input, *, share: int | None = None) -> Iterator[list[tuple[Key, Input]]]:
        """Add one input of shape [height, width, 3]; yield the batches that are now due. share: a smaller batch size,
        where fewer are due."""
        self._count += 1
        _, group = self._groups.setdefault(pixels.shape, (self._count, []))
        group.append((key, pixels))
        area = pixels.shape[0] * pixels.shape[1]
        self._waiting += pixels.nbytes
        full = min(share or self._batch_size, self._most.get(pixels.shape, self._batch_size), self._batch_size)
        if len(group) >= max(1, min(full, self._batch_size * FULL_BATCH_PIXELS // area)):
            yield self._take(pixels.shape)
        # Groups are in the order of their first input: only the first can be overdue.
        while self._groups:
            shape, (since, _) = next(iter(self._groups.items()))
            crowded = self._waiting > PATIENT_BATCHES * self._batch_size * FULL_BATCH_PIXELS * 3
            if self._count - since < self._patience and not crowded:
                break
            yield self._take(shape)

    def flush(self) -> Iterator[list[tuple[Key, Input]]]:
        """Yield every group that is left."""
        while self._groups:
            yield self._take(next(iter(self._groups)))

    def _take(self, shape: tuple[int, ...]) -> list[tuple[Key, Input]]:
        group = self._groups.pop(shape)[1]
        self._waiting -= sum(pixels.nbytes for _, pixels in group)
        return group
