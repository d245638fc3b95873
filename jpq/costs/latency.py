"""Latency of one sample, from a table of measured layers: between measured counts of channels it is interpolated.

    ns = sum_l times_l * T_l(inputs_l, outputs_l, bits_l) * rho_l(scheme_l, density_l)

| symbol | meaning | here |
|---|---|---|
| T | bilinear in channels in and out between the nearest measured counts, in nanoseconds | `Curve._at` |
| bits | the larger of weight and input; between measured widths it runs as the next wider one | `_level` |
| rho | time at a density over the dense time, as measured for the mask's scheme; 1 where it was not | `Curve._ratio` |
| times | calls of the layer in one sample, by MACs | `Curve.times` |

What a runtime adds between layers (adds, pooling, reordering) is not in the sum: compare with the whole model.

Measured tables are noisy, and landing needs a cost that never falls when a channel or a bit is added. Each node is
therefore the mean of the largest time measured at or below it and the smallest measured at or above it (in channels
in, channels out and, up to 8 bits, width), the isotonic fit whose largest deviation from the measurements is least
(T. Robertson, F. T. Wright, R. L. Dykstra, "Order Restricted Statistical Inference", Wiley 1988). Nodes that agree
with the order keep the measured time, to the nanosecond; grid points that nobody measured get theirs in the same way.
Float layers and quantized ones are not compared: int8 may be slower than float.

Below the smallest measured count time stays what it is there; above the largest it grows in proportion.
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

from jpq.costs.base import DENSE, LayerUse, Number
from jpq.costs.latency_table import MODELLED, Entry, LatencyTable, Shape
from jpq.types import JpqError

NS = 10**6  # nanoseconds of a millisecond

QUANTIZED = 8  # widths up to here are compared with each other


def latency_ns(uses: Sequence[LayerUse]) -> Number:
    """Predicted nanoseconds of one sample. Raises JpqError where no table was given."""
    return sum(layer_latency(u) for u in uses)


def layer_latency(u: LayerUse) -> Number:
    """Predicted nanoseconds of one layer. Raises JpqError where no table was given."""
    if u.clock is None:
        raise JpqError(
            "A latency needs a table of measured layers: run jpq bench --table FILE.csv --model NAME, then "
            "give --latency-table FILE.csv."
        )
    return u.clock(u.inputs, u.outputs, u.density, u.w_bits, u.a_bits, u.scheme)


@dataclass(frozen=True, eq=False)
class InterpolatedLatency:
    """How long one layer takes. A `Clock`; exact for whole numbers and fractions, differentiable for tensors.

    Gradients are those of the interpolation (at a measured count, of the piece below it). Whole widths cost steps; for
    the gradient a step is spread over the widths that it spans.
    """

    shape: Shape
    inputs: int  # dense channels in
    outputs: int
    times: Fraction  # calls in one sample
    axes: tuple[tuple[int, ...], tuple[int, ...]]  # counts of channels in and out at the nodes; one, for depthwise in
    bits: tuple[int, ...]  # measured widths
    nodes: np.ndarray  # [bits, in, out], nanoseconds
    masked: dict[str, dict[int, tuple[tuple[Fraction, Fraction], ...]]]  # scheme -> bits -> (density, share of dense)
    modelled: frozenset[str] = frozenset()  # schemes whose lines are not measured (column source)

    def __call__(
        self, inputs: Number, outputs: Number, density: Number, w_bits: Number, a_bits: Number, scheme: str = DENSE
    ) -> Number:
        """Nanoseconds of one sample, from shares of channels, density and bits."""
        bits = _larger(w_bits, a_bits)
        places = self._place(0, inputs * self.inputs), self._place(1, outputs * self.outputs)
        level = self._level(bits)
        time = self._at(level, places)
        if isinstance(bits, Tensor):
            step = self._step(level, places) * (bits - bits.detach())
            time = (time if isinstance(time, Tensor) else float(time)) + step
        return _times(_times(time, self._ratio(scheme, self.bits[level], density)), self.times)

    def measured(self, scheme: str) -> bool:
        """Whether the table says how fast masks of this scheme run here."""
        return scheme == DENSE or (scheme in self.masked and scheme not in self.modelled)

    def _level(self, bits: Number) -> int:
        return min(bisect_left(self.bits, _plain(bits) - 1e-6), len(self.bits) - 1)

    def _step(self, level: int, places: tuple[_Place, _Place]) -> Number:
        """What one more bit costs: the step that ends at this width, spread over its widths."""
        if not level or self.bits[level] > QUANTIZED:
            return 0.0
        step = self._at(level, places) - self._at(level - 1, places)
        return _plain(step) / (self.bits[level] - self.bits[level - 1])

    def _place(self, axis: int, count: Number) -> _Place:
        """Between which nodes a count lies, how far along, and by how much it is beyond the last."""
        nodes = self.axes[axis]
        count = count if isinstance(count, Tensor) else Fraction(count)
        at = _plain(count)
        if at <= nodes[0] or (axis == 0 and self.shape.kind == "depthwise"):
            return _Place(0, 0, Fraction(0), Fraction(1))
        if at > nodes[-1] * (1 + 1e-6):
            return _Place(len(nodes) - 1, len(nodes) - 1, Fraction(0), count / nodes[-1])
        high = min(bisect_left(nodes, at), len(nodes) - 1)
        if high == 0:  # the only node, but for rounding
            return _Place(0, 0, Fraction(0), Fraction(1))
        return _Place(high - 1, high, (count - nodes[high - 1]) / (nodes[high] - nodes[high - 1]), Fraction(1))

    def _at(self, level: int, places: tuple[_Place, _Place]) -> Number:
        a, b = places
        grid = self.nodes[level]
        low, high = (_mixed(int(grid[i, b.low]), int(grid[i, b.high]), b.along) for i in (a.low, a.high))
        return _times(_times(_mixed(low, high, a.along), a.beyond), b.beyond)

    def _ratio(self, scheme: str, bits: int, density: Number) -> Number:
        if scheme == DENSE or scheme not in self.masked:
            return 1
        widths = self.masked[scheme]
        points = widths[min(widths, key=lambda b: (b < bits, abs(b - bits)))]
        at = _plain(density)
        high = bisect_left([float(d) for d, _ in points], at)
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
    low: int
    high: int
    along: Number  # 0 at the lower node, 1 at the upper
    beyond: Number  # 1, or the count over the last node


def interpolate(
    table: LatencyTable, shape: Shape, form: str, inputs: int, outputs: int, times: Fraction
) -> InterpolatedLatency | None:
    """How long a layer takes by this table; None where the table has no dense line for its shape."""
    mine = _of_form([e for e in table.entries if e.shape == shape], form)
    plain = [e for e in mine if e.scheme == DENSE]
    if not plain:
        return None
    narrow = shape.kind == "depthwise"
    bits = tuple(sorted({e.bits for e in plain}))
    axes = ((1,) if narrow else tuple(sorted({e.inputs for e in plain}))), tuple(sorted({e.outputs for e in plain}))
    cells: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for e in plain:
        at = bits.index(e.bits), 0 if narrow else axes[0].index(e.inputs), axes[1].index(e.outputs)
        cells[at].append(max(1, round(e.ms * NS)))
    seen = np.full((len(bits), len(axes[0]), len(axes[1])), -1, np.int64)
    for at, times_seen in cells.items():
        seen[at] = round(median(times_seen))
    few = sum(b <= QUANTIZED for b in bits)
    parts = [isotonic(seen[:few])] if few else []
    nodes = np.concatenate([*parts, *(isotonic(seen[i : i + 1]) for i in range(few, len(bits)))])
    guessed = frozenset(e.scheme for e in mine if e.notes.get("source") == MODELLED)
    made = InterpolatedLatency(shape, inputs, outputs, times, axes, bits, nodes, {}, guessed)
    made.masked.update(_masked(made, [e for e in mine if e.scheme != DENSE]))
    return made


def _of_form(entries: Sequence[Entry], form: str) -> list[Entry]:
    """Of each width and scheme the lines measured in this form; else those that hold for any; else all."""
    groups: dict[tuple[int, str], list[Entry]] = defaultdict(list)
    for e in entries:
        groups[e.bits, e.scheme].append(e)
    picked = []
    for lines in groups.values():
        exact = [e for e in lines if e.form == form]
        picked += exact or [e for e in lines if not e.form] or lines
    return picked


def isotonic(seen: np.ndarray) -> np.ndarray:
    """The nearest array (in its largest deviation) that falls along no axis; entries below 0 were not measured.

    Where nothing smaller (larger) was measured, the smallest (largest) of all stands for it.
    """
    below = np.where(seen < 0, seen[seen >= 0].min(), seen)
    above = np.where(seen < 0, seen.max(), seen)
    for axis in range(seen.ndim):
        below = np.maximum.accumulate(below, axis)
        above = np.flip(np.minimum.accumulate(np.flip(above, axis), axis), axis)
    return (below + above) // 2


def _masked(
    dense: InterpolatedLatency, entries: Sequence[Entry]
) -> dict[str, dict[int, tuple[tuple[Fraction, Fraction], ...]]]:
    """Time over dense time by density, from the lines measured at the counts nearest to the whole layer's."""
    groups: dict[tuple[str, int], list[Entry]] = defaultdict(list)
    for e in entries:
        groups[e.scheme, e.bits].append(e)
    out: dict[str, dict[int, tuple[tuple[Fraction, Fraction], ...]]] = defaultdict(dict)
    for (scheme, bits), lines in groups.items():
        nearest = min(abs(e.inputs - dense.inputs) + abs(e.outputs - dense.outputs) for e in lines)
        times: dict[Fraction, list[Fraction]] = defaultdict(list)
        for e in lines:
            if abs(e.inputs - dense.inputs) + abs(e.outputs - dense.outputs) == nearest:
                places = dense._place(0, e.inputs), dense._place(1, e.outputs)
                times[Fraction(str(e.density))].append(round(e.ms * NS) / dense._at(dense._level(bits), places))
        times.setdefault(Fraction(1), [Fraction(1)])  # a layer that keeps all runs dense
        known = sorted(times)
        ratios = [median(times[d]) for d in known]
        rising = [(max(ratios[: i + 1]) + min(ratios[i:])) / 2 for i in range(len(ratios))]
        out[scheme][bits] = tuple(zip(known, rising, strict=True))
    return dict(out)


def _plain(x: Number) -> float:
    return float(x.detach() if isinstance(x, Tensor) else x)


def _larger(w: Number, a: Number) -> Number:
    if isinstance(w, Tensor) or isinstance(a, Tensor):
        like = w if isinstance(w, Tensor) else a
        pair = [x if isinstance(x, Tensor) else torch.as_tensor(float(x)).to(like) for x in (w, a)]
        return torch.maximum(*pair)
    return max(w, a)


def _mixed(low: Number, high: Number, along: Number) -> Number:
    if isinstance(along, Tensor) or isinstance(low, Tensor):
        return _times(low, 1 - along) + _times(high, along)
    return low + (high - low) * along


def _times(a: Number, b: Number) -> Number:
    """A product in which a fraction gives way to a tensor."""
    if isinstance(a, Tensor) and isinstance(b, Fraction):
        return a * float(b)
    if isinstance(b, Tensor) and isinstance(a, Fraction):
        return b * float(a)
    return a * b
