"""What a gate's decision does to the layers that it reaches: a mask on weights, noise on inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

from jpq.methods.gates import Gate
from jpq.methods.structures import Structure
from jpq.types import NONE, Weight


class GateSample:
    """What one gate's decision is in this forward pass: every tap sees the same.

    Args:
        gate: the gate.
        reach: what its taps multiply: (module, name of its weight, structure), for gates that look at weights.
    """

    def __init__(self, gate: Gate, reach: Sequence[tuple[nn.Module, str, Structure]] = ()):
        self.gate, self.reach = gate, list(reach)
        self.part: tuple[int, int, int] | None = None  # samples of a batch, and which of them are this process's
        self.resample()

    def show_weights(self) -> None:
        """Show the gate the float weights as they stand."""
        if self.gate.needs_weights and self.reach:
            self.gate.observe_weights([(original(module, name), structure) for module, name, structure in self.reach])

    def resample(self) -> None:
        """A new draw, at the start of a forward pass."""
        self.show_weights()
        self.z = self.gate.multiplier()
        self._noise: dict[int, Tensor | None] = {}

    def noise(self, batch: int) -> Tensor | None:
        """`[batch, n]`, the same for every consumer in one forward pass."""
        if batch not in self._noise:
            whole, start, stop = self.part or (batch, 0, batch)
            each = batch // (stop - start)  # rows of a sample, where it was cut into several
            noise = self.gate.input_noise(whole * each)
            self._noise[batch] = None if noise is None else noise[start * each : stop * each]
        return self._noise[batch]


def original(module: nn.Module, name: str) -> Tensor:
    """The trainable weight behind the masks."""
    if parametrize.is_parametrized(module, name):
        return module.parametrizations[name].original  # type: ignore[index,union-attr]
    return getattr(module, name)


class MaskParametrization(nn.Module):
    """Parametrization of a weight: times the mask of every tap on it."""

    def __init__(self, taps: Sequence[tuple[GateSample, Structure]]):
        super().__init__()
        self.taps = list(taps)

    def forward(self, weight: Weight) -> Weight:
        """weight * expand(z) for each tap; where the gate says so, backward as if there were no mask."""
        for draw, structure in self.taps:
            if draw.z is None:
                continue
            masked = weight * structure.expand(draw.z, weight.shape)
            weight = weight + (masked - weight).detach() if draw.gate.straight_through else masked
        return weight


class InputNoise:
    """Noise per sample that multiplies the input of one layer, gathered from the gates that it reads."""

    def __init__(self, taps: Sequence[tuple[GateSample, Any]], channel_dim: int, groups: int = 1):
        self.taps, self.channel_dim, self.groups = list(taps), channel_dim, groups

    def __call__(self, x: Tensor) -> Tensor | None:
        """A tensor that broadcasts to x, or None."""
        total = None
        for draw, axis in self.taps:
            noise = draw.noise(x.shape[0])
            if noise is None:
                continue
            index = torch.as_tensor(axis.index, device=x.device).repeat(self.groups)  # the same channels of each group
            padded = torch.cat([noise, noise.new_ones(len(noise), 1)], 1)
            part = padded[:, torch.where(index == NONE, axis.n, index)]
            total = part if total is None else total * part
        if total is None:
            return None
        shape = [1] * x.dim()
        shape[0], shape[self.channel_dim] = x.shape[0], -1
        return total.reshape(shape)
