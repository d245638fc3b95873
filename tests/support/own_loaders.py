"""Data of the user's own as batches, for --data own_loaders:NAME: the digits, a table with two inputs, bad ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from jpq.tasks.batches import epoch_seed
from jpq.tasks.data import load


class SameOrder:
    """A batch sampler in the order of jpq's own shuffled batches."""

    def __init__(self, samples: int, batch_size: int, seed: int = 0) -> None:
        self.samples, self.batch_size, self.seed, self.number = samples, batch_size, seed, 0

    def set_epoch(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        full, rest = divmod(self.samples, self.batch_size)
        return full + (rest > 1)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.number))
        order = torch.randperm(self.samples, generator=generator).tolist()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size]


def digits() -> tuple[Any, ...]:
    """The splits of `load("digits", limit=200)` as loaders that give the same batches in the same order."""
    data = load("digits", limit=200, augment=False)
    sets = [TensorDataset(part.images, part.labels) for part in (data.train, data.held_out, data.test)]
    train = DataLoader(sets[0], batch_sampler=SameOrder(len(sets[0]), 32))
    return train, *(DataLoader(part, batch_size=32) for part in sets[1:])


class Noisy(Dataset[Any]):
    """Samples that draw from torch's, numpy's and Python's random numbers each time they are read."""

    def __init__(self, samples: int = 20) -> None:
        self.samples, self.reads = samples, 0

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        import random

        import numpy as np

        self.reads += 1
        draws = [float(torch.rand(())), float(np.random.rand()), random.random()]
        return torch.tensor([float(number), *draws]), number % 2


class Stream(IterableDataset[Any]):
    """Samples without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for number in range(20):
            yield torch.tensor([float(number), 1.0]), number % 2


class TwoInputs(nn.Module):
    """A network of two named inputs, [B, 6] and [B, 6]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, classes)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Scores of the masked inputs."""
        return self.last(self.second(self.first(x * mask).relu()).relu())


def two_inputs(kind: type = dict) -> dict[str, Any]:
    """Batches of a dict (or a tuple) of two inputs, whose class is the largest of three masked numbers."""
    generator = torch.Generator().manual_seed(0)
    x, mask = torch.rand(300, 6, generator=generator), torch.randint(2, (300, 6), generator=generator).float()
    y = (x * mask)[:, :3].argmax(1)

    def batches(start: int, stop: int) -> list[Any]:
        parts = [slice(i, i + 20) for i in range(start, stop, 20)]
        return [({"x": x[p], "mask": mask[p]} if kind is dict else (x[p], mask[p]), y[p]) for p in parts]

    return {"train": batches(0, 200), "held_out": batches(200, 240), "test": batches(240, 300), "classes": 3}


def tuples() -> dict[str, Any]:
    """The same with a tuple of inputs."""
    return two_inputs(tuple)


def noisy() -> dict[str, Any]:
    """Shuffled samples with random numbers of their own."""
    loaders = {part: DataLoader(Noisy(n), batch_size=8) for part, n in (("held_out", 16), ("test", 16))}
    return {"train": DataLoader(Noisy(48), batch_size=8, shuffle=True), **loaders}


class Narrow(nn.Sequential):
    """Three Linear layers for samples of four numbers."""

    def __init__(self, classes: int) -> None:
        super().__init__(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, classes))
