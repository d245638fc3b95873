"""jpq.training.epochs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from jpq.config import Config
from jpq.methods.table import Method
from jpq.types import JpqError

WARM_UP = 0.03  # share of the steps in which the learning rate rises


@dataclass(frozen=True)
class BudgetEpochs:
    """One budget's part of the epochs."""

    search: int
    tune: int
    before: int  # epochs of the run's learning-rate curve that lie before this search
    total: int  # epochs of the whole curve

    def phases(self, budget: str, first: bool) -> tuple[Phase, Phase]:
        """(search, fine-tuning). The rate of the fine-tuning begins where the search ended, and ends at 0."""
        after = self.before + self.search
        stretch = (self.total - after) / self.tune
        return (
            Phase("search", self.search, self.before, self.total, budget=budget, anneals=first),
            Phase("fine-tune", self.tune, after, self.total, stretch=stretch, budget=budget),
        )


def split_epochs(config: Config, method: Method) -> tuple[int, int]:
    """(search epochs, fine-tune epochs)."""
    if not (method.searches or method.stages):
        return 0, config.train.epochs
    search = min(config.train.epochs - 1, max(1, round(config.train.search * config.train.epochs)))
    return search, config.train.epochs - search


def budget_epochs(config: Config, method: Method) -> dict[str, BudgetEpochs]:
    """Every budget's part: the search is divided among them, the last is fine-tuned for the rest of the epochs.

    Raises JpqError where a budget would have no epoch to search in.
    """
    budgets = list(config.each())
    search, tune = split_epochs(config, method)
    if 0 < search < len(budgets):
        raise JpqError(
            f"--epochs {config.train.epochs}: {search} epochs of search are too few for {len(budgets)} "
            "budgets. Give more --epochs, or a larger --search."
        )
    less = config.train.tune_epochs or max(1, tune // 4)
    found, before = {}, 0
    for i, budget in enumerate(budgets):
        part = search // len(budgets) + (i < search % len(budgets))
        last = i == len(budgets) - 1
        found[budget] = BudgetEpochs(part, tune if last else less, before, search + tune)
        before += part
    return found


def all_phases(config: Config, method: Method) -> Iterator[Phase]:
    """Everything that will be trained, in order."""
    if config.task.weights is None:
        yield Phase("float", config.train.float_epochs)
    for i, (budget, share) in enumerate(budget_epochs(config, method).items()):
        yield from share.phases(budget, i == 0)


@dataclass
class Phase:
    """One stretch of training: `epochs` of it, at a place on the learning-rate curve of the whole."""

    name: str  # "float" | "search" | "fine-tune"
    epochs: int
    before: int = 0  # epochs of the same curve that lie before this phase
    total: int = 0  # epochs of the whole curve; 0: this phase alone
    done: int = 0  # epochs already done (resumed)
    losses: list[float] = field(default_factory=list)  # of the steps already done in the epoch after those
    stretch: float = 1.0  # epochs of the curve that one of this phase covers
    budget: str = ""  # which of several budgets it is for
    anneals: bool = True  # False: gates stay as cold as an earlier search left them

    @property
    def title(self) -> str:
        """What the screen calls it."""
        return f"{self.name} {self.budget}".strip()

    def rate(self, epoch: float) -> float:
        """Learning rate as a share of its peak, at a fractional epoch of this phase: warm-up, then cosine to 0."""
        at = (self.before + epoch * self.stretch) / (self.total or self.epochs)
        return min(1.0, at / WARM_UP + 0.01) * 0.5 * (1 + math.cos(math.pi * min(1.0, at)))
