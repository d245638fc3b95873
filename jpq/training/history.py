"""A run's history as TensorBoard event files, beside whatever else watches it."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from jpq.files.atomic import replace_file
from jpq.types import JpqError

LEFT_OUT = ("phase", "budget", "epoch", "epochs")  # columns of history.csv that are no quantity

FRONT = "front.csv"


class TensorBoardObserver:
    """A `Watch` that writes every epoch's row, and the loss and cost of every step, and passes all on to another.

    Args:
        watch: the other.
        folder: where the event file goes.
        earlier: epochs of an interrupted run that this one goes on from; their events are there already.

    Epochs are counted over the whole run (tags `epoch/...`), steps within their phase (tags `step/PHASE/...`).

    Raises JpqError where tensorboard is not installed.
    """

    def __init__(self, watch: TrainingObserver, folder: Path, earlier: Sequence[EpochRecord] = ()) -> None:
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

    def epoch(self, row: EpochRecord) -> None:
        """One epoch is done; what was written is on disk."""
        self.epochs += 1
        self.at = row.epoch * self.steps
        for tag, value in asdict(row).items():
            if tag not in LEFT_OUT and math.isfinite(value):
                self.writer.add_scalar(f"epoch/{tag}", value, self.epochs)
        self.writer.flush()
        self.watch.epoch(row)


def write_history(rows: Sequence[EpochRecord], folder: Path) -> None:
    """Write history.csv, one line an epoch, with a column for the budget where there are several."""
    several = any(row.budget for row in rows)
    columns = [f.name for f in fields(EpochRecord) if several or f.name != "budget"]

    def fill(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            for row in rows:
                cells = asdict(row)
                writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in cells.items()})

    replace_file(folder / "history.csv", fill)


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of one phase, a line of history.csv."""

    phase: str  # "float" | "search" | "fine-tune"
    epoch: int  # from 1, within the phase
    epochs: int  # of the phase
    loss: float  # mean training loss
    accuracy: float  # held-out, in [0, 1]
    bops: float  # of the decisions as they stand, rounded to whole bits and units; nan before quantizers exist
    bops_share: float  # of the fp32 model, in [0, 1]
    aim_share: float  # the ramped target that the controller follows, same unit
    pressure: float  # multiplier of log(cost / target)
    w_bits: float  # mean over layers
    a_bits: float
    kept: float  # share of units kept; of weights, where masks lie inside layers
    lr: float
    seconds: float  # since the run began
    budget: str = ""  # which of several budgets the phase is for

    @property
    def title(self) -> str:
        """What the screen calls the phase."""
        return f"{self.phase} {self.budget}".strip()


class TrainingObserver(Protocol):
    """Somebody who watches a run: the progress display, or nobody."""

    def phase(self, name: str, epochs: int, steps: int) -> None:
        """A phase of so many epochs of so many steps begins (epochs 0: a phase without epochs, such as verify)."""

    def step(self, loss: float, bops_share: float, aim_share: float) -> None:
        """One optimisation step is done."""

    def epoch(self, row: EpochRecord) -> None:
        """One epoch is done."""


class NullObserver:
    """Nobody watches."""

    def phase(self, name: str, epochs: int, steps: int) -> None:
        """Ignore it."""

    def step(self, loss: float, bops_share: float, aim_share: float) -> None:
        """Ignore it."""

    def epoch(self, row: EpochRecord) -> None:
        """Ignore it."""
