"""A loop of accelerate around a session: accumulated gradients, mixed precision, saved state."""

import pytest
import torch
import torch.nn.functional as F
from small_net import Small
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import jpq

accelerate = pytest.importorskip("accelerate", reason='needs the extra: pip install "jpq[accelerate]"')

from jpq.integrations.accelerate import prepare  # noqa: E402

X = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(64) % 4


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerators of one process share their state; each test begins anew."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def session_of(steps):
    torch.manual_seed(0)
    session = jpq.compress(Small().eval(), X[:16], bops="4%", steps=steps)
    return session.train(), torch.optim.Adam(session.groups())


def train(accelerator, session, optimizer, loader, seed=0):
    torch.manual_seed(seed)
    for x, y in loader:
        with accelerator.accumulate(session):
            loss = F.cross_entropy(session(x), y) + session.pressure()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_steps_of_accumulated_gradients_are_counted_and_the_budget_is_met(precision):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    loader = DataLoader(TensorDataset(X, Y), batch_size=8)
    session, optimizer, loader = prepare(accelerator, *session_of(12), loader)
    for epoch in range(3):
        train(accelerator, session, optimizer, loader, epoch)
    assert session.done == 12
    small = accelerator.unwrap_model(session).finalize()
    full = jpq.costs.baseline(session.net.exact_usage())["bops"]
    assert 0.036 * full < jpq.measure(small, X[:8])["bops"] <= 0.04 * full


def test_saved_state_resumes_to_the_same_bits(tmp_path):
    smalls = []
    for resumed in (False, True):
        accelerator = accelerate.Accelerator(cpu=True)
        session, optimizer, loader = prepare(
            accelerator, *session_of(16), DataLoader(TensorDataset(X, Y), batch_size=8)
        )
        if resumed:
            accelerator.load_state(tmp_path)
        else:
            train(accelerator, session, optimizer, loader)
            accelerator.save_state(tmp_path)
        train(accelerator, session, optimizer, loader, seed=1)
        assert session.done == 16
        smalls.append(session.finalize().state_dict())
    assert all(torch.equal(value, smalls[1][name]) for name, value in smalls[0].items())


def test_what_is_no_session_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(jpq.JpqError, match=r"session of jpq\.compress first, and got Linear"):
        prepare(accelerate.Accelerator(cpu=True), model, torch.optim.SGD(model.parameters()))
