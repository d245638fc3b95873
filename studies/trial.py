"""Short compression runs on the built-in digits, watched step by step, and the rules by which a claim holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jpq
from jpq.methods.gates import Gate
from jpq.session import CompressionSession
from jpq.tasks.classification import evaluate
from jpq.tasks.data import Batches, Data, load

EIGHT = {"bops": "6.3%", "w_bits": (8, 8), "a_bits": (8, 8)}  # nothing but pruning is decided, and nothing presses
FLOAT_EPOCHS = 8
ADAM, SGD = (torch.optim.Adam, 2e-3), (partial(torch.optim.SGD, momentum=0.9, nesterov=True), 0.02)  # with their rates
SEEDS = (0, 1, 2)
STEPS, TUNE = 300, 60  # of search, of fine-tuning


@dataclass(frozen=True)
class Found:
    """What was measured, whether the claim holds, and the number of runs, rows or layers that it was measured on."""

    measured: str
    holds: str
    n: int


def verdict(yes: bool, partly: bool = False) -> str:
    """What a line of claims.csv says of its claim."""
    return "yes" if yes else "partly" if partly else "no"


def better(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Whether `ours` is larger with every seed ("yes"), or only on the mean ("partly")."""
    pairs = list(zip(ours, theirs, strict=True))
    return verdict(all(a > b for a, b in pairs), mean(ours) > mean(theirs))


def listed(values: Sequence[float], form: str = ".2f") -> str:
    """Numbers beside each other, one per seed."""
    return ", ".join(format(v, form) for v in values)


@cache
def digits() -> Data:
    """1,797 images of 8 x 8 pixels in three splits."""
    return load("digits", batch_size=64)


@cache
def float_model(seed: int) -> nn.Module:
    """A trained convnet."""
    torch.manual_seed(seed)
    model = jpq.tasks.models.build("convnet", 10, 1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for epoch in range(FLOAT_EPOCHS):
        for x, y in digits().train.epoch(1000 * seed + epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def variant(method: str, gate: type[Gate]) -> str:
    """The name of a method that differs from a published one in its gate."""
    name = f"{method} with {gate.__name__}"
    jpq.METHODS[name] = replace(jpq.METHODS[method], gate=gate)
    return name


def started(method: str, seed: int, steps: int, **asked: object) -> CompressionSession:
    """The trained convnet under compression; the search takes `steps`."""
    model = float_model(seed)  # before the seed: it draws when it is not yet cached
    x, _ = next(iter(digits().train.epoch(0)))
    torch.manual_seed(seed)
    return jpq.compress(model, x, method=method, steps=steps, **asked)


def endless(part: Batches, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch after the other."""
    for epoch in count(1000 * seed):
        yield from part.epoch(epoch)


def trained(
    net: CompressionSession, seed: int, steps: int, watch: Callable[[], object] = lambda: None, by: tuple = ADAM
) -> CompressionSession:
    """The network after so many optimiser steps, `watch` called after each."""
    one, other = digits().train.halves() if net.net.bilevel else (digits().train,) * 2
    sides = {"both": endless(digits().train, seed), "weights": endless(one, seed), "decisions": endless(other, seed)}
    make, lr = by
    optimizer = make(net.groups(lr=lr))
    net.train()
    for _ in range(steps):
        x, y = next(sides[net.turn])
        optimizer.zero_grad()
        (F.cross_entropy(net(x), y) + net.pressure()).backward()
        optimizer.step()
        net.step()
        watch()
    return net


def accuracy(net: nn.Module) -> float:
    """Per cent of the test images that are right."""
    return 100 * evaluate(net, digits().test)


def landed(net: CompressionSession, seed: int, steps: int, by: tuple = ADAM) -> float:
    """Accuracy once decisions are taken and the weights had so many steps more, at half the rate."""
    net.discretize()
    return accuracy(trained(net, seed + 500, steps, by=(by[0], by[1] / 2)))
