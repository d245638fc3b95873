"""Batch sizes that code reads in any way: exported files take any batch and compute the same."""

import builtins
import math
import threading
import warnings
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import jpq
from jpq.export import FORMATS, write_formats
from jpq.export.onnx.export import export_float, export_qonnx
from jpq.export.onnx.quant_nodes import expand_quant_nodes
from jpq.export.program import Program, capture_program
from jpq.export.runtimes import Session
from jpq.export.torch_export import export_pt2
from jpq.export.trial_export import check_exportable
from jpq.tracing.forward import first_samples, split_samples, take_samples
from jpq.tracing.trace import trace
from jpq.tracing.traced_lengths import traced_lengths
from jpq.types import JpqError

ROW = torch.arange(8.0)[None] / 8

READERS = {  # x: [batch, 8]
    "len": lambda x: x.reshape(len(x), -1),
    "slice to len": lambda x: torch.cat([x, x * 2])[: len(x)] * 3,
    "shape[0]": lambda x: x.reshape(x.shape[0], 2, 4).flatten(1),
    "size(0)": lambda x: x.view(x.size(0), -1),
    "expand(len)": lambda x: x + ROW.expand(len(x), -1),
    "repeat(len)": lambda x: x + ROW.repeat(len(x), 1),
    "zeros(len)": lambda x: x + torch.zeros(len(x), 8),
    "full(len)": lambda x: x + torch.full((len(x), 8), 0.5),
    "arange(len)": lambda x: x[torch.arange(len(x))] * (torch.arange(len(x))[:, None] + 1),
    "windows of len": lambda x: (x.unflatten(1, (2, 4)).flatten(0, 1) * 2).reshape(len(x), 8),
    "prod of the shape": lambda x: x.reshape(math.prod(x.shape[:2])).reshape(-1, 8),
    "len of a list": lambda x: x * len([x, x]),
    "divided by len": lambda x: x / len(x),
}


class Reads(nn.Module):
    """A layer, and code that reads the batch size of its output."""

    def __init__(self, read):
        super().__init__()
        self.layer, self.read = nn.Linear(4, 8), read

    def forward(self, x):
        return self.read(self.layer(x))


@torch.no_grad()
@pytest.mark.parametrize("name", READERS)
def test_files_take_any_batch(name, tmp_path):
    torch.manual_seed(0)
    model = Reads(READERS[name]).eval()
    example = torch.randn(2, 4)
    export_float(model, example, tmp_path / "m.onnx")
    export_pt2(model, example, tmp_path / "m.pt2")
    session, program = Session(tmp_path / "m.onnx"), torch.export.load(tmp_path / "m.pt2").module()
    for batch in (2, 1, 5):
        x = torch.randn(batch, 4)
        torch.testing.assert_close(session(x), model(x))
        torch.testing.assert_close(program(x), model(x))


@torch.no_grad()
def test_a_saved_model_takes_any_batch(tmp_path):
    example, x = torch.randn(2, 4), torch.randn(5, 4)
    small = jpq.compress(Reads(READERS["expand(len)"]).eval(), example, bops="20%", steps=1).finalize()
    jpq.save(small, tmp_path / "kept", example)
    loaded, _ = jpq.load(tmp_path / "kept")
    torch.testing.assert_close(loaded(x), small(x), rtol=0, atol=0)


@torch.no_grad()
def test_a_pt2_file_keeps_the_limits_that_code_sets(tmp_path):
    def limited(x):
        assert len(x) < 100
        return x * 2

    model = Reads(limited).eval()
    export_pt2(model, torch.randn(2, 4), tmp_path / "m.pt2")
    program = torch.export.load(tmp_path / "m.pt2").module()
    for x in (torch.randn(1, 4), torch.randn(99, 4)):
        torch.testing.assert_close(program(x), model(x))
    with pytest.raises((RuntimeError, AssertionError)):
        program(torch.randn(100, 4))


LOOPS = {
    "range": lambda x: torch.stack([x[i] for i in range(len(x))]),
    "split": lambda x: torch.cat(list(x.split(1))),
    "int": lambda x: x.reshape(int(x.shape[0]), -1),
}


@torch.no_grad()
@pytest.mark.parametrize("name", LOOPS)
def test_an_onnx_file_of_code_that_loops_over_samples_takes_them_one_by_one(name, tmp_path):
    torch.manual_seed(0)
    model, path = Reads(LOOPS[name]).eval(), tmp_path / "m.onnx"
    with pytest.warns(UserWarning, match=r"m.onnx takes one sample at a time"):
        export_float(model, torch.randn(2, 4), path)
    shapes = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in onnx.load(path).graph.input]
    assert shapes == [[1, 4]], "the file says so"
    for batch in (1, 3):
        x = torch.randn(batch, 4)
        torch.testing.assert_close(Session(path)(x), model(x))


@torch.no_grad()
def test_a_count_that_only_values_depend_on_is_noticed(tmp_path):
    torch.manual_seed(0)
    model, path = Reads(lambda x: x / int(x.shape[0])).eval(), tmp_path / "m.onnx"
    with pytest.warns(UserWarning, match=r"m.onnx takes one sample at a time"):
        export_float(model, torch.randn(4, 4), path)
    x = torch.randn(1, 4)
    torch.testing.assert_close(Session(path)(x), model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for free in (lambda x: x + torch.rand_like(x), lambda x: x - x.mean(0)):  # random, and rounding alone
            export_float(Reads(free).eval(), torch.randn(1, 4), path)


class OtherInTraining(nn.Module):
    """A network that gives other outputs in training, as Ultralytics' detectors do, with parts that differ there."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = nn.functional.dropout(self.norm(self.first(x)), 0.5, self.training)
        scores = self.last(hidden)
        return {"scores": scores} if self.training else {"scores": scores, "hidden": hidden}


@torch.no_grad()
def test_files_of_several_outputs_are_compared_with_the_model_in_evaluation_mode(tmp_path):
    torch.manual_seed(0)
    example, x = torch.randn(8, 4), torch.randn(3, 4)
    small = jpq.compress(OtherInTraining().eval(), example, bops="20%", steps=1).finalize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jpq.export_onnx(small, example, tmp_path / "m.onnx")
        export_float(OtherInTraining().eval(), example, tmp_path / "float.onnx")
    torch.testing.assert_close(Session(tmp_path / "m.onnx")(x), tuple(small(x).values()))


def test_first_samples_are_repeated_where_there_are_fewer():
    x, table = torch.arange(3.0)[:, None], torch.zeros(5, 2)
    assert first_samples((x, {"t": table}), 2)[0].tolist() == [[0.0], [1.0]]
    more, unchanged = first_samples((x, {"t": table}), 7)
    assert more.flatten().tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert unchanged["t"] is table


class WithState(nn.Module):
    """A recurrent layer whose first state is an input, [layers, batch, units]."""

    def __init__(self, layers):
        super().__init__()
        self.cell, self.layer = nn.GRU(4, 5, layers, batch_first=True), nn.Linear(5, 3)

    def forward(self, x, state):
        y, state = self.cell(x, state)
        return self.layer(y), state


@pytest.mark.parametrize("layers", [1, 2])
def test_every_form_takes_states_of_recurrent_layers(layers, tmp_path):
    torch.manual_seed(0)
    example = torch.randn(3, 6, 4), torch.randn(layers, 3, 5)
    model = jpq.decompose(WithState(layers).eval(), example)
    session = jpq.compress(model, example, bops="30%", steps=1)
    check_exportable(session.net, model, example, FORMATS, "int8")  # on the first two samples
    small = session.finalize()
    for name, record in write_formats(small, example, tmp_path, tuple(FORMATS), [(example, None)]).items():
        found = record["verified"].get("rebuilt_vs_onnxruntime", record["verified"])
        assert found["largest_relative_difference"] < 0.2, name
    program = torch.export.load(tmp_path / "model.pt2").module()
    x, state = torch.randn(5, 6, 4), torch.randn(layers, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(program(x, state), small(x, state))


@torch.no_grad()
@pytest.mark.parametrize(
    ("read", "batches"),
    [(lambda x: x.reshape(2, 8), (2,)), (lambda x: x[:, :, None].squeeze() * 2, (2, 3))],
    ids=["a fixed batch", "squeeze"],
)
def test_a_model_that_takes_no_other_batch_or_not_one_is_exported_without_a_warning(read, batches, tmp_path):
    model = Reads(read).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export_float(model, torch.randn(2, 4), tmp_path / "m.onnx")
    for batch in batches:
        x = torch.randn(batch, 4)
        torch.testing.assert_close(Session(tmp_path / "m.onnx")(x), model(x))


@pytest.mark.parametrize("name", LOOPS)
def test_a_pt2_file_of_code_that_loops_over_samples_is_refused(name, tmp_path):
    with pytest.raises(JpqError, match=r"fixes the number of samples at 2.*loop over samples"):
        export_pt2(Reads(LOOPS[name]).eval(), torch.randn(2, 4), tmp_path / "m.pt2")


def test_a_graph_of_code_that_loops_over_samples_takes_the_samples_of_its_example_alone():
    example = torch.randn(2, 4)
    record, tensors = capture_program(Reads(LOOPS["range"]).eval(), example)
    program = Program(record, {}, tensors)
    assert program(example).shape == (2, 8)
    with pytest.raises(JpqError, match=r"takes torch.float32 \[2, 4\], as it was saved; it got .*\[3, 4\]"):
        program(torch.randn(3, 4))


def test_len_is_pythons_own_in_other_threads_and_for_other_objects():
    seen = []
    with traced_lengths():
        assert len([1, 2]) == 2
        other = threading.Thread(target=lambda: seen.append(len(torch.zeros(3, 2))))
        other.start()
        other.join()
        with pytest.raises(TypeError, match="0-d tensor"):
            len(torch.tensor(1))
    assert seen == [3]
    assert type(seen[0]) is int


def test_len_is_pythons_own_after_an_error():
    own = builtins.len
    with pytest.raises(ZeroDivisionError), traced_lengths():
        raise ZeroDivisionError
    assert builtins.len is own


class Streaming(nn.Module):
    """A recurrent layer that takes its last states, [1, batch, units], and gives the new ones."""

    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x, h, c):
        y, (h, c) = self.cells(x, (h, c))
        return self.head(y), h, c


@torch.no_grad()
def test_states_of_recurrent_layers_take_any_batch(tmp_path):
    def inputs(count):
        return torch.randn(count, 5, 4), torch.randn(1, count, 6), torch.randn(1, count, 6)

    torch.manual_seed(0)
    small = jpq.compress(Streaming().eval(), inputs(2), bops="6%", steps=1).finalize().eval()
    jpq.export_onnx(small, inputs(2), tmp_path / "m.onnx")
    jpq.save(small, tmp_path / "kept")
    loaded, _ = jpq.load(tmp_path / "kept")
    for count in (1, 2, 7):
        x = inputs(count)
        expected = small(*x)
        for found in (loaded(*x), Session(tmp_path / "m.onnx", optimised=False)(*x), Session(tmp_path / "m.onnx")(*x)):
            torch.testing.assert_close(tuple(found), expected)


def test_samples_of_states_lie_along_their_second_dim() -> None:
    x, states = torch.arange(4.0)[:, None], torch.arange(8.0).reshape(2, 4, 1)
    taken = take_samples((x, states), 1, 3)
    assert taken[0].flatten().tolist() == [1, 2]
    assert taken[1].flatten().tolist() == [1, 2, 5, 6]
    assert [len(part[0]) for part in split_samples((x, states), 3)] == [3, 1]


class Conditioned(nn.Module):
    """An image model whose channels are scaled by what a layer makes of a vector of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Linear(6, 8)
        self.latent = nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)) * self.scale(self.latent)[:, None, None]).mean((2, 3))


def test_a_layer_that_reads_a_vector_of_parameters_does_not_make_the_batch_one_sample(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8, 8)
    once = 6 * 8  # the same for any number of samples
    macs = 64 * (27 * 8 + 8 * 4) + once
    model = Conditioned().eval()
    assert trace(model, x).macs == jpq.measure(model, x)["macs"] == macs
    export_float(model, x, tmp_path / "m.onnx")
    with torch.no_grad():
        torch.testing.assert_close(Session(tmp_path / "m.onnx")(x[:3]), model(x[:3]), rtol=1e-4, atol=1e-5)
    net = jpq.compress(model, x, method="uniform", bops="100%", steps=1)
    with pytest.raises(JpqError, match=r"Layer 'scale' reads a parameter that is a vector.*p\[None\]"):
        jpq.export_onnx(net.finalize(), x, tmp_path / "m.onnx")


def test_files_of_one_sample_without_a_batch_dim(tmp_path: Path) -> None:
    x = torch.randn(3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    small = jpq.compress(model, x, method="uniform", bops="100%", steps=1).finalize()
    jpq.export_onnx(small, x, tmp_path / "m.onnx")
    export_qonnx(small, x, tmp_path / "q.onnx")
    with torch.no_grad():
        for file in (tmp_path / "m.onnx", expand_quant_nodes(onnx.load(tmp_path / "q.onnx"))):
            torch.testing.assert_close(Session(file, optimised=False)(x), small(x), rtol=1e-4, atol=1e-5)
