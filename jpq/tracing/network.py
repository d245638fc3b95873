"""A traced network: layers with weights, products without, and which channels are kept or removed together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from fractions import Fraction
from math import prod

from jpq.costs import LatencyModel
from jpq.costs.latency import interpolate
from jpq.costs.latency_table import Entry, LatencyTable, Shape
from jpq.methods.structures import parse_structure
from jpq.tracing.integer_io import OutputQuantPoint
from jpq.types import DENSE, JpqError, Labels, unknown


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
    """A layer with one weight: its shape, its work, and the class of each input and output channel."""

    name: str  # dotted path of the module that owns the weight
    weight: str  # name of the parameter
    kind: LayerKind
    weight_shape: tuple[int, ...]
    groups: int
    macs: int  # multiply-accumulates of one sample, summed over calls
    inputs: Labels  # [input channels, of all groups]: class of each channel, NONE where it has none
    outputs: Labels  # [output channels]: class of each channel
    reads_input: bool  # the model's input reaches this layer through nothing but moves and arithmetic with constants
    calls: int
    wrappable: bool = True  # every call is one of a torch Conv or Linear module: a selection can be put before it
    stride: tuple[int, ...] = ()  # of the first call
    size: tuple[int, ...] = ()  # positions where the kernel is applied (dims of the output; transposed, of the input)
    form: str = ""  # number formats read and handed on if all layers are quantized, such as "float>int8"
    output_quant_point: OutputQuantPoint | None = None  # where rounding the result makes an integer kernel possible
    clock: LatencyModel | None = None  # the layer's latency by its kept channels and bits, from a latency table
    positions: tuple[Labels, ...] = ()  # other dims with classes by which the work shrinks, such as heads
    float_reason: str = ""  # why it stays at 32 bits, where its weight is computed or its op is no layer's
    shared: bool = False  # whether its weight is another module's too: its channels stay, and it has no mask
    kept_float: bool = False  # whether it stays at 32 bits because it was asked to (`--keep-float`)
    stored: int | None = None  # numbers of the parameter that this layer counts as its own, where not the whole weight

    @property
    def depthwise(self) -> bool:
        """Whether every output channel reads a single input channel."""
        return self.groups > 1 and self.groups == len(self.inputs)

    @property
    def weights(self) -> int:
        """Number of weights that are stored for it."""
        return prod(self.weight_shape) if self.stored is None else self.stored


@dataclass(frozen=True, eq=False)
class Product:
    """A product of two computed tensors, as attention has two: work at 32 bits without weights."""

    name: str  # dotted path of the module whose code computes it, and the op: "attn.q@k", "attn.matmul"
    op: str  # such as "aten.matmul"
    module: str  # dotted path of that module
    macs: int  # multiply-accumulates of one sample, summed over calls
    dims: tuple[Labels, ...]  # of every dim with classes (heads, rows, columns, a summed one): class of each index


@dataclass(frozen=True, eq=False)
class Table:
    """A parameter of two or more dims that is no layer's weight: an embedding, positions, the weights of a cell."""

    name: str
    numbers: int
    dims: tuple[Labels, ...]  # of every dim with classes: class of each index


@dataclass(frozen=True, eq=False)
class Network:
    """Layers in execution order, and the label class of every channel.

    A class is an integer. All channels of a class are kept or removed together; a frozen class is always kept.
    """

    layers: tuple[Layer, ...]
    axes: Mapping[str, Mapping[int, Labels]]  # parameter or buffer -> dim -> class per index
    frozen: Mapping[int, str]  # class -> reason
    attributes: Mapping[str, Labels]  # integer attribute of a module ("pad.before", "attn.heads") -> classes it counts
    embeddings: Mapping[str, Labels]  # module -> the classes of its columns
    unknown_ops: tuple[str, ...]  # ops without a rule that touched labels, or that hide a graph of their own
    opened: Mapping[int, str] = field(default_factory=dict)  # class that only `open_norms` frees -> why it was frozen
    idle: tuple[str, ...] = ()  # modules with parameters that evaluation never reads
    products: tuple[Product, ...] = ()  # in execution order
    tables: tuple[Table, ...] = ()

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample: of layers and of products of computed tensors."""
        return sum(layer.macs for layer in self.layers) + sum(product.macs for product in self.products)

    def layer(self, name: str) -> Layer:
        """The layer of that name. Raises JpqError for an unknown one."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise unknown("layer", name, [layer.name for layer in self.layers])


def latency_shape(layer: Layer) -> Shape:
    """The key of a layer in a latency table: all of its geometry but the numbers of channels."""
    kind = "depthwise" if layer.depthwise and layer.kind is LayerKind.CONV else layer.kind.value
    groups = 1 if kind == "depthwise" else layer.groups
    return Shape(kind, groups, layer.weight_shape[2:], layer.stride, layer.size)


def equivalent_calls(layer: Layer) -> Fraction:
    """Number of calls of the layer for one sample, in units of its first call's MACs."""
    return Fraction(layer.macs, prod(layer.size) * prod(layer.weight_shape))


def with_layer_times(network: Network, table: LatencyTable) -> Network:
    """A copy of the network whose layers have a latency model (`Layer.clock`), interpolated in a latency table.

    Raises JpqError for a layer that the table has no line for: a latency that is promised is not guessed from another
    layer's.
    """
    table = replace(table, entries=tuple(_with_parsed_scheme(entry, table.source) for entry in table.entries))
    layers, missing = [], []
    for layer in network.layers:
        channels = len(layer.inputs), len(layer.outputs)
        clock = interpolate(table, latency_shape(layer), layer.form, *channels, equivalent_calls(layer))
        if clock is None:
            missing.append(layer)
        layers.append(replace(layer, clock=clock))
    if missing:
        raise JpqError(
            f"{table.source} has no line for {len(missing)} of {len(layers)} layers, such as '{missing[0].name}' "
            f"({latency_shape(missing[0])}). Measure this model: `jpq bench --table FILE.csv --model NAME`."
        )
    return replace(network, layers=tuple(layers))


def with_float_layers(network: Network, names: Collection[str]) -> Network:
    """A copy of the network in which layers of these names stay at 32 bits."""
    layers = tuple(replace(layer, kept_float=layer.name in names) for layer in network.layers)
    return replace(network, layers=layers) if names else network


def _with_parsed_scheme(entry: Entry, source: str) -> Entry:
    """The entry with its mask structure spelled as `Structure.spec` spells it."""
    if entry.scheme == DENSE:
        return entry
    try:
        return replace(entry, scheme=parse_structure(entry.scheme).spec())
    except JpqError as error:
        raise JpqError(f"{source}: scheme '{entry.scheme}' is no structure. {error.command_line}") from error
