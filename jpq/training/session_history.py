"""Costs of a search in a user's own loop over its steps, for the report of a session."""

from __future__ import annotations

from jpq.costs.target import Controller

MOST_ROWS = 500  # of a search


class SessionHistory:
    """Cost, limit and multiplier of each target at evenly spaced steps of a search: `rows` of plain numbers."""

    def __init__(self, steps: int) -> None:
        self.every = max(1, steps // MOST_ROWS)
        self.rows: list[dict[str, float]] = []

    def record(self, step: int, controller: Controller) -> None:
        """Add a row for a step where one is due; nothing before the first `pressure()`."""
        if step % self.every or not controller.last_costs:
            return
        row: dict[str, float] = {"step": step}
        for target in controller.targets:
            cost, limit = controller.last_costs[target.cost]
            row |= {
                target.cost: cost,
                f"{target.cost}_limit": limit,
                f"{target.cost}_multiplier": controller.pressure[target.cost],
            }
        self.rows.append(row)
