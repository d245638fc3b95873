"""Where zeros may lie."""

from jpq.structures.axis import Axis
from jpq.structures.base import Structure

STRUCTURES: dict[str, type[Structure]] = {"axis": Axis}

__all__ = ["STRUCTURES", "Axis", "Structure"]
