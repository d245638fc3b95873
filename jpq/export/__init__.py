"""The small model and its files: rebuild, verify, write formats, measure times."""

from jpq.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, {})
