"""ONNX export (QCDQ and QONNX) and the rewrites that let runtimes compute in integers."""

from jpq.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, {})
