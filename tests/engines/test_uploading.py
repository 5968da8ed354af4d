"""How images get to a GPU: those in pinned memory as they are. Its driver is faked, and writes down what is asked."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY

from sppfeat import DeviceError
from sppfeat.backbones import Network
from sppfeat.engines import torch_engine
from sppfeat.engines.torch_engine import TorchEngine
from sppfeat.extraction.shared_memory import SharedMemory


class Driver:
    """Stands in for CUDA's runtime; `pinned` are sizes by address."""

    cudaError = SimpleNamespace(success=0)

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.pinned: dict[int, int] = {}
        self.answer = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert flags == 1 and address % 4096 == 0
        self.calls.append(("register", address))
        if not self.answer:
            self.pinned[address] = size
        return self.answer

    def cudaHostUnregister(self, address: int) -> int:
        assert ctypes.c_uint8.from_address(address).value == 7  # a fault if it were unmapped
        self.calls.append(("unregister", address))
        del self.pinned[address]
        return 0

    def cudaGetErrorString(self, error: int) -> str:
        return f"error {error}"

    def is_pinned(self, pixels: np.ndarray) -> bool:
        at = pixels.ctypes.data
        return any(begin <= at and at + pixels.nbytes <= begin + size for begin, size in self.pinned.items())


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", lambda place: contextlib.nullcontext())
    monkeypatch.setattr(torch_engine, "_is_pinned", driver.is_pinned)
    return driver


@pytest.fixture
def engine() -> TorchEngine:
    return TorchEngine(Network(TINY).backbone, "cpu")


@pytest.fixture
def on_gpu(engine: TorchEngine) -> TorchEngine:
    engine._place, engine.device = torch.device("cuda:0"), "cuda:0"
    return engine


def test_images_in_pinned_memory_are_not_copied_before(
    engine: TorchEngine, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SharedMemory(1 << 20)
    memory.close()
    driver.pinned[memory.whole.ctypes.data] = 1 << 20
    generator, images = np.random.default_rng(0), []
    for number in range(7):
        shape = (5 + number, 8, 3)
        taken = memory.take(int(np.prod(shape)))
        assert taken is not None
        pixels = taken.array()[: int(np.prod(shape))] if number % 2 else np.empty(np.prod(shape), np.uint8)
        pixels[:] = generator.integers(0, 256, pixels.shape)
        images.append(pixels.reshape(shape))
    joined: list[int] = []
    concatenate = np.concatenate

    def noted(arrays: Any, **options: Any) -> Any:
        joined.append(len(arrays))
        return concatenate(arrays, **options)

    monkeypatch.setattr(np, "concatenate", noted)
    found = engine._uploaded(images)
    assert joined == [4]
    for number, (each, image) in enumerate(zip(found, images, strict=True)):
        assert each.shape == image.shape and np.array_equal(each.numpy(), image)
        # On a CPU, what is not copied is where it was.
        assert np.shares_memory(each.numpy(), image) == bool(number % 2)
    joined.clear()
    assert len(engine._uploaded(images[1::2])) == 3 and not joined


def test_images_that_others_own_are_not_pinned(engine: TorchEngine) -> None:
    """Without a warning that they are not writable."""
    pixels = np.frombuffer(bytes(12), np.uint8).reshape(2, 2, 3)
    (found,) = engine._uploaded([pixels])
    assert np.array_equal(found.numpy(), pixels)


def test_memory_is_pinned_once_and_as_long_as_it_is_there(on_gpu: TorchEngine, driver: Driver) -> None:
    memory = SharedMemory(1 << 20)
    memory.close()
    address = memory.whole.ctypes.data
    memory.whole[0] = 7
    on_gpu.pin(memory.whole)
    on_gpu.pin(memory.whole)  # a second backbone on the same GPU
    assert driver.calls == [("register", address)] and driver.pinned == {address: 1 << 20}
    taken = memory.take(10)
    assert taken is not None
    array = taken.array()[3:]
    del memory, taken
    gc.collect()
    assert driver.pinned
    del array
    assert driver.calls == [("register", address), ("unregister", address)]


def test_memory_that_cannot_be_pinned(on_gpu: TorchEngine, driver: Driver) -> None:
    driver.answer = 2
    memory = SharedMemory(1 << 20)
    memory.close()
    with pytest.raises(DeviceError, match="device cuda:0: 1,048,576 bytes of memory cannot be pinned .error 2."):
        on_gpu.pin(memory.whole)
    del memory
    assert [name for name, _ in driver.calls] == ["register"]


def test_a_cpu_pins_nothing(engine: TorchEngine, driver: Driver) -> None:
    engine.pin(np.zeros(4096, np.uint8))
    assert not driver.calls
