"""`jpq bench`: layers measured one by one into a table of latencies, and whole models against what it predicts."""

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
from jpq.costs.latency_table import Entry, LatencyTable, Shape, parse, write
from jpq.export.timing.layer_model import call_model, layer_model
from jpq.export.timing.runner import Runner, hardware, kernels, take_turns
from jpq.files import untrusted
from jpq.files.atomic import replace_file
from jpq.plan import Plan
from jpq.tracing.channel_shares import ChannelShares
from jpq.tracing.network import Layer, Network, latency_shape, with_layer_times
from jpq.types import NONE, JpqError, Labels

FLOAT, INT8 = 32, 8

SHARES = (0.0, 0.25, 0.5, 0.75)  # of the channels, besides all of them; 0: one channel

TABLE_NAME = "latency.csv"  # the table of a run, in its folder

ROOM = 2**29  # bytes of weights that are loaded at a time

LARGEST = 2**26  # bytes of a table's file

SMALL = 5 * 10**6  # MACs of a layer below which copies of it are timed together

COPIES = 4

Tell = Callable[[int, int], None]  # (done, of)


@dataclass(frozen=True)
class LayerBenchmark:
    """One layer to be measured."""

    shape: Shape
    inputs: int
    outputs: int
    form: str | None  # None: in floating point
    whole: bool  # with all of its channels

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call."""
        one = 1 if self.shape.kind == "depthwise" else self.inputs // self.shape.groups
        return prod(self.shape.size) * prod(self.shape.kernel) * one * self.outputs

    @property
    def copies(self) -> int:
        """How many are timed together."""
        return COPIES if self.macs < SMALL else 1

    @property
    def room(self) -> int:
        """Bytes that its session holds, about."""
        weights = self.macs // max(1, prod(self.shape.size))
        return 4 * (weights * (self.copies + 1) + prod(self.shape.size) * (self.inputs + self.copies * self.outputs))


def points(network: Network) -> list[LayerBenchmark]:
    """Every distinct layer at a grid of channel counts, in float and as the quantized layer it would be.

    Counts between one and all are odd: pruned layers rarely have the multiples of 8 that kernels are fastest at.
    """
    found: dict[LayerBenchmark, None] = {}
    for layer in network.layers:
        key = latency_shape(layer)
        sides = _counts(network, layer, layer.inputs), _counts(network, layer, layer.outputs)
        pairs = [(n * len(layer.inputs) // len(layer.outputs), n) for n in sides[1]]
        if key.kind != "depthwise":
            pairs = [(i, o) for i in sides[0] for o in sides[1]]
        for i, o in pairs:
            for form in (None, layer.form):
                found[LayerBenchmark(key, max(1, i), o, form, (i, o) == (len(layer.inputs), len(layer.outputs)))] = None
    return list(found)


def _counts(network: Network, layer: Layer, labels: Labels) -> list[int]:
    """Counts of channels to measure on one side: all of them alone, where none can go."""
    n, step = len(labels), layer.groups if layer.groups < len(layer.inputs) else 1
    if all(c == NONE or c in network.frozen for c in labels.tolist()):
        return [n]
    odd = {max(1, int(share * n / step) | 1) * step for share in SHARES}
    return sorted({c for c in odd if c < n} | {n})


def measure(
    network: Network, name: str, threads: int = 1, repeats: int = 60, tell: Tell = lambda done, of: None
) -> list[Entry]:
    """The table of a network: the median of `repeats` calls each, less what a call costs by itself.

    All in this process, in random order and in turns, so that a slow moment hits all alike.
    """
    todo = points(network)
    order = {p: i for i, p in enumerate(todo)}
    random.Random(0).shuffle(todo)
    common = {"hardware": hardware(), "onnxruntime": version("onnxruntime"), "threads": str(threads)}
    done, total = 0, len(todo) * repeats

    def count(calls: int) -> None:
        nonlocal done
        done += calls
        tell(min(done, total), total)

    entries: dict[LayerBenchmark, Entry] = {}
    for part in _loads(todo):
        made = [layer_model(p.shape, p.inputs, p.outputs, p.copies, p.form) for p in part]
        runners = [Runner(call_model(), threads), *(Runner(m, threads) for m in made)]
        seconds = take_turns(runners, repeats, count)
        call = float(np.median(seconds[0]))
        for p, model, own in zip(part, made, seconds[1:], strict=True):
            ms = max(1e-6, 1e3 * (float(np.median(own)) - call) / p.copies)
            least = max(0.0, 1e3 * (float(own.min()) - call) / p.copies)
            nodes = " ".join(f"{k}:{v}" for k, v in sorted(kernels(model).items())) if p.whole else ""
            notes = {
                "n": str(repeats),
                "ms_least": f"{least:.6f}",
                "copies": str(p.copies),
                "kernels": nodes,
                "model": name,
                **common,
            }
            bits = FLOAT if p.form is None else INT8
            entries[p] = Entry(p.shape, p.inputs, p.outputs, bits, ms, form=p.form or "", notes=notes)
    return [entries[p] for p in sorted(entries, key=order.__getitem__)]


def _loads(todo: list[LayerBenchmark]) -> Iterator[list[LayerBenchmark]]:
    """Parts that fit into memory together."""
    part: list[LayerBenchmark] = []
    for p in todo:
        if part and sum(q.room for q in part) + p.room > ROOM:
            yield part
            part = []
        part.append(p)
    if part:
        yield part


def text_of(table: LatencyTable) -> str:
    """What `write_table` writes of it."""
    return write(table.entries)


def write_table(entries: list[Entry], path: Path) -> None:
    """Write the table; what stood there before stands there until it is whole."""
    replace_file(path, lambda part: part.write_text(write(entries)))


def read_table(path: Path) -> LatencyTable:
    """The table in a file. Raises JpqError for a file that cannot be read or is none."""
    return parse(untrusted.read_text(path, "latency table", LARGEST), str(path))


def threads_of(table: LatencyTable) -> int:
    """How many threads it was measured with; 1 where it does not say."""
    text = table.note("threads", "1")
    return int(text) if text.isdigit() and 0 < int(text) < 1000 else 1


def compare(path: Path, predicted_ms: float, table: LatencyTable, repeats: int = 100) -> dict[str, Any]:
    """What the table predicts for an exported model against what it takes in onnxruntime here."""
    threads = threads_of(table)
    measured = time_model(path, threads, repeats)
    out = {
        "predicted_ms": predicted_ms,
        "measured_ms": measured,
        "measured_over_predicted": measured / predicted_ms,
        "threads": threads,
        "n": repeats,
        "table": table.source,
    }
    there, here = table.note("hardware", hardware()), hardware()
    return out if there == here else {**out, "elsewhere": f"the table was measured on {there}, the model on {here}"}


def time_model(path: Path, threads: int, repeats: int) -> float:
    """Milliseconds of one sample of an ONNX file here, less what a call costs by itself."""
    if not path.is_file():
        raise JpqError(f"{path} is not there. Give a run's folder, such as runs/0123456789ab, or an ONNX file.")
    call, own = 1e3 * np.median(take_turns([Runner(call_model(), threads), Runner(path, threads)], repeats), axis=1)
    return float(own - call)


def whole(network: Network, entries: list[Entry], bits: int) -> float:
    """Milliseconds of a network that keeps everything, with all layers at `bits`."""
    known = with_layer_times(network, LatencyTable("the table", tuple(entries)))
    uses = exact_usage(known, ChannelShares(known, ()), Plan("", {}, {}))
    return float(costs.latency_ns([costs.dense(u, bits) for u in uses])) / NS


def require_place(path: Path) -> None:
    """Raise JpqError where no file can be written, before anything is measured."""
    if path.is_dir() or not path.parent.is_dir():
        raise JpqError(f"--table {path}: give the name of a file in a folder that is there.")


def require_run(folder: Path) -> None:
    """Raise JpqError where this is not the folder of a finished run."""
    for name in ("config.toml", "plan.json", "model.onnx"):
        if not (folder / name).is_file():
            raise JpqError(f"{folder} is not the folder of a finished run: it has no {name}.")
