"""Calls that torch.onnx does not know, and sizes that it freezes: files take any batch and compute the same."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import jpq
from jpq.export.onnx.example_values import computes_example
from jpq.export.onnx.export import export_float
from jpq.export.onnx.written_out_calls import WrittenOutCalls
from jpq.export.runtimes import Session
from jpq.tracing.shrink import remove_channels
from jpq.tracing.sites import channels
from jpq.tracing.trace import trace
from jpq.types import JpqError

CALLS = {
    "unflatten": lambda x: x.unflatten(1, (-1, 2)),
    "torch.unflatten": lambda x: torch.unflatten(x, -2, (2, -1)),
    "nn.Unflatten": nn.Unflatten(1, (4, 2)),
    "unflatten of the batch": lambda x: F.relu(x.flatten(0, 1)).unflatten(0, (-1, 8)),
    "rms_norm": lambda x: F.rms_norm(x, (6, 6), eps=1e-3),
    "nn.RMSNorm": nn.RMSNorm(6),
    "nn.ChannelShuffle": nn.ChannelShuffle(2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 4),
    **{f"rot90 by {k}": lambda x, k=k: torch.rot90(x, k, (2, 3)) for k in range(-1, 5)},
    "mT": lambda x: x.mT,
    "rot90": lambda x: x.rot90(dims=(3, 1)),
    "nn.Threshold": nn.Threshold(0.3, -2.0),
    "nn.Bilinear": lambda x: F.bilinear(x, x * 2, torch.arange(72).to(x).reshape(2, 6, 6) / 36, torch.ones(2).to(x)),
    "fold": lambda x: F.fold(F.unfold(x, 3, padding=1, stride=2), (6, 6), 3, padding=1, stride=2),
    **{
        f"adaptive {kind} pool to {size}": lambda x, f=f, size=size: f(x, size)
        for kind, f in (("mean", F.adaptive_avg_pool2d), ("max", F.adaptive_max_pool2d))
        for size in (1, 2, 4, (None, 5), (1, 3))
    },
    "adaptive pool of a signal": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 7),
    "adaptive pool of a volume": lambda x: F.adaptive_max_pool3d(x.unsqueeze(1), (4, 3, 1)),
    "adaptive pool of a reshape": lambda x: F.adaptive_avg_pool2d(
        x.flatten(2).reshape(x.shape[0], -1, *x.shape[2:]), 2
    ),
    "average by a divisor": nn.AvgPool2d(2, divisor_override=3),
    "average by a divisor, padded": nn.AvgPool2d((3, 2), (2, 3), 1, divisor_override=5),
    "average by a divisor, larger": nn.AvgPool2d(3, 2, 1, ceil_mode=True, divisor_override=4),
    "average by a divisor, window behind the end": nn.AvgPool2d(1, 5, ceil_mode=True, divisor_override=4),
    "average of a volume by a divisor": lambda x: F.avg_pool3d(x[:, None], 2, ceil_mode=True, divisor_override=3),
    **{
        f"pool over the whole image, {name}": call
        for name, call in {
            "shape": lambda x: F.avg_pool2d(x, x.size()[2:]),
            "one size": lambda x: F.avg_pool2d(x, x.size(2)),
            "keyword": lambda x: F.avg_pool2d(x, kernel_size=x.shape[-2:]),
            "maximum": lambda x: F.max_pool2d(x, kernel_size=(x.size(2), x.size(3))),
            "padded": lambda x: F.avg_pool2d(x, x.size()[2:], padding=1),
            "signal": lambda x: F.avg_pool1d(x.flatten(2), x.size(2) * x.size(3)),
            "maximum of a signal": lambda x: F.max_pool1d(x.flatten(2), x.size(2) * x.size(3)),
        }.items()
    },
    "pool by half of the size": lambda x: F.avg_pool2d(x, x.size(2) // 2, stride=x.size(3) // 3),
    "windows by half of the size": lambda x: F.unfold(x, x.size(2) // 2, stride=x.size(2) // 2),
    "layer_norm by shape": lambda x: F.layer_norm(x, x.shape[1:]),
    "instance_norm of unknown channels": lambda x: F.instance_norm(F.unfold(x, 3).view(-1, 8, 9, 16)),
    "nn.InstanceNorm1d": lambda x: nn.InstanceNorm1d(72)(F.unfold(x, 3)),
    "interpolate by area": lambda x: F.interpolate(x, scale_factor=0.5, mode="area"),
    "interpolate by area to a size": lambda x: F.interpolate(x, size=(4, 9), mode="area"),
    "interpolate to the nearest": lambda x: F.interpolate(x, scale_factor=1.7, mode="nearest-exact"),
    "interpolate to the nearest of a size": lambda x: F.interpolate(x, size=(4, 9), mode="nearest-exact"),
    "interpolate to the nearest of equally near ones": lambda x: F.interpolate(x, size=(37, 47), mode="nearest-exact"),
    "softplus with a threshold": nn.Softplus(2.0, 0.5),
    "floor division": lambda x: x // 0.7 + torch.floor_divide(x, 0.3) + x.floor_divide(-0.4),
    "distance by p = 1": lambda x: torch.cdist(x, x.flip(1), p=1.0),
    "distance by p = 3": lambda x: torch.cdist(x, x.flip(1), p=3.0),
    "largest distance": lambda x: torch.cdist(x, x.flip(1), p=float("inf")),
    "inner": lambda x: torch.inner(x, torch.arange(36).to(x).reshape(6, 6) / 36),
    "addmv": lambda x: torch.addmv(x[0, 0, 0], x[0, 0], x[0, 0, 1], beta=0.5, alpha=2),
    "addbmm": lambda x: torch.addbmm(x[0, 0], x[0], x[0].mT, alpha=0.5),
    "addr": lambda x: torch.addr(x[0, 0], x[0, 0, 0], x[0, 0, 1], beta=2),
    "multi_dot": lambda x: torch.linalg.multi_dot([x[0, 0], x[0, 1], x[0, 2]]),
    "diag": lambda x: torch.diag(x[0, 0]) + torch.diag(x[0, 0, 0]).sum(0),
    "diag_embed": lambda x: torch.diag_embed(x[:, 0]).sum(-1),
    "fill_diagonal_": lambda x: x @ torch.zeros(6, 6).to(x).fill_diagonal_(-5.0),
    "parts of numbers": lambda x: (x * 3).trunc() + (x * 3).frac() * 2 + torch.fix(x * 5),
    "exponentials": lambda x: (
        torch.expm1(x) + torch.exp2(x) + x.sinh() + torch.cosh(x) + torch.asinh(x) + torch.erfc(x)
    ),
    "sinc": lambda x: torch.sinc(F.relu(x)),
    "xlogy, hypot": lambda x: torch.xlogy(F.relu(x), x.abs() + 1) + torch.hypot(x, x + 1),
    "heaviside": lambda x: torch.heaviside(F.relu(x), torch.full((1,), 0.5).to(x)),
    "addcdiv": lambda x: torch.addcdiv(x, x, x.abs() + 1, value=0.5),
    "logaddexp": lambda x: torch.logaddexp(x * 50, x + 1),
    "logaddexp of nothing": lambda x: torch.logaddexp(
        torch.where(x < 0, -torch.inf, x), torch.where(x < 0.5, -torch.inf, 1 - x)
    ),
    "nansum": lambda x: torch.where(x > 0, x, torch.full_like(x, torch.nan)).nansum(-1),
    "diff": lambda x: torch.diff(x, dim=2) + x.diff(n=2, dim=2, prepend=x[:, :, :1]),
    "column_stack, ravel": lambda x: torch.column_stack([x[0, 0].ravel(), x[0, 1].ravel()]),
    "fliplr, flipud": lambda x: x.fliplr() + torch.flipud(x[0]),
    "adjoint": lambda x: x.adjoint() + x.mH,
    "degrees": lambda x: torch.deg2rad(x) + torch.rad2deg(x).sgn(),
    "unpool": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "unpool to a size": lambda x: F.max_unpool2d(
        *F.max_pool2d(x, (3, 2), (2, 3), padding=1, return_indices=True), (3, 2), (2, 3), 1, output_size=x.size()
    ),
    "unpool a signal": lambda x: F.max_unpool1d(*F.max_pool1d(x.flatten(2), 3, return_indices=True), 3),
    "unpool a volume": lambda x: F.max_unpool3d(*F.max_pool3d(x[:, None], 2, return_indices=True), 2),
    "affine_grid": lambda x: F.grid_sample(x, F.affine_grid(x[:, 0, :2, :3], x.shape, False), align_corners=False),
    "affine_grid of corners": lambda x: F.grid_sample(
        x, F.affine_grid(x[:, 1, :2, 1:4], [*x.shape[:2], 5, 1], align_corners=True), align_corners=True
    ),
    "affine_grid of a volume": lambda x: F.affine_grid(x[:, 2, :3, :4], [x.shape[0], 1, 4, 3, 5], align_corners=False),
    "fold, not square": lambda x: F.fold(F.unfold(x, (2, 3), dilation=(1, 2)), (6, 6), (2, 3), dilation=(1, 2)),
}


class Called(nn.Module):
    """A call, and zeros of its result's size."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        y = self.call(x)
        return y + torch.zeros_like(y)


@pytest.mark.parametrize("call", [F.hardswish, F.hardsigmoid, nn.Hardswish(inplace=True), nn.Hardsigmoid(inplace=True)])
def test_hard_activations_are_the_same_to_the_bit(call, tmp_path):
    x = 4 * torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    export_float(Called(lambda v: call(v + 0.1)), x[:2], tmp_path / "m.onnx")
    for optimised in (False, True):
        assert torch.equal(Session(tmp_path / "m.onnx", optimised=optimised)(x), call(x + 0.1))


@pytest.mark.parametrize("name", CALLS)
def test_a_file_computes_the_call_for_any_batch(name, tmp_path):
    model = Called(CALLS[name]).eval()
    export_float(model, torch.randn(2, 8, 6, 6), tmp_path / "m.onnx")
    session = Session(tmp_path / "m.onnx")
    for batch in (1, 5):
        x = torch.randn(batch, 8, 6, 6)
        torch.testing.assert_close(session(x), model(x), rtol=1e-5, atol=1e-5)
        with WrittenOutCalls():
            torch.testing.assert_close(model.double()(x.double()), Called(CALLS[name]).double().eval()(x.double()))
        model.float()


def test_attention_before_a_recurrent_layer_leaves_the_batch_free(tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.recurrent, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.recurrent(self.attention(x, x, x)[0])[0][:, -1])

    torch.manual_seed(0)
    example = torch.randn(2, 5, 8)
    small = jpq.compress(jpq.decompose(Mixed().eval(), example), example, bops="20%", steps=1).finalize()
    jpq.export_onnx(small, example, tmp_path / "m.onnx")
    x = torch.randn(7, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(Session(tmp_path / "m.onnx")(x), small(x), rtol=1e-3, atol=1e-3)


def test_nothing_is_printed_where_an_export_fails(capfd, tmp_path):
    model = Called(lambda x: torch.fft.rfft(x).abs())
    with pytest.raises(JpqError, match="fft_rfft"):
        export_float(model, torch.randn(1, 2, 3, 3), tmp_path / "m.onnx")
    assert capfd.readouterr().out == ""


class OfEachSample(nn.Module):
    """A convolution whose weight is mixed for each sample (CondConv, WeightNet)."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts, self.out = (
            nn.Linear(3, 4),
            nn.Parameter(torch.randn(4, 8, 3, 3, 3)),
            nn.Conv2d(8, 2, 1),
        )

    def forward(self, x):
        shares = self.gate(x.mean((2, 3))).softmax(1)
        weight = torch.einsum("bk,koihw->boihw", shares, self.experts).reshape(-1, 3, 3, 3)
        y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight, padding=1, groups=x.shape[0])
        return self.out(F.relu(y.view(x.shape[0], 8, *x.shape[2:])))


def test_a_convolution_with_a_weight_of_each_sample_takes_one_at_a_time(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    small = jpq.compress(OfEachSample(), x, "uniform", bops="90%", steps=1).finalize()
    with pytest.warns(UserWarning, match="takes one sample at a time"):
        jpq.export_onnx(small, x, tmp_path / "m.onnx")
    torch.testing.assert_close(Session(tmp_path / "m.onnx")(x[:1]), small(x[:1]), rtol=1e-4, atol=1e-4)


class ChangedParts(nn.Module):
    """Channels of which code changes a part in place, by a call of its own."""

    def __init__(self, change) -> None:
        super().__init__()
        self.a, self.b, self.change = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), change

    def forward(self, x):
        y = self.a(x)
        self.change(y)
        return self.b(y)


def double_nested(y):
    part = y[:, 2:6]
    part[:, 1] *= 2
    part += 1


CHANGES = {
    "slice": lambda y: y[:, 2:5].mul_(2.0),
    "activation": lambda y: F.relu(y[:, :4], inplace=True),
    "narrow": lambda y: y.narrow(1, 2, 3).sigmoid_(),
    "select": lambda y: y.select(-3, 2).add_(1.0),
    "last": lambda y: y[..., :2].clamp_(0, 1),
    "nested": double_nested,
    "copied": lambda y: y[:, :3].copy_(y[:, 5:] * 2),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_parts_that_are_changed_in_place(name, tmp_path):
    x = torch.randn(2, 3, 6, 6)
    model = ChangedParts(CHANGES[name]).eval()
    network = trace(model, x)
    dropped = [int(site.labels[0]) for site in channels(network) if site.n > 1]
    for net in (model, remove_channels(model, network, dropped)):
        export_float(net, x, tmp_path / "m.onnx")
        for batch in (x, torch.randn(3, 3, 6, 6)):
            torch.testing.assert_close(Session(tmp_path / "m.onnx")(batch), net(batch), rtol=1e-4, atol=1e-5)
    assert dropped or name not in ("slice", "activation", "narrow", "last"), "calls with other sizes were tried"


class Lost(nn.Module):
    """A change in place of a tensor that torch.onnx takes for one that shares no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.a(x)
        y.diagonal(0, 2, 3).mul_(2.0)
        return self.b(y)


def test_a_file_that_loses_a_change_in_place_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="m.onnx does not compute what the model does, not even for the example"):
        export_float(Lost().eval(), torch.randn(2, 3, 6, 6), tmp_path / "m.onnx")
    small = jpq.compress(Lost().eval(), torch.randn(2, 3, 6, 6), bops="50%", steps=1).finalize()
    with pytest.warns(UserWarning, match="not even for the example"):
        jpq.export_onnx(small, torch.randn(2, 3, 6, 6), tmp_path / "m.onnx")


class Noisy(nn.Module):
    """A layer whose outputs are other ones at every run, or of which one is no number."""

    def __init__(self, factor) -> None:
        super().__init__()
        self.a, self.factor = nn.Linear(4, 4), factor

    def forward(self, x):
        return self.a(x) * self.factor(x)


@pytest.mark.parametrize("factor", [torch.randn_like, lambda x: torch.log(x - x.amin())], ids=["random", "infinite"])
def test_files_of_random_and_infinite_numbers_are_not_warned_of(factor, tmp_path):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        export_float(Noisy(factor).eval(), torch.randn(3, 4), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").exists()
    assert [str(w.message) for w in told] == []


class Rounded(nn.Module):
    """A layer between two roundings, whose outputs all lie at the boundaries of the second."""

    def __init__(self, scale=1.0) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.layer.weight.data = 0.5 * scale * torch.eye(4)

    def forward(self, x):
        return self.layer(x.round()).round()


def test_values_at_rounding_boundaries_of_inner_layers_are_no_lost_code(tmp_path):
    x = torch.tensor([[1.1, 3.1, -0.9, 5.1]]).repeat(16, 1)
    export_float(Rounded(1 + 1e-6).eval(), x, tmp_path / "m.onnx")
    assert not torch.equal(Session(tmp_path / "m.onnx")(x), Rounded()(x)), "the file rounds other values up"
    assert computes_example(tmp_path / "m.onnx", Rounded().eval(), (x,), {})
    assert not computes_example(tmp_path / "m.onnx", Rounded(3).eval(), (x,), {}), "the model computes another thing"
