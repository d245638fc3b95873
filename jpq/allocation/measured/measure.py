"""Measuring a sensitivity table: one tensor rounded, or one site pruned, at a time, in an attached network."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import isfinite

from jpq.allocation.measured.probe import Probe
from jpq.allocation.measured.table import Key, SensitivityTable, tensors_checksum
from jpq.tracing.forward import collect_tensors
from jpq.types import JpqError

Bounds = tuple[int, int]  # smallest and largest width, in bits

ESTIMATORS = {
    "single": "each change alone, in the float model",
    "around": "each change alone, in the model at the bits and units of the present plan",
    "coarse": "half of the changes, on a quarter of the samples; other widths are interpolated",
    "fisher": "squared gradients times squared rounding errors, from one backward pass over the calibration",
}

SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)  # of a site's units, beside all of them


def unit_counts(n: int, allowed: Sequence[int] = ()) -> list[int]:
    """The numbers of units that a site is measured at, ascending, without all of them: the fewest, and shares of n.

    `allowed`: the numbers that may be kept, ascending; default: any from 1 to n.
    """
    allowed = allowed or range(1, n + 1)
    wanted = [share * n for share in SHARES]
    return sorted({min(allowed), *(min(allowed, key=lambda k: (abs(k - count), k)) for count in wanted)} - {n})


@dataclass(frozen=True)
class Change:
    """One entry of a table: the tensor that takes another width, or the site that keeps another number of units."""

    what: str  # "weight", "input" or "units"
    name: str  # of the layer or site
    value: int  # width in bits, or number of units

    def __str__(self) -> str:
        if self.what == "units":
            return f"{self.value} of the units of '{self.name}'"
        return f"the {self.what} of layer '{self.name}' at {self.value} bits"

    @property
    def key(self) -> Key:
        """The tensor of a change of width."""
        return self.name, "w" if self.what == "weight" else "a"

    @property
    def widths(self) -> dict[Key, int | None]:
        """The widths that it changes."""
        return {} if self.what == "units" else {self.key: self.value}

    @property
    def kept(self) -> dict[str, int]:
        """The numbers of units that it changes."""
        return {self.name: self.value} if self.what == "units" else {}


def changes_of(
    probe: Probe,
    w_bits: Bounds,
    a_bits: Bounds,
    around: Mapping[Key, int] | None = None,
    counts: Mapping[str, int] | None = None,
    step: int | None = None,
) -> list[Change]:
    """The entries of a table that are to be measured (see `measure_table`)."""
    changes = []
    for key in probe.keys:
        low, high = w_bits if key[1] == "w" else a_bits
        centre = (around or {}).get(key)
        for width in range(low, high + 1):
            if centre is None or step is None or abs(width - centre) <= step:
                changes.append(Change("weight" if key[1] == "w" else "input", key[0], width))
    allowed = {site.name: probe.net.counts(site) for site in probe.net.sites}
    for name, order in probe.orders.items():
        present = (counts or {}).get(name, len(order))
        for count in sorted({*unit_counts(len(order), allowed[name]), len(order)} - {present}):
            changes.append(Change("units", name, count))
    return changes


def measure_table(
    probe: Probe,
    w_bits: Bounds,
    a_bits: Bounds,
    model: str,
    around: Mapping[Key, int] | None = None,
    counts: Mapping[str, int] | None = None,
    step: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    known: Mapping[Change, float] | None = None,
    record: Callable[[Change, float], None] = lambda change, divergence: None,
    wanted: Collection[Change] | None = None,
) -> SensitivityTable:
    """Measure the table of an attached network.

    Args:
        probe: the network and its calibration.
        w_bits, a_bits: smallest and largest widths.
        model: checksum of the float weights.
        around: the widths of the plan around which single tensors change; None: the float model.
        counts: with `around`, the units that the plan keeps of each site; default: all of them.
        step: with `around`, the widths tried are those at most so far from the plan's; None: all.
        progress: is told how many of the changes are measured.
        known: divergences that an interrupted measurement of the same table has found; they are not measured again.
        record: is given each divergence as soon as it is found.
        wanted: the entries that the table gets; default: all of them.

    Raises JpqError for a divergence that is NaN or infinite.

    The time is that of one pass over the calibration per change, 2 L B + sum of the sites' counts of them; less where
    the model is a chain, of which the part before a change does not run again.
    """
    base_widths: dict[Key, int | None] = dict.fromkeys(probe.keys) | dict(around or {})
    base_counts = {name: len(order) for name, order in probe.orders.items()} | dict(counts or {})
    changes = changes_of(probe, w_bits, a_bits, around, counts, step)
    if wanted is not None:
        changes = [change for change in changes if change in wanted]
    asked = set(changes)
    found = {change: value for change, value in (known or {}).items() if change in asked}
    with probe.changed(base_widths, base_counts):
        base = _finite(probe.measure(), "the plan that the table is around") if around else 0.0
        for of_units in (False, True):
            missing = [change for change in changes if change not in found and bool(change.kept) == of_units]
            with ExitStack() as stack:
                if of_units and missing:
                    if not around:
                        stack.enter_context(probe.compared_with_norms_anew())
                    stack.enter_context(probe.statistics_anew())
                again = of_units and missing and around
                zero = _finite(probe.measure(), "BatchNorm's statistics measured anew") if again else base
                for change, value in _measure_changes(probe, missing):
                    found[change] = _finite(value, str(change)) - zero
                    record(change, found[change])
                    progress(len(found), len(changes))
    bits: dict[Key, dict[int, float]] = {key: {} for key in probe.keys}
    units: dict[str, dict[int, float]] = {name: {count: 0.0} for name, count in base_counts.items()}
    for change in changes:
        row = units[change.name] if change.kept else bits[change.key]
        row[change.value] = found[change]
    return SensitivityTable(
        bits,
        units,
        {name: tuple(order) for name, order in probe.orders.items()},
        "around" if around else "single",
        model,
        tensors_checksum(collect_tensors(probe.batches)),
        probe.samples,
        {
            "divergence": base,
            "bits": {f"{layer}/{side}": b for (layer, side), b in (around or {}).items()},
            "weight_levels": probe.net.plan().weight_levels,
        },
    )


def _finite(divergence: float, change: str) -> float:
    """A divergence. Raises JpqError where it is NaN or infinite, which names the change that it was measured with."""
    if not isfinite(divergence):
        raise JpqError(
            f"With {change} the network's divergence from the float model is {divergence}, no number that a table can "
            "hold: a part of the model overflows or divides by zero there. Keep it as it is (--keep-float, --skip)."
        )
    return divergence


def _measure_changes(probe: Probe, changes: Sequence[Change]) -> Iterator[tuple[Change, float]]:
    """The divergence after each change alone, from the input of the network to its output."""
    cuts = [probe.cut_before(list(change.widths), list(change.kept)) for change in changes]
    for number in sorted(set(cuts)):
        with probe.starting_at(number):
            for change, cut in zip(changes, cuts, strict=True):
                if cut == number:
                    with probe.changed(change.widths, change.kept):
                        yield change, probe.measure()
