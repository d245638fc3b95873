"""ONNX files: rewrites that change no number, weights in narrow types, rounding before sums, Quant nodes."""

from itertools import product

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from quantized_nets import EXAMPLE, IMAGES, Residual, Small, quantized
from storage import STORAGES
from thinned import thinned
from torch import Tensor, nn

import jpq
from jpq.export.onnx.export import export_float, export_onnx, export_qonnx
from jpq.export.onnx.graph import fold_constants
from jpq.export.onnx.integer_kernels import prepare_integer_kernels
from jpq.export.onnx.quant_nodes import expand_quant_nodes
from jpq.export.packed.model import pack_model, unpack_model
from jpq.export.rebuild import build_from_plan
from jpq.export.runtimes import Session
from jpq.export.timing.kernels import count_kernels, find_float_layers
from jpq.export.verify import compare, difference
from jpq.plan import from_json
from jpq.tasks.models import build as make
from jpq.tracing.trace import trace
from jpq.types import JpqError


@torch.library.custom_op("onnx_test::half", mutates_args=())
def half(x: Tensor) -> Tensor:
    return x / 2


@half.register_fake
def _(x):
    return torch.empty_like(x)


class Half(nn.Module):
    """An operator that ONNX does not know."""

    def forward(self, x):
        return torch.ops.onnx_test.half(x)


def test_an_operator_that_onnx_does_not_know_is_named(tmp_path):
    with pytest.raises(JpqError, match="cannot export the operator onnx_test::half: translate it"):
        export_float(Half(), torch.rand(2, 3), tmp_path / "m.onnx")
    assert not any(tmp_path.iterdir())
    model = jpq.compress(nn.Sequential(nn.Linear(3, 4), Half(), nn.Linear(4, 2)), torch.rand(8, 3), bops="50%", steps=1)
    with pytest.raises(JpqError, match="the operator onnx_test::half"):
        export_onnx(model.finalize(), torch.rand(8, 3), tmp_path / "m.onnx")


PAIRS = list(product([Residual, Small], [8, 4, 2]))


@pytest.mark.parametrize(("kind", "bits"), thinned(PAIRS, lambda i, _: i in (0, 2, 4)))
def test_the_file_computes_the_model_and_integer_kernels_run_it(kind, bits, tmp_path):
    path = tmp_path / "m.onnx"
    for output_bits in (0, 8):
        model = quantized(kind, bits, output_bits).finalize()
        export_onnx(model, EXAMPLE, path)
        found = compare(model, Session(path, optimised=False), IMAGES)
        assert found["argmax_agreement"] >= 1 - 1 / 32
        assert found["at_a_rounding_boundary"] <= 1
        integer, left = find_float_layers(path)
        expected = {Residual: {0: 3, 8: 0}, Small: {0: 0, 8: 0}}[kind][output_bits]
        assert (integer, len(left)) == ((4 if kind is Residual else 6) - expected, expected)
        assert all("floating point" in why for why in left.values())


def graph(nodes, constants, opset=17, shape=("n", 2, 6, 6)):
    """A model of some nodes from x to y."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy")
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    made = helper.make_graph([helper.make_node(*n[:3], **n[3]) for n in nodes], "g", [x], [y], tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0.01, 2.0),
    st.integers(1, 255),
    st.sampled_from(["Relu", "Clip", None]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.floats(0.1, 8.0),
)
def test_rewrites_change_no_number(scale, top, activation, pooled, signed, flat, limit):
    """x -> (Conv) -> activation -> pooling -> grid: before and after the rewrites, to the bit."""
    signed = signed and activation is None
    zero = np.int8(0) if signed else np.uint8(0)
    top = min(top, 127) if signed else top
    low = np.int8(-top) if signed else np.uint8(0)
    constants = {
        "w": np.float32(np.eye(2)).reshape(2, 2, 1, 1),
        "s": np.float32(scale),
        "z": zero,
        "low": low,
        "top": type(zero)(top),
        "zero": np.float32(0),
        "limit": np.float32(limit),
    }
    nodes, last = [("Conv", ["x", "w"], ["conv"], {})], "conv"
    if activation:
        nodes.append((activation, [last, "zero", "limit"] if activation == "Clip" else [last], ["act"], {}))
        last = "act"
    if pooled:
        nodes.append(("MaxPool", [last], ["pool"], {"kernel_shape": [2, 2], "pads": [1, 1, 0, 0]}))
        last = "pool"
    if flat:
        nodes.append(("Flatten", [last], ["flat"], {}))
        last = "flat"
    nodes += [
        ("QuantizeLinear", [last, "s", "z"], ["q"], {}),
        ("Clip", ["q", "low", "top"], ["c"], {}),
        ("DequantizeLinear", ["c", "s", "z"], ["y"], {}),
    ]
    model = graph(nodes, constants)
    x = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0)) * 4
    before = Session(model, optimised=False)(x)
    prepare_integer_kernels(model)
    assert torch.equal(Session(model, optimised=False)(x), before)
    kinds = {t.data_type for t in model.graph.initializer}
    assert TensorProto.INT8 not in kinds  # every grid is unsigned now
    assert not any(n.op_type == "Clip" and n.input[-1] == "limit" for n in model.graph.node)


def test_constants_are_folded_and_numbers_are_not():
    nodes = [
        ("Concat", ["a", "a"], ["pads"], {"axis": 0}),
        ("Cast", ["pads"], ["wide"], {"to": TensorProto.INT64}),
        ("Pad", ["x", "wide"], ["padded"], {}),
        ("Mul", ["two", "two"], ["four"], {}),
        ("Mul", ["padded", "four"], ["y"], {}),
    ]
    model = graph(nodes, {"a": np.array([0, 0, 1, 1], np.int32), "two": np.float32(2)})
    x = torch.randn(1, 2, 6, 6)
    before = Session(model)(x)
    fold_constants(model)
    assert [n.op_type for n in model.graph.node] == ["Pad", "Mul", "Mul"]
    assert torch.equal(Session(model)(x), before)


@pytest.mark.parametrize(("bits", "weights", "kind"), [(4, "int4", "INT4"), (3, "int4", "INT4"), (2, "int2", "INT2")])
def test_narrow_weights_are_stored_narrow_and_read_the_same(bits, weights, kind, tmp_path):
    model = quantized(Residual, bits, 8).finalize()
    wide, narrow = tmp_path / "wide.onnx", tmp_path / "narrow.onnx"
    export_onnx(model, EXAMPLE, wide)
    export_onnx(model, EXAMPLE, narrow, weights)
    stored = [t for t in onnx.load(narrow).graph.initializer if t.data_type == getattr(TensorProto, kind)]
    assert sum(np.prod(t.dims) for t in stored) == 3 * 8 * 9 + 8 * 8 * 9 + 8 * 8 + 8 * 4
    share = {"INT4": 2, "INT2": 4}[kind]
    assert all(len(t.raw_data) == -(-np.prod(t.dims) // share) for t in stored)
    assert onnx.load(narrow).opset_import[0].version == {"INT4": 21, "INT2": 25}[kind]
    if weights in STORAGES:
        x = IMAGES[0][0]
        assert torch.equal(Session(wide, optimised=False)(x), Session(narrow, optimised=False)(x))
        assert count_kernels(narrow)["QLinearConv"] == count_kernels(wide)["QLinearConv"] == 3
    else:
        with pytest.raises(JpqError, match="reads ONNX files up to format"):
            Session(narrow)


def test_weights_that_need_8_bits_keep_them(tmp_path):
    export_onnx(quantized(Residual, 8).finalize(), EXAMPLE, tmp_path / "m.onnx", "int4")
    kinds = {t.data_type for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert TensorProto.UINT8 in kinds
    assert TensorProto.INT4 not in kinds
    with pytest.raises(JpqError, match="Did you mean int4"):
        export_onnx(quantized(Residual, 8).finalize(), EXAMPLE, tmp_path / "m.onnx", "int44")


def test_where_results_can_be_rounded():
    found = {layer.name: layer.output_quant_point for layer in trace(Residual().eval(), EXAMPLE).layers}
    assert (found["first"].module, found["first"].signed) == ("norm", False)  # ReLU takes negative numbers anyway
    assert (found["a"].module, found["a"].signed) == ("a", True)
    assert found["b"].module == "b"
    assert found["linear"] is None  # goes to the caller
    chain = {layer.name: layer.output_quant_point for layer in trace(Small().eval(), EXAMPLE).layers}
    assert chain["0"] is None  # the next layer rounds it
    assert (chain["5"].module, chain["5"].signed) == ("5", False)


@pytest.mark.parametrize("method", [{"method": "two-stage", "density": 0.5}, {"method": "djpq"}])
def test_rounded_results_are_part_of_the_model(method, tmp_path):
    """masked == rebuilt == saved and loaded == packed == exported, with channels gone."""
    joint = quantized(Residual, 4, 8, bops="2%", **method)
    joint.discretize()
    model = joint._dense[0]
    small, plan = jpq.rebuild(joint.net, model)
    assert {name: (end.bits, end.signed) for name, end in plan.ends.items()} == {
        "norm": (8, False),
        "a": (8, True),
        "b": (8, True),
    }
    assert difference(joint.net, small, EXAMPLE) <= 1e-9
    again = build_from_plan(from_json(plan.to_json(), "a plan"), model)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again.eval()(EXAMPLE), small(EXAMPLE))
    pack_model(small, plan, EXAMPLE, tmp_path / "m.packed")
    unpacked = unpack_model(build_from_plan(plan, model), tmp_path / "m.packed")
    assert compare(small, unpacked, IMAGES)["at_a_rounding_boundary"] <= 1
    export_onnx(small, EXAMPLE, tmp_path / "m.onnx")
    assert compare(small, Session(tmp_path / "m.onnx", optimised=False), IMAGES)["at_a_rounding_boundary"] <= 1
    grid = small.norm.results(EXAMPLE).unique()
    assert len(grid) <= 256
    assert grid.min() == 0


def test_ranges_of_results_learn():
    joint = quantized(Residual, 4, 4, method="djpq", bops="20%").train()  # in a search: then steps are fixed
    joint(EXAMPLE).sum().backward()
    ranges = [p for n, p in joint.named_parameters() if ".results." in n]
    assert len(ranges) == 3
    assert all(float(p.grad.abs()) > 0 for p in ranges)
    learns = {id(p) for group in joint.groups() for p in group["params"]}
    assert all(id(p) in learns for p in ranges)


@pytest.mark.parametrize(
    ("name", "bits", "size"),
    thinned([("convnet", 4, (1, 8, 8)), ("resnet8", 4, (3, 32, 32)), ("resnet8", 2, (3, 32, 32))], lambda i, _: i != 1),
)
def test_qonnx_counts_what_we_count(name, bits, size, tmp_path):
    cost = pytest.importorskip("qonnx.util.inference_cost", reason="qonnx is not installed")
    torch.manual_seed(0)
    x = torch.randn(4, *size)
    joint = jpq.compress(
        make(name, 10, size[0]).eval(), x, method="uniform", bops="100%", w_bits=(bits, bits), a_bits=(bits, bits)
    )
    model, path = joint.finalize(), tmp_path / "m.qonnx.onnx"
    export_qonnx(model, x, path)
    ours = jpq.measure(model, x)
    theirs = cost.inference_cost(str(path), discount_sparsity=False)["total_cost"]
    assert (theirs["total_macs"], theirs["total_bops"]) == (ours["macs"], ours["bops"])
    sparse = cost.inference_cost(str(path), discount_sparsity=True)["total_cost"]
    assert sparse["total_bops"] < ours["bops"]  # weights that happen to be zero: they are kept, and cost us


def test_quant_nodes_written_out_are_those_of_the_specification():
    node = ("Quant", ["x", "scale", "zero", "bits"], ["y"])
    for signed, narrow, low, high in ((1, 1, -3, 3), (1, 0, -4, 3), (0, 0, 0, 7), (0, 1, 0, 6)):
        options = {"signed": signed, "narrow": narrow, "rounding_mode": "ROUND", "domain": "qonnx.custom_op.general"}
        model = graph(
            [(*node, options)], {"scale": np.float32(0.5), "zero": np.float32(0), "bits": np.float32(3)}, shape=("n",)
        )
        x = torch.tensor([-9.0, -0.75, -0.3, 0.25, 0.7, 1.1, 9.0])
        assert torch.equal(Session(expand_quant_nodes(model))(x), (x / 0.5).round().clamp(low, high) * 0.5)
    odd = graph([(*node, {**options, "rounding_mode": "FLOOR"})], {"bits": np.float32(3)})
    with pytest.raises(JpqError, match="no standard form"):
        expand_quant_nodes(odd)


@pytest.mark.parametrize("bits", [1, 9, -1])
def test_output_bits_outside_are_refused(bits):
    with pytest.raises(JpqError, match="outside 2 to 8"):
        quantized(Residual, 4, bits)


@pytest.mark.parametrize("write", [export_onnx, export_qonnx])
def test_files_of_other_precisions_are_refused_in_a_sentence(write, tmp_path):
    small = quantized(Small, 4).finalize().double()
    with pytest.raises(JpqError, match=r"float64.*model\.float\(\)"):
        write(small, EXAMPLE.double(), tmp_path / "m.onnx")
    write(small.float(), EXAMPLE, tmp_path / "m.onnx")
