"""Storage of weights: uint8 around 128, exact also where processors add products of uint8 and int8 in 16 bits.

Kernels are emulated in numpy: those of the machine at hand show only what its own processor does.
"""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from quantized_nets import EXAMPLE, IMAGES, Residual, Small, quantized
from storage import STORAGES
from torch import nn
from zoo import ZOO

import jpq
from jpq.export.onnx.export import export_onnx
from jpq.export.onnx.graph import Graph
from jpq.export.onnx.integer_kernels import UINT8_MIDDLE, prepare_integer_kernels
from jpq.export.onnx.narrow_weights import store_narrow_weights
from jpq.export.onnx.twice_rounded_weights import round_weights_twice
from jpq.export.runtimes import Session
from jpq.export.timing.kernels import find_float_layers
from jpq.export.verify import compare


class Upsampling(nn.Sequential):
    """A transposed convolution between two convolutions."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), nn.Conv2d(6, 4, 1)
        )


def products_in_16_bits(x, weight):
    """uint8 [M, K] times int8 [K, N] by vpmaddubsw: pairs of products are added with saturation at 16 bits."""
    if x.shape[1] % 2:
        x, weight = np.pad(x, ((0, 0), (0, 1))), np.pad(weight, ((0, 1), (0, 0)))
    products = x[:, :, None].astype(np.int64) * weight[None].astype(np.int64)
    return np.clip(products[:, 0::2] + products[:, 1::2], -(2**15), 2**15 - 1).sum(1)


def products_in_32_bits(x, weight, zero_point):
    """uint8 [M, K] times uint8 [K, N] by vpmaddwd: both widened to 16 bits, pairs of products added in 32."""
    products = x.astype(np.int16)[:, :, None].astype(np.int32) * weight.astype(np.int16)[None].astype(np.int32)
    return products.sum(1) - zero_point * x.astype(np.int32).sum(1, keepdims=True)


def stored_weights(path):
    """(integers, zero points, output) of each DequantizeLinear of a constant in a file."""
    graph = Graph(onnx.load(path))
    nodes = [n for n in graph.proto.node if n.op_type == "DequantizeLinear" and n.input[0] in graph.constants]
    return [(graph.array(n.input[0]), graph.array(n.input[2]), n.output[0]) for n in nodes]


@pytest.fixture(scope="module")
def full_range(tmp_path_factory):
    """(file, integers of the linear layer's weight [N, K] in uint8): one layer at 8 bits on inputs in [0, 1]."""
    torch.manual_seed(0)
    path, x = tmp_path_factory.mktemp("storage") / "m.onnx", torch.rand(16, 32)
    session = jpq.compress(
        nn.Sequential(nn.Linear(32, 8)).eval(), x, method="uniform", bops="100%", w_bits=(8, 8), a_bits=(8, 8)
    )
    export_onnx(session.finalize(), x, path)
    ((integers, zero_points, _),) = stored_weights(path)
    assert (zero_points == UINT8_MIDDLE).all()
    return path, integers


def test_16_bits_saturate_the_old_storage_and_leave_the_new_one_exact(full_range):
    _, stored = full_range
    assert stored.dtype == np.uint8
    assert (stored.min() == 1) or (stored.max() == 255)  # the range is used in full
    weight = stored.astype(np.int64).T - UINT8_MIDDLE
    x = np.random.default_rng(0).integers(0, 256, (64, 32)).astype(np.uint8)
    exact = x.astype(np.int64) @ weight
    assert (products_in_16_bits(x, weight.astype(np.int8)) != exact).mean() > 0.05
    assert (products_in_32_bits(x, stored.T, UINT8_MIDDLE) == exact).all()
    assert (products_in_16_bits(x // 2, weight.astype(np.int8)) == x.astype(np.int64) // 2 @ weight).all()  # 7 bits fit


def test_the_emulated_layer_is_the_file_and_the_default_session(full_range):
    path, stored = full_range
    graph = Graph(onnx.load(path))
    quantize = next(n for n in graph.proto.node if n.op_type == "QuantizeLinear")
    dequantize = next(n for n in graph.proto.node if n.op_type == "DequantizeLinear" and n.input[0] in graph.constants)
    scale, zero = (graph.array(name) for name in quantize.input[1:3])
    bias = next(numpy_helper.to_array(t) for t in graph.proto.initializer if t.name.endswith("bias"))
    x = torch.rand(64, 32, generator=torch.Generator().manual_seed(1))
    integers = np.clip(np.rint(x.numpy() / scale) + zero, 0, 255).astype(np.uint8)
    sums = products_in_32_bits(integers, stored.T, UINT8_MIDDLE)
    sums -= int(zero) * (stored.T.astype(np.int32) - UINT8_MIDDLE).sum(0)
    expected = torch.from_numpy((sums * scale * graph.array(dequantize.input[1]) + bias).astype(np.float32))
    for optimised in (False, True):
        torch.testing.assert_close(Session(path, optimised=optimised)(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Residual", "Small", "Upsampling", "tokens", "grouped", "transposed", "volume"])
def test_no_weight_is_stored_in_signed_8_bits(name, tmp_path):
    nets = {net.__name__: (net, EXAMPLE) for net in (Residual, Small, Upsampling)}
    kind, example = nets[name] if name in nets else ZOO[name]
    torch.manual_seed(0)
    session = jpq.compress(kind().eval(), example, method="uniform", bops="100%", w_bits=(8, 8), a_bits=(8, 8))
    export_onnx(session.finalize(), example, tmp_path / "m.onnx")
    assert TensorProto.INT8 not in {t.data_type for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    weights = stored_weights(tmp_path / "m.onnx")
    assert weights
    assert all(integers.dtype == np.uint8 and (zero == UINT8_MIDDLE).all() for integers, zero, _ in weights)


def weight_model(integers, scale, zero_points, axis, op, **options):
    """An ONNX model of one layer without bias whose weight is dequantized: x -> op(x, DequantizeLinear(integers))."""
    constants = {"w": integers, "s": np.float32(scale), "z": zero_points}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["dw"], **({} if axis is None else {"axis": axis})),
        helper.make_node(op, ["x", "dw"], ["y"], **options),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["Conv", "ConvTranspose", "MatMul"]),
    st.booleans(),
    st.sampled_from([1, 8, 16]),
    st.integers(-3, 3),
    st.sampled_from(STORAGES),
)
def test_storage_changes_no_number(op, per_channel, factor, zero, weights):
    """int8 around any zero point before, uint8 or fewer bits after: the same outputs, to the bit."""
    rng = np.random.default_rng(0)
    size = (6, 6) if op == "MatMul" else (6, 6, 2, 2)
    axis = 0 if op == "Conv" else 1
    integers = (rng.integers(-128 // factor, 127 // factor + 1, size) * factor).astype(np.int8)
    scale, zero_points = rng.uniform(0.01, 1, 6), np.full(6, zero, np.int8)
    options = {} if op == "MatMul" else {"kernel_shape": [2, 2]}
    if not per_channel:
        axis, scale, zero_points = None, scale[0], zero_points[0]
    model = weight_model(integers, scale, zero_points, axis, op, **options)
    x = torch.randn(3, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    before = Session(model, optimised=False)(x)
    prepare_integer_kernels(model)
    model = store_narrow_weights(model, weights)
    round_weights_twice(model)
    assert torch.equal(Session(model, optimised=False)(x), before)
    kinds = {t.data_type for t in model.graph.initializer}
    assert TensorProto.INT8 not in kinds
    if weights == "int4" and factor == 16 and zero == 0:
        assert TensorProto.INT4 in kinds
    twice = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}[op]  # second roundings, for OpenVINO
    assert [n.op_type for n in model.graph.node].count("QuantizeLinear") == twice


def test_weights_that_a_graph_inside_a_node_reads_stay_for_it():
    integers = np.arange(-18, 18, dtype=np.int8).reshape(6, 6)
    model = weight_model(integers, 0.5, np.int8(0), None, "MatMul")
    inner = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Cast", ["w"], ["inner"], to=1)], "branch", [], [inner])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "condition"))
    model.graph.node.append(helper.make_node("If", ["condition"], ["raw"], then_branch=branch, else_branch=branch))
    model.graph.output.append(helper.make_tensor_value_info("raw", TensorProto.FLOAT, None))
    x = torch.randn(2, 6)
    before = Session(model, optimised=False)(x)
    prepare_integer_kernels(model)
    store_narrow_weights(model, "int8")
    round_weights_twice(model)
    after = Session(model, optimised=False)(x)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert {t.name: t.data_type for t in model.graph.initializer}["w"] == TensorProto.INT8  # the inner graph's
    assert [t.data_type for t in model.graph.initializer].count(TensorProto.UINT8) == 2  # weights and their zero point


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_transposed_convolutions_agree_in_both_runtimes(weights, tmp_path):
    pytest.importorskip("openvino", reason="openvino is not installed")
    from jpq.export.runtimes import open_session

    path = tmp_path / "m.onnx"
    bits = 4 if weights == "int4" else 8
    model = quantized(Upsampling, bits).finalize()
    export_onnx(model, EXAMPLE, path, weights)
    for session in (Session(path, optimised=False), Session(path), open_session("openvino", path, 1)):
        assert compare(model, session, IMAGES)["largest_relative_difference"] < 3 / 2**bits  # of a few crossings
    assert find_float_layers(path)[0] >= 1
