"""Compression inside the user's own training loop: `compress`, then `pressure`, `step` and `finalize`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from jpq.allocation import two_stage
from jpq.allocation.allocators import PlanEvaluator
from jpq.allocation.measured.calibration import Measurement
from jpq.allocation.measured.table import SensitivityTable, model_checksum, read_table
from jpq.allocation.prepare import Prepared, check_decide, prepare
from jpq.allocation.ranking.evidence import Batches, Loss, check_pairs
from jpq.allocation.ranking.scheduled_pruning import ScheduledPruning
from jpq.compression import discretize, feasibility, session_state
from jpq.compression.calibration import recalibrate
from jpq.compression.float_work import float_work_warning
from jpq.compression.model import CompressedModel, Trainable
from jpq.compression.power_of_two_steps import round_activation_steps
from jpq.config import MEASURED_START, SEARCH, Budget, Config, Decide, Task
from jpq.costs import COSTS, baseline
from jpq.costs.latency_table import LatencyTable
from jpq.costs.target import Controller, Target
from jpq.export.exact_steps import round_weight_steps
from jpq.export.origin import note_origin
from jpq.export.rebuild import rebuild
from jpq.files.paths import expand_home, find_run
from jpq.methods.schedules import pick_schedule
from jpq.plan import Plan, from_json
from jpq.tasks import CLASSIFICATION
from jpq.tasks.base import Task as MetricTask
from jpq.tracing.decompose import decompose
from jpq.tracing.forward import call_on_copies
from jpq.training.distillation import distill
from jpq.training.loop import pressure
from jpq.training.loop_use import LoopUse
from jpq.training.measured_start import measure_start
from jpq.training.reconstruction import BlockError, reconstruct
from jpq.training.session_history import SessionHistory
from jpq.types import JpqError, unknown

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from jpq.results.session_report import SessionReport

LARGEST_FACTOR = 16.0  # of a loss in a backward pass; a GradScaler multiplies by thousands

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
        two_stage.start_second_stage(self.net, self.plan, _moved(self.batches, self.net))


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
        self.targets: tuple[Target, ...] = () if controller is None else controller.targets
        self.history = SessionHistory(steps, self.targets)
        self.sensitivities: SensitivityTable | None = None  # by which discretization spends the rest, start="measured"
        self._pressed_at = -1  # step of the last `pressure()`: multipliers move once in a step
        self._example = example
        self._settings: Mapping[str, Any] = {"settings": {}, "layers": {}}  # which a state that is loaded must have

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Output of the model under the decisions as they stand."""
        if self.training:
            self.net.set_trainable(self.turn)
            self.use.passes += torch.is_grad_enabled()
        return call_on_copies(self.net, args, kwargs)

    @property
    def progress(self) -> float:
        """Position in the search, in [0, 1]."""
        return min(1.0, self.done / self.steps)

    @property
    def decided(self) -> bool:
        """Whether `discretize()` has taken all decisions, or the method took them at the start."""
        return self.controller is None and self.second_stage is None

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
        """The term of budget and gates in the loss, a scalar; 0 once discretized, and where only weights learn.

        Where gradients of k batches are accumulated, call it for each and divide it by k as the loss is. The backward
        pass raises JpqError where a GradScaler multiplies the loss and the method reads gradients itself (gdp, dhp).
        """
        self.use.pressures += 1
        if self.controller is None or self.turn == "weights":
            return torch.zeros((), device=next(self.parameters()).device)
        multipliers = dict(self.controller.pressure)
        term = pressure(self.net, self.controller, self.progress, self.gate_weight)
        if self._pressed_at == self.done:
            self.controller.pressure = multipliers
        self._pressed_at = self.done
        if term.requires_grad and any(gate.reads_gradients for gate in self.net.gates):
            term.register_hook(self._check_factor)
        return term

    def _check_factor(self, gradient: Tensor) -> None:
        """Raise JpqError in the backward pass of a loss that was multiplied, as a GradScaler does it."""
        if not abs(float(gradient)) <= LARGEST_FACTOR:
            raise JpqError(
                f"Method {self.net.method} takes gradients as they are, and this loss is multiplied by "
                f"{float(gradient):g}: leave the GradScaler out and compute in bfloat16, or choose another method."
            )

    def distill(
        self,
        output: Any,
        inputs: Any,
        temperature: float = 2.0,
        task: MetricTask = CLASSIFICATION,
        pick: Callable[[Any], Tensor] | None = None,
    ) -> Tensor:
        """Distance of an output from the float model's output for the same inputs, a scalar, to add to the loss.

        Args:
            output: what this session gave for `inputs`: a tensor, or any output with one tensor or with `logits`.
            inputs: a batch as `example_inputs` is one: a tensor, a tuple of arguments, or a dict of keywords.
            temperature: softens both outputs, where the task has probabilities.
            task: whose distillation loss is taken (`jpq.tasks.TASKS`): for classes T^2 KL, in nats.
            pick: takes the tensor to compare from an output with several.

        The float model runs in evaluation mode and without gradients. Raises JpqError where it is not clear which
        tensors to compare, and for a temperature that is not positive.
        """
        return distill(self._teacher(), output, inputs, temperature, task, pick)

    def _teacher(self) -> nn.Module:
        """The float model, on this session's device; the user's own module stays where it is."""
        device = next(self.net.parameters()).device
        if any(p.device != device for p in self._dense[0].parameters()):
            self._dense = [copy.deepcopy(self._dense[0]).to(device)]
        return self._dense[0]

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Call `step()` by itself after each step that `optimizer` takes; then the loop must not call it.

        Steps that a GradScaler skips, or that accelerate leaves out while gradients accumulate, are not counted; nor is
        a step counted twice where an optimizer is given twice.
        Raises JpqError for anything but an optimizer of torch.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise JpqError(f"follow takes an optimizer of torch, and got {type(optimizer).__name__}.")
        if getattr(optimizer, "jpq_session", None) is not self:
            optimizer.jpq_session = self  # type: ignore[attr-defined]
            optimizer.register_step_post_hook(lambda *_: self._step_of_optimizer())

    def _step_of_optimizer(self) -> None:
        self.use.followed += 1
        self.step()

    def step(self) -> None:
        """Advance the search; call it after every `optimizer.step()`."""
        self.net.after_step(self.progress)
        self.done += 1
        self.use.steps += 1
        if self.controller is not None:
            self.history.record(self.done, self.controller)

    def get_extra_state(self) -> Tensor:
        """What `state_dict` holds beside the tensors: settings, progress, history, decisions; bytes, uint8."""
        searching = self.controller is not None
        return session_state.encode(
            {
                "done": self.done,
                "history": self.history.state(),
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
        try:
            if searching and self.controller is not None:
                self.controller.restore(record["controller"])
            self.history.restore(record.get("history", ""))  # older states have none
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JpqError(f"The state dict is of a session with other targets ({error}).") from error
        if not searching and (self.controller is not None or (self.second_stage is not None and not pending)):
            self.net.freeze(from_json(record["plan"], "the state dict"))
            self.controller = self.recalibrate = self.second_stage = None
        if self.second_stage is not None:
            self.second_stage.plan = from_json(record["second_plan"], "the state dict")
        self.done, self._pressed_at = record["done"], -1

    def share(self, cost: str = "bops") -> float:
        """Cost of the decisions as they stand over the fp32 model's; `cost` is a name in `jpq.costs.COSTS`.

        Raises JpqError for another name, and for a latency without a table of latencies.
        """
        if cost not in COSTS:
            raise unknown("cost", cost, COSTS)
        uses = self.net.exact_usage()
        full = baseline(uses)
        if cost not in full:
            raise JpqError(f"The float model has no {cost} to compare with: give jpq.compress a table of latencies.")
        return float(COSTS[cost](uses)) / full[cost]

    def report(self, folder: str | Path | None = None) -> SessionReport:
        """Costs, targets, layers and the search so far, as they stand.

        Its `table` is a DataFrame, a row per layer, its `record` plain data. With a `folder` it is written there:
        layers.csv, report.json, layers.png, curves.png. Raises JpqError where the folder cannot be written.
        """
        from jpq.results.session_report import report_session, save_report

        steps = (self.done, self.steps)
        report = report_session(self.net, self.targets, steps, self.decided, self.history.rows)
        if folder is not None:
            save_report(report, expand_home(folder))
        return report

    @_shortcut_names()
    def discretize(self) -> Plan:
        """Discretize the decisions within the budget, for good; go on training with a new optimiser to fine-tune.

        Warns where the loop has not called `step` or `pressure`, or ends before the search does. Raises JpqError where
        training has made a parameter NaN.
        """
        if self.controller is not None:
            _check_numbers(self.net)
            for text in self.use.describe_mistakes(self.done, self.steps):
                warnings.warn(text, UserWarning, stacklevel=3)
            self.net.finish_search()
            plan = discretize.discretize(self.net, self.controller.targets, divergences=self.sensitivities)
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

    def reconstruct(self, batches: Batches, steps: int = 500, seed: int = 0) -> tuple[BlockError, ...]:
        """Learn the rounding of the weights block by block from inputs without labels, after `discretize()`.

        Args:
            batches: inputs as `example_inputs` is one, without labels, a few hundred samples together.
            steps: of Adam for each block, 0 or more.
            seed: of the samples of each step.

        Returns the squared error of each block's output before and after. Raises JpqError before `discretize()`,
        and for batches of another kind.
        """
        if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 0:
            raise JpqError(f"reconstruct(steps={steps!r}): give the steps for each block, a whole number, 0 or more.")
        if not self.decided:
            raise JpqError("reconstruct() rounds the weights of final decisions: call discretize() first.")
        inputs = list(batches)
        arguments = len(self._example) if _is_several(self._example) else 1
        if isinstance(batches, Tensor) or any(len(x) != arguments for x in inputs if _is_several(x)):
            raise JpqError(
                "reconstruct() takes batches of inputs as example_inputs is one, without labels: give "
                "[x for x, _ in loader]."
            )
        return reconstruct(self.net, self._teacher(), inputs, steps, seed)

    def finalize(self) -> nn.Module:
        """The small model: an ordinary module in eval mode, physically smaller, with brevitas layers.

        It computes what this one does, unless averages were opened (`open_norms`): then go on training it. Otherwise
        training ends here: norms are folded, and steps and biases rounded so that files compute the same numbers
        (jpq/export/exact_steps.py), in this model too.
        """
        self.discretize()
        self.net.eval()
        if not self.net.opened and self._example is not None:
            round_weight_steps(self.net.model, _moved(self._example, self.net))
        small, plan = rebuild(self.net, self._teacher())
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
    weight_levels: str
    image_bits: int
    output_bits: int
    channel_multiple: int | None
    structure: str
    width: str
    density: float
    bits: str | None
    densities: str | None
    skip: Collection[str]
    keep_float: Collection[str]
    mask: str | Path | None
    open_norms: bool
    gate_weight: float
    start: str
    sensitivity: Path | None


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
    task: MetricTask | None = None,
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
        steps: optimiser steps that the search may take, 1 or more.
        evidence: training batches for scores that look at data, (inputs, classes) pairs, iterated at each decision
            (a list, a DataLoader); default: the example inputs, without classes. With `method="measured"`, and with
            `start="measured"`, sensitivities are measured on them: 256 samples or more are good.
        table: measured layers for a target of latency (`jpq.export.timing.read_table`).
        task: whose distance sensitivities are measured in (`jpq.tasks.TASKS`), and whose loss scores differentiate;
            default: that of classes (distances of outputs of one column are squared errors; scores need a task there).
        shortcuts: targets (`bops="1%"`, `macs`, `size`, `latency`, and `cost`) and fields of `Decide` by name
            (`w_bits=(2, 8)`, `density=0.5`, `skip=["fc"]` ...), in place of whole sections.

    Raises JpqError for unknown names, for what does not go together (`jpq.methods.compatibility.incompatibility`), and
    for targets that are malformed or cannot be met.
    """
    if isinstance(example_inputs, list):
        example_inputs = tuple(example_inputs)
    if table is not None and not isinstance(table, LatencyTable):
        raise JpqError("table must be a LatencyTable: read one with jpq.export.timing.read_table(Path(...)).")
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise JpqError(f"steps={steps!r}: give the number of optimiser steps of the search, a whole number above 0.")
    decide, budget = _sections(method, decide or Decide(), budget or Budget(), dict(shortcuts), table)
    example = example_inputs if isinstance(example_inputs, (tuple, dict)) else (example_inputs,)
    model = decompose(model, example)
    prepared = prepare(model, example, decide, budget, table=table)
    net = prepared.attach(model, [example_inputs])
    if text := float_work_warning(net):
        warnings.warn(text, stacklevel=2)
    steps = int(steps)
    settings = session_state.describe_settings(net, decide, budget, steps)
    batches = [(example_inputs, None)] if evidence is None else evidence
    judged, loss = (CLASSIFICATION, class_loss) if task is None else (task, task.output_loss)
    measurement = Measurement(
        lambda: (x for x, _ in check_pairs(batches)),
        judged.divergence,
        model_checksum(model),
        table=None if decide.sensitivity is None else read_table(decide.sensitivity),
        source=str(decide.sensitivity),
        main_output=judged.main_output,
        task="" if task is None else task.name,
    )
    if prepared.procedure.searches:
        table_of_start = None
        if decide.start == MEASURED_START:
            found = measure_start(
                prepared, net, model, [example_inputs], batches, measurement, prepared.targets, judged
            )
            prepared, table_of_start = replace(prepared, starts=found.starts), found.table
            net = prepared.attach(model, [example_inputs])
        fit_ranges = partial(_fit_ranges, net, example_inputs)
        session = _start_search(prepared, net, model, batches, loss, steps, fit_ranges, example_inputs)
        session._settings, session.sensitivities = settings, table_of_start
        return session
    plan = prepared.procedure.decide(
        net, prepared.targets, decide, PlanEvaluator(lambda: batches, loss=loss, measurement=measurement)
    )
    stage_plan = prepared.procedure.first_stage(net, plan)
    net.freeze(plan if stage_plan is None else stage_plan)
    second_stage = None if stage_plan is None else SecondStage(net, plan, [example_inputs])
    if stage_plan is None:
        round_activation_steps(net)
    session = CompressionSession(net, model, None, steps, 0.0, second_stage, example=example_inputs)
    session._settings, session.targets = settings, prepared.targets
    return session


def _start_search(
    prepared: Prepared,
    net: CompressedModel,
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    steps: int,
    fit_ranges: Callable[[], None],
    example: Any,
) -> CompressionSession:
    """A session whose decisions are learned, with its controller, and its schedule where a ranking closes channels."""
    decide = prepared.decide
    feasibility.check_reachable(net, prepared.targets)
    if prepared.method.score:
        schedule = pick_schedule(prepared.method.schedule)
        net.scheduled_pruning = ScheduledPruning(
            net, prepared.score, schedule, decide.density, _SameBatches(batches), loss
        )
        net.scheduled_pruning(0.0)
    controller = Controller(prepared.targets)
    controller.begin(net.exact_usage())
    return CompressionSession(
        net, model, controller, steps, decide.gate_weight, recalibrate=fit_ranges, example=example
    )


def class_loss(output: Any, labels: Tensor) -> Tensor:
    """Cross entropy, the loss of scores without a task, a scalar; labels are classes, or a row of probabilities each.

    Raises JpqError where it says nothing: outputs of one column, and labels that are no probabilities.
    """
    scores = CLASSIFICATION.main_output(output)
    advice = "give compress the task of your loss, such as task=jpq.tasks.TASKS['regression']."
    if isinstance(scores, Tensor) and (scores.dim() < 2 or scores.shape[1] < 2):
        raise JpqError(
            f"This score differentiates the cross entropy of classes, and the outputs are {list(scores.shape)}: "
            f"{advice}"
        )
    if labels.is_floating_point() and labels.dim() > 1:
        sums = labels.sum(1)
        if labels.min() < 0 or not torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
            raise JpqError(
                "This score differentiates the cross entropy of classes, and these labels are neither classes nor "
                f"probabilities of them: {advice}"
            )
    return F.cross_entropy(scores, labels)


def _check_numbers(net: CompressedModel) -> None:
    """Raise JpqError where a parameter holds NaN, of which nothing can be decided."""
    name = next((name for name, p in net.named_parameters() if bool(p.isnan().any())), None)
    if name is not None:
        raise JpqError(
            f"Training has made '{name}' NaN, so there is nothing to decide by: go back to a checkpoint, leave out "
            "steps whose loss is not finite, and lower the learning rate."
        )


def _fit_ranges(net: CompressedModel, example: Any) -> None:
    """Fit the ranges of the quantizers anew, on the device that the network is on by now."""
    recalibrate(net, [_moved(example, net)])


def _moved(example: Any, net: nn.Module) -> Any:
    """An example with its tensors on the network's device, which trainers move after `compress`."""
    device = next(net.parameters()).device
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, example)


def _is_several(inputs: Any) -> bool:
    """Whether inputs are positional arguments."""
    return isinstance(inputs, (tuple, list))


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
            if name in ("skip", "keep_float"):
                value = (value,) if isinstance(value, str) else tuple(value)
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
