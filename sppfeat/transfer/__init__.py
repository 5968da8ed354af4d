"""How well descriptors tell classes apart: protocols, labels, the classifier, and its page."""

from __future__ import annotations

from sppfeat.transfer.classifier import Classifier, open_classifier, save_classifier
from sppfeat.transfer.labels import Labels, labels_from_folders, read_labels, read_voc_labels
from sppfeat.transfer.options import TransferOptions
from sppfeat.transfer.prediction import classifier_describer, predict

__all__ = [
    "Classifier",
    "Labels",
    "TransferOptions",
    "classifier_describer",
    "labels_from_folders",
    "open_classifier",
    "predict",
    "read_labels",
    "read_voc_labels",
    "save_classifier",
]
