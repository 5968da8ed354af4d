"""torch's settings while any thread computes; see `sppfeat.settings`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import torch

from sppfeat.settings import WhileAny


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    # Once a program sets `fp32_precision`, new in torch 2.9, torch refuses to read or write the older setting.
    if hasattr(cudnn, "conv"):
        changes: dict[Any, tuple[str, object]] = dict.fromkeys((cudnn.conv, cudnn.rnn), ("fp32_precision", "ieee"))
    else:
        changes = {cudnn: ("allow_tf32", False)}
    before = {place: getattr(place, name) for place, (name, _) in changes.items()}
    try:
        for place, (name, value) in changes.items():
            setattr(place, name, value)
        yield
    finally:
        for place, (name, _) in changes.items():
            setattr(place, name, before[place])


# cuDNN would round float32 to 10 bits (TF32): a GPU must give the values that a CPU gives.
exact_convolutions: Final = WhileAny(_exact)
