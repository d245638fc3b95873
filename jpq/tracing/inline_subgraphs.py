"""Subgraphs of an exported graph (regions under autocast, without gradient), written into the graph that calls them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

_WRAPPERS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")


def inline_subgraphs(module: GraphModule, autocast: bool = True) -> None:
    """Replace every call of a wrapped region by the nodes of its subgraph, in place and at every depth.

    The ops are those of the region; only the mode in which it ran is no longer to be seen. With `autocast` False,
    regions under an autocast that is enabled stay: they compute in other types than their ops say.
    """
    for node in list(module.graph.nodes):
        if node.op == "call_function" and _is_wrapper(node.target) and (autocast or not _autocasts(node)):
            _inline(module, node, autocast)
    module.graph.lint()


def _autocasts(call: Node) -> bool:
    """Whether a call of a region enables autocast in it."""
    return "autocast" in str(call.target) and call.args[2] is not False


def _is_wrapper(target: Any) -> bool:
    """Whether a node with this target calls a region that computes what its ops compute."""
    return isinstance(target, torch._ops.HigherOrderOperator) and target.name() in _WRAPPERS


def _inline(module: GraphModule, call: Node, autocast: bool) -> None:
    """Replace one call of a region by its nodes."""
    place = next(k for k, arg in enumerate(call.args) if isinstance(arg, Node) and arg.op == "get_attr")
    region = module.get_submodule(str(call.args[place].target))  # type: ignore[union-attr]
    assert isinstance(region, GraphModule)
    inline_subgraphs(region, autocast)
    inputs = iter(call.args[place + 1 :])
    copies: dict[Node, Any] = {}
    results: Any = ()
    with module.graph.inserting_before(call):
        for node in region.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(inputs)
            elif node.op == "output":
                results = map_arg(node.args[0], copies.__getitem__)
            else:
                copies[node] = module.graph.node_copy(node, copies.__getitem__)
    _replace_results(module, call, results)


def _replace_results(module: GraphModule, call: Node, results: Any) -> None:
    """Let the users of a call, which pick its results by index, read the results themselves."""
    for user in list(call.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])
            module.graph.erase_node(user)
    if call.users:
        call.replace_all_uses_with(results[0] if isinstance(results, (tuple, list)) else results)
    module.graph.erase_node(call)
