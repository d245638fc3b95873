"""Allocation of a budget: how many channels, bits and weights of a mask stay in each layer."""

from typing import TYPE_CHECKING

from jpq.lazy import lazy_names

if TYPE_CHECKING:
    from jpq.allocation.allocators import ALLOCATORS
    from jpq.allocation.channels import AllocationProblem
    from jpq.allocation.ranking.rank import rank, scores
    from jpq.allocation.structure_rules import milliseconds, variants
    from jpq.allocation.structure_search import MappingEvaluator

__all__ = [
    "ALLOCATORS",
    "AllocationProblem",
    "MappingEvaluator",
    "milliseconds",
    "rank",
    "scores",
    "variants",
]

_HOMES = {
    "ALLOCATORS": "allocators",
    "AllocationProblem": "channels",
    "MappingEvaluator": "structure_search",
    "milliseconds": "structure_rules",
    "rank": "ranking.rank",
    "scores": "ranking.rank",
    "variants": "structure_rules",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
