"""Norms that a model's code writes by hand: averages over channels that only scale or shift those same channels.

RMSNorm as LLaMA, Qwen and T5 write it is `x * rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)`, GRN of ConvNeXt V2 is
`g / (g.mean(-1, keepdim=True) + eps)`, and LayerNorm has two such averages. Such an average is to its channels what
the statistic of a torch norm is, so `open_norms` may free them.
"""

from __future__ import annotations

import operator

import numpy as np
from torch.fx import Node

from jpq.tracing.op_call import OpCall, TraceState, shape_of
from jpq.types import Labels

REASON = "inside a hand-written norm's average"

AVERAGES = ("aten.mean", "aten.var", "aten.std", "aten.var_mean", "aten.std_mean")

_SCALING = ("mul", "div", "true_divide", "sub", "add", "addcmul", "addcdiv")  # ops by which the average meets channels

_ALONE = """mul div true_divide sub add rsub rsqrt sqrt reciprocal pow square neg abs exp log to _to_copy type_as clamp
clamp_min clamp_max maximum unsqueeze expand contiguous clone detach alias float double half getitem"""

_CHECKS = ("_assert_tensor_metadata", "sym_size")


def is_norm_average(call: OpCall, labels: Labels) -> bool:
    """Whether the average that this call takes over `labels` reaches nothing but these channels, as their scale."""
    if call.op not in AVERAGES:
        return False
    pending, seen, used = [call.node], {call.node}, False
    while pending:
        source = pending.pop()
        for user in source.users:
            name = _op_name(user)
            if user in seen or name in _CHECKS:
                continue
            others = [node for node in user.all_input_nodes if node is not source]
            if name in _SCALING and any(_carries(call.state, node, labels) for node in others):
                used = True
            elif name in _ALONE.split() and all(_is_no_wider(node, source) for node in others):
                pending.append(user)
                seen.add(user)
            else:
                return False
    return used


def _op_name(node: Node) -> str:
    """The op's name without namespace, overload and in-place mark: aten.add_.Tensor -> add."""
    if node.target is operator.getitem:
        return "getitem"
    return ".".join(str(node.target).split(".")[1:2]).rstrip("_")


def _is_no_wider(node: Node, source: Node) -> bool:
    """Whether a tensor is broadcast over what `source` has, so that the result is a statistic, too."""
    widths, sizes = shape_of(node)[::-1], shape_of(source)[::-1]
    return len(widths) <= len(sizes) and all(n in (1, m) for n, m in zip(widths, sizes, strict=False))


def _carries(state: TraceState, node: Node, labels: Labels) -> bool:
    """Whether a tensor has these channels along some dim: known already, or computed from such by elementwise ops."""
    pending, seen = [node], {node}
    classes = state.classes.find(labels)
    while pending:
        source = pending.pop()
        if source in state.values or source in state.parameters:
            known = [d for d in state.value(source)[0] if d is not None and len(d) == len(labels)]
            if any(np.array_equal(state.classes.find(d), classes) for d in known):
                return True
        elif _op_name(source) in (*_SCALING, *_ALONE.split()):
            pending += [n for n in source.all_input_nodes if n not in seen]
            seen.update(source.all_input_nodes)
    return False
