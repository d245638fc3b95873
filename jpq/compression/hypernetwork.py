"""Hypernetworks: weights of convolutions, generated from latent vectors of their input and output channels.

    Z = z_in z_out^T + B0          E[i, j] = Z[i, j] w1[i, j] + b1[i, j]          O[i, j] = W2[i, j] E[i, j] + b2[i, j]

for every kernel (input i, output j), E in R^8. Y. Li et al., "DHP", ECCV 2020, arXiv:2003.13683.

| paper | here | shape |
|---|---|---|
| z_in, z_out | the sites' gates, gathered by label; `own` in channels of no site (image, logits) | [c], [n] |
| B0 | `b0` | [c, n] |
| w1, b1 | `w1`, `b1` | [c, n, m], m = 8 |
| W2 | `w2` | [c, n, k*k, m] |
| b2 | the layer's own parameter | [n, c, k, k] |

A channel is cut by its index in all of them: once the biases are not 0, z_j = 0 does not make its slice 0.

We differ: W2 starts so that the pretrained weight is generated exactly with z = 1 and biases 0 (of all such W2 the one
nearest to the paper's draw). Transposed convolutions and linear layers stay ordinary parameters: W2 holds eight times
the weights. A grouped or depthwise convolution has an input latent of its own (`own`), as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

from jpq.compression.masking import parametrize_weight
from jpq.methods.gates import Gate
from jpq.tracing.network import Layer, LayerKind
from jpq.tracing.sites import Site
from jpq.types import Labels, Weight

EMBEDDING = 8  # size m of the hypernetwork's embedding


def generate_weight(z_in: Tensor, z_out: Tensor, b0: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    """The generated weight O without b2, `[n, c, k*k]`, from latents `[c]` and `[n]`."""
    z = z_in[:, None] * z_out[None] + b0
    embedded = z[:, :, None] * w1 + b1
    return (w2 @ embedded[..., None]).squeeze(3).transpose(0, 1)


class Generated(nn.Module):
    """Parametrization of a weight that is generated from latents; it generates `weight` at first.

    Args:
        weight: `[n, c, *kernel]`.
        gates: the gates whose latents it is generated from.
        inputs, outputs: for each input `[c]` and output `[n]` its index into the concatenated latents of `gates`;
            indices beyond them are the layer's own.
    """

    inputs: Tensor
    outputs: Tensor

    def __init__(self, weight: Weight, gates: Sequence[Gate], inputs: Labels, outputs: Labels):
        super().__init__()
        self._gates = list(gates)  # in a list, so that their parameters are not this module's
        shared = sum(gate.n for gate in gates)
        own = max(0, int(max(inputs.max(), outputs.max())) + 1 - shared)
        n, c = weight.shape[:2]
        flat = weight.detach().reshape(n, c, -1).transpose(0, 1)  # [c, n, k*k]
        m = EMBEDDING
        self.own = nn.Parameter(weight.new_ones(own))
        self.b0 = nn.Parameter(weight.new_zeros(c, n))
        self.w1 = nn.Parameter((torch.rand(c, n, m).to(weight) * 2 - 1) * 3**0.5)
        self.b1 = nn.Parameter(weight.new_zeros(c, n, m))
        drawn = (torch.rand(*flat.shape, m).to(weight) * 2 - 1) * (3 / (m * flat[0, 0].numel() * c)) ** 0.5
        w1 = self.w1.detach()[:, :, None]
        rest = flat - (drawn * w1).sum(3)
        self.w2 = nn.Parameter(drawn + rest[..., None] * w1 / w1.square().sum(3, keepdim=True))
        self.register_buffer("inputs", torch.as_tensor(inputs, device=weight.device))
        self.register_buffer("outputs", torch.as_tensor(outputs, device=weight.device))

    def forward(self, b2: Weight) -> Weight:
        """The weight, shaped like b2."""
        z = torch.cat([gate.latent()[0] for gate in self._gates] + [self.own])
        weight = generate_weight(z[self.inputs], z[self.outputs], self.b0, self.w1, self.b1, self.w2)
        return weight.reshape(b2.shape) + b2


class Hypernetworks:
    """Puts a hypernetwork on each convolution that reads or makes channels of a site whose gate generates weights."""

    def __init__(self, sites: Sequence[Site], gates: Sequence[Gate]):
        self.gates = [gate for gate in gates if gate.generates_weights]
        self.places: dict[int, tuple[int, int]] = {}  # label -> (gate, unit)
        chosen = [site for site, gate in zip(sites, gates, strict=True) if gate.generates_weights]
        for g, site in enumerate(chosen):
            self.places.update({int(label): (g, unit) for unit, label in enumerate(site.labels)})

    def register(self, model: nn.Module, layer: Layer) -> None:
        """Generate the layer's weight by a hypernetwork where that is possible; its value does not change."""
        if not self.gates or layer.kind is not LayerKind.CONV or layer.weight != f"{layer.name}.weight":
            return
        c = layer.weight_shape[1]
        inputs = layer.inputs if layer.groups == 1 else np.full(c, -1)
        used = sorted({self.places[int(v)][0] for v in [*inputs, *layer.outputs] if int(v) in self.places})
        if not used:
            return
        starts = dict(zip(used, np.cumsum([0, *[self.gates[g].n for g in used]]).tolist(), strict=False))
        behind = sum(self.gates[g].n for g in used)

        def place(labels: Labels, behind: int) -> Labels:
            places = [self.places.get(int(label)) for label in labels]
            unshared = iter(range(behind, behind + len(places)))
            return np.array(
                [starts[position[0]] + position[1] if position else next(unshared) for position in places], np.int64
            )

        reads = place(inputs, behind)
        makes = place(layer.outputs, max(behind, int(reads.max()) + 1))
        module = model.get_submodule(layer.name)
        weight: Tensor = module.weight  # type: ignore[assignment]
        hyper = Generated(weight, [self.gates[g] for g in used], reads, makes)
        parametrize_weight(module, "weight", hyper)
        with torch.no_grad():
            module.parametrizations.weight.original.zero_()  # type: ignore[union-attr,operator]


@torch.no_grad()
def bake_hypernetwork(model: nn.Module, layer: Layer) -> None:
    """Replace the hypernetwork of a layer by the weight that it generates, an ordinary parameter."""
    owner, _, name = layer.weight.rpartition(".")
    module = model.get_submodule(owner)
    if not parametrize.is_parametrized(module, name):
        return
    chain: Any = module.parametrizations[name]  # type: ignore[index]
    if isinstance(chain[0], Generated):
        chain.original.copy_(chain[0](chain.original))
        chain[0] = nn.Identity()
