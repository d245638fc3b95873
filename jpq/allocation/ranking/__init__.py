"""Rankings of units: evidence for scores, scores of all layers as one order, pruning on a schedule."""

from jpq.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, {})
