"""Data, models, and the task that says how good a model is."""

from jpq.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, {})
