"""Fixed-length image descriptors by spatial pyramid pooling.

What each command calls:

    extract                         extract_folder
    windows                         propose_folder
    inspect                         open_store, open_classifier, open_detector, open_vocabulary, open_windows,
                                    describe_gallery; with --verify also verify_store, verify_gallery
    models                          describe_backbones, layers_and_default, survey_families
    evaluate transfer, retrieval,   evaluate_transfer, evaluate_retrieval,
        detection, all              evaluate_detector, evaluate_matrix
    train svm, detector,            train_classifier, train_detector (tune_detector with --tune),
        vocabulary                  learn_vocabulary
    tune                            tune
    predict, detect                 predict, detect_images
    index                           create_gallery, add_to_gallery, remove_from_gallery, add_map
    search                          search_images, search_store
    serve                           serve_gallery
    duplicates                      find_duplicates, find_crops
    export, merge                   export_store, merge_stores

The public names are imported when they are first used, so that `import sppfeat` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sppfeat._version import __version__

if TYPE_CHECKING:
    from sppfeat.backbones import Vocabulary, open_vocabulary
    from sppfeat.backbones.backbone import describe_backbones, layers_and_default
    from sppfeat.backbones.families import survey_families
    from sppfeat.detection import (
        Detecting,
        DetectionEvaluation,
        DetectionObserver,
        Detections,
        DetectOptions,
        Detector,
        TrainingOptions,
        detect_images,
        detection_recipe,
        evaluate_detector,
        open_detector,
        read_annotations,
        select_classes,
    )
    from sppfeat.detection.train_detector import Training, train_detector
    from sppfeat.detection.tune_detector import TunedDetector, tune_detector
    from sppfeat.errors import (
        BackboneError,
        DeviceError,
        GalleryError,
        ImageError,
        MissingExtraError,
        ModelError,
        ReportError,
        SppFeatError,
        SppFeatWarning,
        StoreBusyError,
        StoreError,
        UsageError,
        WindowsError,
    )
    from sppfeat.extraction import (
        Described,
        Describer,
        Extraction,
        ShardOptions,
        calibrate,
        calibrated_as,
        extract_folder,
    )
    from sppfeat.images import Columns
    from sppfeat.matrix import Cell, evaluate_matrix, read_data, read_recipes
    from sppfeat.progress import Observer
    from sppfeat.pyramid.pooling import SpatialPyramidPool, pool_pyramid, pool_rois
    from sppfeat.recipe import Recipe, RunOptions
    from sppfeat.retrieval import (
        Change,
        Crops,
        Duplicates,
        Gallery,
        GalleryCheck,
        IndexOptions,
        ProjectionOptions,
        Retrieval,
        RetrievalOptions,
        SearchOptions,
        SearchResult,
        add_map,
        add_to_gallery,
        create_gallery,
        describe_gallery,
        evaluate_retrieval,
        find_crops,
        find_duplicates,
        open_gallery,
        read_ground_truth,
        remove_from_gallery,
        search_descriptors,
        search_images,
        search_store,
        verify_gallery,
    )
    from sppfeat.serve import ServeOptions, serve_gallery
    from sppfeat.store import (
        Block,
        Exported,
        LostFiles,
        Merged,
        Status,
        Store,
        count_lost,
        export_store,
        iter_blocks,
        merge_stores,
        open_store,
        split_row_name,
        to_numpy,
        verify_store,
    )
    from sppfeat.store.dataset import StoreDataset
    from sppfeat.svm import LinearSvm, SvmOptions
    from sppfeat.svm.solver import train_linear_svm
    from sppfeat.training import LearningOptions
    from sppfeat.transfer import (
        Classifier,
        Labels,
        Prediction,
        TransferOptions,
        open_classifier,
        predict,
        read_labels,
        read_voc_labels,
        save_classifier,
    )
    from sppfeat.transfer.evaluation import Transfer, evaluate_transfer
    from sppfeat.transfer.train_classifier import train_classifier
    from sppfeat.tuning import Tuned, TuningOptions
    from sppfeat.tuning.tune import tune
    from sppfeat.vocabulary import Learned, VocabularyOptions, learn_vocabulary
    from sppfeat.windows import ProposalOptions, Proposals, WindowFile, open_windows, propose_folder, read_windows

_HOMES = {
    "backbones": (
        "Vocabulary",
        "open_vocabulary",
    ),
    "backbones.backbone": (
        "describe_backbones",
        "layers_and_default",
    ),
    "backbones.families": ("survey_families",),
    "detection": (
        "DetectOptions",
        "Detecting",
        "DetectionEvaluation",
        "DetectionObserver",
        "Detections",
        "Detector",
        "TrainingOptions",
        "detect_images",
        "detection_recipe",
        "evaluate_detector",
        "open_detector",
        "read_annotations",
        "select_classes",
    ),
    "detection.train_detector": (
        "Training",
        "train_detector",
    ),
    "detection.tune_detector": (
        "TunedDetector",
        "tune_detector",
    ),
    "errors": (
        "BackboneError",
        "DeviceError",
        "GalleryError",
        "ImageError",
        "MissingExtraError",
        "ModelError",
        "ReportError",
        "SppFeatError",
        "SppFeatWarning",
        "StoreBusyError",
        "StoreError",
        "UsageError",
        "WindowsError",
    ),
    "extraction": (
        "Described",
        "Describer",
        "Extraction",
        "ShardOptions",
        "calibrate",
        "calibrated_as",
        "extract_folder",
    ),
    "images": ("Columns",),
    "matrix": (
        "Cell",
        "evaluate_matrix",
        "read_data",
        "read_recipes",
    ),
    "progress": ("Observer",),
    "pyramid.pooling": (
        "SpatialPyramidPool",
        "pool_pyramid",
        "pool_rois",
    ),
    "recipe": (
        "Recipe",
        "RunOptions",
    ),
    "retrieval": (
        "Change",
        "Crops",
        "Duplicates",
        "Gallery",
        "GalleryCheck",
        "IndexOptions",
        "ProjectionOptions",
        "Retrieval",
        "RetrievalOptions",
        "SearchOptions",
        "SearchResult",
        "add_map",
        "add_to_gallery",
        "create_gallery",
        "describe_gallery",
        "evaluate_retrieval",
        "find_crops",
        "find_duplicates",
        "open_gallery",
        "read_ground_truth",
        "remove_from_gallery",
        "search_descriptors",
        "search_images",
        "search_store",
        "verify_gallery",
    ),
    "serve": (
        "ServeOptions",
        "serve_gallery",
    ),
    "store": (
        "Block",
        "Exported",
        "LostFiles",
        "Merged",
        "Status",
        "Store",
        "count_lost",
        "export_store",
        "iter_blocks",
        "merge_stores",
        "open_store",
        "split_row_name",
        "to_numpy",
        "verify_store",
    ),
    "store.dataset": ("StoreDataset",),
    "svm": (
        "LinearSvm",
        "SvmOptions",
    ),
    "svm.solver": ("train_linear_svm",),
    "training": ("LearningOptions",),
    "transfer": (
        "Classifier",
        "Labels",
        "Prediction",
        "TransferOptions",
        "open_classifier",
        "predict",
        "read_labels",
        "read_voc_labels",
        "save_classifier",
    ),
    "transfer.evaluation": (
        "Transfer",
        "evaluate_transfer",
    ),
    "transfer.train_classifier": ("train_classifier",),
    "tuning": (
        "Tuned",
        "TuningOptions",
    ),
    "tuning.tune": ("tune",),
    "vocabulary": (
        "Learned",
        "VocabularyOptions",
        "learn_vocabulary",
    ),
    "windows": (
        "ProposalOptions",
        "Proposals",
        "WindowFile",
        "open_windows",
        "propose_folder",
        "read_windows",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "BackboneError",
    "Block",
    "Cell",
    "Change",
    "Classifier",
    "Columns",
    "Crops",
    "Described",
    "Describer",
    "DetectOptions",
    "Detecting",
    "DetectionEvaluation",
    "DetectionObserver",
    "Detections",
    "Detector",
    "DeviceError",
    "Duplicates",
    "Exported",
    "Extraction",
    "Gallery",
    "GalleryCheck",
    "GalleryError",
    "ImageError",
    "IndexOptions",
    "Labels",
    "Learned",
    "LearningOptions",
    "LinearSvm",
    "LostFiles",
    "Merged",
    "MissingExtraError",
    "ModelError",
    "Observer",
    "Prediction",
    "ProjectionOptions",
    "ProposalOptions",
    "Proposals",
    "Recipe",
    "ReportError",
    "Retrieval",
    "RetrievalOptions",
    "RunOptions",
    "SearchOptions",
    "SearchResult",
    "ServeOptions",
    "ShardOptions",
    "SpatialPyramidPool",
    "SppFeatError",
    "SppFeatWarning",
    "Status",
    "Store",
    "StoreBusyError",
    "StoreDataset",
    "StoreError",
    "SvmOptions",
    "Training",
    "TrainingOptions",
    "Transfer",
    "TransferOptions",
    "Tuned",
    "TunedDetector",
    "TuningOptions",
    "UsageError",
    "Vocabulary",
    "VocabularyOptions",
    "WindowFile",
    "WindowsError",
    "__version__",
    "add_map",
    "add_to_gallery",
    "calibrate",
    "calibrated_as",
    "count_lost",
    "create_gallery",
    "describe_backbones",
    "describe_gallery",
    "detect_images",
    "detection_recipe",
    "evaluate_detector",
    "evaluate_matrix",
    "evaluate_retrieval",
    "evaluate_transfer",
    "export_store",
    "extract_folder",
    "find_crops",
    "find_duplicates",
    "iter_blocks",
    "layers_and_default",
    "learn_vocabulary",
    "merge_stores",
    "open_classifier",
    "open_detector",
    "open_gallery",
    "open_store",
    "open_vocabulary",
    "open_windows",
    "pool_pyramid",
    "pool_rois",
    "predict",
    "propose_folder",
    "read_annotations",
    "read_data",
    "read_ground_truth",
    "read_labels",
    "read_recipes",
    "read_voc_labels",
    "read_windows",
    "remove_from_gallery",
    "save_classifier",
    "search_descriptors",
    "search_images",
    "search_store",
    "select_classes",
    "serve_gallery",
    "split_row_name",
    "survey_families",
    "to_numpy",
    "train_classifier",
    "train_detector",
    "train_linear_svm",
    "tune",
    "tune_detector",
    "verify_gallery",
    "verify_store",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(f"sppfeat.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'sppfeat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
