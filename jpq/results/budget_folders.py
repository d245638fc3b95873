"""The folders of a run with several budgets, one each, and their front once all are finished."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jpq.config import Config
from jpq.results import plots, run_folder
from jpq.results.front import front
from jpq.results.front.plots import draw_front
from jpq.results.front.points import read_points
from jpq.results.record import BudgetRecord
from jpq.training import checkpoint, history
from jpq.training.run_state import RunState


def budget_folder(run: Path, name: str, config: Config) -> Path:
    """The folder of one budget: the run's own ("" is the name of a single budget), or one inside it."""
    return run / run_folder.budget_folder_name(name, config) if name else run


def finish_front(folders: Mapping[str, Path], run: RunState) -> tuple[BudgetRecord, ...]:
    """Write front.csv, front.png and history.csv of a run whose budgets are all finished; its checkpoint goes.

    Args:
        folders: budget name -> its folder, in the order of the budgets.
        run: the state of the whole run.
    """
    records = tuple(run_folder.read_budget(name, folder) for name, folder in folders.items())
    run_folder.write_front(records, run.folder)
    runs = read_points([run.folder])
    plots.save_picture(draw_front(front.build_front(runs.points)), run.folder / run_folder.FRONT_PICTURE)
    history.write_history(run.recorder.rows, run.folder)
    (run.folder / checkpoint.NAME).unlink(missing_ok=True)
    return records
