"""Calling a model with any kind of inputs: arguments, forward hooks, evaluation mode, tensors of an example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import SUPPORTED_NODES, register_dataclass, tree_leaves, tree_map

Example = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]

CallObserver = Callable[[str, Any, Any, Any], None]  # (module's name, module, its first input, its output)


def split_arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split an example (a tensor, a tuple or list, or a dict of keywords) into (positional, keyword) arguments."""
    register_dataclasses(example)
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}


def call_model(model: Callable[..., Any], example: Any) -> Any:
    """The model's output for a tensor, a tuple of positional arguments, or a dict of keywords, which stay unchanged."""
    return call_on_copies(model, *split_arguments(example))


def call_on_copies(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The model's output for these arguments, which stay unchanged, though some models write into their input."""
    return model(*copy_tensors(args), **copy_tensors(kwargs))


def copy_tensors(example: Any) -> Any:
    """A nest of inputs with copies of its tensors."""
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, example)


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
def note_missing_batch_dims(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """A context that notes the layers, each with a weight, that read a tensor without a batch dim, and that tensor.

    It is one sample of an example without a batch, or a vector of parameters.
    """
    found: dict[str, Tensor] = {}

    def look(name: str, layer: Any, x: Tensor | None, _: Any) -> None:
        if x is not None and x.dim() < layer.weight.dim():
            found[name] = x

    with hook_modules(layers, look, before=True):
        yield found


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """A context in which the model is in evaluation mode; afterwards each of its modules is in its former mode.

    Some modules stay in evaluation mode while the others train: BatchNorm whose statistics are kept.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        restore_modes(model, modes)


def restore_modes(model: nn.Module, modes: Mapping[nn.Module, bool]) -> None:
    """Put the modules of a model into these modes (True: training), those that are new into that of the model."""
    model.train(modes[model])  # by the model's own method, which may do more than set the mode
    for module, training in modes.items():
        if module.training != training:
            module.training = training


def collect_tensors(value: Any) -> list[Tensor]:
    """The tensors in any nest of tuples, lists, dicts, dataclasses and registered classes, in order.

    Caches of past keys and values, as decoders of Hugging Face return them, are no results: they are left out.
    """
    return [leaf for leaf in tree_leaves(as_plain_nest(value)) if isinstance(leaf, Tensor)]


def as_plain_nest(value: Any) -> Any:
    """A model's output as torch.export takes it: dataclasses become dicts; objects that it does not know become None.

    What is already such a nest is returned as it is.
    """
    if isinstance(value, Tensor) or value is None:
        return value
    if _is_cache(value):
        return None
    if isinstance(value, Mapping):
        entries = {key: as_plain_nest(entry) for key, entry in value.items()}
        same = all(entries[key] is entry for key, entry in value.items())
        return value if same and type(value) in SUPPORTED_NODES else entries
    if isinstance(value, (tuple, list)):
        items = [as_plain_nest(item) for item in value]
        same = all(a is b for a, b in zip(items, value, strict=True))
        return value if same else tuple(items) if isinstance(value, tuple) else items
    if type(value) in SUPPORTED_NODES or isinstance(value, (bool, int, float, complex, str)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_plain_nest(getattr(value, f.name)) for f in fields(value) if hasattr(value, f.name)}
    return None


def _is_cache(value: Any) -> bool:
    """Whether a value is a decoder's cache of past keys and values."""
    bases = type(value).__mro__
    return any(base.__module__.startswith("transformers.") and base.__name__.endswith("Cache") for base in bases)


@contextmanager
def plain_outputs(model: nn.Module) -> Iterator[None]:
    """A context in which the model returns what `as_plain_nest` makes of its output."""

    def replace(_: nn.Module, __: Any, output: Any) -> Any:
        plain = as_plain_nest(output)
        return () if plain is None else plain  # torch takes None for "leave the output as it is"

    handle = model.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def register_dataclasses(value: Any) -> None:
    """Let torch look for tensors inside the dataclasses of an example, as torch.export.register_dataclass does."""
    if isinstance(value, Mapping):
        for entry in value.values():
            register_dataclasses(entry)
    elif isinstance(value, (tuple, list)):
        for item in value:
            register_dataclasses(item)
    elif is_dataclass(value) and not isinstance(value, type) and type(value) not in SUPPORTED_NODES:
        names = [f.name for f in fields(value)]
        given = [f.name for f in fields(value) if f.init]
        register_dataclass(type(value), field_names=given, drop_field_names=[n for n in names if n not in given])
        for name in given:
            register_dataclasses(getattr(value, name))


def batch_size(example: Any) -> int:
    """Samples in an example: the first size of its first tensor that has one, else 1."""
    return next((max(int(t.shape[0]), 1) for t in collect_tensors(example) if t.dim() > 0), 1)


def batch_dim(tensor: Tensor, size: int) -> int | None:
    """The dim of an input or output that lies along a batch of that size; None where there is none.

    It is the first, or the second of three: states of recurrent layers are [layers, batch, units].
    """
    dims = [d for d in (0, *([1] if tensor.dim() == 3 else [])) if tensor.dim() and tensor.shape[d] == size]
    return dims[0] if dims else None


def take_samples(example: Any, first: int, last: int) -> Any:
    """The samples `first` to `last` - 1 of an example; a tensor without a dim along the batch stays as it is."""
    return pick_samples(example, range(first, min(last, batch_size(example))))


def pick_samples(example: Any, numbers: Sequence[int]) -> Any:
    """The samples of these numbers of an example, in any nest of tensors; they begin anew behind the last one.

    A tensor without a dim along the batch (`batch_dim`) stays as it is.
    """
    register_dataclasses(example)
    size = batch_size(example)

    def pick(v: Any) -> Any:
        dim = batch_dim(v, size) if isinstance(v, Tensor) else None
        if dim is None:
            return v
        return v.index_select(dim, torch.tensor(numbers, dtype=torch.long, device=v.device) % size)

    return tree_map(pick, example)


def first_samples(example: Any, count: int) -> Any:
    """An example's first `count` samples, in any nest of tensors; they are repeated where it has fewer."""
    return pick_samples(example, range(count))


def split_samples(example: Any, size: int) -> tuple[Any, ...]:
    """An example in parts of at most `size` samples."""
    return tuple(take_samples(example, i, i + size) for i in range(0, batch_size(example), size))


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
