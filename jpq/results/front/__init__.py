"""Several runs as one Pareto front."""

from jpq.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, {})
