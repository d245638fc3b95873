"""Pruning groups ("sites"): the channels or weights of a network that one gate keeps or removes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Size

from jpq.methods.structures import Axis, Structure, WeightLayout, parse_structure
from jpq.tracing.call_sizes import is_call_size, parse_size
from jpq.tracing.channel_labels import unique_labels
from jpq.tracing.network import Layer, LayerKind, Network
from jpq.types import DENSE, NONE, JpqError, Labels, unknown

CUTS = ("__getitem__", "narrow", "split", "tensor_split", "split_with_sizes")  # calls that cut a dim into parts


@dataclass(frozen=True, eq=False)
class Tap:
    """A layer whose weight a site's gate multiplies, and the structure that maps units to its weights."""

    layer: str
    structure: Structure


@dataclass(frozen=True, eq=False)
class Site:
    """A pruning group: `[rows, n]` units that one gate controls, and the weights that they multiply."""

    name: str
    rows: int
    n: int
    taps: tuple[Tap, ...]
    labels: Labels  # [n]: the label class of each unit; empty for a mask inside one layer
    producers: tuple[str, ...]  # layers that make these channels

    @property
    def is_mask(self) -> bool:
        """Whether the units are weights inside one layer, so that pruning removes no channel."""
        return not len(self.labels)


def channels(network: Network, skip: Collection[str] = ()) -> tuple[Site, ...]:
    """Coupled channel sites: dropping a unit removes one label class from every layer that reads it.

    Frozen classes are left out, so are classes made by a layer in `skip` and classes that no layer reads. Channels
    are grouped by (producers, consumers), and by how often they stand in the parts into which the code's own calls cut
    them: one unit kept per site leaves no layer without input, and no part of a cut without channels.
    """
    _check_layer_names(network, skip)
    sources = [(layer.name, layer.outputs) for layer in network.layers if not layer.float_reason]
    sources += network.embeddings.items()
    readings = _weight_inputs(network)
    producers = _occurrences([labels for _, labels in sources])
    consumers = _occurrences([labels for _, _, labels in readings])
    counted = _counts_in_calls(network)
    groups: dict[tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, int], ...]], list[int]] = defaultdict(list)
    for c, made_by in producers.items():
        if c not in network.frozen and c in consumers and not any(sources[i][0] in skip for i in made_by):
            groups[made_by, consumers[c], tuple(counted.get(c, ()))].append(c)
    sites, used = [], set[str]()
    for (made_by, read_by, _), classes in groups.items():
        names = tuple(sources[i][0] for i in made_by)
        units = np.array(sorted(classes), np.int64)
        taps = tuple(_channel_tap(*readings[i], units) for i in read_by)
        name = names[0] if names[0] not in used else f"{names[0]}->{taps[0].layer}"
        while name in used:
            name += "'"
        used.add(name)
        sites.append(Site(name, 1, len(units), taps, units, names))
    return tuple(sites)


def _counts_in_calls(network: Network) -> dict[int, list[tuple[int, int]]]:
    """Class -> (number of a size at which the code's own calls cut, how many channels of the class it counts)."""
    counts: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for i, (name, labels) in enumerate(network.attributes.items()):
        if is_call_size(name) and parse_size(name)[0][1].split(":")[0] in CUTS:
            for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
                counts[int(label)].append((i, int(count)))
    return counts


def channels_per_consumer(network: Network, skip: Collection[str] = ()) -> tuple[Site, ...]:
    """Uncoupled channel sites: each coupled site of `channels` once for every layer that reads it.

    A site stays coupled where one of its consumers is not `wrappable`: nothing can select that consumer's channels.
    One unit kept per site leaves no layer without input and none without output.
    """
    wrappable = {layer.name for layer in network.layers if layer.wrappable}
    sites = []
    for site in channels(network, skip):
        if len(site.taps) == 1 or not wrappable.issuperset(tap.layer for tap in site.taps):
            sites.append(site)
            continue
        for tap in site.taps:
            sites.append(Site(f"{site.name} for {tap.layer}", site.rows, site.n, (tap,), site.labels, site.producers))
    return tuple(sites)


def dropped_classes(sites: Sequence[Site], kept: Mapping[str, Sequence[bool]]) -> set[int]:
    """The label classes that no site keeps, so that their channels leave the network."""
    votes: dict[int, bool] = defaultdict(bool)
    for site in sites:
        for label, keeps in zip(site.labels.tolist(), kept[site.name], strict=True):
            votes[label] |= bool(keeps)
    return {label for label, keeps in votes.items() if not keeps}


def masks(network: Network, structure: str | Mapping[str, str], skip: Collection[str] = ()) -> tuple[Site, ...]:
    """Mask sites: one per layer, whose units are weights inside the layer, so that pruning removes no channel.

    One structure goes to every layer whose weight it fits; a layer that it does not fit stays dense (4 x 4 kernels have
    no 3 x 3 pattern). A mapping gives each layer its own; layers that it leaves out, or calls `dense`, stay dense. So
    do layers in `skip`. Raises JpqError for a structure that cannot be read, for one that fits no layer, with the
    reason, and for a mapping to a structure that does not fit its layer.
    """
    if isinstance(structure, str):
        _check_layer_names(network, skip)
        return _masks_where_they_fit(network, structure, skip)
    _check_layer_names(network, (*skip, *structure))
    return _masks_by_layer(network, structure, skip)


def can_mask(layer: Layer) -> bool:
    """Whether a mask inside this layer is possible: its module alone has its weight, and applies it."""
    return layer.weight == f"{layer.name}.weight" and not layer.float_reason and not layer.shared


def weight_layout(layer: Layer) -> WeightLayout:
    """Layout of a layer's weight: which dims stand for inputs, outputs and groups."""
    return WeightLayout(layer.kind is LayerKind.CONV_TRANSPOSE, layer.groups)


def _check_layer_names(network: Network, names: Collection[str]) -> None:
    """Raise JpqError for a name that is no layer's."""
    known = [layer.name for layer in network.layers]
    for name in names:
        if name not in known:
            raise unknown("layer", name, known)


def _masks_where_they_fit(network: Network, structure: str, skip: Collection[str]) -> tuple[Site, ...]:
    """A mask site with this structure for every layer that it fits."""
    sites: list[Site] = []
    misfits: dict[LayerKind, str] = {}  # the reason of the first layer of each kind
    for layer in network.layers:
        if layer.name in skip or not can_mask(layer):
            continue
        parsed = parse_structure(structure, weight_layout(layer))
        try:
            sites.append(_mask_site(layer, parsed))
        except JpqError as reason:
            misfits.setdefault(layer.kind, f"Layer {layer.name}: {reason.command_line}")
    if not sites:
        raise JpqError(" ".join((f"--structure {structure} fits no layer of this model.", *misfits.values())))
    return tuple(sites)


def _masks_by_layer(network: Network, structures: Mapping[str, str], skip: Collection[str]) -> tuple[Site, ...]:
    """A mask site for every layer that the mapping gives a structure."""
    sites = []
    for layer in network.layers:
        text = structures.get(layer.name, DENSE)
        if layer.name in skip or text == DENSE:
            continue
        parsed = parse_structure(text, weight_layout(layer))
        try:
            site = _mask_site(layer, parsed)
            if not can_mask(layer):
                raise JpqError("its weight belongs to no module of its own; leave it dense.")
        except JpqError as reason:
            raise JpqError(f"--structure {layer.name}={text}: {reason.command_line}") from reason
        sites.append(site)
    if not sites:
        raise JpqError(
            "Every layer is to stay dense, so nothing would be pruned: choose another --structure or a lower --density."
        )
    return tuple(sites)


def _mask_site(layer: Layer, structure: Structure) -> Site:
    """The site of a mask inside one layer. Raises JpqError where the structure does not fit the weight."""
    rows, n = structure.shape(Size(layer.weight_shape))
    return Site(layer.name, rows, n, (Tap(layer.name, structure),), np.zeros(0, np.int64), (layer.name,))


def _occurrences(arrays: Sequence[Labels]) -> dict[int, tuple[int, ...]]:
    """Class -> indices of the arrays that it occurs in, in the order in which classes first occur.

    Classes with equal histories are handled together, so that the cost does not grow with the channels of a stage.
    """
    history = np.zeros(max((int(a.max(initial=NONE)) for a in arrays), default=NONE) + 1, np.int64)
    histories: list[tuple[int, ...]] = [()]
    order: dict[int, None] = {}
    for i, labels in enumerate(arrays):
        classes = np.array([c for c in unique_labels(labels) if c != NONE], np.int64)
        before, which = np.unique(history[classes], return_inverse=True)
        order.update(dict.fromkeys(classes[history[classes] == 0].tolist()))
        history[classes] = len(histories) + which
        histories += [(*histories[h], i) for h in before]
    return {c: histories[history[c]] for c in order}


def _weight_inputs(network: Network) -> list[tuple[str, int, Labels]]:
    """(layer, input dim of its weight, labels along that dim) of every layer that mixes channels."""
    readings = []
    for layer in network.layers:
        if layer.depthwise or layer.float_reason:
            continue  # it hands its channels on, and their consumers are masked; or its inputs are frozen
        dim = layer.kind.input_dim
        readings.append((layer.name, dim, layer.inputs[: layer.weight_shape[dim]]))
    return readings


def _channel_tap(layer: str, dim: int, labels: Labels, units: Labels) -> Tap:
    """The tap of a site with these sorted unit classes on a layer whose weight has these labels along `dim`."""
    nearest = np.minimum(np.searchsorted(units, labels), len(units) - 1)
    index = np.where(units[nearest] == labels, nearest, NONE)  # NONE: the position belongs to another site
    return Tap(layer, Axis(dim, index, len(units)))
