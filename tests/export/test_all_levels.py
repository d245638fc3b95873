"""Weights that use all levels of their widths: masked, rebuilt and exported models compute the same numbers."""

import onnx
import pytest
import torch
from onnx import TensorProto
from storage import STORAGES
from torch import nn

import jpq
from jpq.export.onnx.export import export_onnx, export_qonnx
from jpq.export.onnx.quant_nodes import expand_quant_nodes
from jpq.export.packed.batchnorm_folding import fold_batchnorms
from jpq.export.packed.file import load_packed
from jpq.export.packed.model import pack_model, unpack_model
from jpq.export.rebuild import rebuild
from jpq.export.runtimes import Session, open_session
from jpq.export.torch_export import export_pt2
from jpq.methods.quantizers import weight_quantizer
from jpq.plan import from_json
from jpq.types import JpqError

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class EveryKind(nn.Module):
    """Convolutions (plain, grouped, depthwise, transposed, 1d), a norm with negative gains, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.depthwise = nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8)
        self.up, self.signal = nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv1d(6, 6, 3)
        self.last = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.up(torch.relu(self.depthwise(torch.relu(self.grouped(x))))))
        return self.last(torch.relu(self.signal(x.flatten(2))).amax(2))


def session_at(width, **settings):
    """(session, float model) with the grids of some channels longer above zero, of others below it."""
    torch.manual_seed(0)
    model = EveryKind().eval()
    with torch.no_grad():
        model.norm.weight.mul_(torch.tensor([1.0, -1.0] * 4))
        model.norm.running_mean.normal_()
        for p in model.parameters():
            p.mul_(2)
    settings = settings or {"method": "uniform", "bops": "100%", "w_bits": (width, width), "a_bits": (8, 8)}
    return jpq.compress(model, X, **settings), model


def quantized_layers(model):
    return [m for m in model.modules() if hasattr(m, "weight_quant")]


def check_onnx(small, folder, kinds=STORAGES):
    """QCDQ files of a small model compute its numbers, bit for bit, as written and in default sessions."""
    want = small(X).detach()
    for weights in kinds:
        export_onnx(small, X, folder / "m.onnx", weights)
        for optimised in (False, True):
            assert torch.equal(Session(folder / "m.onnx", optimised=optimised)(X), want), (weights, optimised)


def check_other_forms(small, plan, folder):
    """All other forms of a small model compute its numbers, bit for bit."""
    want = small(X).detach()
    export_qonnx(small, X, folder / "q.onnx")
    session = Session(expand_quant_nodes(onnx.load(folder / "q.onnx")), optimised=False)
    assert torch.equal(torch.cat([session(X[i : i + 1]) for i in range(len(X))]), want)
    export_pt2(small, X, folder / "m.pt2")
    assert torch.equal(torch.export.load(folder / "m.pt2").module()(X), want)
    jpq.save(small, folder / "saved", plan=plan)
    assert torch.equal(jpq.load(folder / "saved")[0](X), want)
    pack_model(small, plan, X, folder / "m.packed")
    assert torch.equal(unpack_model(small, folder / "m.packed")(X), want)


@pytest.mark.parametrize("bits", [2, 3, 7, 8, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (4, 5, 6))])
def test_masked_rebuilt_and_exported_models_agree(bits, tmp_path):
    session, model = session_at(bits)
    session.discretize()
    small = session.finalize()
    assert torch.equal(session(X), small(X))
    grids = [weight_quantizer(layer) for layer in quantized_layers(small)]
    assert {int(s) for grid in grids for s in grid.side.flatten()} == {-1, 1}
    if bits < 8:
        q = torch.cat([(layer.weight / weight_quantizer(layer).scale()).flatten() for layer in quantized_layers(small)])
        assert q.round().min() < -(2 ** (bits - 1)) + 1 or q.round().max() > 2 ** (bits - 1) - 1
    plan = session.net.plan()
    assert plan.weight_levels == from_json(plan.to_json(), "text").weight_levels == "all"
    check_onnx(small, tmp_path)
    if bits in (2, 5):
        check_other_forms(small, rebuild(session.net, model)[1], tmp_path)


def test_channels_that_stay_keep_their_sides(tmp_path):
    session, model = session_at(3, bits="3/8", densities="0.5")
    session.discretize()
    small = session.finalize()
    assert torch.allclose(session(X), small(X), atol=1e-6)
    wide, narrow = session.net.quantizers("first")[0], weight_quantizer(small.first)
    assert len(narrow.side) < len(wide.side)
    rows = rebuild(session.net, model)[1].slices["first.weight"][0]
    assert torch.equal(wide.side[rows], narrow.side)
    check_onnx(small, tmp_path, ["int4"])


def test_dropped_weights_are_zero_on_every_side(tmp_path):
    session, _ = session_at(2, method="dpf", bops="100%", w_bits=(2, 2), a_bits=(8, 8), density=0.4, steps=1)
    session.discretize()
    small = session.finalize()
    assert torch.equal(session(X), small(X))
    for layer in quantized_layers(small):
        if hasattr(layer, "mask"):
            assert not weight_quantizer(layer)(layer.weight)[0][~layer.mask].any()
    check_onnx(small, tmp_path, STORAGES[-1:])


def test_openvino_computes_the_same_numbers(tmp_path):
    pytest.importorskip("openvino", reason="openvino is not installed")
    small = session_at(3)[0].finalize()
    for weights in ("int8", "int4"):
        export_onnx(small, X, tmp_path / "m.onnx", weights)
        torch.testing.assert_close(open_session("openvino", tmp_path / "m.onnx", 1)(X), small(X), rtol=0.05, atol=0.02)


def test_two_bit_weights_are_stored_in_int2_whatever_their_side(tmp_path):
    small = session_at(2)[0].finalize()
    export_onnx(small, X, tmp_path / "m.onnx", "int2")
    stored = [t.data_type for t in onnx.load(tmp_path / "m.onnx").graph.initializer]
    assert stored.count(TensorProto.INT2) == len(quantized_layers(small))


def test_all_levels_take_no_room_in_a_packed_file(tmp_path):
    """The side is the sign of a channel's scale: the streams are as long as those of narrow ranges."""
    sizes = {}
    for levels in ("all", "narrow"):
        session, model = session_at(
            3, method="uniform", bops="100%", w_bits=(3, 3), a_bits=(8, 8), weight_levels=levels
        )
        small = session.finalize()
        stored = pack_model(small, rebuild(session.net, model)[1], X, tmp_path / levels)
        sizes[levels] = stored.layers, stored.others
    assert sizes["all"][0] == sizes["narrow"][0]
    _, tensors = load_packed(tmp_path / "all")
    assert any(bool((t < 0).any()) for name, t in tensors.items() if name.endswith("first.scale"))


def test_folding_a_norm_with_negative_gains_mirrors_the_grid():
    session, model = session_at(2)
    session.discretize()
    session.net.eval()
    session.net.model.norm.weight.data.mul_(torch.tensor([1.0, -1.0] * 4))
    small, _ = rebuild(session.net, model)
    folded = fold_batchnorms(small.double(), X.double())
    before, after = weight_quantizer(small.first).side, weight_quantizer(folded.first).side
    assert torch.equal(after.flatten(), before.flatten() * small.norm.weight.sign().to(torch.int8))
    torch.testing.assert_close(folded(X.double()), small(X.double()))


def test_narrow_levels_are_those_of_version_0_1():
    session, _ = session_at(3, method="uniform", bops="100%", w_bits=(3, 3), a_bits=(8, 8), weight_levels="narrow")
    plan = session.discretize()
    assert plan.weight_levels == "narrow"
    assert "weight_levels" not in plan.to_json()
    small = session.finalize()
    for layer in quantized_layers(small):
        assert (layer.weight / weight_quantizer(layer).scale()).abs().max() <= 3
    old = {name: t for name, t in small.state_dict().items() if not name.endswith(".side")}
    other = session_at(3)[0].finalize()
    other.load_state_dict(old)  # a state of version 0.1 in a model with all levels
    assert torch.equal(other(X), small(X))


def test_other_levels_are_refused():
    with pytest.raises(JpqError, match="weight_levels"):
        session_at(3, bops="100%", weight_levels="most")
    plan = session_at(3)[0].discretize().to_json().replace('"weight_levels": "all"', '"weight_levels": 3')
    with pytest.raises(JpqError, match="not a plan"):
        from_json(plan, "text")
