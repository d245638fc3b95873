"""Where a convolution's result could be put on a grid of its own, so that an integer kernel computes it whole.

A convolution whose result meets a residual sum, a pooling or several readers hands on floating point (see forms.py),
and runtimes then compute all of it in floating point. With a quantizer on the result they do not. Rounding there
changes the function, so it is part of the model that trains (`attach(..., output_bits=8)`), never added at export.

It sits behind the normalisation that alone reads the convolution (export folds that one), else behind the convolution.
Where ReLU follows, the grid starts at 0: rounding then does what ReLU does, and all levels are of use.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn
from torch.fx import Node

_SAME = {"alias", "clone", "detach", "dropout", "dropout_"}  # in evaluation

_PLAIN = {"view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", *_SAME}

_THROUGH = {"batch_norm", "relu", "relu_", "hardtanh", "hardtanh_", "dropout", "dropout_", "alias", "clone", "detach"}


@dataclass(frozen=True)
class OutputQuantPoint:
    """The module whose output would be rounded."""

    module: str
    signed: bool


def ends(layers: Mapping[Node, str], forms: Mapping[Node, str], model: nn.Module) -> dict[Node, OutputQuantPoint]:
    """Layer call -> where its result can be rounded; only convolutions that run once and hand on floating point.

    `layers`: layer call -> name of its module. What goes to the model's output as it is stays as it is.
    """
    named: dict[Node, str] = {}
    for call in layers:
        for node in call.graph.nodes:
            named[node] = _module(node)
        break
    found = {}
    for call, name in layers.items():
        if not forms[call].endswith(">float") or _op(call) not in ("conv1d", "conv2d", "conv3d", "convolution"):
            continue
        if named[call] != name or list(named.values()).count(name) != 1:
            continue
        last, where = _through(call), name
        if last is not None and _op(last) == "batch_norm" and list(named.values()).count(named[last]) == 1:
            norm = model.get_submodule(named[last])
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                call, where = last, named[last]
        reader = _through(call)
        if not _only_given(call.users):
            found[next(n for n, m in layers.items() if m == name)] = OutputQuantPoint(where, not _positive(reader))
    return found


def _through(node: Node) -> Node | None:
    """The one node that reads this one, past what changes nothing."""
    while len(node.users) == 1:
        (node,) = node.users
        if _op(node) not in _SAME:
            return node
    return None


def _only_given(readers: Collection[Node]) -> bool:
    """Whether nothing but the model's caller reads this, merely moved."""
    return all(r.op == "output" or (_op(r) in _PLAIN and _only_given(r.users)) for r in readers)


def _positive(node: Node | None) -> bool:
    """Whether it takes negative numbers away, as ReLU and ReLU6 do."""
    op = _op(node).rstrip("_")
    return op == "relu" or (op == "hardtanh" and node is not None and len(node.args) > 1 and bool(node.args[1] == 0))


def _op(node: Node | None) -> str:
    return "" if node is None else "".join(str(node.target).split(".")[1:2])


def _module(node: Node) -> str:
    """Path of the innermost module that makes this call."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).split("@")[0] if stack else ""


def forms(layers: Collection[Node]) -> dict[Node, str]:
    """Layer call -> "READS>HANDS ON", each int8 or float."""
    known = set(layers)
    reader = {layer: _only_reader(layer, known) for layer in known}
    fed = {node for node in reader.values() if node is not None}
    return {
        layer: f"{'int8' if layer in fed else 'float'}>{'int8' if reader[layer] is not None else 'float'}"
        for layer in layers
    }


def _only_reader(layer: Node, layers: set[Node]) -> Node | None:
    """The one layer that reads what this one makes, if nothing else does."""
    node = layer
    while len(node.users) == 1:
        (user,) = node.users
        if user in layers:
            return user if user.args and user.args[0] is node else None
        if "".join(str(user.target).split(".")[1:2]) not in _THROUGH:
            return None
        node = user
    return None
