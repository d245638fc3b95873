"""Recurrent modules as steps of plain layers: the same outputs, prunable units, counted MACs, files that run."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import jpq
from jpq.export.float_equivalence import check_equivalence, randomize, relative_difference
from jpq.export.runtimes import Session
from jpq.export.verify import difference
from jpq.tracing.decompose import decompose
from jpq.tracing.recurrent import Recurrent
from jpq.tracing.sites import channels
from jpq.types import JpqError

T, B, FEATURES, UNITS = 6, 2, 5, 7

KINDS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "gru": (nn.GRU, {}),
    "lstm": (nn.LSTM, {}),
    "projected lstm": (nn.LSTM, {"proj_size": 3}),
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
}


class Classifier(nn.Module):
    """The last step of a recurrent layer, classified."""

    def __init__(self, rnn: nn.RNNBase, width: int):
        super().__init__()
        self.rnn, self.fc1, self.fc2 = rnn, nn.Linear(width, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.flatten_parameters()
        return self.fc2(torch.relu(self.fc1(self.rnn(x)[0][:, -1])))


class LastStates(nn.Module):
    """The last states of both directions, as text classifiers read them, from h and from c."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(FEATURES, 8, 2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(8 * 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, c) = self.rnn(x)
        return self.fc(torch.cat((h[-2], h[-1], c[-1]), 1))


class CRNN(nn.Module):
    """Convolutions, whose columns are the time steps of two bidirectional layers; a class for every column."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 6, 3, (2, 1), 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 1, 1))
        self.rnn = nn.GRU(8 * 4, 8, 2, bidirectional=True, dropout=0.1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(1, 2).permute(2, 0, 1)  # [width, batch, channels * height]
        return self.fc(self.rnn(y)[0]).transpose(0, 1)


class Tagger(nn.Module):
    """A tag for every token, from an embedding and an LSTM whose first state the model computes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.start = nn.Embedding(11, 6), nn.Linear(6, 2 * 8)
        self.rnn, self.fc = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        h, c = self.start(x.mean(1)).chunk(2, -1)
        return self.fc(torch.tanh(self.rnn(x, (h.unsqueeze(0), c.unsqueeze(0)))[0]))


class Unrolled(nn.Module):
    """A loop over cells in the model's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.GRUCell(FEATURES, 8), nn.LSTMCell(8, 6), nn.RNNCell(6, 9)
        self.fc = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        a: Tensor | None = None
        b: Any = None
        c: Tensor | None = None
        for t in range(4):
            a = self.first(x[:, t], a)
            b = self.second(a, b)
            c = self.third(b[0], c)
        return self.fc(c)


NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "gru": (lambda: Classifier(nn.GRU(FEATURES, 12, batch_first=True), 12), (T, FEATURES)),
    "two lstms": (lambda: Classifier(nn.LSTM(FEATURES, 12, 2, batch_first=True), 12), (T, FEATURES)),
    "projected lstm": (lambda: Classifier(nn.LSTM(FEATURES, 12, 2, batch_first=True, proj_size=6), 6), (T, FEATURES)),
    "bidirectional": (lambda: Classifier(nn.RNN(FEATURES, 6, 2, batch_first=True, bidirectional=True), 12), (T, 5)),
    "last states": (LastStates, (T, FEATURES)),
    "crnn": (CRNN, (1, 8, 6)),
    "tagger": (Tagger, (T,)),
    "cells": (Unrolled, (4, FEATURES)),
}


def net_and_example(name: str) -> tuple[nn.Module, Tensor]:
    """The net, in evaluation mode, and a batch of 3 for it."""
    make, shape = NETS[name]
    torch.manual_seed(0)
    return make().eval(), torch.randint(0, 11, (3, *shape)) if name == "tagger" else torch.randn(3, *shape)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_compute_what_torch_computes(kind: str) -> None:
    make, fixed = KINDS[kind]
    switches = itertools.product((1, 2), *[(False, True)] * 5)
    for layers, bidirectional, batch_first, bias, unbatched, given in switches:
        torch.manual_seed(0)
        options = {"bidirectional": bidirectional, "batch_first": batch_first, "bias": bias, **fixed}
        theirs = make(FEATURES, UNITS, layers, dtype=torch.double, **options)
        ours = decompose(theirs)
        assert type(ours) is Recurrent
        assert (ours.hidden_size, ours.proj_size, ours.input_size) == (UNITS, fixed.get("proj_size", 0), FEATURES)
        batch = () if unbatched else (B,)
        x = torch.randn(*((B, T) if batch_first and batch else (T, *batch)), FEATURES, dtype=torch.double)
        cells = layers * (1 + bidirectional)
        h, c = (torch.randn(cells, *batch, n, dtype=torch.double) for n in (ours.proj_size or UNITS, UNITS))
        state = None if not given else (h, c) if make is nn.LSTM else h
        expected, actual = tree_leaves(theirs(x, state)), tree_leaves(ours(x, state))
        assert len(actual) == (3 if make is nn.LSTM else 2)
        assert relative_difference(expected, actual) < 1e-12


@pytest.mark.parametrize(
    "cell", [nn.GRUCell, nn.LSTMCell, nn.RNNCell, lambda i, h, **o: nn.RNNCell(i, h, nonlinearity="relu", **o)]
)
def test_cells_compute_what_torch_computes(cell: Any) -> None:
    for bias, batch, given in itertools.product((True, False), ((), (B,)), (False, True)):
        torch.manual_seed(0)
        theirs = cell(FEATURES, UNITS, bias=bias, dtype=torch.double)
        x, h = (torch.randn(*batch, n, dtype=torch.double) for n in (FEATURES, UNITS))
        state = None if not given else (h, h.cos()) if isinstance(theirs, nn.LSTMCell) else h
        expected, actual = theirs(x, state), decompose(theirs)(x, state)
        assert type(expected) is type(actual)
        assert relative_difference(tree_leaves(expected), tree_leaves(actual)) < 1e-12


def test_gradients_are_those_of_torch() -> None:
    torch.manual_seed(0)
    theirs = nn.LSTM(FEATURES, UNITS, 2, dtype=torch.double, bidirectional=True)
    ours, x = decompose(theirs), torch.randn(T, B, FEATURES, dtype=torch.double)
    for m in (theirs, ours):
        m(x)[0].square().sum().backward()
    theirs_grads = [theirs.weight_ih_l0.grad, theirs.weight_hh_l1_reverse.grad, theirs.bias_hh_l0.grad]
    ours_grads = [ours.l0.inputs.weight.grad, ours.l1_reverse.hidden.weight.grad, ours.l0.hidden.bias.grad]
    assert relative_difference(theirs_grads, ours_grads) < 1e-12


def test_dropout_lies_between_layers_and_only_in_training() -> None:
    ours = decompose(nn.GRU(FEATURES, UNITS, 2, dropout=1.0))
    x = torch.randn(T, B, FEATURES)
    assert ours.training
    first, second = (ours(3 * x)[0], ours(x)[0])
    assert torch.equal(first, second), "the second layer reads nothing but zeros"
    ours.eval()
    assert not torch.equal(ours(3 * x)[0], ours(x)[0])
    single = decompose(nn.GRU(FEATURES, UNITS, 1)).train()
    assert torch.equal(single(x)[0], single(x)[0])


@pytest.mark.parametrize("name", NETS)
def test_hidden_units_go_and_masked_equals_rebuilt(name: str) -> None:
    model, x = net_and_example(name)
    plain = decompose(model)
    network = jpq.trace(plain, x)
    sites = channels(network)
    rnn = {layer.name for layer in network.layers if layer.name.endswith(".hidden")}
    assert rnn <= {tap.layer for site in sites for tap in site.taps}, "every hidden state can lose units"
    assert "the model's code has fixed sizes there" not in " ".join(network.frozen.values())
    for seed in range(2):
        result = check_equivalence(randomize(decompose(model), x, seed), network, sites, x, seed)
        assert result.difference < 1e-12
        assert result.dropped > 0


@pytest.mark.parametrize("name", NETS)
def test_macs_are_those_of_an_independent_counter(name: str) -> None:
    model, x = net_and_example(name)
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        model(x)  # the counter does not look into oneDNN's fused LSTM
    counted = sum(layer.macs for layer in jpq.trace(decompose(model), x).layers)
    assert counted == counter.get_total_flops() / 2 / len(x)


@pytest.mark.parametrize("name", ["crnn", "two lstms", "projected lstm", "cells"])
def test_compressed_it_trains_and_its_file_computes_the_same(name: str, tmp_path: Path) -> None:
    model, x = net_and_example(name)
    net = jpq.compress(model, x, bops="6%", macs="70%", steps=3)
    optimizer = torch.optim.Adam(net.groups())
    net.train()
    for _ in range(3):
        optimizer.zero_grad()
        (net(x).square().mean() + net.pressure()).backward()
        assert all(p.grad is not None for p in net.net.weights()["decayed"])
        optimizer.step()
        net.step()
    small = net.finalize()
    assert net.share() <= 0.06
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert difference(net.net, small, x) < 1e-12
    jpq.export_onnx(small, x, tmp_path / "net.onnx")
    more = torch.cat([x, x.flip(0)])[:5]  # another number of samples
    assert torch.allclose(Session(tmp_path / "net.onnx", optimised=False)(more), small(more), atol=1e-5)


def test_a_weight_of_every_step_is_stored_once(tmp_path: Path) -> None:
    sizes = []
    for steps in (2, 12):
        model, x = Classifier(nn.GRU(FEATURES, 96, batch_first=True), 96).eval(), torch.randn(3, steps, FEATURES)
        jpq.export_onnx(jpq.compress(model, x, bops="10%", steps=1).finalize(), x, tmp_path / "net.onnx")
        sizes.append((tmp_path / "net.onnx").stat().st_size)
    assert sizes[1] - sizes[0] < 10 * 3 * 96 * 96 / 2, "ten more steps are nodes, not weights"


def test_what_it_does_not_take_is_a_sentence() -> None:
    gru = decompose(nn.GRU(FEATURES, UNITS, batch_first=True))
    with pytest.raises(JpqError, match="Give the padded tensor"):
        gru(pack_sequence([torch.randn(T, FEATURES), torch.randn(T - 1, FEATURES)]))
    with pytest.raises(JpqError, match="at least one time step"):
        gru(torch.randn(B, 0, FEATURES))
    with pytest.raises(JpqError, match="2 or 3 dims"):
        gru(torch.randn(FEATURES))
    with pytest.raises(JpqError, match="first dim must be 1"):
        gru(torch.randn(B, T, FEATURES), torch.randn(2, B, UNITS))
    with pytest.raises(JpqError, match="at least one time step"):
        jpq.compress(Classifier(nn.GRU(FEATURES, 12, batch_first=True), 12), torch.randn(B, 0, FEATURES), bops="5%")


def test_a_subclass_stays_as_it_is() -> None:
    class Odd(nn.GRU):
        pass

    assert type(decompose(Odd(2, 3))) is Odd
