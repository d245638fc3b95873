"""Where zeros may lie."""

from jpq.structures.axis import Axis
from jpq.structures.base import Structure
from jpq.structures.block import Block, BlockPunched
from jpq.structures.elementwise import Elementwise
from jpq.structures.layout import Layout
from jpq.structures.parse import STRUCTURES, by_layer, parse
from jpq.structures.pattern import KernelPattern
from jpq.structures.per_output import PerOutput
from jpq.structures.slices import Filters, Inputs, Kernels
from jpq.structures.window import Window

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
    "Layout",
    "PerOutput",
    "Structure",
    "Window",
    "by_layer",
    "parse",
]
