"""Channels pruned by Torch-Pruning, then bits by brevitas: one width for the body, another for both ends.

Torch-Pruning scores groups of channels by its Taylor importance, gradients taken anew as channels go, and removes them
in small steps until the network at the chosen width is within the target, as its documentation shows: the same share of
every layer's channels, which did better here on held-out images than one ranking over all layers. Shortcuts that
pad channels are 1x1 convolutions of zeros and ones while it looks for groups (it takes padding for an elementwise
operation, and would prune the wrong channels), and cost nothing again afterwards.
"""

from __future__ import annotations

import copy
from itertools import islice

import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

from support.tools.job import Job, Small, Widths
from support.tools.pruned import (
    body_widths,
    choose_bits,
    close_shortcuts,
    count_bops,
    finish,
    open_shortcuts,
    shortcut_names,
)

STEPS = 288  # in which all channels would go
FRESH = 8  # steps between two measurements of gradients
BATCHES = 5  # for gradients
MAX_RATIO = 0.9  # of a layer's channels that may go


def measure_gradients(job: Job, net: nn.Module) -> None:
    """Leave the gradient of the loss over some training batches in the parameters."""
    net.zero_grad()
    for x, y in islice(job.data.train.epoch(0), BATCHES):
        (F.cross_entropy(net(x), y) / BATCHES).backward()


def prune(job: Job, widths: Widths, importance: tp.importance.Importance, global_pruning: bool = False) -> nn.Module:
    """The float network without the least important channels: within the target at these widths."""
    net = job.fresh().eval()
    shortcuts = shortcut_names(net)
    net = open_shortcuts(net)
    *_, last = net.modules()
    x, budget = job.sample(), job.target * job.full_bops
    pruner = tp.pruner.BasePruner(
        net,
        x,
        importance,
        global_pruning=global_pruning,
        pruning_ratio=1.0,
        max_pruning_ratio=MAX_RATIO,
        iterative_steps=STEPS,
        ignored_layers=[last],
    )
    for step in range(STEPS):
        if count_bops(net, widths, x) <= budget:
            break
        if step % FRESH == 0:
            measure_gradients(job, net)
        pruner.step()
    net.zero_grad()
    return close_shortcuts(copy.deepcopy(net), shortcuts)


def run(job: Job) -> Small:
    """Prune, train, quantize, train."""
    bits = choose_bits(job)
    net = prune(job, body_widths(job, bits), tp.importance.GroupTaylorImportance())
    first = job.epochs // 2
    job.fit(net, first)
    return finish(job, net, bits, first, "Taylor importance")
