"""The input of an op rule: `OpCall`, one call of an ATen op with its labels, and `TraceState`, all labels so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import Node
from torch.fx.node import map_arg

from jpq.tracing.call_sizes import COUNT, Pattern, can_resize, name_size
from jpq.tracing.channel_labels import ChannelClasses
from jpq.tracing.network import LayerKind
from jpq.tracing.own_calls import call_of_node
from jpq.types import NONE, JpqError, Labels

Dims = list[Labels | None]  # per dim of a tensor: a label per index, or None where the dim has no labels

Rule = Callable[["OpCall"], "Dims | list[Dims]"]  # the output's labels, or a list of them for several outputs

RULES: dict[str, Rule] = {}  # "aten.relu" -> its rule; overloads and in-place variants share it


def rule(*names: str) -> Callable[[Rule], Rule]:
    """A decorator that registers a rule for these ops: `@rule("aten.relu")`; it returns the labels of the outputs."""

    def register(handler: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, handler))
        return handler

    return register


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer with weights in the graph."""

    node: Node
    weight: str
    kind: LayerKind
    shape: tuple[int, ...]
    groups: int
    macs: int  # multiply-accumulates of the whole example batch
    inputs: Labels
    outputs: Labels
    stride: tuple[int, ...]
    size: tuple[int, ...]  # positions where the kernel is applied
    positions: tuple[Labels, ...] = ()  # other dims with labels by which the work shrinks
    float_reason: str = ""  # why it stays at 32 bits: its weight is computed, or its op is no layer's
    key: str = ""  # tells the call from others that compute with the same parameter in another way


@dataclass(frozen=True, eq=False)
class ProductCall:
    """One product of two computed tensors in the graph, or of two constant ones."""

    operands: tuple[Node, ...]  # of the product, or of the op where it computes some of them
    name: str  # that tells it from other products of its op, or ""
    op: str
    module: str  # path of the module whose code computes it, with "@1" at its second call
    macs: int  # multiply-accumulates of the whole example batch
    dims: tuple[Labels, ...]


@dataclass(eq=False)
class TraceState:
    """All that tracing has recorded so far: labels of values and parameters, layer calls, counting attributes."""

    model: nn.Module
    parameters: dict[Node, str] = field(default_factory=dict)  # placeholder of a parameter or buffer -> first name
    origins: dict[Node, str] = field(default_factory=dict)  # "input" (merely moved and scaled), "constant", "computed"
    called: dict[str, set[nn.Module]] = field(default_factory=dict)  # parameter -> its modules whose own code reads it
    classes: ChannelClasses = field(default_factory=ChannelClasses)
    values: dict[Node, tuple[Dims, ...]] = field(default_factory=dict)  # node -> labels of each output
    axes: dict[str, dict[int, Labels]] = field(default_factory=dict)  # parameter or buffer -> dim -> labels
    attributes: dict[str, Labels] = field(default_factory=dict)  # integer attribute of a module -> labels it counts
    embeddings: dict[str, Labels] = field(default_factory=dict)  # module -> labels of its columns
    calls: list[LayerCall] = field(default_factory=list)
    products: list[ProductCall] = field(default_factory=list)
    expressions: dict[Node, str] = field(default_factory=dict)  # as `expression` gives them
    suspects: list[Labels] = field(default_factory=list)  # channels whose number the model's code may hold fixed
    sizes: dict[str, list[Labels]] = field(default_factory=dict)  # size in a call of the code -> labels it counts
    conditional: list[tuple[Labels, str]] = field(default_factory=list)  # frozen, for a reason, unless sizes follow
    open_norms: bool = False  # channels inside a norm's average may be removed, though the others then change
    opened: list[tuple[Labels, str]] = field(default_factory=list)  # labels that only `open_norms` frees, and the norm

    def axis(self, name: str, dim: int, size: int) -> Labels:
        """`[size]` labels of one dim of a parameter, new ones at the first request."""
        dims = self.axes.setdefault(name, {})
        if dim not in dims:
            dims[dim] = self.classes.fresh(size)
        return dims[dim]

    def value(self, node: Node) -> tuple[Dims, ...]:
        """The labels of each output of a node, per dim."""
        if node in self.parameters:
            name, shape = self.parameters[node], node.meta["val"].shape
            return ([self.axis(name, d, n) if n > 1 else None for d, n in enumerate(shape)],)
        return self.values[node]

    def weight_source(self, node: Node) -> str | None:
        """The largest parameter (or else buffer) that a constant tensor is computed from; None where there is none."""
        if self.origins.get(node) != "constant":
            return None
        found: dict[str, Node] = {}
        pending, seen = [node], set[Node]()
        while pending:
            source = pending.pop()
            if source in seen:
                continue
            seen.add(source)
            if source in self.parameters:
                found[self.parameters[source]] = source
            pending += source.all_input_nodes
        trained = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return max(sorted(found), key=lambda n: (n in trained, prod(shape_of(found[n]))), default=None)

    def expression(self, node: Node) -> str:
        """A text that is equal for tensors which the same ops compute from the same parameters."""
        if node in self.parameters:
            return self.parameters[node]
        if node not in self.expressions:
            parts = map_arg((node.args, dict(node.kwargs)), self.expression)
            text = node.name if node.op == "placeholder" else f"{node.target} {parts}"
            self.expressions[node] = sha256(text.encode()).hexdigest()[:16]
        return self.expressions[node]

    def add_attribute(self, name: str, labels: Labels) -> None:
        """Record that an integer attribute of a module is the number of these channels."""
        if name in self.attributes and len(self.attributes[name]) == len(labels):
            self.classes.union(self.attributes[name], labels, f"'{name}' counts different things in different calls")
        self.attributes[name] = labels


class OpCall:
    """One call of an ATen op: its arguments by schema name, its labels and shapes, methods to tie or keep labels."""

    def __init__(self, state: TraceState, node: Node) -> None:
        self.state, self.node, self.classes = state, node, state.classes
        self.op = str(node.target).rpartition(".")[0]  # aten.relu_
        self.args: dict[str, Any] = {}
        for i, a in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
            default = a.default_value if a.has_default_value() else None
            self.args[a.name] = node.args[i] if i < len(node.args) else node.kwargs.get(a.name, default)

    def __getitem__(self, name: str) -> Any:
        return self.args.get(name)

    @property
    def tensors(self) -> list[Node]:
        """The nodes that this op reads, in order."""
        return list(self.node.all_input_nodes)

    @property
    def x(self) -> Dims:
        """The labels of the first tensor, per dim."""
        return self.dims(self.tensors[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first output."""
        return shape_of(self.node)

    def dims(self, node: Node) -> Dims:
        """The labels of a tensor that this op reads, per dim."""
        return list(self.state.value(node)[0])

    def dim(self, value: int, rank: int | None = None) -> int:
        """A dim argument, which may be negative, counted from the front."""
        return value % (rank if rank is not None else max(len(shape_of(self.tensors[0])), 1))

    def freeze(self, labels: Labels | None, reason: str) -> None:
        """Keep these channels, for a reason that the report shows."""
        self.classes.freeze(labels, reason)

    def freeze_averaged(self, labels: Labels | None, reason: str) -> None:
        """Keep these channels, which a normalisation averages over, unless `open_norms` frees them."""
        if not self.state.open_norms:
            self.freeze(labels, reason)
        elif labels is not None:
            self.state.opened.append((labels[labels != NONE], reason))

    def add_attribute(self, name: str, value: Any, labels: Labels | None) -> bool:
        """Record that attribute `name` of the calling module, if it is `value`, counts these labels; whether it is."""
        path, module = self.module()
        if labels is None or vars(module).get(name) != value:
            return False
        self.state.add_attribute(f"{path}.{name}".lstrip("."), labels)
        return True

    def tie(self, blocks: Labels) -> Labels:
        """Tie entry i of every block, [g, n], so that they are kept or removed together; gives the first block."""
        for block in blocks[1:]:
            self.classes.union(blocks[0], block, f"{self.op} ties it to a channel that cannot be removed")
        return blocks[0]

    def join(self, a: Labels | None, b: Labels | None) -> Labels | None:
        """Tie two dims of equal size index by index; labels that meet a dim without labels are frozen."""
        if a is None or b is None:
            labels = b if a is None else a
            self.freeze(labels, f"{self.op} joins it with a tensor whose size is fixed")
            return labels
        self.classes.union(a, b, f"{self.op} joins it with a channel whose place is fixed")
        return a

    def bind(self, node: Node | None, dim: int, labels: Labels | None) -> None:
        """Record that a parameter's dim shrinks with these labels (a computed tensor's dim is joined with them)."""
        if node is None:
            return
        name = self.state.parameters.get(node)
        if name is None:
            self.join(self.dims(node)[dim], labels)
        elif dim in self.state.axes.setdefault(name, {}):
            self.join(self.state.axes[name][dim], labels)
        else:
            fixed = np.full(shape_of(node)[dim], NONE, np.int64)
            self.state.axes[name][dim] = fixed if labels is None else labels

    def add_size(self, pattern: Pattern, labels: Labels | None) -> bool:
        """Record that the model's code names the number of these channels in this call; whether that can be rewritten.

        `pattern` has an entry per number of the call (see `jpq.tracing.call_sizes`), COUNT where the channels count;
        without any, the numbers are held wherever these channels go. Where the call is not known, an attribute of the
        module may hold the number.
        """
        own = call_of_node(self.node)
        if labels is None or (own is not None and not can_resize(own)):
            return False
        name = name_size(own, pattern) if own is not None else ""
        if own is None and COUNT in pattern:
            name = self._counting_attribute(len(labels))
        if name:
            self.state.sizes.setdefault(name, []).append(labels)
        return bool(name)

    def _counting_attribute(self, count: int) -> str:
        """The only integer attribute of the calling module with this value; empty where there is not exactly one."""
        path, module = self.module()
        names = [name for name, value in vars(module).items() if type(value) is int and value == count]
        return f"{path}.{names[0]}".lstrip(".") if len(names) == 1 else ""

    def freeze_unless_followed(self, labels: Labels | None, reason: str, followed: bool) -> None:
        """Keep these channels, unless sizes in the code, which were recorded (`followed`), can follow their number."""
        if labels is None or not followed:
            self.freeze(labels, reason)
        else:
            self.state.conditional.append((labels[labels != NONE], reason))
            self.suspect(labels[labels != NONE])

    def suspect(self, labels: Labels | None) -> None:
        """Record that the model's code may hold the number of these channels fixed, to be tried by running it."""
        if labels is not None:
            self.state.suspects.append(labels)

    def for_each_output(self, dims: Dims) -> Dims | list[Dims]:
        """A list that repeats these labels for every output of the op."""
        value = self.node.meta["val"]
        return [dims] * len(value) if isinstance(value, (tuple, list)) else dims

    def module(self) -> tuple[str, nn.Module]:
        """Path and module whose code makes this call; the model itself where that is not known."""
        path = module_path(self.node)
        return path, self.state.model.get_submodule(path)

    def merge(self, nodes: Sequence[Node]) -> Dims:
        """The labels of an elementwise op's output, its operands joined as broadcasting aligns them."""
        return [self._merge_dim(nodes, k) for k in range(len(self.shape))]

    def _merge_dim(self, nodes: Sequence[Node], k: int) -> Labels | None:
        """The labels of dim `k` of an elementwise op's output."""
        labelled: list[Labels] = []
        unlabelled: list[Node] = []  # operands of full size there, whose size is fixed
        for node in nodes:
            d = k - len(self.shape) + len(shape_of(node))
            if d < 0:
                continue
            labels, size = self.dims(node)[d], shape_of(node)[d]
            if labels is None:
                unlabelled += [node] if size == self.shape[k] != 1 else []
            elif size != self.shape[k]:
                self.freeze(labels, f"{self.op} spreads this one channel over many")
            else:
                labelled.append(labels)
        if not labelled:
            return None
        for labels in labelled[1:]:
            self.join(labelled[0], labels)
        if unlabelled:
            is_input = any(self.state.origins[node] == "input" for node in unlabelled)
            partner = "the model's input" if is_input else "a tensor whose size is fixed"
            self.freeze(labelled[0], f"{self.op} joins it with {partner}")
        return labelled[0]


def module_path(node: Node) -> str:
    """The path of the module whose code makes this call; empty for the model itself, and where it is not known."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0].split("@")[0] if stack else ""


def shape_of(node: Node) -> tuple[int, ...]:
    """The shape of a node's first output; () where that is no tensor. Raises JpqError where values decide it."""
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) else value
    shape = value.shape if isinstance(value, torch.Tensor) else ()
    if any(isinstance(n, torch.SymInt) for n in shape):
        path = module_path(node)
        raise JpqError(
            f"A size{f' in {path}' if path else ''} depends on values, as that of x[mask] does, so that the layers "
            "behind it have no fixed cost. Pick by torch.where, by a product with the mask, or by fixed places."
        )
    return tuple(int(n) for n in shape)


def as_outputs(labels: Dims | list[Dims]) -> tuple[Dims, ...]:
    """A rule's return value as one entry per output of the op."""
    several = [dims for dims in labels if isinstance(dims, list)]
    return tuple(several) if several else ([d for d in labels if not isinstance(d, list)],)
