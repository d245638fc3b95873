"""Unconstrained pruning (UPSCALE): each consumer of a tensor keeps channels of its own."""

from typing import TYPE_CHECKING

from jpq.lazy import lazy_names

if TYPE_CHECKING:
    from jpq.export.unconstrained.channel_blocks import Blocks, find_blocks
    from jpq.export.unconstrained.channel_order import count_copied, order_channels
    from jpq.export.unconstrained.reorder import ChannelLayout, choose_layout, export_unconstrained
    from jpq.export.unconstrained.select import CopyCounts, Select, count_copies, insert_selects

__all__ = [
    "Blocks",
    "ChannelLayout",
    "CopyCounts",
    "Select",
    "choose_layout",
    "count_copied",
    "count_copies",
    "export_unconstrained",
    "find_blocks",
    "insert_selects",
    "order_channels",
]

_HOMES = {
    "Blocks": "channel_blocks",
    "ChannelLayout": "reorder",
    "CopyCounts": "select",
    "Select": "select",
    "choose_layout": "reorder",
    "count_copied": "channel_order",
    "count_copies": "select",
    "export_unconstrained": "reorder",
    "find_blocks": "channel_blocks",
    "insert_selects": "select",
    "order_channels": "channel_order",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
