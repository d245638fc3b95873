"""The state of one run while it trains: folder, clock, history and checkpoint."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jpq.config import Config, write_toml
from jpq.files import tensors
from jpq.files.model_files import keep_files, tokenizer_files
from jpq.training import checkpoint, distributed, history
from jpq.training.epochs import Phase
from jpq.training.history import EpochRecord, TrainingObserver
from jpq.training.loop import Recorder
from jpq.training.signals import Interruption
from jpq.types import JpqError

TEXTS = ("phase", "budget")  # fields of an EpochRecord that are no numbers
BLOCK_BYTES = 2**20  # of a file that are read at a time for its checksum


def create_folder(config: Config) -> Path:
    """Make the run's folder with its config.toml, and copies of what a model of transformers is made from.

    Raises JpqError where it cannot be written.
    """
    folder = config.folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JpqError(f"Cannot write to {folder}: {error.strerror}. Choose another folder with --out.") from error
    write_toml(config, folder / "config.toml")
    keep_files(config.task.model, folder)
    return folder


@dataclass
class RunState:
    """State of a run: settings, folder, clock, history, notes and checkpoint, where `run.resume` begins.

    Raises JpqError for a checkpoint of other settings or weights, or one that is damaged.
    """

    config: Config
    observer: TrainingObserver
    folder: Path
    recorder: Recorder = field(default_factory=lambda: Recorder(_clock()))
    seconds: dict[str, float] = field(default_factory=dict)  # by phase
    notes: list[str] = field(default_factory=list)
    saved: dict[str, Any] | None = None  # the checkpoint that this run resumes
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # site -> its gate's numbers at discretization
    contest: dict[str, Any] = field(default_factory=dict)  # plans that were measured and compared (`Result.contest`)
    pruning: dict[str, Any] = field(default_factory=dict)  # what more pruning would cost (`Result.pruning`)
    trained: Mapping[str, Tensor] | None = None  # state of the network that a contest kept, as it has trained it
    schemes: str = ""  # origin of the structures of the layers: rules, search or hand; empty where all have one
    stop: Interruption = field(default_factory=Interruption)
    budget: int = 0  # index among the budgets
    label: str = ""  # name of the budget; empty where there is one
    loss_scale: float = 1.0  # factor of the task's loss beside distillation and budget
    opened: float = 0.0  # difference of rebuilt and masked model at discretization, by opened averages

    def __post_init__(self) -> None:
        self.top = self.folder  # of the whole run: holds checkpoint and history
        self.weights = _checksum(self.config.task.weights)  # of the file that this run begins with
        self.data = ""  # checksum of the data
        if self.config.run.resume:
            self.saved = distributed.run_on_first(self._load_checkpoint)
        if self.saved:
            tensors.apply_saved(self._restore_history, self.top / checkpoint.NAME)

    def _load_checkpoint(self) -> dict[str, Any] | None:
        saved = checkpoint.load(self.folder)
        ends = (self.folder / "result.json", self.folder / history.FRONT)
        if saved is None and any(path.exists() for path in ends):
            raise JpqError(f"Nothing to go on with: {self.folder} holds a finished run. Start anew without --resume.")
        if saved and (saved["settings"] != self.config.hash() or saved["budget"] >= len(self.config.each())):
            raise JpqError(f"The checkpoint in {self.folder} belongs to other settings; run without --resume.")
        if saved and saved.get("weights", self.weights) != self.weights:
            raise JpqError(_changed_error(f"--weights {self.config.task.weights}"))
        return saved

    def _restore_history(self) -> None:
        rows = [EpochRecord(**row) for row in self.saved["history"]] if self.saved else []
        if any(isinstance(value, str) != (name in TEXTS) for row in rows for name, value in asdict(row).items()):
            raise ValueError("its history is not of rows as history.csv has them")
        self.recorder.rows = rows
        self.recorder.clock = _clock(rows[-1].seconds if rows else 0.0)

    def check_data(self, checksum: str) -> None:
        """Note the checksum of the training data. Raises JpqError where the run began with other data."""
        self.data = checksum
        if self.saved and self.saved.get("data", checksum) != checksum:
            task = self.config.task
            tokenizer = f", or the tokenizer of --model {task.model}," if tokenizer_files(task.model) else ""
            raise JpqError(_changed_error(f"--data {task.data}{tokenizer}"))

    def for_budget(self, budget: int, label: str, folder: Path) -> RunState:
        """A view of the run at one of several budgets, with a folder and notes of its own; all else is shared."""
        state = copy.copy(self)
        state.budget, state.label, state.folder, state.top = budget, label, folder, self.top
        state.notes, state.metrics, state.contest, state.pruning = list(self.notes), {}, {}, {}
        state.trained = None
        return state

    def lineage(self) -> tuple[EpochRecord, ...]:
        """The epochs that led to the present model: without the fine-tuning of other budgets."""
        return tuple(row for row in self.recorder.rows if row.phase != "fine-tune" or row.budget == self.label)

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        """Do `work` and add its seconds to those of the phase `name`."""
        start = time.perf_counter()
        result = work()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 2)
        return result

    def save_checkpoint(self, phase: Phase, net: nn.Module, optim: torch.optim.Optimizer, **extra: Any) -> None:
        """Write history.csv and the checkpoint, with the entries `extra` beside network and optimizer."""
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
            **extra,
        }
        checkpoint.save(self.top, state)

    def resume_phase(self, phase: Phase, net: nn.Module, optim: torch.optim.Optimizer) -> None:
        """Restore network, optimizer, random numbers and position, if the checkpoint lies in this phase."""
        if not self.saved or not self.is_within(phase.name):
            return
        saved, source = self.saved, self.top / checkpoint.NAME
        tensors.restore(net, saved["net"], source)
        checkpoint.restore_optimizer(optim, saved["optimizer"], source)
        tensors.apply_saved(lambda: torch.set_rng_state(saved["random"]), source)
        if saved["random_cuda"] and torch.cuda.is_available():
            tensors.apply_saved(lambda: torch.cuda.set_rng_state_all(saved["random_cuda"]), source)
        tensors.apply_saved(lambda: setattr(phase, "losses", _finite_losses(saved["losses"])), source)
        phase.done = saved["done"]
        if phase.done + bool(phase.losses) > phase.epochs:
            raise JpqError(
                f"{source} is of more epochs than phase {phase.title} has ({phase.done} of {phase.epochs}). "
                f"{tensors.START_OVER}"
            )

    def is_within(self, phase: str) -> bool:
        """Whether the checkpoint lies in this phase of the present budget."""
        return bool(self.saved) and self._saved_place() == self._place(phase)

    def is_past(self, phase: str) -> bool:
        """Whether the checkpoint lies after this phase of the present budget."""
        return bool(self.saved) and self._saved_place() > self._place(phase)

    def _saved_place(self) -> tuple[int, int]:
        saved: Mapping[str, Any] = self.saved or {}
        return int(saved["budget"]), checkpoint.PHASES.index(saved["phase"])

    def _place(self, phase: str) -> tuple[int, int]:
        """(budget, phase) as numbers that rise during a run."""
        return self.budget, checkpoint.PHASES.index(phase)


def _finite_losses(losses: Sequence[float]) -> list[float]:
    """The losses unchanged. Raises ValueError where one is not finite."""
    if not all(math.isfinite(loss) for loss in losses):
        raise ValueError("a loss is no finite number")
    return list(losses)


def _checksum(path: Path | None) -> str:
    """sha256 of a file; "" where none is given or it is missing, which its reader reports."""
    if path is None or not path.is_file():
        return ""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _changed_error(what: str) -> str:
    return f"{what} is no longer the one that this run began with. Run without --resume."


def _clock(earlier: float = 0.0) -> Callable[[], float]:
    """A function that gives the seconds since now, plus those of an earlier part of the run."""
    start = time.perf_counter() - earlier
    return lambda: round(time.perf_counter() - start, 2)
