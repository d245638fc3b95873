"""Live progress of one run: phase, epoch, loss, held-out metric, BOPs share and ramp, time left."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column

from jpq.cli.header import header
from jpq.cli.output import print_line
from jpq.results.description import RunDescription
from jpq.results.formatting import format_duration, format_metric, format_percent
from jpq.training.history import EpochRecord

if TYPE_CHECKING:  # --help shows without torch
    from jpq.tasks.base import Task

SEARCH_STEP_FACTOR = 2.0  # time of a step with gates and quantizers over one of the float model


class ProgressDisplay:
    """Observer of a run that shows its header, its warnings and its progress; use it as a context.

    On a terminal a bar with two lines is kept up to date; elsewhere (a log, CI) every epoch writes one line.

    Args:
        console: the terminal or log.
        planned: phase -> its epochs, in the order of the run; the time left covers all of them.
    """

    def __init__(self, console: Console, planned: Mapping[str, int]) -> None:
        self.console = console
        self.planned = dict(planned)
        self.name, self.epochs, self.steps = "", 0, 0
        self.done = 0  # steps of this phase, those of an earlier run included
        self.timed = 0  # steps of this phase that this run did
        self.began = time.monotonic()
        self.loss = self.bops_share = self.limit_share = math.nan
        self.record: EpochRecord | None = None  # of the last epoch of this phase
        self.task: Task | None = None
        self.live: Progress | None = None

    def __enter__(self) -> ProgressDisplay:
        if self.console.is_terminal:
            self.live = Progress(
                SpinnerColumn(finished_text=" "),
                TextColumn("[bold]{task.description:<9}"),
                BarColumn(bar_width=max(10, min(40, self.console.width - 70))),
                TextColumn(
                    "{task.fields[position]}  [cyan]{task.fields[left]}[/]\n[dim]{task.fields[numbers]}[/]",
                    table_column=Column(no_wrap=True, overflow="ellipsis"),
                ),
                console=self.console,
                refresh_per_second=5,
                transient=True,
            )
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._close_phase()
        if self.live is not None:
            self._remove_bar(self.live)
            self.live.stop()

    def begin(self, task: Task) -> None:
        """Keep the task, whose metric is shown."""
        self.task = task

    def describe(self, description: RunDescription) -> None:
        """Print the header of the run."""
        self.console.print(header(description))
        self.console.print()

    def warn(self, text: str) -> None:
        """Print a warning."""
        print_line(self.console, f"[yellow]warning[/] {escape(text)}")

    def phase(self, name: str, epochs: int, steps: int) -> None:
        """Show the start of a phase of so many epochs of so many steps."""
        self._close_phase()
        self.name, self.epochs, self.steps = name, epochs, steps
        self.done = self.timed = 0
        self.began = time.monotonic()
        self.record = None
        self.loss = self.bops_share = self.limit_share = math.nan
        if self.live is not None:
            total = max(epochs, 1) * steps or None
            self.live.add_task(name, total=total, position="" if epochs else "...", left="", numbers="")
            self._update_bar()
        elif not epochs:
            print_line(self.console, f"{name} ...")

    def step(self, loss: float, bops_share: float, limit_share: float) -> None:
        """Show a finished optimizer step."""
        self.done += 1
        self.timed += 1
        self.loss, self.bops_share, self.limit_share = loss, bops_share, limit_share
        self._update_bar()

    def epoch(self, row: EpochRecord) -> None:
        """Show a finished epoch."""
        self.record = row
        self.done = row.epoch * self.steps
        self._update_bar()
        if self.live is None:
            numbers = self._numbers(row.loss, row.bops_share, row.aim_share)
            parts = [f"{row.title:<9} {row.epoch:>3}/{row.epochs}", *numbers, *self._left_text()]
            print_line(self.console, escape("  ".join(parts)))

    def seconds_left(self) -> float | None:
        """Time left in this and all planned phases; None until it can be guessed."""
        if not self.timed or not self.steps:
            return None
        per_step = (time.monotonic() - self.began) / self.timed
        left = max(0, max(self.epochs, 1) * self.steps - self.done) * per_step
        factor = SEARCH_STEP_FACTOR if self.name == "float" else 1.0
        names = list(self.planned)
        later = names[names.index(self.name) + 1 :] if self.name in names else []
        return left + sum(self.planned[name] for name in later) * self.steps * per_step * factor

    def _left_text(self) -> list[str]:
        left = self.seconds_left()
        return [] if left is None else [f"{format_duration(left)} left"]

    def _numbers(self, loss: float, bops: float, limit: float) -> list[str]:
        """Loss, held-out metric and BOPs, as far as they are known."""
        texts = [f"loss {loss:.3f}"] if math.isfinite(loss) else []
        if self.record is not None:
            metric = self.record.accuracy
            texts.append(f"held-out {format_metric(self.task, metric) if self.task else format_percent(metric)}")
            bops = bops if math.isfinite(bops) else self.record.bops_share
        if math.isfinite(bops):
            texts.append(
                f"BOPs {format_percent(bops)}" + (f" (aim {format_percent(limit)})" if math.isfinite(limit) else "")
            )
        return texts

    def _update_bar(self) -> None:
        """Show the state of this phase on the terminal."""
        if self.live is None or not self.live.task_ids or not self.steps:
            return
        total = max(self.epochs, 1) * self.steps
        epoch = min(self.epochs, self.done // max(self.steps, 1) + 1)
        self.live.update(
            self.live.task_ids[-1],
            completed=min(self.done, total),
            position=f"epoch {epoch}/{self.epochs}" if self.epochs else f"{min(self.done, total)}/{total}",
            left="  ".join(self._left_text()),
            numbers="   ".join(self._numbers(self.loss, self.bops_share, self.limit_share)),
        )

    def _remove_bar(self, live: Progress) -> None:
        for task_id in live.task_ids:
            live.remove_task(task_id)

    def _close_phase(self) -> None:
        """Leave one line on the terminal for the phase that ended."""
        if self.live is None or not self.name:
            return
        parts = [f"{self.name:<9}", f"{self.epochs} epochs" if self.epochs else ""]
        if self.record is not None:
            parts += self._numbers(math.nan, self.record.bops_share, math.nan)
        parts.append(format_duration(time.monotonic() - self.began))
        self._remove_bar(self.live)
        self.live.console.print("[green]✓[/] " + escape("  ".join(p for p in parts if p)), highlight=False)
        self.name = ""
