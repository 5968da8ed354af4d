"""Learning a vocabulary of visual words from images, for backbone sift-bow."""

from __future__ import annotations

from sppfeat.vocabulary.learning import Learned, VocabularyOptions, learn_vocabulary
from sppfeat.vocabulary.sampling import Sample, sample_descriptors

__all__ = ["Learned", "Sample", "VocabularyOptions", "learn_vocabulary", "sample_descriptors"]
