"""The CSV files of the studies: where they lie, rows with their provenance, and appending a row."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

from jpq.export.timing import describe_hardware as cpu_name

STUDIES = Path(__file__).parents[1]
RESULTS = STUDIES / "results"
UNKNOWN_COMMIT = "unknown"


def provenance(
    command: str, n: int = 1, packages: Sequence[str] = ("torch",), threads: int | None = None
) -> dict[str, object]:
    """The columns that say how a row came about: n, threads, hardware, a version per package, commit and command.

    Args:
        command: the shell command that measures this row again.
        n: number of runs, rounds or draws behind the row's figures.
        packages: distributions whose versions matter, torch among them.
        threads: of the processor; default: what torch is set to.
    """
    return {
        "n": n,
        "threads": torch.get_num_threads() if threads is None else threads,
        "hardware": hardware(),
        **{name.replace("-", "_"): version(name) for name in packages},
        "commit": commit(),
        "command": command,
    }


def hardware() -> str:
    """The accelerator's name, or the processor's name and number of cores."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()


@cache
def commit() -> str:
    """The checked-out commit, 12 digits, with `+changes` where files of jpq or of the studies differ from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "jpq", "studies/*.py")
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN_COMMIT
    return head + ("+changes" if changed else "")


def append_row(path: Path, row: dict[str, object]) -> None:
    """Add one row (and the header to a new file); rows from before a column was added leave that column empty."""
    if path.exists() and path.stat().st_size:
        table = pd.read_csv(path, dtype=str)
        if list(table) != list(row):
            table = pd.concat([table, pd.DataFrame([row], dtype=object)])
            table[[*row, *(c for c in table if c not in row)]].to_csv(path, index=False)
            return
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if path.stat().st_size == 0:
            writer.writeheader()
        writer.writerow(row)


def read_rows(path: Path, columns: Sequence[str], dtype: type[str] | None = None) -> pd.DataFrame:
    """The rows of a CSV file, or an empty table with these columns where the file does not exist yet."""
    return pd.read_csv(path, dtype=dtype) if path.exists() else pd.DataFrame(columns=list(columns))


def _git(*arguments: str) -> str:
    """What a git command prints, run in the root of the repository."""
    done = subprocess.run(["git", *arguments], cwd=STUDIES.parent, check=True, capture_output=True, text=True)
    return done.stdout.strip()
