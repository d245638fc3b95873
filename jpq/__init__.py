"""jpq: prune and quantize a trained network together, in one loss, exactly onto a budget.

`optimize` is the whole job; `compress` is for use inside one's own training loop; the rest are the pieces.
"""

from typing import TYPE_CHECKING

from jpq.lazy import lazy_names

if TYPE_CHECKING:
    from jpq.compression.attach import attach
    from jpq.compression.discretize import discretize
    from jpq.compression.model import CompressedModel
    from jpq.config import Budget, Config, Decide
    from jpq.export.count import measure
    from jpq.export.onnx.export import export_onnx
    from jpq.export.rebuild import rebuild
    from jpq.export.verify import verify
    from jpq.methods.table import METHODS
    from jpq.plan import Plan
    from jpq.recipe import optimize
    from jpq.results.front.front import front
    from jpq.results.run_folder import load
    from jpq.results.sensitivity import sensitivity
    from jpq.session import CompressionSession, compress
    from jpq.tracing.decompose import decompose
    from jpq.tracing.sites import channels
    from jpq.tracing.trace import trace
    from jpq.training.loop import fit
    from jpq.trials.accuracy_target import find_cheapest
    from jpq.trials.settings import Study
    from jpq.trials.study import study
    from jpq.types import JpqError

__all__ = [
    "METHODS",
    "Budget",
    "CompressedModel",
    "CompressionSession",
    "Config",
    "Decide",
    "JpqError",
    "Plan",
    "Study",
    "attach",
    "channels",
    "compress",
    "decompose",
    "discretize",
    "export_onnx",
    "find_cheapest",
    "fit",
    "front",
    "load",
    "measure",
    "optimize",
    "rebuild",
    "save",
    "sensitivity",
    "study",
    "trace",
    "verify",
]

_HOMES = {
    "METHODS": "methods.table",
    "Budget": "config",
    "CompressedModel": "compression.model",
    "CompressionSession": "session",
    "Config": "config",
    "Decide": "config",
    "JpqError": "types",
    "Plan": "plan",
    "Study": "trials.settings",
    "attach": "compression.attach",
    "channels": "tracing.sites",
    "compress": "session",
    "decompose": "tracing.decompose",
    "discretize": "compression.discretize",
    "export_onnx": "export.onnx.export",
    "find_cheapest": "trials.accuracy_target",
    "fit": "training.loop",
    "front": "results.front.front",
    "load": "results.run_folder",
    "measure": "export.count",
    "optimize": "recipe",
    "rebuild": "export.rebuild",
    "save": "export.saved_model",
    "sensitivity": "results.sensitivity",
    "study": "trials.study",
    "trace": "tracing.trace",
    "verify": "export.verify",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
