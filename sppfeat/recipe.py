"""The two value objects that carry all options: `Recipe` (which values) and `RunOptions` (how fast)."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from sppfeat.errors import UsageError, unknown_name

T = TypeVar("T")
RECIPE_VERSION: Final = 1
NATIVE: Final = "native"
# The backbone that is no network: bags of visual words made of SIFT descriptors.
SIFT_BOW: Final = "sift-bow"

POOLINGS: Final = ("max", "avg", "gem")
FUSIONS: Final = ("mean", "max", "concat")
NORMALIZATIONS: Final = ("l2", "signed-sqrt-l2", "none")
PRECISIONS: Final = ("float32", "bfloat16", "float16", "int8")
DTYPES: Final = ("float16", "float32")
CROPS: Final = ("none", "center")
ORIENTATIONS: Final = ("exif", "ignore")
INTERPOLATIONS: Final = ("bicubic", "bilinear", "lanczos")
ENGINES: Final = ("auto", "torch", "openvino")

# A level of 64 already makes 4096 bins; no feature map in use has more cells per side.
MAX_LEVEL: Final = 64
# Beyond this, powers of usual activations overflow double precision; long before that, gem equals the maximum.
MAX_GEM_P: Final = 50.0
MIN_SCALE: Final = 16
MAX_SCALE: Final = 4096


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that changes descriptor values; saved as JSON in every file made from it.

    Several backbones, joined by `+`, and several layers, joined by `,`, give a descriptor of several parts, each
    normalized by itself, in the order backbone, scale (if scales are concatenated), layer; see `parts`.

    backbone: `efficientnet_lite0|1|2`, `torchvision:NAME`, `timm:NAME` or `sift-bow` (bags of visual words, see
        `sppfeat.engines.sift_engine`), or several, such as `efficientnet_lite0+efficientnet_lite2`. One may have scales
        of its own: `efficientnet_lite0@320`.
    weights: `pretrained` (the backbone's own), `random` (seeded; for timing and tests) or a file, .safetensors or
        .pth, or for `sift-bow` its vocabulary; for several backbones one for all of them, or one for each, joined by
        `+`.
    layer: dotted name of the module whose output is pooled, or several, such as `blocks.4,blocks.6`; for several
        backbones those of all of them, or of each, joined by `+`; None: the backbone's default.
    scales: short sides in pixels, or `native` (no resizing).
    levels: pyramid levels; level n is an n x n grid over the feature map.
    pooling: `max`, `avg`, or `gem` (generalized mean with exponent `gem_p`).
    fuse: how the descriptors of several scales become one: `mean`, `max` or `concat`.
    normalize: of each scale's descriptor, before `fuse`: `l2`, `signed-sqrt-l2` or `none`.
    precision: of the network's arithmetic. dtype: of the stored values.
    calibration: of a network of precision `int8`, whose whole numbers were chosen on some images (see
        `sppfeat.extraction.calibrate`): its fingerprint, or those of several backbones, joined by `+`.
    crop: `none` describes the whole image; `center` its central square, resized so that the scale is 7/8 of
        the short side, as is common practice on ImageNet.
    size_multiple: both sides of the resized image are rounded to a multiple of this; 1 = exact.
    min_side, max_aspect: an image with a shorter side, or a larger long/short ratio, fails.
    max_pixels: an image with more pixels than this once resized fails (bounds memory at `native`).
    mean, std, interpolation: the network's input; None: what its weights were trained with, for each backbone.
    orientation: `exif` turns the image upright; `ignore` takes the pixels as stored.
    jpeg_draft: let the JPEG decoder shrink by 2, 4 or 8 while decoding; faster on large photographs, but
        changes values.
    channels: of each part, filled in where there are several; not part of the identity, which follows from the rest.

    Raises UsageError that names the field for an invalid value.
    """

    backbone: str = "efficientnet_lite0"
    weights: str = "pretrained"
    layer: str | None = None
    scales: tuple[int | str, ...] = (224,)
    levels: tuple[int, ...] = (6, 3, 2, 1)
    pooling: str = "max"
    gem_p: float = 3.0
    fuse: str = "mean"
    normalize: str = "l2"
    precision: str = "float32"
    calibration: str | None = None
    dtype: str = "float16"
    crop: str = "none"
    size_multiple: int = 32
    min_side: int = 8
    max_aspect: float = 20.0
    max_pixels: int = 4_000_000
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: str | None = None
    orientation: str = "exif"
    jpeg_draft: bool = False
    channels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("backbone", "weights"):
            _require_text(name, getattr(self, name))
        if self.layer is not None:
            _require_text("layer", self.layer)
            _check_layers(self.layer)
        object.__setattr__(self, "scales", _scales(self.scales))
        object.__setattr__(self, "levels", _levels(self.levels))
        for name, valid in (
            ("pooling", POOLINGS),
            ("fuse", FUSIONS),
            ("normalize", NORMALIZATIONS),
            ("precision", PRECISIONS),
            ("dtype", DTYPES),
            ("crop", CROPS),
            ("orientation", ORIENTATIONS),
        ):
            _require_choice(name, getattr(self, name), valid)
        if self.interpolation is not None:
            _require_choice("interpolation", self.interpolation, INTERPOLATIONS)
        _require_integer("size_multiple", self.size_multiple, 1, 512)
        _require_integer("min_side", self.min_side, 1, MAX_SCALE)
        _require_integer("max_pixels", self.max_pixels, 1, 1 << 40)
        object.__setattr__(self, "max_aspect", _number("max_aspect", self.max_aspect, 1.0, 1e6))
        object.__setattr__(self, "gem_p", _number("gem_p", self.gem_p, 1.0, MAX_GEM_P))
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _per_channel(name, value))
        if self.std is not None and min(self.std) <= 0:
            raise UsageError(f"std must be three numbers above 0, found {self.std}")
        if not isinstance(self.jpeg_draft, bool):
            raise UsageError(f"jpeg_draft must be true or false, found {self.jpeg_draft!r}")
        if self.crop == "center" and NATIVE in self.scales:
            raise UsageError("crop 'center' needs a scale in pixels, found 'native'")
        if self.jpeg_draft and NATIVE in self.scales:
            raise UsageError("jpeg_draft needs scales in pixels, found 'native'")
        if self.calibration is not None:
            self._check_calibration()
        if self.backbone == SIFT_BOW:
            self._check_bag_of_words()
        self._settle_scales()
        if self.channels is not None:
            object.__setattr__(self, "channels", tuple(self.channels))
            for number in self.channels:
                _require_integer("channels", number, 1, 1 << 20)

    def _check_calibration(self) -> None:
        if self.precision != "int8":
            raise UsageError(f"calibration must be none with precision {self.precision}, found {self.calibration!r}")
        if not isinstance(self.calibration, str) or not re.fullmatch(
            r"[0-9a-f]{16}(\+[0-9a-f]{16})*", self.calibration
        ):
            raise UsageError(f"calibration must be a fingerprint of 16 digits, found {self.calibration!r}")

    def _check_bag_of_words(self) -> None:
        if self.weights in ("pretrained", "random"):
            raise UsageError(
                f"backbone {SIFT_BOW}: expected a vocabulary, with --vocabulary FILE (see `sppfeat train vocabulary`), "
                f"found weights {self.weights!r}"
            )
        for name, expected in (("pooling", ("avg", "max")), ("precision", ("float32",))):
            if (found := getattr(self, name)) not in expected:
                raise UsageError(f"{name}: expected {' or '.join(expected)} for backbone {SIFT_BOW}, found {found!r}")
        for name in ("mean", "std"):
            if getattr(self, name) is not None:
                raise UsageError(f"{name}: expected none for backbone {SIFT_BOW}, found {_show(getattr(self, name))}")

    def _settle_scales(self) -> None:
        """Where every backbone has scales of its own, `scales` says nothing, and is those of the first."""
        branches = self.branches()
        if "@" in self.backbone and all("@" in name for name in self.backbone.split("+")):
            if self.scales not in (Recipe.scales, branches[0].scales):
                raise UsageError(
                    f"scales: expected none beside backbones that have their own ({self.backbone}), found "
                    f"{_show(self.scales)}"
                )
            object.__setattr__(self, "scales", branches[0].scales)

    def branches(self) -> tuple[Recipe, ...]:
        """The recipe of each backbone by itself, with the layers of that backbone."""
        names = self.backbone.split("+")
        if len(names) == 1 and "@" not in names[0]:
            return (self,)
        if len(names) > 1 and self.jpeg_draft:
            raise UsageError("jpeg_draft needs one backbone: a draft for one would change what another sees")
        weights = _each("weights", self.weights, len(names))
        layers = [None] * len(names) if self.layer is None else _each("layer", self.layer, len(names))
        calibrated: list[Any] = [None] * len(names)
        if self.calibration is not None:
            calibrated = _each("calibration", self.calibration, len(names))
        found = []
        for name, weight, layer, calibration in zip(names, weights, layers, calibrated, strict=True):
            backbone, _, scales = name.partition("@")
            own = dataclasses.replace(
                self,
                backbone=backbone,
                weights=weight,
                layer=layer,
                calibration=calibration,
                scales=tuple(int(s) if s.isdecimal() else s for s in scales.split(",")) if scales else self.scales,
                channels=None,
            )
            if own in found:
                raise UsageError(f"backbone: expected different ones, found {name} twice, with the same layers")
            found.append(own)
        return tuple(found)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers of a recipe of one backbone; none if it is the backbone's default."""
        return () if self.layer is None else tuple(self.layer.split(","))

    def parts(self, dim: int) -> tuple[Part, ...]:
        """The parts of a descriptor of `dim` values, by a recipe that was filled in. Raises UsageError unless they
        have that length together."""
        names = [
            (branch.backbone, layer, scale)
            for branch in self.branches()
            for scale in (branch.scales if self.fuse == "concat" else [None])
            for layer in branch.layers or ("",)
        ]
        if len(names) == 1:
            return (Part(*names[0], channels=dim // self.bins, start=0, end=dim),)
        channels = self.channels or (dim // (self.bins * len(names)),) * len(names)
        lengths = [self.bins * each for each in channels]
        if len(channels) != len(names) or sum(lengths) != dim:
            raise UsageError(f"recipe: expected {len(names)} parts of {dim} values, found channels {_show(channels)}")
        ends = itertools.accumulate(lengths)
        return tuple(
            Part(*name, channels=each, start=end - length, end=end)
            for name, each, length, end in zip(names, channels, lengths, ends, strict=True)
        )

    @property
    def bins(self) -> int:
        """Bins of the pyramid: the sum of n x n over the levels."""
        return sum(level * level for level in self.levels)

    def to_json(self) -> str:
        """The recipe as one JSON object with sorted keys; `Recipe.from_json` reads it back."""
        fields = dataclasses.asdict(self)
        for name in ("channels", "calibration"):
            if fields[name] is None:
                del fields[name]
        return json.dumps({"recipe_version": RECIPE_VERSION, **fields}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read a recipe. Raises UsageError that names an unknown key, an invalid value or a newer version."""
        from sppfeat.files import decode_document

        def decode(shape: type[T], expected: str) -> T:
            # Lenient, because the name of a weights file may not be UTF-8.
            return decode_document(text, shape, what=f"recipe: expected {expected}", error=UsageError, lenient=True)

        keys = set(decode(dict[str, object], "a JSON object"))
        expected = f"a recipe_version from 1 to {RECIPE_VERSION}"
        version = decode(_Version, expected).recipe_version
        if version < 1:
            raise UsageError(f"recipe: expected {expected}, found {version}")
        if version > RECIPE_VERSION:
            raise UsageError(
                f"recipe: version {version} is newer than this sppfeat reads ({RECIPE_VERSION}): update sppfeat"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(keys - known - {"recipe_version"}):
            raise UsageError("recipe: " + unknown_name("key", unknown[0], sorted(known)))
        return decode(cls, "valid values")

    def identity(self, weights_sha256: str) -> str:
        """SHA-256 of everything that determines values: the fields, with the weights by content, not by path."""
        fields = dataclasses.asdict(self) | {"weights": weights_sha256, "recipe_version": RECIPE_VERSION}
        del fields["channels"]
        if self.calibration is None:
            del fields["calibration"]  # files made before there was one keep their identity
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def differences(
        self,
        other: Recipe,
        names: tuple[str, str],
        *,
        weights: tuple[str, str] | None = None,
        dims: tuple[int, int] | None = None,
    ) -> list[str]:
        """What differs, such as `scales: store 224, asked 224,320`, where the names are `store` and `asked`.

        weights: the SHA-256 of both, since paths say nothing. dims: the lengths of both descriptors. Channels are not
        compared: they follow from the rest.
        """
        pairs = {
            field.name: (getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(self)
            if field.name not in ("weights", "channels")
        }
        if weights is not None and weights[0] != weights[1]:
            pairs["weights"] = short_sha(weights[0]), short_sha(weights[1])
        if dims is not None:
            pairs["dimensions"] = dims
        return [
            f"{field}: {names[0]} {_show(ours)}, {names[1]} {_show(theirs)}"
            for field, (ours, theirs) in pairs.items()
            if ours != theirs
        ]


@dataclass(frozen=True)
class Part:
    """The values `start` to `end` of a descriptor: the pyramid of one layer of one backbone, normalized by itself.

    scale: None where the scales are fused into one.
    """

    backbone: str
    layer: str
    scale: int | str | None
    channels: int
    start: int
    end: int


@dataclass(frozen=True)
class _Version:
    """The part of a recipe's JSON that is read first."""

    recipe_version: int


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Everything that changes only how fast descriptors are made; never part of their identity.

    device: `auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:N`, or several GPUs, `cuda:N,M,...`: one process
        each (`extract_folder` alone).
    engine: `auto` (the fastest that is installed and runs the network), `torch` or `openvino`.
    batch_size: maximum images per forward pass; None: chosen for the device.
    num_workers: decoding threads, or, for many images on a GPU, processes; None: one per core.
    """

    device: str = "auto"
    engine: str = "auto"
    batch_size: int | None = None
    num_workers: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+(,\d+)*)?", self.device):
            raise UsageError(f"device must be auto, cpu, cuda, cuda:N or cuda:N,M,..., found {self.device!r}")
        if len(set(_devices(self.device))) != len(_devices(self.device)):
            raise UsageError(f"device must name different GPUs, found {self.device!r}")
        _require_choice("engine", self.engine, ENGINES)
        if self.batch_size is not None:
            _require_integer("batch_size", self.batch_size, 1, 4096)
        if self.num_workers is not None:
            _require_integer("num_workers", self.num_workers, 1, 1024)

    def devices(self) -> list[str]:
        """The devices, one by one."""
        return _devices(self.device)


def short_sha(weights_sha256: str) -> str:
    """The beginning of a SHA-256 of weights, or of those of each part, for messages."""
    return "+".join(one[:12] for one in weights_sha256.split("+"))


def _devices(device: str) -> list[str]:
    kind, _, numbers = device.partition(":")
    return [f"{kind}:{int(number)}" for number in numbers.split(",")] if "," in numbers else [device]


def _show(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _require_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise UsageError(f"{name} must be a name, found {value!r}")


def _check_layers(layer: str) -> None:
    for group in layer.split("+"):
        names = group.split(",")
        if not all(names):
            raise UsageError(f"layer must be names, found {layer!r}")
        if repeated := [name for at, name in enumerate(names) if name in names[:at]]:
            raise UsageError(f"layer: expected different names, found {repeated[0]} twice")


def _require_choice(name: str, value: object, valid: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in valid:
        raise UsageError(unknown_name(name, str(value), valid))


def _require_integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} must be a whole number from {low} to {high}, found {value!r}")


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise UsageError(f"{name} must be a number from {low:g} to {high:g}, found {value!r}")
    return float(value)


def _per_channel(name: str, value: Any) -> tuple[float, ...]:
    numbers = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(numbers) != 3 or not all(
        isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in numbers
    ):
        raise UsageError(f"{name} must be three numbers, for red, green and blue, found {value!r}")
    return tuple(float(n) for n in numbers)


def _each(name: str, value: str, count: int) -> list[str]:
    """One value for each of several backbones, joined by `+`, or one for all of them."""
    values = value.split("+") if count > 1 else [value]
    if len(values) == 1:
        return values * count
    if len(values) != count:
        raise UsageError(
            f"{name}: expected one, or one for each of {count} backbones, found {len(values)}: {value} (a path cannot "
            "hold +)"
        )
    return values


def _levels(value: Any) -> tuple[int, ...]:
    levels = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    good = levels and all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= MAX_LEVEL for n in levels)
    if not good or len(set(levels)) != len(levels):
        raise UsageError(
            f"levels must be different whole numbers from 1 to {MAX_LEVEL}, such as 6,3,2,1, found {_show(levels)!r}"
        )
    return levels


def _scales(value: Any) -> tuple[int | str, ...]:
    scales = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    good = scales and all(
        s == NATIVE or (isinstance(s, int) and not isinstance(s, bool) and MIN_SCALE <= s <= MAX_SCALE) for s in scales
    )
    if not good or len(set(scales)) != len(scales):
        raise UsageError(
            f"scales must be different short sides from {MIN_SCALE} to {MAX_SCALE} pixels, or 'native', "
            f"such as 224,320, found {_show(scales)!r}"
        )
    return scales
