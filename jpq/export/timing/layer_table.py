"""Latency tables: a network's layers measured one by one, and the time of a whole model against the prediction."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from jpq import costs
from jpq.compression.usage import exact_usage
from jpq.costs.latency import NS
from jpq.costs.latency_table import Entry, LatencyTable, Shape, format_table, parse_table
from jpq.export.timing.kernels import count_kernels
from jpq.export.timing.layer_model import empty_model, layer_model
from jpq.export.timing.runner import Runner, describe_hardware, take_turns
from jpq.files import untrusted
from jpq.files.atomic import replace_file
from jpq.plan import Plan
from jpq.tracing.channel_shares import ChannelShares
from jpq.tracing.network import Layer, Network, latency_shape, with_layer_times
from jpq.types import NONE, JpqError, Labels

FLOAT, INT8 = 32, 8  # bits of a measured layer

CHANNEL_SHARES = (0.0, 0.25, 0.5, 0.75)  # measured besides all channels; 0: one channel

TABLE_NAME = "latency.csv"  # the table of a run, in its folder

MAX_LOADED_BYTES = 2**29  # bytes of the layers that are loaded at a time

MAX_TABLE_BYTES = 2**26  # largest size of a table's file

SMALL_LAYER_MACS = 5 * 10**6  # MACs, below which copies of a layer are timed together

COPIES = 4  # number of copies of a small layer in one model

ReportProgress = Callable[[int, int], None]  # (calls done, of all)


@dataclass(frozen=True)
class LayerBenchmark:
    """A layer with numbers of channels at which it is measured."""

    shape: Shape
    inputs: int
    outputs: int
    form: str | None  # None: in floating point
    all_channels: bool  # with all of its channels

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call."""
        inputs_per_output = 1 if self.shape.kind == "depthwise" else self.inputs // self.shape.groups
        return prod(self.shape.size) * prod(self.shape.kernel) * inputs_per_output * self.outputs

    @property
    def copies(self) -> int:
        """Number of copies in one timed model."""
        return COPIES if self.macs < SMALL_LAYER_MACS else 1

    @property
    def loaded_bytes(self) -> int:
        """Approximate bytes that its session holds."""
        weights = self.macs // max(1, prod(self.shape.size))
        return 4 * (weights * (self.copies + 1) + prod(self.shape.size) * (self.inputs + self.copies * self.outputs))


def measure_layers(
    network: Network, name: str, threads: int = 1, repeats: int = 60, report: ReportProgress = lambda done, of: None
) -> list[Entry]:
    """Measure a network's layers: the median of `repeats` calls each, less the cost of an empty call.

    All in this process, in random order and in turns, so that a slow moment hits all alike.

    Args:
        network: the traced model.
        name: of the model, for the table's notes.
        threads: of one operator.
        repeats: timed calls of each layer.
        report: told the progress in calls.
    """
    benchmarks = layer_benchmarks(network)
    order = {benchmark: i for i, benchmark in enumerate(benchmarks)}
    random.Random(0).shuffle(benchmarks)
    notes = {"hardware": describe_hardware(), "onnxruntime": version("onnxruntime"), "threads": str(threads)}
    done, total = 0, len(benchmarks) * repeats

    def count(calls: int) -> None:
        nonlocal done
        done += calls
        report(min(done, total), total)

    entries: dict[LayerBenchmark, Entry] = {}
    for part in _parts_in_memory(benchmarks):
        layer_models = [layer_model(b.shape, b.inputs, b.outputs, b.copies, b.form) for b in part]
        runners = [Runner(empty_model(), threads), *(Runner(m, threads) for m in layer_models)]
        seconds = take_turns(runners, repeats, count)
        for benchmark, model, times in zip(part, layer_models, seconds[1:], strict=True):
            kernel_counts = sorted(count_kernels(model).items()) if benchmark.all_channels else []
            kernels = " ".join(f"{kind}:{n}" for kind, n in kernel_counts)
            own_notes = {"n": str(repeats), "kernels": kernels, "model": name, **notes}
            entries[benchmark] = _table_entry(benchmark, times, float(np.median(seconds[0])), own_notes)
    return [entries[benchmark] for benchmark in sorted(entries, key=order.__getitem__)]


def layer_benchmarks(network: Network) -> list[LayerBenchmark]:
    """Every distinct layer at a grid of channel counts, in float and as the quantized layer that it would become.

    Counts between one and all are odd: pruned layers rarely have the multiples of 8 that kernels are fastest at.
    """
    benchmarks: dict[LayerBenchmark, None] = {}
    for layer in network.layers:
        key = latency_shape(layer)
        sides = _channel_counts(network, layer, layer.inputs), _channel_counts(network, layer, layer.outputs)
        pairs = [(n * len(layer.inputs) // len(layer.outputs), n) for n in sides[1]]
        if key.kind != "depthwise":
            pairs = [(i, o) for i in sides[0] for o in sides[1]]
        for i, o in pairs:
            all_channels = (i, o) == (len(layer.inputs), len(layer.outputs))
            for form in (None, layer.form):
                benchmarks[LayerBenchmark(key, max(1, i), o, form, all_channels)] = None
    return list(benchmarks)


def _channel_counts(network: Network, layer: Layer, labels: Labels) -> list[int]:
    """Counts of channels to measure on one side: only all of them, where none can be removed."""
    n, step = len(labels), layer.groups if layer.groups < len(layer.inputs) else 1
    if all(c == NONE or c in network.frozen for c in labels.tolist()):
        return [n]
    odd = {max(1, int(share * n / step) | 1) * step for share in CHANNEL_SHARES}
    return sorted({c for c in odd if c < n} | {n})


def _parts_in_memory(benchmarks: list[LayerBenchmark]) -> Iterator[list[LayerBenchmark]]:
    """Parts that fit into memory together."""
    part: list[LayerBenchmark] = []
    for benchmark in benchmarks:
        if part and sum(b.loaded_bytes for b in part) + benchmark.loaded_bytes > MAX_LOADED_BYTES:
            yield part
            part = []
        part.append(benchmark)
    if part:
        yield part


def _table_entry(benchmark: LayerBenchmark, seconds: np.ndarray, call_s: float, notes: dict[str, str]) -> Entry:
    """The row of one layer from the seconds of its calls and those of an empty call."""
    ms = max(1e-6, round(1e3 * (float(np.median(seconds)) - call_s) / benchmark.copies, 6))
    least = max(0.0, 1e3 * (float(seconds.min()) - call_s) / benchmark.copies)
    columns = {"n": notes["n"], "ms_least": f"{least:.6f}", "copies": str(benchmark.copies), **notes}
    bits = FLOAT if benchmark.form is None else INT8
    form = benchmark.form or ""
    return Entry(benchmark.shape, benchmark.inputs, benchmark.outputs, bits, ms, form=form, notes=columns)


def write_table(entries: list[Entry], path: str | Path) -> None:
    """Write a table as CSV; a file that is there already is replaced in one step."""
    replace_file(path, lambda part: part.write_text(format_table(entries), encoding="utf-8"))


def read_table(path: str | Path) -> LatencyTable:
    """Read a latency table from a CSV file. Raises JpqError for a file that cannot be read or is no table."""
    return parse_table(untrusted.read_text(path, "latency table", MAX_TABLE_BYTES), str(path))


def table_threads(table: LatencyTable) -> int:
    """Number of threads that a table was measured with; 1 where it does not say."""
    text = table.note("threads", "1")
    return int(text) if text.isdigit() and 0 < int(text) < 1000 else 1


def compare_with_prediction(path: Path, predicted_ms: float, table: LatencyTable, repeats: int = 100) -> dict[str, Any]:
    """Measure an exported model in onnxruntime here, beside the milliseconds that a table predicts for it."""
    threads = table_threads(table)
    measured = time_model(path, threads, repeats)
    record = {
        "predicted_ms": predicted_ms,
        "measured_ms": measured,
        "measured_over_predicted": measured / predicted_ms,
        "threads": threads,
        "n": repeats,
        "table": table.source,
    }
    there, here = table.note("hardware", describe_hardware()), describe_hardware()
    return (
        record if there == here else {**record, "elsewhere": f"the table was measured on {there}, the model on {here}"}
    )


def time_model(path: Path, threads: int, repeats: int) -> float:
    """Milliseconds of one sample of an ONNX file in onnxruntime here, less the cost of an empty call."""
    if not path.is_file():
        raise JpqError(f"{path} is not there. Give a run's folder, such as runs/0123456789ab, or an ONNX file.")
    runners = [Runner(empty_model(), threads), Runner(path, threads)]
    call_ms, model_ms = 1e3 * np.median(take_turns(runners, repeats), axis=1)
    return float(model_ms - call_ms)


def dense_latency_ms(network: Network, entries: list[Entry], bits: int) -> float:
    """Predicted milliseconds of a network that keeps everything, with all layers at `bits`."""
    timed = with_layer_times(network, LatencyTable("the table", tuple(entries)))
    uses = exact_usage(timed, ChannelShares(timed, ()), Plan("", {}, {}))
    return float(costs.latency_ns([costs.dense(u, bits) for u in uses])) / NS


def check_table_path(path: Path) -> None:
    """Raise JpqError where a table could not be written, before anything is measured."""
    if path.is_dir() or not path.parent.is_dir():
        raise JpqError(f"--table {path}: give the name of a file in a folder that is there.")


def check_run_folder(folder: Path) -> None:
    """Raise JpqError where this is not the folder of a finished run."""
    for name in ("config.toml", "plan.json", "model.onnx"):
        if not (folder / name).is_file():
            raise JpqError(f"{folder} is not the folder of a finished run: it has no {name}.")
