"""Several runs as one Pareto front: read, compare, choose, draw."""

from typing import TYPE_CHECKING

from jpq.lazy import lazy_names

if TYPE_CHECKING:
    from jpq.results.front.front import Front, build_front, hypervolume_by_method, to_dataframe
    from jpq.results.front.pareto import find_knee, hypervolume, hypervolume_of, non_dominated, to_objectives
    from jpq.results.front.plots import draw_decisions, draw_front, write_front_files
    from jpq.results.front.points import LayerDecision, RunCollection, RunPoint, read_point, read_points
    from jpq.results.front.select import Choice, Limit, parse_limits, pick_point

__all__ = [
    "Choice",
    "Front",
    "LayerDecision",
    "Limit",
    "RunCollection",
    "RunPoint",
    "build_front",
    "draw_decisions",
    "draw_front",
    "find_knee",
    "hypervolume",
    "hypervolume_by_method",
    "hypervolume_of",
    "non_dominated",
    "parse_limits",
    "pick_point",
    "read_point",
    "read_points",
    "to_dataframe",
    "to_objectives",
    "write_front_files",
]

_HOMES = {
    "Choice": "select",
    "Front": "front",
    "LayerDecision": "points",
    "Limit": "select",
    "RunCollection": "points",
    "RunPoint": "points",
    "build_front": "front",
    "draw_decisions": "plots",
    "draw_front": "plots",
    "find_knee": "pareto",
    "hypervolume": "pareto",
    "hypervolume_by_method": "front",
    "hypervolume_of": "pareto",
    "non_dominated": "pareto",
    "parse_limits": "select",
    "pick_point": "select",
    "read_point": "points",
    "read_points": "points",
    "to_dataframe": "front",
    "to_objectives": "pareto",
    "write_front_files": "plots",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
