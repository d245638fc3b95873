"""An export of a model before it is trained: what no file can hold is said before hours are spent on it."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jpq.compression.model import CompressedModel
from jpq.export.onnx.export import MAX_BITS, export_onnx, export_qonnx
from jpq.export.rebuild import build_from_plan
from jpq.export.runtimes import Session
from jpq.export.torch_export import export_pt2
from jpq.plan import Plan
from jpq.tracing.forward import batch_size, call_model, first_samples
from jpq.types import JpqError

SAMPLES = 5  # of the example that is exported; hardly a number of layers: states are [layers, batch, units]


@torch.no_grad()
def check_exportable(
    net: CompressedModel, model: nn.Module, example: Any, formats: Collection[str], weights: str
) -> None:
    """Export a model with its quantizers and all its channels, and run the file in onnxruntime.

    Raises JpqError for what the exporters or the runtime cannot handle.

    Args:
        net: the model with its quantizers; model: the float model that it was made from.
        example: a batch, of which the first samples are taken.
        formats: names in FORMATS.
        weights: type of stored weights, as `export_onnx` takes it.
    """
    plan = net.plan()
    layers = {
        name: replace(layer, w_bits=min(layer.w_bits, MAX_BITS), a_bits=min(layer.a_bits, MAX_BITS))
        for name, layer in plan.layers.items()
    }
    small = build_from_plan(Plan(plan.method, layers, {}, ends=plan.ends), model).eval()
    samples = _first_samples(small, example)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        export_onnx(small, samples, path, weights)
        for optimised in (False, True):
            try:
                call_model(Session(path, optimised=optimised), samples)
            except JpqError:
                raise
            except Exception as error:  # onnxruntime has a class of its own for every kind of failure
                reason = " ".join(str(error).split())[-200:]
                raise JpqError(
                    f"onnxruntime cannot run this model's ONNX file ({reason}). Replace that part of the model."
                ) from error
        if "qonnx" in formats:
            export_qonnx(small, samples, path)
        if "pt2" in formats:
            export_pt2(small, samples, Path(folder, "model.pt2"))


def _first_samples(model: nn.Module, example: Any) -> Any:
    """The first samples of a batch, in any nest of tensors; the whole batch where the model does not run on a part."""
    samples = first_samples(example, min(SAMPLES, batch_size(example)))
    try:
        call_model(model, samples)
    except Exception:  # whatever the model's code raises
        return example
    return samples
