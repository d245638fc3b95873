"""The command line: one file per command."""

from jpq.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, {})
