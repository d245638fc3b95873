"""What a rule sees: one call of one ATen op, and the book in which labels are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import Node

from jpq.tracing.channel_labels import ChannelClasses
from jpq.tracing.network import LayerKind
from jpq.types import NONE, Labels

Dims = list[Labels | None]  # per dim of a tensor: a label per index, or None where the dim has no labels

Rule = Callable[["OpCall"], "Dims | list[Dims]"]  # the output's labels, or a list of them for several outputs

RULES: dict[str, Rule] = {}  # "aten.relu" -> what it does to labels; overloads and in-place twins share a rule


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for these ops: `@rule("aten.relu")`. It returns the labels of the op's output(s)."""

    def register(handler: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, handler))
        return handler

    return register


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer with weights, as a rule met it."""

    node: Node
    weight: str
    kind: LayerKind
    shape: tuple[int, ...]
    groups: int
    macs: int  # of the whole example batch
    inputs: Labels
    outputs: Labels
    stride: tuple[int, ...]
    size: tuple[int, ...]  # positions where the kernel is applied


@dataclass(eq=False)
class TraceState:
    """Everything learnt while walking the graph."""

    model: nn.Module
    parameters: dict[Node, str] = field(default_factory=dict)  # placeholders of parameters and buffers: the first name
    origins: dict[Node, str] = field(default_factory=dict)  # "input" (merely moved and scaled), "constant", "computed"
    classes: ChannelClasses = field(default_factory=ChannelClasses)
    values: dict[Node, tuple[Dims, ...]] = field(default_factory=dict)
    axes: dict[str, dict[int, Labels]] = field(default_factory=dict)
    attributes: dict[str, Labels] = field(default_factory=dict)
    embeddings: dict[str, Labels] = field(default_factory=dict)
    calls: list[LayerCall] = field(default_factory=list)
    suspects: list[Labels] = field(default_factory=list)
    open_norms: bool = False  # channels inside a normalisation's average may go, though the rest then changes
    opened: list[tuple[Labels, str]] = field(default_factory=list)

    def axis(self, name: str, dim: int, size: int) -> Labels:
        """The labels of one dim of a parameter, made when first asked for."""
        dims = self.axes.setdefault(name, {})
        if dim not in dims:
            dims[dim] = self.classes.fresh(size)
        return dims[dim]

    def value(self, node: Node) -> tuple[Dims, ...]:
        """The labels of a node's output(s)."""
        if node in self.parameters:
            name, shape = self.parameters[node], node.meta["val"].shape
            return ([self.axis(name, d, n) if n > 1 else None for d, n in enumerate(shape)],)
        return self.values[node]

    def attribute(self, name: str, labels: Labels) -> None:
        """An integer attribute of a module that counts these labels."""
        if name in self.attributes and len(self.attributes[name]) == len(labels):
            self.classes.union(self.attributes[name], labels, f"'{name}' counts different things in different calls")
        self.attributes[name] = labels


class OpCall:
    """One call of one op: arguments by the name of the op's schema, labels and shapes of tensors, verbs."""

    def __init__(self, book: TraceState, node: Node) -> None:
        self.book, self.node, self.classes = book, node, book.classes
        self.op = str(node.target).rpartition(".")[0]  # aten.relu_
        self.args: dict[str, Any] = {}
        for i, a in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
            default = a.default_value if a.has_default_value() else None
            self.args[a.name] = node.args[i] if i < len(node.args) else node.kwargs.get(a.name, default)

    def __getitem__(self, name: str) -> Any:
        return self.args.get(name)

    @property
    def tensors(self) -> list[Node]:
        """The nodes this op reads, in order."""
        return list(self.node.all_input_nodes)

    @property
    def x(self) -> Dims:
        """Labels of the first tensor."""
        return self.dims(self.tensors[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the (first) output."""
        return shape_of(self.node)

    def dims(self, node: Node) -> Dims:
        """Labels of a tensor that this op reads."""
        return list(self.book.value(node)[0])

    def dim(self, value: int, rank: int | None = None) -> int:
        """A dim counted from the front."""
        return value % (rank if rank is not None else max(len(shape_of(self.tensors[0])), 1))

    def freeze(self, labels: Labels | None, reason: str) -> None:
        """These channels stay."""
        self.classes.freeze(labels, reason)

    def average(self, labels: Labels | None, reason: str) -> None:
        """These channels are averaged by a normalisation: they stay, unless averages are opened."""
        if not self.book.open_norms:
            self.freeze(labels, reason)
        elif labels is not None:
            self.book.opened.append((labels[labels != NONE], reason))

    def counts(self, name: str, value: Any, labels: Labels | None) -> bool:
        """Note that the calling module's attribute `name`, if it is `value`, counts these labels; whether it is."""
        path, _ = self.module()
        if labels is None or vars(self.book.model.get_submodule(path)).get(name) != value:
            return False
        self.book.attribute(f"{path}.{name}".lstrip("."), labels)
        return True

    def tie(self, blocks: Labels) -> Labels:
        """[g, n]: entry i of every block stands or falls together; gives the first block."""
        for block in blocks[1:]:
            self.classes.union(blocks[0], block, f"{self.op} ties it to a channel that cannot be removed")
        return blocks[0]

    def join(self, a: Labels | None, b: Labels | None) -> Labels | None:
        """Tie two dims of equal size index by index; labels that meet a dim without labels are frozen."""
        if a is None or b is None:
            known = b if a is None else a
            self.freeze(known, f"{self.op} joins it with a tensor whose size is fixed")
            return known
        self.classes.union(a, b, f"{self.op} joins it with a channel whose place is fixed")
        return a

    def bind(self, node: Node | None, dim: int, labels: Labels | None) -> None:
        """A parameter's dim carries these labels (a computed tensor's too, if it has labels of its own)."""
        if node is None:
            return
        name = self.book.parameters.get(node)
        if name is None:
            self.join(self.dims(node)[dim], labels)
        elif dim in self.book.axes.setdefault(name, {}):
            self.join(self.book.axes[name][dim], labels)
        else:
            fixed = np.full(shape_of(node)[dim], NONE, np.int64)
            self.book.axes[name][dim] = fixed if labels is None else labels

    def suspect(self, labels: Labels | None) -> None:
        """The model's own code may hold a size for these: whether it does is found by running it."""
        if labels is not None:
            self.book.suspects.append(labels)

    def each(self, out: Dims) -> Dims | list[Dims]:
        """The same labels for every output of the op."""
        value = self.node.meta["val"]
        return [out] * len(value) if isinstance(value, (tuple, list)) else out

    def module(self) -> tuple[str, str]:
        """Path and class of the module whose code makes this call."""
        stack = list((self.node.meta.get("nn_module_stack") or {}).values())
        path, kind = stack[-1] if stack else ("", "")
        kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        return path.split("@")[0], kind

    def merge(self, nodes: Sequence[Node]) -> Dims:
        """Labels of an elementwise op with broadcasting."""
        out: Dims = []
        for k, n in enumerate(self.shape):
            found: list[Labels] = []
            fixed: list[Node] = []
            for node in nodes:
                d = k - len(self.shape) + len(shape_of(node))
                if d < 0:
                    continue
                labels, size = self.dims(node)[d], shape_of(node)[d]
                if labels is None:
                    fixed += [node] if size == n != 1 else []
                elif size != n:
                    self.freeze(labels, f"{self.op} spreads this one channel over many")
                else:
                    found.append(labels)
            for other in found[1:]:
                self.join(found[0], other)
            if found and fixed:
                image = any(self.book.origins[node] == "input" for node in fixed)
                what = "the model's input" if image else "a tensor whose size is fixed"
                self.freeze(found[0], f"{self.op} joins it with {what}")
            out.append(found[0] if found else None)
        return out


def shape_of(node: Node) -> tuple[int, ...]:
    """Shape of a node's first output."""
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) else value
    return tuple(int(n) for n in value.shape) if isinstance(value, torch.Tensor) else ()


def outputs(out: Dims | list[Dims]) -> tuple[Dims, ...]:
    """What a rule returned, as one entry per output."""
    several = [dims for dims in out if isinstance(dims, list)]
    return tuple(several) if several else ([d for d in out if not isinstance(d, list)],)
