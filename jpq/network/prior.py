"""Bayesian Bits' own regulariser: additive in the bits of weights and activations, weighted by multiply-accumulates.

M. van Baalen et al., "Bayesian Bits", NeurIPS 2020, arXiv:2005.07093; the loss there is task + mu * R with

    R = sum over weights      of w * mean over channels of (2 q_2 + 4 q_2 q_4 + 8 q_2 q_4 q_8 + ...)
      + sum over activations  of w * (1 + 4 q_4 + 8 q_4 q_8 + ...)            w = MACs / MACs of the largest layer

jpq's budget replaces it: bit-operations are a product of bits, R is not. It is here for whoever wants the paper's loss
in a loop of their own: `loss + mu * prior(net.net)`, with mu around 0.01 to 0.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jpq.network.compressed import Compressed
from jpq.quantizers import Gated
from jpq.types import JpqError


def prior(net: Compressed) -> Tensor:
    """R of a network under compression, a scalar that is differentiable by every bit gate and every channel gate.

    An activation that several layers read has a quantizer in each of them here, each with the MACs of its layer: at
    equal gates that adds up to the paper's one term with summed MACs. Widths that have no gates add nothing.

    Raises JpqError where no width has gates: R would be a constant.
    """
    _, outputs = net.shares.soft([gate.alive() for gate in net.gates])  # mean of q_2 over a layer's channels
    largest = max(layer.macs for layer in net.network.layers)
    total = torch.zeros((), device=next(net.parameters()).device)
    gated = False
    for layer, share in zip(net.network.layers, outputs, strict=True):
        pair = net.quantizers(layer.name)
        if pair is None:
            continue
        weight, act = (q.width for q in pair)
        if isinstance(weight, Gated):
            total = total + layer.macs / largest * share * weight.price()
        if isinstance(act, Gated):
            total = total + layer.macs / largest * (act.price() - act.choices[0] + 1)
        gated = gated or isinstance(weight, Gated) or isinstance(act, Gated)
    if not gated:
        raise JpqError(f"Method '{net.method}' has no bit gates to regularise: use --method bayesian-bits.")
    return total
