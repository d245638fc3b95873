"""Reading a model: its layers, the classes of its channels, and its pruning groups (sites)."""

from typing import TYPE_CHECKING

from jpq.lazy import lazy_names

if TYPE_CHECKING:
    from jpq.tracing.channel_shares import ChannelShares
    from jpq.tracing.coverage import FrozenChannels, frozen_channels, halved_share, prunable_share
    from jpq.tracing.forward import call_model, collect_tensors
    from jpq.tracing.network import Layer, LayerKind, Network
    from jpq.tracing.op_call import OpCall, TraceState, rule
    from jpq.tracing.pad_channels import PadChannels
    from jpq.tracing.shrink import freeze_unshrinkable, remove_channels
    from jpq.tracing.sites import Site, Tap, channels, channels_per_consumer, masks

__all__ = [
    "ChannelShares",
    "FrozenChannels",
    "Layer",
    "LayerKind",
    "Network",
    "OpCall",
    "PadChannels",
    "Site",
    "Tap",
    "TraceState",
    "call_model",
    "channels",
    "channels_per_consumer",
    "collect_tensors",
    "freeze_unshrinkable",
    "frozen_channels",
    "halved_share",
    "masks",
    "prunable_share",
    "remove_channels",
    "rule",
]

_HOMES = {
    "ChannelShares": "channel_shares",
    "FrozenChannels": "coverage",
    "Layer": "network",
    "LayerKind": "network",
    "Network": "network",
    "OpCall": "op_call",
    "PadChannels": "pad_channels",
    "Site": "sites",
    "Tap": "sites",
    "TraceState": "op_call",
    "call_model": "forward",
    "channels": "sites",
    "channels_per_consumer": "sites",
    "collect_tensors": "forward",
    "freeze_unshrinkable": "shrink",
    "frozen_channels": "coverage",
    "halved_share": "coverage",
    "masks": "sites",
    "prunable_share": "coverage",
    "remove_channels": "shrink",
    "rule": "op_call",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
