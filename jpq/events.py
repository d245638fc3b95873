"""A run's history as TensorBoard event files, beside whatever else watches it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jpq.result import Row, Watch
from jpq.types import JpqError

LEFT_OUT = ("phase", "budget", "epoch", "epochs")  # columns of history.csv that are no quantity


class Events:
    """A `Watch` that writes every epoch's row, and the loss and cost of every step, and passes all on to another.

    Args:
        watch: the other.
        folder: where the event file goes.
        earlier: epochs of an interrupted run that this one goes on from; their events are there already.

    Epochs are counted over the whole run (tags `epoch/...`), steps within their phase (tags `step/PHASE/...`).

    Raises JpqError where tensorboard is not installed.
    """

    def __init__(self, watch: Watch, folder: Path, earlier: Sequence[Row] = ()) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise JpqError('--tensorboard needs a package that is missing: pip install "jpq[tensorboard]".') from error
        self.watch = watch
        self.writer: Any = SummaryWriter(str(folder))
        self.epochs = len(earlier)
        self.finished = Counter(row.title for row in earlier)
        self.name, self.steps, self.at = "", 0, 0

    def phase(self, name: str, epochs: int, steps: int) -> None:
        """A phase begins."""
        self.name, self.steps, self.at = name, steps, self.finished[name] * steps
        self.writer.add_text("phase", name, self.epochs)
        self.watch.phase(name, epochs, steps)

    def step(self, loss: float, bops_share: float, aim_share: float) -> None:
        """One optimisation step is done."""
        self.at += 1
        for tag, value in (("loss", loss), ("bops_share", bops_share), ("aim_share", aim_share)):
            if math.isfinite(value):
                self.writer.add_scalar(f"step/{self.name}/{tag}", value, self.at)
        self.watch.step(loss, bops_share, aim_share)

    def epoch(self, row: Row) -> None:
        """One epoch is done; what was written is on disk."""
        self.epochs += 1
        self.at = row.epoch * self.steps
        for tag, value in asdict(row).items():
            if tag not in LEFT_OUT and math.isfinite(value):
                self.writer.add_scalar(f"epoch/{tag}", value, self.epochs)
        self.writer.flush()
        self.watch.epoch(row)
