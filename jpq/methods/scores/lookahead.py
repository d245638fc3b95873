"""Lookahead scores (LAP): the weight of a filter in the product with the layers before and after it.

S. Park, J. Lee, S. Mo, J. Shin, "Lookahead: A Far-Sighted Alternative of Magnitude-based Pruning", ICLR 2020,
arXiv:2002.04809. For one weight of layer i between output k and input j, with a the scale of the norm behind a layer:

    S[k, j] = W_i[k, j]^2 * A[j] * B[k]      A[j] = a_{i-1}[j]^2 * ||W_{i-1}[j, :]||^2
                                             B[k] = a_i[k]^2 * ||W_{i+1}[:, k]||^2

sqrt(S) is the Frobenius change of W_{i+1} W_i W_{i-1} when that weight goes. A unit scores the sum over its filter, and
over the filters of all layers that make it.

| paper | here | |
|---|---|---|
| W_i[k, :]^2, the same times A, B | `Chain.filter_norms`, `.producer_norms`, `.consumer_norms` | [links, n] |
| LAP | `Lookahead` | all sites on the weights as they stand |
| LAP-forward, LAP-backward | `Forward`, `Backward` | site by site, on what the sites before leave |
| LFP (following layer only), LBP (layer before only) | `Next`, `Previous` | |

We differ: whole filters instead of single weights; neighbours come from the traced graph
(`allocation/ranking/neighbour_norms.py`). Squares are summed in double precision. The paper's variants with activations
or curvature, cuts in sub-steps, and one cut over all layers are left out.
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
    """LAP: sum of S over the unit's filters."""

    needs: ClassVar[frozenset[str]] = frozenset({"chain"})

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """Sum of S, `[1, n]`."""
        chain = _chain(site, evidence)
        return (chain.producer_norms * chain.consumer_norms).sum(0)[None]


class Forward(Lookahead):
    """LAP-forward: sites from the input on, with A of what is left of the layer before."""

    order: ClassVar[Literal["together", "forward", "backward"]] = "forward"


class Backward(Lookahead):
    """LAP-backward: sites from the output on, with B of what is left of the layer behind."""

    order: ClassVar[Literal["together", "forward", "backward"]] = "backward"


class Next(Score):
    """LFP: the factor B of the following layer alone."""

    needs: ClassVar[frozenset[str]] = frozenset({"chain"})

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """Squared Frobenius change of W_{i+1} W_i when a unit of linear layers is removed, `[1, n]`."""
        chain = _chain(site, evidence)
        return (chain.filter_norms * chain.consumer_norms).sum(0)[None]


class Previous(Score):
    """LBP: the factor A of the layer before alone."""

    needs: ClassVar[frozenset[str]] = frozenset({"chain"})

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """Sum over the unit's filters, `[1, n]`."""
        return _chain(site, evidence).producer_norms.sum(0)[None]
