"""Times of a compressed model beside its fp32, pruned fp32 and int8 counterparts, in turns, in one process.

| name            | model                                                                                   |
|-----------------|-----------------------------------------------------------------------------------------|
| fp32            | the model that the run began with, in floating point                                    |
| fp32, pruned    | the same channels as the compressed one, no quantizers (masks inside layers drop no work) |
| int8            | all channels, every layer at 8 bits, exported like the compressed model                   |
| compressed      | the run's model.onnx                                                                      |

Weights do not matter for time: the first three have those of a fresh model.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import nn

from jpq.export.onnx.export import export_float, export_onnx
from jpq.export.rebuild import build_from_plan
from jpq.export.timing.kernels import find_float_layers
from jpq.export.timing.runner import OpenVinoRunner, Runner, take_turns
from jpq.export.unconstrained.select import insert_selects
from jpq.methods.quantizers import IntegerQuantizer
from jpq.plan import EndPlan, LayerPlan, Plan, read
from jpq.tasks import models
from jpq.tracing.decompose import decompose
from jpq.tracing.routes import apply_routes
from jpq.tracing.shrink import apply_slices

FULL, PRUNED, INT8, SMALL = "fp32", "fp32, pruned", "int8", "compressed"


@dataclass(frozen=True)
class Timing:
    """Measured time of one model with one runtime, thread count and batch size."""

    model: str
    runtime: str
    threads: int
    batch: int
    median_ms: float
    p95_ms: float
    least_ms: float
    over_full: float  # speed relative to fp32: median over the rounds of their ratios
    float_layers: int  # number of layers that onnxruntime computes in floating point
    layers: int  # number of all layers
    bytes: int  # size of the ONNX file
    n: int  # number of rounds


def model_files(run: str | Path, shape: Sequence[int], folder: str | Path, run_code: bool = False) -> dict[str, Path]:
    """Paths of a run's four models as ONNX files, three of them written into `folder`.

    Args:
        run: the run's folder.
        shape: of one sample, without the batch.
        folder: for the files.
        run_code: see `models.of_plan`.

    Raises JpqError where the run's plan does not say which model it belongs to.
    """
    run = Path(run)
    folder = Path(folder)
    source = run / "plan.json"
    plan = read(source)
    dense = models.of_plan(plan, source, run / "model.safetensors", run_code)
    dense = apply_routes(decompose(dense).eval(), plan.routes)
    return {**reference_models(dense, plan, shape, folder), SMALL: run / "model.onnx"}


def reference_models(dense: nn.Module, plan: Plan, shape: Sequence[int], folder: str | Path) -> dict[str, Path]:
    """Write the float, the pruned float and the int8 model that a compressed one is compared with; returns paths."""
    folder = Path(folder)
    example = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    pruned = insert_selects(apply_slices(copy.deepcopy(dense), plan.slices), plan.selects)
    int8_layers = {name: LayerPlan(8, 8, layer.signed) for name, layer in plan.layers.items()}
    ends = {name: EndPlan(8, end.signed) for name, end in plan.ends.items()}
    int8 = build_from_plan(Plan("int8", int8_layers, {}, ends=ends), dense)
    grids = [m for m in int8.modules() if isinstance(m, IntegerQuantizer)]
    for i, grid in enumerate(grids):  # no two alike: a runtime would merge them
        grid.log_threshold.data.fill_(i / len(grids))
    paths = {name: folder / f"{i}.onnx" for i, name in enumerate((FULL, PRUNED, INT8))}
    export_float(dense, example, paths[FULL])
    export_float(pruned.eval(), example, paths[PRUNED])
    export_onnx(int8, example, paths[INT8])
    return paths


def time_in_turns(
    paths: dict[str, Path],
    runtimes: Sequence[str],
    threads: Sequence[int],
    batches: Sequence[int],
    rounds: int,
    report: Callable[[int], None] = lambda calls: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time every model with every runtime, thread count and batch size; within a round each model has one turn."""
    layer_counts = {name: find_float_layers(path) for name, path in paths.items()}
    timings = []
    for runtime, thread_count, batch in product(runtimes, threads, batches):
        runner = Runner if runtime == "onnxruntime" else OpenVinoRunner
        runners = [runner(path, thread_count, batch) for path in paths.values()]
        milliseconds = 1e3 * take_turns(runners, rounds, report, clock)
        for times, (name, path) in zip(milliseconds, paths.items(), strict=True):
            integer_count, float_reasons = layer_counts[name]
            timings.append(
                Timing(
                    model=name,
                    runtime=runtime,
                    threads=thread_count,
                    batch=batch,
                    median_ms=float(np.median(times)),
                    p95_ms=float(np.percentile(times, 95)),
                    least_ms=float(times.min()),
                    over_full=float(np.median(milliseconds[0] / times)),
                    float_layers=len(float_reasons),
                    layers=integer_count + len(float_reasons),
                    bytes=path.stat().st_size,
                    n=rounds,
                )
            )
    return timings
