"""The devices of this machine."""

from __future__ import annotations

import ctypes
import functools
import sys
import warnings
from importlib.metadata import version

from sppfeat.errors import DeviceError, SppFeatWarning, UsageError, one_line


def resolve_device(name: str) -> str:
    """The device of that name, as `cpu` or `cuda:N`; `auto` takes a GPU if there is one, and warns with a
    SppFeatWarning if it cannot be used. Raises DeviceError if the device is not available, UsageError for several
    devices.
    """
    if "," in name:
        raise UsageError(f"device {name}: expected one device here, found several")
    if name == "cpu":
        return "cpu"
    if name == "auto":
        if not has_driver():
            return "cpu"
        usable, complaint = _usable_gpus()
        if not usable and complaint:
            warnings.warn(
                f"the GPU cannot be used ({complaint}); falling back to the CPU", SppFeatWarning, stacklevel=2
            )
        return "cuda:0" if usable else "cpu"
    usable, complaint = _usable_gpus()
    number = int(name.partition(":")[2] or 0)
    if number >= usable:
        import torch

        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        raise DeviceError(
            f"device {name}: expected an NVIDIA GPU, found {usable or 'none'} usable ({complaint or built})"
        )
    return f"cuda:{number}"


@functools.cache
def has_driver() -> bool:
    """Whether torch may find a GPU here. Without a driver there is no point in asking it, which takes seconds."""
    if "rocm" in version("torch"):
        return True
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _usable_gpus() -> tuple[int, str]:
    """The number of usable GPUs, and torch's complaint if it cannot use one, such as a driver that is too old."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    complaints = [one_line(warning.message) for warning in said if isinstance(warning.message, Warning)]
    # A machine without a GPU is no reason to complain.
    return usable, next((text for text in complaints if "no NVIDIA driver" not in text), "")
