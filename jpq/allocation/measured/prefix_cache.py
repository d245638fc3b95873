"""Passes that begin behind a module whose output is known: only the part behind a change runs again.

A cut is a module on whose output alone everything behind it depends, as between the blocks of a chain. Whether it is
one is tried, not guessed: what runs before it answers NaN, the module itself what it answered before, and the network's
output must be the same to the bit. Models without cuts, or whose outputs there need too much memory, run whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jpq.tracing.forward import batch_size, call_model, collect_tensors

MOST_CUTS = 64  # modules that are tried, those with the fewest dots in their names first
MOST_BYTES = 2**30  # of outputs that are kept at a cut


@dataclass(frozen=True)
class Cut:
    """A module behind which a pass can begin."""

    name: str
    end: int  # place of the end of its call among all calls
    skipped: Mapping[str, tuple[int, ...]]  # module before it -> shape of its output without the batch


@dataclass
class Calls:
    """The order of the calls of a pass: place of the first start and of the last end, and the form of the output."""

    starts: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...] | None] = field(default_factory=dict)  # None: not one tensor of real numbers
    place: int = 0

    def before(self, name: str) -> None:
        """Note the start of a call."""
        self.place += 1
        self.starts.setdefault(name, self.place)

    def after(self, name: str, output: Any, samples: int) -> None:
        """Note the end of a call."""
        self.place += 1
        self.ends[name] = self.place
        self.counts[name] = self.counts.get(name, 0) + 1
        fits = isinstance(output, Tensor) and output.is_floating_point() and output.shape[:1] == (samples,)
        self.shapes[name] = tuple(output.shape[1:]) if fits else None


class _ReachedError(Exception):
    """The output of a cut has been computed, and the rest of the pass is not needed."""


@torch.no_grad()
def record_calls(model: nn.Module, names: Sequence[str], x: Any) -> Calls:
    """The calls of these modules in one pass."""
    calls = Calls()
    with ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(lambda m, a, n=name: calls.before(n)).remove)
            hook = module.register_forward_hook(lambda m, a, out, n=name: calls.after(n, out, batch_size(x)))
            stack.callback(hook.remove)
        call_model(model, x)
    return calls


@torch.no_grad()
def find_cuts(model: nn.Module, layers: Sequence[str], x: Any) -> tuple[list[Cut], Calls]:
    """The cuts of a model in the order of their calls, and the calls themselves.

    Args:
        model: in evaluation mode.
        layers: modules that are not looked into.
        x: a few samples, a batch.
    """
    inner = tuple(f"{name}." for name in layers)
    names = [name for name, _ in model.named_modules() if name and not name.startswith(inner)]
    reference = collect_tensors(call_model(model, x))
    calls = record_calls(model, names, x)
    once = [name for name in names if calls.counts.get(name) == 1 and calls.shapes[name] is not None]
    candidates = sorted(once, key=lambda name: (name.count("."), calls.ends[name]))[:MOST_CUTS]
    found = []
    for name in sorted(candidates, key=calls.ends.__getitem__):
        cut = _cut_at(name, calls)
        if cut is not None and _holds(model, cut, x, reference):
            found.append(cut)
    return found, calls


def _cut_at(name: str, calls: Calls) -> Cut | None:
    """The cut behind a module; None where something before it cannot be left out."""
    start = calls.starts[name]
    before = [n for n in calls.ends if calls.ends[n] < start]
    outermost = [n for n in before if not any(n.startswith(f"{other}.") for other in before)]
    skipped = {n: calls.shapes[n] for n in outermost}
    if any(shape is None for shape in skipped.values()):
        return None
    return Cut(name, calls.ends[name], {n: shape for n, shape in skipped.items() if shape is not None})


def _holds(model: nn.Module, cut: Cut, x: Any, reference: Sequence[Tensor]) -> bool:
    """Whether the network's output depends on nothing before the cut but on the output of its module."""
    known = output_at(model, cut, x)
    try:
        with answering(model, cut) as feed:
            feed(known)
            outputs = collect_tensors(call_model(model, x))
    except Exception:  # the model's own code may not stand NaN: then there is no cut
        return False
    return len(outputs) == len(reference) and all(map(torch.equal, outputs, reference))


@torch.no_grad()
def output_at(model: nn.Module, cut: Cut, x: Any) -> Tensor:
    """The output of a cut's module; the pass ends there."""
    kept: list[Tensor] = []

    def stop(module: nn.Module, args: Any, output: Tensor) -> None:
        kept.append(output)
        raise _ReachedError

    handle = model.get_submodule(cut.name).register_forward_hook(stop)
    try:
        call_model(model, x)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return kept[0]


@contextmanager
def answering(model: nn.Module, cut: Cut | None) -> Iterator[Any]:
    """A context in which passes begin behind a cut (None: at the input).

    It gives a function that takes the output of the cut's module for the next pass.
    """
    present: list[Tensor] = []

    def feed(output: Tensor) -> None:
        present[:] = [output]

    def skip(shape: tuple[int, ...]) -> Tensor:
        known = present[0]
        return torch.full((1,) * (len(shape) + 1), torch.nan, device=known.device).expand(len(known), *shape)

    if cut is None:
        yield feed
        return
    with ExitStack() as stack:
        for name, shape in cut.skipped.items():
            stack.enter_context(_replaced(model.get_submodule(name), lambda *a, s=shape, **k: skip(s)))
        stack.enter_context(_replaced(model.get_submodule(cut.name), lambda *a, **k: present[0]))
        yield feed


@contextmanager
def _replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    """A context in which a module computes something else."""
    own = vars(module).get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
