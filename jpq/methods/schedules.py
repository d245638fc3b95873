"""SCHEDULES: when a ranking closes units during a search, and down to which density.

Densities are shares of the MACs that stay. All schedules end at END of the search, so that the weights and the bits
have the rest of it for the network that is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jpq.types import unknown

END = 0.75  # position in the search of the last decision

STEPS = {"one-shot": 1, "iterative": 10, "cubic": 20}  # decisions of each schedule


@dataclass(frozen=True)
class Schedule:
    """Pruning schedule: decisions at `times`, the last of which reaches the final density."""

    times: tuple[float, ...]  # positions in the search, ascending
    left: Callable[[float], float]  # share of the decisions taken, in [0, 1] -> share of the pruning still to do

    def due(self, progress: float) -> int:
        """Number of decisions at or before this position in the search."""
        return sum(time <= progress for time in self.times)

    def density(self, taken: int, final: float) -> float:
        """Density after so many decisions."""
        return final + (1 - final) * self.left(taken / len(self.times))


def _linear(done: float) -> float:
    return 1 - done


def _cubic(done: float) -> float:
    return (1 - done) ** 3


def _even(steps: int) -> tuple[float, ...]:
    return tuple(END * (k + 1) / steps for k in range(steps))


SCHEDULES: dict[str, Schedule] = {
    "one-shot": Schedule((0.0,), _linear),  # all at the start
    "iterative": Schedule(_even(STEPS["iterative"]), _linear),  # the same share at every step
    # Zhu and Gupta, To prune, or not to prune, ICLR workshop 2018, arXiv:1710.01878: s = s_f (1 - (1 - t)^3)
    "cubic": Schedule(_even(STEPS["cubic"]), _cubic),
}


def pick_schedule(name: str) -> Schedule:
    """Schedule of that name. Raises JpqError with the closest names."""
    if name not in SCHEDULES:
        raise unknown("schedule", name, SCHEDULES)
    return SCHEDULES[name]
