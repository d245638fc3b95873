"""Sessions of `Small` for tests of loops and of saved states: the network is traced once for all of them."""

from __future__ import annotations

import pytest
import torch
from small_net import Small

from jpq.allocation import prepare
from jpq.tracing.network import Network
from jpq.tracing.trace import trace

X = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) // 2


def build_small() -> Small:
    """A `Small` with the same random weights every time, in evaluation mode."""
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="session")
def small_network() -> Network:
    """The trace of `Small`."""
    return trace(build_small(), (X,))


@pytest.fixture
def traced(small_network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions of `Small` are made without tracing it anew."""
    monkeypatch.setattr(prepare, "trace", lambda *_, **__: small_network)
