"""DPP gate (dynamic probabilistic pruning): k of n units of every row, drawn by Gumbel top-k from learned logits.

L. Gonzalez-Carabarin, I. Huijben, B. Veeling, A. Schmid, R. van Sloun, "Dynamic Probabilistic Pruning", IEEE TNNLS
35(1), arXiv:2105.12686.

| paper | here | value or shape |
|---|---|---|
| logits Phi | `logits` | [rows, n] |
| Gumbel noise, factor c | `noise` | 0.1 |
| temperature T(e) = 5 (1 - 0.9 e / (E - 1)) | `temperature` | 5 -> 0.5 over the search |
| A: k-hot forward, sum of the k relaxed draws backward | `relaxed()` | [rows, n] |
| H(softmax(Phi)), weighted by mu | `penalty()` | [rows, n] |

Drawing without replacement in the order of the scores, draw j is a softmax over what is left: with the row sorted and
Z_j = sum_{i >= j} e_i, unit i gets e_i * sum_{j <= min(rank_i, k)} 1 / Z_j in all. That closed form needs two
cumulative log-sum-exps instead of k softmaxes and has their gradient. (The authors' code lists draws by position
instead of score, so that the relaxed sum differs from the mask even at T -> 0; a test checks ours.)

We differ: from a pretrained network the logits start at the standardised log magnitudes of the units, not at N(0, 0.25)
(random rows would first destroy what the network knows; `start="random"` gives the paper's); evaluation takes the top k
without noise, where the authors' code draws there too. The noise is the same in all layers (the code has 0.1 in linear
ones, 0.01 in convolutions). H counts as a mean over units, times the gate weight and the budget's multiplier, instead
of a sum over rows times mu = 5e-5. A row of a convolution is all that one output reads, not the outputs of one tap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from jpq.methods.gates.base import Holds, squared_norms
from jpq.methods.gates.fixed_count import FixedCount
from jpq.methods.structures.base import Structure
from jpq.types import Units, Weight

HOT, COLD = 5.0, 0.5  # temperature when the search begins and ends

TINY = 1e-12


class GumbelTopK(FixedCount):
    """Gate that keeps the k largest logits of each row."""

    needs_weights: ClassVar[bool] = True  # once, for the start
    enforces_quota: ClassVar[Holds] = "always"

    def __init__(self, rows: int, n: int, density: float = 0.5, noise: float = 0.1, start: str = "magnitude"):
        super().__init__(rows, n, density)
        self.logits = nn.Parameter(torch.randn(rows, n) * 0.5)
        self.noise, self.started = noise, start == "random"
        self.temperature: Tensor
        self.register_buffer("temperature", torch.tensor(HOT))

    @torch.no_grad()
    def observe_weights(self, weights: Sequence[tuple[Weight, Structure]]) -> None:
        """Start the logits from the magnitudes of the first weights it sees."""
        if self.started:
            return
        size = (squared_norms(weights) / self.sizes.clamp_min(1) + TINY).log()
        spread = size.std(1, keepdim=True, correction=0).clamp_min(1e-6)
        self.logits.copy_((size - size.mean(1, keepdim=True)) / spread * 0.5)
        self.started = True

    def relaxed(self) -> Units:
        """k-hot draw in each row; its gradient is that of the sum of k softmaxes drawn without replacement."""
        uniform = torch.rand_like(self.logits).clamp(1e-10, 1 - 1e-7)
        scores = self._real(self.logits + self.noise * -(-uniform.log()).log())
        k_hot = self.top(scores, self.density)
        soft = draw_mass(scores / self.temperature, self.count(self.density))
        return k_hot + (soft - soft.detach())

    def keep(self) -> Units:
        """Mask of the k largest logits of each row, without noise."""
        return self.top(self.logits, self.density)

    def penalty(self) -> Units:
        """Entropy terms -p ln p of each unit with p = softmax over its row; their sum is what the paper lowers."""
        log_p = torch.log_softmax(self._real(self.logits), 1)
        return -(log_p.exp() * log_p.clamp_min(-100))

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Lower the temperature."""
        self.temperature.fill_(HOT * (1 - (1 - COLD / HOT) * min(1.0, progress)))

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Confidence (1: each row is certain) and diversity (1: rows keep different units) of the logits, in [0, 1].

        With p_r = softmax(Phi_r) over n units: confidence = 1 - mean_r H(p_r) / ln n and
        diversity = (H(mean_r p_r) - mean_r H(p_r)) / ln n. The paper's own definitions are not public.
        """
        p = torch.softmax(self._real(self.logits).double(), 1)
        most = math.log(max(2, self.n))
        mean = _entropy(p).mean()
        return {"confidence": float(1 - mean / most), "diversity": float((_entropy(p.mean(0)) - mean) / most)}

    def _real(self, scores: Units) -> Units:
        valid = self.valid
        return scores if valid is None else scores.masked_fill(~valid, -1e4)


def _entropy(p: Tensor) -> Tensor:
    """Entropy in nats over the last dim."""
    return -(p * p.clamp_min(1e-300).log()).sum(-1)


def draw_mass(scores: Tensor, k: Tensor) -> Units:
    """Probability mass that k draws without replacement put on each unit, `[rows, n]`; rows sum to k.

    Args:
        scores: `[rows, n]` perturbed logits over the temperature; draw 1 is the largest, and so on.
        k: `[rows]` number of draws.
    """
    ordered, index = scores.sort(1, descending=True)
    left = torch.logcumsumexp(ordered.flip(1), 1).flip(1)  # ln Z_j
    draws = torch.logcumsumexp(-left, 1)  # ln sum_{j <= r} 1 / Z_j
    last = (k.to(scores.device) - 1)[:, None]
    rank = torch.arange(scores.shape[1], device=scores.device)[None].expand_as(scores)
    mass = (ordered + draws.gather(1, rank.minimum(last))).exp()
    return torch.zeros_like(scores).scatter(1, index, mass)
