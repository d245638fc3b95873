"""Searches on a net half of whose channels are dead: these close before any bit goes, and no live one does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import jpq
from jpq.tasks import data

WIDTH, LIVE = 16, 8


def bury(model):
    """Make every second half of the channels dead: nothing makes them, nothing reads them."""
    stem, norm, _, conv, norm2, _, _, _, head = model
    with torch.no_grad():
        for tensor in (stem.weight, norm.weight, norm.bias, conv.weight, norm2.weight, norm2.bias):
            tensor[LIVE:] = 0
        for reader in (conv, head):
            reader.weight[:, LIVE:] = 0


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", limit=600)


@pytest.fixture(scope="module")
def half_dead(digits):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, WIDTH, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()),
        *(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10)),
    )
    bury(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for epoch in range(8):
        for x, y in digits.train.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            bury(model)
    return model.eval()


def searched(model, digits, method, steps):
    """(session after a search onto 1 % of the BOPs, mean width of the start)."""
    torch.manual_seed(0)
    session = jpq.compress(copy.deepcopy(model), next(iter(digits.train.epoch(0)))[0], method, bops="1%", steps=steps)
    start = mean_width(session.net)
    optimizer = torch.optim.Adam(session.groups(lr=1e-3))
    session.train()
    batches = (batch for epoch in range(steps) for batch in digits.train.epoch(100 + epoch))
    for _, (x, y) in zip(range(steps), batches, strict=False):
        optimizer.zero_grad()
        (F.cross_entropy(session(x), y) + session.pressure()).backward()
        optimizer.step()
        session.step()
    return session, start


def mean_width(net):
    widths = [width.soft() for width in net.widths() if width.learns]
    return sum(widths) / len(widths)


def test_djpq_closes_dead_channels_before_it_lowers_bits(half_dead, digits):
    session, start = searched(half_dead, digits, "djpq", steps=80)
    assert mean_width(session.net) > start  # what the channels save, the bits may spend
    session.discretize()
    plan = session.net.plan()
    for kept in plan.kept.values():
        assert list(kept) == [True] * LIVE + [False] * (WIDTH - LIVE)
    assert min(layer.w_bits for layer in plan.layers.values()) > start


@pytest.mark.slow
@pytest.mark.parametrize("method", ["l0", "gdp", "dais", "bayesian-bits"])
def test_longer_searches_of_other_gates_close_the_dead_ones_too(half_dead, digits, method):
    session, start = searched(half_dead, digits, method, steps=240)
    assert mean_width(session.net) > start
    for gate in session.net.gates:
        assert gate.keep()[0].tolist() == [1.0] * LIVE + [0.0] * (WIDTH - LIVE)
