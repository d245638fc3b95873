"""How much stays where, in channels, bits and mask structures."""

from jpq.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, {})
