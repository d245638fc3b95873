"""Calls that torch.onnx does not know, and sizes that it freezes: files take any batch and compute the same."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import jpq
from jpq.export.onnx.export import export_float
from jpq.export.onnx.written_out_calls import WrittenOutCalls
from jpq.export.runtimes import Session
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
    model = Called(lambda x: F.affine_grid(torch.eye(2, 3)[None], [1, *x.shape[1:]]))
    with pytest.raises(JpqError, match="affine_grid"):
        export_float(model, torch.randn(1, 2, 3, 3), tmp_path / "m.onnx")
    assert capfd.readouterr().out == ""
