"""Small networks of tests of run folders: of images, tables and texts."""

from __future__ import annotations

from torch import Tensor, nn


def images(classes: int, channels: int) -> nn.Module:
    """Two convolutions for images of any size."""
    layers = (nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes))


def table(classes: int, channels: int) -> nn.Module:
    """Three Linear layers."""
    return nn.Sequential(nn.Linear(channels, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, classes))


class TextNet(nn.Module):
    """Embedding, a Linear layer for each word, the mean over words, and a Linear layer."""

    def __init__(self, classes: int, vocabulary: int) -> None:
        super().__init__()
        self.words, self.hidden, self.last = nn.Embedding(vocabulary, 16), nn.Linear(16, 24), nn.Linear(24, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Scores [B, classes] of word numbers [B, length]."""
        return self.last(self.hidden(self.words(ids)).relu().mean(1))


def text(classes: int, vocabulary: int) -> nn.Module:
    """A TextNet."""
    return TextNet(classes, vocabulary)


class Denoiser(nn.Module):
    """The image minus the noise that three convolutions find."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers = (nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.noise = nn.Sequential(*layers, nn.Conv2d(8, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """A clean image of the size of `x`."""
        return x - self.noise(x)


def denoiser(channels: int) -> nn.Module:
    """A Denoiser."""
    return Denoiser(channels)


def series(classes: int, channels: int) -> nn.Module:
    """Two 1-D convolutions."""
    layers = (nn.Conv1d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 8, 3, padding=1), nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, classes))
