"""What no file can hold is said before training; norms that torch.onnx lacks are exported; warnings and --strict."""

import copy

import pytest
import torch
from torch import nn

import jpq
from jpq.config import Run
from jpq.export.onnx.export import export_onnx
from jpq.export.onnx.plain_norms import replace_norms
from jpq.export.runtimes import Session
from jpq.export.trial_export import check_exportable
from jpq.export.verify import METRIC_DIFFERS, compare, compare_metrics
from jpq.results.record import Result
from jpq.tasks import CLASSIFICATION
from jpq.types import JpqError

EXAMPLE = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Fourier(nn.Module):
    """A filter in the frequency domain, which ONNX has no operators for."""

    def forward(self, x):
        return torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=x.shape[-2:])


def net(middle):
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return nn.Sequential(nn.Conv2d(3, 16, 3), middle, nn.ReLU(), *head).eval()


def try_export(middle, formats=()):
    model = net(middle)
    session = jpq.compress(model, EXAMPLE, bops="10%", steps=1)
    check_exportable(session.net, model, EXAMPLE, formats, "int8")
    return session


@pytest.mark.parametrize("formats", [(), ("qonnx", "pt2")])
def test_an_ordinary_model_passes(formats):
    session = try_export(nn.BatchNorm2d(16), formats)
    assert session.share() > 0.0, "the session can still be trained"


def test_what_onnx_lacks_is_one_sentence():
    with pytest.raises(JpqError, match=r"torch\.onnx cannot export the operator aten::fft_rfft2"):
        try_export(Fourier())


def test_what_the_exporter_raises_is_one_sentence():
    class BatchWide(nn.Module):
        def forward(self, x):
            return nn.functional.instance_norm(x, torch.zeros(16), torch.ones(16), use_input_stats=False)

    with pytest.raises(JpqError, match=r"torch\.onnx cannot export this model \("):
        try_export(BatchWide())


@pytest.mark.parametrize(
    ("norm", "output_bits"),
    [
        (nn.BatchNorm2d(16, track_running_stats=False), 8),
        (nn.BatchNorm2d(16, affine=False, track_running_stats=False), 0),
        (nn.InstanceNorm2d(16, affine=True, track_running_stats=True), 8),
        (nn.InstanceNorm2d(16, track_running_stats=True), 0),
    ],
    ids=str,
)
def test_norms_without_a_translation_are_exported(norm, output_bits, tmp_path):
    torch.manual_seed(0)
    norm = copy.deepcopy(norm)
    for tensor in (*norm.parameters(), *(b for b in norm.buffers() if b.dim())):
        tensor.data.uniform_(0.5, 1.5)
    model = net(norm)
    plain = copy.deepcopy(model).double()
    replace_norms(plain)
    assert type(plain[1]) is not type(norm)
    torch.testing.assert_close(plain(EXAMPLE.double()), copy.deepcopy(model).double()(EXAMPLE.double()))
    small = jpq.compress(model, EXAMPLE, method="uniform", bops="10%", output_bits=output_bits).finalize()
    export_onnx(small, EXAMPLE, tmp_path / "m.onnx")
    found = compare(small, Session(tmp_path / "m.onnx"), [(EXAMPLE, None)])
    assert found["largest_relative_difference"] < 1e-2


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 2), (4, 3), (2, 1)])
def test_same_padding_is_written_in_numbers(kernel, dilation, tmp_path):
    """torch puts the larger half of an odd padding behind, which a file that does otherwise would shift."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, kernel, padding="same", dilation=dilation), nn.ReLU(), nn.Conv2d(4, 4, 1))
    small = jpq.compress(model.eval(), EXAMPLE, method="uniform", bops="100%", w_bits=(8, 8), a_bits=(8, 8)).finalize()
    export_onnx(small, EXAMPLE, tmp_path / "m.onnx")
    for optimised in (False, True):
        session = Session(tmp_path / "m.onnx", optimised=optimised)
        assert compare(small, session, [(EXAMPLE, None)])["largest_relative_difference"] == 0


class Batches(list):
    """Batches with the number of their samples."""

    size = 1000


def test_a_file_that_is_right_less_often_is_warned_of(tmp_path):
    small = jpq.compress(net(nn.BatchNorm2d(16)), EXAMPLE, method="uniform", bops="10%").finalize()
    export_onnx(small, EXAMPLE, tmp_path / "m.onnx")
    x = torch.randn(1000, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        batches = Batches([(x, small(x).argmax(1))])
    assert compare_metrics(small, tmp_path / "m.onnx", batches, CLASSIFICATION) == {"file": 1.0, "model": 1.0}
    other = copy.deepcopy(small)
    other[-1].bias.data[0] += 0.05 * float(small(x).abs().max().detach())
    record = compare_metrics(other, tmp_path / "m.onnx", batches, CLASSIFICATION)
    assert abs(record["file"] - record["model"]) > METRIC_DIFFERS
    assert "accuracy 1, the PyTorch model" in record["warning"]


def test_outputs_of_an_unknown_task_are_compared_by_distance():
    """Of an image only the largest channel changes its place here: no class, and within a tenth of the range."""
    a = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 5
    found = compare(lambda x: a, lambda x: a.flip(1), [(torch.zeros(2, 1), None)])
    assert found["decisions"] == 2
    found = compare(lambda x: a, lambda x: a + 0.01 * torch.randn(2, 3, 8, 8), [(torch.zeros(2, 1), None)])
    assert found["argmax_differs"] == 0
    scores = torch.eye(4)
    assert compare(lambda x: scores, lambda x: scores.flip(1), [(torch.zeros(4, 1), None)])["argmax_differs"] == 4


def test_strict_changes_no_hash():
    assert jpq.Config(run=Run(strict=True)).hash() == jpq.Config().hash()


def test_warnings_of_files_are_found_in_a_result():
    result = object.__new__(Result)
    object.__setattr__(result, "verified", {"metric": {"file": 0.5, "model": 0.6, "warning": "a"}, "warning": "b"})
    assert result.file_warnings == ("a", "b")
    object.__setattr__(result, "verified", {"metric": {"file": 0.5, "model": 0.5}})
    assert result.file_warnings == ()
