"""Where channels may be dropped: one site for all channels that the same layers make and the same layers read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Size

from jpq.methods.structures import Axis, Structure, WeightLayout, parse
from jpq.tracing.channel_labels import distinct
from jpq.tracing.network import Layer, LayerKind, Network
from jpq.types import DENSE, NONE, JpqError, Labels, unknown


@dataclass(frozen=True, eq=False)
class Tap:
    """The weights of one layer that a site's gate multiplies."""

    layer: str
    structure: Structure


@dataclass(frozen=True, eq=False)
class Site:
    """All the weights that one gate controls."""

    name: str
    rows: int
    n: int
    taps: tuple[Tap, ...]
    labels: Labels  # [n]: the label class of each unit; empty for a mask inside one layer
    makers: tuple[str, ...]  # layers that produce these channels

    @property
    def is_mask(self) -> bool:
        """Whether this is a mask on the weights of one layer, which removes no channel."""
        return not len(self.labels)


def channels(network: Network, skip: Collection[str] = ()) -> tuple[Site, ...]:
    """Coupled channel sites: dropping a unit silences one label class in every layer that reads it.

    Frozen classes are left out, so are classes made by a layer in `skip` and classes that no layer reads. Channels
    are grouped by (makers, readers); one unit kept per site leaves no layer without input.
    """
    known = [layer.name for layer in network.layers]
    for name in skip:
        if name not in known:
            raise unknown("layer", name, known)
    made = [(layer.name, layer.outputs) for layer in network.layers] + list(network.embeddings.items())
    taps = _tapped(network)
    makers, readers = _members([labels for _, labels in made]), _members([labels for _, _, labels in taps])
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = defaultdict(list)
    for c, by in makers.items():
        if c not in network.frozen and c in readers and not any(made[i][0] in skip for i in by):
            groups[by, readers[c]].append(c)
    sites, used = [], set[str]()
    for (by, at), classes in groups.items():
        names = tuple(made[i][0] for i in by)
        units = np.array(sorted(classes), np.int64)
        cut = tuple(Tap(taps[i][0], Axis(taps[i][1], _units(taps[i][2], units), len(units))) for i in at)
        name = names[0] if names[0] not in used else f"{names[0]}->{cut[0].layer}"
        while name in used:
            name += "'"
        used.add(name)
        sites.append(Site(name, 1, len(units), cut, units, names))
    return tuple(sites)


def _members(arrays: Sequence[Labels]) -> dict[int, tuple[int, ...]]:
    """Class -> the arrays that it occurs in, in the order in which classes first occur.

    Classes with equal histories are told apart together, so that the cost does not grow with the channels of a stage.
    """
    history = np.zeros(max((int(a.max(initial=NONE)) for a in arrays), default=NONE) + 1, np.int64)
    told: list[tuple[int, ...]] = [()]
    order: dict[int, None] = {}
    for i, labels in enumerate(arrays):
        classes = np.array([c for c in distinct(labels) if c != NONE], np.int64)
        old, which = np.unique(history[classes], return_inverse=True)
        order.update(dict.fromkeys(classes[history[classes] == 0].tolist()))
        history[classes] = len(told) + which
        told += [(*told[h], i) for h in old]
    return {c: told[history[c]] for c in order}


def masks(network: Network, structure: str | Mapping[str, str], skip: Collection[str] = ()) -> tuple[Site, ...]:
    """A site for each layer with a mask inside, which removes no channel.

    One structure goes to every layer whose weight it fits; what it refuses stays dense (4 x 4 kernels have no 3 x 3
    pattern). A mapping gives each layer its own; layers that it leaves out, or calls `dense`, stay dense. So do layers
    in `skip`. Raises JpqError for a structure that cannot be read, for one that fits no layer, with the reason, and for
    a mapping to a structure that does not fit its layer.
    """
    known = [layer.name for layer in network.layers]
    mapped = not isinstance(structure, str)
    for name in (*skip, *(structure if mapped else ())):
        if name not in known:
            raise unknown("layer", name, known)
    sites, refused = [], ""
    for layer in network.layers:
        text = structure if isinstance(structure, str) else structure.get(layer.name, DENSE)
        if layer.name in skip or (text == DENSE and mapped) or not (can_mask(layer) or mapped):
            continue
        own = parse(text, layout(layer))
        try:
            rows, n = own.shape(Size(layer.weight_shape))
            if not can_mask(layer):
                raise JpqError("its weight belongs to no module of its own; leave it dense.")
        except JpqError as reason:
            refused = str(reason)
            if mapped:
                raise JpqError(f"--structure {layer.name}={text}: {reason}") from reason
        else:
            sites.append(Site(layer.name, rows, n, (Tap(layer.name, own),), np.zeros(0, np.int64), (layer.name,)))
    if not sites and mapped:
        raise JpqError(
            "Every layer is to stay dense, so nothing would be pruned: choose another --structure or a lower --density."
        )
    if not sites:
        raise JpqError(f"--structure {structure} fits no layer of this model. {refused}")
    return tuple(sites)


def can_mask(layer: Layer) -> bool:
    """Whether a mask inside this layer is possible: its weight belongs to the module of its name."""
    return layer.weight == f"{layer.name}.weight"


def layout(layer: Layer) -> WeightLayout:
    """How the layer's weight lies."""
    return WeightLayout(layer.kind is LayerKind.CONV_TRANSPOSE, layer.groups)


def _tapped(network: Network) -> list[tuple[str, int, Labels]]:
    """(layer, input dim of its weight, labels along that dim) of every layer that mixes channels."""
    out = []
    for layer in network.layers:
        if layer.depthwise:
            continue  # it hands its channels on, and their readers are masked
        dim = layer.kind.input_dim
        out.append((layer.name, dim, layer.inputs[: layer.weight_shape[dim]]))
    return out


def _units(labels: Labels, units: Labels) -> Labels:
    """Position -> index of its class in the sorted `units`, NONE where it belongs to another site."""
    at = np.minimum(np.searchsorted(units, labels), len(units) - 1)
    return np.where(units[at] == labels, at, NONE)


def per_consumer(network: Network, skip: Collection[str] = ()) -> tuple[Site, ...]:
    """Uncoupled channel sites: the coupled ones of `channels`, one for each layer that reads them.

    A site stays coupled where one of its readers is not `wrappable`: nothing can select that reader's channels.
    One unit kept per site leaves no layer without input and none without output.
    """
    wrappable = {layer.name for layer in network.layers if layer.wrappable}
    out = []
    for site in channels(network, skip):
        if len(site.taps) == 1 or not wrappable.issuperset(tap.layer for tap in site.taps):
            out.append(site)
            continue
        for tap in site.taps:
            out.append(Site(f"{site.name} for {tap.layer}", site.rows, site.n, (tap,), site.labels, site.makers))
    return tuple(out)


def dropped(sites: Sequence[Site], kept: Mapping[str, Sequence[bool]]) -> set[int]:
    """The label classes that no site keeps: they leave the network."""
    votes: dict[int, bool] = defaultdict(bool)
    for site in sites:
        for label, keeps in zip(site.labels.tolist(), kept[site.name], strict=True):
            votes[label] |= bool(keeps)
    return {label for label, keeps in votes.items() if not keeps}
