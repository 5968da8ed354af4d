"""The engine `sift`: the words of an image's patches instead of a network's feature map, by OpenCV on the processor.

A linear SVM on the rows of `avg` under `signed-sqrt-l2` is spatial pyramid matching (Lazebnik, Schmid, Ponce, "Beyond
Bags of Features: Spatial Pyramid Matching for Recognizing Natural Scene Categories", CVPR 2006) with another kernel of
histograms: the levels have the paper's weights, and the product of two rows is, bin by bin, the sum of sqrt(p q) over
words (Hellinger's, or Bhattacharyya's, kernel) in place of the sum of min(p, q). That it is as good or better, and
linear, is in Vedaldi, Zisserman, "Efficient Additive Kernels via Explicit Feature Maps", TPAMI 2012.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

import numpy as np

from sppfeat.backbones import Network, dense_sift, grid_size, import_cv2
from sppfeat.pyramid import pool_word_windows, pool_words
from sppfeat.settings import WhileAny


@contextlib.contextmanager
def _without_threads() -> Iterator[None]:
    cv2 = import_cv2()
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


# OpenCV's threads: images are described side by side instead.
_one_thread: Final = WhileAny(_without_threads)


class SiftEngine:
    """Bags of visual words for images of any size; see `sppfeat.engines.engine.Engine`.

    network: of backbone sift-bow. streams, threads: images side by side, and cores for each.
    Raises BackboneError for a vocabulary that cannot be read, and MissingExtraError.
    """

    name = "sift"
    device = "cpu"
    # Images are described one by one: a batch saves nothing.
    batch_size = 1
    patience = 1

    def __init__(self, network: Network, streams: int, threads: int) -> None:
        import_cv2()
        self.streams, self.threads = streams, threads
        self._recipe = network.recipe
        self._vocabulary = network.vocabulary

    def at_work(self) -> contextlib.AbstractContextManager[object]:
        return _one_thread

    def lane(self) -> contextlib.AbstractContextManager[object]:
        return _one_thread

    def feature_maps(self, images: np.ndarray) -> list[np.ndarray]:
        """[N, h, w] int32, the word of each patch, as the only layer; see `Engine.feature_maps`."""
        rows, columns = grid_size(*images.shape[1:3])
        words = [self._vocabulary.words_of(dense_sift(image)) for image in images]
        return [np.stack(words).reshape(len(images), rows, columns)]

    def pool(self, maps: np.ndarray) -> np.ndarray:
        recipe = self._recipe
        return pool_words(maps, self._vocabulary.words, recipe.levels, recipe.pooling)

    def pool_windows(self, feature_map: np.ndarray, rois: np.ndarray) -> np.ndarray:
        recipe = self._recipe
        return pool_word_windows(feature_map, rois, self._vocabulary.words, recipe.levels, recipe.pooling)

    def release(self) -> None:
        pass  # nothing is held between images
