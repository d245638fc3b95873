"""ONNX with QuantizeLinear, Clip and DequantizeLinear (QCDQ): any runtime computes it, any width below 8 bits too."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from brevitas.export import export_onnx_qcdq
from brevitas.export import export_qonnx as brevitas_qonnx
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from jpq.exporters.constants import fold_constants
from jpq.exporters.fold import fold_norms
from jpq.exporters.graph import own_constants
from jpq.exporters.integers import make_integral
from jpq.exporters.narrow import narrowed
from jpq.files import replace_file
from jpq.network.read import arguments, batch_of, named_inputs, tensors
from jpq.quantizers import act_quantizer, result_quantizer, weight_quantizer
from jpq.types import JpqError

OPSET = 17


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
    given: nn.Module, example: Any, path: Path, exporter: Callable[..., Any],
    finish: Callable[[onnx.ModelProto], onnx.ModelProto], dynamic: bool = True,
) -> None:  # fmt: skip
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
        with _quiet():
            exporter(
                flat, args=tuple(inputs), dynamo=False, opset_version=OPSET, input_names=names[0],
                output_names=names[1], **{place: str(part)},
                dynamic_axes=axes if dynamic else None,
            )  # fmt: skip
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


class Session:
    """An exported file in onnxruntime, called like the model it came from.

    Unless `optimised`, the graph runs as it is written: onnxruntime's fusions round biases to integers.
    """

    def __init__(self, path: Path | onnx.ModelProto, threads: int = 0, optimised: bool = True):
        options = onnxruntime.SessionOptions()
        if not optimised:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        source = path.SerializeToString() if isinstance(path, onnx.ModelProto) else str(path)
        self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """The output for one batch, on the CPU: a tensor, or a tuple of all tensors that the model gives."""
        names = [i.name for i in self._session.get_inputs()]
        order = [*args, *(kwargs[name] for name in names if name in kwargs)] if set(names) >= set(kwargs) else kwargs
        values = [v.detach().cpu() for v in tensors(order)]
        feed = [np.ascontiguousarray((v.float() if v.is_floating_point() else v).numpy()) for v in values]
        out = tuple(
            torch.from_numpy(np.asarray(o)) for o in self._session.run(None, dict(zip(names, feed, strict=True)))
        )
        return out[0] if len(out) == 1 else out


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter and onnxoptimizer talk on every channel; what fails still raises."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
