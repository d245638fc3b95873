"""The effect of each ATen op on channel labels: `RULES`, op name -> rule.

An op without a rule freezes every channel that it touches, and is listed in `Network.unknown_ops`; `jpq inspect` shows
both. A rule of your own lifts that. It gets the call and returns, for each dim of the output, the labels that this dim
carries (a label per index), or None where it carries none. Take an op that scales channels and squashes them, with one
scale per channel:

    import torch
    from torch import Tensor

    from jpq.tracing.rules import Dims, OpCall, rule

    @torch.library.custom_op("mine::squash", mutates_args=())
    def squash(x: Tensor, scale: Tensor) -> Tensor:
        return torch.tanh(x * scale[:, None, None])

    @squash.register_fake
    def _(x: Tensor, scale: Tensor) -> Tensor:
        return torch.empty_like(x)

    @rule("mine.squash")
    def squash_rule(call: OpCall) -> Dims:
        dims = call.dims(call["x"])
        call.bind(call["scale"], 0, dims[1])
        return dims

`call["x"]` is an argument by the name in the op's schema (a node of the graph where it is a tensor), `call.dims` gives
the labels of a tensor, `call.bind` says that a dim of a parameter shrinks with these channels, `call.join` ties two
dims, `call.merge` joins operands as broadcasting aligns them, and `call.freeze` keeps channels, for a reason that the
report shows. A rule must be true: a channel that it hands on may be removed, and the op must then compute the same for
the others. An op that mixes channels freezes them or, like a layer, returns new ones.
"""

from __future__ import annotations

from jpq.tracing.op_call import RULES, Dims, OpCall, Rule, rule
from jpq.tracing.rules import layers, movement, pointwise, reshape

__all__ = ["MEMBERS", "RULES", "Dims", "OpCall", "Rule", "rule"]

MEMBERS = (layers, movement, pointwise, reshape)  # importing them fills the table
