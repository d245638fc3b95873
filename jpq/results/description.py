"""`RunDescription`, what a run is about to do, and the contract of those who are told before it begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class TargetDescription:
    """One target of one budget, in the cost's unit (bit-operations, MACs, bytes, nanoseconds)."""

    cost: str  # a name in COSTS
    asked: str  # the amount as the user wrote it
    limit: int
    full: float  # cost of the fp32 model


@dataclass(frozen=True)
class RunDescription:
    """What a run works on and how, known before anything is trained."""

    model: str
    parameters: int
    layers: int
    macs: int  # of one sample
    data: str
    sizes: Mapping[str, int]  # "train", "held-out", "test" -> samples
    shape: tuple[int, ...]  # of one sample
    classes: int
    device: str
    threads: int  # of the CPU
    processes: int
    method: str
    targets: tuple[TargetDescription, ...]  # those of several budgets one after another
    phases: Mapping[str, int]  # phase -> epochs, in the order of training
    folder: Path
    resumed: bool
    task: str = ""  # name and metric of the task, where it is not classification
    notes: tuple[str, ...] = ()  # sentences on how the data were read


class RunAnnouncer(Protocol):
    """The receiver of what a run is about to do, and of warnings before it does."""

    def describe(self, description: RunDescription) -> None:
        """Receive what the run works on, once, before anything is trained."""

    def warn(self, text: str) -> None:
        """Receive a warning, one sentence."""


class NullAnnouncer:
    """A `RunAnnouncer` that does nothing."""

    def describe(self, description: RunDescription) -> None:
        """Ignore it."""

    def warn(self, text: str) -> None:
        """Ignore it."""
