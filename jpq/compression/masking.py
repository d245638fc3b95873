"""The effect of gates on layers: masks that multiply weights, and noise that multiplies inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

from jpq.methods.gates import Gate
from jpq.methods.structures import Structure
from jpq.tracing.checkpointing import in_checkpoint, uncounted
from jpq.types import NONE, Weight


class GateSample:
    """The sample of one gate in a forward pass, shared by all taps of its site.

    Args:
        gate: the gate.
        reach: the float weights that its taps mask, each with its structure, for gates that need weights. They are no
            modules: these hold the samples of other gates, and copies of a deep network would recurse through all.
        number: of the gate among those of the model.
    """

    def __init__(self, gate: Gate, reach: Sequence[tuple[Tensor, Structure]] = (), number: int = 0):
        self.gate, self.reach = gate, list(reach)
        seed = (torch.initial_seed() + number) % 2**63
        self._seeds = torch.Generator().manual_seed(seed)  # of noise that is drawn inside checkpoints of activations
        self.part: tuple[int, int, int] | None = None  # size of the whole batch, and this process's part of it
        self.resample()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the noise of a forward pass, and without the graph behind the sample."""
        z = None if self.z is None else self.z.detach()
        return {**vars(self), "z": z, "_noise": {}}

    def show_weights(self) -> None:
        """Pass the present float weights to the gate (`Gate.observe_weights`)."""
        if self.gate.needs_weights and self.reach:
            self.gate.observe_weights(self.reach)

    def resample(self) -> None:
        """Draw a new sample, at the start of a forward pass."""
        self.show_weights()
        self.z = self.gate.multiplier()
        self._noise: dict[int, Tensor | None] = {}

    def noise(self, batch: int) -> Tensor | None:
        """Noise of the units, `[batch, n]`, the same for every consumer in one forward pass; None for none."""
        if batch not in self._noise:
            total, start, stop = self.part or (batch, 0, batch)
            if batch < stop - start:  # one sample without a batch dim
                total, start, stop = batch, 0, batch
            each = batch // (stop - start)  # rows per sample, where a layer splits samples into several rows
            noise = self._draw(total * each)
            self._noise[batch] = None if noise is None else noise[start * each : stop * each]
        return self._noise[batch]

    def _draw(self, rows: int) -> Tensor | None:
        """New noise of this many rows; inside a checkpoint of activations it is no part of what that computes again."""
        if not in_checkpoint():
            return self.gate.input_noise(rows)
        device = next(self.gate.parameters(), torch.empty(0)).device
        with uncounted(int(torch.randint(2**62, (), generator=self._seeds)), device):
            return self.gate.input_noise(rows)


def parametrize_weight(module: nn.Module, name: str, parametrization: nn.Module) -> None:
    """Let a module's parameter be computed by a parametrization, in a module that can be pickled.

    torch gives the module a class made while the program runs, and refuses to pickle it.
    """
    parametrize.register_parametrization(module, name, parametrization, unsafe=True)
    type(module).__reduce__ = _reduce_parametrized  # type: ignore[assignment]


def _reduce_parametrized(module: nn.Module) -> tuple[Any, ...]:
    """How a parametrized module is pickled: the class behind its own, the names of its parameters, its attributes."""
    names = tuple(module.parametrizations.keys())  # type: ignore[operator,union-attr]
    return _empty_parametrized, (parametrize.type_before_parametrizations(module), names), dict(vars(module))


def _empty_parametrized(kind: type[nn.Module], names: Sequence[str]) -> nn.Module:
    """A module of a class with parametrized parameters, whose attributes are still to be set."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name in names:
        module.register_parameter(name, nn.Parameter(torch.zeros(())))
        parametrize_weight(module, name, nn.Identity())
    return module


def original(module: nn.Module, name: str) -> Tensor:
    """The trainable float weight behind the masks of a module's parameter."""
    if parametrize.is_parametrized(module, name):
        return module.parametrizations[name].original  # type: ignore[index,union-attr]
    return getattr(module, name)


class MaskParametrization(nn.Module):
    """Parametrization of a weight: its product with the masks of all taps on it."""

    def __init__(self, taps: Sequence[tuple[GateSample, Structure]]):
        super().__init__()
        self.taps = list(taps)

    def forward(self, weight: Weight) -> Weight:
        """weight * expand(z) for each tap; backward as without a mask where the gate is straight-through."""
        for draw, structure in self.taps:
            if draw.z is None:
                continue
            masked = weight * structure.expand(draw.z, weight.shape)
            weight = weight + (masked - weight).detach() if draw.gate.straight_through else masked
        return weight


class InputNoise:
    """Noise per sample that multiplies the input of one layer, gathered from the gates of its input channels.

    Args:
        taps: samples of gates, each with the places of its units along the weight's input dim.
        rank: dims of the layer's weight, which are as many as those of its input with a batch dim (2 for an nn.Linear,
            whose channels lie last, behind any number of other dims).
    """

    def __init__(self, taps: Sequence[tuple[GateSample, Any]], rank: int):
        self.taps, self.rank = list(taps), rank

    def __call__(self, x: Tensor) -> Tensor | None:
        """The noise, a tensor that broadcasts to x; None for none. An x without a batch dim is one sample."""
        samples = x.shape[0] if x.dim() >= self.rank else 1
        channel_dim = x.dim() - 1 if self.rank == 2 else x.dim() - self.rank + 1
        total = None
        for draw, axis in self.taps:
            noise = draw.noise(samples)
            if noise is None:
                continue
            index = torch.as_tensor(axis.index, device=x.device)
            index = index.repeat(x.shape[channel_dim] // len(index))  # a weight may hold the channels of one group only
            padded = torch.cat([noise, noise.new_ones(len(noise), 1)], 1)
            part = padded[:, torch.where(index == NONE, axis.n, index)]
            total = part if total is None else total * part
        if total is None:
            return None
        shape = [1] * x.dim()
        shape[channel_dim] = -1
        if x.dim() >= self.rank:
            shape[0] = samples
        return total.reshape(shape)
