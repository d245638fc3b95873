"""Read a model: export it to an ATen graph, carry channel labels through the graph, note the layers with weights."""

from __future__ import annotations

import logging
import operator
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from jpq.network.call import Book, Call, Dims, LayerCall, outputs, shape_of
from jpq.network.check import runs_smaller
from jpq.network.record import Layer, Network
from jpq.network.rules import RULES
from jpq.types import JpqError, Labels

__all__ = ["Layer", "Network", "trace"]

Example = Tensor | tuple[Any, ...] | list[Any] | dict[str, Any]

_SILENT = ("aten.sym_size", "aten._assert_async", "aten._assert_scalar", "aten._assert_tensor_metadata")
_PLAIN = """add sub mul div rsub to clone contiguous alias detach view reshape flatten unflatten permute transpose
unsqueeze squeeze select unbind slice narrow chunk split split_with_sizes cat stack expand pad constant_pad_nd flip
float double half _to_copy lift_fresh lift_fresh_copy pixel_unshuffle getitem"""  # leave an input's values an input


def trace(model: nn.Module, example: Example, *, open_norms: bool = False) -> Network:
    """The network behind `model`; the example is what its forward takes: a tensor, a tuple, or a dict of keywords.

    The model is read in evaluation mode and left as it was; `unpacked` beforehand makes more of it prunable. A smaller
    copy is run to find channel counts that its code holds as plain numbers; those channels are frozen.

    So are channels that LayerNorm, RMSNorm or GroupNorm average over, since without one the others change. With
    `open_norms` they may go nevertheless (GroupNorm's groups stay equally large): the rebuilt model then is NOT the
    masked one, and fine-tuning must repair it. `Network.opened` lists them.
    """
    args, kwargs = _call_of(example)
    with _evaluating(model):
        program = _export(model, args, kwargs)
        book, unknown_ops = _walk(model, program, open_norms)
        network = _record(book, unknown_ops, _batch(args, kwargs))
        suspects = {int(c) for labels in book.suspects for c in np.unique(book.classes.find(labels))}
        network = runs_smaller(model, network, args, kwargs, suspects)
        return replace(network, opened={c: why for c, why in network.opened.items() if c not in network.frozen})


def _call_of(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, dict):
        return (), example
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, then every module's own mode again."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    level = logging.root.manager.disable
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            return torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        raise _unreadable(model, args, kwargs, error) from error
    finally:
        logging.disable(level)


def _unreadable(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> JpqError:
    """Tell a wrong example from a model that cannot be exported."""
    name = type(model).__name__
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as wrong:
        shapes = [list(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in (*args, *kwargs.values())]
        return JpqError(f"{name} does not run on the example {shapes}: {_first_line(wrong)} "
                        "Give an example of the shape that its forward takes (a tuple for several inputs, a dict for "
                        "keywords).")  # fmt: skip
    frames = [f for f in traceback.extract_tb(error.__traceback__)
              if "/torch/" not in f.filename and f.filename != __file__]  # fmt: skip
    where = f" at {frames[-1].filename}:{frames[-1].lineno}, `{frames[-1].line}`" if frames else ""
    return JpqError(f"torch.export cannot read {name}{where}: {_first_line(error)} Values of tensors cannot steer "
                    "Python code: replace that line by tensor operations (torch.where, masks), or trace a submodule "
                    "that does without it.")  # fmt: skip


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if text.endswith((".", "!", "?")) else text + "."


def _walk(model: nn.Module, program: ExportedProgram, open_norms: bool = False) -> tuple[Book, list[str]]:
    """Carry labels through the graph, node by node."""
    program.graph.eliminate_dead_code()  # such as attention weights that nobody asked for
    book = Book(model, _parameters(model, program), _origins(program), open_norms=open_norms)
    missing: dict[str, None] = {}
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


def _apply(book: Book, node: Node, missing: dict[str, None]) -> tuple[Dims, ...]:
    """One node by its rule; without one, everything it touches is frozen."""
    base = _base(node)
    if base in _SILENT:
        return ([None] * len(shape_of(node)),)
    handler = RULES.get(base) or RULES.get(base.rstrip("_"))
    if handler is not None:
        return outputs(handler(Call(book, node)))
    touched = [labels for n in node.all_input_nodes for dims in book.value(n) for labels in dims if labels is not None]
    if touched or not isinstance(node.target, torch._ops.OpOverload):  # other ops may hide layers in a subgraph
        missing[base] = None
    for labels in touched:
        book.classes.freeze(labels, f"op {base} has no rule")
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return tuple([None] * (v.dim() if isinstance(v, Tensor) else 0) for v in values)


def _parameters(model: nn.Module, program: ExportedProgram) -> dict[Node, str]:
    """Placeholder -> the first name the model has for that parameter or buffer."""
    first = {id(t): name for name, t in [*model.named_buffers(), *model.named_parameters()]}
    targets = {s.arg.name: s.target for s in program.graph_signature.input_specs
               if s.kind in (InputKind.PARAMETER, InputKind.BUFFER)}  # fmt: skip
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


def _batch(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    sizes = [v.shape[0] for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 0]
    return max(int(sizes[0]), 1) if sizes else 1


def _record(book: Book, unknown_ops: list[str], batch: int) -> Network:
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
    layers = tuple(_layer(weight, calls, batch, owners, book) for weight, calls in grouped.items())
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
        opened={int(c): why for labels, why in reversed(book.opened) for c in np.unique(find(labels))},
    )


def _layer(weight: str, calls: list[LayerCall], batch: int, owners: list[str], book: Book) -> Layer:
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
    )


def _is_own(node: Node, owner: str, model: nn.Module) -> bool:
    """Whether the forward of the module that owns the weight makes this call, and is a torch layer's."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    module = model.get_submodule(owner)
    plain = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and type(module).__module__.startswith("torch.nn.")
    return plain and bool(stack) and model.get_submodule(stack[-1][0].split("@")[0]) is module
