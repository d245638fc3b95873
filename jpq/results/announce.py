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
from jpq.results.unseen import held_out_warning
from jpq.tasks import CLASSIFICATION
from jpq.tasks.data import Data
from jpq.tracing.channel_shares import ChannelShares
from jpq.tracing.forward import collect_tensors
from jpq.training import distributed
from jpq.training.batchnorm_choice import BatchStatistics
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
        device=str(collect_tensors(data.example)[0].device),
        threads=torch.get_num_threads(),
        processes=distributed.count(),
        method=config.decide.method,
        targets=tuple(asked.values()),
        phases={phase.title: phase.epochs for phase in all_phases(config, prepared.method)},
        folder=run.folder,
        resumed=bool(run.saved),
        task="" if data.task.name == CLASSIFICATION.name else f"{data.task.name}, judged by {data.task.metric_name}",
        notes=data.notes,
    )


def check_float_metric(model: nn.Module, data: Data, config: Config, run: RunState, announcer: RunAnnouncer) -> None:
    """Warn where the float model is hardly better than guessing, and note where it has seen the held-out samples."""
    if config.task.weights is not None and (optimistic := held_out_warning(model, data)) is not None:
        run.notes.append(optimistic)
    task, samples, chance = data.task, data.held_out.size, data.task.score(data.task.chance(data.classes))
    if not task.knows_chance or not math.isfinite(chance):
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


def note_batchnorm(found: BatchStatistics | None, data: Data, run: RunState) -> None:
    """Note that BatchNorm keeps the float model's statistics, and why, where that was found to be better."""
    if found is not None:
        task = data.task
        run.notes.append(
            "BatchNorm keeps the float model's statistics: measured anew on batches of "
            f"{found.samples} {data.sample_names} they change its {task.metric_name} from "
            f"{format_metric(task, found.own)} to {format_metric(task, found.batches)}. --batchnorm batch measures "
            "them anew all the same."
        )
