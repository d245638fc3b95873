"""The reconstruction of a run (`--effort minutes`, `--warm-start reconstruction`), between plan and fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from torch import Tensor

from jpq.compression.calibration import reestimate_batchnorm
from jpq.compression.model import CompressedModel
from jpq.config import MINUTES, RECONSTRUCTION
from jpq.files.rows import write_rows
from jpq.tasks.data import Data
from jpq.tracing.forward import batch_size
from jpq.training import distributed
from jpq.training.epochs import Phase
from jpq.training.job import Job
from jpq.training.loop import Objective
from jpq.training.nonfinite import check_buffers
from jpq.training.reconstruction import BlockError, reconstruct

EPOCH = 2 * 10**6  # number of the epoch whose batches are reconstructed, beyond those of training and of scores

TABLE_NAME = "reconstruction.csv"  # in the run's folder


def reconstruct_weights(net: CompressedModel, job: Job) -> None:
    """Learn the rounding of the weights, where the config asks for it.

    Where channels are dropped, or nothing is learned, BatchNorm's statistics are measured anew first. They are not
    measured again after it: the blocks were fitted with them as they are.

    Args:
        net: frozen.
        job: what the run works on at this budget; its training data are looked at, without labels, and the errors of
            the blocks are written into the run's folder.
    """
    run, data, t = job.run, job.data, job.config.train
    if t.effort != MINUTES and t.warm_start != RECONSTRUCTION:
        return
    if run.is_past("search"):
        return  # the checkpoint holds what was fine-tuned since
    batches = sample_batches(data, t.reconstruction_samples)
    started = False
    losses: list[float] = []

    def observe(block: int, blocks: int, step: int, loss: float) -> None:
        nonlocal started
        if not started:
            run.observer.phase(RECONSTRUCTION, 1, blocks * t.reconstruction_steps)
            started = True
        losses.append(loss)
        run.observer.step(loss, math.nan, math.nan)

    def work() -> tuple[BlockError, ...]:
        if not t.reconstruction_steps or not keeps_all(net):
            reestimate_batchnorm(net, data.train.epoch(EPOCH + 1))
        if not t.reconstruction_steps:
            return ()
        errors = reconstruct(net, job.model, batches, t.reconstruction_steps, job.config.run.seed, observe)
        distributed.share_state(net)
        return errors

    run.observer.begin(data.task)
    errors = run.timed(RECONSTRUCTION, work)
    check_buffers(net, "after the reconstruction")
    distributed.run_on_first(lambda: write_errors(errors, run.folder / TABLE_NAME))
    phase = Phase(RECONSTRUCTION, 1, budget=run.label)
    metric = data.task.evaluate(net, data.held_out)
    loss = sum(losses) / max(1, len(losses))
    run.observer.epoch(run.recorder.record(phase, 1, loss, metric, net, Objective(), 0.0))


def keeps_all(net: CompressedModel) -> bool:
    """Whether no unit is dropped."""
    return all(bool(gate.keep().bool().all()) for gate in net.gates)


def sample_batches(data: Data, samples: int) -> list[Tensor]:
    """Inputs of the first training batches of an epoch of its own, so many samples together at least."""
    inputs: list[Tensor] = []
    for x, _ in islice(data.train.epoch(EPOCH), samples):
        inputs.append(x)
        if sum(map(batch_size, inputs)) >= samples:
            break
    return inputs


def write_errors(errors: Sequence[BlockError], path: Path) -> None:
    """Write the errors of the blocks as CSV, a line each."""
    write_rows(path, BlockError, errors)
