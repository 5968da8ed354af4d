"""The engine `openvino`: the trunk converted straight from the torch module, compiled for this processor, and kept.

Converting takes seconds, reading a compiled network back 0.2 s: so compiled networks stay in the user's cache folder
(`$XDG_CACHE_HOME/sppfeat/openvino`), a file each, named by all that they were made from. A file appears at once, whole,
and holds a checksum; one that is damaged, or that this version of OpenVINO does not take, is made anew. A cache that
cannot be read or written costs time, and is no error.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import platform
import re
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from sppfeat._version import __version__
from sppfeat.backbones.backbone import Backbone
from sppfeat.errors import BackboneError, one_line, require_extra

# What OpenVINO may differ by from torch, relative to the map's length: 1e-4 is promised, about 2e-6 is usual. bfloat16
# keeps 8 bits; over some dozens of layers, the two libraries' roundings part by up to a few percent.
TOLERANCE: Final = {"float32": 1e-4, "bfloat16": 1e-1}
_HINT: Final = {"float32": "f32", "bfloat16": "bf16"}
_MAGIC: Final = b"sppfeat-openvino-2\n"
# Each is some 10 to 200 MB; those used last stay.
_KEPT_ENTRIES: Final = 24


def import_openvino() -> Any:
    """The module openvino, which then tells nobody of its use.

    Its converter reports each import to an analytics host, through a package that it does without where that is not
    there. Raises MissingExtraError.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: importing it fails
    return require_extra("openvino", "cpu", "engine openvino")


class OpenVinoEngine:
    """A backbone as OpenVINO runs it on this processor, for pictures of any size; see `sppfeat.engines.engine.Engine`.

    streams, threads: passes side by side, and cores for each. Raises BackboneError when OpenVINO cannot run this
    network, or gives other values than torch, and MissingExtraError.
    """

    name = "openvino"
    device = torch.device("cpu")
    # They are computed one by one, as on torch's CPU: but a request that goes on with the shape it had has nothing to
    # plan anew, which saves a tenth of the time. It is not worth holding many rows back for.
    batch_size = 4
    patience = 4

    def __init__(self, backbone: Backbone, streams: int, threads: int) -> None:
        import_openvino()
        self.streams, self.threads = streams, threads
        self._backbone = backbone
        self._local = threading.local()
        options: dict[str, Any] = {
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": streams * threads,
            "INFERENCE_PRECISION_HINT": _HINT[backbone.recipe.precision],
            # Decoding needs the cores between passes.
            "ENABLE_CPU_PINNING": False,
        }
        entry = _entry(backbone)
        self._compiled = _read_entry(entry, options)
        if self._compiled is None:
            self._compiled = _compile(backbone, options)
            self._check_values()
            _write_entry(entry, self._compiled)
        else:
            # At its first pass the binding fills tables of its own, and two threads that do so at once wait for each
            # other for ever, one for the table and one for the interpreter: so the first pass is this thread's.
            self._infer(torch.zeros((1, *_odd_size(backbone), 3), dtype=torch.uint8))

    def lane(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def feature_map(self, pictures: torch.Tensor) -> torch.Tensor:
        try:
            return self._infer(pictures)
        except RuntimeError as error:
            if found := re.search(r"Failed to allocate \d+ bytes of memory", str(error)):
                raise MemoryError(found[0]) from None
            # Where torch refuses too (too few pixels for a layer, say), its text is the one that names why.
            with torch.inference_mode():
                self._backbone.feature_map(pictures)
            raise RuntimeError(f"OpenVINO: {_reason(error)}; --engine torch runs it") from None

    def release(self) -> None:
        self._local = threading.local()  # requests keep the maps of the largest image they have seen

    def _infer(self, pictures: torch.Tensor) -> torch.Tensor:
        request = getattr(self._local, "request", None)
        if request is None:
            request = self._local.request = self._compiled.create_infer_request()
        cells: np.ndarray | None = None
        for at, picture in enumerate(pictures.numpy()):
            one: np.ndarray = request.infer([picture[None]], share_inputs=True, share_outputs=True)[0]
            if cells is None:
                cells = np.empty((len(pictures), *one.shape[1:]), np.float32)
            # Copied: the request's own memory is overwritten by its next pass.
            cells[at] = one[0]
        assert cells is not None
        return torch.from_numpy(cells).permute(0, 3, 1, 2)

    def _check_values(self) -> None:
        """Compare with torch on two pictures of a size that is no multiple of any stride, or raise BackboneError."""
        generator = torch.Generator().manual_seed(0)
        tolerance = TOLERANCE[self._backbone.recipe.precision]
        height, width = _odd_size(self._backbone)
        pictures = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=generator)
        with torch.inference_mode():
            expected = self._backbone.feature_map(pictures).float()
            try:
                found = self._infer(pictures)
            except RuntimeError as error:
                raise _failure(self._backbone, error) from None
        if found.shape != expected.shape:
            difference = f"maps of {list(found.shape)} where torch gives {list(expected.shape)}"
        else:
            relative = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
            if relative <= tolerance:
                return
            difference = f"values that differ from torch's by {relative:.1e}, expected at most {tolerance:g}"
        raise BackboneError(f"{_who(self._backbone)} gives {difference}, on pictures of {width} x {height}") from None


class _Served(nn.Module):
    """What OpenVINO is given: from uint8 pictures [N, H, W, 3] to cells [N, h, w, C], normalisation inside."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(backbone.trunk).float()
        for name, module in list(self.trunk.named_modules()):
            if type(module).__name__ == "Conv2dSame":
                self.trunk.set_submodule(name, _MarkedConvolution(module))
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (backbone.recipe.mean, backbone.recipe.std))
        self.register_buffer("scale", (1 / (255 * std)).float().view(1, 3, 1, 1))
        self.register_buffer("shift", (-mean / std).float().view(1, 3, 1, 1))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        inputs = pictures.permute(0, 3, 1, 2).float() * self.scale + self.shift
        output: torch.Tensor = self.trunk(inputs).permute(0, 2, 3, 1)
        return output


class _MarkedConvolution(nn.Module):
    """A convolution padded "SAME", before OpenVINO pads it itself: NaN marks the padding for `_pad_inside`."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        layer: Any = self.convolution
        # As many cells as the "SAME" padding of stride 1, so that the map has the right size.
        height, width = (d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
        sides = [width // 2, width - width // 2, height // 2, height - height // 2]
        padded = nn.functional.pad(inputs, sides, value=float("nan"))
        return nn.functional.conv2d(padded, layer.weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)


def _pad_inside(model: Any) -> None:
    """Let each marked convolution of a converted network pad its own inputs, whatever their size.

    Padding that depends on the size is otherwise a copy of the map by a slow layer, and hides that the map's size is
    that of the shortcut around it, so that sums are not computed inside convolutions: 1.2 to 1.35 times the time.
    """
    opset13 = import_openvino().opset13

    for layer in model.get_ordered_ops():
        kind = layer.get_type_name()
        pad = layer.input_value(0).get_node() if kind in ("Convolution", "GroupConvolution") else None
        if pad is None or pad.get_type_name() != "Pad":
            continue
        value = pad.input_value(3).get_node() if pad.get_input_size() > 3 else None
        while value is not None and value.get_type_name() == "Convert":
            value = value.input_value(0).get_node()
        if value is None or value.get_type_name() != "Constant" or not np.isnan(value.data).all():
            continue
        options = layer.get_attributes()
        convolution = opset13.convolution if kind == "Convolution" else opset13.group_convolution
        same = convolution(
            pad.input_value(0),
            layer.input_value(1),
            options["strides"],
            [0, 0],
            [0, 0],
            options["dilations"],
            auto_pad="same_upper",
        )
        layer.output(0).replace(same.output(0))
    model.validate_nodes_and_infer_types()


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """Let Python's signal handlers wait: converting calls Python from C++, which an exception there would abort."""
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread alone
        return
    came: list[tuple[int, FrameType | None]] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.signal(kind, lambda *what: came.append(what)) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
        for number, _ in came[:1]:
            signal.raise_signal(number)


def _compile(backbone: Backbone, options: dict[str, Any]) -> Any:
    """Convert a backbone, with free batch, height and width, and compile it."""
    openvino = import_openvino()
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    height, width = _odd_size(backbone)
    try:
        with _signals_later(), warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")  # tracing warns of itself, and of Python numbers in it: values are checked
            served = _Served(backbone).eval()
            example = torch.zeros(1, height, width, 3, dtype=torch.uint8)
            traced = torch.jit.trace(served, example, check_trace=False)  # type: ignore[no-untyped-call]
            frontend = openvino.frontend.FrontEndManager().load_by_framework("pytorch")
            decoder = TorchScriptPythonDecoder(traced)  # the front end borrows it: it has to live while converting
            model = frontend.convert(frontend.load(decoder))
        _pad_inside(model)
        model.reshape(openvino.PartialShape([-1, -1, -1, 3]))
        return openvino.Core().compile_model(model, "CPU", options)
    except Exception as error:  # tracing, converting and compiling run code that can fail in any way
        raise _failure(backbone, error) from None


def _odd_size(backbone: Backbone) -> tuple[int, int]:
    """Height and width of a small picture that is no multiple of any stride."""
    side = max(97, backbone.minimum_side + 1)
    return side, side + 34


def _who(backbone: Backbone) -> str:
    return f"engine openvino: backbone {backbone.recipe.backbone} up to layer {backbone.layer.name}"


def _failure(backbone: Backbone, error: Exception) -> BackboneError:
    return BackboneError(f"{_who(backbone)} cannot be run ({_reason(error)})")


def _reason(error: Exception) -> str:
    """What OpenVINO says, in one line: its texts begin with places in its own source."""
    text = str(error)
    if found := re.search(r"No conversion rule found for operations: (.+)", text):
        return f"no conversion for {found[1].strip()}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if not re.match(r"(Exception from|Check) .*src|Converting input model", line)]
    return telling[0] if telling else one_line(error)


def _entry(backbone: Backbone) -> Path:
    """The file that holds this backbone compiled for this machine, by these versions."""
    recipe = backbone.recipe
    made_from = {
        "backbone": recipe.backbone,
        "layer": backbone.layer.name,
        "weights_sha256": backbone.weights_sha256,
        "input": [recipe.mean, recipe.std, recipe.precision],
        "versions": {"sppfeat": __version__}
        | {name: version(name) for name in ("openvino", "torch", "torchvision", "timm")},
        "machine": _machine(),
    }
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "openvino" / f"{key}.bin"


def _machine() -> list[str]:
    """The processor, as far as compiled code depends on it."""
    found: list[str] = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "flags", "Features", "CPU implementer", "CPU part"):
                found.append(value.strip())
            elif not name and found:
                break  # the other cores are alike
    return [platform.system(), platform.machine(), *(found or [platform.processor()])]


def cache_folder() -> Path:
    """Where sppfeat keeps what it can make again: below `$XDG_CACHE_HOME`, or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "sppfeat"


def _read_entry(entry: Path, options: dict[str, Any]) -> Any:
    """The compiled network of a cache entry; None when there is none that is whole and ours."""
    openvino = import_openvino()
    try:
        with open(entry, "rb") as file:
            # Compiled networks are trusted as programs are: another user's are not read.
            if hasattr(os, "geteuid") and os.fstat(file.fileno()).st_uid != os.geteuid():
                return None
            content = file.read()
        body = memoryview(content)[len(_MAGIC) + 32 :]
        if content[: len(_MAGIC)] != _MAGIC or hashlib.sha256(body).digest() != content[len(_MAGIC) :][:32]:
            return None
        compiled = openvino.Core().import_model(bytes(body), "CPU", options)
        with contextlib.suppress(OSError):
            os.utime(entry)
        return compiled
    except (OSError, RuntimeError):
        return None


def _write_entry(entry: Path, compiled: Any) -> None:
    """Keep a compiled network; writers at the same moment each put a whole file in place."""
    try:
        body = compiled.export_model().getvalue()
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Not `files.appearing`, whose name beside the file would be the same for all writers.
        descriptor, partial = tempfile.mkstemp(dir=entry.parent, prefix=".", suffix=".partial")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(body).digest() + body)
            os.replace(partial, entry)
        except BaseException:
            os.unlink(partial)
            raise
        for old in _oldest(entry.parent):
            old.unlink(missing_ok=True)
    except (OSError, RuntimeError):
        return


def _oldest(folder: Path) -> Iterator[Path]:
    """Entries beyond those that are kept, and what killed writers left."""
    used = {path: path.stat().st_mtime for path in folder.iterdir()}
    newest = max(used.values(), default=0.0)
    entries = sorted((path for path in used if path.suffix == ".bin"), key=lambda path: used[path], reverse=True)
    yield from entries[_KEPT_ENTRIES:]
    yield from (path for path in used if path.suffix == ".partial" and used[path] < newest - 3600)
