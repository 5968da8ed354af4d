"""The state of a training run as one file of safetensors: no pickle, and whole or not there at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from sppfeat.errors import ModelError
from sppfeat.files import decode_document
from sppfeat.training.epoch import Epoch
from sppfeat.training.weights import save_tensors

_KEY: Final = "sppfeat"


class Progress(msgspec.Struct):
    """Where a run is.

    key: what it is made from. epoch, step: the next to be done. loss, count: sums over this epoch's images so far.
    seconds: of this epoch so far. best: number of the epoch that is kept.
    """

    key: str
    epoch: int = 1
    step: int = 0
    loss: float = 0.0
    count: int = 0
    seconds: float = 0.0
    best: int = 0
    history: list[Epoch] = []


def save_checkpoint(
    path: Path,
    progress: Progress,
    weights: Mapping[str, torch.Tensor],
    best: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a checkpoint. Raises ModelError where it cannot be written, such as on a full disk."""
    tensors = {f"weights.{name}": value for name, value in weights.items()}
    tensors |= {f"best.{name}": value for name, value in best.items()}
    for at, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if value is not None:
                tensors[f"optimizer.{at}.{name}"] = torch.as_tensor(value)
    save_tensors(path, tensors, {_KEY: msgspec.json.encode(progress).decode()})


def read_checkpoint(path: Path) -> tuple[Progress, dict[str, torch.Tensor]]:
    """What `save_checkpoint` wrote, on the CPU. Raises ModelError unless the file is a checkpoint and whole."""
    try:
        with safe_open(path, "pt") as file:
            body = (file.metadata() or {}).get(_KEY, "")
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: expected a checkpoint, found: {error}") from None
    return decode_document(body, Progress, what=f"{path}: checkpoint", error=ModelError), tensors


def restore(
    tensors: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    path: Path,
) -> dict[str, torch.Tensor]:
    """Put a checkpoint's weights and the optimizer's state in place; returns the best weights. Raises ModelError."""
    best = {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            at, _, field = rest.partition(".")
            state.setdefault(int(at), {})[field] = value
    with torch.no_grad():
        for name, value in weights.items():
            found = tensors.get(f"weights.{name}")
            if found is None or found.shape != value.shape or name not in best:
                raise ModelError(f"{path}: not a checkpoint of this network: {name} differs")
            value.copy_(found)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return best
