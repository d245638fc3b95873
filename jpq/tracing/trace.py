"""`trace`: a model's ATen graph, channel labels carried through it, and the `Network` of its layers with weights."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node

from jpq.tracing.call_sizes import CallSizes
from jpq.tracing.channel_labels import unique_labels
from jpq.tracing.export_graph import export_graph
from jpq.tracing.float_work import build_products, count_stored_numbers, freeze_unmaskable, layer_names, sample_macs
from jpq.tracing.forward import Example, batch_size, split_arguments
from jpq.tracing.inline_subgraphs import inline_subgraphs
from jpq.tracing.integer_io import OutputQuantPoint, find_output_quant_points, integer_forms
from jpq.tracing.model_checks import accept_model
from jpq.tracing.network import Layer, LayerKind, Network
from jpq.tracing.op_call import Dims, LayerCall, OpCall, TraceState, as_outputs, module_path, shape_of
from jpq.tracing.own_calls import annotate_own_calls
from jpq.tracing.pruning_masks import without_pruning_masks
from jpq.tracing.remaining_work import record_remaining_work
from jpq.tracing.rules import RULES
from jpq.tracing.shrink import freeze_unshrinkable
from jpq.tracing.tied_weights import WeightOwners, freeze_tied, parameter_names
from jpq.types import JpqError, Labels

__all__ = ["Layer", "Network", "trace"]

_CHECK_OPS = ("aten.sym_size", "aten._assert_async", "aten._assert_scalar", "aten._assert_tensor_metadata")

_WORK = """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul mm bmm mv addmm baddbmm
einsum scaled_dot_product_attention"""  # layers and products

_INPUT_OPS = """add sub mul div rsub to clone contiguous alias detach view reshape flatten unflatten permute transpose
unsqueeze squeeze select unbind slice narrow chunk split split_with_sizes cat stack expand pad constant_pad_nd flip
float double half _to_copy lift_fresh lift_fresh_copy pixel_unshuffle getitem"""  # moves, and arithmetic with constants


def trace(model: nn.Module, example: Example, *, open_norms: bool = False) -> Network:
    """Read `model` into a `Network`: its layers with weights, and which channels are kept or removed together.

    Args:
        model: read in evaluation mode and left as it was; DataParallel and torch.compile are looked through, and
            `decompose` beforehand makes more of it prunable. Masks of torch.nn.utils.prune count as folded.
        example: what its forward takes: a tensor, a tuple, or a dict of keywords.
        open_norms: let channels be removed that LayerNorm, RMSNorm or GroupNorm average over. They are frozen
            otherwise, since without one the others change (GroupNorm's groups stay equally large). The rebuilt model
            then is NOT the masked one, and fine-tuning must repair it. `Network.opened` lists them.

    A smaller copy is run to find channels that the model's code holds as plain numbers; those channels are frozen, and
    so are those that parts which only train (auxiliary heads) read. Raises JpqError where the model cannot be read or
    run.
    """
    model, (args, kwargs) = accept_model(without_pruning_masks(model)), split_arguments(example)
    with _mode(model, training=False):
        with annotate_own_calls(model):
            program = export_graph(model, args, kwargs)
        state, unknown_ops = propagate_labels(TraceState(model, open_norms=open_norms), program)
        idle = _idle_parameters(state, program)
        if idle:
            _freeze_idle(state, idle, args, kwargs)
        network = build_network(state, unknown_ops, batch_size((args, kwargs)), idle)
        suspects = {c for labels in state.suspects for c in unique_labels(state.classes.find(labels))}
        sizes = CallSizes.resolve(state.classes.find, state.sizes, state.conditional)
        network = freeze_unshrinkable(model, network, args, kwargs, suspects, sizes)
        return replace(network, opened={c: why for c, why in network.opened.items() if c not in network.frozen})


def propagate_labels(state: TraceState, program: ExportedProgram) -> tuple[TraceState, list[str]]:
    """Carry labels through the graph, node by node; gives the state and the ops without a rule."""
    inline_subgraphs(program.graph_module)
    _remove_unused(program.graph)
    missing = dict[str, None]()
    state.parameters.update(_parameter_names(state.model, program))
    state.origins.update(_origins(program))
    state.called.update(_called_modules(state))
    for node in program.graph.nodes:
        if node in state.parameters:
            continue
        if node.op == "placeholder":
            state.values[node] = ([None] * len(shape_of(node)),)
        elif node.op == "output":
            _freeze_outputs(state, node)
        elif node.target is operator.getitem:
            source, index = state.value(node.args[0]), node.args[1]
            state.values[node] = (source[index] if index < len(source) else [None] * len(shape_of(node)),)
        else:
            state.values[node] = _apply_rule(state, node, missing)
    record_remaining_work(state, program)
    return state, list(missing)


def _remove_unused(graph: Graph) -> None:
    """Remove what no output needs, such as attention weights that nobody asked for.

    Layers and products that run in vain stay, with what reads them (the last skip connection of a WaveNet): the model
    computes them, so they count, and their channels must fit.
    """
    needed = set[Node]()
    todo = [node for node in graph.nodes if node.is_impure()]
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += node.all_input_nodes
    in_vain, work = set[Node](), {f"aten.{name}" for name in _WORK.split()}
    for node in graph.nodes:
        works = _op_without_overload(node) in work or not in_vain.isdisjoint(node.all_input_nodes)
        if works and node not in needed:
            in_vain.add(node)
    graph.eliminate_dead_code(lambda node: node.is_impure() or node in in_vain)


def build_network(state: TraceState, unknown_ops: list[str], batch: int, idle: Collection[str] = ()) -> Network:
    """The network of a traced graph, with every label resolved to its class."""
    by_key: dict[str, list[LayerCall]] = {}
    for call in state.calls:
        by_key.setdefault(call.key or call.weight, []).append(call)
    names = layer_names(state, [calls[0] for calls in by_key.values()])
    owners = Counter(weight.rpartition(".")[0] for weight in dict.fromkeys(call.weight for call in state.calls))
    for calls in by_key.values():
        if owners[calls[0].weight.rpartition(".")[0]] > 1:
            for labels in (labels for call in calls for labels in (call.inputs, call.outputs)):
                state.classes.freeze(labels, "its module owns several weights; give each a module of its own")
        _unify_positions(state, calls)
    owners_of_weights = WeightOwners(state.model)
    freeze_tied(state, owners_of_weights)
    if any(_is_unbatched(state, call) for call in state.calls):
        batch = 1  # the example is one sample without a batch dim
    find = state.classes.find
    plain = [call for call in state.calls if not call.float_reason]
    forms = integer_forms([call.node for call in plain])
    once = [calls[0] for calls in by_key.values() if len(calls) == 1 and not calls[0].float_reason]
    points = find_output_quant_points({c.node: c.weight.rpartition(".")[0] for c in once}, forms, state.model)
    stored, tables = count_stored_numbers(state, by_key, owners_of_weights)
    layers = tuple(
        replace(
            _build_layer(name, calls, batch, state, forms, points.get(calls[0].node), stored.get(key)),
            shared=len(owners_of_weights.of(calls[0].weight)) > 1,
        )
        for (key, calls), name in zip(by_key.items(), names, strict=True)
    )
    axes: dict[str, dict[int, Labels]] = {
        name: {d: find(labels) for d, labels in dims.items() if (labels >= 0).any()}
        for name, dims in state.axes.items()
    }
    return Network(
        layers=layers,
        axes={name: dims for name, dims in axes.items() if dims},
        frozen=freeze_unmaskable(state, layers),
        attributes={name: find(labels) for name, labels in state.attributes.items()},
        embeddings={name: find(labels) for name, labels in state.embeddings.items()},
        unknown_ops=tuple(unknown_ops),
        opened={int(c): why for labels, why in reversed(state.opened) for c in unique_labels(find(labels))},
        idle=tuple(dict.fromkeys(name.rpartition(".")[0] for name in idle)),
        products=build_products(state, batch),
        tables=tuple(table for table in tables if table.name not in idle),
    )


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Context of evaluation mode, or of training mode of all but torch's own layers; it restores all modes."""
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


def _idle_parameters(state: TraceState, program: ExportedProgram) -> list[str]:
    """Names of the parameters that evaluation never reads."""
    names = set(parameter_names(state.model).values())
    used = {state.parameters[n] for n in program.graph.nodes if n in state.parameters and n.users}
    return sorted(names - used)


def _freeze_idle(state: TraceState, idle: Collection[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Freeze the channels that these parameters touch in training mode, so that the smaller model still trains."""
    calls, products = len(state.calls), len(state.products)
    with _mode(state.model, training=True):
        try:
            with annotate_own_calls(state.model):
                program = export_graph(state.model, args, kwargs)
            propagate_labels(state, program)
        except JpqError:
            return  # it is the evaluation that must agree; `Network.idle` names these parameters
    del state.calls[calls:], state.products[products:]
    for name in idle:
        for labels in state.axes.get(name, {}).values():
            state.classes.freeze(labels, f"read or made by '{name.rpartition('.')[0]}', which only runs in training")


def _freeze_outputs(state: TraceState, node: Node) -> None:
    """Freeze every label that reaches the model's output."""
    for source in node.all_input_nodes:
        for dims in state.value(source):
            for labels in dims:
                state.classes.freeze(labels, "reaches the model's output")


def _apply_rule(state: TraceState, node: Node, missing: dict[str, None]) -> tuple[Dims, ...]:
    """The labels of a node's outputs by its rule; without a fitting rule all labels that it touches are frozen."""
    op = _op_without_overload(node)
    if op in _CHECK_OPS:
        return ([None] * len(shape_of(node)),)
    handler, reason = RULES.get(op) or RULES.get(op.rstrip("_")), "has no rule; add one with jpq.tracing.rules"
    if handler is not None:
        try:
            return _check_rule_output(as_outputs(handler(OpCall(state, node))), node)
        except Exception as error:
            if not handler.__module__.startswith("jpq."):
                raise JpqError(f"Your rule for {op} failed: {type(error).__name__}: {error}") from error
            reason = "is used in a way that its rule does not cover"
    touched = [labels for n in node.all_input_nodes for dims in state.value(n) for labels in dims if labels is not None]
    if touched or isinstance(node.target, torch._ops.HigherOrderOperator):  # those may hide layers in a subgraph
        missing[op] = None
    for labels in touched:
        state.classes.freeze(labels, f"op {op} {reason}")
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return tuple([None] * (v.dim() if isinstance(v, Tensor) else 0) for v in values)


def _check_rule_output(outputs: tuple[Dims, ...], node: Node) -> tuple[Dims, ...]:
    """A rule's output, if it has a label for every index of every dim, or None; else ValueError."""
    value = node.meta.get("val")
    for dims, tensor in zip(outputs, value if isinstance(value, (tuple, list)) else [value], strict=False):
        counts = [None if labels is None else len(labels) for labels in dims]
        sizes = list(tensor.shape) if isinstance(tensor, Tensor) else counts
        pairs = [(k, n) for k, n in zip(counts, sizes, strict=False) if k is not None]
        if len(counts) != len(sizes) or any(not isinstance(n, int) or k != n for k, n in pairs):
            raise ValueError(
                f"it gave labels for sizes {counts} to an output of shape {sizes}; give one entry per dim, "
                "None or a label for each index."
            )
    return outputs


def _parameter_names(model: nn.Module, program: ExportedProgram) -> dict[Node, str]:
    """Placeholder of a parameter or buffer -> its name in the model, that in a layer where several modules share it."""
    first_name = {id(t): name for name, t in model.named_buffers()} | parameter_names(model)
    targets = {
        s.arg.name: s.target
        for s in program.graph_signature.input_specs
        if s.kind in (InputKind.PARAMETER, InputKind.BUFFER)
    }
    names = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and (target := targets.get(node.name)) is not None:
            path, _, attribute = target.rpartition(".")
            names[node] = first_name.get(id(getattr(model.get_submodule(path), attribute)), target)
    return names


def _called_modules(state: TraceState) -> dict[str, set[nn.Module]]:
    """Parameter -> the modules that have it and read it in code of their own."""
    owners_of_weights, called = WeightOwners(state.model), dict[str, set[nn.Module]]()
    for node, name in state.parameters.items():
        owners = set(owners_of_weights.of(name).values())
        readers = {state.model.get_submodule(module_path(user)) for user in node.users}
        called[name] = owners & readers
    return called


def _op_without_overload(node: Node) -> str:
    """The op's name with namespace, without overload: aten.add_.Tensor -> aten.add_."""
    return ".".join(str(node.target).split(".")[:2])


def _origins(program: ExportedProgram) -> dict[Node, str]:
    """Node -> "input" (the model's input, merely moved and scaled), "constant" or "computed"."""
    origins: dict[Node, str] = {}
    inputs, input_ops = set(program.graph_signature.user_inputs), set(_INPUT_OPS.split())
    for node in program.graph.nodes:
        op = "getitem" if node.target is operator.getitem else _op_without_overload(node)
        op = op.removeprefix("aten.").rstrip("_")
        sources = {origins[n] for n in node.all_input_nodes}
        if node.op == "placeholder":
            origins[node] = "input" if node.name in inputs else "constant"
        elif sources <= {"constant"}:
            origins[node] = "constant"
        else:
            origins[node] = "input" if op in input_ops and "computed" not in sources else "computed"
    return origins


def _is_unbatched(state: TraceState, call: LayerCall) -> bool:
    """Whether a call of a layer reads one sample without a batch dim; a vector of parameters is none."""
    source = call.node.all_input_nodes[0]
    plain = not call.float_reason or call.kind is not LayerKind.LINEAR
    return plain and state.origins[source] != "constant" and len(shape_of(source)) < len(call.shape)


def _unify_positions(state: TraceState, calls: list[LayerCall]) -> None:
    """Freeze the positions of a layer where its calls have different ones: one share cannot be right for all."""
    found = [[state.classes.find(labels).tolist() for labels in call.positions] for call in calls]
    if any(positions != found[0] for positions in found):
        for labels in (labels for call in calls for labels in call.positions):
            state.classes.freeze(labels, f"'{calls[0].weight}' is applied along it in only some of its calls")


def _build_layer(
    name: str,
    calls: list[LayerCall],
    batch: int,
    state: TraceState,
    forms: Mapping[Node, str],
    output_quant_point: OutputQuantPoint | None,
    stored: int | None,
) -> Layer:
    """The layer of one weight from all of its calls."""
    owner, first_call = calls[0].weight.rpartition(".")[0], calls[0]
    size = first_call.size
    if first_call.float_reason and first_call.kind is LayerKind.LINEAR:
        positions = first_call.macs // batch // max(prod(first_call.shape), 1)
        size = (positions,) if positions > 1 else ()
    return Layer(
        name=name,
        weight=first_call.weight,
        kind=first_call.kind,
        weight_shape=first_call.shape,
        groups=first_call.groups,
        macs=sample_macs(state, calls, batch),
        inputs=state.classes.find(first_call.inputs),
        outputs=state.classes.find(first_call.outputs),
        reads_input=any(state.origins[call.node.all_input_nodes[0]] == "input" for call in calls),
        calls=len(calls),
        wrappable=not first_call.float_reason
        and all(_is_torch_layer_call(call.node, owner, state.model) for call in calls),
        stride=first_call.stride,
        size=size,
        form=forms.get(first_call.node, "float>float"),
        output_quant_point=output_quant_point,
        positions=tuple(state.classes.find(labels) for labels in first_call.positions),
        float_reason=first_call.float_reason,
        stored=stored,
    )


def _is_torch_layer_call(node: Node, owner: str, model: nn.Module) -> bool:
    """Whether a torch Conv or Linear module at path `owner` makes this call in its forward."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    module = model.get_submodule(owner)
    is_torch = type(module).__module__.startswith("torch.nn.")
    plain = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and is_torch
    return plain and bool(stack) and model.get_submodule(stack[-1][0].split("@")[0]) is module
