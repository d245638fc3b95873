"""Kernel patterns: each kernel keeps the positions of one pattern from a library.

X. Ma et al., "PCONV", AAAI 2020, arXiv:1909.05073 (the four crosses); W. Niu et al., "PatDNN", ASPLOS 2020,
arXiv:2001.00138 (libraries made from the weights); Y. Gong et al., arXiv:2003.06513 (ADMM on them).

| paper | here | shape |
|---|---|---|
| library {P_p} | `patterns`: the kept positions of each | n tuples |
| P* = argmax norm(K * P) | the largest unit of a row of `pool(weight ** 2)` | [kernels, n] |
| connectivity: kernels dropped whole | a row of zeros, or `Kernels` on top | |

The best patterns first, then connectivity on the remaining norms, give the nearest point of both together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import prod

import torch
from torch import Size, Tensor

from jpq.methods.structures.base import Structure
from jpq.methods.structures.layout import PLAIN, WeightLayout, check_has_kernel
from jpq.types import JpqError, Units, Weight

CROSSES = ((1, 3, 4, 5), (1, 3, 4, 7), (1, 4, 5, 7), (3, 4, 5, 7))  # the centre and three of its four neighbours

MOST = 512  # largest number of patterns in a library, and of positions in a kernel


@dataclass(frozen=True)
class KernelPattern(Structure):
    """Structure of kernel patterns: a row per kernel and a unit per pattern; a mask combines a row's patterns.

    Units overlap, so this is no partition: a decision keeps one unit of a row, or none, and then the kernel is gone.
    Soft rows that sum to at most 1 give masks in [0, 1]; a row of ones does not mean dense.
    """

    partition = False

    patterns: tuple[tuple[int, ...], ...] = CROSSES  # kept positions, row-major in the kernel
    kernel: tuple[int, ...] = (3, 3)
    layout: WeightLayout = PLAIN

    def __post_init__(self) -> None:
        taps = prod(self.kernel)
        sound = [p and len(set(p)) == len(p) and all(0 <= i < taps for i in p) for p in self.patterns]
        if not sound or not all(sound) or len({frozenset(p) for p in self.patterns}) < len(self.patterns):
            raise JpqError(f"A library of patterns needs different sets of positions 0 to {taps - 1}, none empty.")
        if taps > MOST or len(self.patterns) > MOST:
            raise JpqError(f"A library holds at most {MOST} patterns, of kernels with at most {MOST} positions.")

    @cached_property
    def library(self) -> Tensor:
        """Masks of all patterns, `[n, taps]` of 0 and 1."""
        masks = torch.zeros(len(self.patterns), prod(self.kernel))
        for row, positions in zip(masks, self.patterns, strict=True):
            row[list(positions)] = 1
        return masks

    def shape(self, weight: Size) -> tuple[int, int]:
        """Rows for kernels, units for patterns. Raises JpqError for kernels of another size."""
        groups, outputs, inputs, _ = self.layout.sides(weight)
        check_has_kernel(weight, "Kernel patterns", "per-output or block:AxB")
        if tuple(weight[2:]) != self.kernel:
            raise JpqError(
                f"These patterns are for kernels of {' x '.join(map(str, self.kernel))}, and those of a weight "
                f"{tuple(weight)} are of {' x '.join(map(str, weight[2:]))}. Leave this layer dense, or use "
                "punched:AxB or block:AxB."
            )
        return groups * outputs * inputs, len(self.patterns)

    def expand(self, z: Units, weight: Size) -> Weight:
        """Combination of the patterns, weighed by z."""
        return self.layout.close((z @ self.library.to(z)).reshape(self.layout.sides(weight)), weight)

    def pool(self, x: Weight) -> Units:
        """Sum of each kernel over the positions of each pattern, `[kernels, n]`."""
        return self.layout.open(x).reshape(-1, prod(self.kernel)) @ self.library.to(x).T

    def quota(self) -> int | None:
        """One pattern of each kernel."""
        return 1

    def spec(self) -> str:
        """Text `pattern` for the four crosses, else `pattern:3x3:1.3.4.5/...` with the whole library."""
        if self.patterns == CROSSES and self.kernel == (3, 3):
            return "pattern"
        return f"pattern:{'x'.join(map(str, self.kernel))}:{'/'.join('.'.join(map(str, p)) for p in self.patterns)}"

    @classmethod
    def centred(cls, k: int, layout: WeightLayout = PLAIN) -> KernelPattern:
        """Library of every pattern of k positions of a 3 x 3 kernel that holds the centre (56 for k = 4)."""
        if not 1 <= k <= 8:
            raise JpqError(f"A pattern of a 3 x 3 kernel keeps 1 to 8 positions, not {k}.")
        surroundings = combinations((0, 1, 2, 3, 5, 6, 7, 8), k - 1)
        return cls(tuple(tuple(sorted((4, *rest))) for rest in surroundings), layout=layout)

    @classmethod
    def frequent(cls, weights: Sequence[Weight], k: int = 4, n: int = 8, layout: WeightLayout = PLAIN) -> KernelPattern:
        """Library of the n commonest best patterns of the 3 x 3 kernels in `weights`, each with the centre.

        Fewer than n where fewer occur; equally common ones in order of their positions.
        """
        full = cls.centred(k, layout)
        kernels = torch.cat(
            [w.detach().double().reshape(-1, 9) for w in weights if tuple(w.shape[2:]) == (3, 3)]
            or [torch.zeros(0, 9, dtype=torch.float64)]
        )
        if not len(kernels) or n < 1:
            raise JpqError("A library made from weights needs at least one 3 x 3 kernel and one pattern.")
        best = (kernels.square() @ full.library.double().T.to(kernels.device)).argmax(1)
        counts = torch.bincount(best, minlength=len(full.patterns))
        order = counts.argsort(descending=True, stable=True)[:n]
        return cls(tuple(full.patterns[i] for i in order.tolist() if counts[i]), layout=layout)

    @classmethod
    def read(cls, text: str, layout: WeightLayout = PLAIN) -> KernelPattern:
        """Structure from the text behind `pattern:`: nothing, a number of positions, or the library of `spec`."""
        if not text:
            return cls(layout=layout)
        if re.fullmatch(r"\d", text):
            return cls.centred(int(text), layout)
        if not re.fullmatch(r"\d{1,3}(x\d{1,3}){0,2}:\d{1,4}([./]\d{1,4})*", text):
            raise JpqError(
                f"Cannot read 'pattern:{text}': write pattern, pattern:4, or pattern:3x3:1.3.4.5/1.3.4.7 (the "
                "positions that each pattern keeps)."
            )
        kernel, _, patterns = text.partition(":")
        kept = tuple(tuple(int(i) for i in p.split(".")) for p in patterns.split("/"))
        return cls(kept, tuple(int(k) for k in kernel.split("x")), layout)
