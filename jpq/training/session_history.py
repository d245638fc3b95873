"""Costs of a search in a user's own loop over its steps, for the report of a session."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

import numpy as np

from jpq.costs.target import Controller, Target

MOST_ROWS = 500  # of a search


class SessionHistory:
    """Cost, limit and multiplier of each target at evenly spaced steps of a search: `rows` of plain numbers.

    Args:
        steps: of the search.
        targets: of the search; none where nothing is searched.
    """

    def __init__(self, steps: int, targets: Sequence[Target]) -> None:
        self.every = max(1, steps // MOST_ROWS)
        self.columns = ["step", *(f"{t.cost}{part}" for t in targets for part in ("", "_limit", "_multiplier"))]
        self.due = steps // self.every if targets else 0  # rows of the whole search
        self.rows: list[dict[str, float]] = []
        self.latest: dict[str, float] = {}  # of the last step so far that knew its costs, as in `rows`

    def record(self, step: int, controller: Controller) -> None:
        """Add a row for a step where one is due; nothing before the first `pressure()`."""
        if controller.last_costs:
            values: list[float] = [step]
            for target in controller.targets:
                values += [*controller.last_costs[target.cost], controller.pressure[target.cost]]
            self.latest = dict(zip(self.columns, values, strict=True))
        if self.latest and step % self.every == 0:
            self.rows.append({**self.latest, "step": step})

    def state(self) -> str:
        """The latest row and `rows` as text, float64 in base64, of the same length at all steps of the search."""
        table = np.full((1 + max(self.due, len(self.rows)), len(self.columns)), np.nan, "<f8")
        for place, row in enumerate((self.latest, *self.rows)):
            table[place] = list(row.values()) or np.nan
        return base64.b64encode(table.tobytes()).decode()

    def restore(self, text: str) -> None:
        """Continue from a `state()`; an empty text has no rows. Raises ValueError for other text."""
        table = np.frombuffer(base64.b64decode(text, validate=True), "<f8").reshape(-1, len(self.columns))
        known = [dict(zip(self.columns, row, strict=True)) for row in table.tolist()]
        found = [{**row, "step": int(row["step"])} if math.isfinite(row["step"]) else {} for row in known] or [{}]
        self.latest, self.rows = found[0], [row for row in found[1:] if row]
