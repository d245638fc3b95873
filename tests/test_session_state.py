"""Copies, pickles and state dicts of a session in the middle of its search, and of the models it gives."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_sessions import X, Y, build_small
from torch import nn

import jpq

PATTERNS = {"scheme-mapping", "pdp-2:4", "upscale"}  # whose layers, sites or outputs another setting would change


def session_of(method="djpq", model=None, steps=6, bops="4%", **settings):
    """A session, its optimizer; the same bits every time."""
    torch.manual_seed(0)
    if method not in PATTERNS:
        settings.setdefault("output_bits", 8)
    session = jpq.compress(
        model or build_small(), X, method, bops=bops, steps=steps, evidence=[(X, Y)], **settings
    ).train()
    return session, torch.optim.Adam(session.groups())


def train(session, optimizer, steps, seed=0):
    """Train with the given seed for the draws of the gates; the parameters and buffers afterwards."""
    torch.manual_seed(seed)
    session.train()
    for _ in range(steps):
        loss = F.cross_entropy(session(X), Y) + session.pressure()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        session.step()
    return {name: value.clone() for name, value in session.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@torch.no_grad()
def outputs(model):
    return model.eval()(X)


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def saved(value):
    """What torch.save and torch.load make of it."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("method", sorted(jpq.METHODS))
def test_a_search_resumes_from_its_state_dict_to_the_same_bits(method, traced):
    session, optimizer = session_of(method)
    train(session, optimizer, 2)
    state = copy.deepcopy(saved({"session": session.state_dict(), "optimizer": optimizer.state_dict()}))
    whole = train(session, optimizer, 2, seed=1)
    again, restored = session_of(method)
    again.load_state_dict(state["session"])
    restored.load_state_dict(state["optimizer"])
    assert again.done == 2
    assert same(train(again, restored, 2, seed=1), whole)
    assert torch.equal(outputs(again.finalize()), outputs(session.finalize()))


@pytest.mark.parametrize("method", sorted(jpq.METHODS))
def test_copies_of_a_session_train_on_alike_and_apart(method, traced):
    session, optimizer = session_of(method)
    train(session, optimizer, 1)
    for other in (copy.deepcopy(session), pickled(session)):
        before = {name: value.clone() for name, value in session.state_dict().items()}
        assert same(other.state_dict(), before)
        other_optimizer = torch.optim.Adam(other.groups())
        other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        after = train(other, other_optimizer, 1, seed=2)
        assert same(session.state_dict(), before)  # the copy has nothing in common with its source
        twin = copy.deepcopy(session)
        twin_optimizer = torch.optim.Adam(twin.groups())
        twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert same(train(twin, twin_optimizer, 1, seed=2), after)


def test_sessions_of_deep_networks_are_copied_pickled_and_finalized():
    """Layers whose gates hold each other would be copied within each other: 60 layers exceed Python's recursion."""
    layers = [layer for _ in range(60) for layer in (nn.Conv2d(2, 2, 1), nn.ReLU())]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), *layers, nn.Flatten(), nn.LazyLinear(10)).eval()
    with torch.no_grad():
        model(X)
    session = jpq.compress(model, X, "djpq", bops="6%", steps=1)
    assert same(copy.deepcopy(session).state_dict(), session.state_dict())
    assert same(pickled(session).state_dict(), session.state_dict())
    assert copy.deepcopy(session.finalize())(X).shape == (len(X), 10)


@pytest.mark.parametrize("method", sorted(jpq.METHODS))
def test_small_models_are_copied_and_pickled(method, traced):
    session, _ = session_of(method)
    small = session.finalize()
    for other in (copy.deepcopy(small), pickled(small), saved(small)):
        assert torch.equal(outputs(other), outputs(small))
        before = outputs(small).clone()
        state = {k: v * 1.5 if v.is_floating_point() and "weight" in k else v for k, v in other.state_dict().items()}
        other.load_state_dict(state)  # brevitas sets its quantizers anew as it loads
        assert not torch.equal(outputs(other), before)
        assert torch.equal(outputs(small), before)
    assert torch.equal(outputs(pickled(session)), outputs(session))


def test_state_after_discretize_discretizes_a_new_session(traced):
    for method in ("djpq", "pdp", "two-stage", "uniform"):
        session, optimizer = session_of(method)
        train(session, optimizer, 2)
        session.discretize()
        train(session, torch.optim.Adam(session.groups()), 1)
        again, _ = session_of(method)
        again.load_state_dict(session.state_dict())
        assert again.progress == session.progress
        assert again.net.plan() == session.net.plan()
        assert float(again.pressure()) == 0
        assert torch.equal(outputs(again), outputs(session))
        assert torch.equal(outputs(again.finalize()), outputs(session.finalize()))


def test_state_from_before_discretize_needs_a_new_session(traced):
    for method in ("djpq", "two-stage"):
        session, _ = session_of(method)
        state = copy.deepcopy(session.state_dict())
        session.discretize()
        with pytest.raises(jpq.JpqError, match=r"before discretize.*new session"):
            session.load_state_dict(state)


def test_state_of_other_settings_or_of_another_network_is_refused(traced, monkeypatch):
    state = session_of("djpq")[0].state_dict()
    for other, text in (
        (session_of("l0"), "method='djpq'.*method='l0'"),
        (session_of(bops="3%"), "bops='4%'.*bops='3%'"),
        (session_of(steps=7), "steps=6.*steps=7"),
        (session_of(w_bits=(2, 4)), "w_bits"),
    ):
        with pytest.raises(jpq.JpqError, match=text):
            other[0].load_state_dict(state)
    monkeypatch.undo()
    wide = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten(), nn.Linear(180, 10)).eval()
    other = session_of(model=wide)[0]
    with pytest.raises(jpq.JpqError, match="another network"):
        other.load_state_dict(state)


def test_names_in_another_order_are_the_same_settings(traced):
    """A set has another order in each process."""
    session, _ = session_of(skip=("a", "head"))
    again, _ = session_of(skip=("head", "a"))
    again.load_state_dict(session.state_dict())
    with pytest.raises(jpq.JpqError, match="skip="):
        session_of(skip=("a",))[0].load_state_dict(session.state_dict())


def test_a_session_that_goes_back_to_a_checkpoint_goes_on_as_a_new_one(traced):
    session, optimizer = session_of()
    train(session, optimizer, 2)
    state = copy.deepcopy(session.state_dict())
    session.pressure()  # of a step that was not finished
    again, _ = session_of()
    for each in (session, again):
        each.load_state_dict(state)
        each.pressure()
    assert session.controller.pressure == again.controller.pressure


@pytest.mark.parametrize("damage", ["text", "short", "format", "done", "history", "controller"])
def test_damaged_state_is_refused_in_a_sentence(damage, traced):
    from jpq.compression import session_state

    session, _ = session_of()
    state = dict(session.state_dict())
    record = session_state.decode(state["_extra_state"])
    state["_extra_state"] = {
        "text": "pickle me",
        "short": state["_extra_state"][:40],
        "format": session_state.encode({**record, "format": 9}),
        "done": session_state.encode({**record, "done": -1}),
        "history": session_state.encode({**record, "history": "AAAA"}),
        "controller": session_state.encode({**record, "controller": {"start": {"bops": "x"}}}),
    }[damage]
    with pytest.raises(jpq.JpqError):
        session.load_state_dict(state)


def test_state_dict_holds_tensors_alone_and_keeps_its_size(traced):
    from safetensors.torch import load, save

    session, optimizer = session_of("l0")
    first = session.state_dict()
    later = train(session, optimizer, 3)
    assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in later.items()}
    stored = load(save({k: v.contiguous().clone() for k, v in later.items()}))
    again, _ = session_of("l0")
    again.load_state_dict(stored)
    assert again.done == 3


def test_session_inside_another_module_resumes_with_it(traced):
    session, optimizer = session_of()
    train(session, optimizer, 2)
    outer = nn.ModuleDict({"net": session})
    again = nn.ModuleDict({"net": session_of()[0]})
    again.load_state_dict(outer.state_dict())
    assert again["net"].done == 2
    assert again["net"].controller.pressure == session.controller.pressure


@pytest.mark.parametrize("discretized", [False, True])
def test_history_of_a_resumed_search_is_whole(discretized, traced):
    settings = {"steps": 4, "size": "30%"}
    session, optimizer = session_of(**settings)
    train(session, optimizer, 2)
    middle = copy.deepcopy(session.state_dict())
    train(session, optimizer, 2, seed=1)
    if discretized:
        session.discretize()
        middle = session.state_dict()
    again, restored = session_of(**settings)
    again.load_state_dict(middle)
    if not discretized:
        restored.load_state_dict(optimizer.state_dict())
        assert again.history.rows == session.history.rows[:2]
        train(again, restored, 2, seed=1)
    assert [row["step"] for row in again.report().record["history"]] == [1, 2, 3, 4]
    assert {"bops_multiplier", "size_limit"} <= again.history.rows[0].keys()


def test_states_from_before_histories_were_kept_are_read(traced):
    from jpq.compression import session_state

    session, optimizer = session_of()
    train(session, optimizer, 1)
    state = dict(session.state_dict())
    record = session_state.decode(state["_extra_state"])
    del record["history"]
    again, _ = session_of()
    again.load_state_dict({**state, "_extra_state": session_state.encode(record)})
    assert (again.done, again.history.rows) == (session.done, [])
