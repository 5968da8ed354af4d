"""A random sample of images, and of the SIFT descriptors of each: the same for the same seed, whatever runs first."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from sppfeat.backbones import dense_sift, grid_size
from sppfeat.errors import ImageError, one_line
from sppfeat.images import Item, prepare_image
from sppfeat.progress import Observer
from sppfeat.recipe import Recipe
from sppfeat.settings import quiet_pillow


@dataclass(frozen=True)
class Sample:
    """Descriptors [P, 128] uint8 of the `images` that could be read, and why the others could not, by name."""

    descriptors: np.ndarray
    images: int
    failed: dict[str, str]


def choose_items(items: Iterable[Item], count: int, seed: int) -> list[Item]:
    """A random choice of at most `count` items of a stream, each as likely, in the order of the stream.

    Only the chosen ones are held: reservoir sampling (Vitter, "Random Sampling with a Reservoir", 1985, algorithm R).
    """
    numbers, kept = random.Random(seed), []
    for at, item in enumerate(items):
        if at < count:
            kept.append((at, item))
        elif (place := numbers.randrange(at + 1)) < count:
            kept[place] = at, item
    return [item for _, item in sorted(kept, key=lambda one: one[0])]


def sample_descriptors(
    items: list[Item], recipe: Recipe, *, most: int, seed: int, workers: int, minimum: int, observer: Observer
) -> Sample:
    """At most `most` descriptors of each image, from random places of its grid of patches.

    recipe: how images are read and resized, at its one scale. minimum: shortest side in pixels. workers: threads.
    An image that cannot be read is counted, and told to the observer.
    """

    def describe(at: int, item: Item) -> np.ndarray | str:
        if item.problem is not None:
            return item.problem
        try:
            with quiet_pillow:
                pixels = prepare_image(item, recipe, minimum=minimum).inputs[0]
            rows, columns = grid_size(*pixels.shape[:2])
            # By its own seed: threads finish in any order.
            chosen = np.random.default_rng([seed, at]).permutation(rows * columns)[:most]
            return dense_sift(pixels, np.sort(chosen)).astype(np.uint8)
        except (ImageError, RuntimeError) as error:
            return one_line(error)
        except MemoryError:
            return "cannot be described: out of memory"

    found, failed = [], {}
    waiting: deque[tuple[Item, Future[np.ndarray | str]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="sift")
    numbered = enumerate(items)
    try:
        while True:
            for at, item in itertools.islice(numbered, 4 * workers - len(waiting)):
                waiting.append((item, pool.submit(describe, at, item)))
            if not waiting:
                break
            item, future = waiting.popleft()
            result = future.result()
            if isinstance(result, str):
                failed[item.name] = result
            else:
                found.append(result)
            observer.row(item.name, result if isinstance(result, str) else None)
    finally:
        pool.shutdown(cancel_futures=True)
    descriptors = np.concatenate(found) if found else np.zeros((0, 128), np.uint8)
    return Sample(descriptors, len(found), failed)
