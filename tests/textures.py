"""Images of textures of three kinds, which bags of visual words tell apart, and a vocabulary to read them with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from sppfeat.backbones import Vocabulary, save_vocabulary

KINDS = ("across", "down", "checks")


def texture(kind: str, height: int, width: int, seed: int) -> np.ndarray:
    """[H, W, 3] uint8: stripes or checks of a random period, phase and noise."""
    random = np.random.default_rng(seed)
    period, phase = random.uniform(9, 12), random.uniform(0, 9)
    y, x = np.mgrid[:height, :width] + phase
    waves = {"across": np.sin(2 * np.pi * y / period), "down": np.sin(2 * np.pi * x / period)}
    waves["checks"] = waves["across"] * waves["down"]
    levels = 128 + 90 * waves[kind] + random.normal(0, 6, (height, width))
    return np.repeat(np.clip(levels, 0, 255).astype(np.uint8)[:, :, None], 3, 2)


def make_textures(folder: Path, count: int) -> Path:
    """`count` images of each kind, in a folder of its own, half of them in train/ and half in test/; the folder."""
    for part, kind, number in [
        (part, kind, n) for part in ("train", "test") for kind in KINDS for n in range(count // 2)
    ]:
        path = folder / part / kind / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = 1000 * (part == "test") + 100 * KINDS.index(kind) + number
        height, width = np.random.default_rng(seed).choice([64, 75, 90], 2)
        Image.fromarray(texture(kind, height, width, seed)).save(path, compress_level=0)
    return folder


def random_vocabulary(words: int, seed: int = 0) -> Vocabulary:
    """Centers as far apart as descriptors of noise."""
    centers = np.random.default_rng(seed).integers(0, 120, (words, 128)).astype(np.float32)
    return Vocabulary(centers=centers, seed=seed, images=1, descriptors=words, objective=1.5, versions={"sppfeat": "0"})


def save_random(path: Path, words: int = 6, seed: int = 0) -> Path:
    """The file of such a vocabulary."""
    save_vocabulary(random_vocabulary(words, seed), path, overwrite=True)
    return path
