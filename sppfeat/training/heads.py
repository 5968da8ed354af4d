"""Heads that start from a fit on the untuned network."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def start_head(head: nn.Linear, weights: np.ndarray, biases: np.ndarray, labels: np.ndarray) -> None:
    """Copy fitted weights [K, D] and biases [K] of classes into a head. labels: [N] of the rows of the fit.

    The fit rules out a class that none of its rows is of, which would take very long to unlearn: it starts with the
    lowest bias of the others instead.
    """
    known = np.bincount(labels, minlength=len(biases)) > 0
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weights))
        head.bias.copy_(torch.from_numpy(np.where(known, biases, biases[known].min())))
