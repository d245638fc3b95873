"""Counted costs: MACs, bit-operations and bytes.

    MACs  = sum_l macs_l * inputs_l * outputs_l * density_l * positions_l
    BOPs  = sum_l macs_l * inputs_l * outputs_l * density_l * positions_l * w_bits_l * a_bits_l    (a_bits: its input's)
    bytes = sum_l (weights_l * inputs_l * outputs_l * density_l * w_bits_l + mask_l + channels_l * outputs_l * 64) / 8
                                                                                    (layers at 32 bits: 32, not 64)

Structured BOPs count the density only where known devices skip the dropped weights (`Structure.regular`): zeros that
lie anywhere in a layer cost as much as other weights there.

l runs over all that multiplies: layers; products of two computed tensors (attention), which have no weights and whose
operands both count 32 bits; and over tables (embeddings, positions), which are 32-bit weights and multiply nothing.
Bias, normalisation (folded), elementwise products, activations, pooling and adds count no operations. The 64 bits are
the two fp32 numbers that each output channel keeps beside its weights: a scale, and a bias (its own, or that of a
folded normalisation). mask_l are the bits of the mask in the smallest encoding of
`jpq.methods.structures.mask_encoding`.
Source: the conventions of DJPQ (arXiv:2007.10463) and Bayesian Bits (arXiv:2005.07093); kept channels count on both
sides of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jpq.costs.base import LayerUse, Number
from jpq.costs.latency import latency_ns
from jpq.types import DENSE


def macs(uses: Sequence[LayerUse]) -> Number:
    """Multiply-accumulates of one sample."""
    return sum(layer_macs(u) for u in uses)


def layer_macs(u: LayerUse) -> Number:
    """Multiply-accumulates of one layer, or product, for one sample."""
    return u.macs * u.inputs * u.outputs * u.density * u.positions


def bops(uses: Sequence[LayerUse]) -> Number:
    """Bit-operations of one sample."""
    return sum(layer_bops(u) for u in uses)


def layer_bops(u: LayerUse) -> Number:
    """Bit-operations of one layer for one sample."""
    return layer_macs(u) * u.w_bits * u.a_bits


def bops_structured(uses: Sequence[LayerUse]) -> Number:
    """Bit-operations of one sample on devices that compute with unstructured zeros."""
    return bops(structured(uses))


def structured(uses: Sequence[LayerUse]) -> list[LayerUse]:
    """Uses on devices that compute with unstructured zeros: density 1 where the mask is not regular."""
    return [u if u.regular else replace(u, density=1) for u in uses]


def size(uses: Sequence[LayerUse]) -> Number:
    """Bytes of the weights at their bit-widths, of masks, and of scales and biases at 32 bits."""
    weight_bits = sum(u.weights * u.inputs * u.outputs * u.density * u.w_bits for u in uses)
    return (weight_bits + sum(u.mask_bits + u.outputs_all * u.outputs * _channel_bits(u) for u in uses)) / 8


def _channel_bits(u: LayerUse) -> int:
    """Bits that each output channel keeps beside its weights: a scale and a bias; a float layer has no scale."""
    return 32 if isinstance(u.w_bits, int) and u.w_bits == 32 else 64


def dense(u: LayerUse, bits: int = 32) -> LayerUse:
    """Use of the layer with everything kept, at `bits` bits; 32 is the fp32 baseline of percentages."""
    bits = bits if u.part == "layer" else 32
    return replace(u, inputs=1, outputs=1, density=1, w_bits=bits, a_bits=bits, mask_bits=0, scheme=DENSE, positions=1)


def baseline(uses: Sequence[LayerUse]) -> dict[str, float]:
    """Costs of the fp32 model by name; latency (of the layers) only where every layer has measured times."""
    full = [dense(u) for u in uses]
    parameter_bytes = sum(u.weights + u.outputs_all for u in full) * 4
    costs = {"bops": bops(full), "bops-structured": bops(full), "macs": macs(full), "size": parameter_bytes}
    return {**costs, "latency": latency_ns(full)} if are_timed(full) else costs


def are_timed(uses: Sequence[LayerUse]) -> bool:
    """Whether there are layers and all of them have measured times; products and tables never have."""
    layers = [u for u in uses if u.part == "layer"]
    return bool(layers) and all(u.clock for u in layers)
