"""`find_routes`: the products in modules' own code that plain layers can compute, found by running the model once.

Every torch call of a forward pass is observed. Tensors that depend on parameters alone are followed from call to call,
so that the weight of a product is known as a view of a parameter (x @ W, W^T, slices) or as computed from parameters
(weight standardisation). A product becomes a layer where its module owns these parameters and nothing else reads
them, and where training makes the same product of the same weight as evaluation.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jpq.plan import LayerRoute, RoutedCall, WeightSource
from jpq.tracing.export_graph import restore_attributes
from jpq.tracing.forward import Example, call_model, collect_tensors
from jpq.tracing.model_checks import unwrap_model
from jpq.tracing.own_calls import OwnCall, observe_calls
from jpq.tracing.products import Product, read_operands, read_product
from jpq.tracing.routes import Tensors, apply_routes
from jpq.types import JpqError

# methods that tell no values of a tensor
_METADATA = """size dim ndimension numel nelement stride is_floating_point is_complex element_size is_contiguous
get_device __len__ storage_offset type __get__ __hash__ __format__ __repr__"""

SAME_OUTPUT = 1e-3  # largest difference of outputs that counts as rounding, of the largest value

_OTHER = OwnCall("", "")  # a reader of a parameter that is no product of its own module


@dataclass
class Constant:
    """A tensor that depends on parameters and buffers alone, and the calls that made it."""

    tensor: Tensor
    parameters: frozenset[str]  # by their dotted names
    calls: frozenset[OwnCall | None] = frozenset()  # None: a call that is no module's own


@dataclass
class SeenProduct:
    """A product that a module makes, as seen in one call."""

    product: Product
    weight: Constant
    bias: Constant | None


@dataclass
class Observations:
    """What one or several forward passes told of products and parameters."""

    products: dict[OwnCall, list[SeenProduct]] = field(default_factory=lambda: defaultdict(list))
    readers: dict[str, set[OwnCall]] = field(default_factory=lambda: defaultdict(set))  # parameter -> who reads it
    shapes: dict[OwnCall, set[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(set))  # constant results
    modules: set[str] = field(default_factory=set)  # those that made calls of their own


class Observer:
    """Follows the tensors that depend on parameters alone through the calls of one forward pass."""

    def __init__(self, model: nn.Module, seen: Observations):
        self.seen = seen
        self.constants: dict[int, Constant] = {}
        self.made: dict[int, Tensor] = {}  # made of no tensor at all, such as zeros
        for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
            self.constants[id(tensor)] = Constant(tensor, frozenset([name]))

    def __call__(
        self, call: OwnCall | None, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Note one call."""
        if call is not None:
            self.seen.modules.add(call.module)
        inputs = collect_tensors((args, kwargs))
        constants = [self.constants[id(t)] for t in inputs if id(t) in self.constants]
        name = getattr(function, "__name__", "")
        if not constants:
            if all(id(t) in self.made for t in inputs):
                self.made.update({id(t): t for t in collect_tensors(result)})
        elif call is not None and self._note_product(call, name, args, kwargs):
            pass
        elif all(id(t) in self.constants or id(t) in self.made for t in inputs) and _makes_tensors(name, result):
            self._note_constant(None if name == "__get__" else call, name, constants, result)
        elif name not in _METADATA.split() or collect_tensors(result):
            self.note_reader(constants, _OTHER)

    def _note_product(self, call: OwnCall, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Note a product of a constant with another tensor; whether it is one."""
        found = read_operands(name, args, kwargs)
        if found is None:
            return False
        is_constant = [id(t) in self.constants for t in found.operands]
        product = read_product(name, found, is_constant.index(True)) if sum(is_constant) == 1 else None
        bias = None if found.bias is None else self.constants.get(id(found.bias))
        if product is None or (found.bias is not None and bias is None):
            return False
        weight = self.constants[id(found.operands[is_constant.index(True)])]
        self.seen.products[call].append(SeenProduct(product, weight, bias))
        self.note_reader([weight, *([] if bias is None else [bias])], call)
        return True

    def _note_constant(self, call: OwnCall | None, name: str, constants: Sequence[Constant], result: Any) -> None:
        """Note a call that makes constants of constants."""
        tensors = collect_tensors(result)
        calls = frozenset().union(*(c.calls for c in constants))
        if name != "__get__":  # reading a property costs nothing, and zeros have properties too
            calls |= {call}
        if call is not None:
            self.seen.shapes[call].add(tuple(result.shape) if isinstance(result, Tensor) else (-1,))
        parameters = frozenset().union(*(c.parameters for c in constants))
        for tensor in tensors:
            if id(tensor) not in self.constants:
                self.constants[id(tensor)] = Constant(tensor, parameters, calls)

    def note_reader(self, constants: Sequence[Constant], reader: OwnCall) -> None:
        """Note that a call, or something that is no product, reads what depends on these parameters."""
        for constant in constants:
            for name in constant.parameters:
                self.seen.readers[name].add(reader)


def _makes_tensors(name: str, result: Any) -> bool:
    """Whether a call makes new tensors, and writes into none."""
    in_place = name.endswith("_") and not name.endswith("__")
    return bool(collect_tensors(result)) and not in_place and name != "__setitem__"


def route_products(model: nn.Module, example: Example) -> nn.Module:
    """A copy of `model` with plain layers for the products of its modules' own code; else the model itself.

    The outputs in evaluation are equal. Where they are not, code reads the weights in a way that cannot be observed,
    and the model stays as it is; so does one that does not run on the example.
    """
    model = unwrap_model(model)
    routes, values = _find(model, example)
    if not routes:
        return model
    routed = apply_routes(copy.deepcopy(model), routes, values)
    try:
        same = all(map(_are_close, _outputs_of(model, example), _outputs_of(routed, example)))
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, JpqError):
        same = False
    return routed if same else model


def _outputs_of(model: nn.Module, example: Example) -> list[Tensor]:
    """The output tensors of a model in evaluation."""
    with _unchanged(model), torch.no_grad():
        model.eval()
        return collect_tensors(call_model(model, example))


def _are_close(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs are equal but for rounding, relative to the largest value."""
    if a.shape != b.shape or a.numel() == 0 or not a.is_floating_point():
        return a.shape == b.shape
    finite = a.isfinite() & b.isfinite()
    differences = (a - b)[finite].abs()
    largest = max(float(a[finite].abs().max()) if finite.any() else 0.0, 1e-6)
    return bool((a.isfinite() == b.isfinite()).all()) and bool((differences <= SAME_OUTPUT * largest).all())


def find_routes(model: nn.Module, example: Example) -> tuple[LayerRoute, ...]:
    """The products in modules' own code that plain layers can compute, as plain data for `apply_routes`.

    Args:
        model: run in evaluation and in training mode on the example, and left as it was.
        example: what its forward takes: a tensor, a tuple, or a dict of keywords.

    Left out are products whose weight other code reads as well, such as tied weights, and modules that make other
    products in training than in evaluation. None is found where the model does not run on the example.
    """
    return _find(unwrap_model(model), example)[0]


def _find(model: nn.Module, example: Example) -> tuple[tuple[LayerRoute, ...], dict[tuple[str, str], Tensors]]:
    """The routes, and (module, child) -> weight and bias of the layers."""
    evaluation, training = Observations(), Observations()
    with _unchanged(model), torch.no_grad():
        try:
            model.eval()
            _observe(model, example, evaluation)
        except Exception:  # whoever reads the model next says what is wrong with it or the example
            return (), {}
        for module in model.modules():
            module.training = not type(module).__module__.startswith("torch.nn.")
        with suppress(Exception):  # in training it may need targets
            _observe(model, example, training)
    return _make_routes(model, _choose(model, evaluation, training), evaluation)


def _observe(model: nn.Module, example: Example, seen: Observations) -> None:
    """Note the calls of one forward pass."""
    observer = Observer(model, seen)
    with observe_calls(model, observer):
        output = call_model(model, example)
    returned = [observer.constants[id(t)] for t in collect_tensors(output) if id(t) in observer.constants]
    observer.note_reader(returned, _OTHER)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """A context after which modes, buffers, attributes and the state of random numbers are as before."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
    with torch.random.fork_rng(sorted(devices)), restore_attributes(model):
        yield
    for module, mode in modes.items():
        module.training = mode
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)


def _choose(model: nn.Module, evaluation: Observations, training: Observations) -> list[OwnCall]:
    """The products that become layers: those whose parameters nothing else reads, neither in training."""
    owners = _single_owners(model)
    chosen = [call for call in evaluation.products if _can_route(model, owners, call, evaluation, training)]
    readers = {
        name: evaluation.readers[name] | training.readers[name] for name in {*evaluation.readers, *training.readers}
    }
    while True:
        kept = [call for call in chosen if all(readers[p] <= set(chosen) for p in _parameters(evaluation, call))]
        kept = [call for call in kept if not _conflicts(model, call, kept, evaluation)]
        if len(kept) == len(chosen):
            return kept
        chosen = kept


def _parameters(seen: Observations, call: OwnCall) -> frozenset[str]:
    """The parameters of a product."""
    first = seen.products[call][0]
    return first.weight.parameters | (first.bias.parameters if first.bias is not None else frozenset())


def _single_owners(model: nn.Module) -> dict[str, str]:
    """Parameter or buffer -> the path of its module, where no other module has it, and this one under one name."""
    places: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                places[id(tensor)].append(f"{path}.{name}".lstrip("."))
    return {names[0]: names[0].rpartition(".")[0] for names in places.values() if len(names) == 1}


def _can_route(
    model: nn.Module, owners: Mapping[str, str], call: OwnCall, evaluation: Observations, training: Observations
) -> bool:
    """Whether a module can be given a layer for this product: it owns and computes the weight, the same in training."""
    module = model.get_submodule(call.module)
    if type(module).__module__.startswith("torch.nn.") or "forward" in vars(module):
        return False
    first, *others = evaluation.products[call]
    others += training.products.get(call, [])
    if call.module in training.modules and call not in training.products:
        return False
    if not all(_is_same(first, other) for other in others) or not _fits(first):
        return False
    constants = [first.weight, *([] if first.bias is None else [first.bias])]
    made_here = all(c is not None and c.module == call.module for constant in constants for c in constant.calls)
    return made_here and all(owners.get(name) == call.module for name in _parameters(evaluation, call))


def _fits(seen: SeenProduct) -> bool:
    """Whether a bias has an entry for each output, and all is floating point."""
    product = seen.product
    if product.bias is not None and product.bias.numel() != _outputs(product):
        return False
    return product.weight.is_floating_point() and product.weight.numel() > 0


def _outputs(product: Product) -> int:
    """The number of output channels of a product."""
    if product.kind.startswith("ConvTranspose"):
        return product.shape[1] * int(product.options["groups"])
    return product.shape[0]


def _is_same(a: SeenProduct, b: SeenProduct) -> bool:
    """Whether two products are calls of one layer: the same arguments and the same weight."""
    same = [(p.kind, p.shape, p.call, p.options, p.bias is None) for p in (a.product, b.product)]
    if same[0] != same[1]:
        return False
    pairs = [(a.product.weight, b.product.weight), (a.product.bias, b.product.bias)]
    return all(x is None or y is None or torch.allclose(x, y) for x, y in pairs)


def _source(model: nn.Module, constant: Constant, tensor: Tensor) -> WeightSource:
    """How a tensor follows from the parameters of its module: as a view of one, or computed."""
    names = tuple(sorted(name.rpartition(".")[2] for name in constant.parameters))
    if len(constant.parameters) > 1:
        return WeightSource(names)
    parameter = _tensor_named(model, next(iter(constant.parameters)))
    same_memory = tensor.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    if not same_memory or tensor.dtype != parameter.dtype or not parameter.is_contiguous():
        return WeightSource(names)
    return WeightSource(
        names, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset() - parameter.storage_offset())
    )


def _tensor_named(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that dotted name."""
    path, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), attribute)
    return tensor


def _sources(model: nn.Module, seen: SeenProduct) -> tuple[WeightSource, WeightSource | None]:
    """Where the weight and the bias of a product come from."""
    product = seen.product
    bias = None if seen.bias is None or product.bias is None else _source(model, seen.bias, product.bias)
    return _source(model, seen.weight, product.weight), bias


def _are_one_layer(model: nn.Module, a: SeenProduct, b: SeenProduct) -> bool:
    """Whether one layer computes both products: the same weight, bias and options."""
    kinds = [(p.kind, p.shape, p.options) for p in (a.product, b.product)]
    if kinds[0] != kinds[1] or _sources(model, a) != _sources(model, b):
        return False
    pairs = [(a.product.weight, b.product.weight), (a.product.bias, b.product.bias)]
    return all(x is None or y is None or torch.equal(x, y) for x, y in pairs)


def _conflicts(model: nn.Module, call: OwnCall, chosen: Sequence[OwnCall], seen: Observations) -> bool:
    """Whether another layer would get a copy of the same weights, which would no longer learn as one."""
    this = seen.products[call][0]
    learned = {name for name, _ in model.named_parameters()} & _parameters(seen, call)
    for other in (other for other in chosen if other.module == call.module and other != call):
        shared = learned & _parameters(seen, other)
        if not shared or _are_one_layer(model, this, seen.products[other][0]):
            continue
        sources = [s for product in (this, seen.products[other][0]) for s in _sources(model, product) if s is not None]
        if any(_overlap(_tensor_named(model, name), name.rpartition(".")[2], sources) for name in shared):
            return True
    return False


def _overlap(parameter: Tensor, name: str, sources: Sequence[WeightSource]) -> bool:
    """Whether two of the sources read the same element of a parameter, or one computes something from it."""
    readers = [source for source in sources if name in source.parameters]
    if not all(source.size for source in readers):
        return True
    count = torch.zeros(parameter.numel(), dtype=torch.int8)
    for source in readers:
        part = torch.zeros_like(count)
        part.as_strided(source.size, source.stride, source.offset).fill_(1)
        count += part
    return bool((count > 1).any())


def _make_routes(
    model: nn.Module, chosen: Sequence[OwnCall], seen: Observations
) -> tuple[tuple[LayerRoute, ...], dict[tuple[str, str], Tensors]]:
    """The routes of the products that were chosen, and the weights of their layers."""
    layers: list[tuple[SeenProduct, dict[OwnCall, RoutedCall]]] = []
    for call in chosen:
        made = seen.products[call][0]
        for first, calls in layers:
            if next(iter(calls)).module == call.module and _are_one_layer(model, first, made):
                calls[call] = made.product.call
                break
        else:
            layers.append((made, {call: made.product.call}))
    routes: list[LayerRoute] = []
    values: dict[tuple[str, str], Tensors] = {}
    for first, calls in layers:
        path = next(iter(calls)).module
        weight, bias = _sources(model, first)
        alone = sum(next(iter(others)).module == path for _, others in layers) == 1
        taken = {route.child for route in routes if route.module == path}
        child = _child_name(model.get_submodule(path), "" if alone else weight.parameters[0], taken)
        product = first.product
        routes.append(
            LayerRoute(
                path,
                child,
                product.kind,
                product.shape,
                weight,
                bias,
                {call.key: routed for call, routed in calls.items()},
                product.options,
                _skipped(seen, first),
            )
        )
        values[path, child] = product.weight.detach().clone(), None if product.bias is None else product.bias.clone()
    return tuple(routes), values


def _skipped(seen: Observations, product: SeenProduct) -> dict[str, tuple[int, ...]]:
    """The own calls that only make the weight or bias of a product, with the shapes of their results."""
    skipped = {}
    for call in product.weight.calls | (product.bias.calls if product.bias is not None else frozenset()):
        shapes = seen.shapes[call] if call is not None else set()
        if call is not None and len(shapes) == 1 and (-1,) not in shapes:
            skipped[call.key] = next(iter(shapes))
    return dict(sorted(skipped.items()))


def _child_name(module: nn.Module, parameter: str, taken: set[str]) -> str:
    """A name for a new layer of the module: `layer`, or after its parameter where there are several."""
    name = base = f"{parameter}_layer" if parameter else "layer"
    number = 1
    while hasattr(module, name) or name in taken:
        name = f"{base}_{number}"
        number += 1
    return name
