"""ONNX export (QCDQ and QONNX), and the rewrites that let runtimes compute in integers."""

from typing import TYPE_CHECKING

from jpq.lazy import lazy_names

if TYPE_CHECKING:
    from jpq.export.onnx.export import export_float, export_onnx, export_qonnx
    from jpq.export.onnx.metadata import read_metadata
    from jpq.export.onnx.narrow_weights import WEIGHTS
    from jpq.export.onnx.quant_nodes import expand_quant_nodes

__all__ = [
    "WEIGHTS",
    "expand_quant_nodes",
    "export_float",
    "export_onnx",
    "export_qonnx",
    "read_metadata",
]

_HOMES = {
    "WEIGHTS": "narrow_weights",
    "expand_quant_nodes": "quant_nodes",
    "export_float": "export",
    "export_onnx": "export",
    "export_qonnx": "export",
    "read_metadata": "metadata",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
