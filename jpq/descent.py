"""Budgets followed down in one run, each landed, fine-tuned, checked and saved in a folder of its own.

A method that learns its decisions goes on from the network as it was before landing: soft gates, real-valued widths,
Adam's moments and the pressure are kept, and only the controller's ramp begins anew. A method that takes its decisions
at once takes them again, for weights that the budget before it has trained.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jpq import bench, checkpoint, foreign, front_report, fronts, ranks, report
from jpq.budget import Target
from jpq.config import TARGETS, Config
from jpq.costs.table import Table
from jpq.data import Data
from jpq.journal import Journal
from jpq.judging import calibration
from jpq.methods import row
from jpq.network.attach import observe_again
from jpq.network.compressed import Compressed
from jpq.network.taps import original
from jpq.outcome import finish
from jpq.phases import More, Share, Soft, fine_tune, opened, search
from jpq.result import FrontRow, Result
from jpq.runs import read
from jpq.settings import write
from jpq.types import JpqError

PICTURE = "front.png"


@dataclass(frozen=True)
class Begun:
    """What every budget of a run begins with."""

    config: Config
    data: Data
    model: nn.Module  # float, trained
    attached: Callable[[nn.Module], Compressed]  # gates and quantizers on a model like it, always the same
    budgets: Mapping[str, tuple[Target, ...]]
    shares: Mapping[str, Share]
    table: Table | None
    command: str
    final: bool


def descend(begun: Begun, net: Compressed, run: Journal) -> Result:
    """The result for the last budget; `front` holds all of them where there are several.

    Args:
        begun: what they share.
        net: attached to the trained model.
        run: of the whole.
    """
    each, soft, weights, learns = begun.config.each(), Soft(net), begun.model, row(net.method).searches
    folders = {name: run.folder / folder_name(name, each[name]) if name else run.folder for name in each}
    for place, (name, config) in enumerate(each.items()):
        at = run.at(place, name, folders[name])
        if run.saved and int(run.saved.get("budget", 0)) > place:
            continue  # an earlier part of this run finished it
        if place and not learns:
            weights = resumed_weights(weights, at)
            soft = Soft(begun.attached(weights))
        result, tuned = one(begun, config, soft, weights, at, last=place == len(each) - 1)
        if tuned is not None and not learns:
            weights = trained(begun.model, tuned)
    if len(each) == 1:
        return result

    def close() -> tuple[FrontRow, ...]:
        points = tuple(point(name, folders[name]) for name in each)
        report.write_front(points, run.folder)
        made = fronts.make(read([run.folder]).points)
        report.save_picture(front_report.plane(made), run.folder / PICTURE)
        report.write_history(run.recorder.rows, run.folder)
        (run.folder / checkpoint.NAME).unlink(missing_ok=True)
        return points

    return replace(result, front=ranks.from_first(close))


def one(
    begun: Begun, config: Config, soft: Soft, weights: nn.Module, run: Journal, last: bool
) -> tuple[Result, Compressed | None]:
    """One budget: its result, and the network that it fine-tuned (None where only a rebuilt one was)."""
    data, model, goals = begun.data, begun.model, begun.budgets[run.label]
    if run.label:
        ranks.from_first(lambda: prepare(run, config, begun.table))
    searching, tuning = begun.shares[run.label].phases(run.label, run.budget == 0)
    learns = row(soft.net.method).searches
    first: More = lambda: {} if learns or not run.budget else {"first": weights.state_dict()}  # noqa: E731
    plan = search(soft, model, data, goals, config, run, searching, first)  # 6, 7
    if learns and run.is_past("search") and run.saved and run.saved.get("soft"):
        soft.restore(run.saved["soft"], config, run)
    net = soft.net if last or not learns else twin(soft.net, begun.attached(weights))
    if learns and not run.is_past("search"):
        observe_again(net, calibration(data))  # ranges are fitted to what layers read now
    net.settle(plan)  # 8
    kept: More = lambda: first() if last or not learns else {"soft": soft.state()}  # noqa: E731
    tuned = opened(net, model, data, run) if net.opened else net
    fine_tune(tuned, model, data, config, run, plan, soft.moments(net), tuning, kept)  # 9
    last_step = partial(finish, net, tuned, model, data, goals, config, run, begun.command, begun.table, begun.final)
    with full_precision():
        result = ranks.from_first(last_step)  # 10
    return result, net if tuned is net else None


@contextmanager
def full_precision() -> Iterator[None]:
    """Leaves TF32 as it was: the last step compares at full precision, and the next budget need not train so."""
    parts: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [part.allow_tf32 for part in parts]
    try:
        yield
    finally:
        for part, allowed in zip(parts, before, strict=True):
            part.allow_tf32 = allowed


def twin(net: Compressed, fresh: Compressed) -> Compressed:
    """`fresh`, which was attached as `net` was, in the state of `net`."""
    fresh.load_state_dict(net.state_dict())
    with torch.no_grad():
        for draw in fresh.draws:
            draw.again()
    return fresh


@torch.no_grad()
def trained(model: nn.Module, tuned: Compressed) -> nn.Module:
    """A copy of the float model with the weights of a landed and fine-tuned network, masked ones included."""
    model = copy.deepcopy(model)
    state, own = model.state_dict(), tuned.model.state_dict()
    for name, tensor in state.items():
        if name in own and own[name].shape == tensor.shape:
            tensor.copy_(own[name])
    for layer in tuned.network.layers:
        owner, _, name = layer.weight.rpartition(".")
        state[layer.weight].copy_(original(tuned.model.get_submodule(owner), name))
    return model


def resumed_weights(weights: nn.Module, run: Journal) -> nn.Module:
    """The weights that this budget begins with: those at hand, or those of the checkpoint where it lies in it."""
    if run.saved and (run.is_in("search") or run.is_in("fine-tune")) and "first" in run.saved:
        weights = copy.deepcopy(weights)
        checkpoint.restore(weights, run.saved["first"], run.top / checkpoint.NAME)
    return weights


def folder_name(name: str, config: Config) -> str:
    """`bops-0.5pct` for 0.5 %: the first target that tells the budgets apart, safe on every file system."""
    cost = next(t for t in TARGETS if getattr(config.budget, t) == name)
    return f"{cost.removeprefix('target_')}-{re.sub(r'[^A-Za-z0-9.+-]', '', name.replace('%', 'pct'))}"


def prepare(run: Journal, config: Config, table: Table | None) -> None:
    """Make one budget's folder, with its settings and the table of layers that the run goes by."""
    try:
        run.folder.mkdir(exist_ok=True)
        write(config, run.folder / "config.toml")
    except OSError as error:
        raise JpqError(f"Cannot write to {run.folder}: {error.strerror}. Choose another folder with --out.") from error
    if table is not None:
        bench.write_table(list(table.entries), run.folder / bench.NAME)


def point(name: str, folder: Path) -> FrontRow:
    """One line of front.csv, from the folder of a finished budget."""
    try:
        found: dict[str, Any] = foreign.tree_of(foreign.text_of(folder / "result.json"), "result.json")
        now, seconds = found["compressed"], found["seconds"]["total"]
        accuracy = math.nan if now["accuracy"] is None else now["accuracy"]
        return FrontRow(
            name, accuracy, found["held_out"]["compressed"], now["bops"], now["bops_share"], now["macs"],
            now["size_bytes"], seconds, folder.name,
        )  # fmt: skip
    except (JpqError, KeyError, TypeError) as error:
        raise JpqError(f"{folder} was finished earlier and cannot be read now. Run without --resume.") from error
