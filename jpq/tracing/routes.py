"""Routes: products in a module's own code, computed by plain layers that become its children.

The weight goes from the module into the layer, in the layer's layout, and the call becomes `child(input)`. The code of
the module stays: calls that only made the weight are skipped, and attributes that went away can still be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from jpq.plan import LayerRoute, RoutedCall, WeightSource
from jpq.tracing.own_calls import Action, provide_attributes, replace_calls
from jpq.tracing.products import call_layer, read_operands
from jpq.types import JpqError

_ROUTES = "_jpq_routes"  # attribute of a module: its routes

_LINEAR = "Linear"
_KINDS = (_LINEAR, *(f"Conv{d}d" for d in (1, 2, 3)), *(f"ConvTranspose{d}d" for d in (1, 2, 3)))

LARGEST_WEIGHT = 2**30  # largest number of weights of a layer whose weight is computed

Tensors = tuple[Tensor, Tensor | None]  # a layer's weight and bias


@dataclass(frozen=True)
class CallLayer:
    """The product is computed by a child."""

    child: str
    name: str  # of the function
    call: RoutedCall
    options: Mapping[str, Any] = field(default_factory=dict)  # of the convolution

    def run(self, module: nn.Module, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The child's output. Raises JpqError where the code now asks for another product than the layer computes."""
        found = read_operands(self.name, args, kwargs)
        if found is None or {k: found.options.get(k) for k in self.options} != dict(self.options):
            raise JpqError(
                f"{type(module).__name__} was read with {self.name}({_option_text(self.options)}) and now calls it "
                f"with ({_option_text(found.options) if found else ''}). Read it with an example of the size that it "
                "is used with, and in the same mode."
            )
        return call_layer(getattr(module, self.child), found.operands[self.call.operand], self.call)


@dataclass(frozen=True)
class SkipCall:
    """A call that only makes the weight of a child gives zeros of the right shape instead."""

    child: str
    shape: tuple[int, ...]

    def run(self, module: nn.Module, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Zeros, which hold no memory."""
        return _zeros(module, self.child, self.shape)


@dataclass(frozen=True)
class MovedParameter:
    """A parameter that went into a child: its values there, or zeros where the child's weight is another tensor."""

    child: str
    shape: tuple[int, ...]
    tensor: str = ""  # of the child: "weight", "bias"; empty: zeros
    transposed: bool = False

    def read(self, module: nn.Module) -> Tensor:
        """The parameter in the layout that the module's code knows."""
        if not self.tensor:
            return _zeros(module, self.child, self.shape)
        value: Tensor = getattr(getattr(module, self.child), self.tensor)
        return value.t() if self.transposed else value


def _zeros(module: nn.Module, child: str, shape: tuple[int, ...]) -> Tensor:
    """Zeros of a shape, one number in memory, like the weights of a child."""
    layer = getattr(module, child)
    like = next((t for t in [*layer.parameters(), *layer.buffers()] if t.is_floating_point()), torch.empty(()))
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(shape)


def _option_text(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())


def applied_routes(model: nn.Module) -> tuple[LayerRoute, ...]:
    """The routes that a model was given, by the present paths of its modules."""
    return tuple(
        replace(route, module=name) for name, module in model.named_modules() for route in vars(module).get(_ROUTES, ())
    )


@torch.no_grad()
def apply_routes(
    model: nn.Module, routes: Iterable[LayerRoute], values: Mapping[tuple[str, str], Tensors] | None = None
) -> nn.Module:
    """Give modules of `model`, in place, the layers that compute products of their own code; returns the model.

    Args:
        model: of the classes and shapes in which the routes were found (`find_routes`); routes that it has already are
            passed over.
        routes: the layers.
        values: (module, child) -> weight and bias of the layers. Without, parameters are taken over; a weight that
            code computes from parameters is not known then: load weights afterwards.

    Raises JpqError where the model does not have what a route names.
    """
    present = {(route.module, route.child) for route in applied_routes(model)}
    by_module: dict[str, list[LayerRoute]] = {}
    for route in routes:
        if (route.module, route.child) not in present:
            by_module.setdefault(route.module, []).append(route)
    for path, members in by_module.items():
        try:
            module = model.get_submodule(path)
            _route_module(module, members, values or {})
        except (AttributeError, RuntimeError, ValueError, TypeError, LookupError) as error:
            reason = " ".join(str(error).split())[:160]
            raise JpqError(
                f"The plan turns products of '{path}' into layers, and the model does not fit ({reason}): "
                "is it the same model?"
            ) from error
    return model


def _route_module(module: nn.Module, routes: Sequence[LayerRoute], values: Mapping[tuple[str, str], Tensors]) -> None:
    """Apply the routes of one module."""
    actions: dict[str, Action] = {}
    tensors = {**dict(module.named_buffers(recurse=False)), **dict(module.named_parameters(recurse=False))}
    moved: dict[str, MovedParameter] = {}
    layers = {}
    for route in routes:
        if not route.child.isidentifier() or hasattr(module, route.child):
            raise ValueError(f"it has '{route.child}' already")
        layers[route.child] = _build_layer(route, tensors, values.get((route.module, route.child)))
        sources = {"weight": route.weight, "bias": route.bias}
        for tensor, source in ((t, s) for t, s in sources.items() if s is not None):
            moved |= {name: _moved(route, tensor, source, tensors[name]) for name in source.parameters}
        for key, shape in route.skipped.items():
            actions[key] = SkipCall(route.child, shape)
        for key, call in route.calls.items():
            actions[key] = CallLayer(route.child, key.partition(":")[0], call, route.options)
    for name in moved:
        delattr(module, name)
    for name, layer in layers.items():
        module.add_module(name, layer)
    replace_calls(module, actions)
    provide_attributes(module, moved)
    vars(module)[_ROUTES] = (*vars(module).get(_ROUTES, ()), *routes)


def _moved(route: LayerRoute, tensor: str, source: WeightSource, parameter: Tensor) -> MovedParameter:
    """How the module's code reads a parameter that went into a layer."""
    shape = tuple(parameter.shape)
    layer_shape = route.shape if tensor == "weight" else _bias_shape(route)
    strides = tuple(parameter.stride())
    whole = source.offset == 0 and prod(source.size) == parameter.numel() and bool(source.size)
    if whole and source.size == shape == layer_shape and source.stride == strides:
        return MovedParameter(route.child, shape, tensor)
    if whole and len(shape) == 2 and source.size == shape[::-1] == layer_shape and source.stride == strides[::-1]:
        return MovedParameter(route.child, shape, tensor, transposed=True)
    return MovedParameter(route.child, shape)


def _build_layer(route: LayerRoute, tensors: Mapping[str, Tensor], values: Tensors | None) -> nn.Module:
    """The plain layer of a route, with its weights."""
    weight = _tensor(route.weight, tensors, route.shape, values and values[0])
    bias = None
    if route.bias is not None:
        bias = _tensor(route.bias, tensors, _bias_shape(route), values and values[1])
    if route.kind not in _KINDS:
        raise ValueError(f"no layer is called {route.kind[:40]}")
    kind: Any = getattr(nn, route.kind)
    if route.kind == _LINEAR:
        layer = kind(route.shape[1], route.shape[0], bias is not None, device="meta")
    else:
        channels = {"in_channels": _in_channels(route), "out_channels": _bias_shape(route)[0]}
        layer = kind(**channels, kernel_size=route.shape[2:], bias=bias is not None, device="meta", **route.options)
    if tuple(layer.weight.shape) != route.shape:
        raise ValueError(f"a weight of {list(route.shape)} is none of a {route.kind}")
    layer.weight = nn.Parameter(weight, _learns(route.weight, tensors))
    layer.bias = None if bias is None else nn.Parameter(bias, route.bias is not None and _learns(route.bias, tensors))
    return layer


def _bias_shape(route: LayerRoute) -> tuple[int, ...]:
    """The shape of a layer's bias: its number of outputs."""
    groups = route.options.get("groups", 1)
    return (route.shape[1] * groups,) if route.kind.startswith("ConvTranspose") else (route.shape[0],)


def _in_channels(route: LayerRoute) -> int:
    """The input channels of a convolution."""
    return route.shape[0] if route.kind.startswith("ConvTranspose") else route.shape[1] * route.options["groups"]


def _learns(source: WeightSource, tensors: Mapping[str, Tensor]) -> bool:
    """Whether one of the parameters learns."""
    return any(tensors[name].requires_grad for name in source.parameters)


def _tensor(
    source: WeightSource, tensors: Mapping[str, Tensor], shape: tuple[int, ...], value: Tensor | None
) -> Tensor:
    """A tensor of a layer: the value that is known, a view of a parameter, or zeros where it is computed."""
    first = tensors[source.parameters[0]]
    if any(name not in tensors for name in source.parameters):
        raise KeyError(f"{source.parameters} are not among its parameters")
    if value is not None:
        return value.detach().reshape(shape).clone()
    if len(source.parameters) == 1 and source.size:
        if not first.is_contiguous():
            first = first.contiguous()
        largest = source.offset + sum((n - 1) * step for n, step in zip(source.size, source.stride, strict=True)) + 1
        if min(source.size) < 1 or largest > first.numel():
            raise ValueError(f"{list(source.size)} is no view of {list(first.shape)}")
        whole = first.detach().flatten()
        return whole.as_strided(source.size, source.stride, source.offset).reshape(shape).clone()
    if prod(shape) > LARGEST_WEIGHT:
        raise ValueError(f"a weight of {list(shape)}")
    return torch.zeros(shape, dtype=first.dtype, device=first.device)
