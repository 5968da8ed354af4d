"""Rows as they are stored, made by torch where the network runs: half the bytes to copy, and no work for processors."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def stored_rows(layers: Sequence[torch.Tensor], normalize: str, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The pooled rows [N, D of the layer] of each layer, each normalized, side by side in the store's type [N, D].

    With the largest absolute value of each row, float32 [N], not finite if a value is not. normalize, dtype: a
    recipe's. The arithmetic is that of `sppfeat.extraction.values`, sums in another order.
    """
    rows = torch.cat([_normalized(each.float(), normalize) for each in layers], 1)
    return rows.to(getattr(torch, dtype)), rows.abs().amax(1)


def _normalized(rows: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "none":
        return rows
    if kind == "signed-sqrt-l2":
        rows = rows.abs().sqrt().copysign(rows)
    lengths: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / lengths.clamp_min(1e-12)


def copied_out(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors on the processor; from a GPU by way of pinned memory, while other threads' passes run on it."""
    if tensors[0].device.type != "cuda":
        return [each.cpu() for each in tensors]
    held = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in tensors]
    for to, each in zip(held, tensors, strict=True):
        to.copy_(each, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()
    copied.synchronize()  # Python's lock is free meanwhile
    return held
