"""A job on eight-by-eight images whose brightest place is their class, and plans for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from jpq.compression.model import CompressedModel
from jpq.config import Config, Decide, Train
from jpq.costs.target import Target
from jpq.plan import Plan
from jpq.tasks.data import Batches, Data
from jpq.training.history import NullObserver
from jpq.training.job import Job


class Noted(Batches):
    """Batches that note the numbers of the epochs that are read."""

    epochs: list[int]

    def epoch(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        self.epochs = [*getattr(self, "epochs", []), epoch]
        return super().epoch(epoch)


class Unread(Batches):
    """The test split, which no decision may read."""

    def epoch(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        raise AssertionError("the test split was read")

    def first(self, count: int) -> Batches:
        raise AssertionError("the test split was read")


def places() -> Data:
    """Images [1, 8, 8] whose brightest of ten places is their class: 64 to train, 24 held out, 24 that stay unread."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(10, (112,), generator=generator)
    images = 0.3 * torch.randn(112, 1, 8, 8, generator=generator)
    images.view(112, 64)[torch.arange(112), 6 * labels] += 3.0
    parts = [
        kind(images[a:b], labels[a:b], batch_size=16, shuffle=kind is Noted)
        for kind, a, b in ((Noted, 0, 64), (Batches, 64, 88), (Unread, 88, 112))
    ]
    return Data("places", *parts, images[:2], 10, (1, 8, 8), checksum="")


def settings(**train: Any) -> Config:
    return Config(decide=Decide(method="measured"), train=replace(Train(lr=1e-2), **train))


def at_bits(net: CompressedModel, bits: int) -> Plan:
    """All units, and all widths but the image's the same."""
    plan = net.plan()
    image = {layer.name for layer in net.network.layers if layer.reads_input}
    layers = {n: replace(x, w_bits=bits, a_bits=x.a_bits if n in image else bits) for n, x in plan.layers.items()}
    return replace(plan, layers=layers)


def without_a_unit(plan: Plan) -> Plan:
    """The plan without the last unit of its first site."""
    name, kept = next(iter(plan.kept.items()))
    return replace(plan, kept={**plan.kept, name: (*kept[:-1], False)})


def job_of(model: nn.Module, data: Data, targets: tuple[Target, ...] = (), config: Config | None = None) -> Job:
    """A job whose run notes no more than decisions do."""
    run: Any = SimpleNamespace(
        observer=NullObserver(), timed=lambda name, work: work(), loss_scale=2.0, contest={}, notes=[], trained=None
    )
    return Job(model, data, targets, config or settings(), run)
