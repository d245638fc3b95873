"""What the screen shows: a live line while a run works, then a table of the layers and a summary."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from jpq.results.formatting import format_duration, format_metric, format_percent
from jpq.training.history import EpochRecord

if TYPE_CHECKING:  # --help shows without torch
    from jpq.tasks.base import Task

COST_OF_SEARCH = 2.0  # a step with gates and quantizers over a step of the float model, to guess the time left


class ProgressDisplay:
    """A `Watch` for people: phase, epoch, loss, held-out accuracy, BOPs against their aim, and the time left.

    On a terminal two lines are kept up to date; elsewhere (a log, CI) every epoch writes one line. Use it as a context.
    `planned` names the phases to come with their epochs, in order, so that the time left covers all of them.
    """

    def __init__(self, console: Console, planned: Mapping[str, int]) -> None:
        self.console = console
        self.planned = dict(planned)
        self.name, self.epochs, self.steps = "", 0, 0
        self.done = 0  # steps of this phase, those of an earlier run included
        self.timed = 0  # steps of this phase that this run did
        self.began = time.monotonic()
        self.loss = self.bops_share = self.aim_share = math.nan
        self.row: EpochRecord | None = None
        self.task: Task | None = None
        self.live: Live | None = None

    def __enter__(self) -> ProgressDisplay:
        if self.console.is_terminal:
            self.live = Live(get_renderable=self._screen, console=self.console, refresh_per_second=5, transient=True)
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._close_phase()
        if self.live is not None:
            self.name = ""
            self.live.stop()

    def begin(self, task: Task) -> None:
        """Training for this task begins."""
        self.task = task

    def phase(self, name: str, epochs: int, steps: int) -> None:
        """A phase of so many epochs of so many steps begins."""
        self._close_phase()
        self.name, self.epochs, self.steps = name, epochs, steps
        self.done = self.timed = 0
        self.began = time.monotonic()
        self.row = None
        self.loss = self.bops_share = self.aim_share = math.nan
        if self.live is None and not epochs:
            self.console.print(f"{name} ...", soft_wrap=True, highlight=False)

    def step(self, loss: float, bops_share: float, aim_share: float) -> None:
        """One optimisation step is done."""
        self.done += 1
        self.timed += 1
        self.loss, self.bops_share, self.aim_share = loss, bops_share, aim_share

    def epoch(self, row: EpochRecord) -> None:
        """One epoch is done."""
        self.row = row
        self.done = row.epoch * self.steps
        if self.live is None:
            numbers = self._numbers(row.loss, row.bops_share, row.aim_share)
            parts = [f"{row.title:<9} {row.epoch:>3}/{row.epochs}", *numbers, *self._left_text()]
            self.console.print("  ".join(parts), soft_wrap=True, highlight=False)

    def seconds_left(self) -> float | None:
        """Time left in this and all planned phases; None until it can be guessed."""
        if not self.timed or not self.steps:
            return None
        per_step = (time.monotonic() - self.began) / self.timed
        left = max(0, self.epochs * self.steps - self.done) * per_step
        factor = COST_OF_SEARCH if self.name == "float" else 1.0
        names = list(self.planned)
        later = names[names.index(self.name) + 1 :] if self.name in names else []
        return left + sum(self.planned[name] for name in later) * self.steps * per_step * factor

    def _left_text(self) -> list[str]:
        left = self.seconds_left()
        return [] if left is None else [f"{format_duration(left)} left"]

    def _numbers(self, loss: float, bops: float, aim: float) -> list[str]:
        """Loss, held-out accuracy and BOPs, as far as they are known."""
        out = [f"loss {loss:.3f}"] if math.isfinite(loss) else []
        if self.row is not None:
            metric = self.row.accuracy
            out.append(f"held-out {format_metric(self.task, metric) if self.task else format_percent(metric)}")
            bops = bops if math.isfinite(bops) else self.row.bops_share
        if math.isfinite(bops):
            out.append(f"BOPs {format_percent(bops)}" + (f" (aim {format_percent(aim)})" if math.isfinite(aim) else ""))
        return out

    def _screen(self) -> RenderableType:
        if not self.name:
            return Text("")
        if not self.epochs:
            return Spinner("dots", Text(f"{self.name} ..."))
        total = self.epochs * self.steps
        epoch = min(self.epochs, self.done // max(self.steps, 1) + 1)
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=total, completed=min(self.done, total), width=max(10, min(40, self.console.width - 50)))
        line.add_row(
            Text(f"{self.name:<9}", style="bold"),
            bar,
            Text(f"epoch {epoch}/{self.epochs}"),
            Text("  ".join(self._left_text()), style="cyan"),
        )
        numbers = "   ".join(self._numbers(self.loss, self.bops_share, self.aim_share))
        return Group(line, Text(f"          {numbers}", style="dim", no_wrap=True, overflow="ellipsis"))

    def _close_phase(self) -> None:
        """Leave one line on the terminal about the phase that ended."""
        if self.live is None or not self.name:
            return
        parts = [f"{self.name:<9}", f"{self.epochs} epochs" if self.epochs else ""]
        if self.row is not None:
            parts += self._numbers(math.nan, self.row.bops_share, math.nan)
        parts.append(format_duration(time.monotonic() - self.began))
        self.live.console.print("[green]✓[/] " + escape("  ".join(p for p in parts if p)), highlight=False)
        self.name = ""
