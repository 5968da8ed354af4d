"""Files of tuned weights: checked before the work, and written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sppfeat.errors import ModelError
from sppfeat.files import appearing, check_new_file

_KIND: Final = "a file of weights"


def check_weights_file(path: Path, *, overwrite: bool) -> Path:
    """The path, if weights may be written there; see `check_new_file`. Raises ModelError."""
    return check_new_file(path, overwrite=overwrite, error=ModelError, kind=_KIND, other=_other_than_weights)


def _other_than_weights(path: Path) -> str | None:
    try:
        with safe_open(path, "np"):
            return None
    except Exception:  # whatever the reader says of another file
        return "another file"


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, str]) -> None:
    """Write tensors, and texts about them, to a .safetensors file. Raises ModelError, such as on a full disk."""
    # Tensors that share memory are refused by the format.
    copies = {name: one.detach().cpu().clone(memory_format=torch.contiguous_format) for name, one in tensors.items()}
    with appearing(path, ModelError) as partial:
        try:
            save_file(copies, partial, dict(about))
        except SafetensorError as error:  # it wraps what the system says
            raise OSError(str(error)) from None
