"""Gates, scores, structures and quantizers of the papers, and the table of methods that combines them."""

from jpq.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, {})
