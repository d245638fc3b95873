"""ONNX with QuantizeLinear, Clip and DequantizeLinear (QCDQ): any runtime computes it, any width below 8 bits too."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from brevitas.export import export_onnx_qcdq
from torch import Tensor, nn

from jpq.quantizers import act_quantizer, weight_quantizer
from jpq.types import JpqError

OPSET = 17


def export(small: nn.Module, example: Tensor, path: Path) -> None:
    """Write a rebuilt model to `path`; the batch dimension is dynamic, inputs are called "input", outputs "output"."""
    model = copy.deepcopy(small).cpu().eval()
    module: Any
    for module in model.modules():
        if hasattr(module, "weight_quant"):
            wide = max(float(q.width()) for q in (weight_quantizer(module), act_quantizer(module)))
            if wide > 8:
                raise JpqError(f"QCDQ export holds at most 8 bits; a layer has {wide:.0f}. Lower --w-bits or --a-bits.")
            module.weight_quant.skip_create_quant_tensor = False
            module.input_quant.skip_create_quant_tensor = False
    part = path.with_suffix(".part")
    with _quiet():
        export_onnx_qcdq(
            model, args=example.cpu(), export_path=str(part), dynamo=False, opset_version=OPSET,
            input_names=["input"], output_names=["output"],
            dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
        )  # fmt: skip
    onnx.checker.check_model(str(part))
    part.replace(path)


class Session:
    """An exported file in onnxruntime, called like the model it came from.

    Unless `optimised`, the graph runs as it is written: onnxruntime's fusions round biases to integers.
    """

    def __init__(self, path: Path, threads: int = 0, optimised: bool = True):
        options = onnxruntime.SessionOptions()
        if not optimised:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, x: Tensor) -> Tensor:
        """The output for one batch, on the CPU."""
        (out,) = self._session.run(None, {"input": np.ascontiguousarray(x.cpu().numpy(), dtype=np.float32)})
        return torch.from_numpy(np.asarray(out))


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
