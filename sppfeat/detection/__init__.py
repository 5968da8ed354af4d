"""SPP-net object detection: annotations, training, the detector, its evaluation, and drawings."""

from __future__ import annotations

from sppfeat.detection.annotations import read_annotations, select_classes
from sppfeat.detection.detecting import (
    Detecting,
    DetectionObserver,
    Detections,
    DetectOptions,
    DetectorRunner,
    detect_images,
    threshold_for,
)
from sppfeat.detection.detections_page import DetectionPage
from sppfeat.detection.detector import Detector, detection_recipe, open_detector
from sppfeat.detection.drawing import DrawingFolder
from sppfeat.detection.evaluation import DetectionEvaluation, complete_options, evaluate_detector
from sppfeat.detection.evaluation_page import write_evaluation
from sppfeat.detection.training_options import TrainingOptions
from sppfeat.detection.tuning_page import write_detector_page

__all__ = [
    "DetectOptions",
    "Detecting",
    "DetectionEvaluation",
    "DetectionObserver",
    "DetectionPage",
    "Detections",
    "Detector",
    "DetectorRunner",
    "DrawingFolder",
    "TrainingOptions",
    "complete_options",
    "detect_images",
    "detection_recipe",
    "evaluate_detector",
    "open_detector",
    "read_annotations",
    "select_classes",
    "threshold_for",
    "write_detector_page",
    "write_evaluation",
]
