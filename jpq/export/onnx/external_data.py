"""Weights of an ONNX file that lie in other files: only those in its own folder are read.

Older versions of onnxruntime (1.23 is one) follow any path, so that a file from a stranger could read what it should
not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PureWindowsPath

import onnx

from jpq.types import JpqError

_IN_MEMORY = "_ORT_MEM_ADDR_"  # onnxruntime's mark of an address in memory in place of a file


def check_external_data(path: str | Path) -> None:
    """Raise JpqError for an ONNX file that asks for data outside of its folder.

    What is no ONNX file passes: the runtime says why it cannot be loaded.
    """
    model = onnx.ModelProto()
    with suppress(Exception):  # protobuf's and the system's errors
        model = onnx.load(str(path), load_external_data=False)
    for tensor in _tensors(model.graph, *model.functions):
        for location in (entry.value for entry in tensor.external_data if entry.key == "location"):  # any may count
            parts = PureWindowsPath(location)  # which reads "/" as well
            if parts.anchor or ".." in parts.parts or _IN_MEMORY in location:
                raise JpqError(
                    f"jpq cannot load {path}: its weight '{tensor.name}' lies outside of its folder, in '{location}'."
                )


def _tensors(*graphs: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.TensorProto]:
    """The constants of graphs and functions, and of the graphs inside their nodes."""
    for graph in graphs:
        if isinstance(graph, onnx.GraphProto):
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
        yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    """The constants in the attributes of nodes."""
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            yield from _tensors(attribute.g, *attribute.graphs)
