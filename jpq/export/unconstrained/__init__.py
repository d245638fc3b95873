"""One kept set of channels per consumer (UPSCALE), exported with few copies."""

from jpq.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, {})
