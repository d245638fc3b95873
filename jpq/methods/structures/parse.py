"""STRUCTURES: structures by their names in text, such as `2:4` or `block:8x4`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from jpq.config import CHANNELS, RULES, SEARCH
from jpq.methods.structures.axis import Filters, Inputs, Kernels
from jpq.methods.structures.base import Structure
from jpq.methods.structures.block import Block, BlockPunched
from jpq.methods.structures.elementwise import Elementwise, PerOutput
from jpq.methods.structures.layout import PLAIN, WeightLayout
from jpq.methods.structures.pattern import KernelPattern
from jpq.methods.structures.window import Window
from jpq.types import JpqError, unknown

WHOLE = (CHANNELS, RULES, SEARCH)  # settings for the whole network, not for one layer


@dataclass(frozen=True)
class Named:
    """A kind of structure with a name in text, and its syntax."""

    make: Callable[..., Structure]  # numbers, layout=WeightLayout -> structure
    form: str  # forms of its text, for error messages
    example: str  # text of a structure that fits most layers
    numbers: tuple[int, ...] = (0,)  # allowed counts of numbers in the text
    spans: bool = False  # whether * may stand for "all"


STRUCTURES: dict[str, Named] = {
    "elementwise": Named(Elementwise, "elementwise", "elementwise"),
    "per-output": Named(PerOutput, "per-output or per-output:TILES", "per-output", (0, 1)),
    "kernels": Named(Kernels, "kernels", "kernels"),
    "filters": Named(Filters, "filters", "filters"),
    "inputs": Named(Inputs, "inputs", "inputs"),
    "window": Named(Window, "N:M or window:N:M, such as 2:4", "2:4", (2,)),
    "block": Named(Block, "block:AxB, such as block:8x4 or block:*x1", "block:8x4", (2,), True),
    "punched": Named(BlockPunched, "punched:FILTERSxCHANNELS, such as punched:8x4", "punched:8x4", (2,), True),
    "pattern": Named(KernelPattern, "pattern, pattern:4 or pattern:3x3:1.3.4.5/1.3.4.7", "pattern"),
}


def parse_structure(text: str, layout: WeightLayout = PLAIN) -> Structure:
    """Structure that a text names, for a layer of this layout. Raises JpqError with the forms that exist."""
    name, _, rest = text.strip().partition(":")
    if re.fullmatch(r"\d{1,9}:\d{1,9}", text.strip()):
        name, rest = "window", text.strip()
    if name not in STRUCTURES:
        raise unknown("structure", name, [*STRUCTURES, "2:4"])
    if name == "pattern":
        return KernelPattern.read(rest, layout)
    named = STRUCTURES[name]
    numbers = re.split("[:x]", rest) if rest else []
    number = r"\d{1,9}|\*" if named.spans else r"\d{1,9}"
    if len(numbers) not in named.numbers or not all(re.fullmatch(number, n) for n in numbers):
        raise JpqError(f"Cannot read structure '{text}': write {named.form}.")
    return named.make(*(None if n == "*" else int(n) for n in numbers), layout=layout)


def parse_layers(text: str) -> dict[str, str]:
    """{layer: structure} of a text such as `conv1=pattern,fc=block:8x1`; empty where it names one structure for all.

    Layers that it leaves out are dense, so are those that it calls `dense`. Raises JpqError for text that is neither,
    with the form; what the structures say is for `parse_structure` to read.
    """
    if "=" not in text:
        return {}
    structures: dict[str, str] = {}
    for part in text.split(","):
        name, _, structure = (side.strip() for side in part.partition("="))
        if not name or not structure or name in structures:
            why = f"'{name}' stands there twice" if name in structures else f"'{part.strip()}' is no LAYER=STRUCTURE"
            raise JpqError(f"Cannot read structure '{text}': {why}. Write it like conv1=pattern,fc=block:8x1.")
        if structure in WHOLE:
            raise JpqError(
                f"Structure '{text}': {structure} is for the whole network, not for layer '{name}'. Give "
                "the layer a mask such as pattern or block:8x1, or call it dense."
            )
        structures[name] = structure
    return structures
