"""Files and reports of runs: written, read back, made final; several runs as one front."""

from typing import TYPE_CHECKING

from jpq.lazy import lazy_names

if TYPE_CHECKING:
    from jpq.results.finalize import is_final
    from jpq.results.finish import with_branches
    from jpq.results.formatting import format_duration, format_metric, format_ms, format_number, format_percent
    from jpq.results.predicted_latency import predicted_ms
    from jpq.results.record import UNREAD, BudgetRecord, LayerRecord, ModelMetrics, Result
    from jpq.results.run_folder import load, read_run, write_run

__all__ = [
    "UNREAD",
    "BudgetRecord",
    "LayerRecord",
    "ModelMetrics",
    "Result",
    "format_duration",
    "format_metric",
    "format_ms",
    "format_number",
    "format_percent",
    "is_final",
    "load",
    "predicted_ms",
    "read_run",
    "with_branches",
    "write_run",
]

_HOMES = {
    "BudgetRecord": "record",
    "LayerRecord": "record",
    "ModelMetrics": "record",
    "Result": "record",
    "UNREAD": "record",
    "format_duration": "formatting",
    "format_metric": "formatting",
    "format_ms": "formatting",
    "format_number": "formatting",
    "format_percent": "formatting",
    "is_final": "finalize",
    "load": "run_folder",
    "predicted_ms": "predicted_latency",
    "read_run": "run_folder",
    "with_branches": "finish",
    "write_run": "run_folder",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
