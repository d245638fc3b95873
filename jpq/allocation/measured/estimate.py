"""What a sensitivity table costs before it is measured, and the estimator that fits into the time: `estimate_cost`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jpq.allocation.measured.coarse import SAMPLES, coarse_changes
from jpq.allocation.measured.measure import ESTIMATORS, Bounds, Change, changes_of
from jpq.allocation.measured.probe import NORM_BATCHES, Probe
from jpq.tracing.forward import batch_size
from jpq.types import JpqError, unknown

AUTO = "auto"  # --estimator: "single" where it fits into LONGEST, else "coarse" within LONGEST_COARSE, else "fisher"
AROUND = "around"  # needs a plan, which a search has and a command has not
LONGEST = 600.0  # seconds that a measured table may take before AUTO prefers another estimator
LONGEST_COARSE = 1800.0  # seconds that a coarse one may take before AUTO prefers one backward pass
BACKWARD = 4.0  # time of a forward and backward pass with all errors of rounding, in forward passes


@dataclass(frozen=True)
class CostEstimate:
    """Time and memory of a table, from two timed passes over the calibration."""

    changes: int  # entries of the whole table
    pass_seconds: float  # of one pass over the calibration
    seconds: Mapping[str, float]  # estimator -> time of the whole table
    memory: int  # bytes of samples and of outputs that are kept, beside the model


def estimate_cost(probe: Probe, w_bits: Bounds, a_bits: Bounds, known: int = 0) -> CostEstimate:
    """Time and memory of a table; `known` of its entries need not be measured."""
    timed = []
    for _ in range(2):  # the first one also warms up
        start = time.perf_counter()
        probe.measure()
        timed.append(time.perf_counter() - start)
    changes = changes_of(probe, w_bits, a_bits)
    left = 1 - known / max(1, len(changes))
    fewer = min(1.0, SAMPLES / probe.samples)
    seconds = {
        "single": min(timed) * _passes(probe, changes, probe.samples) * left,
        "coarse": min(timed) * fewer * _passes(probe, coarse_changes(probe, w_bits, a_bits), fewer * probe.samples),
        "fisher": min(timed) * BACKWARD,
    }
    return CostEstimate(len(changes), min(timed), seconds, probe.kept_bytes())


def _passes(probe: Probe, changes: Sequence[Change], samples: float) -> float:
    """The passes over so many samples that measuring these changes takes, in whole passes."""
    norms = sum(batch_size(x) for x in probe.norm_batches[:NORM_BATCHES]) / samples
    passes = 0.0
    for change in changes:
        share = probe.share_behind(probe.cut_before(list(change.widths), list(change.kept)))
        passes += share * (1 + norms if change.kept else 1)
    return passes


def pick_estimator(name: str, cost: CostEstimate) -> tuple[str, str]:
    """(the estimator that a name stands for, a sentence why). Raises JpqError for an unknown name."""
    check_estimator(name)
    single, coarse = cost.seconds["single"], cost.seconds["coarse"]
    if name != AUTO:
        return name, ESTIMATORS[name]
    if single <= LONGEST:
        return "single", f"measuring all {cost.changes} changes takes about {single:.0f} s"
    why = f"measuring all {cost.changes} changes would take about {single / 60:.0f} minutes (--estimator single does)"
    if coarse <= LONGEST_COARSE:
        return "coarse", f"{why}, half of them on {SAMPLES} samples about {coarse / 60:.1f}"
    return "fisher", f"{why}, half of them on {SAMPLES} samples {coarse / 60:.0f} (--estimator coarse)"


def check_estimator(name: str) -> None:
    """Raise JpqError for a name that is no estimator of a table without a plan."""
    names = [AUTO, *(known for known in ESTIMATORS if known != AROUND)]
    if name not in names:
        raise unknown("estimator", name, names)


def check_samples(samples: int) -> None:
    """Raise JpqError for a number of samples that nothing can be measured on."""
    if samples < 2:
        raise JpqError(f"--samples {samples}: at least 2 are needed, and 512 are usual.")
