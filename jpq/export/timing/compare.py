"""What compression brought in time: a run's model beside the one that it began with, in turns, in one process.

| model           | what it is                                                                            |
|-----------------|---------------------------------------------------------------------------------------|
| fp32            | the model that the run began with, in floating point                                    |
| fp32, pruned    | the same channels as the compressed one, no quantizers (masks inside layers drop no work) |
| int8            | all channels, every layer at 8 bits, exported as the compressed model is                  |
| compressed      | the run's model.onnx                                                                      |

Weights do not matter for time: the first three have those of a fresh model.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from jpq.export.onnx import export
from jpq.export.rebuild import build
from jpq.export.timing.runner import OpenVinoRunner, Runner, float_layers, take_turns
from jpq.export.unconstrained.select import insert
from jpq.methods.quantizers import IntegerQuantizer
from jpq.plan import EndPlan, LayerPlan, Plan, read
from jpq.tasks import models
from jpq.tracing.decompose import decompose
from jpq.tracing.shrink import apply_slices

FULL, PRUNED, INT8, SMALL = "fp32", "fp32, pruned", "int8", "compressed"


@dataclass(frozen=True)
class Timing:
    """How long one model takes in one setting."""

    model: str
    runtime: str
    threads: int
    batch: int
    median_ms: float
    p95_ms: float
    least_ms: float
    over_full: float  # how many times as fast as fp32: the median of the rounds' ratios
    float_layers: int  # layers that onnxruntime computes in floating point
    layers: int
    bytes: int  # of the file
    n: int


def model_files(run: Path, shape: Sequence[int], folder: Path, run_code: bool = False) -> dict[str, Path]:
    """The four models of a run as ONNX files, three of them written into `folder`; `run_code`: see `models.of_plan`.

    `shape`: one sample without the batch. Raises JpqError where the run's plan does not say which model it belongs to.
    """
    source = run / "plan.json"
    plan = read(source)
    made = models.of_plan(plan, source, run / "model.safetensors", run_code)
    return {**reference_models(decompose(made).eval(), plan, shape, folder), SMALL: run / "model.onnx"}


def reference_models(dense: nn.Module, plan: Plan, shape: Sequence[int], folder: Path) -> dict[str, Path]:
    """The float model, the pruned float model, and the int8 model that a compressed one is compared with."""
    example = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    pruned = insert(apply_slices(copy.deepcopy(dense), plan.slices), plan.selects)
    wide = {name: LayerPlan(8, 8, layer.signed) for name, layer in plan.layers.items()}
    ends = {name: EndPlan(8, end.signed) for name, end in plan.ends.items()}
    int8 = build(Plan("int8", wide, {}, ends=ends), dense)
    grids = [m for m in int8.modules() if isinstance(m, IntegerQuantizer)]
    for i, grid in enumerate(grids):  # no two alike: a runtime would merge them
        grid.log_threshold.data.fill_(i / len(grids))
    paths = {name: folder / f"{i}.onnx" for i, name in enumerate((FULL, PRUNED, INT8))}
    export.export_float(dense, example, paths[FULL])
    export.export_float(pruned.eval(), example, paths[PRUNED])
    export.export(int8, example, paths[INT8])
    return paths


def time_in_turns(
    paths: dict[str, Path],
    runtimes: Sequence[str],
    threads: Sequence[int],
    batches: Sequence[int],
    rounds: int,
    tell: Callable[[int], None] = lambda calls: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Every model in every setting. Within a round all take a turn, so that a slow moment hits all alike."""
    left = {name: float_layers(path) for name, path in paths.items()}
    found = []
    for runtime in runtimes:
        for count in threads:
            for batch in batches:
                runner = Runner if runtime == "onnxruntime" else OpenVinoRunner
                seconds = take_turns([runner(path, count, batch) for path in paths.values()], rounds, tell, clock)
                for own, (name, path) in zip(1e3 * seconds, paths.items(), strict=True):
                    integer, floating = left[name]
                    found.append(
                        Timing(
                            name,
                            runtime,
                            count,
                            batch,
                            float(np.median(own)),
                            float(np.percentile(own, 95)),
                            float(own.min()),
                            float(np.median(1e3 * seconds[0] / own)),
                            len(floating),
                            integer + len(floating),
                            path.stat().st_size,
                            rounds,
                        )
                    )
    return found
