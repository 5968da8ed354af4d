"""Engines: equal values from each, the choice between them, and compiled networks on disk."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
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
from sppfeat.backbones.network import Network
from sppfeat.backbones.tracing import _Tracer
from sppfeat.engines import devices
from sppfeat.engines import engine as engine_module
from sppfeat.engines.devices import resolve_device
from sppfeat.engines.engine import Engine, ImageRefusedError, load_engine
from sppfeat.extraction.pipeline import Describer
from sppfeat.files import cache

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


def images(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def load(recipe: Recipe, options: RunOptions) -> Engine:
    return load_engine(Network(recipe), options)


def cells(engine: Engine, pixels: np.ndarray) -> np.ndarray:
    """[N, h, w, C] float32, from either engine."""
    with engine.lane():
        maps = engine.feature_maps(pixels)[0]
        if isinstance(maps, np.ndarray):
            return maps
        found: np.ndarray = maps.float().permute(0, 2, 3, 1).cpu().numpy()
        return found


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of compiled networks, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sppfeat" / "networks"


@pytest.mark.parametrize(("name", "layer"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_openvino_gives_torchs_values(name: str, layer: str | None) -> None:
    weights = "pretrained" if name.startswith("efficientnet") else "random"
    recipe = Recipe(backbone=name, layer=layer, weights=weights)
    engine, torchs = load(recipe, OPENVINO), load(recipe, TORCH)
    assert engine.name == "openvino"
    for count, height, width in ((1, 224, 288), (1, 127, 201), (3, 160, 96), (1, 93, 93)):
        expected, found = (cells(each, images(count, height, width)) for each in (torchs, engine))
        assert found.shape == expected.shape and apart(found, expected) <= 1e-4


@pytest.mark.parametrize("pooling", ["max", "avg", "gem"])
@pytest.mark.parametrize("levels", [(6, 3, 2, 1), (1,), (5, 3), (4, 7)])
def test_pooling_in_numpy_gives_torchs_values(pooling: str, levels: tuple[int, ...]) -> None:
    recipe = replace(TINY, pooling=pooling, levels=levels)
    ours, torchs = load(recipe, OPENVINO), load(recipe, TORCH)
    maps = cells(ours, images(2, 96, 224))
    on_torch = torch.from_numpy(maps).permute(0, 3, 1, 2)
    np.testing.assert_allclose(ours.pool(maps), torchs.pool(on_torch), rtol=1e-5, atol=1e-7)
    height, width = maps.shape[1:3]
    corners = np.random.default_rng(0).integers(0, [width, height, width, height], (200, 4))
    rois = np.concatenate([np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])], 1)
    found = ours.pool_windows(maps[0], rois)
    np.testing.assert_allclose(found, torchs.pool_windows(on_torch[0], rois), rtol=1e-5, atol=1e-7)
    assert ours.pool_windows(maps[0], rois[:0]).shape == (0, found.shape[1])


def test_bfloat16_is_as_exact_as_torchs() -> None:
    exact = load(TINY, TORCH)
    ours, torchs = (load(replace(TINY, precision="bfloat16"), options) for options in (OPENVINO, TORCH))
    expected = cells(exact, images(2, 96, 130))
    errors = [apart(cells(engine, images(2, 96, 130)), expected) for engine in (ours, torchs)]
    assert errors[0] <= 2 * errors[1] <= 0.1


def test_a_map_does_not_depend_on_its_batch_or_on_threads() -> None:
    engine = load(TINY, OPENVINO)
    many = images(5, 96, 64)
    for one, together in zip(many, cells(engine, many), strict=True):
        np.testing.assert_allclose(cells(engine, one[None])[0], together, rtol=1e-6, atol=1e-7)
    alone = cells(engine, many[:1])
    found: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: found.append(cells(engine, many[:1]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(np.array_equal(one, alone) for one in found)


def test_a_map_is_the_callers_own() -> None:
    engine = load(TINY, OPENVINO)
    first = cells(engine, images(1, 64, 64))
    kept = first.copy()
    cells(engine, images(1, 64, 64, seed=1))
    assert np.array_equal(first, kept)


def test_a_store_resumes_with_another_engine(make_images: Callable[..., Path], tmp_path: Path) -> None:
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


def test_invalid_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown engine 'tensorrt': expected one of auto, torch, openvino"):
        RunOptions(engine="tensorrt")
    with pytest.raises(UsageError, match="openvino: expected precision float32, bfloat16 or int8, found float16"):
        load(replace(TINY, precision="float16"), OPENVINO)
    monkeypatch.setattr(engine_module, "resolve_device", lambda name: "cuda:0")
    with pytest.raises(UsageError, match="openvino runs on the CPU: expected --device cpu, found cuda"):
        load(TINY, RunOptions(engine="openvino", device="cuda"))


def test_openvino_that_is_not_installed(make_images: Callable[..., Path], tmp_path: Path) -> None:
    """In separate processes, in which importing it fails."""
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


def test_openvinos_converter_is_imported_when_it_is_used() -> None:
    code = """
        import sys
        from sppfeat.engines.openvino_engine import import_openvino
        openvino = import_openvino()
        assert openvino is import_openvino() and not [name for name in sys.modules if name.startswith("openvino.tools")]
        assert not hasattr(openvino, "nothing")
        assert openvino.convert_model.__module__ == "openvino.tools.ovc.convert"
    """
    subprocess.run([sys.executable, "-c", inspect.cleandoc(code)], check=True, timeout=60)


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
    graph = _Tracer().trace(network.eval())
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = ([output.args[0]],)
    trunk = torch.fx.GraphModule(network, graph)
    monkeypatch.setattr(backbone, "_trunk", trunk)
    monkeypatch.setattr(backbone, "_running", trunk)
    monkeypatch.setattr("sppfeat.backbones.backbone.load_backbone", lambda recipe: backbone)
    with pytest.raises(BackboneError, match=f"backbone timm:test_resnet up to layer .*{reason}") as caught:
        load(TINY, OPENVINO)
    assert "\n" not in str(caught.value) and not list(own_cache.glob("*.bin"))
    with pytest.warns(SppFeatWarning, match=f"{reason}.*; falling back to PyTorch"):
        engine = load(TINY, RunOptions(device="cpu"))
    assert engine.name == "torch"


def test_the_fallback_is_reported_on_the_command_line(
    make_images: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    import warnings

    from sppfeat_cli import main

    def fail(*arguments: object) -> object:
        raise BackboneError("engine openvino: backbone x up to layer y cannot be run (z)")

    monkeypatch.setattr("sppfeat.engines.openvino_conversion.convert", fail)
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
    assert open_store(tmp_path / "f.h5").counts()["done"] == 1  # the existing store is left unchanged


def test_a_compiled_network_is_kept_and_read_back(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(TINY, OPENVINO)
    (entry,) = own_cache.glob("*.bin")
    monkeypatch.setattr("sppfeat.engines.openvino_conversion.convert", None)  # it would fail
    second = load(TINY, OPENVINO)
    assert np.array_equal(cells(first, images(1, 70, 90)), cells(second, images(1, 70, 90)))
    assert entry.stat().st_mode & 0o077 == 0 and own_cache.stat().st_mode & 0o077 == 0


def test_preparing_is_said_before_it_begins_and_once(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sppfeat")
    said = ["preparing timm:test_resnet for this processor, once"]

    def prepare() -> list[str]:
        caplog.clear()
        load(TINY, OPENVINO)
        return caplog.messages

    assert prepare() == said  # describing and converting are one wait
    assert prepare() == []
    (compiled,) = own_cache.glob("*.bin")
    compiled.unlink()
    assert prepare() == said
    for description in own_cache.glob("*.json"):
        description.unlink()
    assert prepare() == said

    def building(recipe: Recipe) -> None:
        raise BackboneError(f"after {caplog.messages}")

    compiled.unlink()
    monkeypatch.setattr("sppfeat.backbones.backbone.load_backbone", building)
    with pytest.raises(BackboneError, match=r"after \['preparing"):
        prepare()


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "foreign", "stale", "folder"])
def test_a_corrupt_entry_is_recreated(own_cache: Path, damage: str) -> None:
    engine = load(TINY, OPENVINO)
    (entry,) = own_cache.glob("*.bin")
    good = entry.read_bytes()
    start = cache._HEADER
    if damage == "folder":
        entry.unlink()
        entry.mkdir()
    elif damage == "foreign":  # whole, but nothing that OpenVINO reads
        import hashlib

        entry.write_bytes(cache._MAGIC + hashlib.sha256(b"x" * 1000).digest() + b"x" * 1000)
    else:
        flipped = good[: start + 5000] + bytes([good[start + 5000] ^ 1]) + good[start + 5001 :]
        entry.write_bytes(
            {"empty": b"", "cut": good[: len(good) // 2], "flipped": flipped, "stale": b"older\n" + good}[damage]
        )
    again = load(TINY, OPENVINO)
    np.testing.assert_allclose(cells(again, images(1, 64, 64)), cells(engine, images(1, 64, 64)), rtol=1e-5, atol=1e-6)
    if damage != "folder":
        assert openvino_engine._read_entry(entry, {}) is not None


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    engine = load(TINY, OPENVINO)
    assert engine.name == "openvino" and cells(engine, images(1, 64, 64)).shape[::3] == (1, 96)


def test_another_recipe_version_or_machine_has_another_entry(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(recipe: Recipe) -> Path:
        return openvino_engine._entry(Network(recipe).descriptions)

    entries = {entry(TINY)}
    for other in (
        replace(TINY, layer="layer1"),
        replace(TINY, precision="bfloat16"),
        replace(TINY, mean=(0.1, 0.2, 0.3)),
    ):
        entries.add(entry(other))
    monkeypatch.setattr(openvino_engine, "processor", lambda: ["another"])
    entries.add(entry(TINY))
    monkeypatch.setattr(openvino_engine.import_openvino(), "__version__", "0")
    entries.add(entry(TINY))
    assert len(entries) == 6
    # What does not change the network shares it.
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_cache.parents[1]))
    assert entry(replace(TINY, levels=(1,), scales=(96,))) == entry(TINY)


def test_concurrent_writers_leave_one_whole_entry(own_cache: Path) -> None:
    engine = load(TINY, OPENVINO)
    (entry,) = own_cache.glob("*.bin")
    compiled = engine._compiled  # type: ignore[attr-defined]
    threads = [threading.Thread(target=openvino_engine._write_entry, args=(entry, compiled)) for _ in range(6)]
    for thread in threads:
        thread.start()
        assert openvino_engine._read_entry(entry, {}) is not None  # never half of one
    for thread in threads:
        thread.join()
    assert (
        list(own_cache.glob("*.bin")) == [entry]
        and not list(own_cache.glob(".*"))
        and openvino_engine._read_entry(entry, {}) is not None
    )


def test_old_entries_and_leftovers_of_killed_writers_are_removed(own_cache: Path) -> None:
    own_cache.mkdir(parents=True)
    for number in range(openvino_engine._KEPT_ENTRIES + 3):
        (own_cache / f"{number}.bin").write_bytes(b"old")
        os.utime(own_cache / f"{number}.bin", (1000 + number, 1000 + number))
    (own_cache / ".x.partial").write_bytes(b"left")
    os.utime(own_cache / ".x.partial", (1000, 1000))
    load(TINY, OPENVINO)
    left = {path.name for path in own_cache.iterdir() if path.suffix != ".json"}
    assert len(left) == openvino_engine._KEPT_ENTRIES and not left & {"0.bin", "1.bin", "2.bin", "3.bin", ".x.partial"}


def test_images_that_the_network_refuses_have_torchs_reason() -> None:
    engine = load(replace(TINY, backbone="torchvision:squeezenet1_1"), OPENVINO)
    with pytest.raises(ImageRefusedError, match="[Kk]ernel size|too small"):
        cells(engine, images(1, 8, 8))


def test_a_failure_of_openvino_alone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(TINY, OPENVINO)

    def fail(*arguments: object) -> np.ndarray:
        raise RuntimeError(
            "Exception from src/inference/src/cpp/core.cpp:1:\nCheck 'x' failed at src/y.cpp:2:\nno room"
        )

    monkeypatch.setattr(engine, "_infer", fail)
    with pytest.raises(RuntimeError, match="^OpenVINO: no room; --engine torch runs it$"):
        cells(engine, images(1, 64, 64))


def test_a_driver_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    def old() -> bool:
        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).\nPlease update",
            stacklevel=1,
        )
        return False

    monkeypatch.setattr(torch.cuda, "is_available", old)
    monkeypatch.setattr(devices, "has_driver", lambda: True)
    with pytest.raises(DeviceError, match="device cuda: expected .* found none usable .*driver .* is too old .found"):
        resolve_device("cuda")
    with pytest.warns(SppFeatWarning, match="the GPU cannot be used .*too old.*; falling back to the CPU"):
        assert resolve_device("auto") == "cpu"


@pytest.mark.parametrize("needed", [72_000_000, None])
def test_openvino_that_has_no_memory_says_so(monkeypatch: pytest.MonkeyPatch, needed: int | None) -> None:
    """The message of OpenVINO 2026; other failures are not taken for it."""
    engine = load(TINY, OPENVINO)
    cause = f"Failed to allocate {needed} bytes of memory" if needed else "broken"

    def fail(pixels: np.ndarray) -> np.ndarray:
        raise RuntimeError(
            "Exception from src/inference/src/cpp/infer_request.cpp:224:\n"
            "Exception from src/plugins/intel_cpu/src/node.cpp:794:\n"
            "[CPU] Convolution node with name 'Convolution_6464' Check 'ptr' failed at "
            f"src/plugins/intel_cpu/src/cpu_memory.cpp:257:\n{cause}\n\n\n"
        )

    monkeypatch.setattr(engine, "_infer", fail)
    error = MemoryError if needed else RuntimeError
    with pytest.raises(error, match=f"^{cause}$" if needed else "^OpenVINO: .*--engine torch runs it"):
        cells(engine, images(1, 64, 64))
