"""Images of one brightness each, with noise, and a network whose BatchNorm needs the statistics of many of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jpq.tasks import TASKS
from jpq.tasks.data import Batches, Data

SIZES = (160, 40, 40)  # samples of train, held-out, test


def images(batch_size: int = 2) -> Data:
    """Images [1, 6, 6] with noise of 0.05, and the same without; `batch_size` images in a training batch."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(sum(SIZES), 1, 1, 1, generator=generator).expand(-1, 1, 6, 6)
    noisy = clean + 0.05 * torch.randn(clean.shape, generator=generator)
    parts = [
        Batches(x, y, batch_size=40 if i else batch_size, shuffle=i == 0)
        for i, (x, y) in enumerate(zip(noisy.split(SIZES), clean.split(SIZES), strict=True))
    ]
    return Data("bright", *parts, noisy[:2], 1, (1, 6, 6), checksum="", task=TASKS["restoration"])


class Identity(nn.Module):
    """Gives back what it reads, by the BatchNorm of a population with mean 1/2 and variance 1/12."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(1, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)
        for parameter in (self.first.weight, self.last.weight):
            nn.init.ones_(parameter)
        with torch.no_grad():
            self.last.weight.mul_(0.25)
            self.last.bias.zero_()
            self.norm.running_mean.fill_(1 / 2)
            self.norm.running_var.fill_(1 / 12)
            self.norm.weight.fill_((1 / 12 + self.norm.eps) ** 0.5)
            self.norm.bias.fill_(1 / 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, H, W] -> [B, 1, H, W]."""
        return self.last(self.norm(self.first(x)).relu())


def identity() -> nn.Module:
    """An Identity."""
    return Identity()
