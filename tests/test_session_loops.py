"""Loops as people write them around a session: accumulated gradients, mixed precision, distillation, reports."""

import json

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from small_net import Small
from small_sessions import X, Y, build_small
from torch import nn

import jpq
from jpq.training.distillation import result_tensor


def session_of(method="uniform", steps=8, **settings):
    torch.manual_seed(0)
    return jpq.compress(build_small(), X, method, bops="4%", steps=steps, **settings).train()


@pytest.mark.usefixtures("traced")
def test_multipliers_move_once_in_a_step_however_often_gradients_are_accumulated():
    once, thrice = session_of("djpq"), session_of("djpq")
    for _ in range(3):
        first = once.pressure()
        others = [thrice.pressure() for _ in range(3)]
        assert all(torch.equal(first, other) for other in others[:1])
        assert once.controller.pressure == thrice.controller.pressure
        once.step(), thrice.step()
    assert once.controller.pressure["bops"] != 0.1, "they do move"


@pytest.mark.usefixtures("traced")
def test_accumulated_gradients_are_those_of_the_whole_batch():
    whole, parts = session_of("djpq").double().eval(), session_of("djpq").double().eval()  # no noise, no batch moments
    x = X.double()
    (F.cross_entropy(whole(x), Y) + whole.pressure()).backward()
    for rows in (slice(0, 4), slice(4, 8)):
        ((F.cross_entropy(parts(x[rows]), Y[rows]) + parts.pressure()) / 2).backward()
    gradients = [(a.grad, b.grad) for a, b in zip(whole.parameters(), parts.parameters(), strict=True)]
    assert sum(a is not None for a, _ in gradients) > 5
    for a, b in gradients:
        assert (a is None) == (b is None)
        if a is not None:
            # the second part's pressure has the multiplier that the first one moved
            assert torch.allclose(a, b, rtol=0.05, atol=1e-6)


def scaled_loop(session, kind, scale, steps):
    """Train under autocast with a GradScaler, whose first steps overflow and are skipped."""
    optimizer = torch.optim.Adam(session.groups())
    session.follow(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    for _ in range(steps):
        with torch.autocast("cpu", kind):
            output = session(X)
            loss = F.cross_entropy(output.float(), Y) + session.pressure()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return scaler


@pytest.mark.usefixtures("traced")
def test_steps_are_counted_once_where_an_optimizer_is_followed():
    session = session_of("djpq", steps=4)
    optimizer = torch.optim.Adam(session.groups())
    session.follow(optimizer)
    session.follow(optimizer)
    for by_hand in (False, True):
        optimizer.zero_grad()
        (F.cross_entropy(session(X), Y) + session.pressure()).backward()
        optimizer.step()
        assert session.done == 1 + by_hand
    session.step()
    session.step()
    with pytest.warns(UserWarning, match=r"2 times by the loop, and 2 times by the optimizer"):
        session.discretize()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("kind", "scale"), [(torch.bfloat16, 2.0**127), (torch.float16, 2.0**22)])
def test_mixed_precision_with_a_scaler_counts_the_steps_that_were_taken(kind, scale):
    session = session_of("djpq", steps=100)
    scaler = scaled_loop(session, kind, scale, 25)
    skipped = round(torch.log2(torch.tensor(scale / scaler.get_scale())).item())
    assert 0 < skipped < 25
    assert session.done == 25 - skipped
    assert all(p.isfinite().all() for p in session.parameters())


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("method", ["gdp", "dhp"])
def test_methods_that_read_gradients_themselves_refuse_a_scaled_loss(method):
    """A scaled price would close every channel in a few steps."""
    with pytest.raises(jpq.JpqError, match=rf"Method {method} .* multiplied by 65536: leave the GradScaler out"):
        scaled_loop(session_of(method), torch.bfloat16, 2.0**16, 3)


@pytest.mark.usefixtures("traced")
def test_a_search_in_bfloat16_meets_its_budget():
    session = session_of("djpq", steps=12)
    optimizer = torch.optim.Adam(session.groups())
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(session(X), Y) + session.pressure() + session.distill(session(X), X)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        session.step()
    small = session.finalize()
    full = jpq.costs.baseline(session.net.exact_usage())["bops"]
    assert 0.03 * full < jpq.measure(small, X)["bops"] <= 0.04 * full


@pytest.mark.usefixtures("traced")
def test_distillation_is_zero_for_the_teacher_itself_and_teaches():
    session = session_of("djpq")
    model = session._dense[0].eval()
    assert float(session.distill(model(X), X)) == pytest.approx(0, abs=1e-6)
    assert float(session.distill(model(X) + torch.eye(10)[:8], X)) > 0.01
    optimizer = torch.optim.Adam(session.groups(lr=1e-2))
    losses = []
    for _ in range(15):
        loss = session.distill(session(X), X, temperature=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert not any(p.grad is not None for p in model.parameters())


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Small()

    def forward(self, x):
        y = self.body(x)
        return {"loss": y.mean(), "logits": y}


def test_distillation_takes_logits_or_what_pick_chooses():
    session = jpq.compress(Pair().eval(), X, "uniform", bops="4%")
    assert float(session.distill(session(X), X)) >= 0
    assert torch.equal(
        session.distill(session(X), X), session.distill(session(X), X, pick=lambda output: output["logits"])
    )


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda s: s.distill(s(X), X, temperature=0), "temperature above 0"),
        (lambda s: s.distill(s(X), X[:4]), r"compares \[8, 10\] with the float model's \[4, 10\]"),
        (lambda s: s.distill((s(X), X), X), "gives 2 tensors: say which"),
        (lambda s: s.distill((s(X), X), X, pick=lambda output: 3), "pick gave a int"),
        (lambda s: s.follow(3), "takes an optimizer of torch"),
        (lambda s: s.report("/dev/null/here"), "cannot be written to"),
    ],
)
@pytest.mark.usefixtures("traced")
def test_bad_calls_end_in_a_sentence(call, says):
    with pytest.raises(jpq.JpqError, match=says):
        call(session_of())


def test_the_only_tensor_of_an_output_is_taken():
    assert result_tensor(([X], None)) is X
    with pytest.raises(jpq.JpqError, match="gives 0 tensors"):
        result_tensor({"hidden": None})


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("method", ["djpq", "uniform", "pdp"])
def test_report_says_what_the_small_model_costs(method, tmp_path):
    session = session_of(method, steps=4)
    optimizer = torch.optim.Adam(session.groups())
    for _ in range(4):
        loss = F.cross_entropy(session(X), Y) + session.pressure()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        session.step()
    searching = session.report().record
    assert searching["discretized"] == (method == "uniform")
    session.discretize()
    report = session.report(tmp_path / "report")
    counted = jpq.measure(session.finalize(), X)
    table = pd.read_csv(tmp_path / "report" / "layers.csv")
    stored = json.loads((tmp_path / "report" / "report.json").read_text())
    assert stored == report.record
    assert list(table.bops) == list(report.table.bops)
    assert table.bops.sum() == stored["costs"]["bops"]["amount"] == counted["bops"]
    assert stored["targets"]["bops"]["used"] <= 1
    assert stored["step"] == stored["steps"] == 4
    pictures = {"layers.png"} if method == "uniform" else {"layers.png", "curves.png"}
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == pictures
    assert [row["step"] for row in stored["history"]] == ([] if method == "uniform" else [1, 2, 3, 4])
    assert "decided\nbops: " in str(report)


@pytest.mark.usefixtures("traced")
def test_a_session_that_learnt_from_nan_says_so():
    session = session_of("djpq")
    optimizer = torch.optim.Adam(session.groups())
    (F.cross_entropy(session(X), Y) * torch.nan + session.pressure()).backward()
    optimizer.step()
    session.step()
    with pytest.raises(jpq.JpqError, match=r"Training has made '.*' NaN.*lower the learning rate"):
        session.finalize()
