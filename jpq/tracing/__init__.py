"""A model read into layers, channel labels and pruning groups."""

from jpq.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, {})
