"""Lookahead (LAP): what a filter weighs in the product with the layers before and after it.

S. Park, J. Lee, S. Mo, J. Shin, "Lookahead: A Far-Sighted Alternative of Magnitude-based Pruning", ICLR 2020,
arXiv:2002.04809. For one weight of layer i between output k and input j, with a the scale of the norm behind a layer:

    S[k, j] = W_i[k, j]^2 * A[j] * B[k]      A[j] = a_{i-1}[j]^2 * ||W_{i-1}[j, :]||^2
                                             B[k] = a_i[k]^2 * ||W_{i+1}[:, k]||^2

sqrt(S) is the Frobenius change of W_{i+1} W_i W_{i-1} when that weight goes. A unit scores the sum over its filter, and
over the filters of all layers that make it.

| paper | here | |
|---|---|---|
| W_i[k, :]^2, the same times A, B | `Chain.own`, `.reached`, `.after` | [links, n] |
| LAP | `Lookahead` | all sites on the weights as they stand |
| LAP-forward, LAP-backward | `Forward`, `Backward` | site by site, what earlier ones lose counts as gone |
| LFP (following layer only), LBP (layer before only) | `Next`, `Previous` | |

We differ: whole filters instead of single weights; neighbours come from the real graph (`network/chains.py`). Squares
are summed in double precision.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from jpq.methods.scores.base import Chain, Evidence, Score, SiteView
from jpq.types import JpqError, Units


def _chain(site: SiteView, evidence: Evidence) -> Chain:
    if evidence.chain is None:
        raise JpqError(f"Lookahead scores need the layers on both sides of '{site.name}': give them its chain.")
    return evidence.chain


class Lookahead(Score):
    """Sum of S over the unit's filters."""

    needs: ClassVar[frozenset[str]] = frozenset({"chain"})

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """`[1, n]`."""
        chain = _chain(site, evidence)
        return (chain.reached * chain.after).sum(0)[None]


class Forward(Lookahead):
    """The same from the input on: A is of what is left of the layer before."""

    order: ClassVar[Literal["together", "forward", "backward"]] = "forward"


class Backward(Lookahead):
    """The same from the output on: B is of what is left of the layer behind."""

    order: ClassVar[Literal["together", "forward", "backward"]] = "backward"


class Next(Score):
    """LFP: B alone."""

    needs: ClassVar[frozenset[str]] = frozenset({"chain"})

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """`[1, n]`: exactly the squared Frobenius change of W_{i+1} W_i when a unit of linear layers goes."""
        chain = _chain(site, evidence)
        return (chain.own * chain.after).sum(0)[None]


class Previous(Score):
    """LBP: A alone."""

    needs: ClassVar[frozenset[str]] = frozenset({"chain"})

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """`[1, n]`."""
        return _chain(site, evidence).reached.sum(0)[None]
