"""`jpq export`: make one run final."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from jpq.cli.flags import parse_flags, with_help
from jpq.cli.output import print_line
from jpq.cli.run_selection import RunSelection, choose_point, print_choice, print_skipped, read_front
from jpq.results.formatting import format_metric
from jpq.types import JpqError


@dataclasses.dataclass(frozen=True)
class Export(RunSelection):
    """Flags of `jpq export`: the run to export, or the runs to pick it from."""

    data_root: Path | None = None
    """Where the data lie now. Default: where the run read them."""
    out: Path | None = None
    """Leave the run's folder as it is and write the final one here."""
    formats: str = ""
    """Forms to export, such as onnx,qonnx,pt2 (see jpq optimize --help). Default: as the run was told."""
    onnx_weights: str = ""
    """Type of the weights in model.onnx: int8, int4 or int2. Default: as the run was told."""
    all: bool = False
    """Show every layer, where a long model's table is of the dearest 20."""
    run_code: bool = False
    """Run the code that the folder names as its model or data (module:callable): only for folders that you trust."""


def export_command(args: list[str], console: Console) -> None:
    """Run `jpq export`."""
    export_run(parse_flags(with_help(Export, "runs"), "export", args), console)


def export_run(flags: Export, console: Console) -> None:
    """Make the run final that the flags name or choose: export, verify, measure on the test split."""
    from jpq.cli.summary import layer_table, summary
    from jpq.results.finalize import finalize, is_final
    from jpq.tasks.metric_text import example_metric, metric_flag

    front, skipped = read_front(flags)
    choice = choose_point(flags, front)
    print_skipped(skipped, console)
    if choice is None and len(front.points) > 1:
        least = f"{metric_flag(front.task)} {example_metric(front.task)}"
        raise JpqError(
            f"{len(front.points)} runs were found. Say which to export: --knee, {least}, --max-bops 1%, "
            "--max-size 60KB ..., or name its folder."
        )
    point = front.points[0] if choice is None else choice.point
    folder = point.folder
    if folder is None:
        raise JpqError(f"The folder of {point.name} is not at hand.")
    if choice is not None:
        print_choice(choice, console)
    if is_final(folder):
        here = escape(os.path.relpath(folder))
        if flags.out is None and not (flags.formats or flags.onnx_weights):
            test = "-" if point.test_accuracy is None else format_metric(front.task, point.test_accuracy)
            print_line(
                console,
                f"{here} is final already: {test} on the test split, with model.onnx and model.packed. "
                "--out FOLDER exports it once more.",
            )
            return
        print_line(console, f"{here} is final already; it is exported once more.")
    result = finalize(folder, flags.out, flags.data_root, flags.formats, flags.onnx_weights, flags.run_code)
    console.print(layer_table(result, flags.all))
    console.print(summary(result))
