"""One run's folder, clock, history and checkpoint."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jpq.config import Config, write_toml
from jpq.files import tensors
from jpq.training import checkpoint, distributed, history
from jpq.training.epochs import Phase
from jpq.training.history import EpochRecord, TrainingObserver
from jpq.training.loop import Recorder
from jpq.training.signals import Interruption
from jpq.types import JpqError


@dataclass
class RunState:
    """What accompanies one run: its folder, its clock, its history and its checkpoint."""

    config: Config
    watch: TrainingObserver
    folder: Path
    recorder: Recorder = field(default_factory=lambda: Recorder(_clock()))
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    saved: dict[str, Any] | None = None  # the checkpoint that this run goes on from
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # what the gates said at landing
    schemes: str = ""  # who chose a structure for each layer: rules, search or hand; empty where all have the same
    stop: Interruption = field(default_factory=Interruption)
    budget: int = 0  # place among several budgets
    label: str = ""  # and its name; empty where there is one
    opened: float = 0.0  # how far opened averages set the rebuilt model apart from the masked one, at landing

    def __post_init__(self) -> None:
        self.top = self.folder  # where checkpoint and history lie
        self.weights = _checksum(self.config.task.weights)  # of the file that this run begins with
        self.data = ""  # checksum of the data
        if self.config.run.resume:
            self.saved = distributed.run_on_first(self._found)
        if self.saved:
            self.recorder.rows = [EpochRecord(**row) for row in self.saved["history"]]
            earlier = self.recorder.rows[-1].seconds if self.recorder.rows else 0.0
            self.recorder.clock = _clock(earlier)

    def _found(self) -> dict[str, Any] | None:
        saved = checkpoint.load(self.folder)
        ends = (self.folder / "result.json", self.folder / history.FRONT)
        if saved is None and any(path.exists() for path in ends):
            raise JpqError(f"Nothing to go on with: {self.folder} holds a finished run. Start anew without --resume.")
        if saved and (saved["settings"] != self.config.hash() or saved["budget"] >= len(self.config.each())):
            raise JpqError(f"The checkpoint in {self.folder} belongs to other settings; run without --resume.")
        if saved and saved.get("weights", self.weights) != self.weights:
            raise JpqError(_changed(f"--weights {self.config.task.weights}"))
        return saved

    def require_data(self, checksum: str) -> None:
        """Take the checksum of the data that this run learns from. Raises JpqError where it began with others."""
        self.data = checksum
        if self.saved and self.saved.get("data", checksum) != checksum:
            raise JpqError(_changed(f"--data {self.config.task.data}"))

    def at(self, budget: int, label: str, folder: Path) -> RunState:
        """The same run at one of several budgets: its own folder and notes, everything else shared."""
        one = copy.copy(self)
        one.budget, one.label, one.folder, one.top = budget, label, folder, self.top
        one.notes, one.metrics = list(self.notes), {}
        return one

    def lineage(self) -> tuple[EpochRecord, ...]:
        """The epochs that led to the model at hand: without the fine-tuning of other budgets."""
        return tuple(row for row in self.recorder.rows if row.phase != "fine-tune" or row.budget == self.label)

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        """Do `work` and note how long it took."""
        start = time.perf_counter()
        done = work()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 2)
        return done

    def keep(self, phase: Phase, net: nn.Module, optim: torch.optim.Optimizer, **more: Any) -> None:
        """Write the checkpoint and the history so far."""
        if not distributed.is_first():
            return
        history.write_history(self.recorder.rows, self.top)
        state = {
            "kind": checkpoint.KIND,
            "settings": self.config.hash(),
            "weights": self.weights,
            "data": self.data,
            "phase": phase.name,
            "budget": self.budget,
            "done": phase.done,
            "losses": phase.losses,
            "net": net.state_dict(),
            "optimizer": optim.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "history": [asdict(row) for row in self.recorder.rows],
            **more,
        }
        checkpoint.save(self.top, state)

    def go_on(self, phase: Phase, net: nn.Module, optim: torch.optim.Optimizer) -> None:
        """If the checkpoint lies in this phase: put its state in place."""
        if not self.saved or not self.is_in(phase.name):
            return
        saved, source = self.saved, self.top / checkpoint.NAME
        tensors.restore(net, saved["net"], source)
        checkpoint.restore_optimizer(optim, saved["optimizer"], source)
        tensors.fitted(lambda: torch.set_rng_state(saved["random"]), source)
        if saved["random_cuda"] and torch.cuda.is_available():
            tensors.fitted(lambda: torch.cuda.set_rng_state_all(saved["random_cuda"]), source)
        phase.done, phase.losses = saved["done"], list(saved["losses"])
        if phase.done + bool(phase.losses) > phase.epochs:
            raise JpqError(
                f"{source} is of more epochs than phase {phase.title} has ({phase.done} of {phase.epochs}). "
                f"{tensors.AWAY}"
            )

    def is_in(self, phase: str) -> bool:
        """Whether the checkpoint lies in this phase."""
        return bool(self.saved) and _place(self.saved) == self._here(phase)  # type: ignore[arg-type]

    def is_past(self, phase: str) -> bool:
        """Whether the checkpoint lies after this phase."""
        return bool(self.saved) and _place(self.saved) > self._here(phase)  # type: ignore[arg-type]

    def _here(self, phase: str) -> tuple[int, int]:
        return _place({"phase": phase, "budget": self.budget})


def _place(state: Mapping[str, Any]) -> tuple[int, int]:
    """Where a run stands: at which budget, in which phase of it."""
    return int(state.get("budget", 0)), checkpoint.PHASES.index(state["phase"])


def _checksum(path: Path | None) -> str:
    """sha256 of a file; "" where none is given, or there: who reads it says that."""
    if path is None or not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _changed(what: str) -> str:
    return f"{what} is no longer the one that this run began with. Run without --resume."


def _clock(earlier: float = 0.0) -> Callable[[], float]:
    start = time.perf_counter() - earlier
    return lambda: round(time.perf_counter() - start, 2)


def open_folder(config: Config) -> Path:
    """The run's folder, made, with its config.toml. Raises JpqError where it cannot be written."""
    folder = config.run.out / config.hash()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JpqError(f"Cannot write to {folder}: {error.strerror}. Choose another folder with --out.") from error
    write_toml(config, folder / "config.toml")
    return folder
