"""jpq.cli.export."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from jpq.cli.flags import parsed, shown
from jpq.cli.output import print_line
from jpq.cli.pareto import Pick, pick_point, read_picked_runs, reasons
from jpq.results.formatting import format_metric
from jpq.types import JpqError


@dataclasses.dataclass(frozen=True)
class Export(Pick):
    """The run to export, or the runs to pick it from."""

    data_root: Path | None = None
    """Where the data lie now. Default: where the run read them."""
    out: Path | None = None
    """Leave the run's folder as it is and write the final one here."""
    formats: str = ""
    """Forms to export, such as onnx,qonnx,pt2 (see jpq optimize --help). Default: as the run was told."""
    onnx_weights: str = ""
    """Type of the weights in model.onnx: int8, int4 or int2. Default: as the run was told."""
    run_code: bool = False
    """Run the code that the folder names as its model or data (module:callable): only for folders that you trust."""


def export_run(wanted: Export, console: Console) -> None:
    """Make one run final: the one that was named, or the one that the flags pick."""
    from jpq.cli.summary import layer_table, summary
    from jpq.results.finalize import finalize, is_final

    front, skipped = read_picked_runs(wanted)
    choice = pick_point(wanted, front)
    for line in skipped:
        print_line(console, f"[yellow]skipped[/] {escape(line)}")
    if choice is None and len(front.points) > 1:
        raise JpqError(
            f"{len(front.points)} runs were found. Say which to export: --knee, --min-accuracy 91%, --max-bops 1%, "
            "--max-size 60KB ..., or name its folder."
        )
    point = front.points[0] if choice is None else choice.point
    folder = point.folder
    if folder is None:
        raise JpqError(f"The folder of {point.name} is not at hand.")
    if choice is not None:
        for line in reasons(choice):
            print_line(console, line)
    if is_final(folder):
        here = escape(os.path.relpath(folder))
        if wanted.out is None and not (wanted.formats or wanted.onnx_weights):
            test = "-" if point.test_accuracy is None else format_metric(front.task, point.test_accuracy)
            print_line(
                console,
                f"{here} is final already: {test} on the test split, with model.onnx and model.packed. "
                "--out FOLDER exports it once more.",
            )
            return
        print_line(console, f"{here} is final already; it is exported once more.")
    result = finalize(folder, wanted.out, wanted.data_root, wanted.formats, wanted.onnx_weights, wanted.run_code)
    console.print(layer_table(result))
    console.print(summary(result))


def export_command(args: list[str], console: Console) -> None:
    """Run `jpq export`."""
    export_run(parsed(shown(Export, "runs"), "export", args), console)
