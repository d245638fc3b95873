"""The float model's test metric is read where its held-out metric is that of the run, in the metric's own size."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from jpq.config import Config
from jpq.results import finalize
from jpq.tasks import CLASSIFICATION
from jpq.tasks.base import Task
from jpq.tasks.restoration import Restoration


@pytest.mark.parametrize(
    ("task", "then", "now", "same"),
    [
        (CLASSIFICATION, 0.900, 0.904, True),
        (CLASSIFICATION, 0.900, 0.910, False),
        (Restoration(), 30.0, 30.1, True),  # dB: another machine moves them by more than 0.005
        (Restoration(), 30.0, 31.0, False),
    ],
)
def test_test_metric_is_read_of_the_weights_of_the_run(
    task: Task, then: float, now: float, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {"held out": now, "test": 0.25}
    monkeypatch.setattr(type(task), "evaluate", lambda self, model, part: measured[part])
    monkeypatch.setattr(finalize, "read_float_model", lambda *args: nn.Identity())
    data: Any = SimpleNamespace(task=task, held_out="held out", test="test")
    before: Any = SimpleNamespace(held_out={"float": then})
    metric, notes = finalize.measure_float_model(Path(), Config(), data, before)
    if same:
        assert (metric, notes) == (0.25, [])
    else:
        assert math.isnan(metric)
        assert "was not read" in notes[0]
