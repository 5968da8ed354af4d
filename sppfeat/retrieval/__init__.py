"""Galleries and their search: whitening, index, gallery, duplicates, crops, and the evaluation of rankings."""

from __future__ import annotations

from sppfeat.retrieval.changes import Change, add_map, add_to_gallery, create_gallery, read_names, remove_from_gallery
from sppfeat.retrieval.crops import Crops, check_crops, find_crops
from sppfeat.retrieval.duplicates import (
    DEFAULT_THRESHOLD,
    Duplicates,
    check_duplicates_csv,
    find_duplicates,
    write_duplicates_csv,
)
from sppfeat.retrieval.duplicates_page import write_duplicates_page
from sppfeat.retrieval.evaluation import Retrieval, RetrievalOptions, evaluate_retrieval, percent
from sppfeat.retrieval.explanation import Explanation
from sppfeat.retrieval.faiss_index import IndexOptions
from sppfeat.retrieval.gallery import Gallery, GalleryCheck, describe_gallery, open_gallery, verify_gallery
from sppfeat.retrieval.ground_truth import read_boxes, read_ground_truth, write_query_windows
from sppfeat.retrieval.hits_page import PAGE_QUERIES, write_hits_page
from sppfeat.retrieval.map import check_map, tile_order
from sppfeat.retrieval.members import Member
from sppfeat.retrieval.queries import describer_for, rows_of_image
from sppfeat.retrieval.retrieval_page import write_retrieval_page
from sppfeat.retrieval.search import (
    Answer,
    Neighbor,
    SearchOptions,
    SearchResult,
    part_factors,
    search_descriptors,
    search_images,
    search_items,
    search_store,
    stream_store,
)
from sppfeat.retrieval.whitening import DEFAULT_DIMS, ProjectionOptions

__all__ = [
    "Answer",
    "Change",
    "Crops",
    "DEFAULT_DIMS",
    "DEFAULT_THRESHOLD",
    "Duplicates",
    "Explanation",
    "Gallery",
    "GalleryCheck",
    "IndexOptions",
    "Member",
    "Neighbor",
    "PAGE_QUERIES",
    "ProjectionOptions",
    "Retrieval",
    "RetrievalOptions",
    "SearchOptions",
    "SearchResult",
    "add_map",
    "add_to_gallery",
    "check_crops",
    "check_duplicates_csv",
    "check_map",
    "create_gallery",
    "describe_gallery",
    "describer_for",
    "evaluate_retrieval",
    "find_crops",
    "find_duplicates",
    "open_gallery",
    "part_factors",
    "percent",
    "read_boxes",
    "read_ground_truth",
    "read_names",
    "remove_from_gallery",
    "rows_of_image",
    "search_descriptors",
    "search_images",
    "search_items",
    "search_store",
    "stream_store",
    "tile_order",
    "verify_gallery",
    "write_duplicates_csv",
    "write_duplicates_page",
    "write_hits_page",
    "write_query_windows",
    "write_retrieval_page",
]
