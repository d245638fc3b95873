"""What the screen shows of pruning without data."""

from __future__ import annotations

from rich.console import Console, Group
from rich.markup import escape

from jpq.cli.flags import parsed, shown
from jpq.cli.output import Column, table, text_column
from jpq.data_free.layerwise_admm import LayerReport
from jpq.data_free.prune import DataFreeResult
from jpq.data_free.settings import DataFreeSettings
from jpq.results.formatting import format_percent

MOST_DEAD = 0.5  # share of outputs above which a layer saw too little to learn from


def prune_private_command(args: list[str], console: Console) -> None:
    """Run `jpq prune-private`."""
    from jpq.data_free.settings import DataFreeSettings

    wanted = parsed(shown(DataFreeSettings), "prune-private", args).check()
    from jpq.data_free.prune import prune_private

    watch = lambda row: console.print(layer_line(row), soft_wrap=True, highlight=False)  # noqa: E731
    console.print(report(prune_private(wanted, watch), wanted))


def layer_line(row: LayerReport) -> str:
    """One layer, as soon as it is done."""
    return (
        f"{escape(row.name)}  density {format_percent(row.density)}  output error {format_percent(row.error)} "
        f"(projected at once: {format_percent(row.error_one_shot)})"
    )


def report(done: DataFreeResult, settings: DataFreeSettings) -> Group:
    """What became of each layer, and what the client does next."""
    columns = (
        text_column("layer", "whole model"),
        Column("density", format_percent(done.density)),
        "W-Z first",
        "W-Z last",
        Column("error at once", format_percent(done.error_one_shot), wrap=True),
        Column("error, ADMM", format_percent(done.error), wrap=True),
        "dead",
    )
    rows = []
    for r in done.layers:
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
    dead = max(done.layers, key=lambda r: r.dead)
    if dead.dead > MOST_DEAD:
        what = "choose --inputs matched" if settings.inputs == "noise" else "little could be learned there"
        text.insert(
            1,
            f"[yellow]note[/] {format_percent(dead.dead)} of the outputs of layer {escape(dead.name)} "
            f"are dead: {what}.",
        )
    return Group(table(columns, rows), *text)
