"""The history of a run: one `EpochRecord` per epoch, the observers that receive it, and history.csv."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jpq.files.atomic import replace_file
from jpq.types import JpqError

if TYPE_CHECKING:  # the screens import this module, and start without torch
    from jpq.tasks.base import Task

LABEL_COLUMNS = ("phase", "budget", "epoch", "epochs")  # columns of history.csv that are no quantity

FRONT = "front.csv"  # table of a run's budgets, in the run's folder


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of one phase, a line of history.csv."""

    phase: str  # "float" | "search" | "fine-tune"
    epoch: int  # from 1, within the phase
    epochs: int  # of the phase
    loss: float  # mean training loss
    accuracy: float  # held-out metric of the task; accuracy in [0, 1] for classification
    bops: float  # of the decisions as they stand, rounded to whole bits and units; nan before quantizers exist
    bops_share: float  # of the fp32 model, in [0, 1]
    aim_share: float  # the ramped limit that the controller follows, as a share of the fp32 model
    pressure: float  # multiplier of log(cost / target)
    w_bits: float  # mean over layers
    a_bits: float  # mean over layers
    kept: float  # share of units kept; of weights, where masks lie inside layers
    lr: float  # of the weights
    seconds: float  # since the run began
    budget: str = ""  # budget of the phase, where the run has several

    @property
    def title(self) -> str:
        """Name of the phase on the screen."""
        return f"{self.phase} {self.budget}".strip()


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


class TrainingObserver(Protocol):
    """The receiver of a run's progress: a display, a log, an early stop."""

    def begin(self, task: Task) -> None:
        """Receive the start of training; the task's metric stands in `EpochRecord.accuracy`. May come several times."""

    def phase(self, name: str, epochs: int, steps: int) -> None:
        """Receive the start of a phase, its epochs (0: none, such as verify), and its steps per epoch or in all."""

    def step(self, loss: float, bops_share: float, limit_share: float) -> None:
        """Receive a finished optimizer step: loss, BOPs and their ramped limit as shares of the fp32 model."""

    def epoch(self, row: EpochRecord) -> None:
        """Receive the record of a finished epoch."""


class NullObserver:
    """A `TrainingObserver` that does nothing."""

    def begin(self, task: Task) -> None:
        """Ignore it."""

    def phase(self, name: str, epochs: int, steps: int) -> None:
        """Ignore it."""

    def step(self, loss: float, bops_share: float, limit_share: float) -> None:
        """Ignore it."""

    def epoch(self, row: EpochRecord) -> None:
        """Ignore it."""


def import_writer() -> Any:
    """The class that writes TensorBoard event files. Raises JpqError where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise JpqError('--tensorboard needs a package that is missing: pip install "jpq[tensorboard]".') from error
    return SummaryWriter


class TensorBoardObserver:
    """A `TrainingObserver` that writes TensorBoard event files and passes everything on to another observer.

    Args:
        observer: the other observer.
        folder: where the event file goes.
        earlier: epochs of an interrupted run that this one continues; their events are there already.

    Epochs are counted over the whole run (tags `epoch/...`), steps within their phase (tags `step/PHASE/...`).

    Raises JpqError where tensorboard is not installed.
    """

    def __init__(self, observer: TrainingObserver, folder: Path, earlier: Sequence[EpochRecord] = ()) -> None:
        self.observer = observer
        self.writer: Any = import_writer()(str(folder))
        self.epochs = len(earlier)
        self.finished_epochs = Counter(row.title for row in earlier)  # of each phase
        self.name, self.steps, self.steps_done = "", 0, 0  # of the phase at hand

    def begin(self, task: Task) -> None:
        """Pass it on."""
        self.observer.begin(task)

    def phase(self, name: str, epochs: int, steps: int) -> None:
        """Write the start of a phase, and pass it on."""
        self.name, self.steps, self.steps_done = name, steps, self.finished_epochs[name] * steps
        self.writer.add_text("phase", name, self.epochs)
        self.observer.phase(name, epochs, steps)

    def step(self, loss: float, bops_share: float, limit_share: float) -> None:
        """Write the numbers of an optimizer step, and pass it on."""
        self.steps_done += 1
        for tag, value in (("loss", loss), ("bops_share", bops_share), ("aim_share", limit_share)):
            if math.isfinite(value):
                self.writer.add_scalar(f"step/{self.name}/{tag}", value, self.steps_done)
        self.observer.step(loss, bops_share, limit_share)

    def epoch(self, row: EpochRecord) -> None:
        """Write the numbers of a finished epoch to disk."""
        self.epochs += 1
        self.steps_done = row.epoch * self.steps
        for tag, value in asdict(row).items():
            if tag not in LABEL_COLUMNS and math.isfinite(value):
                self.writer.add_scalar(f"epoch/{tag}", value, self.epochs)
        self.writer.flush()
        self.observer.epoch(row)
