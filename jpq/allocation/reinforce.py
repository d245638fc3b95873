"""RL-Pruner: a distribution over the layers from which units are removed, learned by trial and reward.

Source: B. Wang, V. Kindratenko, "RL-Pruner: Structured Pruning Using Reinforcement Learning for CNN Compression and
Acceleration", arXiv:2411.06463, and its final code. In each step `rate` of all units is removed,
spread by a noisy draw a of the distribution p; copies of the network are tried, the best draw pulls p towards it:

    a  = project(p + v * xi * eps)            eps ~ N(0, I), xi ~ U(0, 1), one number for each draw
    k  = round(a * n), corrected by largest remainders to sum to n; no layer falls below one unit
    Q  = accuracy + alpha * (1 - cost / full cost)
    p' = p + lambda * (a_best - p);  r = clip(p' / p, 1 - delta, 1 + delta);  p = project(p * r)

with project(x) = x clamped at 1e-5, 0 for layers that have one unit left, divided by its sum.

We differ. The network is not fine-tuned between steps: an allocation is decided before training begins, so that all
allocators train equally long; instead the tried copies measure BatchNorm's statistics anew, without which accuracy says
little after the first steps. The reward is measured on held-out images, never on the test split (the public code reads
the test loader), and `v` is the standard deviation of the noise, as in the code and not as its comment says. Layers
that an add couples are one entry, so they lose the same units. A step that costs more than `fall` of the accuracy
(relative) is tried again from the initial distribution, at most three times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FLOOR = 1e-5  # smallest probability of a layer that can still lose units

RETRIES = 3  # attempts at a step that loses too much accuracy, after the first

Vector = npt.NDArray[np.float64]

Counts = npt.NDArray[np.int64]  # units of each layer

Quality = Callable[[Counts], tuple[float, float]]  # units removed -> (accuracy, share of the full cost that is left)

AllocationDraw = tuple[float, float, Counts]  # (reward, accuracy, units that are removed)


@dataclass(frozen=True)
class Policy:
    """Hyper-parameters of RL-Pruner; the defaults are the authors', but for larger steps with fewer draws.

    The authors remove 0.01 of the units in a step, with 10 updates of 10 draws. Every draw is a measurement, and theirs
    take twenty times as many; with ours the distribution stays nearer to the uniform one.
    """

    rate: float = 0.05  # share of all units that is removed in one step
    epochs: int = 5  # updates of the distribution in one step
    samples: int = 5  # draws between two updates
    noise: float = 0.04  # v: standard deviation of the noise on the distribution
    pull: float = 0.1  # lambda: step towards the best draw
    clip: float = 0.25  # delta: largest relative change of a probability in one update
    explore: float = 0.4  # chance of taking a random draw rather than the best, falling to 0 over the first tenth
    alpha: float = 0.25  # weight of the saved cost in the reward
    fall: float = 0.1  # relative loss of accuracy that makes a step be tried again


def project(p: Vector, left: Counts) -> Vector:
    """Project onto distributions over layers that can still lose a unit (more than one is left)."""
    p = np.where(left > 1, np.maximum(p, FLOOR), 0.0)
    return p / p.sum()


def spread_units(a: Vector, n: int, left: Counts) -> Counts:
    """Spread n units over layers by `a`, rounded by largest remainders so that they sum to n.

    No layer falls below one unit; units that it cannot give come from others by the same order. The sum is below n only
    where no more units are left.
    """
    most = np.maximum(left - 1, 0)
    real_counts = a * n
    k = np.minimum(np.round(real_counts).astype(np.int64), most)
    while k.sum() != n:
        short = k.sum() < n
        free = np.flatnonzero(k < most) if short else np.flatnonzero(k > 0)
        if not len(free):
            break
        rest = (real_counts - k)[free]
        order = free[np.argsort(-rest if short else rest, kind="stable")]
        change = order[: abs(n - int(k.sum()))]
        k[change] += 1 if short else -1
    return k


def pull_distribution(p: Vector, best: Vector, policy: Policy, left: Counts) -> Vector:
    """Pull the distribution towards the best draw, clipped by `policy.clip`."""
    moved = np.maximum(p + policy.pull * (best - p), FLOOR)
    ratio = np.clip(np.divide(moved, p, out=np.ones_like(p), where=p > 0), 1 - policy.clip, 1 + policy.clip)
    return project(p * ratio, left)


def learn_allocation(
    units: Sequence[int],
    quality: Quality,
    is_enough: Callable[[Counts], bool],
    policy: Policy,
    seed: int = 0,
) -> list[Counts]:
    """Learn from which layers units are removed: the removed units of each layer after each step.

    Steps end when the removed units are enough, or when no layer can lose another unit.

    Args:
        units: units of each layer at the start.
        quality: (accuracy, share of the full cost that is left) once these units are removed.
        is_enough: whether no more units need to be removed.
        seed: seeds all random draws.
    """
    rng = np.random.default_rng(seed % 2**32)
    full = np.array(units, np.int64)
    initial = full / full.sum()
    removed, p = np.zeros_like(full), initial.copy()
    path: list[Counts] = []
    step = max(1, int(policy.rate * full.sum()))
    steps = math.ceil((full - 1).sum() / step)
    accuracy = quality(removed)[0]
    while not is_enough(removed) and (full - removed > 1).any():
        for retry in range(RETRIES + 1):
            p = project(initial if retry else p, full - removed)
            p, draws = try_draws(p, removed, full, step, quality, policy, rng)
            chance = policy.explore * _cosine(len(path) / max(1, steps // 10))
            index = int(rng.integers(len(draws))) if rng.random() < chance else 0
            _, new_accuracy, choice = draws[index]
            if new_accuracy >= (1 - policy.fall) * accuracy:
                break
        removed, accuracy = removed + choice, new_accuracy
        path.append(removed)
    return path


def try_draws(
    p: Vector,
    removed: Counts,
    full: Counts,
    step: int,
    quality: Quality,
    policy: Policy,
    rng: np.random.Generator,
) -> tuple[Vector, list[AllocationDraw]]:
    """Try noisy draws of one step: (the distribution after its updates, the draws of the best rewards, best first).

    Args:
        p: the distribution over layers before the step.
        removed, full: units of each layer that are gone already, and at the start.
        step: units that this step removes.
    """
    left = full - removed
    known: dict[tuple[int, ...], tuple[float, float]] = {}
    draws: list[AllocationDraw] = []
    best_reward = -math.inf
    for _ in range(policy.epochs):
        leader: tuple[float, Vector] | None = None
        for _ in range(policy.samples):
            eps = rng.standard_normal(len(full))
            a = project(p + policy.noise * rng.random() * eps, left)
            k = spread_units(a, step, left)
            if tuple(k) not in known:
                known[tuple(k)] = quality(removed + k)
            accuracy, cost_share = known[tuple(k)]
            reward = accuracy + policy.alpha * (1 - cost_share)
            draws.append((reward, accuracy, k))
            if leader is None or reward > leader[0]:
                leader = reward, a
        assert leader is not None
        if leader[0] > best_reward:
            best_reward = leader[0]
            p = pull_distribution(p, leader[1], policy, left)
    draws.sort(key=lambda draw: -draw[0])
    return p, draws[: policy.samples]


def _cosine(progress: float) -> float:
    """Cosine decay: 1 at 0, 0 from 1 on."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
