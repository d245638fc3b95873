"""Finished runs on the digits that tests share: session fixtures make each once; copy a folder before changing it."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs

import jpq
from jpq.config import Run, Task, Train
from jpq.results.record import Result

SHORT = Train(epochs=2, float_epochs=1, lr=3e-3)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A final djpq run at 1 % of the BOPs: 600 digits, 3 float epochs, 4 epochs."""
    return jpq.optimize(runs.config(tmp_path_factory.mktemp("finished_run")), command="jpq optimize --target-bops 1%")


@pytest.fixture(scope="session")
def finished_budgets(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A final run with the budgets 4 % and 2 %: 200 digits, 4 epochs; its folders lie in `result.folder.parent`."""
    config = runs.config(tmp_path_factory.mktemp("finished_budgets"), target_bops="4%,2%")
    return jpq.optimize(runs.shortened(config, epochs=4))


@pytest.fixture(scope="session")
def finished_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study of two uniform trials: 200 digits, 2 epochs."""
    out = tmp_path_factory.mktemp("finished_study")
    config = jpq.Config(task=Task(limit=200), train=SHORT, run=Run(out=out, device="cpu"))
    jpq.study(config, jpq.Study(trials=2, per="network"))
    return out / "study"
