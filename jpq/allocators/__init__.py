"""How much where: starting plans, and the plans of methods that decide nothing by gradient."""

from jpq.allocators.allocate import ALLOCATORS, Judge, bit_widths, pick_allocator, place
from jpq.allocators.ranked import rank
from jpq.allocators.start import start_bits
from jpq.allocators.uniform import uniform

__all__ = ["ALLOCATORS", "Judge", "bit_widths", "pick_allocator", "place", "rank", "start_bits", "uniform"]
