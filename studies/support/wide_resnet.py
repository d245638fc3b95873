"""A ResNet8 of twice the usual width: a network with more channels than its task needs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (32, 64, 128)  # of the three stages; He et al. have 16, 32, 64


class WideBlock(nn.Module):
    """Two convolutions and a shortcut without parameters: every second pixel, channels padded with zeros."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.more = (1, 0) if inputs == outputs else (2, outputs - inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=self.stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return torch.relu(x + y)


class WideResNet8(nn.Module):
    """[B, channels, H, W] -> [B, classes]: a convolution, one block for each width, mean, and a linear layer."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, WIDTHS[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTHS[0])
        self.blocks = nn.Sequential(
            *(WideBlock(inputs, outputs) for inputs, outputs in zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False))
        )
        self.head = nn.Linear(WIDTHS[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, classes]."""
        return self.head(self.blocks(torch.relu(self.norm(self.stem(x)))).mean((2, 3)))


def wide_resnet8(classes: int, channels: int) -> WideResNet8:
    """A new network, as `--model support.wide_resnet:wide_resnet8` builds it from studies/."""
    return WideResNet8(classes, channels)


def layer_names() -> tuple[str, ...]:
    """The names of its convolutions and of its linear layer."""
    return tuple(n for n, m in wide_resnet8(10, 1).named_modules() if isinstance(m, nn.Conv2d | nn.Linear))
