"""Memory in parts: none overlaps another while an array lies in it, and all of it comes back."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from sppfeat.extraction.shared_memory import SharedMemory, Taken
from sppfeat.images import Unresized

PAGE = 4096


@pytest.fixture
def memory() -> SharedMemory:
    memory = SharedMemory(64 * PAGE)
    memory.close()  # what is mapped stays
    return memory


def all_of(memory: SharedMemory) -> bool:
    """Whether all memory is free, in one piece."""
    return memory.take(64 * PAGE) is not None


@pytest.mark.parametrize(
    "view",
    [
        lambda array: array[5:7],
        lambda array: array[: 30 * 40 * 3].reshape(30, 40, 3)[2:, :, :2][::2],
        lambda array: torch.from_numpy(array[100:200])[3:],
        lambda array: memoryview(array)[7:],
        lambda array: Unresized(array[:3].reshape(1, 1, 3), (9, 9), "bicubic", (0, 0), (9, 9, 3)),
        lambda array: np.frombuffer(array[8:16], np.int32).view(np.float32),
    ],
)
def test_any_view_keeps_a_part(view: Callable[[np.ndarray], object], memory: SharedMemory) -> None:
    taken = memory.take(3 * PAGE)
    assert taken is not None
    kept = view(taken.array())
    del taken
    gc.collect()
    assert not all_of(memory)
    del kept
    assert all_of(memory)


def test_a_part_is_memory_that_its_descriptor_shows() -> None:
    memory = SharedMemory(4 * PAGE)
    first, second = memory.take(PAGE), memory.take(10)
    assert first is not None and second is not None and second.begin == PAGE
    second.array()[:3] = 7, 8, 9
    with open(memory.descriptor, "rb") as file:
        assert file.read()[PAGE : PAGE + 4] == b"\7\10\11\0"


def test_what_is_not_kept_comes_back_at_once(memory: SharedMemory) -> None:
    taken = memory.take(64 * PAGE)
    assert taken is not None and memory.take(1) is None
    taken.keep(PAGE + 1)
    assert taken.end == 2 * PAGE
    rest = memory.take(62 * PAGE)
    assert rest is not None and rest.begin == 2 * PAGE and memory.take(1) is None
    taken.keep(0)
    assert memory.take(2 * PAGE) is not None
    del taken, rest
    assert all_of(memory)


def test_parts_never_overlap(memory: SharedMemory) -> None:
    """Random sizes and lifetimes; each part is filled with its number, which must be there to the end."""
    dice = random.Random(0)
    living: list[tuple[int, np.ndarray]] = []
    refused = 0
    for number in range(4000):
        taken = memory.take(dice.randint(1, 12 * PAGE))
        if taken is None:
            refused += 1
        else:
            array = taken.array()[: dice.randint(1, taken.end - taken.begin)]
            array[:] = number % 251
            taken.keep(len(array))
            living.append((number % 251, array))
            del taken, array
        for _ in range(dice.randint(0, 2)):
            if living:
                expected, array = living.pop(dice.randrange(len(living)))
                assert (array == expected).all()
                del array
    assert 0 < refused < 3000
    living.clear()
    assert all_of(memory)


def test_parts_come_back_from_many_threads(memory: SharedMemory) -> None:
    dropped = 0

    def drop(arrays: list[np.ndarray]) -> None:
        nonlocal dropped
        while arrays:
            arrays.pop()
            dropped += 1

    for _ in range(50):
        arrays = [taken.array() for _ in range(64) if (taken := memory.take(PAGE)) is not None]
        assert len(arrays) == 64
        taken = None
        threads = [threading.Thread(target=drop, args=(arrays[at::4],)) for at in range(4)]
        arrays.clear()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        del thread, threads
        assert all_of(memory)
    assert dropped > 0


def test_a_part_keeps_the_memory(memory: SharedMemory) -> None:
    taken = memory.take(PAGE)
    assert isinstance(taken, Taken)
    array = taken.array()
    del memory, taken
    gc.collect()
    array[:] = 1  # a fault if it were unmapped
    assert array.sum() == PAGE
