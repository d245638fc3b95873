"""Cases of a test of which some run with the slow tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def thinned(cases: Iterable[Any], fast: Callable[[int, Any], bool]) -> list[Any]:
    """All cases, in order: those of which `fast(position, case)` is false carry the marker `slow`."""
    every = list(cases)
    marks = [() if fast(i, case) else pytest.mark.slow for i, case in enumerate(every)]
    assert () in marks, "some case is fast"
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=mark)
        for case, mark in zip(every, marks, strict=True)
    ]
