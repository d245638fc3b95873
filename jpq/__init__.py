"""jpq: prune and quantize a trained network together, in one loss, exactly onto a budget.

`optimize` is the whole job; `compress` is for use inside one's own training loop; the rest are the pieces.
"""

from jpq import costs, data, gates, models, quantizers, structures
from jpq.compress import Joint, compress
from jpq.config import Budget, Config
from jpq.exporters.onnx import export as export_onnx
from jpq.exporters.quantized import rebuild
from jpq.exporters.verify import measure, verify
from jpq.landing import land
from jpq.methods import METHODS
from jpq.network.attach import attach
from jpq.network.compressed import Compressed
from jpq.network.sites import channels
from jpq.network.trace import trace
from jpq.optimize import load, optimize
from jpq.plan import Plan
from jpq.train import fit
from jpq.types import JpqError

__all__ = [
    "METHODS", "Budget", "Compressed", "Config", "Joint", "JpqError", "Plan", "attach", "channels", "compress", "costs",
    "data", "export_onnx", "fit", "gates", "land", "load", "measure", "models", "optimize", "quantizers", "rebuild",
    "structures", "trace", "verify",
]  # fmt: skip
