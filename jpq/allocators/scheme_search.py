"""Which structure each layer's mask has, by policy gradient over (scheme, block size) of every layer.

Y. Gong et al., arXiv:2111.11581, after R. J. Williams, "Simple Statistical Gradient-Following Algorithms", Machine
Learning 1992.

| symbol | here | value |
|---|---|---|
| theta_l: logits over the choices of layer l | `Found.logits` | from 0 |
| R = accuracy - mu max(0, ms / limit - 1) | `reward` | mu 1 |
| R_bar <- .9 R_bar + .1 R | the baseline; the first is R itself | |
| theta_l += lr (R - R_bar) / s * grad log pi_l(choice) | | lr .1, 200 samples |

We differ: the paper has a recurrent controller, these logits know nothing of each other. The advantage is divided by s,
the root of its own running mean square, since rewards of real tasks lie within a few points. A mapping to start from
(the rules') is judged first, and the likeliest choices at the end: the best of all that was judged is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from jpq.types import JpqError

SAMPLES, LR, MU = 200, 0.1, 1.0
SLOW = 0.9  # of the baseline's moving average


@dataclass(frozen=True)
class Found:
    """What a search ended with."""

    mapping: Mapping[str, str]
    reward: float
    accuracy: float  # as the proxy says, in [0, 1]
    ms: float
    logits: Mapping[str, Tensor]  # layer -> one for each of its choices
    judged: int  # different mappings


def reward(accuracy: float, ms: float, limit_ms: float, mu: float = MU) -> float:
    """R of the table: accuracy, less what it is slower than the limit."""
    return accuracy - mu * max(0.0, ms / limit_ms - 1)


def search(
    ms: Mapping[str, Mapping[str, float]],
    accuracy: Callable[[Mapping[str, str]], float],
    limit_ms: float,
    *,
    start: Mapping[str, str] | None = None,
    samples: int = SAMPLES,
    lr: float = LR,
    mu: float = MU,
    seed: int = 0,
) -> Found:
    """The mapping of the best reward among the samples.

    Args:
        ms: layer -> its choices -> milliseconds.
        accuracy: mapping -> held-out accuracy in [0, 1]; asked once for each mapping.
        limit_ms: above it the whole network is penalised.
        start: a mapping that is judged before the samples.
        samples, lr, mu, seed: see above.

    Raises JpqError where a layer has no choice, or a number makes no sense.
    """
    if not samples >= 1 or not lr >= 0 or not mu >= 0 or not limit_ms > 0:
        asked = f"samples {samples}, lr {lr}, mu {mu}, limit {limit_ms} ms"
        raise JpqError(f"A search needs samples >= 1, lr >= 0, mu >= 0 and a limit above 0 ms, not {asked}.")
    if not ms or not all(ms.values()):
        raise JpqError("A search over schemes needs at least one choice for every layer.")
    draw = torch.Generator().manual_seed(seed)
    names = {layer: tuple(choices) for layer, choices in ms.items()}
    logits = {layer: torch.zeros(len(choices), dtype=torch.float64) for layer, choices in names.items()}
    known: dict[tuple[str, ...], tuple[float, float, float]] = {}  # mapping -> reward, accuracy, ms

    def judge(mapping: Mapping[str, str]) -> float:
        key = tuple(mapping[layer] for layer in names)
        if key not in known:
            total = sum(ms[layer][mapping[layer]] for layer in names)
            right = accuracy(mapping)
            known[key] = reward(right, total, limit_ms, mu), right, total
        return known[key][0]

    if start is not None:
        judge(start)
    mean, square = None, 0.0
    for t in range(1, samples + 1):
        picked = {x: int(torch.multinomial(theta.softmax(0), 1, generator=draw)) for x, theta in logits.items()}
        got = judge({layer: names[layer][i] for layer, i in picked.items()})
        mean = got if mean is None else SLOW * mean + (1 - SLOW) * got
        advantage = got - mean
        square = SLOW * square + (1 - SLOW) * advantage**2
        spread = (square / (1 - SLOW**t)) ** 0.5
        if spread > 0:
            for layer, i in picked.items():
                step = -logits[layer].softmax(0)
                step[i] += 1  # the gradient of log pi
                logits[layer] += lr * advantage / spread * step
    judge({layer: names[layer][int(theta.argmax())] for layer, theta in logits.items()})
    key, (best, right, total) = max(known.items(), key=lambda entry: entry[1][0])
    return Found(dict(zip(names, key, strict=True)), best, right, total, logits, len(known))
