"""STRUCTURES: where zeros may lie in a layer's weight, one kind of mask a file."""

from __future__ import annotations

from jpq.methods.structures.axis import Axis, Filters, Inputs, Kernels
from jpq.methods.structures.base import Structure
from jpq.methods.structures.block import Block, BlockPunched
from jpq.methods.structures.elementwise import Elementwise, PerOutput
from jpq.methods.structures.layout import WeightLayout
from jpq.methods.structures.parse import STRUCTURES, parse_layers, parse_structure
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
    "parse_layers",
    "parse_structure",
]
