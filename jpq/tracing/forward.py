"""jpq.tracing.forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Example = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]

Heard = Callable[[str, Any, Any, Any], None]  # (name of the module, module, what it reads first, what it gives)


def arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, keyword) arguments: a tensor is the only one, a tuple or list all of them, a dict goes by name."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}


def call_model(model: Callable[..., Any], example: Any) -> Any:
    """What a model gives for a tensor, a tuple of positional arguments, or a dict of keywords."""
    args, kwargs = arguments(example)
    return model(*args, **kwargs)


@contextmanager
def hook_modules(modules: Mapping[str, nn.Module], note: Heard, before: bool = False) -> Iterator[None]:
    """`note` each call of the modules; before a call (`before`) there is nothing given yet (None).

    What a module reads first is None where it is not a tensor.
    """

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any = None) -> None:
            x = args[0] if args else kwargs.get("input")
            note(name, module, x if isinstance(x, Tensor) else None, out)

        return look

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
    """The model in evaluation mode; afterwards as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in any nest of tuples, lists, dicts, named tuples and registered classes, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def batch_of(example: Any) -> int:
    """Samples in an example: the first size of its first tensor that has one."""
    return next((max(int(t.shape[0]), 1) for t in tensors(example) if t.dim() > 0), 1)


def named_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names that `forward` gives them. Raises TypeError where it cannot take them."""
    plain = {**{f"input_{i}": v for i, v in enumerate(args)}, **kwargs}
    try:
        signature = inspect.signature(model.forward)
    except ValueError:  # code without a signature
        return plain
    bound = signature.bind(*args, **kwargs).arguments
    kinds = {signature.parameters[name].kind for name in bound}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return plain
    return {
        name: bound[name] for name in [*(n for n in bound if n not in kwargs), *kwargs]
    }  # in the order of its leaves
