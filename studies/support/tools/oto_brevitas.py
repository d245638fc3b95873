"""Channels pruned while training by OTO's optimizer HESSO, then bits by brevitas: one width for the body, one for ends.

HESSO scores groups of channels and takes the worst smoothly to zero; `construct_subnet` cuts them out. Of its criteria
the first-order Taylor term alone did better here on held-out images than its default, the mean of five. Its target is
a share of groups: the least is sought by bisection that keeps to the budget of bit-operations. What goes is decided at
the first step, by gradients of 500 training images, so that trying a share costs no training. Shortcuts that pad
channels are 1x1 convolutions of zeros and ones until the network is cut.

only_train_once 3.0.1, the last on PyPI, runs with no torch that jpq supports unless two private functions of
torch.onnx that have moved are where it looks for them, and it calls `Tensor.cuda` on every machine.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F
from torch.onnx._internal.torchscript_exporter import _globals, utils

from support.tools.job import LEARNING_RATE, WEIGHT_DECAY, Job, Small
from support.tools.pruned import (
    body_widths,
    choose_bits,
    close_shortcuts,
    count_bops,
    finish,
    open_shortcuts,
    shortcut_names,
)

CRITERIA = {"taylor_first_order": 1.0}
BATCHES = 5  # for the gradients that decide
TRIES = 9  # of the bisection
MOST = 0.95  # of the groups


@contextlib.contextmanager
def old_torch() -> Iterator[None]:
    """What OTO expects of torch, and without its prints."""
    with contextlib.ExitStack() as stack, contextlib.redirect_stdout(io.StringIO()):
        sys.modules["torch.onnx._globals"] = _globals
        stack.callback(sys.modules.pop, "torch.onnx._globals")
        torch.onnx._optimize_graph = utils._optimize_graph  # type: ignore[attr-defined]
        stack.callback(delattr, torch.onnx, "_optimize_graph")
        if not torch.cuda.is_available():
            stack.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor))
        yield


class Pruning:
    """A network with HESSO at work on it: the channels to go are known, and go over a number of steps."""

    def __init__(self, job: Job, sparsity: float, steps: int) -> None:
        from only_train_once import OTO  # it finds what it needs only within `old_torch`

        self.net = job.fresh().eval()
        self.shortcuts = shortcut_names(self.net)
        open_shortcuts(self.net)
        modules = [self.net.get_submodule(name) for name in self.shortcuts]
        self.paddings = [module.weight for module in modules if isinstance(module, nn.Conv2d)]
        self.full = [padding.detach().clone() for padding in self.paddings]
        self.oto = OTO(self.net, job.sample())
        self.optimizer = self.oto.hesso(
            variant="adamw",
            lr=0.0,
            weight_decay=WEIGHT_DECAY,
            target_group_sparsity=sparsity,
            start_pruning_step=0,
            pruning_periods=1,
            pruning_steps=steps,
            importance_score_criteria=CRITERIA,
        )
        for x, y in islice(job.data.train.epoch(0), BATCHES):
            (F.cross_entropy(self.net(x), y) / BATCHES).backward()
        self.optimizer.step()  # at rate 0: decides what goes
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE
        self.keep_paddings()

    @torch.no_grad()
    def keep_paddings(self) -> None:
        """Shortcuts carry what they carry until their channel is gone."""
        for padding, full in zip(self.paddings, self.full, strict=True):
            gone = padding.abs().amax((1, 2, 3), keepdim=True) == 0
            padding.copy_(full.masked_fill(gone, 0.0))

    def cut(self) -> nn.Module:
        """The network without the channels that are zero."""
        with tempfile.TemporaryDirectory() as folder:
            self.oto.construct_subnet(out_dir=folder, save_full_group_sparse_model=False)
            net: nn.Module = torch.load(self.oto.compressed_model_path, weights_only=False)
        return close_shortcuts(net, self.shortcuts)


def run(job: Job) -> Small:
    """Prune while training, quantize, train."""
    bits = choose_bits(job)
    widths = body_widths(job, bits)
    budget = job.target * job.full_bops
    first = job.epochs // 2
    with old_torch():
        low, high = 0.0, MOST
        for _ in range(TRIES):
            middle = (low + high) / 2
            fits = count_bops(Pruning(job, middle, 1).cut(), widths, job.sample()) <= budget
            low, high = (low, middle) if fits else (middle, high)
        pruning = Pruning(job, high, max(1, first * len(job.data.train) // 2))
        job.fit(pruning.net, first, optimizer=pruning.optimizer, after_step=pruning.keep_paddings)
        net = pruning.cut()
    return finish(job, net, bits, first, f"{high:.1%} of groups")
