"""A model of the user's own that runs of version 0.1 name as `tiny_v01:build`."""

from torch import nn


def build(classes: int, channels: int) -> nn.Module:
    """A net of three layers for 8 x 8 images."""
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )
