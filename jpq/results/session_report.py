"""`CompressionSession.report`: costs, targets, layers and search of a session, as a table, as JSON and as pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from jpq import costs
from jpq.compression.model import CompressedModel
from jpq.costs.target import Target
from jpq.files.atomic import replace_file
from jpq.results.finish import layer_records, target_record
from jpq.results.formatting import format_percent
from jpq.results.plots import BLUE, INK, ORANGE, draw_layer_bars, save_picture, set_log_ticks, style_axes
from jpq.results.record import LayerRecord
from jpq.types import JpqError


@dataclass(frozen=True)
class SessionReport:
    """The state of a session: `table` has a row per layer, `record` is all as plain data, `str()` the main lines."""

    layers: tuple[LayerRecord, ...]
    record: dict[str, Any]

    @property
    def table(self) -> pd.DataFrame:
        """A row per layer: channels, bits, MACs, BOPs, share of the BOPs, density (the columns of layers.csv)."""
        return pd.DataFrame([asdict(row) for row in self.layers])

    def __str__(self) -> str:
        record = self.record
        state = "decided" if record["discretized"] else f"step {record['step']} of {record['steps']}"
        lines = [f"{record['method']}, {state}"]
        for name, cost in record["costs"].items():
            asked = f", target {record['targets'][name]['asked']}" if name in record["targets"] else ""
            lines.append(f"{name}: {cost['amount']:,} ({format_percent(cost['share'])} of fp32{asked})")
        return "\n".join(lines)


def report_session(
    net: CompressedModel, targets: Sequence[Target], steps: tuple[int, int], decided: bool, history: Sequence[Any]
) -> SessionReport:
    """The report of a session as it stands: decisions are read as if they were taken now.

    Args:
        net: the model under compression.
        targets: of the budget.
        steps: of the search so far, and in all.
        decided: whether the decisions are taken for good.
        history: rows of a `SessionHistory`.
    """
    plan = net.plan()
    uses = net.exact_usage(plan)
    full = costs.baseline(uses)
    amounts = {name: int(costs.COSTS[name](uses)) for name in full}
    record = {
        "method": net.method,
        "step": steps[0],
        "steps": steps[1],
        "discretized": decided,
        "costs": {
            name: {"amount": amount, "full": int(full[name]), "share": amount / full[name]}
            for name, amount in amounts.items()
        },
        "targets": {target.cost: target_record(target, uses) for target in targets},
        "history": list(history),
    }
    layers = layer_records(net, plan)
    return SessionReport(layers, {**record, "layers": [asdict(row) for row in layers]})


def save_report(report: SessionReport, folder: Path) -> None:
    """Write layers.csv, report.json, layers.png, and where a search was recorded curves.png.

    Raises JpqError where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "layers.csv", lambda path: report.table.to_csv(path, index=False))
        text = json.dumps(report.record, indent=1) + "\n"
        replace_file(folder / "report.json", lambda path: path.write_text(text, encoding="utf-8"))
        save_picture(draw_layer_bars(report.layers, str(report).replace("\n", "; ")), folder / "layers.png")
        if report.record["history"]:
            save_picture(draw_session_curves(report), folder / "curves.png")
    except OSError as error:
        raise JpqError(f"The report cannot be written to {folder}: {error.strerror}. Give another folder.") from error


def draw_session_curves(report: SessionReport) -> Figure:
    """Plot of each target's cost and its limit over the steps of the search, as shares of the fp32 model's cost."""
    rows, targets = report.record["history"], report.record["targets"]
    figure = Figure(figsize=(9, 1 + 3 * len(targets)), layout="constrained")
    panels = figure.subplots(len(targets), 1, sharex=True, squeeze=False)[:, 0]
    steps = [row["step"] for row in rows]
    for axes, (name, target) in zip(panels, targets.items(), strict=True):
        full = report.record["costs"][name]["full"] / 100
        axes.set_yscale("log")
        axes.plot(steps, [row[f"{name}_limit"] / full for row in rows], color=ORANGE, lw=2, ls="--", label="limit now")
        axes.plot(steps, [row[name] / full for row in rows], color=BLUE, lw=2, label=f"{name} now")
        axes.axhline(target["limit"] / full, color=INK, lw=1.2, ls=":", label=f"target {target['asked']}")
        set_log_ticks(axes.yaxis)
        axes.set_ylabel(f"{name}, % of fp32")
        axes.legend(loc="upper right", fontsize=9, framealpha=0.9, edgecolor="none")
        style_axes(axes)
    panels[-1].set_xlabel("step")
    return figure
