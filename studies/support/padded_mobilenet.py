"""torchvision's mobilenet_v2 on small grey images: a network whose layers differ much in work and width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torchvision.models import MobileNetV2


class PaddedMobileNetV2(MobileNetV2):
    """[B, channels, 28, 28] -> [B, classes]: two pixels more on every side, then the network as it is."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__(num_classes=classes, dropout=0.0)
        stem = self.features[0][0]
        self.features[0][0] = type(stem)(channels, stem.out_channels, 3, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, 28, 28] -> [B, classes]."""
        out: Tensor = super().forward(F.pad(x, (2, 2, 2, 2)))
        return out


def mobilenet_v2(classes: int, channels: int) -> PaddedMobileNetV2:
    """A new network, as `--model support.padded_mobilenet:mobilenet_v2` builds it from studies/."""
    return PaddedMobileNetV2(classes, channels)
