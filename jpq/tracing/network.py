"""A network as jpq sees it: layers with weights, and which channels stand or fall together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from fractions import Fraction
from math import prod

from jpq.costs import DENSE, LatencyModel
from jpq.costs.latency import interpolate
from jpq.costs.latency_table import Entry, LatencyTable, Shape
from jpq.methods.structures import parse
from jpq.tracing.integer_io import OutputQuantPoint
from jpq.types import JpqError, Labels, unknown


class LayerKind(str, Enum):
    """The kind of a layer with weights; the value is its name in results and latency tables."""

    CONV = "conv"
    CONV_TRANSPOSE = "conv_transpose"
    LINEAR = "linear"

    def __str__(self) -> str:
        return self.value

    @property
    def output_dim(self) -> int:
        """The dim of the weight with one slice per output channel (of one group, if transposed)."""
        return 1 if self is LayerKind.CONV_TRANSPOSE else 0

    @property
    def input_dim(self) -> int:
        """The dim of the weight with one slice per input channel (of one group, unless transposed)."""
        return 0 if self is LayerKind.CONV_TRANSPOSE else 1

    @property
    def channel_dim(self) -> int:
        """The dim of input and output activations along which channels lie, where there is a batch dim."""
        return -1 if self is LayerKind.LINEAR else 1


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight that reads input channels and makes output channels, in one call or several."""

    name: str  # dotted path of the module that owns the weight
    weight: str  # name of the parameter
    kind: LayerKind
    weight_shape: tuple[int, ...]
    groups: int
    macs: int  # of one sample, summed over calls
    inputs: Labels  # [channels in, of all groups]: class of each input channel, NONE where it has none
    outputs: Labels  # [channels out]
    reads_input: bool  # the model's input reaches it through nothing but moves and arithmetic with constants
    calls: int
    wrappable: bool = True  # only ever called as a torch Conv or Linear module: a selection can be put before it
    stride: tuple[int, ...] = ()  # of the first call, as is
    size: tuple[int, ...] = ()  # positions where the kernel is applied (dims of the output; transposed, of the input)
    form: str = ""  # what it reads and hands on where all layers are quantized, such as "float>int8" (`network.forms`)
    end: OutputQuantPoint | None = (
        None  # where its result can be rounded, so that an integer kernel computes it (`network.ends`)
    )
    clock: LatencyModel | None = None  # how long it takes, where a table says so (`network.timed`)

    @property
    def depthwise(self) -> bool:
        """Whether every output channel reads a single input channel."""
        return self.groups > 1 and self.groups == len(self.inputs)


@dataclass(frozen=True, eq=False)
class Network:
    """Layers in execution order, and the label class of every channel.

    A class is an integer. All channels of a class are kept or dropped together; a frozen class is always kept.
    """

    layers: tuple[Layer, ...]
    axes: Mapping[str, Mapping[int, Labels]]  # parameter or buffer -> dim -> class per index
    frozen: Mapping[int, str]  # class -> reason
    attributes: Mapping[str, Labels]  # integer attribute of a module ("pad.before", "attn.heads") -> what it counts
    embeddings: Mapping[str, Labels]  # module -> the classes of its columns
    unknown_ops: tuple[str, ...]  # ops without a rule that touched labels, or that hide a graph of their own
    opened: Mapping[int, str] = field(default_factory=dict)  # class that only `open_norms` frees -> why it was frozen
    idle: tuple[str, ...] = ()  # modules with parameters that evaluation never reads

    def layer(self, name: str) -> Layer:
        """The layer of that name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise unknown("layer", name, [layer.name for layer in self.layers])


def shape(layer: Layer) -> Shape:
    """What a table knows a layer by."""
    kind = "depthwise" if layer.depthwise and layer.kind is LayerKind.CONV else layer.kind.value
    return Shape(kind, 1 if kind == "depthwise" else layer.groups, layer.weight_shape[2:], layer.stride, layer.size)


def times(layer: Layer) -> Fraction:
    """How often it runs at its first call's size in one sample, by MACs."""
    return Fraction(layer.macs, prod(layer.size) * prod(layer.weight_shape))


def with_times(network: Network, table: LatencyTable) -> Network:
    """The same network, every layer with its clock.

    Raises JpqError for a layer that nobody measured: a latency that is promised is not guessed from another layer's.
    """
    table = replace(table, entries=tuple(_named(e, table.source) for e in table.entries))
    layers, lost = [], []
    for layer in network.layers:
        clock = interpolate(table, shape(layer), layer.form, len(layer.inputs), len(layer.outputs), times(layer))
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
