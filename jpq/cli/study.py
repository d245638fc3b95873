"""What the screen shows of a study: trials by kind, the best of each objective, hypervolume, and the time left."""

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

from jpq.cli.flags import parse_study
from jpq.cli.output import Column, table, text_column
from jpq.config import Config
from jpq.results.formatting import format_duration, format_metric, format_percent
from jpq.training.history import EpochRecord
from jpq.trials.settings import Study
from jpq.trials.status import OptunaStudy, StudyStatus
from jpq.trials.storage import without_password
from jpq.trials.study import study

if TYPE_CHECKING:  # --help shows without torch
    from jpq.tasks.base import Task


def study_command(args: list[str], console: Console) -> None:
    """Run `jpq study`."""
    config, settings = parse_study(args)
    settings.check(config)

    run_study(config, settings, console)


class StudyScreen:
    """A `StudyWatch` for people. On a terminal a few lines are kept up to date; elsewhere every trial writes one."""

    def __init__(self, console: Console, study: Study) -> None:
        self.console, self.study = console, study
        self.began = time.monotonic()
        self.number = -1
        self.row: EpochRecord | None = None
        self.task: Task | None = None
        self.name = ""
        self.standing: StudyStatus | None = None
        self.first: int | None = None  # trials that had ended when this worker began
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
        """Training for this task begins."""
        self.task = task

    def phase(self, name: str, epochs: int, steps: int) -> None:
        """What the trial does now."""
        self.name, self.row = name, None
        if name == "float" and self.live is None:
            self.console.print("The float model that all trials start from is trained ...", highlight=False)

    def step(self, loss: float, bops_share: float, aim_share: float) -> None:
        """Nothing is shown of steps."""

    def epoch(self, row: EpochRecord) -> None:
        """One epoch is done."""
        self.row = row

    def trial(self, number: int) -> None:
        """A trial begins."""
        self.number, self.row, self.name = number, None, ""

    def tally(self, study: OptunaStudy) -> None:
        """Trials have ended."""
        now = StudyStatus.of(study, self.study)
        if self.first is None:
            self.first = now.done
            self.began = time.monotonic()
        if self.live is None and self.number >= 0 and now != self.standing:
            parts = (f"trial {self.number}: {now.outcome(self.number)}", now.counts(self.study.trials), self._left(now))
            self.console.print(escape("  ".join(p for p in parts if p)), soft_wrap=True, highlight=False)
        self.standing = now

    def _left(self, now: StudyStatus) -> str:
        """Time left, from the trials that ended since this worker began."""
        ended = now.done - (self.first or 0)
        if ended < 1:
            return ""
        left = max(0, self.study.trials - now.done) * (time.monotonic() - self.began) / ended
        return f"{format_duration(left)} left"

    def _screen(self) -> RenderableType:
        now = self.standing
        if now is None:
            return Text(f"{self.name or 'study'} ...")
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self.study.trials, completed=min(now.done, self.study.trials), width=30)
        line.add_row(
            Text("study", style="bold"), bar, Text(now.counts(self.study.trials)), Text(self._left(now), style="cyan")
        )
        doing = f"trial {self.number}  {self.name}"
        if self.row is not None:
            held_out = self.row.accuracy
            metric = format_metric(self.task, held_out) if self.task else format_percent(held_out)
            doing += f" {self.row.epoch}/{self.row.epochs}  held-out {metric}"
        best = "   ".join([*(f"{name} {value:.4g}" for name, value in now.best.items()), now.volume_text()])
        return Group(line, Text(f"      best: {best}", style="dim"), Text(f"      {doing}", style="dim"))


def run_study(config: Config, settings: Study, console: Console) -> None:
    """Work on a study and show what came of it."""
    with StudyScreen(console, settings) as watch:
        done = study(config, settings, watch)
    console.print(front_table(done, settings))
    now = StudyStatus.of(done, settings)
    if now.done < settings.trials:
        console.print(
            f"The study ends at {now.done} of {settings.trials} trials: {now.spare} proposals were repeated "
            "or ruled out.",
            soft_wrap=True,
            highlight=False,
        )
    where = settings.storage or "journal.log"
    console.print(
        f"[bold]{escape(os.path.relpath(config.run.out / settings.name))}[/]: study.toml, float.safetensors, "
        f"trials/; the study itself in {escape(without_password(where))}",
        highlight=False,
    )


def front_table(study: OptunaStudy, asked: Study) -> Table:
    """The trials that no other is better than, by every objective."""
    now = StudyStatus.of(study, asked)
    columns: list[str | Column] = ["trial", *(Column(name, wrap=True) for name in now.names), text_column("run folder")]
    rows = []
    for trial in now.front:
        values = [f"{value:.4g}" for value in trial.values]
        rows.append((str(trial.number), *values, escape(str(trial.user_attrs.get("run_folder", "")))))
    return table(columns, rows, title=f"front: {len(now.front)} of {now.done} trials")
