"""The header of a run, printed before it begins: model, data, task, targets, epochs, device, folder and notes."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import RenderableType
from rich.markup import escape

from jpq.cli.output import label_grid
from jpq.results.description import RunDescription, TargetDescription
from jpq.results.formatting import format_ms, format_number

LABELS = {"bops": "BOPs", "bops-structured": "structured BOPs", "macs": "MACs", "size": "size", "latency": "latency"}
MOST_TARGETS = 8  # largest number of targets that are written out


def header(run: RunDescription) -> RenderableType:
    """Labels with a text beside each."""
    layers = f"{run.layers} layer{'s' * (run.layers != 1)}"
    sizes = ", ".join(f"{size:,} {split}" for split, size in run.sizes.items())
    shape = " x ".join(map(str, run.shape))
    threads = f"{run.threads} CPU thread{'s' * (run.threads != 1)}"
    processes = f", {run.processes} processes" if run.processes > 1 else ""
    epochs = ", ".join(f"{epochs} {phase}" for phase, epochs in run.phases.items() if epochs)
    rows = [
        (
            "model",
            f"{escape(run.model)}: {format_number(run.parameters)} parameters, {layers}, "
            f"{format_number(run.macs)} MACs a sample",
        ),
        ("data", f"{escape(run.data)}: {sizes}; samples of {shape}, {run.classes} output{'s' * (run.classes != 1)}"),
        *([("task", escape(run.task))] if run.task else []),
        ("method", escape(run.method)),
        ("target", escape(describe_targets(run.targets)) or "none: bits and channels are given"),
        ("epochs", escape(epochs) or "none: nothing is trained"),
        ("device", f"{run.device}, {threads}{processes}"),
        ("folder", escape(os.path.relpath(run.folder)) + (" (goes on from its checkpoint)" if run.resumed else "")),
    ]
    notes = [("[yellow]note[/]", escape(note)) for note in run.notes]
    return label_grid([(f"[dim]{label}[/]", text) for label, text in rows] + notes)


def describe_targets(targets: Sequence[TargetDescription]) -> str:
    """Targets in units of this network: "BOPs 1% = 9.25 M of 925 M"."""
    texts = []
    for target in targets[:MOST_TARGETS]:
        limit, full = (_amount(target.cost, number) for number in (target.limit, target.full))
        texts.append(f"{LABELS.get(target.cost, target.cost)} {target.asked} = {limit} of {full}")
    more = len(targets) - len(texts)
    return "; ".join(texts) + (f"; and {more} more" if more else "")


def _amount(cost: str, number: float) -> str:
    if cost == "latency":
        return format_ms(number / 1e6)
    return format_number(number, "B" if cost == "size" else "")
