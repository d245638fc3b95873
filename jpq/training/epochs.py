"""Phases of training, and how the epochs of a run are divided among its budgets and phases."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from jpq.allocation.procedures import PROCEDURES
from jpq.config import MINUTES, Config
from jpq.methods.table import Method
from jpq.types import JpqError

WARM_UP = 0.03  # share of the steps in which the learning rate rises


@dataclass(frozen=True)
class BudgetEpochs:
    """The epochs of one budget, and where they lie on the learning-rate curve of the run."""

    search: int
    tune: int
    before: int  # epochs of the run's learning-rate curve that lie before this search
    total: int  # epochs of the whole curve

    def phases(self, budget: str, is_first: bool) -> tuple[Phase, Phase]:
        """(search phase, fine-tuning phase); the rate of fine-tuning begins where the search ended, and ends at 0."""
        after = self.before + self.search
        stretch = (self.total - after) / max(1, self.tune)
        return (
            Phase("search", self.search, self.before, self.total, budget=budget, anneals=is_first),
            Phase("fine-tune", self.tune, after, self.total, stretch=stretch, budget=budget),
        )


def split_epochs(config: Config, method: Method) -> tuple[int, int]:
    """(epochs of the search phase, epochs of fine-tuning) of a run with one budget; (0, 0) where nothing is trained.

    Raises JpqError for a method that has to train, with --effort minutes.
    """
    if config.train.effort == MINUTES:
        if PROCEDURES[method.procedure].searches:
            raise JpqError(
                f"--effort minutes trains nothing, and --method {config.decide.method} decides by training: choose "
                "measured, uniform, two-stage or --bits, or leave --effort out."
            )
        return 0, 0
    if not PROCEDURES[method.procedure].has_search_phase:
        return 0, config.train.epochs
    search = min(config.train.epochs - 1, max(1, round(config.train.search * config.train.epochs)))
    return search, config.train.epochs - search


def budget_epochs(config: Config, method: Method) -> dict[str, BudgetEpochs]:
    """Budget name -> its epochs: the search is divided evenly, and the last budget is fine-tuned for the rest.

    Raises JpqError where a budget would have no epoch to search in.
    """
    budgets = list(config.each())
    search, tune = split_epochs(config, method)
    if 0 < search < len(budgets):
        raise JpqError(
            f"--epochs {config.train.epochs}: {search} epochs of search are too few for {len(budgets)} "
            "budgets. Give more --epochs, or a larger --search."
        )
    less = min(tune, config.train.tune_epochs or max(1, tune // 4))
    parts, before = {}, 0
    for i, budget in enumerate(budgets):
        part = search // len(budgets) + (i < search % len(budgets))
        last = i == len(budgets) - 1
        parts[budget] = BudgetEpochs(part, tune if last else less, before, search + tune)
        before += part
    return parts


def all_phases(config: Config, method: Method) -> Iterator[Phase]:
    """Every phase of a run, in the order of training."""
    if config.task.weights is None:
        yield Phase("float", config.train.float_epochs)
    for i, (budget, share) in enumerate(budget_epochs(config, method).items()):
        yield from share.phases(budget, i == 0)


@dataclass
class Phase:
    """A phase of training: its epochs, and its place on the learning-rate curve of the run."""

    name: str  # "float" | "search" | "fine-tune"
    epochs: int
    before: int = 0  # epochs of the same curve that lie before this phase
    total: int = 0  # epochs of the whole curve; 0: this phase alone
    done: int = 0  # epochs already done (resumed)
    losses: list[float] = field(default_factory=list)  # of the steps already done in the current epoch
    stretch: float = 1.0  # epochs of the curve per epoch of this phase
    budget: str = ""  # name of the budget, where the run has several
    anneals: bool = True  # False: the gates' temperature stays where an earlier search ended

    @property
    def title(self) -> str:
        """The phase's name on screen, with its budget where there are several."""
        return f"{self.name} {self.budget}".strip()

    def rate(self, epoch: float) -> float:
        """Learning rate over its peak at a fractional epoch of this phase: linear warm-up, then cosine to 0."""
        position = (self.before + epoch * self.stretch) / (self.total or self.epochs)
        return min(1.0, position / WARM_UP + 0.01) * 0.5 * (1 + math.cos(math.pi * min(1.0, position)))
