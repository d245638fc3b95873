"""A network as jpq sees it: layers with weights, and which channels stand or fall together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jpq.costs import Clock
from jpq.network.ends import End
from jpq.types import Labels, unknown


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight that reads channels and makes channels."""

    name: str  # dotted path of the module that owns the weight
    weight: str  # name of the parameter
    kind: str  # "conv" | "conv_transpose" | "linear"
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
    end: End | None = None  # where its result can be rounded, so that an integer kernel computes it (`network.ends`)
    clock: Clock | None = None  # how long it takes, where a table says so (`network.timed`)


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
