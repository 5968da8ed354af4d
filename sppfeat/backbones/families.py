"""Which families of networks work: one small network of each is cut at its last layer, without weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import torch
from torch import nn

from sppfeat._version import __version__
from sppfeat.backbones.backbone import build_network, cuttable_of
from sppfeat.backbones.description import KEPT_DESCRIPTIONS, network_versions
from sppfeat.backbones.hooking import HookedNetwork
from sppfeat.errors import BackboneError, SppFeatError, one_line
from sppfeat.files import cache_folder, cache_key, decode_document, read_entry, write_entry

# How libraries call their smallest networks, the smallest first.
_SMALL: Final = (
    "test_",
    "pico",
    "femto",
    "atto",
    "nano",
    "xxs",
    "xx_small",
    "xxtiny",
    "mini",
    "tiny",
    "_xs",
    "s0",
    "b0",
)
_SMALLISH: Final = ("_ti", "_t", "50", "small", "_s", "18", "11", "14", "1")
# Parameters of networks that are run, with random weights, where shapes do not tell all.
_RUN_BELOW: Final = 100_000_000


@dataclass(frozen=True)
class Family:
    """What is known of a family, by its network `example`.

    layer: that is pooled by default, with its channels and stride. how: it is cut, `traced` or by `hooks`. side: of the
    only images that it takes, squares; None: it takes images of any size. multiple: of pixels that both sides must be.
    problem: why it does not work; then the others say nothing.
    """

    name: str
    example: str
    layer: str = ""
    channels: int = 0
    stride: int = 0
    how: str = ""
    side: int | None = None
    multiple: int = 1
    problem: str | None = None


class _Kept(msgspec.Struct, forbid_unknown_fields=True):
    families: list[Family]


class _Unusable(SppFeatError):
    pass


def survey_families(done: Callable[[int, int], None] = lambda at, count: None) -> list[Family]:
    """Every family of torchvision and timm, by one small network of each: takes a minute, and is kept in the cache.

    done: called with the number of families looked at, and of all of them.
    """
    entry = (
        cache_folder()
        / "networks"
        / f"families-{cache_key(dict[str, object](network_versions(), sppfeat=__version__))}.json"
    )
    body = read_entry(entry)
    if body is not None:
        try:
            return decode_document(body, _Kept, what="families", error=_Unusable).families
        except _Unusable:
            pass
    examples = family_examples()
    found = []
    for at, (name, example) in enumerate(examples.items()):
        done(at, len(examples))
        found.append(look_at(name, example))
    done(len(examples), len(examples))
    write_entry(entry, msgspec.json.encode(_Kept(families=found)), kept=KEPT_DESCRIPTIONS)
    return found


def family_examples() -> dict[str, str]:
    """A small network of each family of torchvision and timm, by the family's name."""
    import timm
    from torchvision import models

    groups: dict[str, list[str]] = {}
    for name in models.list_models(module=models):
        module = models.get_model_builder(name).__module__.rpartition(".")[2]
        groups.setdefault(f"torchvision:{module}", []).append(f"torchvision:{name}")
    for module in sorted(timm.list_modules()):
        if names := timm.list_models(module=module):
            groups[f"timm:{module}"] = [f"timm:{name}" for name in names]
    return {family: _smallest(names) for family, names in groups.items()}


def look_at(family: str, example: str) -> Family:
    """Cut a network at its default layer, without values: whatever its code raises is its problem."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = _build_empty(example)
            cuttable = cuttable_of(example, network, ())
            layer = cuttable.layer(cuttable.default_layer())
            if isinstance(cuttable, HookedNetwork) and sum(p.numel() for p in network.parameters()) < _RUN_BELOW:
                cuttable = HookedNetwork(example, build_network(example))
                cuttable.check([layer.name])
    except Exception as error:  # the network's own code can fail in any way
        reason = error if isinstance(error, SppFeatError) else f"cannot be built: {one_line(error)}"
        return Family(family, example, problem=str(reason).removeprefix(f"backbone {example}: "))
    hooked = isinstance(cuttable, HookedNetwork)
    return Family(
        family,
        example,
        layer.name,
        layer.channels,
        layer.stride,
        "hooks" if hooked else "traced",
        cuttable.fixed if isinstance(cuttable, HookedNetwork) else None,
        layer.stride if isinstance(cuttable, HookedNetwork) and cuttable.tiles(layer.name) else 1,
    )


def _build_empty(example: str) -> nn.Module:
    """A network without values, which takes no memory; with them where its constructor computes with them."""
    try:
        with torch.device("meta"):
            return build_network(example)
    except BackboneError:
        return build_network(example)


def _smallest(names: Sequence[str]) -> str:
    """The name that sounds like the smallest network."""
    for words in (_SMALL, _SMALLISH):
        for word in words:
            if found := [name for name in names if re.search(rf"{word}(?![0-9])", name.partition(":")[2])]:
                return min(found, key=lambda name: (len(name), name))
    return min(names, key=lambda name: (len(name), name))
