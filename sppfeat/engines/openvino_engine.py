"""The engine `openvino`: a network compiled for this processor, and kept; it runs without torch.

Converting takes seconds, reading a compiled network back 0.2 s: so compiled networks stay in the user's cache, beside
their descriptions, keyed by everything they were made from. One that this version of OpenVINO does not accept is
compiled again.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from sppfeat._version import __version__
from sppfeat.backbones import Description, Network, network_versions
from sppfeat.engines.calibrated import CalibratedNetwork, read_calibrated
from sppfeat.engines.engine import ImageRefusedError
from sppfeat.errors import BackboneError, one_line, require_extra
from sppfeat.files import cache_folder, cache_key, read_entry, write_entry
from sppfeat.machine import processor
from sppfeat.pyramid import pool_maps, pool_windows

# What OpenVINO may differ by from torch, relative to the map's length: 1e-4 is promised, about 2e-6 is usual. bfloat16
# keeps 8 bits; over some dozens of layers, the two libraries' roundings part by up to a few percent.
# Whole numbers are the same on all processors but for roundings between them.
TOLERANCE: Final = {"float32": 1e-4, "bfloat16": 1e-1, "int8": 1e-1}
_HINT: Final = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}
# Each is some 10 to 200 MB; those used last stay.
_KEPT_ENTRIES: Final = 24
_CONVERTER: Final = "openvino.tools.ovc"


def import_openvino() -> Any:
    """The module openvino, with its telemetry off and without its converter, which is imported on first use.

    The converter reports each import to an analytics host, and takes a third of the time of importing openvino, which
    runs without it. Raises MissingExtraError.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: importing it fails
    if "openvino" in sys.modules:
        return require_extra("openvino", "cpu", "engine openvino")
    sys.modules[_CONVERTER] = None  # type: ignore[assignment]
    try:
        openvino = require_extra("openvino", "cpu", "engine openvino")
    finally:
        sys.modules.pop(_CONVERTER, None)
    if not hasattr(openvino, "convert_model"):
        vars(openvino)["__getattr__"] = _later
    return openvino


def _later(name: str) -> Any:
    """What the module openvino lacks, for programs that use it besides sppfeat."""
    if name == "convert_model":
        return importlib.import_module(_CONVERTER).convert_model
    raise AttributeError(f"module 'openvino' has no attribute {name!r}")


class OpenVinoEngine:
    """A network as OpenVINO runs it on this processor, for images of any size; see `sppfeat.engines.engine.Engine`.

    streams, threads: passes side by side, and cores for each. Raises BackboneError when OpenVINO cannot run this
    network, or gives other values than torch, and MissingExtraError.
    """

    name = "openvino"
    device = "cpu"
    patience = 4

    def __init__(self, network: Network, streams: int, threads: int) -> None:
        import_openvino()
        self.streams, self.threads = streams, threads
        self._network = network
        self._descriptions = network.descriptions
        self._recipe = recipe = network.recipe
        # They are computed one by one, as on torch's CPU: but a request whose image has the shape of the last one plans
        # nothing anew, which saves a tenth of the time, of whole numbers a fifth. More would hold rows back for little.
        self.batch_size = 16 if recipe.precision == "int8" else 4
        self._local = threading.local()
        options: dict[str, Any] = {
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": streams * threads,
            "INFERENCE_PRECISION_HINT": _HINT[recipe.precision],
            # Decoding needs the cores between passes.
            "ENABLE_CPU_PINNING": False,
        }
        entry = _entry(self._descriptions)
        side = odd_size(self._descriptions)
        self._compiled = _read_entry(entry, options)
        if recipe.precision == "int8":
            calibrated = read_calibrated(self._descriptions)
            is_new = self._compiled is None
            if is_new:
                self._compiled = compiled(self._descriptions, calibrated.model(), options)
            # Each time: OpenVINO 2026.4 computes SqueezeNet's whole numbers wrongly in several streams of one thread.
            self._check_samples(calibrated)
            if is_new:
                _write_entry(entry, self._compiled)
        elif self._compiled is None:
            network.log_preparing()
            backbone = network.backbone
            from sppfeat.engines.openvino_conversion import convert

            self._compiled = compiled(self._descriptions, convert(backbone, side), options)
            self._check_values()
            _write_entry(entry, self._compiled)
        else:
            # At its first pass the binding fills tables of its own, and two threads that do so at once wait for each
            # other for ever, one for the table and one for the interpreter: so the first pass is this thread's.
            try:
                self._infer(np.zeros((1, *side, 3), np.uint8))
            except RuntimeError as error:
                raise failure(self._descriptions, error) from None

    def at_work(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def lane(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def feature_maps(self, images: np.ndarray) -> list[np.ndarray]:
        """[N, h, w, C] float32 of each layer; see `Engine.feature_maps`."""
        try:
            return self._infer(images)
        except RuntimeError as error:
            if found := re.search(r"Failed to allocate \d+ bytes of memory", str(error)):
                raise MemoryError(found[0]) from None
            # Where torch refuses too (too few pixels for a layer, say), its text is the one that names why.
            from sppfeat.engines.openvino_conversion import say_why

            say_why(self._network.backbone, images)
            raise RuntimeError(f"OpenVINO: {_reason(error)}; --engine torch runs it") from None

    def pool(self, maps: np.ndarray) -> np.ndarray:
        recipe = self._recipe
        return pool_maps(maps, recipe.levels, recipe.pooling, recipe.gem_p)

    def pool_windows(self, feature_map: np.ndarray, rois: np.ndarray) -> np.ndarray:
        recipe = self._recipe
        return pool_windows(feature_map, rois, recipe.levels, recipe.pooling, recipe.gem_p)

    def release(self) -> None:
        self._local = threading.local()  # requests keep the maps of the largest image they have seen

    def _infer(self, images: np.ndarray) -> list[np.ndarray]:
        request = getattr(self._local, "request", None)
        if request is None:
            request = self._local.request = self._compiled.create_infer_request()
        cells: list[np.ndarray] = []
        for at, image in enumerate(images):
            outputs = request.infer([image[None]], share_inputs=True, share_outputs=True)
            ones = [outputs[number] for number in range(len(self._descriptions))]
            if not cells:
                cells = [np.empty((len(images), *one.shape[1:]), np.float32) for one in ones]
            # Copied: the request's own memory is overwritten by its next pass.
            for layer, one in zip(cells, ones, strict=True):
                layer[at] = one[0]
        return cells

    def _check_samples(self, calibrated: CalibratedNetwork) -> None:
        """Compare with what the network gave when it was calibrated, or raise BackboneError."""
        for image, expected in calibrated.samples():
            try:
                found = self._infer(image[None])
            except RuntimeError as error:
                raise failure(self._descriptions, error) from None
            for ours, theirs in zip(found, expected, strict=True):
                if difference := self._difference(ours[0], theirs, "those when it was calibrated"):
                    raise BackboneError(
                        f"{_who(self._descriptions)}, precision int8, gives {difference}: another processor, or a "
                        "fault of OpenVINO; use float32"
                    )

    def _check_values(self) -> None:
        """Compare with torch on images of several sizes, or raise BackboneError: what was computed in Python while the
        network was converted holds for the size of the example alone."""
        from sppfeat.engines.openvino_conversion import expected_cells

        for number, (height, width) in enumerate(_sizes_to_check(self._descriptions)):
            images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
            try:
                expected = expected_cells(self._network.backbone, images)
            except ImageRefusedError:
                continue
            try:
                found = self._infer(images)
            except RuntimeError as error:
                if number:
                    continue  # such images have an error of their own
                raise failure(self._descriptions, error) from None
            for ours, theirs in zip(found, expected, strict=True):
                if difference := self._difference(ours, theirs):
                    raise BackboneError(
                        f"{_who(self._descriptions)} gives {difference}, on images of {width} x {height}"
                    )

    def _difference(self, ours: np.ndarray, theirs: np.ndarray, whose: str = "those of torch") -> str | None:
        """What is wrong with OpenVINO's cells; whose: of the others."""
        if ours.shape != theirs.shape:
            return f"maps of {list(ours.shape)}, not {list(theirs.shape)} as {whose}"
        tolerance = TOLERANCE[self._recipe.precision]
        relative = float(np.linalg.norm(ours - theirs) / max(float(np.linalg.norm(theirs)), 1e-30))
        if relative <= tolerance:
            return None
        return f"values that differ from {whose} by {relative:.1e}, expected at most {tolerance:g}"


def compiled(descriptions: Sequence[Description], model: Any, options: dict[str, Any]) -> Any:
    """A model compiled for this processor. Raises BackboneError."""
    try:
        return import_openvino().Core().compile_model(model, "CPU", options)
    except RuntimeError as error:
        raise failure(descriptions, error) from None


def odd_size(descriptions: Sequence[Description]) -> tuple[int, int]:
    """Height and width of a small image that is no multiple of any stride."""
    side = max(97, max(each.minimum_side for each in descriptions) + 1)
    return side, side + 34


def _sizes_to_check(descriptions: Sequence[Description]) -> list[tuple[int, int]]:
    """Heights and widths: that of the example, a larger and the smallest one."""
    height, width = odd_size(descriptions)
    least = max(each.minimum_side for each in descriptions)
    return [(height, width), (2 * height + 30, width + 29), (least, least)]


def _who(descriptions: Sequence[Description]) -> str:
    layers = ", ".join(each.layer.name for each in descriptions)
    return f"engine openvino: backbone {descriptions[0].recipe.backbone} up to layer {layers}"


def failure(descriptions: Sequence[Description], error: Exception) -> BackboneError:
    return BackboneError(f"{_who(descriptions)} cannot be run ({_reason(error)})")


def _reason(error: Exception) -> str:
    """What OpenVINO says, in one line: its texts begin with places in its own source."""
    text = str(error)
    if found := re.search(r"No conversion rule found for operations: (.+)", text):
        return f"no conversion for {found[1].strip()}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if not re.match(r"(Exception from|Check) .*src|Converting input model", line)]
    return telling[0] if telling else one_line(error)


def _entry(descriptions: Sequence[Description]) -> Path:
    """The file that holds this network compiled for this machine, by these versions."""
    recipe = descriptions[0].recipe
    made_from: dict[str, object] = {
        "backbone": recipe.backbone,
        "layers": [[each.layer.name, each.weights_sha256] for each in descriptions],
        "input": [recipe.mean, recipe.std, recipe.precision, recipe.calibration],
        "versions": {"sppfeat": __version__, "openvino": import_openvino().__version__} | network_versions(),
        "machine": processor(),
    }
    return cache_folder() / "networks" / f"{cache_key(made_from)}.bin"


def _read_entry(entry: Path, options: dict[str, Any]) -> Any:
    """The compiled network of a cache entry; None when there is none that is whole and ours."""
    body = read_entry(entry)
    if body is None:
        return None
    try:
        return import_openvino().Core().import_model(body, "CPU", options)
    except RuntimeError:
        return None


def _write_entry(entry: Path, compiled: Any) -> None:
    try:
        exported = compiled.export_model()
    except RuntimeError:
        return  # it runs, and cannot be kept
    # OpenVINO 2025.0 gives bytes, later versions a file.
    body = exported if isinstance(exported, bytes) else exported.getvalue()
    write_entry(entry, body, kept=_KEPT_ENTRIES)
