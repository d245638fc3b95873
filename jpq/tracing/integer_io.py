"""Number formats between layers: which layers read and write int8, and where an output quantizer would help.

A convolution whose result meets a residual sum, a pooling or several consumers hands on floating point, and runtimes
then compute all of it in floating point. With a quantizer on the result they do not. Rounding there changes the
function, so it is part of the model that trains (`attach(..., output_bits=8)`), never added at export.

The quantizer sits behind the normalisation that alone reads the convolution (export folds that one), else behind the
convolution. Where ReLU follows, the grid starts at 0: rounding then does what ReLU does, and all levels are of use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn
from torch.fx import Node

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")

_IDENTITIES = {"alias", "clone", "detach", "dropout", "dropout_"}  # ops that change nothing in evaluation

_MOVES = {"view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", *_IDENTITIES}

_FUSED = {"batch_norm", "relu", "relu_", "hardtanh", "hardtanh_", *_IDENTITIES}  # ops that runtimes fold into a layer


@dataclass(frozen=True)
class OutputQuantPoint:
    """A module whose output can be quantized, and whether the quantizer must be signed."""

    module: str
    signed: bool


def integer_forms(layers: Collection[Node]) -> dict[Node, str]:
    """Layer call -> "READS>HANDS ON", each "int8" or "float", if all layers of the graph are quantized."""
    known = set(layers)
    consumer = {layer: _only_consumer(layer, known) for layer in known}
    fed = {node for node in consumer.values() if node is not None}
    return {
        layer: f"{'int8' if layer in fed else 'float'}>{'int8' if consumer[layer] is not None else 'float'}"
        for layer in layers
    }


def find_output_quant_points(
    layers: Mapping[Node, str], forms: Mapping[Node, str], model: nn.Module
) -> dict[Node, OutputQuantPoint]:
    """Layer call -> where its result can be rounded, for convolutions that run once and hand on floating point.

    Args:
        layers: layer call -> name of its module.
        forms: layer call -> its form, as `integer_forms` gives it.
        model: the traced model.

    What goes to the model's output without further computation is left out.
    """
    if not layers:
        return {}
    module_of = {node: _module_path(node) for node in next(iter(layers)).graph.nodes}
    calls = Counter(module_of.values())
    points = {}
    for layer, name in layers.items():
        convolution = forms[layer].endswith(">float") and _op_name(layer) in _CONVOLUTIONS
        if not convolution or module_of[layer] != name or calls[name] != 1:
            continue
        last, path = layer, name
        norm = _single_user(layer)
        if norm is not None and calls[module_of[norm]] == 1 and _is_batch_norm(norm, model, module_of[norm]):
            last, path = norm, module_of[norm]
        if not _only_returned(last.users):
            points[layer] = OutputQuantPoint(path, not _cuts_negatives(_single_user(last)))
    return points


def _only_consumer(layer: Node, layers: set[Node]) -> Node | None:
    """The one layer that reads this layer's result past fused ops, if nothing else reads it."""
    node = layer
    while len(node.users) == 1:
        (user,) = node.users
        if user in layers:
            return user if user.args and user.args[0] is node else None
        if _op_name(user) not in _FUSED:
            return None
        node = user
    return None


def _single_user(node: Node) -> Node | None:
    """The one node that reads this one, past ops that change nothing."""
    while len(node.users) == 1:
        (node,) = node.users
        if _op_name(node) not in _IDENTITIES:
            return node
    return None


def _is_batch_norm(node: Node, model: nn.Module, path: str) -> bool:
    """Whether the call is that of a BatchNorm module at `path`."""
    return _op_name(node) == "batch_norm" and isinstance(model.get_submodule(path), nn.modules.batchnorm._BatchNorm)


def _only_returned(users: Collection[Node]) -> bool:
    """Whether the value only goes to the model's output, merely moved."""
    return all(user.op == "output" or (_op_name(user) in _MOVES and _only_returned(user.users)) for user in users)


def _cuts_negatives(node: Node | None) -> bool:
    """Whether the op sets negative numbers to 0, as ReLU and ReLU6 do."""
    op = _op_name(node).rstrip("_")
    return op == "relu" or (op == "hardtanh" and node is not None and len(node.args) > 1 and bool(node.args[1] == 0))


def _op_name(node: Node | None) -> str:
    """The op without namespace and overload: aten.relu_.default -> relu_; empty for None."""
    return "" if node is None else "".join(str(node.target).split(".")[1:2])


def _module_path(node: Node) -> str:
    """Path of the innermost module that makes this call."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).split("@")[0] if stack else ""
