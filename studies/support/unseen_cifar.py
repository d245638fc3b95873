"""CIFAR-10 split as studies/float_weights.py splits it: its float weights have not seen the held-out images."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from jpq.tasks import load_data

ROOT = "CIFAR10_ROOT"  # environment variable: folder of cifar-10-batches-py
IMAGES = 8000  # training images; they are among the 45,000
Pair = tuple[Tensor, Tensor]


def images() -> tuple[Pair, Pair, Pair]:
    """(training, held-out, test) images as bytes [N, 3, 32, 32], and their classes."""
    data = load_data("cifar10", Path(os.environ[ROOT]), held_out=0.1, seed=0)
    parts = [(part.images, part.labels) for part in (data.train, data.held_out, data.test)]
    return (parts[0][0][:IMAGES], parts[0][1][:IMAGES]), parts[1], parts[2]
