"""A distribution over layers, learned by trying: from where the next units go.

Source: B. Wang, V. Kindratenko, "RL-Pruner: Structured Pruning Using Reinforcement Learning for CNN Compression and
Acceleration", arXiv:2411.06463, and its final code. In each step `rate` of all units go, spread by a noisy draw a of
the distribution p; copies of the network are tried, the best draw pulls p towards it:

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

FLOOR = 1e-5  # least probability of a layer that can still lose units

RETRIES = 3  # of a step that loses too much accuracy

Vector = npt.NDArray[np.float64]

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Policy:
    """The numbers of the method; the defaults are the sheet's for small budgets, with larger steps."""

    rate: float = 0.05  # share of all units that go in one step
    epochs: int = 5  # updates of the distribution in one step
    samples: int = 5  # draws between two updates
    noise: float = 0.04  # v
    pull: float = 0.1  # lambda
    clip: float = 0.25  # delta
    explore: float = 0.4  # chance of taking a random draw rather than the best, falling to 0 over the first tenth
    alpha: float = 0.25  # weight of the saved cost in the reward
    fall: float = 0.1  # relative loss of accuracy that makes a step be tried again


def project(p: Vector, left: Counts) -> Vector:
    """A distribution over layers that can still lose a unit (`left` counts more than one)."""
    p = np.where(left > 1, np.maximum(p, FLOOR), 0.0)
    return p / p.sum()


def counts(a: Vector, n: int, left: Counts) -> Counts:
    """n units spread by `a`, whole: the largest remainders first where units are missing, the smallest where over.

    No layer falls below one unit: what it cannot give is passed on in the same order. Fewer than n only where no more
    are left.
    """
    most = np.maximum(left - 1, 0)
    wanted = a * n
    k = np.minimum(np.round(wanted).astype(np.int64), most)
    while k.sum() != n:
        short = k.sum() < n
        free = np.flatnonzero(k < most) if short else np.flatnonzero(k > 0)
        if not len(free):
            break
        rest = (wanted - k)[free]
        order = free[np.argsort(-rest if short else rest, kind="stable")]
        change = order[: abs(n - int(k.sum()))]
        k[change] += 1 if short else -1
    return k


def update(p: Vector, best: Vector, policy: Policy, left: Counts) -> Vector:
    """The distribution after one pull towards the best draw."""
    moved = np.maximum(p + policy.pull * (best - p), FLOOR)
    ratio = np.clip(np.divide(moved, p, out=np.ones_like(p), where=p > 0), 1 - policy.clip, 1 + policy.clip)
    return project(p * ratio, left)


def learn(
    units: Sequence[int],
    quality: Callable[[Counts], tuple[float, float]],
    enough: Callable[[Counts], bool],
    policy: Policy,
    seed: int = 0,
) -> list[Counts]:
    """Units gone from each layer after each step, until that is enough or nothing more can go.

    Args:
        units: of each layer at the start.
        quality: (accuracy, share of the cost that stays) with so many units gone.
        enough: whether no more need to go.
        seed: of every draw.
    """
    rng = np.random.default_rng(seed % 2**32)
    full = np.array(units, np.int64)
    initial = full / full.sum()
    gone, p = np.zeros_like(full), initial.copy()
    path: list[Counts] = []
    step = max(1, int(policy.rate * full.sum()))
    steps = math.ceil((full - 1).sum() / step)
    before = quality(gone)[0]
    while not enough(gone) and (full - gone > 1).any():
        for retry in range(RETRIES + 1):
            p = project(initial if retry else p, full - gone)
            p, tried = _try(p, gone, full, step, quality, policy, rng)
            chance = policy.explore * _cosine(len(path) / max(1, steps // 10))
            taken = int(rng.integers(len(tried))) if rng.random() < chance else 0
            _, after, choice = tried[taken]
            if after >= (1 - policy.fall) * before:
                break
        gone, before = gone + choice, after
        path.append(gone)
    return path


def _try(
    p: Vector,
    gone: Counts,
    full: Counts,
    step: int,
    quality: Callable[[Counts], tuple[float, float]],
    policy: Policy,
    rng: np.random.Generator,
) -> tuple[Vector, list[tuple[float, float, Counts]]]:
    """(the distribution, the best draws as (reward, accuracy, units that go), best first) after one step's trials."""
    left = full - gone
    known: dict[tuple[int, ...], tuple[float, float]] = {}
    kept: list[tuple[float, float, Counts]] = []
    best = -math.inf
    for _ in range(policy.epochs):
        leader: tuple[float, Vector] | None = None
        for _ in range(policy.samples):
            eps = rng.standard_normal(len(full))
            a = project(p + policy.noise * rng.random() * eps, left)
            k = counts(a, step, left)
            if tuple(k) not in known:
                known[tuple(k)] = quality(gone + k)
            accuracy, share = known[tuple(k)]
            reward = accuracy + policy.alpha * (1 - share)
            kept.append((reward, accuracy, k))
            if leader is None or reward > leader[0]:
                leader = reward, a
        assert leader is not None
        if leader[0] > best:
            best = leader[0]
            p = update(p, leader[1], policy, left)
    kept.sort(key=lambda entry: -entry[0])
    return p, kept[: policy.samples]


def _cosine(at: float) -> float:
    """1 at 0, 0 from 1 on."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, at)))
