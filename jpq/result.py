"""What a run found, as plain data: the one record that tables, plots, JSON and the screen are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jpq.types import DENSE

Numbers = dict[str, dict[str, float]]  # of what -> name -> number
UNREAD = math.nan  # accuracy on a test split that was not read


@dataclass(frozen=True)
class Row:
    """One epoch of one phase, a line of history.csv."""

    phase: str  # "float" | "search" | "fine-tune"
    epoch: int  # from 1, within the phase
    epochs: int  # of the phase
    loss: float  # mean training loss
    accuracy: float  # held-out, in [0, 1]
    bops: float  # of the decisions as they stand, rounded to whole bits and units; nan before quantizers exist
    bops_share: float  # of the fp32 model, in [0, 1]
    aim_share: float  # the ramped target that the controller follows, same unit
    pressure: float  # multiplier of log(cost / target)
    w_bits: float  # mean over layers
    a_bits: float
    kept: float  # share of units kept; of weights, where masks lie inside layers
    lr: float
    seconds: float  # since the run began
    budget: str = ""  # which of several budgets the phase is for

    @property
    def title(self) -> str:
        """What the screen calls the phase."""
        return f"{self.phase} {self.budget}".strip()


@dataclass(frozen=True)
class LayerRow:
    """One layer of the compressed model, a line of layers.csv."""

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
    share: float  # of the compressed model's BOPs
    density: float = 1.0  # share of the layer's weights that its mask keeps
    structure: str = DENSE  # what the units of its mask are
    latency_ms: float | None = None  # predicted, where a table of measured layers was given
    macs_all: int | None = None  # with nothing dropped


@dataclass(frozen=True)
class Figures:
    """How good, and how dear, one model is."""

    accuracy: float  # on the test split, in [0, 1]; UNREAD where the run is not final
    bops: int
    macs: int
    size_bytes: int  # weights at their bit-widths, biases and scales at 32 bits
    bops_share: float  # of the fp32 model
    bops_structured: int = 0  # with weights that an elementwise mask drops counted as work
    latency_ms: float | None = None  # predicted, where a table of measured layers was given


@dataclass(frozen=True)
class FrontRow:
    """One of several budgets of a run, a line of front.csv."""

    budget: str  # as asked for
    accuracy: float  # on the test split, in [0, 1]; UNREAD where the run is not final
    held_out: float
    bops: int
    bops_share: float  # of the fp32 model
    macs: int
    size_bytes: int
    seconds: float  # from the run's beginning to this model's end
    folder: str  # inside the run's


@dataclass(frozen=True)
class Result:
    """The outcome of one run."""

    folder: Path
    method: str
    float: Figures
    compressed: Figures
    held_out: dict[str, Any]  # held-out accuracy of both
    targets: dict[str, Any]  # target name -> {"asked", "limit", "reached", "used"}; and "note" where < 97 % is used
    layers: tuple[LayerRow, ...]
    history: tuple[Row, ...]
    seconds: dict[str, Any]  # phase -> seconds, "total"
    command: str
    versions: dict[str, str]
    seed: int
    notes: tuple[str, ...] = field(default=())
    verified: dict[str, Any] = field(default_factory=dict)  # what was compared, and what came out
    metrics: Numbers = field(default_factory=dict)  # site -> what its gate said at landing
    latency: dict[str, Any] = field(default_factory=dict)  # model.onnx: predicted_ms, measured_ms, their ratio ...
    export: dict[str, Any] = field(default_factory=dict)  # opset, type of weights, forms, layers left in float
    packed: dict[str, int] = field(default_factory=dict)  # bytes of model.packed: total, header, promised, others
    schemes: dict[str, Any] = field(default_factory=dict)  # who mapped them, ms, and where those are from (jpq.mapping)
    data: dict[str, Any] = field(default_factory=dict)  # name, checksum, sizes of the splits
    machine: dict[str, Any] = field(default_factory=dict)  # platform, device, threads, peak memory
    uniform: Numbers = field(default_factory=dict)  # "W4A4" -> what the whole model costs at these bits, by measure
    final: bool = True  # exported, verified and measured on the test split; else one of a study's trials
    front: tuple[FrontRow, ...] = ()  # every budget of a run that followed several down; this result is the last one's


class Watch(Protocol):
    """Somebody who watches a run: the progress display, or nobody."""

    def phase(self, name: str, epochs: int, steps: int) -> None:
        """A phase of so many epochs of so many steps begins (epochs 0: a phase without epochs, such as verify)."""

    def step(self, loss: float, bops_share: float, aim_share: float) -> None:
        """One optimisation step is done."""

    def epoch(self, row: Row) -> None:
        """One epoch is done."""


class Silent:
    """Nobody watches."""

    def phase(self, name: str, epochs: int, steps: int) -> None:
        """Ignore it."""

    def step(self, loss: float, bops_share: float, aim_share: float) -> None:
        """Ignore it."""

    def epoch(self, row: Row) -> None:
        """Ignore it."""


Say = Callable[[str], None]


def human(number: float, unit: str = "") -> str:
    """A number with three digits and a decimal prefix: 12300000 is "12.3 M", and 50100 of unit "B" is "50.1 KB"."""
    if not math.isfinite(number):
        return "-"
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= 0.9995 * scale:
            value = number / scale
            digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
            return f"{value:.{digits}f} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def percent(share: float) -> str:
    """A share in [0, 1] as text: 0.0098 is "0.98 %"."""
    if not math.isfinite(share):
        return "-"
    value = 100 * share
    return f"{value:.2f} %" if abs(value) >= 0.1 or value == 0 else f"{value:.2g} %"
