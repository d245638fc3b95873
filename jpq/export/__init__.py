"""The small model and its files: rebuild, verify, write file formats, measure times.

`rebuild` and `verify` are modules here; the functions of these names are `jpq.rebuild` and `jpq.verify`.
"""

from typing import TYPE_CHECKING

from jpq.lazy import lazy_names

if TYPE_CHECKING:
    from jpq.export.branches import Branches, split_into_branches
    from jpq.export.count import measure
    from jpq.export.float_equivalence import (
        EquivalenceResult,
        check_equivalence,
        float64_outputs,
        randomize,
        relative_difference,
    )
    from jpq.export.formats import FORMATS, Format
    from jpq.export.formats import write as write_formats
    from jpq.export.rebuild import build_from_plan, complete_plan
    from jpq.export.runtimes import RUNTIMES, OpenVinoSession, Session, open_session, parse_runtimes
    from jpq.export.torch_export import export_pt2
    from jpq.export.verify import compare, difference

__all__ = [
    "FORMATS",
    "RUNTIMES",
    "Branches",
    "EquivalenceResult",
    "Format",
    "OpenVinoSession",
    "Session",
    "build_from_plan",
    "check_equivalence",
    "compare",
    "complete_plan",
    "difference",
    "export_pt2",
    "float64_outputs",
    "measure",
    "open_session",
    "parse_runtimes",
    "randomize",
    "relative_difference",
    "split_into_branches",
    "write_formats",
]

_HOMES = {
    "FORMATS": "formats",
    "RUNTIMES": "runtimes",
    "Branches": "branches",
    "EquivalenceResult": "float_equivalence",
    "Format": "formats",
    "OpenVinoSession": "runtimes",
    "Session": "runtimes",
    "build_from_plan": "rebuild",
    "check_equivalence": "float_equivalence",
    "compare": "verify",
    "complete_plan": "rebuild",
    "difference": "verify",
    "export_pt2": "torch_export",
    "float64_outputs": "float_equivalence",
    "measure": "count",
    "open_session": "runtimes",
    "parse_runtimes": "runtimes",
    "randomize": "float_equivalence",
    "relative_difference": "float_equivalence",
    "split_into_branches": "branches",
    "write_formats": "formats:write",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
