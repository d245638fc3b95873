"""Where zeros may lie."""

from __future__ import annotations

from jpq.methods.structures.axis import Axis, Filters, Inputs, Kernels
from jpq.methods.structures.base import Structure
from jpq.methods.structures.block import Block, BlockPunched
from jpq.methods.structures.elementwise import Elementwise, PerOutput
from jpq.methods.structures.layout import WeightLayout
from jpq.methods.structures.parse import STRUCTURES, by_layer, parse
from jpq.methods.structures.pattern import KernelPattern
from jpq.methods.structures.window import Window

__all__ = [
    "STRUCTURES",
    "Axis",
    "Block",
    "BlockPunched",
    "Elementwise",
    "Filters",
    "Inputs",
    "KernelPattern",
    "Kernels",
    "PerOutput",
    "Structure",
    "WeightLayout",
    "Window",
    "by_layer",
    "parse",
]
