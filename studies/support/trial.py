"""Short compression runs on the built-in digits, observed step by step, and the rules by which a claim holds."""

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
from jpq.tasks import CLASSIFICATION, Batches, Data, build_model, load_data

EIGHT_BITS = {"bops": "6.3%", "w_bits": (8, 8), "a_bits": (8, 8)}  # only pruning is decided, and no budget presses
FLOAT_EPOCHS = 8
SEEDS = (0, 1, 2)
SEARCH_STEPS, TUNE_STEPS = 300, 60


@dataclass(frozen=True)
class OptimizerRecipe:
    """A constructor of an optimizer and its learning rate."""

    build: Callable[..., torch.optim.Optimizer]
    lr: float


ADAM = OptimizerRecipe(torch.optim.Adam, 2e-3)
SGD = OptimizerRecipe(partial(torch.optim.SGD, momentum=0.9, nesterov=True), 0.02)


@dataclass(frozen=True)
class Measurement:
    """The text of what was measured, whether the claim holds, and the number of runs, rows or layers behind it."""

    measured: str
    holds: str
    n: int


def verdict(holds: bool, partly: bool = False) -> str:
    """The word of claims.csv for a claim that holds, holds partly, or does not hold."""
    return "yes" if holds else "partly" if partly else "no"


def compare_by_seed(values: Sequence[float], baseline: Sequence[float]) -> str:
    """Whether values are larger with every seed ("yes"), or only on the mean ("partly")."""
    pairs = list(zip(values, baseline, strict=True))
    return verdict(all(a > b for a, b in pairs), mean(values) > mean(baseline))


def join_numbers(values: Sequence[float], form: str = ".2f") -> str:
    """Numbers beside each other, one per seed."""
    return ", ".join(format(v, form) for v in values)


@cache
def digits() -> Data:
    """1,797 images of 8 x 8 pixels in three splits."""
    return load_data("digits", batch_size=64)


@cache
def float_model(seed: int) -> nn.Module:
    """A convnet, trained on the digits."""
    torch.manual_seed(seed)
    model = build_model("convnet", 10, 1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for epoch in range(FLOAT_EPOCHS):
        for x, y in digits().train.epoch(1000 * seed + epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def register_variant(method: str, gate: type[Gate]) -> str:
    """Add a method that differs from a published one in its gate; its name."""
    name = f"{method} with {gate.__name__}"
    jpq.METHODS[name] = replace(jpq.METHODS[method], gate=gate)
    return name


def start_compression(method: str, seed: int, steps: int, **settings: object) -> jpq.CompressionSession:
    """The trained convnet under compression, with a search of so many steps; further settings go to `compress`."""
    model = float_model(seed)  # before the seed: it draws when it is not yet cached
    x, _ = next(iter(digits().train.epoch(0)))
    torch.manual_seed(seed)
    return jpq.compress(model, x, method=method, steps=steps, **settings)


def repeat_epochs(part: Batches, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch after another, without end."""
    for epoch in count(1000 * seed):
        yield from part.epoch(epoch)


def ignore() -> None:
    """Observe nothing after a step."""


def train(
    session: jpq.CompressionSession,
    seed: int,
    steps: int,
    observe: Callable[[], object] = ignore,
    recipe: OptimizerRecipe = ADAM,
) -> jpq.CompressionSession:
    """The session after so many optimizer steps; `observe` is called after each."""
    whole = digits().train
    weights, decisions = whole.halves() if session.net.bilevel else (whole, whole)
    batches = {
        "both": repeat_epochs(whole, seed),
        "weights": repeat_epochs(weights, seed),
        "decisions": repeat_epochs(decisions, seed),
    }
    optimizer = recipe.build(session.groups(lr=recipe.lr))
    session.train()
    for _ in range(steps):
        x, y = next(batches[session.turn])
        optimizer.zero_grad()
        (F.cross_entropy(session(x), y) + session.pressure()).backward()
        optimizer.step()
        session.step()
        observe()
    return session


def accuracy_percent(model: nn.Module) -> float:
    """Per cent of the test images that are right."""
    return 100 * CLASSIFICATION.evaluate(model, digits().test)


def accuracy_after_tuning(
    session: jpq.CompressionSession, seed: int, steps: int, recipe: OptimizerRecipe = ADAM
) -> float:
    """Test accuracy (per cent) after discretization and so many steps of the weights at half the learning rate."""
    session.discretize()
    return accuracy_percent(train(session, seed + 500, steps, recipe=replace(recipe, lr=recipe.lr / 2)))
