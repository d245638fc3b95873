"""Compression inside the user's own training loop: `compress`, then `pressure`, `step` and `finalize`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from jpq.allocation import two_stage
from jpq.allocation.allocators import PlanEvaluator
from jpq.allocation.prepare import Prepared, check_decide, prepare
from jpq.allocation.ranking.evidence import Batches
from jpq.allocation.ranking.scheduled_pruning import ScheduledPruning
from jpq.compression import discretize, session_state
from jpq.compression.calibration import recalibrate
from jpq.compression.float_work import float_work_warning
from jpq.compression.model import CompressedModel, Trainable
from jpq.compression.power_of_two_steps import round_activation_steps
from jpq.config import SEARCH, Budget, Config, Decide, Task
from jpq.costs import COSTS, baseline
from jpq.costs.latency_table import LatencyTable
from jpq.costs.target import Controller
from jpq.export.exact_steps import round_weight_steps
from jpq.export.origin import note_origin
from jpq.export.rebuild import rebuild
from jpq.files.paths import find_run
from jpq.methods.schedules import pick_schedule
from jpq.plan import Plan, from_json
from jpq.tracing.decompose import decompose
from jpq.training.loop import pressure
from jpq.training.loop_use import LoopUse
from jpq.types import JpqError, unknown

if TYPE_CHECKING:
    from typing_extensions import Unpack

TARGETS = {"bops": "target_bops", "macs": "target_macs", "size": "target_size", "latency": "target_latency"}


@contextmanager
def _shortcut_names() -> Iterator[None]:
    """Errors name targets as `compress` takes them: `bops="1%"`, where a config has `target_bops`."""
    try:
        yield
    except JpqError as error:
        error.parameters = {field: name for name, field in TARGETS.items()}
        raise


class SecondStage:
    """The second stage of a two-stage method, still to begin: the network, its plan, batches of inputs."""

    def __init__(self, net: CompressedModel, plan: Plan, batches: list[Any]):
        self.net, self.plan, self.batches = net, plan, batches

    def __call__(self) -> None:
        """Begin the stage: freeze the plan with its bits."""
        two_stage.start_second_stage(self.net, self.plan, self.batches)


class CompressionSession(nn.Module):
    """A model under compression in a loop of the user's: call it, add `pressure()` to the loss, call `step()`.

    Made by `compress`. The search lasts `steps` optimiser steps; the budget is reached before it ends.

    With a bi-level method (`dais`) steps alternate by themselves: in one only the weights get gradients, in the next
    only the decisions, and `turn` says which. Split the training samples into two fixed halves (`Batches.halves`, or
    by index) and take each batch from the half of `turn`; use a single optimiser that leaves parameters without a
    gradient alone, as torch's do after `zero_grad()`.
    """

    def __init__(
        self,
        net: CompressedModel,
        model: nn.Module,
        controller: Controller | None,
        steps: int,
        gate_weight: float,
        second_stage: SecondStage | None = None,
        recalibrate: Callable[[], None] | None = None,
        example: Any = None,
    ):
        super().__init__()
        self.net = net
        self._dense = [model]  # in a list: it is not part of what trains
        self.controller, self.steps, self.gate_weight = controller, steps, gate_weight
        self.recalibrate = recalibrate  # fits ranges anew when the search has ended
        self.second_stage = second_stage  # quantizes the pruned network of a two-stage method
        self.done = 0
        self.use = LoopUse()
        self._example = example
        self._settings: Mapping[str, Any] = {"settings": {}, "layers": {}}  # which a state that is loaded must have

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Output of the model under the decisions as they stand."""
        if self.training:
            self.net.set_trainable(self.turn)
            self.use.passes += torch.is_grad_enabled()
        return self.net(*args, **kwargs)

    @property
    def progress(self) -> float:
        """Position in the search, in [0, 1]."""
        return min(1.0, self.done / self.steps)

    @property
    def turn(self) -> Trainable:
        """The parameters that learn from the next batch: "both"; if bi-level, "weights" and "decisions" in turn."""
        if self.controller is None or not self.net.bilevel:
            return "both"
        return "decisions" if self.done % 2 else "weights"

    def groups(
        self, lr: float = 1e-3, gate_lr: float = 0.05, bit_lr: float = 0.02, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser (Adam's kind); decisions need larger rates than weights."""
        weights, decisions = self.net.weights(), self.net.decisions()
        groups = [
            {"params": weights["decayed"], "lr": lr, "weight_decay": weight_decay},
            {"params": weights["plain"], "lr": lr, "weight_decay": 0.0},
            {"params": decisions["gates"], "lr": gate_lr, "weight_decay": 0.0},
            {"params": decisions["bits"], "lr": bit_lr, "weight_decay": 0.0},
        ]
        return [g for g in groups if g["params"]]

    def pressure(self) -> Tensor:
        """The term of budget and gates in the loss, a scalar; 0 once discretized, and where only weights learn."""
        self.use.pressures += 1
        if self.controller is None or self.turn == "weights":
            return torch.zeros((), device=next(self.parameters()).device)
        return pressure(self.net, self.controller, self.progress, self.gate_weight)

    def step(self) -> None:
        """Advance the search; call it after every `optimizer.step()`."""
        self.net.after_step(self.progress)
        self.done += 1
        self.use.steps += 1

    def get_extra_state(self) -> Tensor:
        """What `state_dict` holds beside the tensors: settings, progress, multipliers, decisions; bytes, uint8."""
        searching = self.controller is not None
        return session_state.encode(
            {
                "done": self.done,
                "searching": searching,
                "controller": None if self.controller is None else self.controller.state(),
                "plan": None if searching else self.net.plan().to_json(),
                "second_plan": None if self.second_stage is None else self.second_stage.plan.to_json(),
                **self._settings,
            }
        )

    def set_extra_state(self, state: Any) -> None:
        """Continue from a state of `get_extra_state`; `load_state_dict` calls this before it loads the tensors.

        A state that was saved after `discretize` discretizes this session too. Raises JpqError for a state of other
        settings or of another network, and for one from before `discretize` where this session is past it.
        """
        record = session_state.decode(state)
        session_state.check_same_settings(record, self._settings)
        searching, pending = record["searching"], record["second_plan"] is not None
        if (searching and self.controller is None) or (pending and self.second_stage is None):
            raise JpqError(
                "The state dict was saved before discretize(), and this session has been discretized: load it into a "
                "new session of the same settings."
            )
        if searching and self.controller is not None:
            try:
                self.controller.restore(record["controller"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise JpqError(f"The state dict is of a session with other targets ({error}).") from error
        elif self.controller is not None or (self.second_stage is not None and not pending):
            self.net.freeze(from_json(record["plan"], "the state dict"))
            self.controller = self.recalibrate = self.second_stage = None
        if self.second_stage is not None:
            self.second_stage.plan = from_json(record["second_plan"], "the state dict")
        self.done = record["done"]

    def share(self, cost: str = "bops") -> float:
        """Cost of the decisions as they stand over the fp32 model's."""

        uses = self.net.exact_usage()
        return float(COSTS[cost](uses)) / baseline(uses)[cost]

    @_shortcut_names()
    def discretize(self) -> Plan:
        """Discretize the decisions within the budget, for good; go on training with a new optimiser to fine-tune.

        Warns where the loop has not called `step` or `pressure`, or ends before the search does.
        """
        if self.controller is not None:
            for text in self.use.describe_mistakes(self.done, self.steps):
                warnings.warn(text, UserWarning, stacklevel=3)
            self.net.finish_search()
            plan = discretize.discretize(self.net, self.controller.targets)
            if self.recalibrate is not None:
                self.recalibrate()
            self.net.freeze(plan)
            round_activation_steps(self.net)
            self.controller, self.recalibrate = None, None
        if self.second_stage is not None:
            self.second_stage()
            round_activation_steps(self.net)
            self.second_stage = None
        return self.net.plan()

    def finalize(self) -> nn.Module:
        """The small model: an ordinary module in eval mode, physically smaller, with brevitas layers.

        It computes what this one does, unless averages were opened (`open_norms`): then go on training it. Otherwise
        training ends here: norms are folded, and steps and biases rounded so that files compute the same numbers
        (jpq/export/exact_steps.py), in this model too.
        """
        self.discretize()
        self.net.eval()
        if not self.net.opened and self._example is not None:
            round_weight_steps(self.net.model, self._example)
        small, plan = rebuild(self.net, self._dense[0])
        settings = self._settings["settings"]
        budget = {name: settings[field] for name, field in TARGETS.items() if settings.get(field)}
        note_origin(small, plan, self._example, {"budget": budget})
        return small


class Shortcuts(TypedDict, total=False):
    """Settings of `Budget` and `Decide` that `compress` takes as keywords; `jpq optimize --help` explains each."""

    bops: str | None
    macs: str | None
    size: str | None
    latency: str | None
    cost: str
    score: str
    schedule: str
    classes: str
    allocator: str
    w_bits: tuple[int, int]
    a_bits: tuple[int, int]
    image_bits: int
    output_bits: int
    channel_multiple: int | None
    structure: str
    width: str
    density: float
    bits: str | None
    densities: str | None
    skip: Collection[str]
    mask: str | Path | None
    open_norms: bool
    gate_weight: float


@_shortcut_names()
def compress(
    model: nn.Module,
    example_inputs: Any,
    method: str | None = None,
    *,
    decide: Decide | None = None,
    budget: Budget | None = None,
    steps: int = 1000,
    evidence: Batches | None = None,
    table: LatencyTable | None = None,
    **shortcuts: Unpack[Shortcuts],
) -> CompressionSession:
    """Make a trainable copy of a trained `model`, with gates and quantizers, that will meet its budget.

    Args:
        model: trained, in floating point; it is not changed.
        example_inputs: one real batch (a tensor, a tuple of positional arguments, or a dict of keywords): it fits the
            ranges of the quantizers too.
        method: a name in METHODS; default: that of `decide`, "djpq". With "two-stage" train the pruned network first;
            `discretize` then quantizes it.
        decide: how decisions are taken, the settings of `jpq optimize`; default: all of them at their defaults.
        budget: the targets, one value each.
        steps: optimiser steps that the search may take.
        evidence: training batches for scores that look at data, (inputs, classes) pairs, iterated at each decision
            (a list, a DataLoader); default: the example inputs, without classes.
        table: measured layers for a target of latency (`jpq.export.timing.read_table`).
        shortcuts: targets (`bops="1%"`, `macs`, `size`, `latency`, and `cost`) and fields of `Decide` by name
            (`w_bits=(2, 8)`, `density=0.5`, `skip=["fc"]` ...), in place of whole sections.

    Raises JpqError for unknown names, for what does not go together (`jpq.methods.compatibility.incompatibility`), and
    for targets that are malformed or cannot be met.
    """
    if isinstance(example_inputs, list):
        example_inputs = tuple(example_inputs)
    if table is not None and not isinstance(table, LatencyTable):
        raise JpqError("table must be a LatencyTable: read one with jpq.export.timing.read_table(Path(...)).")
    decide, budget = _sections(method, decide or Decide(), budget or Budget(), dict(shortcuts), table)
    example = example_inputs if isinstance(example_inputs, (tuple, dict)) else (example_inputs,)
    model = decompose(model, example)
    prepared = prepare(model, example, decide, budget, table=table)
    net = prepared.attach(model, [example_inputs])
    if text := float_work_warning(net):
        warnings.warn(text, stacklevel=2)
    steps = max(1, steps)
    settings = session_state.describe_settings(net, decide, budget, steps)
    batches = [(example_inputs, None)] if evidence is None else evidence
    if prepared.procedure.searches:
        fit_ranges = partial(recalibrate, net, [example_inputs])
        session = _start_search(prepared, net, model, batches, steps, fit_ranges, example_inputs)
        session._settings = settings
        return session
    plan = prepared.procedure.decide(net, prepared.targets, decide, PlanEvaluator(lambda: batches))
    stage_plan = prepared.procedure.first_stage(net, plan)
    net.freeze(plan if stage_plan is None else stage_plan)
    second_stage = None if stage_plan is None else SecondStage(net, plan, [example_inputs])
    if stage_plan is None:
        round_activation_steps(net)
    session = CompressionSession(net, model, None, steps, 0.0, second_stage, example=example_inputs)
    session._settings = settings
    return session


def _start_search(
    prepared: Prepared,
    net: CompressedModel,
    model: nn.Module,
    batches: Batches,
    steps: int,
    fit_ranges: Callable[[], None],
    example: Any,
) -> CompressionSession:
    """A session whose decisions are learned, with its controller, and its schedule where a ranking closes channels."""
    decide = prepared.decide
    discretize.check_reachable(net, prepared.targets)
    if prepared.method.score:
        schedule = pick_schedule(prepared.method.schedule)
        net.scheduled_pruning = ScheduledPruning(net, prepared.score, schedule, decide.density, _SameBatches(batches))
        net.scheduled_pruning(0.0)
    controller = Controller(prepared.targets)
    controller.begin(net.exact_usage())
    return CompressionSession(
        net, model, controller, steps, decide.gate_weight, recalibrate=fit_ranges, example=example
    )


class _SameBatches:
    """Training batches for a score: the same at every decision."""

    def __init__(self, batches: Batches):
        self.batches = batches

    def __call__(self, decision: int) -> Batches:
        return self.batches


def _sections(
    method: str | None, decide: Decide, budget: Budget, shortcuts: dict[str, Any], table: LatencyTable | None
) -> tuple[Decide, Budget]:
    """The settings with the shortcuts in their places, checked as those of a run are."""
    decide_fields = {f.name for f in fields(Decide)}
    for name, value in shortcuts.items():
        if name in TARGETS or name == "cost":
            budget = replace(budget, **{TARGETS.get(name, name): value})
        elif name in decide_fields:
            if name == "skip":
                value = tuple(value)
            elif name == "mask" and value is not None:
                value = find_run(value)
            changes: dict[str, Any] = {name: value}
            decide = replace(decide, **changes)
        else:
            raise unknown("setting of compress", name, [*TARGETS, "cost", *sorted(decide_fields)])
    if method is not None:
        decide = replace(decide, method=method)
    if not any(getattr(budget, field) for field in TARGETS.values()) and not (decide.bits or decide.densities):
        raise JpqError('No target: give bops="1%" (or "12M"), size="50KB", macs="50%" or latency="3ms".')
    if table is not None:
        budget = replace(budget, latency_table=Path(table.source))
    in_memory = Task(weights=Path("model"))  # the float model is at hand: its weights count as given
    checked = Config(task=in_memory, budget=budget, decide=decide).check()
    if decide.structure == SEARCH:
        check_decide(checked.decide)  # a method without mask structures is the first thing to report
        raise JpqError(
            'structure="search" judges mappings on held-out data, which compress has not: use jpq.optimize, '
            'or structure="rules".'
        )
    return checked.decide, checked.budget
