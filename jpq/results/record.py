"""`Result`, the record of a run as plain data, from which files, plots and screens are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jpq.results.intervals import LEVEL, is_within_noise, metric_interval
from jpq.training.history import EpochRecord
from jpq.types import DENSE

if TYPE_CHECKING:  # screens import this module, and --help shows without torch
    from jpq.tasks.base import Task

Numbers = dict[str, dict[str, float]]  # subject -> name -> number

UNREAD = math.nan  # accuracy on a test split that was not read

WARNING = "warning: "  # begins a note that is shown before all else

Say = Callable[[str], None]


@dataclass(frozen=True)
class LayerRecord:
    """One layer of the compressed model: channels, bits and costs, a line of layers.csv."""

    name: str
    kind: str
    inputs: int
    inputs_all: int
    outputs: int
    outputs_all: int
    w_bits: int
    a_bits: int
    macs: int
    bops: int
    share: float  # share of the compressed model's BOPs, in [0, 1]
    density: float = 1.0  # share of the layer's weights that its mask keeps
    structure: str = DENSE  # structure of the layer's mask
    latency_ms: float | None = None  # predicted, where a table of measured layers was given
    macs_all: int | None = None  # MACs of one sample with nothing dropped


@dataclass(frozen=True)
class ModelMetrics:
    """Test metric and costs of one model."""

    accuracy: float  # on the test split, in [0, 1]; UNREAD where the run is not final
    bops: int
    macs: int
    size_bytes: int  # weights at their bit-widths, biases and scales at 32 bits
    bops_share: float  # of the fp32 model
    bops_structured: int = 0  # with weights that an elementwise mask drops counted as work
    latency_ms: float | None = None  # predicted, where a table of measured layers was given


@dataclass(frozen=True)
class BudgetRecord:
    """Metrics and costs of one of several budgets of a run, a line of front.csv."""

    budget: str  # the amount as its flag was given
    accuracy: float  # on the test split, in [0, 1]; UNREAD where the run is not final
    held_out: float
    bops: int
    bops_share: float  # of the fp32 model
    macs: int
    size_bytes: int
    seconds: float  # since the run began
    folder: str  # folder of the budget, relative to the run's


@dataclass(frozen=True)
class Result:
    """Outcome of one run: metrics, costs, targets, layers, history, checks and files."""

    folder: Path
    method: str
    float: ModelMetrics
    compressed: ModelMetrics
    held_out: dict[str, Any]  # held-out accuracy of both
    targets: dict[str, Any]  # target name -> {"asked", "limit", "reached", "used"}; of latency "unit"
    layers: tuple[LayerRecord, ...]
    history: tuple[EpochRecord, ...]
    seconds: dict[str, Any]  # phase -> seconds, "total"
    command: str
    versions: dict[str, str]
    seed: int
    notes: tuple[str, ...] = field(default=())
    verified: dict[str, Any] = field(default_factory=dict)  # check -> its outcome
    metrics: Numbers = field(default_factory=dict)  # site -> numbers of its gate at discretization
    latency: dict[str, Any] = field(default_factory=dict)  # model.onnx: predicted_ms, measured_ms, their ratio ...
    export: dict[str, Any] = field(default_factory=dict)  # opset, type of weights, forms, layers left in float
    packed: dict[str, int] = field(default_factory=dict)  # bytes of model.packed: total, header, promised, others
    pruning: dict[str, Any] = field(default_factory=dict)  # price of closing more channels, beside that of fewer bits
    contest: dict[str, Any] = field(default_factory=dict)  # plans that were compared before training, and their cost
    schemes: dict[str, Any] = field(default_factory=dict)  # structures per layer: how chosen, modelled ms
    data: dict[str, Any] = field(default_factory=dict)  # name, checksum, sizes of the splits
    machine: dict[str, Any] = field(default_factory=dict)  # platform, device, threads, peak memory
    float_work: dict[str, Any] = field(default_factory=dict)  # what is computed at 32 bits: MACs, shares, parts
    uniform: Numbers = field(default_factory=dict)  # "W4A4" -> cost -> amount of the unpruned model
    final: bool = True  # exported, verified and measured on the test split; trials of a study are not
    front: tuple[BudgetRecord, ...] = ()  # every budget of a run with several; this result is the last one's

    @property
    def file_warnings(self) -> tuple[str, ...]:
        """Warnings that an exported file differs from its model by more than the fixed limits."""
        return tuple(
            record["warning"] for record in (self.verified.get("metric", {}), self.verified) if "warning" in record
        )

    @property
    def intervals(self) -> dict[str, Any]:
        """95 % intervals of both models' test metric, by "float" and "compressed"; empty where there is none."""
        samples, found = int(self.data.get("test", 0)), {}
        for side, figures in (("float", self.float), ("compressed", self.compressed)):
            interval = metric_interval(self.task, figures.accuracy, samples)
            if interval is not None:
                found[side] = interval
        if not found:
            return {}
        noise = is_within_noise(self.task, self.float.accuracy, self.compressed.accuracy, samples)
        return {**found, "level": LEVEL, "samples": samples, "within_noise": noise}

    @property
    def task(self) -> Task:
        """The task that the run's data are for. Raises JpqError where its name is unknown."""
        from jpq.tasks import recorded_task

        return recorded_task(self.data)

    @property
    def sample_name(self) -> str:
        """One sample of the data, in words; runs of earlier versions name those of their task."""
        return str(self.data.get("sample", self.task.sample_name))
