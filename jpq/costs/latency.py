"""Predicted latency of one sample: measured times of layers, interpolated between measured channel counts.

    ns = sum_l times_l * T_l(inputs_l, outputs_l, bits_l) * rho_l(scheme_l, density_l)

| symbol | meaning | here |
|---|---|---|
| T | bilinear in channels in and out between the nearest measured counts, in ns | `InterpolatedLatency._time` |
| bits | the larger of weight and input; between measured widths it runs as the next wider one | `_level` |
| rho | time at a density over the dense time, as measured for the mask's scheme; 1 where it was not | `_ratio` |
| times | calls of the layer in one sample, by MACs | `InterpolatedLatency.times` |

The time that a runtime spends between layers (adds, pooling, reordering) is not in the sum: compare with the whole
model.

Measured tables are noisy, and discretization needs a cost that never falls when a channel or a bit is added. Each node
is therefore the mean of the largest time measured at or below it and the smallest measured at or above it (in channels
in, channels out and, up to 8 bits, width), the isotonic fit whose largest deviation from the measurements is least
(T. Robertson, F. T. Wright, R. L. Dykstra, "Order Restricted Statistical Inference", Wiley 1988). Nodes that agree
with the order keep the measured time, to the nanosecond; grid points that nobody measured get theirs in the same way.
Float layers and quantized ones are not compared: int8 may be slower than float.

Below the smallest measured count the time is constant; above the largest it grows in proportion to the count.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import median

import numpy as np
import torch
from torch import Tensor

from jpq.costs.base import LayerUse, Number
from jpq.costs.latency_table import MODELLED, Entry, LatencyTable, Shape
from jpq.types import DENSE, JpqError

NS = 10**6  # nanoseconds in a millisecond

QUANTIZED = 8  # largest bit-width of a quantized layer; more bits are floating point


def latency_ns(uses: Sequence[LayerUse]) -> Number:
    """Predicted nanoseconds of one sample: its layers, without products and tables. Raises JpqError without a table."""
    return sum(layer_latency(u) for u in uses if u.part == "layer")


def layer_latency(u: LayerUse) -> Number:
    """Predicted nanoseconds of one layer. Raises JpqError where no table was given."""
    if u.clock is None:
        raise JpqError(
            "A latency needs a table of measured layers: run `jpq bench --table FILE.csv --model NAME`, then "
            "give --latency-table FILE.csv."
        )
    return u.clock(u.inputs, u.outputs, u.density, u.w_bits, u.a_bits, u.scheme)


@dataclass(frozen=True, eq=False)
class InterpolatedLatency:
    """Latency of one layer (a `LatencyModel`): exact for whole numbers and fractions, differentiable for tensors.

    Gradients are those of the interpolation (at a measured count, of the piece below it). In whole bit-widths the time
    is a step function; its gradient spreads each step evenly over the widths that it spans.
    """

    shape: Shape
    inputs: int  # channels in, nothing pruned
    outputs: int  # channels out, nothing pruned
    times: Fraction  # calls in one sample
    axes: tuple[tuple[int, ...], tuple[int, ...]]  # channels in and out at the nodes; depthwise layers have one in
    bits: tuple[int, ...]  # measured widths
    nodes: np.ndarray  # [bits, in, out], nanoseconds
    masked: dict[str, dict[int, tuple[tuple[Fraction, Fraction], ...]]]  # scheme -> bits -> (density, share of dense)
    modelled: frozenset[str] = frozenset()  # schemes whose times are modelled, not measured (column source)

    def __call__(
        self, inputs: Number, outputs: Number, density: Number, w_bits: Number, a_bits: Number, scheme: str = DENSE
    ) -> Number:
        """Nanoseconds of one sample, from shares of channels, density and bits."""
        bits = _larger(w_bits, a_bits)
        places = self._place(0, inputs * self.inputs), self._place(1, outputs * self.outputs)
        level = self._level(bits)
        time = self._time(level, places)
        if isinstance(bits, Tensor):
            step = self._step(level, places) * (bits - bits.detach())
            time = (time if isinstance(time, Tensor) else float(time)) + step
        return _times(_times(time, self._ratio(scheme, self.bits[level], density)), self.times)

    def measured(self, scheme: str) -> bool:
        """Whether the table has measured times of masks of this scheme."""
        return scheme == DENSE or (scheme in self.masked and scheme not in self.modelled)

    def _level(self, bits: Number) -> int:
        """Index of the measured width that runs these bits: the next wider one."""
        return min(bisect_left(self.bits, _plain(bits) - 1e-6), len(self.bits) - 1)

    def _step(self, level: int, places: tuple[_Place, _Place]) -> Number:
        """Nanoseconds of one more bit: the step that ends at this width, divided by the widths that it spans."""
        if not level or self.bits[level] > QUANTIZED:
            return 0.0
        step = self._time(level, places) - self._time(level - 1, places)
        return _plain(step) / (self.bits[level] - self.bits[level - 1])

    def _place(self, axis: int, count: Number) -> _Place:
        """The position of a channel count among the nodes of an axis (0: channels in, 1: out)."""
        nodes = self.axes[axis]
        count = count if isinstance(count, Tensor) else Fraction(count)
        value = _plain(count)
        if value <= nodes[0] or (axis == 0 and self.shape.kind == "depthwise"):
            return _Place(0, 0, Fraction(0), Fraction(1))
        if value > nodes[-1] * (1 + 1e-6):
            return _Place(len(nodes) - 1, len(nodes) - 1, Fraction(0), count / nodes[-1])
        high = min(bisect_left(nodes, value), len(nodes) - 1)
        if high == 0:  # a single node, and a count above it by rounding
            return _Place(0, 0, Fraction(0), Fraction(1))
        return _Place(high - 1, high, (count - nodes[high - 1]) / (nodes[high] - nodes[high - 1]), Fraction(1))

    def _time(self, level: int, places: tuple[_Place, _Place]) -> Number:
        """Nanoseconds of one dense call at a measured width: T, bilinear between four nodes."""
        inputs, outputs = places
        grid = self.nodes[level]
        low, high = (
            _mixed(int(grid[i, outputs.low]), int(grid[i, outputs.high]), outputs.along)
            for i in (inputs.low, inputs.high)
        )
        return _times(_times(_mixed(low, high, inputs.along), inputs.beyond), outputs.beyond)

    def _ratio(self, scheme: str, bits: int, density: Number) -> Number:
        """Time at this density over the dense time: rho, linear between measured densities."""
        if scheme == DENSE or scheme not in self.masked:
            return 1
        widths = self.masked[scheme]
        points = widths[min(widths, key=lambda b: (b < bits, abs(b - bits)))]
        high = bisect_left([float(d) for d, _ in points], _plain(density))
        if high == 0:
            return points[0][1]
        (d0, r0), (d1, r1) = points[high - 1], points[min(high, len(points) - 1)]
        if d0 == d1:
            return r1
        if isinstance(density, Tensor):
            return float(r0) + (density - float(d0)) * float((r1 - r0) / (d1 - d0))
        return r0 + (Fraction(density) - d0) * (r1 - r0) / (d1 - d0)


@dataclass(frozen=True)
class _Place:
    """The position of a channel count on one axis of the grid."""

    low: int  # index of the node at or below it
    high: int  # index of the node at or above it
    along: Number  # 0 at the lower node, 1 at the upper
    beyond: Number  # the count over the last node where it is larger, else 1


def interpolate(
    table: LatencyTable, shape: Shape, form: str, inputs: int, outputs: int, times: Fraction
) -> InterpolatedLatency | None:
    """The latency model of a layer by this table; None where the table has no dense line for its shape."""
    lines = _of_form([e for e in table.entries if e.shape == shape], form)
    dense_lines = [e for e in lines if e.scheme == DENSE]
    if not dense_lines:
        return None
    bits, axes, measured = _measured_grid(dense_lines, shape.kind == "depthwise")
    quantized = sum(b <= QUANTIZED for b in bits)
    parts = [isotonic(measured[:quantized])] if quantized else []
    nodes = np.concatenate([*parts, *(isotonic(measured[i : i + 1]) for i in range(quantized, len(bits)))])
    modelled = frozenset(e.scheme for e in lines if e.notes.get("source") == MODELLED)
    latency = InterpolatedLatency(shape, inputs, outputs, times, axes, bits, nodes, {}, modelled)
    latency.masked.update(_masked_ratios(latency, [e for e in lines if e.scheme != DENSE]))
    return latency


def _measured_grid(
    entries: Sequence[Entry], depthwise: bool
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], tuple[int, ...]], np.ndarray]:
    """(bits, axes, `[bits, in, out]` nanoseconds) of dense lines; -1 where nothing was measured."""
    bits = tuple(sorted({e.bits for e in entries}))
    inputs = (1,) if depthwise else tuple(sorted({e.inputs for e in entries}))
    outputs = tuple(sorted({e.outputs for e in entries}))
    cells: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for e in entries:
        cell = bits.index(e.bits), 0 if depthwise else inputs.index(e.inputs), outputs.index(e.outputs)
        cells[cell].append(max(1, round(e.ms * NS)))
    measured = np.full((len(bits), len(inputs), len(outputs)), -1, np.int64)
    for cell, nanoseconds in cells.items():
        measured[cell] = round(median(nanoseconds))
    return bits, (inputs, outputs), measured


def _of_form(entries: Sequence[Entry], form: str) -> list[Entry]:
    """Lines of each width and scheme measured in this number format; else those without a format; else all."""
    groups: dict[tuple[int, str], list[Entry]] = defaultdict(list)
    for e in entries:
        groups[e.bits, e.scheme].append(e)
    picked = []
    for lines in groups.values():
        same_form = [e for e in lines if e.form == form]
        picked += same_form or [e for e in lines if not e.form] or lines
    return picked


def isotonic(measured: np.ndarray) -> np.ndarray:
    """Isotonic fit: the array that falls along no axis and is nearest to `measured` in its largest deviation.

    Entries below 0 were not measured; the smallest and the largest of all bound them from below and above.
    """
    below = np.where(measured < 0, measured[measured >= 0].min(), measured)
    above = np.where(measured < 0, measured.max(), measured)
    for axis in range(measured.ndim):
        below = np.maximum.accumulate(below, axis)
        above = np.flip(np.minimum.accumulate(np.flip(above, axis), axis), axis)
    return (below + above) // 2


def _masked_ratios(
    dense: InterpolatedLatency, entries: Sequence[Entry]
) -> dict[str, dict[int, tuple[tuple[Fraction, Fraction], ...]]]:
    """Scheme -> bits -> (density, time over dense time), of lines measured nearest to the whole layer's channels."""
    groups: dict[tuple[str, int], list[Entry]] = defaultdict(list)
    for e in entries:
        groups[e.scheme, e.bits].append(e)
    table: dict[str, dict[int, tuple[tuple[Fraction, Fraction], ...]]] = defaultdict(dict)
    for (scheme, bits), lines in groups.items():
        nearest = min(abs(e.inputs - dense.inputs) + abs(e.outputs - dense.outputs) for e in lines)
        times: dict[Fraction, list[Fraction]] = defaultdict(list)
        for e in lines:
            if abs(e.inputs - dense.inputs) + abs(e.outputs - dense.outputs) == nearest:
                places = dense._place(0, e.inputs), dense._place(1, e.outputs)
                times[Fraction(str(e.density))].append(round(e.ms * NS) / dense._time(dense._level(bits), places))
        times.setdefault(Fraction(1), [Fraction(1)])  # a layer that keeps all runs dense
        densities = sorted(times)
        ratios = [median(times[d]) for d in densities]
        rising = [(max(ratios[: i + 1]) + min(ratios[i:])) / 2 for i in range(len(ratios))]
        table[scheme][bits] = tuple(zip(densities, rising, strict=True))
    return dict(table)


def _plain(x: Number) -> float:
    """A number or tensor as a Python number, without gradient."""
    return float(x.detach() if isinstance(x, Tensor) else x)


def _larger(w: Number, a: Number) -> Number:
    """The larger of two widths; a tensor where either is one."""
    if isinstance(w, Tensor) or isinstance(a, Tensor):
        reference = w if isinstance(w, Tensor) else a
        pair = [x if isinstance(x, Tensor) else torch.as_tensor(float(x)).to(reference) for x in (w, a)]
        return torch.maximum(*pair)
    return max(w, a)


def _mixed(low: Number, high: Number, along: Number) -> Number:
    """Linear interpolation: `low` at 0, `high` at 1."""
    if isinstance(along, Tensor) or isinstance(low, Tensor):
        return _times(low, 1 - along) + _times(high, along)
    return low + (high - low) * along


def _times(a: Number, b: Number) -> Number:
    """A product; a fraction beside a tensor becomes a float."""
    if isinstance(a, Tensor) and isinstance(b, Fraction):
        return a * float(b)
    if isinstance(b, Tensor) and isinstance(a, Fraction):
        return b * float(a)
    return a * b
