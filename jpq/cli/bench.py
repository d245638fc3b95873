"""The command `jpq bench`: its flags and what it says. Heavy imports wait until they are needed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as Bar
from rich.table import Table

from jpq.cli.flags import parsed, shown
from jpq.cli.output import Column, table
from jpq.results.formatting import format_number
from jpq.types import JpqError

if TYPE_CHECKING:
    from jpq.export.timing.compare import Timing

USUAL = ("onnxruntime",)

SHOWN = 6  # layers left in floating point that are named


@dataclasses.dataclass(frozen=True)
class Bench:
    """What bench measures, with onnxruntime on this machine's CPU, one sample at a time."""

    what: tuple[Path, ...] = ()
    """Runs or ONNX files to time; with --table, what it predicts for a run stands beside what the run's model takes."""
    table: Path | None = None
    """With --model: the file to write (replaced if it is there). With runs: the table to predict from; default: the
    one that the run was given."""
    model: str | None = None
    """Whose layers are measured: each distinct one at a grid of channel counts, in float and quantized."""
    data: str | None = None
    """A data set that says what the model takes and gives. Default: what it usually has."""
    data_root: Path = Path("data")
    """Where data sets lie, or are downloaded to."""
    input_shape: tuple[int, ...] | None = None
    """One sample without the batch: channels, (frames,) height and width."""
    classes: int | None = None
    """Number of classes."""
    threads: tuple[int, ...] = ()
    """CPU threads. Default: 1, and for the comparison of a run's models 1 and 2. (Predictions are checked with as many
    as their table was measured with.)"""
    batch: tuple[int, ...] = (1,)
    """Samples at a time, for the comparison of a run's models, and for files (whose batch may be fixed)."""
    runtime: str = "onnxruntime"
    """For the same: onnxruntime, openvino, or both (onnxruntime,openvino)."""
    repeats: int = 60
    """Timed calls of everything; the median counts."""
    run_code: bool = False
    """Run the code that a run's folder names as its model (module:callable): only for folders that you trust."""


def run_bench(wanted: Bench, console: Console) -> None:
    """Measure what was asked for. Raises JpqError for flags that make no sense together."""
    for flag, numbers in (("threads", wanted.threads), ("batch", wanted.batch), ("repeats", (wanted.repeats,))):
        if any(n < 1 for n in numbers):
            raise JpqError(f"--{flag} {' '.join(map(str, numbers))}: at least one is needed.")
    if wanted.model is not None and wanted.what:
        raise JpqError("Give either --model, to measure its layers into --table, or runs and ONNX files to time.")
    if wanted.model is not None:
        if wanted.table is None:
            raise JpqError(f"Say where the table goes: jpq bench --table FILE.csv --model {wanted.model}.")
        _layers(wanted, console)
    elif wanted.what:
        _models(wanted, console)
    else:
        raise JpqError("Nothing to measure: give --table FILE.csv --model NAME, or runs and ONNX files.")


def _layers(wanted: Bench, console: Console) -> None:
    from jpq.cli.inspect import noise
    from jpq.export.timing import layer_table
    from jpq.tracing.decompose import decompose
    from jpq.tracing.trace import trace

    assert wanted.table is not None
    assert wanted.model is not None
    layer_table.check_table_path(wanted.table)
    if len(wanted.threads) > 1:
        raise JpqError(f"A table is for one number of threads, not for {' and '.join(map(str, wanted.threads))}.")
    threads = wanted.threads[0] if wanted.threads else 1
    model, example = noise(wanted)
    network = trace(decompose(model), example)
    start = time.perf_counter()
    with Bar(console=console, transient=True) as bar:
        task = bar.add_task("measuring", total=None)
        tell = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        entries = layer_table.measure_layers(network, wanted.model, threads, wanted.repeats, tell)
    layer_table.write_table(entries, wanted.table)
    shapes = len({(e.shape, e.form) for e in entries if e.form})
    seconds = time.perf_counter() - start
    full, small = (layer_table.dense_latency_ms(network, entries, bits) for bits in (layer_table.FLOAT, layer_table.INT8))
    for line in (
        f"{wanted.table}: {len(entries)} measurements of {shapes} kinds of layers (each the median of "
        f"{wanted.repeats}; threads: {threads}) in {seconds:.0f} s.",
        f"All of {wanted.model}'s layers: {full:.3g} ms in float, {small:.3g} ms quantized.",
        f"Next: jpq optimize --model {wanted.model} --latency-table {wanted.table} "
        f"--target-latency {0.7 * small:.2g}ms",
    ):
        console.print(escape(line), soft_wrap=True, highlight=False)


def _models(wanted: Bench, console: Console) -> None:
    from jpq.cli.summary import latency_line
    from jpq.export.runtimes import parse_runtimes
    from jpq.export.timing import layer_table
    from jpq.results.formatting import format_ms
    from jpq.results.predicted_latency import predicted_ms

    runtimes = chosen(wanted.runtime)
    for path in wanted.what:
        own = wanted.table or path / layer_table.TABLE_NAME
        if path.is_dir() and (wanted.table is not None or own.is_file()):
            measured = layer_table.read_table(own)
            layer_table.check_run_folder(path)
            line = latency_line(
                layer_table.compare_with_prediction(
                    path / "model.onnx", predicted_ms(path, measured, wanted.run_code), measured, wanted.repeats
                )
            )
        else:
            file = path / "model.onnx" if path.is_dir() else path
            threads = wanted.threads[0] if wanted.threads else 1
            line = f"{format_ms(layer_table.time_model(file, threads, wanted.repeats))} in onnxruntime"
        console.print(f"{escape(str(path))}: {line}", soft_wrap=True, highlight=False)
        if path.is_dir() and (path / "plan.json").is_file():
            _race(path, wanted, runtimes, console)
        elif path.is_file() and (tuple(runtimes), wanted.batch, len(wanted.threads) < 2) != (USUAL, (1,), True):
            _alone(path, wanted, runtimes, console)


def _alone(file: Path, wanted: Bench, runtimes: Sequence[str], console: Console) -> None:
    """One file in every setting that was asked for, calls and all: a line each."""
    from jpq.export.timing import compare
    from jpq.results.formatting import format_ms

    for t in compare.time_in_turns({str(file): file}, runtimes, wanted.threads or (1,), wanted.batch, wanted.repeats):
        line = f"{file}: {format_ms(t.median_ms)} in {_setting(t)}"
        console.print(escape(line), soft_wrap=True, highlight=False)


def _race(folder: Path, wanted: Bench, runtimes: Sequence[str], console: Console) -> None:
    """The run's model beside the one that it began with: a table, and where layers are left in floating point."""
    from jpq.export.timing import compare
    from jpq.export.timing.kernels import float_layers
    from jpq.export.timing.runner import Runner

    small = folder / "model.onnx"
    shape = Runner(small).shapes[0][1:]
    with TemporaryDirectory() as place:
        paths = compare.model_files(folder, shape, Path(place), wanted.run_code)
        threads = wanted.threads or (1, 2)
        with Bar(console=console, transient=True) as bar:
            total = len(paths) * len(runtimes) * len(threads) * len(wanted.batch) * wanted.repeats
            task = bar.add_task("measuring", total=total)
            tell = lambda calls: bar.update(task, advance=calls)  # noqa: E731
            times = compare.time_in_turns(paths, runtimes, threads, wanted.batch, wanted.repeats, tell)
    for start in range(0, len(times), len(paths)):
        console.print(_table(times[start : start + len(paths)]))
    left = float_layers(small)[1]
    for name, why in list(left.items())[:SHOWN]:
        console.print(f"in floating point: {escape(name)}: {escape(why)}", soft_wrap=True, highlight=False)
    if len(left) > SHOWN:
        console.print(f"... and {len(left) - SHOWN} more", highlight=False)


def _setting(t: Timing) -> str:
    threads = "1 thread" if t.threads == 1 else f"{t.threads} threads"
    return f"{t.runtime}, {threads}, batch {t.batch}, median of {t.n} turns"


def _table(times: Sequence[Timing]) -> Table:
    """One setting: a row for each model."""
    rows = [
        (
            t.model,
            f"{t.median_ms:#.3g} ms",
            f"{t.p95_ms:#.3g} ms",
            f"{t.over_full:.2f}x",
            f"{t.float_layers} of {t.layers}" if t.runtime == "onnxruntime" else "-",
            format_number(t.bytes, "B"),
        )
        for t in times
    ]
    columns = (Column("model", align="left"), "median", "p95", "speed", "in float", "file")
    return table(columns, rows, title=_setting(times[0]))


def bench_command(args: list[str], console: Console) -> None:
    """Run `jpq bench`."""
    run_bench(parsed(shown(Bench, "what"), "bench", args), console)
