"""Which units are removed first: scores of all layers as one order."""

from jpq.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, {})
