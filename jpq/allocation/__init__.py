"""Allocation of a budget: how many channels, bits and weights of a mask stay in each layer."""

from typing import TYPE_CHECKING

from jpq.lazy import lazy_names

if TYPE_CHECKING:
    from jpq.allocation.allocators import ALLOCATORS, PlanEvaluator
    from jpq.allocation.channels import AllocationProblem
    from jpq.allocation.measured.calibration import mix_pairs
    from jpq.allocation.measured.coarse import coarse_table
    from jpq.allocation.measured.decide import joint_divergence
    from jpq.allocation.measured.estimate import estimate_cost
    from jpq.allocation.measured.fisher import fisher_table
    from jpq.allocation.measured.measure import measure_table
    from jpq.allocation.measured.probe import Probe
    from jpq.allocation.measured.solve import Solver, predicted_divergence
    from jpq.allocation.measured.table import SensitivityTable, read_table, write_table
    from jpq.allocation.ranking.rank import rank_units, site_scores
    from jpq.allocation.structure_latency import mapping_ms
    from jpq.allocation.structure_rules import allowed_structures
    from jpq.allocation.structure_search import MappingEvaluator
    from jpq.allocation.uniform_bits import decide_uniform_bits, uniform_plan

__all__ = [
    "ALLOCATORS",
    "AllocationProblem",
    "MappingEvaluator",
    "PlanEvaluator",
    "Probe",
    "SensitivityTable",
    "Solver",
    "allowed_structures",
    "coarse_table",
    "decide_uniform_bits",
    "estimate_cost",
    "fisher_table",
    "joint_divergence",
    "mapping_ms",
    "measure_table",
    "mix_pairs",
    "predicted_divergence",
    "rank_units",
    "read_table",
    "site_scores",
    "uniform_plan",
    "write_table",
]

_HOMES = {
    "ALLOCATORS": "allocators",
    "AllocationProblem": "channels",
    "MappingEvaluator": "structure_search",
    "PlanEvaluator": "allocators",
    "Probe": "measured.probe",
    "SensitivityTable": "measured.table",
    "Solver": "measured.solve",
    "allowed_structures": "structure_rules",
    "coarse_table": "measured.coarse",
    "decide_uniform_bits": "uniform_bits",
    "estimate_cost": "measured.estimate",
    "fisher_table": "measured.fisher",
    "joint_divergence": "measured.decide",
    "mapping_ms": "structure_latency",
    "measure_table": "measured.measure",
    "mix_pairs": "measured.calibration",
    "predicted_divergence": "measured.solve",
    "rank_units": "ranking.rank",
    "read_table": "measured.table",
    "site_scores": "ranking.rank",
    "uniform_plan": "uniform_bits",
    "write_table": "measured.table",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
