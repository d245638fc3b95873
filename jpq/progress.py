"""What the screen shows: a live line while a run works, then a table of the layers and a summary."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from jpq.result import Result, Row, human, percent
from jpq.sizes import export_lines
from jpq.types import DENSE

OPENED = "masked_vs_rebuilt_at_landing_with_open_norms"  # as verify has it, without importing torch for --help
COST_OF_SEARCH = 2.0  # a step with gates and quantizers over a step of the float model, to guess the time left


class Progress:
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
        self.row: Row | None = None
        self.live: Live | None = None

    def __enter__(self) -> Progress:
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

    def epoch(self, row: Row) -> None:
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
        return [] if left is None else [f"{duration(left)} left"]

    def _numbers(self, loss: float, bops: float, aim: float) -> list[str]:
        """Loss, held-out accuracy and BOPs, as far as they are known."""
        out = [f"loss {loss:.3f}"] if math.isfinite(loss) else []
        if self.row is not None:
            out.append(f"held-out {percent(self.row.accuracy)}")
            bops = bops if math.isfinite(bops) else self.row.bops_share
        if math.isfinite(bops):
            out.append(f"BOPs {percent(bops)}" + (f" (aim {percent(aim)})" if math.isfinite(aim) else ""))
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
            Text(f"{self.name:<9}", style="bold"), bar, Text(f"epoch {epoch}/{self.epochs}"),
            Text("  ".join(self._left_text()), style="cyan"),
        )  # fmt: skip
        numbers = "   ".join(self._numbers(self.loss, self.bops_share, self.aim_share))
        return Group(line, Text(f"          {numbers}", style="dim", no_wrap=True, overflow="ellipsis"))

    def _close_phase(self) -> None:
        """Leave one line on the terminal about the phase that ended."""
        if self.live is None or not self.name:
            return
        parts = [f"{self.name:<9}", f"{self.epochs} epochs" if self.epochs else ""]
        if self.row is not None:
            parts += self._numbers(math.nan, self.row.bops_share, math.nan)
        parts.append(duration(time.monotonic() - self.began))
        self.live.console.print("[green]✓[/] " + escape("  ".join(p for p in parts if p)), highlight=False)
        self.name = ""


def duration(seconds: float) -> str:
    """Seconds as people say them: 2.4 s, 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def layer_table(result: Result) -> Table:
    """What became of each layer."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_footer=True, footer_style="bold")
    rows = result.layers
    kept, every = sum(r.outputs for r in rows), sum(r.outputs_all for r in rows)
    table.add_column("layer", "total", overflow="fold")
    masked = any(r.density < 1 for r in rows)
    mixed = len({r.structure for r in rows} - {DENSE}) > 1
    macs, bops = (human(sum(getattr(r, field) for r in rows)) for field in ("macs", "bops"))
    names = ["structure" if mixed else "in", "out", "density", "w bits", "a bits", "MACs", "BOPs", "share"]
    footers = ["", f"{kept}/{every}", "", "", "", macs, bops, "100 %"]
    hidden = {"out"} if mixed else set() if masked else {"density"}  # masks remove no channel
    for name, footer in zip(names, footers, strict=True):
        if name not in hidden:
            table.add_column(name, footer, justify="right", no_wrap=True)
    for r in rows:
        channels = (f"{r.inputs}/{r.inputs_all}", f"{r.outputs}/{r.outputs_all}")
        where = (escape(r.structure),) if mixed else channels
        density = (percent(r.density),) if masked else ()
        cells = (*density, str(r.w_bits), str(r.a_bits), human(r.macs), human(r.bops), f"{100 * r.share:.1f} %")
        table.add_row(escape(r.name), *where, *cells)
    return table


def summary(result: Result) -> Panel:
    """How good and how dear the model was and is, whether the budget and the checks hold, and where the files are."""
    full, now = result.float, result.compressed
    top = Table.grid(padding=(0, 2))
    for justify in ("left", "right", "right", "left"):
        top.add_column(justify=justify, no_wrap=justify != "left")
    top.add_row("", "[dim]float[/]", "[dim]compressed[/]", "")
    points = 100 * (now.accuracy - full.accuracy)
    change = f"{points:+.2f} points, test split" if math.isfinite(points) else "test split"
    top.add_row("accuracy", percent(full.accuracy), f"[bold]{percent(now.accuracy)}[/]", change)
    for label, field, unit in (("BOPs", "bops", ""), ("MACs", "macs", ""), ("size", "size_bytes", "B")):
        before, after = getattr(full, field), getattr(now, field)
        share = f"{percent(now.bops_share)} of fp32, " if field == "bops" else ""
        top.add_row(label, human(before, unit), f"[bold]{human(after, unit)}[/]", share + _factor(before, after))

    if now.bops_structured > now.bops:
        share = f"{percent(now.bops_structured / full.bops)} of fp32, where zeros that lie anywhere cost what others do"
        top.add_row("", "", human(now.bops_structured), share)

    if now.latency_ms is not None and full.latency_ms is not None:
        share = f"predicted; {percent(now.latency_ms / full.latency_ms)} of fp32"
        top.add_row("latency", ms(full.latency_ms), f"[bold]{ms(now.latency_ms)}[/]", share)

    rest = Table.grid(padding=(0, 2))
    rest.add_column(no_wrap=True)
    rest.add_column(overflow="fold")
    for name, target in result.targets.items():
        rest.add_row("target", target_line(name, target))
    if result.schemes:
        s = result.schemes
        how = "modelled, not measured" if s["latency"] == "modelled" else s["latency"]
        rest.add_row("schemes", f"by {s['by']}: {s['ms']:.3g} ms a sample, {s['dense_ms']:.3g} ms dense ({how})")
    for line in verified_lines(result.verified):
        rest.add_row("verified", line)
    for label, line in export_lines(result):
        rest.add_row(label, escape(line))
    if result.latency:
        rest.add_row("measured", latency_line(result.latency))
    if result.metrics:
        rest.add_row("gates", metrics_line(result.metrics))
    parts = ", ".join(f"{escape(k)} {duration(v)}" for k, v in result.seconds.items() if k != "total")
    total = result.seconds.get("total", sum(result.seconds.values()))
    rest.add_row("time", duration(total) + (f" ({parts})" if parts else ""))
    exported = ", ".join(made["file"] for made in result.export.get("forms", {}).values()) or "model.onnx"
    files = f"model.safetensors with plan.json, {exported}, model.packed, result.json, layers.csv, history.csv, "
    files += "sizes.csv, curves.png, layers.png"
    rest.add_row("files", f"[bold]{escape(os.path.relpath(result.folder))}[/]: {files}")
    for note in result.notes:
        rest.add_row("[yellow]note[/]", escape(note))
    return Panel(Group(top, Text(""), rest), title=f"{escape(result.method)}", title_align="left", border_style="cyan",
                 expand=False)  # fmt: skip


def target_line(name: str, target: Mapping[str, Any]) -> str:
    """One target as a sentence: what was asked, what it allows, how much of it is used."""
    unit, shown = {
        "bops": ("", "BOPs"),
        "bops-structured": ("", "structured BOPs"),
        "macs": ("", "MACs"),
        "size": ("B", "size"),
        "latency": ("", "latency"),
    }.get(name, ("", name))
    asked, limit, reached = str(target["asked"]), target["limit"], target["reached"]
    amount = ms(limit / 1e6) if name == "latency" else human(limit, unit)
    allowed = f"{shown} {escape(asked)}" + (f" = {amount}" if "%" in asked else "")
    verdict = "[green]met[/]" if reached <= limit else "[red]not met[/]"
    return f"{allowed}: {verdict}, {100 * target['used']:.1f} % of it used"


def ms(milliseconds: float) -> str:
    """Milliseconds with three digits."""
    return f"{milliseconds:#.3g} ms"


def latency_line(found: Mapping[str, Any]) -> str:
    """What onnxruntime takes for one sample, beside what the table of layers predicted."""
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    line = (
        f"{ms(found['measured_ms'])} in onnxruntime ({threads}, median of {found['n']}), predicted "
        f"{ms(found['predicted_ms'])}: {found['measured_over_predicted']:.2f} times as long"
    )
    return line + (f"; {escape(found['elsewhere'])}" if "elsewhere" in found else "")


def metrics_line(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """What gates said at landing, as means over the sites."""
    names = dict.fromkeys(name for numbers in metrics.values() for name in numbers)
    means = {name: statistics.mean(n[name] for n in metrics.values() if name in n) for name in names}
    return ", ".join(f"{name.replace('_', ' ')} {mean:.3g}" for name, mean in means.items()) + " (means over sites)"


def verified_lines(verified: Mapping[str, Any]) -> list[str]:
    """What was checked, in words; checks that are not known here are listed as they are."""
    lines = []
    for name, value in verified.items():
        if name == OPENED:
            lines.append(f"NOT exact, by --open-norms: at landing the rebuilt model was {value:.2g} (relative) off the "
                         "masked one; it was fine-tuned since")  # fmt: skip
        elif name == "masked_vs_rebuilt_float64":
            lines.append(f"rebuilt model = masked model (largest relative difference {value:.2g} in float64)")
        elif name == "rebuilt_vs_onnxruntime":
            same = value["images"] - value["argmax_differs"]
            lines.append(
                f"onnxruntime agrees on {same} of {value['images']} test images "
                f"({value['at_a_rounding_boundary']} with a value at a rounding boundary)"
            )
        elif name == "rebuilt_vs_onnxruntime_optimised":
            same = value["images"] - value["argmax_differs"]
            lines.append(f"with onnxruntime's integer kernels, which round biases too: {same} of {value['images']}")
        else:
            lines.append(f"{escape(name.replace('_', ' '))}: {escape(str(value))}")
    return lines


def _factor(before: float, after: float) -> str:
    """How many times less."""
    if after <= 0 or after == before:
        return "the same" if after == before else ""
    times = before / after
    return f"{times:.0f}x less" if times >= 20 else f"{times:.1f}x less"
