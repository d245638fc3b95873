"""What a run works on at one of its budgets: handed from the search to the last step as one thing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from jpq.config import Config
from jpq.costs.target import Target
from jpq.tasks.data import Data
from jpq.training.run_state import RunState


@dataclass(frozen=True)
class Job:
    """Model, data, targets and settings of one budget, and the state of the run, which alone changes."""

    model: nn.Module  # float, trained: the teacher of distillation, and what divergences are from
    data: Data  # its training part is learned and measured on, its held-out part judges; `finish` reads the test part
    targets: tuple[Target, ...]  # of this budget
    config: Config  # with this budget alone
    run: RunState  # its folder, clock, notes and checkpoint
