"""The command `jpq bench`: its flags and what it says. Heavy imports wait until they are needed."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as Bar

from jpq.types import JpqError


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
    threads: int = 1
    """CPU threads of onnxruntime. (Predictions are checked with as many as their table was measured with.)"""
    repeats: int = 60
    """Timed calls of everything; the median counts."""
    run_code: bool = False
    """Run the code that a run's folder names as its model (module:callable): only for folders that you trust."""


def run(wanted: Bench, console: Console) -> None:
    """Measure what was asked for. Raises JpqError for flags that make no sense together."""
    if wanted.threads < 1 or wanted.repeats < 1:
        raise JpqError(f"--threads {wanted.threads} --repeats {wanted.repeats}: at least one of each is needed.")
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
    from jpq import bench
    from jpq.inspection import noise
    from jpq.network.trace import trace
    from jpq.network.unpack import unpacked

    assert wanted.table is not None
    assert wanted.model is not None
    bench.require_place(wanted.table)
    model, example = noise(wanted)
    network = trace(unpacked(model), example)
    start = time.perf_counter()
    with Bar(console=console, transient=True) as bar:
        task = bar.add_task("measuring", total=None)
        tell = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        entries = bench.measure(network, wanted.model, wanted.threads, wanted.repeats, tell)
    bench.write_table(entries, wanted.table)
    shapes = len({(e.shape, e.form) for e in entries if e.form})
    seconds = time.perf_counter() - start
    full, small = (bench.whole(network, entries, bits) for bits in (bench.FLOAT, bench.INT8))
    for line in (
        f"{wanted.table}: {len(entries)} measurements of {shapes} kinds of layers (each the median of "
        f"{wanted.repeats}; threads: {wanted.threads}) in {seconds:.0f} s.",
        f"All of {wanted.model}'s layers: {full:.3g} ms in float, {small:.3g} ms quantized.",
        f"Next: jpq optimize --model {wanted.model} --latency-table {wanted.table} "
        f"--target-latency {0.7 * small:.2g}ms",
    ):
        console.print(escape(line), soft_wrap=True, highlight=False)


def _models(wanted: Bench, console: Console) -> None:
    from jpq import bench
    from jpq.progress import latency_line, ms

    for path in wanted.what:
        own = wanted.table or path / bench.NAME
        if path.is_dir() and (wanted.table is not None or own.is_file()):
            table = bench.read_table(own)
            bench.require_run(path)
            line = latency_line(
                bench.compare(path / "model.onnx", bench.predicted(path, table, wanted.run_code), table, wanted.repeats)
            )
        else:
            file = path / "model.onnx" if path.is_dir() else path
            line = f"{ms(bench.time_model(file, wanted.threads, wanted.repeats))} in onnxruntime"
        console.print(f"{escape(str(path))}: {line}", soft_wrap=True, highlight=False)
