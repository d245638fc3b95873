"""Times of a compressed model beside its fp32, pruned fp32 and int8 counterparts, in turns, in one process.

| name            | model                                                                                   |
|-----------------|-----------------------------------------------------------------------------------------|
| fp32            | the model that the run began with, in floating point                                    |
| fp32, pruned    | the same channels as the compressed one, no quantizers (masks inside layers drop no work) |
| int8            | all channels, every layer at 8 bits, exported like the compressed model                   |
| compressed      | the run's model.onnx                                                                      |

Weights do not matter for time: the first three have those of a fresh model, unless the run's float model is given. Then
"fp32" computes what that does, and "int8" rounds it with ranges fitted to batches, without training; "fp32, pruned" has
nothing but a time, since its weights were never trained without quantizers.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jpq.compression.calibration import observe_modules
from jpq.export.onnx.export import export_float, export_onnx
from jpq.export.packed.batchnorm_folding import fold_batchnorms
from jpq.export.rebuild import build_from_plan
from jpq.export.timing.kernels import find_float_layers
from jpq.export.timing.runner import OpenVinoRunner, Runner, take_turns
from jpq.export.unconstrained.select import insert_selects
from jpq.methods.quantizers import (
    IntegerQuantizer,
    act_quantizer,
    fit_threshold,
    result_quantizer,
    weight_quantizer,
)
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


def model_files(
    run: str | Path,
    shape: Sequence[int],
    folder: str | Path,
    run_code: bool = False,
    trained: nn.Module | None = None,
    batches: Sequence[Any] = (),
) -> dict[str, Path]:
    """Paths of a run's four models as ONNX files, three of them written into `folder`.

    Args:
        run: the run's folder.
        shape: of one sample, without the batch.
        folder: for the files.
        run_code: see `models.of_plan`.
        trained: the float model of the run, in plain layers; None: a fresh one, of the plan's name.
        batches: see `reference_models`.

    Raises JpqError where the run's plan does not say which model it belongs to.
    """
    run = Path(run)
    folder = Path(folder)
    source = run / "plan.json"
    plan = read(source)
    dense = trained or decompose(models.of_plan(plan, source, run / "model.safetensors", run_code))
    dense = apply_routes(dense.eval(), plan.routes)
    return {**reference_models(dense, plan, shape, folder, batches), SMALL: run / "model.onnx"}


def reference_models(
    dense: nn.Module, plan: Plan, shape: Sequence[int], folder: str | Path, batches: Sequence[Any] = ()
) -> dict[str, Path]:
    """Write the float, the pruned float and the int8 model that a compressed one is compared with; returns paths.

    Args:
        dense: the float model, in plain layers.
        plan: of the compressed one.
        shape: of one sample, without the batch; not needed with batches.
        folder: for the files.
        batches: inputs, as `call_model` takes them, to which the int8 ranges are fitted; (): those are arbitrary,
            and the input is one tensor of real numbers.
    """
    folder = Path(folder)
    example = batches[0] if batches else torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    pruned = insert_selects(apply_slices(copy.deepcopy(dense), plan.slices), plan.selects)
    int8_layers = {name: LayerPlan(8, 8, layer.signed) for name, layer in plan.layers.items()}
    ends = {name: EndPlan(8, end.signed) for name, end in plan.ends.items()}
    int8 = build_from_plan(Plan("int8", int8_layers, {}, ends=ends), dense)
    grids = [m for m in int8.modules() if isinstance(m, IntegerQuantizer)]
    for i, grid in enumerate(grids):  # no two alike: a runtime would merge them
        grid.log_threshold.data.fill_(i / len(grids))
    if batches:
        _fit_ranges(int8, dense, plan, batches)
    paths = {name: folder / f"{i}.onnx" for i, name in enumerate((FULL, PRUNED, INT8))}
    export_float(dense, example, paths[FULL])
    export_float(pruned.eval(), example, paths[PRUNED])
    export_onnx(fold_batchnorms(int8, example), example, paths[INT8])
    return paths


@torch.no_grad()
def _fit_ranges(int8: nn.Module, dense: nn.Module, plan: Plan, batches: Sequence[Any]) -> None:
    """Fit the ranges of the int8 model's weights, inputs and rounded outputs to what the float model computes."""
    inputs = observe_modules(dense, {name: name for name in plan.layers}, batches, before=True)
    outputs = observe_modules(dense, {name: name for name in plan.ends}, batches, before=False)
    for name, layer in plan.layers.items():
        module = int8.get_submodule(name)
        weight: Any = module.weight
        _set_range(weight_quantizer(module), weight, per_channel=True)
        if name in inputs:
            _set_range(act_quantizer(module), inputs[name], signed=layer.signed)
    for name, samples in outputs.items():
        grid = result_quantizer(int8.get_submodule(name))
        if grid is not None:
            _set_range(grid, samples, signed=plan.ends[name].signed)


def _set_range(grid: IntegerQuantizer, values: Tensor, signed: bool = True, per_channel: bool = False) -> None:
    """Give a quantizer of 8 bits the range with the least squared error on some values."""
    per_channel = per_channel and grid.log_threshold.dim() > 0
    threshold = fit_threshold(values, 8, signed, per_channel).clamp_min(1e-8)
    grid.log_threshold.copy_(threshold.log().reshape(grid.log_threshold.shape))


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
