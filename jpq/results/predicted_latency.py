"""The latency of a finished run's model as a table of measured layers predicts it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jpq import costs
from jpq.allocation.prepare import prepare
from jpq.compression.usage import Densities, exact_usage
from jpq.config import Budget, read_toml
from jpq.costs.latency import NS
from jpq.costs.latency_table import LatencyTable
from jpq.export.timing.runner import Runner
from jpq.plan import read
from jpq.tasks import models
from jpq.tracing.channel_shares import ChannelShares
from jpq.tracing.decompose import decompose
from jpq.tracing.routes import apply_routes


def predicted_ms(folder: str | Path, table: LatencyTable, run_code: bool = False) -> float:
    """Milliseconds for one sample of the model in a run's folder, by a table of its layers.

    Args:
        folder: of a finished run.
        table: measured layers of the same model.
        run_code: whether code that the folder names as its model may be run.
    """
    folder = Path(folder)
    plan = read(folder / "plan.json")
    dense = models.of_plan(plan, folder / "plan.json", folder / "model.safetensors", run_code)
    model = apply_routes(decompose(dense), plan.routes)
    example = Runner(folder / "model.onnx").two_samples()
    decide = replace(read_toml(folder / "config.toml").decide, mask=None)  # the plan holds the mask
    prepared = prepare(model, example, decide, Budget(), table=table, structures=plan.structures or None)
    shares = ChannelShares(prepared.network, [s for s in prepared.sites if not s.is_mask])
    densities = Densities(prepared.network, prepared.sites)
    return float(costs.latency_ns(exact_usage(prepared.network, shares, plan, densities))) / NS
