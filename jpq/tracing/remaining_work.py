"""Multiplications that no op rule has recorded: products of computed tensors, and ops that apply a parameter.

A product with a parameter becomes a layer at 32 bits, whatever op computes it; a product of two computed tensors
becomes work at 32 bits without weights. So every multiplication of the graph is in the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from jpq.tracing.contractions import Contraction, contractions
from jpq.tracing.float_work import is_bare_parameter
from jpq.tracing.network import LayerKind
from jpq.tracing.op_call import Dims, LayerCall, OpCall, ProductCall, TraceState, shape_of
from jpq.types import NONE, Labels


def record_remaining_work(state: TraceState, program: ExportedProgram) -> None:
    """Record a layer call or a product for every multiplication of the graph that no rule has recorded."""
    recorded = {call.node for call in state.calls}
    for node in program.graph.nodes:
        if node.op == "call_function" and node not in recorded:
            if hasattr(node.target, "_schema"):
                _record_node(state, node)
            else:
                _record_subgraphs(state, node, program.graph_module, 1)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    state.calls.sort(key=lambda call: order.get(call.node, -1))  # those of an earlier graph stay in front


def _record_node(state: TraceState, node: Node) -> None:
    """Record the multiplications of one op."""
    call = OpCall(state, node)
    for contraction in contractions(call):
        weight = _weight(state, contraction)
        if weight is None:
            state.products.append(_product(call, contraction))
        else:
            state.calls.append(_layer(call, contraction, weight))


def _weight(state: TraceState, contraction: Contraction) -> int | None:
    """Which operand (0, 1) is made from parameters alone; None where both are, or none is."""
    constant = [node is not None and state.weight_source(node) is not None for node in contraction.operands]
    free = [node is None or state.origins.get(node) != "constant" for node in contraction.operands]
    return next((i for i in (1, 0) if constant[i] and free[1 - i]), None)


def _product(call: OpCall, contraction: Contraction, times: int = 1) -> ProductCall:
    """The record of a product, with the classes of all its indices."""
    indices = dict.fromkeys("".join(contraction.indices))
    dims = tuple(contraction.labels[n] for n in indices if n in contraction.labels)
    path = _module_path(call.node)
    known = tuple(node for node in contraction.operands if node is not None)
    operands = known if len(known) == 2 else tuple(call.node.all_input_nodes)
    return ProductCall(operands, contraction.name, call.op, path, contraction.macs * times, dims)


def _layer(call: OpCall, contraction: Contraction, place: int) -> LayerCall:
    """The record of a layer whose weight is operand `place`: summed indices are inputs, which are always kept."""
    weight, indices = contraction.operands[place], contraction.indices[place]
    assert weight is not None
    source = call.state.weight_source(weight)
    assert source is not None
    summed = [n for n in indices if n not in contraction.result]
    made = [n for n in indices if n in contraction.result]
    rest = [n for n in dict.fromkeys(contraction.indices[1 - place]) if n not in indices]
    sizes, labels = contraction.sizes, contraction.labels
    for n in summed:
        call.freeze(labels.get(n), f"summed over by {call.op}")
    what = "bare parameter" if is_bare_parameter(call.state, weight) else "computed weight"
    return LayerCall(
        node=call.node,
        weight=source,
        kind=LayerKind.LINEAR,
        shape=shape_of(weight),
        groups=1,
        macs=contraction.macs,
        inputs=np.full(prod(sizes[n] for n in summed), NONE, np.int64),
        outputs=_flat_labels(call, made, contraction),
        stride=(),
        size=(),
        positions=tuple(labels[n] for n in rest if n in labels),
        float_reason=f"{call.op} with a {what}",
        key=f"{call.op} {contraction.name} {call.state.expression(weight)}",
    )


def _flat_labels(call: OpCall, made: list[str], contraction: Contraction) -> Labels:
    """The class of every channel that a weight makes, over all its indices in the result; one of them keeps classes."""
    sizes, labels = contraction.sizes, contraction.labels
    labelled = [n for n in made if n in labels]
    for n in labelled[1:]:
        call.freeze(labels[n], f"one of several dims that {call.op} makes")
    shape = [sizes[n] for n in made]
    if not labelled:
        return np.full(prod(shape), NONE, np.int64)
    dims = [-1 if n == labelled[0] else 1 for n in made]
    return np.broadcast_to(labels[labelled[0]].reshape(dims), shape).reshape(-1).copy()


def _record_subgraphs(state: TraceState, node: Node, owner: Any, times: int) -> None:
    """Record the multiplications inside an op that holds graphs: all of a loop's steps, the dearest of its branches.

    How often `while_loop` runs depends on values: it counts once.
    """
    name = str(node.target)
    if "flex_attention" in name:
        q, k, v = (shape_of(n) for n in node.all_input_nodes[:3])
        macs = prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
        state.products.append(
            ProductCall(tuple(node.all_input_nodes), "q@k+weights@v", name, _module_path(node), macs * times, ())
        )
        return
    bodies = [getattr(owner, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"]
    bodies = [body for body in bodies if isinstance(body, GraphModule)]
    found = [list(_products_inside(state, node, body, times * _steps(name, node))) for body in bodies]
    if name == "cond":
        found = [max(found, key=lambda products: sum(p.macs for p in products), default=[])]
    state.products += [product for products in found for product in products]


def _steps(name: str, node: Node) -> int:
    """How often an op runs its graph: once per entry of what `scan` and `map` go through."""
    if name not in ("scan", "map_impl", "associative_scan"):
        return 1
    over = node.args[2] if name == "scan" else node.args[1]
    first = over[0] if isinstance(over, (tuple, list)) else over
    return max(shape_of(first)[:1], default=1) if isinstance(first, Node) else 1


def _products_inside(state: TraceState, outer: Node, body: GraphModule, times: int) -> Iterator[ProductCall]:
    """The products of a graph inside an op, whose tensors have no labels."""
    before = len(state.products)
    for node in body.graph.nodes:
        dims: Dims = [None] * len(shape_of(node))
        state.values[node] = (dims,)
        state.origins[node] = "computed"
        if node.op != "call_function":
            continue
        if hasattr(node.target, "_schema"):
            call = OpCall(state, node)
            yield from (_product(call, contraction, times) for contraction in contractions(call))
        else:
            _record_subgraphs(state, node, body, times)
    yield from state.products[before:]
    del state.products[before:]


def _module_path(node: Node) -> str:
    """Path of the innermost module that makes this call, with "@1" at the module's second call."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""
