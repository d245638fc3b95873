"""The plans that a run compared before it trained one of them: cost, divergence, held-out loss and metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from jpq.cli.output import Column, table, text_column
from jpq.results.formatting import format_duration, format_metric, format_percent
from jpq.results.record import Result


def contest_table(result: Result) -> RenderableType:
    """A row per compared plan, the kept one marked, and a line on what that took."""
    record = result.contest
    judged = any("held_out_loss" in row for row in record["candidates"])
    judged_columns: list[str | Column] = ["held-out loss", Column(result.task.metric_name)] if judged else []
    columns: list[str | Column] = [
        text_column("plan"),
        Column("BOPs", optional=1),
        Column("MACs", optional=3),
        Column("w bits", optional=2),
        Column("a bits", optional=2),
        "units",
        "divergence",
        *judged_columns,
        Column("kept", align="left"),
    ]
    lines = [_line(result, row, judged) for row in record["candidates"]]
    return Group(table(tuple(columns), lines), Text(contest_words(record), style="dim"))


def _line(result: Result, row: Mapping[str, Any], judged: bool) -> tuple[str, ...]:
    """The cells of one plan."""
    loss, metric = row.get("held_out_loss"), row.get("held_out_metric")
    divergence = row["divergence"]
    return (
        escape(row["name"]),
        format_percent(row["bops_share"]),
        format_percent(row["macs"] / result.float.macs),
        f"{row['w_bits']:.1f}",
        f"{row['a_bits']:.1f}",
        format_percent(row["units"]),
        "-" if divergence is None else f"{divergence:.4g}",
        *(
            (
                "-" if loss is None else f"{loss:.4f}",
                "-" if metric is None else format_metric(result.task, metric),
            )
            if judged
            else ()
        ),
        "yes" if row["kept"] else "tied" if row.get("tied") else "",
    )


def contest_words(record: Mapping[str, Any]) -> str:
    """What measuring and the contest took, in a line or two."""
    parts = []
    if "samples" in record:
        parts.append(
            f"  Divergence: of the outputs from the float model's, on {record['samples']:,} training samples"
            f"{' mixed in pairs' if record.get('mixed', True) else ''}; {record['passes']:,} batches in "
            f"{format_duration(record['measure_seconds'])}."
        )
    if "steps" in record:
        longest = max((row.get("steps", 0) for row in record["candidates"]), default=0)
        further = f", then {longest - record['steps']} more for the better half" if longest > record["steps"] else ""
        seconds = format_duration(record["contest_seconds"])
        parts.append(
            f"  Contest: {record['steps']} steps for each plan{further}; {seconds} in all, "
            f"judged on {record['held_out_samples']:,} held-out samples. Tied: within two standard errors of the "
            "least loss at the end; kept of these: one that keeps all channels, then the one of smaller divergence."
        )
    return "\n".join(parts)
