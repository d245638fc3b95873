"""The sensitivity table of a network too large to measure whole: fewer samples, widths and counts are measured.

Divergence falls with the width about as a power law does, but not with one exponent: by 3.2 to 4.1 times a bit from 2
to 4 bits, more where a layer breaks, and by less where the float model's own noise begins. So every width up to 4 bits
is measured, and 6; the logarithm is interpolated between measured widths, and beyond the last one continues at its
slope there, by 1 to 4 times a bit. Of each site every second count of units is measured; the solver takes those alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from jpq.allocation.measured.measure import Bounds, Change, changes_of
from jpq.allocation.measured.partial import PartialTable, measure_noted
from jpq.allocation.measured.probe import Probe
from jpq.allocation.measured.table import SensitivityTable

COARSE = "coarse"  # name of the estimator
SAMPLES = 128  # of the calibration
DENSE_BITS = 4  # every width up to this one is measured
SPARSE_BITS = 6  # and this one
STEEPEST = 4.0  # largest factor by which divergence falls in a bit beyond the last measured width
LEAST = 1e-12  # divergences below this count as this in logarithms


def coarse_changes(probe: Probe, w_bits: Bounds, a_bits: Bounds) -> list[Change]:
    """The entries that are measured."""
    kept: list[Change] = []
    counts: dict[str, list[Change]] = {}
    for change in changes_of(probe, w_bits, a_bits):
        if change.kept:
            counts.setdefault(change.name, []).append(change)
        elif change.value in measured_widths(w_bits if change.what == "weight" else a_bits):
            kept.append(change)
    for changes in counts.values():
        kept += changes[::2]  # from the fewest units on
    return kept


def measured_widths(bounds: Bounds) -> list[int]:
    """The widths that are measured between a smallest and a largest one, ascending."""
    low, high = bounds
    return [b for b in range(low, high + 1) if b <= max(DENSE_BITS, low + 1) or b == SPARSE_BITS]


def coarse_table(
    probe: Probe,
    w_bits: Bounds,
    a_bits: Bounds,
    model: str,
    notes: PartialTable | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SensitivityTable:
    """Measure some entries of the table of an attached network, and interpolate the other widths.

    Args:
        probe: the network and its calibration, of about SAMPLES samples.
        w_bits, a_bits: smallest and largest widths.
        model: checksum of the float weights.
        notes: where entries are noted as soon as they are found.
        progress: is told how many of the entries are measured.
    """
    table = measure_noted(
        probe, w_bits, a_bits, model, notes, progress, COARSE, set(coarse_changes(probe, w_bits, a_bits))
    )
    bits = {key: interpolate(row, w_bits if key[1] == "w" else a_bits) for key, row in table.bits.items()}
    return replace(table, bits=bits, estimator=COARSE)


def interpolate(row: Mapping[int, float], bounds: Bounds) -> dict[int, float]:
    """The divergence at every width between the bounds, from those at some of them.

    Args:
        row: width -> divergence, at least one; these stay as they are.
        bounds: smallest and largest width.
    """
    known: Collection[int] = sorted(row)
    logs = {b: math.log(max(row[b], LEAST)) for b in known}
    found: dict[int, float] = {}
    for b in range(bounds[0], bounds[1] + 1):
        below, above = max((k for k in known if k < b), default=None), min((k for k in known if k > b), default=None)
        if b in row:
            found[b] = row[b]
        elif below is not None and above is not None:
            share = (b - below) / (above - below)
            found[b] = math.exp((1 - share) * logs[below] + share * logs[above])
        elif below is not None:
            found[b] = math.exp(logs[below] - (b - below) * _slope(logs, below))
    return found


def _slope(logs: Mapping[int, float], last: int) -> float:
    """The fall of the logarithm in a bit at the last measured width, within its limits."""
    before = max((k for k in logs if k < last), default=None)
    if before is None:
        return 0.0
    return min(max((logs[before] - logs[last]) / (last - before), 0.0), math.log(STEEPEST))
