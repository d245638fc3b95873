"""Own calls of modules: who makes them, their numbers, and what happens when they are replaced."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from carried import through_torch_save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from jpq.tracing.own_calls import (
    OwnCall,
    ReplaceArguments,
    annotate_own_calls,
    call_of_node,
    observe_calls,
    original_class,
    own_call_actions,
    replace_calls,
)


def doubled(x: Tensor) -> Tensor:
    return torch.mul(x, 2.0)


class Child(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(self.fc(x).reshape(-1, 2, 4), 3.0).reshape(-1, 8)

    def helper(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 8)


class Base(nn.Module):
    def forward(me, x: Tensor) -> Tensor:
        return doubled(x).reshape(-1, 8)


class Parent(Base):
    def __init__(self) -> None:
        super().__init__()
        self.child, self.scale = Child(), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        x = super().forward(x)
        x = self.child(x) + self.child.helper(x)
        if x.shape[0] > 1:
            x = torch.mul(self.child(x), self.scale)
        return self.last(x) + shift

    def last(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 2, 4)


def recorded(model: nn.Module, x: Tensor) -> list[OwnCall | None]:
    calls: list[OwnCall | None] = []
    with observe_calls(model, lambda call, *_: calls.append(call)):
        model(x)
    return [call for call in calls if call is not None]


def test_calls_belong_to_the_forward_that_makes_them() -> None:
    model = nn.Sequential(Parent())
    calls = recorded(model, torch.randn(3, 8))
    assert [c.key for c in calls if c.module == "0"] == [
        "mul:0",
        "reshape:0",
        "reshape:1",
        "add:0",
        "mul:1",
        "reshape:2",
        "add:1",
    ], "a method of the child is a part of this forward"
    child = ["reshape:0", "mul:0", "reshape:1"]
    assert [c.key for c in calls if c.module == "0.child"] == child * 2, "each forward counts from 0"


def test_replaced_arguments() -> None:
    model, x = Parent(), torch.randn(3, 8)
    expected = model(x)
    replace_calls(model, {"mul:0": ReplaceArguments({(1,): 4.0})})
    replace_calls(model, {"reshape:2": ReplaceArguments({(1,): 3, (2,): 4, (3,): 2})})
    assert set(own_call_actions(model)) == {"mul:0", "reshape:2"}
    other = copy.deepcopy(model)
    assert model(x).shape == (3, 4, 2)
    plain = Parent()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(other(x / 2), plain(x).reshape(3, 4, 2))
    assert torch.equal(plain(x), expected)
    assert isinstance(model, Parent)
    assert original_class(model) is Parent
    assert original_class(plain) is Parent
    assert list(inspect.signature(model.forward).parameters) == ["x", "shift"]


def test_arguments_inside_lists_and_keywords() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([torch.reshape(x, shape=(2, 8)), x.view((4, 4)).view(2, 8)], dim=0)

    net, x = Net(), torch.arange(16.0)
    replace_calls(
        net,
        {
            "reshape:0": ReplaceArguments({("shape", 0): 4, ("shape", 1): 4}),
            "view:1": ReplaceArguments({(1,): 4, (2,): 4}),
            "cat:0": ReplaceArguments({("dim",): 1}),
        },
    )
    assert torch.equal(net(x), torch.cat([x.view(4, 4), x.view(4, 4)], 1))


def intercepted() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(Parent(), nn.Flatten()), torch.randn(3, 8)
    replace_calls(model[0], {"mul:0": ReplaceArguments({(1,): 5.0})})
    replace_calls(model[0].child, {"mul:0": ReplaceArguments({(1,): 0.5})})
    return model, x, model(x)


@pytest.mark.parametrize(
    "carry",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save],
    ids=["copy", "pickle", "save"],
)
def test_an_intercepted_module_is_carried(carry: Any) -> None:
    model, x, expected = intercepted()
    carried = carry(model)
    assert torch.equal(carried(x), expected)
    assert type(carried[0]) is type(model[0])
    with torch.no_grad():
        carried[0].scale.zero_()
    assert torch.equal(model(x), expected)
    assert set(carried.state_dict()) == set(model.state_dict())


def test_an_intercepted_module_is_exported() -> None:
    model, x, expected = intercepted()
    program = torch.export.export(model, (x,), strict=False).module()
    assert torch.allclose(program(x), expected)
    traced = torch.jit.trace(model, (x,), check_trace=False)
    assert torch.allclose(traced(x), expected)


def test_a_compiled_module_computes_the_same() -> None:
    model, x, expected = intercepted()
    assert torch.allclose(torch.compile(model, backend="eager")(x), expected)


def test_nodes_know_their_call_also_where_calls_are_replaced() -> None:
    model, x, _ = intercepted()

    def calls() -> set[OwnCall]:
        with annotate_own_calls(model):
            program = torch.export.export(model, (x,), strict=False)
        return {call for node in program.graph.nodes if (call := call_of_node(node)) is not None}

    found = calls()
    assert {OwnCall("0", "reshape:1"), OwnCall("0.child", "mul:0"), OwnCall("0", "mul:1")} <= found


def test_a_module_that_calls_itself_counts_each_forward() -> None:
    class Again(nn.Module):
        def forward(self, x: Tensor, depth: int = 1) -> Tensor:
            x = torch.mul(x, 2.0)
            x = self(x, depth - 1) if depth else x
            return torch.mul(x, 3.0)

    net, x = Again(), torch.ones(1)
    assert [c.key for c in recorded(net, x)] == ["mul:0", "mul:0", "mul:1", "mul:1"]
    replace_calls(net, {"mul:1": ReplaceArguments({(1,): 1.0})})
    assert net(x).item() == 4.0


def test_checkpointed_parts_are_nobodys_calls() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda y: torch.mul(y, 2.0), x, use_reentrant=False).relu()

    assert [c.key for c in recorded(Net(), torch.ones(1))] == ["relu:0"]


def test_gradients_pass() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w).mul(2.0)

    net = Net()
    replace_calls(net, {"mul:0": ReplaceArguments({(1,): 3.0})})
    net(torch.ones(1, 2)).sum().backward()
    assert torch.equal(net.w.grad, torch.full((2, 2), 3.0))
