"""Measured times of models and layers in onnxruntime and OpenVINO, and tables of layer latencies."""

from typing import TYPE_CHECKING

from jpq.lazy import lazy_names

if TYPE_CHECKING:
    from jpq.export.timing.compare import (
        FULL,
        INT8,
        PRUNED,
        SMALL,
        Timing,
        model_files,
        reference_models,
        time_in_turns,
    )
    from jpq.export.timing.kernels import count_kernels, find_float_layers
    from jpq.export.timing.layer_model import empty_model
    from jpq.export.timing.layer_table import (
        compare_with_prediction,
        dense_latency_ms,
        measure_layers,
        read_table,
        time_model,
        write_table,
    )
    from jpq.export.timing.runner import OpenVinoRunner, Runner, describe_hardware, take_turns

__all__ = [
    "FULL",
    "INT8",
    "PRUNED",
    "SMALL",
    "OpenVinoRunner",
    "Runner",
    "Timing",
    "compare_with_prediction",
    "count_kernels",
    "dense_latency_ms",
    "describe_hardware",
    "empty_model",
    "find_float_layers",
    "measure_layers",
    "model_files",
    "read_table",
    "reference_models",
    "take_turns",
    "time_in_turns",
    "time_model",
    "write_table",
]

_HOMES = {
    "FULL": "compare",
    "INT8": "compare",
    "OpenVinoRunner": "runner",
    "PRUNED": "compare",
    "Runner": "runner",
    "SMALL": "compare",
    "Timing": "compare",
    "compare_with_prediction": "layer_table",
    "count_kernels": "kernels",
    "dense_latency_ms": "layer_table",
    "describe_hardware": "runner",
    "empty_model": "layer_model",
    "find_float_layers": "kernels",
    "measure_layers": "layer_table",
    "model_files": "compare",
    "read_table": "layer_table",
    "reference_models": "compare",
    "take_turns": "runner",
    "time_in_turns": "compare",
    "time_model": "layer_table",
    "write_table": "layer_table",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
