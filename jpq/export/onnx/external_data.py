"""Weights of an ONNX file that lie in other files: only those in its own folder are read.

Older versions of onnxruntime (1.23 is one) follow any path, so that a file from a stranger could read what it should
not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PureWindowsPath

import onnx

from jpq.types import JpqError


def check_external_data(path: str | Path) -> None:
    """Raise JpqError for an ONNX file that asks for data outside of its folder.

    What is no ONNX file passes: the runtime says why it cannot be loaded.
    """
    graph = onnx.GraphProto()
    with suppress(Exception):  # protobuf's and the system's errors
        graph = onnx.load(str(path), load_external_data=False).graph
    for tensor in _tensors(graph):
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        parts = PureWindowsPath(location)  # which reads "/" as well
        if parts.anchor or ".." in parts.parts:
            raise JpqError(
                f"jpq cannot load {path}: its weight '{tensor.name}' lies outside of its folder, in '{location}'."
            )


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """The constants of a graph, and of the graphs inside its nodes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)
