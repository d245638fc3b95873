"""The files of a run, written and read back; several runs as one front."""

from jpq.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, {})
