"""Allocation of a budget: how many channels, bits and weights of a mask stay in each layer."""

from typing import TYPE_CHECKING

from jpq.lazy import lazy_names

if TYPE_CHECKING:
    from jpq.allocation.allocators import ALLOCATORS, PlanEvaluator
    from jpq.allocation.channels import AllocationProblem
    from jpq.allocation.ranking.rank import rank_units, site_scores
    from jpq.allocation.structure_latency import mapping_ms
    from jpq.allocation.structure_rules import allowed_structures
    from jpq.allocation.structure_search import MappingEvaluator

__all__ = [
    "ALLOCATORS",
    "AllocationProblem",
    "MappingEvaluator",
    "PlanEvaluator",
    "allowed_structures",
    "mapping_ms",
    "rank_units",
    "site_scores",
]

_HOMES = {
    "ALLOCATORS": "allocators",
    "AllocationProblem": "channels",
    "MappingEvaluator": "structure_search",
    "PlanEvaluator": "allocators",
    "allowed_structures": "structure_rules",
    "mapping_ms": "structure_latency",
    "rank_units": "ranking.rank",
    "site_scores": "ranking.rank",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
