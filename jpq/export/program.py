"""`Program`: a model as plain data, its ATen graph and tensors, which is run step by step without the model's code.

The graph comes from torch.export in evaluation mode: every quantizer, selection and branch is in it as ATen operators,
and the outputs are those of the model to the bit. A `Program` is read from JSON and tensors alone. Only operators of
ATen and torchvision and arithmetic on sizes are looked up, none that takes the name of a file, and nothing else runs.
"""

from __future__ import annotations

import inspect
import io
import logging
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx import Node
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from jpq.files import untrusted
from jpq.tracing.export_graph import restore_attributes
from jpq.tracing.forward import (
    batch_dim,
    batch_size,
    call_model,
    collect_tensors,
    first_samples,
    name_inputs,
    plain_outputs,
    split_arguments,
)
from jpq.tracing.inline_subgraphs import inline_subgraphs
from jpq.tracing.traced_lengths import traced_lengths
from jpq.types import JpqError

FORMAT = 1  # version of the record

BATCH = "batch"  # stands for the size of a dim that lies along the batch

LIBRARIES = ("aten", "torchvision")  # whose operators a program may call

# arguments of text that choose a formula; any other text, such as the name of a file, is refused
TEXT_ARGUMENTS = frozenset({"approximate", "equation", "indexing", "mode", "ord", "padding", "reduce", "rounding_mode"})

_SKIPPED = ("_assert", "sym_constrain", "assert_")  # checks of sizes; a program checks the shapes of its inputs

_OPERATORS = ("getitem", "add", "sub", "mul", "neg", "floordiv", "truediv", "mod", "pow", "eq", "ne", "lt", "le", "gt")
ARITHMETIC: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in (*_OPERATORS, "ge", "and_", "or_", "not_")},
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not")},
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "math.trunc": math.trunc,
}
_ARITHMETIC_NAMES = {function: name for name, function in ARITHMETIC.items()}

_NAMED = {  # values of arguments that have a name in torch, by their kind
    kind: {str(getattr(torch, name)).removeprefix("torch."): getattr(torch, name) for name in names}
    for kind, names in {
        "dtype": [n for n in dir(torch) if isinstance(getattr(torch, n), torch.dtype)],
        "layout": ["strided"],
        "memory_format": ["contiguous_format", "preserve_format", "channels_last", "channels_last_3d"],
    }.items()
}


def capture_program(model: nn.Module, example: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(record, tensors): the graph of a model in evaluation mode as JSON's types, and the tensors that it reads.

    Args:
        model: in evaluation mode.
        example: a batch: a tensor, a tuple of positional arguments, or a dict of keywords. Sizes along the batch stay
            free where the model's code allows any.

    Raises JpqError where torch.export cannot follow the model, or where its graph holds more than plain operators.
    """
    args, kwargs = split_arguments(example)
    size = batch_size((args, kwargs))
    shapes = free_sizes(model, args, kwargs, size, Dim.AUTO)
    if size == 1:  # torch.export takes a dim of size 1 for a constant
        args, kwargs = first_samples((args, kwargs), 2)
    names = list(name_inputs(model, args, kwargs))
    with _quiet_export(model), plain_outputs(model), traced_lengths():
        try:
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # torch.export has no common class of errors
            reason = " ".join(str(error).split())[:160]
            raise JpqError(f"torch.export cannot follow {type(model).__name__} ({reason}).") from error
    try:
        return _Capture(exported, names).record()
    except ValueError as error:
        raise JpqError(f"The graph of {type(model).__name__} cannot be stored: {error}.") from error


def free_sizes(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int, free_dim: Any
) -> dict[str, Any]:
    """The dims of each argument that lie along a batch of that size, in torch.export's terms: `free_dim` for each."""

    def free(leaf: Any) -> dict[int, Any] | None:
        dim = batch_dim(leaf, size) if isinstance(leaf, Tensor) else None
        return None if dim is None else {dim: free_dim}

    sizes = tree_map(free, (args, dict(kwargs)))
    return dict(inspect.signature(model.forward).bind(*sizes[0], **sizes[1]).arguments)


@contextmanager
def _quiet_export(model: nn.Module) -> Iterator[None]:
    """A context for torch.export: without its warnings, logs and gradients, and with the model's attributes kept."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad(), restore_attributes(model), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class _Capture:
    """An exported graph on its way to a record."""

    def __init__(self, exported: ExportedProgram, names: Sequence[str]):
        self.exported, self.input_names = exported, names
        self.tensors: dict[str, Tensor] = {}
        self.steps: list[dict[str, Any]] = []
        self.sources: list[dict[str, Any]] = []  # placeholders: tensors of the program, or leaves of its inputs

    def record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(record, tensors). Raises ValueError for what no record can hold."""
        inline_subgraphs(self.exported.graph_module, autocast=False)
        self.exported.graph.eliminate_dead_code()
        leaves = self._read_placeholders()
        results: list[Any] = []
        for node in self.exported.graph.nodes:
            if node.op == "output":
                results = list(node.args[0])
            elif node.op == "call_function":
                self._add_step(node)
            elif node.op != "placeholder":
                raise ValueError(f"it holds {node.op} '{node.name}'")
        specs = self.exported.graph_signature.output_specs
        if any(spec.kind is not OutputKind.USER_OUTPUT for spec in specs):
            raise ValueError("it changes its own tensors in evaluation mode")
        args, kwargs = tree_unflatten(range(len(leaves)), self.exported.call_spec.in_spec)
        values = [*args, *kwargs.values()]
        out_spec = self.exported.call_spec.out_spec
        return {
            "format": FORMAT,
            "inputs": [[name, describe(value)] for name, value in zip(self.input_names, values, strict=True)],
            "leaves": leaves,
            "sources": self.sources,
            "steps": self.steps,
            "results": [encode_argument(result) for result in results],
            "output": describe(tree_unflatten(range(len(results)), out_spec)),
        }, self.tensors

    def _read_placeholders(self) -> list[Any]:
        """The leaves of the inputs, each as its type and shape or as a constant; tensors and sources are filled."""
        leaves: list[Any] = []
        nodes = {node.name: node for node in self.exported.graph.nodes if node.op == "placeholder"}
        for spec in self.exported.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT:
                self.sources.append({"node": spec.arg.name, "leaf": len(leaves)})
                constant = isinstance(spec.arg, ConstantArgument)
                leaves.append(_describe_leaf(spec.arg.value if constant else nodes[spec.arg.name].meta["val"]))
            elif nodes[spec.arg.name].users:
                self._add_tensor(spec)
        return leaves

    def _add_tensor(self, spec: Any) -> None:
        """Keep the tensor behind a placeholder, with its kind and shape."""
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise ValueError(f"it takes an object, '{spec.arg.name}'")
        name = str(spec.target)
        stored = self.exported.state_dict if name in self.exported.state_dict else self.exported.constants
        tensor = self.tensors[name] = stored[name].detach()
        self.sources.append(
            {"node": spec.arg.name, "tensor": name, "kind": spec.kind.name.lower(), "shape": list(tensor.shape)}
        )

    def _add_step(self, node: Node) -> None:
        """Append the call of one node, unless it only checks a size."""
        name = _ARITHMETIC_NAMES.get(node.target)  # type: ignore[arg-type]
        if name is None:
            name = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""
        if name.partition(".")[2].startswith(_SKIPPED) and not node.users:
            return
        find_operator(name or str(node.target))  # which says what cannot be read again
        self.steps.append(
            {
                "node": node.name,
                "call": name,
                "args": [encode_argument(value) for value in node.args],
                "kwargs": {key: encode_argument(value) for key, value in node.kwargs.items()},
            }
        )


def describe(value: Any) -> Any:
    """A nest of numbers of leaves in JSON's types. Raises ValueError for classes that a record cannot name."""
    if value is None or type(value) is int:
        return value
    if isinstance(value, Mapping):
        return {"dict": [[str(key), describe(inner)] for key, inner in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list" if isinstance(value, list) else "tuple": [describe(inner) for inner in value]}
    fields = getattr(type(value), "__dataclass_fields__", None)
    if fields is not None:
        return describe({name: getattr(value, name) for name in fields})
    raise ValueError(f"a {type(value).__name__} among its inputs or outputs")


def _describe_leaf(value: Any) -> Any:
    """The type and shape of a tensor; a constant as it is."""
    if isinstance(value, Tensor):
        shape = [BATCH if is_free_size(n) else int(n) for n in value.shape]
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": shape}
    return {"value": encode_argument(value)}


def is_free_size(n: Any) -> bool:
    """Whether a size in an exported graph may differ from the example's; torch keeps a symbol of one value, too."""
    return isinstance(n, torch.SymInt) and not n.node.expr.is_number


def encode_argument(value: Any) -> Any:
    """An argument of an operator in JSON's types. Raises ValueError for what has no form there."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [encode_argument(inner) for inner in value]
    if isinstance(value, torch.device):
        return {"device": "input"}  # where the tensors of the program are
    for kind, names in _NAMED.items():
        name = str(value).removeprefix("torch.")
        if name in names and names[name] is value:
            return {kind: name}
    raise ValueError(f"an argument of type {type(value).__name__}")


def find_operator(name: str) -> Callable[..., Any]:
    """The function behind the name of an operator. Raises ValueError for anything that a program may not call."""
    if name in ARITHMETIC:
        return ARITHMETIC[name]
    library, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    found = None
    if library in LIBRARIES and packet.isidentifier() and overload.isidentifier():
        found = getattr(getattr(getattr(torch.ops, library), packet, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"the operator {name[:80]} is none of ATen or torchvision")
    for argument in found._schema.arguments:
        if "str" in str(argument.type).lower() and argument.name not in TEXT_ARGUMENTS:
            raise ValueError(f"the operator {name[:80]} takes text")
    return found


class Program(nn.Module):
    """A model read from its graph as data, for evaluation; called like the model that it was captured from.

    Its parameters and buffers have the names that they had in the model. Inputs must have the shapes of the example
    that the graph was captured with, apart from the batch.

    Args:
        record: of `capture_program`.
        state: name -> tensor, the state dict of the program; what the graph does not read is kept too.
        constants: the tensors that the graph reads besides.

    Raises JpqError for a record that `capture_program` did not make, and where a tensor is missing.
    """

    def __init__(self, record: Any, state: Mapping[str, Tensor], constants: Mapping[str, Tensor] | None = None):
        super().__init__()
        try:
            self.record = _check_record(record)
            sources = {source["tensor"]: source for source in self.record["sources"] if "tensor" in source}
            tensors = {**(constants or {}), **state}
            for name, source in sources.items():
                if list(tensors[name].shape) != source["shape"]:
                    raise ValueError(f"tensor '{name}' has another shape")
            for name, tensor in tensors.items():
                if name in sources or name in state:
                    learns = name in sources and sources[name]["kind"] == "parameter"
                    self._store(name, tensor, learns and tensor.is_floating_point(), name in state)
            self._prepare()
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise JpqError(f"The stored graph is not one that jpq wrote ({type(error).__name__}: {reason}).") from error
        self.eval()

    def _store(self, name: str, tensor: Tensor, learns: bool, persistent: bool) -> None:
        """Keep a tensor under its dotted name, as a parameter or as a buffer."""
        *path, leaf = name.split(".")
        owner: Any = self
        for part in path:  # not by add_module, which takes no part of the name of an attribute, such as `record`
            owner = owner._modules.setdefault(part, nn.Module())
        if learns:
            owner._parameters[leaf] = nn.Parameter(tensor)
            return
        owner._buffers[leaf] = tensor
        if not persistent:
            owner._non_persistent_buffers_set.add(leaf)

    def constants(self) -> dict[str, Tensor]:
        """The tensors that the graph reads and that the state dict has not."""
        state = self.state_dict()
        return {s["tensor"]: self._tensor(s) for s in self.record["sources"] if s.get("tensor", "") not in {"", *state}}

    def _prepare(self) -> None:
        """Look the operators up, and note after which step a value is no longer needed."""
        known = {source["node"] for source in self.record["sources"]}
        last = {name: -1 for name in known}
        calls = []
        for i, step in enumerate(self.record["steps"]):
            reads = set(_nodes_in([step["args"], step["kwargs"]]))
            if not reads <= known or step["node"] in known:
                raise ValueError(f"step '{step['node'][:40]}' reads what was not computed")
            calls.append(find_operator(step["call"]))
            known.add(step["node"])
            last |= dict.fromkeys([*reads, step["node"]], i)
        results = set(_nodes_in(self.record["results"]))
        if not results <= known:
            raise ValueError("it gives what was not computed")
        ends: dict[int, list[str]] = {}
        for name, i in last.items():
            if name not in results:
                ends.setdefault(i, []).append(name)
        self._calls, self._ends = calls, ends

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_calls", "_ends")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the model; JpqError for inputs of another structure, type or shape than the example's."""
        leaves = self._leaves(args, kwargs)
        values = {s["node"]: leaves[s["leaf"]] if "leaf" in s else self._tensor(s) for s in self.record["sources"]}
        device = next((value.device for value in values.values() if isinstance(value, Tensor)), torch.device("cpu"))
        for i, (step, call) in enumerate(zip(self.record["steps"], self._calls, strict=True)):
            arguments = [_decode(value, values, device) for value in step["args"]]
            named = {key: _decode(value, values, device) for key, value in step["kwargs"].items()}
            values[step["node"]] = call(*arguments, **named)
            for name in self._ends.get(i, ()):
                del values[name]
        results = [_decode(result, values, device) for result in self.record["results"]]
        return assemble(self.record["output"], results)

    def _tensor(self, source: Mapping[str, Any]) -> Tensor:
        *path, leaf = source["tensor"].split(".")
        owner: Any = self
        for part in path:
            owner = owner._modules[part]
        value: Tensor = owner._parameters[leaf] if leaf in owner._parameters else owner._buffers[leaf]
        return value

    def _leaves(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The tensors and constants of a call, in the order of the record's leaves."""
        names = [name for name, _ in self.record["inputs"]]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(args) > len(names) or given.keys() != set(names) or len(given) < len(args) + len(kwargs):
            raise JpqError(f"This model takes {', '.join(names)}, as it was saved; it got {len(args)} positional "
                           f"arguments and {sorted(kwargs)}.")  # fmt: skip
        leaves: list[Any] = [None] * len(self.record["leaves"])
        for name, structure in self.record["inputs"]:
            for number, value in _match(structure, given[name], name):
                leaves[number] = value
        _check_leaves(self.record["leaves"], leaves)
        return leaves


def _match(structure: Any, value: Any, name: str) -> Iterator[tuple[int, Any]]:
    """(number of a leaf, its value) of an argument. Raises JpqError where it is of another structure."""
    if type(structure) is int:
        yield structure, value
    elif structure is None:
        if value is not None:
            raise JpqError(f"The input '{name}' was None when this model was saved, and must be.")
    elif "dict" in structure:
        keys = [key for key, _ in structure["dict"]]
        if not isinstance(value, Mapping) or set(value) != set(keys):
            raise JpqError(f"The input '{name}' must be a dict of {', '.join(keys)}.")
        for key, inner in structure["dict"]:
            yield from _match(inner, value[key], f"{name}.{key}")
    else:
        (parts,) = structure.values()
        if not isinstance(value, (list, tuple)) or len(value) != len(parts):
            raise JpqError(f"The input '{name}' must be a tuple of {len(parts)}.")
        for i, inner in enumerate(parts):
            yield from _match(inner, value[i], f"{name}.{i}")


def _check_leaves(expected: Sequence[Any], leaves: Sequence[Any]) -> None:
    """Raise JpqError where a leaf has another type or shape than the record says."""
    batch: int | None = None
    for leaf, value in zip(expected, leaves, strict=True):
        if "shape" not in leaf:
            if not isinstance(value, Tensor) and value == _decode(leaf["value"], {}, torch.device("cpu")):
                continue
            raise JpqError(f"This model was saved with {leaf['value']} as one of its inputs, and takes no other value.")
        shape = list(value.shape) if isinstance(value, Tensor) else []
        free = [n for n, size in zip(shape, leaf["shape"], strict=False) if size == BATCH]
        batch = batch if batch is not None or not free else free[0]
        wanted = [batch if size == BATCH else size for size in leaf["shape"]]
        if not isinstance(value, Tensor) or shape != wanted or str(value.dtype) != f"torch.{leaf['dtype']}":
            text = ", ".join(map(str, leaf["shape"]))
            got = f"{value.dtype} {shape}" if isinstance(value, Tensor) else type(value).__name__
            raise JpqError(
                f"This model takes torch.{leaf['dtype']} [{text}], as it was saved; it got {got}. For other sizes load "
                "it with its code: jpq.load(folder, model=...)."
            )


def _check_record(record: Any) -> dict[str, Any]:
    """The record. Raises ValueError or KeyError where its entries are not of their types."""
    tree = untrusted.as_dict(record)
    if tree["format"] != FORMAT:
        raise ValueError(f"format {str(tree['format'])[:20]}")
    for source in untrusted.as_list(tree["sources"]):
        untrusted.as_str(source["node"])
        if "leaf" in source:
            untrusted.as_int(source["leaf"], 0, len(tree["leaves"]) - 1)
        elif not all(untrusted.as_str(source["tensor"]).split(".")):  # names as setattr and ModuleDict take them
            raise ValueError(f"a tensor of the name {source['tensor'][:40]!r}")
    for step in untrusted.as_list(tree["steps"]):
        untrusted.as_str(step["node"])
        untrusted.as_str(step["call"])
        untrusted.as_list(step["args"])
        untrusted.as_dict(step["kwargs"])
    for name in ("inputs", "leaves", "results"):
        untrusted.as_list(tree[name])
    for _, structure in tree["inputs"]:
        check_structure(structure, len(tree["leaves"]))
    for leaf in tree["leaves"]:
        if "shape" in untrusted.as_dict(leaf):
            untrusted.as_list(leaf["shape"])
            untrusted.as_str(leaf["dtype"])
        else:
            _decode(leaf["value"], {}, torch.device("cpu"))
    check_structure(tree["output"], len(tree["results"]))
    return tree


def check_structure(structure: Any, count: int) -> None:
    """Raise ValueError unless a nest holds numbers of `count` leaves."""
    if structure is None:
        return
    if not isinstance(structure, dict):
        untrusted.as_int(structure, 0, count - 1)
        return
    ((kind, parts),) = structure.items()
    if kind not in ("dict", "list", "tuple"):
        raise ValueError(f"a nest of kind {kind[:20]!r}")
    for part in untrusted.as_list(parts):
        if kind == "dict":
            untrusted.as_str(part[0])
        check_structure(part[1] if kind == "dict" else part, count)


def _nodes_in(value: Any) -> Iterator[str]:
    """Names of the values that encoded arguments read."""
    if isinstance(value, list):
        for inner in value:
            yield from _nodes_in(inner)
    elif isinstance(value, dict):
        if set(value) == {"node"}:
            yield untrusted.as_str(value["node"])
        else:
            yield from _nodes_in(list(value.values()))


def _decode(value: Any, values: Mapping[str, Any], device: torch.device) -> Any:
    """The argument behind `encode_argument`. Raises ValueError for what that does not give."""
    if isinstance(value, list):
        return [_decode(inner, values, device) for inner in value]
    if not isinstance(value, dict):
        return value
    ((kind, name),) = value.items()
    if kind == "node":
        return values[name]
    if kind == "device":
        return device
    if kind == "float" and name in ("inf", "-inf", "nan"):
        return float(name)
    if kind in _NAMED and name in _NAMED[kind]:
        return _NAMED[kind][name]
    raise ValueError(f"an argument of kind {kind[:20]!r}")


def assemble(structure: Any, results: Sequence[Any]) -> Any:
    """The output of a program in its nest."""
    if structure is None:
        return None
    if type(structure) is int:
        return results[structure]
    ((kind, parts),) = structure.items()
    if kind == "dict":
        return {key: assemble(inner, results) for key, inner in parts}
    nest = [assemble(inner, results) for inner in parts]
    return nest if kind == "list" else tuple(nest)


def outputs_differ(model: nn.Module, program: nn.Module, example: Any) -> bool:
    """Whether two models give outputs on a batch that differ in any bit."""
    with torch.no_grad():
        ours, theirs = (collect_tensors(tree_flatten(call_model(m, example))[0]) for m in (model, program))
    pairs = zip(ours, theirs, strict=False)
    return len(ours) != len(theirs) or not all(torch.allclose(a, b, 0, 0, equal_nan=True) for a, b in pairs)
