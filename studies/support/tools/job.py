"""What every tool is given, and what it gives back: the same float weights, images, epochs and loss for all.

Training loops are the user's business in all of these tools, so all get nearly jpq's own: its AdamW and its loss, cross
entropy plus distillation from the float model, BatchNorm statistics measured anew at the end. The rate falls by half a
cosine from the first step on, and the gradient of all parameters is clipped.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from jpq.compression import reestimate_batchnorm
from jpq.tasks import Data
from jpq.training import Objective, build_optimizer

FLOAT_BITS = 32
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-4
DISTILL, TEMPERATURE = 1.0, 2.0
MAX_GRADIENT_NORM = 5.0
Widths = Mapping[str, tuple[int, int]]  # name of a layer in the network -> bits of (weights, activations)


def count_macs(net: nn.Module, x: Tensor) -> dict[str, int]:
    """Multiplications and additions of each convolution and linear layer for one image: name -> count.

    Args:
        net: any network; subclasses of nn.Conv2d and nn.Linear count as they do.
        x: images [1, C, H, W].
    """
    macs: dict[str, int] = {}
    hooks = []

    def counter(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def count(module: nn.Module, _: object, out: Tensor) -> None:
            assert isinstance(module, nn.Conv2d | nn.Linear)
            places = out[0, 0].numel() if isinstance(module, nn.Conv2d) else out[0].numel() // module.out_features
            macs[name] = macs.get(name, 0) + places * module.weight.numel()

        return count

    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            hooks.append(module.register_forward_hook(counter(name)))
    training = net.training
    with torch.no_grad():
        net.eval()(x)
    net.train(training)
    for hook in hooks:
        hook.remove()
    return macs


@torch.no_grad()
def inputs_of(net: nn.Module, x: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """What each of the named layers reads, in evaluation, for images [N, 3, 32, 32]."""
    inputs: dict[str, Tensor] = {}
    for name in names:

        def keep(_: nn.Module, given: tuple[Tensor], name: str = name) -> None:
            inputs[name] = given[0]

        net.get_submodule(name).register_forward_pre_hook(keep)
    net.eval()(x)
    return inputs


def layer_names(net: nn.Module) -> list[str]:
    """Names of the convolutions and linear layers, in the order in which they are defined."""
    return [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]


@dataclass(frozen=True)
class Small:
    """What a tool made: a network that computes what its deployed form would, and the bits of its layers."""

    net: nn.Module
    widths: Widths  # layers that are missing here keep 32 bits
    note: str = ""  # how the target was met

    def bops(self, x: Tensor) -> int:
        """Bit-operations of one image [1, C, H, W]: MACs times bits of weights times bits of activations."""
        total = 0
        for name, macs in count_macs(self.net, x).items():
            w_bits, a_bits = self.widths.get(name, (FLOAT_BITS, FLOAT_BITS))
            total += macs * w_bits * a_bits
        return total


@dataclass
class Job:
    """One network to be made smaller."""

    float_net: nn.Module  # trained; tools take copies by `fresh`
    data: Data
    target: float  # share of the float network's bit-operations
    epochs: int
    steps: int = field(default=0, init=False)  # of training so far, for the report

    def fresh(self) -> nn.Module:
        """A copy of the float network."""
        return copy.deepcopy(self.float_net)

    def sample(self, n: int = 1) -> Tensor:
        """The first n training images [n, 3, 32, 32], normalized."""
        x, _ = next(iter(self.data.train.epoch(0)))
        return x[:n]

    def calibration(self, images: int = 500) -> Iterator[Tensor]:
        """Batches of training images [N, 3, 32, 32], normalized, `images` in all, in a fixed order."""
        left = images
        for x, _ in self.data.train.epoch(0):
            if left <= 0:
                return
            yield x[:left]
            left -= len(x)

    @property
    def full_bops(self) -> int:
        """Bit-operations of the float network at 32 bits."""
        return sum(count_macs(self.float_net, self.sample()).values()) * FLOAT_BITS**2

    def fit(
        self,
        net: nn.Module,
        epochs: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        after_step: Callable[[], None] | None = None,
        first_epoch: int = 0,
        lr: float = LEARNING_RATE,
    ) -> nn.Module:
        """Train a network in place, and return it.

        Args:
            net: the tool's network, in whatever form it is trained.
            epochs: default: the job's.
            optimizer: the tool's own where it brings one; default: AdamW. Its rates follow the same curve.
            after_step: called after each step.
            first_epoch: number by which images are shuffled, where epochs went before.
            lr: peak learning rate of the default optimizer.
        """
        epochs = self.epochs if epochs is None else epochs
        optimizer = optimizer or build_optimizer(net, lr, WEIGHT_DECAY)
        peaks = [group["lr"] for group in optimizer.param_groups]
        objective = Objective(self.fresh().eval(), DISTILL, TEMPERATURE)
        steps = epochs * len(self.data.train)
        step = 0
        for epoch in range(first_epoch, first_epoch + epochs):
            net.train()
            for x, y in self.data.train.epoch(epoch):
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * (1 + math.cos(math.pi * step / steps)) / 2
                loss = objective(net, x, y, step / steps)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), MAX_GRADIENT_NORM)
                optimizer.step()
                if after_step is not None:
                    after_step()
                step += 1
                self.steps += 1
        reestimate_batchnorm(net, self.data.train.epoch(0))
        return net.eval()
