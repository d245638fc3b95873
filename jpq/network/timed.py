"""Give the layers of a network their clocks: what a table of latencies says of each."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import prod

from jpq.costs import DENSE
from jpq.costs.latency import curve
from jpq.costs.table import Entry, Shape, Table
from jpq.network.record import Layer, Network
from jpq.structures import parse
from jpq.types import JpqError


def shape(layer: Layer) -> Shape:
    """What a table knows a layer by."""
    narrow = layer.groups > 1 and layer.groups == len(layer.inputs)
    kind = "depthwise" if narrow and layer.kind == "conv" else layer.kind
    return Shape(kind, 1 if kind == "depthwise" else layer.groups, layer.weight_shape[2:], layer.stride, layer.size)


def times(layer: Layer) -> Fraction:
    """How often it runs at its first call's size in one sample, by MACs."""
    return Fraction(layer.macs, prod(layer.size) * prod(layer.weight_shape))


def timed(network: Network, table: Table) -> Network:
    """The same network, every layer with its clock.

    Raises JpqError for a layer that nobody measured: a latency that is promised is not guessed from another layer's.
    """
    table = replace(table, entries=tuple(_named(e, table.source) for e in table.entries))
    layers, lost = [], []
    for layer in network.layers:
        clock = curve(table, shape(layer), layer.form, len(layer.inputs), len(layer.outputs), times(layer))
        if clock is None:
            lost.append(layer)
        layers.append(replace(layer, clock=clock))
    if lost:
        raise JpqError(
            f"{table.source} has no line for {len(lost)} of {len(layers)} layers, such as '{lost[0].name}' "
            f"({shape(lost[0])}). Measure this model: jpq bench --table FILE.csv --model NAME."
        )
    return replace(network, layers=tuple(layers))


def _named(entry: Entry, source: str) -> Entry:
    """The entry with its scheme as structures write their own."""
    if entry.scheme == DENSE:
        return entry
    try:
        return replace(entry, scheme=parse(entry.scheme).spec())
    except JpqError as error:
        raise JpqError(f"{source}: scheme '{entry.scheme}' is no structure. {error}") from error
