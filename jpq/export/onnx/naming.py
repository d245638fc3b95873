"""Names of the nodes of an exported file by the model's layers: `layer1.0.conv1`, `layer1.0.conv1/weight_quant/...`.

The exporter names a node by the modules whose code runs, each with its whole path or a part of it, such as
`/layer1/layer1.0/conv1/Conv`. The node that computes a layer gets the layer's name, and nodes around it that name, a
slash and what they are. Names of tensors stay as they are.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property

import onnx
from torch import nn

COMPUTING_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "InstanceNormalization")

_LEFT_OUT = ("export_handler",)  # parts of a path that say nothing to a reader

_NUMBER = re.compile(r"_\d+$")  # of a repeated call

_RESULTS = "results"  # child of a module that rounds its result, in a hook that runs outside of the module


def name_nodes(file: onnx.ModelProto, model: nn.Module) -> None:
    """Name the nodes of a file after the modules of the model that it was exported from, in place."""
    modules = ModuleNames(name for name, _ in model.named_modules(remove_duplicate=False))
    owners: dict[str, str] = {}  # output of a node that rounds a result -> module of that result
    taken: set[str] = set()
    for node in file.graph.node:
        module, rest = split_scope(node.name, modules)
        kinds = [_NUMBER.sub("", part) for part in rest]
        if _RESULTS in kinds and node.input:
            module = owners.get(node.input[0]) or split_scope(node.input[0], modules)[0] or module
            rest = rest[kinds.index(_RESULTS) :]
            owners.update(dict.fromkeys(node.output, module))
        if module or rest:
            node.name = unique_name(_node_name(node.op_type, module, rest), taken)
        taken.add(node.name)


class ModuleNames:
    """Names of modules, in which the parts of a path are looked up.

    Args:
        names: as of `named_modules`.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = {name for name in names if name}
        self._found: dict[tuple[str, str], list[str]] = {}  # (module, part) -> what the part may mean

    @cached_property
    def by_ending(self) -> dict[str, list[str]]:
        """What stands behind any dot of a name -> the names that end so."""
        found = defaultdict(list)
        for name in self.names:
            _, _, ending = name.partition(".")
            while ending:
                found[ending].append(name)
                _, _, ending = ending.partition(".")
        return found

    def meant(self, part: str, module: str) -> list[str]:
        """The modules below `module` that a part of a path may mean: one beside or in it, else any that ends so."""
        if (module, part) not in self._found:
            nearest = {f"{owner}.{part}".lstrip(".") for owner in (module, module.rpartition(".")[0])}
            names = self._below(nearest & self.names, module) or self._below(self.by_ending.get(part, ()), module)
            self._found[module, part] = names
        return self._found[module, part]

    def _below(self, names: Iterable[str], module: str) -> list[str]:
        return [name for name in names if not module or name.startswith(f"{module}.")]


def split_scope(path: str, modules: ModuleNames) -> tuple[str, list[str]]:
    """(the module that a path of scopes leads to, the rest of the path) for a path such as /layer1/layer1.0/Add.

    A container whose own forward does not run, such as a ModuleDict, is no part of the path: the next part is then
    looked for below it, and counts where only one module can be meant.
    """
    module, rest = "", [part for part in path.split("/") if part]
    while rest:
        meant = modules.meant(rest[0], module) or modules.meant(_NUMBER.sub("", rest[0]), module)
        if len(meant) != 1:
            break
        module, rest = meant[0], rest[1:]
    return module, rest


def _node_name(op: str, module: str, rest: Sequence[str]) -> str:
    """The name of a node of a module: the module's own for the operator that computes it."""
    parts = [part for part in rest if _NUMBER.sub("", part) not in _LEFT_OUT]
    if module and len(parts) == 1 and op in COMPUTING_OPS and parts[0].startswith(op):
        return module
    return "/".join([part for part in (module, *parts) if part])


def unique_name(name: str, taken: Collection[str]) -> str:
    """The name, with a number where it is taken, as that of a module that is called several times."""
    number, unique = 1, name
    while unique in taken:
        unique, number = f"{name}_{number}", number + 1
    return unique
