"""Windows on images: reading, naming, mapping onto feature maps, proposals, and boxes."""

from __future__ import annotations

from sppfeat.windows.boxes import box_targets, fit_ridge, moved_boxes, overlaps, suppress, voted_boxes
from sppfeat.windows.mapping import map_windows, nearest_scales, outside, part_of_image
from sppfeat.windows.proposals import Proposals, WindowFile, open_windows, propose_folder, windows_from
from sppfeat.windows.reading import COLUMNS, read_windows
from sppfeat.windows.selective_search import ProposalOptions, Proposer, propose

__all__ = [
    "COLUMNS",
    "ProposalOptions",
    "Proposals",
    "Proposer",
    "WindowFile",
    "box_targets",
    "fit_ridge",
    "map_windows",
    "moved_boxes",
    "nearest_scales",
    "open_windows",
    "outside",
    "overlaps",
    "part_of_image",
    "propose",
    "propose_folder",
    "read_windows",
    "suppress",
    "voted_boxes",
    "windows_from",
]
