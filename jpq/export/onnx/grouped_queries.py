"""Attention whose queries share keys and values (grouped-query attention), written out for exporters.

torch's ONNX exporter has no translation of `enable_gqa`, by which several heads of queries read one head of keys and
values (Ainslie et al. 2023, arXiv:2305.13245). Repeating those heads computes the same.
"""

from __future__ import annotations

from typing import Any

from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class RepeatedHeads(TorchFunctionMode):
    """A context in which scaled_dot_product_attention repeats the heads of keys and values instead of sharing them."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """The call itself; of attention with `enable_gqa` the one with repeated heads."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and kwargs.pop("enable_gqa", False):
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            kwargs |= dict(zip(names, args, strict=False))
            times = kwargs["query"].shape[-3] // kwargs["key"].shape[-3]
            for name in ("key", "value"):
                kwargs[name] = kwargs[name].repeat_interleave(times, -3)
            args = ()
        return func(*args, **kwargs)
