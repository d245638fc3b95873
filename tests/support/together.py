"""What processes of a test do together: run as `python -m together TASK FOLDER`, started by torchrun or alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

import jpq
from jpq.tasks import data
from jpq.tasks.data import Data
from jpq.training import distributed
from jpq.training.loop import Objective
from jpq.types import JpqError

METHODS = ("djpq", "gdp", "l0", "dhp", "pdp", "bayesian-bits")
SAMPLES = 13  # does not divide evenly


def one_step(method: str) -> dict[str, torch.Tensor]:
    """Loss, gradients and buffers after the forward and backward pass of one batch in float64, by name."""
    torch.manual_seed(0)
    model = jpq.tasks.models.build("convnet", 10, 1).double()
    x, y = torch.rand(SAMPLES, 1, 8, 8, dtype=torch.float64), torch.arange(SAMPLES) % 10
    joint = jpq.compress(model, x, method, bops="0.5%", steps=10)
    net = joint.net.double()
    net.train()
    objective = Objective(model.eval(), 1.0, 2.0, 0.03, joint.controller)
    with distributed.Split(net, net.draws) as objective.split:
        loss = objective(net, x, y, 0.9)
        value = distributed.mean(loss)
        loss.backward()
    distributed.average_gradients(net)
    found = {f"gradient of {n}": p.grad for n, p in net.named_parameters() if p.grad is not None}
    found |= {n: b.double() for n, b in net.named_buffers()}
    return {**found, "loss": torch.tensor(value, dtype=torch.float64)}


def unlike(name: str = "digits") -> Data:
    """The digits, of which the second process has others."""
    return data.load("digits", limit=100 if os.environ.get("RANK") == "1" else 600)


def main(task: str, folder: Path) -> None:
    """`steps`: the gradients of each method into FOLDER. `disagree`: what each process is told where they do."""
    torch.set_num_threads(1)
    distributed.begin("cpu")
    rank = int(os.environ.get("RANK", "0"))
    if task == "steps":
        torch.save({method: one_step(method) for method in METHODS}, folder / f"{distributed.count()}-{rank}.pt")
    elif task == "disagree":
        said = []
        for work in (
            lambda: distributed.check_same(f"plan {rank}", "a plan"),
            lambda: distributed.run_on_first(fails),
        ):
            try:
                work()
            except JpqError as error:
                said.append(str(error))
        torch.manual_seed(rank)
        net = torch.nn.BatchNorm1d(3)
        torch.nn.init.normal_(net.weight)
        distributed.share_state(net)
        drawn = [*net.weight.tolist(), *torch.rand(2).tolist()]
        (folder / f"{rank}.txt").write_text("\n".join([*said, str(drawn)]))
    distributed.end()


def fails() -> None:
    """Goes wrong where the first process does it."""
    raise JpqError("there is no such file")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
