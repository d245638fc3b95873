"""Layers that read constants: a default session multiplies their integers, as the model does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

import jpq
from jpq.export.onnx.constant_inputs import read_constants_as_rows
from jpq.export.runtimes import Session


class LearnedQueries(nn.Module):
    """Attention whose queries are parameters, as DETR and Perceiver have it."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(*dims, 24))
        self.first, self.head = nn.Linear(12, 24), nn.Linear(24, 4)
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        q, k, v = (y.unflatten(-1, (-1, 6)).transpose(-2, -3) for y in (self.q(self.queries), self.k(x), self.v(x)))
        return self.head(self.o(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2))).mean(1)


class Positions(nn.Module):
    """Positions that two layers make of sines, and a third makes of the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.arange(6.0)[None, :, None] * torch.linspace(0.1, 2, 8))
        self.first, self.head = nn.Linear(12, 24), nn.Linear(24, 4)
        self.a, self.b, self.c = nn.Linear(16, 20), nn.Linear(20, 24), nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.cat([self.angles.sin(), self.angles.cos()], -1)
        return self.head(F.relu(self.first(x) + self.b(self.a(waves).relu()) * self.c(waves))).mean(1)


@pytest.mark.parametrize("make", [lambda: LearnedQueries(1, 3), lambda: LearnedQueries(3), Positions])
def test_a_default_session_computes_what_the_model_computes(make, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, x = make(), torch.randn(7, 6, 12)
    small = jpq.compress(model, x, bops="50%", steps=1).finalize().eval()
    path, fused = tmp_path / "m.onnx", tmp_path / "fused.onnx"
    jpq.export_onnx(small, x, path)
    with torch.no_grad():
        assert (Session(path)(x) - small(x)).abs().max() <= 1e-6 * small(x).abs().max()
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(fused)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert b"MatMulNBits" not in fused.read_bytes()


@pytest.mark.parametrize("keys", [[8, 4], [2, 8, 4]])
def test_constants_times_keys_of_each_sample_stay_as_they_are(keys: list[int]) -> None:
    rng = np.random.default_rng(0)
    constants = {"c": rng.normal(size=(2, 5, 8)).astype(np.float32), "s": np.float32(0.05), "z": np.uint8(128)}
    nodes = [
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["d", "k"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    sides = [helper.make_tensor_value_info(name, 1, dims) for name, dims in (("k", keys), ("y", [2, 5, 4]))]
    graph = helper.make_graph(nodes, "g", sides[:1], sides[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    k = torch.randn(*keys)
    before = Session(model)(k)
    read_constants_as_rows(model)
    torch.testing.assert_close(Session(model)(k), before)
