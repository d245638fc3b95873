"""Data sets that something is wrong with, or odd about, for --data odd_data:NAME: (train, held out, test) of 1x8x8."""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
SIZES = (97, 17, 17)  # in batches of 16 one sample is left over in each


def _split(images: Tensor, labels: Tensor) -> tuple[Pair, ...]:
    return tuple(zip(images.split(SIZES), labels.split(SIZES), strict=True))


def _drawn(channels: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(sum(SIZES)) % 4
    images = torch.rand(sum(SIZES), channels, 8, 8, generator=generator) * 0.3
    images[torch.arange(sum(SIZES)), :, labels * 2] += 0.7  # a bright line says which class it is
    return images.clamp(0, 1), labels


def one_left_over() -> tuple[Pair, ...]:
    """Nothing is wrong but the number of samples."""
    return _split(*_drawn())


def black() -> tuple[Pair, ...]:
    """Every pixel of every image is 0: no activation has a range."""
    images, labels = _drawn()
    return _split(images * 0, labels)


def grey() -> tuple[Pair, ...]:
    """Every pixel of every image is the same."""
    images, labels = _drawn()
    return _split(images * 0 + 0.5, labels)


def blank_channel() -> tuple[Pair, ...]:
    """Three channels, one of which is always 0."""
    images, labels = _drawn(3)
    images[:, 1] = 0
    return _split(images, labels)


def rare_class() -> tuple[Pair, ...]:
    """A fifth class with one training sample, which most batches lack, and none elsewhere."""
    images, labels = _drawn()
    labels[0] = 4
    return _split(images, labels)


def absent_class() -> tuple[Pair, ...]:
    """Class 2 of five is nowhere."""
    images, labels = _drawn()
    return _split(images, labels + (labels >= 2))


def one_class() -> tuple[Pair, ...]:
    """All samples are of class 0."""
    images, labels = _drawn()
    return _split(images, labels * 0)


def huge_values() -> tuple[Pair, ...]:
    """Pixels up to 1e30."""
    images, labels = _drawn()
    return _split(images * 1e30, labels)


def outlier() -> tuple[Pair, ...]:
    """One pixel of one image is 1e20."""
    images, labels = _drawn()
    images[5, 0, 3, 3] = 1e20
    return _split(images, labels)
