"""In what form a quantized layer reads and hands on: as 8-bit integers, or in floating point.

A runtime's integer kernel computes DequantizeLinear, layer, (ReLU), QuantizeLinear in one. So a layer hands on integers
where nothing but a normalisation (which export folds) and an activation with the same role as ReLU stands between it
and exactly one other layer; after a residual sum, a pooling or where several read, it hands on floating point.
"""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import Node

_THROUGH = {"batch_norm", "relu", "relu_", "hardtanh", "hardtanh_", "dropout", "dropout_", "alias", "clone", "detach"}


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
