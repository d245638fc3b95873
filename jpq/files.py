"""Files that a reader never sees half of."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write_to: Callable[[Path], object]) -> None:
    """Let `write_to` write a file beside `path`, then put it in its place in one step.

    Where writing fails, what stood at `path` still stands there and nothing is left beside it.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        write_to(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
