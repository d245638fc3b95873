"""`jpq bench`: measure a model's layers into a latency table, or the time and the metric of runs and ONNX files."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as Bar
from rich.table import Table

from jpq.cli.flags import parse_flags, with_help
from jpq.cli.inspect import READING, check_reading, model_and_example
from jpq.cli.output import Column, print_line, table
from jpq.results.formatting import format_number
from jpq.types import JpqError

if TYPE_CHECKING:  # --help shows without torch
    from torch import nn

    from jpq.export.timing.compare import Timing
    from jpq.tasks.data import Data

DEFAULT_RUNTIMES = ("onnxruntime",)

DEFAULT_THREADS = (1, 2)  # for the comparison of a run's models

MAX_FLOAT_LAYERS = 6  # largest number of float layers that are printed


@dataclasses.dataclass(frozen=True)
class Bench:
    """Flags of `jpq bench`, which measures one sample at a time in onnxruntime on this machine's CPU."""

    what: tuple[Path, ...] = ()
    """Runs or ONNX files to time; with --table, what it predicts for a run stands beside what the run's model takes."""
    table: Path | None = None
    """With --model: the file to write (replaced if it is there). With runs: the table to predict from; default: the
    one that the run was given."""
    model: str | None = None
    """Whose layers are measured: each distinct one at a grid of channel counts, in float and quantized."""
    data: str | None = None
    """With --model: a data set that says what it takes and gives; default: what it usually has. With runs: the data on
    whose test split their files are judged; default: those of the run."""
    data_root: Path | None = None
    """Where data sets lie, or are downloaded to. Default: where the run read them, else data."""
    task: str = ""
    """With --data: what the data are for, as for jpq optimize. Default: as the data say."""
    image_size: tuple[int, ...] = ()
    """With --data: size that images are brought to, as 224 (a square) or 192 256 (height, width)."""
    noise: float = 0.0
    """With --data that are clean images to be restored: the noise that jpq optimize adds, of 255."""
    scale: int = 1
    """With --data that are clean images to be restored: how many times smaller the input is."""
    target_column: str = ""
    """With --data table:FILE.csv: the column that is predicted."""
    metric: bool = True
    """Beside the times of a run, show the task's metric of its file, of its float model and of that at 8 bits, in the
    runtime that is timed, on the test split."""
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
    """Run the code that a run's folder names as its model, data or task (module:callable): only for folders that you
    trust."""


def bench_command(args: list[str], console: Console) -> None:
    """Run `jpq bench`."""
    run_bench(parse_flags(with_help(Bench, "what"), "bench", args), console)


def run_bench(flags: Bench, console: Console) -> None:
    """Measure layers, or runs and files. Raises JpqError for flags that make no sense together."""
    for flag, numbers in (("threads", flags.threads), ("batch", flags.batch), ("repeats", (flags.repeats,))):
        if any(n < 1 for n in numbers):
            raise JpqError(f"--{flag} {' '.join(map(str, numbers))}: at least one is needed.")
    most = max(*DEFAULT_THREADS, os.cpu_count() or 1)
    if any(n > most for n in flags.threads):
        raise JpqError(f"--threads {' '.join(map(str, flags.threads))}: this machine runs {most} at a time.")
    if flags.model is not None and flags.what:
        raise JpqError("Give either --model, to measure its layers into --table, or runs and ONNX files to time.")
    if flags.model is not None:
        if flags.table is None:
            raise JpqError(f"Say where the table goes: jpq bench --table FILE.csv --model {flags.model}.")
        measure_layers(flags, console)
    elif flags.what:
        check_reading(flags)
        time_models(flags, console)
    else:
        raise JpqError("Nothing to measure: give --table FILE.csv --model NAME, or runs and ONNX files.")


def measure_layers(flags: Bench, console: Console) -> None:
    """Measure every kind of layer of --model, and write the latency table."""
    from jpq.export.timing import layer_table
    from jpq.tracing.decompose import decompose
    from jpq.tracing.trace import trace

    assert flags.table is not None
    assert flags.model is not None
    layer_table.check_table_path(flags.table)
    if len(flags.threads) > 1:
        raise JpqError(f"A table is for one number of threads, not for {' and '.join(map(str, flags.threads))}.")
    threads = flags.threads[0] if flags.threads else 1
    model, example = model_and_example(dataclasses.replace(flags, data_root=flags.data_root or Path("data")))
    network = trace(decompose(model, example), example)
    start = time.perf_counter()
    with Bar(console=console, transient=True) as bar:
        task = bar.add_task("measuring", total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        entries = layer_table.measure_layers(network, flags.model, threads, flags.repeats, report)
    layer_table.write_table(entries, flags.table)
    shapes = len({(e.shape, e.form) for e in entries if e.form})
    seconds = time.perf_counter() - start
    float_ms, int8_ms = (
        layer_table.dense_latency_ms(network, entries, bits) for bits in (layer_table.FLOAT, layer_table.INT8)
    )
    for line in (
        f"{flags.table}: {len(entries)} measurements of {shapes} kinds of layers (each the median of "
        f"{flags.repeats}; threads: {threads}) in {seconds:.0f} s.",
        f"All of {flags.model}'s layers: {float_ms:.3g} ms in float, {int8_ms:.3g} ms quantized.",
        f"Next: jpq optimize --model {flags.model} {_data_words(flags)}--latency-table {flags.table} "
        f"--target-latency {0.7 * int8_ms:.2g}ms",
    ):
        print_line(console, escape(line))


def _data_words(flags: Bench) -> str:
    """The flags that name the data and say how they are read, with a blank behind them; "" without --data."""
    if flags.data is None:
        return ""
    given = {"data": flags.data} | {key: getattr(flags, key) for key in READING}
    unset = {field.name: field.default for field in dataclasses.fields(Bench)}
    words = {key: value for key, value in given.items() if value != unset[key]}
    return "".join(
        f"--{key.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, tuple) else value} "
        for key, value in words.items()
    )


def time_models(flags: Bench, console: Console) -> None:
    """Time runs and ONNX files, beside the prediction of a latency table where there is one."""
    from jpq.cli.summary import latency_line
    from jpq.export.runtimes import parse_runtimes
    from jpq.export.timing import layer_table
    from jpq.results.formatting import format_ms
    from jpq.results.predicted_latency import predicted_ms

    runtimes = parse_runtimes(flags.runtime)
    for path in flags.what:
        check_exported(path)
    for path in flags.what:
        table_path = flags.table or path / layer_table.TABLE_NAME
        if path.is_dir() and (flags.table is not None or table_path.is_file()):
            measured = layer_table.read_table(table_path)
            layer_table.check_run_folder(path)
            line = latency_line(
                layer_table.compare_with_prediction(
                    path / "model.onnx", predicted_ms(path, measured, flags.run_code), measured, flags.repeats
                )
            )
        else:
            file = path / "model.onnx" if path.is_dir() else path
            threads = flags.threads[0] if flags.threads else 1
            ms = layer_table.time_model(file, threads, flags.repeats)
            line = f"{format_ms(ms)} in onnxruntime, less an empty call"
        print_line(console, f"{escape(str(path))}: {line}")
        if path.is_dir() and (path / "plan.json").is_file():
            _compare_models(path, flags, runtimes, console)
        elif path.is_file() and (tuple(runtimes), flags.batch, len(flags.threads) < 2) != (
            DEFAULT_RUNTIMES,
            (1,),
            True,
        ):
            _time_file(path, flags, runtimes, console)
        if path.is_file():
            _print_file_metric(path, flags, runtimes, console)


def check_exported(path: Path) -> None:
    """Raise JpqError for a run's folder without its ONNX file, and for one that holds runs, with what to do."""
    if not path.is_dir() or (path / "model.onnx").is_file():
        return
    if (path / "result.json").is_file():
        raise JpqError(
            f"{path} has no model.onnx: it is a trial, which is not exported, or the file was removed. "
            f"jpq export {path} writes it."
        )
    runs = sorted(file.parent for file in path.glob("**/model.onnx"))
    if runs:
        raise JpqError(f"{path} is not the folder of one run but holds several: name one or more, such as {runs[0]}.")


def _time_file(file: Path, flags: Bench, runtimes: Sequence[str], console: Console) -> None:
    """Print the time of one ONNX file in every setting of the flags, a line each."""
    from jpq.export.timing import compare
    from jpq.results.formatting import format_ms

    for t in compare.time_in_turns({str(file): file}, runtimes, flags.threads or (1,), flags.batch, flags.repeats):
        line = f"{file}: {format_ms(t.median_ms)} in {_setting(t)}"
        print_line(console, escape(line))


def _print_file_metric(file: Path, flags: Bench, runtimes: Sequence[str], console: Console) -> None:
    """Print the metric of a run's file in each runtime, where the folder that it lies in is that of a run."""
    if not flags.metric or not (file.parent / "config.toml").is_file():
        return
    try:
        data = _read_test_data(file.parent, flags)
        metrics = _measure_metrics({str(file): file}, data, runtimes, file)
    except JpqError as error:
        print_line(console, f"[yellow]note[/] {escape(_no_metric(error))}")
        return
    for (_, runtime), metric in metrics.items():
        print_line(console, escape(f"{data.task.report(metric, _samples(data))} ({file} in {runtime})."))


def _compare_models(folder: Path, flags: Bench, runtimes: Sequence[str], console: Console) -> None:
    """Print the times of a run's compressed model beside its float models, and its layers in floating point.

    With the task's metric of the files, where the run's data are there.
    """
    from jpq.export.timing import compare
    from jpq.export.timing.kernels import find_float_layers
    from jpq.export.timing.runner import Runner

    compressed = folder / "model.onnx"
    data, trained, note = _read_run(folder, flags)
    with TemporaryDirectory() as place:
        batches = [Runner(compressed).two_samples()] if data is None else _calibration(data)
        paths = compare.model_files(folder, (), Path(place), flags.run_code, trained, batches)
        threads = flags.threads or DEFAULT_THREADS
        with Bar(console=console, transient=True) as bar:
            total = len(paths) * len(runtimes) * len(threads) * len(flags.batch) * flags.repeats
            task = bar.add_task("measuring", total=total)

            def report(calls: int) -> None:
                bar.update(task, advance=calls)

            times = compare.time_in_turns(paths, runtimes, threads, flags.batch, flags.repeats, report)
        judged = {compare.SMALL: compressed}
        if trained is not None:
            judged = {name: path for name, path in paths.items() if name != compare.PRUNED}
        metrics = {} if data is None else _measure_metrics(judged, data, runtimes, compressed)
    metric_name = "" if data is None else data.task.metric_name
    for start in range(0, len(times), len(paths)):
        console.print(_timing_table(times[start : start + len(paths)], metric_name, metrics))
    if data is not None:
        meaning = (
            "fp32 is the run's float model, int8 that one with ranges fitted to training batches and no training"
            if trained is not None
            else "the float model's weights are no longer there"
        )
        print_line(console, escape(f"{metric_name} on {_samples(data)}; {meaning}."))
    if note:
        print_line(console, f"[yellow]note[/] {escape(note)}")
    left = find_float_layers(compressed)[1]
    for name, reason in list(left.items())[:MAX_FLOAT_LAYERS]:
        print_line(console, f"in floating point: {escape(name)}: {escape(reason)}")
    if len(left) > MAX_FLOAT_LAYERS:
        print_line(console, f"... and {len(left) - MAX_FLOAT_LAYERS} more")


def _read_run(folder: Path, flags: Bench) -> tuple[Data | None, nn.Module | None, str]:
    """(data that judge a run, its float model, a note where there are none); None for what is not there.

    Raises JpqError where the run's model is code, which needs --run-code.
    """
    import torch

    from jpq.config import read_toml
    from jpq.files.untrusted import check_no_code
    from jpq.results.finalize import read_float_model

    if not flags.metric or not (folder / "config.toml").is_file():
        return None, None, ""
    config = read_toml(folder / "config.toml")
    if not flags.run_code:
        check_no_code("model", config.task.model, folder / "plan.json", "add --run-code")
    try:
        data = _read_test_data(folder, flags)
        with torch.random.fork_rng():
            return data, read_float_model(folder, config, data), ""
    except JpqError as error:
        return None, None, _no_metric(error)


def _read_test_data(folder: Path, flags: Bench) -> Data:
    """The data of a run, or those of --data, whose metric can be measured."""
    from jpq.cli.evaluate import Evaluate, read_data_of

    reading = {key: getattr(flags, key) for key in READING if flags.data is not None}
    asked = Evaluate(data=flags.data, data_root=flags.data_root, run_code=flags.run_code, **reading)
    data: Data = read_data_of(folder, asked, folder)
    data.task.check_packages()
    return data


def _no_metric(error: JpqError) -> str:
    return f"No metric is shown: {error}"


def _samples(data: Data) -> str:
    """The test split in words."""
    return f"{data.test.size} test {data.sample_names} of {data.name}"


def _calibration(data: Data) -> list[Any]:
    """Inputs of training batches, to which the ranges of the int8 model are fitted."""
    from jpq.allocation.decision_data import calibration_batches

    return list(calibration_batches(data))


def _measure_metrics(
    files: Mapping[str, Path], data: Data, runtimes: Sequence[str], compressed: Path
) -> dict[tuple[str, str], str]:
    """(name, runtime) -> the task's metric of a file in a runtime on the test split, with its unit."""
    from jpq.cli.evaluate import as_file_takes
    from jpq.export.runtimes import open_session
    from jpq.results.formatting import format_metric

    metrics = {}
    for name, path in files.items():
        taken = as_file_takes(path, data) if path == compressed else data
        for runtime in runtimes:
            session = open_session(runtime, path)
            metrics[name, runtime] = format_metric(data.task, data.task.evaluate(session, taken.test))
    return metrics


def _setting(t: Timing) -> str:
    """Runtime, threads, batch and repeats of a measurement."""
    threads = "1 thread" if t.threads == 1 else f"{t.threads} threads"
    return f"{t.runtime}, {threads}, batch {t.batch}, median of {t.n} turns"


def _timing_table(times: Sequence[Timing], metric_name: str, metrics: Mapping[tuple[str, str], str]) -> Table:
    """Times of several models in one setting, a row each, with their metrics where the data were read."""
    rows = [
        (
            t.model,
            f"{t.median_ms:#.3g} ms",
            f"{t.p95_ms:#.3g} ms",
            f"{t.over_full:.2f}x",
            *((metrics.get((t.model, t.runtime), "-"),) if metrics else ()),
            f"{t.float_layers} of {t.layers}" if t.runtime == "onnxruntime" else "-",
            format_number(t.bytes, "B"),
        )
        for t in times
    ]
    metric = (metric_name,) if metrics else ()
    columns = (Column("model", align="left"), "median", Column("p95", optional=1), "speed", *metric, "in float", "file")
    return table(columns, rows, title=_setting(times[0]))
