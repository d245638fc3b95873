"""Several runs as one Pareto front: read, compare, choose, draw."""

from typing import TYPE_CHECKING

from jpq.lazy import lazy_names

if TYPE_CHECKING:
    from jpq.results.front.front import Front, build_front, hypervolume_by_method, to_dataframe
    from jpq.results.front.pareto import hypervolume, hypervolume_of, knee, non_dominated, objectives
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
    "hypervolume",
    "hypervolume_by_method",
    "hypervolume_of",
    "knee",
    "non_dominated",
    "objectives",
    "parse_limits",
    "pick_point",
    "read_point",
    "read_points",
    "to_dataframe",
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
    "hypervolume": "pareto",
    "hypervolume_by_method": "front",
    "hypervolume_of": "pareto",
    "knee": "pareto",
    "non_dominated": "pareto",
    "objectives": "pareto",
    "parse_limits": "select",
    "pick_point": "select",
    "read_point": "points",
    "read_points": "points",
    "to_dataframe": "front",
    "write_front_files": "plots",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
