"""Engines: the same values whichever computes them, the choice between them, and compiled networks on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from torch import nn

from sppfeat import (
    BackboneError,
    DeviceError,
    Recipe,
    RunOptions,
    SppFeatWarning,
    UsageError,
    extract_folder,
    open_store,
)
from sppfeat.backbones.backbone import load_backbone
from sppfeat.backbones.tracing import _Tracer
from sppfeat.engines import engine as engine_module
from sppfeat.engines.devices import resolve_device
from sppfeat.engines.engine import load_engine
from sppfeat.extraction.pipeline import Describer

pytest.importorskip("openvino")
from sppfeat.engines import openvino_engine

OPENVINO, TORCH = RunOptions(engine="openvino", device="cpu"), RunOptions(engine="torch", device="cpu")

# One of each family: what the packages bring, depthwise "SAME" padding, residuals, channel shuffles, dense links,
# pooling that rounds up, LayerNorm over channels, squeeze-and-excitation, several branches.
FAMILIES = [
    ("efficientnet_lite0", None),
    ("efficientnet_lite1", "blocks.3"),
    ("efficientnet_lite2", "blocks.2"),
    ("timm:test_resnet", None),
    ("torchvision:resnet18", "layer2"),
    ("torchvision:squeezenet1_1", None),
    ("torchvision:mobilenet_v3_small", None),
    ("torchvision:shufflenet_v2_x0_5", None),
    ("torchvision:googlenet", "inception4a"),
    ("torchvision:densenet121", "features.denseblock1"),
    ("timm:convnext_atto", "stages.1"),
    ("timm:tf_efficientnet_b0", "blocks.2"),
]


def pictures(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of compiled networks, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sppfeat" / "openvino"


@pytest.mark.parametrize(("name", "layer"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_openvino_gives_torchs_values(name: str, layer: str | None) -> None:
    weights = "pretrained" if name.startswith("efficientnet") else "random"
    recipe = Recipe(backbone=name, layer=layer, weights=weights)
    backbone, engine = load_engine(recipe, OPENVINO)
    assert engine.name == "openvino"
    for count, height, width in ((1, 224, 288), (1, 127, 201), (3, 160, 96), (1, 93, 93)):
        expected = backbone.feature_map(pictures(count, height, width)).detach()
        found = engine.feature_map(pictures(count, height, width))
        assert found.shape == expected.shape and found.is_contiguous(memory_format=torch.channels_last)
        assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())


def test_bfloat16_is_as_exact_as_torchs() -> None:
    exact, _ = load_engine(TINY, TORCH)
    _, ours = load_engine(replace(TINY, precision="bfloat16"), OPENVINO)
    _, torchs = load_engine(replace(TINY, precision="bfloat16"), TORCH)
    expected = exact.feature_map(pictures(2, 96, 130)).detach()
    errors = [float((e.feature_map(pictures(2, 96, 130)).detach().float() - expected).norm()) for e in (ours, torchs)]
    assert errors[0] <= 2 * errors[1] <= 0.1 * float(expected.norm())


def test_a_map_does_not_depend_on_its_batch_or_on_threads() -> None:
    _, engine = load_engine(TINY, OPENVINO)
    many = pictures(5, 96, 64)
    together = engine.feature_map(many)
    for one, found in zip(many, together, strict=True):
        torch.testing.assert_close(engine.feature_map(one[None])[0], found, rtol=1e-6, atol=1e-7)
    alone = engine.feature_map(many[:1])
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(engine.feature_map(many[:1]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(one, alone) for one in found)


def test_a_map_is_the_callers_own() -> None:
    _, engine = load_engine(TINY, OPENVINO)
    first = engine.feature_map(pictures(1, 64, 64))
    kept = first.clone()
    engine.feature_map(pictures(1, 64, 64, seed=1))
    assert torch.equal(first, kept)


def test_a_store_goes_on_with_another_engine(make_images: Callable[..., Path], tmp_path: Path) -> None:
    folder, output = make_images(4), tmp_path / "f.h5"
    assert extract_folder(folder, output, TINY, TORCH).engine == "torch"
    make_images(8)
    done = extract_folder(folder, output, TINY, OPENVINO)
    assert (done.engine, done.described, done.reused) == ("openvino", 4, 4)
    extract_folder(folder, tmp_path / "torch.h5", TINY, TORCH)
    mixed, torchs = open_store(output), open_store(tmp_path / "torch.h5")
    assert mixed.recipe_hash == torchs.recipe_hash and "openvino" not in mixed.recipe.to_json()
    np.testing.assert_allclose(
        np.array(mixed.descriptors, np.float32), np.array(torchs.descriptors, np.float32), rtol=2e-3, atol=1e-6
    )


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Describer(TINY, RunOptions(device="cpu")).engine == "openvino"
    assert Describer(replace(TINY, precision="float16"), RunOptions(device="cpu")).engine == "torch"
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert Describer(TINY, RunOptions(device="cpu")).engine == "torch"
    assert Describer(TINY, OPENVINO).engine == "openvino"


def test_choices_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown engine 'tensorrt': expected one of auto, torch, openvino"):
        RunOptions(engine="tensorrt")
    with pytest.raises(UsageError, match="openvino computes float32 and bfloat16, found precision float16"):
        load_engine(replace(TINY, precision="float16"), OPENVINO)
    monkeypatch.setattr(engine_module, "resolve_device", lambda name: torch.device("cuda", 0))
    with pytest.raises(UsageError, match="openvino computes on the processor, found device cuda: .*--device cpu"):
        load_engine(TINY, RunOptions(engine="openvino", device="cuda"))


def test_openvino_that_is_not_installed(make_images: Callable[..., Path], tmp_path: Path) -> None:
    """In processes of their own, in which importing it fails."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['openvino'] = None\n")
    folder = make_images(2)
    arguments = ["-o", tmp_path / "f.h5", "--backbone", TINY.backbone, "--weights", "random", "--scales", "64"]
    code = "from sppfeat_cli import main; main()"

    def run(*more: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, "extract", *map(str, (folder, *arguments, *more))]
        env = {**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)

    refused = run("--engine", "openvino")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "engine openvino needs openvino, which is not installed: pip install 'sppfeat[cpu]'" in refused.stderr
    done = run("--json")
    assert done.returncode == 0 and json.loads(done.stdout)["engine"] == "torch" and "warning" not in done.stderr


class _Constant(nn.Module):
    """Multiplies by the map's height, in a way that tracing takes for a constant."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * int(x.shape[2])


class _Unknown(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.i0e(x)


@pytest.mark.parametrize(
    ("last", "reason"), [(_Unknown(), r"no conversion for aten::special_i0e"), (_Constant(), "values that differ")]
)
def test_a_network_that_openvino_cannot_run(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path, last: nn.Module, reason: str
) -> None:
    backbone = load_backbone(TINY)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4, padding=1), last)
    trunk = torch.fx.GraphModule(network, _Tracer().trace(network.eval()))
    monkeypatch.setattr(backbone, "_trunk", trunk)
    monkeypatch.setattr(backbone, "_running", trunk)
    sizes = cycle([(96, 128), (97, 131)])  # of the example that is traced, and of what is compared
    monkeypatch.setattr(openvino_engine, "_odd_size", lambda backbone: next(sizes))
    monkeypatch.setattr(engine_module, "load_backbone", lambda recipe: backbone)
    with pytest.raises(BackboneError, match=f"backbone timm:test_resnet up to layer .*{reason}") as caught:
        load_engine(TINY, OPENVINO)
    assert "\n" not in str(caught.value) and not own_cache.exists()
    sizes = cycle([(96, 128), (97, 131)])
    with pytest.warns(SppFeatWarning, match=f"{reason}.*; torch takes its place"):
        _, engine = load_engine(TINY, RunOptions(device="cpu"))
    assert engine.name == "torch"


def test_the_fallback_is_said_at_the_command_line(
    make_images: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    import warnings

    from sppfeat_cli import main

    def fail(*arguments: object) -> object:
        raise BackboneError("engine openvino: backbone x up to layer y cannot be run (z)")

    monkeypatch.setattr(openvino_engine, "_compile", fail)
    monkeypatch.setattr(openvino_engine, "_read_entry", lambda *arguments: None)
    arguments = ["extract", str(make_images(1)), "-o", str(tmp_path / "f.h5"), "--backbone", TINY.backbone]
    arguments += ["--weights", "random", "--scales", "64", "--device", "cpu"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        monkeypatch.setattr(sys, "argv", ["sppfeat", *arguments])
        with pytest.raises(SystemExit) as done:
            main()
        assert not done.value.code
        printed = capsys.readouterr()
        assert "(torch)" in printed.out
        assert "sppfeat: warning: engine openvino: backbone x up to layer y" in printed.err
        monkeypatch.setattr(sys, "argv", ["sppfeat", *arguments, "--overwrite", "--engine", "openvino"])
        with pytest.raises(SystemExit) as refused:
            main()
    assert refused.value.code == 1 and capsys.readouterr().err.startswith("sppfeat: engine openvino: backbone x")


def test_a_compiled_network_is_kept_and_read_back(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = load_engine(TINY, OPENVINO)
    (entry,) = own_cache.iterdir()
    monkeypatch.setattr(openvino_engine, "_compile", None)  # it would fail
    _, second = load_engine(TINY, OPENVINO)
    assert torch.equal(first.feature_map(pictures(1, 70, 90)), second.feature_map(pictures(1, 70, 90)))
    assert entry.stat().st_mode & 0o077 == 0 and own_cache.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "foreign", "stale", "folder"])
def test_a_corrupt_entry_is_made_anew(own_cache: Path, damage: str) -> None:
    backbone, engine = load_engine(TINY, OPENVINO)
    (entry,) = own_cache.iterdir()
    good = entry.read_bytes()
    start = len(openvino_engine._MAGIC)
    if damage == "folder":
        entry.unlink()
        entry.mkdir()
    elif damage == "foreign":  # whole, but nothing that OpenVINO reads
        import hashlib

        entry.write_bytes(openvino_engine._MAGIC + hashlib.sha256(b"x" * 1000).digest() + b"x" * 1000)
    else:
        flipped = good[: start + 5000] + bytes([good[start + 5000] ^ 1]) + good[start + 5001 :]
        entry.write_bytes(
            {"empty": b"", "cut": good[: len(good) // 2], "flipped": flipped, "stale": b"older\n" + good}[damage]
        )
    _, again = load_engine(TINY, OPENVINO)
    torch.testing.assert_close(again.feature_map(pictures(1, 64, 64)), engine.feature_map(pictures(1, 64, 64)))
    if damage != "folder":
        assert openvino_engine._read_entry(entry, {}) is not None


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    _, engine = load_engine(TINY, OPENVINO)
    assert engine.name == "openvino" and engine.feature_map(pictures(1, 64, 64)).shape[:2] == (1, 96)


def test_another_recipe_version_or_machine_has_another_entry(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(TINY)
    entries = {openvino_engine._entry(backbone)}
    for other in (
        replace(TINY, layer="layer1"),
        replace(TINY, precision="bfloat16"),
        replace(TINY, mean=(0.1, 0.2, 0.3)),
    ):
        entries.add(openvino_engine._entry(load_backbone(other)))
    monkeypatch.setattr(openvino_engine, "_machine", lambda: ["another"])
    entries.add(openvino_engine._entry(backbone))
    monkeypatch.setattr(openvino_engine, "version", lambda name: "0")
    entries.add(openvino_engine._entry(backbone))
    assert len(entries) == 6
    # What does not change the network shares it.
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_cache.parents[1]))
    same = load_backbone(replace(TINY, levels=(1,), scales=(96,)))
    assert openvino_engine._entry(same) == openvino_engine._entry(backbone)


def test_writers_at_once_leave_one_whole_entry(own_cache: Path) -> None:
    _, engine = load_engine(TINY, OPENVINO)
    (entry,) = own_cache.iterdir()
    compiled = engine._compiled  # type: ignore[attr-defined]
    threads = [threading.Thread(target=openvino_engine._write_entry, args=(entry, compiled)) for _ in range(6)]
    for thread in threads:
        thread.start()
        assert openvino_engine._read_entry(entry, {}) is not None  # never half of one
    for thread in threads:
        thread.join()
    assert list(own_cache.iterdir()) == [entry] and openvino_engine._read_entry(entry, {}) is not None


def test_old_entries_and_what_killed_writers_left_go(own_cache: Path) -> None:
    own_cache.mkdir(parents=True)
    for number in range(openvino_engine._KEPT_ENTRIES + 3):
        (own_cache / f"{number}.bin").write_bytes(b"old")
        os.utime(own_cache / f"{number}.bin", (1000 + number, 1000 + number))
    (own_cache / ".x.partial").write_bytes(b"left")
    os.utime(own_cache / ".x.partial", (1000, 1000))
    load_engine(TINY, OPENVINO)
    left = {path.name for path in own_cache.iterdir()}
    assert len(left) == openvino_engine._KEPT_ENTRIES and not left & {"0.bin", "1.bin", "2.bin", "3.bin", ".x.partial"}


def test_pictures_that_the_network_refuses_have_torchs_reason() -> None:
    _, engine = load_engine(replace(TINY, backbone="torchvision:squeezenet1_1"), OPENVINO)
    with pytest.raises(RuntimeError, match="[Kk]ernel size|too small"):
        engine.feature_map(pictures(1, 8, 8))


def test_a_failure_of_openvino_alone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _, engine = load_engine(TINY, OPENVINO)

    def fail(*arguments: object) -> torch.Tensor:
        raise RuntimeError(
            "Exception from src/inference/src/cpp/core.cpp:1:\nCheck 'x' failed at src/y.cpp:2:\nno room"
        )

    monkeypatch.setattr(engine, "_infer", fail)
    with pytest.raises(RuntimeError, match="^OpenVINO: no room; --engine torch runs it$"):
        engine.feature_map(pictures(1, 64, 64))


def test_a_driver_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    def old() -> bool:
        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).\nPlease update",
            stacklevel=1,
        )
        return False

    monkeypatch.setattr(torch.cuda, "is_available", old)
    with pytest.raises(DeviceError, match="device cuda: expected .* found none usable .*driver .* is too old .found"):
        resolve_device("cuda")
    with pytest.warns(SppFeatWarning, match="the GPU is left out .*too old.*; the processor takes its place"):
        assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("needed", [72_000_000, None])
def test_openvino_that_has_no_memory_says_so(monkeypatch: pytest.MonkeyPatch, needed: int | None) -> None:
    """As OpenVINO 2026 says it; anything else that fails is not taken for it."""
    _, engine = load_engine(TINY, OPENVINO)
    cause = f"Failed to allocate {needed} bytes of memory" if needed else "broken"

    def fail(pictures: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(
            "Exception from src/inference/src/cpp/infer_request.cpp:224:\n"
            "Exception from src/plugins/intel_cpu/src/node.cpp:794:\n"
            "[CPU] Convolution node with name 'Convolution_6464' Check 'ptr' failed at "
            f"src/plugins/intel_cpu/src/cpu_memory.cpp:257:\n{cause}\n\n\n"
        )

    monkeypatch.setattr(engine, "_infer", fail)
    error = MemoryError if needed else RuntimeError
    with pytest.raises(error, match=f"^{cause}$" if needed else "^OpenVINO: .*--engine torch runs it"):
        engine.feature_map(torch.zeros((1, 64, 64, 3), dtype=torch.uint8))
