"""Comparison of two models: decisions by the task, rounding boundaries, and the limits beyond which it raises."""

import pytest
import torch
from regression import Regression
from torch import nn

import jpq
from jpq.export import verify
from jpq.export.onnx.export import export_onnx
from jpq.tasks import CLASSIFICATION
from jpq.types import JpqError


def constant(*rows):
    """A model that gives these rows, whatever the input."""
    return lambda x: torch.tensor(rows)


BATCH = [(torch.zeros(2, 1), None)]
A = constant([1.0, 0.0], [0.0, 2.0])


def test_decisions_gaps_and_boundaries_are_counted():
    found = verify.compare(A, constant([1.0, 0.001], [1.0, 0.5]), BATCH)
    assert found == {
        "images": 2,
        "decisions": 2,
        "argmax_agreement": 0.5,
        "argmax_differs": 1,
        "at_a_rounding_boundary": 1,  # 0.001 of 2 is below the threshold
        "largest_relative_difference": pytest.approx(0.75),
        "largest_gap_where_argmax_differs": pytest.approx(1.0),
    }


def test_agreement_is_the_tasks():
    """Another class in the first sample, though every number is within a tenth of the largest."""
    a, b = constant([1.0, 0.9], [0.0, 2.0]), constant([0.85, 0.9], [0.0, 2.1])
    assert verify.compare(a, b, BATCH)["argmax_differs"] == 1
    assert verify.compare(a, b, BATCH, Regression())["argmax_differs"] == 0


def test_every_output_tensor_is_compared():
    def both(x):
        return torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[0.0, 1.0]] * 2)

    def swapped(x):
        return tuple(reversed(both(x)))

    found = verify.compare(both, swapped, BATCH)
    assert (found["images"], found["decisions"], found["argmax_differs"]) == (2, 4, 4)


def test_nan_in_one_of_two_models_is_a_difference_and_equal_infinities_are_none():
    minus_inf = float("-inf")
    a, b = constant([1.0, minus_inf], [0.0, 2.0]), constant([1.0, minus_inf], [float("nan"), 2.0])
    found = verify.compare(a, a, BATCH)
    assert (found["at_a_rounding_boundary"], found["largest_relative_difference"]) == (0, 0.0)
    found = verify.compare(a, b, BATCH)
    assert (found["at_a_rounding_boundary"], found["largest_relative_difference"]) == (1, float("inf"))


class Two(nn.Module):
    """Two outputs, the second times a number."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return x, x * self.number


def test_a_second_output_that_is_nan_is_refused():
    assert verify.difference(Two(1.0), Two(1.0), torch.ones(2, 3)) == 0
    assert verify.difference(Two(1.0), Two(float("nan")), torch.ones(2, 3)) == float("inf")


def test_outputs_in_float64_are_numbers_alone():
    outputs = verify.outputs_in_double([nn.Linear(2, 3), nn.Linear(2, 3)], torch.ones(4, 2))
    assert [(y.dtype, y.requires_grad) for (y,) in outputs] == [(torch.float64, False)] * 2


def test_difference_is_taken_in_float64_and_leaves_the_models_as_they_are():
    torch.manual_seed(0)
    one, x = nn.Linear(4, 3), torch.rand(5, 4)
    other = nn.Linear(4, 3)
    other.load_state_dict({name: value * (1 + 1e-6) for name, value in one.state_dict().items()})
    assert verify.difference(one, one, x) == 0
    assert 1e-7 < verify.difference(one, other, x) < 1e-5
    assert one.weight.dtype == torch.float32


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(session, rebuilt model, its ONNX file, example)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))
    example = torch.rand(32, 1, 8, 8)
    session = jpq.compress(model, example, "djpq", bops="3%", steps=1)
    session.discretize()
    small, path = session.finalize(), tmp_path_factory.mktemp("verify") / "model.onnx"
    export_onnx(small, example, path)
    return session, small, path, example


def test_equal_models_pass_and_report_every_comparison(exported):
    session, small, path, example = exported
    found = verify.verify(session.net, small, path, [(example, None)], example)
    assert found["masked_vs_rebuilt_float64"] <= verify.EXACT
    assert found["rebuilt_vs_onnxruntime"]["argmax_differs"] == 0
    assert found["rebuilt_vs_onnxruntime_optimised"]["images"] == 32


@torch.no_grad()
def test_another_rebuilt_model_or_file_is_refused(exported, tmp_path):
    session, small, path, example = exported
    bias = small.get_parameter("4.bias")
    before = bias.clone()
    try:
        bias[0] += 1e-4
        with pytest.raises(JpqError, match="The rebuilt model is not the masked one"):
            verify.verify(session.net, small, path, [(example, None)], example)
        bias.copy_(before + torch.linspace(0, 30, 10))
        with pytest.raises(JpqError, match="decisions come out differently"):
            verify.exported(small, path, [(example, None)])
        bias.copy_(before * 1.001 + 0.01 * before.abs().max())  # the same classes, but every output is off
        assert "this is more than rounding" in verify.exported(small, path, [(example, None)])["warning"]
    finally:
        bias.copy_(before)


class Casts(nn.Module):
    """Reads bytes, and casts them to float32 in its code, which verification in float64 must follow."""

    def __init__(self, cast):
        super().__init__()
        self.cast, self.conv, self.norm, self.head = cast, nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.conv(self.cast(x))).relu().mean((2, 3)))


CASTS = {
    "float()": lambda x: x.float() / 255,
    "to(float32)": lambda x: x.to(torch.float32) / 255,
    "to(dtype=)": lambda x: x.to(dtype=torch.float32) / 255,
    "of integers": lambda x: x / 255,
}


@pytest.mark.parametrize("name", CASTS)
def test_models_that_cast_to_single_precision_are_verified(name, tmp_path):
    torch.manual_seed(0)
    x = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    session = jpq.compress(Casts(CASTS[name]).eval(), x, bops="8%", steps=1)
    small = session.finalize().eval()
    jpq.export_onnx(small, x, tmp_path / "m.onnx")
    record = jpq.verify(session.net, small, tmp_path / "m.onnx", [(x, None)], x)
    assert record["masked_vs_rebuilt_float64"] < 1e-9
    assert "warning" not in record
    assert small(x).dtype == torch.float32 == torch.get_default_dtype()


class Split(list):
    """Batches with their number of samples."""

    size = 32


@pytest.fixture
def split(exported):
    """The example's samples in four batches, with classes that the model gives."""
    _, small, _, example = exported
    with torch.no_grad():
        classes = small(example).argmax(1)
    return Split(zip(example.split(8), classes.split(8), strict=True))


def test_file_and_metric_are_checked_in_one_pass_of_each_network(exported, split):
    _, small, path, _ = exported
    apart = verify.exported(small, path, split, CLASSIFICATION)
    apart["metric"] = verify.compare_metrics(small, path, split, CLASSIFICATION)
    calls = []
    handle = small.register_forward_hook(lambda *_: calls.append(1))
    try:
        together = verify.exported_with_metric(small, path, split, CLASSIFICATION)
    finally:
        handle.remove()
    assert together == apart
    assert together["metric"] == {"file": 1.0, "model": 1.0}
    assert len(calls) == 4 + 1  # its double-precision copy has the hook too, and runs on the first batch


def test_outputs_that_are_kept_are_known_by_their_batch_and_belong_to_the_caller():
    runs = []
    net = verify.KeptOutputs(lambda x, scale=1: runs.append(1) or {"y": x * scale})
    one, two = torch.ones(2, 3), torch.zeros(2, 3)
    net(one)["y"].add_(5)
    assert torch.equal(net(two)["y"], two)
    assert torch.equal(net(one.clone())["y"], one)
    assert torch.equal(net(one, scale=2)["y"], 2 * one)
    assert torch.equal(net(one.double())["y"], one.double())
    assert len(runs) == 4


def test_outputs_are_not_kept_beyond_the_limit_or_for_unknown_parts(monkeypatch):
    runs = []
    net = verify.KeptOutputs(lambda *inputs: runs.append(1) or inputs[0] + 1)
    x, part = torch.ones(2, 3), object()
    for _ in range(2):
        assert torch.equal(net(x, part), x + 1)
    assert len(runs) == 2
    monkeypatch.setattr(verify, "KEPT_BYTES", 4 * 6)
    for number in (0, 1, 0, 1):
        assert torch.equal(net(x * number), x * number + 1)
    assert len(runs) == 5  # the first is kept, the second is not


def test_a_model_in_training_mode_is_judged_in_evaluation_mode():
    net = nn.Dropout(0.5).train()
    assert torch.equal(verify.KeptOutputs(net)(torch.ones(100)), torch.ones(100))
    assert net.training
