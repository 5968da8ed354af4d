"""What this machine has to compute with."""

from __future__ import annotations

import os

import torch

from sppfeat.errors import DeviceError, UsageError


def resolve_device(name: str) -> torch.device:
    """The device of that name; `auto` takes a GPU where there is one. Raises DeviceError when it is not there,
    UsageError for several."""
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda:0" if usable else "cpu")
    if "," in name:
        raise UsageError(f"device {name}: expected one device here, found several")
    if name.startswith("cuda"):
        number = int(name.partition(":")[2] or 0)
        if number >= usable:
            built = (
                f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
            )
            raise DeviceError(f"device {name}: expected an NVIDIA GPU, found {usable or 'none'} usable ({built})")
        return torch.device("cuda", number)
    return torch.device(name)


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
