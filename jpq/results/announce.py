"""What is said before a run compresses anything: what it works on, and that the float model knows nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from jpq import costs
from jpq.allocation.prepare import Prepared
from jpq.compression.usage import exact_usage
from jpq.config import Config
from jpq.costs.target import Target
from jpq.plan import Plan
from jpq.results.description import RunAnnouncer, RunDescription, TargetDescription
from jpq.results.formatting import format_metric
from jpq.results.intervals import is_near_chance
from jpq.tasks.data import Data
from jpq.tracing.channel_shares import ChannelShares
from jpq.training import distributed
from jpq.training.epochs import all_phases
from jpq.training.run_state import RunState


def describe_run(
    model: nn.Module,
    data: Data,
    prepared: Prepared,
    targets: Mapping[str, tuple[Target, ...]],
    config: Config,
    run: RunState,
) -> RunDescription:
    """What the run works on: model, data, targets, epochs, device and folder."""
    uses = exact_usage(prepared.network, ChannelShares(prepared.network, ()), Plan("", {}, {}))  # nothing dropped
    full = costs.baseline(uses)
    asked = {
        (t.cost, t.text): TargetDescription(t.cost, t.text, t.limit, float(full[t.cost]))
        for each in targets.values()
        for t in each
    }
    return RunDescription(
        model=config.task.model,
        parameters=sum(p.numel() for p in model.parameters()),
        layers=len(prepared.network.layers),
        macs=int(full["macs"]),
        data=config.task.data,
        sizes={"train": data.train.size, "held-out": data.held_out.size, "test": data.test.size},
        shape=tuple(data.shape),
        classes=data.classes,
        device=str(data.example.device),
        threads=torch.get_num_threads(),
        processes=distributed.count(),
        method=config.decide.method,
        targets=tuple(asked.values()),
        phases={phase.title: phase.epochs for phase in all_phases(config, prepared.method)},
        folder=run.folder,
        resumed=bool(run.saved),
    )


def check_float_metric(model: nn.Module, data: Data, config: Config, run: RunState, announcer: RunAnnouncer) -> None:
    """Warn where the float model is hardly better than guessing: nothing is there to be kept."""
    task, samples, chance = data.task, data.held_out.size, data.task.chance(data.classes)
    if not math.isfinite(chance):
        return
    metric = task.evaluate(model, data.held_out)
    if not is_near_chance(task, metric, samples, chance):
        return
    way_out = "Check --weights and --data" if config.task.weights is not None else "Train longer with --float-epochs"
    text = (
        f"The float model is near chance: its held-out {task.metric_name} is {format_metric(task, metric)} on "
        f"{samples} samples, and guessing gives {format_metric(task, chance)}. {way_out}."
    )
    run.notes.append(f"warning: {text}")
    announcer.warn(text)
