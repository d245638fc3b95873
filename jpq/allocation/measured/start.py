"""The widths that a search starts from, by measurement: the solver's bits a little above the budget, all units kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil

from jpq.allocation.measured.candidates import AllowedWidths
from jpq.allocation.measured.decide import allowed_part, plan_widths
from jpq.allocation.measured.solve import Solver
from jpq.allocation.measured.table import Key, SensitivityTable
from jpq.allocation.uniform_bits import HEADROOM, LOWERED_BY_BITS
from jpq.compression.model import CompressedModel
from jpq.costs.target import Target
from jpq.types import JpqError


def start_widths(
    net: CompressedModel,
    table: SensitivityTable,
    targets: Sequence[Target],
    widths: AllowedWidths,
    left: Mapping[str, float],
    headroom: float = HEADROOM,
) -> dict[Key, int]:
    """The width of least predicted divergence of each tensor, where the network costs `headroom` times its targets.

    Args:
        net: attached, with all units open.
        table: of its float weights.
        targets: those for latency alone ask for no bits.
        widths: the allowed ones.
        left: cost -> the share of it that stays whatever is learned (masks of a fixed density); others: all of it.
        headroom: above the targets.

    {} where no target depends on bits, and where no bits meet the targets while all units stay: then widths start as
    they do without a table.
    """
    wider = [
        replace(target, limit=ceil(headroom * target.limit / left.get(target.cost, 1.0)))
        for target in targets
        if target.cost in LOWERED_BY_BITS
    ]
    if not wider:
        return {}
    solver = Solver(net, allowed_part(table, widths), wider, widths.pinned, free_units=False)
    try:
        solution = solver.solve()
    except JpqError:
        return {}
    return plan_widths(net, solution.plan)
