"""Names, products and tables of a network: what belongs to it beside layers that are modules of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod

from torch.fx import Node

from jpq.tracing.channel_labels import unique_labels
from jpq.tracing.network import Layer, Product, Table
from jpq.tracing.op_call import LayerCall, ProductCall, TraceState, shape_of
from jpq.tracing.tied_weights import WeightOwners
from jpq.types import NONE

UNMASKABLE = "made with a weight that is computed in the model's code, or applied by no layer of torch"

_MOVES = ("t", "transpose", "permute", "view", "reshape", "contiguous", "unsqueeze", "squeeze", "mT", "numpy_T")

_EXPANSIONS = ("flatten", "unflatten", "expand", "expand_as", "repeat")  # of a weight that stays what it is

_SPREADING = [[op] for op in ("expand", "expand_as", "repeat", "tile", "new_zeros", "new_ones", "new_full")]

_RESHAPING = [[op] for op in ("view", "reshape", "_unsafe_view", "unflatten")]  # they name sizes too

_PARTS = ("split", "chunk", "split_with_sizes", "unbind", "tensor_split")


def layer_names(state: TraceState, calls: Sequence[LayerCall]) -> list[str]:
    """A name for each layer, given its first call: its module's, where that has no other weight; else its parameter's.

    Parts of one parameter have its name and their index ("attn.in_proj_weight[0]"), other uses of one a number.
    """
    owners = Counter(weight.rpartition(".")[0] for weight in dict.fromkeys(call.weight for call in calls))
    names: dict[int, str] = {}
    for i, call in sorted(enumerate(calls), key=lambda pair: bool(pair[1].float_reason)):  # modules keep their names
        owner, part = call.weight.rpartition(".")[0], _part(state, call)
        name = owner if owner and owners[owner] == 1 and not part else call.weight + part
        taken, n = set(names.values()), 2
        if name == owner and name in taken:
            name = call.weight
        base = name
        while name in taken:
            name, n = f"{base}#{n}", n + 1
        names[i] = name
    return [names[i] for i in range(len(calls))]


def _part(state: TraceState, call: LayerCall) -> str:
    """`[1]` where the layer's weight is this part of a parameter, merely cut and moved; else empty."""
    if not call.float_reason:
        return ""
    for node in call.node.all_input_nodes:
        text = ""
        while node.all_input_nodes and not text:
            source, op = node.all_input_nodes[0], _op_name(node)
            if op == "getitem" and _op_name(source) in _PARTS:
                source, text = source.all_input_nodes[0], f"[{node.args[1]}]"
            elif op == "select":
                text = f"[{node.args[2]}]"
            elif op == "slice":
                text = f"[{':'.join(str(n) for n in node.args[2:4])}]"
            elif op not in _MOVES:
                break
            node = source
        if text and state.parameters.get(node) == call.weight:
            return text
    return ""


def is_bare_parameter(state: TraceState, weight: Node) -> bool:
    """Whether a weight is a parameter as it is, or merely moved and expanded."""
    while weight not in state.parameters and _op_name(weight) in (*_MOVES, *_EXPANSIONS) and weight.all_input_nodes:
        weight = weight.all_input_nodes[0]
    return weight in state.parameters


def _op_name(node: Node) -> str:
    """The op without namespace and overload: aten.t.default -> t."""
    return "getitem" if "getitem" in str(node.target) else (str(node.target).split(".")[1:2] or [""])[0]


def sample_macs(state: TraceState, calls: Sequence[LayerCall | ProductCall], batch: int) -> int:
    """Multiply-accumulates of one sample, from calls on a batch; what depends on no input is done once for all."""
    operands = [call.operands if isinstance(call, ProductCall) else call.node.all_input_nodes for call in calls]
    constant = [_is_constant(state, nodes, batch) for nodes in operands]
    once = sum(call.macs for call, alone in zip(calls, constant, strict=True) if alone)
    return once + sum(call.macs for call, alone in zip(calls, constant, strict=True) if not alone) // batch


def _is_constant(state: TraceState, operands: Sequence[Node], batch: int) -> bool:
    """Whether work on these tensors is the same for any number of samples: they depend on parameters alone.

    Tensors that the code makes or spreads (zeros, expand) count as a batch where a size that it names is the batch's.
    """
    if any(state.origins.get(operand) != "constant" for operand in operands):
        return False
    made: dict[Node, tuple[bool, bool]] = {}
    return not any(_made_and_spread(operand, batch, made)[1] for operand in operands)


def _made_and_spread(node: Node, batch: int, known: dict[Node, tuple[bool, bool]]) -> tuple[bool, bool]:
    """Of a constant tensor: whether its sizes depend on numbers in the code, and whether one was the batch's."""
    if node.op == "placeholder":
        return False, False
    if node not in known:
        sources = [_made_and_spread(source, batch, known) for source in node.all_input_nodes]
        op, inherited = str(node.target).split(".")[1:2], any(m for m, _ in sources)
        named = not sources or op in _SPREADING or (inherited and op in _RESHAPING)
        spread = (named and batch in shape_of(node)) or any(spread for _, spread in sources)
        known[node] = named or inherited, spread
    return known[node]


def build_products(state: TraceState, batch: int) -> tuple[Product, ...]:
    """The products of a graph; those that one place in a module's code makes in several calls are one.

    Args:
        state: after all ops were recorded; batch: samples of the example.
    """
    places = Counter[tuple[str, str]]()
    groups: dict[tuple[str, str, int, str], list[ProductCall]] = {}
    for call in state.products:
        what = call.name or call.op.rpartition(".")[2].rstrip("_")
        places[call.module, what] += 1  # the n-th of this kind in this call of the module
        dims = str([state.classes.find(labels).tolist() for labels in call.dims])
        groups.setdefault((call.module.split("@")[0], what, places[call.module, what], dims), []).append(call)
    products, used = [], set[str]()
    for (module, what, place, _), calls in groups.items():
        base = f"{module}.{what}".lstrip(".") + (f"_{place}" if place > 1 else "")
        name, n = base, 2
        while name in used:
            name, n = f"{base}#{n}", n + 1
        used.add(name)
        macs = sample_macs(state, calls, batch)
        dims_of_first = tuple(state.classes.find(labels) for labels in calls[0].dims)
        products.append(Product(name, calls[0].op, module, macs, dims_of_first))
    return tuple(products)


def count_stored_numbers(
    state: TraceState, by_key: Mapping[str, Sequence[LayerCall]], owners_of_weights: WeightOwners
) -> tuple[dict[str, int], list[Table]]:
    """How many numbers of its parameter each layer with a computed weight has for its own, and parameters left over.

    Returns (key of the layer -> numbers, tables). A parameter that several layers read belongs to the first, layers
    that read it as it is before others. What belongs to no layer and has two or more dims is a table, and so is what an
    embedding shares with a layer: a file holds it twice.
    """
    left = {name: node for node, name in state.parameters.items() if node.users}
    numbers = {name: prod(shape_of(node)) for name, node in left.items()}
    stored: dict[str, int] = {}
    for key, calls in sorted(by_key.items(), key=lambda item: bool(item[1][0].float_reason)):
        call = calls[0]
        own = min(prod(call.shape), numbers.get(call.weight, 0))
        numbers[call.weight] = numbers.get(call.weight, 0) - own
        if own != prod(call.shape):
            stored[key] = own
    for name in left.keys() & {call.weight for call in state.calls}:
        if owners_of_weights.is_read_by_others(name):  # an embedding reads what a layer stores as integers
            numbers[name] = prod(shape_of(left[name]))
    trained = {name for name, _ in state.model.named_parameters(remove_duplicate=False)}
    tables = []
    for name, node in left.items():
        if name in trained and len(shape_of(node)) > 1 and numbers[name] > 0:
            dims = tuple(labels for labels in state.axes.get(name, {}).values() if (labels != NONE).any())
            tables.append(Table(name, numbers[name], tuple(state.classes.find(labels) for labels in dims)))
    return stored, tables


def freeze_unmaskable(state: TraceState, layers: Sequence[Layer]) -> dict[int, str]:
    """The frozen classes, with those that only layers at 32 bits make: no site is named after such a layer."""
    frozen = state.classes.frozen()
    sources = [layer.outputs for layer in layers if not layer.float_reason]
    sources += [state.classes.find(labels) for labels in state.embeddings.values()]
    made = {int(c) for labels in sources for c in unique_labels(labels)}
    for layer in layers:
        if layer.float_reason:
            frozen |= {int(c): UNMASKABLE for c in unique_labels(layer.outputs) if c not in made and c not in frozen}
    return frozen
