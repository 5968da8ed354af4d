"""Where the cells of a feature map lie in the image: plain arithmetic over the layers that lead to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sppfeat.errors import BackboneError


@dataclass(frozen=True)
class Geometry:
    """One axis of a feature map, in input pixels.

    Cell i is centered on pixel `offset + stride * i`, and depends on the pixels up to (receptive_field - 1) / 2 away
    from it. `size` is the number of cells. Gates that see the whole image (squeeze-and-excitation) do not count.
    """

    size: int
    stride: int
    offset: float
    receptive_field: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """The effect of a layer along one axis: a window that slides over its input.

    inputs: its inputs, 0 for the image and n for the n-th step; several inputs are merged (a sum, a concatenation)
    first. extent: cells from a window's first to its last. before, after: cells of padding. same: padded as
    TensorFlow's "SAME" instead. ceil_mode: the last window may reach beyond the input.
    """

    name: str
    inputs: tuple[int, ...]
    extent: int = 1
    stride: int = 1
    before: int = 0
    after: int = 0
    same: bool = False
    ceil_mode: bool = False


def follow(steps: Sequence[Step], length: int) -> Geometry:
    """Geometry of the last step's output along an axis of `length` input pixels.

    It depends on the length, because "SAME" padding does. Raises BackboneError for an axis that is too short.
    """
    known = [Geometry(length, 1, 0.0, 1)]
    for step in steps:
        known.append(_through(step, _join([known[place] for place in step.inputs])))
    return known[-1]


def _join(branches: list[Geometry]) -> Geometry:
    """Where branches are merged, a cell sees the union of what each branch sees."""
    if len({branch.stride for branch in branches}) > 1:
        raise BackboneError("the geometry of the layer cannot be derived: branches of different strides are merged")
    first = min(branch.offset - (branch.receptive_field - 1) / 2 for branch in branches)
    last = max(branch.offset + (branch.receptive_field - 1) / 2 for branch in branches)
    widest = max(branches, key=lambda branch: branch.receptive_field)
    return Geometry(min(b.size for b in branches), widest.stride, (first + last) / 2, round(last - first) + 1)


def _through(step: Step, axis: Geometry) -> Geometry:
    if step.same:
        # TensorFlow's padding: ceil(size / stride) cells, the odd pixel of padding at the end.
        size = math.ceil(axis.size / step.stride)
        before = max((size - 1) * step.stride + step.extent - axis.size, 0) // 2
    else:
        before = step.before
        free = axis.size + before + step.after - step.extent
        size = (math.ceil(free / step.stride) if step.ceil_mode else free // step.stride) + 1
        if step.ceil_mode and (size - 1) * step.stride >= axis.size + before:
            size -= 1
    if size < 1 or axis.size < 1:
        raise BackboneError(f"{axis.size} cells are too few for layer {step.name}, which needs {step.extent}")
    return Geometry(
        size=size,
        stride=axis.stride * step.stride,
        offset=axis.offset + ((step.extent - 1) / 2 - before) * axis.stride,
        receptive_field=axis.receptive_field + (step.extent - 1) * axis.stride,
    )
