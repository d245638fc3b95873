"""Calling a model with any kind of inputs: arguments, forward hooks, evaluation mode, tensors of an example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Example = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]

CallObserver = Callable[[str, Any, Any, Any], None]  # (module's name, module, its first input, its output)


def split_arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split an example (a tensor, a tuple or list, or a dict of keywords) into (positional, keyword) arguments."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}


def call_model(model: Callable[..., Any], example: Any) -> Any:
    """The model's output for a tensor, a tuple of positional arguments, or a dict of keywords."""
    args, kwargs = split_arguments(example)
    return model(*args, **kwargs)


@contextmanager
def hook_modules(modules: Mapping[str, nn.Module], observer: CallObserver, before: bool = False) -> Iterator[None]:
    """A context in which `observer` sees each call of the modules, after the call or `before` it (output None).

    The first input is None where it is not a tensor.
    """

    def hook(name: str) -> Callable[..., None]:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
            x = args[0] if args else kwargs.get("input")
            observer(name, module, x if isinstance(x, Tensor) else None, output)

        return observe

    handles = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        if before
        else module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """A context in which the model is in evaluation mode; afterwards it is in its former mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def collect_tensors(value: Any) -> list[Tensor]:
    """The tensors in any nest of tuples, lists, dicts, named tuples and registered classes, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def batch_size(example: Any) -> int:
    """Samples in an example: the first size of its first tensor that has one, else 1."""
    return next((max(int(t.shape[0]), 1) for t in collect_tensors(example) if t.dim() > 0), 1)


def name_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names that `forward` gives them. Raises TypeError where it cannot take them."""
    numbered = {**{f"input_{i}": value for i, value in enumerate(args)}, **kwargs}
    try:
        signature = inspect.signature(model.forward)
    except ValueError:  # code without a signature
        return numbered
    bound = signature.bind(*args, **kwargs).arguments
    kinds = {signature.parameters[name].kind for name in bound}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return numbered
    order = [*(name for name in bound if name not in kwargs), *kwargs]  # the order of the example's leaves
    return {name: bound[name] for name in order}
