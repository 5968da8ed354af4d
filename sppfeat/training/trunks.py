"""A trunk that is tuned: its input, and which of its parameters change."""

from __future__ import annotations

import torch
from torch import nn

from sppfeat.backbones.backbone import Trunk


class TunedTrunk(nn.Module):
    """From uint8 images [N, H, W, 3] of one size to the list of each layer's feature maps [N, C, h, w], in float32.

    In evaluation mode: batch norms keep their statistics. Only the parameters of `from_layer` and of what is computed
    after it change, all if it is None. Raises UsageError for a layer of no parameters.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, trunk: Trunk, from_layer: str | None = None) -> None:
        super().__init__()
        self.tuned = trunk.parameters_from(from_layer)
        self.trunk = trunk.module
        mean, std = (torch.tensor(each, dtype=torch.float64) for each in (trunk.recipe.mean, trunk.recipe.std))
        self.register_buffer("scale", (1 / (255 * std)).float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).float().view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)
        for parameter in self.tuned:
            parameter.requires_grad_(True)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        inputs = images.permute(0, 3, 1, 2).float() * self.scale + self.shift
        for module in self.modules():
            # Networks such as LeViT keep what they made of their weights in evaluation, where these do not change.
            if isinstance(cache := getattr(module, "attention_bias_cache", None), dict):
                cache.clear()
        return [one.float() for one in self.trunk(inputs)]
