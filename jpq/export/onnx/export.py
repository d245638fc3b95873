"""ONNX with QuantizeLinear, Clip and DequantizeLinear (QCDQ): any runtime computes it, any width below 8 bits too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from brevitas.export import export_onnx_qcdq
from brevitas.export import export_qonnx as brevitas_qonnx
from onnx import helper
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from jpq.export.onnx.fold_norms import fold_norms
from jpq.export.onnx.graph import Graph, fold_constants, own_constants
from jpq.export.onnx.integer_kernels import make_integral
from jpq.export.onnx.narrow_weights import narrowed
from jpq.export.runtimes import quiet_exporters
from jpq.files.atomic import replace_file
from jpq.methods.quantizers import act_quantizer, result_quantizer, weight_quantizer
from jpq.tracing.forward import arguments, batch_of, named_inputs, tensors
from jpq.types import JpqError

OPSET = 17

DOMAIN = "qonnx.custom_op.general"


class _Flat(nn.Module):
    """A model as ONNX knows it: tensors in, tensors out; whatever else the example holds stays as it was."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        super().__init__()
        self.model = model
        self._leaves, self._shape = tree_flatten((args, kwargs))

    def forward(self, *given: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The output's tensors, alone or in order."""
        feed = iter(given)
        leaves = [next(feed) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._shape)
        out = tensors(self.model(*args, **kwargs))
        return out[0] if len(out) == 1 else tuple(out)


def export(small: nn.Module, example: Any, path: Path, weights: str = "int8") -> None:
    """Write a rebuilt model to `path`; the batch dimension is dynamic. Normalisations are folded (`fold_norms`).

    Weights are stored as integers, in 8 bits each or, where `weights` is "int4" or "int2", in the narrowest of those
    types that holds the layer's (opset 21 or 25; see narrow.py).

    The one input is called "input", the one output "output". Several inputs (a tuple or a dict as example) have the
    names that `forward` gives them, several outputs the keys of their dict or output_0, output_1, ...

    Raises JpqError for widths above 8 bits, and for a file that onnx cannot store in narrower types.
    """

    def finish(written: onnx.ModelProto) -> onnx.ModelProto:
        fold_norms(written)
        fold_constants(written)
        make_integral(written)
        return narrowed(written, weights)

    for layer in [m for m in small.modules() if hasattr(m, "weight_quant")]:
        wide = max(float(q.width()) for q in (weight_quantizer(layer), act_quantizer(layer)))
        if wide > 8:
            raise JpqError(f"QCDQ export holds at most 8 bits; a layer has {wide:.0f}. Lower --w-bits or --a-bits.")
    _write(small, example, path, export_onnx_qcdq, finish)


def export_qonnx(small: nn.Module, example: Any, path: Path) -> None:
    """The rebuilt model with QONNX's Quant nodes, any width, norms as they are: for FPGA flows, and for netron.

    `qonnx.util.inference_cost` counts the same MACs and BOPs in it as jpq.measure, with `discount_sparsity=False`
    (otherwise a stored weight of zero costs it nothing, while jpq counts what a mask keeps). That tool and the flows
    take no dynamic batch: the file holds one sample.
    """
    size = batch_of(example)
    one = tree_map(lambda v: v[:1] if isinstance(v, Tensor) and v.dim() and len(v) == size else v, example)

    def finish(written: onnx.ModelProto) -> onnx.ModelProto:
        fold_constants(written)
        return written

    _write(small, one, path, brevitas_qonnx, finish, dynamic=False)


def export_float(model: nn.Module, example: Any, path: Path) -> None:
    """A float model as ONNX: what a quantized one is compared with."""
    _write(model, example, path, torch.onnx.export, lambda written: written)


def _write(
    given: nn.Module,
    example: Any,
    path: Path,
    exporter: Callable[..., Any],
    finish: Callable[[onnx.ModelProto], onnx.ModelProto],
    dynamic: bool = True,
) -> None:
    """Trace a copy with one of the exporters, finish what it wrote, and put it in place."""
    model = copy.deepcopy(given).cpu().eval()
    module: Any
    for module in model.modules():
        if hasattr(module, "weight_quant"):
            module.weight_quant.skip_create_quant_tensor = False
            module.input_quant.skip_create_quant_tensor = False
        if result_quantizer(module) is not None:
            module.results.act_quant.skip_create_quant_tensor = False
    args, kwargs = arguments(tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, example))
    inputs = tensors((args, kwargs))
    with torch.no_grad():
        out = model(*args, **kwargs)
    flat = model if len(inputs) == len(args) and isinstance(out, Tensor) else _Flat(model, args, kwargs)
    names = _input_names(model, args, kwargs), _output_names(out)
    batched = [t.dim() > 0 and len(t) == len(inputs[0]) for t in [*inputs, *tensors(out)]]
    axes = {n: {0: "batch"} for n, b in zip(names[0] + names[1], batched, strict=True) if b}
    place = "f" if exporter is torch.onnx.export else "export_path"

    def write(part: Path) -> None:
        with quiet_exporters():
            exporter(
                flat,
                args=tuple(inputs),
                dynamo=False,
                opset_version=OPSET,
                input_names=names[0],
                output_names=names[1],
                **{place: str(part)},
                dynamic_axes=axes if dynamic else None,
            )
        written = onnx.load(str(part))
        own_constants(written.graph)
        onnx.save(finish(written), str(part))
        onnx.checker.check_model(str(part))

    replace_file(path, write)


def _input_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    found = _numbered({name: len(tensors(value)) for name, value in named_inputs(model, args, kwargs).items()})
    return found if len(found) > 1 else ["input"]


def _output_names(out: Any) -> list[str]:
    count = len(tensors(out))
    if count == 1:
        return ["output"]
    keyed = {str(k): len(tensors(v)) for k, v in out.items()} if isinstance(out, Mapping) else {}
    return _numbered(keyed or {"output": count})


def _numbered(counts: Mapping[str, int]) -> list[str]:
    """A name for each tensor: its own where it is alone under it, else with a number."""
    return [name if n == 1 else f"{name}_{i}" for name, n in counts.items() for i in range(n)]


def standard(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with each Quant node written out. Raises JpqError for other nodes or roundings of QONNX."""
    graph = Graph(model)
    for node in [n for n in graph.proto.node if n.domain not in ("", "ai.onnx")]:
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type != "Quant" or options.get("rounding_mode", b"ROUND") != b"ROUND":
            raise JpqError(f"A {node.op_type} node of {node.domain} has no standard form here.")
        x, scale, zero, bits = node.input
        width, signed, narrow = float(graph.array(bits)), bool(options["signed"]), int(options["narrow"])
        low, high = (-(2 ** (width - 1)) + narrow, 2 ** (width - 1) - 1) if signed else (0.0, 2**width - 1 - narrow)
        out = node.output[0]
        limits = [graph.keep(f"limit.{end}", np.array(end, np.float32)) for end in (low, high)]
        steps = [
            ("Div", [x, scale]),
            ("Add", ["", zero]),
            ("Round", [""]),
            ("Clip", ["", *limits]),
            ("Sub", ["", zero]),
            ("Mul", ["", scale]),
        ]
        made: list[onnx.NodeProto] = []
        for i, (op, inputs) in enumerate(steps):
            read = [made[-1].output[0], *inputs[1:]] if made else inputs
            made.append(helper.make_node(op, read, [out if i == len(steps) - 1 else f"{out}.step_{i}"]))
        graph.insert(node, made)
        graph.proto.node.remove(node)
    for entry in [o for o in model.opset_import if o.domain not in ("", "ai.onnx")]:
        model.opset_import.remove(entry)
    return model
