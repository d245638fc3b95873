"""`jpq prune-private`: prune a trained model without any data, and print the density and error of each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.markup import escape

from jpq.cli.flags import parse_flags, with_help
from jpq.cli.output import Column, print_line, table, text_column
from jpq.results.formatting import format_percent

if TYPE_CHECKING:  # --help shows without torch
    from jpq.data_free import DataFreeResult, DataFreeSettings, LayerReport

MAX_DEAD = 0.5  # share of outputs that never change, above which a layer gets a warning


def prune_private_command(args: list[str], console: Console) -> None:
    """Run `jpq prune-private`."""
    from jpq.data_free.settings import DataFreeSettings

    settings = parse_flags(with_help(DataFreeSettings), "prune-private", args).check()
    from jpq.data_free.prune import prune_private

    def print_layer(layer: LayerReport) -> None:
        print_line(console, describe_layer(layer))

    console.print(report_result(prune_private(settings, print_layer), settings))


def describe_layer(layer: LayerReport) -> str:
    """Density and output error of one pruned layer, in a line."""
    return (
        f"{escape(layer.name)}  density {format_percent(layer.density)}  output error {format_percent(layer.error)} "
        f"(projected at once: {format_percent(layer.error_one_shot)})"
    )


def report_result(result: DataFreeResult, settings: DataFreeSettings) -> Group:
    """A table of the pruned layers, and the command with which the client goes on."""
    columns = (
        text_column("layer", "whole model"),
        Column("density", format_percent(result.density)),
        "W-Z first",
        "W-Z last",
        Column("error at once", format_percent(result.error_one_shot), wrap=True),
        Column("error, ADMM", format_percent(result.error), wrap=True),
        "dead",
    )
    rows = []
    for r in result.layers:
        shares = (r.density, r.residual_first, r.residual, r.error_one_shot, r.error, r.dead)
        rows.append((escape(r.name), *map(format_percent, shares)))
    folder, weights = escape(str(settings.out)), escape(str(settings.weights))
    text = [
        "W-Z: distance from the structure, of ||W||, after the first and the last rho. Errors: of the layer's outputs "
        "on random images. Dead: outputs that never change on them. Accuracy is for the client to measure.",
        f"[bold]{folder}[/]: mask.json, weights.safetensors, layers.csv, report.json. The client goes on with:",
        f"  jpq optimize --mask {folder} --model {escape(settings.model)} --weights {weights} --data NAME "
        "--target-bops COST",
    ]
    worst = max(result.layers, key=lambda layer: layer.dead)
    if worst.dead > MAX_DEAD:
        what = "choose --inputs matched" if settings.inputs == "noise" else "little could be learned there"
        text.insert(
            1,
            f"[yellow]note[/] {format_percent(worst.dead)} of the outputs of layer {escape(worst.name)} "
            f"are dead: {what}.",
        )
    return Group(table(columns, rows), *text)
