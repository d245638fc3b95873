"""Runs to make fronts of: folders written from made-up results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from test_report import result

from jpq.config import Budget, Config, Decide, Run, Task
from jpq.config import write_toml as write_config
from jpq.results import run_folder
from jpq.results.front.front import Front, build_front
from jpq.results.front.points import read_points
from jpq.results.record import UNREAD, ModelMetrics

FULL = 100_000_000  # BOPs of the fp32 model


def folder(place: Path, accuracy: float, share: float, seed: int = 0, **changes: Any) -> Path:
    """A run's folder in `place`, with this held-out accuracy at this share of the BOPs, and its root of half the bytes.

    `changes` are fields of the result, or of its config: `model`, `method`, `cost`; `full`: BOPs of the fp32 model.
    """
    config = Config(
        task=Task(model=changes.pop("model", "convnet")),
        budget=Budget(target_bops=f"{100 * share:g}%", cost=changes.pop("cost", "bops")),
        decide=Decide(method=changes.pop("method", "djpq")),
        run=Run(seed=seed),
    )
    made, full, final = place / config.hash(), changes.pop("full", FULL), changes.pop("final", False)
    made.mkdir(parents=True)
    right = accuracy - 0.01 if final else UNREAD
    values = {
        "float": ModelMetrics(0.97 if final else UNREAD, full, 97_656, 150_000, 1.0, full),
        "compressed": ModelMetrics(
            right, round(share * full), 40_000, round(75_000 * share**0.5), share, round(share * full)
        ),
        "held_out": {"float": 0.98, "compressed": accuracy},
        "uniform": {f"W{b}A{b}": {"bops": full * b * b / 1024, "size": 4_700.0 * b} for b in (2, 3, 4, 8)},
        "final": final,
        "seed": seed,
    }
    run_folder.write_run(result(made, **{**values, **changes}), config)
    write_config(config, made / "config.toml")
    return made


SPREAD = ((0.80, 0.001), (0.95, 0.002), (0.96, 0.01), (0.955, 0.02), (0.97, 0.04))  # the fourth is dominated


def spread(place: Path) -> Front:
    """Five runs, four of them on the front; the second is its knee."""
    for accuracy, share in SPREAD:
        folder(place, accuracy, share)
    return build_front(read_points(place).points)
