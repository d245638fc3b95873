"""Read a model: export it to an ATen graph, carry channel labels through the graph, note the layers with weights."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from jpq.tracing.channel_labels import distinct
from jpq.tracing.export_graph import export_graph
from jpq.tracing.forward import Example, arguments, batch_of
from jpq.tracing.integer_io import OutputQuantPoint, ends, forms
from jpq.tracing.model_checks import accepted
from jpq.tracing.network import Layer, Network
from jpq.tracing.op_call import Dims, LayerCall, OpCall, TraceState, outputs, shape_of
from jpq.tracing.rules import RULES
from jpq.tracing.shrink import runs_smaller
from jpq.types import JpqError, Labels

__all__ = ["Layer", "Network", "trace"]

_SILENT = ("aten.sym_size", "aten._assert_async", "aten._assert_scalar", "aten._assert_tensor_metadata")

_PLAIN = """add sub mul div rsub to clone contiguous alias detach view reshape flatten unflatten permute transpose
unsqueeze squeeze select unbind slice narrow chunk split split_with_sizes cat stack expand pad constant_pad_nd flip
float double half _to_copy lift_fresh lift_fresh_copy pixel_unshuffle getitem"""  # leave an input's values an input


def trace(model: nn.Module, example: Example, *, open_norms: bool = False) -> Network:
    """The network behind `model`; the example is what its forward takes: a tensor, a tuple, or a dict of keywords.

    The model is read in evaluation mode and left as it was; DataParallel and torch.compile are looked through, and
    `unpacked` beforehand makes more of it prunable. A smaller copy is run to find channels that its code holds as plain
    numbers; those channels are frozen, and so are those that parts which only train (auxiliary heads) read.

    So are channels that LayerNorm, RMSNorm or GroupNorm average over, since without one the others change. With
    `open_norms` they may go nevertheless (GroupNorm's groups stay equally large): the rebuilt model then is NOT the
    masked one, and fine-tuning must repair it. `Network.opened` lists them.

    Raises JpqError where the model cannot be read or run.
    """
    model, (args, kwargs) = accepted(model), arguments(example)
    with _mode(model, training=False):
        program = export_graph(model, args, kwargs)
        book, unknown_ops = walk(TraceState(model, open_norms=open_norms), program)
        idle = _idle(book, program)
        if idle:
            _keep_idle(book, idle, args, kwargs)
        network = record(book, unknown_ops, batch_of((args, kwargs)), idle)
        suspects = {c for labels in book.suspects for c in distinct(book.classes.find(labels))}
        network = runs_smaller(model, network, args, kwargs, suspects)
        return replace(network, opened={c: why for c, why in network.opened.items() if c not in network.frozen})


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Evaluation mode, or training mode of all but torch's own layers; then every module's own mode again."""
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
    except NotImplementedError as error:
        raise JpqError(
            f"The {type(model).__name__} has no evaluation mode. Give the module that it was exported from."
        ) from error
    try:
        for m in model.modules():
            m.training = training and not type(m).__module__.startswith("torch.nn.")
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


def _idle(book: TraceState, program: ExportedProgram) -> list[str]:
    """Parameters that evaluation never reads."""
    own = {name for name, _ in book.model.named_parameters()}
    used = {book.parameters[n] for n in program.graph.nodes if n in book.parameters and n.users}
    return sorted(own - used)


def _keep_idle(book: TraceState, idle: Collection[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Freeze what these parameters touch in training mode, so that the smaller model still trains; see that graph."""
    calls = len(book.calls)
    with _mode(book.model, training=True):
        try:
            walk(book, export_graph(book.model, args, kwargs))
        except JpqError:
            return  # it is the evaluation that must agree; `Network.idle` names these parameters
    del book.calls[calls:]
    for name in idle:
        for labels in book.axes.get(name, {}).values():
            book.classes.freeze(labels, f"read or made by '{name.rpartition('.')[0]}', which only runs in training")


def walk(book: TraceState, program: ExportedProgram) -> tuple[TraceState, list[str]]:
    """Carry labels through the graph, node by node; gives the ops without a rule, too."""
    program.graph.eliminate_dead_code()  # such as attention weights that nobody asked for
    missing = dict[str, None]()
    book.parameters.update(_parameters(book.model, program))
    book.origins.update(_origins(program))
    for node in program.graph.nodes:
        if node in book.parameters:
            continue
        if node.op == "placeholder":
            book.values[node] = ([None] * len(shape_of(node)),)
        elif node.op == "output":
            for read in node.all_input_nodes:
                for dims in book.value(read):
                    for labels in dims:
                        book.classes.freeze(labels, "reaches the model's output")
        elif node.target is operator.getitem:
            source = book.value(node.args[0])
            book.values[node] = (source[node.args[1]] if node.args[1] < len(source) else [None] * len(shape_of(node)),)
        else:
            book.values[node] = _apply(book, node, missing)
    return book, list(missing)


def _apply(book: TraceState, node: Node, missing: dict[str, None]) -> tuple[Dims, ...]:
    """One node by its rule; without one, or one that does not fit, everything it touches is frozen."""
    base = _base(node)
    if base in _SILENT:
        return ([None] * len(shape_of(node)),)
    handler, why = RULES.get(base) or RULES.get(base.rstrip("_")), "has no rule; add one with jpq.tracing.rules"
    if handler is not None:
        try:
            return _checked(outputs(handler(OpCall(book, node))), node)
        except Exception as error:
            if not handler.__module__.startswith("jpq."):
                raise JpqError(f"Your rule for {base} failed: {type(error).__name__}: {error}") from error
            why = "is used in a way that its rule does not cover"
    touched = [labels for n in node.all_input_nodes for dims in book.value(n) for labels in dims if labels is not None]
    if touched or isinstance(node.target, torch._ops.HigherOrderOperator):  # those may hide layers in a subgraph
        missing[base] = None
    for labels in touched:
        book.classes.freeze(labels, f"op {base} {why}")
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return tuple([None] * (v.dim() if isinstance(v, Tensor) else 0) for v in values)


def _checked(out: tuple[Dims, ...], node: Node) -> tuple[Dims, ...]:
    """What a rule said, if it has a label for every index of every dim, or None; else ValueError."""
    value = node.meta.get("val")
    for dims, tensor in zip(out, value if isinstance(value, (tuple, list)) else [value], strict=False):
        known = [None if labels is None else len(labels) for labels in dims]
        sizes = list(tensor.shape) if isinstance(tensor, Tensor) else known
        wrong = [k for k, n in zip(known, sizes, strict=False) if k is not None and (not isinstance(n, int) or k != n)]
        if len(known) != len(sizes) or wrong:
            raise ValueError(
                f"it gave labels for sizes {known} to an output of shape {sizes}; give one entry per dim, "
                "None or a label for each index."
            )
    return out


def _parameters(model: nn.Module, program: ExportedProgram) -> dict[Node, str]:
    """Placeholder -> the first name the model has for that parameter or buffer."""
    first = {id(t): name for name, t in [*model.named_buffers(), *model.named_parameters()]}
    targets = {
        s.arg.name: s.target
        for s in program.graph_signature.input_specs
        if s.kind in (InputKind.PARAMETER, InputKind.BUFFER)
    }
    out = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and (target := targets.get(node.name)) is not None:
            path, _, attribute = target.rpartition(".")
            out[node] = first.get(id(getattr(model.get_submodule(path), attribute)), target)
    return out


def _base(node: Node) -> str:
    """aten.add_.Tensor -> aten.add_"""
    return ".".join(str(node.target).split(".")[:2])


def _origins(program: ExportedProgram) -> dict[Node, str]:
    """Whether a tensor is the model's input, merely moved and scaled; a constant; or something computed."""
    out: dict[Node, str] = {}
    plain, inputs = set(_PLAIN.split()), set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        base = "getitem" if node.target is operator.getitem else _base(node).removeprefix("aten.").rstrip("_")
        read = {out[n] for n in node.all_input_nodes}
        if node.op == "placeholder":
            out[node] = "input" if node.name in inputs else "constant"
        elif read <= {"constant"}:
            out[node] = "constant"
        else:
            out[node] = "input" if base in plain and "computed" not in read else "computed"
    return out


def record(book: TraceState, unknown_ops: list[str], batch: int, idle: Collection[str] = ()) -> Network:
    """Resolve every label to its class."""
    grouped: dict[str, list[LayerCall]] = {}
    for call in book.calls:
        grouped.setdefault(call.weight, []).append(call)
    owners = [weight.rpartition(".")[0] for weight in grouped]
    for weight, calls in grouped.items():
        if owners.count(weight.rpartition(".")[0]) > 1:
            for call in calls:
                for labels in (call.inputs, call.outputs):
                    book.classes.freeze(labels, "its module owns several weights; give each a module of its own")
    if any(len(shape_of(call.node.all_input_nodes[0])) < len(call.shape) for call in book.calls):
        batch = 1  # the example is one sample without a batch dim
    find = book.classes.find
    shown = forms([call.node for call in book.calls])
    once = {calls[0].node: w.rpartition(".")[0] for w, calls in grouped.items() if len(calls) == 1}
    ended = ends(once, shown, book.model)
    layers = tuple(
        _layer(w, calls, batch, owners, book, shown[calls[0].node], ended.get(calls[0].node))
        for w, calls in grouped.items()
    )
    axes: dict[str, dict[int, Labels]] = {
        name: {d: find(labels) for d, labels in dims.items() if (labels >= 0).any()} for name, dims in book.axes.items()
    }
    return Network(
        layers=layers,
        axes={name: dims for name, dims in axes.items() if dims},
        frozen=book.classes.frozen(),
        attributes={name: find(labels) for name, labels in book.attributes.items()},
        embeddings={name: find(labels) for name, labels in book.embeddings.items()},
        unknown_ops=tuple(unknown_ops),
        opened={int(c): why for labels, why in reversed(book.opened) for c in distinct(find(labels))},
        idle=tuple(dict.fromkeys(name.rpartition(".")[0] for name in idle)),
    )


def _layer(
    weight: str,
    calls: list[LayerCall],
    batch: int,
    owners: list[str],
    book: TraceState,
    shown: str,
    end: OutputQuantPoint | None,
) -> Layer:
    owner, first = weight.rpartition(".")[0], calls[0]
    return Layer(
        name=owner if owner and owners.count(owner) == 1 else weight,
        weight=weight,
        kind=first.kind,
        weight_shape=first.shape,
        groups=first.groups,
        macs=sum(call.macs for call in calls) // batch,
        inputs=book.classes.find(first.inputs),
        outputs=book.classes.find(first.outputs),
        reads_input=any(book.origins[call.node.all_input_nodes[0]] == "input" for call in calls),
        calls=len(calls),
        wrappable=all(_is_own(call.node, owner, book.model) for call in calls),
        stride=first.stride,
        size=first.size,
        form=shown,
        end=end,
    )


def _is_own(node: Node, owner: str, model: nn.Module) -> bool:
    """Whether the forward of the module that owns the weight makes this call, and is a torch layer's."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    module = model.get_submodule(owner)
    plain = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and type(module).__module__.startswith("torch.nn.")
    return plain and bool(stack) and model.get_submodule(stack[-1][0].split("@")[0]) is module
