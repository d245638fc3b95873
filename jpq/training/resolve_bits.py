"""Bits solved again while the weights train (`--resolve-at SHARE`): widths move by single steps under the same budget.

What a table said of the float model need not hold for weights that have trained under a plan. So after a share of the
fine-tuning the divergence from the float model's outputs is measured anew around the network as it is, one step up or
down for one tensor at a time, and the exact solver moves bits (QBitOpt: J. Peters, M. Fournarakis, M. Nagel, M. van
Baalen, T. Blankevoort, ICCVW 2023, solves for bits during training too, from moving averages of Fisher information).
Units stay as they are. The moves are taken only where the whole plan's divergence falls, and held-out samples do not
lose by more than two standard errors at once; training then goes on under them.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jpq.allocation.decision_data import calibration_batches, calibration_inputs
from jpq.allocation.measured.calibration import calibration_samples
from jpq.allocation.measured.candidates import AllowedWidths, image_layers
from jpq.allocation.measured.decide import allowed_part, joint_divergence, plan_widths
from jpq.allocation.measured.measure import Change, changes_of, measure_table
from jpq.allocation.measured.probe import Probe
from jpq.allocation.measured.solve import Solver
from jpq.allocation.measured.table import Key
from jpq.allocation.procedures import allowed_widths
from jpq.compression.calibration import recalibrate, reestimate_batchnorm
from jpq.compression.model import CompressedModel
from jpq.compression.power_of_two_steps import round_activation_steps
from jpq.costs.target import Target
from jpq.methods.quantizers import fit_threshold
from jpq.plan import Plan, from_json
from jpq.tasks.data import Data
from jpq.tracing.forward import eval_mode
from jpq.training import distributed
from jpq.training.contest import JUDGED, NORM_BATCHES, TIED, sample_losses
from jpq.training.job import Job

NORM_EPOCH = 3 * 10**6  # number of the epoch whose batches BatchNorm's statistics are measured on


@dataclass(frozen=True, eq=False)
class Moves:
    """The widths that a solver would change, and what they do at once."""

    plan: Plan
    moved: tuple[tuple[str, str, int, int], ...]  # (layer, "w" | "a", width before, width after)
    divergence: tuple[float, float]  # of the whole plan from the float model, before and after
    held_out_loss: tuple[float, float]  # before and after; nan where it was not looked at
    samples: Mapping[str, Tensor]  # layer -> values of its input, that ranges are fitted to
    taken: bool

    def record(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {
            "moved": [list(move) for move in self.moved],
            "divergence": list(self.divergence),
            "held_out_loss": [loss if math.isfinite(loss) else None for loss in self.held_out_loss],
            "taken": self.taken,
        }


class BitsResolver:
    """Solves for the bits again at the start of one epoch of the fine-tuning.

    Args:
        net: frozen, in training.
        plan: that it was frozen under; of a resumed run the one in its checkpoint.
        job: what the run works on at this budget; its notes get a sentence.
        epochs: of the fine-tuning.
    """

    def __init__(
        self,
        net: CompressedModel,
        plan: Plan,
        job: Job,
        epochs: int,
    ) -> None:
        self.net, self.plan, self.job = net, plan, job
        run, wanted = job.run, round(job.config.decide.resolve_at * epochs)
        self.at = max(1, min(wanted, epochs - 1))  # some training before and after
        self.epochs = epochs
        self.record: dict[str, Any] = {}
        if run.is_past("search") and run.saved and run.saved.get("resolved"):
            self.record = run.saved["resolved"]
            run.notes.append(self.record["sentence"])
        elif epochs < 2:
            run.notes.append("Bits were not solved again (--resolve-at): that needs two epochs of fine-tuning or more.")

    def __call__(self, epoch: int) -> None:
        """Solve again, where this is the epoch for it; called before each epoch, which counts from 0."""
        if epoch != self.at or self.record:
            return
        began = time.perf_counter()

        def work() -> tuple[str, Moves]:
            with torch.random.fork_rng():
                moves = solve_bits_again(self.net, self.job)
            return moves.plan.to_json(), moves

        text, moves = self.job.run.timed("measure", lambda: distributed.run_on_first(work))
        if moves.taken:
            self.plan = from_json(text, "the bits that were solved again")
            change_bits(self.net, self.plan, moves.samples)
        self.record = {"epoch": epoch, "seconds": round(time.perf_counter() - began, 2), **moves.record()}
        self.record["sentence"] = self._sentence(moves)
        self.job.run.notes.append(self.record["sentence"])

    def _sentence(self, moves: Moves) -> str:
        """What was found, for the report."""
        start = f"Bits were solved again after epoch {self.at} of {self.epochs}"
        if not moves.moved:
            return f"{start}: no step has a smaller predicted divergence, so all widths stay."
        count = len(moves.moved)
        before, after = moves.divergence
        if after >= before:
            return (
                f"{start}: {count} widths would move, and the whole plan's divergence would be {after:.4g} in place of "
                f"{before:.4g}, so all stay."
            )
        losses = "held-out loss {:.4g} to {:.4g} at once".format(*moves.held_out_loss)
        if not moves.taken:
            return f"{start}: {count} widths would move (divergence {before:.4g} to {after:.4g}; {losses}), and stay."
        parts = [f"{layer} {'weight' if side == 'w' else 'input'} {a} to {b}" for layer, side, a, b in moves.moved]
        shown = ", ".join(parts[:4]) + (" ..." if count > 4 else "")
        return f"{start}: {count} widths moved ({shown}); divergence {before:.4g} to {after:.4g}, {losses}."


def solve_bits_again(net: CompressedModel, job: Job) -> Moves:
    """The moves of single steps that the solver prefers in a network as it has trained; `net` stays as it is.

    Arguments as for `BitsResolver`.
    """
    data, current = job.data, net.plan()
    trial = _with_norms(net, data)
    recalibrate(trial, calibration_batches(data))
    probe = _probe(trial, job.model, data)
    widths = allowed_widths(trial, job.config.decide)
    around = plan_widths(trial, current)
    images = image_layers(trial)
    image: dict[Key, int | None] = {(n, "a"): x.a_bits for n, x in current.layers.items() if n in images}
    with probe.changed(image):
        plan = _solved(probe, widths, around, job.targets)
        divergence = joint_divergence(probe, current), joint_divergence(probe, plan)
    after = plan_widths(trial, plan)
    moved = tuple((*key, width, after[key]) for key, width in around.items() if after[key] != width)
    losses, taken = (math.nan, math.nan), False
    if moved and divergence[1] < divergence[0]:
        changed = copy.deepcopy(net)
        change_bits(changed, plan, trial.calibration_samples)
        held_out = data.held_out.first(JUDGED)
        pair = [sample_losses(_with_norms(each, data), held_out, data.task) for each in (net, changed)]
        losses = float(pair[0].mean()), float(pair[1].mean())
        taken = is_no_worse(pair[1] - pair[0])
    return Moves(plan, moved, divergence, losses, dict(trial.calibration_samples), taken)


def is_no_worse(differences: np.ndarray[Any, np.dtype[np.float64]]) -> bool:
    """Whether the mean of paired differences of losses exceeds 0 by no more than two standard errors."""
    if not np.isfinite(differences).all():
        return False
    error = differences.std(ddof=1) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return bool(differences.mean() <= TIED * error)


@torch.no_grad()
def change_bits(net: CompressedModel, plan: Plan, samples: Mapping[str, Tensor]) -> None:
    """Give a frozen network the widths of a plan of the same units; ranges are fitted anew where a width changes.

    Args:
        net: frozen.
        plan: with widths for all its layers.
        samples: layer -> values of its input, beside those that the network has; without any a range stays.
    """
    net.calibration_samples = {**net.calibration_samples, **samples}
    inputs: set[str] = set()
    for name, now in net.plan().layers.items():
        pair, wanted = net.quantizers(name), plan.layers[name]
        if not pair:
            continue
        if wanted.w_bits != now.w_bits:
            pair[0].fix(wanted.w_bits)
            pair[0].refit(net.layer(name).weight, wanted.w_bits)
        if wanted.a_bits != now.a_bits:
            pair[1].fix(wanted.a_bits)
            inputs.add(name)
            if name in net.calibration_samples:
                values = net.calibration_samples[name].to(pair[1].log_threshold)
                threshold = fit_threshold(values, wanted.a_bits, pair[1].signed, False)
                pair[1].log_threshold.copy_(threshold.clamp_min(1e-8).log())
    round_activation_steps(net, inputs)


def _solved(probe: Probe, widths: AllowedWidths, around: Mapping[Key, int], targets: tuple[Target, ...]) -> Plan:
    """The plan of least predicted divergence that is one step of each width from the present one, or nearer."""
    bounds = (widths.w[0], widths.w[-1]), (widths.a[0], widths.a[-1])
    step = max((b - a for row in (widths.w, widths.a) for a, b in pairwise(row)), default=1)
    changes = changes_of(probe, *bounds, around, step=step)
    free = {change: 0.0 for change in changes if _is_free(change, widths, around)}
    table = measure_table(probe, *bounds, "", around, step=step, known=free)
    pinned = {key: around[key] for key in widths.pinned if key in around}
    return Solver(probe.net, allowed_part(table, widths), targets, pinned, free_units=False).solve().plan


def _is_free(change: Change, widths: AllowedWidths, around: Mapping[Key, int]) -> bool:
    """Whether a change need not be measured: it is none, or not allowed."""
    return change.value == around[change.key] or change.value not in widths.of(change.key)


def _with_norms(net: CompressedModel, data: Data) -> CompressedModel:
    """A copy whose BatchNorm's statistics are those of its present weights and widths."""
    trial = copy.deepcopy(net)
    reestimate_batchnorm(trial, islice(data.train.epoch(NORM_EPOCH), NORM_BATCHES))
    return trial


@torch.no_grad()
def _probe(net: CompressedModel, model: nn.Module, data: Data) -> Probe:
    """A probe of the network whose divergence is that from the float model."""
    mixed, plain = calibration_samples(calibration_inputs(data))
    probe = Probe(net, mixed, plain, data.task.divergence, {}, data.task.main_output)
    with eval_mode(model):
        probe.references = [probe.output_of(model, x) for x in mixed]
    return probe
