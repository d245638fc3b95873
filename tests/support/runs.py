"""Short runs of the main job on the built-in data: whole, or stopped and resumed."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import jpq
from jpq.config import Budget, Config, Decide, Run, Task, Train
from jpq.results.record import ModelMetrics, Result
from jpq.tasks.data import Data
from jpq.training.history import EpochRecord, NullObserver

QUICK = Train(epochs=4, float_epochs=3, lr=3e-3)


def config(out: Path, method: str = "djpq", train: Train = QUICK, **budget: str) -> Config:
    return Config(
        task=Task(limit=600),
        budget=Budget(**(budget or {"target_bops": "1%"})),
        decide=Decide(method=method),
        train=train,
        run=Run(out=out, device="cpu"),
    )


def shortened(config: Config, limit: int = 200, epochs: int = 2, float_epochs: int = 1) -> Config:
    """The same run on fewer digits, for fewer epochs: where only its settings matter."""
    train = replace(config.train, epochs=epochs, float_epochs=float_epochs)
    return replace(config, task=replace(config.task, limit=limit), train=train)


class Stop(NullObserver):
    """Interrupts a run after some epoch of some phase, as Ctrl-C would."""

    def __init__(self, phase: str, epoch: int) -> None:
        self.at = (phase, epoch)

    def step(self, loss: float, bops_share: float, limit_share: float) -> None:
        if self.next == self.at:
            raise KeyboardInterrupt

    def phase(self, name: str, epochs: int, steps: int) -> None:
        self.next = (name, 1)

    def epoch(self, row: EpochRecord) -> None:
        self.next = (row.title, row.epoch + 1)


def resumed(asked: Config, out: Path, phase: str, final: bool = True) -> Result:
    """The result of a run (a trial, unless `final`) into `out`, stopped in the second epoch of a phase and resumed."""
    asked = replace(asked, run=replace(asked.run, out=out))
    with pytest.raises(KeyboardInterrupt):
        jpq.optimize(asked, Stop(phase, 2), final=final)
    return jpq.optimize(replace(asked, run=replace(asked.run, resume=True)), final=final)


class Outcome(NamedTuple):
    """What two runs of the same settings have in common, to the bit."""

    history: list[str]  # but for the seconds
    compressed: ModelMetrics
    weights: dict[str, tuple[Any, ...]]  # name -> dtype, size and digest of the saved model's tensor


def outcome(result: Result, tested: bool = True) -> Outcome:
    """What two runs share; without the accuracy on the test split where not `tested`, as in a trial."""
    model, _ = jpq.load(result.folder, run_code=True)
    compressed = result.compressed
    if not tested or math.isnan(compressed.accuracy):  # NaN equals nothing
        compressed = replace(compressed, accuracy=-1.0)
    return Outcome(
        [repr(replace(row, seconds=0.0)) for row in result.history],
        compressed,
        {
            name: (t.dtype, *t.shape, hashlib.sha256(t.numpy().tobytes()).hexdigest())
            for name, t in model.state_dict().items()
        },
    )


def trained(data: Data, epochs: int = 6) -> nn.Module:
    """A convnet that has seen the digits for some epochs."""
    torch.manual_seed(0)
    model = jpq.tasks.models.build("convnet", 10, 1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for epoch in range(epochs):
        for x, y in data.train.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()
