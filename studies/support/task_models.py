"""Small networks of the study of tasks, as --model support.task_models:NAME takes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(classes: int, channels: int) -> nn.Module:
    """Two hidden layers of 64 units for the columns of a table."""
    return nn.Sequential(nn.Linear(channels, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes))


class Transformer(nn.Module):
    """Encoder of two layers, width 128, over numbers of words [B, T]; a token is the mean of 8 words.

    jpq leaves attention's own two products at 32 bits. With a token for each word they are a tenth of the MACs, so that
    no bit-widths of the layers reach 2 % of the bit-operations; with one for 8 words they are 0.9 %.
    """

    def __init__(self, classes: int, vocabulary: int, length: int, width: int = 128, group: int = 8):
        super().__init__()
        self.group, self.padding = group, -length % group
        self.words = nn.Embedding(vocabulary, width, padding_idx=0)
        nn.init.normal_(self.words.weight, std=0.1)  # a tenth of torch's: more sentences are right after few epochs
        self.positions = nn.Parameter(0.02 * torch.randn(1, (length + self.padding) // group, width))
        layers = [nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in range(2)]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Class scores [B, classes]."""
        x = self.words(F.pad(ids, (0, self.padding))).transpose(1, 2)
        x = F.avg_pool1d(x, self.group).transpose(1, 2) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class UNet(nn.Module):
    """U-Net with two steps down; sides of images are multiples of 4."""

    def __init__(self, classes: int, channels: int, width: int = 12):
        super().__init__()
        self.first, self.second = _block(channels, width), _block(width, 2 * width)
        self.third = _block(2 * width, 4 * width)
        self.up_second, self.up_first = (nn.ConvTranspose2d(2 * n, n, 2, 2) for n in (2 * width, width))
        self.back_second, self.back_first = _block(4 * width, 2 * width), _block(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [B, classes, H, W]."""
        first = self.first(x)
        second = self.second(F.max_pool2d(first, 2))
        third = self.third(F.max_pool2d(second, 2))
        second = self.back_second(torch.cat([second, self.up_second(third)], 1))
        return self.head(self.back_first(torch.cat([first, self.up_first(second)], 1)))


def _block(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions with BatchNorm and ReLU."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class DnCNN(nn.Module):
    """DnCNN of 17 layers (Zhang et al. 2017), which computes the noise of an image; the output is the clean image."""

    def __init__(self, channels: int = 1, width: int = 64, depth: int = 17):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width, eps=1e-4),
                nn.ReLU(),
            ]
        self.dncnn = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Clean image [B, C, H, W]."""
        return x - self.dncnn(x)


class EDSR(nn.Module):
    """Small EDSR (Lim et al. 2017) for a factor of 2: residual blocks without BatchNorm, then a pixel shuffle.

    Unlike the published one, each pixel of the input is also added to the 2 x 2 pixels that it becomes, so that a short
    training starts at nearest-neighbour scaling.
    """

    def __init__(self, channels: int = 1, width: int = 32, blocks: int = 4):
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(blocks)
        )
        self.last = nn.Conv2d(width, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Image of twice the sides, [B, C, 2 H, 2 W]."""
        first = self.first(x)
        y = first
        for block in self.blocks:
            y = y + block(y)
        return F.pixel_shuffle(self.last(first + y), 2) + F.interpolate(x, scale_factor=2.0, mode="nearest")


def conv1d(classes: int, channels: int) -> nn.Module:
    """Three 1-D convolutions over windows [B, C, T]."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((channels, 32), (32, 64), (64, 64)):
        layers += [nn.Conv1d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, classes))


class GRU(nn.Module):
    """One layer of 64 gated recurrent units over windows [B, C, T]; the last state is classified."""

    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.rnn = nn.GRU(channels, 64, batch_first=True)
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [B, classes]."""
        return self.head(self.rnn(x.transpose(1, 2))[0][:, -1])
