"""Calibration of a recipe of precision int8: its network's whole numbers are chosen on some of the user's own images,
and compared with float32 on others."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

import msgspec
import numpy as np

from sppfeat._version import __version__
from sppfeat.backbones import Network, network_versions
from sppfeat.engines import Engine, is_calibrated, keep_calibrated
from sppfeat.errors import BackboneError, ImageError, UsageError
from sppfeat.extraction.pipeline import Describer
from sppfeat.files import cache_folder, cache_key, read_entry, write_entry
from sppfeat.images import Item, prepare_image
from sppfeat.machine import integer_instructions, processor
from sppfeat.progress import Observer
from sppfeat.recipe import Recipe, RunOptions
from sppfeat.store import open_store

# Images that whole numbers are chosen on, and others that the result is checked on, drawn from the first ones.
IMAGES: Final = 300
HELD_OUT: Final = 60
_FIRST: Final = 2048
_FEWEST: Final = 12
# Of those that are held out, as many stay with the network.
_SAMPLES: Final = 2
# The mean cosine of descriptors to those of float32, on held-out images.
LEAST_COSINE: Final = 0.99
_KEPT: Final = 100
_SPEED_ROUNDS: Final = 3


class Calibration(msgspec.Struct, frozen=True):
    """fingerprints: of the network of each backbone, joined by `+`. images, held_out: how many. cosine: mean of
    descriptors to those of float32, on held-out images. speed: of the networks, in times that of float32."""

    fingerprints: str
    images: int
    held_out: int
    cosine: float
    speed: float

    def check(self) -> None:
        """Raise UsageError unless it is good enough, and faster."""
        if not self.cosine >= LEAST_COSINE:
            raise UsageError(
                f"precision int8: expected descriptors with a mean cosine to float32 of at least {LEAST_COSINE}, found "
                f"{self.cosine:.4f} on {self.held_out} images: use float32 or bfloat16"
            )
        if self.speed < 1:
            has = ", ".join(integer_instructions()) or "no instructions for products of bytes (VNNI, AMX)"
            raise UsageError(
                "precision int8: expected it to be faster than float32, found "
                f"{self.speed:.2f} times its speed on this processor, which has {has}: use float32"
            )

    def told(self) -> str:
        """One line that says how good it is."""
        return (
            f"int8: calibrated on {self.images} images; mean cosine to float32 {self.cosine:.4f} on {self.held_out} "
            f"others, {self.speed:.1f} times as fast"
        )


def calibrate(
    recipe: Recipe,
    items: Iterable[Item],
    *,
    observer: Observer | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Recipe:
    """A recipe of precision int8 with the calibration that these images give; other recipes as they are.

    300 images are drawn, by a fixed seed, from the first 2,048, and 60 others to check the result; of fewer than 360, a
    sixth. Where the first way to choose ranges is not close enough, the second is tried. The networks stay in the
    user's cache, and the result of the same images and recipe is kept. Raises UsageError if there are too few images,
    or the result is not close to float32, or no faster; BackboneError, MissingExtraError; KeyboardInterrupt if it is
    stopped.
    """
    if recipe.precision != "int8" or recipe.calibration is not None:
        return recipe
    observer = observer or Observer()
    options = RunOptions(device="cpu")
    plain = Describer(replace(recipe, precision="float32"), options)
    first = list(islice((item for item in items if item.problem is None), _FIRST))
    order = np.random.default_rng(0).permutation(len(first))
    drawn = [first[at] for at in order[: IMAGES + HELD_OUT]]
    made_from: dict[str, object] = {
        "recipe": replace(recipe, weights="pretrained").to_json(),
        "weights": plain.weights_sha256,
        "images": [[item.name, *item.fingerprint()] for item in drawn],
        "versions": {"sppfeat": __version__} | network_versions(),
        "processor": processor(),
    }
    entry = cache_folder() / "calibrated" / f"{cache_key(made_from)}.json"
    kept = _read(read_entry(entry))
    if kept is None or not all(is_calibrated(each) for each in kept.fingerprints.split("+")):
        observer.say(f"calibrating int8 on up to {IMAGES} images, once")
        kept = _Calibrating(recipe, plain, drawn, options, stop).run()
        write_entry(entry, msgspec.json.encode(kept), kept=_KEPT)
    kept.check()
    observer.say(kept.told())
    return replace(recipe, calibration=kept.fingerprints)


def calibrated_as(recipe: Recipe, store: str | os.PathLike[str]) -> Recipe:
    """A recipe of precision int8 with the calibration of a store. Raises UsageError, StoreError."""
    made = open_store(store).recipe
    for which, found in (("of the recipe", recipe.precision), (f"of {os.fspath(store)}", made.precision)):
        if found != "int8":
            raise UsageError(f"calibration: expected precision int8 {which}, found {found}")
    return replace(recipe, calibration=made.calibration)


def _read(body: bytes | None) -> Calibration | None:
    try:
        return None if body is None else msgspec.json.decode(body, type=Calibration)
    except msgspec.DecodeError:
        return None


@dataclass
class _Calibrating:
    """One calibration. plain: describes in float32."""

    recipe: Recipe
    plain: Describer
    drawn: Sequence[Item]
    options: RunOptions
    stop: Callable[[], bool]

    def run(self) -> Calibration:
        rows = {found.position: found.rows for found in self.plain.describe(self.drawn, stop=self.stop)}
        self._check_stopped()
        readable = [(item, rows[at]) for at, item in enumerate(self.drawn) if rows.get(at) is not None]
        if len(readable) < _FEWEST:
            raise UsageError(
                f"precision int8: expected at least {_FEWEST} readable images to calibrate on, found {len(readable)}"
            )
        count = min(HELD_OUT, len(readable) // 6)
        held, chosen = readable[:count], [item for item, _ in readable[count:]]
        from sppfeat.engines.quantization import RANGES

        best: tuple[str, Describer, float] | None = None
        for ranges in RANGES:
            joined = self._quantized(chosen, [item for item, _ in held[:_SAMPLES]], ranges)
            whole = Describer(replace(self.recipe, calibration=joined), self.options)
            described = sorted(whole.describe([item for item, _ in held]), key=lambda found: found.position)
            cosines = [_cosine(one, other.rows) for (_, one), other in zip(held, described, strict=True)]
            cosine = float(np.mean(cosines))
            if best is None or cosine > best[2] or np.isnan(best[2]):
                best = joined, whole, cosine
            if cosine >= LEAST_COSINE:
                break
        assert best is not None
        joined, whole, cosine = best
        speed = _speed(self.plain.load(), whole.load(), self.recipe, [item for item, _ in held])
        return Calibration(joined, len(chosen), len(held), cosine, speed)

    def _quantized(self, chosen: Sequence[Item], samples: Sequence[Item], ranges: str) -> str:
        """The fingerprints of the networks of all backbones, joined by `+`."""
        from sppfeat.engines.quantization import quantize

        fingerprints = []
        for branch in self.recipe.branches():
            network = Network(replace(branch, precision="float32"))
            views = [(item, scale) for item in chosen for scale in branch.scales]

            def read(view: tuple[Item, int | str], network: Network = network) -> np.ndarray:
                self._check_stopped()
                return _input(view[0], network, view[1])[None]

            inputs = [_input(item, network, branch.scales[0]) for item in samples]
            fingerprints.append(keep_calibrated(quantize(network, views, read, inputs, ranges)))
        return "+".join(fingerprints)

    def _check_stopped(self) -> None:
        if self.stop():
            raise KeyboardInterrupt


def _input(item: Item, network: Network, scale: int | str) -> np.ndarray:
    """An image [H, W, 3] uint8, as the network gets it at a scale."""
    try:
        return prepare_image(item, replace(network.recipe, scales=(scale,))).inputs[0]
    except ImageError as error:  # it could be read a moment ago
        raise BackboneError(f"precision int8: {item.name}: {error}") from None


def _cosine(one: np.ndarray | None, other: np.ndarray | None) -> float:
    if one is None or other is None:
        return 0.0
    a, b = one[0].astype(np.float64), other[0].astype(np.float64)
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30))


def _speed(plain: list[Engine], whole: list[Engine], recipe: Recipe, items: Sequence[Item]) -> float:
    """How many times as fast the networks of whole numbers are: each image in turn by both, the best of three."""
    total = [0.0, 0.0]
    for at, branch in enumerate(recipe.branches()):
        network = Network(replace(branch, precision="float32"))
        for item in items:
            image = _input(item, network, branch.scales[0])[None]
            best = [float("inf"), float("inf")]
            for _ in range(_SPEED_ROUNDS):
                for side, engines in enumerate((plain, whole)):
                    began = time.perf_counter()
                    engines[at].feature_maps(image)
                    best[side] = min(best[side], time.perf_counter() - began)
            total = [total[0] + best[0], total[1] + best[1]]
    return total[0] / total[1]
