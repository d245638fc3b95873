"""The summary printed after a run: the table of its layers, and a panel of metrics, costs, checks and files."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from jpq.cli.output import Column, label_grid, name_column, table
from jpq.results.formatting import (
    format_change,
    format_duration,
    format_metric,
    format_ms,
    format_number,
    format_percent,
)
from jpq.results.intervals import format_interval
from jpq.results.record import LayerRecord, Result
from jpq.results.run_folder import size_rows
from jpq.types import DENSE, plural

if TYPE_CHECKING:  # --help shows without torch
    from jpq.tasks.base import Task

FLOAT_BITS = 32  # of products of computed tensors

OPENED = "masked_vs_rebuilt_at_landing_with_open_norms"  # as verify has it, without importing torch for --help


MAX_ROWS = 20  # largest number of layers that are shown unless all are asked for

OPTIONAL = {"in": 3, "MACs": 2, "out": 1}  # columns that a narrow screen leaves out, the largest number first


def layer_table(result: Result, all_rows: bool = False) -> RenderableType:
    """A row per layer: channels or structure, density, bits and costs, with totals; of a long model the dearest.

    Args:
        result: of the run.
        all_rows: show every layer, where a long model has more than MAX_ROWS.
    """
    rows = result.layers
    dearest = sorted(range(len(rows)), key=lambda i: rows[i].bops, reverse=True)[:MAX_ROWS]
    shown = [rows[i] for i in sorted(dearest)] if not all_rows else list(rows)
    masked = any(r.density < 1 for r in rows)
    mixed = len({r.structure for r in rows} - {DENSE}) > 1
    hidden = {"out"} if mixed else set() if masked else {"density"}  # masks remove no channel
    cells_table = _cells_table(result, shown, mixed, hidden)
    if len(shown) == len(rows):
        return cells_table
    left = len(rows) - len(shown)
    rest = sum(r.share for i, r in enumerate(rows) if i not in dearest)
    line = f"  {left} more layer{'s' * (left > 1)} with {format_percent(rest)} of the BOPs: --all, or layers.csv"
    return Group(cells_table, Text(line, style="dim"))


def _cells_table(result: Result, shown: Sequence[LayerRecord], mixed: bool, hidden: Collection[str]) -> Table:
    """The table of these layers, with the totals of all.

    Args:
        result: of the run.
        shown: its layers that get a row.
        mixed: whether the layers have structures of several kinds.
        hidden: columns that say nothing here.
    """
    rows = result.layers
    products = [part for part in result.float_work.get("parts", ()) if part["part"] == "product"]
    product_macs = sum(part["macs"] for part in products)
    product_bops = product_macs * FLOAT_BITS**2
    kept, every = sum(r.outputs for r in rows), sum(r.outputs_all for r in rows)
    macs = format_number(sum(r.macs for r in rows) + product_macs)
    bops = format_number(sum(r.bops for r in rows) + product_bops)
    names = ["structure" if mixed else "in", "out", "density", "w bits", "a bits", "MACs", "BOPs", "share"]
    footers = ["", f"{kept}/{every}", "", "", "", macs, bops, "100 %"]
    places = [i for i, name in enumerate(names) if name not in hidden]
    columns = [Column(names[i], footers[i], optional=OPTIONAL.get(names[i], 0)) for i in places]
    lines = []
    for r in shown:
        where = escape(r.structure) if mixed else f"{r.inputs}/{r.inputs_all}"
        cells = (
            where,
            f"{r.outputs}/{r.outputs_all}",
            format_percent(r.density),
            str(r.w_bits),
            str(r.a_bits),
            format_number(r.macs),
            format_number(r.bops),
            f"{100 * r.share:.1f} %",
        )
        lines.append((escape(r.name), *(cells[i] for i in places)))
    if products:
        share = product_bops / max(1, product_bops + sum(r.bops for r in rows))
        numbers = format_number(product_macs), format_number(product_bops), f"{100 * share:.1f} %"
        cells = ("", "", "", str(FLOAT_BITS), str(FLOAT_BITS), *numbers)
        name = f"{len(products)} product{'s' * (len(products) > 1)}"
        lines.append((name, *(cells[i] for i in places)))
    return table((name_column("layer", "total"), *columns), lines)


def summary(result: Result) -> Panel:
    """The panel after a run: metrics and costs before and after, targets, checks, times and files."""
    return Panel(
        Group(_metrics_grid(result), Text(""), _facts_grid(result)),
        title=f"{escape(result.method)}",
        title_align="left",
        border_style="cyan",
        expand=False,
    )


def _metrics_grid(result: Result) -> Table:
    """The task's metric and each cost: of the float model, of the compressed one, and the change."""
    full, now, task = result.float, result.compressed, result.task
    grid = Table.grid(padding=(0, 2))
    for justify in ("left", "right", "right", "left"):
        grid.add_column(justify=justify, no_wrap=justify != "left")
    grid.add_row("", "[dim]float[/]", "[dim]compressed[/]", "")
    change = now.accuracy - full.accuracy
    text = f"{format_change(task, change)}, test split" if math.isfinite(change) else "test split"
    before, after = (format_metric(task, metrics.accuracy) for metrics in (full, now))
    grid.add_row(task.metric_name, before, f"[bold]{after}[/]", text)
    if intervals := result.intervals:
        ends = [format_interval(intervals[side]) if side in intervals else "-" for side in ("float", "compressed")]
        grid.add_row("", *(f"[dim]{end}[/]" for end in ends), f"[dim]{_interval_words(intervals)}[/]")
    for label, field, unit in (("BOPs", "bops", ""), ("MACs", "macs", ""), ("size", "size_bytes", "B")):
        float_cost, cost = getattr(full, field), getattr(now, field)
        share = f"{format_percent(now.bops_share)} of fp32, " if field == "bops" else ""
        grid.add_row(
            label,
            format_number(float_cost, unit),
            f"[bold]{format_number(cost, unit)}[/]",
            share + _factor(float_cost, cost),
        )
    if now.bops_structured > now.bops:
        share = format_percent(now.bops_structured / full.bops)
        share += " of fp32, where zeros that lie anywhere cost what others do"
        grid.add_row("", "", format_number(now.bops_structured), share)
    if now.latency_ms is not None and full.latency_ms is not None:
        share = f"predicted; {format_percent(now.latency_ms / full.latency_ms)} of fp32"
        grid.add_row("latency", format_ms(full.latency_ms), f"[bold]{format_ms(now.latency_ms)}[/]", share)
    return grid


def _interval_words(intervals: Mapping[str, Any]) -> str:
    """Meaning of the intervals in a line, and whether the difference lies within them."""
    words = f"{100 * intervals['level']:.0f} % interval of {intervals['samples']} samples"
    return f"{words}: the difference is within the noise" if intervals["within_noise"] else words


def _factor(before: float, after: float) -> str:
    """The reduction factor of a cost as text, such as "12x less"."""
    if after <= 0 or after == before:
        return "the same" if after == before else ""
    times = before / after
    return f"{times:.0f}x less" if times >= 20 else f"{times:.1f}x less"


def _facts_grid(result: Result) -> Table:
    """Targets, structures, checks, exported files, measured time, gates, seconds, files and notes."""
    rows = [("target", target_line(name, target)) for name, target in result.targets.items()]
    if result.schemes:
        s = result.schemes
        source = "modelled, not measured" if s["latency"] == "modelled" else s["latency"]
        rows.append(("schemes", f"by {s['by']}: {s['ms']:.3g} ms a sample, {s['dense_ms']:.3g} ms dense ({source})"))
    if result.float_work.get("parts"):
        rows.append(("32-bit work", escape(float_work_line(result.float_work))))
    rows += [("verified", line) for line in verified_lines(result.verified, result.task, result.sample_name)]
    rows += [(label, escape(line)) for label, line in export_lines(result)]
    if result.latency:
        rows.append(("measured", latency_line(result.latency)))
    if result.metrics:
        rows.append(("gates", metrics_line(result.metrics)))
    rows += [("time", _time_line(result.seconds)), ("files", _files_line(result))]
    rows += [("[yellow]note[/]", escape(note)) for note in result.notes]
    return label_grid(rows)


def _time_line(seconds: Mapping[str, float]) -> str:
    """Seconds in all, and of each phase."""
    phases = ", ".join(f"{escape(name)} {format_duration(s)}" for name, s in seconds.items() if name != "total")
    total = seconds.get("total", sum(seconds.values()))
    return format_duration(total) + (f" ({phases})" if phases else "")


def _files_line(result: Result) -> str:
    """The run's folder and the files in it."""
    exported_files = ", ".join(form["file"] for form in result.export.get("forms", {}).values()) or "model.onnx"
    return (
        f"[bold]{escape(os.path.relpath(result.folder))}[/]: model.safetensors with plan.json, {exported_files}, "
        "model.packed, result.json, layers.csv, history.csv, sizes.csv, curves.png, layers.png"
    )


def target_line(name: str, target: Mapping[str, Any]) -> str:
    """Describe one target in a line: its amount, whether it is met, and the share that is used."""
    unit, label = {
        "bops": ("", "BOPs"),
        "bops-structured": ("", "structured BOPs"),
        "macs": ("", "MACs"),
        "size": ("B", "size"),
        "latency": ("", "latency"),
    }.get(name, ("", name))
    amount, limit, reached = str(target["asked"]), target["limit"], target["reached"]
    limit_text = format_ms(limit / 1e6) if name == "latency" else format_number(limit, unit)
    allowed = f"{label} {escape(amount)}" + (f" = {limit_text}" if "%" in amount else "")
    verdict = "[green]met[/]" if reached <= limit else "[red]not met[/]"
    return f"{allowed}: {verdict}, {100 * target['used']:.1f} % of it used"


def float_work_line(work: Mapping[str, Any]) -> str:
    """What the compressed model computes at 32 bits, with its share of the MACs and BOPs: layers, products, names."""
    from jpq.compression.float_work import describe_float_work

    if work["share"] == 1:
        return "all of it: nothing is quantized"
    return f"{describe_float_work(work)}; {format_percent(work['bops_share'])} of the BOPs"


def latency_line(timing: Mapping[str, Any]) -> str:
    """Milliseconds of one sample in onnxruntime, beside the prediction of the latency table."""
    threads = "1 thread" if timing["threads"] == 1 else f"{timing['threads']} threads"
    line = (
        f"{format_ms(timing['measured_ms'])} in onnxruntime ({threads}, median of {timing['n']}), predicted "
        f"{format_ms(timing['predicted_ms'])}: {timing['measured_over_predicted']:.2f} times as long"
    )
    return line + (f"; {escape(timing['elsewhere'])}" if "elsewhere" in timing else "")


def metrics_line(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Numbers that gates report at discretization, as means over the sites."""
    names = dict.fromkeys(name for numbers in metrics.values() for name in numbers)
    means = {name: statistics.mean(n[name] for n in metrics.values() if name in n) for name in names}
    return ", ".join(f"{name.replace('_', ' ')} {mean:.3g}" for name, mean in means.items()) + " (means over sites)"


def verified_lines(verified: Mapping[str, Any], task: Task | None = None, sample: str = "image") -> list[str]:
    """Results of the checks, a line each; a check without a sentence here is listed by its name.

    `task` names decisions, which are one class per sample where it is None; `sample` is one sample in words.
    """
    lines = []
    for name, value in verified.items():
        if name == OPENED:
            lines.append(
                f"NOT exact, by --open-norms: at discretization the rebuilt model was {value:.2g} (relative) off the "
                "masked one; it was fine-tuned since"
            )
        elif name == "masked_vs_rebuilt_float64":
            lines.append(f"rebuilt model = masked model (largest relative difference {value:.2g} in float64)")
        elif name == "rebuilt_vs_onnxruntime":
            lines.append(
                f"onnxruntime agrees on {_agreement_text(value, task, sample)} "
                f"({value['at_a_rounding_boundary']} with a value at a rounding boundary)"
            )
        elif name == "rebuilt_vs_onnxruntime_optimised":
            same, total = _decisions(value) - value["argmax_differs"], _decisions(value)
            lines.append(f"a default session of onnxruntime, with its integer kernels, agrees on {same:,} of {total:,}")
        elif name in ("metric", "warning"):  # the metric of the file stands at the top, a warning before all else
            continue
        elif name == "rebuilt_float32_vs_float64":
            lines.append(
                f"the model itself in float64 instead of float32: {value['at_a_rounding_boundary']} of "
                f"{value['images']} test {escape(plural(sample))} with a value at a rounding boundary"
            )
        else:
            lines.append(f"{escape(name.replace('_', ' '))}: {escape(str(value))}")
    return lines


def _decisions(check: Mapping[str, Any]) -> int:
    """Number of decisions that a check compared; records of earlier versions name that of the images alone."""
    return int(check.get("decisions", check["images"]))


def _agreement_text(check: Mapping[str, Any], task: Task | None, sample: str) -> str:
    """How many decisions are equal: "449 of 449 test images", or "38,000 of 38,400 pixels of 10 test images"."""
    images, total = check["images"], _decisions(check)
    samples = f"test {escape(plural(sample))}"
    same = total - check["argmax_differs"]
    if task is None or total == images:
        return f"{same:,} of {total:,} {samples}"
    return f"{same:,} of {total:,} decisions ({task.decision_name}) of {images} {samples}"


def export_lines(result: Result) -> list[tuple[str, str]]:
    """Exported files, their sizes and integer layers: (label, text) of each line."""
    if not result.export:
        return []
    e = result.export
    rows = {row["what"]: row for row in size_rows(result)}
    parts = []
    for name in ("model.packed", *(form["file"] for form in e["forms"].values())):
        row = rows.get(name)
        if row is not None:
            int8 = "" if row["share_of_int8"] is None else f" and {format_percent(row['share_of_int8'])} of int8"
            parts.append(
                f"{name} {format_number(row['bytes'], 'B')} ({format_percent(row['share_of_fp32'])} of fp32{int8})"
            )
    lines = [("on disk", "; ".join(parts))]
    left, total = len(e["float_layers"]), e["integer_layers"] + len(e["float_layers"])
    kernels = f"onnxruntime computes {e['integer_layers']} of {total} layers in integers"
    at_32_bits = len(result.float_work.get("parts", ()))  # by choice, or products: no other flag changes that
    hint = "" if left <= at_32_bits else "; --output-bits 8 is for those before sums and poolings"
    weights = "float32" if result.float_work.get("share") == 1 else e["weights"]
    odd = next((x.outputs for x in result.layers if x.outputs < x.outputs_all and x.outputs % 4), None)
    if odd:
        hint += f"; channels in multiples of 8 run faster than {odd} (--channel-multiple 8)"
    lines.append(("ONNX", f"opset {e['opset']}, weights in {weights}; {kernels}{hint}"))
    for name, form in e["forms"].items():
        check = form.get("verified", {})
        if name != "onnx" and "images" in check:
            lines.append(
                ("verified", f"{form['file']} agrees on {_agreement_text(check, result.task, result.sample_name)}")
            )
    return lines
