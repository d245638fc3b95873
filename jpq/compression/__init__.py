"""The model under compression: gates and quantizers on its layers, costs, discretization."""

from jpq.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, {})
