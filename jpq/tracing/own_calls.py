"""A module's own torch calls: recognised, numbered, and replaced by something else at run time.

A call of a torch function belongs to the module whose `forward` makes it, itself, in a helper function or in a method
of another module, but not in a child's forward. Calls of one forward are numbered by the function's name: "reshape:1"
is the second `reshape`. Calls in forwards of children do not count, so replacing children leaves the numbers as they
are, and so does every other call.

    with annotate_own_calls(model):              # nodes of the ATen graph know their call
        program = torch.export.export(model, args)
    call_of_node(node)                           # OwnCall("encoder.3", "reshape:1")

    replace_calls(model.encoder[3], {"reshape:1": ReplaceArguments({(3,): 128})})

`replace_calls` swaps the module's class for a subclass of it whose forward runs the same code and looks up each own
call in a table of actions. Such a module can be copied, pickled and exported; torch.compile runs it uncompiled.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.fx import Node
from torch.overrides import TorchFunctionMode

_MODULE_FILE = nn.Module.__call__.__code__.co_filename  # of `_call_impl`, which ends the frames of one forward
_CHECKPOINT = ("torch/utils/checkpoint.py", "torch\\utils\\checkpoint.py")
_ANNOTATION = "jpq_own_call"
_TABLE = "_own_call_actions"  # attribute: key of a call -> action
_PROVIDED = "_provided_attributes"  # attribute: name of another attribute -> what is read for it


class OwnCall(NamedTuple):
    """A module's own call of a torch function."""

    module: str  # dotted path
    key: str  # the function's name and the number of the call among those of that name, as in "reshape:1"


CallObserver = Callable[[OwnCall | None, Any, tuple[Any, ...], dict[str, Any], Any], None]
"""Told of each call: whose own it is (None: no module's), the function, its arguments and its result."""


class Action(Protocol):
    """What is done in place of a module's own call."""

    def run(self, module: nn.Module, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of the call in `module`, instead of `function(*args, **kwargs)`."""


@dataclass(frozen=True)
class ReplaceArguments:
    """The same call with other values of some arguments.

    The path of an argument begins with its position or keyword; more indices lead into lists and tuples: (2,) is the
    third argument, (1, 0) the first entry of the second, ("dim",) a keyword.
    """

    values: Mapping[tuple[int | str, ...], Any]

    def run(self, module: nn.Module, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call with the replaced arguments."""
        for (first, *rest), value in self.values.items():
            if isinstance(first, str):
                kwargs = {**kwargs, first: _replaced(kwargs[first], rest, value)}
            else:
                args = (*args[:first], _replaced(args[first], rest, value), *args[first + 1 :])
        return function(*args, **kwargs)


def _replaced(old: Any, path: list[Any], value: Any) -> Any:
    """`old`, a nest of lists and tuples, with `value` at a path of indices; the value itself for an empty path."""
    if not path:
        return value
    items = list(old)
    items[path[0]] = _replaced(items[path[0]], path[1:], value)
    return items if isinstance(old, list) else tuple(items)


class Attribute(Protocol):
    """What is read for an attribute that a module no longer has."""

    def read(self, module: nn.Module) -> Any:
        """The value of the attribute of `module`."""


def replace_calls(module: nn.Module, actions: Mapping[str, Action]) -> None:
    """Perform these actions in place of the module's own calls of those keys, from now on.

    Actions of earlier calls of this function stay, but for those of the same keys. Actions are part of the module:
    they are copied and pickled with it, so they must hold plain data and name children by their names.
    """
    table = {**own_call_actions(module), **actions}
    if not isinstance(module, InterceptedModule):
        kind: Any = type(module)
        module.__class__ = _intercepted_class(kind)
    vars(module)[_TABLE] = table


def provide_attributes(module: nn.Module, attributes: Mapping[str, Attribute]) -> None:
    """Let code read these attributes, which the module no longer has; its calls were replaced (`replace_calls`).

    What is read is no own call of the module, whatever torch functions it takes.
    """
    vars(module)[_PROVIDED] = {**vars(module).get(_PROVIDED, {}), **attributes}


def own_call_actions(module: nn.Module) -> dict[str, Action]:
    """The actions that are performed in place of own calls, by key; empty for an ordinary module."""
    return dict(vars(module).get(_TABLE, {}))


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before `replace_calls`; its own class where nothing was replaced."""
    kind = type(module)
    return kind.__mro__[2] if kind.__mro__[1] is InterceptedModule else kind


class InterceptedModule(nn.Module):
    """The first base of every class that performs actions in place of its own calls."""

    def __getattr__(self, name: str) -> Any:
        """An attribute that is provided (`provide_attributes`), else as in every module."""
        provided = vars(self).get(_PROVIDED, {}).get(name)
        return super().__getattr__(name) if provided is None else provided.read(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as its original class: the class of this object is made anew when it is read."""
        reduced: Any = super().__reduce_ex__(protocol)
        if type(self).__mro__[1] is not InterceptedModule or not isinstance(reduced, tuple):
            return reduced
        return (_new_intercepted, (original_class(self),), *reduced[2:])


def _new_intercepted(base: Any) -> nn.Module:
    """An empty module of the intercepted subclass, whose state is set afterwards."""
    kind = _intercepted_class(base)
    module: nn.Module = kind.__new__(kind)
    return module


@functools.cache
def _intercepted_class(base: Any) -> type[nn.Module]:
    """The subclass of `base` whose forward looks up each of its own calls in the module's table of actions."""

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mode = _Intercept(self, sys._getframe())
        try:
            with mode:
                return base.forward(self, *args, **kwargs)
        finally:
            mode.frame = None  # a frame that refers to itself would keep all activations

    names = {"forward": torch.compiler.disable(forward), "__doc__": base.__doc__}
    names |= {"__module__": base.__module__, "__qualname__": base.__qualname__}
    metaclass: Any = type(base)
    kind: type[nn.Module] = metaclass(base.__name__, (InterceptedModule, base), names)
    return kind


class _Intercept(TorchFunctionMode):
    """Performs the actions of one module during one forward."""

    def __init__(self, module: nn.Module, frame: FrameType):
        super().__init__()
        self.module = module
        self.frame: FrameType | None = frame
        self.actions: Mapping[str, Action] = vars(module)[_TABLE]
        self.counts: Counter[str] = Counter()
        self.key = ""  # of the call that runs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name_of(func)
        if not name or _find_forward(sys._getframe(1)) != (self.module, self.frame):
            return func(*args, **kwargs)
        self.key = _number(self.counts, name)
        action = self.actions.get(self.key)
        return func(*args, **kwargs) if action is None else action.run(self.module, func, args, kwargs)


class _Record(TorchFunctionMode):
    """Tells an observer of every torch call, and annotates the graph nodes that it makes."""

    def __init__(self, model: nn.Module, observer: CallObserver | None, annotate: bool):
        super().__init__()
        self.names = {id(module): name for name, module in model.named_modules()}
        self.observer = observer
        self.annotate = _annotate if annotate else _no_annotation
        self.counts: dict[FrameType, Counter[str]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = self.identify(_name_of(func), sys._getframe(1))
        with nullcontext() if call is None else self.annotate(call):
            result = func(*args, **kwargs)
        if self.observer is not None:
            self.observer(call, func, args, kwargs, result)
        return result

    def identify(self, name: str, frame: FrameType) -> OwnCall | None:
        """Whose own call it is, and its number; None where it is no module's, or a property is read."""
        found = _find_forward(frame) if name else None
        if found is None or id(found[0]) not in self.names:
            return None
        module, forward = found
        mode = forward.f_locals.get("mode")
        if isinstance(mode, _Intercept):  # it counts the calls that never get here, too
            return OwnCall(self.names[id(module)], mode.key)
        if forward not in self.counts:
            running = _frames_from(frame)
            self.counts = {f: counts for f, counts in self.counts.items() if f in running}
            self.counts[forward] = Counter()
        return OwnCall(self.names[id(module)], _number(self.counts[forward], name))


@contextmanager
def observe_calls(model: nn.Module, observer: CallObserver) -> Iterator[None]:
    """A context in which `observer` is told of every torch call, with the module of `model` whose own it is."""
    mode = _Record(model, observer, annotate=False)
    try:
        with mode:
            yield
    finally:
        mode.counts.clear()


@contextmanager
def annotate_own_calls(model: nn.Module) -> Iterator[None]:
    """A context in which nodes that torch.export makes of `model` remember their call, for `call_of_node`.

    Without effect where this version of torch cannot annotate nodes.
    """
    mode = _Record(model, None, annotate=True)
    with ExitStack() as stack:
        if hasattr(torch.fx.traceback, "annotate"):
            stack.enter_context(torch.fx.traceback.preserve_node_meta())
            stack.enter_context(mode)
            stack.callback(mode.counts.clear)
        yield


def call_of_node(node: Node) -> OwnCall | None:
    """The own call that made a node of a graph exported under `annotate_own_calls`; None where it is not known."""
    path, found, key = (node.meta.get("custom") or {}).get(_ANNOTATION, "").rpartition("|")
    return OwnCall(path, key) if found else None


def _annotate(call: OwnCall) -> AbstractContextManager[Any]:
    """A context in which new graph nodes belong to the call."""
    return torch.fx.traceback.annotate({_ANNOTATION: f"{call.module}|{call.key}"})


def _no_annotation(call: OwnCall) -> AbstractContextManager[Any]:
    """A context in which graph nodes are not annotated."""
    return nullcontext()


def _name_of(function: Any) -> str:
    """The name by which calls are numbered; empty for the reading of a property such as `shape`."""
    name = getattr(function, "__name__", "")
    return "" if name in ("__get__", "__set__") else name


def _number(counts: Counter[str], name: str) -> str:
    """The key of the next call of this name."""
    counts[name] += 1
    return f"{name}:{counts[name] - 1}"


def _find_forward(frame: FrameType | None) -> tuple[nn.Module, FrameType] | None:
    """The module whose forward makes the call in `frame`, with the outermost frame of that forward.

    None where no forward does, where a provided attribute is read, and where a part of the forward is checkpointed:
    that part runs again in the backward pass, when nothing is intercepted.
    """
    if not _runs_forward(frame):
        return None
    owner: nn.Module | None = None
    forward: FrameType | None = None
    while frame is not None and frame.f_code.co_filename != _MODULE_FILE:
        if frame.f_code.co_filename.endswith(_CHECKPOINT) or frame.f_code is InterceptedModule.__getattr__.__code__:
            return None
        module = _first_argument(frame)
        if module is not None:
            if owner is not module and forward is not None:
                break
            owner = module
            forward = frame if frame.f_code.co_name == "forward" else forward
        frame = frame.f_back
    return None if owner is None or forward is None else (owner, forward)


def _runs_forward(frame: FrameType | None) -> bool:
    """Whether a function named forward makes the call in `frame`; reads no local variables, which takes long."""
    while frame is not None and frame.f_code.co_filename != _MODULE_FILE:
        if frame.f_code.co_name == "forward":
            return True
        frame = frame.f_back
    return False


def _first_argument(frame: FrameType) -> nn.Module | None:
    """The first argument of the function that a frame runs, where it is a module: the self of a method."""
    code = frame.f_code
    value = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return value if isinstance(value, nn.Module) else None


def _frames_from(frame: FrameType | None) -> set[FrameType]:
    """A frame and all that called it."""
    frames = set()
    while frame is not None:
        frames.add(frame)
        frame = frame.f_back
    return frames
