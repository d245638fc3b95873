"""Reconstruction: the rounding of each weight is learned so that blocks give the float model's outputs, without labels.

A block (`jpq.training.reconstruction_blocks`) is fitted to the float model's output on a few hundred samples, given the
inputs that the blocks before it, already rounded, produce (BRECQ, arXiv:2102.05426, algorithm 1). With s the step of a
weight w, which lies between the grid points w_below and w_above (AdaRound, arXiv:2004.10568, equations 22 to 25):

    w(V) = w_below + (w_above - w_below) h(V)       h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)
    loss = |out - float out|^2 / |nearest out - float out|^2  +  weight * mean(1 - |2 h(V) - 1|^beta)

V begins where h(V) gives back w. The regulariser begins after a fifth of the steps; beta falls from 20 to 2 and drives
every h(V) to 0 or 1. Our loss is relative to the error of rounding to nearest, so that one weight of the regulariser
suits every block. While the block is fitted, each value of an activation stays unrounded with probability 1/2 (QDrop,
arXiv:2203.05740, section 3.3), and the activations' steps learn, straight-through, as they do in training.

In the end each weight becomes the grid point that it was given, so everything that follows finds weights that round to
themselves. Weights that are exactly 0 (masked ones) stay 0; those beyond the grid's ends stay at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jpq.compression.masking import original
from jpq.compression.model import CompressedModel
from jpq.methods.quantizers import IntegerQuantizer
from jpq.tracing.forward import batch_size, call_model, eval_mode
from jpq.training.reconstruction_blocks import Block, find_blocks
from jpq.types import JpqError

STRETCH = (-0.1, 1.1)  # ends of the stretched sigmoid (AdaRound, equation 23)
WARM_UP = 0.2  # share of the steps without the regulariser
BETA = (20.0, 2.0)  # of the regulariser, from its begin to the end
DROP = 0.5  # probability that an activation's value stays unrounded (QDrop)
ROUNDING_LR = 2e-2  # of V (Adam)
RANGE_LR = 1e-3  # of the logarithms of the activations' ranges (Adam)
BATCH = 32  # samples per step
POOL = 2**20  # draws of what is rounded, which are turned by a random offset in each step

Observe = Callable[[int, int, int, float], None]  # (block, blocks, step, loss)


@dataclass(frozen=True)
class BlockError:
    """Mean squared error of one block's output against the float model's, on the samples that it was fitted to."""

    name: str
    layers: int
    before: float  # weights rounded to nearest
    after: float


class _Stop(Exception):
    """Ends a forward pass once a block's inputs are known."""


@dataclass
class _Rounding:
    """The learned rounding of one weight, in the place of its quantizer's result while a block is fitted."""

    grid: IntegerQuantizer
    below: Tensor
    above: Tensor
    logits: nn.Parameter = field(init=False)  # V

    def __post_init__(self) -> None:
        self.logits = nn.Parameter(torch.zeros_like(self.below))

    @classmethod
    @torch.no_grad()
    def of(cls, grid: IntegerQuantizer, weight: Tensor) -> _Rounding:
        """The two grid points around each value of a weight, and V at the value between them."""
        step = grid.scale()
        integers = torch.floor(weight / step)
        below, above = (grid(place * step)[0].detach() for place in (integers, integers + 1))
        below, above = (torch.where(weight == 0, torch.zeros_like(weight), point) for point in (below, above))
        rounding = cls(grid, below, above)
        gap = above - below
        share = torch.where(gap > 0, (weight - below) / gap.clamp_min(1e-30), 0.5).clamp(0.01, 0.99)
        low, high = STRETCH
        rounding.logits.copy_(torch.logit((share - low) / (high - low)))
        return rounding

    def share(self) -> Tensor:
        """h(V), in [0, 1]."""
        low, high = STRETCH
        return (torch.sigmoid(self.logits) * (high - low) + low).clamp(0, 1)

    def soft(self) -> Tensor:
        """The weight between its grid points."""
        return self.below + (self.above - self.below) * self.share()

    def hard(self) -> Tensor:
        """The weight on the nearer of its grid points."""
        return torch.where(self.share() >= 0.5, self.above, self.below).detach()

    def regulariser(self, beta: float) -> Tensor:
        """1 - |2 h(V) - 1|^beta, summed over the weights that have two grid points: a scalar."""
        free = self.above > self.below
        return ((1 - (2 * self.share() - 1).abs().pow(beta)) * free).sum()

    def free(self) -> int:
        """Number of weights with two grid points."""
        return int((self.above > self.below).sum())


def reconstruct(
    net: CompressedModel,
    model: nn.Module,
    batches: Sequence[Any],
    steps: int = 500,
    seed: int = 0,
    observe: Observe = lambda block, blocks, step, loss: None,
    regulariser: float = 1.0,
) -> tuple[BlockError, ...]:
    """Learn the rounding of all weights, and the ranges of activations, block by block; `net` changes in place.

    Args:
        net: frozen: its decisions are final.
        model: the float model, of the same names, in whose outputs the blocks are fitted.
        batches: inputs (a tensor `[B, ...]`, positional arguments or keywords), a few hundred samples together.
        steps: of Adam for each block, each on BATCH samples.
        seed: of the samples of each step and of the dropped roundings.
        observe: is told the block, the number of blocks, the step and the loss.
        regulariser: weight of the term that drives h(V) to 0 or 1.

    Raises JpqError where the batches hold fewer than two samples.
    """
    if sum(map(batch_size, batches)) < 2:
        raise JpqError("A reconstruction needs at least two samples: give more data.")
    names = {layer.name for layer in net.network.layers if net.quantizers(layer.name)}
    blocks = find_blocks(model, names, batches[0])
    errors = []
    with eval_mode(net), eval_mode(model):
        for number, block in enumerate(blocks):
            inputs, _ = record_calls(net.model, block.name, batches)
            _, targets = record_calls(model, block.name, batches, output=True)

            def tell(step: int, loss: float, number: int = number) -> None:
                observe(number, len(blocks), step, loss)

            fit = _BlockFit(net, block, inputs, targets, steps, seed + number, regulariser)
            errors.append(fit.run(tell))
    return tuple(errors)


@torch.no_grad()
def record_calls(model: nn.Module, name: str, batches: Sequence[Any], output: bool = False) -> tuple[list[Any], Tensor]:
    """(the positional arguments of a module's call, its output) over all batches, tensors joined along dim 0.

    Without `output` the forward pass ends at the module, and the output is empty.
    """
    calls: list[tuple[Any, ...]] = []
    outputs: list[Tensor] = []

    def before(module: nn.Module, args: Any) -> None:
        calls.append(tuple(a.detach() if isinstance(a, Tensor) else a for a in args))
        if not output:
            raise _Stop

    def after(module: nn.Module, args: Any, result: Tensor) -> None:
        outputs.append(result.detach())
        raise _Stop

    module = model.get_submodule(name)
    handles = [module.register_forward_pre_hook(before)]
    handles += [module.register_forward_hook(after)] if output else []
    try:
        for batch in batches:
            try:
                call_model(model, batch)
            except _Stop:
                continue
    finally:
        for handle in handles:
            handle.remove()
    joined = [torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0] for parts in zip(*calls, strict=True)]
    return joined, torch.cat(outputs) if outputs else torch.empty(0)


class _BlockFit:
    """One block of the compressed model, fitted to the float model's output.

    Args:
        net: the compressed model, in evaluation mode.
        block: its name and layers.
        inputs: positional arguments of the block, tensors `[N, ...]`.
        targets: the float model's output of the block, `[N, ...]`.
        steps: of Adam.
        seed: of samples and dropped roundings.
        regulariser: weight of the regulariser.
    """

    def __init__(
        self,
        net: CompressedModel,
        block: Block,
        inputs: Sequence[Any],
        targets: Tensor,
        steps: int,
        seed: int,
        regulariser: float,
    ) -> None:
        self.net, self.block, self.inputs, self.targets, self.steps = net, block, inputs, targets, steps
        self.regulariser = regulariser
        self.module: Any = net.model.get_submodule(block.name)
        self.draw = torch.Generator(targets.device).manual_seed(seed)
        self.pairs = {name: pair for name in block.layers if (pair := net.quantizers(name))}
        self.roundings = {name: self._rounding(name) for name in self.pairs}

    def run(self, tell: Callable[[int, float], None]) -> BlockError:
        """Fit, write the weights back, and give the errors before and after."""
        before = self.error()
        if before > 0:
            self.fit(before, tell)
            self.write()
        return BlockError(self.block.name, len(self.pairs), before, self.error())

    def fit(self, scale: float, tell: Callable[[int, float], None]) -> None:
        """Learn V and the ranges of activations; `scale`: the squared error of rounding to nearest."""
        ranges = [activation.log_threshold for _, activation in self.pairs.values()]
        logits = [rounding.logits for rounding in self.roundings.values()]
        optim = torch.optim.Adam([{"params": logits, "lr": ROUNDING_LR}, {"params": ranges, "lr": RANGE_LR}])
        free = max(1, sum(rounding.free() for rounding in self.roundings.values()))
        with self._soft_weights(), self._drop_rounding(), _only_trainable(self.net, [*logits, *ranges]):
            for step in range(self.steps):
                optim.param_groups[1]["lr"] = RANGE_LR * 0.5 * (1 + math.cos(math.pi * step / self.steps))
                rows = torch.randint(len(self.targets), (BATCH,), generator=self.draw, device=self.targets.device)
                loss = (self.call(rows) - self.targets[rows]).square().mean() / scale
                position = (step / self.steps - WARM_UP) / (1 - WARM_UP)
                if position >= 0:
                    beta = BETA[1] + 0.5 * (BETA[0] - BETA[1]) * (1 + math.cos(math.pi * position))
                    total = sum((r.regulariser(beta) for r in self.roundings.values()), torch.zeros_like(loss))
                    loss = loss + self.regulariser * total / free
                optim.zero_grad()
                loss.backward()
                optim.step()
                tell(step, float(loss.detach()))

    @torch.no_grad()
    def write(self) -> None:
        """Put the chosen grid points into the weights; masked ones keep what is behind the mask."""
        for name, rounding in self.roundings.items():
            weight = original(self.net.layer(name), "weight")
            weight.copy_(torch.where(self.net.layer(name).weight == 0, weight, rounding.hard()))

    def call(self, rows: Tensor) -> Tensor:
        """The block's output for some of the samples."""
        return self.module(*(a[rows] if isinstance(a, Tensor) else a for a in self.inputs))

    @torch.no_grad()
    def error(self) -> float:
        """Mean squared error of the block's output over all samples."""
        total = 0.0
        for rows in torch.arange(len(self.targets), device=self.targets.device).split(4 * BATCH):
            total += float((self.call(rows) - self.targets[rows]).double().square().sum())
        return total / self.targets.numel()

    def _rounding(self, name: str) -> _Rounding:
        return _Rounding.of(self.pairs[name][0], self.net.layer(name).weight.detach())

    @contextmanager
    def _soft_weights(self) -> Iterator[None]:
        """A context in which weights are the soft ones."""

        def replace(rounding: _Rounding) -> Any:
            def hook(module: nn.Module, args: Any, result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                return (rounding.soft(), *result[1:])

            return hook

        handles = [r.grid.register_forward_hook(replace(r)) for r in self.roundings.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _drop_rounding(self) -> Iterator[None]:
        """A context in which activations learn their ranges, and stay unrounded here and there."""

        pool = torch.empty(POOL, device=self.targets.device).bernoulli_(1 - DROP, generator=self.draw)

        def hook(module: nn.Module, args: tuple[Tensor, ...], result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (x,), rounded = args, result[0]
            repeated = pool.repeat(-(-x.numel() // POOL)) if x.numel() > POOL else pool
            turned = repeated.roll(int(torch.randint(POOL, (), generator=self.draw, device=pool.device)))
            return (torch.lerp(x, rounded, turned[: x.numel()].view(x.shape)), *result[1:])

        grids = [activation for _, activation in self.pairs.values()]
        handles = [grid.register_forward_hook(hook) for grid in grids]
        for grid in grids:
            grid.train()
        try:
            yield
        finally:
            for handle, grid in zip(handles, grids, strict=True):
                handle.remove()
                grid.eval()


@contextmanager
def _only_trainable(net: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """A context in which only these parameters get gradients."""
    kept = {id(p) for p in parameters}
    others = [p for p in net.parameters() if p.requires_grad and id(p) not in kept]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)
