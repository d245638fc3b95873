"""`jpq study`: work on a study with a live screen, then print its front."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jpq.cli.flags import parse_study_flags
from jpq.cli.output import Column, print_line, table, text_column
from jpq.config import Config
from jpq.results.formatting import format_duration, format_metric, format_percent
from jpq.training.history import EpochRecord
from jpq.trials.settings import Study
from jpq.types import JpqError

if TYPE_CHECKING:  # --help shows without torch
    from jpq.tasks.base import Task
    from jpq.trials.status import OptunaStudy, StudyStatus


def study_command(args: list[str], console: Console) -> None:
    """Run `jpq study`."""
    config, settings = parse_study_flags(args)
    if config.budget.max_drop and config.budget.min_metric:
        raise JpqError("--max-drop and --min-metric both say how good the chosen trial must be. Give one.")
    settings.check(config.without_accuracy_target())
    run_study(config, settings, console)


class StudyScreen:
    """Live screen of a study: trials by kind, best values, hypervolume, time left, and the trial that runs.

    On a terminal three lines are kept up to date; elsewhere (a log, CI) every trial writes one line.
    """

    def __init__(self, console: Console, study: Study) -> None:
        self.console, self.study = console, study
        self.began = time.monotonic()
        self.number = -1
        self.told = -1  # number of the trial whose outcome was printed last
        self.record: EpochRecord | None = None  # of the last epoch of the trial that runs
        self.task: Task | None = None
        self.phase_name = ""
        self.status: StudyStatus | None = None
        self.done_before: int | None = None  # trials that had ended when this worker began
        self.live: Live | None = None

    def __enter__(self) -> StudyScreen:
        if self.console.is_terminal:
            self.live = Live(get_renderable=self._screen, console=self.console, refresh_per_second=4, transient=True)
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def begin(self, task: Task) -> None:
        """Keep the task, whose metric is shown."""
        self.task = task

    def phase(self, name: str, epochs: int, steps: int) -> None:
        """Show the start of a phase of the trial."""
        self.phase_name, self.record = name, None
        if name == "float" and self.live is None:
            self.console.print("The float model that all trials start from is trained ...", highlight=False)

    def step(self, loss: float, bops_share: float, limit_share: float) -> None:
        """Ignore an optimizer step: the screen does not show it."""

    def epoch(self, row: EpochRecord) -> None:
        """Show the numbers of a finished epoch."""
        self.record = row

    def trial(self, number: int) -> None:
        """Show the start of a trial."""
        self.number, self.record, self.phase_name = number, None, ""

    def tally(self, study: OptunaStudy) -> None:
        """Show the counts after trials have ended."""
        from jpq.trials.status import StudyStatus

        now = StudyStatus.of(study, self.study)
        if self.done_before is None:
            self.done_before = now.done
            self.began = time.monotonic()
        if self.live is None and self.number >= 0 and now != self.status:
            others = "another worker's trial" if self.number == self.told else ""
            outcome = others or f"trial {self.number}: {now.outcome(self.number)}"
            self.told = self.number
            parts = (outcome, now.counts_text(self.study.trials), self._time_left(now))
            print_line(self.console, escape("  ".join(part for part in parts if part)))
        self.status = now

    def _time_left(self, status: StudyStatus) -> str:
        """Time left, from the trials that ended since this worker began."""
        ended = status.done - (self.done_before or 0)
        if ended < 1:
            return ""
        left = max(0, self.study.trials - status.done) * (time.monotonic() - self.began) / ended
        return f"{format_duration(left)} left"

    def _screen(self) -> RenderableType:
        now = self.status
        if now is None:
            return Text(f"{self.phase_name or 'study'} ...")
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self.study.trials, completed=min(now.done, self.study.trials), width=30)
        left = Text(self._time_left(now), style="cyan")
        line.add_row(Text("study", style="bold"), bar, Text(now.counts_text(self.study.trials)), left)
        doing = f"trial {self.number}  {self.phase_name}"
        if self.record is not None:
            held_out = self.record.accuracy
            metric = format_metric(self.task, held_out) if self.task else format_percent(held_out)
            doing += f" {self.record.epoch}/{self.record.epochs}  held-out {metric}"
        best = "   ".join([*(f"{name} {value:.4g}" for name, value in now.best.items()), now.hypervolume_text()])
        return Group(line, Text(f"      best: {best}", style="dim"), Text(f"      {doing}", style="dim"))


def run_study(config: Config, settings: Study, console: Console) -> None:
    """Run trials until the study has enough of them, then print its front and its folder."""
    from jpq.trials.status import StudyStatus
    from jpq.trials.storage import without_password
    from jpq.trials.study import study

    with StudyScreen(console, settings) as screen:
        done = study(config, settings, screen)
    status = StudyStatus.of(done, settings)
    console.print(front_table(status))
    if status.done < settings.trials:
        print_line(
            console,
            f"The study ends at {status.done} of {settings.trials} trials: {status.spare} proposals were repeated "
            "or ruled out.",
        )
    if config.budget.has_accuracy_target:
        print_recommended(config, settings, console)
    where = settings.storage or "journal.log"
    console.print(
        f"[bold]{escape(os.path.relpath(config.run.out / settings.name))}[/]: study.toml, float.safetensors, "
        f"trials/; the study itself in {escape(without_password(where))}",
        highlight=False,
    )


def print_recommended(config: Config, settings: Study, console: Console) -> None:
    """Print the cheapest trial, by the study's first cost, within --max-drop or --min-accuracy, with the reasons.

    Raises JpqError where no trial keeps the limit.
    """
    from jpq.cli.run_selection import print_choice
    from jpq.results.accuracy_limit import read_limit
    from jpq.results.front.front import build_front, float_accuracy
    from jpq.results.front.points import read_points
    from jpq.results.front.select import ACCURACY, Limit, pick_point

    cost = next(name for name in settings.objective_names() if name != "accuracy")
    front = build_front(read_points(config.run.out / settings.name).points, [cost])
    limit, full = read_limit(config.budget, front.task), float_accuracy(front)
    if full is None:
        raise JpqError(f"{limit.flag}: no trial says how good the float model is.")
    print_choice(pick_point(front, [Limit(ACCURACY, limit.flag, limit.least(full))]), console)


def front_table(status: StudyStatus) -> Table:
    """The non-dominated trials of a study, with the value of each objective."""
    values_of = (Column(name, wrap=True) for name in status.names)
    columns: list[str | Column] = ["trial", *values_of, text_column("run folder")]
    rows = []
    for trial in status.front:
        values = [f"{value:.4g}" for value in trial.values]
        rows.append((str(trial.number), *values, escape(str(trial.user_attrs.get("run_folder", "")))))
    return table(columns, rows, title=f"front: {len(status.front)} of {status.done} trials")
