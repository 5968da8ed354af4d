"""How well descriptors tell classes apart: protocols, labels, the classifier, and its page."""

from __future__ import annotations

from sppfeat.transfer.classifier import Classifier, open_classifier, save_classifier
from sppfeat.transfer.labels import TEST_PARTS, Labels, labels_from_folders, read_labels, read_voc_labels
from sppfeat.transfer.options import TransferOptions
from sppfeat.transfer.prediction import Prediction, classifier_describer, predict
from sppfeat.transfer.predictions import (
    Ranked,
    check_predictions_csv,
    ranked,
    write_predictions_csv,
    write_predictions_page,
)

__all__ = [
    "Classifier",
    "Labels",
    "Prediction",
    "Ranked",
    "TEST_PARTS",
    "TransferOptions",
    "check_predictions_csv",
    "classifier_describer",
    "labels_from_folders",
    "open_classifier",
    "predict",
    "ranked",
    "read_labels",
    "read_voc_labels",
    "save_classifier",
    "write_predictions_csv",
    "write_predictions_page",
]
