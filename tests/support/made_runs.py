"""Runs to make fronts of: folders written from made-up results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from jpq.config import Budget, Config, Decide, Run, Task
from jpq.config import write_toml as write_config
from jpq.results import run_folder
from jpq.results.front.front import Front, build_front
from jpq.results.front.points import read_points
from jpq.results.record import UNREAD, LayerRecord, ModelMetrics, Result
from jpq.training.history import EpochRecord

FULL = 100_000_000  # BOPs of the fp32 model


def history(search: int = 8, tune: int = 6) -> tuple[EpochRecord, ...]:
    """One epoch of training in floating point, then a search and fine-tuning of so many epochs."""
    rows = [
        EpochRecord("float", 1, 1, 0.4, 0.95, math.nan, math.nan, math.nan, 0.0, math.nan, math.nan, 1.0, 1e-3, 2.0)
    ]
    for i in range(search):
        share, aim = 0.0625 * 0.15 ** (i / search), 0.0625 * 0.155 ** (i / search)
        wave = share * (1 + 0.05 * math.sin(i))
        rows.append(
            EpochRecord(
                "search",
                i + 1,
                search,
                1.2 / (i + 1),
                0.9 + 0.05 * i / search,
                wave * 1e8,
                wave,
                aim,
                0.1 * i,
                8 - 4 * i / search,
                8 - 3 * i / search,
                0.9,
                2e-3,
                3.0 + i,
            )
        )
    for i in range(tune):
        rows.append(
            EpochRecord(
                "fine-tune",
                i + 1,
                tune,
                0.2 / (i + 1),
                0.96 + 0.02 * i / tune,
                0.98e6,
                0.0098,
                0.01,
                0.0,
                3.5,
                4.2,
                0.45,
                1e-3,
                12.0 + i,
            )
        )
    return tuple(rows)


def result(folder: Path, n: int = 4, **changes: object) -> Result:
    """A result of `n` layers; `changes` are its fields."""
    spent = np.random.default_rng(0).uniform(0.5, 2.0, n)
    spent = spent / max(spent.sum(), 1)
    layers = tuple(
        LayerRecord(
            f"layer{i // 6 + 1}.{i % 6 // 2}.conv{i % 2 + 1}",
            "conv2d",
            3 + i,
            16,
            16 - i % 13,
            16,
            2 + i % 5,
            3 + i % 4,
            10_000 * (i + 1),
            int(980_000 * spent[i]),
            float(spent[i]),
        )
        for i in range(n)
    )
    values = {
        "folder": folder,
        "method": "djpq",
        "float": ModelMetrics(0.9833, 100_000_000, 97_656, 150_400, 1.0),
        "compressed": ModelMetrics(0.9778, 980_000, 40_120, 12_345, 0.0098),
        "held_out": {"float": 0.985, "compressed": 0.979},
        "targets": {"bops": {"asked": "1%", "limit": 1_000_000, "reached": 980_000, "used": 0.98}},
        "verified": {"rebuilt": {"difference": 0.0}},
        "layers": layers,
        "history": history(),
        "seconds": {"search": 9.0, "total": 20.0},
        "command": "jpq optimize --target-bops 1%",
        "versions": {"torch": "2.9"},
        "seed": 3,
        "notes": ("a note",),
        "data": {"name": "digits"},
    }
    return Result(**{**values, **changes})  # type: ignore[arg-type]


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
