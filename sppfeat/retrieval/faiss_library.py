"""FAISS itself: how it is loaded, its errors and types, and moving an index to a GPU."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from sppfeat.errors import DeviceError, GalleryError, MissingExtraError, one_line, require_extra
from sppfeat.retrieval.segments import JoinedIndex


def load_faiss() -> ModuleType:
    """The module faiss. Raises MissingExtraError."""
    try:
        faiss = require_extra("faiss", "cpu", "similarity search")
    except RuntimeError as error:  # faiss-gpu without NVIDIA's libraries
        raise MissingExtraError(f"similarity search needs faiss, which fails to load: {one_line(error)}") from None
    # That version added the checks of an index from a file, graphs and sizes included.
    if not hasattr(faiss, "set_deserialization_vector_byte_limit"):
        raise MissingExtraError(
            f"similarity search needs faiss 1.15 or newer, found {faiss.__version__}: pip install -U 'sppfeat[cpu]'"
        )
    return faiss


def typed(index: Any) -> Any:
    """A new index as an object of its own class. FAISS's casts do not keep alive what they point to; this does."""
    found = load_faiss().downcast_index(index)
    if found is not index and index.thisown:
        index.this.disown()
        found.this.acquire()
    return found


@contextlib.contextmanager
def faiss_errors(factory: str) -> Iterator[None]:
    """Raise FAISS errors within the block as GalleryError, with the reason on one line."""
    try:
        yield
    except (RuntimeError, MemoryError, AssertionError) as error:
        raise GalleryError(f"index {factory!r}: FAISS fails ({faiss_reason(error)}); Flat always works") from None


def faiss_reason(error: BaseException) -> str:
    """FAISS's reason without the C++ function that raised it."""
    text = one_line(error)
    found = re.search(r"Error: '(.*?)' failed(?::\s*(.*))?$", text)
    if found:
        return found[2] or found[1]
    return re.sub(r"^Error in .* at \S+:\d+: ", "", text)


def on_device(index: Any, device: str) -> Any:
    """The index on a GPU, or unchanged for `cpu`. Raises DeviceError."""
    if device == "cpu":
        return index
    if isinstance(index, JoinedIndex):
        return JoinedIndex(on_device(index.base, device), on_device(index.added, device))
    faiss = load_faiss()
    number = int(device.partition(":")[2] or 0)
    if not hasattr(faiss, "StandardGpuResources"):
        raise DeviceError(
            f"device {device}: expected faiss-gpu, found faiss-cpu {faiss.__version__}: "
            "pip uninstall faiss-cpu && pip install 'sppfeat[gpu]'"
        )
    if number >= (usable := faiss.get_num_gpus()):
        raise DeviceError(f"device {device}: expected an NVIDIA GPU, found {usable or 'none'} usable by faiss")
    try:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), number, index)
    except RuntimeError as error:
        raise DeviceError(
            f"device {device}: this kind of index is not supported there ({faiss_reason(error)})"
        ) from None


def from_device(index: Any, device: str) -> Any:
    """The index, back in main memory."""
    return index if device == "cpu" else typed(load_faiss().index_gpu_to_cpu(index))
