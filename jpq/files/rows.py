"""Dataclasses as the rows of a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jpq.files.atomic import replace_file

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def write_rows(path: Path, kind: type[DataclassInstance], rows: Sequence[Any]) -> None:
    """Write instances of a dataclass as CSV, a line each under the names of its fields; atomic.

    Raises JpqError where the file cannot be written.
    """

    def fill(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(kind)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)

    replace_file(path, fill)
