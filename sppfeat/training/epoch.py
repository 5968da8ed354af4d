"""What is told of each epoch."""

from __future__ import annotations

import msgspec


class Epoch(msgspec.Struct, frozen=True):
    """An epoch, from 1; 0 is the network before it was tuned.

    loss: its mean over the images; None for epoch 0. held_out: in percent; None without held-out images.
    """

    number: int
    loss: float | None
    held_out: float | None
    seconds: float
